// SPDX-License-Identifier: GPL-2.0
/*
 * KVM dirty rings: enable, create, map and free them. dirty_ring.c pushes to them
 * and resets them.
 */

#include <linux/debugfs.h>
#include <linux/fs.h>
#include <linux/kvm_host.h>
#include <linux/kvm_dirty_ring.h>
#include <linux/magic.h>
#include <linux/module.h>
#include <linux/mount.h>
#include <linux/pagemap.h>
#include <linux/pseudo_fs.h>
#include <linux/sizes.h>
#include <linux/vmalloc.h>

#include "dirty_ring.h"

/*
 * Entries above the soft limit, for what KVM itself writes between two checks of
 * the soft limit.
 */
#define RESERVED_ENTRIES	64

/* Headroom for the allocations that follow that of a ring in creating a vCPU. */
#define HEADROOM_PAGES		(SZ_128K >> PAGE_SHIFT)

/**
 * kvm_arch_dirty_log_size - get the size of the CPU's own log of dirty pages
 *
 * Architectures whose CPUs log dirty pages override this. Reserve that many
 * entries above the soft limit in addition to RESERVED_ENTRIES.
 *
 * Context: Any.
 * Return: The number of pages that the CPU can log before KVM sees any of them.
 */
u32 __weak kvm_arch_dirty_log_size(void)
{
	return 0;
}

static u32 reserved_entries(void)
{
	return RESERVED_ENTRIES + kvm_arch_dirty_log_size();
}

/* Allocate a VM's overflow, charged to the caller's memory cgroup. */
static struct kvm_dirty_overflow *overflow_alloc(void)
{
	struct kvm_dirty_overflow *overflow;

	overflow = kvzalloc(sizeof(*overflow), GFP_KERNEL_ACCOUNT);
	if (overflow)
		raw_spin_lock_init(&overflow->lock);

	return overflow;
}

static void overflow_free(struct kvm_dirty_overflow *overflow)
{
	kvfree(overflow);
}

/**
 * kvm_dirty_ring_enable - give a VM's vCPUs dirty rings
 * @kvm:	the VM
 * @cap:	from userspace; args[0] is the size of a ring in bytes
 *
 * Context: Process context. Takes kvm->lock. Sleeps.
 * Return: 0; -EINVAL for flags, for a size that is not a power of two, is below a
 * page or does not exceed the reserved entries, and if the VM has rings or vCPUs
 * already; -E2BIG for a size above the maximum; -ENOMEM.
 */
int kvm_dirty_ring_enable(struct kvm *kvm, const struct kvm_enable_cap *cap)
{
	struct kvm_dirty_overflow *overflow;
	u64 bytes = cap->args[0];
	int r = -EINVAL;

	/* is_power_of_2() would truncate to unsigned long. */
	if (cap->flags || !bytes || (bytes & (bytes - 1)))
		return -EINVAL;

	if (bytes > KVM_DIRTY_RING_MAX_ENTRIES * sizeof(struct kvm_dirty_gfn))
		return -E2BIG;

	if (bytes < PAGE_SIZE ||
	    bytes <= reserved_entries() * sizeof(struct kvm_dirty_gfn))
		return -EINVAL;

	overflow = overflow_alloc();
	if (!overflow)
		return -ENOMEM;

	mutex_lock(&kvm->lock);
	if (!kvm->dirty_ring_size && !kvm->created_vcpus) {
		kvm->dirty_overflow = overflow;
		overflow = NULL;
		/* Pairs with the barrier in push_fallback(). */
		smp_store_release(&kvm->dirty_ring_size, (u32)bytes);
		r = 0;
	}
	mutex_unlock(&kvm->lock);

	overflow_free(overflow);
	return r;
}

#ifdef CONFIG_NEED_KVM_DIRTY_RING_WITH_BITMAP
/**
 * kvm_dirty_ring_enable_bitmaps - give a VM's memslots bitmaps beside the rings
 * @kvm:	the VM
 * @cap:	from userspace
 *
 * Existing memslots would have no bitmap; fail if there are any.
 *
 * Context: Process context. Takes kvm->slots_lock. Sleeps.
 * Return: 0; -EINVAL for flags, and if the VM has no rings or has memslots.
 */
int kvm_dirty_ring_enable_bitmaps(struct kvm *kvm,
				  const struct kvm_enable_cap *cap)
{
	int used = 0;
	int i;

	if (cap->flags || !kvm_dirty_ring_enabled(kvm))
		return -EINVAL;

	mutex_lock(&kvm->slots_lock);
	for (i = 0; i < KVM_ADDRESS_SPACE_NUM; i++)
		used += __kvm_memslots(kvm, i)->used_slots;
	if (!used)
		WRITE_ONCE(kvm->dirty_ring_bitmaps, true);
	mutex_unlock(&kvm->slots_lock);

	return used ? -EINVAL : 0;
}
#endif

/**
 * kvm_dirty_ring_destroy_vm - free a VM's overflow
 * @kvm:	the VM, without vCPUs and with no other user
 *
 * Context: Process context. May sleep.
 */
void kvm_dirty_ring_destroy_vm(struct kvm *kvm)
{
	overflow_free(kvm->dirty_overflow);
}

/* Mounted as long as there are rings */
static struct vfsmount *ring_mnt;
static int ring_mnt_count;

static int ring_fs_init(struct fs_context *fc)
{
	return init_pseudo(fc, ANON_INODE_FS_MAGIC) ? 0 : -ENOMEM;
}

static struct file_system_type ring_fs = {
	.name = "kvm-dirty-ring",
	.owner = THIS_MODULE,
	.init_fs_context = ring_fs_init,
	.kill_sb = kill_anon_super,
};

/* Get an inode that no file system but this one knows of. */
static struct inode *ring_inode_alloc(void)
{
	struct inode *inode;
	int r;

	r = simple_pin_fs(&ring_fs, &ring_mnt, &ring_mnt_count);
	if (r)
		return ERR_PTR(r);

	inode = alloc_anon_inode(ring_mnt->mnt_sb);
	if (IS_ERR(inode)) {
		simple_release_fs(&ring_mnt, &ring_mnt_count);
		return inode;
	}

	/* Keep reclaim from scanning pages that it cannot free. */
	mapping_set_unevictable(inode->i_mapping);
	return inode;
}

static void ring_inode_free(struct inode *inode)
{
	iput(inode);
	simple_release_fs(&ring_mnt, &ring_mnt_count);
}

/*
 * Fill the page cache of a new inode with @nr pages, and map them into the kernel.
 * Hold a reference to each: they are written with a spinlock held, and must not
 * move.
 *
 * Fail rather than have the memory cgroup's OOM killer make room, here or for one
 * of the small allocations that follow: allocate more pages than the ring needs,
 * and free the rest.
 */
static void *ring_map(struct address_space *mapping, u32 nr)
{
	gfp_t gfp = GFP_KERNEL | __GFP_ZERO | __GFP_RETRY_MAYFAIL |
		    __GFP_NOWARN;
	u32 i, all = nr + HEADROOM_PAGES;
	struct page **pages;
	void *addr = NULL;

	pages = kvmalloc_array(all, sizeof(*pages), GFP_KERNEL);
	if (!pages)
		return NULL;

	for (i = 0; i < all; i++) {
		pages[i] = find_or_create_page(mapping, i, gfp);
		if (!pages[i])
			break;
		SetPageUptodate(pages[i]);
		unlock_page(pages[i]);
	}
	if (i == all) {
		while (i > nr)
			put_page(pages[--i]);
		truncate_inode_pages(mapping, (loff_t)nr << PAGE_SHIFT);
		addr = vmap(pages, nr, VM_MAP, PAGE_KERNEL);
	}
	if (!addr) {
		while (i--)
			put_page(pages[i]);
	}

	kvfree(pages);
	return addr;
}

/**
 * kvm_dirty_ring_create - give a vCPU its ring
 * @vcpu:	the vCPU, not yet visible to anybody else
 *
 * Charge the ring to the memory cgroup of the calling task, and allocate it by the
 * task's memory policy: by default, on the node that the task runs on. Use page
 * cache: userspace can map it, and the rest of the kernel can pin, copy and dump
 * it. Pages that are charged as kernel memory cannot count their mappings. Pages of
 * shmem may be huge, and a fault maps a huge page as a whole, over the pages of the
 * vCPU's mapping that are not the ring's.
 *
 * Context: Process context. Sleeps.
 * Return: 0, even if the VM has no dirty rings; -ENOMEM.
 */
int kvm_dirty_ring_create(struct kvm_vcpu *vcpu)
{
	struct kvm_dirty_ring *ring = &vcpu->dirty_ring;
	u32 bytes = vcpu->kvm->dirty_ring_size;
	u32 size;

	if (!bytes)
		return 0;

	ring->inode = ring_inode_alloc();
	if (IS_ERR(ring->inode))
		return -ENOMEM;

	ring->entries = ring_map(ring->inode->i_mapping, bytes >> PAGE_SHIFT);
	if (!ring->entries) {
		ring_inode_free(ring->inode);
		return -ENOMEM;
	}

	size = bytes / sizeof(struct kvm_dirty_gfn);
	ring->mask = size - 1;
	ring->soft_limit = size - reserved_entries();
	ring->soft_end = ring->soft_limit - 1;
	/* The hints must not name entry 0, which is not published yet. */
	memset(ring->recent, 0xff, sizeof(ring->recent));
	mutex_init(&ring->reset_lock);
	return 0;
}

static struct page *ring_page(struct kvm_dirty_ring *ring, u32 nr)
{
	return vmalloc_to_page((void *)ring->entries + nr * PAGE_SIZE);
}

/**
 * kvm_dirty_ring_destroy - free the ring of a vCPU
 * @vcpu:	the vCPU, not visible to anybody else any more
 *
 * Context: Process context. May sleep.
 */
void kvm_dirty_ring_destroy(struct kvm_vcpu *vcpu)
{
	struct kvm_dirty_ring *ring = &vcpu->dirty_ring;
	u32 i;

	if (!ring->entries)
		return;

	/* The inode keeps them until it is freed. */
	for (i = 0; i < vcpu->kvm->dirty_ring_size >> PAGE_SHIFT; i++)
		put_page(ring_page(ring, i));
	vunmap(ring->entries);
	ring_inode_free(ring->inode);
}

/**
 * kvm_dirty_ring_has_page - check whether a page belongs to a vCPU's ring
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
 * @vma:	the new mapping, with or without pages of the ring
 *
 * A private mapping of a ring would lose what userspace writes to it, and an
 * executable one has no use.
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

	/* Do not let mremap() grow a mapping into the ring. */
	vma->vm_flags |= VM_DONTEXPAND;

	if (last < KVM_DIRTY_LOG_PAGE_OFFSET ||
	    (first > KVM_DIRTY_LOG_PAGE_OFFSET &&
	     !kvm_dirty_ring_has_page(vcpu, first)))
		return 0;

	if (!(vma->vm_flags & VM_SHARED) || (vma->vm_flags & VM_EXEC))
		return -EINVAL;

	/* Do not let mprotect() make it executable either. */
	vma->vm_flags &= ~VM_MAYEXEC;
	return 0;
}

/**
 * kvm_dirty_ring_page - get a page of a vCPU's ring
 * @vcpu:	the vCPU
 * @pgoff:	page offset in the vCPU's file descriptor, for which
 *		kvm_dirty_ring_has_page() is true
 *
 * A mapping holds the vCPU's file, which holds the VM, which holds the ring.
 *
 * Context: Any.
 * Return: The page, without taking a reference.
 */
struct page *kvm_dirty_ring_page(struct kvm_vcpu *vcpu, pgoff_t pgoff)
{
	return ring_page(&vcpu->dirty_ring, pgoff - KVM_DIRTY_LOG_PAGE_OFFSET);
}

/**
 * kvm_dirty_ring_create_debugfs - create a vCPU's dirty ring statistics
 * @vcpu:	the vCPU
 * @dentry:	the vCPU's directory in debugfs
 *
 * The architecture's debugfs_entries create the sums over all vCPUs.
 *
 * Context: Process context. Sleeps.
 */
void kvm_dirty_ring_create_debugfs(struct kvm_vcpu *vcpu, struct dentry *dentry)
{
	struct kvm_dirty_ring_vcpu_stat *stat = &vcpu->dirty_ring.stat;

	if (!kvm_dirty_ring_enabled(vcpu->kvm))
		return;

	debugfs_create_u64("dirty_ring_pushed", 0444, dentry,
			   (u64 *)&vcpu->dirty_ring.pushed);
	debugfs_create_u64("dirty_ring_skipped", 0444, dentry, &stat->skipped);
	debugfs_create_u64("dirty_ring_full_exits", 0444, dentry,
			   &stat->full_exits);
	debugfs_create_u64("dirty_ring_reset", 0444, dentry, &stat->reset);
}
