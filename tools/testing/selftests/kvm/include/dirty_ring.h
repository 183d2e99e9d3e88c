/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The userspace half of KVM's dirty ring: map, harvest, reset.
 */
#ifndef SELFTEST_KVM_DIRTY_RING_H
#define SELFTEST_KVM_DIRTY_RING_H

#include <asm/barrier.h>

#include "kvm_util.h"

/* No limit for vcpu_harvest_dirty_ring(). */
#define DIRTY_RING_HARVEST_ALL	UINT32_MAX

static inline bool dirty_gfn_is_dirty(struct kvm_dirty_gfn *gfn)
{
	/* Pairs with KVM's store-release after slot and offset are written. */
	return smp_load_acquire(&gfn->flags) == KVM_DIRTY_GFN_F_DIRTY;
}

static inline void dirty_gfn_set_harvested(struct kvm_dirty_gfn *gfn)
{
	/*
	 * Keep the reads of slot and offset before this: KVM may fill the entry
	 * anew as soon as it sees it harvested. Pairs with the load-acquire of
	 * a reset.
	 */
	smp_store_release(&gfn->flags, KVM_DIRTY_GFN_F_RESET);
}

/* Called for each entry, before it is marked as harvested. */
typedef void (*dirty_gfn_fn)(uint32_t slot, uint64_t offset, void *data);

uint32_t dirty_ring_cap(void);
uint32_t dirty_ring_max_size(void);
void dirty_ring_check_supported(void);
bool dirty_ring_cpu_logs_pages(void);
uint32_t dirty_ring_reserved_entries(void);

uint32_t vm_dirty_ring_entries(struct kvm_vm *vm);
int vm_reset_dirty_rings(struct kvm_vm *vm);

struct kvm_dirty_gfn *vcpu_dirty_ring(struct kvm_vm *vm, uint32_t vcpuid);
uint32_t vcpu_harvest_dirty_ring(struct kvm_vm *vm, uint32_t vcpuid,
				 uint32_t max, dirty_gfn_fn fn, void *data);

#endif /* SELFTEST_KVM_DIRTY_RING_H */
