// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test that no dirty page is lost when KVM_GET_DIRTY_LOG, or
 * KVM_CLEAR_DIRTY_LOG, cannot access the bitmap of userspace
 *
 * Show, one case each, that the next call returns every page that the guest
 * wrote, and no other, after one that failed
 *  - because there is no buffer, or it must not be written to,
 *  - because the buffer ends early, at each boundary of its pages, wherever in
 *    a page it begins,
 *  - when the bitmap is too large to be copied at once,
 *  - with KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, where another call clears,
 *  - while the guest writes.
 */

#define _GNU_SOURCE /* for program_invocation_name */

#include <linux/bitmap.h>
#include <sys/mman.h>

#include "test_util.h"
#include "kvm_util.h"
#include "dirty_ring_vm.h"
#include "processor.h"
#include "test_cases.h"

#define FAULT_SLOT	(RING_VM_SLOT + 1)
#define FAULT_GPA	0x100000000UL

/* The slot that all VMs of the library have; its pages are not used here. */
#define OTHER_PAGES	64

#define MAX_WRITTEN	512

/*
 * A VM with a memslot that is large, and so its bitmap. The guest writes to few
 * of its pages, mapped one after another.
 */
static struct {
	struct ring_vm *rv;
	uint64_t pages;
	/* Size of the bitmap, in bytes, in whole longs, and in pages */
	size_t size;
	size_t nr;
	uint64_t written[MAX_WRITTEN];
	uint32_t nr_written;
	/* What was written, and what was reported */
	unsigned long *want;
	unsigned long *got;
	/*
	 * A buffer, a page longer than the bitmap, to begin anywhere in a page
	 */
	uint8_t *buffer;
} f;

static void *map_anonymous(size_t size)
{
	void *mem = mmap(NULL, size, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	TEST_ASSERT(mem != MAP_FAILED, "mmap failed");
	return mem;
}

/* Add a page to those that the guest writes to. */
static void add_page(uint64_t page)
{
	if (page >= f.pages || test_bit(page, f.want))
		return;

	TEST_ASSERT(f.nr_written < MAX_WRITTEN, "Too many pages");
	f.written[f.nr_written++] = page;
	set_bit(page, f.want);
}

/* Create a memslot whose bitmap has so many pages, the last one not full. */
static void fault_vm_create(size_t bitmap_pages, void (*before)(struct kvm_vm *))
{
	uint64_t page_size = getpagesize(), page_bits = page_size * 8, i;
	void *mem;

	f.nr = bitmap_pages;
	f.pages = bitmap_pages * page_bits - page_bits / 2 + 1;
	f.size = round_up(f.pages, 64) / 8;
	f.want = map_anonymous(f.size);
	f.got = map_anonymous(f.size);
	f.buffer = map_anonymous((f.nr + 1) * page_size);

	/* A whole word, both sides of boundaries, and 100 pages far from any. */
	for (i = 0; i < 64; i++)
		add_page(i);
	for (i = 0; i <= f.nr && i < 32; i++) {
		add_page(i * page_bits);
		if (i)
			add_page(i * page_bits - 1);
	}
	for (i = f.nr - min(f.nr, 4UL); i <= f.nr; i++) {
		add_page(i * page_bits);
		if (i)
			add_page(i * page_bits - 1);
	}
	add_page(f.pages - 1);
	for (i = 0; i < 100; i++)
		add_page(i * (f.pages / 100) + i);

	f.rv = ring_vm_create(0, 1, OTHER_PAGES, 0, before);
	mem = map_anonymous(f.pages * page_size);
	madvise(mem, f.pages * page_size, MADV_NOHUGEPAGE);
	vm_set_slot(f.rv->vm, FAULT_SLOT, FAULT_GPA, mem, f.pages * page_size,
		    KVM_MEM_LOG_DIRTY_PAGES);
	for (i = 0; i < f.nr_written; i++)
		virt_map(f.rv->vm, RING_VM_GVA + (OTHER_PAGES + i) * page_size,
			 FAULT_GPA + f.written[i] * page_size,
			 vm_num_guest_pages(VM_MODE_DEFAULT, 1), 0);
}

/* Let the guest write to all of these pages. */
static void write_pages(void)
{
	ring_vm_write(f.rv, 0, OTHER_PAGES, f.nr_written);
}

/* Return: 0, or a negative error number. */
static int get_log(void *buffer)
{
	struct kvm_dirty_log log = {
		.slot = FAULT_SLOT,
		.dirty_bitmap = buffer,
	};

	return ioctl(vm_get_fd(f.rv->vm), KVM_GET_DIRTY_LOG, &log) ? -errno : 0;
}

static int clear_log(uint64_t first, uint64_t pages, void *buffer)
{
	struct kvm_clear_dirty_log log = {
		.slot = FAULT_SLOT,
		.first_page = first,
		.num_pages = pages,
		.dirty_bitmap = buffer,
	};

	return ioctl(vm_get_fd(f.rv->vm), KVM_CLEAR_DIRTY_LOG, &log) ? -errno : 0;
}

/* Expect the log to have exactly what was written, or nothing. */
static void expect_log(bool written, const char *when)
{
	uint64_t i, lost = 0;

	memset(f.got, 0xff, f.size);
	EXPECT(get_log(f.got), 0);
	for (i = 0; i < f.nr_written; i++)
		lost += !test_bit(f.written[i], f.got);
	if (written)
		TEST_ASSERT(!lost, "%s: %lu of %u dirty pages are lost", when,
			    lost, f.nr_written);
	else
		TEST_ASSERT(lost == f.nr_written, "%s: %lu pages are reported",
			    when, f.nr_written - lost);
	for (i = 0; i < f.size / sizeof(long); i++)
		TEST_ASSERT(!(f.got[i] & ~f.want[i]),
			    "%s: word %lu has %#lx, of it %#lx was written",
			    when, i, f.got[i], f.want[i]);
}

/*
 * Expect that what was dirty still is, and is reported once. A page that is
 * reported is protected: the guest's next write is reported as well.
 */
static void expect_nothing_lost(const char *when)
{
	expect_log(true, when);
	expect_log(false, when);
	write_pages();
	expect_log(true, when);
	expect_log(false, when);
}

/* Map all pages first, so that all calls find the same. */
static void warm_up(void)
{
	write_pages();
	expect_log(true, "At first");
	expect_log(false, "At first");
}

static void no_buffer(void)
{
	fault_vm_create(2, NULL);
	warm_up();

	write_pages();
	EXPECT(get_log(NULL), -EFAULT);
	expect_nothing_lost("No buffer");

	/* Fail several times, with writes in between. */
	write_pages();
	EXPECT(get_log(NULL), -EFAULT);
	EXPECT(get_log((void *)-4096UL), -EFAULT);
	write_pages();
	EXPECT(get_log(NULL), -EFAULT);
	expect_nothing_lost("No buffer, three times");

	/* Nothing was written: nothing is reported. */
	EXPECT(get_log(NULL), -EFAULT);
	expect_log(false, "No buffer, nothing dirty");
	ring_vm_free(f.rv);
}

static void read_only(void)
{
	fault_vm_create(2, NULL);
	warm_up();

	write_pages();
	EXPECT(mprotect(f.buffer, f.nr * getpagesize(), PROT_READ), 0);
	EXPECT(get_log(f.buffer), -EFAULT);
	expect_nothing_lost("A read-only buffer");
	ring_vm_free(f.rv);
}

/*
 * Let the buffer begin @offset bytes into a page, and end after some whole
 * pages, where memory is read-only, or not mapped.
 */
static void ends_after(size_t pages, size_t offset, bool unmapped)
{
	size_t page_size = getpagesize(), rest = (f.nr + 1 - pages) * page_size;
	uint8_t *end = f.buffer + pages * page_size;
	char when[64];

	snprintf(when, sizeof(when), "%zu of %zu pages of a buffer%s", pages,
		 f.nr, offset ? " with an odd beginning" : "");
	if (unmapped)
		EXPECT(munmap(end, rest), 0);
	else
		EXPECT(mprotect(end, rest, PROT_READ), 0);

	write_pages();
	EXPECT(get_log(f.buffer + offset), -EFAULT);
	expect_nothing_lost(when);

	if (unmapped)
		TEST_ASSERT(mmap(end, rest, PROT_READ | PROT_WRITE, MAP_FIXED |
				 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == end,
			    "mmap failed");
	else
		EXPECT(mprotect(end, rest, PROT_READ | PROT_WRITE), 0);
}

static void boundary(void)
{
	size_t pages;

	fault_vm_create(6, NULL);
	warm_up();
	for (pages = 0; pages < f.nr; pages++) {
		ends_after(pages, 0, pages % 2);
		/* Begins in the first page, and may end in it */
		ends_after(pages, getpagesize() - 8, !(pages % 2));
		ends_after(pages, 3, pages % 2);
	}
	/* Exactly as long as needed */
	write_pages();
	EXPECT(mprotect(f.buffer + f.nr * getpagesize(), getpagesize(),
			PROT_NONE), 0);
	EXPECT(get_log(f.buffer), 0);
	expect_log(false, "A buffer that is just long enough");
	ring_vm_free(f.rv);
}

/* Most of a bitmap that KVM copies at once */
#define CHUNK_BYTES	(512 * 1024)

static void large(void)
{
	size_t chunk = CHUNK_BYTES / getpagesize();

	fault_vm_create(chunk + 2, NULL);
	warm_up();
	ends_after(0, 0, true);
	ends_after(chunk - 1, 0, true);
	ends_after(chunk, 0, true);
	ends_after(chunk + 1, 0, true);
	ends_after(chunk, 8, false);
	ring_vm_free(f.rv);
}

static void manual_protect(struct kvm_vm *vm)
{
	struct kvm_enable_cap cap = {
		.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
		.args[0] = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
	};

	vm_enable_cap(vm, &cap);
}

static void manual(void)
{
	size_t page_size = getpagesize(), n;

	fault_vm_create(3, manual_protect);

	write_pages();
	expect_log(true, "At first");
	EXPECT(clear_log(0, f.pages, f.want), 0);
	expect_log(false, "Cleared");

	write_pages();
	EXPECT(get_log(NULL), -EFAULT);
	expect_log(true, "No buffer");
	for (n = 0; n < f.nr; n++) {
		memcpy(f.buffer, f.want, f.size);
		EXPECT(mprotect(f.buffer + n * page_size,
				(f.nr - n) * page_size, PROT_NONE), 0);
		EXPECT(get_log(f.buffer), -EFAULT);
		expect_log(true, "A buffer that ends early");
		/* If it cannot read all, it clears nothing. */
		EXPECT(clear_log(0, f.pages, f.buffer), -EFAULT);
		expect_log(true, "Cleared with a buffer that ends early");
		EXPECT(mprotect(f.buffer, f.nr * page_size,
				PROT_READ | PROT_WRITE), 0);
	}
	EXPECT(clear_log(0, f.pages, NULL), -EFAULT);
	expect_log(true, "Cleared without a buffer");

	EXPECT(clear_log(0, f.pages, f.want), 0);
	expect_log(false, "Cleared");
	write_pages();
	expect_log(true, "Cleared, and written");
	ring_vm_free(f.rv);
}

/* Add what the log has now to @sum. */
static void add_log(unsigned long *sum)
{
	size_t i;

	EXPECT(get_log(f.got), 0);
	for (i = 0; i < f.size / sizeof(long); i++)
		sum[i] |= f.got[i];
}

/*
 * Let the guest write meanwhile: bits that KVM puts back, and bits that the
 * guest's writes set, must not overwrite each other, not even in one word.
 */
#define RUN_ROUNDS	100

static void running(void)
{
	struct ring_vm_runner runner;
	struct ring_vm_task *task;
	uint64_t before, i, lost;
	unsigned long *sum;
	int round;

	fault_vm_create(1, NULL);
	sum = map_anonymous(f.size);
	warm_up();
	task = ring_vm_task(f.rv, 0);
	/* Let it write for ever, and count its stores. */
	ring_vm_set_task(f.rv, 0, OTHER_PAGES, f.nr_written, 1);
	WRITE_ONCE(task->spin, 1);
	ring_vm_runner_start(&runner, f.rv, 0);

	for (round = 0; round < RUN_ROUNDS; round++) {
		memset(sum, 0, f.size);
		before = READ_ONCE(task->stores);
		do {
			EXPECT(get_log(NULL), -EFAULT);
			if (round % 2)
				add_log(sum);
			/* The last store that is counted may not be done. */
		} while (READ_ONCE(task->stores) - before <= f.nr_written);
		EXPECT(get_log(NULL), -EFAULT);
		add_log(sum);
		for (i = 0, lost = 0; i < f.nr_written; i++)
			lost += !test_bit(f.written[i], sum);
		TEST_ASSERT(!lost, "Round %d: %lu of %u dirty pages are lost",
			    round, lost, f.nr_written);
	}
	ring_vm_runner_stop(&runner);
	ring_vm_free(f.rv);
}

static const struct test_case cases[] = {
	{ "no-buffer: EFAULT, and nothing is lost", no_buffer },
	{ "read-only: EFAULT, and nothing is lost", read_only },
	{ "boundary: the buffer ends early, anywhere", boundary },
	{ "large: the same where it is copied in pieces", large },
	{ "manual: the same with manual protection, and to clear", manual },
	{ "running: the same while the guest writes", running },
};

int main(int argc, char **argv)
{
	test_cases_main(argc, argv, cases, ARRAY_SIZE(cases));
}
