// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test of dirty logging with a guest (L1) that has a guest of its own (L2), on
 * Intel
 *
 * What L2 itself writes is in dirty_ring_paths_test. Here it is what KVM and the
 * CPU do for L1 and L2 behind their backs. Show, one case each, that
 *  - nothing is reported that was not written, if dirty pages are asked for while
 *    KVM has another VMCS loaded than the vCPU's,
 *  - what the CPU writes to L1's virtual-APIC page and posted-interrupt descriptor
 *    while L2 runs is reported to who asks, although the vCPU does not exit,
 *  - they are reported once, and not at each exit,
 *  - what KVM writes to an enlightened VMCS is reported,
 *  - a VM can go while L2 is active, and no ring has room for L1's pages.
 */

#define _GNU_SOURCE /* for program_invocation_name */

#include <pthread.h>
#include <sys/ioctl.h>
#include <time.h>

#include "test_util.h"
#include "kvm_util.h"
#include "dirty_ring_vm.h"
#include "processor.h"
#include "test_cases.h"
#include "vmx.h"

/* More pages than the CPU's log, or the smallest ring, has entries */
#define PAGES		2048
#define PAGE_SIZE	4096
#define RING_ENTRIES	4096

/* Pages of the memslot that L1 has the CPU or KVM write to */
#define VIRTUAL_APIC	5
#define POSTED		6
#define EVMCS		9

#define VTPR		0x80
#define POSTED_VECTOR	0xe1

#define APIC_SPIV		0xf0
#define APIC_SPIV_APIC_ENABLED	0x100

struct posted_interrupts {
	uint64_t requests[4];
	uint64_t outstanding;
};

/* Seconds for cases that look for what happens only now and then */
#define SECONDS		5

/* Shared with the guest. */
static struct {
	/* L2's code, and what L1 switches on for it */
	void *l2;
	uint64_t tpr_shadow;
	uint64_t posted;
	uint64_t rounds;
	uint64_t quit;
} shared;

static struct ring_vm *rv;

/* The same in this process */
static typeof(shared) *guest_shared(void)
{
	return addr_gva2hva(rv->vm, (vm_vaddr_t)&shared);
}

/* L2 */

static void l2_calls(void)
{
	while (true)
		vmcall();
}

static void l2_exits(void)
{
	while (true) {
		GUEST_SYNC(2);
		vmcall();
	}
}

/* The CPU writes to the virtual-APIC page, and nothing exits. */
static void l2_writes_tpr(void)
{
	uint64_t tpr = 0;

	while (!READ_ONCE(shared.quit)) {
		tpr = (tpr + 1) % 16;
		asm volatile("mov %0, %%cr8" : : "r" (tpr) : "memory");
	}
	vmcall();
}

/* The CPU takes posted interrupts, and delivers none: their priority is too low. */
static void l2_spins(void)
{
	asm volatile("mov %0, %%cr8" : : "r" (15UL) : "memory");
	while (!READ_ONCE(shared.quit))
		WRITE_ONCE(shared.rounds, shared.rounds + 1);
	vmcall();
}

/* L1 */

static void l1_prepare(struct vmx_pages *vmx, unsigned long *stack_end)
{
	GUEST_ASSERT(prepare_for_vmx_operation(vmx));
	GUEST_ASSERT(load_vmcs(vmx));
	prepare_vmcs(vmx, shared.l2, stack_end);
	if (!shared.tpr_shadow)
		return;
	vmwrite(CPU_BASED_VM_EXEC_CONTROL,
		(vmreadz(CPU_BASED_VM_EXEC_CONTROL) | CPU_BASED_TPR_SHADOW) &
		~(CPU_BASED_CR8_LOAD_EXITING | CPU_BASED_CR8_STORE_EXITING));
	vmwrite(VIRTUAL_APIC_PAGE_ADDR, RING_VM_GPA + VIRTUAL_APIC * PAGE_SIZE);
	if (!shared.posted)
		return;
	vmwrite(PIN_BASED_VM_EXEC_CONTROL,
		vmreadz(PIN_BASED_VM_EXEC_CONTROL) | PIN_BASED_EXT_INTR_MASK |
		PIN_BASED_POSTED_INTR);
	vmwrite(VM_EXIT_CONTROLS,
		vmreadz(VM_EXIT_CONTROLS) | VM_EXIT_ACK_INTR_ON_EXIT);
	vmwrite(SECONDARY_VM_EXEC_CONTROL,
		vmreadz(SECONDARY_VM_EXEC_CONTROL) |
		SECONDARY_EXEC_VIRTUAL_INTR_DELIVERY);
	vmwrite(POSTED_INTR_NV, POSTED_VECTOR);
	vmwrite(POSTED_INTR_DESC_ADDR, RING_VM_GPA + POSTED * PAGE_SIZE);
}

static void l1_after_vmcall(int failed)
{
	uint64_t reason = vmreadz(VM_EXIT_REASON);

	GUEST_ASSERT(!failed);
	GUEST_ASSERT_1(reason == EXIT_REASON_VMCALL, reason);
	vmwrite(GUEST_RIP, vmreadz(GUEST_RIP) +
			   vmreadz(VM_EXIT_INSTRUCTION_LEN));
}

static void write_pages(void)
{
	uint64_t i, *page;

	for (i = 0; i < PAGES; i++) {
		page = (void *)(RING_VM_GVA + i * PAGE_SIZE);
		WRITE_ONCE(*page, *page + 1);
	}
}

/* Leave the CPU's log full of old writes: first faults, then the log. */
static void l1_fill_log(void)
{
	write_pages();
	GUEST_SYNC(0);
	write_pages();
	GUEST_SYNC(0);
}

/* Each exit and each entry copies to or from the shadow VMCS. */
static void l1_resumes(struct vmx_pages *vmx)
{
	unsigned long stack[64];
	int ret;

	l1_fill_log();
	l1_prepare(vmx, &stack[64]);
	for (ret = vmlaunch(); !READ_ONCE(shared.quit); ret = vmresume()) {
		l1_after_vmcall(ret);
		WRITE_ONCE(shared.rounds, shared.rounds + 1);
	}
	GUEST_SYNC(0);
}

/* Each round, KVM sets up a VMCS for L2 anew. */
static void l1_starts_over(struct vmx_pages *vmx)
{
	unsigned long stack[64];

	l1_fill_log();
	l1_prepare(vmx, &stack[64]);
	while (!READ_ONCE(shared.quit)) {
		l1_after_vmcall(vmlaunch());
		WRITE_ONCE(shared.rounds, shared.rounds + 1);
		/* Its fields stay in memory. */
		GUEST_ASSERT(!vmclear(vmx->vmcs_gpa));
		vmxoff();
		GUEST_ASSERT(!vmxon(vmx->vmxon_gpa));
		GUEST_ASSERT(!vmptrld(vmx->vmcs_gpa));
	}
	GUEST_SYNC(0);
}

static void l1_resumes_some(struct vmx_pages *vmx)
{
	unsigned long stack[64];
	int i, ret;

	l1_prepare(vmx, &stack[64]);
	ret = vmlaunch();
	while (true) {
		for (i = 0; i < 20; i++) {
			l1_after_vmcall(ret);
			ret = vmresume();
		}
		GUEST_SYNC(1);
	}
}

static void l1_evmcs(struct vmx_pages *vmx)
{
	unsigned long stack[64];
	int ret;

	enable_vp_assist(vmx->vp_assist_gpa, vmx->vp_assist);
	l1_prepare(vmx, &stack[64]);
	for (ret = vmlaunch(); ; ret = vmresume()) {
		GUEST_SYNC(1);
		l1_after_vmcall(ret);
	}
}

/* Userspace */

/* Create a VM whose vCPUs run L1's code, with a bitmap if @entries is 0. */
static struct vmx_pages *create(uint32_t entries, uint32_t nr_vcpus, void *l1,
				void *l2, bool tpr_shadow)
{
	struct vmx_pages *vmx = NULL;
	vm_vaddr_t gva;
	uint32_t i;

	rv = ring_vm_create(entries, nr_vcpus, PAGES, KVM_MEM_LOG_DIRTY_PAGES,
			    NULL);
	guest_shared()->l2 = l2;
	guest_shared()->tpr_shadow = tpr_shadow;
	for (i = 0; i < nr_vcpus; i++) {
		vmx = vcpu_alloc_vmx(rv->vm, &gva);
		ring_vm_set_code(rv, i, l1, gva);
	}

	return vmx;
}

/* Run the vCPU up to its next ucall. */
static void run(uint32_t vcpu, uint64_t stage)
{
	struct ucall uc;

	vcpu_run(rv->vm, vcpu);
	switch (get_ucall(rv->vm, vcpu, &uc)) {
	case UCALL_SYNC:
		TEST_ASSERT(uc.args[1] == stage, "At stage %lu, not %lu",
			    uc.args[1], stage);
		return;
	case UCALL_ABORT:
		TEST_FAIL("%s at line %ld, %#lx", (const char *)uc.args[0],
			  uc.args[1], uc.args[2]);
	default:
		TEST_FAIL("Unexpected exit: %s",
			  exit_reason_str(vcpu_state(rv->vm, vcpu)->exit_reason));
	}
}

static void *runner(void *unused)
{
	run(0, 0);
	return NULL;
}

/* Bring all that is dirty into the rings or the bitmap, and take it. */
static void look(unsigned long *bitmap)
{
	if (rv->entries) {
		EXPECT(ioctl(vm_get_fd(rv->vm), KVM_SYNC_DIRTY_RINGS), 0);
		ring_vm_collect(rv);
	} else {
		kvm_vm_get_dirty_log(rv->vm, RING_VM_SLOT, bitmap);
	}
}

static bool is_dirty(unsigned long *bitmap, uint64_t page)
{
	bool dirty;

	if (!rv->entries)
		return bitmap[page / 64] >> page % 64 & 1;

	dirty = rv->seen[page];
	rv->seen[page] = 0;
	return dirty;
}

static uint32_t count_dirty(unsigned long *bitmap)
{
	uint32_t i, n = 0;

	for (i = 0; i < PAGES; i++)
		n += is_dirty(bitmap, i);
	return n;
}

/* Nothing is written: nothing may be reported, whatever KVM is doing. */
static void expect_nothing(uint32_t entries, void *l1)
{
	unsigned long bitmap[PAGES / 64];
	uint64_t looks = 0, end;
	pthread_t thread;
	uint32_t n;
	int i;

	create(entries, 1, l1, l2_calls, false);
	for (i = 0; i < 2; i++) {
		run(0, 0);
		look(bitmap);
		n = count_dirty(bitmap);
		TEST_ASSERT(n == PAGES, "%u pages of %u were reported", n,
			    PAGES);
	}

	pthread_create(&thread, NULL, runner, NULL);
	while (!READ_ONCE(guest_shared()->rounds))
		;
	for (end = now_s() + SECONDS; now_s() < end; looks++) {
		look(bitmap);
		n = count_dirty(bitmap);
		TEST_ASSERT(!n, "%u pages were reported, none was written, after %lu rounds of L1",
			    n, guest_shared()->rounds);
	}
	WRITE_ONCE(guest_shared()->quit, 1);
	pthread_join(thread, NULL);
	printf("# looked %lu times in %lu rounds of L1\n", looks,
	       guest_shared()->rounds);

	ring_vm_free(rv);
}

static void shadow_vmcs(void)
{
	expect_nothing(RING_ENTRIES, l1_resumes);
}

static void shadow_vmcs_bitmap(void)
{
	expect_nothing(0, l1_resumes);
}

static void new_vmcs(void)
{
	expect_nothing(RING_ENTRIES, l1_starts_over);
}

static void new_vmcs_bitmap(void)
{
	expect_nothing(0, l1_starts_over);
}

/*
 * As look(), but leave the vCPU alone as far as possible: if it leaves L2, as a
 * reset makes it, KVM marks pages.
 */
static void look_quietly(unsigned long *bitmap)
{
	if (!rv->entries) {
		look(bitmap);
		return;
	}
	EXPECT(ioctl(vm_get_fd(rv->vm), KVM_SYNC_DIRTY_RINGS), 0);
	ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL);
	if (rv->nr_order >= rv->limit / 2) {
		vm_reset_dirty_rings(rv->vm);
		rv->nr_order = 0;
	}
}

/* The CPU writes to the page all the time: each look must find it. */
static void expect_virtual_apic(uint32_t entries)
{
	unsigned long bitmap[PAGES / 64];
	uint64_t looks = 0, missed = 0, end;
	pthread_t thread;
	uint8_t *vtpr, v;

	create(entries, 1, l1_resumes_some, l2_writes_tpr, true);
	vtpr = rv->mem + VIRTUAL_APIC * PAGE_SIZE + VTPR;
	pthread_create(&thread, NULL, runner, NULL);
	while (!READ_ONCE(*vtpr))
		;
	look_quietly(bitmap);
	is_dirty(bitmap, VIRTUAL_APIC);
	for (end = now_s() + SECONDS; now_s() < end; looks++) {
		v = READ_ONCE(*vtpr);
		while (READ_ONCE(*vtpr) == v)
			;
		look_quietly(bitmap);
		missed += !is_dirty(bitmap, VIRTUAL_APIC);
	}
	TEST_ASSERT(!missed, "Written and not reported %lu times of %lu",
		    missed, looks);
	printf("# looked %lu times\n", looks);

	/* The thread runs until the process ends. */
}

static void virtual_apic(void)
{
	expect_virtual_apic(RING_ENTRIES);
}

static void virtual_apic_bitmap(void)
{
	expect_virtual_apic(0);
}

/* The CPU clears what userspace posts, which is a write. */
static void posted_interrupts(void)
{
	struct kvm_msi msi = {
		.address_lo = 0xfee00000,
		.data = POSTED_VECTOR,
	};
	struct posted_interrupts *posted;
	struct kvm_lapic_state lapic;
	uint64_t end, times = 0;
	pthread_t thread;

	create(RING_ENTRIES, 1, l1_resumes_some, l2_spins, true);
	if (!(vcpu_get_msr(rv->vm, 0, MSR_IA32_VMX_TRUE_PINBASED_CTLS) >> 32 &
	      PIN_BASED_POSTED_INTR))
		test_case_skip("no posted interrupts for guests");
	guest_shared()->posted = 1;
	vcpu_ioctl(rv->vm, 0, KVM_GET_LAPIC, &lapic);
	*(uint32_t *)(lapic.regs + APIC_SPIV) |= APIC_SPIV_APIC_ENABLED;
	vcpu_ioctl(rv->vm, 0, KVM_SET_LAPIC, &lapic);

	posted = (void *)(rv->mem + POSTED * PAGE_SIZE);
	pthread_create(&thread, NULL, runner, NULL);
	while (!READ_ONCE(guest_shared()->rounds))
		;
	look_quietly(NULL);
	rv->seen[POSTED] = 0;
	rv->seen[VIRTUAL_APIC] = 0;
	for (end = now_s() + SECONDS; now_s() < end; times++) {
		WRITE_ONCE(posted->requests[1], 1);
		WRITE_ONCE(posted->outstanding, 1);
		EXPECT(ioctl(vm_get_fd(rv->vm), KVM_SIGNAL_MSI, &msi), 1);
		while (READ_ONCE(posted->requests[1]))
			;
		look_quietly(NULL);
		TEST_ASSERT(rv->seen[POSTED] && rv->seen[VIRTUAL_APIC],
			    "Posted %lu times: the descriptor was %sreported, the virtual-APIC page was %sreported",
			    times, rv->seen[POSTED] ? "" : "not ",
			    rv->seen[VIRTUAL_APIC] ? "" : "not ");
		rv->seen[POSTED] = 0;
		rv->seen[VIRTUAL_APIC] = 0;
	}
	TEST_ASSERT(!posted->outstanding, "Still outstanding");
	printf("# posted %lu times\n", times);

	/* The thread runs until the process ends. */
}

static void virtual_apic_once(void)
{
	uint32_t n;
	int i;

	create(RING_ENTRIES, 1, l1_resumes_some, l2_calls, true);
	for (i = 0; i < 3; i++) {
		run(0, 1);
		n = ring_vm_collect(rv);
		TEST_ASSERT(n == 1 && rv->seen[VIRTUAL_APIC] == 1,
			    "%u entries after 20 exits of L2, %u of the page",
			    n, rv->seen[VIRTUAL_APIC]);
		ring_vm_forget(rv);
	}
	ring_vm_free(rv);
}

static void evmcs(void)
{
	struct vmx_pages *vmx;
	int i;

	if (!kvm_check_cap(KVM_CAP_HYPERV_ENLIGHTENED_VMCS))
		test_case_skip("KVM has no enlightened VMCS");

	vmx = create(RING_ENTRIES, 1, l1_evmcs, l2_exits, false);
	vmx->enlightened_vmcs_gpa = RING_VM_GPA + EVMCS * PAGE_SIZE;
	vmx->enlightened_vmcs = (void *)RING_VM_GVA + EVMCS * PAGE_SIZE;
	vcpu_enable_evmcs(rv->vm, 0);

	for (i = 0; i < 3; i++) {
		/* Leave L2, after L1 wrote to its VMCS. */
		run(0, 2);
		ring_vm_collect(rv);
		TEST_ASSERT(rv->seen[EVMCS], "What L1 wrote is not reported");
		ring_vm_forget(rv);

		/* Leave L1, after KVM wrote to it. */
		run(0, 1);
		ring_vm_collect(rv);
		ring_vm_expect(rv, EVMCS, 1);
	}
	ring_vm_free(rv);
}

/*
 * When vCPU 1 goes, after vCPU 0, KVM marks L1's page, and finds no room for
 * it. End the process and free nothing before, so that the memslot is still
 * there.
 */
static void destroy(void)
{
	create(ring_vm_min_entries(), 2, l1_resumes_some, l2_exits, true);
	run(1, 2);
	ring_vm_write_by_ioctl(rv, 0, 16, rv->entries);
	ring_vm_write_by_ioctl(rv, 1, 16, rv->entries);
	_exit(KSFT_PASS);
}

static const struct test_case cases[] = {
	{ "shadow-vmcs: loaded when a sync comes", shadow_vmcs },
	{ "shadow-vmcs-bitmap: the same, with KVM_GET_DIRTY_LOG",
	  shadow_vmcs_bitmap },
	{ "new-vmcs: loaded when a sync comes, and not set up yet", new_vmcs },
	{ "new-vmcs-bitmap: the same, with KVM_GET_DIRTY_LOG",
	  new_vmcs_bitmap },
	{ "virtual-apic: written by the CPU while L2 runs", virtual_apic },
	{ "virtual-apic-bitmap: the same, with KVM_GET_DIRTY_LOG",
	  virtual_apic_bitmap },
	{ "posted-interrupts: cleared by the CPU while L2 runs",
	  posted_interrupts },
	{ "virtual-apic-once: told once, not at each exit", virtual_apic_once },
	{ "evmcs: an enlightened VMCS, written when L2 exits", evmcs },
	{ "destroy: a VM with L2 active and full rings", destroy },
};

int main(int argc, char **argv)
{
	dirty_ring_check_supported();
	if (!nested_vmx_supported())
		ksft_exit_skip("no VMX for guests\n");

	test_cases_main(argc, argv, cases, ARRAY_SIZE(cases));
}
