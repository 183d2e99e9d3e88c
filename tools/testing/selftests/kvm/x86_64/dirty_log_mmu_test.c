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
#include "svm_util.h"
#include "test_cases.h"
#include "vmx.h"

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
	/* How much was done so far */
	uint64_t done;
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
			for (i = 0; i < todo.count; i++) {
				do_one(todo.what, i);
				WRITE_ONCE(todo.done, todo.done + 1);
			}
		} while (READ_ONCE(todo.what) == DO_LOOP);
		if (todo.load_cr3)
			asm volatile("mov %0, %%cr3"
				     : : "r" (get_cr3()) : "memory");
		GUEST_SYNC(0);
	}
}

static struct kvm_vm *vm;

static void create_with_code(uint32_t ring_entries, void *code)
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
	vm_vcpu_add_default(vm, 0, code);
	vcpu_set_cpuid(vm, 0, kvm_get_supported_cpuid());
}

static void create(uint32_t ring_entries)
{
	create_with_code(ring_entries, guest_code);
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

/*
 * Start a real-time thread that shares a CPU with the calling thread, and can
 * preempt it. Leave other CPUs to the vCPU.
 */
static void start_on_same_cpu(pthread_t *thread, void *(*fn)(void *data),
			      pthread_t vcpu)
{
	cpu_set_t all, one;

	need_two_cpus(&all);
	take_first_cpu(&all, &one);
	TEST_ASSERT(!pthread_setaffinity_np(vcpu, sizeof(all), &all) &&
		    !sched_setaffinity(0, sizeof(one), &one),
		    "cannot choose CPUs");
	start_real_time(thread, &one, fn, NULL);
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
	sem_init(&take.go, 0, 0);
	sem_init(&take.done, 0, 0);
	start_on_same_cpu(&taker, take_fn, vcpu);

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

/*
 * Shadow pages that come and go while logging starts and stops: KVM finds what is
 * mapped of a large memslot by its shadow pages, and drops mmu_lock in between
 */

#define LARGE_SIZE	(512 * HUGE)
#define MIN_MMU_PAGES	64
#define RECYCLE_SECONDS	3

/* The pages of slot A that the guest writes to, again and again */
#define RECYCLE_PAGES	200
/* Few enough for their shadow pages to stay */
#define KEPT_PAGES	40

static struct {
	sem_t go, done;
	unsigned long delay;
	/* How long it takes to switch logging */
	uint64_t switch_ns;
	/* How much the guest does until all shadow pages are others; 0: they stay */
	uint64_t enough;
	uint64_t page[RECYCLE_PAGES];
	uint64_t before[RECYCLE_PAGES];
	bool seen[LARGE_SIZE / PAGE];
	unsigned int preempted;
} recycle;

static void recycle_see(uint32_t slot, uint64_t offset, void *data)
{
	TEST_ASSERT(slot == SLOT_A && offset < LARGE_SIZE / PAGE,
		    "Slot %#x, page %#lx was reported", slot, offset);
	recycle.seen[offset] = true;
}

/* All that was written before is in the log. */
static void recycle_harvest(void)
{
	int i, n;

	for (i = 0; i < RECYCLE_PAGES; i++)
		recycle.seen[recycle.page[i]] = false;
	EXPECT(ioctl(vm_get_fd(vm), KVM_SYNC_DIRTY_RINGS, 0), 0);
	n = vcpu_harvest_dirty_ring(vm, 0, DIRTY_RING_HARVEST_ALL, recycle_see,
				    NULL);
	EXPECT(vm_reset_dirty_rings(vm), n);
}

/*
 * Take the CPU away from the thread that switches logging, while the guest has all
 * shadow pages recycled.
 */
static void *recycle_preempt_fn(void *data)
{
	struct timespec delay = { 0 };
	uint64_t *done = &guest_todo()->done;
	uint64_t start, end;

	while (true) {
		sem_wait(&recycle.go);
		if (READ_ONCE(quit))
			return NULL;
		delay.tv_nsec = recycle.delay;
		nanosleep(&delay, NULL);
		start = READ_ONCE(*done);
		end = now_ns() + 100000000;
		while (READ_ONCE(*done) - start < recycle.enough &&
		       now_ns() < end)
			;
		sem_post(&recycle.done);
	}
}

static void recycle_switch(uint32_t flags)
{
	uint64_t start;

	recycle.delay = random() % (recycle.switch_ns + 1);
	sem_post(&recycle.go);
	start = now_ns();
	set_slot(SLOT_A, GPA_A, mem_a, LARGE_SIZE, flags);
	if (!sem_trywait(&recycle.done)) {
		recycle.preempted++;
		/* Perhaps too early; wait longer. */
		recycle.switch_ns += recycle.switch_ns / 16;
	} else {
		recycle.switch_ns = now_ns() - start;
		sem_wait(&recycle.done);
	}
}

/*
 * The guest writes to the first @nr of recycle.page, in any order, until it is
 * stopped. What it writes while logging is on must be in the log: to any page, or,
 * where their mappings are those from before, to all of them.
 */
static void recycle_test(pthread_t vcpu, unsigned int nr, uint64_t enough)
{
	unsigned int i, times, changed, checked = 0;
	uint64_t now[RECYCLE_PAGES], end;
	pthread_t preempter;

	recycle.switch_ns = 1000000;
	recycle.enough = enough;
	sem_init(&recycle.go, 0, 0);
	sem_init(&recycle.done, 0, 0);
	start_on_same_cpu(&preempter, recycle_preempt_fn, vcpu);

	end = now_ns() + RECYCLE_SECONDS * 1000000000ULL;
	for (times = 0; now_ns() < end; times++) {
		recycle_switch(KVM_MEM_LOG_DIRTY_PAGES);
		for (i = 0; i < nr; i++)
			recycle.before[i] = word(mem_a, recycle.page[i]);
		do {
			for (i = 0, changed = 0; i < nr; i++) {
				now[i] = word(mem_a, recycle.page[i]);
				changed += now[i] != recycle.before[i];
			}
		} while (changed < (enough ? 1 : nr));

		recycle_harvest();
		for (i = 0; i < nr; i++)
			TEST_ASSERT(now[i] == recycle.before[i] ||
				    recycle.seen[recycle.page[i]],
				    "Page %#lx was written, not reported",
				    recycle.page[i]);
		checked += changed;

		recycle_switch(0);
		/* What was written since the last one */
		recycle_harvest();
	}
	pr_info("%u times, preempted %u times, %u pages checked; switched in %lu us\n",
		times, recycle.preempted, checked, recycle.switch_ns / 1000);

	WRITE_ONCE(quit, true);
	sem_post(&recycle.go);
	pthread_join(preempter, NULL);
	vcpu_stop(vcpu);
	kvm_vm_free(vm);
}

/* More memory than KVM can have shadow pages for; little of it is touched. */
static void recycle_set_slot(void)
{
	EXPECT(ioctl(vm_get_fd(vm), KVM_SET_NR_MMU_PAGES, MIN_MMU_PAGES), 0);
	mem_a = small_pages(LARGE_SIZE);
	set_slot(SLOT_A, GPA_A, mem_a, LARGE_SIZE, 0);
}

/* A shadow page each 2 MiB */
static void recycle_each_huge(unsigned int nr, uint64_t enough)
{
	pthread_t vcpu;
	uint64_t i;

	create(RING_ENTRIES);
	recycle_set_slot();
	for (i = 0; i < nr; i++) {
		recycle.page[i] = i * PTES;
		virt_map(vm, GVA + i * HUGE, GPA_A + i * HUGE, 1, 0);
	}
	vcpu_start(&vcpu, GVA, nr, HUGE);
	recycle_test(vcpu, nr, enough);
}

static void log_kept(void)
{
	recycle_each_huge(KEPT_PAGES, 0);
}

static void log_recycled(void)
{
	recycle_each_huge(RECYCLE_PAGES, MIN_MMU_PAGES);
}

/*
 * The guest has a guest, L2, with nested page tables: ROOTS of them, each with two
 * page directories, of which the second is the first one of the next root. Each
 * directory has a large page of slot A.
 *
 * KVM recycles the oldest shadow page first. That of a directory has a newer
 * parent, from the next root, and so is recycled on its own account; next to it
 * is that of its large page, made right after it. With EPT it is recycled along
 * with its parent.
 */
#define ROOTS		(RECYCLE_PAGES / 4)
#define L2_GPA		0xc0000000UL
#define L2_GVA		0xe0000000UL

#define NPT_TABLE	(PTE_P | PTE_W | BIT_ULL(2))
#define NPT_LARGE	(NPT_TABLE | PTE_A | PTE_D | PTE_PS)
/* Readable, writable, executable; write-back */
#define EPT_TABLE	7UL
#define EPT_LARGE	(EPT_TABLE | 6 << 3 | PTE_PS)
/* Write-back, four levels */
#define EPTP_FLAGS	(6 | 3 << 3)

static uint64_t nested_root[ROOTS];
static uint64_t l2_page;
static uint64_t l2_stack[512];

static void l2_write(uint64_t gva)
{
	uint64_t *p = (uint64_t *)gva;

	WRITE_ONCE(*p, READ_ONCE(*p) + 1);
}

static void l2_writes(void)
{
	uint64_t gva = L2_GVA + READ_ONCE(l2_page) * PAGE;

	l2_write(gva);
	l2_write(gva + HUGE);
}

static void l2_svm_code(void)
{
	while (true) {
		l2_writes();
		asm volatile("vmmcall" : : : "memory");
	}
}

static void l1_svm_code(struct svm_test_data *svm)
{
	struct vmcb *vmcb = svm->vmcb;
	uint64_t i;

	generic_svm_setup(svm, l2_svm_code, &l2_stack[511]);
	vmcb->control.nested_ctl = 1;
	vmcb->control.tlb_ctl = TLB_CONTROL_FLUSH_ALL_ASID;
	for (i = 0; READ_ONCE(todo.what) == DO_LOOP; i++) {
		vmcb->control.nested_cr3 = nested_root[i % ROOTS];
		WRITE_ONCE(l2_page, i / ROOTS % 4);
		run_guest(vmcb, svm->vmcb_gpa);
		GUEST_ASSERT(vmcb->control.exit_code == SVM_EXIT_VMMCALL);
		vmcb->save.rip += 3;
		WRITE_ONCE(todo.done, i);
	}
	GUEST_SYNC(0);
}

static void l2_vmx_code(void)
{
	while (true) {
		l2_writes();
		vmcall();
	}
}

static void l1_vmx_code(struct vmx_pages *vmx)
{
	uint64_t i;

	GUEST_ASSERT(prepare_for_vmx_operation(vmx));
	GUEST_ASSERT(load_vmcs(vmx));
	prepare_vmcs(vmx, l2_vmx_code, &l2_stack[511]);
	for (i = 0; READ_ONCE(todo.what) == DO_LOOP; i++) {
		vmwrite(EPT_POINTER, nested_root[i % ROOTS] | EPTP_FLAGS);
		WRITE_ONCE(l2_page, i / ROOTS % 4);
		GUEST_ASSERT(!(i ? vmresume() : vmlaunch()));
		GUEST_ASSERT(vmreadz(VM_EXIT_REASON) == EXIT_REASON_VMCALL);
		vmwrite(GUEST_RIP, vmreadz(GUEST_RIP) +
				   vmreadz(VM_EXIT_INSTRUCTION_LEN));
		WRITE_ONCE(todo.done, i);
	}
	GUEST_SYNC(0);
}

/*
 * Make L2's page tables: for each root the first GiB where it is, and two large
 * pages at L2_GPA, 1 GiB apart.
 */
static void new_nested_roots(uint64_t table, uint64_t large)
{
	uint64_t *pml4, *pdpt, *pd, pds[ROOTS], low, gpa, i;

	low = new_page_table(&pd);
	for (i = 0; i < PTES; i++)
		pd[i] = i * HUGE | large;
	for (i = 0; i < ROOTS; i++) {
		pds[i] = new_page_table(&pd);
		pd[0] = (GPA_A + i * HUGE) | large;
	}
	for (i = 0; i < ROOTS; i++) {
		nested_root[i] = new_page_table(&pml4);
		gpa = new_page_table(&pdpt);
		pml4[0] = gpa | table;
		pdpt[0] = low | table;
		pdpt[L2_GPA >> 30] = pds[i] | table;
		pdpt[(L2_GPA >> 30) + 1] = pds[(i + 1) % ROOTS] | table;
	}
	sync_global_to_guest(vm, nested_root);
}

static bool nested_npt_supported(void)
{
	struct kvm_cpuid_entry2 *svm =
		kvm_get_supported_cpuid_index(0x8000000a, 0);

	return svm && svm->edx & 1;
}

static bool nested_ept_supported(void)
{
	uint64_t controls = vcpu_get_msr(vm, 0, MSR_IA32_VMX_PROCBASED_CTLS2);

	return controls >> 32 & SECONDARY_EXEC_ENABLE_EPT;
}

static void log_recycled_nested(void)
{
	struct vmx_pages *vmx;
	pthread_t vcpu;
	vm_vaddr_t gva;
	uint64_t i;

	if (nested_svm_supported()) {
		if (!nested_npt_supported())
			test_case_skip("no nested paging for guests");
		create_with_code(RING_ENTRIES, l1_svm_code);
		new_nested_roots(NPT_TABLE, NPT_LARGE);
		vcpu_alloc_svm(vm, &gva);
	} else if (nested_vmx_supported()) {
		create_with_code(RING_ENTRIES, l1_vmx_code);
		if (!nested_ept_supported())
			test_case_skip("no EPT for guests");
		new_nested_roots(EPT_TABLE, EPT_LARGE);
		vmx = vcpu_alloc_vmx(vm, &gva);
		vmx->eptp_gpa = nested_root[0];
	} else {
		test_case_skip("no nested SVM, nor VMX");
	}
	vcpu_args_set(vm, 0, 1, gva);
	recycle_set_slot();
	for (i = 0; i < RECYCLE_PAGES; i++)
		recycle.page[i] = i / 4 * PTES + i % 4;
	virt_map(vm, L2_GVA, L2_GPA, 4, 0);
	virt_map(vm, L2_GVA + HUGE, L2_GPA + (1UL << 30), 4, 0);
	vcpu_start(&vcpu, 0, 0, 0);
	/* At least four shadow pages a root */
	recycle_test(vcpu, RECYCLE_PAGES, MIN_MMU_PAGES / 4);
}

/*
 * Frames with as many mappings as KVM allows: their number must not count twice,
 * for each mapping all mappings of the frame.
 */

#define ALIASES		900
#define ALIAS_FRAMES	8
#define ALIAS_PTES	(ALIASES * ALIAS_FRAMES)
#define ALIAS_TRIES	5

/* Map frames, and those again. */
static void create_aliases(uint64_t frames)
{
	uint64_t i;

	create(RING_ENTRIES);
	mem_a = small_pages(LARGE_SIZE);
	set_slot(SLOT_A, GPA_A, mem_a, LARGE_SIZE, 0);
	for (i = 0; i < ALIAS_PTES; i++)
		virt_map(vm, GVA + i * PAGE, GPA_A + i % frames * PAGE, 1, 0);
}

/* Have all mappings writable, then switch logging. Return the least time. */
static uint64_t time_aliases(uint64_t frames)
{
	uint64_t i, start, ns, best = UINT64_MAX;

	create_aliases(frames);
	for (i = 0; i < ALIAS_TRIES; i++) {
		run_todo(DO_WRITE, GVA, ALIAS_PTES, PAGE);
		EXPECT(collect(), 0);
		start = now_ns();
		set_slot(SLOT_A, GPA_A, mem_a, LARGE_SIZE,
			 KVM_MEM_LOG_DIRTY_PAGES);
		set_slot(SLOT_A, GPA_A, mem_a, LARGE_SIZE, 0);
		ns = now_ns() - start;
		if (ns < best)
			best = ns;
	}
	return best;
}

static void log_aliases(void)
{
	uint64_t i, single, many;

	if (two_dimensional_paging())
		test_case_skip("KVM does not follow the guest's page tables");

	single = time_aliases(ALIAS_PTES);
	kvm_vm_free(vm);
	many = time_aliases(ALIAS_FRAMES);
	pr_info("%u pages: %lu us; %u pages, %u times each: %lu us\n",
		ALIAS_PTES, single / 1000, ALIAS_FRAMES, ALIASES, many / 1000);
	TEST_ASSERT(many < 10 * single, "%lu us, not about %lu us", many / 1000,
		    single / 1000);

	/* All of them are writable, and then only one of each page. */
	run_todo(DO_WRITE, GVA, ALIAS_PTES, PAGE);
	for (i = 0; i < ALIASES; i += 224) {
		set_slot(SLOT_A, GPA_A, mem_a, LARGE_SIZE,
			 KVM_MEM_LOG_DIRTY_PAGES);
		run_todo(DO_WRITE, GVA + i * ALIAS_FRAMES * PAGE, ALIAS_FRAMES,
			 PAGE);
		expect(SLOT_A, 0, ALIAS_FRAMES);
		run_todo(DO_WRITE, GVA + i * ALIAS_FRAMES * PAGE, ALIAS_FRAMES,
			 PAGE);
		set_slot(SLOT_A, GPA_A, mem_a, LARGE_SIZE, 0);
		expect(SLOT_A, 0, ALIAS_FRAMES);
		set_slot(SLOT_A, GPA_A, mem_a, LARGE_SIZE,
			 KVM_MEM_LOG_DIRTY_PAGES);
		run_todo(DO_WRITE, GVA + i * ALIAS_FRAMES * PAGE, ALIAS_FRAMES,
			 PAGE);
		expect(SLOT_A, 0, ALIAS_FRAMES);
		set_slot(SLOT_A, GPA_A, mem_a, LARGE_SIZE, 0);
		/* No log: a write makes the mapping writable, the others stay. */
		run_todo(DO_WRITE, GVA, ALIAS_PTES, PAGE);
		EXPECT(collect(), 0);
	}
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
	{ "log-kept: mappings stay, the thread is preempted", log_kept },
	{ "log-recycled: shadow pages are recycled meanwhile", log_recycled },
	{ "log-recycled-nested: those of a guest's guest, too", log_recycled_nested },
	{ "log-aliases: many mappings of a page", log_aliases },
};

int main(int argc, char **argv)
{
	dirty_ring_check_supported();
	test_cases_main(argc, argv, cases, ARRAY_SIZE(cases));
}
