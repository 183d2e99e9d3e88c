// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test that a user who may open /dev/kvm, and nothing else, gets nowhere with
 * KVM's dirty rings
 *
 * Show, one case each, that
 *  - whatever a VMM does to its rings, and to the VM they belong to, with
 *    several threads at a time and at random, calls return what they may
 *    return; another VM beside it loses no page; and the VM itself, once that is
 *    over, loses none either,
 *  - a VMM in the middle of that can be killed, and can exit, with everything
 *    open and all rings full, and nothing is left behind,
 *  - what reads or writes a mapped ring by way of the kernel, for a process or
 *    another one, gets the bytes that are there, or EFAULT.
 *
 * When root runs it, all that is done as user 65534, who is let open /dev/kvm.
 */

#define _GNU_SOURCE /* for program_invocation_name, process_vm_readv, mremap */

#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <linux/io_uring.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>

#include "test_util.h"
#include "kvm_util.h"
#include "lib/kvm_util_internal.h"
#include "dirty_ring_vm.h"
#include "processor.h"
#include "test_cases.h"

#ifdef __x86_64__
#include <asm/kvm_para.h>
#endif

/* The same on all architectures, and not in all headers */
#ifndef __NR_io_uring_setup
#define __NR_io_uring_setup	425
#endif
#ifndef __NR_io_uring_register
#define __NR_io_uring_register	427
#endif

#define NOBODY		65534

#define ATTACKERS	4
#define ATTACKED_VCPUS	2
/* vCPUs, with those that attackers add */
#define MAX_VCPUS	16
#define PAGES		1024
#define HONEST_PAGES	512
/* Memslots that attackers create, delete, move and track; pages of each */
#define FIRST_SLOT	(RING_VM_SLOT + 1)
#define NR_SLOTS	6
#define SLOT_PAGES	64

#define MSRS_PER_IOCTL	64

/* Seconds to wait beyond that until each call was made at least once */
#define STORM_PATIENCE	45

static uint32_t seconds = 5;
static unsigned int seed;

/*
 * What a call may return in a VM with rings: errors, and whether it may
 * succeed.
 */
enum call {
	RESET_VM, RESET_VCPU, SYNC, SET_SLOT, SET_MSRS, CREATE_VCPU, ENABLE_RING,
	GET_LOG, CLEAR_LOG, UNKNOWN, OPEN_KVM, CREATE_VM, MAP, UNMAP, PROTECT,
	REMAP, ADVISE, LOCK, SYNC_MAP, READ_MEM, WRITE_MEM, FORK, DUP, CLOSE,
	NR_CALLS
};

static const struct {
	const char *name;
	/* The largest return value; -1: it must fail. */
	long max;
	int errors[10];
} calls[NR_CALLS] = {
	[RESET_VM] = { "KVM_RESET_DIRTY_RINGS", INT_MAX },
	[RESET_VCPU] = { "KVM_RESET_DIRTY_RINGS of a vCPU", INT_MAX },
	[SYNC] = { "KVM_SYNC_DIRTY_RINGS", 0, { ENOSPC } },
	[SET_SLOT] = { "KVM_SET_USER_MEMORY_REGION", 0,
		       { EINVAL, EEXIST, ENOMEM } },
	[SET_MSRS] = { "KVM_SET_MSRS", MSRS_PER_IOCTL },
	[CREATE_VCPU] = { "KVM_CREATE_VCPU", INT_MAX,
			  { EINVAL, EEXIST, ENOMEM, EMFILE, EBUSY } },
	[ENABLE_RING] = { "KVM_ENABLE_CAP", -1, { EINVAL, E2BIG } },
	[GET_LOG] = { "KVM_GET_DIRTY_LOG", -1, { ENXIO } },
	[CLEAR_LOG] = { "KVM_CLEAR_DIRTY_LOG", -1, { ENXIO } },
	[UNKNOWN] = { "an unknown ioctl", -1, { ENOTTY, EINVAL } },
	[OPEN_KVM] = { "open", INT_MAX, { EMFILE } },
	[CREATE_VM] = { "KVM_CREATE_VM", INT_MAX, { ENOMEM, EMFILE } },
	[MAP] = { "mmap", 0, { EINVAL, ENOMEM, EPERM } },
	[UNMAP] = { "munmap", 0, { ENOMEM } },
	[PROTECT] = { "mprotect", 0, { EACCES, ENOMEM } },
	[REMAP] = { "mremap", 0, { EFAULT, EINVAL, ENOMEM, EAGAIN } },
	[ADVISE] = { "madvise", 0, { EINVAL, EACCES, EPERM, ENODEV, EBADF,
				     EOPNOTSUPP, ENOMEM, EBUSY, EAGAIN } },
	[LOCK] = { "mlock", 0, { ENOMEM, EAGAIN, EPERM } },
	[SYNC_MAP] = { "msync", 0, { EBUSY, ENOMEM, EINVAL } },
	[READ_MEM] = { "read of /proc/self/mem", INT_MAX, { EIO, EFAULT } },
	[WRITE_MEM] = { "write to /proc/self/mem", INT_MAX, { EIO, EFAULT } },
	[FORK] = { "fork", INT_MAX, { EAGAIN, ENOMEM } },
	[DUP] = { "dup", INT_MAX, { EMFILE } },
	[CLOSE] = { "close", 0 },
};

static struct {
	uint64_t good;
	uint64_t bad;
} counts[NR_CALLS];

/* Fail unless @call may return @ret. Return: @ret. */
static long did(enum call call, long ret)
{
	int i, err = errno;
	bool may = ret >= 0 && ret <= calls[call].max;

	for (i = 0; ret == -1 && i < ARRAY_SIZE(calls[call].errors); i++)
		may |= err && calls[call].errors[i] == err;
	TEST_ASSERT(may, "%s returned %ld (%s), seed %u", calls[call].name, ret,
		    ret == -1 ? strerror(err) : "success", seed);
	__atomic_fetch_add(ret < 0 ? &counts[call].bad : &counts[call].good, 1,
			   __ATOMIC_RELAXED);
	return ret;
}

/* The same for a call that returns an address */
static void *did_map(enum call call, void *addr)
{
	did(call, addr == MAP_FAILED ? -1 : 0);
	return addr == MAP_FAILED ? NULL : addr;
}

/*
 * The user
 */

static pid_t main_pid;
static mode_t kvm_mode;

static void restore_mode(void)
{
	if (getpid() == main_pid)
		chmod("/dev/kvm", kvm_mode);
}

/* Let everybody open /dev/kvm until this program ends. */
static void open_door(void)
{
	struct stat st;

	if (getuid() || stat("/dev/kvm", &st))
		return;

	main_pid = getpid();
	kvm_mode = st.st_mode & 07777;
	atexit(restore_mode);
	chmod("/dev/kvm", kvm_mode | 0666);
}

static void be_nobody(void)
{
	if (!getuid()) {
		EXPECT(setgroups(0, NULL), 0);
		EXPECT(setresgid(NOBODY, NOBODY, NOBODY), 0);
		EXPECT(setresuid(NOBODY, NOBODY, NOBODY), 0);
	}
	/* For access to its own files in /proc */
	prctl(PR_SET_DUMPABLE, 1);
	if (access("/dev/kvm", R_OK | W_OK))
		test_case_skip("user %d may not open /dev/kvm", getuid());
}

/*
 * The VM that is attacked
 */

static struct ring_vm *rv;
static int vm_fd;
static size_t page_size, ring_pages;
static uint8_t *slot_mem;
static bool quit, rain_quit;
static struct ring_vm_runner runners[ATTACKED_VCPUS];

/* By id; attackers may have closed the file descriptors of those they add. */
static struct {
	int fd;
	struct kvm_dirty_gfn *ring;
} vcpus[MAX_VCPUS];

struct attacker {
	pthread_t thread;
	unsigned int random;
};

static __thread sigjmp_buf touch_env;

static void touch_failed(int sig)
{
	siglongjmp(touch_env, sig);
}

static void kicked(int sig)
{
}

static void catch_signals(void)
{
	struct sigaction sa = { .sa_handler = touch_failed };

	sigaction(SIGBUS, &sa, NULL);
	sigaction(SIGSEGV, &sa, NULL);
	sa.sa_handler = kicked;
	sigaction(SIGUSR1, &sa, NULL);
}

static uint32_t any(struct attacker *a, uint32_t below)
{
	return rand_r(&a->random) % below;
}

static bool one_in(struct attacker *a, uint32_t n)
{
	return !any(a, n);
}

static uint64_t any64(struct attacker *a)
{
	static const uint64_t odd[] = {
		0, 1, 63, PAGES - 1, PAGES, INT_MAX, UINT_MAX, 1UL << 32,
		LONG_MAX, ~0UL - 63, ~0UL,
	};

	return one_in(a, 2) ? odd[any(a, ARRAY_SIZE(odd))] : any(a, PAGES);
}

/* A vCPU, mostly one with a file descriptor */
static int any_vcpu(struct attacker *a)
{
	return one_in(a, 2) ? any(a, ATTACKED_VCPUS) : any(a, MAX_VCPUS);
}

static void attack_entries(struct attacker *a)
{
	struct kvm_dirty_gfn *ring = READ_ONCE(vcpus[any_vcpu(a)].ring), *gfn;
	uint32_t n = 1 << any(a, 10), i = any(a, rv->entries), how = any(a, 6);
	static const uint32_t slots[] = {
		0, RING_VM_SLOT, FIRST_SLOT, 509, 511, 512, 0xffff, 0x10001,
		0x1ffff, 0x20001, 0x7fffffff, 0xffffffff,
	};

	for (; ring && n; n--, i++) {
		gfn = &ring[i % rv->entries];
		switch (how) {
		case 0:
			WRITE_ONCE(gfn->flags, KVM_DIRTY_GFN_F_RESET);
			break;
		case 1:
			if (dirty_gfn_is_dirty(gfn))
				dirty_gfn_set_harvested(gfn);
			break;
		case 2:
			WRITE_ONCE(gfn->flags, any(a, 4));
			break;
		case 3:
			WRITE_ONCE(gfn->slot, slots[any(a, ARRAY_SIZE(slots))]);
			break;
		case 4:
			WRITE_ONCE(gfn->offset, any64(a));
			break;
		default:
			WRITE_ONCE(gfn->flags, rand_r(&a->random));
			WRITE_ONCE(gfn->slot, rand_r(&a->random));
			WRITE_ONCE(gfn->offset, any64(a));
		}
	}
}

static void attack_by_reset(struct attacker *a)
{
	int vcpu = any_vcpu(a), fd = READ_ONCE(vcpus[vcpu].fd);

	if (one_in(a, 2))
		did(RESET_VM, ioctl(vm_fd, KVM_RESET_DIRTY_RINGS, any64(a)));
	else if (fd >= 0)
		did(RESET_VCPU, ioctl(fd, KVM_RESET_DIRTY_RINGS, any64(a)));
}

static void attack_by_sync(struct attacker *a)
{
	did(SYNC, ioctl(vm_fd, KVM_SYNC_DIRTY_RINGS, any64(a)));
}

static void attack_slots(struct attacker *a)
{
	struct kvm_userspace_memory_region region = {};
	uint32_t i = any(a, NR_SLOTS + 1);

	/* Leave the guest's own where it is, tracked or not. */
	if (i == NR_SLOTS) {
		region.slot = RING_VM_SLOT;
		region.guest_phys_addr = RING_VM_GPA;
		region.memory_size = PAGES * page_size;
		region.userspace_addr = (uintptr_t)rv->mem;
	} else {
		region.slot = FIRST_SLOT + i;
		region.guest_phys_addr = RING_VM_GPA +
			(2 * PAGES + any(a, 2 * NR_SLOTS) * SLOT_PAGES / 2) *
			page_size;
		if (!one_in(a, 3))
			region.memory_size = SLOT_PAGES * page_size;
		region.userspace_addr = (uintptr_t)slot_mem +
					i * SLOT_PAGES * page_size;
	}
	if (!one_in(a, 4))
		region.flags = KVM_MEM_LOG_DIRTY_PAGES;
	did(SET_SLOT, ioctl(vm_fd, KVM_SET_USER_MEMORY_REGION, &region));
}

#ifdef __x86_64__
/* Have KVM write to the guest's memory, up to more pages than rings hold. */
static void attack_by_kvm(struct attacker *a)
{
	static const uint32_t msrs[] = {
		MSR_KVM_WALL_CLOCK_NEW, MSR_KVM_SYSTEM_TIME_NEW,
		MSR_KVM_STEAL_TIME,
	};
	struct {
		struct kvm_msrs header;
		struct kvm_msr_entry entries[MSRS_PER_IOCTL];
	} msr = {};
	int fd = READ_ONCE(vcpus[any_vcpu(a)].fd);
	uint32_t i, n, what;

	if (fd < 0)
		return;

	for (n = 1 << any(a, 5); n && !READ_ONCE(quit); n--) {
		msr.header.nmsrs = 1 + any(a, MSRS_PER_IOCTL);
		for (i = 0; i < msr.header.nmsrs; i++) {
			/* KVM writes the other two whenever the vCPU runs. */
			what = one_in(a, 16) ? any(a, ARRAY_SIZE(msrs)) : 0;
			msr.entries[i].index = msrs[what];
			msr.entries[i].data = RING_VM_GPA +
					      any(a, 3 * PAGES) * page_size;
			msr.entries[i].data |= !!what;
		}
		did(SET_MSRS, ioctl(fd, KVM_SET_MSRS, &msr));
	}
}
#else
static void attack_by_kvm(struct attacker *a)
{
}
#endif

static void attack_with_vcpu(struct attacker *a)
{
	static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
	uint32_t id = any(a, MAX_VCPUS);
	void *ring;
	int fd;

	fd = did(CREATE_VCPU, ioctl(vm_fd, KVM_CREATE_VCPU, (long)id));
	if (fd < 0)
		return;

	/* Map its ring, whose entries are needed in the end. */
	ring = did_map(MAP, mmap(NULL, ring_pages * page_size,
				 PROT_READ | PROT_WRITE, MAP_SHARED, fd,
				 KVM_DIRTY_LOG_PAGE_OFFSET * page_size));
	TEST_ASSERT(ring, "The ring of a vCPU is not mapped");
	pthread_mutex_lock(&lock);
	WRITE_ONCE(vcpus[id].ring, ring);
	if (one_in(a, 2))
		WRITE_ONCE(vcpus[id].fd, fd);
	else
		did(CLOSE, close(fd));
	pthread_mutex_unlock(&lock);
}

static void attack_by_ioctl(struct attacker *a)
{
	struct kvm_enable_cap cap = { .cap = dirty_ring_cap() };
	struct kvm_clear_dirty_log clear = { .num_pages = 64 };
	struct kvm_dirty_log log = {};
	int fds[] = { vm_fd, vcpus[0].fd };

	switch (any(a, 4)) {
	case 0:
		cap.flags = any(a, 2);
		cap.args[0] = one_in(a, 2) ? any64(a) : 1UL << any(a, 64);
		did(ENABLE_RING, ioctl(vm_fd, KVM_ENABLE_CAP, &cap));
		break;
	case 1:
		log.slot = any(a, FIRST_SLOT + NR_SLOTS);
		log.dirty_bitmap = slot_mem;
		did(GET_LOG, ioctl(vm_fd, KVM_GET_DIRTY_LOG, &log));
		break;
	case 2:
		clear.slot = any(a, FIRST_SLOT + NR_SLOTS);
		clear.dirty_bitmap = slot_mem;
		did(CLEAR_LOG, ioctl(vm_fd, KVM_CLEAR_DIRTY_LOG, &clear));
		break;
	default:
		/* A number of no KVM */
		did(UNKNOWN, ioctl(fds[any(a, 2)], _IO(KVMIO, 0xfd), any64(a)));
	}
}

static void touch_page(struct attacker *a, uint8_t *page)
{
	if (sigsetjmp(touch_env, 1))
		return;

	READ_ONCE(*page);
	if (one_in(a, 2))
		WRITE_ONCE(page[any(a, page_size)], any(a, 4));
}

/* Read and write all pages of a mapping; some, or all, may not be there. */
static void touch(struct attacker *a, uint8_t *map, size_t pages)
{
	size_t i;

	for (i = 0; i < pages; i++)
		touch_page(a, map + i * page_size);
}

/*
 * Map any part of a vCPU's file, and do to it whatever can be done to a
 * mapping.
 */
static void attack_mapping(struct attacker *a)
{
	static const int prots[] = {
		PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE, PROT_WRITE,
		PROT_READ | PROT_EXEC, PROT_READ | PROT_WRITE | PROT_EXEC,
	};
	static const int advice[] = {
		MADV_DONTNEED, MADV_REMOVE, MADV_DONTFORK, MADV_DOFORK,
		MADV_HWPOISON, MADV_MERGEABLE, MADV_UNMERGEABLE, MADV_HUGEPAGE,
		MADV_NOHUGEPAGE, MADV_DONTDUMP, MADV_DODUMP, MADV_FREE,
		MADV_WIPEONFORK, MADV_KEEPONFORK, 20 /* COLD */, 21 /* PAGEOUT */,
	};
	/* All but page 0, which KVM itself reads */
	size_t first = 1 + any(a, KVM_DIRTY_LOG_PAGE_OFFSET + ring_pages + 1);
	size_t pages, n, moved, i;
	int fd = READ_ONCE(vcpus[any_vcpu(a)].fd);
	uint8_t *map, *map2;

	if (one_in(a, 2))
		first = KVM_DIRTY_LOG_PAGE_OFFSET + any(a, ring_pages);
	pages = 1 + any(a, one_in(a, 4) ? 2 * KVM_DIRTY_LOG_PAGE_OFFSET :
					  ring_pages + 1);
	if (fd < 0)
		return;

	map = did_map(MAP, mmap(NULL, pages * page_size,
				prots[any(a, ARRAY_SIZE(prots))],
				one_in(a, 4) ? MAP_PRIVATE : MAP_SHARED, fd,
				first * page_size));
	if (!map)
		return;

	for (n = any(a, 8); n; n--) {
		i = any(a, pages);
		switch (any(a, 6)) {
		case 0:
			did(PROTECT, mprotect(map + i * page_size, page_size,
					      prots[any(a, ARRAY_SIZE(prots))]));
			break;
		case 1:
			did(ADVISE, madvise(map + i * page_size,
					    (1 + any(a, pages - i)) * page_size,
					    advice[any(a, ARRAY_SIZE(advice))]));
			break;
		case 2:
			did(LOCK, mlock(map + i * page_size, page_size));
			if (one_in(a, 2))
				munlock(map + i * page_size, page_size);
			break;
		case 3:
			did(SYNC_MAP, msync(map, pages * page_size, MS_SYNC));
			break;
		case 4:
			moved = one_in(a, 2) ? pages : 1 + any(a, 2 * pages);
			map2 = did_map(REMAP, mremap(map, pages * page_size,
						     moved * page_size,
						     MREMAP_MAYMOVE));
			if (map2) {
				map = map2;
				pages = moved;
			}
			break;
		default:
			touch(a, map, pages);
		}
	}
	touch(a, map, pages);

	/* Sometimes make a hole first, which others may take. */
	i = one_in(a, 2) ? any(a, pages) : pages;
	if (i < pages)
		did(UNMAP, munmap(map + i * page_size, page_size));
	if (i)
		did(UNMAP, munmap(map, i * page_size));
	if (i + 1 < pages)
		did(UNMAP, munmap(map + (i + 1) * page_size,
				  (pages - i - 1) * page_size));
}

static void attack_by_proc(struct attacker *a)
{
	struct kvm_dirty_gfn gfn[8], *at;
	int mem;

	at = &vcpus[any(a, ATTACKED_VCPUS)].ring[any(a, rv->entries - 8)];
	mem = did(OPEN_KVM, open("/proc/self/mem", O_RDWR));
	if (mem < 0)
		return;
	did(READ_MEM, pread(mem, gfn, sizeof(gfn), (uintptr_t)at));
	did(WRITE_MEM, pwrite(mem, gfn, sizeof(gfn), (uintptr_t)at));
	did(CLOSE, close(mem));
}

/* A child has mappings and files, but may not use the VM. */
static void attack_by_fork(struct attacker *a)
{
	struct kvm_dirty_gfn *ring = vcpus[any(a, ATTACKED_VCPUS)].ring;
	uint32_t i = any(a, rv->entries), rest = any(a, 2000);
	int status;
	pid_t pid;

	pid = did(FORK, fork());
	if (!pid) {
		alarm(60);
		signal(SIGSEGV, SIG_DFL);
		signal(SIGBUS, SIG_DFL);
		usleep(rest);
		WRITE_ONCE(ring[i].flags, ring[i].flags ^ 2);
		if (ioctl(vm_fd, KVM_RESET_DIRTY_RINGS, 0) != -1 ||
		    errno != EIO)
			_exit(1);
		if (ioctl(vm_fd, KVM_SYNC_DIRTY_RINGS, 0) != -1 || errno != EIO)
			_exit(2);
		if (ioctl(vcpus[0].fd, KVM_RESET_DIRTY_RINGS, 0) != -1 ||
		    errno != EIO)
			_exit(3);
		_exit(0);
	}
	if (pid < 0)
		return;
	EXPECT(waitpid(pid, &status, 0), pid);
	TEST_ASSERT(WIFEXITED(status) && !WEXITSTATUS(status),
		    "The child ended with %#x", status);
}

/* Create another VM, and let its parts go in any order. */
static void attack_with_vm(struct attacker *a)
{
	struct kvm_enable_cap cap = { .cap = dirty_ring_cap() };
	struct kvm_userspace_memory_region region = {
		.slot = 1,
		.flags = KVM_MEM_LOG_DIRTY_PAGES,
		.memory_size = SLOT_PAGES * page_size,
		.userspace_addr = (uintptr_t)slot_mem,
	};
	int fds[4], nr_fds = 0, kvm, vm, i, n;
	size_t size = 1UL << (14 + any(a, 6));
	void *maps[2] = {};

	kvm = did(OPEN_KVM, open("/dev/kvm", O_RDWR | O_CLOEXEC));
	if (kvm < 0)
		return;
	fds[nr_fds++] = kvm;
	vm = did(CREATE_VM, ioctl(kvm, KVM_CREATE_VM, 0));
	if (vm >= 0) {
		fds[nr_fds++] = vm;
		cap.args[0] = size;
		if (ioctl(vm, KVM_ENABLE_CAP, &cap))
			cap.args[0] = 0;
		did(SET_SLOT, ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region));
		for (i = 0; i < 2; i++) {
			n = did(CREATE_VCPU, ioctl(vm, KVM_CREATE_VCPU,
						   (long)any(a, 3)));
			if (n < 0)
				continue;
			maps[i] = did_map(MAP, mmap(NULL, size, PROT_READ |
						    PROT_WRITE, MAP_SHARED, n,
						    KVM_DIRTY_LOG_PAGE_OFFSET *
						    page_size));
			fds[nr_fds++] = n;
		}
	}
	while (nr_fds) {
		i = any(a, 2);
		if (maps[i]) {
			touch(a, maps[i], size / page_size);
			did(UNMAP, munmap(maps[i], size));
			maps[i] = NULL;
		}
		n = any(a, nr_fds);
		did(CLOSE, close(fds[n]));
		fds[n] = fds[--nr_fds];
	}
	for (i = 0; i < 2; i++)
		if (maps[i])
			did(UNMAP, munmap(maps[i], size));
}

static void attack_files(struct attacker *a)
{
	int fd = READ_ONCE(vcpus[any_vcpu(a)].fd), two;

	if (fd < 0 || one_in(a, 2))
		fd = vm_fd;
	two = did(DUP, fcntl(fd, F_DUPFD_CLOEXEC, 3));
	if (two < 0)
		return;
	did(fd == vm_fd ? RESET_VM : RESET_VCPU,
	    ioctl(two, KVM_RESET_DIRTY_RINGS, 0));
	did(CLOSE, close(two));
}

/* What to do, and how many times in a hundred */
static const struct {
	void (*fn)(struct attacker *a);
	uint32_t percent;
} attacks[] = {
	{ attack_entries, 20 },
	{ attack_by_reset, 20 },
	{ attack_by_sync, 10 },
	{ attack_slots, 6 },
	{ attack_by_kvm, 6 },
	{ attack_by_ioctl, 8 },
	{ attack_mapping, 14 },
	{ attack_by_proc, 4 },
	{ attack_files, 4 },
	{ attack_with_vcpu, 4 },
	{ attack_with_vm, 2 },
	{ attack_by_fork, 2 },
};

static void *attack(void *data)
{
	struct attacker *a = data;
	uint32_t n;
	int i;

	while (!READ_ONCE(quit)) {
		n = any(a, 100);
		for (i = 0; n >= attacks[i].percent; i++)
			n -= attacks[i].percent;
		attacks[i].fn(a);
		/* Kick vCPUs: ioctls on a vCPU wait until it leaves KVM_RUN. */
		if (one_in(a, 4))
			pthread_kill(runners[any(a, ATTACKED_VCPUS)].thread,
				     SIGUSR1);
	}

	return NULL;
}

/* Kick the vCPUs, whatever attackers do, so that none is stuck. */
static void *rain(void *unused)
{
	struct attacker a = { .random = seed + 99 };

	while (!READ_ONCE(rain_quit)) {
		pthread_kill(runners[any(&a, ATTACKED_VCPUS)].thread, SIGUSR1);
		usleep(any(&a, 2000));
	}

	return NULL;
}

static struct attacker attackers[ATTACKERS];
static pthread_t rainmaker;

static void attack_start(void)
{
	uint32_t i;

	page_size = getpagesize();
	catch_signals();
	rv = ring_vm_create(ring_vm_min_entries(), ATTACKED_VCPUS, PAGES,
			    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	vm_fd = vm_get_fd(rv->vm);
	ring_pages = rv->entries * sizeof(struct kvm_dirty_gfn) / page_size;
	slot_mem = mmap(NULL, NR_SLOTS * SLOT_PAGES * page_size,
			PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1,
			0);
	TEST_ASSERT(slot_mem != MAP_FAILED, "mmap failed");
	for (i = 0; i < MAX_VCPUS; i++)
		vcpus[i].fd = -1;
	for (i = 0; i < ATTACKED_VCPUS; i++) {
		vcpus[i].fd = vcpu_find(rv->vm, i)->fd;
		vcpus[i].ring = vcpu_dirty_ring(rv->vm, i);
		ring_vm_set_task(rv, i, 0, PAGES, 1);
		ring_vm_task(rv, i)->spin = 1;
		ring_vm_runner_start(&runners[i], rv, i);
	}
	for (i = 0; i < ATTACKERS; i++) {
		attackers[i].random = seed + i;
		TEST_ASSERT(!pthread_create(&attackers[i].thread, NULL, attack,
					    &attackers[i]),
			    "pthread_create failed");
	}
	TEST_ASSERT(!pthread_create(&rainmaker, NULL, rain, NULL),
		    "pthread_create failed");
}

/* Harvest and reset what rings have, wherever it begins. */
static uint32_t take_all(void)
{
	uint32_t i, id;

	for (id = 0; id < MAX_VCPUS; id++) {
		for (i = 0; vcpus[id].ring && i < rv->entries; i++) {
			struct kvm_dirty_gfn *gfn = &vcpus[id].ring[i];

			if (dirty_gfn_is_dirty(gfn) &&
			    gfn->slot == RING_VM_SLOT &&
			    gfn->offset < rv->pages)
				rv->seen[gfn->offset]++;
			WRITE_ONCE(gfn->flags, KVM_DIRTY_GFN_F_RESET);
		}
	}
	return vm_reset_dirty_rings(rv->vm);
}

/* Pages that the guest writes at once: no ring gets full. */
#define PIECE	64

/*
 * After an attack on its entries a VMM does not know what is dirty. Start the
 * log anew: from then on it does.
 */
static void recover(void)
{
	uint64_t first, i, lost;
	uint32_t vcpu, round;

	for (vcpu = 0; vcpu < ATTACKED_VCPUS; vcpu++)
		ring_vm_runner_stop(&runners[vcpu]);
	ring_vm_set_slot(rv, RING_VM_GPA, rv->mem, PAGES * page_size, 0);
	while (take_all())
		;
	ring_vm_set_slot(rv, RING_VM_GPA, rv->mem, PAGES * page_size,
			 KVM_MEM_LOG_DIRTY_PAGES);
	/* Let the guest finish what it was doing. */
	for (vcpu = 0; vcpu < ATTACKED_VCPUS; vcpu++)
		while (ring_vm_run(rv, vcpu) != RING_VM_DONE)
			take_all();
	while (take_all())
		;

	/* Twice: the second time shows that resets protect again. */
	for (round = 0; round < 2; round++) {
		for (first = 0; first < PAGES; first += PIECE) {
			vcpu = first / PIECE % ATTACKED_VCPUS;
			ring_vm_forget(rv);
			ring_vm_write(rv, vcpu, first, PIECE);
			while (take_all())
				;
			for (i = 0, lost = 0; i < PIECE; i++)
				lost += !rv->seen[first + i];
			TEST_ASSERT(!lost,
				    "After the attack, %lu of %d pages from %lu on are lost, seed %u",
				    lost, PIECE, first, seed);
		}
	}
}

/*
 * Another VM of the same process, whose VMM behaves: the copy that it keeps by
 * its ring must be what its memory is.
 */
static struct {
	struct ring_vm *rv;
	struct ring_vm_runner runner;
	uint64_t copy[HONEST_PAGES];
	uint64_t entries;
} honest;

static uint64_t honest_page(uint64_t page)
{
	return READ_ONCE(*(uint64_t *)(honest.rv->mem + page * page_size));
}

static uint32_t honest_round(void)
{
	uint32_t n = ring_vm_collect(honest.rv);
	uint64_t i;

	for (i = 0; i < HONEST_PAGES; i++)
		if (honest.rv->seen[i])
			honest.copy[i] = honest_page(i);
	ring_vm_forget(honest.rv);
	honest.entries += n;
	return n;
}

static void honest_compare(void)
{
	uint64_t i, stale = 0;

	ring_vm_runner_stop(&honest.runner);
	while (honest_round())
		;
	for (i = 0; i < HONEST_PAGES; i++)
		stale += honest.copy[i] != honest_page(i);
	TEST_ASSERT(!stale, "%lu pages of the honest VM are lost, seed %u",
		    stale, seed);
	WRITE_ONCE(ring_vm_task(honest.rv, 0)->spin, 1);
	ring_vm_runner_start(&honest.runner, honest.rv, 0);
}

/* Was each call made? That takes its time on a slow machine. */
static bool storm_is_whole(const char **missing)
{
	uint32_t i;

	for (i = 0; i < NR_CALLS; i++) {
#ifndef __x86_64__
		if (i == SET_MSRS)
			continue;
#endif
		if (!READ_ONCE(counts[i].good) && !READ_ONCE(counts[i].bad)) {
			*missing = calls[i].name;
			return false;
		}
	}
	return true;
}

static void storm(void)
{
	const char *missing = NULL;
	struct timespec start;
	uint32_t i, rounds = 0;

	be_nobody();
	page_size = getpagesize();
	honest.rv = ring_vm_create(ring_vm_min_entries(), 1, HONEST_PAGES,
				   KVM_MEM_LOG_DIRTY_PAGES, NULL);
	ring_vm_set_task(honest.rv, 0, 0, HONEST_PAGES, 1);
	ring_vm_task(honest.rv, 0)->spin = 1;
	ring_vm_runner_start(&honest.runner, honest.rv, 0);

	attack_start();
	clock_gettime(CLOCK_MONOTONIC, &start);
	while (timespec_diff_now(start).tv_sec < seconds ||
	       (!storm_is_whole(&missing) &&
		timespec_diff_now(start).tv_sec < seconds + STORM_PATIENCE)) {
		honest_round();
		if (++rounds % 64 == 0)
			honest_compare();
	}
	WRITE_ONCE(quit, true);
	for (i = 0; i < ATTACKERS; i++)
		pthread_join(attackers[i].thread, NULL);
	WRITE_ONCE(rain_quit, true);
	pthread_join(rainmaker, NULL);
	honest_compare();
	ring_vm_runner_stop(&honest.runner);
	TEST_ASSERT(honest.entries, "The honest VM did nothing");
	recover();

	for (i = 0; i < NR_CALLS; i++)
		ksft_print_msg("%s: %lu times, and %lu times refused\n",
			       calls[i].name, counts[i].good, counts[i].bad);
	TEST_ASSERT(storm_is_whole(&missing), "%s was never called", missing);
	ring_vm_free(honest.rv);
}

/*
 * An end in the middle of it
 */

#define END_ROUNDS	6

static void end_vmm(int ready, bool by_itself, uint32_t ms)
{
	be_nobody();
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	attack_start();
	usleep(ms * 1000);
#ifdef __x86_64__
	/* More pages than the rings hold, whatever is reset meanwhile */
	ring_vm_write_by_ioctl(rv, 0, 0, PAGES);
#endif
	EXPECT(write(ready, "", 1), 1);
	if (by_itself)
		_exit(77);
	pause();
}

static void end(void)
{
	struct attacker a = { .random = seed };
	struct timespec start;
	int round, ready[2], status;
	bool by_itself;
	pid_t pid;
	char c;

	for (round = 0; round < END_ROUNDS; round++) {
		by_itself = round % 2;
		EXPECT(pipe(ready), 0);
		fflush(NULL);
		pid = fork();
		if (!pid)
			end_vmm(ready[1], by_itself, any(&a, 400));
		close(ready[1]);
		TEST_ASSERT(read(ready[0], &c, 1) == 1,
			    "The VMM ended early, seed %u", seed);
		clock_gettime(CLOCK_MONOTONIC, &start);
		if (!by_itself)
			kill(pid, SIGKILL);
		EXPECT(waitpid(pid, &status, 0), pid);
		if (by_itself)
			TEST_ASSERT(WIFEXITED(status) &&
				    WEXITSTATUS(status) == 77,
				    "The VMM ended with %#x, seed %u", status,
				    seed);
		else
			TEST_ASSERT(WIFSIGNALED(status) &&
				    WTERMSIG(status) == SIGKILL,
				    "The VMM ended with %#x, seed %u", status,
				    seed);
		/* Its children may hold on to the VM a bit longer. */
		while (vms_of(pid)) {
			TEST_ASSERT(timespec_diff_now(start).tv_sec < 20,
				    "A VM is left behind, seed %u", seed);
			usleep(1000);
		}
		close(ready[0]);
	}
}

/* What gets at the ring's pages by other ways than the process's page tables */

/* Parts of a vCPU's file, as far as the ring goes and further */
static const struct {
	int first;
	int pages;
} parts[] = {
	{ KVM_DIRTY_LOG_PAGE_OFFSET, 1 },
	{ KVM_DIRTY_LOG_PAGE_OFFSET, 4 },
	{ KVM_DIRTY_LOG_PAGE_OFFSET + 1, 3 },
	{ KVM_DIRTY_LOG_PAGE_OFFSET + 3, 2 },
	{ KVM_DIRTY_LOG_PAGE_OFFSET - 1, 2 },
	{ 0, KVM_DIRTY_LOG_PAGE_OFFSET + 1 },
	{ 0, KVM_DIRTY_LOG_PAGE_OFFSET + 4 },
};

struct pin {
	/* What is pinned, and as much other memory */
	uint8_t *map;
	uint8_t *copy;
	size_t size;
	pid_t pid;
	/* All of it is the ring, which does not change meanwhile. */
	bool exact;
	bool tried;
};

/* Expect the first @ret bytes of the copy to be those of the mapping. */
static void compare_pinned(struct pin *pin, const char *what, long ret)
{
	TEST_ASSERT(ret >= 0 || errno == EFAULT, "%s: %s", what,
		    strerror(errno));
	pin->tried = true;
	TEST_ASSERT(ret <= 0 || !pin->exact || !memcmp(pin->map, pin->copy, ret),
		    "%s: %ld other bytes than those of the ring", what, ret);
}

static void by_process_vm(struct pin *pin)
{
	struct iovec local = { pin->copy, page_size };
	struct iovec remote = { pin->copy, page_size };
	long ret;

	/* Not every kernel has it, or allows it. */
	if (process_vm_readv(pin->pid, &local, 1, &remote, 1, 0) == -1)
		return;

	local.iov_len = pin->size;
	remote.iov_len = pin->size;
	remote.iov_base = pin->map;
	ret = process_vm_readv(pin->pid, &local, 1, &remote, 1, 0);
	compare_pinned(pin, "process_vm_readv", ret);
	if (ret < (long)page_size)
		return;
	/* Write what was read: this is no attack on the VM. */
	local.iov_len = page_size;
	remote.iov_len = page_size;
	compare_pinned(pin, "process_vm_writev",
		       process_vm_writev(pin->pid, &local, 1, &remote, 1, 0));
}

static void *by_thread(void *pin)
{
	by_process_vm(pin);
	return NULL;
}

static void by_child(struct pin *pin)
{
	int status;
	pid_t pid;

	fflush(NULL);
	pid = fork();
	if (!pid) {
		by_process_vm(pin);
		_exit(0);
	}
	EXPECT(waitpid(pid, &status, 0), pid);
	TEST_ASSERT(WIFEXITED(status) && !WEXITSTATUS(status),
		    "A child ended with %#x", status);
}

static void by_pipe(struct pin *pin)
{
	struct iovec iov = { pin->map, page_size };
	int fds[2];
	long ret;

	EXPECT(pipe(fds), 0);
	ret = vmsplice(fds[1], &iov, 1, SPLICE_F_NONBLOCK);
	if (ret > 0)
		ret = read(fds[0], pin->copy, ret);
	compare_pinned(pin, "vmsplice", ret);
	close(fds[0]);
	close(fds[1]);
}

static void by_registered_buffer(struct pin *pin)
{
	struct iovec iov = { pin->map, pin->size };
	struct io_uring_params params = {};
	int fd = syscall(__NR_io_uring_setup, 1, &params);

	if (fd < 0)
		return;
	if (syscall(__NR_io_uring_register, fd, IORING_REGISTER_BUFFERS, &iov, 1))
		TEST_ASSERT(errno == EFAULT || errno == EOPNOTSUPP ||
			    errno == ENOMEM, "IORING_REGISTER_BUFFERS: %s",
			    strerror(errno));
	else
		EXPECT(syscall(__NR_io_uring_register, fd,
			       IORING_UNREGISTER_BUFFERS, NULL, 0), 0);
	close(fd);
}

static void by_file(struct pin *pin)
{
	static const char *const dirs[] = { "/tmp", "/var/tmp", "." };
	char name[64];
	int i, fd;

	for (i = 0; i < ARRAY_SIZE(dirs); i++) {
		snprintf(name, sizeof(name), "%s/ringXXXXXX", dirs[i]);
		fd = mkostemp(name, O_DIRECT);
		if (fd < 0)
			continue;
		unlink(name);
		if (pwrite(fd, pin->map, page_size, 0) == -1)
			TEST_ASSERT(errno == EFAULT || errno == EIO ||
				    errno == EINVAL || errno == ENOSPC,
				    "A direct write: %s", strerror(errno));
		else if (pread(fd, pin->map, page_size, 0) == -1)
			TEST_ASSERT(errno == EFAULT || errno == EIO ||
				    errno == EINVAL, "A direct read: %s",
				    strerror(errno));
		close(fd);
	}
}

static void pinned(void)
{
	struct kvm_dirty_gfn *ring;
	pthread_t thread;
	struct pin pin;
	bool tried = false;
	int i, vcpu;

	be_nobody();
	page_size = getpagesize();
	rv = ring_vm_create(4 * page_size / sizeof(*ring), 1, PAGES,
			    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	vcpu = vcpu_find(rv->vm, 0)->fd;
	ring = vcpu_dirty_ring(rv->vm, 0);
	ring_vm_write(rv, 0, 0, 100);

	for (i = 0; i < ARRAY_SIZE(parts); i++) {
		memset(&pin, 0, sizeof(pin));
		pin.pid = getpid();
		pin.size = parts[i].pages * page_size;
		pin.exact = parts[i].first >= KVM_DIRTY_LOG_PAGE_OFFSET;
		pin.map = mmap(NULL, pin.size, PROT_READ | PROT_WRITE,
			       MAP_SHARED, vcpu, parts[i].first * page_size);
		pin.copy = mmap(NULL, pin.size, PROT_READ | PROT_WRITE,
				MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		TEST_ASSERT(pin.map != MAP_FAILED && pin.copy != MAP_FAILED,
			    "mmap failed");
		by_process_vm(&pin);
		TEST_ASSERT(!pthread_create(&thread, NULL, by_thread, &pin),
			    "pthread_create failed");
		pthread_join(thread, NULL);
		by_child(&pin);
		by_pipe(&pin);
		by_registered_buffer(&pin);
		by_file(&pin);
		tried |= pin.tried;
		EXPECT(munmap(pin.map, pin.size), 0);
		EXPECT(munmap(pin.copy, pin.size), 0);
	}
	TEST_ASSERT(tried, "This kernel has no way to these pages");

	/* The ring is what it was. */
	EXPECT(ring_vm_collect(rv), 100);
	ring_vm_expect(rv, 0, 100);
	ring_vm_write(rv, 0, 0, 100);
	EXPECT(ring_vm_collect(rv), 100);
	ring_vm_expect(rv, 0, 100);
	ring_vm_free(rv);
}

static const struct test_case cases[] = {
	{ "storm: calls return what they may, and nothing is lost", storm },
	{ "end: killed, or of itself, in the middle of that", end },
	{ "pinned: the kernel's own ways to the ring's pages", pinned },
};

/* Take option @c and its number off the command line, if it is there. */
static bool take_option(int *argc, char **argv, char c, uint32_t *value)
{
	int i;

	for (i = 1; i + 1 < *argc; i++) {
		if (argv[i][0] != '-' || argv[i][1] != c || argv[i][2])
			continue;
		*value = strtoul(argv[i + 1], NULL, 0);
		*argc -= 2;
		memmove(&argv[i], &argv[i + 2],
			(*argc - i + 1) * sizeof(*argv));
		return true;
	}
	return false;
}

int main(int argc, char **argv)
{
	struct timespec now;

	clock_gettime(CLOCK_REALTIME, &now);
	if (!take_option(&argc, argv, 's', &seed))
		seed = now.tv_sec ^ now.tv_nsec;
	take_option(&argc, argv, 't', &seconds);
	dirty_ring_check_supported();
	setbuf(stdout, NULL);
	printf("# seed %u, for %u s (-s seed, -t seconds)\n", seed, seconds);
	open_door();
	test_cases_main(argc, argv, cases, ARRAY_SIZE(cases));
}
