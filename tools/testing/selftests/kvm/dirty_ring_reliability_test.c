// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test that KVM's dirty ring never loses a page
 *
 * Show, one case each, that
 *  - signals that rain on the thread that resets neither make a reset return
 *    short nor leave a page that was counted as reset unprotected,
 *  - a fatal signal does end a reset, and even then nothing is lost,
 *  - whoever sees an entry empty again finds its page protected,
 *  - a ring that is full for real keeps the entries it has, and what did not
 *    fit is reported later,
 *  - vCPU ioctls that write guest memory may go on beyond the size of the
 *    ring, without a KVM_RUN in between, while others harvest and reset,
 *  - pages are protected when logging starts although userspace asked for
 *    manual protection and an initially set bitmap,
 *  - a reset ends although entries are pushed, harvested and forged all the
 *    time,
 *  - a copy of the memory that is kept up to date with what the ring reports
 *    equals the memory in the end, with all of the above at the same time.
 */

#define _GNU_SOURCE /* for program_invocation_name, clone and CPU affinity */

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>

#include "test_util.h"
#include "kvm_util.h"
#include "dirty_ring_vm.h"
#include "processor.h"
#include "test_cases.h"

#ifdef __x86_64__
#include <asm/kvm_para.h>
#endif

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

/*
 * Send signals to the calling thread all the time, by a timer, which interrupts
 * whatever it does, and by another thread.
 */

#define STORM_TIMER_NS	100000
/*
 * Fewer, so that a slow machine gets something done between them. The resets of
 * signal_vm() take longer than that.
 */
#define STORM_MILD_NS	500000
#define STORM_MILD_US	100

static struct {
	pthread_t thread;
	pthread_t target;
	timer_t timer;
	bool mild;
	bool quit;
	unsigned long handled;
} storm;

static void storm_handler(int sig)
{
	WRITE_ONCE(storm.handled, storm.handled + 1);
}

static void *storm_sender(void *unused)
{
	while (!READ_ONCE(storm.quit)) {
		pthread_kill(storm.target, SIGUSR1);
		if (storm.mild)
			usleep(STORM_MILD_US);
	}

	return NULL;
}

static void storm_start(bool mild)
{
	long ns = mild ? STORM_MILD_NS : STORM_TIMER_NS;
	struct itimerspec often = {
		.it_value.tv_nsec = ns,
		.it_interval.tv_nsec = ns,
	};
	/* Without SA_RESTART, to see an interrupted ioctl */
	struct sigaction sa = { .sa_handler = storm_handler };
	struct sigevent event = {
		.sigev_notify = SIGEV_THREAD_ID,
		.sigev_signo = SIGUSR2,
	};

	sigaction(SIGUSR1, &sa, NULL);
	sigaction(SIGUSR2, &sa, NULL);
	event.sigev_notify_thread_id = syscall(SYS_gettid);
	storm.target = pthread_self();
	storm.mild = mild;
	storm.quit = false;
	TEST_ASSERT(!timer_create(CLOCK_MONOTONIC, &event, &storm.timer) &&
		    !timer_settime(storm.timer, 0, &often, NULL),
		    "No timer: %s", strerror(errno));
	TEST_ASSERT(!pthread_create(&storm.thread, NULL, storm_sender, NULL),
		    "pthread_create failed");
}

static void storm_stop(void)
{
	timer_delete(storm.timer);
	WRITE_ONCE(storm.quit, true);
	pthread_join(storm.thread, NULL);
}

/*
 * Resets and signals
 */

#define SIGNAL_ENTRIES	4096
#define SIGNAL_ROUNDS	16

static struct ring_vm *signal_vm(void)
{
	return ring_vm_create(SIGNAL_ENTRIES, 1, SIGNAL_ENTRIES,
			      KVM_MEM_LOG_DIRTY_PAGES, NULL);
}

/*
 * Write to all pages, which were reset before: all must be reported. Leave them
 * harvested.
 */
static void write_all_again(struct ring_vm *rv)
{
	uint32_t n = rv->limit - 1;

	ring_vm_write(rv, 0, 0, n);
	ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL);
	ring_vm_expect(rv, 0, n);
}

static void reset_in_storm(bool never_short)
{
	struct ring_vm *rv = signal_vm();
	int fd = vm_get_fd(rv->vm), round, ret, hit = 0;
	uint32_t n = rv->limit - 1, sum;
	unsigned long handled;

	write_all_again(rv);
	for (round = 0; round < SIGNAL_ROUNDS; round++) {
		storm_start(true);
		sum = 0;
		do {
			handled = READ_ONCE(storm.handled);
			errno = 0;
			ret = ioctl(fd, KVM_RESET_DIRTY_RINGS, 0);
			hit += READ_ONCE(storm.handled) != handled;
			TEST_ASSERT(ret == n || !never_short,
				    "Harvested %u entries but %d (%s) got reset",
				    n, ret, strerror(errno));
			TEST_ASSERT(ret > 0 || errno == EINTR,
				    "%u of %u entries got reset, then %d (%s)",
				    sum, n, ret, strerror(errno));
			sum += ret > 0 ? ret : 0;
		} while (sum < n);
		storm_stop();
		TEST_ASSERT(sum == n, "Harvested %u entries, %u got reset",
			    n, sum);

		write_all_again(rv);
	}

	printf("# %d of %d resets saw a signal\n", hit, SIGNAL_ROUNDS);
	TEST_ASSERT(hit, "No signal arrived during a reset");
	ring_vm_free(rv);
}

static void signals_protect(void)
{
	reset_in_storm(false);
}

static void signals_never_short(void)
{
	reset_in_storm(true);
}

/* A process to be killed, which shares memory and files with this one */
static struct {
	int fd;
	bool started;
} victim;

static int victim_code(void *unused)
{
	WRITE_ONCE(victim.started, true);
	ioctl(victim.fd, KVM_RESET_DIRTY_RINGS, 0);
	_exit(0);
}

static uint32_t count_empty(struct ring_vm *rv, uint32_t first, uint32_t n)
{
	struct kvm_dirty_gfn *ring = vcpu_dirty_ring(rv->vm, 0);
	uint32_t i, empty = 0;

	for (i = first; i < first + n; i++)
		empty += !READ_ONCE(ring[i % rv->entries].flags);

	return empty;
}

#define FATAL_TRIES	200
#define FATAL_WANTED	5
#define VICTIM_STACK	65536

static void fatal_signal(void)
{
	struct ring_vm *rv = signal_vm();
	uint32_t n = rv->limit - 1, first = 0, empty;
	int status, i, reset, early = 0;
	struct timespec start;
	int64_t full = INT64_MAX, delay;
	cpu_set_t cpus;
	uint8_t *stack;
	pid_t pid;

	need_two_cpus(&cpus);
	stack = mmap(NULL, VICTIM_STACK, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	TEST_ASSERT(stack != MAP_FAILED, "mmap failed");
	victim.fd = vm_get_fd(rv->vm);

	/* See how long a reset takes undisturbed. */
	for (i = 0; i < 5; i++) {
		write_all_again(rv);
		clock_gettime(CLOCK_MONOTONIC, &start);
		TEST_ASSERT(vm_reset_dirty_rings(rv->vm) == n, "Short reset");
		delay = timespec_to_ns(timespec_diff_now(start));
		if (delay < full)
			full = delay;
		first += n;
	}

	for (i = 0; i < FATAL_TRIES && early < FATAL_WANTED; i++) {
		write_all_again(rv);

		victim.started = false;
		pid = clone(victim_code, stack + VICTIM_STACK,
			    CLONE_VM | CLONE_FILES | SIGCHLD, NULL);
		TEST_ASSERT(pid > 0, "clone: %s", strerror(errno));
		while (!READ_ONCE(victim.started))
			;
		delay = random() % (full + 1);
		clock_gettime(CLOCK_MONOTONIC, &start);
		while (timespec_to_ns(timespec_diff_now(start)) < delay)
			;
		kill(pid, SIGKILL);
		TEST_ASSERT(waitpid(pid, &status, 0) == pid, "waitpid failed");

		/* What it has reset is reset, the rest is left to the next. */
		empty = count_empty(rv, first, n);
		reset = vm_reset_dirty_rings(rv->vm);
		TEST_ASSERT(empty + reset == n,
			    "%u entries: %u got reset, then %d", n, empty,
			    reset);
		early += empty && reset;
		first += n;
	}
	/* The last one counts too. */
	write_all_again(rv);

	printf("# %d of %d resets ended early\n", early, i);
	TEST_ASSERT(early, "No reset was ended by a fatal signal");
	ring_vm_free(rv);
}

/*
 * A reset has an end
 */

#define CHURN_SECONDS	5

static struct {
	struct ring_vm *rv;
	bool vcpu_quit;
	bool vcpu_done;
	bool quit;
	uint32_t harvested;
} churn;

static void *churn_vcpu(void *unused)
{
	struct ring_vm *rv = churn.rv;

	while (!READ_ONCE(churn.vcpu_quit)) {
		ring_vm_set_task(rv, 0, random() % (rv->pages - 1000), 1000, 1);
		while (ring_vm_run(rv, 0) == RING_VM_FULL)
			sched_yield();
	}

	WRITE_ONCE(churn.vcpu_done, true);
	return NULL;
}

static void *churn_harvest(void *unused)
{
	struct ring_vm *rv = churn.rv;

	while (!READ_ONCE(churn.quit))
		churn.harvested += vcpu_harvest_dirty_ring(rv->vm, 0, 64, NULL,
							   NULL);
	return NULL;
}

static void *churn_forge(void *unused)
{
	struct ring_vm *rv = churn.rv;
	struct kvm_dirty_gfn *ring = vcpu_dirty_ring(rv->vm, 0);
	uint32_t i;

	while (!READ_ONCE(churn.quit))
		for (i = 0; i < rv->entries; i++)
			WRITE_ONCE(ring[i].flags, KVM_DIRTY_GFN_F_RESET);

	return NULL;
}

/* Reset while a vCPU pushes and @fn harvests or forges. */
static uint32_t reset_in_churn(void *(*fn)(void *))
{
	uint32_t entries = 4 * ring_vm_min_entries();
	pthread_t vcpu, other;
	struct ring_vm *rv;
	struct timespec start;
	uint32_t sum = 0;
	int ret;

	/* Enough pages to fill the ring */
	rv = ring_vm_create(entries, 1, entries > 8192 ? entries : 8192,
			    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	churn.rv = rv;
	pthread_create(&vcpu, NULL, churn_vcpu, NULL);
	pthread_create(&other, NULL, fn, NULL);

	clock_gettime(CLOCK_MONOTONIC, &start);
	while (!READ_ONCE(churn.vcpu_done)) {
		if (timespec_diff_now(start).tv_sec >= CHURN_SECONDS)
			WRITE_ONCE(churn.vcpu_quit, true);
		ret = vm_reset_dirty_rings(rv->vm);
		TEST_ASSERT(ret <= rv->entries,
			    "%d entries got reset, the ring has %u", ret,
			    rv->entries);
		sum += ret;
	}

	pthread_join(vcpu, NULL);
	WRITE_ONCE(churn.quit, true);
	pthread_join(other, NULL);

	return sum + vm_reset_dirty_rings(rv->vm);
}

static void endless_harvest(void)
{
	uint32_t sum = reset_in_churn(churn_harvest);
	struct ring_vm *rv = churn.rv;

	printf("# %u entries\n", sum);
	TEST_ASSERT(sum == churn.harvested, "Harvested %u, %u got reset",
		    churn.harvested, sum);

	/* Take the rest: the ring is as good as new. */
	ring_vm_collect_all(rv);
	ring_vm_forget(rv);
	ring_vm_write(rv, 0, 50, 100);
	TEST_ASSERT(ring_vm_collect(rv) == 100, "Pages are lost");
	ring_vm_expect(rv, 50, 100);
	ring_vm_free(rv);
}

/* The vCPU fills its ring, up to its limit, with the pages from 0 on. */
static void fill_to_limit(struct ring_vm *rv)
{
	ring_vm_set_task(rv, 0, 0, rv->limit, 1);
	/* If the CPU logs pages, the vCPU may be done before KVM sees them. */
	if (dirty_ring_cpu_logs_pages())
		ring_vm_run(rv, 0);
	TEST_ASSERT(ring_vm_run(rv, 0) == RING_VM_FULL,
		    "The ring is not full at the limit");
}

static void endless_forgery(void)
{
	uint32_t sum = reset_in_churn(churn_forge);
	struct ring_vm *rv = churn.rv;
	struct kvm_dirty_gfn *ring = vcpu_dirty_ring(rv->vm, 0);
	uint32_t i, dirty = 0;

	printf("# %u entries\n", sum);
	TEST_ASSERT(sum, "No entry got reset");

	/*
	 * Forging may lose pages, but not make KVM miscount: once all is
	 * harvested and reset, the ring has room for exactly the limit.
	 */
	for (i = 0; i < rv->entries; i++)
		WRITE_ONCE(ring[i].flags, KVM_DIRTY_GFN_F_RESET);
	vm_reset_dirty_rings(rv->vm);
	for (i = 0; i < rv->entries; i++)
		WRITE_ONCE(ring[i].flags, 0);

	vm_mem_region_set_flags(rv->vm, RING_VM_SLOT, 0);
	vm_mem_region_set_flags(rv->vm, RING_VM_SLOT, KVM_MEM_LOG_DIRTY_PAGES);
	fill_to_limit(rv);
	for (i = 0; i < rv->entries; i++)
		dirty += dirty_gfn_is_dirty(&ring[i]);
	TEST_ASSERT(dirty == rv->limit, "%u entries, the limit is %u", dirty,
		    rv->limit);
	ring_vm_free(rv);
}

/*
 * Manual protection and the initially set bitmap
 */

static uint64_t manual_protect;

static int enable_manual_protect(struct kvm_vm *vm)
{
	struct kvm_enable_cap cap = {
		.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
		.args[0] = manual_protect,
	};

	return ioctl(vm_get_fd(vm), KVM_ENABLE_CAP, &cap);
}

static void must_enable_manual_protect(struct kvm_vm *vm)
{
	TEST_ASSERT(!enable_manual_protect(vm), "KVM_ENABLE_CAP: %s",
		    strerror(errno));
}

/* Is a ring refused for a VM with manual protection? */
static bool ring_is_refused(void)
{
	struct kvm_enable_cap cap = {
		.cap = dirty_ring_cap(),
		.args[0] = ring_vm_min_entries() * sizeof(struct kvm_dirty_gfn),
	};
	struct kvm_vm *vm = vm_create(VM_MODE_DEFAULT, 0, O_RDWR);
	bool refused;

	must_enable_manual_protect(vm);
	refused = ioctl(vm_get_fd(vm), KVM_ENABLE_CAP, &cap);
	kvm_vm_free(vm);
	return refused;
}

static void log_start(struct ring_vm *rv)
{
	int i;

	/* Mapped and written to before there is a log */
	ring_vm_write(rv, 0, 0, 1000);
	TEST_ASSERT(!ring_vm_collect(rv), "Pages are reported before logging starts");

	for (i = 0; i < 3; i++) {
		vm_mem_region_set_flags(rv->vm, RING_VM_SLOT,
					KVM_MEM_LOG_DIRTY_PAGES);
		/* More may be reported, nothing may be lost. */
		ring_vm_collect_all(rv);
		ring_vm_forget(rv);
		ring_vm_write(rv, 0, 300, 100);
		ring_vm_collect(rv);
		ring_vm_expect(rv, 300, 100);

		vm_mem_region_set_flags(rv->vm, RING_VM_SLOT, 0);
		ring_vm_write(rv, 0, 0, 1000);
		TEST_ASSERT(!ring_vm_collect(rv), "Pages are reported after logging stopped");
	}
	ring_vm_free(rv);
}

static void manual_protect_first(void)
{
	uint64_t caps = kvm_check_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);

	if (!caps)
		test_case_skip("KVM has no manual protection");

	for (manual_protect = 1; manual_protect <= caps; manual_protect += 2) {
		if (ring_is_refused()) {
			printf("# manual protection %lu: no ring\n",
			       manual_protect);
			continue;
		}
		log_start(ring_vm_create(ring_vm_min_entries(), 1, 4096, 0,
					 must_enable_manual_protect));
	}
}

static void manual_protect_last(void)
{
	uint64_t caps = kvm_check_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
	struct ring_vm *rv;

	if (!caps)
		test_case_skip("KVM has no manual protection");

	for (manual_protect = 1; manual_protect <= caps; manual_protect += 2) {
		rv = ring_vm_create(ring_vm_min_entries(), 1, 4096, 0, NULL);
		if (enable_manual_protect(rv->vm))
			printf("# ring: no manual protection %lu\n",
			       manual_protect);
		log_start(rv);
	}
}

/* A copy of the memory, made only of what is reported */

struct copy {
	struct ring_vm *rv;
	uint8_t *mem;
	uint64_t *pages;
	uint32_t nr;
	uint64_t total;
};

static void copy_init(struct copy *copy, struct ring_vm *rv)
{
	copy->rv = rv;
	copy->total = 0;
	copy->mem = calloc(rv->pages, getpagesize());
	copy->pages = calloc(rv->entries * rv->nr_vcpus, sizeof(uint64_t));
	TEST_ASSERT(copy->mem && copy->pages, "Insufficient Memory");
}

static void copy_mark(uint32_t slot, uint64_t offset, void *data)
{
	struct copy *copy = data;

	TEST_ASSERT(slot == RING_VM_SLOT && offset < copy->rv->pages,
		    "Slot %#x, page %#lx is reported but not tracked", slot, offset);
	copy->pages[copy->nr++] = offset;
}

/* Bring the copy up to date with what is in the rings. */
static uint32_t copy_update(struct copy *copy)
{
	struct ring_vm *rv = copy->rv;
	int page = getpagesize(), reset;
	uint32_t i;

	copy->nr = 0;
	for (i = 0; i < rv->nr_vcpus; i++)
		vcpu_harvest_dirty_ring(rv->vm, i, DIRTY_RING_HARVEST_ALL,
					copy_mark, copy);
	reset = vm_reset_dirty_rings(rv->vm);
	TEST_ASSERT(reset == copy->nr, "Harvested %u entries, %d got reset",
		    copy->nr, reset);
	for (i = 0; i < copy->nr; i++)
		memcpy(copy->mem + copy->pages[i] * page,
		       rv->mem + copy->pages[i] * page, page);
	copy->total += copy->nr;

	return copy->nr;
}

static void copy_finish(struct copy *copy)
{
	int page = getpagesize();
	uint64_t i, lost = 0;

	while (copy_update(copy))
		;
	for (i = 0; i < copy->rv->pages; i++)
		lost += !!memcmp(copy->mem + i * page, copy->rv->mem + i * page,
				 page);
	TEST_ASSERT(!lost, "%lu of %lu pages are lost", lost, copy->rv->pages);
	free(copy->mem);
	free(copy->pages);
}

#ifdef __x86_64__

/* Expect that each of the pages was reported, at least once. */
static void expect_reported(struct ring_vm *rv, uint64_t first, uint64_t count)
{
	uint64_t i;

	for (i = first; i < first + count; i++)
		TEST_ASSERT(rv->seen[i], "Page %lu is lost", i);
}

/* Expect these pages in the ring, in order, from @page at @pos on. */
static void expect_order(struct ring_vm *rv, uint32_t pos, uint64_t page)
{
	TEST_ASSERT(pos >= rv->nr_order || rv->order[pos] == page,
		    "Page %lu instead of %lu is at %u", rv->order[pos], page,
		    pos);
	for (; pos < rv->nr_order; pos++) {
		if (rv->order[pos] == page + 1)
			page++;
		TEST_ASSERT(rv->order[pos] == page,
			    "Page %lu instead of %lu is at %u", rv->order[pos],
			    page, pos);
	}
}

static void full_for_real(void)
{
	struct ring_vm *rv = ring_vm_create(ring_vm_min_entries(), 1, 4096,
					    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	uint32_t i, round;

	for (round = 0; round < 3; round++) {
		/* The vCPU fills the ring up to its limit, */
		fill_to_limit(rv);
		/* its ioctls fill the reserve, and go on. */
		ring_vm_write_by_ioctl(rv, 0, 1000, 2500);
		TEST_ASSERT(ring_vm_run(rv, 0) == RING_VM_FULL, "The ring is not full");

		/* The oldest entries are still there. */
		TEST_ASSERT(ring_vm_harvest(rv, 0, rv->entries) == rv->entries,
			    "The ring is not full for real");
		for (i = 0; i < rv->limit; i++)
			TEST_ASSERT(rv->order[i] == i,
				    "Entry %u was overwritten, with page %lu",
				    i, rv->order[i]);
		expect_order(rv, rv->limit, 1000);
		vm_reset_dirty_rings(rv->vm);

		ring_vm_collect_all(rv);
		expect_reported(rv, 0, rv->limit);
		expect_reported(rv, 1000, 2500);

		/* All are tracked as before. */
		TEST_ASSERT(ring_vm_run(rv, 0) == RING_VM_DONE, "The ring is full after a reset");
		ring_vm_collect_all(rv);
		ring_vm_forget(rv);
		ring_vm_write(rv, 0, 0, rv->limit - 1);
		TEST_ASSERT(ring_vm_collect(rv) == rv->limit - 1, "Pages are lost");
		ring_vm_expect(rv, 0, rv->limit - 1);
		ring_vm_write(rv, 0, 1000, rv->limit - 1);
		TEST_ASSERT(ring_vm_collect(rv) == rv->limit - 1, "Pages are lost");
		ring_vm_expect(rv, 1000, rv->limit - 1);
	}
	ring_vm_free(rv);
}

static void full_step_by_step(void)
{
	struct ring_vm *rv = ring_vm_create(ring_vm_min_entries(), 1, 8192,
					    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	uint64_t page, written = 0;

	/*
	 * Keep the ring full: make little room, and write more than that, so
	 * that the overflow grows, scattered over the slot.
	 */
	for (page = 0; page < rv->pages; page += 5, written++) {
		ring_vm_write_by_ioctl(rv, 0, page, 1);
		if (written % 3)
			continue;
		ring_vm_harvest(rv, 0, 1);
		vm_reset_dirty_rings(rv->vm);
	}

	ring_vm_collect_all(rv);
	for (page = 0; page < rv->pages; page += 5)
		expect_reported(rv, page, 1);
	ring_vm_free(rv);
}

static void ioctls_only(void)
{
	struct ring_vm *rv = ring_vm_create(ring_vm_min_entries(), 2, 4096,
					    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	int i;

	for (i = 0; i < 3; i++) {
		ring_vm_write_by_ioctl(rv, 0, 0, 2000);
		ring_vm_write_by_ioctl(rv, 1, 1500, 2000);
		ring_vm_write_by_ioctl(rv, 0, 3500, 500);
		ring_vm_collect_all(rv);
		expect_reported(rv, 0, 4000);
		ring_vm_forget(rv);
	}
	ring_vm_free(rv);
}

static struct copy ioctl_copy;
static bool ioctl_writer_quit;

static void *ioctl_writer(void *unused)
{
	struct ring_vm *rv = ioctl_copy.rv;
	uint64_t page;
	int i;

	for (i = 0; i < 3000 && !READ_ONCE(ioctl_writer_quit); i++) {
		page = random() % (rv->pages - 50);
		ring_vm_write_by_ioctl(rv, 0, page, 1 + random() % 50);
	}
	WRITE_ONCE(ioctl_writer_quit, true);
	return NULL;
}

static void ioctls_and_resets(void)
{
	struct ring_vm *rv = ring_vm_create(ring_vm_min_entries(), 1, 4096,
					    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	struct timespec start;
	pthread_t thread;

	/* Make room while pages that find none go to the overflow. */
	copy_init(&ioctl_copy, rv);
	pthread_create(&thread, NULL, ioctl_writer, NULL);
	clock_gettime(CLOCK_MONOTONIC, &start);
	while (!READ_ONCE(ioctl_writer_quit)) {
		copy_update(&ioctl_copy);
		if (timespec_diff_now(start).tv_sec >= 20)
			WRITE_ONCE(ioctl_writer_quit, true);
	}
	pthread_join(thread, NULL);
	copy_finish(&ioctl_copy);
	printf("# %lu entries\n", ioctl_copy.total);
	ring_vm_free(rv);
}

static void clock_pages(void)
{
	struct ring_vm *rv = ring_vm_create(ring_vm_min_entries(), 1, 4096,
					    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	uint64_t page, *first;
	uint32_t written = 0, full = 0;

	/*
	 * Have KVM write the system time on the way into the guest, which
	 * writes nothing. The vCPU stops if it gets to the soft limit.
	 */
	ring_vm_set_task(rv, 0, 0, 0, 1);
	for (page = 0; page < 1000; page++) {
		vcpu_set_msr(rv->vm, 0, MSR_KVM_SYSTEM_TIME_NEW,
			     (RING_VM_GPA + page * getpagesize()) | 1);
		full += ring_vm_run(rv, 0) == RING_VM_FULL;
	}

	ring_vm_collect_all(rv);
	for (page = 0; page < 1000; page++) {
		first = (uint64_t *)(rv->mem + page * getpagesize());
		if (!*first)
			continue;
		expect_reported(rv, page, 1);
		written++;
	}
	TEST_ASSERT(full && written >= rv->limit / 4,
		    "Only %u clocks were written, and %u times the ring was full",
		    written, full);
	printf("# %u clocks written, %u times full\n", written, full);
	ring_vm_free(rv);
}
#endif

/*
 * All at once
 */

#define MIGRATE_SECONDS	10
#define MIGRATE_VCPUS	4

static struct copy migrate_copy;
static bool migrate_quit;

static void *migrate_vcpu(void *data)
{
	uint32_t vcpu = (uintptr_t)data;
	struct ring_vm *rv = migrate_copy.rv;
	unsigned int seed = vcpu;

	while (!READ_ONCE(migrate_quit)) {
		/* Some pages are written by several vCPUs. */
		ring_vm_set_task(rv, vcpu, rand_r(&seed) % (rv->pages - 200),
				 rand_r(&seed) % 200, 1);
		while (ring_vm_run(rv, vcpu) == RING_VM_FULL &&
		       !READ_ONCE(migrate_quit))
			sched_yield();
	}
	return NULL;
}

#ifdef __x86_64__
/* Have KVM write for the last vCPU, which does not run. */
static void *migrate_kvm(void *data)
{
	struct ring_vm *rv = migrate_copy.rv;
	unsigned int seed = 99;

	while (!READ_ONCE(migrate_quit)) {
		ring_vm_write_by_ioctl(rv, rv->nr_vcpus - 1,
				       rand_r(&seed) % (rv->pages - 500),
				       rand_r(&seed) % 500);
		usleep(rand_r(&seed) % 2000);
	}
	return NULL;
}
#else
/* Without such an ioctl the last vCPU runs like the others. */
#define migrate_kvm		migrate_vcpu
#endif

/* Have KVM write steal time whenever it schedules a vCPU. */
static void migrate_steal_time(struct ring_vm *rv)
{
	uint64_t gpa = RING_VM_GPA + (rv->pages - 1) * getpagesize();
	uint32_t i;

	for (i = 0; i < rv->nr_vcpus - 1; i++)
		if (!ring_vm_set_steal_time(rv, i, gpa + 64 * i))
			printf("# no steal time\n");
}

static void migrate(void)
{
	struct ring_vm *rv = ring_vm_create(ring_vm_min_entries(),
					    MIGRATE_VCPUS, 4096,
					    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	pthread_t threads[MIGRATE_VCPUS];
	struct timespec start;
	uintptr_t i;

	migrate_steal_time(rv);
	copy_init(&migrate_copy, rv);
	for (i = 0; i < MIGRATE_VCPUS; i++)
		pthread_create(&threads[i], NULL,
			       i < MIGRATE_VCPUS - 1 ? migrate_vcpu :
			       migrate_kvm, (void *)i);
	storm_start(false);

	clock_gettime(CLOCK_MONOTONIC, &start);
	while (timespec_diff_now(start).tv_sec < MIGRATE_SECONDS)
		copy_update(&migrate_copy);

	storm_stop();
	WRITE_ONCE(migrate_quit, true);
	for (i = 0; i < MIGRATE_VCPUS; i++)
		pthread_join(threads[i], NULL);
	copy_finish(&migrate_copy);
	printf("# %lu entries\n", migrate_copy.total);
	ring_vm_free(rv);
}

#if defined(__x86_64__) || defined(__aarch64__)

/*
 * Have one vCPU write pages, and let another one, which has no TLB entries for
 * them, watch the ring in its own memory while they are reset. It writes a page
 * as soon as the entry is empty: that is not reported if KVM protects the page
 * after it empties the entry.
 */
#define RELEASE_PAGES	64
#define RELEASE_ROUNDS	200
#define RELEASE_SLOT	(RING_VM_SLOT + 1)
#define RELEASE_GPA	(RING_VM_GPA + 0x10000000UL)
#define RELEASE_GVA	(RING_VM_GVA + 0x10000000UL)

static struct {
	/* Index in the ring, and page */
	uint64_t entry;
	uint64_t page;
	/*
	 * Counts: of the host, and of the guest when it waits and when it has
	 * written
	 */
	uint64_t round;
	uint64_t waits;
	uint64_t written;
	uint64_t page_size;
} watch;

static void watch_code(uint64_t unused)
{
	struct kvm_dirty_gfn *ring = (void *)RELEASE_GVA;
	uint64_t round = 0;

	while (true) {
		while (READ_ONCE(watch.round) == round)
			;
		round++;
		WRITE_ONCE(watch.waits, round);
		/* Pairs with KVM's release of the entry. */
		while (smp_load_acquire(&ring[watch.entry].flags))
			;
		guest_store((void *)RING_VM_GVA + watch.page * watch.page_size,
			    round);
		WRITE_ONCE(watch.written, round);
	}
}

static void released_protected(void)
{
	struct ring_vm_runner runner;
	typeof(watch) *w;
	struct ring_vm *rv;
	uint64_t round;
	cpu_set_t cpus;
	size_t size;

	need_two_cpus(&cpus);
	rv = ring_vm_create(ring_vm_min_entries(), 2, RELEASE_PAGES,
			    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	size = rv->entries * sizeof(struct kvm_dirty_gfn);
	vm_set_slot(rv->vm, RELEASE_SLOT, RELEASE_GPA,
		    vcpu_dirty_ring(rv->vm, 1), size, 0);
	virt_map(rv->vm, RELEASE_GVA, RELEASE_GPA,
		 size / vm_get_page_size(rv->vm), 0);

	w = addr_gva2hva(rv->vm, (vm_vaddr_t)&watch);
	w->page_size = getpagesize();
	ring_vm_set_code(rv, 0, watch_code, 0);
	ring_vm_runner_start(&runner, rv, 0);

	for (round = 1; round <= RELEASE_ROUNDS; round++) {
		ring_vm_write(rv, 1, 0, RELEASE_PAGES);
		EXPECT(ring_vm_harvest(rv, 1, DIRTY_RING_HARVEST_ALL),
		       RELEASE_PAGES);
		ring_vm_forget(rv);

		/* Choose one of the last, which are protected last. */
		w->page = RELEASE_PAGES - 1 - round % 8;
		w->entry = ((round - 1) * RELEASE_PAGES + w->page) %
			   rv->entries;
		/* The guest reads page and entry once it sees this. */
		smp_store_release(&w->round, round);
		while (READ_ONCE(w->waits) != round)
			;
		EXPECT(vm_reset_dirty_rings(rv->vm), RELEASE_PAGES);
		while (READ_ONCE(w->written) != round)
			;

		/* Where the CPU logs pages, KVM may not know of it yet. */
		if (dirty_ring_cpu_logs_pages())
			EXPECT(ioctl(vm_get_fd(rv->vm), KVM_SYNC_DIRTY_RINGS, 0),
			       0);
		EXPECT(ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL), 1);
		EXPECT(rv->seen[w->page], 1);
		EXPECT(vm_reset_dirty_rings(rv->vm), 1);
		ring_vm_forget(rv);
	}

	ring_vm_runner_stop(&runner);
	ring_vm_free(rv);
}

#endif

static const struct test_case cases[] = {
	{ "signals-protect: what was reset is protected", signals_protect },
	{ "signals-never-short: a reset returns what was harvested",
	  signals_never_short },
	{ "fatal-signal: ends a reset, nothing is lost", fatal_signal },
	{ "endless-harvest: a reset ends", endless_harvest },
	{ "endless-forgery: a reset ends", endless_forgery },
	{ "manual-protect-first: pages are protected at log start",
	  manual_protect_first },
	{ "manual-protect-last: pages are protected at log start",
	  manual_protect_last },
#if defined(__x86_64__) || defined(__aarch64__)
	{ "released-protected: an entry is empty when its page is protected",
	  released_protected },
#endif
#ifdef __x86_64__
	{ "full-for-real: nothing overwritten, nothing lost", full_for_real },
	{ "full-step-by-step: nothing lost", full_step_by_step },
	{ "ioctls-only: nothing lost", ioctls_only },
	{ "ioctls-and-resets: nothing lost", ioctls_and_resets },
	{ "clock-pages: nothing lost", clock_pages },
#endif
	{ "migrate: a copy equals the memory", migrate },
};

int main(int argc, char **argv)
{
	dirty_ring_check_supported();
	test_cases_main(argc, argv, cases, ARRAY_SIZE(cases));
}
