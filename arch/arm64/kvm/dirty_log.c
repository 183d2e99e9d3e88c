// SPDX-License-Identifier: GPL-2.0-only
/*
 * Huge pages of a memslot whose dirty pages are tracked: by block mappings, writes
 * to single pages are not noticed
 */

#include <linux/hugetlb.h>
#include <linux/kvm_host.h>
#include <linux/sched/signal.h>

#include <asm/kvm_mmu.h>
#include <asm/kvm_pgtable.h>

/**
 * kvm_supported_block_sizes - what a stage 2 entry can map
 *
 * Return: a mask of sizes in bytes, among them that of a page; what
 * KVM_CAP_ARM_SUPPORTED_BLOCK_SIZES has.
 */
u64 kvm_supported_block_sizes(void)
{
	u64 sizes = PAGE_SIZE | PMD_SIZE;

	if (PAGE_SIZE == SZ_4K)
		sizes |= PUD_SIZE;

	return sizes;
}

/**
 * kvm_set_split_chunk_size - have blocks split when logging starts
 * @kvm:	the VM
 * @size:	what to split at a time, a supported block size; 0: nothing
 *
 * Blocks are split one by one, whatever the size.
 *
 * Context: takes slots_lock.
 * Return: 0; -EINVAL if @size is none of these, or there is a memslot.
 */
int kvm_set_split_chunk_size(struct kvm *kvm, u64 size)
{
	int r = -EINVAL;

	if (size && (hweight64(size) != 1 ||
		     !(size & kvm_supported_block_sizes())))
		return r;

	mutex_lock(&kvm->slots_lock);
	if (!kvm_memslots(kvm)->used_slots) {
		kvm->arch.mmu.split_chunk_size = size;
		r = 0;
	}
	mutex_unlock(&kvm->slots_lock);

	return r;
}

/**
 * kvm_mmu_split_blocks - split blocks before they are written
 * @kvm:	the VM
 * @start:	the first frame, of a memslot that is tracked and protected
 * @end:	the first behind the last
 *
 * As far as there is memory; what is left is split when it is written.
 *
 * Context: slots_lock and mmu_lock held; mmu_lock is dropped for each block.
 */
void kvm_mmu_split_blocks(struct kvm *kvm, gfn_t start, gfn_t end)
	__must_hold(&kvm->mmu_lock)
{
	/* No block is worth killing anyone, or waiting. */
	const gfp_t gfp = (GFP_KERNEL_ACCOUNT & ~__GFP_DIRECT_RECLAIM) |
			  __GFP_NOWARN;
	u64 addr = start << PAGE_SHIFT;
	struct kvm_pgtable *pgt;
	void *spare = NULL;
	int r;

	while (addr < end << PAGE_SHIFT) {
		/* It may go while mmu_lock is dropped. */
		pgt = kvm->arch.mmu.pgt;
		if (!pgt)
			break;

		r = kvm_pgtable_stage2_split(pgt, &addr, &spare);
		if (!r && !need_resched() && !spin_needbreak(&kvm->mmu_lock))
			continue;

		spin_unlock(&kvm->mmu_lock);
		cond_resched();
		if (r == -EAGAIN && !fatal_signal_pending(current))
			spare = (void *)get_zeroed_page(gfp);
		spin_lock(&kvm->mmu_lock);

		if (r == -EAGAIN && !spare) {
			++kvm->stat.lpage_splits_failed;
			break;
		}
	}

	free_page((unsigned long)spare);
}

/* Does the host have a huge page there, all of it in the memslot? */
static bool may_be_block(u64 addr, u64 phys, u64 size, void *arg)
{
	kvm_pfn_t pfn = phys >> PAGE_SHIFT;
	struct kvm_memory_slot *slot = arg;
	struct page *head;
	unsigned long hva;

	hva = gfn_to_hva_memslot(slot, addr >> PAGE_SHIFT);
	if (!fault_supports_stage2_huge_mapping(slot, hva, size) ||
	    !pfn_valid(pfn))
		return false;

	head = compound_head(pfn_to_page(pfn));
	if (PageHuge(head))
		return page_size(head) >= size;

	return size == PMD_SIZE && kvm_is_transparent_hugepage(pfn);
}

/**
 * kvm_mmu_recover_blocks - have blocks again where huge pages were split
 * @kvm:	the VM
 * @slot:	the memslot, no longer tracked
 *
 * Context: slots_lock held; takes mmu_lock, and drops it now and then.
 */
void kvm_mmu_recover_blocks(struct kvm *kvm, struct kvm_memory_slot *slot)
{
	u64 sizes[] = { PMD_SIZE, PUD_SIZE };
	u64 start = slot->base_gfn << PAGE_SHIFT;
	u64 end = start + (slot->npages << PAGE_SHIFT), addr;
	struct kvm_pgtable *pgt;
	int i;

	spin_lock(&kvm->mmu_lock);
	for (i = 0; i < ARRAY_SIZE(sizes); i++) {
		if (!(sizes[i] & kvm_supported_block_sizes()))
			continue;

		addr = ALIGN(start, sizes[i]);
		while (addr < end) {
			pgt = kvm->arch.mmu.pgt;
			if (!pgt)
				break;

			addr = kvm_pgtable_stage2_recover(pgt, addr, end,
							  sizes[i], may_be_block,
							  slot);
			if (addr + sizes[i] > end)
				break;

			spin_unlock(&kvm->mmu_lock);
			cond_resched();
			spin_lock(&kvm->mmu_lock);
		}
	}
	spin_unlock(&kvm->mmu_lock);
}
