// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test of the interface of KVM's dirty ring
 *
 * Shows, one case each, that
 *  - the numbers are those that userspace was built with,
 *  - enabling the ring is refused, with the right error, in all the ways it
 *    can be misused, and a refusal leaves no trace; and so is the bitmap for
 *    pages that no vCPU writes, which not every architecture has,
 *  - a ring can be mapped shared and not executable, and in no other way,
 *  - every page a vCPU writes to in a tracked memslot is reported, in order,
 *    once, and again after it was reset, and nothing else is,
 *  - a reset protects the pages it was told to and no others, stops at the
 *    first entry that was not harvested and returns what it reset, and its TLB
 *    flush is done when it returns,
 *  - a vCPU stops, exactly, at the soft limit of its ring, and only that vCPU,
 *  - flags, slots and offsets that userspace forges do no harm: a reset skips
 *    the entry and goes nowhere beyond what KVM pushed.
 */

#define _GNU_SOURCE /* for program_invocation_name, mremap and CPU affinity */

#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>

#include "test_util.h"
#include "kvm_util.h"
#include "dirty_ring_vm.h"
#include "processor.h"
#include "test_cases.h"

/* Not in the headers of every architecture and kernel that runs this. */
#define CAP_RING_TSO		192
#define CAP_RING_ACQ_REL	223
#define CAP_RING_WITH_BITMAP	225

#define MAX_RING_SIZE		0x100000UL

/* First page of the ring in the mapping of a vCPU. */
#define RING_PAGE		64

#ifdef __x86_64__
#define IS_X86			true
#define VCPU_MMAP_PAGES		3
#else
#define IS_X86			false
#define VCPU_MMAP_PAGES		2
#endif

#define EXPECT_ERROR(expr, want) do {					\
	long __want = (want), __ret;					\
									\
	errno = 0;							\
	__ret = (long)(expr);						\
	TEST_ASSERT(__ret == -1 && errno == __want,			\
		    "%s: got %ld (%s), want -1 (%s)",			\
		    #expr, __ret, strerror(errno), strerror(__want));	\
} while (0)

/*
 * Without the library: what is to be refused
 */

static const int ring_caps[] = {
#ifdef __x86_64__
	CAP_RING_TSO,
#endif
	CAP_RING_ACQ_REL,
};

static int kvm_open(void)
{
	int fd = open("/dev/kvm", O_RDWR);

	TEST_ASSERT(fd >= 0, "/dev/kvm: %s", strerror(errno));
	return fd;
}

static int vm_fd_create(void)
{
	int kvm = kvm_open();
	int fd = ioctl(kvm, KVM_CREATE_VM, 0);

	TEST_ASSERT(fd >= 0, "KVM_CREATE_VM: %s", strerror(errno));
	close(kvm);
	return fd;
}

static int enable(int vm, uint32_t cap, uint64_t size, uint32_t flags)
{
	struct kvm_enable_cap args = {
		.cap = cap,
		.flags = flags,
		.args[0] = size,
	};

	return ioctl(vm, KVM_ENABLE_CAP, &args);
}

/* After a refusal: there is no ring, and one can still be enabled. */
static void expect_no_ring(int vm, uint32_t cap)
{
	EXPECT_ERROR(ioctl(vm, KVM_RESET_DIRTY_RINGS, 0), EINVAL);
	EXPECT(enable(vm, cap, MAX_RING_SIZE, 0), 0);
	EXPECT(ioctl(vm, KVM_RESET_DIRTY_RINGS, 0), 0);
	close(vm);
}

static void refuse_size(uint64_t size, int error)
{
	int i, vm;

	for (i = 0; i < ARRAY_SIZE(ring_caps); i++) {
		vm = vm_fd_create();
		errno = 0;
		TEST_ASSERT(enable(vm, ring_caps[i], size, 0) == -1 &&
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
	EXPECT(KVM_DIRTY_LOG_PAGE_OFFSET, RING_PAGE);
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
	int fds[] = { kvm_open(), vm_fd_create() };
	int i;

	for (i = 0; i < ARRAY_SIZE(fds); i++) {
		EXPECT(ioctl(fds[i], KVM_CHECK_EXTENSION, CAP_RING_TSO),
		       IS_X86 ? MAX_RING_SIZE : 0);
		EXPECT(ioctl(fds[i], KVM_CHECK_EXTENSION, CAP_RING_ACQ_REL),
		       MAX_RING_SIZE);
		EXPECT(ioctl(fds[i], KVM_CHECK_EXTENSION,
			     CAP_RING_WITH_BITMAP), IS_X86 ? 0 : 1);
	}
}

static void vcpu_mmap_size(void)
{
	int kvm = kvm_open(), vm = vm_fd_create();
	long size = VCPU_MMAP_PAGES * getpagesize();

	EXPECT(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), size);
	EXPECT(enable(vm, dirty_ring_cap(), MAX_RING_SIZE, 0), 0);
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
	refuse_size(MAX_RING_SIZE - 16, EINVAL);
	/* That it is no power of two is looked at first. */
	refuse_size(MAX_RING_SIZE + 16, EINVAL);
	refuse_size(3 * MAX_RING_SIZE, EINVAL);
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
			EXPECT_ERROR(enable(vm, ring_caps[i], MAX_RING_SIZE,
					    flags[j]), EINVAL);
			expect_no_ring(vm, ring_caps[i]);
		}
	}
}

static void enable_twice(void)
{
	int i, j, vm;

	for (i = 0; i < ARRAY_SIZE(ring_caps); i++) {
		vm = vm_fd_create();
		EXPECT(enable(vm, ring_caps[i], MAX_RING_SIZE / 2, 0), 0);
		for (j = 0; j < ARRAY_SIZE(ring_caps); j++) {
			EXPECT_ERROR(enable(vm, ring_caps[j],
					    MAX_RING_SIZE / 2, 0), EINVAL);
			EXPECT_ERROR(enable(vm, ring_caps[j],
					    MAX_RING_SIZE, 0), EINVAL);
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
		EXPECT_ERROR(enable(vm, ring_caps[i], MAX_RING_SIZE, 0),
			     EINVAL);
		EXPECT_ERROR(enable(vcpu, ring_caps[i], MAX_RING_SIZE, 0),
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
		EXPECT_ERROR(enable(vm, CAP_RING_TSO, MAX_RING_SIZE, 0),
			     EINVAL);
		expect_no_ring(vm, CAP_RING_ACQ_REL);
		return;
	}

	EXPECT_ERROR(enable(vm, CAP_RING_WITH_BITMAP, 0, 0), EINVAL);
	EXPECT(enable(vm, CAP_RING_TSO, MAX_RING_SIZE, 0), 0);
	EXPECT_ERROR(enable(vm, CAP_RING_WITH_BITMAP, 0, 0), EINVAL);
	EXPECT_ERROR(enable(vm, CAP_RING_WITH_BITMAP, 0, 1), EINVAL);
}

static void enable_all_sizes(void)
{
	uint64_t size = ring_vm_min_entries() * sizeof(struct kvm_dirty_gfn);
	int i, vm, vcpu;

	for (; size <= MAX_RING_SIZE; size *= 2) {
		for (i = 0; i < ARRAY_SIZE(ring_caps); i++) {
			vm = vm_fd_create();
			EXPECT(enable(vm, ring_caps[i], size, 0), 0);
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

/* One memslot with logging, 0, and one without, 1. */
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
	/* There, not logged, not there, too many, bad address space */
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

	/* Without a ring they look at the slot. */
	add_slots(vm);
	EXPECT(get_log(vm, 0, bitmap), 0);
	EXPECT_ERROR(get_log(vm, 1, bitmap), ENOENT);
	EXPECT_ERROR(get_log(vm, 7, bitmap), ENOENT);
	close(vm);

	vm = vm_fd_create();
	EXPECT(enable(vm, dirty_ring_cap(), MAX_RING_SIZE, 0), 0);
	expect_no_bitmap(vm);
	add_slots(vm);
	expect_no_bitmap(vm);
	TEST_ASSERT(ioctl(vm, KVM_CREATE_VCPU, 0) >= 0, "No vCPU");
	expect_no_bitmap(vm);
	close(vm);

	/* Memslots that were there before the ring lose their bitmaps. */
	vm = vm_fd_create();
	add_slots(vm);
	if (enable(vm, dirty_ring_cap(), MAX_RING_SIZE, 0) == 0)
		expect_no_bitmap(vm);
}

#ifndef __x86_64__
/* A ring, and beside it a bitmap for pages that no vCPU writes */

static void enable_with_bitmap(void)
{
	uint64_t bitmap[8] = {};
	int vm = vm_fd_create();

	/* Not without a ring */
	EXPECT_ERROR(enable(vm, CAP_RING_WITH_BITMAP, 0, 0), EINVAL);
	expect_no_ring(vm, CAP_RING_ACQ_REL);

	/* Not with flags, and what is refused is not there. */
	vm = vm_fd_create();
	EXPECT(enable(vm, CAP_RING_ACQ_REL, MAX_RING_SIZE, 0), 0);
	EXPECT_ERROR(enable(vm, CAP_RING_WITH_BITMAP, 0, 1), EINVAL);
	EXPECT_ERROR(enable(vm, CAP_RING_WITH_BITMAP, 0, UINT32_MAX), EINVAL);
	expect_no_bitmap(vm);
	EXPECT(enable(vm, CAP_RING_WITH_BITMAP, 0, 0), 0);
	add_slots(vm);
	EXPECT(get_log(vm, 0, bitmap), 0);
	close(vm);

	/* Not when there is a memslot, whether it is logged or not */
	vm = vm_fd_create();
	EXPECT(enable(vm, CAP_RING_ACQ_REL, MAX_RING_SIZE, 0), 0);
	add_slots(vm);
	EXPECT_ERROR(enable(vm, CAP_RING_WITH_BITMAP, 0, 0), EINVAL);
	expect_no_bitmap(vm);
	close(vm);
}

static void with_bitmap_ioctls(void)
{
	uint64_t bitmap[8];
	int vm = vm_fd_create();

	EXPECT(enable(vm, CAP_RING_ACQ_REL, MAX_RING_SIZE, 0), 0);
	EXPECT(enable(vm, CAP_RING_WITH_BITMAP, 0, 0), 0);

	/* As without a ring: logged, not logged, not there, impossible */
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

	EXPECT(enable(with, dirty_ring_cap(), MAX_RING_SIZE, 0), 0);
	add_slots(with);
	add_slots(without);
	EXPECT(get_log(without, 0, bitmap), 0);
	EXPECT_ERROR(ioctl(without, KVM_RESET_DIRTY_RINGS, 0), EINVAL);
	expect_no_bitmap(with);
}

/*
 * Mappings of the ring
 */

#define RING_PAGES	16

static sigjmp_buf touch_env;

static void touch_failed(int sig)
{
	siglongjmp(touch_env, sig);
}

/* Read a byte, return the signal that this got or 0. */
static int touch(void *p)
{
	struct sigaction sa = { .sa_handler = touch_failed };
	int sig;

	sigaction(SIGBUS, &sa, NULL);
	sigaction(SIGSEGV, &sa, NULL);
	sig = sigsetjmp(touch_env, 1);
	if (!sig)
		READ_ONCE(*(uint8_t *)p);

	return sig;
}

static int vcpu_with_ring(uint32_t ring_pages)
{
	int vm = vm_fd_create(), vcpu;

	if (ring_pages)
		EXPECT(enable(vm, dirty_ring_cap(),
			      ring_pages * getpagesize(), 0), 0);
	vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	TEST_ASSERT(vcpu >= 0, "KVM_CREATE_VCPU: %s", strerror(errno));
	close(vm);
	return vcpu;
}

static uint8_t *map(int vcpu, int first, int pages, int prot, int flags)
{
	return mmap(NULL, pages * getpagesize(), prot, flags, vcpu,
		    (off_t)first * getpagesize());
}

/* Parts of a vCPU's mapping with at least one page of the ring */
static const struct {
	int first;
	int pages;
} with_ring[] = {
	{ RING_PAGE, RING_PAGES },		/* all */
	{ RING_PAGE, 1 },
	{ RING_PAGE + 5, 3 },
	{ RING_PAGE + RING_PAGES - 1, 1 },
	{ RING_PAGE + RING_PAGES - 1, 2 },	/* and past it */
	{ RING_PAGE, 100 },
	{ RING_PAGE - 1, 2 },			/* begins before it */
	{ RING_PAGE - 1, RING_PAGES + 2 },
	{ 0, RING_PAGE + 1 },
	{ 0, RING_PAGE + RING_PAGES },
	{ 0, 200 },
	{ 1, 64 },
}, without_ring[] = {
	{ 0, 1 },
	{ 0, RING_PAGE },
	{ RING_PAGE - 1, 1 },
	{ RING_PAGE + RING_PAGES, 1 },
	{ RING_PAGE + RING_PAGES, 1000 },
};

static void map_shared(void)
{
	size_t i, size = RING_PAGES * getpagesize();
	int vcpu = vcpu_with_ring(RING_PAGES);
	uint8_t *whole, *part, *p;

	whole = map(vcpu, 0, RING_PAGE + RING_PAGES, PROT_READ | PROT_WRITE,
		    MAP_SHARED);
	TEST_ASSERT(whole != MAP_FAILED, "mmap: %s", strerror(errno));
	p = whole + RING_PAGE * getpagesize();
	for (i = 0; i < size; i++)
		TEST_ASSERT(!p[i], "A new ring is not empty");

	for (i = 0; i < ARRAY_SIZE(with_ring); i++) {
		part = map(vcpu, with_ring[i].first, with_ring[i].pages,
			   PROT_READ | PROT_WRITE, MAP_SHARED);
		TEST_ASSERT(part != MAP_FAILED, "mmap: %s", strerror(errno));
		part = map(vcpu, with_ring[i].first, with_ring[i].pages,
			   PROT_READ, MAP_SHARED);
		TEST_ASSERT(part != MAP_FAILED, "mmap: %s", strerror(errno));
	}

	/* It is the same memory at all addresses. */
	part = map(vcpu, RING_PAGE + 5, 1, PROT_READ, MAP_SHARED);
	WRITE_ONCE(p[5 * getpagesize() + 3], 0x5a);
	EXPECT(READ_ONCE(part[3]), 0x5a);
}

static void map_executable(void)
{
	static const int prots[] = {
		PROT_EXEC, PROT_READ | PROT_EXEC,
		PROT_READ | PROT_WRITE | PROT_EXEC,
	};
	int vcpu = vcpu_with_ring(RING_PAGES);
	int i, j;

	for (i = 0; i < ARRAY_SIZE(with_ring); i++)
		for (j = 0; j < ARRAY_SIZE(prots); j++)
			EXPECT_ERROR(map(vcpu, with_ring[i].first,
					 with_ring[i].pages, prots[j],
					 MAP_SHARED), EINVAL);
}

static void map_private(void)
{
	static const int prots[] = {
		PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE,
	};
	int vcpu = vcpu_with_ring(RING_PAGES);
	int i, j;

	for (i = 0; i < ARRAY_SIZE(with_ring); i++)
		for (j = 0; j < ARRAY_SIZE(prots); j++)
			EXPECT_ERROR(map(vcpu, with_ring[i].first,
					 with_ring[i].pages, prots[j],
					 MAP_PRIVATE), EINVAL);

	for (i = 0; i < ARRAY_SIZE(without_ring); i++)
		for (j = 0; j < ARRAY_SIZE(prots); j++)
			TEST_ASSERT(map(vcpu, without_ring[i].first,
					without_ring[i].pages, prots[j],
					MAP_PRIVATE) != MAP_FAILED,
				    "mmap without the ring: %s",
				    strerror(errno));
}

static void map_mprotect(void)
{
	int vcpu = vcpu_with_ring(RING_PAGES);
	int i, page = getpagesize(), end;
	uint8_t *p;

	for (i = 0; i < ARRAY_SIZE(with_ring); i++) {
		end = with_ring[i].pages - 1;
		p = map(vcpu, with_ring[i].first, with_ring[i].pages,
			PROT_READ | PROT_WRITE, MAP_SHARED);
		TEST_ASSERT(p != MAP_FAILED, "mmap: %s", strerror(errno));
		EXPECT_ERROR(mprotect(p, (end + 1) * page,
				      PROT_READ | PROT_EXEC), EACCES);
		EXPECT_ERROR(mprotect(p + end * page, page,
				      PROT_READ | PROT_WRITE | PROT_EXEC),
			     EACCES);
		EXPECT_ERROR(mprotect(p, page, PROT_EXEC), EACCES);
		EXPECT(mprotect(p, (end + 1) * page, PROT_READ), 0);
		EXPECT(mprotect(p, (end + 1) * page, PROT_READ | PROT_WRITE),
		       0);
	}
}

/*
 * A mapping that ends right before the ring may be private or executable. If
 * it can be made to grow over the ring, the ring must not be accessible.
 */
static void map_mremap(void)
{
	int vcpu = vcpu_with_ring(RING_PAGES);
	int page = getpagesize();
	uint8_t *p;

	p = map(vcpu, RING_PAGE - 1, 1, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	TEST_ASSERT(p != MAP_FAILED, "mmap: %s", strerror(errno));
	p = mremap(p, page, 2 * page, MREMAP_MAYMOVE);
	TEST_ASSERT(p == MAP_FAILED || touch(p + page),
		    "A private mapping grew over the ring");

	p = map(vcpu, RING_PAGE - 1, 1, PROT_READ, MAP_SHARED);
	TEST_ASSERT(p != MAP_FAILED, "mmap: %s", strerror(errno));
	p = mremap(p, page, 2 * page, MREMAP_MAYMOVE);
	TEST_ASSERT(p == MAP_FAILED ||
		    mprotect(p, 2 * page, PROT_READ | PROT_EXEC) ||
		    touch(p + page),
		    "An executable mapping grew over the ring");
}

static void map_past_ring(void)
{
	int vcpu = vcpu_with_ring(RING_PAGES);
	int i, page = getpagesize();
	uint8_t *p;

	p = map(vcpu, 0, 200, PROT_READ | PROT_WRITE, MAP_SHARED);
	TEST_ASSERT(p != MAP_FAILED, "mmap: %s", strerror(errno));
	for (i = 0; i < 200; i++) {
		if (i < VCPU_MMAP_PAGES ||
		    (i >= RING_PAGE && i < RING_PAGE + RING_PAGES))
			EXPECT(touch(p + i * page), 0);
		else
			EXPECT(touch(p + i * page), SIGBUS);
	}

	/* Far past it, beyond 32 bits */
	p = mmap(NULL, page, PROT_READ, MAP_SHARED, vcpu,
		 (1UL << 32) * page + RING_PAGE * page);
	TEST_ASSERT(p != MAP_FAILED, "mmap: %s", strerror(errno));
	EXPECT(touch(p), SIGBUS);
}

static void map_without_ring(void)
{
	int vcpu = vcpu_with_ring(0);
	int i, page = getpagesize();
	uint8_t *p;

	for (i = 0; i < ARRAY_SIZE(with_ring); i++) {
		p = map(vcpu, with_ring[i].first, with_ring[i].pages,
			PROT_READ, MAP_PRIVATE);
		TEST_ASSERT(p != MAP_FAILED, "mmap: %s", strerror(errno));
	}

	p = map(vcpu, RING_PAGE, RING_PAGES, PROT_READ, MAP_SHARED);
	TEST_ASSERT(p != MAP_FAILED, "mmap: %s", strerror(errno));
	for (i = 0; i < RING_PAGES; i++)
		EXPECT(touch(p + i * page), SIGBUS);
}

static void map_outlives_vcpu(void)
{
	int vcpu = vcpu_with_ring(RING_PAGES);
	int i, page = getpagesize();
	uint8_t *p;

	p = map(vcpu, RING_PAGE, RING_PAGES, PROT_READ | PROT_WRITE,
		MAP_SHARED);
	TEST_ASSERT(p != MAP_FAILED, "mmap: %s", strerror(errno));
	close(vcpu);
	for (i = 0; i < RING_PAGES; i++)
		EXPECT(touch(p + i * page), 0);
	EXPECT(munmap(p + 3 * page, 5 * page), 0);
	EXPECT(touch(p + 2 * page), 0);
	EXPECT(munmap(p, RING_PAGES * page), 0);
}

/*
 * The memory of a ring
 */

static char cgroup[256];

static long cgroup_file(const char *name, const char *value)
{
	char path[sizeof(cgroup) + 64], buf[32] = "";
	ssize_t ret;
	int fd;

	snprintf(path, sizeof(path), "%s/%s", cgroup, name);
	fd = open(path, value ? O_WRONLY : O_RDONLY);
	if (fd < 0)
		return -1;
	ret = value ? write(fd, value, strlen(value)) :
		      read(fd, buf, sizeof(buf) - 1);
	close(fd);
	return ret < 0 ? -1 : value ? 0 : atol(buf);
}

/* Run @fn in a memory cgroup of its own, of version 1. */
static void in_cgroup(void (*fn)(void))
{
	char dir[] = "/tmp/kvm-cgroup-XXXXXX", type[64], opts[256];
	bool mounted = false;
	FILE *mounts;
	int status;
	pid_t pid;

	mounts = fopen("/proc/mounts", "r");
	while (mounts && fscanf(mounts, "%*s %200s %63s %255s %*d %*d",
				cgroup, type, opts) == 3) {
		mounted = !strcmp(type, "cgroup") && strstr(opts, "memory");
		if (mounted)
			break;
	}
	if (!mounted) {
		if (!mkdtemp(dir) ||
		    mount("cgroup", dir, "cgroup", 0, "memory"))
			test_case_skip("no memory cgroup, version 1: %s",
				       strerror(errno));
		strcpy(cgroup, dir);
	}

	sprintf(cgroup + strlen(cgroup), "/kvm-dirty-ring-%d", getpid());
	if (mkdir(cgroup, 0700))
		test_case_skip("%s: %s", cgroup, strerror(errno));

	pid = fork();
	if (!pid) {
		if (cgroup_file("cgroup.procs", "0"))
			test_case_skip("cgroup.procs: %s", strerror(errno));
		fn();
		exit(0);
	}
	waitpid(pid, &status, 0);

	rmdir(cgroup);
	if (!mounted) {
		umount(dir);
		rmdir(dir);
	}
	exit(WIFEXITED(status) ? WEXITSTATUS(status) : 1);
}

/* Bytes of memory that @nr vCPUs cost. */
static long vcpus_cost(uint32_t ring_size, int nr)
{
	long before, after;
	int i, vm;

	vm = vm_fd_create();
	if (ring_size)
		EXPECT(enable(vm, dirty_ring_cap(), ring_size, 0), 0);
	before = cgroup_file("memory.usage_in_bytes", NULL);
	if (before < 0)
		test_case_skip("memory is not accounted");
	for (i = 0; i < nr; i++)
		TEST_ASSERT(ioctl(vm, KVM_CREATE_VCPU, i) >= 0, "No vCPU");
	after = cgroup_file("memory.usage_in_bytes", NULL);
	close(vm);
	return after - before;
}

static void charge(void)
{
	long with, without, least;

	without = vcpus_cost(0, 8);
	with = vcpus_cost(MAX_RING_SIZE, 8);
	/* CPUs charge 32 pages ahead, and keep what they did not need. */
	least = getpagesize() > 4096 ? 4 : 7;
	TEST_ASSERT(with - without > least * MAX_RING_SIZE,
		    "8 vCPUs cost %ld bytes with, %ld without rings of 1 MiB",
		    with, without);
}

static void memory_is_charged(void)
{
	in_cgroup(charge);
}

/* Of processes in the cgroup; nobody should have to die for a ring. */
static long oom_kills(void)
{
	char path[sizeof(cgroup) + 64], line[64];
	long kills = 0;
	FILE *file;

	snprintf(path, sizeof(path), "%s/memory.oom_control", cgroup);
	file = fopen(path, "r");
	while (file && fgets(line, sizeof(line), file))
		sscanf(line, "oom_kill %ld", &kills);
	if (file)
		fclose(file);
	return kills;
}

static void exhaust(void)
{
	long usage, before;
	int vm, i, fd, tries;
	char limit[32];

	/* The inode of a ring, say, may be what finds no room then. */
	if (getpagesize() > 4096)
		test_case_skip("CPUs charge %d KiB ahead, as much as two rings",
			       32 * getpagesize() / 1024);

	/* Whatever is allocated once */
	vcpus_cost(MAX_RING_SIZE, 1);

	before = cgroup_file("memory.usage_in_bytes", NULL);
	vm = vm_fd_create();
	EXPECT(enable(vm, dirty_ring_cap(), MAX_RING_SIZE, 0), 0);
	usage = cgroup_file("memory.usage_in_bytes", NULL);
	sprintf(limit, "%ld", usage + 3 * (long)MAX_RING_SIZE);
	if (cgroup_file("memory.limit_in_bytes", limit))
		test_case_skip("no limit for memory: %s",
			       strerror(errno));

	for (i = 0; i < 8; i++) {
		errno = 0;
		fd = ioctl(vm, KVM_CREATE_VCPU, i);
		if (fd < 0)
			break;
	}
	TEST_ASSERT(i && i < 4 && errno == ENOMEM,
		    "%d rings of 1 MiB fit into 3 MiB, then %s", i,
		    strerror(errno));
	/* Again and again: if it leaks, the last one will not fit either */
	for (tries = 0; tries < 20; tries++)
		EXPECT_ERROR(ioctl(vm, KVM_CREATE_VCPU, i), ENOMEM);

	EXPECT(oom_kills(), 0);

	/* The VM goes on, and the id is still free. */
	sprintf(limit, "%ld", usage + 8 * (long)MAX_RING_SIZE);
	EXPECT(cgroup_file("memory.limit_in_bytes", limit), 0);
	fd = ioctl(vm, KVM_CREATE_VCPU, i);
	TEST_ASSERT(fd >= 0, "KVM_CREATE_VCPU: %s", strerror(errno));
	EXPECT(touch(map(fd, RING_PAGE, 1, PROT_READ, MAP_SHARED)), 0);
	EXPECT(ioctl(vm, KVM_RESET_DIRTY_RINGS, 0), 0);

	/* The VM lives as long as a mapping or a file of a vCPU does. */
	for (i = 3; i < 256; i++)
		close(i);
	for (tries = 0; tries < 50; tries++) {
		usage = cgroup_file("memory.usage_in_bytes", NULL);
		if (usage < before + 8 * (long)MAX_RING_SIZE)
			break;
		usleep(100000);
	}
	TEST_ASSERT(tries < 50, "%ld bytes are left of 20 rings that failed",
		    usage - before);
}

static void memory_runs_out(void)
{
	in_cgroup(exhaust);
}

/* Rings, what is kept aside, and what was not wanted: all of it is freed. */
static void come_and_go(void)
{
	long before = 0, usage = 0;
	int i, vm, vcpu, tries;

	for (i = 0; i < 101; i++) {
		vm = vm_fd_create();
		EXPECT(enable(vm, dirty_ring_cap(), MAX_RING_SIZE, 0), 0);
		for (tries = 0; tries < 10; tries++)
			EXPECT_ERROR(enable(vm, dirty_ring_cap(),
					    MAX_RING_SIZE, 0), EINVAL);
		vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
		TEST_ASSERT(vcpu >= 0, "No vCPU");
		close(vcpu);
		close(vm);
		if (!i)
			before = cgroup_file("memory.usage_in_bytes", NULL);
	}
	if (before < 0)
		test_case_skip("memory is not accounted");

	/* Each of the three would be more than this. */
	for (tries = 0; tries < 50; tries++) {
		usage = cgroup_file("memory.usage_in_bytes", NULL);
		if (usage < before + 4 * (long)MAX_RING_SIZE)
			break;
		usleep(100000);
	}
	TEST_ASSERT(tries < 50, "%ld bytes are left of 100 VMs",
		    usage - before);
}

static void memory_is_freed(void)
{
	in_cgroup(come_and_go);
}

/*
 * With a guest: what gets into the ring
 */

#define SLOT_PAGES	4096

static struct ring_vm *small_vm(void)
{
	return ring_vm_create(ring_vm_min_entries(), 1, SLOT_PAGES,
			      KVM_MEM_LOG_DIRTY_PAGES, NULL);
}

static void expect_flags(struct ring_vm *rv, uint32_t vcpu, uint32_t first,
			 uint32_t count, uint32_t flags)
{
	struct kvm_dirty_gfn *ring = vcpu_dirty_ring(rv->vm, vcpu);
	uint32_t i;

	for (i = first; i < first + count; i++)
		TEST_ASSERT(READ_ONCE(ring[i % rv->entries].flags) == flags,
			    "Entry %u: flags are %#x, want %#x", i,
			    ring[i % rv->entries].flags, flags);
}

static void entries(void)
{
	struct ring_vm *rv = small_vm();
	struct kvm_dirty_gfn *ring = vcpu_dirty_ring(rv->vm, 0);
	uint32_t i;

	expect_flags(rv, 0, 0, rv->entries, 0);

	ring_vm_set_task(rv, 0, 3, 10, 7);
	EXPECT(ring_vm_run(rv, 0), RING_VM_DONE);
	for (i = 0; i < 10; i++) {
		EXPECT(ring[i].slot, RING_VM_SLOT);
		EXPECT(ring[i].offset, 3 + i * 7);
	}
	expect_flags(rv, 0, 0, 10, KVM_DIRTY_GFN_F_DIRTY);
	expect_flags(rv, 0, 10, rv->entries - 10, 0);

	/* Not harvested, thus not reset */
	EXPECT(vm_reset_dirty_rings(rv->vm), 0);
	expect_flags(rv, 0, 0, 10, KVM_DIRTY_GFN_F_DIRTY);

	EXPECT(ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL), 10);
	expect_flags(rv, 0, 0, 10, KVM_DIRTY_GFN_F_RESET);
	EXPECT(vm_reset_dirty_rings(rv->vm), 10);
	expect_flags(rv, 0, 0, rv->entries, 0);
	EXPECT(vm_reset_dirty_rings(rv->vm), 0);

	/* Backwards: ring order is the order of the writes. */
	ring_vm_set_task(rv, 0, 20, 20, -1);
	EXPECT(ring_vm_run(rv, 0), RING_VM_DONE);
	for (i = 0; i < 20; i++)
		EXPECT(ring[10 + i].offset, 20 - i);

	ring_vm_free(rv);
}

static void protected_again(void)
{
	struct ring_vm *rv = small_vm();
	int i;

	ring_vm_write(rv, 0, 100, 30);
	/* Reported and not harvested: not reported twice */
	ring_vm_write(rv, 0, 100, 30);
	EXPECT(ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL), 30);
	/* Harvested and not reset: not reported twice */
	ring_vm_write(rv, 0, 100, 30);
	EXPECT(ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL), 0);
	EXPECT(vm_reset_dirty_rings(rv->vm), 30);
	ring_vm_expect(rv, 100, 30);

	/* Reset: reported again, if written to */
	EXPECT(ring_vm_collect(rv), 0);
	for (i = 0; i < 5; i++) {
		ring_vm_write(rv, 0, 105, 20);
		EXPECT(ring_vm_collect(rv), 20);
		ring_vm_expect(rv, 105, 20);
	}

	/* The rest is protected too, although none of it was rewritten. */
	ring_vm_write(rv, 0, 100, 30);
	EXPECT(ring_vm_collect(rv), 30);
	ring_vm_expect(rv, 100, 30);

	ring_vm_free(rv);
}

static void scattered_pages(void)
{
	static const uint64_t strides[] = { 1, 2, 31, 63, 64, 65, 511, -1, -3 };
	uint32_t i, j, count = 64;
	struct ring_vm *rv;
	uint64_t page;

	/* All distances at which a reset may or may not join pages */
	rv = ring_vm_create(ring_vm_min_entries(), 1, 64 * 512,
			    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	for (i = 0; i < ARRAY_SIZE(strides); i++) {
		page = (int64_t)strides[i] < 0 ? 1000 : 3;
		ring_vm_set_task(rv, 0, page, count, strides[i]);
		for (j = 0; j < 2; j++) {
			EXPECT(ring_vm_run(rv, 0), RING_VM_DONE);
			EXPECT(ring_vm_collect(rv), count);
		}
		for (j = 0; j < count; j++, page += strides[i]) {
			EXPECT(rv->seen[page], 2);
			EXPECT(rv->order[j], page);
			EXPECT(rv->order[count + j], page);
		}
		ring_vm_forget(rv);
	}

	/* The last page of the slot, and the first */
	ring_vm_set_task(rv, 0, 64 * 512 - 1, 2, -(64 * 512 - 1));
	for (i = 0; i < 2; i++) {
		EXPECT(ring_vm_run(rv, 0), RING_VM_DONE);
		EXPECT(ring_vm_collect(rv), 2);
	}
	EXPECT(rv->seen[0], 2);
	EXPECT(rv->seen[64 * 512 - 1], 2);

	ring_vm_free(rv);
}

static void find_slot(uint32_t slot, uint64_t offset, void *data)
{
	uint64_t *found = data;

	found[0] = slot;
	found[1] = offset;
}

/*
 * A reset protects the pages it was told to, and none of those in between: they
 * are dirty still, and who writes to them again has nothing to report.
 */
static void exact_reset(void)
{
	/* Which pages vCPU 0 writes to, and vCPU 1 */
	static const struct {
		uint64_t stride;
		uint64_t others;
	} patterns[] = {
		{ 4, 2 },	/* Every second page, one half each */
		{ 2, 1 },
		{ 3, 1 },
		{ 31, 1 },
		{ 63, 1 },
		{ 65, 1 },
		{ 511, 1 },
	};
	const uint64_t pages = 512;
	struct ring_vm *rv = ring_vm_create(4096, 2, pages,
					    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	uint32_t count, others;
	uint64_t i, page;

	for (i = 0; i < ARRAY_SIZE(patterns); i++) {
		count = DIV_ROUND_UP(pages, patterns[i].stride);
		others = DIV_ROUND_UP(pages, patterns[i].others);

		/* vCPU 1 has no fault where vCPU 0 has been. */
		ring_vm_set_task(rv, 0, 0, count, patterns[i].stride);
		EXPECT(ring_vm_run(rv, 0), RING_VM_DONE);
		ring_vm_set_task(rv, 1, 0, others, patterns[i].others);
		EXPECT(ring_vm_run(rv, 1), RING_VM_DONE);

		EXPECT(ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL), count);
		EXPECT(vm_reset_dirty_rings(rv->vm), count);
		ring_vm_forget(rv);

		/* Whatever was protected, vCPU 0 faults on it now. */
		ring_vm_set_task(rv, 0, 0, others, patterns[i].others);
		EXPECT(ring_vm_run(rv, 0), RING_VM_DONE);
		ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL);
		for (page = 0; page < pages; page++)
			TEST_ASSERT(rv->seen[page] ==
				    !(page % patterns[i].stride),
				    "Page %lu was reported %u times, every %luth was reset",
				    page, rv->seen[page], patterns[i].stride);

		EXPECT(ring_vm_harvest(rv, 1, DIRTY_RING_HARVEST_ALL),
		       others - count);
		EXPECT(vm_reset_dirty_rings(rv->vm), others);
		ring_vm_forget(rv);
	}
	ring_vm_free(rv);
}

static void enable_manual_protect(struct kvm_vm *vm)
{
	struct kvm_enable_cap cap = {
		.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
		.args[0] = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
	};

	vm_enable_cap(vm, &cap);
}

/* How often the vCPUs left the guest, as debugfs counts it */
static long vm_exits(struct kvm_vm *vm)
{
	char path[64];
	FILE *file;
	long exits;

	snprintf(path, sizeof(path), "/sys/kernel/debug/kvm/%d-%d/exits",
		 getpid(), vm_get_fd(vm));
	file = fopen(path, "r");
	if (!file)
		test_case_skip("there is no %s", path);
	EXPECT(fscanf(file, "%ld", &exits), 1);
	fclose(file);
	return exits;
}

/*
 * It is the same with a bitmap and KVM_CLEAR_DIRTY_LOG. The bitmap does not
 * tell who had a fault on a page that is dirty still, but the exits do.
 */
static void exact_clear(void)
{
	const uint64_t pages = 4096;
	struct ring_vm *rv = ring_vm_create(0, 1, pages,
					    KVM_MEM_LOG_DIRTY_PAGES,
					    enable_manual_protect);
	uint64_t bitmap[4096 / 64];
	long exits;
	int i;

	ring_vm_set_task(rv, 0, 0, pages / 2, 2);
	EXPECT(ring_vm_run(rv, 0), RING_VM_DONE);
	kvm_vm_get_dirty_log(rv->vm, RING_VM_SLOT, bitmap);
	for (i = 0; i < ARRAY_SIZE(bitmap); i++)
		EXPECT(bitmap[i], 0x5555555555555555);

	memset(bitmap, 0x11, sizeof(bitmap));
	kvm_vm_clear_dirty_log(rv->vm, RING_VM_SLOT, bitmap, 0, pages);
	exits = vm_exits(rv->vm);
	EXPECT(ring_vm_run(rv, 0), RING_VM_DONE);
	exits = vm_exits(rv->vm) - exits;

	/* Some are for the timer, and one is the end of the task. */
	printf("# %ld exits, %lu of %lu pages were protected\n", exits,
	       pages / 4, pages / 2);
	TEST_ASSERT(exits < pages * 3 / 8, "Others were protected, too");

	/* Pages that were cleared are reported again, and all others still. */
	kvm_vm_get_dirty_log(rv->vm, RING_VM_SLOT, bitmap);
	for (i = 0; i < ARRAY_SIZE(bitmap); i++)
		EXPECT(bitmap[i], 0x5555555555555555);
	ring_vm_free(rv);
}

static void many_slots(void)
{
	uint32_t ids[] = { 2, 31, 100, kvm_check_cap(KVM_CAP_NR_MEMSLOTS) - 1 };
	uint32_t i, pages = vm_num_guest_pages(VM_MODE_DEFAULT, 16);
	size_t size = 16UL * getpagesize();
	struct ring_vm *rv = small_vm();
	uint64_t first, offset, found[2];

	for (i = 0; i < ARRAY_SIZE(ids); i++) {
		first = SLOT_PAGES + i * 16;
		offset = (uint64_t)SLOT_PAGES * getpagesize() + i * size;
		vm_userspace_mem_region_add(rv->vm, VM_MEM_SRC_ANONYMOUS,
					    RING_VM_GPA + offset, ids[i], pages,
					    KVM_MEM_LOG_DIRTY_PAGES);
		virt_map(rv->vm, RING_VM_GVA + offset, RING_VM_GPA + offset,
			 pages, 0);
		ring_vm_write(rv, 0, first + i, 1);
		EXPECT(vcpu_harvest_dirty_ring(rv->vm, 0, 9, find_slot, found),
		       1);
		EXPECT(found[0], ids[i]);
		EXPECT(found[1], i);
		EXPECT(vm_reset_dirty_rings(rv->vm), 1);
		ring_vm_write(rv, 0, first, 16);
		EXPECT(vcpu_harvest_dirty_ring(rv->vm, 0, 99, NULL, NULL), 16);
		EXPECT(vm_reset_dirty_rings(rv->vm), 16);
	}

	ring_vm_free(rv);
}

#ifndef __x86_64__
/* What vCPUs write is in their rings, and not in the bitmap too. */
static void with_bitmap_vcpus(void)
{
	struct ring_vm *rv = ring_vm_create(ring_vm_min_entries(), 2, 512,
					    KVM_MEM_LOG_DIRTY_PAGES |
					    RING_VM_WITH_BITMAP, NULL);
	uint64_t bitmap[512 / 64];
	int i, round;

	for (round = 0; round < 3; round++) {
		ring_vm_write(rv, 0, 10, 100);
		ring_vm_write(rv, 1, 110, 100);
		memset(bitmap, 0xff, sizeof(bitmap));
		EXPECT(get_log(vm_get_fd(rv->vm), RING_VM_SLOT, bitmap), 0);
		for (i = 0; i < ARRAY_SIZE(bitmap); i++)
			EXPECT(bitmap[i], 0);
		EXPECT(ring_vm_collect(rv), 200);
		ring_vm_expect(rv, 10, 200);
	}
	ring_vm_free(rv);
}
#endif

static void untracked_slot(void)
{
	struct ring_vm *rv = ring_vm_create(ring_vm_min_entries(), 1,
					    SLOT_PAGES, 0, NULL);

	/* More than fit into the ring */
	ring_vm_write(rv, 0, 0, 1000);
	EXPECT(ring_vm_collect(rv), 0);

	/* Logging is switched on: all that are mapped get protected. */
	vm_mem_region_set_flags(rv->vm, RING_VM_SLOT, KVM_MEM_LOG_DIRTY_PAGES);
	EXPECT(ring_vm_collect(rv), 0);
	ring_vm_write(rv, 0, 950, 100);
	EXPECT(ring_vm_collect(rv), 100);
	ring_vm_expect(rv, 950, 100);

	/* Off, with entries in the ring */
	ring_vm_write(rv, 0, 500, 10);
	vm_mem_region_set_flags(rv->vm, RING_VM_SLOT, 0);
	ring_vm_write(rv, 0, 0, 1000);
	EXPECT(ring_vm_collect(rv), 10);
	ring_vm_expect(rv, 500, 10);
	ring_vm_write(rv, 0, 0, 1000);
	EXPECT(ring_vm_collect(rv), 0);

	/* And on once more */
	vm_mem_region_set_flags(rv->vm, RING_VM_SLOT, KVM_MEM_LOG_DIRTY_PAGES);
	ring_vm_write(rv, 0, 490, 30);
	EXPECT(ring_vm_collect(rv), 30);
	ring_vm_expect(rv, 490, 30);

	ring_vm_free(rv);
}

/* A large memslot of which little is mapped, all over it */
#define SPARSE_PAGES	(64 * 1024)
#define SPARSE_STRIDE	1021

static void sparse_slot(void)
{
	struct ring_vm *rv = ring_vm_create(ring_vm_min_entries(), 1,
					    SPARSE_PAGES, 0, NULL);
	uint32_t round, i, count = SPARSE_PAGES / SPARSE_STRIDE;

	for (round = 0; round < 3; round++) {
		ring_vm_set_task(rv, 0, 5, count, SPARSE_STRIDE);
		EXPECT(ring_vm_run(rv, 0), RING_VM_DONE);
		EXPECT(ring_vm_collect(rv), 0);

		vm_mem_region_set_flags(rv->vm, RING_VM_SLOT,
					KVM_MEM_LOG_DIRTY_PAGES);
		ring_vm_set_task(rv, 0, 5, count, SPARSE_STRIDE);
		EXPECT(ring_vm_run(rv, 0), RING_VM_DONE);
		EXPECT(ring_vm_collect(rv), count);
		for (i = 0; i < count; i++)
			EXPECT(rv->seen[5 + i * SPARSE_STRIDE], 1);
		ring_vm_forget(rv);

		vm_mem_region_set_flags(rv->vm, RING_VM_SLOT, 0);
	}
	ring_vm_free(rv);
}

#ifdef __x86_64__
static void set_tss_and_identity_map(struct kvm_vm *vm)
{
	uint64_t identity_map = 0xfffbc000;

	vm_ioctl(vm, KVM_SET_IDENTITY_MAP_ADDR, &identity_map);
	vm_ioctl(vm, KVM_SET_TSS_ADDR, (void *)0xfffbd000);
}

static void slots_of_kvm(void)
{
	struct ring_vm *rv;

	rv = ring_vm_create(ring_vm_min_entries(), 2, SLOT_PAGES,
			    KVM_MEM_LOG_DIRTY_PAGES, set_tss_and_identity_map);
	EXPECT(ring_vm_collect(rv), 0);
	ring_vm_write(rv, 0, 5, 3);
	ring_vm_write(rv, 1, 8, 3);
	EXPECT(ring_vm_collect(rv), 6);
	ring_vm_expect(rv, 5, 6);

	ring_vm_free(rv);
}

/*
 * The handler runs in real mode, in its own address space. It writes to its
 * second page; KVM saves the guest's state into the last one.
 */
#define SMRAM_GPA	0x1000000
#define SMRAM_PAGES	16
#define SMRAM_SLOT	0x10005
#define SMI_PORT	0xe
#define SMI_DONE	0xfe

static const uint8_t smi_handler[] = {
	0xb0, SMI_DONE,			/* mov $SMI_DONE, %al */
	0x2e, 0xa2, 0x34, 0x12,		/* mov %al, %cs:0x1234 */
	0xe4, SMI_PORT,			/* in $SMI_PORT, %al */
	0x0f, 0xaa,			/* rsm */
};

static void smi_guest(void)
{
	uint64_t apicbase = rdmsr(MSR_IA32_APICBASE);

	wrmsr(MSR_IA32_APICBASE, apicbase | X2APIC_ENABLE);
	while (true)
		wrmsr(APIC_BASE_MSR + (APIC_ICR >> 4),
		      APIC_DEST_SELF | APIC_INT_ASSERT | APIC_DM_SMI);
}

static void smi_mark(uint32_t slot, uint64_t offset, void *data)
{
	uint32_t *seen = data;

	EXPECT(slot, SMRAM_SLOT);
	TEST_ASSERT(offset < SMRAM_PAGES, "Offset %#lx", offset);
	seen[offset]++;
}

static void smm_address_space(void)
{
	uint32_t seen[SMRAM_PAGES], n, i;
	struct kvm_regs regs;
	struct kvm_run *run;
	struct kvm_vm *vm;
	uint8_t *smram;
	int round;

	if (!kvm_check_cap(KVM_CAP_X86_SMM))
		test_case_skip("KVM has no SMM");

	vm = vm_create(VM_MODE_DEFAULT, DEFAULT_GUEST_PHY_PAGES, O_RDWR);
	kvm_vm_elf_load(vm, program_invocation_name, 0, 0);
	vm_create_irqchip(vm);
	vm_enable_dirty_ring(vm, ring_vm_min_entries() *
				 sizeof(struct kvm_dirty_gfn));
	vm_vcpu_add_default(vm, 0, smi_guest);
	vcpu_set_cpuid(vm, 0, kvm_get_supported_cpuid());

	vm_userspace_mem_region_add(vm, VM_MEM_SRC_ANONYMOUS, SMRAM_GPA,
				    SMRAM_SLOT, SMRAM_PAGES,
				    KVM_MEM_LOG_DIRTY_PAGES);
	smram = addr_gpa2hva(vm, SMRAM_GPA);
	memcpy(smram + 0x8000, smi_handler, sizeof(smi_handler));
	vcpu_set_msr(vm, 0, MSR_IA32_SMBASE, SMRAM_GPA);

	run = vcpu_state(vm, 0);
	for (round = 0; round < 3; round++) {
		smram[0x1234] = 0;
		vcpu_run(vm, 0);
		vcpu_regs_get(vm, 0, &regs);
		TEST_ASSERT(run->exit_reason == KVM_EXIT_IO &&
			    (regs.rax & 0xff) == SMI_DONE,
			    "Unexpected exit: %s",
			    exit_reason_str(run->exit_reason));
		EXPECT(smram[0x1234], SMI_DONE);

		memset(seen, 0, sizeof(seen));
		n = vcpu_harvest_dirty_ring(vm, 0, DIRTY_RING_HARVEST_ALL,
					    smi_mark, seen);
		/*
		 * The page of the code may come, too: KVM maps a page that it
		 * may write to for writing, even if the guest reads it. The
		 * TDP MMU does so each time, because it drops the mappings of
		 * an address space that no vCPU is in.
		 */
		for (i = 0; i < SMRAM_PAGES; i++)
			TEST_ASSERT(!!seen[i] == (i == 1 || i == 15) ||
				    i == 8,
				    "Page %u was reported %u times", i,
				    seen[i]);
		EXPECT(vm_reset_dirty_rings(vm), n);
	}

	kvm_vm_free(vm);
}
#endif

/*
 * Harvest and reset
 */

static void partial_harvest(void)
{
	struct ring_vm *rv = small_vm();

	ring_vm_write(rv, 0, 50, 10);
	EXPECT(ring_vm_harvest(rv, 0, 4), 4);
	EXPECT(vm_reset_dirty_rings(rv->vm), 4);
	ring_vm_expect(rv, 50, 4);
	expect_flags(rv, 0, 0, 4, 0);
	expect_flags(rv, 0, 4, 6, KVM_DIRTY_GFN_F_DIRTY);

	/* Those four are protected again, the other six are not yet. */
	ring_vm_write(rv, 0, 50, 10);
	EXPECT(ring_vm_harvest(rv, 0, 6), 6);
	ring_vm_expect(rv, 54, 6);
	EXPECT(ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL), 4);
	ring_vm_expect(rv, 50, 4);
	EXPECT(vm_reset_dirty_rings(rv->vm), 10);

	ring_vm_free(rv);
}

static void harvest_with_gap(void)
{
	struct ring_vm *rv = small_vm();
	struct kvm_dirty_gfn *ring = vcpu_dirty_ring(rv->vm, 0);

	ring_vm_write(rv, 0, 0, 6);
	dirty_gfn_set_harvested(&ring[0]);
	dirty_gfn_set_harvested(&ring[1]);
	dirty_gfn_set_harvested(&ring[3]);
	EXPECT(vm_reset_dirty_rings(rv->vm), 2);
	expect_flags(rv, 0, 0, 2, 0);
	expect_flags(rv, 0, 2, 1, KVM_DIRTY_GFN_F_DIRTY);
	expect_flags(rv, 0, 3, 1, KVM_DIRTY_GFN_F_RESET);
	expect_flags(rv, 0, 4, 2, KVM_DIRTY_GFN_F_DIRTY);
	EXPECT(vm_reset_dirty_rings(rv->vm), 0);

	dirty_gfn_set_harvested(&ring[2]);
	EXPECT(vm_reset_dirty_rings(rv->vm), 2);
	dirty_gfn_set_harvested(&ring[4]);
	dirty_gfn_set_harvested(&ring[5]);
	EXPECT(vm_reset_dirty_rings(rv->vm), 2);
	expect_flags(rv, 0, 0, rv->entries, 0);

	ring_vm_free(rv);
}

static void dirty_and_reset_set(void)
{
	struct ring_vm *rv = small_vm();
	struct kvm_dirty_gfn *ring = vcpu_dirty_ring(rv->vm, 0);
	int i, round;

	/* Userspace may leave DIRTY alone when it sets RESET. */
	for (round = 0; round < 3; round++) {
		ring_vm_write(rv, 0, 7, 5);
		for (i = 0; i < 5; i++)
			WRITE_ONCE(ring[round * 5 + i].flags,
				   KVM_DIRTY_GFN_F_MASK);
		EXPECT(vm_reset_dirty_rings(rv->vm), 5);
		expect_flags(rv, 0, 0, rv->entries, 0);
	}

	ring_vm_free(rv);
}

static void several_vcpus(void)
{
	struct ring_vm *rv = ring_vm_create(ring_vm_min_entries(), 4,
					    SLOT_PAGES,
					    KVM_MEM_LOG_DIRTY_PAGES, NULL);

	/* Each vCPU reports into its own ring. */
	ring_vm_write(rv, 0, 0, 3);
	ring_vm_write(rv, 2, 100, 5);
	ring_vm_write(rv, 3, 200, 11);
	expect_flags(rv, 0, 0, 3, KVM_DIRTY_GFN_F_DIRTY);
	expect_flags(rv, 0, 3, rv->entries - 3, 0);
	expect_flags(rv, 1, 0, rv->entries, 0);
	expect_flags(rv, 2, 5, rv->entries - 5, 0);
	expect_flags(rv, 3, 11, rv->entries - 11, 0);

	/* A reset returns the sum, */
	EXPECT(ring_vm_harvest(rv, 2, DIRTY_RING_HARVEST_ALL), 5);
	ring_vm_expect(rv, 100, 5);
	EXPECT(ring_vm_harvest(rv, 3, 7), 7);
	ring_vm_expect(rv, 200, 7);
	EXPECT(vm_reset_dirty_rings(rv->vm), 12);
	/* and one ring that is not harvested holds up none of the others. */
	EXPECT(ring_vm_harvest(rv, 3, DIRTY_RING_HARVEST_ALL), 4);
	ring_vm_expect(rv, 207, 4);
	EXPECT(ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL), 3);
	ring_vm_expect(rv, 0, 3);
	EXPECT(vm_reset_dirty_rings(rv->vm), 7);

	/* A page that another vCPU reported is in one ring only. */
	ring_vm_write(rv, 0, 300, 8);
	ring_vm_write(rv, 1, 300, 8);
	EXPECT(ring_vm_harvest(rv, 1, DIRTY_RING_HARVEST_ALL), 0);
	EXPECT(ring_vm_collect(rv), 8);
	ring_vm_expect(rv, 300, 8);
	/* After the reset either may be the one to report it. */
	ring_vm_write(rv, 1, 300, 8);
	EXPECT(ring_vm_harvest(rv, 1, DIRTY_RING_HARVEST_ALL), 8);
	EXPECT(vm_reset_dirty_rings(rv->vm), 8);

	ring_vm_free(rv);
}

static void wrap_around(void)
{
	struct ring_vm *rv = small_vm();
	struct kvm_dirty_gfn *ring = vcpu_dirty_ring(rv->vm, 0);
	uint32_t i, pos = 0, batch = 37, page = 0;

	while (pos < 7 * rv->entries) {
		ring_vm_write(rv, 0, page, batch);
		for (i = 0; i < batch; i++)
			EXPECT(ring[(pos + i) % rv->entries].offset, page + i);
		expect_flags(rv, 0, pos, batch, KVM_DIRTY_GFN_F_DIRTY);
		expect_flags(rv, 0, pos + batch, rv->entries - batch, 0);
		EXPECT(ring_vm_collect(rv), batch);
		ring_vm_expect(rv, page, batch);
		pos += batch;
		page = (page + 29) % (SLOT_PAGES - batch);
	}

	ring_vm_free(rv);
}

static void soft_limit(void)
{
	struct ring_vm *rv = small_vm();
	uint32_t i, limit = rv->limit;

	/* One entry less than the limit: the vCPU runs. */
	ring_vm_write(rv, 0, 0, limit - 1);
	EXPECT(vm_reset_dirty_rings(rv->vm), 0);

	/* The next write takes the last entry; the store is not done. */
	ring_vm_set_task(rv, 0, limit - 1, 2, 1);
	for (i = 0; i < 5; i++) {
		EXPECT(ring_vm_run(rv, 0), RING_VM_FULL);
		expect_flags(rv, 0, 0, limit, KVM_DIRTY_GFN_F_DIRTY);
		expect_flags(rv, 0, limit, rv->entries - limit, 0);
	}

	/* Harvesting makes no room, */
	EXPECT(ring_vm_harvest(rv, 0, 1), 1);
	EXPECT(ring_vm_run(rv, 0), RING_VM_FULL);
	/* a reset does, even of one entry: for one more page. */
	EXPECT(vm_reset_dirty_rings(rv->vm), 1);
	EXPECT(ring_vm_run(rv, 0), RING_VM_FULL);
	expect_flags(rv, 0, 1, limit, KVM_DIRTY_GFN_F_DIRTY);
	expect_flags(rv, 0, limit + 1, rv->entries - limit, 0);
	EXPECT(*(uint64_t *)(rv->mem + (limit - 1) * getpagesize()), limit);

	/* With an empty ring the last store faults again and gets done. */
	EXPECT(ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL), limit);
	ring_vm_expect(rv, 0, limit + 1);
	EXPECT(vm_reset_dirty_rings(rv->vm), limit);
	EXPECT(ring_vm_run(rv, 0), RING_VM_DONE);
	EXPECT(*(uint64_t *)(rv->mem + limit * getpagesize()), limit + 1);
	EXPECT(ring_vm_collect(rv), 1);
	ring_vm_expect(rv, limit, 1);

	/*
	 * The same anywhere in the ring; but a CPU that logs pages stops when
	 * its log is full, see pml_test.
	 */
	for (i = 0; i < 3 && !dirty_ring_cpu_logs_pages(); i++) {
		ring_vm_set_task(rv, 0, 0, limit + 10, 1);
		EXPECT(ring_vm_run(rv, 0), RING_VM_FULL);
		EXPECT(ring_vm_collect(rv), limit);
		EXPECT(ring_vm_run(rv, 0), RING_VM_DONE);
		/* The page of the store that was in flight comes again. */
		EXPECT(ring_vm_collect(rv), 11);
	}
	ring_vm_free(rv);

	/* The same in the biggest ring */
	rv = ring_vm_create(MAX_RING_SIZE / sizeof(struct kvm_dirty_gfn), 1,
			    MAX_RING_SIZE / sizeof(struct kvm_dirty_gfn),
			    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	ring_vm_set_task(rv, 0, 0, rv->pages, 1);
	EXPECT(ring_vm_run(rv, 0), RING_VM_FULL);
	EXPECT(ring_vm_collect(rv), rv->limit);
	ring_vm_expect(rv, 0, rv->limit);
	ring_vm_free(rv);
}

static void only_one_is_full(void)
{
	uint32_t entries = ring_vm_min_entries();
	struct ring_vm *rv = ring_vm_create(entries, 2, 2 * entries,
					    KVM_MEM_LOG_DIRTY_PAGES, NULL);

	ring_vm_set_task(rv, 0, 0, rv->limit + 1, 1);
	EXPECT(ring_vm_run(rv, 0), RING_VM_FULL);
	ring_vm_write(rv, 1, entries, rv->limit - 1);
	EXPECT(ring_vm_run(rv, 0), RING_VM_FULL);

	/* A reset of the other ring does not help. */
	EXPECT(ring_vm_harvest(rv, 1, DIRTY_RING_HARVEST_ALL), rv->limit - 1);
	EXPECT(vm_reset_dirty_rings(rv->vm), rv->limit - 1);
	EXPECT(ring_vm_run(rv, 0), RING_VM_FULL);

	EXPECT(ring_vm_collect(rv), rv->limit);
	EXPECT(ring_vm_run(rv, 0), RING_VM_DONE);

	ring_vm_free(rv);
}

/*
 * Forged entries
 */

/* Set the flags of all entries but those from @first on. */
static void forge_flags(struct ring_vm *rv, uint32_t first, uint32_t count,
			uint32_t flags)
{
	struct kvm_dirty_gfn *ring = vcpu_dirty_ring(rv->vm, 0);
	uint32_t i;

	for (i = count; i < rv->entries; i++)
		WRITE_ONCE(ring[(first + i) % rv->entries].flags, flags);
}

static void forged_harvest(void)
{
	static const uint32_t flags[] = {
		KVM_DIRTY_GFN_F_RESET, KVM_DIRTY_GFN_F_MASK, UINT32_MAX,
	};
	struct ring_vm *rv;
	uint32_t i, pos, batch;

	for (i = 0; i < ARRAY_SIZE(flags); i++) {
		rv = small_vm();
		batch = rv->limit / 2 + 3;

		/* Nothing was pushed: nothing is reset. */
		forge_flags(rv, 0, 0, flags[i]);
		EXPECT(vm_reset_dirty_rings(rv->vm), 0);
		expect_flags(rv, 0, 0, rv->entries, flags[i]);

		/* No more than what was pushed, anywhere in the ring. */
		for (pos = 0; pos < 5 * rv->entries; pos += batch) {
			ring_vm_write(rv, 0, 0, batch);
			forge_flags(rv, pos, batch, flags[i]);
			expect_flags(rv, 0, pos, batch, KVM_DIRTY_GFN_F_DIRTY);
			EXPECT(vm_reset_dirty_rings(rv->vm), 0);
			EXPECT(ring_vm_harvest(rv, 0, batch), batch);
			ring_vm_expect(rv, 0, batch);
			EXPECT(vm_reset_dirty_rings(rv->vm), batch);
			EXPECT(vm_reset_dirty_rings(rv->vm), 0);
		}

		/* The soft limit is where it was. */
		ring_vm_set_task(rv, 0, 0, rv->limit, 1);
		EXPECT(ring_vm_run(rv, 0), RING_VM_FULL);
		EXPECT(ring_vm_harvest(rv, 0, rv->limit), rv->limit);
		EXPECT(vm_reset_dirty_rings(rv->vm), rv->limit);
		EXPECT(ring_vm_run(rv, 0), RING_VM_DONE);
		ring_vm_free(rv);
	}
}

static void forged_flags(void)
{
	struct ring_vm *rv = small_vm();
	struct kvm_dirty_gfn *ring = vcpu_dirty_ring(rv->vm, 0);

	/* An entry that userspace empties is not harvested. */
	ring_vm_write(rv, 0, 0, 5);
	dirty_gfn_set_harvested(&ring[0]);
	WRITE_ONCE(ring[1].flags, 0);
	dirty_gfn_set_harvested(&ring[2]);
	EXPECT(vm_reset_dirty_rings(rv->vm), 1);
	EXPECT(vm_reset_dirty_rings(rv->vm), 0);
	dirty_gfn_set_harvested(&ring[1]);
	EXPECT(vm_reset_dirty_rings(rv->vm), 2);

	/* Nor is one with just anything but RESET. */
	WRITE_ONCE(ring[3].flags, ~KVM_DIRTY_GFN_F_RESET);
	EXPECT(vm_reset_dirty_rings(rv->vm), 0);
	dirty_gfn_set_harvested(&ring[3]);
	dirty_gfn_set_harvested(&ring[4]);
	EXPECT(vm_reset_dirty_rings(rv->vm), 2);

	/* The whole ring zeroed: stuck until harvested, but no harm done */
	ring_vm_set_task(rv, 0, 0, rv->limit + 1, 1);
	EXPECT(ring_vm_run(rv, 0), RING_VM_FULL);
	memset(ring, 0, rv->entries * sizeof(*ring));
	EXPECT(vm_reset_dirty_rings(rv->vm), 0);
	EXPECT(ring_vm_run(rv, 0), RING_VM_FULL);
	forge_flags(rv, 0, 0, KVM_DIRTY_GFN_F_RESET);
	EXPECT(vm_reset_dirty_rings(rv->vm), rv->limit);
	EXPECT(vm_reset_dirty_rings(rv->vm), 0);

	ring_vm_free(rv);
}

/* A VM with entries that are good, but for those the callback forges. */
static void forge(void (*fn)(struct kvm_dirty_gfn *ring, uint32_t *n))
{
	struct ring_vm *rv = small_vm();
	struct kvm_dirty_gfn *ring = vcpu_dirty_ring(rv->vm, 0);
	uint32_t i, n = rv->limit - 1, forged = n - 1;

	ring_vm_write(rv, 0, 0, n);

	/* @forged entries from the second on, the last is good again. */
	fn(ring, &forged);
	for (i = 0; i < n; i++)
		dirty_gfn_set_harvested(&ring[i]);
	/* Skipped, but counted */
	EXPECT(vm_reset_dirty_rings(rv->vm), n);
	expect_flags(rv, 0, 0, rv->entries, 0);
	ring_vm_free(rv);

	/* Once more: now with the good ones in between, and looked at. */
	rv = small_vm();
	ring = vcpu_dirty_ring(rv->vm, 0);
	n = rv->limit - 1;
	ring_vm_write(rv, 0, 0, n);
	forged = n - 1;
	fn(ring, &forged);
	for (i = 0; i < n; i++) {
		if (i % 3 != 1) {
			ring[i].slot = RING_VM_SLOT;
			ring[i].offset = i;
		}
		dirty_gfn_set_harvested(&ring[i]);
	}
	EXPECT(vm_reset_dirty_rings(rv->vm), n);

	/* All whose entries were good are protected. */
	ring_vm_write(rv, 0, 0, n);
	for (i = 0; i < rv->entries; i++) {
		uint32_t pos = (n + i) % rv->entries;

		if (!dirty_gfn_is_dirty(&ring[pos]))
			break;
		EXPECT(ring[pos].slot, RING_VM_SLOT);
		TEST_ASSERT(ring[pos].offset < n, "Page was not written to");
		rv->seen[ring[pos].offset]++;
		dirty_gfn_set_harvested(&ring[pos]);
	}
	EXPECT(vm_reset_dirty_rings(rv->vm), i);
	for (i = 0; i < n; i++)
		if (i % 3 != 1 || i > forged)
			EXPECT(rv->seen[i], 1);
	ring_vm_free(rv);
}

static void forge_slots(struct kvm_dirty_gfn *ring, uint32_t *n)
{
	/* No memslot, as yet; not tracked; none possible; address space */
	static const uint32_t slots[] = {
		2, 31, 508, 509, 510, 511, 512, 513, 0x7ffe, 0x7fff, 0x8000,
		0xfffe, 0xffff, 0x10000, 0x10001, 0x1ffff, 0x20000, 0x20001,
		0x7fff0001, 0x80000001, 0xffff0000, 0xffff0001, UINT32_MAX,
	};
	uint32_t i;

	for (i = 0; i < *n; i++)
		ring[1 + i].slot = slots[i % ARRAY_SIZE(slots)];
}

static void forged_slot(void)
{
	forge(forge_slots);
}

static void forge_offsets(struct kvm_dirty_gfn *ring, uint32_t *n)
{
	uint64_t base = RING_VM_GPA / getpagesize();
	const uint64_t offsets[] = {
		/* Just past the slot, and too far for a distance of 64 */
		SLOT_PAGES, SLOT_PAGES - 1, SLOT_PAGES + 1, SLOT_PAGES + 62,
		SLOT_PAGES + 63, SLOT_PAGES + 64,
		/* Good if cut to 32 bits, or shifted to an address */
		1UL << 32, (1UL << 32) + 3, 1UL << 52, (1UL << 52) + 3,
		1UL << 31, UINT32_MAX, 1UL << 63, INT64_MAX,
		/* Another slot if added to the first frame */
		-base, -base + 1, -base - 1,
	};
	uint32_t i;

	for (i = 0; i < *n; i++)
		ring[1 + i].offset = offsets[i % ARRAY_SIZE(offsets)];
}

static void forged_offset(void)
{
	forge(forge_offsets);
}

static void forge_wrapping_offsets(struct kvm_dirty_gfn *ring, uint32_t *n)
{
	/*
	 * Near 2^64: an offset is good, and in one batch with the one before,
	 * if their distance is all that is looked at.
	 */
	static const int64_t offsets[] = {
		-1, 0, -1, 62, -10, 5, 5, -10, -63, 0, -64, -1, -64, 63, 0,
		-63, 10, -53, SLOT_PAGES - 1, -1, -2, -3, -4, 3, 2, 1,
	};
	uint32_t i;

	for (i = 0; i < *n; i++)
		ring[1 + i].offset = offsets[i % ARRAY_SIZE(offsets)];
}

static void wrapping_offset(void)
{
	forge(forge_wrapping_offsets);
}

static void removed_slot(void)
{
	struct ring_vm *rv = small_vm();
	uint64_t pages = vm_num_guest_pages(VM_MODE_DEFAULT, SLOT_PAGES);

	/* The memslot is gone when its pages are reset. */
	ring_vm_write(rv, 0, 1000, 20);
	EXPECT(ring_vm_harvest(rv, 0, 10), 10);
	vm_mem_region_delete(rv->vm, RING_VM_SLOT);
	EXPECT(vm_reset_dirty_rings(rv->vm), 10);

	/* It is back, but too small for the other pages. */
	vm_userspace_mem_region_add(rv->vm, VM_MEM_SRC_ANONYMOUS, RING_VM_GPA,
				    RING_VM_SLOT, pages / 8,
				    KVM_MEM_LOG_DIRTY_PAGES);
	rv->mem = addr_gpa2hva(rv->vm, RING_VM_GPA);
	EXPECT(ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL), 10);
	EXPECT(vm_reset_dirty_rings(rv->vm), 10);
	ring_vm_expect(rv, 1000, 20);

	ring_vm_write(rv, 0, 100, 20);
	EXPECT(ring_vm_collect(rv), 20);
	ring_vm_expect(rv, 100, 20);

	ring_vm_free(rv);
}

/*
 * A reset while the vCPU runs
 */

#define FLUSH_ROUNDS		2000
#define FLUSH_MIN_ROUNDS	50
#define FLUSH_SECONDS		20

static struct {
	struct ring_vm *rv;
	cpu_set_t cpus;
	sem_t go;
	sem_t done;
	bool quit;
} spinner;

static void *spin_vcpu(void *unused)
{
	TEST_ASSERT(!sched_setaffinity(0, sizeof(spinner.cpus), &spinner.cpus),
		    "sched_setaffinity: %s", strerror(errno));

	while (true) {
		sem_wait(&spinner.go);
		if (spinner.quit)
			return NULL;
		EXPECT(ring_vm_run(spinner.rv, 0), RING_VM_DONE);
		sem_post(&spinner.done);
	}
}

/* Wait for a store that began after the call. */
static void wait_for_store(uint64_t *page)
{
	uint64_t before = READ_ONCE(*page);

	while (READ_ONCE(*page) < before + 2)
		;
}

/*
 * The vCPU writes to one page all the time, on a CPU of its own, and leaves
 * the guest for no other reason than to report it. When a reset returned, the
 * page must be in the ring again before the next write can be seen. If the
 * TLB of the vCPU's CPU was not flushed by then, writes are seen but the ring
 * is empty.
 */
static void tlb_flush(void)
{
	struct ring_vm_task *task;
	struct timespec start;
	pthread_t thread;
	struct ring_vm *rv;
	cpu_set_t cpus;
	uint64_t *page;
	int i, cpu;
	bool log;

	sched_getaffinity(0, sizeof(cpus), &cpus);
	if (CPU_COUNT(&cpus) < 2)
		test_case_skip("needs two CPUs");

	/* One CPU for the vCPU, the others for the resets */
	for (cpu = 0; !CPU_ISSET(cpu, &cpus); cpu++)
		;
	CPU_CLR(cpu, &cpus);
	sched_setaffinity(0, sizeof(cpus), &cpus);
	CPU_ZERO(&spinner.cpus);
	CPU_SET(cpu, &spinner.cpus);

	rv = small_vm();
	spinner.rv = rv;
	sem_init(&spinner.go, 0, 0);
	sem_init(&spinner.done, 0, 0);
	pthread_create(&thread, NULL, spin_vcpu, NULL);

	page = (uint64_t *)(rv->mem + 77 * getpagesize());
	task = ring_vm_task(rv, 0);
	ring_vm_set_task(rv, 0, 77, 1, 0);
	WRITE_ONCE(task->spin, 1);
	sem_post(&spinner.go);

	log = dirty_ring_cpu_logs_pages();
	wait_for_store(page);
	clock_gettime(CLOCK_MONOTONIC, &start);
	for (i = 0; i < FLUSH_ROUNDS; i++) {
		/* Emulation on a busy machine takes long for a round. */
		if (i >= FLUSH_MIN_ROUNDS &&
		    timespec_diff_now(start).tv_sec >= FLUSH_SECONDS)
			break;

		EXPECT(ring_vm_collect(rv), 1);
		wait_for_store(page);
		if (!log)
			continue;

		/*
		 * A CPU that logs pages itself has it in the ring only after
		 * the next exit, which must be the guest's own: to kick the
		 * vCPU would flush the TLB.
		 */
		WRITE_ONCE(task->spin, 0);
		sem_wait(&spinner.done);
		WRITE_ONCE(task->spin, 1);
		sem_post(&spinner.go);
	}
	EXPECT(ring_vm_collect(rv), 1);
	EXPECT(rv->seen[77], i + 1);
	printf("# %d resets\n", i + 1);

	WRITE_ONCE(task->spin, 0);
	sem_wait(&spinner.done);
	spinner.quit = true;
	sem_post(&spinner.go);
	pthread_join(thread, NULL);
	ring_vm_free(rv);
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
	{ "with-bitmap-vcpus: no page of theirs is in it", with_bitmap_vcpus },
#endif
	{ "map-shared", map_shared },
	{ "map-executable: EINVAL", map_executable },
	{ "map-private: EINVAL", map_private },
	{ "map-mprotect: never executable", map_mprotect },
	{ "map-mremap: does not get around that", map_mremap },
	{ "map-past-ring: SIGBUS", map_past_ring },
	{ "map-without-ring: SIGBUS", map_without_ring },
	{ "map-outlives-vcpu", map_outlives_vcpu },
	{ "memory-charged: to the memory cgroup", memory_is_charged },
	{ "memory-runs-out: ENOMEM, no leak, the VM goes on",
	  memory_runs_out },
	{ "memory-freed: all of it", memory_is_freed },
	{ "entries: order, fields, states", entries },
	{ "protected-again: by a reset, not before", protected_again },
	{ "scattered-pages", scattered_pages },
	{ "exact-reset: protects no page in between", exact_reset },
	{ "exact-clear: nor does it with a bitmap", exact_clear },
	{ "many-slots", many_slots },
	{ "untracked-slot: nothing is reported", untracked_slot },
	{ "sparse-slot: tracked from when logging is on until it is off",
	  sparse_slot },
#ifdef __x86_64__
	{ "slots-of-kvm: not tracked", slots_of_kvm },
	{ "smm: an address space of its own", smm_address_space },
#endif
	{ "partial-harvest", partial_harvest },
	{ "gap: a reset stops at an entry not harvested", harvest_with_gap },
	{ "dirty-and-reset: counts as harvested", dirty_and_reset_set },
	{ "several-vcpus: a ring each, a reset returns the sum",
	  several_vcpus },
	{ "wrap-around", wrap_around },
	{ "soft-limit: exact", soft_limit },
	{ "only-one-full: the other vCPU runs", only_one_is_full },
	{ "forged-harvest: nothing beyond what was pushed", forged_harvest },
	{ "forged-flags", forged_flags },
	{ "forged-slot: skipped and counted", forged_slot },
	{ "forged-offset: skipped and counted", forged_offset },
	{ "wrapping-offset: skipped and counted", wrapping_offset },
	{ "removed-slot: skipped and counted", removed_slot },
	{ "tlb-flush: done when a reset returns", tlb_flush },
};

int main(int argc, char **argv)
{
	dirty_ring_check_supported();
	test_cases_main(argc, argv, cases, ARRAY_SIZE(cases));
}
