/* SPDX-License-Identifier: GPL-2.0 */
#ifndef VIRT_KVM_DIRTY_RING_H
#define VIRT_KVM_DIRTY_RING_H

/*
 * What dirty_ring.c and dirty_ring_setup.c share. The rest of KVM needs
 * include/linux/kvm_dirty_ring.h only.
 */

#include <linux/kvm_host.h>
#include <linux/spinlock.h>
#include <linux/types.h>

/* Groups of 64 pages that the overflow keeps page by page. */
#define OVERFLOW_ENTRIES	4096
#define OVERFLOW_HASH_BITS	11

/* At least one for each possible memslot of all address spaces. */
#define OVERFLOW_RANGES		(KVM_ADDRESS_SPACE_NUM * KVM_MEM_SLOTS_NUM)

/**
 * struct overflow_entry - overflow pages of one group of 64
 * @slot:	address space id << 16 | memslot id
 * @word:	the group's number: page index in the memslot, divided by 64
 * @mask:	which of the 64 pages, at least one
 */
struct overflow_entry {
	u32 slot;
	u32 word;
	u64 mask;
};

/**
 * struct overflow_range - consecutive overflow pages
 * @slot:	address space id << 16 | memslot id
 * @first:	index of the first page in the memslot
 * @end:	index of the page after the last one
 */
struct overflow_range {
	u32 slot;
	u32 first;
	u32 end;
};

/**
 * struct kvm_dirty_overflow - dirty pages of a VM for which no ring had room
 * @lock:	protects all other members. A raw spinlock, taken with interrupts
 *		disabled: it nests inside the runqueue's lock when steal time is
 *		written. Hold it while a page moves between the overflow and a
 *		ring, so that a reset that makes room sees "no ring has room" and
 *		"the page is in the overflow" as one step.
 * @stopped:	the VM is being destroyed; vCPUs and their rings go one by one
 * @nr_pages:	pages in @entry
 * @nr_entries:	valid elements of @entry
 * @nr_ranges:	valid elements of @range
 * @hash:	index of the newest entry with each hash, plus one; 0 if none
 * @next:	index of the next older entry with the same hash, as in @hash
 * @entry:	exact pages, in order of arrival. Only the last entry is removed.
 * @range:	pages that arrived while @entry was full, in order; ranges neither
 *		overlap nor touch. If there are more than OVERFLOW_RANGES, merge
 *		the closest two: reporting pages that are not dirty costs userspace
 *		a copy each, but the size of this structure must not depend on the
 *		size of the guest.
 */
struct kvm_dirty_overflow {
	raw_spinlock_t lock;
	bool stopped;
	u32 nr_pages;
	u32 nr_entries;
	u32 nr_ranges;
	u16 hash[1 << OVERFLOW_HASH_BITS];
	u16 next[OVERFLOW_ENTRIES];
	struct overflow_entry entry[OVERFLOW_ENTRIES];
	struct overflow_range range[OVERFLOW_RANGES + 1];
};

#endif /* VIRT_KVM_DIRTY_RING_H */
