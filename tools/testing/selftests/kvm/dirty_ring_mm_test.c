// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test dirty logging while the host's memory management works on the memory
 *
 * A vCPU writes to memory that is tracked while something is done to it that has
 * KVM unmap pages, or map others in their place: the process forks, pages are
 * merged and unmerged, collapsed to huge ones and split, swapped out and in, moved
 * within a node and between nodes, thrown away and made read-only, their VMA is taken
 * apart, logging is switched off and on, another memslot is deleted.
 *
 * Meanwhile dirty pages are collected, write-protected again, and copied, as a
 * migration does. Whenever the vCPU has stopped, and what it wrote last has been
 * collected, the copy must be what the memory is: a page that was changed and not
 * reported is different. Each case is there with the ring and with the bitmap.
 */

#include <fcntl.h>
#include <linux/mempolicy.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/swap.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>

#include "test_util.h"
#include "kvm_util.h"
#include "dirty_ring_vm.h"
#include "test_cases.h"

/* tools/ has a list of system calls of its own, which is short. */
#ifndef __NR_mbind
#ifdef __x86_64__
#define __NR_mbind	237
#else
#define __NR_mbind	235
#endif
#endif

/* Two huge pages, where pages have 4 KiB. */
#define HUGE_SIZE	(2UL << 20)
#define SIZE		(2 * HUGE_SIZE)

/* At most so many rounds, in at most so many seconds */
#define ROUNDS		16
#define COLLECTS	3
#define SECONDS		3

/* How long to wait for what kernel threads do, in seconds */
#define PATIENCE	60

#define KSM		"/sys/kernel/mm/ksm/"
#define BALANCING	"/proc/sys/kernel/numa_balancing"
#define SWAP		"/dev/ram0"
#define KHUGEPAGED	"/sys/kernel/mm/transparent_hugepage/khugepaged/"

/**
 * struct churn - a VM, and a copy of its memory
 * @rv:		the VM
 * @ring:	whether it has a ring, else a bitmap
 * @page_size:	the host's
 * @mem:	the tracked memory
 * @copy:	what it was when it was reported last
 * @bitmap:	of dirty pages, each time; from the ring as well
 * @runner:	runs the vCPU
 * @copied:	pages, in all
 * @random:	state of a sequence of numbers
 */
struct churn {
	struct ring_vm *rv;
	bool ring;
	size_t page_size;
	uint8_t *mem;
	uint8_t *copy;
	unsigned long *bitmap;
	struct ring_vm_runner runner;
	uint64_t copied;
	uint64_t random;
};

static uint64_t next_random(struct churn *c)
{
	/* Knuth's MMIX; the lower bits are not that random. */
	c->random = c->random * 6364136223846793005UL + 1442695040888963407UL;
	return c->random >> 33;
}

static void set_slot(struct churn *c, size_t size, uint32_t flags)
{
	ring_vm_set_slot(c->rv, RING_VM_GPA, c->mem, size, flags);
}

static void *map_memory(size_t size)
{
	uint8_t *mem = mmap(NULL, size + HUGE_SIZE, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	TEST_ASSERT(mem != MAP_FAILED, "mmap failed");
	return (void *)(((uintptr_t)mem + HUGE_SIZE - 1) & ~(HUGE_SIZE - 1));
}

static struct churn *churn_create(bool ring)
{
	struct churn *c = calloc(1, sizeof(*c));

	TEST_ASSERT(c, "Insufficient Memory");
	c->ring = ring;
	c->page_size = getpagesize();
	c->rv = ring_vm_create(ring ? 8192 : 0, 1, SIZE / c->page_size, 0, NULL);
	/* The library aligns nothing to huge pages. */
	set_slot(c, 0, 0);
	c->mem = map_memory(SIZE);
	c->copy = map_memory(SIZE);
	c->bitmap = calloc(c->rv->pages / 8 + sizeof(long), 1);
	TEST_ASSERT(c->bitmap, "Insufficient Memory");
	set_slot(c, SIZE, KVM_MEM_LOG_DIRTY_PAGES);
	return c;
}

static void churn_free(struct churn *c)
{
	printf("# %lu pages were reported, and copied\n", c->copied);
	ring_vm_free(c->rv);
	free(c->bitmap);
	free(c);
}

static void note_page(uint32_t slot, uint64_t offset, void *data)
{
	struct churn *c = data;

	TEST_ASSERT(slot == RING_VM_SLOT && offset < c->rv->pages,
		    "Page %#lx of slot %#x was reported", offset, slot);
	c->bitmap[offset / 64] |= 1UL << offset % 64;
}

/* Collect, protect and copy what is dirty. Return: how many pages. */
static uint64_t collect(struct churn *c)
{
	struct kvm_vm *vm = c->rv->vm;
	uint64_t i, n = 0;
	int harvested;

	if (c->ring) {
		memset(c->bitmap, 0, c->rv->pages / 8);
		harvested = vcpu_harvest_dirty_ring(vm, 0,
						    DIRTY_RING_HARVEST_ALL,
						    note_page, c);
		EXPECT(vm_reset_dirty_rings(vm), harvested);
	} else {
		kvm_vm_get_dirty_log(vm, RING_VM_SLOT, c->bitmap);
	}
	for (i = 0; i < c->rv->pages; i++) {
		if (!(c->bitmap[i / 64] & 1UL << i % 64))
			continue;
		memcpy(c->copy + i * c->page_size, c->mem + i * c->page_size,
		       c->page_size);
		n++;
	}
	c->copied += n;
	return n;
}

static uint64_t stores(struct churn *c)
{
	return READ_ONCE(ring_vm_task(c->rv, 0)->stores);
}

static void start_vcpu(struct churn *c)
{
	ring_vm_set_task(c->rv, 0, 0, c->rv->pages, 1);
	WRITE_ONCE(ring_vm_task(c->rv, 0)->spin, 1);
	ring_vm_runner_start(&c->runner, c->rv, 0);
}

/* Let the vCPU write to some of the pages, up to all of them. */
static void some_stores(struct churn *c)
{
	uint64_t before = stores(c), n = 1 + next_random(c) % c->rv->pages;
	uint32_t exits = READ_ONCE(c->runner.exits);

	/* If nothing moves, the case's time limit ends it. */
	while (stores(c) - before < n) {
		usleep(100);
		/* The ring is full: there is no other reason for an exit. */
		if (c->ring && READ_ONCE(c->runner.exits) != exits)
			collect(c);
	}
}

static void compare(struct churn *c, int round)
{
	uint64_t i;

	while (collect(c))
		;
	for (i = 0; i < c->rv->pages; i++)
		TEST_ASSERT(!memcmp(c->copy + i * c->page_size,
				    c->mem + i * c->page_size, c->page_size),
			    "Round %d: page %lu was changed, and is not reported",
			    round, i);
}

/* Call @work again and again while the vCPU writes. */
static void churn(struct churn *c, void (*work)(struct churn *c, int round))
{
	uint64_t start = now_s();
	int round, i;

	for (round = 0; round < ROUNDS && now_s() - start < SECONDS; round++) {
		start_vcpu(c);
		for (i = 0; i < COLLECTS; i++) {
			some_stores(c);
			work(c, round);
			some_stores(c);
			collect(c);
		}
		ring_vm_runner_stop(&c->runner);
		compare(c, round);
	}
	printf("# %d rounds\n", round);
}

/* --- What the host does ---------------------------------------------------------- */

static bool write_file(const char *path, const char *value)
{
	int fd = open(path, O_WRONLY);
	bool ok;

	if (fd < 0)
		return false;
	ok = write(fd, value, strlen(value)) == strlen(value);
	close(fd);
	return ok;
}

static void set_file(const char *path, const char *value)
{
	if (!write_file(path, value))
		test_case_skip("cannot write %s to %s", value, path);
}

static uint64_t read_file(const char *path)
{
	FILE *file = fopen(path, "r");
	uint64_t value = 0;

	if (!file || fscanf(file, "%lu", &value) != 1)
		test_case_skip("cannot read %s", path);
	fclose(file);
	return value;
}

/* A count of /proc/vmstat */
static uint64_t vm_counter(const char *name)
{
	FILE *file = fopen("/proc/vmstat", "r");
	bool found = false;
	char word[64];
	uint64_t n;

	TEST_ASSERT(file, "Cannot read /proc/vmstat");
	while (!found && fscanf(file, "%63s %lu", word, &n) == 2)
		found = !strcmp(word, name);
	fclose(file);
	if (!found)
		test_case_skip("the kernel does not count %s", name);
	return n;
}

static void do_advise(struct churn *c, size_t from, size_t size, int advice,
		      const char *name)
{
	if (madvise(c->mem + from, size, advice))
		test_case_skip("no madvise %s: %s", name, strerror(errno));
}

#define advise(c, from, size, advice) \
	do_advise(c, from, size, advice, #advice)

/* Throw pages away, which makes them zero; so in the copy. */
static void throw_away(struct churn *c, size_t from, size_t size)
{
	advise(c, from, size, MADV_DONTNEED);
	memset(c->copy + from, 0, size);
}

static uint64_t sum(struct churn *c)
{
	uint64_t i, s = 0;

	for (i = 0; i < SIZE; i += c->page_size)
		s = s * 31 + *(uint64_t *)(c->mem + i);
	return s;
}

/*
 * Fork: the child keeps the memory as it was. Pages are copied when the vCPU
 * writes them, or the child does.
 */
static void work_fork(struct churn *c, int round)
{
	uint64_t before, i;
	int status;
	pid_t pid;

	pid = fork();
	TEST_ASSERT(pid >= 0, "fork failed");
	if (!pid) {
		before = sum(c);
		usleep(1000);
		if (sum(c) != before)
			_exit(1);
		for (i = 0; i < SIZE; i += 3 * c->page_size)
			*(uint64_t *)(c->mem + i) = ~0UL;
		_exit(0);
	}
	some_stores(c);
	collect(c);
	TEST_ASSERT(waitpid(pid, &status, 0) == pid, "waitpid failed");
	TEST_ASSERT(!status, "The vCPU wrote to the memory of a child");
}

static void work_dontneed(struct churn *c, int round)
{
	size_t page = next_random(c) % c->rv->pages;
	size_t n = 1 + next_random(c) % (c->rv->pages - page);

	throw_away(c, page * c->page_size, n * c->page_size);
}

/* Flags that only split and merge VMAs */
static void work_split(struct churn *c, int round)
{
	size_t page = next_random(c) % c->rv->pages;
	size_t size = c->page_size;

	advise(c, page * size, size, MADV_DONTDUMP);
	advise(c, page / 2 * size, size, MADV_DONTFORK);
	some_stores(c);
	TEST_ASSERT(!mlock(c->mem + page / 3 * size, size) &&
		    !munlock(c->mem + page / 3 * size, size), "mlock failed");
	advise(c, 0, SIZE, MADV_DODUMP);
	advise(c, 0, SIZE, MADV_DOFORK);
}

/* Make holes, so that there is something to fill. */
static void work_compact(struct churn *c, int round)
{
	size_t page;

	for (page = round % 4; page < c->rv->pages; page += 4)
		throw_away(c, page * c->page_size, c->page_size);
	set_file("/proc/sys/vm/compact_memory", "1");
}

/* Whatever was written before logging starts has to be copied. */
static void work_toggle(struct churn *c, int round)
{
	set_slot(c, SIZE, 0);
	some_stores(c);
	set_slot(c, SIZE, KVM_MEM_LOG_DIRTY_PAGES);
	memcpy(c->copy, c->mem, SIZE);
}

/* Collapse small pages; or split huge ones, which KVM maps huge, too. */
static void work_huge(struct churn *c, int round)
{
	uint64_t until, before;
	size_t i;

	switch (next_random(c) % 4) {
	case 0:
		for (i = 0; i < SIZE; i += 2 * c->page_size)
			throw_away(c, i, c->page_size);
		before = vm_counter("thp_collapse_alloc");
		until = now_s() + 2;
		while (vm_counter("thp_collapse_alloc") == before &&
		       now_s() < until) {
			some_stores(c);
			collect(c);
		}
		break;
	case 1:
		throw_away(c, 0, SIZE);
		work_toggle(c, round);
		break;
	case 2:
		throw_away(c, next_random(c) % c->rv->pages * c->page_size,
			   c->page_size);
		break;
	default:
		work_toggle(c, round);
	}
}

/*
 * Pages are read again when somebody wants them: the vCPU, or the copy. They are
 * not written as long as the vCPU has used them since the last time; so ask twice,
 * for not too many.
 */
static void work_swap(struct churn *c, int round)
{
	size_t i, size = SIZE / 64;

	for (i = 0; i < SIZE; i += size) {
		advise(c, i, size, MADV_PAGEOUT);
		advise(c, i, size, MADV_PAGEOUT);
	}
}

/* Move all pages to a node; and leave them to the kernel, which moves them back. */
static void work_nodes(struct churn *c, int round)
{
	unsigned long nodes = 1UL << round % 2;

	EXPECT(syscall(__NR_mbind, c->mem, SIZE, MPOL_BIND, &nodes,
		       8 * sizeof(nodes), MPOL_MF_MOVE), 0);
	EXPECT(syscall(__NR_mbind, c->mem, SIZE, MPOL_DEFAULT, NULL, 0, 0), 0);
}

/* --- The cases -------------------------------------------------------------------- */

static void simple_case(bool ring, void (*work)(struct churn *c, int round))
{
	struct churn *c = churn_create(ring);

	churn(c, work);
	churn_free(c);
}

static void compact_case(bool ring)
{
	struct churn *c = churn_create(ring);
	uint64_t before = vm_counter("pgmigrate_success");

	set_file("/proc/sys/vm/compact_memory", "1");
	churn(c, work_compact);
	before = vm_counter("pgmigrate_success") - before;
	printf("# %lu pages were migrated\n", before);
	TEST_ASSERT(before, "No page was migrated");
	churn_free(c);
}

static void huge_case(bool ring)
{
	struct churn *c = churn_create(ring);
	uint64_t collapsed, split;

	if (c->page_size != 4096)
		test_case_skip("huge pages have more than 2 MiB");
	collapsed = vm_counter("thp_collapse_alloc");
	split = vm_counter("thp_split_pmd");
	advise(c, 0, SIZE, MADV_HUGEPAGE);
	set_file(KHUGEPAGED "scan_sleep_millisecs", "0");
	set_file(KHUGEPAGED "alloc_sleep_millisecs", "0");
	churn(c, work_huge);
	set_file(KHUGEPAGED "scan_sleep_millisecs", "10000");
	set_file(KHUGEPAGED "alloc_sleep_millisecs", "60000");
	collapsed = vm_counter("thp_collapse_alloc") - collapsed;
	split = vm_counter("thp_split_pmd") - split;
	printf("# %lu huge pages were made, %lu split\n", collapsed, split);
	TEST_ASSERT(collapsed && split, "No huge page was made, or none split");
	churn_free(c);
}

/* What mkswap does, which needs a shell */
static bool make_swap(size_t page_size)
{
	struct {
		uint32_t version;
		uint32_t last_page;
	} info = { .version = 1 };
	static const char magic[] = "SWAPSPACE2";
	size_t len = strlen(magic);
	int fd = open(SWAP, O_WRONLY);
	bool ok;

	if (fd < 0)
		return false;
	info.last_page = lseek(fd, 0, SEEK_END) / page_size - 1;
	ok = pwrite(fd, &info, sizeof(info), 1024) == sizeof(info) &&
	     pwrite(fd, magic, len, page_size - len) == len;
	close(fd);
	return ok;
}

static void swap_case(bool ring)
{
	uint64_t out = vm_counter("pswpout"), in = vm_counter("pswpin");
	struct churn *c = churn_create(ring);

	/* It may be on: a case that failed has left it. */
	if (swapoff(SWAP) && errno != EINVAL)
		test_case_skip("no " SWAP " to swap to: %s", strerror(errno));
	if (!make_swap(c->page_size) || swapon(SWAP, 0))
		test_case_skip("cannot swap to " SWAP ": %s", strerror(errno));
	churn(c, work_swap);
	EXPECT(swapoff(SWAP), 0);
	compare(c, -1);
	out = vm_counter("pswpout") - out;
	in = vm_counter("pswpin") - in;
	printf("# %lu pages were swapped out, %lu in\n", out, in);
	TEST_ASSERT(out && in, "No page was swapped out, or none in");
	churn_free(c);
}

static void work_slots(struct churn *c, int round)
{
	int i;

	for (i = 0; i < 10; i++) {
		usleep(1000);
		collect(c);
	}
}

static void slots_case(bool ring)
{
	struct churn *c = churn_create(ring);
	struct ring_vm_other_slot other;

	ring_vm_other_slot_start(&other, c->rv);
	churn(c, work_slots);
	ring_vm_other_slot_stop(&other);
	churn_free(c);
}

static void nodes_case(bool ring)
{
	struct churn *c = churn_create(ring);
	uint64_t moved, hints;

	if (access("/sys/devices/system/node/node1", F_OK))
		test_case_skip("there is only one node");
	set_file(BALANCING "_scan_delay_ms", "0");
	set_file(BALANCING "_scan_period_min_ms", "10");
	set_file(BALANCING, "1");
	moved = vm_counter("pgmigrate_success");
	hints = vm_counter("numa_hint_faults");
	churn(c, work_nodes);
	set_file(BALANCING "_scan_delay_ms", "1000");
	set_file(BALANCING "_scan_period_min_ms", "1000");
	moved = vm_counter("pgmigrate_success") - moved;
	hints = vm_counter("numa_hint_faults") - hints;
	printf("# %lu pages were moved, %lu faults told where they are used\n",
	       moved, hints);
	TEST_ASSERT(moved && hints, "No page was moved, or none was asked for");
	churn_free(c);
}

/*
 * Have the vCPU write the same to all pages, and stop: KSM merges pages that
 * are alike and do not change for a while. Then something else to each: what goes
 * to a page that is still merged shows in others.
 */
static void guest_merge(uint64_t pages)
{
	uint64_t i, value, size = SIZE / pages;

	for (value = 1;; value++) {
		for (i = 0; i < pages; i++)
			guest_store((uint64_t *)(RING_VM_GVA + i * size),
				    value % 2 ? value : value + i);
		GUEST_SYNC(0);
	}
}

/* Wait until KSM has merged most pages, or has unmerged all. */
static void wait_for_ksm(struct churn *c, bool merged)
{
	uint64_t until = now_s() + PATIENCE, sharing;

	while (true) {
		sharing = read_file(KSM "pages_sharing");
		if (merged ? sharing >= c->rv->pages / 2 : !sharing)
			return;
		TEST_ASSERT(now_s() < until, "KSM has merged %lu pages",
			    sharing);
		usleep(1000);
	}
}

static void *unmerge(void *data)
{
	struct churn *c = data;

	advise(c, 0, SIZE, MADV_UNMERGEABLE);
	return NULL;
}

static void ksm_case(bool ring)
{
	struct churn *c = churn_create(ring);
	pthread_t thread;
	uint64_t i;
	int round;

	/* Splitting a huge page unmaps all of it: KSM then has nothing to replace. */
	advise(c, 0, SIZE, MADV_NOHUGEPAGE);
	set_file(KSM "sleep_millisecs", "0");
	set_file(KSM "pages_to_scan", "4096");
	set_file(KSM "run", "1");
	ring_vm_set_code(c->rv, 0, guest_merge, c->rv->pages);

	for (round = 0; round < ROUNDS / 4; round++) {
		/* Write each page, whatever it is mapped to. */
		EXPECT(ring_vm_run(c->rv, 0), RING_VM_DONE);
		EXPECT(collect(c), c->rv->pages);
		compare(c, round);
		for (i = 0; i < SIZE; i += c->page_size)
			EXPECT(*(uint64_t *)(c->mem + i), round * 2 + 1);

		advise(c, 0, SIZE, MADV_MERGEABLE);
		wait_for_ksm(c, true);
		compare(c, round);

		/* Unmerge by the vCPU's writes, and by the host meanwhile. */
		if (round % 2)
			EXPECT(pthread_create(&thread, NULL, unmerge, c), 0);
		EXPECT(ring_vm_run(c->rv, 0), RING_VM_DONE);
		if (round % 2)
			EXPECT(pthread_join(thread, NULL), 0);
		EXPECT(collect(c), c->rv->pages);
		compare(c, round);
		for (i = 0; i < SIZE; i += c->page_size)
			EXPECT(*(uint64_t *)(c->mem + i),
			       round * 2 + 2 + i / c->page_size);

		advise(c, 0, SIZE, MADV_UNMERGEABLE);
		wait_for_ksm(c, false);
	}
	set_file(KSM "run", "2");
	churn_free(c);
}

/*
 * Pages that the kernel may throw away, unless they are written first. If they are,
 * by the guest, the kernel must know even when the page is protected once more.
 */
static void free_case(bool ring)
{
	uint64_t freed = vm_counter("pglazyfreed"), until = now_s() + PATIENCE;
	struct churn *c = churn_create(ring);
	uint64_t pages = c->rv->pages, i, value;

	/* A huge page is dirty as a whole. */
	advise(c, 0, SIZE, MADV_NOHUGEPAGE);
	memset(c->mem, 0xff, SIZE);
	advise(c, 0, SIZE, MADV_FREE);
	ring_vm_set_task(c->rv, 0, 0, pages / 2, 2);
	EXPECT(ring_vm_run(c->rv, 0), RING_VM_DONE);
	EXPECT(collect(c), pages / 2);

	/* The pages may look as if they were in use, at first. */
	do {
		TEST_ASSERT(now_s() < until, "No pages were thrown away");
		advise(c, 0, SIZE, MADV_PAGEOUT);
	} while (vm_counter("pglazyfreed") - freed < pages / 4);
	for (i = 0; i < 3; i++)
		advise(c, 0, SIZE, MADV_PAGEOUT);

	for (i = 0; i < pages; i++) {
		value = *(uint64_t *)(c->mem + i * c->page_size);
		TEST_ASSERT(i % 2 ? !value || !~value : value == i / 2 + 1,
			    "Page %lu, which the guest %s, has %#lx", i,
			    i % 2 ? "did not write" : "wrote", value);
	}
	churn_free(c);
}

static void guest_write_read(uint64_t pages)
{
	uint64_t i, value, size = SIZE / pages;

	for (value = 1;; value++) {
		for (i = 0; i < pages; i++)
			guest_store((uint64_t *)(RING_VM_GVA + i * size), value);
		GUEST_SYNC(0);
		for (i = 0; i < pages; i++)
			READ_ONCE(*(uint64_t *)(RING_VM_GVA + i * size));
		GUEST_SYNC(0);
	}
}

/*
 * Pages that the host makes read-only, after the guest has written them, and they were
 * protected once more: they could be written before, but not now, nor when the guest
 * has read them.
 */
static void readonly_case(bool ring)
{
	struct churn *c = churn_create(ring);
	uint64_t pages = c->rv->pages;

	ring_vm_set_code(c->rv, 0, guest_write_read, pages);
	EXPECT(ring_vm_run(c->rv, 0), RING_VM_DONE);
	EXPECT(collect(c), pages);

	EXPECT(mprotect(c->mem, SIZE, PROT_READ), 0);
	EXPECT(ring_vm_run(c->rv, 0), RING_VM_DONE);
	EXPECT_ERROR(_vcpu_ioctl(c->rv->vm, 0, KVM_RUN, NULL), EFAULT);
	compare(c, 0);
	EXPECT(c->copied, pages);

	EXPECT(mprotect(c->mem, SIZE, PROT_READ | PROT_WRITE), 0);
	EXPECT(ring_vm_run(c->rv, 0), RING_VM_DONE);
	EXPECT(collect(c), pages);
	compare(c, 1);
	churn_free(c);
}

static void fork_ring(void)
{
	simple_case(true, work_fork);
}

static void fork_bitmap(void)
{
	simple_case(false, work_fork);
}

static void dontneed_ring(void)
{
	simple_case(true, work_dontneed);
}

static void dontneed_bitmap(void)
{
	simple_case(false, work_dontneed);
}

static void split_ring(void)
{
	simple_case(true, work_split);
}

static void split_bitmap(void)
{
	simple_case(false, work_split);
}

static void toggle_ring(void)
{
	simple_case(true, work_toggle);
}

static void toggle_bitmap(void)
{
	simple_case(false, work_toggle);
}

static void compact_ring(void)
{
	compact_case(true);
}

static void compact_bitmap(void)
{
	compact_case(false);
}

static void huge_ring(void)
{
	huge_case(true);
}

static void huge_bitmap(void)
{
	huge_case(false);
}

static void ksm_ring(void)
{
	ksm_case(true);
}

static void ksm_bitmap(void)
{
	ksm_case(false);
}

static void swap_ring(void)
{
	swap_case(true);
}

static void swap_bitmap(void)
{
	swap_case(false);
}

static void free_ring(void)
{
	free_case(true);
}

static void free_bitmap(void)
{
	free_case(false);
}

static void readonly_ring(void)
{
	readonly_case(true);
}

static void readonly_bitmap(void)
{
	readonly_case(false);
}

static void slots_ring(void)
{
	slots_case(true);
}

static void slots_bitmap(void)
{
	slots_case(false);
}

static void nodes_ring(void)
{
	nodes_case(true);
}

static void nodes_bitmap(void)
{
	nodes_case(false);
}

static const struct test_case cases[] = {
	{ "fork-ring: pages are copied, for the vCPU or for a child", fork_ring },
	{ "fork-bitmap", fork_bitmap },
	{ "dontneed-ring: pages are thrown away", dontneed_ring },
	{ "dontneed-bitmap", dontneed_bitmap },
	{ "vma-ring: the VMA is split and merged", split_ring },
	{ "vma-bitmap", split_bitmap },
	{ "toggle-ring: logging is switched off and on", toggle_ring },
	{ "toggle-bitmap", toggle_bitmap },
	{ "compact-ring: pages are migrated", compact_ring },
	{ "compact-bitmap", compact_bitmap },
	{ "huge-ring: pages are collapsed to huge ones, and split", huge_ring },
	{ "huge-bitmap", huge_bitmap },
	{ "ksm-ring: pages are merged and unmerged", ksm_ring },
	{ "ksm-bitmap", ksm_bitmap },
	{ "swap-ring: pages are swapped out and in", swap_ring },
	{ "swap-bitmap", swap_bitmap },
	{ "free-ring: pages are free to be thrown away, until they are written", free_ring },
	{ "free-bitmap", free_bitmap },
	{ "readonly-ring: the host makes pages read-only", readonly_ring },
	{ "readonly-bitmap", readonly_bitmap },
	{ "slots-ring: another memslot goes", slots_ring },
	{ "slots-bitmap", slots_bitmap },
	{ "nodes-ring: pages move between nodes", nodes_ring },
	{ "nodes-bitmap", nodes_bitmap },
};

int main(int argc, char **argv)
{
	dirty_ring_check_supported();
	test_cases_main(argc, argv, cases, ARRAY_SIZE(cases));
}
