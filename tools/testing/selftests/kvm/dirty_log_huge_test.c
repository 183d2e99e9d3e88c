// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test the tracking of dirty pages in memory of huge pages
 *
 * Show, with a dirty ring and with a bitmap, that
 *  - a write into a huge page is reported, and nothing that was not written; the
 *    guest does not fault for what it reads,
 *  - the guest does not fault for what it reads and writes once logging is off,
 *  - if all pages are dirty when logging starts, nothing else happens then.
 */

#define _GNU_SOURCE /* for program_invocation_name */

#include <fcntl.h>
#include <linux/sizes.h>
#include <sys/mman.h>

#include "test_util.h"
#include "kvm_util.h"
#include "processor.h"
#include "dirty_ring_vm.h"
#include "test_cases.h"
#include "../kselftest.h"

#define MODULES		"/sys/module/"
#define EAGER		MODULES "kvm/parameters/eager_page_split"
#define NX_HUGE		MODULES "kvm/parameters/nx_huge_pages"

#ifndef KVM_CAP_ARM_EAGER_SPLIT_CHUNK_SIZE
#define KVM_CAP_ARM_EAGER_SPLIT_CHUNK_SIZE	228
#define KVM_CAP_ARM_SUPPORTED_BLOCK_SIZES	229
#endif

/* Where allocations can be made to fail */
#define FAIL_NTH	"/proc/thread-self/fail-nth"
#define FAIL_SLAB	"/sys/kernel/debug/failslab/"
#define FAIL_PAGE	"/sys/kernel/debug/fail_page_alloc/"

#define THP_SIZE	"/sys/kernel/mm/transparent_hugepage/hpage_pmd_size"

#define NR_HUGE		8
#define SIZE		(NR_HUGE * huge_size)

/* Of a transparent huge page */
static size_t huge_size = SZ_2M;

/* Is log start to split what is huge? */
static bool eager;

struct huge_vm {
	struct ring_vm *rv;
	uint8_t *mem;
	size_t size;
	unsigned long *bitmap;
	uint64_t gpa;
	uint64_t pages;
	uint64_t per_huge;
	/* How often the ring was full since what was reported was looked at */
	uint32_t full;
};

/* What the guest does, to @count pages, @stride apart, from @first on */
static struct touch {
	enum { READ, WRITE, EXECUTE, WRITE_EXECUTE } how;
	uint64_t first;
	uint64_t count;
	uint64_t stride;
	uint64_t page_size;
} touch;

static void touch_code(uint64_t unused)
{
	uint64_t i, pass, *page;

	for (pass = 0; ; pass++) {
		for (i = 0; i < touch.count; i++) {
			page = (void *)RING_VM_GVA +
			       (touch.first + i * touch.stride) *
			       touch.page_size;
			/* The first word may be an instruction. */
			if (touch.how == WRITE ||
			    (touch.how == WRITE_EXECUTE && (i + pass) % 2))
				WRITE_ONCE(page[1], page[1] + 1);
			else if (touch.how == READ)
				READ_ONCE(*page);
			else
				((void (*)(void))page)();
		}
		GUEST_SYNC(0);
	}
}

static void set_touch(struct huge_vm *h, int how, uint64_t first,
		      uint64_t count, uint64_t stride)
{
	struct touch *t = addr_gva2hva(h->rv->vm, (vm_vaddr_t)&touch);

	t->how = how;
	t->first = first;
	t->count = count;
	t->stride = stride;
	t->page_size = getpagesize();
}

static void do_touch(struct huge_vm *h, int how, uint64_t first,
		     uint64_t count, uint64_t stride)
{
	set_touch(h, how, first, count, stride);
	while (ring_vm_run(h->rv, 0) == RING_VM_FULL) {
		ring_vm_collect(h->rv);
		h->full++;
	}
}

static void guest_reads(struct huge_vm *h, uint64_t first, uint64_t count,
			uint64_t stride)
{
	do_touch(h, READ, first, count, stride);
}

static void guest_writes(struct huge_vm *h, uint64_t first, uint64_t count,
			 uint64_t stride)
{
	do_touch(h, WRITE, first, count, stride);
}

/* The huge pages in the mapping that has @mem, in bytes */
static size_t transparent_huge(void *mem)
{
	unsigned long first, end, at = (unsigned long)mem;
	bool here = false;
	size_t kb = 0;
	char line[256];
	FILE *f;

	f = fopen("/proc/self/smaps", "r");
	TEST_ASSERT(f, "smaps: %s", strerror(errno));
	while (fgets(line, sizeof(line), f)) {
		if (sscanf(line, "%lx-%lx ", &first, &end) == 2)
			here = at >= first && at < end;
		else if (here && sscanf(line, "AnonHugePages: %zu", &kb) == 1)
			break;
	}
	fclose(f);

	return kb * 1024;
}

/* Transparent huge pages; skip if there are none */
static void *map_thp(size_t size)
{
	uint8_t *mem;
	size_t i;

	mem = mmap(NULL, size + huge_size, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	TEST_ASSERT(mem != MAP_FAILED, "mmap: %s", strerror(errno));
	mem = (void *)(((uintptr_t)mem + huge_size - 1) & ~(huge_size - 1));
	if (madvise(mem, size, MADV_HUGEPAGE))
		test_case_skip("no transparent huge pages");
	for (i = 0; i < size; i += huge_size)
		mem[i] = 1;
	if (transparent_huge(mem) < size)
		test_case_skip("too few transparent huge pages");
	return mem;
}

static void set_log(struct huge_vm *h, bool on)
{
	ring_vm_set_slot(h->rv, h->gpa, h->rv->mem, h->size,
			 on ? KVM_MEM_LOG_DIRTY_PAGES : 0);
}

static void set_param(const char *path, const char *value)
{
	int fd = open(path, O_WRONLY);

	if (fd < 0)
		test_case_skip("no %s", path);
	EXPECT(write(fd, value, strlen(value)), strlen(value));
	close(fd);
}

static void set_eager(bool on)
{
	eager = on;
#ifdef __x86_64__
	set_param(EAGER, on ? "Y" : "N");
#endif
}

/* On arm64 it is set when a VM is made. */
static void set_chunk_size(struct kvm_vm *vm)
{
	struct kvm_enable_cap cap = {
		.cap = KVM_CAP_ARM_EAGER_SPLIT_CHUNK_SIZE,
		.args[0] = huge_size,
	};

#ifdef __aarch64__
	if (eager)
		vm_enable_cap(vm, &cap);
#endif
}

static void huge_vm_create(struct huge_vm *h, uint32_t entries, void *mem,
			   size_t size)
{
	uint64_t page = getpagesize();
	struct ring_vm *rv;

	memset(h, 0, sizeof(*h));
	h->mem = mem;
	h->gpa = RING_VM_GPA;
	h->size = size;
	h->pages = size / page;
	h->per_huge = huge_size / page;
	rv = ring_vm_create(entries, 1, h->pages, 0, set_chunk_size);
	h->rv = rv;
	h->bitmap = calloc(h->pages / 64, sizeof(long));
	TEST_ASSERT(h->bitmap, "Insufficient Memory");

	ring_vm_set_slot(rv, RING_VM_GPA, rv->mem, 0, 0);
	rv->mem = mem;
	set_log(h, false);
	ring_vm_set_code(rv, 0, touch_code, 0);
	/* Have the guest's page tables dirty, and all of it mapped. */
	guest_writes(h, 0, h->pages, 1);
}

static void huge_vm_free(struct huge_vm *h)
{
	ring_vm_free(h->rv);
	free(h->bitmap);
}

/*
 * Expect that the pages @stride apart from @first on are reported, once each. Those
 * that fill the ring are reported before they are written, and then once more.
 */
static void expect_dirty(struct huge_vm *h, uint64_t first, uint64_t count,
			 uint64_t stride)
{
	struct ring_vm *rv = h->rv;
	uint64_t i, last = first + (count - 1) * stride;
	uint32_t want, n, twice = 0;

	if (rv->entries)
		ring_vm_collect_all(rv);
	else
		kvm_vm_get_dirty_log(rv->vm, RING_VM_SLOT, h->bitmap);
	for (i = 0; i < h->pages; i++) {
		n = rv->entries ? rv->seen[i] :
		    h->bitmap[i / 64] >> i % 64 & 1;
		want = count && i >= first && i <= last &&
		       (i - first) % stride == 0;
		if (want && n == 2 && ++twice <= h->full)
			continue;
		TEST_ASSERT(n == want, "Page %lu was reported %u times, not %u",
			    i, n, want);
	}
	ring_vm_forget(rv);
	h->full = 0;
}

/* Slow page faults so far */
static long faults(struct huge_vm *h)
{
#ifdef __x86_64__
	return ring_vm_stat(h->rv, "pf_fixed");
#else
	return ring_vm_stat(h->rv, "exits");
#endif
}

static void expect_no_faults(struct huge_vm *h, long before)
{
	long n = faults(h) - before;

#ifdef __x86_64__
	TEST_ASSERT(!n, "%ld page faults", n);
#else
	/* Exits for other reasons are few. */
	TEST_ASSERT(n < h->pages / 16, "%ld exits", n);
#endif
}

/*
 * A write into each huge page, then reads, then writes to all pages; then the same
 * without faults, as nothing is logged any more
 */
static void check_split(struct huge_vm *h)
{
	uint64_t per = h->per_huge, all = h->pages;
	long before;
	int round;

	for (round = 0; round < 2; round++) {
		set_log(h, true);
		expect_dirty(h, 0, 0, 1);
		before = faults(h);
		guest_reads(h, 0, all, 1);
		expect_no_faults(h, before);

		guest_writes(h, 3, all / per, per);
		expect_dirty(h, 3, all / per, per);

		before = faults(h);
		guest_reads(h, 0, all, 1);
		expect_no_faults(h, before);
		expect_dirty(h, 0, 0, 1);

		guest_writes(h, 0, all, 1);
		expect_dirty(h, 0, all, 1);
		guest_writes(h, 5, all / 8, 8);
		expect_dirty(h, 5, all / 8, 8);

		set_log(h, false);
		if (!two_dimensional_paging())
			continue;
		before = faults(h);
		guest_reads(h, 0, all, 1);
		guest_writes(h, 0, all, 1);
		expect_no_faults(h, before);
	}
}

static void check_thp(uint32_t entries, bool on)
{
	struct huge_vm h;

	set_eager(on);
	huge_vm_create(&h, entries, map_thp(SIZE), SIZE);
	check_split(&h);
	huge_vm_free(&h);
}

static void thp_ring(void)
{
	check_thp(ring_vm_min_entries(), false);
}

static void thp_bitmap(void)
{
	check_thp(0, false);
}

static void thp_ring_eager(void)
{
	check_thp(ring_vm_min_entries(), true);
}

static void thp_bitmap_eager(void)
{
	check_thp(0, true);
}

static void check_gigantic(bool on)
{
	struct huge_vm h;

	set_eager(on);
	huge_vm_create(&h, ring_vm_min_entries(), map_huge_pages(SZ_1G, 30),
		       SZ_1G);
	check_split(&h);
	huge_vm_free(&h);
}

static void gigantic(void)
{
	check_gigantic(false);
}

static void gigantic_eager(void)
{
	check_gigantic(true);
}

/* One page of 2 MiB of the 512 is split, and recovered with the rest. */
static void gigantic_in_part(void)
{
	struct huge_vm h;
	long before;
	int round;

	set_eager(false);
	huge_vm_create(&h, 0, map_huge_pages(SZ_1G, 30), SZ_1G);
	for (round = 1; round < 3; round++) {
		set_log(&h, true);
		guest_writes(&h, h.per_huge + 3, 1, 1);
		expect_dirty(&h, h.per_huge + 3, 1, 1);
		if (two_dimensional_paging())
			EXPECT(ring_vm_stat(h.rv, "largepages_split"),
			       2 * round);
		set_log(&h, false);
		if (!two_dimensional_paging())
			continue;
		EXPECT(ring_vm_stat(h.rv, "largepages_recovered"), 2 * round);
		before = faults(&h);
		guest_writes(&h, 0, h.pages, 1);
		expect_no_faults(&h, before);
	}
	huge_vm_free(&h);
}

static void set_manual(struct huge_vm *h, uint64_t flags)
{
	struct kvm_enable_cap cap = {
		.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
		.args[0] = flags,
	};

	vm_enable_cap(h->rv->vm, &cap);
}

static void clear_log(struct huge_vm *h, uint64_t first, uint64_t count)
{
	memset(h->bitmap, 0xff, h->pages / 8);
	kvm_vm_clear_dirty_log(h->rv->vm, RING_VM_SLOT, h->bitmap, first, count);
}

static void expect_split(struct huge_vm *h, long want)
{
	if (two_dimensional_paging())
		EXPECT(ring_vm_stat(h->rv, "largepages_split"), want);
}

/* All pages start dirty; then set the flags to @then, which must not matter. */
static void check_initially_set(bool on, uint64_t then)
{
	uint64_t per, first, word = 64;
	struct huge_vm h;
	long before;

	set_eager(on);
	huge_vm_create(&h, 0, map_thp(SIZE), SIZE);
	per = h.per_huge;
	set_manual(&h, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE |
		   KVM_DIRTY_LOG_INITIALLY_SET);
	before = faults(&h);
	set_log(&h, true);
	expect_split(&h, 0);
	guest_writes(&h, 0, h.pages, 1);
	expect_no_faults(&h, before);
	expect_dirty(&h, 0, h.pages, 1);
	set_manual(&h, then);

	/* What the others of a huge page do is not missed, nor its neighbours'. */
	first = 2 * per + word;
	clear_log(&h, first, word);
	expect_split(&h, eager ? 1 : 0);
	before = faults(&h);
	guest_reads(&h, 0, h.pages, 1);
	guest_writes(&h, 0, 2 * per, 1);
	guest_writes(&h, 3 * per, h.pages - 3 * per, 1);
	expect_no_faults(&h, before);
	guest_writes(&h, first + 5, 1, 1);
	expect_split(&h, 1);
	kvm_vm_get_dirty_log(h.rv->vm, RING_VM_SLOT, h.bitmap);
	EXPECT(h.bitmap[first / 64], 1UL << 5);
	EXPECT(h.bitmap[first / 64 - 1], ~0UL);
	EXPECT(h.bitmap[first / 64 + 1], ~0UL);

	clear_log(&h, 0, h.pages);
	expect_split(&h, eager ? NR_HUGE : 1);
	before = faults(&h);
	guest_reads(&h, 0, h.pages, 1);
	expect_no_faults(&h, before);
	expect_dirty(&h, 0, 0, 1);
	guest_writes(&h, 3, h.pages / 8, 8);
	expect_dirty(&h, 3, h.pages / 8, 8);

	set_log(&h, false);
	if (two_dimensional_paging()) {
		before = faults(&h);
		guest_writes(&h, 0, h.pages, 1);
		expect_no_faults(&h, before);
	}
	huge_vm_free(&h);
}

static void initially_set(void)
{
	check_initially_set(true, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE |
			    KVM_DIRTY_LOG_INITIALLY_SET);
}

static void initially_set_fault(void)
{
	check_initially_set(false, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE |
			    KVM_DIRTY_LOG_INITIALLY_SET);
}

static void initially_set_once(void)
{
	check_initially_set(false, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
}

/* Log start splits what is huge if it is to, log stop makes it huge again. */
static void check_statistics(bool on)
{
	struct huge_vm h;
	int i;

	set_eager(on);
	huge_vm_create(&h, ring_vm_min_entries(), map_thp(SIZE), SIZE);
	for (i = 0; i < 2; i++) {
		set_log(&h, true);
		expect_split(&h, on ? NR_HUGE * (i + 1) : i);
		guest_writes(&h, 1, 1, 1);
		expect_dirty(&h, 1, 1, 1);
		expect_split(&h, on ? NR_HUGE * (i + 1) : i + 1);
		set_log(&h, false);
		EXPECT(ring_vm_stat(h.rv, "largepages_recovered"),
		       (on ? NR_HUGE : 1) * (i + 1));
	}
	EXPECT(ring_vm_stat(h.rv, "largepages_split_failed"), 0);
	huge_vm_free(&h);
}

static void statistics(void)
{
	if (!two_dimensional_paging())
		test_case_skip("shadow pages map what the guest's tables do");
	check_statistics(false);
	check_statistics(true);
}

/*
 * The memslot has @skip pages less at either end, and is mapped @shift pages from
 * where huge pages could map it: @huge of them can
 */
static void check_slot(uint64_t skip, uint64_t shift, bool on, int huge)
{
	size_t page = getpagesize();
	uint64_t all;
	struct huge_vm h;
	int round;

	set_eager(on);
	huge_vm_create(&h, 0, map_thp(SIZE), SIZE);
	ring_vm_set_slot(h.rv, RING_VM_GPA, h.mem, 0, 0);
	h.rv->mem = h.mem + skip * page;
	h.gpa = RING_VM_GPA + (skip + shift) * page;
	h.size -= (2 * skip + shift) * page;
	all = h.size / page;
	set_log(&h, false);
	guest_writes(&h, skip + shift, all, 1);

	for (round = 1; round < 3; round++) {
		set_log(&h, true);
		expect_dirty(&h, 0, 0, 1);
		guest_reads(&h, skip + shift, all, 1);
		expect_dirty(&h, 0, 0, 1);
		/* The first and the last page */
		guest_writes(&h, skip + shift, 2, all - 1);
		expect_dirty(&h, 0, 2, all - 1);
		set_log(&h, false);
		if (two_dimensional_paging() && on)
			EXPECT(ring_vm_stat(h.rv, "largepages_recovered"),
			       huge * round);
	}
	huge_vm_free(&h);
}

static void slot_ends(void)
{
	check_slot(5, 0, false, 0);
	check_slot(5, 0, true, NR_HUGE - 2);
}

/* Page tables that are not full when logging stops; then pages are only read. */
static void check_partly_mapped(bool ring)
{
	uint64_t per, all;
	struct huge_vm h;
	int round;

	set_eager(false);
	huge_vm_create(&h, ring ? ring_vm_min_entries() : 0, map_thp(SIZE), SIZE);
	per = h.per_huge;
	all = h.pages;
	for (round = 0; round < 2; round++) {
		ring_vm_set_slot(h.rv, h.gpa, h.mem, 0, 0);
		set_log(&h, true);
		guest_reads(&h, 3, NR_HUGE, per);
		guest_writes(&h, 5, NR_HUGE, per);
		expect_dirty(&h, 5, NR_HUGE, per);
		set_log(&h, false);
		guest_reads(&h, 0, all, 1);
		guest_writes(&h, 0, all, 1);
	}
	huge_vm_free(&h);
}

static void partly_mapped(void)
{
	check_partly_mapped(false);
	check_partly_mapped(true);
}

/*
 * Of each huge page, all pages but the last are freed: nothing may be asked of them.
 * They are free at once, as MADV_FREE splits the huge page; MADV_DONTNEED does not.
 */
static void freed_beside(void)
{
	bool warned = kernel_warned();
	struct huge_vm h;
	uint64_t i, last;
	size_t size;
	void *mem;

	set_eager(false);
	huge_vm_create(&h, 0, map_thp(SIZE), SIZE);
	last = h.per_huge - 1;
	size = last * getpagesize();
	for (i = 0; i < NR_HUGE; i++) {
		mem = h.mem + i * huge_size;
		TEST_ASSERT(!madvise(mem, size, MADV_FREE) &&
			    !madvise(mem, size, MADV_DONTNEED),
			    "madvise: %s", strerror(errno));
	}
	set_log(&h, true);
	guest_writes(&h, last, NR_HUGE, h.per_huge);
	expect_dirty(&h, last, NR_HUGE, h.per_huge);
	set_log(&h, false);
	TEST_ASSERT(warned || !kernel_warned(), "The kernel warned");
	huge_vm_free(&h);
}

/* Pages that the guest has only read, and reads again when they were unmapped */
static void check_reads_again(uint32_t entries)
{
	struct huge_vm h;

	set_eager(false);
	huge_vm_create(&h, entries, map_thp(SIZE), SIZE);
	set_log(&h, true);
	guest_reads(&h, 0, h.pages, 1);

	ring_vm_other_slot(h.rv);
	guest_reads(&h, 0, h.pages, 1);
	expect_dirty(&h, 0, 0, 1);

	/* Memory management unmaps it; a page of the last huge page is split off. */
	EXPECT(mprotect(h.mem, h.size, PROT_NONE), 0);
	EXPECT(mprotect(h.mem, h.size, PROT_READ | PROT_WRITE), 0);
	EXPECT(madvise(h.mem + h.size - getpagesize(), getpagesize(),
		       MADV_DONTNEED), 0);
	guest_reads(&h, 0, h.pages, 1);
	expect_dirty(&h, 0, 0, 1);

	guest_writes(&h, 7, NR_HUGE, h.per_huge);
	guest_reads(&h, 0, h.pages, 1);
	expect_dirty(&h, 7, NR_HUGE, h.per_huge);
	huge_vm_free(&h);
}

static void reads_again(void)
{
	check_reads_again(0);
	check_reads_again(ring_vm_min_entries());
}

static void slot_shifted(void)
{
	check_slot(0, 1, true, 0);
	check_slot(3, huge_size / getpagesize() / 2, true, 0);
}

#ifdef __x86_64__
/* The fewest that KVM_SET_NR_MMU_PAGES takes */
#define KVM_MIN_MMU_PAGES	64

/* There is no room for page tables: no others are thrown away for them. */
static void quota(void)
{
	size_t size = KVM_MIN_MMU_PAGES * huge_size;
	struct huge_vm h;
	long before;

	if (!two_dimensional_paging())
		test_case_skip("shadow pages need room for the guest's tables");
	set_eager(true);
	huge_vm_create(&h, 0, map_thp(size), size);
	EXPECT(ioctl(vm_get_fd(h.rv->vm), KVM_SET_NR_MMU_PAGES,
		     KVM_MIN_MMU_PAGES), 0);
	guest_writes(&h, 0, h.pages, 1);
	set_log(&h, true);
	/* The TDP MMU's page tables are not counted. */
	if (!uses_tdp_mmu())
		TEST_ASSERT(ring_vm_stat(h.rv, "largepages_split_failed"),
			    "All of %d huge pages were split", KVM_MIN_MMU_PAGES);
	before = faults(&h);
	guest_reads(&h, 0, h.pages, 1);
	expect_no_faults(&h, before);
	guest_writes(&h, 3, KVM_MIN_MMU_PAGES, h.per_huge);
	expect_dirty(&h, 3, KVM_MIN_MMU_PAGES, h.per_huge);
	guest_writes(&h, 0, h.pages, 1);
	expect_dirty(&h, 0, h.pages, 1);
	set_log(&h, false);
	huge_vm_free(&h);
}

/* A page of 1 GiB that was split, but most of its pages of 2 MiB were not */
static void gigantic_quota(void)
{
	struct huge_vm h;
	long before;

	if (!two_dimensional_paging())
		test_case_skip("shadow pages need room for the guest's tables");
	if (uses_tdp_mmu())
		test_case_skip("the TDP MMU's page tables are not counted");
	set_eager(true);
	huge_vm_create(&h, 0, map_huge_pages(SZ_1G, 30), SZ_1G);
	EXPECT(ioctl(vm_get_fd(h.rv->vm), KVM_SET_NR_MMU_PAGES,
		     KVM_MIN_MMU_PAGES), 0);
	guest_writes(&h, 0, h.pages, 1);
	set_log(&h, true);
	TEST_ASSERT(ring_vm_stat(h.rv, "largepages_split") > 1 &&
		    ring_vm_stat(h.rv, "largepages_split_failed"),
		    "All was split, or nothing");
	guest_writes(&h, 3, 4, h.per_huge);
	expect_dirty(&h, 3, 4, h.per_huge);

	set_log(&h, false);
	EXPECT(ring_vm_stat(h.rv, "largepages_recovered"),
	       ring_vm_stat(h.rv, "largepages_split"));
	before = faults(&h);
	guest_writes(&h, 0, h.pages, 1);
	expect_no_faults(&h, before);
	huge_vm_free(&h);
}
#endif

/* Have the @n-th allocation from now on fail, 0: none. Return how many are left. */
static unsigned int fail_nth(unsigned int n)
{
	static int fd = -1;
	unsigned int left;
	char text[16] = "";

	/* Stay open: to open it would take allocations. */
	if (fd < 0)
		fd = open(FAIL_NTH, O_RDWR);
	TEST_ASSERT(fd >= 0, FAIL_NTH ": %s", strerror(errno));
	TEST_ASSERT(pread(fd, text, sizeof(text) - 1, 0) > 0,
		    "Cannot read " FAIL_NTH);
	left = atoi(text);
	snprintf(text, sizeof(text), "%u", n);
	EXPECT(pwrite(fd, text, strlen(text), 0), strlen(text));
	return left;
}

/* Set whether the slot is logged, and have the @n-th allocation fail; did one? */
static bool set_log_failing(struct huge_vm *h, bool on, unsigned int n)
{
	struct kvm_userspace_memory_region region = {
		.slot = RING_VM_SLOT,
		.flags = on ? KVM_MEM_LOG_DIRTY_PAGES : 0,
		.guest_phys_addr = h->gpa,
		.memory_size = h->size,
		.userspace_addr = (uintptr_t)h->rv->mem,
	};
	bool failed;
	int ret;

	fail_nth(n);
	ret = ioctl(vm_get_fd(h->rv->vm), KVM_SET_USER_MEMORY_REGION, &region);
	ret = ret ? errno : 0;
	failed = !fail_nth(0);
	if (ret) {
		EXPECT(ret, ENOMEM);
		TEST_ASSERT(failed, "ENOMEM, but no allocation failed");
		set_log(h, on);
	}
	return failed;
}

/* Each allocation of log start, of log stop and of a split by a write fails once. */
static void allocations_fail(void)
{
	unsigned int n, round;
	bool start, stop;
	struct huge_vm h;
	long before;
	int ret;

	if (!two_dimensional_paging())
		test_case_skip("shadow pages map what the guest's tables do");
	set_param(FAIL_SLAB "ignore-gfp-wait", "N");
	set_param(FAIL_SLAB "verbose", "0");
	set_param(FAIL_PAGE "ignore-gfp-wait", "N");
	set_param(FAIL_PAGE "min-order", "0");
	set_param(FAIL_PAGE "verbose", "0");
	set_eager(true);
	/* Not with a bitmap: vmalloc() complains if it fails. */
	huge_vm_create(&h, ring_vm_min_entries(), map_thp(SIZE), SIZE);
	n = 0;
	do {
		start = set_log_failing(&h, true, ++n);
		before = faults(&h);
		guest_reads(&h, 0, h.pages, 1);
		expect_no_faults(&h, before);
		guest_writes(&h, 3, NR_HUGE, h.per_huge);
		expect_dirty(&h, 3, NR_HUGE, h.per_huge);

		stop = set_log_failing(&h, false, n);
		before = faults(&h);
		guest_writes(&h, 0, h.pages, 1);
		if (!stop)
			expect_no_faults(&h, before);
	} while (start || stop);
	printf("# %u allocations failed\n", n - 1);
	TEST_ASSERT(ring_vm_stat(h.rv, "largepages_split_failed") >= NR_HUGE,
		    "Few splits failed");

	/* A vCPU has page tables in store, and allocates more at times. */
	set_eager(false);
	n = 0;
	for (round = 0; round < 100 && n < 3; round++) {
		set_log(&h, true);
		set_touch(&h, WRITE, 3, NR_HUGE, h.per_huge);
		fail_nth(1);
		ret = _vcpu_ioctl(h.rv->vm, 0, KVM_RUN, NULL);
		ret = ret ? errno : 0;
		if (!fail_nth(0))
			n++;
		if (ret) {
			EXPECT(ret, ENOMEM);
			EXPECT(ring_vm_run(h.rv, 0), RING_VM_DONE);
		}
		expect_dirty(&h, 3, NR_HUGE, h.per_huge);
		set_log(&h, false);
		guest_writes(&h, 0, h.pages, 1);
	}
	printf("# %u allocations of the vCPU failed\n", n);
	TEST_ASSERT(n, "The vCPU allocated nothing");
	huge_vm_free(&h);
}

/*
 * Switch logging on and off, and the parameters, while the guest writes and executes;
 * nothing that it wrote since logging was on may be missing.
 */
#define TOGGLE_SECONDS	6
#define TOGGLE_ENTRIES	8192
#define X86_RET		0xc3

/* Memslots @go: another one, all the time, and the one that is tracked */
static void check_toggle(uint32_t entries, bool on, bool go)
{
	struct ring_vm_runner runner;
	size_t page = getpagesize();
	uint64_t i, stop, round, writes = 0;
	int how = WRITE;
	struct ring_vm_other_slot other;
	struct huge_vm h;
	uint8_t *copy;
	bool dirty;

	copy = malloc(SIZE);
	TEST_ASSERT(copy, "Insufficient Memory");
	set_eager(on);
	huge_vm_create(&h, entries, map_thp(SIZE), SIZE);
#ifdef __x86_64__
	/* Each page is written and executed, in turns; only where there is one. */
	for (i = 0; i < h.pages; i++)
		h.mem[i * page] = X86_RET;
	if (!go)
		how = WRITE_EXECUTE;
#endif
	set_touch(&h, how, 0, h.pages, 1);

	if (go)
		ring_vm_other_slot_start(&other, h.rv);
	ring_vm_runner_start(&runner, h.rv, 0);
	stop = now_s() + TOGGLE_SECONDS / 2;
	for (round = 0; now_s() < stop || !writes; round++) {
#ifdef __x86_64__
		set_param(NX_HUGE, round / 4 % 2 ? "force" : "off");
		set_eager(round % 2);
#endif
		usleep(round % 7 * 300);

		set_log(&h, true);
		memcpy(copy, h.mem, SIZE);
		usleep(round % 5 * 300);
		ring_vm_runner_stop(&runner);

		if (entries)
			ring_vm_collect_all(h.rv);
		else
			kvm_vm_get_dirty_log(h.rv->vm, RING_VM_SLOT, h.bitmap);
		for (i = 0; i < h.pages; i++) {
			if (!memcmp(copy + i * page, h.mem + i * page, page))
				continue;
			writes++;
			dirty = entries ? h.rv->seen[i] :
					  h.bitmap[i / 64] >> i % 64 & 1;
			TEST_ASSERT(dirty,
				    "Round %lu: page %lu was written unnoticed",
				    round, i);
		}
		ring_vm_forget(h.rv);

		ring_vm_runner_start(&runner, h.rv, 0);
		usleep(round % 3 * 300);
		if (go && round % 4 == 3)
			ring_vm_set_slot(h.rv, h.gpa, h.mem, 0, 0);
		else
			set_log(&h, false);
	}
	ring_vm_runner_stop(&runner);
	if (go)
		ring_vm_other_slot_stop(&other);
	printf("# %lu times, %lu pages written after\n", round, writes);
	set_log(&h, false);
	huge_vm_free(&h);
	free(copy);
}

static void toggle(void)
{
	check_toggle(0, false, false);
	check_toggle(0, true, false);
}

static void toggle_ring(void)
{
	check_toggle(TOGGLE_ENTRIES, false, false);
	check_toggle(TOGGLE_ENTRIES, true, false);
}

static void slots_go(void)
{
	check_toggle(0, false, true);
	check_toggle(0, true, true);
}

#ifdef __aarch64__
/* Whether log start splits is set before there is a memslot, and by a block's size. */
static void chunk_size(void)
{
	struct kvm_enable_cap cap = {
		.cap = KVM_CAP_ARM_EAGER_SPLIT_CHUNK_SIZE,
	};
	struct kvm_vm *vm = vm_create(VM_MODE_DEFAULT, 0, O_RDWR);
	uint64_t sizes = kvm_check_cap(KVM_CAP_ARM_SUPPORTED_BLOCK_SIZES), bit;
	int fd = vm_get_fd(vm);

	TEST_ASSERT(sizes & huge_size && sizes & getpagesize(),
		    "block sizes: 0x%lx", sizes);
	EXPECT(ioctl(fd, KVM_CHECK_EXTENSION, cap.cap), 0);
	for (bit = 1; bit; bit <<= 1) {
		cap.args[0] = bit;
		if (!(sizes & bit)) {
			EXPECT_ERROR(ioctl(fd, KVM_ENABLE_CAP, &cap), EINVAL);
			continue;
		}
		EXPECT(ioctl(fd, KVM_ENABLE_CAP, &cap), 0);
		EXPECT(ioctl(fd, KVM_CHECK_EXTENSION, cap.cap), bit);
	}
	cap.args[0] = sizes;
	EXPECT_ERROR(ioctl(fd, KVM_ENABLE_CAP, &cap), EINVAL);
	cap.args[0] = 0;
	EXPECT(ioctl(fd, KVM_ENABLE_CAP, &cap), 0);

	vm_userspace_mem_region_add(vm, VM_MEM_SRC_ANONYMOUS, 0, 0, 64, 0);
	EXPECT_ERROR(ioctl(fd, KVM_ENABLE_CAP, &cap), EINVAL);
	cap.args[0] = huge_size;
	EXPECT_ERROR(ioctl(fd, KVM_ENABLE_CAP, &cap), EINVAL);
	EXPECT(ioctl(fd, KVM_CHECK_EXTENSION, cap.cap), 0);
	kvm_vm_free(vm);
}
#endif

#ifdef __x86_64__

/* Where the guest executes, pages stay small; elsewhere they get huge again. */
static void check_nx(struct huge_vm *h)
{
	uint64_t per = h->per_huge, all = h->pages, i;
	long recovered, before;

	for (i = 0; i < all; i++)
		h->mem[i * getpagesize()] = X86_RET;

	set_log(h, true);
	do_touch(h, EXECUTE, 7, NR_HUGE, per);
	guest_writes(h, 3, NR_HUGE, per);
	expect_dirty(h, 3, NR_HUGE, per);
	before = faults(h);
	guest_reads(h, 0, all, 1);
	do_touch(h, EXECUTE, 0, all, 1);
	expect_no_faults(h, before);
	expect_dirty(h, 0, 0, 1);

	recovered = ring_vm_stat(h->rv, "largepages_recovered");
	set_log(h, false);
	EXPECT(ring_vm_stat(h->rv, "largepages_recovered"),
	       recovered + NR_HUGE);
	before = faults(h);
	guest_writes(h, 0, all, 1);
	expect_no_faults(h, before);

	/* They are huge, so they may not be executable. */
	before = faults(h);
	do_touch(h, EXECUTE, 7, NR_HUGE / 2, per);
	EXPECT(faults(h) - before, NR_HUGE / 2);
	guest_reads(h, 0, all, 1);

	set_log(h, true);
	guest_writes(h, 3, NR_HUGE, per);
	expect_dirty(h, 3, NR_HUGE, per);
	recovered = ring_vm_stat(h->rv, "largepages_recovered");
	set_log(h, false);
	EXPECT(ring_vm_stat(h->rv, "largepages_recovered"),
	       recovered + NR_HUGE / 2);
	before = faults(h);
	guest_reads(h, 0, all, 1);
	do_touch(h, EXECUTE, 7, NR_HUGE / 2, per);
	expect_no_faults(h, before);
}

static void nx(void)
{
	struct huge_vm h;

	if (!two_dimensional_paging())
		test_case_skip("shadow pages map what the guest's tables do");
	set_param(NX_HUGE, "force");
	set_eager(false);
	huge_vm_create(&h, ring_vm_min_entries(), map_thp(SIZE), SIZE);
	check_nx(&h);
	huge_vm_free(&h);
}

#endif

static const struct test_case cases[] = {
	{ "thp-ring: what is written is reported, reads do not fault",
	  thp_ring },
	{ "thp-bitmap: the same with a bitmap", thp_bitmap },
	{ "thp-ring-eager: the same if log start splits", thp_ring_eager },
	{ "thp-bitmap-eager: and with a bitmap", thp_bitmap_eager },
	{ "gigantic: the same with a page of 1 GiB", gigantic },
	{ "gigantic-eager: and if log start splits", gigantic_eager },
	{ "gigantic-in-part: one of its pages is split, and recovered",
	  gigantic_in_part },
#ifdef __x86_64__
	{ "gigantic-quota: most of its pages are not, as there is no room",
	  gigantic_quota },
#endif
	{ "toggle: no write after log start is missing", toggle },
	{ "toggle-ring: nor with a ring", toggle_ring },
	{ "slots-go: the same while memslots are deleted", slots_go },
#ifdef __x86_64__
	{ "nx: but where the guest executes pages get huge again", nx },
#endif
	{ "initially-set: log start does nothing, clearing a page splits",
	  initially_set },
	{ "initially-set-fault: the same if a write splits",
	  initially_set_fault },
	{ "initially-set-once: and if that is switched off again",
	  initially_set_once },
	{ "slot-ends: in a huge page, which stays small", slot_ends },
	{ "partly-mapped: page tables that are not full at log stop",
	  partly_mapped },
	{ "reads-again: of what was unmapped is not reported", reads_again },
	{ "freed-beside: pages that are not there at log stop", freed_beside },
	{ "slot-shifted: so that it has no huge pages", slot_shifted },
#ifdef __x86_64__
	{ "quota: no room for page tables, nothing is lost", quota },
#endif
	{ "allocations-fail: one at a time, nothing is lost", allocations_fail },
	{ "statistics: of what is split and recovered", statistics },
#ifdef __aarch64__
	{ "chunk-size: a block's, set before there are memslots", chunk_size },
#endif
};

/* The parameters as they were, for all ends of the test and of its cases */
static struct param {
	const char *path;
	char value[2];
} params[] = {
	{ EAGER }, { NX_HUGE },
};

static void restore_params(void)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(params); i++) {
		if (params[i].value[0])
			set_param(params[i].path, params[i].value);
	}
}

static void save_params(void)
{
	int fd, i;

	for (i = 0; i < ARRAY_SIZE(params); i++) {
		fd = open(params[i].path, O_RDONLY);
		if (fd < 0)
			continue;
		EXPECT(read(fd, params[i].value, 1), 1);
		close(fd);
	}
	atexit(restore_params);
}

int main(int argc, char *argv[])
{
	FILE *f = fopen(THP_SIZE, "r");

	if (f) {
		if (fscanf(f, "%zu", &huge_size) != 1)
			perror(THP_SIZE);
		fclose(f);
	}
	if (huge_size > SZ_32M) {
		print_skip("A huge page has %zu bytes", huge_size);
		exit(KSFT_SKIP);
	}
	save_params();
	test_cases_main(argc, argv, cases, ARRAY_SIZE(cases));
}
