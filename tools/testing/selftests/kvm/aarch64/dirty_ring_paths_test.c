// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test the ways a page gets dirty that only arm64 has, or has otherwise
 *
 * One case a way: memory mapped in blocks when logging is switched on, written
 * or executed, and steal time, the one thing that KVM writes for a vCPU that
 * runs. Ordinary writes of the guest are in dirty_ring_test, what is written
 * for a GIC is in dirty_ring_its_test.
 *
 * Try, harvest and reset each way more than once: the second time shows that
 * the page was write-protected again.
 */

#include <sys/mman.h>

#include "test_util.h"
#include "kvm_util.h"
#include "dirty_ring_vm.h"
#include "test_cases.h"

#define ROUNDS		3

/* Writes to memory in blocks: to some pages, so far apart; or to all */
#define APART_WRITES	60
#define APART_STRIDE	17
#define ALL_WRITES	1024

/* Have the tracked memslot be this memory. */
static void set_slot(struct ring_vm *rv, void *mem, size_t size,
		     uint32_t flags)
{
	ring_vm_set_slot(rv, RING_VM_GPA, mem, size, flags);
}

/* How often the vCPUs left the guest */
static long vm_exits(struct ring_vm *rv)
{
	return ring_vm_stat(rv, "exits");
}

static void write_blocks(struct ring_vm *rv, uint32_t writes, uint32_t stride)
{
	ring_vm_set_task(rv, 0, 0, writes, stride);
	EXPECT(ring_vm_run(rv, 0), RING_VM_DONE);
}

/* Expect nothing in the bitmap: what a vCPU writes is in its ring only. */
static void expect_clean_bitmap(struct ring_vm *rv, size_t size)
{
	size_t i, words = size / getpagesize() / 64;
	uint64_t *bitmap = calloc(words, sizeof(*bitmap));

	TEST_ASSERT(bitmap, "Insufficient Memory");
	kvm_vm_get_dirty_log(rv->vm, RING_VM_SLOT, bitmap);
	for (i = 0; i < words; i++)
		EXPECT(bitmap[i], 0);
	free(bitmap);
}

static void logged_blocks(size_t size, unsigned int shift, uint32_t writes,
			  uint32_t stride, uint32_t vm_flags)
{
	void *mem = map_huge_pages(size, shift);
	struct ring_vm *rv;
	uint32_t i, round;
	long before;

	rv = ring_vm_create(4096, 1, writes * stride, vm_flags, NULL);
	set_slot(rv, NULL, 0, 0);
	set_slot(rv, mem, size, 0);

	for (round = 0; round < ROUNDS; round++) {
		before = vm_exits(rv);
		write_blocks(rv, writes, stride);
		TEST_ASSERT(round || vm_exits(rv) - before < writes / 2,
			    "The memory is not mapped in blocks");
		EXPECT(ring_vm_collect(rv), 0);

		/* Each page is reported once, whatever its block */
		set_slot(rv, mem, size, KVM_MEM_LOG_DIRTY_PAGES);
		write_blocks(rv, writes, stride);
		write_blocks(rv, writes, stride);
		EXPECT(ring_vm_collect(rv), writes);
		for (i = 0; i < writes; i++)
			EXPECT(rv->order[i], i * stride);
		write_blocks(rv, writes, stride);
		EXPECT(ring_vm_collect(rv), writes);
		for (i = 0; i < rv->pages; i++)
			EXPECT(rv->seen[i], i % stride ? 0 : 2);
		ring_vm_forget(rv);
		if (vm_flags & RING_VM_WITH_BITMAP)
			expect_clean_bitmap(rv, size);

		/* Map it in blocks again in the next round. */
		set_slot(rv, NULL, 0, 0);
		set_slot(rv, mem, size, 0);
	}
	ring_vm_free(rv);
	munmap(mem, size);
}

static void blocks_2m(void)
{
	logged_blocks(4UL << 20, 21, APART_WRITES,
		      APART_STRIDE, 0);
}

static void blocks_2m_all(void)
{
	logged_blocks(4UL << 20, 21, ALL_WRITES, 1, 0);
}

static void blocks_2m_bitmap(void)
{
	logged_blocks(4UL << 20, 21, ALL_WRITES, 1,
		      RING_VM_WITH_BITMAP);
}

static void blocks_1g(void)
{
	logged_blocks(1UL << 30, 30, APART_WRITES,
		      APART_STRIDE, 0);
}

static void blocks_1g_bitmap(void)
{
	logged_blocks(1UL << 30, 30, APART_WRITES,
		      APART_STRIDE, RING_VM_WITH_BITMAP);
}

/*
 * A block that the guest wrote becomes a table when it is executed for the
 * first time while it is logged, if the CPU has to be told (CTR_EL0.DIC is 0).
 * Do that more often than a vCPU has pages for tables in stock, with no other
 * fault in between.
 */
#define EXEC_ROUNDS	64

static void guest_exec(uint64_t gva)
{
	uint32_t *code = (void *)gva;

	while (true) {
		WRITE_ONCE(*code, 0xd65f03c0); /* ret */
		asm volatile("dc cvau, %0\n\t"
			     "dsb ish\n\t"
			     "ic ivau, %0\n\t"
			     "dsb ish\n\t"
			     "isb" : : "r" (code) : "memory");
		GUEST_SYNC(0);
		((void (*)(void))code)();
		GUEST_SYNC(0);
	}
}

static void executed_blocks(void)
{
	size_t size = 2UL << 20;
	void *mem = map_huge_pages(size, 21);
	bool warned = kernel_warned();
	struct ring_vm *rv;
	int i;

	rv = ring_vm_create(ring_vm_min_entries(), 1, size / getpagesize(), 0,
			    NULL);
	set_slot(rv, NULL, 0, 0);
	ring_vm_set_code(rv, 0, guest_exec, RING_VM_GVA);
	for (i = 0; i < EXEC_ROUNDS; i++) {
		set_slot(rv, mem, size, 0);
		EXPECT(ring_vm_run(rv, 0), RING_VM_DONE);
		set_slot(rv, mem, size, KVM_MEM_LOG_DIRTY_PAGES);
		EXPECT(ring_vm_run(rv, 0), RING_VM_DONE);
		EXPECT(ring_vm_collect(rv), 0);
	}
	EXPECT(kernel_warned(), warned);
	ring_vm_free(rv);
	munmap(mem, size);
}

static void steal_time(void)
{
	struct ring_vm *rv = ring_vm_create(ring_vm_min_entries(), 1, 64,
					    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	int i;

	if (!ring_vm_set_steal_time(rv, 0, RING_VM_GPA + 5 * getpagesize()))
		test_case_skip("KVM has no steal time");
	/* Written, and reported, each time the vCPU is loaded. */
	for (i = 0; i < ROUNDS; i++) {
		ring_vm_write(rv, 0, 0, 0);
		EXPECT(ring_vm_collect(rv), 1);
		ring_vm_expect(rv, 5, 1);
	}
	ring_vm_free(rv);
}

/* Expect that all flushes are counted, which no other architecture does. */
static void flushes(void)
{
	struct ring_vm *rv = ring_vm_create(ring_vm_min_entries(), 1, 64,
					    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	long before;
	int i;

	for (i = 0; i < ROUNDS; i++) {
		ring_vm_write(rv, 0, 0, 64);
		EXPECT(ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL), 64);
		before = ring_vm_stat(rv, "remote_tlb_flush");
		EXPECT(vm_reset_dirty_rings(rv->vm), 64);
		EXPECT(ring_vm_stat(rv, "remote_tlb_flush") - before, 1);
		EXPECT(vm_reset_dirty_rings(rv->vm), 0);
		EXPECT(ring_vm_stat(rv, "remote_tlb_flush") - before, 1);
	}
	ring_vm_free(rv);
}

static const struct test_case cases[] = {
	{ "blocks-2m: tracked when mapped with 2 MiB blocks", blocks_2m },
	{ "blocks-2m-all: every page of them", blocks_2m_all },
	{ "blocks-2m-bitmap: the same with bitmaps beside the rings",
	  blocks_2m_bitmap },
	{ "blocks-1g: tracked when mapped with 1 GiB blocks", blocks_1g },
	{ "blocks-1g-bitmap: the same with bitmaps beside the rings",
	  blocks_1g_bitmap },
	{ "blocks-exec: executed for the first time when tracked",
	  executed_blocks },
	{ "steal-time", steal_time },
	{ "flushes: one for each reset, counted in debugfs", flushes },
};

int main(int argc, char **argv)
{
	dirty_ring_check_supported();
	test_cases_main(argc, argv, cases, ARRAY_SIZE(cases));
}
