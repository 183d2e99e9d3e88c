// SPDX-License-Identifier: GPL-2.0-only
/*
 * The userspace half of KVM's dirty ring: map, harvest, reset.
 */

#include "test_util.h"
#include "kvm_util.h"
#include "kvm_util_internal.h"
#include "dirty_ring.h"
#include "processor.h"

#include <sys/mman.h>

/* Entries that KVM keeps free for pages that are dirtied during one KVM_RUN. */
#define RESERVED_ENTRIES	64

/* Entries of a hardware log (Intel PML), which come in one go. */
#define CPU_LOG_ENTRIES		512

/*
 * The capability to enable the ring with, 0 if KVM has no ring. Only x86, which
 * has total store order, advertises the first one.
 */
uint32_t dirty_ring_cap(void)
{
	if (kvm_check_cap(KVM_CAP_DIRTY_LOG_RING))
		return KVM_CAP_DIRTY_LOG_RING;
	if (kvm_check_cap(KVM_CAP_DIRTY_LOG_RING_ACQ_REL))
		return KVM_CAP_DIRTY_LOG_RING_ACQ_REL;
	return 0;
}

/* Bytes of the largest ring that KVM accepts, 0 if KVM has no ring. */
uint32_t dirty_ring_max_size(void)
{
	uint32_t cap = dirty_ring_cap();

	return cap ? kvm_check_cap(cap) : 0;
}

/* Skip the whole test if there is no KVM, or KVM has no ring. */
void dirty_ring_check_supported(void)
{
	/* Does not return without KVM. */
	if (!dirty_ring_max_size())
		ksft_exit_skip("KVM has no dirty ring\n");
}

/*
 * Does the CPU log dirty pages itself? Then a page is in the ring only after
 * the next exit of the vCPU that wrote it.
 */
bool dirty_ring_cpu_logs_pages(void)
{
	char val = 'N';
	FILE *f;

#ifdef __x86_64__
	/* A built-in kvm_intel has the parameter even if it is not in use. */
	if (!is_intel_cpu())
		return false;
#endif

	f = fopen("/sys/module/kvm_intel/parameters/pml", "r");
	if (f) {
		TEST_ASSERT(fread(&val, 1, 1, f) == 1,
			    "Unable to read the pml parameter");
		fclose(f);
	}

	return val == 'Y';
}

/* A vCPU stops for a full ring when only this many entries are left. */
uint32_t dirty_ring_reserved_entries(void)
{
	return RESERVED_ENTRIES +
	       (dirty_ring_cpu_logs_pages() ? CPU_LOG_ENTRIES : 0);
}

/*
 * VM Enable Dirty Ring
 *
 * Input Args:
 *   vm - Virtual Machine, without a vCPU as yet
 *   ring_size - Size of the ring of each vCPU, in bytes
 *
 * Makes KVM report the dirty pages of the VM in one ring for each vCPU
 * instead of in the bitmaps of its memslots.
 */
void vm_enable_dirty_ring(struct kvm_vm *vm, uint32_t ring_size)
{
	struct kvm_enable_cap cap = {
		.cap = dirty_ring_cap(),
		.args[0] = ring_size,
	};

	TEST_ASSERT(cap.cap, "KVM has no dirty ring");
	vm_enable_cap(vm, &cap);
	vm->dirty_ring_size = ring_size;
}

/* Number of entries in the ring of each vCPU. */
uint32_t vm_dirty_ring_entries(struct kvm_vm *vm)
{
	return vm->dirty_ring_size / sizeof(struct kvm_dirty_gfn);
}

/*
 * VM Reset Dirty Rings
 *
 * Return: the number of harvested entries that KVM reset. All their pages are
 * write-protected again, thus read the contents of the pages only after this.
 */
int vm_reset_dirty_rings(struct kvm_vm *vm)
{
	int ret = ioctl(vm->fd, KVM_RESET_DIRTY_RINGS, 0);

	TEST_ASSERT(ret >= 0, "KVM_RESET_DIRTY_RINGS failed, rc: %i errno: %i",
		    ret, errno);
	return ret;
}

/*
 * VCPU Dirty Ring
 *
 * Return: the ring of the vCPU, mapped at the first call.
 */
struct kvm_dirty_gfn *vcpu_dirty_ring(struct kvm_vm *vm, uint32_t vcpuid)
{
	struct vcpu *vcpu = vcpu_find(vm, vcpuid);
	void *ring;

	TEST_ASSERT(vcpu, "vcpu not found, vcpuid: %u", vcpuid);
	TEST_ASSERT(vm->dirty_ring_size, "The VM has no dirty rings");

	if (!vcpu->dirty_ring) {
		ring = mmap(NULL, vm->dirty_ring_size, PROT_READ | PROT_WRITE,
			    MAP_SHARED, vcpu->fd,
			    KVM_DIRTY_LOG_PAGE_OFFSET * getpagesize());
		TEST_ASSERT(ring != MAP_FAILED,
			    "mmap of the ring failed, vcpuid: %u errno: %i",
			    vcpuid, errno);
		vcpu->dirty_ring = ring;
		vcpu->dirty_ring_size = vm->dirty_ring_size;
	}

	return vcpu->dirty_ring;
}

/*
 * VCPU Harvest Dirty Ring
 *
 * Input Args:
 *   vm - Virtual Machine
 *   vcpuid - VCPU ID
 *   max - Harvest at most so many entries
 *   fn - Called for each entry; may be NULL
 *   data - Passed to fn
 *
 * Return: the number of entries harvested.
 *
 * Takes what is in the ring, in ring order. The vCPU may run meanwhile. Never
 * goes round the ring twice: what is dirty after that was harvested before
 * and waits for a reset.
 */
uint32_t vcpu_harvest_dirty_ring(struct kvm_vm *vm, uint32_t vcpuid,
				 uint32_t max, dirty_gfn_fn fn, void *data)
{
	struct kvm_dirty_gfn *ring = vcpu_dirty_ring(vm, vcpuid);
	struct vcpu *vcpu = vcpu_find(vm, vcpuid);
	uint32_t entries = vm_dirty_ring_entries(vm);
	struct kvm_dirty_gfn *gfn;
	uint32_t n;

	for (n = 0; n < max && n < entries; n++) {
		gfn = &ring[vcpu->dirty_ring_next % entries];
		if (!dirty_gfn_is_dirty(gfn))
			break;
		if (fn)
			fn(gfn->slot, gfn->offset, data);
		dirty_gfn_set_harvested(gfn);
		vcpu->dirty_ring_next++;
	}

	return n;
}
