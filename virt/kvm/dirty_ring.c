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
 *  - reset store-releases flags = 0 and then tail; push load-acquires tail
 *    before it claims an entry, so an entry that is claimed is empty.
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
 * (steal time) with the runqueue locked, and from plain process context.
 * Several tasks may push to one ring at the same time, see below. Hence a push
 * takes no lock; only a page that finds no room takes one, see struct
 * kvm_dirty_aside.
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
 * no page is dropped.
 */

#include <linux/kvm_host.h>
#include <linux/kvm_dirty_ring.h>
#include <linux/nospec.h>
#include <linux/pfn_t.h>
#include <linux/sched/signal.h>
#include <linux/vmalloc.h>
#include <trace/events/kvm.h>

/*
 * Pages that are write-protected under one hold of mmu_lock, and pages that
 * are moved from aside to the rings with interrupts off.
 */
#define BATCH_PAGES	64

/* Pages kept aside one by one, before whole ranges are. */
#define ASIDE_PAGES	512

/* Memslots that can be kept aside, of all address spaces. */
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
 * struct kvm_dirty_aside - dirty pages of a VM for which no ring had room
 * @lock:	protects everything below. A raw spinlock with interrupts off,
 *		because it nests inside a runqueue's lock when steal time is
 *		written. Also held while a page is moved between aside and a
 *		ring, which makes "no ring has room" and "the page is aside"
 *		one step as seen by a reset that makes room.
 * @nr_pages:	valid elements of @page
 * @page:	exact pages, in no order
 * @nr_ranges:	elements of @range that are not empty
 * @range:	once @page is full: for each memslot the pages from first up to
 *		end that include all of its pages, and perhaps others. Reporting
 *		a page too many costs userspace a copy; the size of this
 *		structure must not depend on the size of the guest. Empty if end
 *		is 0.
 */
struct kvm_dirty_aside {
	raw_spinlock_t lock;
	u32 nr_pages;
	struct dirty_page page[ASIDE_PAGES];
	u32 nr_ranges;
	struct {
		u64 first;
		u64 end;
	} range[ASIDE_RANGES];
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

/* Push to the ring of @vcpu unless @limit entries are in use. */
static bool ring_push(struct kvm_vcpu *vcpu, struct dirty_page page, u32 limit)
{
	struct kvm_dirty_ring *ring = &vcpu->dirty_ring;
	struct kvm_dirty_gfn *entry;
	u32 tail;
	int head;

	do {
		/* Acquire pairs with the release in reset_release(). */
		tail = smp_load_acquire(&ring->tail);
		head = atomic_read(&ring->head);
		if (head - tail >= limit)
			return false;
	} while (!atomic_try_cmpxchg_relaxed(&ring->head, &head, head + 1));

	entry = &ring->entries[head & (ring->size - 1)];
	WRITE_ONCE(entry->slot, page.slot);
	WRITE_ONCE(entry->offset, page.offset);
	/* Pairs with the acquire of flags in userspace. */
	smp_store_release(&entry->flags, KVM_DIRTY_GFN_F_DIRTY);

	trace_kvm_dirty_ring_push(vcpu->vcpu_id, page.slot, page.offset,
				  head + 1 - tail);

	if (head + 1 - tail >= ring->soft_limit)
		kvm_make_request(KVM_REQ_DIRTY_RING_FULL, vcpu);

	return true;
}

/* Push to the first ring that is below its soft limit. */
static bool any_ring_push(struct kvm *kvm, struct dirty_page page)
{
	struct kvm_vcpu *vcpu;
	int i;

	kvm_for_each_vcpu(i, vcpu, kvm)
		if (ring_push(vcpu, page, vcpu->dirty_ring.soft_limit))
			return true;

	return false;
}

static void aside_add(struct kvm_dirty_aside *aside, struct dirty_page page)
{
	u32 i;

	if (aside->nr_pages < ASIDE_PAGES) {
		aside->page[aside->nr_pages++] = page;
		return;
	}

	i = (page.slot >> 16) * KVM_MEM_SLOTS_NUM + (u16)page.slot;
	if (!aside->range[i].end) {
		aside->nr_ranges++;
		aside->range[i].first = page.offset;
		aside->range[i].end = page.offset + 1;
	} else {
		aside->range[i].first = min(aside->range[i].first, page.offset);
		aside->range[i].end = max(aside->range[i].end, page.offset + 1);
	}
}

/*
 * Move up to BATCH_PAGES pages from aside to the rings. Returns true if there
 * may be more to move.
 */
static bool aside_push_some(struct kvm *kvm, struct kvm_dirty_aside *aside)
{
	struct dirty_page page;
	int nr = 0;
	u32 i;

	for (; aside->nr_pages; aside->nr_pages--) {
		if (nr++ == BATCH_PAGES)
			return true;
		if (!any_ring_push(kvm, aside->page[aside->nr_pages - 1]))
			return false;
	}

	for (i = 0; aside->nr_ranges && i < ASIDE_RANGES; i++) {
		if (!aside->range[i].end)
			continue;

		page.slot = (i / KVM_MEM_SLOTS_NUM) << 16 |
			    (i % KVM_MEM_SLOTS_NUM);
		while (aside->range[i].first < aside->range[i].end) {
			if (nr++ == BATCH_PAGES)
				return true;
			page.offset = aside->range[i].first;
			if (!any_ring_push(kvm, page))
				return false;
			aside->range[i].first++;
		}
		aside->range[i].end = 0;
		aside->nr_ranges--;
	}

	return false;
}

/* Called whenever rings may have got room. May sleep. */
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
	} while (more);
}

/**
 * kvm_dirty_ring_push - report a page as dirty
 * @kvm:	the VM, with dirty rings enabled
 * @memslot:	the memslot of the page
 * @offset:	the page's index in @memslot
 *
 * Context: Any, but hard interrupts of a CPU that runs a vCPU of @kvm. Does not
 * sleep. @memslot must be protected by kvm->srcu or kvm->slots_lock.
 */
void kvm_dirty_ring_push(struct kvm *kvm, struct kvm_memory_slot *memslot,
			 u64 offset)
{
	struct kvm_vcpu *vcpu = kvm_get_running_vcpu();
	struct dirty_page page = {
		.offset = offset,
		.slot = memslot->as_id << 16 | memslot->id,
	};
	struct kvm_dirty_aside *aside;
	unsigned long flags;

	if (likely(vcpu && vcpu->kvm == kvm) &&
	    likely(ring_push(vcpu, page, vcpu->dirty_ring.size)))
		return;

	/*
	 * Pairs with the release of dirty_ring_size. Either that was seen set,
	 * or a memslot without a bitmap, which comes after.
	 */
	smp_rmb();
	aside = kvm->dirty_aside;

	raw_spin_lock_irqsave(&aside->lock, flags);
	if (!any_ring_push(kvm, page))
		aside_add(aside, page);
	raw_spin_unlock_irqrestore(&aside->lock, flags);
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
	trace_kvm_dirty_ring_exit(vcpu->vcpu_id, used);
	return true;
}

/*
 * Read up to BATCH_PAGES harvested entries from @first on, and not past @end.
 * What is returned may be nonsense, see reset_protect().
 */
static u32 reset_collect(struct kvm_dirty_ring *ring, u32 first, u32 end,
			 struct dirty_page *page)
{
	u32 max = min_t(u32, end - first, BATCH_PAGES);
	u32 nr;

	for (nr = 0; nr < max; nr++) {
		struct kvm_dirty_gfn *entry;

		entry = &ring->entries[(first + nr) & (ring->size - 1)];
		/* Acquire pairs with the release in userspace. */
		if (!(smp_load_acquire(&entry->flags) & KVM_DIRTY_GFN_F_RESET))
			break;
		page[nr].slot = READ_ONCE(entry->slot);
		page[nr].offset = READ_ONCE(entry->offset);
	}

	return nr;
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

/*
 * Write-protect the pages, or clear their dirty bits, without flushing TLBs.
 * Pages that do not exist, or are not tracked (any more), are skipped.
 */
static void reset_protect(struct kvm *kvm, const struct dirty_page *page,
			  u32 nr)
{
	struct kvm_memory_slot *memslot;
	unsigned long mask;
	u32 i = 0, slot;
	u64 base;
	int idx;

	idx = srcu_read_lock(&kvm->srcu);
	spin_lock(&kvm->mmu_lock);

	while (i < nr) {
		slot = page[i].slot;
		base = round_down(page[i].offset, BITS_PER_LONG);
		memslot = reset_memslot(kvm, slot);
		mask = 0;

		for (; i < nr && page[i].slot == slot &&
		     round_down(page[i].offset, BITS_PER_LONG) == base; i++)
			if (memslot && page[i].offset < memslot->npages)
				__set_bit(page[i].offset - base, &mask);

		if (mask)
			kvm_arch_mmu_enable_log_dirty_pt_masked(kvm, memslot,
								base, mask);
	}

	spin_unlock(&kvm->mmu_lock);
	srcu_read_unlock(&kvm->srcu, idx);
}

/* Return entries to whoever pushes. */
static void reset_release(struct kvm_dirty_ring *ring, u32 first, u32 nr)
{
	u32 i;

	for (i = first; i != first + nr; i++)
		WRITE_ONCE(ring->entries[i & (ring->size - 1)].flags, 0);

	/* Pairs with the acquire in ring_push(): empty before claimed. */
	smp_store_release(&ring->tail, first + nr);
}

/* Reset the harvested entries of one ring; the caller flushes TLBs. */
static u32 ring_reset(struct kvm *kvm, struct kvm_vcpu *vcpu)
{
	struct kvm_dirty_ring *ring = &vcpu->dirty_ring;
	struct dirty_page page[BATCH_PAGES];
	u32 end, nr, count = 0;

	mutex_lock(&ring->reset_lock);
	end = atomic_read(&ring->head);

	while (!fatal_signal_pending(current)) {
		nr = reset_collect(ring, ring->tail, end, page);
		if (!nr)
			break;

		reset_protect(kvm, page, nr);
		reset_release(ring, ring->tail, nr);
		count += nr;
		cond_resched();
	}

	if (count)
		trace_kvm_dirty_ring_reset(vcpu->vcpu_id, count,
					   ring_used(ring));
	mutex_unlock(&ring->reset_lock);

	return count;
}

/**
 * kvm_dirty_ring_reset - reset the harvested entries of all rings of a VM
 * @kvm:	the VM
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
int kvm_dirty_ring_reset(struct kvm *kvm)
{
	struct kvm_vcpu *vcpu;
	int i, count = 0;

	if (!kvm_dirty_ring_enabled(kvm))
		return -EINVAL;

	kvm_for_each_vcpu(i, vcpu, kvm)
		count += ring_reset(kvm, vcpu);

	/*
	 * Flush even if no mapping had to be changed: the one who changed it,
	 * for an entry of the same page in another ring, may not have flushed
	 * yet.
	 */
	if (count)
		kvm_flush_remote_tlbs(kvm);

	aside_push(kvm);
	return count;
}

/**
 * kvm_arch_dirty_log_size - tell how many entries the CPU logs on its own
 *
 * An architecture whose CPUs log dirty pages by themselves overrides this. That
 * many entries are reserved above the soft limit in addition to
 * KVM_DIRTY_RING_RESERVED_ENTRIES.
 *
 * Context: Any.
 * Return: The size of the CPU's log, in entries, before KVM sees any of them.
 */
u32 __weak kvm_arch_dirty_log_size(void)
{
	return 0;
}

static u32 reserved_entries(void)
{
	return KVM_DIRTY_RING_RESERVED_ENTRIES + kvm_arch_dirty_log_size();
}

/**
 * kvm_dirty_ring_enable - give a VM's vCPUs dirty rings
 * @kvm:	the VM
 * @cap:	from userspace; args[0] is the size of a ring in bytes
 *
 * Context: Process context. Takes kvm->lock. Sleeps.
 * Return: 0; -EINVAL for a size that is not a power of two, is below a page or
 * does not exceed the reserved entries, for flags, and if the VM has rings or
 * vCPUs already; -E2BIG for a size above the maximum; -ENOMEM.
 */
int kvm_dirty_ring_enable(struct kvm *kvm, const struct kvm_enable_cap *cap)
{
	struct kvm_dirty_aside *aside;
	u64 bytes = cap->args[0];
	int r = -EINVAL;

	/* Not is_power_of_2(), which cuts its argument to an unsigned long. */
	if (cap->flags || !bytes || (bytes & (bytes - 1)))
		return -EINVAL;

	if (bytes > KVM_DIRTY_RING_MAX_ENTRIES * sizeof(struct kvm_dirty_gfn))
		return -E2BIG;

	if (bytes < PAGE_SIZE ||
	    bytes <= reserved_entries() * sizeof(struct kvm_dirty_gfn))
		return -EINVAL;

	aside = kvzalloc(sizeof(*aside), GFP_KERNEL_ACCOUNT);
	if (!aside)
		return -ENOMEM;
	raw_spin_lock_init(&aside->lock);

	mutex_lock(&kvm->lock);
	if (!kvm->dirty_ring_size && !kvm->created_vcpus) {
		kvm->dirty_aside = aside;
		aside = NULL;
		/* Pairs with the barrier in kvm_dirty_ring_push(). */
		smp_store_release(&kvm->dirty_ring_size, (u32)bytes);
		r = 0;
	}
	mutex_unlock(&kvm->lock);

	kvfree(aside);
	return r;
}

/**
 * kvm_dirty_ring_destroy_vm - free what a VM with dirty rings has
 * @kvm:	the VM, without vCPUs and with no other user
 *
 * Context: Process context. May sleep.
 */
void kvm_dirty_ring_destroy_vm(struct kvm *kvm)
{
	kvfree(kvm->dirty_aside);
}

/**
 * kvm_dirty_ring_create - give a vCPU its ring
 * @vcpu:	the vCPU, not yet visible to anybody else
 *
 * The ring is charged to the memory cgroup of the calling task and allocated
 * by its memory policy: on the node it runs on, by default.
 *
 * Context: Process context. Sleeps.
 * Return: 0, also if the VM has no dirty rings; -ENOMEM.
 */
int kvm_dirty_ring_create(struct kvm_vcpu *vcpu)
{
	struct kvm_dirty_ring *ring = &vcpu->dirty_ring;
	u32 bytes = vcpu->kvm->dirty_ring_size;

	if (!bytes)
		return 0;

	/* Fail rather than have the memory cgroup's OOM killer make room. */
	ring->entries = __vmalloc(bytes, GFP_KERNEL_ACCOUNT | __GFP_ZERO |
				  __GFP_RETRY_MAYFAIL | __GFP_NOWARN);
	if (!ring->entries)
		return -ENOMEM;

	ring->size = bytes / sizeof(struct kvm_dirty_gfn);
	ring->soft_limit = ring->size - reserved_entries();
	mutex_init(&ring->reset_lock);
	return 0;
}

/**
 * kvm_dirty_ring_destroy - free the ring of a vCPU
 * @vcpu:	the vCPU, not visible to anybody else any more
 *
 * Context: Process context. May sleep.
 */
void kvm_dirty_ring_destroy(struct kvm_vcpu *vcpu)
{
	vfree(vcpu->dirty_ring.entries);
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

/**
 * kvm_dirty_ring_has_page - tell whether a page belongs to a vCPU's ring
 * @vcpu:	the vCPU
 * @pgoff:	page offset in the vCPU's file descriptor
 *
 * Context: Any.
 * Return: true if it does.
 */
bool kvm_dirty_ring_has_page(struct kvm_vcpu *vcpu, pgoff_t pgoff)
{
	return pgoff >= KVM_DIRTY_LOG_PAGE_OFFSET &&
	       pgoff - KVM_DIRTY_LOG_PAGE_OFFSET <
	       vcpu->kvm->dirty_ring_size >> PAGE_SHIFT;
}

/**
 * kvm_dirty_ring_mmap - check and prepare a mapping of a vCPU's file descriptor
 * @vcpu:	the vCPU
 * @vma:	the mapping to be; it need not touch the ring
 *
 * A private mapping of a ring would lose what userspace writes to it, and
 * there is no use for an executable one.
 *
 * Context: mmap(), with the mmap lock held for writing.
 * Return: 0; -EINVAL if any page of the ring would be mapped private or
 * executable.
 */
int kvm_dirty_ring_mmap(struct kvm_vcpu *vcpu, struct vm_area_struct *vma)
{
	pgoff_t first = vma->vm_pgoff;
	pgoff_t last = first + vma_pages(vma) - 1;

	if (!kvm_dirty_ring_enabled(vcpu->kvm))
		return 0;

	/* No growing into the ring by mremap(). */
	vma->vm_flags |= VM_DONTEXPAND;

	if (last < KVM_DIRTY_LOG_PAGE_OFFSET ||
	    (first > KVM_DIRTY_LOG_PAGE_OFFSET &&
	     !kvm_dirty_ring_has_page(vcpu, first)))
		return 0;

	if (!(vma->vm_flags & VM_SHARED) || (vma->vm_flags & VM_EXEC))
		return -EINVAL;

	/* No mprotect() to executable either. */
	vma->vm_flags &= ~VM_MAYEXEC;
	/* For kvm_dirty_ring_fault(); other pages are mapped as usual. */
	vma->vm_flags |= VM_MIXEDMAP;
	return 0;
}

/**
 * kvm_dirty_ring_fault - map a page of a vCPU's ring
 * @vcpu:	the vCPU
 * @vmf:	the fault, on a page for which kvm_dirty_ring_has_page() is true
 *
 * The page is mapped without its struct page: that of a page charged to a
 * memory cgroup as kernel memory has no room for a count of mappings. The
 * mapping holds the file, which holds the VM, which holds the ring.
 *
 * Context: Page fault, with the mmap lock held for reading. Sleeps.
 * Return: VM_FAULT_NOPAGE, or an error of vmf_insert_mixed().
 */
vm_fault_t kvm_dirty_ring_fault(struct kvm_vcpu *vcpu, struct vm_fault *vmf)
{
	unsigned long offset = vmf->pgoff - KVM_DIRTY_LOG_PAGE_OFFSET;
	struct page *page;

	page = vmalloc_to_page((void *)vcpu->dirty_ring.entries +
			       (offset << PAGE_SHIFT));
	return vmf_insert_mixed(vmf->vma, vmf->address, page_to_pfn_t(page));
}
