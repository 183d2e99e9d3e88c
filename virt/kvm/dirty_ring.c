// SPDX-License-Identifier: GPL-2.0
/*
 * KVM dirty rings: per-vCPU rings of dirty page numbers
 *
 * Flow
 * ----
 * A write fault, or the CPU's own log, marks a page dirty, and KVM pushes the
 * page to the ring of the running vCPU. Userspace reads the ring in place, marks
 * the entries it has read as harvested, and asks for a reset. The reset
 * write-protects the harvested pages again and returns their entries to KVM.
 * Documentation/virt/kvm/dirty-ring.rst describes the interface.
 *
 * Ownership
 * ---------
 * An entry belongs to one side at a time, and its flags say to which:
 *
 *	flags		entry		owner		until
 *	0		empty		KVM		a push writes DIRTY
 *	DIRTY		published	userspace	userspace writes RESET
 *	RESET (any)	harvested	KVM		a reset writes 0
 *
 * "RESET (any)" is RESET with or without DIRTY.
 *
 * head counts claimed entries, tail counts reset ones; userspace sees neither.
 * Every push advances head with an atomic operation, a reset advances tail
 * under reset_lock. Entries from tail up to head are in use, all others are
 * empty.
 *
 * Ordering
 * --------
 *  - A push writes slot and offset, then store-releases DIRTY; userspace
 *    load-acquires flags.
 *  - Userspace store-releases RESET; a reset load-acquires flags.
 *  - A reset writes 0 to flags, then store-releases tail and soft_end; a push
 *    reads tail or soft_end, then claims an entry, which is a full barrier.
 *    Hence a claimed entry is empty.
 *
 * Documentation/litmus-tests/kvm has a test for each of these, and for all other
 * ordering in this file.
 *
 * What a reset relies on
 * ----------------------
 * Userspace can write anything to a ring, at any time. A reset relies on head and
 * tail only: it reads flags, slot and offset once, checks slot and offset against
 * the memslots, and lets flags decide nothing but where it stops. It does not
 * look at or past the value that head had when the reset of the ring began.
 * Hence entries that were never pushed have no effect whatever userspace writes
 * to them, and a reset ends even if vCPUs and userspace keep going. A forged
 * entry can make KVM skip a push, see ring_pushed_recently(), and so hide a dirty
 * page from the userspace that forged it, and from nobody else.
 *
 * Return an entry to KVM, and count it, only after its page is write-protected.
 * A fatal signal ends a reset, but never between the two; other signals do not
 * end it.
 *
 * Contexts and locks of a push
 * ----------------------------
 * Pages are marked dirty with mmu_lock held, in a context switch with the
 * runqueue locked (steal time), in an interrupt (the CPU's own log), and in plain
 * process context. Several tasks may push to one ring at the same time. Hence a
 * vCPU pushes to its own ring without a lock; only a page that finds no room
 * there takes one, that of struct kvm_dirty_overflow. Disable preemption from the
 * claim of an entry until it is published. An interrupt may push to the same ring
 * in between; it completes its own push.
 *
 * Layers of a push
 * ----------------
 * A push chooses where a page goes: kvm_dirty_ring_push(), with push_slow(), for
 * what the guest writes; kvm_dirty_ring_push_once() for what KVM writes; both with
 * push_fallback(), without a running vCPU or without room in its ring. An add puts
 * the page there: own_ring_add(), any_ring_add(), overflow_add(). Adding to a ring,
 * by ring_add(), takes two steps: ring_claim(), ring_publish(). The fast path of
 * kvm_dirty_ring_push() does the two on its own, and claims in a cheaper way.
 *
 * What is not pushed again
 * ------------------------
 * Report each guest write to a clean page once, by a fault or by the CPU's log.
 * KVM itself writes some pages over and over: steal time, clocks, an emulated
 * device's memory. Do not push a page that KVM rewrites while a recent,
 * unharvested entry names it: userspace reads the page only after harvesting
 * that entry.
 *
 * No running vCPU, no room
 * ------------------------
 * A vCPU exits at its soft limit before it enters the guest. What it dirties
 * before that check goes to the reserved entries above the limit. A page goes to
 * the first ring below its soft limit if
 *  - no vCPU is running: an ioctl on the VM writes guest memory;
 *  - the running vCPU's ring is full: ioctls on a vCPU write guest memory without
 *    a KVM_RUN in between, and so without that check.
 *
 * If no ring is below its soft limit, the page goes to the VM's overflow. The
 * ioctl that makes room, a reset or the creation of a vCPU, drains the overflow
 * before it returns. No entry in use is overwritten, and no page is dropped,
 * until the VM is destroyed: from then on a vCPU pushes to its own ring only.
 *
 * If userspace has asked for bitmaps beside the rings, pages dirtied without a
 * running vCPU go to the memslot's bitmap instead. No other pages do.
 *
 * What a sync waits for
 * ---------------------
 * A sync must wait for every dirty page that is not in a ring yet:
 *  - pages in a CPU's own log; the architecture's part
 *  - pages that a fault made writable and has not marked; the architecture's part
 *  - pages in the overflow
 *  - claimed entries that are not published: userspace cannot harvest the entries
 *    behind them. A ring has none if as many entries were published, by its vCPU
 *    and by others, as were claimed.
 */

#include <linux/kvm_host.h>
#include <linux/kvm_dirty_ring.h>
#include <linux/hash.h>
#include <linux/mm.h>
#include <linux/nospec.h>
#include <linux/sched/signal.h>
#include <trace/events/kvm.h>

#include "dirty_ring.h"

/*
 * Max pages to write-protect at a time, and to drain from the overflow with
 * interrupts disabled.
 */
#define BATCH_PAGES	64

/* Max runs of pages of the same memslot to write-protect at a time */
#define BATCH_RUNS	8

/**
 * struct dirty_page - a page, as an entry of a dirty ring identifies it
 * @offset:	page index in the memslot
 * @slot:	address space id << 16 | memslot id
 */
struct dirty_page {
	u64 offset;
	u32 slot;
};

static struct dirty_page dirty_page(struct kvm_memory_slot *memslot, u64 offset)
{
	struct dirty_page page = {
		.offset = offset,
		.slot = memslot->as_id << 16 | (u16)memslot->id,
	};

	return page;
}

static struct dirty_page dirty_page_of_gfn(struct kvm_memory_slot *memslot,
					   gfn_t gfn)
{
	return dirty_page(memslot, gfn - memslot->base_gfn);
}

/**
 * struct reset_batch - harvested entries that are reset together
 * @nr:		number of entries
 * @nr_runs:	valid elements of @run
 * @run:	pages [previous end, end) of one memslot; empty, and memslot perhaps
 *		NULL, if no entry of the run is valid
 * @page:	page indices in the memslots
 */
struct reset_batch {
	u32 nr;
	u32 nr_runs;
	struct {
		struct kvm_memory_slot *memslot;
		u32 end;
	} run[BATCH_RUNS];
	u64 page[BATCH_PAGES];
};

static u32 ring_used(struct kvm_dirty_ring *ring)
{
	/*
	 * Acquire pairs with the release of tail in reset_release(). Reading
	 * tail first can only make the result too large.
	 */
	u32 tail = smp_load_acquire(&ring->tail);

	return atomic_read(&ring->head) - tail;
}

/*
 * Claim the next entry; fail if head reached @end. Keep preemption disabled until
 * the entry is published and counted.
 *
 * Full barrier: orders the load that @end derives from before the stores to the
 * entry. Whoever sees one of those stores sees that the entry was reset before,
 * see ring_pushed_recently().
 */
static __always_inline bool ring_claim(struct kvm_dirty_ring *ring, u32 end,
				       u32 *nr)
{
	*nr = atomic_read(&ring->head);

	do {
		if ((s32)(*nr - end) >= 0)
			return false;
	} while (!atomic_try_cmpxchg(&ring->head, (int *)nr, *nr + 1));

	return true;
}

/* Publish entry @nr, which the caller has claimed. */
static __always_inline void ring_publish(struct kvm_dirty_ring *ring, u32 nr,
					 struct dirty_page page)
{
	struct kvm_dirty_gfn *entry = &ring->entries[nr & ring->mask];

	WRITE_ONCE(entry->slot, page.slot);
	WRITE_ONCE(entry->offset, page.offset);
	/* Pairs with the acquire of flags in userspace. */
	smp_store_release(&entry->flags, KVM_DIRTY_GFN_F_DIRTY);
	/*
	 * Pairs with the barrier in ring_all_published(), and with the address
	 * dependency on ring->recent in ring_pushed_recently().
	 */
	smp_wmb();
}

/*
 * Count an entry that the vCPU has published in its own ring. Call with preemption
 * disabled. Where no interrupt pushes, local64_inc() may be atomic for nothing.
 */
static __always_inline void ring_count_own(struct kvm_dirty_ring *ring)
{
	if (IS_ENABLED(CONFIG_ARM64))
		local64_set(&ring->pushed, local64_read(&ring->pushed) + 1);
	else
		local64_inc(&ring->pushed);
}

/*
 * Add @page to the ring of @vcpu; fail if @limit entries are in use. Request an
 * exit at the soft limit. Call with preemption disabled, see ring_claim().
 */
static bool ring_add(struct kvm_vcpu *vcpu, struct dirty_page page, u32 limit)
{
	struct kvm_dirty_ring *ring = &vcpu->dirty_ring;
	u32 nr, used;

	/* Pairs with the release in reset_release(). */
	if (!ring_claim(ring, READ_ONCE(ring->tail) + limit, &nr))
		return false;

	ring_publish(ring, nr, page);
	/* Only a hint, but of a published entry, see ring_pushed_recently(). */
	WRITE_ONCE(ring->recent[page.offset % ARRAY_SIZE(ring->recent)], nr);

	used = ring_used(ring);
	trace_kvm_dirty_ring_push(vcpu->vcpu_id, page.slot, page.offset, used);
	/*
	 * One early: kvm_dirty_ring_push() may be past its check, and about to
	 * claim the next entry without a request.
	 */
	if (used + 1 >= ring->soft_limit)
		kvm_make_request(KVM_REQ_DIRTY_RING_FULL, vcpu);

	return true;
}

/*
 * Does a recent, unharvested entry of @ring name @page? Check the entry that
 * ring->recent hints at, and no other. A stale hint is harmless, but it must not
 * name an unpublished entry, whose old contents may match @page.
 */
static bool ring_pushed_recently(struct kvm_dirty_ring *ring,
				 struct dirty_page page)
{
	u32 nr = READ_ONCE(ring->recent[page.offset %
					ARRAY_SIZE(ring->recent)]);
	struct kvm_dirty_gfn *entry = &ring->entries[nr & ring->mask];
	u32 tail;

	if (READ_ONCE(entry->offset) != page.offset ||
	    READ_ONCE(entry->slot) != page.slot)
		return false;

	/*
	 * Pairs with the barrier in ring_reset(): if the entry is not harvested
	 * here, whoever reads the page after that reset sees what was written
	 * to the page before this barrier, whichever thread harvests and resets.
	 */
	smp_mb();
	if (READ_ONCE(entry->flags) != KVM_DIRTY_GFN_F_DIRTY)
		return false;

	/* The checks above are valid only if entry nr is still in use. */
	smp_rmb();
	/* As in ring_used(): head behind tail would let any entry be in use. */
	tail = smp_load_acquire(&ring->tail);
	return nr - tail < atomic_read(&ring->head) - tail;
}

/* Add @page to the ring of the running vCPU; fail if the ring is full. */
static bool own_ring_add(struct kvm_vcpu *vcpu, struct dirty_page page)
{
	struct kvm_dirty_ring *ring = &vcpu->dirty_ring;
	bool added;

	preempt_disable();
	added = ring_add(vcpu, page, ring->mask + 1);
	if (added)
		ring_count_own(ring);
	preempt_enable();

	return added;
}

/*
 * Add @page to the first ring below its soft limit; fail if there is none. Call
 * with the lock of struct kvm_dirty_overflow held.
 */
static bool any_ring_add(struct kvm *kvm, struct dirty_page page)
{
	struct kvm_dirty_ring *ring;
	struct kvm_vcpu *vcpu;
	int i;

	kvm_for_each_vcpu(i, vcpu, kvm) {
		ring = &vcpu->dirty_ring;
		if (ring_pushed_recently(ring, page)) {
			kvm->dirty_ring_stat.skipped_other++;
			return true;
		}
		if (ring_add(vcpu, page, ring->soft_limit)) {
			WRITE_ONCE(ring->pushed_other, ring->pushed_other + 1);
			kvm->dirty_ring_stat.pushed_other++;
			return true;
		}
	}

	return false;
}

static u16 *overflow_hash(struct kvm_dirty_overflow *overflow, u32 slot,
			  u32 word)
{
	u32 hash = hash_64((u64)slot << 32 | word, OVERFLOW_HASH_BITS);

	return &overflow->hash[hash];
}

static struct overflow_entry *
overflow_find_entry(struct kvm_dirty_overflow *overflow, u32 slot, u32 word)
{
	struct overflow_entry *entry;
	u16 i = *overflow_hash(overflow, slot, word);

	for (; i; i = overflow->next[i - 1]) {
		entry = &overflow->entry[i - 1];
		if (entry->word == word && entry->slot == slot)
			return entry;
	}

	return NULL;
}

/* Find the first range that ends after @page; it may begin after it, too. */
static u32 overflow_find_range(struct kvm_dirty_overflow *overflow,
			       struct dirty_page page)
{
	u32 low = 0, high = overflow->nr_ranges, i;
	struct overflow_range *range;

	while (low < high) {
		i = (low + high) / 2;
		range = &overflow->range[i];
		if (range->slot < page.slot ||
		    (range->slot == page.slot && range->end <= page.offset))
			low = i + 1;
		else
			high = i;
	}

	return low;
}

static bool overflow_has(struct kvm_dirty_overflow *overflow,
			 struct dirty_page page)
{
	struct overflow_entry *entry;
	struct overflow_range *range;
	u32 i;

	entry = overflow_find_entry(overflow, page.slot, page.offset / 64);
	if (entry && entry->mask & BIT_ULL(page.offset % 64))
		return true;

	i = overflow_find_range(overflow, page);
	range = &overflow->range[i];
	return i < overflow->nr_ranges && range->slot == page.slot &&
	       range->first <= page.offset;
}

/* Count the pages between ranges @i and @i + 1; U32_MAX if the two cannot merge. */
static u32 overflow_gap(struct kvm_dirty_overflow *overflow, u32 i)
{
	struct overflow_range *range = &overflow->range[i];

	if (i + 1 >= overflow->nr_ranges || range[0].slot != range[1].slot)
		return U32_MAX;

	return range[1].first - range[0].end;
}

/* Merge ranges @i and @i + 1. */
static void overflow_merge(struct kvm_dirty_overflow *overflow, u32 i)
{
	struct overflow_range *range = &overflow->range[i];

	range[0].end = range[1].end;
	overflow->nr_ranges--;
	memmove(&range[1], &range[2],
		(overflow->nr_ranges - i - 1) * sizeof(*range));
}

/* Add @page to the ranges. Return how many other pages that adds. */
static u32 overflow_add_range(struct kvm_dirty_overflow *overflow,
			      struct dirty_page page)
{
	u32 i = overflow_find_range(overflow, page);
	struct overflow_range *range = &overflow->range[i];
	u32 gap, closest = 0;

	if (i && range[-1].slot == page.slot && range[-1].end == page.offset) {
		range[-1].end++;
		if (!overflow_gap(overflow, i - 1))
			overflow_merge(overflow, i - 1);
		return 0;
	}

	if (i < overflow->nr_ranges && range->slot == page.slot &&
	    range->first == page.offset + 1) {
		range->first--;
		return 0;
	}

	memmove(range + 1, range, (overflow->nr_ranges - i) * sizeof(*range));
	range->slot = page.slot;
	range->first = page.offset;
	range->end = page.offset + 1;
	overflow->nr_ranges++;
	if (overflow->nr_ranges <= OVERFLOW_RANGES)
		return 0;

	/* More ranges than memslots: at least two belong to the same memslot. */
	for (i = 1; i < overflow->nr_ranges; i++)
		if (overflow_gap(overflow, i) < overflow_gap(overflow, closest))
			closest = i;
	gap = overflow_gap(overflow, closest);
	overflow_merge(overflow, closest);
	return gap;
}

/*
 * Add @page, which must not be in the overflow, to the overflow. Return how many
 * other pages that adds.
 */
static u32 overflow_add(struct kvm_dirty_overflow *overflow,
			struct dirty_page page)
{
	u32 word = page.offset / 64;
	struct overflow_entry *entry;
	u16 *hash;

	entry = overflow_find_entry(overflow, page.slot, word);
	if (!entry) {
		if (overflow->nr_entries == OVERFLOW_ENTRIES)
			return overflow_add_range(overflow, page);

		hash = overflow_hash(overflow, page.slot, word);
		overflow->next[overflow->nr_entries] = *hash;
		entry = &overflow->entry[overflow->nr_entries++];
		entry->slot = page.slot;
		entry->word = word;
		entry->mask = 0;
		*hash = overflow->nr_entries;
	}

	entry->mask |= BIT_ULL(page.offset % 64);
	overflow->nr_pages++;
	return 0;
}

/*
 * Move pages of the last entry to the rings, until @nr, which counts the pages
 * that were moved, reaches BATCH_PAGES. Return false if that, or a lack of room,
 * left pages in the entry.
 */
static bool overflow_drain_entry(struct kvm *kvm,
				 struct kvm_dirty_overflow *overflow, u32 *nr)
{
	u32 last = overflow->nr_entries - 1;
	struct overflow_entry *entry = &overflow->entry[last];
	struct dirty_page page = { .slot = entry->slot };

	while (entry->mask) {
		if (*nr == BATCH_PAGES)
			return false;
		page.offset = (u64)entry->word * 64 + __ffs64(entry->mask);
		if (!any_ring_add(kvm, page))
			return false;
		entry->mask &= entry->mask - 1;
		overflow->nr_pages--;
		(*nr)++;
	}

	/* The last entry is the newest with its hash. */
	*overflow_hash(overflow, entry->slot, entry->word) =
		overflow->next[last];
	overflow->nr_entries = last;
	return true;
}

/* The same for the last range. */
static bool overflow_drain_range(struct kvm *kvm,
				 struct kvm_dirty_overflow *overflow, u32 *nr)
{
	struct overflow_range *range = &overflow->range[overflow->nr_ranges - 1];
	struct dirty_page page = { .slot = range->slot };

	while (range->first < range->end) {
		if (*nr == BATCH_PAGES)
			return false;
		page.offset = range->first;
		if (!any_ring_add(kvm, page))
			return false;
		range->first++;
		(*nr)++;
	}

	overflow->nr_ranges--;
	return true;
}

/* Move up to BATCH_PAGES pages to the rings. Return true if there may be more. */
static bool overflow_drain_batch(struct kvm *kvm,
				 struct kvm_dirty_overflow *overflow)
{
	u32 nr = 0;

	while (overflow->nr_entries && overflow_drain_entry(kvm, overflow, &nr))
		;
	while (!overflow->nr_entries && overflow->nr_ranges &&
	       overflow_drain_range(kvm, overflow, &nr))
		;

	return nr == BATCH_PAGES;
}

/*
 * Move pages to the rings as far as there is room. Call after making room. May
 * sleep. A fatal signal ends it early.
 */
static void overflow_drain(struct kvm *kvm)
{
	struct kvm_dirty_overflow *overflow = kvm->dirty_overflow;
	bool more;

	/*
	 * Take the lock even if the overflow looks empty: a concurrent push
	 * either finds the room that was made, or leaves its page to be seen
	 * here.
	 */
	do {
		raw_spin_lock_irq(&overflow->lock);
		more = overflow_drain_batch(kvm, overflow);
		raw_spin_unlock_irq(&overflow->lock);
		cond_resched();
	} while (more && !fatal_signal_pending(current));
}

/* Push to any ring with room, or else to the overflow. */
static noinline void push_fallback(struct kvm *kvm, struct dirty_page page)
{
	struct kvm_dirty_overflow *overflow;
	unsigned long flags;

	/*
	 * Pairs with the release of dirty_ring_size. The caller saw
	 * dirty_ring_size set, or a memslot without a bitmap, which can only be
	 * created afterwards.
	 */
	smp_rmb();
	overflow = kvm->dirty_overflow;

	raw_spin_lock_irqsave(&overflow->lock, flags);
	if (overflow->stopped) {
		/* Nobody will harvest it. */
	} else if (overflow_has(overflow, page)) {
		kvm->dirty_ring_stat.skipped_other++;
	} else if (!any_ring_add(kvm, page)) {
		kvm->dirty_ring_stat.overflow_between +=
			overflow_add(overflow, page);
		kvm->dirty_ring_stat.overflow++;
		trace_kvm_dirty_ring_overflow(page.slot, page.offset,
					      overflow->nr_pages,
					      overflow->nr_ranges);
	}
	raw_spin_unlock_irqrestore(&overflow->lock, flags);
}

/* Slow path: tracing, soft limit reached, or preemptible. Keep out of line. */
static noinline void push_slow(struct kvm_vcpu *vcpu,
			       struct kvm_memory_slot *memslot, gfn_t gfn)
{
	struct dirty_page page = dirty_page_of_gfn(memslot, gfn);

	if (!own_ring_add(vcpu, page))
		push_fallback(vcpu->kvm, page);
}

/**
 * kvm_dirty_ring_push - report a page that the guest wrote as dirty
 * @vcpu:	the vCPU that wrote it, loaded, with a dirty ring
 * @gfn:	the page. Not reported if it is in no memslot, or in one whose dirty
 *		pages are not tracked.
 *
 * Context: On the CPU where @vcpu is loaded; any but NMI. Does not sleep.
 * kvm->srcu or kvm->slots_lock held.
 */
void kvm_dirty_ring_push(struct kvm_vcpu *vcpu, gfn_t gfn)
{
	struct kvm_memslots *slots = kvm_vcpu_memslots(vcpu);
	struct kvm_memory_slot *memslot = __gfn_to_memslot(slots, gfn);
	struct kvm_dirty_ring *ring = &vcpu->dirty_ring;
	u32 end, nr;

	if (!memslot || !kvm_slot_dirty_track_enabled(memslot))
		return;

	/*
	 * Faults are handled with a spinlock held, or interrupts off: most often
	 * preemption is disabled already. end: pairs with the release in
	 * reset_release().
	 */
	end = READ_ONCE(ring->soft_end);
	if (trace_kvm_dirty_ring_push_enabled() || unlikely(preemptible()) ||
	    unlikely((s32)(atomic_read(&ring->head) - end) >= 0)) {
		push_slow(vcpu, memslot, gfn);
		return;
	}
	/*
	 * What is claimed between check and claim is bounded: others stop at the
	 * soft limit, and an interrupt pushes what one run of the guest left, a
	 * full log of the CPU and two pages of a vmcs12. The reserve has room for
	 * that and for this entry. Full barrier, as in ring_claim().
	 */
	nr = atomic_fetch_inc(&ring->head);
	ring_publish(ring, nr, dirty_page_of_gfn(memslot, gfn));
	ring_count_own(ring);
}

/**
 * kvm_dirty_ring_push_once - report a page that KVM wrote as dirty
 * @kvm:	the VM, with dirty rings enabled
 * @memslot:	the memslot of the page
 * @offset:	the page's index in @memslot
 *
 * For what KVM itself writes, on behalf of a vCPU or of the VM. Skip a page that
 * was pushed recently and is not harvested.
 *
 * Context: Any but NMI. Does not sleep. @memslot must be protected by kvm->srcu
 * or kvm->slots_lock.
 */
void kvm_dirty_ring_push_once(struct kvm *kvm, struct kvm_memory_slot *memslot,
			      u64 offset)
{
	struct kvm_vcpu *vcpu = kvm_get_running_vcpu();
	struct dirty_page page = dirty_page(memslot, offset);
	struct kvm_dirty_ring *ring;

	if (likely(vcpu && vcpu->kvm == kvm)) {
		ring = &vcpu->dirty_ring;
		if (ring_pushed_recently(ring, page)) {
			ring->stat.skipped++;
			return;
		}
		if (own_ring_add(vcpu, page))
			return;
	} else if (READ_ONCE(kvm->dirty_ring_bitmaps)) {
		/*
		 * Go by whether a vCPU is loaded, not by which task writes: a
		 * task that runs a vCPU has none loaded during an ioctl on the
		 * VM, or on a device such as the GIC's ITS that writes its
		 * tables to guest memory.
		 *
		 * The barrier pairs with the atomic operations that clear the
		 * bit: whoever clears it sees what was written to the page.
		 */
		smp_mb__before_atomic();
		set_bit_le(offset, memslot->dirty_bitmap);
		return;
	}
	push_fallback(kvm, page);
}

/**
 * kvm_dirty_ring_full_exit - handle a pending KVM_REQ_DIRTY_RING_FULL
 * @vcpu:	the vCPU, about to enter the guest
 *
 * Keep the request pending while the ring is at its soft limit, so that the vCPU
 * does not enter the guest before a reset has made room.
 *
 * Context: The vCPU's task, in KVM_RUN.
 * Return: true if KVM_RUN must return to userspace, with the exit reason set.
 */
bool kvm_dirty_ring_full_exit(struct kvm_vcpu *vcpu)
{
	u32 used;

	if (likely(!kvm_check_request(KVM_REQ_DIRTY_RING_FULL, vcpu)))
		return false;

	used = ring_used(&vcpu->dirty_ring);
	if (used < vcpu->dirty_ring.soft_limit)
		return false;

	kvm_make_request(KVM_REQ_DIRTY_RING_FULL, vcpu);
	vcpu->run->exit_reason = KVM_EXIT_DIRTY_RING_FULL;
	vcpu->dirty_ring.stat.full_exits++;
	trace_kvm_dirty_ring_exit(vcpu->vcpu_id, used);
	return true;
}

/* Find the memslot that an entry's slot names; NULL if invalid or not tracked. */
static struct kvm_memory_slot *reset_memslot(struct kvm *kvm, u32 slot)
{
	u32 as_id = slot >> 16;
	u32 id = (u16)slot;
	struct kvm_memory_slot *memslot;

	if (as_id >= KVM_ADDRESS_SPACE_NUM || id >= KVM_USER_MEM_SLOTS)
		return NULL;

	id = array_index_nospec(id, KVM_USER_MEM_SLOTS);
	memslot = id_to_memslot(__kvm_memslots(kvm, as_id), id);
	if (!memslot || !kvm_slot_dirty_track_enabled(memslot))
		return NULL;

	return memslot;
}

/*
 * Find harvested entries, from @first up to @end, at most BATCH_PAGES of them, and
 * their pages. Skip pages that do not exist, or are not or no longer tracked. Hold
 * kvm->srcu until @batch is no longer needed.
 */
static void reset_find(struct kvm *kvm, struct kvm_dirty_ring *ring, u32 first,
		       u32 end, struct reset_batch *batch)
{
	struct kvm_memory_slot *memslot = NULL;
	u32 max = min_t(u32, end - first, BATCH_PAGES);
	u32 nr, nr_pages = 0, nr_runs = 0, slot, memslot_slot = 0;
	u64 offset;

	for (nr = 0; nr < max; nr++) {
		struct kvm_dirty_gfn *entry;

		entry = &ring->entries[(first + nr) & ring->mask];
		/* Acquire pairs with the release in userspace. */
		if (!(smp_load_acquire(&entry->flags) & KVM_DIRTY_GFN_F_RESET))
			break;

		slot = READ_ONCE(entry->slot);
		offset = READ_ONCE(entry->offset);
		if (unlikely(!nr || slot != memslot_slot)) {
			if (nr_runs == BATCH_RUNS)
				break;
			if (nr_runs)
				batch->run[nr_runs - 1].end = nr_pages;
			memslot = reset_memslot(kvm, slot);
			memslot_slot = slot;
			batch->run[nr_runs++].memslot = memslot;
		}
		if (likely(memslot && offset < memslot->npages))
			batch->page[nr_pages++] =
				array_index_nospec((unsigned long)offset,
						   memslot->npages);
	}
	if (nr_runs)
		batch->run[nr_runs - 1].end = nr_pages;
	batch->nr_runs = nr_runs;
	batch->nr = nr;
}

/* Write-protect the pages of @batch. */
static void reset_protect(struct kvm *kvm, struct reset_batch *batch)
{
	u32 i, end, first = 0;

	for (i = 0; i < batch->nr_runs; i++, first = end) {
		end = batch->run[i].end;
		if (end != first)
			kvm_arch_dirty_ring_protect(kvm, batch->run[i].memslot,
						    batch->page + first,
						    end - first);
	}
}

/* Return entries to KVM: make room for pushes. */
static void reset_release(struct kvm_dirty_ring *ring, u32 first, u32 nr)
{
	u32 tail = first + nr;
	u32 i;

	for (i = first; i != tail; i++)
		WRITE_ONCE(ring->entries[i & ring->mask].flags, 0);

	/* Pairs with the claim in ring_add(): empty before claimed. */
	smp_store_release(&ring->tail, tail);
	/* Pairs with the claim in kvm_dirty_ring_push(). */
	smp_store_release(&ring->soft_end, tail + ring->soft_limit - 1);
}

/*
 * Reset the harvested entries of one ring, and add their number to @total. Leave
 * the flush of TLBs to the caller.
 */
static void ring_reset(struct kvm *kvm, struct kvm_vcpu *vcpu, int *total)
{
	struct kvm_dirty_ring *ring = &vcpu->dirty_ring;
	struct reset_batch batch;
	u32 end, count = 0;
	int idx;

	mutex_lock(&ring->reset_lock);
	end = atomic_read(&ring->head);

	while (!fatal_signal_pending(current)) {
		idx = srcu_read_lock(&kvm->srcu);
		reset_find(kvm, ring, ring->tail, end, &batch);
		if (batch.nr) {
			/* A flush is owed from now on, see kvm_dirty_ring_reset(). */
			if (!*total)
				atomic_inc(&kvm->dirty_ring_resets);
			reset_protect(kvm, &batch);
		}
		srcu_read_unlock(&kvm->srcu, idx);
		if (!batch.nr)
			break;

		reset_release(ring, ring->tail, batch.nr);
		count += batch.nr;
		*total += batch.nr;
		cond_resched();
	}

	/*
	 * Pairs with the barrier in ring_pushed_recently(): order userspace's
	 * harvest before its later reads of the pages. Keep it behind the reads
	 * of flags: if another thread harvested, nothing else orders that.
	 */
	smp_mb();

	ring->stat.reset += count;
	if (count)
		trace_kvm_dirty_ring_reset(vcpu->vcpu_id, count,
					   ring_used(ring));
	mutex_unlock(&ring->reset_lock);
}

/**
 * kvm_dirty_ring_reset - reset the harvested entries of one ring, or of all
 * @kvm:	the VM
 * @only:	the vCPU whose ring to reset, running or not; NULL for all rings
 *
 * On return every page of a reset entry is write-protected, or has its dirty bit
 * clear, on all CPUs: the next write is reported again. Pages in the overflow
 * have been moved to the rings as far as there is room.
 *
 * Context: Process context, no locks held. Takes kvm->srcu, the rings' locks
 * and perhaps mmu_lock. Sleeps. Runs in parallel with vCPUs, with other resets
 * and with changes of memslots.
 * Return: The number of entries that were reset, less than were harvested only
 * if a fatal signal is pending; -EINVAL if the VM has no dirty rings.
 */
int kvm_dirty_ring_reset(struct kvm *kvm, struct kvm_vcpu *only)
{
	struct kvm_vcpu *vcpu;
	int i, count = 0;

	if (!kvm_dirty_ring_enabled(kvm))
		return -EINVAL;

	if (only)
		ring_reset(kvm, only, &count);
	else
		kvm_for_each_vcpu(i, vcpu, kvm)
			ring_reset(kvm, vcpu, &count);

	/*
	 * Flush even if nothing was reset: a concurrent reset may have taken
	 * what this one's caller harvested, and not have flushed yet.
	 * dirty_ring_resets counts resets that owe a flush, from the first
	 * harvested entry until they have flushed; the rings' locks order it. A
	 * reset that finds nothing owes none. Acquire pairs with the release
	 * below: after a count of 0, userspace reads what was written to the
	 * pages before the other reset's flush.
	 */
	if (count || atomic_read_acquire(&kvm->dirty_ring_resets))
		kvm_flush_remote_tlbs(kvm);
	/* Release: flush before the count drops. */
	if (count)
		atomic_dec_return_release(&kvm->dirty_ring_resets);

	overflow_drain(kvm);
	return count;
}

/**
 * kvm_arch_dirty_ring_protect - write-protect pages, or clear their dirty bits
 * @kvm:	the VM
 * @memslot:	the memslot of the pages
 * @offset:	the pages' indices in @memslot, valid, in any order
 * @nr:		number of pages
 *
 * The pages must not be mapped by huge mappings. The caller flushes TLBs. By
 * default, convert to masks; architectures may override this.
 *
 * Context: kvm->srcu held. Takes mmu_lock, if the architecture has to.
 */
void __weak kvm_arch_dirty_ring_protect(struct kvm *kvm,
					struct kvm_memory_slot *memslot,
					const u64 *offset, u32 nr)
{
	unsigned long mask;
	u32 i = 0;
	u64 base;

	spin_lock(&kvm->mmu_lock);
	while (i < nr) {
		base = round_down(offset[i], BITS_PER_LONG);
		for (mask = 0;
		     i < nr && round_down(offset[i], BITS_PER_LONG) == base;
		     i++)
			__set_bit(offset[i] - base, &mask);
		kvm_arch_mmu_enable_log_dirty_pt_masked(kvm, memslot, base,
							mask);
	}
	spin_unlock(&kvm->mmu_lock);
}

/**
 * kvm_dirty_ring_vcpu_online - use the room in a new vCPU's ring
 * @vcpu:	the vCPU, just made visible
 *
 * Context: Process context, no locks held. Sleeps.
 */
void kvm_dirty_ring_vcpu_online(struct kvm_vcpu *vcpu)
{
	if (kvm_dirty_ring_enabled(vcpu->kvm))
		overflow_drain(vcpu->kvm);
}

/* Return true if at some point no claimed entry was unpublished. */
static bool ring_all_published(struct kvm_dirty_ring *ring)
{
	u32 published = local64_read(&ring->pushed) +
			READ_ONCE(ring->pushed_other);

	/*
	 * Pairs with the barrier in ring_publish(). Read the published entries
	 * first, as userspace does: then only the claims can be too many.
	 */
	smp_rmb();
	return published == atomic_read(&ring->head);
}

/**
 * kvm_dirty_ring_sync - bring everything that was written into the rings
 * @kvm:	the VM
 *
 * If this returns 0, one harvest of the rings finds every write to tracked memory
 * that completed before the call. vCPUs keep running; those in the guest are
 * interrupted only where the CPU keeps a log of its own.
 *
 * Context: Process context, no locks held. Takes kvm->srcu and mmu_lock. Sleeps.
 * Return: 0; -EINVAL if the VM has no dirty rings; -ENOSPC if the rings have no
 * room for all pages in the overflow: harvest, reset, and call again; -EINTR if a
 * fatal signal is pending.
 */
int kvm_dirty_ring_sync(struct kvm *kvm)
{
	struct kvm_dirty_overflow *overflow;
	struct kvm_vcpu *vcpu;
	bool all;
	int i;

	if (!kvm_dirty_ring_enabled(kvm))
		return -EINVAL;

	kvm_arch_sync_dirty_log(kvm, NULL);
	overflow_drain(kvm);

	overflow = kvm->dirty_overflow;
	raw_spin_lock_irq(&overflow->lock);
	all = !overflow->nr_entries && !overflow->nr_ranges;
	kvm->dirty_ring_stat.syncs++;
	raw_spin_unlock_irq(&overflow->lock);
	if (!all && fatal_signal_pending(current))
		return -EINTR;

	/* Wait for pushes under way on other CPUs, which are not preempted. */
	kvm_for_each_vcpu(i, vcpu, kvm) {
		while (!ring_all_published(&vcpu->dirty_ring)) {
			if (fatal_signal_pending(current))
				return -EINTR;
			cond_resched();
			cpu_relax();
		}
	}

	trace_kvm_dirty_ring_sync(all);
	return all ? 0 : -ENOSPC;
}

/**
 * kvm_dirty_ring_stop - let vCPUs push to their own rings only from now on
 * @kvm:	the VM, with no references left
 *
 * Destroying a vCPU unmaps its pages, which may mark them dirty. They go to the
 * vCPU's ring as long as it has one. If that has no room, do not look at other
 * rings: their vCPUs may be freed.
 *
 * Context: Process context. Takes the lock of struct kvm_dirty_overflow.
 */
void kvm_dirty_ring_stop(struct kvm *kvm)
{
	struct kvm_dirty_overflow *overflow = kvm->dirty_overflow;

	if (!overflow)
		return;

	raw_spin_lock_irq(&overflow->lock);
	overflow->stopped = true;
	raw_spin_unlock_irq(&overflow->lock);
}
