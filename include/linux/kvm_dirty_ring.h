/* SPDX-License-Identifier: GPL-2.0 */
#ifndef KVM_DIRTY_RING_H
#define KVM_DIRTY_RING_H

#include <linux/atomic.h>
#include <linux/kvm.h>
#include <linux/kvm_types.h>
#include <linux/mm_types.h>
#include <linux/mutex.h>
#include <asm/local64.h>

struct dentry;
struct inode;
struct kvm;
struct kvm_memory_slot;
struct kvm_vcpu;
struct page;
struct vm_area_struct;

/* Entries of the largest ring, which has 1 MiB */
#define KVM_DIRTY_RING_MAX_ENTRIES	65536

#ifdef CONFIG_HAVE_KVM_DIRTY_RING

/* Entries to remember per ring, in order not to push their pages again */
#define KVM_DIRTY_RING_RECENT	8

/**
 * struct kvm_dirty_ring_vcpu_stat - what happened to a vCPU's dirty ring
 * @skipped:	pages that KVM wrote for the vCPU and did not push, because they were
 *		in its ring already. Written on the CPU where the vCPU is loaded,
 *		also in interrupts, without synchronization: may miss some.
 * @full_exits:	exits to userspace at the soft limit. Written by the vCPU's task.
 * @reset:	entries that were reset. Written under reset_lock.
 *
 * Userspace may set these to 0.
 */
struct kvm_dirty_ring_vcpu_stat {
	u64 skipped;
	u64 full_exits;
	u64 reset;
};

/**
 * struct kvm_dirty_ring_vm_stat - what happened to a VM's dirty rings
 * @pushed_other:	entries pushed by others than the ring's own vCPU
 * @skipped_other:	pages that others dirtied and did not push, because they
 *			were in a ring or in the overflow already
 * @overflow:		pages that no ring had room for
 * @overflow_between:	pages that are in the overflow only because they are between
 *			two ranges that were merged for want of room
 * @syncs:		times everything was brought into the rings
 *
 * Written under the lock of struct kvm_dirty_overflow.
 */
struct kvm_dirty_ring_vm_stat {
	ulong pushed_other;
	ulong skipped_other;
	ulong overflow;
	ulong overflow_between;
	ulong syncs;
};

/*
 * For an architecture's debugfs_entries. pushed is read-only, because a sync
 * depends on it.
 */
#define KVM_DIRTY_RING_VCPU_PUSHED					\
	{ "dirty_ring_pushed", offsetof(struct kvm_vcpu, dirty_ring.pushed), \
	  KVM_STAT_VCPU, 0444 }
#define KVM_DIRTY_RING_VCPU_STAT(x)					\
	{ "dirty_ring_" #x, offsetof(struct kvm_vcpu, dirty_ring.stat.x), \
	  KVM_STAT_VCPU }
#define KVM_DIRTY_RING_VM_STAT(x)					\
	{ "dirty_ring_" #x, offsetof(struct kvm, dirty_ring_stat.x),	\
	  KVM_STAT_VM }

/**
 * struct kvm_dirty_ring - one vCPU's ring of dirty pages
 * @entries:	the ring, shared with userspace and not to be trusted; NULL if
 *		the VM has no dirty rings. Set at vCPU creation.
 * @mask:	entries in the ring, a power of two, less one. Set at vCPU
 *		creation.
 * @soft_limit:	used entries that make the vCPU exit to userspace. Set at vCPU
 *		creation.
 * @head:	entries claimed since creation, modulo 2^32. Advanced by every
 *		push, without a lock, from any context.
 * @soft_end:	@head's value when the next push makes the vCPU exit to userspace:
 *		@tail + @soft_limit - 1. Written with @tail.
 * @pushed:	entries that the vCPU published; a sync compares it with @head.
 *		Written on the CPU where the vCPU is loaded, on x86 also in
 *		interrupts.
 * @stat:	for debugfs only
 * @pushed_other: entries that others published, modulo 2^32. Written under the
 *		lock of struct kvm_dirty_overflow.
 * @recent:	for each page index modulo the size of this array, an entry that was
 *		pushed for such a page. Only a hint: may be any entry, except one
 *		that is not published.
 * @tail:	entries reset since creation, modulo 2^32. Written under
 *		@reset_lock, read by pushes.
 * @reset_lock:	serializes resets of this ring
 * @inode:	the inode whose page cache @entries is. Set at vCPU creation.
 *
 * head and tail do not wrap at the ring's size: entry n is entries[n & mask], and
 * head - tail entries are in use.
 */
struct kvm_dirty_ring {
	struct kvm_dirty_gfn *entries;
	u32 mask;
	u32 soft_limit;
	atomic_t head;
	u32 soft_end;
	local64_t pushed;
	struct kvm_dirty_ring_vcpu_stat stat;
	u32 pushed_other;
	u32 recent[KVM_DIRTY_RING_RECENT];
	u32 tail;
	struct mutex reset_lock; /* one reset at a time, writes tail */
	struct inode *inode;
};

u32 kvm_arch_dirty_log_size(void);

int kvm_dirty_ring_enable(struct kvm *kvm, const struct kvm_enable_cap *cap);
int kvm_dirty_ring_enable_bitmaps(struct kvm *kvm,
				  const struct kvm_enable_cap *cap);
void kvm_dirty_ring_stop(struct kvm *kvm);
void kvm_dirty_ring_destroy_vm(struct kvm *kvm);

int kvm_dirty_ring_create(struct kvm_vcpu *vcpu);
void kvm_dirty_ring_destroy(struct kvm_vcpu *vcpu);
void kvm_dirty_ring_vcpu_online(struct kvm_vcpu *vcpu);
int kvm_dirty_ring_mmap(struct kvm_vcpu *vcpu, struct vm_area_struct *vma);
bool kvm_dirty_ring_has_page(struct kvm_vcpu *vcpu, pgoff_t pgoff);
struct page *kvm_dirty_ring_page(struct kvm_vcpu *vcpu, pgoff_t pgoff);

void kvm_dirty_ring_push(struct kvm_vcpu *vcpu, gfn_t gfn);
void kvm_dirty_ring_push_once(struct kvm *kvm, struct kvm_memory_slot *memslot,
			      u64 offset);
bool kvm_dirty_ring_full_exit(struct kvm_vcpu *vcpu);
int kvm_dirty_ring_reset(struct kvm *kvm, struct kvm_vcpu *only);
int kvm_dirty_ring_sync(struct kvm *kvm);
void kvm_arch_dirty_ring_protect(struct kvm *kvm,
				 struct kvm_memory_slot *memslot,
				 const u64 *offset, u32 nr);
void kvm_dirty_ring_create_debugfs(struct kvm_vcpu *vcpu,
				   struct dentry *dentry);

#else /* !CONFIG_HAVE_KVM_DIRTY_RING */

struct kvm_dirty_ring {
};

static inline void kvm_dirty_ring_stop(struct kvm *kvm)
{
}

static inline void kvm_dirty_ring_destroy_vm(struct kvm *kvm)
{
}

static inline int kvm_dirty_ring_create(struct kvm_vcpu *vcpu)
{
	return 0;
}

static inline void kvm_dirty_ring_destroy(struct kvm_vcpu *vcpu)
{
}

static inline void kvm_dirty_ring_vcpu_online(struct kvm_vcpu *vcpu)
{
}

static inline int kvm_dirty_ring_mmap(struct kvm_vcpu *vcpu,
				      struct vm_area_struct *vma)
{
	return 0;
}

static inline bool kvm_dirty_ring_has_page(struct kvm_vcpu *vcpu, pgoff_t pgoff)
{
	return false;
}

static inline struct page *kvm_dirty_ring_page(struct kvm_vcpu *vcpu,
					       pgoff_t pgoff)
{
	return NULL;
}

static inline void kvm_dirty_ring_push(struct kvm_vcpu *vcpu, gfn_t gfn)
{
}

static inline void kvm_dirty_ring_push_once(struct kvm *kvm,
					    struct kvm_memory_slot *memslot,
					    u64 offset)
{
}

static inline bool kvm_dirty_ring_full_exit(struct kvm_vcpu *vcpu)
{
	return false;
}

static inline int kvm_dirty_ring_reset(struct kvm *kvm, struct kvm_vcpu *only)
{
	return -EINVAL;
}

static inline int kvm_dirty_ring_sync(struct kvm *kvm)
{
	return -EINVAL;
}

static inline void kvm_dirty_ring_create_debugfs(struct kvm_vcpu *vcpu,
						 struct dentry *dentry)
{
}

#endif /* CONFIG_HAVE_KVM_DIRTY_RING */

#endif /* KVM_DIRTY_RING_H */
