// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test that the dirty ring sees a page get dirty whichever way that happens
 *
 * One case a way: what KVM writes on its own (clocks, steal time, async page
 * faults, the pages of Hyper-V's and of the local APIC's paravirtual
 * interfaces), instructions that KVM emulates, guests of the guest, and memory
 * in huge pages when logging is switched on. Ordinary writes of the guest, SMM,
 * and ioctls that write guest memory are in dirty_ring_test and
 * dirty_ring_reliability_test.
 *
 * Try, harvest and reset each way more than once: the second time shows that
 * the page was write-protected again.
 */

#define _GNU_SOURCE /* for program_invocation_name */

#include <asm/kvm_para.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include "test_util.h"
#include "kvm_util.h"
#include "dirty_ring_vm.h"
#include "processor.h"
#include "svm_util.h"
#include "test_cases.h"
#include "vmx.h"

#define PAGES		64
#define GPA		RING_VM_GPA
#define GVA		RING_VM_GVA
#define ROUNDS		3

#define IN_PORT		0x1234
#define MMIO_GPA	0x80000000UL
#define MMIO_GVA	0xd0000000UL

/* Where the guest's guest has the memslot: elsewhere */
#define L2_GPA		0xc0000000UL
#define L2_GVA		0xe0000000UL

/* Pages for the page tables of the guest's guest */
#define FIRST_FREE_GPA	0x200000

#define MSR_HV_GUEST_OS_ID	0x40000000
#define MSR_HV_HYPERCALL	0x40000001
#define MSR_HV_REFERENCE_TSC	0x40000021
#define MSR_HV_VP_ASSIST_PAGE	0x40000073
#define MSR_HV_SIEFP		0x40000082
#define MSR_HV_SIMP		0x40000083

#define APIC_SPIV		0xf0
#define APIC_SPIV_APIC_ENABLED	0x100

#define CLOCK_PAIRING_HYPERCALL	9
#define ASYNC_PF_VECTOR		0x40

/* What the guest does next */
enum {
	DO_NOTHING, DO_STORE, DO_WRMSR, DO_INS, DO_MOVS, DO_INTERRUPT,
	DO_STORE_INTERRUPTIBLE, DO_VMCALL, DO_VMMCALL,
};

static struct {
	uint64_t what;
	uint64_t a;
	uint64_t b;
	uint64_t answer;
} todo;

static void increment(uint64_t gva)
{
	uint64_t *p = (uint64_t *)gva;

	WRITE_ONCE(*p, READ_ONCE(*p) + 1);
}

static void guest_code(void)
{
	uint64_t count, from;

	while (true) {
		switch (READ_ONCE(todo.what)) {
		case DO_STORE:
			increment(todo.a);
			break;
		case DO_WRMSR:
			wrmsr(todo.a, todo.b);
			break;
		case DO_INS:
			count = 1;
			asm volatile("rep insb" : "+D"(todo.a), "+c"(count)
				     : "d"(IN_PORT) : "memory");
			break;
		case DO_MOVS:
			count = 1;
			from = MMIO_GVA;
			asm volatile("rep movsb"
				     : "+D"(todo.a), "+S"(from), "+c"(count)
				     : : "memory");
			break;
		case DO_INTERRUPT:
			asm volatile("sti; nop; cli" : : : "memory");
			break;
		case DO_STORE_INTERRUPTIBLE:
			asm volatile("sti; nop" : : : "memory");
			WRITE_ONCE(*(uint64_t *)todo.a, 1);
			asm volatile("cli" : : : "memory");
			break;
		case DO_VMCALL:
			asm volatile("vmcall" : "=a"(todo.answer)
				     : "a"(todo.a), "b"(todo.b), "c"(0)
				     : "memory");
			break;
		case DO_VMMCALL:
			asm volatile("vmmcall" : "=a"(todo.answer)
				     : "a"(todo.a), "b"(todo.b), "c"(0)
				     : "memory");
			break;
		}
		GUEST_SYNC(0);
	}
}

static struct kvm_vm *vm;
static uint32_t seen[PAGES];

static void create(void *code)
{
	vm = vm_create(VM_MODE_DEFAULT,
		       vm_adjust_num_guest_pages(VM_MODE_DEFAULT,
						 DEFAULT_GUEST_PHY_PAGES + 64),
		       O_RDWR);
	kvm_vm_elf_load(vm, program_invocation_name, 0, 0);
	vm_create_irqchip(vm);
	vm_enable_dirty_ring(vm, ring_vm_min_entries() *
				 sizeof(struct kvm_dirty_gfn));
	vm_userspace_mem_region_add(vm, VM_MEM_SRC_ANONYMOUS, GPA, RING_VM_SLOT,
				    PAGES, KVM_MEM_LOG_DIRTY_PAGES);
	virt_map(vm, GVA, GPA, PAGES, 0);
	virt_map(vm, MMIO_GVA, MMIO_GPA, 1, 0);
	vm_vcpu_add_default(vm, 0, code);
	vcpu_set_cpuid(vm, 0, kvm_get_supported_cpuid());
}

/* Run the vCPU until it is done; answer what it reads from devices. */
static void run(void)
{
	struct kvm_run *run = vcpu_state(vm, 0);
	static uint8_t answer;
	struct ucall uc;

	while (true) {
		vcpu_run(vm, 0);
		/* The guest reads whatever is in KVM's buffer. */
		if (run->exit_reason == KVM_EXIT_IO &&
		    run->io.port == IN_PORT)
			continue;
		/* An exit for SynIC's pages; nothing to do */
		if (run->exit_reason == KVM_EXIT_HYPERV)
			continue;
		if (run->exit_reason == KVM_EXIT_MMIO) {
			TEST_ASSERT(!run->mmio.is_write &&
				    run->mmio.phys_addr == MMIO_GPA,
				    "Unexpected MMIO at %#llx",
				    run->mmio.phys_addr);
			run->mmio.data[0] = ++answer;
			continue;
		}
		switch (get_ucall(vm, 0, &uc)) {
		case UCALL_SYNC:
		case UCALL_DONE:
			return;
		case UCALL_ABORT:
			TEST_FAIL("%s", (const char *)uc.args[0]);
		default:
			TEST_FAIL("Unexpected exit: %s",
				  exit_reason_str(run->exit_reason));
		}
	}
}

static void run_todo(uint64_t what, uint64_t a, uint64_t b)
{
	todo.what = what;
	todo.a = a;
	todo.b = b;
	sync_global_to_guest(vm, todo);
	run();
}

static uint64_t page_gpa(uint64_t page)
{
	return GPA + page * getpagesize();
}

static uint64_t page_gva(uint64_t page)
{
	return GVA + page * getpagesize();
}

static void mark(uint32_t slot, uint64_t offset, void *data)
{
	TEST_ASSERT(slot == RING_VM_SLOT && offset < PAGES,
		    "Slot %#x, page %#lx was reported", slot, offset);
	seen[offset]++;
}

/*
 * Expect the page in the ring, and no other of the slot but, perhaps, the one
 * that was written before.
 */
static void expect_page_or(int page, int before)
{
	uint32_t n;
	int i;

	memset(seen, 0, sizeof(seen));
	n = vcpu_harvest_dirty_ring(vm, 0, DIRTY_RING_HARVEST_ALL, mark, NULL);
	for (i = 0; i < PAGES; i++)
		TEST_ASSERT(!!seen[i] == (i == page) || i == before,
			    "Page %d was reported %u times, page %d was written",
			    i, seen[i], page);
	TEST_ASSERT(vm_reset_dirty_rings(vm) == n, "The reset is short");
}

static void expect_page(int page)
{
	expect_page_or(page, -1);
}

/* Pages that KVM writes, after an MSR has its address */

static void by_msr(uint32_t msr, uint64_t bits)
{
	int i;

	for (i = 0; i < ROUNDS; i++) {
		run_todo(DO_WRMSR, msr, page_gpa(7 + i) | bits);
		run_todo(DO_NOTHING, 0, 0);
		/* Before the WRMSR, KVM may update the last one. */
		expect_page_or(7 + i, 6 + i);
	}
	kvm_vm_free(vm);
}

static void wall_clock(void)
{
	create(guest_code);
	by_msr(MSR_KVM_WALL_CLOCK_NEW, 0);
}

static void system_time(void)
{
	create(guest_code);
	by_msr(MSR_KVM_SYSTEM_TIME_NEW, 1);
}

static void steal_time(void)
{
	int i;

	create(guest_code);
	run_todo(DO_WRMSR, MSR_KVM_STEAL_TIME, page_gpa(5) | 1);
	/* Written, and reported, each time the vCPU is loaded. */
	for (i = 0; i < ROUNDS; i++) {
		run_todo(DO_NOTHING, 0, 0);
		expect_page(5);
	}
	kvm_vm_free(vm);
}

static void hv_by_msr(uint32_t msr)
{
	if (!kvm_check_cap(KVM_CAP_HYPERV))
		test_case_skip("KVM does not emulate Hyper-V");

	create(guest_code);
	run_todo(DO_WRMSR, MSR_HV_GUEST_OS_ID, 1);
	by_msr(msr, 1);
}

static void hv_hypercall(void)
{
	hv_by_msr(MSR_HV_HYPERCALL);
}

static void hv_tsc(void)
{
	hv_by_msr(MSR_HV_REFERENCE_TSC);
}

static void hv_vp_assist(void)
{
	hv_by_msr(MSR_HV_VP_ASSIST_PAGE);
}

static void hv_synic(void)
{
	struct kvm_enable_cap cap = { .cap = KVM_CAP_HYPERV_SYNIC };

	if (!kvm_check_cap(KVM_CAP_HYPERV_SYNIC))
		test_case_skip("KVM does not emulate Hyper-V's SynIC");

	create(guest_code);
	vcpu_ioctl(vm, 0, KVM_ENABLE_CAP, &cap);
	run_todo(DO_WRMSR, MSR_HV_SIEFP, page_gpa(20) | 1);
	expect_page(20);
	by_msr(MSR_HV_SIMP, 1);
}

static void enable_apic(void)
{
	struct kvm_lapic_state lapic;

	vcpu_ioctl(vm, 0, KVM_GET_LAPIC, &lapic);
	*(uint32_t *)(lapic.regs + APIC_SPIV) |= APIC_SPIV_APIC_ENABLED;
	vcpu_ioctl(vm, 0, KVM_SET_LAPIC, &lapic);
}

/* The page to which KVM writes the task priority at each entry */
static void apic_page(void)
{
	struct kvm_vapic_addr addr = { .vapic_addr = page_gpa(11) + 8 };
	struct kvm_mp_state mp;
	int i;

	create(guest_code);
	enable_apic();
	vcpu_ioctl(vm, 0, KVM_SET_VAPIC_ADDR, &addr);
	for (i = 0; i < ROUNDS; i++) {
		/* Have KVM look at events on the way in. */
		vcpu_ioctl(vm, 0, KVM_GET_MP_STATE, &mp);
		vcpu_set_mp_state(vm, 0, &mp);
		run_todo(DO_NOTHING, 0, 0);
		expect_page(11);
	}
	kvm_vm_free(vm);
}

static void ignore(struct ex_regs *regs)
{
}

/*
 * The page in which KVM says whether an interrupt needs an EOI; it gets none.
 */
static void pv_eoi(void)
{
	struct kvm_msi msi = { .address_lo = 0xfee00000 };
	int i;

	create(guest_code);
	vm_init_descriptor_tables(vm);
	vcpu_init_descriptor_tables(vm, 0);
	enable_apic();
	run_todo(DO_WRMSR, MSR_KVM_PV_EOI_EN, page_gpa(3) | 1);
	for (i = 0; i < ROUNDS; i++) {
		/* Of a higher priority than the last one */
		msi.data = 0x40 + i * 16;
		vm_handle_exception(vm, msi.data, ignore);
		EXPECT(ioctl(vm_get_fd(vm), KVM_SIGNAL_MSI, &msi), 1);
		run_todo(DO_INTERRUPT, 0, 0);
		expect_page(3);
	}
	kvm_vm_free(vm);
}

static void clock_pairing(void)
{
	int i;

	create(guest_code);
	for (i = 0; i < ROUNDS; i++) {
		run_todo(is_intel_cpu() ? DO_VMCALL : DO_VMMCALL,
			 CLOCK_PAIRING_HYPERCALL, page_gpa(4 + i));
		sync_global_from_guest(vm, todo);
		if (todo.answer == -95UL)
			test_case_skip("the host's clock is not the TSC");
		TEST_ASSERT(!todo.answer, "The hypercall returned %ld",
			    todo.answer);
		expect_page(4 + i);
	}
	kvm_vm_free(vm);
}

/* Memory that takes a while to be there */

#define SLOW_PAGE	32

/* tools/arch/x86/include/uapi/asm/unistd_64.h has that of another call. */
#define NR_USERFAULTFD	323

static void *bring_page(void *data)
{
	struct uffdio_zeropage zero = { .range.len = getpagesize() };
	int uffd = *(int *)data;
	struct uffd_msg msg;

	TEST_ASSERT(read(uffd, &msg, sizeof(msg)) == sizeof(msg) &&
		    msg.event == UFFD_EVENT_PAGEFAULT, "No fault in userfaultfd");
	usleep(20000);
	zero.range.start = msg.arg.pagefault.address & -zero.range.len;
	EXPECT(ioctl(uffd, UFFDIO_ZEROPAGE, &zero), 0);
	return NULL;
}

/* The page in which KVM says that a page is not there, and then that it is */
static void async_page_fault(void)
{
	struct uffdio_register reg = { .mode = UFFDIO_REGISTER_MODE_MISSING };
	struct uffdio_api api = { .api = UFFD_API };
	pthread_t thread;
	uint8_t *mem;
	int i, uffd;

	uffd = syscall(NR_USERFAULTFD, O_CLOEXEC);
	if (uffd < 0)
		test_case_skip("no userfaultfd: %s", strerror(errno));
	EXPECT(ioctl(uffd, UFFDIO_API, &api), 0);

	create(guest_code);
	vm_init_descriptor_tables(vm);
	vcpu_init_descriptor_tables(vm, 0);
	enable_apic();
	mem = addr_gpa2hva(vm, GPA);
	reg.range.start = (uintptr_t)mem + SLOW_PAGE * getpagesize();
	reg.range.len = ROUNDS * getpagesize();
	EXPECT(ioctl(uffd, UFFDIO_REGISTER, &reg), 0);
	vm_handle_exception(vm, PF_VECTOR, ignore);
	vm_handle_exception(vm, ASYNC_PF_VECTOR, ignore);
	run_todo(DO_WRMSR, MSR_KVM_ASYNC_PF_INT, ASYNC_PF_VECTOR);
	run_todo(DO_WRMSR, MSR_KVM_ASYNC_PF_EN, page_gpa(2) |
		 KVM_ASYNC_PF_ENABLED | KVM_ASYNC_PF_SEND_ALWAYS |
		 KVM_ASYNC_PF_DELIVERY_AS_INT);
	for (i = 0; i < ROUNDS; i++) {
		memset(mem + 2 * getpagesize(), 0, 64);
		pthread_create(&thread, NULL, bring_page, &uffd);
		run_todo(DO_STORE_INTERRUPTIBLE, page_gva(SLOW_PAGE + i), 0);
		pthread_join(thread, NULL);
		expect_page_or(2, SLOW_PAGE + i);
		TEST_ASSERT(seen[SLOW_PAGE + i], "The store is not reported");
	}
	close(uffd);
	kvm_vm_free(vm);
}

/* Instructions that KVM emulates, and that store to memory */

static void by_guest(uint64_t what)
{
	uint8_t *mem;
	int i;

	create(guest_code);
	mem = addr_gpa2hva(vm, GPA);
	for (i = 0; i < 2 * ROUNDS; i++) {
		mem[(i % ROUNDS) * getpagesize() + 12] = 0xff;
		run_todo(what, page_gva(i % ROUNDS) + 12, 0);
		TEST_ASSERT(mem[(i % ROUNDS) * getpagesize() + 12] != 0xff,
			    "The guest wrote nothing");
		expect_page(i % ROUNDS);
	}
	kvm_vm_free(vm);
}

static void plain_store(void)
{
	by_guest(DO_STORE);
}

static void string_input(void)
{
	by_guest(DO_INS);
}

static void device_to_memory(void)
{
	by_guest(DO_MOVS);
}

/* The guest's guest, L2. Its page tables are the guest's, L1's. */

static uint64_t l2_gva;
static uint64_t l2_reads_gva, l2_reads;

static void l2_access(void)
{
	uint64_t i;

	for (i = 0; i < l2_reads; i++)
		READ_ONCE(*(uint64_t *)(l2_reads_gva + i * 4096));
	increment(l2_gva);
}

static void l2_svm_code(void)
{
	while (true) {
		l2_access();
		asm volatile("vmmcall" : : : "memory");
	}
}

static void l1_svm(struct svm_test_data *svm, uint64_t nested_cr3)
{
	unsigned long stack[64];

	generic_svm_setup(svm, l2_svm_code, &stack[64]);
	if (nested_cr3) {
		svm->vmcb->control.nested_ctl = 1;
		svm->vmcb->control.nested_cr3 = nested_cr3;
	}
	while (true) {
		run_guest(svm->vmcb, svm->vmcb_gpa);
		GUEST_ASSERT(svm->vmcb->control.exit_code == SVM_EXIT_VMMCALL);
		svm->vmcb->save.rip += 3;
		GUEST_SYNC(0);
	}
}

static void l2_vmx_code(void)
{
	while (true) {
		l2_access();
		vmcall();
	}
}

static void l1_vmx(struct vmx_pages *vmx)
{
	unsigned long stack[64];
	int ret;

	GUEST_ASSERT(prepare_for_vmx_operation(vmx));
	GUEST_ASSERT(load_vmcs(vmx));
	prepare_vmcs(vmx, l2_vmx_code, &stack[64]);
	for (ret = vmlaunch(); ; ret = vmresume()) {
		GUEST_ASSERT(!ret);
		GUEST_ASSERT(vmreadz(VM_EXIT_REASON) == EXIT_REASON_VMCALL);
		vmwrite(GUEST_RIP, vmreadz(GUEST_RIP) +
				   vmreadz(VM_EXIT_INSTRUCTION_LEN));
		GUEST_SYNC(0);
	}
}

/* L2 writes to the memslot, which it finds at @gva. */
static void l2_writes(uint64_t gva)
{
	int i;

	for (i = 0; i < 2 * ROUNDS; i++) {
		l2_gva = gva + (i % ROUNDS) * getpagesize();
		sync_global_to_guest(vm, l2_gva);
		run();
		expect_page(i % ROUNDS);
	}
	kvm_vm_free(vm);
}

static void nested_plain(void)
{
	vm_vaddr_t gva;

	if (nested_svm_supported()) {
		create(l1_svm);
		vcpu_alloc_svm(vm, &gva);
		vcpu_args_set(vm, 0, 2, gva, 0UL);
	} else if (nested_vmx_supported()) {
		create(l1_vmx);
		vcpu_alloc_vmx(vm, &gva);
		vcpu_args_set(vm, 0, 1, gva);
	} else {
		test_case_skip("no nested SVM, nor VMX");
	}
	l2_writes(GVA);
}

/*
 * L2's nested page tables, GiB by GiB: 0 at 0, and where L2 writes at the
 * memslot's. They are marked as accessed and dirty, lest KVM has others for a GiB that
 * is not.
 */
static uint64_t nested_cr3(void)
{
	vm_paddr_t pml4, pdpt;
	uint64_t i;

	pml4 = vm_phy_page_alloc(vm, FIRST_FREE_GPA, 0);
	pdpt = vm_phy_page_alloc(vm, FIRST_FREE_GPA, 0);
	*(uint64_t *)addr_gpa2hva(vm, pml4) = pdpt | 7;
	for (i = 0; i < 4; i++)
		((uint64_t *)addr_gpa2hva(vm, pdpt))[i] =
			(i == L2_GPA >> 30 ? GPA : i << 30) | 0xe7;
	return pml4;
}

/* Can the guest use EPT? */
static bool nested_ept_supported(void)
{
	uint64_t controls = vcpu_get_msr(vm, 0, MSR_IA32_VMX_PROCBASED_CTLS2);

	return controls >> 32 & SECONDARY_EXEC_ENABLE_EPT;
}

/* The guest's guest has nested page tables, and addresses that differ. */
static void nested_paging(void)
{
	struct kvm_cpuid_entry2 *svm_cpuid;
	struct vmx_pages *vmx;
	vm_vaddr_t gva;

	if (nested_svm_supported()) {
		svm_cpuid = kvm_get_supported_cpuid_index(0x8000000a, 0);
		if (!svm_cpuid || !(svm_cpuid->edx & 1))
			test_case_skip("no nested paging for guests");
		create(l1_svm);
		virt_map(vm, L2_GVA, L2_GPA, PAGES, 0);
		vcpu_alloc_svm(vm, &gva);
		vcpu_args_set(vm, 0, 2, gva, nested_cr3());
	} else if (nested_vmx_supported()) {
		create(l1_vmx);
		if (!nested_ept_supported())
			test_case_skip("no EPT for guests");
		virt_map(vm, L2_GVA, L2_GPA, PAGES, 0);
		vmx = vcpu_alloc_vmx(vm, &gva);
		vcpu_args_set(vm, 0, 1, gva);
		/* After everything that L2 uses is mapped */
		prepare_eptp(vmx, vm, 0);
		nested_map_memslot(vmx, vm, 0, 0);
		nested_map(vmx, vm, L2_GPA, GPA, PAGES * getpagesize(), 0);
	} else {
		test_case_skip("no nested SVM, nor VMX");
	}
	l2_writes(L2_GVA);
}

/* Memory in huge pages, mapped before it is tracked */

#define HUGE_SLOT	3
#define HUGE_GPA	0x100000000UL
#define HUGE_GVA	0x100000000UL
#define HUGE_WRITES	60

/* Faults that made KVM map something, in all VMs */
static long faults(void)
{
	return kvm_stat("pf_fixed");
}

static void huge_mark(uint32_t slot, uint64_t offset, void *data)
{
	uint64_t **next = data;

	TEST_ASSERT(slot == HUGE_SLOT && offset == *(*next)++,
		    "Slot %#x, page %#lx was reported", slot, offset);
}

static void huge_pages(size_t size, unsigned int shift)
{
	size_t page = getpagesize();
	uint64_t expected[HUGE_WRITES], *next;
	uint32_t i, round;
	long before;
	void *mem;

	mem = map_huge_pages(size, shift);
	for (i = 0; i < HUGE_WRITES; i++)
		expected[i] = i * 17;

	create(guest_code);
	vm_set_slot(vm, HUGE_SLOT, HUGE_GPA, mem, size, 0);
	for (i = 0; i < HUGE_WRITES; i++)
		virt_map(vm, HUGE_GVA + expected[i] * page,
			 HUGE_GPA + expected[i] * page, 1, 0);

	run_todo(DO_NOTHING, 0, 0);
	for (round = 0; round < 2; round++) {
		vm_set_slot(vm, HUGE_SLOT, HUGE_GPA, mem, size, 0);
		before = faults();
		for (i = 0; i < HUGE_WRITES; i++)
			run_todo(DO_STORE, HUGE_GVA + expected[i] * page, 0);
		if (!round && faults() - before >= HUGE_WRITES)
			test_case_skip("KVM maps no huge pages here");
		TEST_ASSERT(!vcpu_harvest_dirty_ring(vm, 0, 1, huge_mark, NULL),
			    "Reported, but not tracked");

		vm_set_slot(vm, HUGE_SLOT, HUGE_GPA, mem, size,
			    KVM_MEM_LOG_DIRTY_PAGES);
		for (i = 0; i < HUGE_WRITES; i++) {
			run_todo(DO_STORE, HUGE_GVA + expected[i] * page, 0);
			run_todo(DO_STORE, HUGE_GVA + expected[i] * page, 0);
		}
		next = expected;
		TEST_ASSERT(vcpu_harvest_dirty_ring(vm, 0,
						    DIRTY_RING_HARVEST_ALL,
						    huge_mark, &next) ==
			    HUGE_WRITES, "%td of %u pages were reported",
			    next - expected, HUGE_WRITES);
		TEST_ASSERT(vm_reset_dirty_rings(vm) == HUGE_WRITES,
			    "The reset is short");
	}
	kvm_vm_free(vm);
	munmap(mem, size);
}

/*
 * A guest's guest reads all pages, and writes some. Its page tables map the GiB by one
 * entry, so those of KVM that have the huge pages are direct.
 */
static void huge_nested(void)
{
	const uint64_t at = 64UL << 20, size = 4UL << 20;
	uint64_t written[] = { 5, 600 }, *next = written;
	struct kvm_cpuid_entry2 *svm_cpuid;
	long split, recovered;
	vm_vaddr_t gva;
	uint32_t i, round;
	void *mem;

	if (!nested_svm_supported())
		test_case_skip("no nested SVM");
	svm_cpuid = kvm_get_supported_cpuid_index(0x8000000a, 0);
	if (!svm_cpuid || !(svm_cpuid->edx & 1))
		test_case_skip("no nested paging for guests");

	mem = map_huge_pages(size, 21);
	create(l1_svm);
	virt_map(vm, L2_GVA + at, L2_GPA + at, size / getpagesize(), 0);
	vcpu_alloc_svm(vm, &gva);
	vcpu_args_set(vm, 0, 2, gva, nested_cr3());
	l2_reads_gva = L2_GVA + at;
	l2_reads = size / getpagesize();
	sync_global_to_guest(vm, l2_reads_gva);
	sync_global_to_guest(vm, l2_reads);

	for (round = 0; round < 2; round++) {
		vm_set_slot(vm, HUGE_SLOT, GPA + at, mem, size, 0);
		l2_gva = L2_GVA + at;
		sync_global_to_guest(vm, l2_gva);
		run();
		TEST_ASSERT(!vcpu_harvest_dirty_ring(vm, 0, 1, huge_mark, NULL),
			    "Reported, but not tracked");

		split = kvm_stat("largepages_split");
		vm_set_slot(vm, HUGE_SLOT, GPA + at, mem, size,
			    KVM_MEM_LOG_DIRTY_PAGES);
		for (i = 0; i < ARRAY_SIZE(written); i++) {
			l2_gva = L2_GVA + at + written[i] * getpagesize();
			sync_global_to_guest(vm, l2_gva);
			run();
			run();
		}
		next = written;
		TEST_ASSERT(vcpu_harvest_dirty_ring(vm, 0,
						    DIRTY_RING_HARVEST_ALL,
						    huge_mark, &next) ==
			    ARRAY_SIZE(written), "%td pages were reported",
			    next - written);
		TEST_ASSERT(vm_reset_dirty_rings(vm) == ARRAY_SIZE(written),
			    "The reset is short");
		split = kvm_stat("largepages_split") - split;
		TEST_ASSERT(split == ARRAY_SIZE(written),
			    "%ld huge pages were split", split);
		recovered = kvm_stat("largepages_recovered");
	}
	vm_set_slot(vm, HUGE_SLOT, GPA + at, mem, size, 0);
	recovered = kvm_stat("largepages_recovered") - recovered;
	TEST_ASSERT(recovered == ARRAY_SIZE(written),
		    "%ld huge pages were recovered", recovered);
	kvm_vm_free(vm);
	munmap(mem, size);
}

static void huge_2m(void)
{
	huge_pages(4UL << 20, 21);
}

static void huge_1g(void)
{
	huge_pages(1UL << 30, 30);
}

static const struct test_case cases[] = {
	{ "plain-store: of the guest", plain_store },
	{ "string-input: INS, emulated", string_input },
	{ "device-to-memory: MOVS, emulated", device_to_memory },
	{ "wall-clock", wall_clock },
	{ "system-time", system_time },
	{ "steal-time", steal_time },
	{ "apic-page: KVM_SET_VAPIC_ADDR", apic_page },
	{ "pv-eoi: end of interrupt, paravirtual", pv_eoi },
	{ "clock-pairing: a hypercall", clock_pairing },
	{ "async-page-fault: not there, and there", async_page_fault },
	{ "hv-hypercall: Hyper-V's hypercall page", hv_hypercall },
	{ "hv-tsc: Hyper-V's TSC page", hv_tsc },
	{ "hv-vp-assist: Hyper-V's VP assist page", hv_vp_assist },
	{ "hv-synic: Hyper-V's message and event pages", hv_synic },
	{ "nested: a guest's guest, without nested paging", nested_plain },
	{ "nested-paging: a guest's guest, with nested paging", nested_paging },
	{ "huge-2m: tracked when mapped with 2 MiB pages", huge_2m },
	{ "huge-1g: tracked when mapped with 1 GiB pages", huge_1g },
	{ "huge-nested: a guest's guest is split and recovered alike",
	  huge_nested },
};

int main(int argc, char **argv)
{
	dirty_ring_check_supported();
	test_cases_main(argc, argv, cases, ARRAY_SIZE(cases));
}
