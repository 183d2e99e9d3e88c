// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test that what userspace forges in KVM's dirty ring does no harm
 *
 * Show, one case each, that
 *  - whatever the flags, a reset goes no further than what KVM pushed,
 *  - it skips, and counts, an entry whose slot or offset names no page, or one
 *    that is gone.
 */

#define _GNU_SOURCE /* for program_invocation_name */

#include "test_util.h"
#include "kvm_util.h"
#include "dirty_ring_vm.h"
#include "test_cases.h"

#define SLOT_PAGES	4096

/* Set the flags of all entries but those from @first on. */
static void forge_flags(struct ring_vm *rv, uint32_t first, uint32_t count,
			uint32_t flags)
{
	struct kvm_dirty_gfn *ring = vcpu_dirty_ring(rv->vm, 0);
	uint32_t i;

	for (i = count; i < rv->entries; i++)
		WRITE_ONCE(ring[(first + i) % rv->entries].flags, flags);
}

static void forged_harvest(void)
{
	static const uint32_t flags[] = {
		KVM_DIRTY_GFN_F_RESET, KVM_DIRTY_GFN_F_MASK, UINT32_MAX,
	};
	struct ring_vm *rv;
	uint32_t i, pos, batch;

	for (i = 0; i < ARRAY_SIZE(flags); i++) {
		rv = ring_vm_create_small(SLOT_PAGES);
		batch = rv->limit / 2 + 3;

		/* Nothing was pushed: nothing is reset. */
		forge_flags(rv, 0, 0, flags[i]);
		EXPECT(vm_reset_dirty_rings(rv->vm), 0);
		ring_vm_expect_flags(rv, 0, 0, rv->entries, flags[i]);

		/* No more than what was pushed, anywhere in the ring. */
		for (pos = 0; pos < 5 * rv->entries; pos += batch) {
			ring_vm_write(rv, 0, 0, batch);
			forge_flags(rv, pos, batch, flags[i]);
			ring_vm_expect_flags(rv, 0, pos, batch,
					     KVM_DIRTY_GFN_F_DIRTY);
			EXPECT(vm_reset_dirty_rings(rv->vm), 0);
			EXPECT(ring_vm_harvest(rv, 0, batch), batch);
			ring_vm_expect(rv, 0, batch);
			EXPECT(vm_reset_dirty_rings(rv->vm), batch);
			EXPECT(vm_reset_dirty_rings(rv->vm), 0);
		}

		/* The soft limit is where it was. */
		ring_vm_set_task(rv, 0, 0, rv->limit, 1);
		EXPECT(ring_vm_run(rv, 0), RING_VM_FULL);
		EXPECT(ring_vm_harvest(rv, 0, rv->limit), rv->limit);
		EXPECT(vm_reset_dirty_rings(rv->vm), rv->limit);
		EXPECT(ring_vm_run(rv, 0), RING_VM_DONE);
		ring_vm_free(rv);
	}
}

static void forged_flags(void)
{
	struct ring_vm *rv = ring_vm_create_small(SLOT_PAGES);
	struct kvm_dirty_gfn *ring = vcpu_dirty_ring(rv->vm, 0);

	/* An entry that userspace empties is not harvested. */
	ring_vm_write(rv, 0, 0, 5);
	dirty_gfn_set_harvested(&ring[0]);
	WRITE_ONCE(ring[1].flags, 0);
	dirty_gfn_set_harvested(&ring[2]);
	EXPECT(vm_reset_dirty_rings(rv->vm), 1);
	EXPECT(vm_reset_dirty_rings(rv->vm), 0);
	dirty_gfn_set_harvested(&ring[1]);
	EXPECT(vm_reset_dirty_rings(rv->vm), 2);

	/* Nor is one with all flags but RESET. */
	WRITE_ONCE(ring[3].flags, ~KVM_DIRTY_GFN_F_RESET);
	EXPECT(vm_reset_dirty_rings(rv->vm), 0);
	dirty_gfn_set_harvested(&ring[3]);
	dirty_gfn_set_harvested(&ring[4]);
	EXPECT(vm_reset_dirty_rings(rv->vm), 2);

	/*
	 * The whole ring zeroed: full until it is harvested, and no harm done
	 */
	ring_vm_set_task(rv, 0, 0, rv->limit + 1, 1);
	EXPECT(ring_vm_run(rv, 0), RING_VM_FULL);
	memset(ring, 0, rv->entries * sizeof(*ring));
	EXPECT(vm_reset_dirty_rings(rv->vm), 0);
	EXPECT(ring_vm_run(rv, 0), RING_VM_FULL);
	forge_flags(rv, 0, 0, KVM_DIRTY_GFN_F_RESET);
	EXPECT(vm_reset_dirty_rings(rv->vm), rv->limit);
	EXPECT(vm_reset_dirty_rings(rv->vm), 0);

	ring_vm_free(rv);
}

/* Reset good entries, and those among them that the callback forges. */
static void forge(void (*fn)(struct kvm_dirty_gfn *ring, uint32_t *n))
{
	struct ring_vm *rv = ring_vm_create_small(SLOT_PAGES);
	struct kvm_dirty_gfn *ring = vcpu_dirty_ring(rv->vm, 0);
	uint32_t i, n = rv->limit - 1, forged = n - 1;

	ring_vm_write(rv, 0, 0, n);

	/* Leave the first one good, and the last. */
	fn(ring, &forged);
	for (i = 0; i < n; i++)
		dirty_gfn_set_harvested(&ring[i]);
	/* Skipped, but counted */
	EXPECT(vm_reset_dirty_rings(rv->vm), n);
	ring_vm_expect_flags(rv, 0, 0, rv->entries, 0);
	ring_vm_free(rv);

	/*
	 * Once more, with every third one forged, and see what was protected.
	 */
	rv = ring_vm_create_small(SLOT_PAGES);
	ring = vcpu_dirty_ring(rv->vm, 0);
	n = rv->limit - 1;
	ring_vm_write(rv, 0, 0, n);
	forged = n - 1;
	fn(ring, &forged);
	for (i = 0; i < n; i++) {
		if (i % 3 != 1) {
			ring[i].slot = RING_VM_SLOT;
			ring[i].offset = i;
		}
		dirty_gfn_set_harvested(&ring[i]);
	}
	EXPECT(vm_reset_dirty_rings(rv->vm), n);

	/* Pages with good entries are protected, and reported again. */
	ring_vm_write(rv, 0, 0, n);
	for (i = 0; i < rv->entries; i++) {
		uint32_t pos = (n + i) % rv->entries;

		if (!dirty_gfn_is_dirty(&ring[pos]))
			break;
		EXPECT(ring[pos].slot, RING_VM_SLOT);
		TEST_ASSERT(ring[pos].offset < n,
			    "Page %#llx is reported but was not written",
			    ring[pos].offset);
		rv->seen[ring[pos].offset]++;
		dirty_gfn_set_harvested(&ring[pos]);
	}
	EXPECT(vm_reset_dirty_rings(rv->vm), i);
	for (i = 0; i < n; i++)
		if (i % 3 != 1 || i > forged)
			EXPECT(rv->seen[i], 1);
	ring_vm_free(rv);
}

static void forge_slots(struct kvm_dirty_gfn *ring, uint32_t *n)
{
	/* No memslot; none possible; bad address space */
	static const uint32_t slots[] = {
		2, 31, 508, 509, 510, 511, 512, 513, 0x7ffe, 0x7fff, 0x8000,
		0xfffe, 0xffff, 0x10000, 0x10001, 0x1ffff, 0x20000, 0x20001,
		0x7fff0001, 0x80000001, 0xffff0000, 0xffff0001, UINT32_MAX,
	};
	uint32_t i;

	for (i = 0; i < *n; i++)
		ring[1 + i].slot = slots[i % ARRAY_SIZE(slots)];
}

static void forged_slot(void)
{
	forge(forge_slots);
}

static void forge_offsets(struct kvm_dirty_gfn *ring, uint32_t *n)
{
	uint64_t base = RING_VM_GPA / getpagesize();
	const uint64_t offsets[] = {
		/* Just past the slot, and too far for a distance of 64 */
		SLOT_PAGES, SLOT_PAGES - 1, SLOT_PAGES + 1, SLOT_PAGES + 62,
		SLOT_PAGES + 63, SLOT_PAGES + 64,
		/* Good once cut to 32 bits, or shifted to an address */
		1UL << 32, (1UL << 32) + 3, 1UL << 52, (1UL << 52) + 3,
		1UL << 31, UINT32_MAX, 1UL << 63, INT64_MAX,
		/* In another slot once added to the base frame */
		-base, -base + 1, -base - 1,
	};
	uint32_t i;

	for (i = 0; i < *n; i++)
		ring[1 + i].offset = offsets[i % ARRAY_SIZE(offsets)];
}

static void forged_offset(void)
{
	forge(forge_offsets);
}

static void forge_wrapping_offsets(struct kvm_dirty_gfn *ring, uint32_t *n)
{
	/*
	 * Near 2^64: good, and in one batch with the offset before, for a check
	 * that looks at their distance only.
	 */
	static const int64_t offsets[] = {
		-1, 0, -1, 62, -10, 5, 5, -10, -63, 0, -64, -1, -64, 63, 0,
		-63, 10, -53, SLOT_PAGES - 1, -1, -2, -3, -4, 3, 2, 1,
	};
	uint32_t i;

	for (i = 0; i < *n; i++)
		ring[1 + i].offset = offsets[i % ARRAY_SIZE(offsets)];
}

static void wrapping_offset(void)
{
	forge(forge_wrapping_offsets);
}

static void removed_slot(void)
{
	struct ring_vm *rv = ring_vm_create_small(SLOT_PAGES);
	uint64_t pages = vm_num_guest_pages(VM_MODE_DEFAULT, SLOT_PAGES);

	/* Delete the memslot before its pages are reset. */
	ring_vm_write(rv, 0, 1000, 20);
	EXPECT(ring_vm_harvest(rv, 0, 10), 10);
	vm_mem_region_delete(rv->vm, RING_VM_SLOT);
	EXPECT(vm_reset_dirty_rings(rv->vm), 10);

	/* Have it back, too small for the other pages. */
	vm_userspace_mem_region_add(rv->vm, VM_MEM_SRC_ANONYMOUS, RING_VM_GPA,
				    RING_VM_SLOT, pages / 8,
				    KVM_MEM_LOG_DIRTY_PAGES);
	rv->mem = addr_gpa2hva(rv->vm, RING_VM_GPA);
	EXPECT(ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL), 10);
	EXPECT(vm_reset_dirty_rings(rv->vm), 10);
	ring_vm_expect(rv, 1000, 20);

	ring_vm_write(rv, 0, 100, 20);
	EXPECT(ring_vm_collect(rv), 20);
	ring_vm_expect(rv, 100, 20);

	ring_vm_free(rv);
}

static const struct test_case cases[] = {
	{ "forged-harvest: nothing beyond what was pushed", forged_harvest },
	{ "forged-flags", forged_flags },
	{ "forged-slot: skipped and counted", forged_slot },
	{ "forged-offset: skipped and counted", forged_offset },
	{ "wrapping-offset: skipped and counted", wrapping_offset },
	{ "removed-slot: skipped and counted", removed_slot },
};

int main(int argc, char **argv)
{
	dirty_ring_check_supported();
	test_cases_main(argc, argv, cases, ARRAY_SIZE(cases));
}
