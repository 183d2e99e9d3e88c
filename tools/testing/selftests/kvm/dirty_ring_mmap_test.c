// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test how KVM's dirty ring is mapped, and the memory it takes
 *
 * Show, one case each, that
 *  - a ring can be mapped shared and not executable, and in no other way,
 *  - a mapping goes no further than the ring, and outlives the vCPU's file
 *    descriptor,
 *  - a ring has no huge page, even if shared memory has,
 *  - the memory of rings is charged to the memory cgroup, may run out, is not
 *    reclaimed, and is freed.
 *
 * What the rest of the kernel does with a mapping is in dirty_ring_map_test.
 */

#define _GNU_SOURCE /* for mremap */

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "test_util.h"
#include "kvm_util.h"
#include "dirty_ring_vm.h"
#include "test_cases.h"

/*
 * Mappings of the ring
 */

#define RING_PAGES	16

static sigjmp_buf touch_env;

static void touch_failed(int sig)
{
	siglongjmp(touch_env, sig);
}

/* Read a byte; return the signal that this gave, or 0. */
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

/* Parts of a vCPU's mapping with a page of the ring, and without */
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
	int vcpu = vcpu_fd_create(RING_PAGES);
	uint8_t *whole, *part, *p;

	whole = vcpu_fd_map(vcpu, 0, RING_PAGE + RING_PAGES,
			    PROT_READ | PROT_WRITE, MAP_SHARED);
	p = whole + RING_PAGE * getpagesize();
	for (i = 0; i < size; i++)
		TEST_ASSERT(!p[i], "A new ring is not empty");

	for (i = 0; i < ARRAY_SIZE(with_ring); i++) {
		vcpu_fd_map(vcpu, with_ring[i].first, with_ring[i].pages,
			    PROT_READ | PROT_WRITE, MAP_SHARED);
		vcpu_fd_map(vcpu, with_ring[i].first, with_ring[i].pages,
			    PROT_READ, MAP_SHARED);
	}

	/* All of them map the same memory. */
	part = vcpu_fd_map(vcpu, RING_PAGE + 5, 1, PROT_READ, MAP_SHARED);
	WRITE_ONCE(p[5 * getpagesize() + 3], 0x5a);
	EXPECT(READ_ONCE(part[3]), 0x5a);
}

/* No mapping that has a page of the ring may be made so. */
static void refuse_with_ring(int vcpu, const int *prots, int nr, int flags)
{
	int i, j;

	for (i = 0; i < ARRAY_SIZE(with_ring); i++)
		for (j = 0; j < nr; j++)
			EXPECT_ERROR(vcpu_fd_try_map(vcpu, with_ring[i].first,
						     with_ring[i].pages,
						     prots[j], flags),
				     EINVAL);
}

static void map_executable(void)
{
	static const int prots[] = {
		PROT_EXEC, PROT_READ | PROT_EXEC,
		PROT_READ | PROT_WRITE | PROT_EXEC,
	};
	int vcpu = vcpu_fd_create(RING_PAGES);

	refuse_with_ring(vcpu, prots, ARRAY_SIZE(prots), MAP_SHARED);
}

static void map_private(void)
{
	static const int prots[] = {
		PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE,
	};
	int vcpu = vcpu_fd_create(RING_PAGES);
	int i, j;

	refuse_with_ring(vcpu, prots, ARRAY_SIZE(prots), MAP_PRIVATE);
	for (i = 0; i < ARRAY_SIZE(without_ring); i++)
		for (j = 0; j < ARRAY_SIZE(prots); j++)
			vcpu_fd_map(vcpu, without_ring[i].first,
				    without_ring[i].pages, prots[j],
				    MAP_PRIVATE);
}

static void map_mprotect(void)
{
	int vcpu = vcpu_fd_create(RING_PAGES);
	int i, page = getpagesize(), end;
	uint8_t *p;

	for (i = 0; i < ARRAY_SIZE(with_ring); i++) {
		end = with_ring[i].pages - 1;
		p = vcpu_fd_map(vcpu, with_ring[i].first, with_ring[i].pages,
				PROT_READ | PROT_WRITE, MAP_SHARED);
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
	int vcpu = vcpu_fd_create(RING_PAGES);
	int page = getpagesize();
	uint8_t *p;

	p = vcpu_fd_map(vcpu, RING_PAGE - 1, 1, PROT_READ | PROT_WRITE,
			MAP_PRIVATE);
	p = mremap(p, page, 2 * page, MREMAP_MAYMOVE);
	TEST_ASSERT(p == MAP_FAILED || touch(p + page),
		    "A private mapping grew over the ring");

	p = vcpu_fd_map(vcpu, RING_PAGE - 1, 1, PROT_READ, MAP_SHARED);
	p = mremap(p, page, 2 * page, MREMAP_MAYMOVE);
	TEST_ASSERT(p == MAP_FAILED ||
		    mprotect(p, 2 * page, PROT_READ | PROT_EXEC) ||
		    touch(p + page),
		    "An executable mapping grew over the ring");
}

static void map_past_ring(void)
{
	int vcpu = vcpu_fd_create(RING_PAGES);
	int i, page = getpagesize();
	uint8_t *p;

	p = vcpu_fd_map(vcpu, 0, 200, PROT_READ | PROT_WRITE, MAP_SHARED);
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
	int vcpu = vcpu_fd_create(0);
	int i, page = getpagesize();
	uint8_t *p;

	for (i = 0; i < ARRAY_SIZE(with_ring); i++)
		vcpu_fd_map(vcpu, with_ring[i].first, with_ring[i].pages,
			    PROT_READ, MAP_PRIVATE);

	p = vcpu_fd_map(vcpu, RING_PAGE, RING_PAGES, PROT_READ, MAP_SHARED);
	for (i = 0; i < RING_PAGES; i++)
		EXPECT(touch(p + i * page), SIGBUS);
}

static void map_outlives_vcpu(void)
{
	int vcpu = vcpu_fd_create(RING_PAGES);
	int i, page = getpagesize();
	uint8_t *p;

	p = vcpu_fd_map(vcpu, RING_PAGE, RING_PAGES, PROT_READ | PROT_WRITE,
			MAP_SHARED);
	close(vcpu);
	for (i = 0; i < RING_PAGES; i++)
		EXPECT(touch(p + i * page), 0);
	EXPECT(munmap(p + 3 * page, 5 * page), 0);
	EXPECT(touch(p + 2 * page), 0);
	EXPECT(munmap(p, RING_PAGES * page), 0);
}

#define THP	"/sys/kernel/mm/transparent_hugepage/"

/* Read a file of the kernel's, or write @value to it. */
static void kernel_file(const char *path, char *buf, size_t size,
			const char *value)
{
	int fd = open(path, value ? O_WRONLY : O_RDONLY);
	ssize_t ret;

	if (fd < 0)
		test_case_skip("%s: %s", path, strerror(errno));
	if (value) {
		EXPECT(write(fd, value, strlen(value)), strlen(value));
	} else {
		ret = read(fd, buf, size - 1);
		TEST_ASSERT(ret > 0, "%s: %s", path, strerror(errno));
		buf[ret] = '\0';
	}
	close(fd);
}

/*
 * Map a vCPU from page 0 on, as a huge page would be mapped, and touch a page
 * of the ring before all others.
 */
static void expect_small_pages(size_t huge)
{
	int page = getpagesize(), end = RING_PAGE + RING_MAX_SIZE / page, i;
	int vcpu = vcpu_fd_create(RING_MAX_SIZE / page);
	uint8_t *small, *big;

	small = vcpu_fd_map(vcpu, 0, end, PROT_READ | PROT_WRITE, MAP_SHARED);
	big = mmap(NULL, 2 * huge, PROT_NONE,
		   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	TEST_ASSERT(big != MAP_FAILED, "mmap: %s", strerror(errno));
	big += -(uintptr_t)big & (huge - 1);
	big = mmap(big, huge, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
		   vcpu, 0);
	TEST_ASSERT(big != MAP_FAILED, "mmap: %s", strerror(errno));

	for (i = 0; i < end; i++) {
		/* The end of a page of struct kvm_run is not in use. */
		if (i < VCPU_MMAP_PAGES || i >= RING_PAGE)
			WRITE_ONCE(small[(i + 1) * page - 1], i % 255 + 1);
	}

	EXPECT(touch(big + RING_PAGE * page), 0);
	for (i = 0; i < huge / page; i++) {
		if (i < VCPU_MMAP_PAGES || (i >= RING_PAGE && i < end)) {
			EXPECT(touch(big + i * page), 0);
			TEST_ASSERT(big[(i + 1) * page - 1] == i % 255 + 1,
				    "Another page is mapped at page %d", i);
		} else {
			EXPECT(touch(big + i * page), SIGBUS);
		}
	}
}

static void map_huge(void)
{
	static const char * const settings[] = { "always", "force" };
	char buf[128], *old, *end;
	int i, status = 0;
	size_t huge;
	pid_t pid;

	kernel_file(THP "hpage_pmd_size", buf, sizeof(buf), NULL);
	huge = atol(buf);
	kernel_file(THP "shmem_enabled", buf, sizeof(buf), NULL);
	old = strchr(buf, '[');
	end = strchr(buf, ']');
	TEST_ASSERT(old && end, "shmem_enabled is %s", buf);
	old++;
	*end = '\0';

	for (i = 0; i < ARRAY_SIZE(settings) && !status; i++) {
		kernel_file(THP "shmem_enabled", NULL, 0, settings[i]);
		pid = fork();
		if (!pid) {
			expect_small_pages(huge);
			exit(0);
		}
		waitpid(pid, &status, 0);
	}

	kernel_file(THP "shmem_enabled", NULL, 0, old);
	if (status)
		exit(WIFEXITED(status) ? WEXITSTATUS(status) : 1);
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
		EXPECT(vm_fd_enable(vm, dirty_ring_cap(), ring_size, 0), 0);
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
	with = vcpus_cost(RING_MAX_SIZE, 8);
	/* Each CPU charges 32 pages ahead, and keeps what is left. */
	least = getpagesize() > 4096 ? 4 : 7;
	TEST_ASSERT(with - without > least * RING_MAX_SIZE,
		    "8 vCPUs cost %ld bytes with, %ld without rings of 1 MiB",
		    with, without);
}

static void memory_is_charged(void)
{
	in_cgroup(charge);
}

/*
 * Processes of the cgroup that the OOM killer killed; a ring is not worth one.
 */
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

/* Wait until less memory than that of @rings is left; it is freed late. */
static void expect_freed(long before, int rings, const char *what)
{
	long usage = 0;
	int tries;

	for (tries = 0; tries < 50; tries++) {
		usage = cgroup_file("memory.usage_in_bytes", NULL);
		if (usage < before + rings * (long)RING_MAX_SIZE)
			return;
		usleep(100000);
	}
	TEST_FAIL("%ld bytes are left of %s", usage - before, what);
}

static void exhaust(void)
{
	long usage, before;
	int vm, i, fd, tries;
	char limit[32];

	/* Then the inode of a ring, say, may be what finds no room. */
	if (getpagesize() > 4096)
		test_case_skip("CPUs charge %d KiB ahead, as much as two rings",
			       32 * getpagesize() / 1024);

	/* Have allocated what is allocated only once. */
	vcpus_cost(RING_MAX_SIZE, 1);

	before = cgroup_file("memory.usage_in_bytes", NULL);
	vm = vm_fd_create();
	EXPECT(vm_fd_enable(vm, dirty_ring_cap(), RING_MAX_SIZE, 0), 0);
	usage = cgroup_file("memory.usage_in_bytes", NULL);
	sprintf(limit, "%ld", usage + 3 * (long)RING_MAX_SIZE);
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
	/* Try often: a leak would show below. */
	for (tries = 0; tries < 20; tries++)
		EXPECT_ERROR(ioctl(vm, KVM_CREATE_VCPU, i), ENOMEM);

	EXPECT(oom_kills(), 0);

	/* The VM still works, and the id is free. */
	sprintf(limit, "%ld", usage + 8 * (long)RING_MAX_SIZE);
	EXPECT(cgroup_file("memory.limit_in_bytes", limit), 0);
	fd = ioctl(vm, KVM_CREATE_VCPU, i);
	TEST_ASSERT(fd >= 0, "KVM_CREATE_VCPU: %s", strerror(errno));
	EXPECT(touch(vcpu_fd_map(fd, RING_PAGE, 1, PROT_READ, MAP_SHARED)), 0);
	EXPECT(ioctl(vm, KVM_RESET_DIRTY_RINGS, 0), 0);

	/* The VM lives as long as a mapping or a file of a vCPU does. */
	for (i = 3; i < 256; i++)
		close(i);
	expect_freed(before, 8, "20 rings that failed");
}

static void memory_runs_out(void)
{
	in_cgroup(exhaust);
}

/* Rings, the overflow, and what was not wanted: all of it is freed. */
static void come_and_go(void)
{
	int i, vm, vcpu, tries;
	long before = 0;

	for (i = 0; i < 101; i++) {
		vm = vm_fd_create();
		EXPECT(vm_fd_enable(vm, dirty_ring_cap(), RING_MAX_SIZE, 0), 0);
		for (tries = 0; tries < 10; tries++)
			EXPECT_ERROR(vm_fd_enable(vm, dirty_ring_cap(),
						  RING_MAX_SIZE, 0),
				     EINVAL);
		vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
		TEST_ASSERT(vcpu >= 0, "No vCPU");
		close(vcpu);
		close(vm);
		if (!i)
			before = cgroup_file("memory.usage_in_bytes", NULL);
	}
	if (before < 0)
		test_case_skip("memory is not accounted");

	/* A leak of any of the three is more than this. */
	expect_freed(before, 4, "100 VMs");
}

static void memory_is_freed(void)
{
	in_cgroup(come_and_go);
}

static void reclaim(void)
{
	int vcpu = vcpu_fd_create(RING_PAGES), page = getpagesize(), i;
	uint8_t *p;

	p = vcpu_fd_map(vcpu, RING_PAGE, RING_PAGES, PROT_READ | PROT_WRITE,
			MAP_SHARED);
	for (i = 0; i < RING_PAGES; i++)
		WRITE_ONCE(p[i * page], i + 1);
	EXPECT(munmap(p, RING_PAGES * page), 0);

	/* All that can be reclaimed */
	if (cgroup_file("memory.force_empty", "0"))
		test_case_skip("memory.force_empty: %s", strerror(errno));

	p = vcpu_fd_map(vcpu, RING_PAGE, RING_PAGES, PROT_READ, MAP_SHARED);
	for (i = 0; i < RING_PAGES; i++)
		EXPECT(p[i * page], i + 1);
}

static void memory_stays(void)
{
	in_cgroup(reclaim);
}

static const struct test_case cases[] = {
	{ "map-shared", map_shared },
	{ "map-executable: EINVAL", map_executable },
	{ "map-private: EINVAL", map_private },
	{ "map-mprotect: never executable", map_mprotect },
	{ "map-mremap: does not get around that", map_mremap },
	{ "map-past-ring: SIGBUS", map_past_ring },
	{ "map-without-ring: SIGBUS", map_without_ring },
	{ "map-outlives-vcpu", map_outlives_vcpu },
	{ "map-huge: no huge page, even if shared memory has", map_huge },
	{ "memory-charged: to the memory cgroup", memory_is_charged },
	{ "memory-runs-out: ENOMEM, no leak, the VM goes on",
	  memory_runs_out },
	{ "memory-freed: all of it", memory_is_freed },
	{ "memory-stays: when it is reclaimed, and nothing maps it",
	  memory_stays },
};

int main(int argc, char **argv)
{
	dirty_ring_check_supported();
	test_cases_main(argc, argv, cases, ARRAY_SIZE(cases));
}
