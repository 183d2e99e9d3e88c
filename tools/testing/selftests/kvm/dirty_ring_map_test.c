// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test what else the kernel does with memory that is a mapped dirty ring
 *
 * Show, one case each, that other parts of the kernel, which look for the pages
 * behind an address, get those of the ring and of the vCPU's run page, or an
 * error where there is no page, wherever a mapping of the vCPU begins and ends:
 *  - a process that reads or writes another's memory,
 *  - a debugger,
 *  - direct I/O, a pipe that keeps pages, and io_uring,
 *  - mlock(), fork(), mremap(), madvise(),
 *  - a core dump,
 *  - all of that for a user who has nothing but /dev/kvm.
 */

#define _GNU_SOURCE /* for process_vm_readv, vmsplice, mremap */

#include <dirent.h>
#include <fcntl.h>
#include <grp.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>

#include "test_util.h"
#include "kvm_util.h"
#include "dirty_ring_vm.h"
#include "test_cases.h"

/* The same on all architectures, and not in all headers */
#ifndef __NR_io_uring_setup
#define __NR_io_uring_setup	425
#define __NR_io_uring_register	427
#endif

#define RING_PAGES	16

static const struct {
	int first;
	int pages;
} ranges[] = {
	{ 0, 1 },
	{ 0, VCPU_MMAP_PAGES },
	{ 0, RING_PAGE },
	{ 0, RING_PAGE + 1 },
	{ 0, RING_PAGE + RING_PAGES },
	{ 0, 200 },
	{ 1, RING_PAGE },
	{ VCPU_MMAP_PAGES, 2 },
	{ RING_PAGE - 1, 1 },
	{ RING_PAGE - 1, 2 },
	{ RING_PAGE - 1, RING_PAGES + 2 },
	{ RING_PAGE, 1 },
	{ RING_PAGE, RING_PAGES },
	{ RING_PAGE, 100 },
	{ RING_PAGE + 5, 3 },
	{ RING_PAGE + RING_PAGES - 1, 1 },
	{ RING_PAGE + RING_PAGES - 1, 2 },
	{ RING_PAGE + RING_PAGES, 4 },
};

static size_t page;
/* The mapping that is tried, and its first page's number in the vCPU's file */
static uint8_t *mem;
static int mem_first, mem_pages;

static uint8_t *map_ring(int vcpu)
{
	return vcpu_fd_map(vcpu, RING_PAGE, RING_PAGES, PROT_READ | PROT_WRITE,
			   MAP_SHARED);
}

static bool in_ring(int nr)
{
	return nr >= RING_PAGE && nr < RING_PAGE + RING_PAGES;
}

static bool has_page(int nr)
{
	return nr < VCPU_MMAP_PAGES || in_ring(nr);
}

/* What a page of the ring begins with */
static uint64_t pattern(int nr)
{
	return 0x5241474e49470000ULL + nr;
}

static void fill(uint8_t *ring)
{
	int i;

	for (i = 0; i < RING_PAGES; i++)
		*(uint64_t *)(ring + i * page) = pattern(RING_PAGE + i);
}

/* Call @fn for each of the mappings twice: not touched yet, and touched. */
static void with_each_range(void (*fn)(uint8_t *ring))
{
	int vcpu = vcpu_fd_create(RING_PAGES), i;
	uint8_t *ring = map_ring(vcpu);

	fill(ring);
	for (i = 0; i < ARRAY_SIZE(ranges); i++) {
		mem_first = ranges[i].first;
		mem_pages = ranges[i].pages;
		mem = vcpu_fd_map(vcpu, mem_first, mem_pages,
				  PROT_READ | PROT_WRITE, MAP_SHARED);
		fn(ring);
		fn(ring);
		EXPECT(munmap(mem, mem_pages * page), 0);
	}
	EXPECT(munmap(ring, RING_PAGES * page), 0);
	close(vcpu);
}

/*
 * Another process
 */

/* Fork a child that stops, traced or not, with the same memory. */
static pid_t child_start(bool traced)
{
	pid_t pid = fork();

	TEST_ASSERT(pid >= 0, "fork: %s", strerror(errno));
	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (traced)
			ptrace(PTRACE_TRACEME, 0, 0, 0);
		raise(SIGSTOP);
		_exit(0);
	}
	EXPECT(waitpid(pid, NULL, WUNTRACED), pid);
	return pid;
}

static void child_end(pid_t pid)
{
	EXPECT(kill(pid, SIGKILL), 0);
	EXPECT(waitpid(pid, NULL, 0), pid);
}

static ssize_t vm_io(pid_t pid, bool write, void *local, void *remote,
		     size_t len)
{
	struct iovec l = { local, len }, r = { remote, len };
	ssize_t ret;

	ret = write ? process_vm_writev(pid, &l, 1, &r, 1, 0) :
		      process_vm_readv(pid, &l, 1, &r, 1, 0);
	return ret < 0 ? -errno : ret;
}

static void readv_pages(pid_t pid)
{
	static uint8_t buf[300 << 16];
	int i, n;

	for (i = 0; i < mem_pages; i++) {
		buf[0] = 0;
		EXPECT(vm_io(pid, false, buf, mem + i * page, page),
		       has_page(mem_first + i) ? page : -EFAULT);
		if (in_ring(mem_first + i))
			EXPECT(*(uint64_t *)buf == pattern(mem_first + i), 1);
	}

	/* All in one call: up to the first page that is not there */
	for (n = 0; n < mem_pages && has_page(mem_first + n); n++)
		;
	EXPECT(vm_io(pid, false, buf, mem, mem_pages * page),
	       n ? n * page : -EFAULT);
}

static void readv_range(uint8_t *ring)
{
	pid_t pid;

	readv_pages(getpid());
	pid = child_start(false);
	readv_pages(pid);
	child_end(pid);
}

static void vm_readv(void)
{
	with_each_range(readv_range);
}

static void writev_range(uint8_t *ring)
{
	static uint64_t number = 1000;
	pid_t pids[2];
	int i, j, nr;

	pids[0] = getpid();
	pids[1] = child_start(false);
	for (j = 0; j < 2; j++) {
		for (i = 0; i < mem_pages; i++) {
			nr = mem_first + i;
			if (nr < VCPU_MMAP_PAGES)
				continue;
			number++;
			EXPECT(vm_io(pids[j], true, &number,
				     mem + i * page + 8, 8),
			       has_page(nr) ? 8 : -EFAULT);
			if (in_ring(nr))
				EXPECT(*(uint64_t *)(ring + 8 +
						     (nr - RING_PAGE) * page),
				       number);
		}
	}
	child_end(pids[1]);
}

static void vm_writev(void)
{
	with_each_range(writev_range);
}

static void trace_range(uint8_t *ring)
{
	pid_t pid = child_start(true);
	char path[64];
	uint64_t word;
	int i, nr, fd;
	long ret;

	snprintf(path, sizeof(path), "/proc/%d/mem", pid);
	fd = open(path, O_RDWR);
	TEST_ASSERT(fd >= 0, "%s: %s", path, strerror(errno));

	for (i = 0; i < mem_pages; i++) {
		nr = mem_first + i;
		if (!has_page(nr)) {
			EXPECT_ERROR(ptrace(PTRACE_PEEKDATA, pid,
					    mem + i * page, 0), EIO);
			EXPECT_ERROR(pread(fd, &word, 8,
					   (uintptr_t)mem + i * page), EIO);
			continue;
		}
		errno = 0;
		ret = ptrace(PTRACE_PEEKDATA, pid, mem + i * page, 0);
		TEST_ASSERT(!errno, "PTRACE_PEEKDATA of page %d: %s", nr,
			    strerror(errno));
		EXPECT(pread(fd, &word, 8, (uintptr_t)mem + i * page), 8);
		if (!in_ring(nr))
			continue;
		EXPECT(ret == pattern(nr) && word == pattern(nr), 1);
		EXPECT(ptrace(PTRACE_POKEDATA, pid, mem + i * page + 16,
			      nr + 1L), 0);
		EXPECT(*(uint64_t *)(ring + (nr - RING_PAGE) * page + 16),
		       nr + 1);
		word = nr + 2;
		EXPECT(pwrite(fd, &word, 8, (uintptr_t)mem + i * page + 24), 8);
		EXPECT(*(uint64_t *)(ring + (nr - RING_PAGE) * page + 24),
		       nr + 2);
	}
	close(fd);
	child_end(pid);
}

static void debugger(void)
{
	with_each_range(trace_range);
}

/*
 * I/O
 */

/* Put into @path a file, or a block device, that takes direct I/O. */
static bool find_direct(char *path, size_t size)
{
	DIR *dir = opendir("/sys/block");
	struct dirent *d;
	bool found;
	int fd;

	snprintf(path, size, "/proc/self/exe");
	do {
		fd = open(path, O_RDONLY | O_DIRECT);
		found = fd >= 0 && lseek(fd, 0, SEEK_END) >= 4 * page &&
			pread(fd, mem, page, 0) == page;
		if (fd >= 0)
			close(fd);
		while (!found && dir && (d = readdir(dir)) &&
		       d->d_name[0] == '.')
			;
		if (!found && dir && d)
			snprintf(path, size, "/dev/%s", d->d_name);
	} while (!found && dir && d);

	if (dir)
		closedir(dir);
	return found;
}

static char direct_path[300];

static void direct_range(uint8_t *ring)
{
	static uint8_t buf[1 << 16];
	int fd = open(direct_path, O_RDONLY);
	int direct = open(direct_path, O_RDONLY | O_DIRECT);
	int i, nr;

	TEST_ASSERT(fd >= 0 && direct >= 0, "%s: %s", direct_path,
		    strerror(errno));
	for (i = 0; i < mem_pages; i++) {
		nr = mem_first + i;
		if (nr < VCPU_MMAP_PAGES)
			continue;
		if (!has_page(nr)) {
			EXPECT_ERROR(pread(direct, mem + i * page, page,
					   nr % 4 * page), EFAULT);
			continue;
		}
		EXPECT(pread(direct, mem + i * page, page, nr % 4 * page),
		       page);
		EXPECT(pread(fd, buf, page, nr % 4 * page), page);
		EXPECT(memcmp(buf, ring + (nr - RING_PAGE) * page, page), 0);
	}
	close(fd);
	close(direct);
}

static void direct_io(void)
{
	mem = mmap(NULL, page, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (!find_direct(direct_path, sizeof(direct_path)))
		test_case_skip("nothing that can be read directly");
	with_each_range(direct_range);
}

static void splice_range(uint8_t *ring)
{
	unsigned int flags;
	int fds[2], i, nr;
	uint64_t word;

	EXPECT(pipe(fds), 0);
	for (i = 0; i < mem_pages; i++) {
		struct iovec iov = { mem + i * page, 8 };

		nr = mem_first + i;
		flags = nr & 1 ? SPLICE_F_GIFT : 0;
		if (!has_page(nr)) {
			EXPECT_ERROR(vmsplice(fds[1], &iov, 1, flags), EFAULT);
			continue;
		}
		EXPECT(vmsplice(fds[1], &iov, 1, flags), 8);
		EXPECT(read(fds[0], &word, 8), 8);
		if (in_ring(nr))
			EXPECT(word == pattern(nr), 1);
	}
	close(fds[0]);
	close(fds[1]);
}

/* The pipe keeps the pages when vCPU and ring are gone. */
static void splice_outlives(void)
{
	int vcpu = vcpu_fd_create(RING_PAGES), fds[2], i;
	uint8_t *ring = map_ring(vcpu), *buf = malloc(page);
	struct iovec iov = { ring, 8 * page };

	fill(ring);
	EXPECT(pipe(fds), 0);
	EXPECT(vmsplice(fds[1], &iov, 1, 0), 8 * page);
	EXPECT(munmap(ring, RING_PAGES * page), 0);
	close(vcpu);
	for (i = 0; i < 8; i++) {
		EXPECT(read(fds[0], buf, page), page);
		EXPECT(*(uint64_t *)buf == pattern(RING_PAGE + i), 1);
	}
	free(buf);
	close(fds[0]);
	close(fds[1]);
}

static void pipes(void)
{
	with_each_range(splice_range);
	splice_outlives();
}

/*
 * This kernel's io_uring refuses fixed buffers that are neither anonymous
 * memory nor huge pages, but pins them first.
 */
static void uring_range(uint8_t *ring)
{
	uint64_t params[15];
	struct iovec iov;
	int fd, i, ret;

	for (i = 0; i < mem_pages; i++) {
		memset(params, 0, sizeof(params));
		fd = syscall(__NR_io_uring_setup, 4, params);
		if (fd < 0)
			test_case_skip("no io_uring: %s", strerror(errno));
		iov.iov_base = mem + i * page;
		iov.iov_len = page;
		errno = 0;
		ret = syscall(__NR_io_uring_register, fd,
			      0 /* IORING_REGISTER_BUFFERS */, &iov, 1);
		TEST_ASSERT(has_page(mem_first + i) ?
			    !ret || errno == EOPNOTSUPP : errno == EFAULT,
			    "Page %d as a fixed buffer: got %d (%s)",
			    mem_first + i, ret, strerror(errno));
		close(fd);
	}
}

static void io_uring(void)
{
	with_each_range(uring_range);
}

/*
 * Memory management
 */

static void expect_pattern(uint8_t *p, int nr)
{
	uint64_t word = READ_ONCE(*(uint64_t *)p);

	TEST_ASSERT(word == pattern(nr), "Page %d has %#lx, want %#lx", nr,
		    word, pattern(nr));
}

static void lock_ring(void)
{
	int vcpu = vcpu_fd_create(RING_PAGES);
	uint8_t *p, *q;
	int i;

	p = vcpu_fd_map(vcpu, RING_PAGE, 4, PROT_READ | PROT_WRITE, MAP_SHARED);
	fill(map_ring(vcpu));
	EXPECT(mlock(p, 4 * page), 0);
	for (i = 0; i < 4; i++)
		expect_pattern(p + i * page, RING_PAGE + i);
	EXPECT(munlock(p + page, 2 * page), 0);
	EXPECT(mlock2(p, page, MLOCK_ONFAULT), 0);
	EXPECT(munmap(p + page, page), 0);
	EXPECT(munlockall(), 0);

	q = vcpu_fd_map(vcpu, RING_PAGE, 4, PROT_READ,
			MAP_SHARED | MAP_POPULATE);
	expect_pattern(q + 3 * page, RING_PAGE + 3);
	close(vcpu);
}

static void fork_range(uint8_t *ring)
{
	int i, status;
	pid_t pid = fork();

	if (!pid) {
		for (i = 0; i < mem_pages; i++) {
			if (!in_ring(mem_first + i))
				continue;
			expect_pattern(mem + i * page, mem_first + i);
			WRITE_ONCE(*(uint64_t *)(mem + i * page + 32),
				   mem_first + i);
		}
		_exit(0);
	}
	EXPECT(waitpid(pid, &status, 0), pid);
	EXPECT(status, 0);
	for (i = 0; i < mem_pages; i++) {
		if (in_ring(mem_first + i))
			EXPECT(*(uint64_t *)(mem + i * page + 32),
			       mem_first + i);
	}
}

static void forks(void)
{
	with_each_range(fork_range);
}

static void move_ring(void)
{
	int vcpu = vcpu_fd_create(RING_PAGES);
	uint8_t *p = map_ring(vcpu), *q, *r;

	fill(p);
	r = mmap(NULL, RING_PAGES * page, PROT_NONE,
		 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	q = mremap(p, RING_PAGES * page, RING_PAGES * page,
		   MREMAP_MAYMOVE | MREMAP_FIXED, r);
	EXPECT(q == r, 1);
	expect_pattern(q, RING_PAGE);
	expect_pattern(q + 15 * page, RING_PAGE + 15);

	/* A second mapping of the same, and a smaller one */
	p = mremap(q, 0, 2 * page, MREMAP_MAYMOVE);
	if (p != MAP_FAILED) {
		expect_pattern(p + page, RING_PAGE + 1);
		EXPECT(munmap(p, 2 * page), 0);
	}
	p = mremap(q, RING_PAGES * page, 4 * page, 0);
	EXPECT(p == q, 1);
	expect_pattern(p + 3 * page, RING_PAGE + 3);

	/* Never more */
	EXPECT_ERROR(mremap(p, 4 * page, 5 * page, MREMAP_MAYMOVE), EFAULT);

	/* Dropped or taken apart, its contents stay. */
	EXPECT(madvise(p, 4 * page, MADV_DONTNEED), 0);
	expect_pattern(p + 2 * page, RING_PAGE + 2);
	madvise(p, 4 * page, MADV_PAGEOUT);
	madvise(p, 4 * page, MADV_COLD);
	expect_pattern(p + 2 * page, RING_PAGE + 2);
	EXPECT(madvise(p, 4 * page, MADV_REMOVE), -1);
	expect_pattern(p + 2 * page, RING_PAGE + 2);
	EXPECT(mprotect(p + page, page, PROT_NONE), 0);
	EXPECT(munmap(p, page), 0);
	expect_pattern(p + 2 * page, RING_PAGE + 2);
	EXPECT(mprotect(p + page, page, PROT_READ), 0);
	expect_pattern(p + page, RING_PAGE + 1);
	close(vcpu);
}

/*
 * A core dump
 */

/* How many pages of the ring does the file have? */
static int patterns_in(const char *path)
{
	bool found[RING_PAGES] = {};
	uint64_t words[512], nr;
	int fd = open(path, O_RDONLY), i, n = 0;
	ssize_t len;

	TEST_ASSERT(fd >= 0, "%s: %s", path, strerror(errno));
	while ((len = read(fd, words, sizeof(words))) > 0) {
		for (i = 0; i < len / 8; i++) {
			nr = words[i] - pattern(RING_PAGE);
			if (nr < RING_PAGES && !found[nr]) {
				found[nr] = true;
				n++;
			}
		}
	}
	close(fd);
	return n;
}

static void core_dump(void)
{
	struct rlimit limit = { RLIM_INFINITY, RLIM_INFINITY };
	char dir[] = "/tmp/kvm-core-XXXXXX", cmd[64], line[128] = "";
	int vcpu = vcpu_fd_create(RING_PAGES), status, fd;
	struct dirent *d;
	uint8_t *ring;
	DIR *entries;
	int n = -1;
	pid_t pid;

	fd = open("/proc/sys/kernel/core_pattern", O_RDONLY);
	if (fd < 0 || read(fd, line, sizeof(line) - 1) <= 0 ||
	    strchr(line, '|') || strchr(line, '/'))
		test_case_skip("core dumps do not go to the current folder");
	close(fd);
	TEST_ASSERT(mkdtemp(dir), "mkdtemp: %s", strerror(errno));
	setrlimit(RLIMIT_CORE, &limit);

	ring = vcpu_fd_map(vcpu, 0, 200, PROT_READ | PROT_WRITE, MAP_SHARED);
	fill(ring + RING_PAGE * page);
	pid = fork();
	if (!pid) {
		/* Dump shared memory, and that of files, too. */
		fd = open("/proc/self/coredump_filter", O_WRONLY);
		if (fd < 0 || write(fd, "0x7f", 4) != 4 || chdir(dir))
			_exit(1);
		prctl(PR_SET_DUMPABLE, 1);
		signal(SIGABRT, SIG_DFL);
		abort();
	}
	EXPECT(waitpid(pid, &status, 0), pid);
	if (WIFSIGNALED(status) && WCOREDUMP(status)) {
		entries = opendir(dir);
		while ((d = readdir(entries))) {
			if (strncmp(d->d_name, "core", 4))
				continue;
			snprintf(line, sizeof(line), "%s/%.64s", dir,
				 d->d_name);
			n = patterns_in(line);
		}
		closedir(entries);
	}
	snprintf(cmd, sizeof(cmd), "rm -rf %s", dir);
	EXPECT(system(cmd), 0);
	if (n < 0)
		test_case_skip("no core was dumped");
	EXPECT(n, RING_PAGES);
}

static void no_privilege(void)
{
	/* Pages of 64 KiB are more than such a user may lock by default. */
	struct rlimit limit = { 64 * page, 64 * page };

	EXPECT(setrlimit(RLIMIT_MEMLOCK, &limit), 0);
	EXPECT(setgroups(0, NULL), 0);
	EXPECT(setgid(65534), 0);
	EXPECT(setuid(65534), 0);
	/* Let its child be read. */
	EXPECT(prctl(PR_SET_DUMPABLE, 1), 0);

	vm_readv();
	vm_writev();
	debugger();
	pipes();
	lock_ring();
	forks();
	move_ring();
}

static const struct test_case cases[] = {
	{ "readv: of a process, and of another", vm_readv },
	{ "writev: of a process, and of another", vm_writev },
	{ "debugger: by ptrace() and /proc", debugger },
	{ "direct: from a file into the ring", direct_io },
	{ "pipe: has the pages, also when the VM is gone", pipes },
	{ "io-uring: as a fixed buffer", io_uring },
	{ "mlock: and munlock, and MAP_POPULATE", lock_ring },
	{ "fork: one ring for both", forks },
	{ "mremap: moves and shrinks, does not grow", move_ring },
	{ "core: has the ring in it, and not what is beside it", core_dump },
	{ "no-privilege: the same as user 65534", no_privilege },
};

int main(int argc, char **argv)
{
	page = getpagesize();
	dirty_ring_check_supported();
	/* While that is allowed */
	kvm_fd_get();
	test_cases_main(argc, argv, cases, ARRAY_SIZE(cases));
}
