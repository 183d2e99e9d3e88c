// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test of dirty logging with Intel's page-modification log (PML)
 *
 * With PML the CPU writes down itself which pages the guest writes to; KVM
 * takes that over at the vCPU's next exit. Without PML, or on the first write
 * to a page, the guest faults. Show, one case each, that
 *  - exactly the pages that were written are in the ring, in the order of
 *    their first writes, once, and again after a reset,
 *  - exactly they are in the bitmap,
 *  - a ring that is too small for them stops the vCPU, and nothing is lost,
 *  - this is PML's work and not that of faults: with PML no write faults, and
 *    the log fills up; without PML each page faults, and there is no log,
 *  - the smallest ring has room for a whole log.
 *
 * Runs with and without PML. What it expects depends on the parameter pml of
 * kvm_intel alone.
 */

#define _GNU_SOURCE /* for program_invocation_name */

#include "test_util.h"
#include "kvm_util.h"
#include "dirty_ring_vm.h"
#include "processor.h"
#include "test_cases.h"
#include "vmx.h"

#include <linux/bitmap.h>
#include <linux/bitops.h>
#include <sys/ioctl.h>

/*
 * Writes of the guest, not in the order of the pages, and to some pages twice,
 * with others in between. The last one is in the middle of a log.
 */
#define WRITES		1500
#define STEP		389	/* has no common factor with the above */
#define PAGES		1255
#define LOG_ENTRIES	512
#define PAGE_SIZE	4096

/* Leave gaps: some pages of the slot are never written to. */
#define SLOT_PAGES	(3 * PAGES)

#define ROUNDS		3

static uint64_t page_of_write(uint64_t i)
{
	return i * STEP % WRITES % PAGES * 3 + 1;
}

static void guest_code(void)
{
	uint64_t i, *page, stores = 0;

	while (true) {
		for (i = 0; i < WRITES; i++) {
			page = (void *)RING_VM_GVA +
			       page_of_write(i) * PAGE_SIZE;
			WRITE_ONCE(*page, ++stores);
		}
		GUEST_SYNC(0);
	}
}

/* Create a VM that runs the code above, with a bitmap if @entries is 0. */
static struct ring_vm *pml_vm_create(uint32_t entries)
{
	struct ring_vm *rv = ring_vm_create(entries, 1, SLOT_PAGES,
					    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	struct kvm_regs regs;

	vcpu_regs_get(rv->vm, 0, &regs);
	regs.rip = (uintptr_t)guest_code;
	vcpu_regs_set(rv->vm, 0, &regs);

	return rv;
}

/* Have the vCPU make all its writes, which must fit into the ring. */
static void write_all(struct ring_vm *rv)
{
	TEST_ASSERT(ring_vm_run(rv, 0) == RING_VM_DONE,
		    "The ring is full too early");
}

/* Expect exactly the pages written in the ring, once each, in order. */
static void expect_in_ring(struct ring_vm *rv)
{
	unsigned long *written = bitmap_alloc(SLOT_PAGES);
	uint32_t i, n;
	uint64_t page;

	n = ring_vm_collect(rv);
	TEST_ASSERT(n == PAGES, "%u pages are in the ring, %u were written",
		    n, PAGES);
	for (i = 0, n = 0; i < WRITES; i++) {
		page = page_of_write(i);
		if (test_and_set_bit(page, written))
			continue;
		TEST_ASSERT(rv->order[n] == page,
			    "Entry %u is page %lu; the guest wrote page %lu then",
			    n, rv->order[n], page);
		n++;
	}
	TEST_ASSERT(n == PAGES, "Made %u pages dirty, not %u", n, PAGES);

	free(written);
	ring_vm_forget(rv);
}

/* Expect exactly the pages written in the bitmap. */
static void expect_in_bitmap(struct ring_vm *rv)
{
	unsigned long *written = bitmap_alloc(SLOT_PAGES);
	unsigned long *bitmap = bitmap_alloc(SLOT_PAGES);
	uint64_t i;

	kvm_vm_get_dirty_log(rv->vm, RING_VM_SLOT, bitmap);
	for (i = 0; i < WRITES; i++)
		set_bit(page_of_write(i), written);
	for (i = 0; i < SLOT_PAGES; i++)
		TEST_ASSERT(test_bit(i, bitmap) == test_bit(i, written),
			    "Page %lu was %swritten, and is %sin the bitmap", i,
			    test_bit(i, written) ? "" : "not ",
			    test_bit(i, bitmap) ? "" : "not ");

	free(written);
	free(bitmap);
}

static void ring(void)
{
	struct ring_vm *rv = pml_vm_create(4096);
	int i;

	/* Faults at first, then the log. */
	for (i = 0; i < ROUNDS; i++) {
		write_all(rv);
		expect_in_ring(rv);
	}
	TEST_ASSERT(!ring_vm_collect(rv), "Reported without a write");

	ring_vm_free(rv);
}

static void bitmap(void)
{
	struct ring_vm *rv = pml_vm_create(0);
	int i;

	for (i = 0; i < ROUNDS; i++) {
		write_all(rv);
		expect_in_bitmap(rv);
	}

	ring_vm_free(rv);
}

static void small_ring(void)
{
	struct ring_vm *rv = pml_vm_create(ring_vm_min_entries());
	uint32_t *most = calloc(SLOT_PAGES, sizeof(*most));
	bool pml = dirty_ring_cpu_logs_pages();
	uint32_t i, n, full;
	int round;

	for (round = 0; round < ROUNDS; round++) {
		/* Written before a reset and after it: reported twice. */
		memset(most, 0, SLOT_PAGES * sizeof(*most));
		for (i = 0; i < WRITES; i++)
			most[page_of_write(i)]++;

		for (full = 0; ring_vm_run(rv, 0) == RING_VM_FULL; full++) {
			n = ring_vm_collect(rv);
			/*
			 * A write that faults is reported and waits for the
			 * reset, then faults again.
			 */
			if (!pml || !round)
				most[rv->order[(rv->nr_order - 1) %
					       rv->entries]]++;
			TEST_ASSERT(n >= rv->limit,
				    "Full with %u entries, limit %u", n,
				    rv->limit);
			TEST_ASSERT(!ring_vm_collect(rv),
				    "More than fits into the ring");
		}
		TEST_ASSERT(full, "%u pages fit into a ring of %u entries",
			    PAGES, rv->entries);

		ring_vm_collect(rv);
		TEST_ASSERT(!ring_vm_collect(rv),
			    "More than fits into the ring");

		for (i = 0; i < SLOT_PAGES; i++)
			TEST_ASSERT(!rv->seen[i] == !most[i] &&
				    rv->seen[i] <= most[i],
				    "Page %u was reported %u times, expected at most %u",
				    i, rv->seen[i], most[i]);
		ring_vm_forget(rv);
		printf("# stopped %u times\n", full);
	}

	free(most);
	ring_vm_free(rv);
}

/*
 * Exits of the calling process's vCPU, by reason, counted by a hist trigger.
 */

static char trace_dir[64];

static FILE *trace_open(const char *name, const char *mode)
{
	char path[128];

	snprintf(path, sizeof(path), "%s/%s", trace_dir, name);
	return fopen(path, mode);
}

static void trace_find(void)
{
	static const char * const dirs[] = {
		"/sys/kernel/tracing/events/kvm/kvm_exit",
		"/sys/kernel/debug/tracing/events/kvm/kvm_exit",
	};
	FILE *f;
	int i;

	for (i = 0; i < ARRAY_SIZE(dirs); i++) {
		strcpy(trace_dir, dirs[i]);
		f = trace_open("hist", "r");
		if (f) {
			fclose(f);
			return;
		}
	}
	test_case_skip("no hist triggers on kvm_exit in tracefs: %s",
		       strerror(errno));
}

static void trace_trigger(const char *prefix, const char *suffix)
{
	FILE *f = trace_open("trigger", "a");
	int ret;

	TEST_ASSERT(f, "Cannot open the trigger of kvm_exit: %s",
		    strerror(errno));
	fprintf(f, "%shist:keys=exit_reason%s if common_pid == %d\n", prefix,
		suffix, getpid());
	ret = fclose(f);
	TEST_ASSERT(!ret, "Cannot set a trigger on kvm_exit: %s",
		    strerror(errno));
}

struct exits {
	uint32_t ept_violation;
	uint32_t pml_full;
	/* To userspace, with the guest's ucall */
	uint32_t io;
	/* Interrupts; each empties the log. */
	uint32_t others;
};

/* Let the vCPU make all its writes, and count its exits meanwhile. */
static struct exits count_exits(struct ring_vm *rv)
{
	struct exits exits = {};
	uint32_t reason, hits;
	char line[256];
	FILE *f;

	trace_trigger("", "");
	write_all(rv);

	f = trace_open("hist", "r");
	TEST_ASSERT(f, "Cannot read the hist of kvm_exit: %s", strerror(errno));
	while (fgets(line, sizeof(line), f)) {
		if (sscanf(line, "{ exit_reason: %u } hitcount: %u", &reason,
			   &hits) != 2)
			continue;
		switch (reason) {
		case EXIT_REASON_EPT_VIOLATION:
			exits.ept_violation += hits;
			break;
		case EXIT_REASON_PML_FULL:
			exits.pml_full += hits;
			break;
		case EXIT_REASON_IO_INSTRUCTION:
			exits.io += hits;
			break;
		default:
			exits.others += hits;
		}
	}
	fclose(f);
	trace_trigger("!", "");

	printf("# exits: %u EPT violations, %u PML full, %u I/O, %u others\n",
	       exits.ept_violation, exits.pml_full, exits.io, exits.others);
	TEST_ASSERT(exits.io == 1, "%u ucalls were counted, not 1", exits.io);
	return exits;
}

static void expect_exits(uint32_t entries, void (*expect)(struct ring_vm *rv))
{
	bool pml = dirty_ring_cpu_logs_pages();
	struct ring_vm *rv;
	struct exits exits;
	int i;

	trace_find();
	rv = pml_vm_create(entries);

	/* Nothing is mapped yet: each page faults, with PML or without. */
	exits = count_exits(rv);
	TEST_ASSERT(exits.ept_violation >= PAGES && !exits.pml_full,
		    "The first writes: %u EPT violations, %u times PML full",
		    exits.ept_violation, exits.pml_full);
	expect(rv);

	/*
	 * Repeat until there was no interrupt: it empties the log. Without a
	 * log, one between a fault and its write may make the write fault
	 * again.
	 */
	for (i = 0; i < 100; i++) {
		exits = count_exits(rv);
		expect(rv);
		if (!pml || !exits.others)
			break;
	}
	TEST_ASSERT(i < 100, "No round without an interrupt");
	TEST_ASSERT(exits.ept_violation >= (pml ? 0 : PAGES) &&
		    exits.ept_violation <= (pml ? 0 : PAGES + exits.others),
		    "%u writes faulted", exits.ept_violation);
	TEST_ASSERT(exits.pml_full == (pml ? PAGES / LOG_ENTRIES : 0),
		    "The log was full %u times", exits.pml_full);

	ring_vm_free(rv);
}

static void need_ept(void)
{
	FILE *f = fopen("/sys/module/kvm_intel/parameters/ept", "r");

	if (!f || fgetc(f) != 'Y')
		test_case_skip("kvm_intel does not use EPT");
	fclose(f);
}

static void exits_ring(void)
{
	need_ept();
	expect_exits(4096, expect_in_ring);
}

static void exits_bitmap(void)
{
	need_ept();
	expect_exits(0, expect_in_bitmap);
}

static void smallest_ring(void)
{
	uint32_t smallest = dirty_ring_cpu_logs_pages() ? 16384 : 4096;
	struct kvm_enable_cap cap = { .cap = dirty_ring_cap() };
	struct kvm_vm *vm;
	int ret;

	for (cap.args[0] = 1; cap.args[0] <= 32768; cap.args[0] *= 2) {
		vm = vm_create(VM_MODE_DEFAULT, 0, O_RDWR);
		errno = 0;
		ret = ioctl(vm_get_fd(vm), KVM_ENABLE_CAP, &cap);
		if (cap.args[0] < smallest)
			TEST_ASSERT(ret == -1 && errno == EINVAL,
				    "%llu bytes: got %d (%s), want -1 (%s)",
				    cap.args[0], ret, strerror(errno),
				    strerror(EINVAL));
		else
			TEST_ASSERT(!ret, "%llu bytes: %s", cap.args[0],
				    strerror(errno));
		kvm_vm_free(vm);
	}
}

static const struct test_case cases[] = {
	{ "ring: exactly what was written, in that order", ring },
	{ "bitmap: exactly what was written", bitmap },
	{ "small-ring: full, nothing lost", small_ring },
	{ "exits-ring: only PML saw the writes, or only faults", exits_ring },
	{ "exits-bitmap: the same", exits_bitmap },
	{ "smallest-ring: holds the whole log", smallest_ring },
};

int main(int argc, char **argv)
{
	dirty_ring_check_supported();
	if (!is_intel_cpu())
		ksft_exit_skip("the processor has no VMX\n");

	test_cases_main(argc, argv, cases, ARRAY_SIZE(cases));
}
