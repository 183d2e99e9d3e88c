// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test dirty logging where x86's page tables make it hard
 *
 * Most cases are about shadow paging (kvm_amd.npt=0, kvm_intel.ept=0): there the
 * sptes follow the guest's own page tables, which the guest and the VMM change.
 * Where a CPU walks the guest's page tables itself these cases show that nothing
 * depends on it.
 *
 * What is not reported, or is reported and was not written, fails a case. Some of
 * what is tried here makes KVM warn, or die, if it is wrong: look at the kernel's
 * log as well.
 */

#define _GNU_SOURCE /* for program_invocation_name, memfd_create */

#include <linux/bits.h>
#include <linux/memfd.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

#include "test_util.h"
#include "kvm_util.h"
#include "dirty_ring.h"
#include "dirty_ring_vm.h"
#include "processor.h"
#include "test_cases.h"

#define PAGE		4096UL
#define HUGE		(2UL << 20)
#define PTES		512

/* More pages than any case writes, or has reported, without a reset */
#define RING_ENTRIES	65536

#define SLOT_A		2
#define SLOT_B		3
#define GPA_A		0x100000000UL
#define GPA_B		0x180000000UL
/* Guest addresses of what a case is about, and of the guest's page tables */
#define GVA		0x100000000UL
#define GVA_2		0x180000000UL
#define PT_GVA		0xd0000000UL

/* Page tables are in slot 0, from here on. */
#define FIRST_FREE_GPA	0x200000

#define PTE_P		BIT_ULL(0)
#define PTE_W		BIT_ULL(1)
#define PTE_A		BIT_ULL(5)
#define PTE_D		BIT_ULL(6)
#define PTE_PS		BIT_ULL(7)
#define PTE_SOFT	BIT_ULL(9)
#define PTE_FLAGS	(PTE_P | PTE_W | PTE_A | PTE_D)
#define PTE_ADDR(pte)	((pte) & GENMASK_ULL(51, 12))

/* What the guest does with some addresses */
enum { DO_NOTHING, DO_READ, DO_WRITE, DO_SET_SOFT, DO_SET_SOFT_INVLPG, DO_LOOP };

static struct {
	uint64_t what;
	uint64_t gva;
	uint64_t count;
	uint64_t stride;
	uint64_t load_cr3;
	/* What the last read found */
	uint64_t value;
	/* First address that the PTEs at gva map */
	uint64_t pte_gva;
} todo;

static void do_one(uint64_t what, uint64_t i)
{
	uint64_t *p = (uint64_t *)(todo.gva + i * todo.stride);

	switch (what) {
	case DO_READ:
		todo.value = READ_ONCE(*p);
		break;
	case DO_WRITE:
	case DO_LOOP:
		WRITE_ONCE(*p, READ_ONCE(*p) + 1);
		break;
	case DO_SET_SOFT:
	case DO_SET_SOFT_INVLPG:
		WRITE_ONCE(*p, READ_ONCE(*p) | PTE_SOFT);
		if (what == DO_SET_SOFT_INVLPG)
			asm volatile("invlpg (%0)"
				     : : "r" (todo.pte_gva + i * PAGE)
				     : "memory");
		break;
	}
}

static void guest_code(void)
{
	uint64_t i;

	while (true) {
		do {
			for (i = 0; i < todo.count; i++)
				do_one(todo.what, i);
		} while (READ_ONCE(todo.what) == DO_LOOP);
		if (todo.load_cr3)
			asm volatile("mov %0, %%cr3"
				     : : "r" (get_cr3()) : "memory");
		GUEST_SYNC(0);
	}
}

static struct kvm_vm *vm;

static void create(uint32_t ring_entries)
{
	vm = vm_create(VM_MODE_DEFAULT,
		       vm_adjust_num_guest_pages(VM_MODE_DEFAULT,
						 DEFAULT_GUEST_PHY_PAGES + 512),
		       O_RDWR);
	kvm_vm_elf_load(vm, program_invocation_name, 0, 0);
	vm_create_irqchip(vm);
	if (ring_entries)
		vm_enable_dirty_ring(vm, ring_entries *
					 sizeof(struct kvm_dirty_gfn));
	vm_vcpu_add_default(vm, 0, guest_code);
	vcpu_set_cpuid(vm, 0, kvm_get_supported_cpuid());
}

static void run(void)
{
	vcpu_run(vm, 0);
	TEST_ASSERT(get_ucall(vm, 0, NULL) == UCALL_SYNC, "Unexpected exit: %s",
		    exit_reason_str(vcpu_state(vm, 0)->exit_reason));
}

/* @todo as the guest sees it */
static typeof(todo) *guest_todo(void)
{
	return addr_gva2hva(vm, (vm_vaddr_t)&todo);
}

static void set_todo(uint64_t what, uint64_t gva, uint64_t count,
		     uint64_t stride)
{
	memset(&todo, 0, sizeof(todo));
	todo.what = what;
	todo.gva = gva;
	todo.count = count;
	todo.stride = stride;
	*guest_todo() = todo;
}

static void run_todo(uint64_t what, uint64_t gva, uint64_t count,
		     uint64_t stride)
{
	set_todo(what, gva, count, stride);
	run();
}

static uint64_t guest_read(uint64_t gva)
{
	run_todo(DO_READ, gva, 1, 0);
	return guest_todo()->value;
}

/* Map memory in pages of 4 KiB. */
static void *small_pages(size_t size)
{
	void *mem = mmap(NULL, size + HUGE, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	TEST_ASSERT(mem != MAP_FAILED, "mmap failed");
	mem = (void *)(((uintptr_t)mem + HUGE - 1) & ~(HUGE - 1));
	madvise(mem, size, MADV_NOHUGEPAGE);
	return mem;
}

static void set_slot(uint32_t slot, uint64_t gpa, void *mem, size_t size,
		     uint32_t flags)
{
	vm_set_slot(vm, slot, gpa, mem, size, flags);
}

/* The entry for @gva in the guest's page tables; level 1 is a PTE. */
static uint64_t *entry(uint64_t gva, int level)
{
	struct kvm_sregs sregs;
	uint64_t *table;
	int at;

	vcpu_sregs_get(vm, 0, &sregs);
	table = addr_gpa2hva(vm, PTE_ADDR(sregs.cr3));
	for (at = 4; ; at--) {
		table += gva >> (12 + (at - 1) * 9) & 511;
		if (at == level)
			return table;
		table = addr_gpa2hva(vm, PTE_ADDR(*table));
	}
}

static vm_paddr_t new_page_table(uint64_t **pt)
{
	vm_paddr_t gpa = vm_phy_page_alloc(vm, FIRST_FREE_GPA, 0);

	*pt = addr_gpa2hva(vm, gpa);
	memset(*pt, 0, PAGE);
	return gpa;
}

/* Make sure that there is a PDE for @gva. */
static uint64_t *new_pde(uint64_t gva)
{
	virt_map(vm, gva, 0, 1, 0);
	return entry(gva, 2);
}

/* The pages of a slot that were reported */
struct report {
	uint32_t slot;
	uint64_t first;
	uint64_t count;
	bool seen[PTES];
};

static void see(uint32_t slot, uint64_t offset, void *data)
{
	struct report *report = data;

	TEST_ASSERT(slot == report->slot && offset >= report->first &&
		    offset < report->first + report->count,
		    "Slot %u, page %#lx was reported, not written", slot,
		    offset);
	TEST_ASSERT(!report->seen[offset - report->first],
		    "Slot %u, page %#lx was reported twice", slot, offset);
	report->seen[offset - report->first] = true;
}

/* Expect that exactly these pages were reported, once each. */
static void expect(uint32_t slot, uint64_t first, uint64_t count)
{
	struct report report = { slot, first, count };

	EXPECT(vcpu_harvest_dirty_ring(vm, 0, DIRTY_RING_HARVEST_ALL, see,
				       &report), count);
	EXPECT(vm_reset_dirty_rings(vm), count);
}

/* Page tables that change from outside of the guest */

/* Map something at @gva, first by a frame of slot A, then by others. */
static void *mem_a, *mem_b;

static void create_two_slots(void)
{
	create(RING_ENTRIES);
	mem_a = small_pages(HUGE);
	mem_b = small_pages(HUGE);
	set_slot(SLOT_A, GPA_A, mem_a, HUGE, 0);
	set_slot(SLOT_B, GPA_B, mem_b, HUGE, 0);
}

static uint64_t word(void *mem, uint64_t page)
{
	return READ_ONCE(*(uint64_t *)(mem + page * PAGE));
}

/*
 * Now the guest writes to frames of slot B. Remove slot A, to which it wrote
 * before, with all that maps it, and log its writes.
 */
static void remove_a_log_b(uint64_t gva, uint64_t first, uint64_t count)
{
	int i;

	set_slot(SLOT_A, GPA_A, mem_a, 0, 0);
	set_slot(SLOT_B, GPA_B, mem_b, HUGE, KVM_MEM_LOG_DIRTY_PAGES);
	for (i = 0; i < 3; i++) {
		run_todo(DO_WRITE, gva, count, PAGE);
		expect(SLOT_B, first, count);
	}
	set_slot(SLOT_B, GPA_B, mem_b, 0, 0);
	set_slot(SLOT_B, GPA_B, mem_b, HUGE, KVM_MEM_LOG_DIRTY_PAGES);
	run_todo(DO_WRITE, gva, count, PAGE);
	expect(SLOT_B, first, count);
	kvm_vm_free(vm);
}

static void large_to_large(void)
{
	uint64_t *pde;

	create_two_slots();
	pde = new_pde(GVA);
	*pde = GPA_A | PTE_FLAGS | PTE_PS;
	run_todo(DO_WRITE, GVA, 4, PAGE);
	*pde = GPA_B | PTE_FLAGS | PTE_PS;
	/* KVM has not seen these with another frame. */
	run_todo(DO_WRITE, GVA + 8 * PAGE, 4, PAGE);
	TEST_ASSERT(word(mem_a, 0) == 1 && word(mem_b, 8) == 1 &&
		    !word(mem_a, 8), "The guest wrote to another frame");
	remove_a_log_b(GVA + 8 * PAGE, 8, 4);
}

static void large_to_table(void)
{
	uint64_t *pde, *pt, gpa;
	int i;

	create_two_slots();
	pde = new_pde(GVA);
	gpa = new_page_table(&pt);
	for (i = 0; i < PTES; i++)
		pt[i] = (GPA_B + (i ^ 1) * PAGE) | PTE_FLAGS;

	*pde = GPA_A | PTE_FLAGS | PTE_PS;
	run_todo(DO_WRITE, GVA, 4, PAGE);
	*pde = gpa | PTE_FLAGS;
	run_todo(DO_WRITE, GVA + 8 * PAGE, 4, PAGE);
	TEST_ASSERT(word(mem_a, 0) == 1 && word(mem_b, 8) == 1 &&
		    !word(mem_a, 8), "The guest wrote to another frame");
	remove_a_log_b(GVA + 8 * PAGE, 8, 4);
}

/* A page table that is also used elsewhere must not get foreign entries. */
static void from_table(bool large)
{
	uint64_t *pde, *pde_2, *pt, *pt_b, gpa, gpa_b;
	int i;

	create_two_slots();
	pde = new_pde(GVA);
	pde_2 = new_pde(GVA_2);
	gpa = new_page_table(&pt);
	gpa_b = new_page_table(&pt_b);
	for (i = 0; i < PTES; i++) {
		pt[i] = (GPA_A + i * PAGE) | PTE_FLAGS;
		pt_b[i] = (GPA_B + i * PAGE) | PTE_FLAGS;
	}
	*(uint64_t *)(mem_a + 8 * PAGE) = 0xa;
	*(uint64_t *)(mem_b + 8 * PAGE) = 0xb;

	*pde = gpa | PTE_FLAGS;
	*pde_2 = gpa | PTE_FLAGS;
	run_todo(DO_WRITE, GVA, 1, PAGE);
	run_todo(DO_WRITE, GVA_2, 1, PAGE);
	TEST_ASSERT(word(mem_a, 0) == 2, "The guest wrote to another frame");

	*pde = large ? GPA_B | PTE_FLAGS | PTE_PS : gpa_b | PTE_FLAGS;
	EXPECT(guest_read(GVA + 8 * PAGE), 0xb);
	EXPECT(guest_read(GVA_2 + 8 * PAGE), 0xa);
	*pde_2 = *pde;
	remove_a_log_b(GVA + 8 * PAGE, 8, 4);
}

static void table_to_large(void)
{
	from_table(true);
}

static void table_to_table(void)
{
	from_table(false);
}

/* Two frames are the same page of the host; only one of them is tracked. */
static void alias(void)
{
	uint64_t *pte, i;

	create(RING_ENTRIES);
	mem_a = small_pages(HUGE);
	/* Have pages, not the zero page. */
	*(uint64_t *)mem_a = 0;
	set_slot(SLOT_A, GPA_A, mem_a, HUGE, 0);
	set_slot(SLOT_B, GPA_B, mem_a, HUGE, KVM_MEM_LOG_DIRTY_PAGES);
	new_pde(GVA);
	pte = entry(GVA, 1);

	/* Clean, so that a read maps it read-only. */
	*pte = GPA_A | PTE_P | PTE_W;
	EXPECT(guest_read(GVA), 0);
	*pte = GPA_B | PTE_P | PTE_W;
	for (i = 1; i < 4; i++) {
		run_todo(DO_WRITE, GVA, 1, PAGE);
		EXPECT(word(mem_a, 0), i);
		expect(SLOT_B, 0, 1);
	}
	kvm_vm_free(vm);
}

/* Reports of what was not written */

#define TABLES		20

/* The guest's mapping of its page tables for TABLES times 2 MiB */
static void create_tables(void)
{
	uint64_t i;

	create(RING_ENTRIES);
	mem_a = small_pages(TABLES * HUGE);
	set_slot(SLOT_A, GPA_A, mem_a, TABLES * HUGE, KVM_MEM_LOG_DIRTY_PAGES);
	virt_map(vm, GVA, GPA_A, TABLES * PTES, 0);
	for (i = 0; i < TABLES; i++)
		virt_map(vm, PT_GVA + i * PAGE,
			 PTE_ADDR(*entry(GVA + i * HUGE, 2)), 1, 0);
}

static uint32_t collect(void)
{
	uint32_t n;

	n = vcpu_harvest_dirty_ring(vm, 0, DIRTY_RING_HARVEST_ALL, NULL, NULL);
	EXPECT(vm_reset_dirty_rings(vm), n);
	return n;
}

/* The guest changes a PTE in each of its page tables, and flushes its TLB. */
static void change_tables(void)
{
	set_todo(DO_SET_SOFT, PT_GVA, TABLES, PAGE);
	guest_todo()->load_cr3 = 1;
	run();
}

static void resync(void)
{
	int round;

	create_tables();
	/* Everything is mapped, and may be written. */
	run_todo(DO_WRITE, GVA, TABLES * PTES, PAGE);
	EXPECT(collect(), TABLES * PTES);

	for (round = 0; round < 3; round++) {
		/* Everything is write-protected. */
		change_tables();
		EXPECT(collect(), 0);

		/*
		 * Scattered writes, and some that are reported and not
		 * harvested
		 */
		run_todo(DO_WRITE, GVA, TABLES * 4, HUGE / 4);
		change_tables();
		EXPECT(collect(), TABLES * 4);
	}

	/* Writable pages stay writable: one fault and one entry a page. */
	run_todo(DO_WRITE, GVA, TABLES * PTES, PAGE);
	change_tables();
	run_todo(DO_WRITE, GVA, TABLES * PTES, PAGE);
	change_tables();
	EXPECT(collect(), TABLES * PTES);
	kvm_vm_free(vm);
}

static void invlpg(void)
{
	int i;

	create_tables();
	run_todo(DO_WRITE, GVA, PTES, PAGE);
	EXPECT(collect(), PTES);
	for (i = 0; i < 3; i++) {
		set_todo(DO_SET_SOFT_INVLPG, PT_GVA, PTES, 8);
		guest_todo()->pte_gva = GVA;
		run();
		EXPECT(collect(), 0);
		run_todo(DO_WRITE, GVA, PTES, PAGE);
		EXPECT(collect(), PTES);
	}
	kvm_vm_free(vm);
}

/* A page table in tracked memory, in which accessed and dirty bits get set. */
static void accessed_bits(uint64_t what)
{
	uint64_t *pde, *pt;
	int i, round;

	create_two_slots();
	set_slot(SLOT_B, GPA_B, mem_b, HUGE, KVM_MEM_LOG_DIRTY_PAGES);
	pde = new_pde(GVA);
	pt = mem_b + 7 * PAGE;
	*pde = (GPA_B + 7 * PAGE) | PTE_FLAGS;
	for (round = 0; round < 3; round++) {
		for (i = 0; i < PTES; i++)
			pt[i] = (GPA_A + i * PAGE) | PTE_P | PTE_W;
		/* Have KVM forget its copies of the page table. */
		set_slot(SLOT_A, GPA_A, mem_a, 0, 0);
		set_slot(SLOT_A, GPA_A, mem_a, HUGE, 0);
		run_todo(what, GVA, PTES, PAGE);
		for (i = 0; i < PTES; i++)
			TEST_ASSERT(pt[i] & (what == DO_READ ? PTE_A : PTE_D),
				    "PTE %d is %#lx", i, pt[i]);
		expect(SLOT_B, 7, 1);
	}
	kvm_vm_free(vm);
}

static void accessed(void)
{
	accessed_bits(DO_READ);
}

static void dirty(void)
{
	accessed_bits(DO_WRITE);
}

/* TLBs when logging starts and stops, with a vCPU that never leaves the guest */

static bool quit;

static void *vcpu_fn(void *data)
{
	run();
	return NULL;
}

static void vcpu_start(pthread_t *thread, uint64_t gva, uint64_t count,
		       uint64_t stride)
{
	set_todo(DO_LOOP, gva, count, stride);
	TEST_ASSERT(!pthread_create(thread, NULL, vcpu_fn, NULL),
		    "pthread_create failed");
}

static void vcpu_stop(pthread_t thread)
{
	WRITE_ONCE(guest_todo()->what, DO_NOTHING);
	pthread_join(thread, NULL);
}

/* TLB flushes of other CPUs that KVM asked for, in all VMs */
static long flushes(void)
{
	return kvm_stat("remote_tlb_flush");
}

#define STARTS		100

/*
 * Expect one flush for each start, though nothing is mapped: a TLB may still
 * have what was. A flush counts only if it finds the vCPU in the guest, so wait
 * until it is there; it may still leave for something else.
 */
static void log_start(void)
{
	long before, count;
	pthread_t thread;
	uint64_t next;
	cpu_set_t cpus;
	int i;

	need_two_cpus(&cpus);

	create(0);
	mem_a = small_pages(HUGE);
	set_slot(SLOT_A, GPA_A, mem_a, HUGE, 0);
	mem_b = small_pages(HUGE);
	set_slot(SLOT_B, GPA_B, mem_b, HUGE, 0);
	virt_map(vm, GVA, GPA_B, 1, 0);
	vcpu_start(&thread, GVA, 1, 0);
	while (word(mem_b, 0) < 1000)
		;

	before = flushes();
	for (i = 0; i < STARTS; i++) {
		next = word(mem_b, 0) + 1000;
		while (word(mem_b, 0) < next)
			;
		set_slot(SLOT_A, GPA_A, mem_a, HUGE, KVM_MEM_LOG_DIRTY_PAGES);
		set_slot(SLOT_A, GPA_A, mem_a, HUGE, 0);
	}
	count = flushes() - before;
	vcpu_stop(thread);
	kvm_vm_free(vm);

	pr_info("%d starts, %ld flushes\n", STARTS, count);
	/*
	 * On a busy machine the vCPU is rarely in the guest at the right time.
	 */
	TEST_ASSERT(count > STARTS / 20 && count <= STARTS,
		    "%d starts of logging, %ld flushes", STARTS, count);
}

/*
 * Does KVM use two-dimensional paging, without regard to the guest's page
 * tables?
 */
static bool two_dimensional_paging(void)
{
	const char *file = is_intel_cpu() ?
			   "/sys/module/kvm_intel/parameters/ept" :
			   "/sys/module/kvm_amd/parameters/npt";
	FILE *f = fopen(file, "r");
	char c = '?';

	TEST_ASSERT(f && fread(&c, 1, 1, f) == 1, "Cannot read %s", file);
	fclose(f);
	return c == 'Y' || c == '1';
}

#define HUGE_PAGES	3
#define STOP_SIZE	(32 * HUGE)
#define STOPS		500
#define STOPS_SECONDS	20

/* Shared by the thread that switches logging and the one that takes memory */
static struct {
	sem_t go, done;
	unsigned long delay;
	/* The slot's memory, and the same pages mapped elsewhere */
	void *mem;
	uint64_t *view;
	/* Contents when the memory was taken, and a moment later */
	uint64_t then[HUGE_PAGES], later[HUGE_PAGES];
} take;

static void *take_fn(void *data)
{
	struct timespec delay = { 0 };
	uint64_t start;
	void *mem;
	int i;

	while (true) {
		sem_wait(&take.go);
		if (READ_ONCE(quit))
			return NULL;
		delay.tv_nsec = take.delay;
		nanosleep(&delay, NULL);
		mem = mmap(take.mem, HUGE_PAGES * HUGE, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE |
			   MAP_FIXED, -1, 0);
		for (i = 0; i < HUGE_PAGES; i++)
			take.then[i] = READ_ONCE(take.view[i * HUGE / 8]);
		for (start = now_ns(); now_ns() - start < 100000; )
			;
		for (i = 0; i < HUGE_PAGES; i++)
			take.later[i] = READ_ONCE(take.view[i * HUGE / 8]);
		TEST_ASSERT(mem == take.mem, "mmap failed");
		sem_post(&take.done);
	}
}

/* Let both threads share a CPU, which the one that takes memory can preempt. */
static void take_start(pthread_t *thread, pthread_t vcpu)
{
	struct sched_param param = { .sched_priority = 1 };
	cpu_set_t all, one;
	pthread_attr_t attr;
	int cpu, ret;

	need_two_cpus(&all);
	for (cpu = 0; !CPU_ISSET(cpu, &all); cpu++)
		;
	CPU_ZERO(&one);
	CPU_SET(cpu, &one);
	CPU_CLR(cpu, &all);
	TEST_ASSERT(!pthread_setaffinity_np(vcpu, sizeof(all), &all) &&
		    !sched_setaffinity(0, sizeof(one), &one),
		    "cannot choose CPUs");

	sem_init(&take.go, 0, 0);
	sem_init(&take.done, 0, 0);
	pthread_attr_init(&attr);
	pthread_attr_setaffinity_np(&attr, sizeof(one), &one);
	pthread_attr_setinheritsched(&attr, PTHREAD_EXPLICIT_SCHED);
	pthread_attr_setschedpolicy(&attr, SCHED_FIFO);
	pthread_attr_setschedparam(&attr, &param);
	ret = pthread_create(thread, &attr, take_fn, NULL);
	if (ret == EPERM)
		test_case_skip("no right to real-time threads");
	TEST_ASSERT(!ret, "pthread_create failed: %s", strerror(ret));
	pthread_attr_destroy(&attr);
}

/*
 * When logging stops, KVM removes small mappings of huge pages. Take the pages
 * from the slot in the middle of that: once mmap() has returned, nothing may
 * write to them. A second mapping of the pages shows whether anything does.
 *
 * mmap() interrupts the CPU of the vCPU. Where each exit flushes the guest's
 * TLB entries, as under QEMU's emulation, this cannot fail.
 */
static void log_stop(void)
{
	uint64_t start, stop_ns = 1000000, end;
	pthread_t vcpu, taker;
	int fd, i, n;
	void *view;

	if (!two_dimensional_paging())
		test_case_skip("no huge pages with shadow paging");

	fd = memfd_create("log_stop", MFD_HUGETLB);
	if (fd < 0 || ftruncate(fd, HUGE_PAGES * HUGE))
		test_case_skip("no huge pages");
	view = mmap(NULL, HUGE_PAGES * HUGE, PROT_READ | PROT_WRITE,
		    MAP_SHARED | MAP_POPULATE, fd, 0);
	if (view == MAP_FAILED)
		test_case_skip("no free huge pages");
	take.view = view;
	take.mem = small_pages(STOP_SIZE);

	create(0);
	set_slot(SLOT_A, GPA_A, take.mem, STOP_SIZE, 0);
	virt_map(vm, GVA, GPA_A, HUGE_PAGES * PTES, 0);
	vcpu_start(&vcpu, GVA, HUGE_PAGES, HUGE);
	take_start(&taker, vcpu);

	end = now_ns() + STOPS_SECONDS * 1000000000ULL;
	for (n = 0; n < STOPS && now_ns() < end; n++) {
		view = mmap(take.mem, HUGE_PAGES * HUGE, PROT_READ | PROT_WRITE,
			    MAP_SHARED | MAP_FIXED, fd, 0);
		TEST_ASSERT(view == take.mem, "mmap failed");
		set_slot(SLOT_A, GPA_A, take.mem, STOP_SIZE,
			 KVM_MEM_LOG_DIRTY_PAGES);
		for (i = 0; i < HUGE_PAGES; i++) {
			start = READ_ONCE(take.view[i * HUGE / 8]);
			while (READ_ONCE(take.view[i * HUGE / 8]) < start + 2)
				;
		}

		take.delay = random() % (stop_ns + 1);
		sem_post(&take.go);
		start = now_ns();
		set_slot(SLOT_A, GPA_A, take.mem, STOP_SIZE, 0);
		if (!sem_trywait(&take.done)) {
			/* Too early; wait longer. */
			stop_ns += stop_ns / 16;
		} else {
			stop_ns = now_ns() - start;
			sem_wait(&take.done);
		}
		for (i = 0; i < HUGE_PAGES; i++)
			TEST_ASSERT(take.then[i] == take.later[i],
				    "Try %d: the guest wrote %lu times to a page that was taken",
				    n, take.later[i] - take.then[i]);
	}
	pr_info("%d times, the last took up to %lu us\n", n, stop_ns / 1000);

	WRITE_ONCE(quit, true);
	sem_post(&take.go);
	pthread_join(taker, NULL);
	vcpu_stop(vcpu);
	kvm_vm_free(vm);
}

static const struct test_case cases[] = {
	{ "large-to-large: a PDE gets another frame", large_to_large },
	{ "large-to-table: a PDE gets a page table", large_to_table },
	{ "table-to-large: a PDE gets a frame for a page table", table_to_large },
	{ "table-to-table: a PDE gets another page table", table_to_table },
	{ "alias: a PTE gets another frame, of the same page", alias },
	{ "resync: page tables are synced, and nothing is written", resync },
	{ "invlpg: PTEs are flushed, and nothing is written", invlpg },
	{ "accessed: accessed bits, once for a page table", accessed },
	{ "dirty: dirty bits, once for a page table", dirty },
	{ "log-start: one flush, whatever is mapped", log_start },
	{ "log-stop: memory goes while its mappings are removed", log_stop },
};

int main(int argc, char **argv)
{
	dirty_ring_check_supported();
	test_cases_main(argc, argv, cases, ARRAY_SIZE(cases));
}
