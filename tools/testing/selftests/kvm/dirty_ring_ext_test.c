// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test what KVM's dirty ring does beyond the interface it has elsewhere
 *
 * Show, one case each, that
 *  - KVM_CAP_DIRTY_RING_EXT tells what there is,
 *  - KVM_RESET_DIRTY_RINGS on a vCPU resets its ring alone, while it runs and
 *    others are reset, and a copy kept up to date that way is right,
 *  - a reset that finds nothing, because another has taken it, returns when the
 *    other's pages are protected,
 *  - after KVM_SYNC_DIRTY_RINGS one harvest sees all that was written before,
 *    while vCPUs run, and no vCPU returns to userspace for it,
 *  - that includes a page that another vCPU is about to mark, and what a vCPU
 *    wrote that is preempted,
 *  - a sync does not wait for vCPUs that do not run,
 *  - a sync says so if what is in the overflow does not fit into the rings,
 *  - a page that KVM writes again and again is in a ring once, but again as
 *    soon as that entry was harvested,
 *  - of thousands of pages that find no room in a ring none is lost, and none is
 *    reported that was not written, or it is counted,
 *  - the statistics in debugfs count what happened, and setting them to 0 does
 *    no harm,
 *  - resets that find nothing flush no TLB,
 *  - pushes that are traced are in the ring as well.
 */

#define _GNU_SOURCE /* for program_invocation_name */

#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>

#include "test_util.h"
#include "kvm_util.h"
#include "dirty_ring_vm.h"
#include "processor.h"
#include "test_cases.h"

static int vm_sync(struct kvm_vm *vm)
{
	return ioctl(vm_get_fd(vm), KVM_SYNC_DIRTY_RINGS, 0) ? -errno : 0;
}

static void need(int feature, const char *name)
{
	struct kvm_vm *vm = vm_create(VM_MODE_DEFAULT, 0, O_RDWR);
	int ext = ioctl(vm_get_fd(vm), KVM_CHECK_EXTENSION,
			KVM_CAP_DIRTY_RING_EXT);

	kvm_vm_free(vm);
	if (ext <= 0 || !(ext & feature))
		test_case_skip("KVM has no %s", name);
}

static void need_sync(void)
{
	need(KVM_DIRTY_RING_EXT_SYNC, "KVM_SYNC_DIRTY_RINGS");
}

static void need_vcpu_reset(void)
{
	need(KVM_DIRTY_RING_EXT_VCPU_RESET, "reset of a vCPU's ring alone");
}

static void numbers(void)
{
	struct kvm_vm *vm = vm_create(VM_MODE_DEFAULT, 0, O_RDWR);
	int ext;

	EXPECT(KVM_CAP_DIRTY_RING_EXT, 0x44520001);
	EXPECT(KVM_DIRTY_RING_EXT_VCPU_RESET, 1 << 0);
	EXPECT(KVM_DIRTY_RING_EXT_SYNC, 1 << 1);
	EXPECT(KVM_SYNC_DIRTY_RINGS, _IO(0xae, 0xf7));

	/* Not more than is known here */
	ext = ioctl(vm_get_fd(vm), KVM_CHECK_EXTENSION, KVM_CAP_DIRTY_RING_EXT);
	EXPECT(ext & ~(KVM_DIRTY_RING_EXT_VCPU_RESET | KVM_DIRTY_RING_EXT_SYNC),
	       0);
	kvm_vm_free(vm);
}

static void sync_without_ring(void)
{
	struct kvm_vm *vm = vm_create(VM_MODE_DEFAULT, 0, O_RDWR);

	need_sync();
	EXPECT(vm_sync(vm), -EINVAL);
	kvm_vm_free(vm);
}

/*
 * Have the guest write page after page, and count its stores: all but the last
 * that was counted before a sync must be in the ring after it. If the CPU logs
 * pages, some are not in the ring without the sync.
 */
#define SYNC_PAGES	400
#define SYNC_ROUNDS	60

/* How many of the first pages were not harvested, and the lowest of them */
static uint64_t missing(struct ring_vm *rv, uint64_t pages, uint64_t *first)
{
	uint64_t i, n = 0;

	for (i = pages; i--;) {
		if (!rv->seen[i]) {
			n++;
			*first = i;
		}
	}
	return n;
}

static void sync_running(void)
{
	struct ring_vm *rv;
	struct ring_vm_task *task;
	struct ring_vm_runner runner;
	uint64_t before, written, lost, first = 0, early = 0, halfway = 0;
	uint32_t exits;
	int round;

	need_sync();
	rv = ring_vm_create(4096, 1, SYNC_PAGES, KVM_MEM_LOG_DIRTY_PAGES, NULL);

	/* Map every page, so that only writes are left to log. */
	ring_vm_write(rv, 0, 0, SYNC_PAGES);
	ring_vm_collect_all(rv);
	ring_vm_forget(rv);

	task = ring_vm_task(rv, 0);
	for (round = 0; round < SYNC_ROUNDS; round++) {
		before = READ_ONCE(task->stores);
		/* Again and again, so that it stays in the guest */
		ring_vm_set_task(rv, 0, 0, SYNC_PAGES, 1);
		WRITE_ONCE(task->spin, 1);
		ring_vm_runner_start(&runner, rv, 0);
		do {
			written = READ_ONCE(task->stores) - before;
		} while (written < SYNC_PAGES * round / SYNC_ROUNDS + 2);
		exits = READ_ONCE(runner.exits);

		/* All stores but the last of these are done. */
		written = READ_ONCE(task->stores) - before - 1;
		halfway += written < SYNC_PAGES;
		if (written > SYNC_PAGES)
			written = SYNC_PAGES;

		ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL);
		early += missing(rv, written, &first);

		EXPECT(vm_sync(rv->vm), 0);
		EXPECT(READ_ONCE(runner.exits), exits);
		ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL);
		lost = missing(rv, written, &first);
		TEST_ASSERT(!lost, "Round %d: %lu of %lu pages are lost, from %lu on",
			    round, lost, written, first);

		ring_vm_runner_stop(&runner);
		/* Start over, whatever was interrupted. */
		EXPECT(ring_vm_run(rv, 0), RING_VM_DONE);
		vm_reset_dirty_rings(rv->vm);
		ring_vm_collect_all(rv);
		ring_vm_forget(rv);
	}
	printf("# %lu of %d syncs came while the guest wrote, %lu pages were missing before\n",
	       halfway, SYNC_ROUNDS, early);
	/* A sync is needed because of the CPU's own log. */
	EXPECT(!!early, dirty_ring_cpu_logs_pages());
	ring_vm_free(rv);
}

/*
 * Have two vCPUs write the same pages: once a page is mapped for one, the other
 * can write it before KVM marks it dirty for the first.
 */
#define SHARED_ROUNDS	30

static void sync_shared(void)
{
	struct ring_vm_runner runners[2];
	struct ring_vm *rv;
	uint64_t before[2], stores, written, lost, first = 0;
	int round, i;

	need_sync();
	rv = ring_vm_create(4096, 2, SYNC_PAGES, KVM_MEM_LOG_DIRTY_PAGES, NULL);
	ring_vm_write(rv, 0, 0, SYNC_PAGES);
	ring_vm_collect_all(rv);
	ring_vm_forget(rv);

	for (round = 0; round < SHARED_ROUNDS; round++) {
		for (i = 0; i < 2; i++) {
			before[i] = READ_ONCE(ring_vm_task(rv, i)->stores);
			ring_vm_set_task(rv, i, 0, SYNC_PAGES, 1);
			WRITE_ONCE(ring_vm_task(rv, i)->spin, 1);
			ring_vm_runner_start(&runners[i], rv, i);
		}
		do {
			written = 0;
			for (i = 0; i < 2; i++) {
				stores = READ_ONCE(ring_vm_task(rv, i)->stores);
				written = max(written, stores - before[i]);
			}
			/* One starts later, and catches up. */
		} while (written < SYNC_PAGES / 2 + 5 * round);

		/* All but the last, see above */
		written = min(written - 1, (uint64_t)SYNC_PAGES);
		EXPECT(vm_sync(rv->vm), 0);
		for (i = 0; i < 2; i++)
			ring_vm_harvest(rv, i, DIRTY_RING_HARVEST_ALL);
		lost = missing(rv, written, &first);
		TEST_ASSERT(!lost, "Round %d: %lu of %lu pages are lost, from %lu on",
			    round, lost, written, first);

		for (i = 0; i < 2; i++) {
			ring_vm_runner_stop(&runners[i]);
			EXPECT(ring_vm_run(rv, i), RING_VM_DONE);
		}
		vm_reset_dirty_rings(rv->vm);
		ring_vm_collect_all(rv);
		ring_vm_forget(rv);
	}
	ring_vm_free(rv);
}

/*
 * Have the guest write page after page, and preempt it at any point: compare
 * its memory with what is reported.
 */
#define PREEMPT_PAGES	2000
#define PREEMPT_ROUNDS	40

static uint64_t first_word(struct ring_vm *rv, uint64_t page)
{
	return *(uint64_t *)(rv->mem + page * getpagesize());
}

static void sync_preempted(void)
{
	uint64_t i, old[PREEMPT_PAGES], written, total = 0;
	struct ring_vm_preempter preempter;
	struct ring_vm_runner runner;
	struct ring_vm_task *task;
	struct ring_vm *rv;
	int round;

	need_sync();
	rv = ring_vm_create(4096, 1, PREEMPT_PAGES, KVM_MEM_LOG_DIRTY_PAGES,
			    NULL);
	ring_vm_write(rv, 0, 0, PREEMPT_PAGES);

	task = ring_vm_task(rv, 0);
	ring_vm_set_task(rv, 0, 0, PREEMPT_PAGES, 1);
	WRITE_ONCE(task->spin, 1);
	ring_vm_runner_start(&runner, rv, 0);
	ring_vm_preempter_start(&preempter, &runner);

	for (round = 0; round < PREEMPT_ROUNDS; round++) {
		ring_vm_preempt(&preempter, 0);
		ring_vm_collect_all(rv);
		ring_vm_forget(rv);
		for (i = 0; i < PREEMPT_PAGES; i++)
			old[i] = first_word(rv, i);
		ring_vm_go_on(&preempter);

		/* Up to the whole of it. */
		i = READ_ONCE(task->stores);
		while (READ_ONCE(task->stores) - i <
		       PREEMPT_PAGES * round / PREEMPT_ROUNDS + 2)
			;

		ring_vm_preempt(&preempter, 0);
		EXPECT(vm_sync(rv->vm), 0);
		ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL);
		for (i = 0, written = 0; i < PREEMPT_PAGES; i++) {
			if (first_word(rv, i) == old[i])
				continue;
			written++;
			TEST_ASSERT(rv->seen[i],
				    "Round %d: page %lu was written, and lost",
				    round, i);
		}
		total += written;
		vm_reset_dirty_rings(rv->vm);
		ring_vm_go_on(&preempter);
	}
	printf("# %lu pages were written\n", total);

	ring_vm_preempter_stop(&preempter);
	ring_vm_runner_stop(&runner);
	ring_vm_free(rv);
}

/* Have a vCPU wait in KVM_RUN. */
#ifdef __x86_64__
#define BLOCKED		KVM_MP_STATE_HALTED
#else
#define BLOCKED		KVM_MP_STATE_STOPPED
#endif

static void sync_not_running(void)
{
	struct kvm_mp_state blocked = { .mp_state = BLOCKED };
	struct ring_vm *rv;
	struct ring_vm_runner runner;
	struct timespec start;
	int i;

	need_sync();
	/* One vCPU in userspace, one that never ran, one that is blocked. */
	rv = ring_vm_create(ring_vm_min_entries(), 3, 64,
			    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	ring_vm_write(rv, 0, 0, 64);
	vcpu_set_mp_state(rv->vm, 2, &blocked);
	ring_vm_runner_start(&runner, rv, 2);

	clock_gettime(CLOCK_MONOTONIC, &start);
	for (i = 0; i < 1000; i++)
		EXPECT(vm_sync(rv->vm), 0);
	/* If it hangs, the case's time limit ends it. */
	printf("# 1000 syncs in %ld ms\n",
	       timespec_to_ns(timespec_diff_now(start)) / 1000000);
	EXPECT(runner.exits, 0);
	EXPECT(ring_vm_collect(rv), 64);
	ring_vm_expect(rv, 0, 64);

	ring_vm_runner_stop(&runner);
	ring_vm_free(rv);
}

static struct ring_vm *parallel_rv;
static bool parallel_quit;

static void *parallel_sync(void *unused)
{
	int ret;

	while (!READ_ONCE(parallel_quit)) {
		ret = vm_sync(parallel_rv->vm);
		TEST_ASSERT(!ret || ret == -ENOSPC, "Sync failed: %d", ret);
	}
	return NULL;
}

static void sync_in_parallel(void)
{
	struct ring_vm_runner runners[2];
	struct timespec start;
	pthread_t threads[2];
	struct ring_vm *rv;
	uint32_t total = 0;
	int i;

	need_sync();
	rv = ring_vm_create(ring_vm_min_entries(), 2, 512,
			    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	parallel_rv = rv;
	for (i = 0; i < 2; i++) {
		ring_vm_set_task(rv, i, 0, 512, 1);
		WRITE_ONCE(ring_vm_task(rv, i)->spin, 1);
		ring_vm_runner_start(&runners[i], rv, i);
		EXPECT(pthread_create(&threads[i], NULL, parallel_sync, NULL),
		       0);
	}

	/* If nothing moves, the case's time limit ends it. */
	clock_gettime(CLOCK_MONOTONIC, &start);
	while (timespec_diff_now(start).tv_sec < 3 || total <= 1000)
		total += ring_vm_collect(rv);

	WRITE_ONCE(parallel_quit, true);
	for (i = 0; i < 2; i++) {
		EXPECT(pthread_join(threads[i], NULL), 0);
		ring_vm_runner_stop(&runners[i]);
	}
	printf("# %u entries meanwhile\n", total);
	ring_vm_free(rv);
}

static int vcpu_reset(struct kvm_vm *vm, uint32_t vcpu)
{
	int ret = _vcpu_ioctl(vm, vcpu, KVM_RESET_DIRTY_RINGS, NULL);

	return ret < 0 ? -errno : ret;
}

static void vcpu_reset_without_ring(void)
{
	struct kvm_vm *vm = vm_create(VM_MODE_DEFAULT, 0, O_RDWR);

	need_vcpu_reset();
	vm_vcpu_add(vm, 0);
	EXPECT(vcpu_reset(vm, 0), -EINVAL);
	kvm_vm_free(vm);
}

static void vcpu_reset_alone(void)
{
	struct ring_vm *rv;

	need_vcpu_reset();
	rv = ring_vm_create(ring_vm_min_entries(), 2, 64,
			    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	ring_vm_write(rv, 0, 0, 32);
	ring_vm_write(rv, 1, 32, 32);
	EXPECT(ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL), 32);
	EXPECT(ring_vm_harvest(rv, 1, DIRTY_RING_HARVEST_ALL), 32);
	ring_vm_expect(rv, 0, 64);

	/* The pages of this ring are protected again, */
	EXPECT(vcpu_reset(rv->vm, 0), 32);
	EXPECT(vcpu_reset(rv->vm, 0), 0);
	ring_vm_write(rv, 0, 0, 32);
	EXPECT(ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL), 32);
	ring_vm_expect(rv, 0, 32);
	/* those of the other are not. */
	ring_vm_write(rv, 0, 32, 32);
	EXPECT(ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL), 0);

	/* What is harvested, either reset takes. */
	EXPECT(vcpu_reset(rv->vm, 1), 32);
	EXPECT(vm_reset_dirty_rings(rv->vm), 32);
	ring_vm_write(rv, 1, 0, 64);
	EXPECT(ring_vm_collect(rv), 64);
	ring_vm_expect(rv, 0, 64);
	ring_vm_free(rv);
}

/*
 * Have each vCPU write to all pages, and give each a thread that harvests and
 * resets its ring and copies the pages.
 */
#define HARVESTED_VCPUS	4
#define HARVESTED_PAGES	256

struct harvester {
	struct ring_vm *rv;
	uint32_t vcpu;
	/* What was harvested, not copied yet; allocated. */
	uint64_t *pages;
	uint32_t nr_pages;
	uint8_t *copy;
	uint64_t total;
	bool quit;
	pthread_t thread;
};

/* Threads copy the same pages; the copy after the last reset has to win. */
static pthread_mutex_t copy_lock = PTHREAD_MUTEX_INITIALIZER;

static void note_page(uint32_t slot, uint64_t offset, void *data)
{
	struct harvester *h = data;

	TEST_ASSERT(offset < HARVESTED_PAGES, "Page %lu was reported", offset);
	h->pages[h->nr_pages++] = offset;
}

static uint32_t harvest_and_copy(struct harvester *h)
{
	int page = getpagesize();
	uint32_t n, i;

	h->nr_pages = 0;
	n = vcpu_harvest_dirty_ring(h->rv->vm, h->vcpu, DIRTY_RING_HARVEST_ALL,
				    note_page, h);
	EXPECT(vcpu_reset(h->rv->vm, h->vcpu), n);
	for (i = 0; i < n; i++) {
		pthread_mutex_lock(&copy_lock);
		memcpy(h->copy + h->pages[i] * page,
		       h->rv->mem + h->pages[i] * page, page);
		pthread_mutex_unlock(&copy_lock);
	}
	return n;
}

static void *harvester_fn(void *data)
{
	struct harvester *h = data;

	while (!READ_ONCE(h->quit))
		WRITE_ONCE(h->total, h->total + harvest_and_copy(h));
	return NULL;
}

static void vcpu_reset_running(void)
{
	struct ring_vm_runner runners[HARVESTED_VCPUS];
	struct harvester h[HARVESTED_VCPUS];
	uint64_t total, size;
	uint8_t *copy;
	struct ring_vm *rv;
	int i;

	need_vcpu_reset();
	rv = ring_vm_create(ring_vm_min_entries(), HARVESTED_VCPUS,
			    HARVESTED_PAGES, KVM_MEM_LOG_DIRTY_PAGES, NULL);
	size = rv->pages * getpagesize();
	copy = calloc(1, size);
	TEST_ASSERT(copy, "Insufficient Memory");

	for (i = 0; i < HARVESTED_VCPUS; i++) {
		h[i] = (struct harvester){ .rv = rv, .vcpu = i, .copy = copy };
		h[i].pages = calloc(rv->entries, sizeof(*h[i].pages));
		TEST_ASSERT(h[i].pages, "Insufficient Memory");
		ring_vm_set_task(rv, i, 0, HARVESTED_PAGES, 1);
		WRITE_ONCE(ring_vm_task(rv, i)->spin, 1);
		ring_vm_runner_start(&runners[i], rv, i);
		EXPECT(pthread_create(&h[i].thread, NULL, harvester_fn, &h[i]),
		       0);
	}
	/* If nothing moves, the case's time limit ends it. */
	do {
		sleep(3);
		total = 0;
		for (i = 0; i < HARVESTED_VCPUS; i++)
			total += READ_ONCE(h[i].total);
	} while (total < 1000);
	for (i = 0; i < HARVESTED_VCPUS; i++)
		ring_vm_runner_stop(&runners[i]);
	for (i = 0; i < HARVESTED_VCPUS; i++) {
		WRITE_ONCE(h[i].quit, true);
		EXPECT(pthread_join(h[i].thread, NULL), 0);
	}
	for (i = 0; i < HARVESTED_VCPUS; i++) {
		while (harvest_and_copy(&h[i]))
			;
		free(h[i].pages);
	}

	printf("# %lu entries meanwhile\n", total);
	TEST_ASSERT(!memcmp(copy, rv->mem, size),
		    "The copy differs from the memory");
	free(copy);
	ring_vm_free(rv);
}

/*
 * Have one thread reset all rings, the first of which has one entry, and another
 * that ring alone as soon as it is empty: it finds nothing, but the vCPU, which
 * writes to that page all the time, may still have it in its TLB. The long second
 * ring keeps the first thread from the flush meanwhile.
 */
#define TAKEN_PAGES	2048
#define TAKEN_ROUNDS	32

static void *reset_all(void *data)
{
	struct ring_vm *rv = data;

	/* Let the other in as soon as it wakes up. */
	EXPECT(setpriority(PRIO_PROCESS, 0, 19), 0);
	EXPECT(vm_reset_dirty_rings(rv->vm), TAKEN_PAGES);
	return NULL;
}

static void vcpu_reset_taken(void)
{
	struct ring_vm_runner runner;
	struct kvm_dirty_gfn *entry;
	cpu_set_t cpus, first;
	struct ring_vm *rv;
	pthread_t thread;
	uint64_t *page;
	uint32_t n;
	int i;

	need_vcpu_reset();
	need_two_cpus(&cpus);
	rv = ring_vm_create(4096, 2, TAKEN_PAGES, KVM_MEM_LOG_DIRTY_PAGES, NULL);
	n = TAKEN_PAGES - 1;
	page = (uint64_t *)(rv->mem + n * getpagesize());

	/* One CPU for the vCPU, the others for the resets */
	take_first_cpu(&cpus, &first);
	EXPECT(sched_setaffinity(0, sizeof(first), &first), 0);
	ring_vm_set_task(rv, 0, n, 1, 0);
	WRITE_ONCE(ring_vm_task(rv, 0)->spin, 1);
	ring_vm_runner_start(&runner, rv, 0);
	EXPECT(sched_setaffinity(0, sizeof(cpus), &cpus), 0);

	ring_vm_wait_for_store(page);
	if (dirty_ring_cpu_logs_pages())
		EXPECT(vm_sync(rv->vm), 0);
	EXPECT(ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL), 1);
	for (i = 0; i < TAKEN_ROUNDS; i++) {
		ring_vm_write(rv, 1, 0, n);
		EXPECT(ring_vm_harvest(rv, 1, DIRTY_RING_HARVEST_ALL), n);

		entry = vcpu_dirty_ring(rv->vm, 0) + i % rv->entries;
		EXPECT(pthread_create(&thread, NULL, reset_all, rv), 0);
		/* Pairs with KVM's release of the entry. */
		while (smp_load_acquire(&entry->flags))
			usleep(50);
		EXPECT(vcpu_reset(rv->vm, 0), 0);
		ring_vm_wait_for_store(page);
		if (dirty_ring_cpu_logs_pages())
			EXPECT(vm_sync(rv->vm), 0);
		EXPECT(ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL), 1);
		EXPECT(pthread_join(thread, NULL), 0);
	}
	ring_vm_runner_stop(&runner);
	ring_vm_free(rv);
}

#define TRACE	"/sys/kernel/tracing/instances/dirty_ring_test"

static void trace_write(const char *event, const char *file, const char *text)
{
	char path[256];
	FILE *f;

	snprintf(path, sizeof(path), TRACE "/events/%s/%s", event, file);
	f = fopen(path, "w");
	if (!f) {
		rmdir(TRACE);
		test_case_skip("no tracepoint %s", event);
	}
	TEST_ASSERT(fputs(text, f) >= 0 && !fclose(f), "%s: %s", path,
		    strerror(errno));
}

/* Trace an event, all or, if there is a filter, some. */
static void trace_start(const char *event, const char *filter)
{
	/* One that is left over from a test that failed has old events. */
	rmdir(TRACE);
	if (mkdir(TRACE, 0700))
		test_case_skip("no trace instance: %s", strerror(errno));
	if (filter)
		trace_write(event, "filter", filter);
	trace_write(event, "enable", "1\n");
}

/* A push takes another path while it is traced. */
static void traced(void)
{
	struct ring_vm *rv = ring_vm_create_small(ring_vm_min_entries());
	unsigned int vcpu, as, slot, used;
	char line[512], *what;
	uint64_t offset;
	uint32_t n = 0;
	int fields;
	FILE *file;

	trace_start("kvm/kvm_dirty_ring_push", NULL);
	ring_vm_set_task(rv, 0, 0, rv->limit + 1, 1);
	EXPECT(ring_vm_run(rv, 0), RING_VM_FULL);
	EXPECT(ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL), rv->limit);
	ring_vm_expect(rv, 0, rv->limit);

	file = fopen(TRACE "/trace", "r");
	TEST_ASSERT(file, TRACE "/trace: %s", strerror(errno));
	while (fgets(line, sizeof(line), file)) {
		what = strstr(line, "kvm_dirty_ring_push: ");
		if (!what)
			continue;
		fields = sscanf(what,
				"%*s vcpu %u as %u slot %u offset %lx used %u",
				&vcpu, &as, &slot, &offset, &used);
		EXPECT(fields, 5);
		EXPECT(vcpu, 0);
		EXPECT(slot, RING_VM_SLOT);
		EXPECT(offset, n);
		EXPECT(used, ++n);
	}
	fclose(file);
	EXPECT(n, rv->limit);
	rmdir(TRACE);
	ring_vm_free(rv);
}

#ifdef __x86_64__

static unsigned int traced_events(const char *name)
{
	FILE *file = fopen(TRACE "/trace", "r");
	unsigned int n = 0;
	char line[512];

	TEST_ASSERT(file, TRACE "/trace: %s", strerror(errno));
	while (fgets(line, sizeof(line), file))
		n += !!strstr(line, name);
	fclose(file);
	return n;
}

/* A VM whose 64 pages are mapped, and protected for their log only */
static struct ring_vm *steady_vm(void)
{
	struct ring_vm *rv;

	if (!two_dimensional_paging())
		test_case_skip("the guest's page tables are protected, too");

	rv = ring_vm_create_small(64);
	ring_vm_write(rv, 0, 0, 64);
	EXPECT(ring_vm_collect(rv), 64);
	return rv;
}

/* The faults of such pages are not the slow ones. */
static void fast_faults(void)
{
	struct ring_vm *rv = steady_vm();
	long before;

	before = ring_vm_stat(rv, "pf_fixed");
	ring_vm_write(rv, 0, 0, 64);
	EXPECT(ring_vm_collect(rv), 64);
	EXPECT(ring_vm_stat(rv, "pf_fixed"), before);
	ring_vm_free(rv);
}

/* The steady state: a write fault, a harvest, a reset, again and again */
static void no_mmu_lock(void)
{
	struct ring_vm *rv = steady_vm();
	int i;

	trace_start("lock/lock_acquire", "name == \"&kvm->mmu_lock\"\n");
	for (i = 0; i < 5; i++) {
		ring_vm_write(rv, 0, 0, 64);
		EXPECT(ring_vm_collect(rv), 64);
	}
	EXPECT(traced_events("lock_acquire: "), 0);
	/* It would be seen. */
	ring_vm_set_slot(rv, RING_VM_GPA, rv->mem, 64 * getpagesize(), 0);
	TEST_ASSERT(traced_events("lock_acquire: "), "The trace shows nothing");
	trace_write("lock/lock_acquire", "enable", "0\n");
	rmdir(TRACE);
	ring_vm_free(rv);
}

static void sync_no_room(void)
{
	struct ring_vm *rv;
	uint32_t n;
	uint64_t i;

	need_sync();
	rv = ring_vm_create(ring_vm_min_entries(), 1, 4096,
			    KVM_MEM_LOG_DIRTY_PAGES, NULL);

	/* It fits into the ring, reserve included. */
	ring_vm_write_by_ioctl(rv, 0, 0, rv->entries);
	EXPECT(vm_sync(rv->vm), 0);
	EXPECT(ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL), rv->entries);
	ring_vm_forget(rv);
	EXPECT(vm_reset_dirty_rings(rv->vm), rv->entries);

	/* More than that does not; the rest is reported later. */
	n = rv->entries + rv->limit;
	ring_vm_write_by_ioctl(rv, 0, 0, n);
	EXPECT(vm_sync(rv->vm), -ENOSPC);
	EXPECT(ring_vm_collect(rv), rv->entries);
	EXPECT(vm_sync(rv->vm), 0);
	EXPECT(ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL),
	       n - rv->entries);
	for (i = 0; i < n; i++)
		EXPECT(rv->seen[i], 1);

	ring_vm_free(rv);
}

/* Pages that KVM writes again before they are harvested */
static void duplicates(void)
{
	struct ring_vm *rv = ring_vm_create(ring_vm_min_entries(), 1, 64,
					    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	int i;

	/* Once in the ring, also if the vCPU writes elsewhere in between */
	for (i = 0; i < 10; i++)
		ring_vm_write_by_ioctl(rv, 0, 7, 1);
	ring_vm_write(rv, 0, 16, 3);
	ring_vm_write_by_ioctl(rv, 0, 7, 1);
	EXPECT(ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL), 4);
	EXPECT(rv->seen[7], 1);

	/* Harvested, not reset: written again, reported again */
	ring_vm_write_by_ioctl(rv, 0, 7, 1);
	ring_vm_write_by_ioctl(rv, 0, 7, 1);
	EXPECT(ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL), 1);
	EXPECT(rv->seen[7], 2);
	EXPECT(vm_reset_dirty_rings(rv->vm), 5);

	/* Reset: the same */
	ring_vm_write_by_ioctl(rv, 0, 7, 1);
	EXPECT(ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL), 1);
	EXPECT(rv->seen[7], 3);
	EXPECT(vm_reset_dirty_rings(rv->vm), 1);

	/* More pages than KVM may remember: all are reported. */
	ring_vm_forget(rv);
	for (i = 0; i < 3; i++)
		ring_vm_write_by_ioctl(rv, 0, 0, 64);
	ring_vm_collect_all(rv);
	for (i = 0; i < 64; i++)
		TEST_ASSERT(rv->seen[i], "Page %d is lost", i);

	/* At every position in the ring */
	for (i = 0; i < 2 * rv->entries; i++) {
		ring_vm_forget(rv);
		ring_vm_write_by_ioctl(rv, 0, i % 64, 1);
		ring_vm_write_by_ioctl(rv, 0, i % 64, 1);
		EXPECT(ring_vm_collect(rv), 1);
		EXPECT(rv->seen[i % 64], 1);
	}
	ring_vm_free(rv);
}

#endif /* __x86_64__ */

/* Set to 0 all statistics in a directory that can be set. */
static void clear_in(const char *path)
{
	char name[512];
	struct dirent *d;
	DIR *dir;
	int fd;

	dir = opendir(path);
	TEST_ASSERT(dir, "%s: %s", path, strerror(errno));
	while ((d = readdir(dir))) {
		if (strncmp(d->d_name, "dirty_ring", strlen("dirty_ring")))
			continue;
		snprintf(name, sizeof(name), "%s/%.100s", path, d->d_name);
		chmod(name, 0644);
		fd = open(name, O_WRONLY);
		if (fd < 0)
			continue;
		if (write(fd, "0\n", 2) < 0)
			TEST_ASSERT(errno == EACCES, "%s: %s", name,
				    strerror(errno));
		close(fd);
	}
	closedir(dir);
}

static void clear_statistics(void)
{
	struct ring_vm *rv;
	char path[128];
	uint32_t n;
	int i;

	need_sync();
	rv = ring_vm_create(ring_vm_min_entries(), 2, 64,
			    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	ring_vm_stat(rv, "dirty_ring_pushed");
	for (i = 0; i < 3; i++) {
		ring_vm_write(rv, 0, 0, 20);
		ring_vm_write(rv, 1, 20, 20);

		clear_in("/sys/kernel/debug/kvm");
		snprintf(path, sizeof(path), "/sys/kernel/debug/kvm/%d-%d",
			 getpid(), vm_get_fd(rv->vm));
		clear_in(path);
		strcat(path, "/vcpu1");
		clear_in(path);

		/*
		 * A sync that relies on them would not end, not even by a
		 * signal.
		 */
		EXPECT(vm_sync(rv->vm), 0);
		n = ring_vm_collect(rv);
		EXPECT(n, 40);
		ring_vm_expect(rv, 0, 40);
		EXPECT(ring_vm_stat(rv, "dirty_ring_reset"), 40);
	}
	ring_vm_free(rv);
}

#define EMPTY_THREADS	4
#define EMPTY_RESETS	2000

static void *empty_reset(void *data)
{
	struct ring_vm *rv = data;
	int i;

	for (i = 0; i < EMPTY_RESETS; i++)
		EXPECT(vm_reset_dirty_rings(rv->vm), 0);
	return NULL;
}

static void empty_resets(void)
{
	struct ring_vm *rv = ring_vm_create(ring_vm_min_entries(), 2, 64,
					    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	pthread_t threads[EMPTY_THREADS];
	struct ring_vm_runner runner;
	long long before;
	int i;

	/*
	 * Keep one vCPU in the guest: a flush counts if it interrupts a vCPU.
	 */
	ring_vm_set_task(rv, 1, 0, 0, 1);
	WRITE_ONCE(ring_vm_task(rv, 1)->spin, 1);
	ring_vm_runner_start(&runner, rv, 1);

	/* One ring is empty, the other not harvested. */
	ring_vm_write(rv, 0, 0, 20);
	/* Wait until all that it needs to spin is mapped. */
	usleep(300000);
	before = ring_vm_stat(rv, "remote_tlb_flush");
	for (i = 0; i < EMPTY_THREADS; i++)
		EXPECT(pthread_create(&threads[i], NULL, empty_reset, rv), 0);
	for (i = 0; i < EMPTY_THREADS; i++)
		EXPECT(pthread_join(threads[i], NULL), 0);
	EXPECT(ring_vm_stat(rv, "remote_tlb_flush") - before, 0);

	/* A reset that finds something flushes, once for all of it. */
	for (i = 0; i < 20; i++) {
		EXPECT(ring_vm_collect(rv), 20);
		ring_vm_write(rv, 0, 0, 20);
	}
	i = ring_vm_stat(rv, "remote_tlb_flush") - before;
	TEST_ASSERT(i > 0 && i <= 20, "20 resets flushed %d times", i);

	ring_vm_runner_stop(&runner);
	ring_vm_free(rv);
}

#ifdef __x86_64__

static void statistics(void)
{
	struct ring_vm *rv = ring_vm_create(ring_vm_min_entries(), 2, 4096,
					    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	uint32_t n, others;

	/* Have the guest fill its ring up to the limit, and stop. */
	ring_vm_set_task(rv, 0, 0, rv->limit, 1);
	EXPECT(ring_vm_run(rv, 0), RING_VM_FULL);
	EXPECT(ring_vm_stat(rv, "dirty_ring_pushed"), rv->limit);
	EXPECT(ring_vm_stat(rv, "vcpu0/dirty_ring_pushed"), rv->limit);
	EXPECT(ring_vm_stat(rv, "vcpu1/dirty_ring_pushed"), 0);
	EXPECT(ring_vm_stat(rv, "dirty_ring_full_exits"), 1);
	EXPECT(ring_vm_stat(rv, "vcpu0/dirty_ring_full_exits"), 1);

	/* Have its ioctls fill the reserve, the other vCPU's ring, and more. */
	others = rv->limit + 10;
	ring_vm_write_by_ioctl(rv, 0, 2000, rv->entries - rv->limit + others);
	EXPECT(ring_vm_stat(rv, "vcpu0/dirty_ring_pushed"), rv->entries);
	EXPECT(ring_vm_stat(rv, "dirty_ring_pushed_other"), rv->limit);
	EXPECT(ring_vm_stat(rv, "dirty_ring_overflow"), 10);
	TEST_ASSERT(ring_vm_stat(rv, "vcpu0/dirty_ring_skipped") > 0, "None skipped");
	TEST_ASSERT(ring_vm_stat(rv, "dirty_ring_skipped_other") > 0, "None skipped");

	/* Not the vCPU but the reset pushes what is in the overflow. */
	n = ring_vm_collect(rv);
	EXPECT(n, rv->entries + rv->limit);
	EXPECT(ring_vm_stat(rv, "dirty_ring_reset"), n);
	EXPECT(ring_vm_stat(rv, "vcpu0/dirty_ring_reset"), rv->entries);
	EXPECT(ring_vm_stat(rv, "vcpu1/dirty_ring_reset"), rv->limit);
	EXPECT(ring_vm_stat(rv, "dirty_ring_pushed_other"), rv->limit + 10);

	EXPECT(ring_vm_stat(rv, "dirty_ring_syncs"), 0);
	EXPECT(vm_sync(rv->vm), 0);
	EXPECT(ring_vm_stat(rv, "dirty_ring_syncs"), 1);
	ring_vm_free(rv);
}

/*
 * Pages far from each other that find no room in the ring: fewer than the
 * overflow keeps one by one, as many as it keeps exactly, and more than that.
 */
#define OVERFLOW_STRIDE	71
#define OVERFLOW_FEW	2000
#define OVERFLOW_EXACT	4096
#define OVERFLOW_MORE	1200

static void write_scattered(struct ring_vm *rv, uint64_t count)
{
	uint64_t i;

	for (i = 0; i < count; i++)
		ring_vm_write_by_ioctl(rv, 0, i * OVERFLOW_STRIDE, 1);
}

static void expect_scattered(struct ring_vm *rv, uint64_t count, long long more)
{
	uint64_t i, others = 0, first = 0;

	ring_vm_collect_all(rv);
	for (i = 0; i < rv->pages; i++) {
		if (i % OVERFLOW_STRIDE == 0 && i / OVERFLOW_STRIDE < count) {
			TEST_ASSERT(rv->seen[i], "Page %lu is lost", i);
		} else if (rv->seen[i]) {
			first = others++ ? first : i;
			EXPECT(rv->seen[i], 1);
		}
	}
	TEST_ASSERT(others == more,
		    "%lu pages were reported and not written, want %lld; the first is %lu",
		    others, more, first);
	ring_vm_forget(rv);
}

static void overflow_exact(void)
{
	uint64_t count, i;
	struct ring_vm *rv;

	rv = ring_vm_create(ring_vm_min_entries(), 1,
			    (OVERFLOW_FEW + ring_vm_min_entries()) *
			    OVERFLOW_STRIDE + 64, KVM_MEM_LOG_DIRTY_PAGES, NULL);
	count = rv->entries + OVERFLOW_FEW;
	write_scattered(rv, count);
	EXPECT(ring_vm_stat(rv, "dirty_ring_overflow"), OVERFLOW_FEW);
	EXPECT(ring_vm_stat(rv, "dirty_ring_overflow_between"), 0);
	expect_scattered(rv, count, 0);

	/* Far more, if they are close to each other */
	ring_vm_write_by_ioctl(rv, 0, 0, 20000);
	ring_vm_write_by_ioctl(rv, 0, 40000, 20000);
	ring_vm_collect_all(rv);
	for (i = 0; i < rv->pages; i++)
		EXPECT(!!rv->seen[i], i / 20000 % 2 == 0 && i < 60000);
	ring_vm_free(rv);
}

static void overflow_between(void)
{
	struct ring_vm *rv;
	long long more;
	uint64_t count;

	rv = ring_vm_create(ring_vm_min_entries(), 1,
			    (OVERFLOW_EXACT + OVERFLOW_MORE +
			     ring_vm_min_entries()) * OVERFLOW_STRIDE + 64,
			    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	count = rv->entries + OVERFLOW_EXACT + OVERFLOW_MORE;
	write_scattered(rv, count);
	EXPECT(ring_vm_stat(rv, "dirty_ring_overflow"), OVERFLOW_EXACT + OVERFLOW_MORE);
	more = ring_vm_stat(rv, "dirty_ring_overflow_between");
	printf("# %lld pages more\n", more);
	TEST_ASSERT(more > 0 && more < OVERFLOW_MORE * OVERFLOW_STRIDE,
		    "%lld pages between others are reported", more);
	expect_scattered(rv, count, more);
	ring_vm_free(rv);
}

#endif /* __x86_64__ */

static const struct test_case cases[] = {
	{ "numbers", numbers },
	{ "vcpu-reset-without-ring: EINVAL", vcpu_reset_without_ring },
	{ "vcpu-reset-alone: that ring and no other", vcpu_reset_alone },
	{ "vcpu-reset-running: beside vCPUs and each other",
	  vcpu_reset_running },
	{ "vcpu-reset-taken: returns when what another took is protected",
	  vcpu_reset_taken },
	{ "sync-without-ring: EINVAL", sync_without_ring },
	{ "sync-running: one harvest sees all that was written", sync_running },
	{ "sync-shared: sees what another vCPU is about to mark", sync_shared },
	{ "sync-preempted: sees what a preempted vCPU wrote", sync_preempted },
	{ "sync-not-running: waits for no vCPU that does not run",
	  sync_not_running },
	{ "sync-in-parallel: with vCPUs, resets and other syncs",
	  sync_in_parallel },
#ifdef __x86_64__
	{ "sync-no-room: ENOSPC, nothing lost", sync_no_room },
	{ "duplicates: in the ring once, until harvested", duplicates },
	{ "statistics: in debugfs", statistics },
	{ "overflow-exact: thousands of pages, and no other", overflow_exact },
	{ "overflow-between: more, and others are counted", overflow_between },
#endif
	{ "clear-statistics: a sync does not go by them", clear_statistics },
	{ "empty-resets: flush nothing", empty_resets },
	{ "traced: a push that is traced is in the ring as well", traced },
#ifdef __x86_64__
	{ "fast-faults: once a page is mapped", fast_faults },
	{ "no-mmu-lock: neither faults, nor resets, take it", no_mmu_lock },
#endif
};

int main(int argc, char **argv)
{
	dirty_ring_check_supported();
	test_cases_main(argc, argv, cases, ARRAY_SIZE(cases));
}
