// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test the interface of KVM's dirty ring, without a guest
 *
 * Show, one case each, that
 *  - the numbers are those that userspace was built with,
 *  - enabling the ring is refused, with the right error, in each way it can be
 *    misused, and a refusal leaves no trace,
 *  - so is enabling the bitmap for pages that no vCPU writes, which not every
 *    architecture has,
 *  - with a ring the ioctls of the dirty bitmap are refused, unless that bitmap
 *    is enabled.
 *
 * What may be mapped is in dirty_ring_mmap_test.
 */

#include <stddef.h>
#include <sys/mman.h>

#include "test_util.h"
#include "kvm_util.h"
#include "dirty_ring_vm.h"
#include "test_cases.h"

/* Not in the headers of every architecture and kernel that runs this. */
#define CAP_RING_TSO		192
#define CAP_RING_ACQ_REL	223
#define CAP_RING_WITH_BITMAP	225

#ifdef __x86_64__
#define IS_X86			true
#else
#define IS_X86			false
#endif

static const int ring_caps[] = {
#ifdef __x86_64__
	CAP_RING_TSO,
#endif
	CAP_RING_ACQ_REL,
};

/* Expect that there is no ring after a refusal, and that one can be enabled. */
static void expect_no_ring(int vm, uint32_t cap)
{
	EXPECT_ERROR(ioctl(vm, KVM_RESET_DIRTY_RINGS, 0), EINVAL);
	EXPECT(vm_fd_enable(vm, cap, RING_MAX_SIZE, 0), 0);
	EXPECT(ioctl(vm, KVM_RESET_DIRTY_RINGS, 0), 0);
	close(vm);
}

static void refuse_size(uint64_t size, int error)
{
	int i, vm;

	for (i = 0; i < ARRAY_SIZE(ring_caps); i++) {
		vm = vm_fd_create();
		errno = 0;
		TEST_ASSERT(vm_fd_enable(vm, ring_caps[i], size, 0) == -1 &&
			    errno == error,
			    "Capability %d, ring size %#lx: got %s, want %s",
			    ring_caps[i], size, strerror(errno),
			    strerror(error));
		expect_no_ring(vm, ring_caps[i]);
	}
}

static void numbers(void)
{
	EXPECT(KVM_CAP_DIRTY_LOG_RING, CAP_RING_TSO);
	EXPECT(KVM_CAP_DIRTY_LOG_RING_ACQ_REL, CAP_RING_ACQ_REL);
	EXPECT(KVM_RESET_DIRTY_RINGS, _IO(KVMIO, 0xc7));
	EXPECT(KVM_RESET_DIRTY_RINGS, 0xaec7);
	EXPECT(KVM_EXIT_DIRTY_RING_FULL, 31);
	EXPECT(KVM_DIRTY_LOG_PAGE_OFFSET, 64);
	EXPECT(KVM_DIRTY_GFN_F_DIRTY, 1);
	EXPECT(KVM_DIRTY_GFN_F_RESET, 2);
	EXPECT(KVM_DIRTY_GFN_F_MASK, 3);
	EXPECT(sizeof(struct kvm_dirty_gfn), 16);
	EXPECT(offsetof(struct kvm_dirty_gfn, flags), 0);
	EXPECT(offsetof(struct kvm_dirty_gfn, slot), 4);
	EXPECT(offsetof(struct kvm_dirty_gfn, offset), 8);
}

static void check_extension(void)
{
	int fds[] = { kvm_fd_get(), vm_fd_create() };
	int i;

	for (i = 0; i < ARRAY_SIZE(fds); i++) {
		EXPECT(ioctl(fds[i], KVM_CHECK_EXTENSION, CAP_RING_TSO),
		       IS_X86 ? RING_MAX_SIZE : 0);
		EXPECT(ioctl(fds[i], KVM_CHECK_EXTENSION, CAP_RING_ACQ_REL),
		       RING_MAX_SIZE);
		EXPECT(ioctl(fds[i], KVM_CHECK_EXTENSION,
			     CAP_RING_WITH_BITMAP), IS_X86 ? 0 : 1);
	}
}

static void vcpu_mmap_size(void)
{
	int kvm = kvm_fd_get(), vm = vm_fd_create();
	long size = VCPU_MMAP_PAGES * getpagesize();

	EXPECT(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), size);
	EXPECT(vm_fd_enable(vm, dirty_ring_cap(), RING_MAX_SIZE, 0), 0);
	EXPECT(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), size);
	TEST_ASSERT(ioctl(vm, KVM_CREATE_VCPU, 0) >= 0, "No vCPU");
	EXPECT(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), size);
}

static void enable_bad_size(void)
{
	uint64_t reserved = dirty_ring_reserved_entries() *
			    sizeof(struct kvm_dirty_gfn);
	uint64_t size;

	refuse_size(0, EINVAL);
	refuse_size(3 * getpagesize(), EINVAL);
	refuse_size(RING_MAX_SIZE - 16, EINVAL);
	/* Not a power of two: looked at first */
	refuse_size(RING_MAX_SIZE + 16, EINVAL);
	refuse_size(3 * RING_MAX_SIZE, EINVAL);
	refuse_size(UINT32_MAX, EINVAL);
	refuse_size(UINT64_MAX, EINVAL);
	/* Less than a page, or no more than what is reserved */
	for (size = 1; size < getpagesize() || size <= reserved; size *= 2)
		refuse_size(size, EINVAL);
}

static void enable_too_big(void)
{
	int shift;

	for (shift = 21; shift < 32; shift++)
		refuse_size(1UL << shift, E2BIG);
}

static void enable_too_big_for_32_bits(void)
{
	int shift;

	for (shift = 32; shift < 64; shift++)
		refuse_size(1UL << shift, E2BIG);
}

static void enable_cut_to_32_bits(void)
{
	refuse_size(0x100010000, EINVAL);
	refuse_size(0x8000000000010000, EINVAL);
	refuse_size(0x100100000, EINVAL);
}

static void enable_flags(void)
{
	static const uint32_t flags[] = { 1, 2, 1U << 31, UINT32_MAX };
	int i, j, vm;

	for (i = 0; i < ARRAY_SIZE(ring_caps); i++) {
		for (j = 0; j < ARRAY_SIZE(flags); j++) {
			vm = vm_fd_create();
			EXPECT_ERROR(vm_fd_enable(vm, ring_caps[i],
						  RING_MAX_SIZE, flags[j]),
				     EINVAL);
			expect_no_ring(vm, ring_caps[i]);
		}
	}
}

static void enable_twice(void)
{
	int i, j, vm;

	for (i = 0; i < ARRAY_SIZE(ring_caps); i++) {
		vm = vm_fd_create();
		EXPECT(vm_fd_enable(vm, ring_caps[i], RING_MAX_SIZE / 2, 0), 0);
		for (j = 0; j < ARRAY_SIZE(ring_caps); j++) {
			EXPECT_ERROR(vm_fd_enable(vm, ring_caps[j],
						  RING_MAX_SIZE / 2, 0),
				     EINVAL);
			EXPECT_ERROR(vm_fd_enable(vm, ring_caps[j],
						  RING_MAX_SIZE, 0),
				     EINVAL);
		}
		/* The first one holds. */
		EXPECT(ioctl(vm, KVM_RESET_DIRTY_RINGS, 0), 0);
		close(vm);
	}
}

static void enable_after_vcpu(void)
{
	int i, vm, vcpu;

	for (i = 0; i < ARRAY_SIZE(ring_caps); i++) {
		vm = vm_fd_create();
		vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
		TEST_ASSERT(vcpu >= 0, "No vCPU");
		EXPECT_ERROR(vm_fd_enable(vm, ring_caps[i], RING_MAX_SIZE, 0),
			     EINVAL);
		EXPECT_ERROR(vm_fd_enable(vcpu, ring_caps[i], RING_MAX_SIZE, 0),
			     EINVAL);
		EXPECT_ERROR(ioctl(vm, KVM_RESET_DIRTY_RINGS, 0), EINVAL);
		close(vcpu);
		close(vm);
	}
}

static void enable_unadvertised(void)
{
	int vm = vm_fd_create();

	if (!IS_X86) {
		EXPECT_ERROR(vm_fd_enable(vm, CAP_RING_TSO, RING_MAX_SIZE, 0),
			     EINVAL);
		expect_no_ring(vm, CAP_RING_ACQ_REL);
		return;
	}

	EXPECT_ERROR(vm_fd_enable(vm, CAP_RING_WITH_BITMAP, 0, 0), EINVAL);
	EXPECT(vm_fd_enable(vm, CAP_RING_TSO, RING_MAX_SIZE, 0), 0);
	EXPECT_ERROR(vm_fd_enable(vm, CAP_RING_WITH_BITMAP, 0, 0), EINVAL);
	EXPECT_ERROR(vm_fd_enable(vm, CAP_RING_WITH_BITMAP, 0, 1), EINVAL);
}

static void enable_all_sizes(void)
{
	uint64_t size = ring_vm_min_entries() * sizeof(struct kvm_dirty_gfn);
	int i, vm, vcpu;

	for (; size <= RING_MAX_SIZE; size *= 2) {
		for (i = 0; i < ARRAY_SIZE(ring_caps); i++) {
			vm = vm_fd_create();
			EXPECT(vm_fd_enable(vm, ring_caps[i], size, 0), 0);
			EXPECT(ioctl(vm, KVM_RESET_DIRTY_RINGS, 0), 0);
			vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
			TEST_ASSERT(vcpu >= 0, "No vCPU, ring size %#lx", size);
			EXPECT(ioctl(vm, KVM_RESET_DIRTY_RINGS, 0), 0);
			close(vcpu);
			close(vm);
		}
	}
}

static void reset_without_ring(void)
{
	int vm = vm_fd_create();

	EXPECT_ERROR(ioctl(vm, KVM_RESET_DIRTY_RINGS, 0), EINVAL);
	TEST_ASSERT(ioctl(vm, KVM_CREATE_VCPU, 0) >= 0, "No vCPU");
	EXPECT_ERROR(ioctl(vm, KVM_RESET_DIRTY_RINGS, 0), EINVAL);
}

/* Add memslot 0, logged, and memslot 1, not logged. */
static void add_slots(int vm)
{
	struct kvm_userspace_memory_region region = {
		.memory_size = 64 * getpagesize(),
	};
	int i;

	for (i = 0; i < 2; i++) {
		region.slot = i;
		region.flags = i ? 0 : KVM_MEM_LOG_DIRTY_PAGES;
		region.guest_phys_addr = (i + 1UL) << 30;
		region.userspace_addr = (uintptr_t)
			mmap(NULL, region.memory_size, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		EXPECT(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), 0);
	}
}

static int get_log(int vm, uint32_t slot, void *bitmap)
{
	struct kvm_dirty_log log = { .slot = slot, .dirty_bitmap = bitmap };

	return ioctl(vm, KVM_GET_DIRTY_LOG, &log);
}

static int clear_log(int vm, uint32_t slot, void *bitmap, uint64_t first,
		     uint32_t num)
{
	struct kvm_clear_dirty_log log = {
		.slot = slot,
		.first_page = first,
		.num_pages = num,
		.dirty_bitmap = bitmap,
	};

	return ioctl(vm, KVM_CLEAR_DIRTY_LOG, &log);
}

static void expect_no_bitmap(int vm)
{
	/* Logged, not logged, missing, beyond the last, bad address space */
	static const uint32_t slots[] = {
		0, 1, 7, 0x7fff, 0xffff, 0x10000, 0x20000, UINT32_MAX
	};
	uint64_t bitmap[8] = {};
	int i;

	for (i = 0; i < ARRAY_SIZE(slots); i++) {
		EXPECT_ERROR(get_log(vm, slots[i], bitmap), ENXIO);
		EXPECT_ERROR(get_log(vm, slots[i], NULL), ENXIO);
		EXPECT_ERROR(clear_log(vm, slots[i], bitmap, 0, 64), ENXIO);
		EXPECT_ERROR(clear_log(vm, slots[i], NULL, 0, 64), ENXIO);
		EXPECT_ERROR(clear_log(vm, slots[i], bitmap, 3, 5), ENXIO);
		EXPECT_ERROR(clear_log(vm, slots[i], bitmap, UINT64_MAX, 64),
			     ENXIO);
	}
}

static void bitmap_ioctls(void)
{
	uint64_t bitmap[8] = {};
	int vm = vm_fd_create();

	/* Without a ring the slot decides. */
	add_slots(vm);
	EXPECT(get_log(vm, 0, bitmap), 0);
	EXPECT_ERROR(get_log(vm, 1, bitmap), ENOENT);
	EXPECT_ERROR(get_log(vm, 7, bitmap), ENOENT);
	close(vm);

	vm = vm_fd_create();
	EXPECT(vm_fd_enable(vm, dirty_ring_cap(), RING_MAX_SIZE, 0), 0);
	expect_no_bitmap(vm);
	add_slots(vm);
	expect_no_bitmap(vm);
	TEST_ASSERT(ioctl(vm, KVM_CREATE_VCPU, 0) >= 0, "No vCPU");
	expect_no_bitmap(vm);
	close(vm);

	/* Memslots that are older than the ring lose their bitmaps. */
	vm = vm_fd_create();
	add_slots(vm);
	if (vm_fd_enable(vm, dirty_ring_cap(), RING_MAX_SIZE, 0) == 0)
		expect_no_bitmap(vm);
}

#ifndef __x86_64__
/* A ring, and beside it a bitmap for pages that no vCPU writes */

static void enable_with_bitmap(void)
{
	uint64_t bitmap[8] = {};
	int vm = vm_fd_create();

	/* Not without a ring */
	EXPECT_ERROR(vm_fd_enable(vm, CAP_RING_WITH_BITMAP, 0, 0), EINVAL);
	expect_no_ring(vm, CAP_RING_ACQ_REL);

	/* Not with flags; a refusal enables nothing. */
	vm = vm_fd_create();
	EXPECT(vm_fd_enable(vm, CAP_RING_ACQ_REL, RING_MAX_SIZE, 0), 0);
	EXPECT_ERROR(vm_fd_enable(vm, CAP_RING_WITH_BITMAP, 0, 1), EINVAL);
	EXPECT_ERROR(vm_fd_enable(vm, CAP_RING_WITH_BITMAP, 0, UINT32_MAX),
		     EINVAL);
	expect_no_bitmap(vm);
	EXPECT(vm_fd_enable(vm, CAP_RING_WITH_BITMAP, 0, 0), 0);
	add_slots(vm);
	EXPECT(get_log(vm, 0, bitmap), 0);
	close(vm);

	/* Not when there is a memslot, whether it is logged or not */
	vm = vm_fd_create();
	EXPECT(vm_fd_enable(vm, CAP_RING_ACQ_REL, RING_MAX_SIZE, 0), 0);
	add_slots(vm);
	EXPECT_ERROR(vm_fd_enable(vm, CAP_RING_WITH_BITMAP, 0, 0), EINVAL);
	expect_no_bitmap(vm);
	close(vm);
}

static void with_bitmap_ioctls(void)
{
	uint64_t bitmap[8];
	int vm = vm_fd_create();

	EXPECT(vm_fd_enable(vm, CAP_RING_ACQ_REL, RING_MAX_SIZE, 0), 0);
	EXPECT(vm_fd_enable(vm, CAP_RING_WITH_BITMAP, 0, 0), 0);

	/* As without a ring: logged, not logged, missing, impossible */
	EXPECT_ERROR(get_log(vm, 0, bitmap), ENOENT);
	add_slots(vm);
	memset(bitmap, 0xff, sizeof(bitmap));
	EXPECT(get_log(vm, 0, bitmap), 0);
	EXPECT(bitmap[0], 0);
	EXPECT_ERROR(get_log(vm, 1, bitmap), ENOENT);
	EXPECT_ERROR(get_log(vm, 7, bitmap), ENOENT);
	EXPECT_ERROR(get_log(vm, 0x10000, bitmap), EINVAL);
	EXPECT(clear_log(vm, 0, bitmap, 0, 64), 0);
	EXPECT_ERROR(clear_log(vm, 1, bitmap, 0, 64), ENOENT);
	EXPECT(ioctl(vm, KVM_RESET_DIRTY_RINGS, 0), 0);
	close(vm);
}
#endif

static void other_vm(void)
{
	int with = vm_fd_create(), without = vm_fd_create();
	uint64_t bitmap[8] = {};

	EXPECT(vm_fd_enable(with, dirty_ring_cap(), RING_MAX_SIZE, 0), 0);
	add_slots(with);
	add_slots(without);
	EXPECT(get_log(without, 0, bitmap), 0);
	EXPECT_ERROR(ioctl(without, KVM_RESET_DIRTY_RINGS, 0), EINVAL);
	expect_no_bitmap(with);
}

static const struct test_case cases[] = {
	{ "numbers", numbers },
	{ "check-extension: bytes of the largest ring", check_extension },
	{ "vcpu-mmap-size is not changed by the ring", vcpu_mmap_size },
	{ "bad-size: EINVAL", enable_bad_size },
	{ "too-big: E2BIG", enable_too_big },
	{ "too-big-64: E2BIG beyond 32 bits", enable_too_big_for_32_bits },
	{ "cut-size: refused if it fits only when cut to 32 bits",
	  enable_cut_to_32_bits },
	{ "cap-flags: EINVAL if not 0", enable_flags },
	{ "twice: EINVAL", enable_twice },
	{ "after-vcpu: EINVAL", enable_after_vcpu },
	{ "unadvertised: EINVAL", enable_unadvertised },
	{ "all-sizes: from the smallest to the largest", enable_all_sizes },
	{ "reset-without-ring: EINVAL", reset_without_ring },
	{ "bitmap-ioctls: ENXIO, whatever the slot", bitmap_ioctls },
	{ "other-vm: keeps its bitmap", other_vm },
#ifndef __x86_64__
	{ "with-bitmap: needs a ring, and no memslot", enable_with_bitmap },
	{ "with-bitmap-ioctls: as without a ring", with_bitmap_ioctls },
#endif
};

int main(int argc, char **argv)
{
	dirty_ring_check_supported();
	test_cases_main(argc, argv, cases, ARRAY_SIZE(cases));
}
