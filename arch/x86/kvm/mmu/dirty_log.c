// SPDX-License-Identifier: GPL-2.0-only
/*
 * How the MMU learns of a guest's writes to a memslot whose dirty pages are
 * tracked, whatever log they are written to
 *
 * Writes to a page are noticed as long as the page is mapped read-only, or, where
 * the CPU logs pages, with the dirty bit clear.
 */

#include <linux/kvm_host.h>

#include "mmu.h"
#include "mmu_internal.h"
#include "spte.h"

/**
 * kvm_mmu_tracked_slot - look up a memslot whose dirty pages are tracked
 * @kvm:	the VM
 * @sp:		a page table
 * @gfn:	a page that it maps, or could
 *
 * Context: slots_lock or kvm->srcu held.
 * Return: the memslot, of the page table's address space; NULL if there is none, or
 * it is not tracked.
 */
struct kvm_memory_slot *kvm_mmu_tracked_slot(struct kvm *kvm,
					     struct kvm_mmu_page *sp, gfn_t gfn)
{
	struct kvm_memory_slot *slot;

	slot = __gfn_to_memslot(kvm_memslots_for_spte_role(kvm, sp->role), gfn);

	return slot && kvm_slot_dirty_track_enabled(slot) ? slot : NULL;
}

/* Does the CPU log the pages that it writes to by this spte, and sets dirty? */
static bool cpu_logs_spte(u64 spte)
{
	return kvm_x86_ops.enable_log_dirty_pt_masked &&
	       !spte_ad_need_write_protect(spte);
}

/**
 * kvm_mmu_spte_logs_write - does an spte make a page writable unnoticed?
 * @old_spte:	what the page was mapped by, 0 if it was not
 * @spte:	what it is going to be mapped by
 *
 * Return: true if writes were noticed until now, or not possible, and would no
 * longer be.
 */
bool kvm_mmu_spte_logs_write(u64 old_spte, u64 spte)
{
	bool was_writable = is_shadow_present_pte(old_spte) &&
			    is_writable_pte(old_spte);

	if (!is_shadow_present_pte(spte) || !is_writable_pte(spte))
		return false;

	/* The CPU notices the first write, as long as the page is clean. */
	if (cpu_logs_spte(spte))
		return is_dirty_spte(spte) &&
		       !(was_writable && is_dirty_spte(old_spte));

	return !was_writable;
}

/**
 * kvm_mmu_mark_page_dirty - mark a page that was made writable, but not for a write
 * @kvm:	the VM
 * @sptep:	what maps the page
 * @gfn:	the page
 *
 * Context: mmu_lock, and slots_lock or kvm->srcu held.
 */
void kvm_mmu_mark_page_dirty(struct kvm *kvm, u64 *sptep, gfn_t gfn)
{
	struct kvm_memory_slot *slot;

	slot = kvm_mmu_tracked_slot(kvm, sptep_to_sp(sptep), gfn);
	if (slot)
		mark_page_dirty_in_slot(kvm, slot, gfn);
}

/**
 * kvm_mmu_log_first_write - have the first write to a page noticed
 * @kvm:	the VM
 * @sptep:	what is to map the page, for a fault that is not a write to it
 * @gfn:	the page
 * @spte:	what it would be mapped by, writable and dirty
 *
 * Context: mmu_lock, and slots_lock or kvm->srcu held.
 * Return: what to map the page by; @spte, if its memslot is not tracked.
 */
u64 kvm_mmu_log_first_write(struct kvm *kvm, u64 *sptep, gfn_t gfn, u64 spte)
{
	if (!kvm_mmu_tracked_slot(kvm, sptep_to_sp(sptep), gfn))
		return spte;

	if (cpu_logs_spte(spte))
		return spte & ~shadow_dirty_mask;

	return spte & ~PT_WRITABLE_MASK;
}

/**
 * kvm_mmu_small_spte - what maps the first part of a huge page
 * @huge_spte:	maps the huge page, in a memslot that is tracked
 * @level:	of the page table that is to map it
 * @exec:	whether the guest may execute in it
 *
 * The rights stay, but those that huge pages do not get: to execute, because of the
 * mitigation of the CPU's iTLB multihit erratum; and to write, where the CPU logs
 * pages, but not huge ones.
 *
 * If logging is being switched on, the huge page may not have been protected yet,
 * and those who do that may not look at the small ones any more. So these are
 * protected; TLBs are flushed when logging is on.
 *
 * Context: mmu_lock held.
 * Return: the spte.
 */
u64 kvm_mmu_small_spte(u64 huge_spte, int level, bool exec)
{
	u64 spte = huge_spte & ~(PT_WRITABLE_MASK | SPTE_WAS_DIRTY_MASK);

	if (level > PG_LEVEL_4K)
		return spte;

	spte &= ~PT_PAGE_SIZE_MASK;

	if (exec && is_nx_huge_page_enabled() && !is_access_track_spte(spte))
		spte = (spte & ~shadow_nx_mask) | shadow_x_mask;

	if (cpu_logs_spte(spte) &&
	    spte_can_locklessly_be_made_writable(spte))
		spte = (spte & ~shadow_dirty_mask) | PT_WRITABLE_MASK;

	return spte;
}

/* Inlined, for the loop over a reset's pages. */
static __always_inline void protect_page(u64 *sptep)
{
	u64 old_spte, new_spte, spte, mask;
	bool logs;

	for (spte = READ_ONCE(*sptep); ; spte = old_spte) {
		if (!is_shadow_present_pte(spte))
			return;

		logs = cpu_logs_spte(spte);
		mask = logs ? shadow_dirty_mask : PT_WRITABLE_MASK;
		if (!(spte & mask))
			return;

		/*
		 * If this bit was what said that the page is dirty: without mmu_lock,
		 * the page may be freed by now. Do not touch it.
		 */
		new_spte = spte & ~mask;
		if (logs || !spte_ad_enabled(spte))
			new_spte |= SPTE_WAS_DIRTY_MASK;

		old_spte = cmpxchg64(sptep, spte, new_spte);
		if (old_spte == spte)
			return;
	}
}

/**
 * kvm_mmu_protect_page - have the next write to a page noticed
 * @sptep:	maps the page, or nothing
 *
 * The caller flushes TLBs. See Documentation/virt/kvm/dirty-ring.rst, "x86's resets",
 * for why no write goes unnoticed.
 *
 * Context: mmu_lock held; or kvm->srcu, and what frees the page table waits.
 */
void kvm_mmu_protect_page(u64 *sptep)
{
	protect_page(sptep);
}

/**
 * kvm_mmu_protect_pages_lockless - have writes to pages noticed, without mmu_lock
 * @slot:	the memslot, tracked
 * @offset:	the pages' indices in @slot
 * @nr:		number of pages
 *
 * The caller flushes TLBs.
 *
 * Context: kvm->srcu held; a VM whose shadow pages are freed by RCU.
 * Return: how many pages were protected before one that takes mmu_lock, because
 * several sptes map it.
 */
u32 kvm_mmu_protect_pages_lockless(struct kvm_memory_slot *slot,
				   const u64 *offset, u32 nr)
{
	unsigned long val;
	u32 i;

	/* An spte cannot be read, and written, at once. */
	if (!IS_ENABLED(CONFIG_X86_64))
		return 0;

	rcu_read_lock();
	for (i = 0; i < nr; i++) {
		val = READ_ONCE(slot->arch.rmap[0][offset[i]].val);
		if (val & 1)
			break;
		if (val)
			protect_page((u64 *)val);
	}
	rcu_read_unlock();

	return i;
}

/* Add a second spte to a reverse map, if there is memory for that. */
static bool rmap_add_alias(u64 *sptep, struct kvm_rmap_head *rmap_head)
{
	struct kvm_mmu_memory_cache cache = { .nobjs = 1 };

	if (rmap_head->val & 1)
		return false;

	cache.objects[0] = kmem_cache_zalloc(pte_list_desc_cache,
					     GFP_NOWAIT | __GFP_NOWARN |
					     __GFP_ACCOUNT);
	if (!cache.objects[0])
		return false;

	pte_list_add(&cache, sptep, rmap_head);
	return true;
}

/**
 * kvm_mmu_split_huge_page - map by a page table what a huge page maps
 * @kvm:	the VM
 * @slot:	the memslot, tracked
 * @sptep:	maps the huge page, in a direct shadow page
 * @sp:		the page table, direct, and for the same frames.  It may have been
 *		in use before
 * @cache:	for the reverse map of @sp; not needed if @sp has no parent
 *
 * All of it stays mapped, by the same frames and with the same rights.  So nobody
 * has to fault, and TLBs may keep what they have.  Left out is what has several
 * mappings already, which would take too long, or is short of memory for one more.
 *
 * Context: mmu_lock held.
 * Return: true if the caller has to flush TLBs.
 */
bool kvm_mmu_split_huge_page(struct kvm *kvm, struct kvm_memory_slot *slot,
			     u64 *sptep, struct kvm_mmu_page *sp,
			     struct kvm_mmu_memory_cache *cache)
{
	int i, level = sp->role.level, added = 0;
	struct kvm_rmap_head *rmap_head = __gfn_to_rmap(sp->gfn, level, slot);
	u64 stride = KVM_PAGES_PER_HPAGE(level) << PAGE_SHIFT;
	u64 spte = kvm_mmu_small_spte(*sptep, level,
				      sp->role.access & ACC_EXEC_MASK);
	u64 old_spte;

	for (i = 0; i < PT64_ENT_PER_PAGE; i++, rmap_head++, spte += stride) {
		if (is_shadow_present_pte(sp->spt[i]))
			continue;

		if (!rmap_head->val)
			WRITE_ONCE(rmap_head->val,
				   (unsigned long)&sp->spt[i]);
		else if (!rmap_add_alias(&sp->spt[i], rmap_head))
			continue;

		set_64bit(&sp->spt[i], spte);
		added++;
	}
	sp->rmapped += added;
	if (level > PG_LEVEL_4K)
		kvm->stat.lpages += added;

	__pte_list_remove(sptep, __gfn_to_rmap(sp->gfn, level + 1, slot));
	sptep_to_sp(sptep)->rmapped--;
	kvm->stat.lpages--;
	++kvm->stat.lpage_splits;
	pte_list_add(cache, sptep, &sp->parent_ptes);

	old_spte = exchange_spte(sptep, make_nonleaf_spte(sp->spt,
							  sp_ad_disabled(sp)));
	if (is_accessed_spte(old_spte))
		kvm_set_pfn_accessed(spte_to_pfn(old_spte));
	if (spte_page_is_dirty(old_spte))
		kvm_set_pfn_dirty(spte_to_pfn(old_spte));

	return added < PT64_ENT_PER_PAGE;
}

/**
 * kvm_mmu_alloc_split_page - allocate a page table to split a huge page with
 * @kvm:	the VM
 *
 * Context: mmu_lock held, dropped for the allocation.
 * Return: the page table, empty and unknown to the MMU; NULL if there is no memory,
 * or a fatal signal is pending.
 */
struct kvm_mmu_page *kvm_mmu_alloc_split_page(struct kvm *kvm)
	__must_hold(&kvm->mmu_lock)
{
	/*
	 * It is not worth killing anyone, nor waiting: reclaim may want kvm_lock,
	 * which others hold who wait for slots_lock.
	 */
	const gfp_t gfp = (GFP_KERNEL_ACCOUNT & ~__GFP_DIRECT_RECLAIM) |
			  __GFP_NOWARN;
	struct kvm_mmu_page *sp;

	spin_unlock(&kvm->mmu_lock);
	cond_resched();

	sp = fatal_signal_pending(current) ? NULL :
	     kmem_cache_zalloc(mmu_page_header_cache, gfp);
	if (sp) {
		sp->spt = (u64 *)get_zeroed_page(gfp);
		if (sp->spt) {
			set_page_private(virt_to_page(sp->spt),
					 (unsigned long)sp);
		} else {
			kmem_cache_free(mmu_page_header_cache, sp);
			sp = NULL;
		}
	}

	spin_lock(&kvm->mmu_lock);
	return sp;
}

/**
 * kvm_mmu_free_split_page - free a page table that was not used
 * @sp:		of kvm_mmu_alloc_split_page()
 */
void kvm_mmu_free_split_page(struct kvm_mmu_page *sp)
{
	free_page((unsigned long)sp->spt);
	kmem_cache_free(mmu_page_header_cache, sp);
}

/**
 * kvm_mmu_huge_spte - what maps by a huge page what a page table maps
 * @kvm:	the VM
 * @slot:	the memslot, no longer tracked
 * @gfn:	the first frame that the page table maps
 * @level:	of the huge page
 * @pt:		the page table
 *
 * Context: mmu_lock held.
 * Return: the spte, 0 if a huge page may not or cannot map the same.
 */
u64 kvm_mmu_huge_spte(struct kvm *kvm, struct kvm_memory_slot *slot, gfn_t gfn,
		      int level, const u64 *pt)
{
	u64 stride = KVM_PAGES_PER_HPAGE(level - 1) << PAGE_SHIFT;
	u64 ignore = PT_WRITABLE_MASK | SPTE_WAS_DIRTY_MASK;
	u64 spte = READ_ONCE(*pt), want = spte, one, all = 0, differ = 0;
	int i;

	if (!is_shadow_present_pte(spte) || !is_last_spte(spte, level - 1) ||
	    is_access_track_spte(spte))
		return 0;

	if (spte_ad_enabled(spte))
		ignore |= shadow_accessed_mask | shadow_dirty_mask;

	/* Most page tables that differ do so soon. */
	if ((READ_ONCE(pt[PT64_ENT_PER_PAGE - 1]) ^
	     (spte + (PT64_ENT_PER_PAGE - 1) * stride)) & ~ignore)
		return 0;

	if (!kvm_mmu_may_be_huge(kvm, slot, gfn, spte_to_pfn(spte), level))
		return 0;

	for (i = 0; i < PT64_ENT_PER_PAGE; i++, want += stride) {
		one = READ_ONCE(pt[i]);
		differ |= one ^ want;
		all |= one;
	}
	if (differ & ~ignore)
		return 0;

	spte |= PT_PAGE_SIZE_MASK | (all & ignore);
	if (spte_can_locklessly_be_made_writable(spte))
		spte |= PT_WRITABLE_MASK | spte_shadow_dirty_mask(spte);
	if (is_nx_huge_page_enabled())
		spte = (spte & ~shadow_x_mask) | shadow_nx_mask;

	return spte;
}

/**
 * kvm_mmu_recover_huge_page - map by a huge page what a page table maps
 * @kvm:	the VM
 * @slot:	the memslot, no longer tracked
 * @sptep:	leads to the page table, and nothing else does
 * @sp:		the page table, direct and full
 *
 * The pages stay mapped, and may all be written at once.
 *
 * Context: mmu_lock held.
 * Return: true if @sptep now maps the huge page. No reverse map leads to @sp any
 * more, but its entries are what they were: CPUs may use them until TLBs are
 * flushed, which the caller has to do before it frees @sp or drops mmu_lock.
 */
bool kvm_mmu_recover_huge_page(struct kvm *kvm, struct kvm_memory_slot *slot,
			       u64 *sptep, struct kvm_mmu_page *sp)
{
	int i, level = sp->role.level;
	struct kvm_rmap_head *rmap_head;
	u64 spte;

	spte = kvm_mmu_huge_spte(kvm, slot, sp->gfn, level + 1, sp->spt);
	if (!spte)
		return false;

	rmap_head = __gfn_to_rmap(sp->gfn, level + 1, slot);
	if (!rmap_head->val)
		WRITE_ONCE(rmap_head->val, (unsigned long)sptep);
	else if (!rmap_add_alias(sptep, rmap_head))
		return false;
	sptep_to_sp(sptep)->rmapped++;
	kvm->stat.lpages++;
	++kvm->stat.lpages_recovered;

	__pte_list_remove(sptep, &sp->parent_ptes);
	exchange_spte(sptep, spte);

	rmap_head = __gfn_to_rmap(sp->gfn, level, slot);
	for (i = 0; i < PT64_ENT_PER_PAGE; i++, rmap_head++) {
		if (rmap_head->val == (unsigned long)&sp->spt[i])
			WRITE_ONCE(rmap_head->val, 0);
		else
			__pte_list_remove(&sp->spt[i], rmap_head);
	}
	sp->rmapped = 0;
	if (level > PG_LEVEL_4K)
		kvm->stat.lpages -= PT64_ENT_PER_PAGE;

	return true;
}
