// SPDX-License-Identifier: GPL-2.0
/*
 * A small VMM that migrates a guest while it writes: by dirty ring, by
 * KVM_GET_DIRTY_LOG, and by KVM_CLEAR_DIRTY_LOG
 *
 * vCPUs write to random pages. Meanwhile their memory is sent to a second buffer,
 * over a link of limited bandwidth, first all of it and then, again and again,
 * what was written since; until what is left can be sent in the downtime that is
 * allowed. Then the vCPUs are stopped, the last pages are sent, and the copy is
 * compared with the memory, whole.
 *
 * It is an example of how a VMM can use the ring rather than a product:
 *
 *  - Each ring has a thread of its own that harvests and resets it. Where KVM can
 *    reset one vCPU's ring alone, these threads do not wait for each other.
 *  - Rings are harvested in batches, as each reset flushes TLBs. But these are small:
 *    a page that is sent while it waits in a ring is sent once more for that, even
 *    if nobody writes to it any more. When the link has little else to send, there
 *    is no need to wait for a batch.
 *  - To know how many pages wait in a ring, have a look at it.
 *  - Pages are sent only after they were reset. A page that is read before that
 *    may be written once more, without a report.
 */

#define _GNU_SOURCE /* for program_invocation_name */

#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>

#include "test_util.h"
#include "kvm_util.h"
#include "processor.h"
#include "dirty_ring_vm.h"
#include "../kselftest.h"

#define NSEC		1000000000UL
/* Time for which the link may catch up on what it did not send */
#define LINK_BURST_NS	(100 * NSEC / 1000)
/* Do not sleep for less. */
#define LINK_NAP_NS	(2 * NSEC / 1000)
/* Time to count the guest's writes before the migration */
#define BEFORE_NS	NSEC

/* Pages of a batch; with fewer left to send, do not wait for one. */
#define HARVEST_PAGES	128
#define HUNGRY_PAGES	512
#define HARVEST_NAP_US	1000

static struct {
	uint64_t times, vcpus, mib, rate, bandwidth, downtime, limit, entries,
		 chunk;
} opt = {
	.times = 1,
	.vcpus = 1,
	.mib = 256,
	.bandwidth = 64,
	.downtime = 300,
	.limit = 60,
	.entries = 4096,
	.chunk = 4096,
};

static const struct number {
	char option;
	uint64_t *value;
	uint64_t min;
	uint64_t max;
	const char *what;
} numbers[] = {
	{ 'i', &opt.times, 1, 1000, "migrations by each way, the ways taking turns" },
	{ 'v', &opt.vcpus, 1, RING_VM_MAX_VCPUS, "vCPUs" },
	{ 'b', &opt.mib, 1, 2048, "MiB that they write to" },
	{ 'R', &opt.rate, 0, 100000000, "pages they write a second, 0: all they can" },
	{ 'B', &opt.bandwidth, 1, 100000, "bandwidth of the link, in MiB/s" },
	{ 'd', &opt.downtime, 1, 100000, "downtime that is allowed, in ms" },
	{ 't', &opt.limit, 1, 100000, "who takes more seconds has failed" },
	{ 'r', &opt.entries, 1, 65536, "entries of each ring" },
	{ 'c', &opt.chunk, 64, 1 << 20, "pages that KVM_CLEAR_DIRTY_LOG takes at a time" },
};

/*
 * A memslot and its copy. The pages of all memslots have one numbering, in which
 * a memslot begins at a multiple of 64.
 */
static struct area {
	uint32_t slot;
	uint64_t first;
	uint64_t pages;
	uint8_t *mem;
	uint8_t *copy;
	/* What KVM_GET_DIRTY_LOG fills in, and then what is sent next. */
	uint64_t *log;
} areas[] = {
	{ .slot = 0 },
	{ .slot = RING_VM_SLOT },
};

static struct vcpu_threads {
	uint32_t id;
	pthread_t runner;
	/* The ring is full, and the runner waits for its reset. */
	bool waits;
	sem_t may_run;
	uint64_t full_exits;

	pthread_t harvester;
	/* The next entry, not wrapped; and what was harvested last. */
	uint32_t next;
	uint64_t *harvested;
	uint32_t nr_harvested;
} vcpus[RING_VM_MAX_VCPUS];

/* A way to learn what is dirty. */
struct way {
	const char *name;
	/* Why it cannot be used here, or NULL */
	const char *(*missing)(void);
	/* All but get() and finish() may be NULL. */
	void (*enable)(struct kvm_vm *vm);
	/* How many pages are dirty, beyond those that are to be sent already */
	uint64_t (*waiting)(void);
	/* Add dirty pages to those that are to be sent, perhaps not all. */
	void (*get)(void);
	/* Called before the pages in these words of area->log are sent */
	void (*before_send)(struct area *area, uint64_t from, uint64_t to);
	/* Add all that are left: no vCPU runs any more. */
	void (*finish)(void);
};

static const struct way *way;
static struct ring_vm *rv;
static uint64_t page_bytes;
static bool vcpus_quit, harvesters_quit;

/* Pages that are to be sent, and how many. */
static uint64_t *to_send;
static uint64_t nr_to_send;

static uint64_t link_free_at;
static uint64_t sent;
static uint64_t sending_ns;

/* --- The guest -------------------------------------------------------------- */

/* Shared with the guest. */
static struct {
	uint64_t pages;
	uint64_t page_bytes;
	uint64_t vcpus;
	/*
	 * Cycles from one write of a vCPU to the next, and most it may catch up
	 */
	uint64_t interval;
	uint64_t catch_up;
} guest;

static struct progress {
	uint64_t writes;
} __aligned(64) progress[RING_VM_MAX_VCPUS];

/* Cycles of a clock that is as fast in the host as in the guest */
static uint64_t cycles(void)
{
#ifdef __x86_64__
	return rdtsc();
#else
	uint64_t count;

	asm volatile("isb\n\tmrs %0, cntvct_el0" : "=r" (count) : : "memory");
	return count;
#endif
}

static uint64_t cycles_per_second(void)
{
	uint64_t start = now_ns(), count = cycles();

	usleep(100000);
	return (cycles() - count) * NSEC / (now_ns() - start);
}

static void write_page(uint64_t page, uint64_t vcpu)
{
	uint64_t *word = (void *)(RING_VM_GVA + page * guest.page_bytes);
	uint64_t n = progress[vcpu].writes + 1;

	guest_store(word + vcpu, vcpu << 56 | n);
	WRITE_ONCE(progress[vcpu].writes, n);
}

/* Write to all pages once, shared out to the vCPUs, then to random ones. */
static void guest_code(uint64_t vcpu)
{
	uint64_t random = (vcpu + 1) * 0x9e3779b97f4a7c15, page, due, now;

	for (page = vcpu; page < guest.pages; page += guest.vcpus)
		write_page(page, vcpu);

	due = cycles();
	while (true) {
		random ^= random << 13;
		random ^= random >> 7;
		random ^= random << 17;
		write_page((random >> 32) * guest.pages >> 32, vcpu);

		if (!guest.interval)
			continue;
		due += guest.interval;
		now = cycles();
		if ((int64_t)(now - due) > (int64_t)guest.catch_up)
			due = now;
		while ((int64_t)(due - cycles()) > 0)
			;
	}
}

static uint64_t guest_writes(void)
{
	struct progress *p;
	uint64_t sum = 0;
	uint32_t i;

	for (i = 0; i < opt.vcpus; i++) {
		p = addr_gva2hva(rv->vm, (vm_vaddr_t)&progress[i]);
		sum += READ_ONCE(p->writes);
	}
	return sum;
}

/* --- vCPUs ------------------------------------------------------------------ */

static void kick(int sig)
{
}

static void *run_vcpu(void *data)
{
	struct vcpu_threads *v = data;
	struct kvm_run *run = vcpu_state(rv->vm, v->id);
	int ret;

	while (!READ_ONCE(vcpus_quit)) {
		ret = _vcpu_ioctl(rv->vm, v->id, KVM_RUN, NULL);
		if (ret) {
			TEST_ASSERT(errno == EINTR, "KVM_RUN: %s",
				    strerror(errno));
			continue;
		}
		TEST_ASSERT(run->exit_reason == KVM_EXIT_DIRTY_RING_FULL,
			    "Unexpected exit: %s",
			    exit_reason_str(run->exit_reason));
		v->full_exits++;
		WRITE_ONCE(v->waits, true);
		sem_wait(&v->may_run);
	}
	return NULL;
}

/* vCPUs that wait for a reset get one: the harvesters still run. */
static void stop_vcpus(void)
{
	uint32_t i;

	WRITE_ONCE(vcpus_quit, true);
	for (i = 0; i < opt.vcpus; i++) {
		/* The signal may come just before KVM_RUN. */
		WRITE_ONCE(vcpu_state(rv->vm, i)->immediate_exit, 1);
		pthread_kill(vcpus[i].runner, SIGUSR1);
	}
	for (i = 0; i < opt.vcpus; i++)
		pthread_join(vcpus[i].runner, NULL);
}

/* --- What is to be sent, and the link --------------------------------------- */

static void add_to_send(uint64_t word, uint64_t bits)
{
	bits &= ~__atomic_fetch_or(&to_send[word], bits, __ATOMIC_ACQ_REL);
	__atomic_fetch_add(&nr_to_send, __builtin_popcountl(bits),
			   __ATOMIC_RELAXED);
}

static void link_wait(uint64_t until)
{
	struct timespec ts = {
		.tv_sec = until / NSEC,
		.tv_nsec = until % NSEC,
	};

	clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &ts, NULL);
}

static void send_page(struct area *area, uint64_t page)
{
	uint64_t now = now_ns();

	memcpy(area->copy + page * page_bytes, area->mem + page * page_bytes,
	       page_bytes);
	sent++;

	if (link_free_at + LINK_BURST_NS < now)
		link_free_at = now - LINK_BURST_NS;
	link_free_at += page_bytes * NSEC / (opt.bandwidth << 20);
	if (link_free_at > now + LINK_NAP_NS)
		link_wait(link_free_at);
}

/* Move what is to be sent of these words to area->log. */
static uint64_t take(struct area *area, uint64_t from, uint64_t to)
{
	uint64_t nr = 0, word;

	for (word = from; word < to; word++) {
		/* A page that is added from now on is sent again. */
		area->log[word] =
			__atomic_exchange_n(&to_send[area->first / 64 + word], 0,
					    __ATOMIC_ACQ_REL);
		nr += __builtin_popcountl(area->log[word]);
	}
	__atomic_fetch_sub(&nr_to_send, nr, __ATOMIC_RELAXED);
	return nr;
}

/* Go through all memory once. */
static void send_all(void)
{
	uint64_t start = now_ns(), from, to, word, bits;
	struct area *area;

	for (area = areas; area < areas + ARRAY_SIZE(areas); area++) {
		for (from = 0; from * 64 < area->pages; from = to) {
			to = from + (way->before_send ? opt.chunk / 64 : 1);
			if (to * 64 > area->pages)
				to = (area->pages + 63) / 64;
			if (!take(area, from, to))
				continue;
			if (way->before_send && !vcpus_quit)
				way->before_send(area, from, to);
			for (word = from; word < to; word++)
				for (bits = area->log[word]; bits; bits &= bits - 1)
					send_page(area, word * 64 +
						  __builtin_ctzl(bits));
		}
	}
	link_wait(link_free_at);
	sending_ns += now_ns() - start;
}

/* --- The bitmaps ------------------------------------------------------------ */

static void bitmap_get(void)
{
	struct area *area;
	uint64_t word;
	uint32_t i;

	for (i = 0; i < ARRAY_SIZE(areas); i++) {
		area = &areas[i];
		kvm_vm_get_dirty_log(rv->vm, area->slot, area->log);
		for (word = 0; word * 64 < area->pages; word++)
			if (area->log[word])
				add_to_send(area->first / 64 + word,
					    area->log[word]);
	}
}

static int clear_log_flags(void)
{
	return kvm_check_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) &
	       (KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE |
		KVM_DIRTY_LOG_INITIALLY_SET);
}

static const char *clear_log_missing(void)
{
	return clear_log_flags() ? NULL : "KVM has no KVM_CLEAR_DIRTY_LOG";
}

static void clear_log_enable(struct kvm_vm *vm)
{
	struct kvm_enable_cap cap = {
		.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
		.args[0] = clear_log_flags(),
	};

	vm_enable_cap(vm, &cap);
}

static void clear_log_before_send(struct area *area, uint64_t from, uint64_t to)
{
	uint64_t pages = to * 64 < area->pages ? (to - from) * 64 :
						 area->pages - from * 64;

	kvm_vm_clear_dirty_log(rv->vm, area->slot, &area->log[from], from * 64,
			       pages);
}

/* --- The rings -------------------------------------------------------------- */

static bool vcpu_reset;

static const char *ring_missing(void)
{
	return dirty_ring_max_size() ? NULL : "KVM has no dirty ring";
}

/* How many pages wait in a ring: its dirty entries are contiguous. */
static uint32_t ring_used(struct vcpu_threads *v)
{
	struct kvm_dirty_gfn *ring = vcpu_dirty_ring(rv->vm, v->id);
	uint32_t from = 0, to = opt.entries, middle;

	while (from < to) {
		middle = (from + to) / 2;
		if (dirty_gfn_is_dirty(&ring[(v->next + middle) % opt.entries]))
			from = middle + 1;
		else
			to = middle;
	}
	return from;
}

static uint64_t ring_waiting(void)
{
	uint64_t sum = 0;
	uint32_t i;

	for (i = 0; i < opt.vcpus; i++)
		sum += ring_used(&vcpus[i]) + READ_ONCE(vcpus[i].nr_harvested);
	return sum;
}

static void note_page(uint32_t slot, uint64_t offset, void *data)
{
	struct vcpu_threads *v = data;
	struct area *area = &areas[slot == RING_VM_SLOT];

	TEST_ASSERT(slot == area->slot && offset < area->pages,
		    "Page %#lx of slot %#x is reported", offset, slot);
	v->harvested[v->nr_harvested++] = area->first + offset;
}

/* Harvest, reset, and have the pages sent only then. */
static uint32_t ring_collect(struct vcpu_threads *v, uint32_t max)
{
	uint64_t page;
	uint32_t nr, i;
	int reset;

	nr = vcpu_harvest_dirty_ring(rv->vm, v->id, max, note_page, v);
	v->next += nr;

	if (vcpu_reset) {
		reset = _vcpu_ioctl(rv->vm, v->id, KVM_RESET_DIRTY_RINGS, NULL);
		TEST_ASSERT(reset == nr,
			    "Harvested %u entries but %d got reset", nr, reset);
	} else {
		/* Another thread may reset these, and this one the other's. */
		vm_reset_dirty_rings(rv->vm);
	}

	for (i = 0; i < nr; i++) {
		page = v->harvested[i];
		add_to_send(page / 64, 1UL << (page % 64));
	}
	WRITE_ONCE(v->nr_harvested, 0);
	return nr;
}

static void *harvest(void *data)
{
	struct vcpu_threads *v = data;
	uint32_t used, batch = rv->limit * 3 / 4;

	if (batch > HARVEST_PAGES)
		batch = HARVEST_PAGES;
	while (!READ_ONCE(harvesters_quit)) {
		used = ring_used(v);
		if (READ_ONCE(v->waits) || used >= batch ||
		    (used && READ_ONCE(nr_to_send) < HUNGRY_PAGES))
			ring_collect(v, HARVEST_PAGES);
		else
			usleep(HARVEST_NAP_US);

		if (READ_ONCE(v->waits)) {
			WRITE_ONCE(v->waits, false);
			sem_post(&v->may_run);
		}
	}
	return NULL;
}

/* The harvesters do it. */
static void ring_get(void)
{
	if (!READ_ONCE(nr_to_send))
		usleep(HARVEST_NAP_US);
}

static void ring_finish(void)
{
	uint32_t i, nr, rounds = 0;

	WRITE_ONCE(harvesters_quit, true);
	for (i = 0; i < opt.vcpus; i++)
		pthread_join(vcpus[i].harvester, NULL);

	/* A reset moves the overflow to the rings: at least twice. */
	do {
		for (nr = 0, i = 0; i < opt.vcpus; i++)
			nr += ring_collect(&vcpus[i], DIRTY_RING_HARVEST_ALL);
	} while (nr || ++rounds < 2);
}

/* --- A migration ------------------------------------------------------------ */

static const struct way ways[] = {
	{
		.name = "dirty-log",
		.get = bitmap_get,
		.finish = bitmap_get,
	}, {
		.name = "clear-log",
		.missing = clear_log_missing,
		.enable = clear_log_enable,
		.get = bitmap_get,
		.before_send = clear_log_before_send,
		.finish = bitmap_get,
	}, {
		.name = "dirty-ring",
		.missing = ring_missing,
		.waiting = ring_waiting,
		.get = ring_get,
		.finish = ring_finish,
	},
};

static void *allocate(uint64_t size)
{
	void *memory = calloc(1, size);

	TEST_ASSERT(memory, "Insufficient Memory");
	return memory;
}

static pthread_t start_thread(void *(*fn)(void *), void *data)
{
	pthread_t thread;

	TEST_ASSERT(!pthread_create(&thread, NULL, fn, data),
		    "pthread_create failed");
	return thread;
}

static void create_areas(void)
{
	static const uint64_t gpa[] = { 0, RING_VM_GPA };
	struct kvm_userspace_memory_region *region;
	uint64_t pages = 0;
	uint32_t i;

	for (i = 0; i < ARRAY_SIZE(areas); i++) {
		region = kvm_userspace_memory_region_find(rv->vm, gpa[i],
							  gpa[i]);
		TEST_ASSERT(region && region->slot == areas[i].slot,
			    "There is no slot %u", areas[i].slot);
		areas[i].first = pages;
		areas[i].pages = region->memory_size / page_bytes;
		areas[i].mem = (void *)region->userspace_addr;
		areas[i].copy = allocate(region->memory_size);
		areas[i].log = allocate(areas[i].pages / 8 + 8);
		pages += (areas[i].pages + 63) / 64 * 64;
	}
	to_send = allocate(pages / 8);
}

static void create_vm(void)
{
	struct sigaction sa = { .sa_handler = kick };
	uint64_t hz;
	uint32_t i;

	page_bytes = getpagesize();
	rv = ring_vm_create(way->waiting ? opt.entries : 0, opt.vcpus,
			    (opt.mib << 20) / page_bytes, 0, way->enable);
	create_areas();

	hz = cycles_per_second();
	guest.pages = rv->pages;
	guest.page_bytes = page_bytes;
	guest.vcpus = opt.vcpus;
	guest.interval = opt.rate ? hz * opt.vcpus / opt.rate : 0;
	guest.catch_up = hz / 5;
	sync_global_to_guest(rv->vm, guest);

	sigaction(SIGUSR1, &sa, NULL);
	vcpu_reset = kvm_check_cap(KVM_CAP_DIRTY_RING_EXT) &
		     KVM_DIRTY_RING_EXT_VCPU_RESET;
	for (i = 0; i < opt.vcpus; i++) {
		ring_vm_set_code(rv, i, guest_code, i);
		vcpus[i].id = i;
		sem_init(&vcpus[i].may_run, 0, 0);
		if (!way->waiting)
			continue;
		/* Map the ring while there is one thread. */
		vcpu_dirty_ring(rv->vm, i);
		vcpus[i].harvested = allocate(opt.entries * sizeof(uint64_t));
	}
	for (i = 0; i < opt.vcpus; i++) {
		vcpus[i].runner = start_thread(run_vcpu, &vcpus[i]);
		if (way->waiting)
			vcpus[i].harvester = start_thread(harvest, &vcpus[i]);
	}
}

static bool compare(void)
{
	uint64_t page, differ = 0, first = 0;
	uint32_t i, slot = 0;

	for (i = ARRAY_SIZE(areas); i--;) {
		for (page = areas[i].pages; page--;) {
			if (!memcmp(areas[i].mem + page * page_bytes,
				    areas[i].copy + page * page_bytes,
				    page_bytes))
				continue;
			differ++;
			first = page;
			slot = areas[i].slot;
		}
	}
	if (differ)
		printf("FAILED: %lu pages differ; the first is page %lu of slot %u\n",
		       differ, first, slot);
	else
		printf("pass\n");
	return !differ;
}

/* Return: whether the copy is right. */
static bool migrate(void)
{
	uint64_t start, end, stop, writes, before, left, i;
	uint64_t full_exits = 0, rounds = 0;

	while (guest_writes() < rv->pages)
		usleep(10000);
	start = now_ns();
	writes = guest_writes();
	usleep(BEFORE_NS / 1000);
	before = (guest_writes() - writes) * NSEC / (now_ns() - start);

	start = now_ns();
	writes = guest_writes();
	for (i = 0; i < ARRAY_SIZE(areas); i++)
		vm_mem_region_set_flags(rv->vm, areas[i].slot,
					KVM_MEM_LOG_DIRTY_PAGES);
	for (i = 0; i < ARRAY_SIZE(areas); i++)
		for (left = areas[i].pages; left; left -= left < 64 ? left : 64)
			add_to_send((areas[i].first + areas[i].pages - left) / 64,
				    left < 64 ? (1UL << left) - 1 : ~0UL);

	while (true) {
		send_all();
		rounds++;
		way->get();
		left = READ_ONCE(nr_to_send);
		if (way->waiting)
			left += way->waiting();
		/* At the bandwidth that was measured */
		if (left * (sending_ns / sent) <= opt.downtime * (NSEC / 1000))
			break;
		if (now_ns() - start > opt.limit * NSEC) {
			printf("%-10s FAILED: does not converge, %lu MiB to go after %lu s\n",
			       way->name, left * page_bytes >> 20, opt.limit);
			return false;
		}
	}

	stop = now_ns();
	stop_vcpus();
	writes = (guest_writes() - writes) * NSEC / (stop - start);
	way->finish();
	send_all();
	rounds++;
	end = now_ns();

	for (i = 0; i < opt.vcpus; i++)
		full_exits += vcpus[i].full_exits;
	printf("%-10s %8lu %8lu %7lu %10lu %9lu %9lu %9lu  ", way->name,
	       (end - start) / 1000000, (end - stop) / 1000000, rounds, sent,
	       full_exits, before, writes);
	return compare();
}

/* Use a process of its own: whatever is left goes with it. */
static bool run_way(void)
{
	int status;
	pid_t pid;

	fflush(NULL);
	pid = fork();
	TEST_ASSERT(pid >= 0, "fork failed");
	if (!pid) {
		create_vm();
		exit(migrate() ? KSFT_PASS : KSFT_FAIL);
	}
	TEST_ASSERT(waitpid(pid, &status, 0) == pid, "waitpid failed");
	if (status && !(WIFEXITED(status) && WEXITSTATUS(status) == KSFT_FAIL))
		printf("%-10s FAILED: status %#x\n", way->name, status);
	return !status;
}

static void __attribute__((noreturn)) help(const char *name, int status)
{
	const struct number *n;

	printf("usage: %s [-h] [-M way]... [-OPTION NUMBER]...\n"
	       " -M: dirty-log (KVM_GET_DIRTY_LOG), clear-log (KVM_CLEAR_DIRTY_LOG) or\n"
	       "     dirty-ring; default: all there are\n", name);
	for (n = numbers; n < numbers + ARRAY_SIZE(numbers); n++)
		printf(" -%c: %s (%lu)\n", n->option, n->what, *n->value);
	printf("Each line has: way, total time and downtime in ms, rounds, pages sent, times a\n"
	       "ring was full, pages written a second before and meanwhile, verdict\n");
	exit(status);
}

static void set_number(char option, const char *arg)
{
	const struct number *n = numbers;
	uint64_t value;
	char *end;

	while (n->option != option)
		n++;
	value = strtoull(arg, &end, 0);
	/* 256 and 256M are the same. */
	if (option == 'b' && end != arg && !strcmp(end, "M"))
		end++;
	if (*end || end == arg || *arg == '-' || value < n->min ||
	    value > n->max) {
		fprintf(stderr, "-%c %s is not from %lu to %lu\n", option, arg,
			n->min, n->max);
		exit(KSFT_FAIL);
	}
	*n->value = value;
}

int main(int argc, char **argv)
{
	bool wanted[ARRAY_SIZE(ways)] = {}, any = false, good = true;
	uint32_t taken = 0, i;
	const char *why;
	int o;

	while ((o = getopt(argc, argv, "hM:i:v:b:R:B:d:t:r:c:")) != -1) {
		switch (o) {
		case 'M':
			for (i = 0; i < ARRAY_SIZE(ways); i++)
				if (!strcmp(optarg, ways[i].name))
					break;
			if (i == ARRAY_SIZE(ways))
				help(argv[0], KSFT_FAIL);
			wanted[i] = true;
			any = true;
			break;
		case 'h':
		case '?':
			help(argv[0], o == 'h' ? 0 : KSFT_FAIL);
		default:
			set_number(o, optarg);
		}
	}
	if (optind < argc)
		help(argv[0], KSFT_FAIL);

	for (i = 0; i < ARRAY_SIZE(ways); i++) {
		wanted[i] |= !any;
		why = ways[i].missing ? ways[i].missing() : NULL;
		if (wanted[i] && why) {
			printf("# %s: skipped, %s\n", ways[i].name, why);
			wanted[i] = false;
		}
		taken += wanted[i];
	}
	if (!taken)
		exit(KSFT_SKIP);

	printf("%-10s %8s %8s %7s %10s %9s %9s %9s  %s\n", "way", "total",
	       "downtime", "rounds", "sent", "ring-full", "before/s", "writes/s",
	       "compare");
	while (opt.times--) {
		for (i = 0; i < ARRAY_SIZE(ways); i++) {
			way = &ways[i];
			if (wanted[i])
				good &= run_way();
		}
	}
	return good ? KSFT_PASS : KSFT_FAIL;
}
