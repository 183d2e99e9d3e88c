// SPDX-License-Identifier: GPL-2.0
/*
 * KVM dirty rings: what the guest dirties, as a ring of page numbers a vCPU
 *
 * Flow
 * ----
 * A write fault (or the CPU's own log) marks a page dirty, which pushes the
 * page to the ring of the running vCPU. Userspace reads the ring in place,
 * marks the entries it has seen as harvested, and asks for a reset, which
 * write-protects the harvested pages again and returns their entries to the
 * vCPU. Documentation/virt/kvm/dirty-ring.rst describes the interface.
 *
 * Ownership
 * ---------
 * An entry belongs to one side at a time, and its flags say to which:
 *
 *	flags		entry		owner		next owner by
 *	0		empty		KVM		push
 *	DIRTY		published	userspace	userspace sets RESET
 *	RESET (any)	harvested	KVM		reset
 *
 * head counts the entries that were claimed by pushes, tail those that were
 * reset. head is private to the kernel and advanced with a compare-and-exchange
 * by whoever pushes; tail is private to the kernel and advanced under
 * reset_lock. Entries from tail up to head are in use, all others are empty.
 *
 * Ordering
 * --------
 *  - push writes slot and offset, then store-releases DIRTY; userspace
 *    load-acquires flags.
 *  - userspace store-releases RESET; reset load-acquires flags.
 *  - reset store-releases flags = 0 and then tail and soft_end; push reads one
 *    of the two before it claims an entry, which is a full barrier, so an entry
 *    that is claimed is empty.
 *
 * Documentation/litmus-tests/kvm has a test for each of these, and for what the
 * functions below order besides.
 *
 * What a reset may rely on
 * ------------------------
 * On head and tail only. The ring itself is writable by userspace at any time:
 * flags, slot and offset are read once, slot and offset are checked against
 * the memslots, and flags decide nothing but where a reset stops. A reset
 * never looks at or past head as it was when the reset of the ring began, so
 * whatever userspace writes to entries that were never pushed has no effect,
 * and a reset ends even if vCPUs and userspace keep going.
 *
 * An entry is returned to the vCPU, and counted, only after its page was
 * write-protected. A fatal signal ends a reset, but never between the two; no
 * other signal does.
 *
 * Who pushes, and with what locks
 * -------------------------------
 * Pages are marked dirty with mmu_lock held, in the middle of a context switch
 * (steal time) with the runqueue locked, in an interrupt (the CPU's own log),
 * and from plain process context. Several tasks may push to one ring at the
 * same time, see below. Hence a vCPU's push to its own ring takes no lock; only
 * a page that finds no room there takes one, see struct kvm_dirty_aside. Between
 * claiming an entry and publishing it nobody is preempted; an interrupt may push
 * to the same ring meanwhile, but then it does all of its push.
 *
 * The guest's own writes are told once each, by a fault or by the CPU's log. KVM
 * writes some pages over and over: steal time, clocks, an emulated device's
 * memory. A page that KVM writes, and that is in the vCPU's ring and not
 * harvested, is not pushed again, as far as a short memory of the last entries
 * goes: userspace harvests the entry later, and looks at the page later still.
 *
 * Dirty without a running vCPU, and rings without room
 * ----------------------------------------------------
 * A vCPU stops at its soft limit before it enters the guest. What it dirties
 * before it gets there goes to the reserved entries above the limit. When
 * there is no running vCPU (an ioctl on the VM writes guest memory), or the
 * running vCPU's ring has no entry left (ioctls on the vCPU that write guest
 * memory, without a KVM_RUN in between, know no limit), the page goes to the
 * first ring that is below its soft limit. If there is none either, the page is
 * kept aside, and is pushed before the ioctl returns that makes room: the next
 * reset, or the creation of a vCPU. An entry in use is never overwritten, and
 * no page is dropped, until the VM is destroyed: then a vCPU pushes to its own
 * ring only.
 *
 * If userspace has asked for bitmaps beside the rings, what is dirtied without
 * a running vCPU goes to the memslot's bitmap instead, and nothing else does.
 *
 * What is in no ring yet
 * ----------------------
 * Four things, and a sync waits for each: writes in a CPU's own log, and pages
 * that a fault has made writable and not marked yet, both of which are the
 * architecture's; pages kept aside; entries claimed and not published, behind
 * which published ones cannot be harvested. There are none of those in a ring
 * while as many entries were published, by the vCPU and by others, as were
 * claimed.
 */

#include <linux/kvm_host.h>
#include <linux/kvm_dirty_ring.h>
#include <linux/hash.h>
#include <linux/mm.h>
#include <linux/nospec.h>
#include <linux/sched/signal.h>
#include <trace/events/kvm.h>

/*
 * Pages that are write-protected under one hold of mmu_lock, and pages that
 * are moved from aside to the rings with interrupts off.
 */
#define BATCH_PAGES	64

/* Memslots, in turns, whose pages are write-protected under one hold of mmu_lock. */
#define BATCH_RUNS	8

/* Neighbourhoods of 64 pages kept aside page by page, before whole ranges are. */
#define ASIDE_ENTRIES	4096
#define ASIDE_HASH_BITS	11

/* One for each memslot that there can be, of all address spaces, at the least. */
#define ASIDE_RANGES	(KVM_ADDRESS_SPACE_NUM * KVM_MEM_SLOTS_NUM)

/**
 * struct dirty_page - what identifies a page in a dirty ring
 * @offset:	page index in the memslot
 * @slot:	address space id << 16 | memslot id
 */
struct dirty_page {
	u64 offset;
	u32 slot;
};

/**
 * struct aside_entry - pages of one neighbourhood that are kept aside
 * @slot:	as in struct dirty_page
 * @word:	the pages' index in the memslot, divided by 64
 * @mask:	which of the 64, at least one
 */
struct aside_entry {
	u32 slot;
	u32 word;
	u64 mask;
};

/**
 * struct aside_range - pages that are kept aside, and those between them
 * @slot:	as in struct dirty_page
 * @first:	index of the first page in the memslot
 * @end:	index of the page after the last one
 */
struct aside_range {
	u32 slot;
	u32 first;
	u32 end;
};

/**
 * struct kvm_dirty_aside - dirty pages of a VM for which no ring had room
 * @lock:	protects everything below. A raw spinlock with interrupts off,
 *		because it nests inside a runqueue's lock when steal time is
 *		written. Also held while a page is moved between aside and a
 *		ring, which makes "no ring has room" and "the page is aside"
 *		one step as seen by a reset that makes room.
 * @stopped:	the VM is being destroyed: vCPUs go one by one, and their rings
 *		with them
 * @nr_pages:	pages in @entry
 * @nr_entries:	valid elements of @entry
 * @nr_ranges:	valid elements of @range
 * @hash:	for each hash the last of its entries, plus one; 0 if it has none
 * @next:	for each entry the one before it that has the same hash, as in @hash
 * @entry:	exact pages, in the order they came. Only the last entry goes.
 * @range:	what comes once @entry is full, in order; they neither overlap nor
 *		touch. If there would be more than ASIDE_RANGES, the two that are
 *		closest become one. Reporting a page too many costs userspace a copy; the
 *		size of this structure must not depend on the size of the guest.
 */
struct kvm_dirty_aside {
	raw_spinlock_t lock;
	bool stopped;
	u32 nr_pages;
	u32 nr_entries;
	u32 nr_ranges;
	u16 hash[1 << ASIDE_HASH_BITS];
	u16 next[ASIDE_ENTRIES];
	struct aside_entry entry[ASIDE_ENTRIES];
	struct aside_range range[ASIDE_RANGES + 1];
};

/**
 * struct reset_batch - harvested entries that are reset together
 * @nr:		how many
 * @nr_runs:	valid elements of @run
 * @run:	pages of one memslot: up to end, from the end of the run before; no
 *		page, perhaps with no memslot, if none of its entries is of use
 * @page:	indices in the memslots
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
 * Claim the next entry of @ring, unless that is @end. The caller is not preempted
 * before it has published it, and counted it as published.
 *
 * A full barrier, between tail or soft_end, of which @end was made, and what is
 * written to the entry: who sees any of that sees the entry reset, see ring_has().
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

/* Publish entry @nr, claimed before. */
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
	 * made of ring->recent in ring_has().
	 */
	smp_wmb();
}

/*
 * Push to the ring of @vcpu unless @limit entries are in use, and have the vCPU
 * exit if it is at its soft limit then. Not to be preempted, see ring_claim().
 */
static bool ring_push(struct kvm_vcpu *vcpu, struct dirty_page page, u32 limit)
{
	struct kvm_dirty_ring *ring = &vcpu->dirty_ring;
	u32 nr, used;

	/* Pairs with the release in reset_release(). */
	if (!ring_claim(ring, READ_ONCE(ring->tail) + limit, &nr))
		return false;

	ring_publish(ring, nr, page);
	/* Only a hint, but of an entry that is published, see ring_has(). */
	WRITE_ONCE(ring->recent[page.offset % ARRAY_SIZE(ring->recent)], nr);

	used = ring_used(ring);
	trace_kvm_dirty_ring_push(vcpu->vcpu_id, page.slot, page.offset, used);
	if (used >= ring->soft_limit)
		kvm_make_request(KVM_REQ_DIRTY_RING_FULL, vcpu);

	return true;
}

/*
 * Is @page in @ring already, and not harvested? Entries are only looked for
 * where ring->recent points to; that is a hint, what counts is the entry. But it
 * must not be one that is yet to be published: what is there from before could be
 * @page, and be taken for what is published a moment later.
 */
static bool ring_has(struct kvm_dirty_ring *ring, struct dirty_page page)
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
	 * here, what was written to the page is seen after the reset there,
	 * whoever harvests, resets, and looks at the page.
	 */
	smp_mb();
	if (READ_ONCE(entry->flags) != KVM_DIRTY_GFN_F_DIRTY)
		return false;

	/* All of this was about entry nr only if that is in use still. */
	smp_rmb();
	/* As in ring_used(): head behind tail would let any entry be in use. */
	tail = smp_load_acquire(&ring->tail);
	return nr - tail < atomic_read(&ring->head) - tail;
}

/* Push to the ring of the running vCPU, if it has room for the page. */
static bool own_ring_push(struct kvm_vcpu *vcpu, struct dirty_page page)
{
	struct kvm_dirty_ring *ring = &vcpu->dirty_ring;
	bool pushed;

	preempt_disable();
	pushed = ring_push(vcpu, page, ring->mask + 1);
	if (pushed)
		local64_inc(&ring->pushed);
	preempt_enable();

	return pushed;
}

/*
 * Push to the first ring that is below its soft limit. Called with the lock of
 * struct kvm_dirty_aside held.
 */
static bool any_ring_push(struct kvm *kvm, struct dirty_page page)
{
	struct kvm_dirty_ring *ring;
	struct kvm_vcpu *vcpu;
	int i;

	kvm_for_each_vcpu(i, vcpu, kvm) {
		ring = &vcpu->dirty_ring;
		if (ring_has(ring, page)) {
			kvm->dirty_ring_stat.skipped_other++;
			return true;
		}
		if (ring_push(vcpu, page, ring->soft_limit)) {
			WRITE_ONCE(ring->pushed_other, ring->pushed_other + 1);
			kvm->dirty_ring_stat.pushed_other++;
			return true;
		}
	}

	return false;
}

static u16 *aside_hash(struct kvm_dirty_aside *aside, u32 slot, u32 word)
{
	return &aside->hash[hash_64((u64)slot << 32 | word, ASIDE_HASH_BITS)];
}

static struct aside_entry *aside_find(struct kvm_dirty_aside *aside, u32 slot,
				      u32 word)
{
	struct aside_entry *entry;
	u16 i;

	for (i = *aside_hash(aside, slot, word); i; i = aside->next[i - 1]) {
		entry = &aside->entry[i - 1];
		if (entry->word == word && entry->slot == slot)
			return entry;
	}

	return NULL;
}

/* The first range that ends behind @page; it may begin behind it, too. */
static u32 aside_find_range(struct kvm_dirty_aside *aside,
			    struct dirty_page page)
{
	u32 low = 0, high = aside->nr_ranges, i;
	struct aside_range *range;

	while (low < high) {
		i = (low + high) / 2;
		range = &aside->range[i];
		if (range->slot < page.slot ||
		    (range->slot == page.slot && range->end <= page.offset))
			low = i + 1;
		else
			high = i;
	}

	return low;
}

static bool aside_has(struct kvm_dirty_aside *aside, struct dirty_page page)
{
	struct aside_entry *entry;
	struct aside_range *range;
	u32 i;

	entry = aside_find(aside, page.slot, page.offset / 64);
	if (entry && entry->mask & BIT_ULL(page.offset % 64))
		return true;

	i = aside_find_range(aside, page);
	range = &aside->range[i];
	return i < aside->nr_ranges && range->slot == page.slot &&
	       range->first <= page.offset;
}

/* The pages between ranges @i and @i + 1; U32_MAX if they cannot become one. */
static u32 aside_gap(struct kvm_dirty_aside *aside, u32 i)
{
	struct aside_range *range = &aside->range[i];

	if (i + 1 >= aside->nr_ranges || range[0].slot != range[1].slot)
		return U32_MAX;

	return range[1].first - range[0].end;
}

/* Make ranges @i and @i + 1 one. */
static void aside_join(struct kvm_dirty_aside *aside, u32 i)
{
	struct aside_range *range = &aside->range[i];

	range[0].end = range[1].end;
	aside->nr_ranges--;
	memmove(&range[1], &range[2],
		(aside->nr_ranges - i - 1) * sizeof(*range));
}

/* Add a page to the ranges. Returns how many others that adds. */
static u32 aside_add_range(struct kvm_dirty_aside *aside,
			   struct dirty_page page)
{
	u32 i = aside_find_range(aside, page);
	struct aside_range *range = &aside->range[i];
	u32 gap, closest = 0;

	if (i && range[-1].slot == page.slot && range[-1].end == page.offset) {
		range[-1].end++;
		if (!aside_gap(aside, i - 1))
			aside_join(aside, i - 1);
		return 0;
	}

	if (i < aside->nr_ranges && range->slot == page.slot &&
	    range->first == page.offset + 1) {
		range->first--;
		return 0;
	}

	memmove(range + 1, range, (aside->nr_ranges - i) * sizeof(*range));
	range->slot = page.slot;
	range->first = page.offset;
	range->end = page.offset + 1;
	aside->nr_ranges++;
	if (aside->nr_ranges <= ASIDE_RANGES)
		return 0;

	/* More than there are memslots: two at least are of the same. */
	for (i = 1; i < aside->nr_ranges; i++)
		if (aside_gap(aside, i) < aside_gap(aside, closest))
			closest = i;
	gap = aside_gap(aside, closest);
	aside_join(aside, closest);
	return gap;
}

/* Keep a page aside that is not. Returns how many others that adds. */
static u32 aside_add(struct kvm_dirty_aside *aside, struct dirty_page page)
{
	u32 word = page.offset / 64;
	struct aside_entry *entry = aside_find(aside, page.slot, word);
	u16 *hash;

	if (!entry) {
		if (aside->nr_entries == ASIDE_ENTRIES)
			return aside_add_range(aside, page);

		hash = aside_hash(aside, page.slot, word);
		aside->next[aside->nr_entries] = *hash;
		entry = &aside->entry[aside->nr_entries++];
		entry->slot = page.slot;
		entry->word = word;
		entry->mask = 0;
		*hash = aside->nr_entries;
	}

	entry->mask |= BIT_ULL(page.offset % 64);
	aside->nr_pages++;
	return 0;
}

/*
 * Move pages of the last entry to the rings, up to BATCH_PAGES with the @nr that were
 * moved before. Returns false if that ends for now, for either reason.
 */
static bool aside_push_entry(struct kvm *kvm, struct kvm_dirty_aside *aside,
			     u32 *nr)
{
	u32 last = aside->nr_entries - 1;
	struct aside_entry *entry = &aside->entry[last];
	struct dirty_page page = { .slot = entry->slot };

	while (entry->mask) {
		if (*nr == BATCH_PAGES)
			return false;
		page.offset = (u64)entry->word * 64 + __ffs64(entry->mask);
		if (!any_ring_push(kvm, page))
			return false;
		entry->mask &= entry->mask - 1;
		aside->nr_pages--;
		(*nr)++;
	}

	/* It is the last of its hash. */
	*aside_hash(aside, entry->slot, entry->word) = aside->next[last];
	aside->nr_entries = last;
	return true;
}

/* The same for the last range. */
static bool aside_push_range(struct kvm *kvm, struct kvm_dirty_aside *aside,
			     u32 *nr)
{
	struct aside_range *range = &aside->range[aside->nr_ranges - 1];
	struct dirty_page page = { .slot = range->slot };

	while (range->first < range->end) {
		if (*nr == BATCH_PAGES)
			return false;
		page.offset = range->first;
		if (!any_ring_push(kvm, page))
			return false;
		range->first++;
		(*nr)++;
	}

	aside->nr_ranges--;
	return true;
}

/*
 * Move up to BATCH_PAGES pages from aside to the rings. Returns true if there
 * may be more to move.
 */
static bool aside_push_some(struct kvm *kvm, struct kvm_dirty_aside *aside)
{
	u32 nr = 0;

	while (aside->nr_entries && aside_push_entry(kvm, aside, &nr))
		;
	while (!aside->nr_entries && aside->nr_ranges &&
	       aside_push_range(kvm, aside, &nr))
		;

	return nr == BATCH_PAGES;
}

/*
 * Called whenever rings may have got room. May sleep. What is aside stays there if
 * a fatal signal is pending.
 */
static void aside_push(struct kvm *kvm)
{
	struct kvm_dirty_aside *aside = kvm->dirty_aside;
	bool more;

	/*
	 * The lock is taken even if nothing seems to be aside: either a page
	 * that is on its way finds the room that was just made, or it is seen
	 * here.
	 */
	do {
		raw_spin_lock_irq(&aside->lock);
		more = aside_push_some(kvm, aside);
		raw_spin_unlock_irq(&aside->lock);
		cond_resched();
	} while (more && !fatal_signal_pending(current));
}

static struct dirty_page dirty_page(struct kvm_memory_slot *memslot, u64 offset)
{
	struct dirty_page page = {
		.offset = offset,
		.slot = memslot->as_id << 16 | (u16)memslot->id,
	};

	return page;
}

/* Push where there is room, or else keep aside. */
static noinline void push_elsewhere(struct kvm *kvm, struct dirty_page page)
{
	struct kvm_dirty_aside *aside;
	unsigned long flags;

	/*
	 * Pairs with the release of dirty_ring_size. Either that was seen set,
	 * or a memslot without a bitmap, which comes after.
	 */
	smp_rmb();
	aside = kvm->dirty_aside;

	raw_spin_lock_irqsave(&aside->lock, flags);
	if (aside->stopped) {
		/* Nobody is there to harvest it. */
	} else if (aside_has(aside, page)) {
		kvm->dirty_ring_stat.skipped_other++;
	} else if (!any_ring_push(kvm, page)) {
		kvm->dirty_ring_stat.aside_between += aside_add(aside, page);
		kvm->dirty_ring_stat.aside++;
		trace_kvm_dirty_ring_aside(page.slot, page.offset,
					   aside->nr_pages, aside->nr_ranges);
	}
	raw_spin_unlock_irqrestore(&aside->lock, flags);
}

/* All that is not as usual, out of the way of what is. */
static noinline void push_slow(struct kvm_vcpu *vcpu,
			       struct kvm_memory_slot *memslot, gfn_t gfn)
{
	struct dirty_page page = dirty_page(memslot, gfn - memslot->base_gfn);

	if (!own_ring_push(vcpu, page))
		push_elsewhere(vcpu->kvm, page);
}

/**
 * kvm_dirty_ring_push - report a page that the guest wrote as dirty
 * @vcpu:	the vCPU that wrote it, loaded, with a dirty ring
 * @gfn:	the page; nothing is reported if dirty pages of its memslot are not
 *		tracked, or if it has none
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

	preempt_disable();
	/* Pairs with the release in reset_release(). */
	end = READ_ONCE(ring->soft_end);
	if (trace_kvm_dirty_ring_push_enabled() ||
	    unlikely(!ring_claim(ring, end, &nr))) {
		preempt_enable();
		push_slow(vcpu, memslot, gfn);
		return;
	}
	ring_publish(ring, nr, dirty_page(memslot, gfn - memslot->base_gfn));
	local64_inc(&ring->pushed);
	preempt_enable();
}

/**
 * kvm_dirty_ring_push_once - report a page as dirty unless it is in the ring
 * @kvm:	the VM, with dirty rings enabled
 * @memslot:	the memslot of the page
 * @offset:	the page's index in @memslot
 *
 * For what KVM itself writes, on behalf of a vCPU or of the VM.
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
		if (ring_has(ring, page)) {
			ring->stat.skipped++;
			return;
		}
		if (own_ring_push(vcpu, page))
			return;
	} else if (READ_ONCE(kvm->dirty_ring_bitmaps)) {
		/*
		 * What counts is that no vCPU is loaded, not who is asking: a
		 * task that runs a vCPU has none loaded while it calls an ioctl
		 * of the VM, or of a device such as the GIC's ITS that writes
		 * its tables to guest memory.
		 *
		 * The barrier pairs with the atomic operations that clear the
		 * bit: who clears it sees what was written to the page.
		 */
		smp_mb__before_atomic();
		set_bit_le(offset, memslot->dirty_bitmap);
		return;
	}
	push_elsewhere(kvm, page);
}

/**
 * kvm_dirty_ring_full_exit - handle a pending KVM_REQ_DIRTY_RING_FULL
 * @vcpu:	the vCPU, about to enter the guest
 *
 * The request stays pending as long as the ring is at its soft limit, so that
 * the vCPU does not enter the guest before a reset has made room.
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

/* The memslot that userspace says an entry is of, or NULL. */
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

/**
 * kvm_arch_dirty_ring_protect - write-protect pages, or clear their dirty bits
 * @kvm:	the VM
 * @memslot:	the memslot of the pages
 * @offset:	the pages' indices in @memslot, all of them in it, in any order
 * @nr:		how many
 *
 * Their mappings are no huge ones. The caller flushes TLBs. This is for
 * architectures whose walk of page tables is by masks; others override it.
 *
 * Context: kvm->srcu and mmu_lock held.
 */
void __weak kvm_arch_dirty_ring_protect(struct kvm *kvm,
					struct kvm_memory_slot *memslot,
					const u64 *offset, u32 nr)
{
	unsigned long mask;
	u32 i = 0;
	u64 base;

	while (i < nr) {
		base = round_down(offset[i], BITS_PER_LONG);
		for (mask = 0;
		     i < nr && round_down(offset[i], BITS_PER_LONG) == base;
		     i++)
			__set_bit(offset[i] - base, &mask);
		kvm_arch_mmu_enable_log_dirty_pt_masked(kvm, memslot, base,
							mask);
	}
}

/*
 * Find up to BATCH_PAGES harvested entries, from @first on and not past @end, and
 * their pages. Pages that do not exist, or are not tracked (any more), are skipped.
 * The caller holds kvm->srcu until it is done with @batch.
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

/* Protect the pages of @batch. Called with mmu_lock held. */
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

/* Return entries to whoever pushes. */
static void reset_release(struct kvm_dirty_ring *ring, u32 first, u32 nr)
{
	u32 tail = first + nr;
	u32 i;

	for (i = first; i != tail; i++)
		WRITE_ONCE(ring->entries[i & ring->mask].flags, 0);

	/* Pairs with the claim in ring_push(): empty before claimed. */
	smp_store_release(&ring->tail, tail);
	/* The same in kvm_dirty_ring_push(). */
	smp_store_release(&ring->soft_end, tail + ring->soft_limit - 1);
}

/*
 * Reset the harvested entries of one ring, and add how many there were to @total;
 * the caller flushes TLBs.
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
			/* Under way, see kvm_dirty_ring_reset(). */
			if (!*total)
				atomic_inc(&kvm->dirty_ring_resets);
			spin_lock(&kvm->mmu_lock);
			reset_protect(kvm, &batch);
			spin_unlock(&kvm->mmu_lock);
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
	 * Pairs with the barrier in ring_has(): userspace harvested before, and
	 * looks at pages after. Not any earlier: whoever harvested may be another
	 * thread than the one that calls this, and it is flags that say so.
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
 * @only:	the vCPU whose ring it is, running or not; NULL for all of the VM
 *
 * When this returns, every page of an entry that was reset is write-protected
 * (or its dirty bit is clear) on all CPUs: the next write is reported again.
 * Pages that were kept aside for want of room are in the rings as far as there
 * is room now.
 *
 * Context: Process context, no locks held. Takes kvm->srcu, the rings' locks
 * and mmu_lock. Sleeps. Runs in parallel with vCPUs, with other resets and with
 * changes of memslots.
 * Return: The number of entries that were reset, less than what was harvested
 * only if a fatal signal is pending; -EINVAL if the VM has no dirty rings.
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
	 * Flush even if nothing was reset: another reset may have taken all that
	 * this one's caller had harvested, and not have flushed yet. It is counted
	 * from when it has found something until it has; the rings' locks order
	 * the count. One that finds nothing owes no flush to anybody, and is not
	 * counted. Acquire pairs with the release below: once the other is not
	 * counted any more userspace may read what was written until the flush.
	 */
	if (count || atomic_read_acquire(&kvm->dirty_ring_resets))
		kvm_flush_remote_tlbs(kvm);
	/* Flushed before it is not counted any more. */
	if (count)
		atomic_dec_return_release(&kvm->dirty_ring_resets);

	aside_push(kvm);
	return count;
}

/**
 * kvm_dirty_ring_vcpu_online - put the ring of a new vCPU to use
 * @vcpu:	the vCPU, just made visible
 *
 * Context: Process context, no locks held. Sleeps.
 */
void kvm_dirty_ring_vcpu_online(struct kvm_vcpu *vcpu)
{
	if (kvm_dirty_ring_enabled(vcpu->kvm))
		aside_push(vcpu->kvm);
}

/* Was there, in the course of this, no entry that was claimed only? */
static bool ring_all_published(struct kvm_dirty_ring *ring)
{
	u32 published = local64_read(&ring->pushed) +
			READ_ONCE(ring->pushed_other);

	/*
	 * Pairs with the barrier in ring_publish(). What was published is read
	 * first, here and by userspace: claims can only be too many.
	 */
	smp_rmb();
	return published == atomic_read(&ring->head);
}

/**
 * kvm_dirty_ring_sync - bring everything that was written into the rings
 * @kvm:	the VM
 *
 * When this returns 0, every write to tracked memory that was finished before
 * the call is found by harvesting the rings once. vCPUs go on running; those in
 * the guest are interrupted only where the CPU keeps a log of its own.
 *
 * Context: Process context, no locks held. Takes kvm->srcu and mmu_lock. Sleeps.
 * Return: 0; -EINVAL if the VM has no dirty rings; -ENOSPC if the rings have no
 * room for all that was kept aside: harvest, reset, and call again; -EINTR if a
 * fatal signal is pending.
 */
int kvm_dirty_ring_sync(struct kvm *kvm)
{
	struct kvm_dirty_aside *aside;
	struct kvm_vcpu *vcpu;
	bool all;
	int i;

	if (!kvm_dirty_ring_enabled(kvm))
		return -EINVAL;

	kvm_arch_sync_dirty_log(kvm, NULL);
	aside_push(kvm);

	aside = kvm->dirty_aside;
	raw_spin_lock_irq(&aside->lock);
	all = !aside->nr_entries && !aside->nr_ranges;
	kvm->dirty_ring_stat.syncs++;
	raw_spin_unlock_irq(&aside->lock);
	if (!all && fatal_signal_pending(current))
		return -EINTR;

	/* Pushes that are under way, on other CPUs and not preempted. */
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
 * kvm_dirty_ring_stop - look at no ring but a vCPU's own from now on
 * @kvm:	the VM, of which nobody has a reference any more
 *
 * To destroy a vCPU may dirty pages: what it has mapped is unmapped. As long as
 * the vCPU has its ring they go there. If they find no room, the other vCPUs may
 * be freed already.
 *
 * Context: Process context. Takes the lock of struct kvm_dirty_aside.
 */
void kvm_dirty_ring_stop(struct kvm *kvm)
{
	struct kvm_dirty_aside *aside = kvm->dirty_aside;

	if (!aside)
		return;

	raw_spin_lock_irq(&aside->lock);
	aside->stopped = true;
	raw_spin_unlock_irq(&aside->lock);
}

/**
 * kvm_dirty_aside_alloc - make room for what finds none in a VM's rings
 *
 * Context: Process context. Sleeps.
 * Return: What kvfree() takes back, charged to the caller's memory cgroup; NULL
 * if there is no memory.
 */
struct kvm_dirty_aside *kvm_dirty_aside_alloc(void)
{
	struct kvm_dirty_aside *aside;

	aside = kvzalloc(sizeof(*aside), GFP_KERNEL_ACCOUNT);
	if (aside)
		raw_spin_lock_init(&aside->lock);

	return aside;
}
