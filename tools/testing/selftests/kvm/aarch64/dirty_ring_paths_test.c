// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test the ways a page gets dirty that only arm64 has, or has otherwise
 *
 * One case a way: memory mapped in blocks when logging is switched on, and the
 * steal time, the one thing that KVM writes for a vCPU that runs. Ordinary
 * writes of the guest are in dirty_ring_test, what is written for a GIC is in
 * dirty_ring_its_test.
 *
 * Each way is tried, harvested and reset more than once: the second time shows
 * that the page was write-protected again.
 */

#include <sys/mman.h>

#include "test_util.h"
#include "kvm_util.h"
#include "dirty_ring_vm.h"
#include "test_cases.h"

#define ROUNDS		3

/* Writes to memory in blocks, to pages that are this far apart */
#define BLOCK_WRITES	60
#define BLOCK_STRIDE	17

/* Have the tracked memslot be this memory. */
static void set_slot(struct ring_vm *rv, void *mem, size_t size,
		     uint32_t flags)
{
	struct kvm_userspace_memory_region region = {
		.slot = RING_VM_SLOT,
		.flags = flags,
		.guest_phys_addr = RING_VM_GPA,
		.memory_size = size,
		.userspace_addr = (uintptr_t)mem,
	};

	vm_ioctl(rv->vm, KVM_SET_USER_MEMORY_REGION, &region);
}

/* How often the vCPUs left the guest */
static long vm_exits(struct ring_vm *rv)
{
	char path[64];
	FILE *file;
	long n;

	snprintf(path, sizeof(path), "/sys/kernel/debug/kvm/%d-%d/exits",
		 getpid(), vm_get_fd(rv->vm));
	file = fopen(path, "r");
	if (!file)
		test_case_skip("there is no %s", path);
	EXPECT(fscanf(file, "%ld", &n), 1);
	fclose(file);
	return n;
}

static void write_apart(struct ring_vm *rv)
{
	ring_vm_set_task(rv, 0, 0, BLOCK_WRITES, BLOCK_STRIDE);
	EXPECT(ring_vm_run(rv, 0), RING_VM_DONE);
}

static void logged_blocks(size_t size, int flags)
{
	struct ring_vm *rv;
	uint32_t i, round;
	long before;
	void *mem;

	mem = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE |
		   MAP_ANONYMOUS | MAP_HUGETLB | MAP_POPULATE | flags, -1, 0);
	if (mem == MAP_FAILED)
		test_case_skip("no free huge pages of this size");

	rv = ring_vm_create(ring_vm_min_entries(), 1,
			    BLOCK_WRITES * BLOCK_STRIDE, 0, NULL);
	set_slot(rv, NULL, 0, 0);
	set_slot(rv, mem, size, 0);

	for (round = 0; round < ROUNDS; round++) {
		before = vm_exits(rv);
		write_apart(rv);
		TEST_ASSERT(round || vm_exits(rv) - before < BLOCK_WRITES / 2,
			    "The memory is not mapped in blocks");
		EXPECT(ring_vm_collect(rv), 0);

		/* Each page on its own, and the second time not at all */
		set_slot(rv, mem, size, KVM_MEM_LOG_DIRTY_PAGES);
		write_apart(rv);
		write_apart(rv);
		EXPECT(ring_vm_collect(rv), BLOCK_WRITES);
		for (i = 0; i < BLOCK_WRITES; i++)
			EXPECT(rv->order[i], i * BLOCK_STRIDE);
		write_apart(rv);
		EXPECT(ring_vm_collect(rv), BLOCK_WRITES);
		for (i = 0; i < rv->pages; i++)
			EXPECT(rv->seen[i], i % BLOCK_STRIDE ? 0 : 2);
		ring_vm_forget(rv);

		/* In blocks again, next time */
		set_slot(rv, NULL, 0, 0);
		set_slot(rv, mem, size, 0);
	}
	ring_vm_free(rv);
	munmap(mem, size);
}

static void blocks_2m(void)
{
	logged_blocks(4UL << 20, 21 << MAP_HUGE_SHIFT);
}

static void blocks_1g(void)
{
	logged_blocks(1UL << 30, 30 << MAP_HUGE_SHIFT);
}

static void steal_time(void)
{
	struct ring_vm *rv = ring_vm_create(ring_vm_min_entries(), 1, 64,
					    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	int i;

	if (!ring_vm_set_steal_time(rv, 0, RING_VM_GPA + 5 * getpagesize()))
		test_case_skip("KVM knows no steal time");
	/* Written, and reported, each time the vCPU is loaded. */
	for (i = 0; i < ROUNDS; i++) {
		ring_vm_write(rv, 0, 0, 0);
		EXPECT(ring_vm_collect(rv), 1);
		ring_vm_expect(rv, 5, 1);
	}
	ring_vm_free(rv);
}

static const struct test_case cases[] = {
	{ "blocks-2m: tracked when mapped with 2 MiB blocks", blocks_2m },
	{ "blocks-1g: tracked when mapped with 1 GiB blocks", blocks_1g },
	{ "steal-time", steal_time },
};

int main(int argc, char **argv)
{
	dirty_ring_check_supported();
	test_cases_main(argc, argv, cases, ARRAY_SIZE(cases));
}
