// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test that a copy of a guest's memory that is kept up to date with nothing
 * but what KVM's dirty rings report equals the memory, under stress
 *
 * At the same time
 *  - vCPUs write to random pages, once or over and over,
 *  - several threads harvest the rings, reset them and copy pages,
 *  - one memslot is deleted and created again, another one is moved,
 *  - KVM itself writes clocks and steal time to guest memory,
 *  - signals rain on the vCPUs and on the threads that reset.
 *
 * A page that is lost shows only until it is written and reported again, thus
 * the copy is compared often: all of it whenever the vCPUs are stopped, which
 * they are now and then; and that of a memslot whenever that was deleted,
 * while the vCPUs run, because nobody can write to it any more.
 */

#define _GNU_SOURCE /* for program_invocation_name */

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <time.h>

#include "test_util.h"
#include "kvm_util.h"
#include "dirty_ring_vm.h"
#include "processor.h"

#ifdef __x86_64__
#include <asm/kvm_para.h>
#endif

/*
 * What the guest writes to, in pages: a memslot that stays, then windows for
 * the one that is deleted and created, and for the two places of the one that
 * moves.
 */
#define BASE_PAGES	2048
#define WINDOW_PAGES	512
#define WINDOWS		3
#define GUEST_PAGES	(BASE_PAGES + WINDOWS * WINDOW_PAGES)

#define WINDOW_GONE	0
#define WINDOW_MOVE	1	/* and the next one */

/* KVM writes to the start of a page, the guest to the rest; in words. */
#define KVM_WORDS	8
#define PAGE_WORDS	(page_bytes / sizeof(uint64_t))

/* One in so many bursts of writes to a word is long, up to 2^20 writes. */
#define BURST_LONG	64
#define BURST_SHIFTS	21

#define HARVESTERS	3
#define PAGE_LOCKS	64

/*
 * Shared with the guest: whether there is memory behind a window. Only a hint:
 * it is cleared after the memslot is gone, and writes that come too late are
 * MMIO. Cleared before, there would be no race to test.
 */
struct windows {
	uint64_t open[WINDOWS];
} __aligned(64);	/* Never across pages */

static struct windows guest_windows;
static uint64_t page_bytes;

struct area {
	uint32_t slot;
	uint64_t pages;
	/* Place in the guest: the memslot's first page */
	uint64_t first;
	uint8_t *mem;
	uint8_t *copy;
};

/* What one thread has harvested since the last reset. */
struct harvest {
	struct {
		uint32_t slot;
		uint64_t offset;
	} *page;
	uint32_t nr;
	uint32_t capacity;
	/* Rest between harvest and reset, in us. */
	uint32_t rest;
};

static struct area areas[] = {
	{ .slot = RING_VM_SLOT, .pages = BASE_PAGES },
	{ .slot = RING_VM_SLOT + 1, .pages = WINDOW_PAGES },
	{ .slot = RING_VM_SLOT + 2, .pages = WINDOW_PAGES },
};

#define BASE	(&areas[0])
#define GONE	(&areas[1])
#define MOVE	(&areas[2])

static struct ring_vm *rv;
/* guest_windows, where the host has it */
static struct windows *windows;
static unsigned int seed;
static bool quit;

/* One thread at a time harvests a ring. */
static pthread_mutex_t ring_lock[RING_VM_MAX_VCPUS];

/*
 * One thread at a time copies a page, so that no older contents replace newer
 * ones.
 */
static pthread_mutex_t page_lock[PAGE_LOCKS];

/* Read: a vCPU runs. Write: none does. Take it before the rounds' lock. */
static pthread_rwlock_t vcpus_lock;

/*
 * Read: a round of harvest, reset and copy, or an ioctl that has KVM write.
 * Write: all rounds have ended, and copied what they harvested.
 */
static pthread_rwlock_t rounds_lock;

/*
 * Longest rest of harvesting threads after a round, in us. It changes now and
 * then: without a rest resets meet, after a long one rings are full.
 */
static unsigned int harvest_pause;

static pthread_t threads[RING_VM_MAX_VCPUS + HARVESTERS];
static uint32_t nr_threads;

static struct {
	uint64_t harvested;
	uint64_t reset;
	uint64_t resets;
	uint64_t full;
	uint64_t mmio;
	uint64_t kvm_writes;
	uint64_t signals;
	uint64_t slot_changes;
	uint64_t compared;
} total;

static void count(uint64_t *counter, uint64_t nr)
{
	__atomic_fetch_add(counter, nr, __ATOMIC_RELAXED);
}

/*
 * The guest
 */

static bool guest_page_is_open(uint64_t page)
{
	return page < BASE_PAGES ||
	       READ_ONCE(guest_windows.open[(page - BASE_PAGES) /
					    WINDOW_PAGES]);
}

/* Each store writes its page and its own number. */
static void guest_code(uint64_t random)
{
	uint64_t *word, page, n, stores = 1;

	while (true) {
		random ^= random << 13;
		random ^= random >> 7;
		random ^= random << 17;

		page = (random >> 32) % GUEST_PAGES;
		word = (void *)RING_VM_GVA + page * page_bytes;
		word += KVM_WORDS + random % (PAGE_WORDS - KVM_WORDS);
		/*
		 * Stay in the guest, to write by a stale TLB entry if there is
		 * one after a reset.
		 */
		n = random >> 16 & (BURST_LONG - 1) ? 1 :
		    1UL << (random >> 24) % BURST_SHIFTS;
		for (; n && guest_page_is_open(page); n--, stores++)
			guest_store(word, page << 32 | (stores & UINT32_MAX));
	}
}

/*
 * vCPUs
 */

#ifdef __x86_64__
/* Have KVM write, to any page but those of the memslot that is deleted. */
static void kvm_writes(uint32_t vcpu, unsigned int *random)
{
	static const uint32_t msrs[] = {
		MSR_KVM_WALL_CLOCK_NEW,
		MSR_KVM_SYSTEM_TIME_NEW,
		MSR_KVM_STEAL_TIME,
	};
	uint64_t page, gpa, enable;
	uint32_t msr, n;

	/* More than the reserved entries, sometimes. */
	for (n = 1 << rand_r(random) % 9; n; n--) {
		page = rand_r(random) % (GUEST_PAGES - WINDOW_PAGES);
		if (page >= GONE->first)
			page += WINDOW_PAGES;
		gpa = RING_VM_GPA + page * page_bytes;
		/* KVM writes the others later, on the way into the guest. */
		msr = msrs[n > 1 ? 0 : rand_r(random) % ARRAY_SIZE(msrs)];
		/* May fail: there may be no steal time, or no memory. */
		enable = msr != MSR_KVM_WALL_CLOCK_NEW;
		if (_vcpu_set_msr(rv->vm, vcpu, msr, gpa | enable) == 1)
			count(&total.kvm_writes, 1);
	}
}
#else
/* From now on KVM writes nothing but steal time. */
static void kvm_writes(uint32_t vcpu, unsigned int *random)
{
}
#endif

static void handle_exit(uint32_t vcpu)
{
	struct kvm_run *run = vcpu_state(rv->vm, vcpu);

	switch (run->exit_reason) {
	case KVM_EXIT_DIRTY_RING_FULL:
		count(&total.full, 1);
		sched_yield();
		break;
	case KVM_EXIT_MMIO:
		TEST_ASSERT(run->mmio.is_write &&
			    run->mmio.phys_addr >=
			    RING_VM_GPA + BASE_PAGES * page_bytes &&
			    run->mmio.phys_addr <
			    RING_VM_GPA + GUEST_PAGES * page_bytes,
			    "MMIO at %#llx", run->mmio.phys_addr);
		count(&total.mmio, 1);
		break;
	default:
		vcpu_dump(stderr, rv->vm, vcpu, 0);
		TEST_FAIL("Unexpected exit: %s",
			  exit_reason_str(run->exit_reason));
	}
}

static void *vcpu_thread(void *data)
{
	uint32_t vcpu = (uintptr_t)data;
	unsigned int random = seed + vcpu;
	bool stop;
	int ret;

	do {
		pthread_rwlock_rdlock(&vcpus_lock);
		stop = quit;
		if (!stop && rand_r(&random) % 64 == 0) {
			pthread_rwlock_rdlock(&rounds_lock);
			kvm_writes(vcpu, &random);
			pthread_rwlock_unlock(&rounds_lock);
		}
		if (!stop) {
			ret = _vcpu_ioctl(rv->vm, vcpu, KVM_RUN, NULL);
			TEST_ASSERT(!ret || errno == EINTR, "KVM_RUN: %s",
				    strerror(errno));
			if (!ret)
				handle_exit(vcpu);
		}
		pthread_rwlock_unlock(&vcpus_lock);
	} while (!stop);

	return NULL;
}

/*
 * Rounds of harvest, reset and copy
 */

static void harvest_init(struct harvest *h)
{
	h->rest = 0;
	h->capacity = rv->nr_vcpus * rv->entries;
	h->page = calloc(h->capacity, sizeof(*h->page));
	TEST_ASSERT(h->page, "Insufficient Memory");
}

static struct area *area_of_slot(uint32_t slot)
{
	TEST_ASSERT(slot >= BASE->slot && slot <= MOVE->slot,
		    "Slot %#x is reported but not tracked", slot);
	return &areas[slot - BASE->slot];
}

static void harvest_note(uint32_t slot, uint64_t offset, void *data)
{
	struct harvest *h = data;

	TEST_ASSERT(offset < area_of_slot(slot)->pages,
		    "Page %#lx is reported but not in slot %u", offset, slot);
	TEST_ASSERT(h->nr < h->capacity, "More entries than the rings have");
	h->page[h->nr].slot = slot;
	h->page[h->nr].offset = offset;
	h->nr++;
}

static void copy_page(uint32_t slot, uint64_t offset)
{
	pthread_mutex_t *lock = &page_lock[offset % PAGE_LOCKS];
	struct area *area = area_of_slot(slot);

	pthread_mutex_lock(lock);
	memcpy(area->copy + offset * page_bytes,
	       area->mem + offset * page_bytes, page_bytes);
	pthread_mutex_unlock(lock);
}

/*
 * Do one round, with at most @max entries of each ring, from vCPU @first on.
 *
 * A reset takes all that is harvested, whoever harvested it. So another thread
 * may reset what this one has harvested, but no later than when this one's own
 * reset returns. Copy only then: a write after the copy is reported again.
 */
static uint32_t do_round(struct harvest *h, uint32_t max, uint32_t first)
{
	uint32_t i, vcpu;

	h->nr = 0;
	for (i = 0; i < rv->nr_vcpus; i++) {
		vcpu = (first + i) % rv->nr_vcpus;
		pthread_mutex_lock(&ring_lock[vcpu]);
		vcpu_harvest_dirty_ring(rv->vm, vcpu, max, harvest_note, h);
		pthread_mutex_unlock(&ring_lock[vcpu]);
	}
	count(&total.harvested, h->nr);

	/* Give others time to reset what was harvested here. */
	if (h->rest)
		usleep(h->rest);

	count(&total.reset, vm_reset_dirty_rings(rv->vm));
	count(&total.resets, 1);

	for (i = 0; i < h->nr; i++)
		copy_page(h->page[i].slot, h->page[i].offset);

	return h->nr;
}

static void *harvest_thread(void *data)
{
	unsigned int random = seed + 100 + (uintptr_t)data;
	uint32_t max, nr, pause;
	struct harvest h;

	harvest_init(&h);
	while (!READ_ONCE(quit)) {
		max = rand_r(&random) % 2 ? 1 + rand_r(&random) % rv->limit :
					    DIRTY_RING_HARVEST_ALL;
		h.rest = rand_r(&random) % 2 ? rand_r(&random) % 500 : 0;
		pthread_rwlock_rdlock(&rounds_lock);
		nr = do_round(&h, max, rand_r(&random));
		pthread_rwlock_unlock(&rounds_lock);
		pause = READ_ONCE(harvest_pause);
		if (!nr || pause)
			usleep(rand_r(&random) % (pause + 500));
	}
	free(h.page);

	return NULL;
}

/*
 * Signals
 */

static void handle_signal(int sig)
{
	count(&total.signals, 1);
}

static void *rain_thread(void *unused)
{
	unsigned int random = seed + 200;

	while (!READ_ONCE(quit)) {
		pthread_kill(threads[rand_r(&random) % nr_threads], SIGUSR1);
		usleep(rand_r(&random) % 500);
	}

	return NULL;
}

/*
 * Comparing
 */

/* Nothing writes to the area, and no copy is under way. */
static void compare(struct area *area, const char *when)
{
	uint64_t page, word, *mem, *copy, stale = 0, at = 0, got;

	TEST_ASSERT(total.harvested == total.reset,
		    "Harvested %lu entries but %lu got reset, %s",
		    total.harvested, total.reset, when);

	for (page = area->pages; page--;) {
		if (memcmp(area->copy + page * page_bytes,
			   area->mem + page * page_bytes, page_bytes)) {
			stale++;
			at = page;
		}
	}
	mem = (uint64_t *)(area->mem + at * page_bytes);
	copy = (uint64_t *)(area->copy + at * page_bytes);
	for (word = 0; stale && mem[word] == copy[word];)
		word++;
	TEST_ASSERT(!stale,
		    "%s, %lu of the %lu pages of slot %u are stale in the copy; page %lu, word %lu: %#lx, in the copy %#lx",
		    when, stale, area->pages, area->slot, at, word, mem[word],
		    copy[word]);

	/* The guest wrote to the right page, wherever the memslot was. */
	for (page = 0; page < area->pages; page++) {
		mem = (uint64_t *)(area->mem + page * page_bytes);
		for (word = KVM_WORDS; word < PAGE_WORDS; word++) {
			got = mem[word] >> 32;
			TEST_ASSERT(!mem[word] || got == area->first + page ||
				    (area == MOVE && got % WINDOW_PAGES ==
				     (area->first + page) % WINDOW_PAGES),
				    "%s, page %lu of slot %u has %#lx", when,
				    page, area->slot, mem[word]);
		}
	}
	total.compared++;
}

/* Stop the vCPUs, get all that is reported, and compare. */
static void compare_all(struct harvest *h, bool last)
{
	int i;

	pthread_rwlock_wrlock(&vcpus_lock);
	pthread_rwlock_wrlock(&rounds_lock);

	/* A reset moves the overflow to the rings: at least twice. */
	do_round(h, DIRTY_RING_HARVEST_ALL, 0);
	while (do_round(h, DIRTY_RING_HARVEST_ALL, 0))
		;
	for (i = 0; i < ARRAY_SIZE(areas); i++)
		compare(&areas[i], last ? "In the end" :
					  "With the vCPUs stopped");
	WRITE_ONCE(quit, last);

	pthread_rwlock_unlock(&rounds_lock);
	pthread_rwlock_unlock(&vcpus_lock);
}

/*
 * Memslots
 */

static void set_memslot(struct area *area, uint64_t pages)
{
	/* Leave the library's list of regions alone: other threads use it. */
	vm_set_slot(rv->vm, area->slot, RING_VM_GPA + area->first * page_bytes,
		    area->mem, pages * page_bytes, KVM_MEM_LOG_DIRTY_PAGES);
	count(&total.slot_changes, 1);
}

static void set_open(struct area *area, bool open)
{
	WRITE_ONCE(windows->open[(area->first - BASE_PAGES) / WINDOW_PAGES],
		   open);
}

/*
 * Delete a memslot that vCPUs write to. When the ioctl returns, each of these
 * writes is in a ring, and one round gets it: what a vCPU writes goes to its
 * own ring, not to the overflow.
 */
static void delete_and_create(struct harvest *h, unsigned int *random)
{
	set_memslot(GONE, 0);
	set_open(GONE, false);

	pthread_rwlock_wrlock(&rounds_lock);
	do_round(h, DIRTY_RING_HARVEST_ALL, 0);
	compare(GONE, "With the memslot deleted");
	pthread_rwlock_unlock(&rounds_lock);

	usleep(rand_r(random) % 1000);
	set_memslot(GONE, GONE->pages);
	set_open(GONE, true);
}

static void move(void)
{
	struct area old = *MOVE;

	MOVE->first = 2 * BASE_PAGES + (2 * WINDOW_MOVE + 1) * WINDOW_PAGES -
		      MOVE->first;
	set_memslot(MOVE, MOVE->pages);
	set_open(&old, false);
	set_open(MOVE, true);
}

static void area_init(struct area *area, uint32_t window)
{
	size_t size = area->pages * page_bytes;

	if (area == BASE) {
		area->mem = rv->mem;
	} else {
		area->first = BASE_PAGES + window * WINDOW_PAGES;
		area->mem = mmap(NULL, size, PROT_READ | PROT_WRITE,
				 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		TEST_ASSERT(area->mem != MAP_FAILED, "mmap failed");
		set_memslot(area, area->pages);
		set_open(area, true);
	}
	area->copy = calloc(area->pages, page_bytes);
	TEST_ASSERT(area->copy, "Insufficient Memory");
}

/*
 * Setting up
 */

/* Let writers of the lock not starve: there is always a reader. */
static void init_lock(pthread_rwlock_t *lock)
{
	pthread_rwlockattr_t attr;

	pthread_rwlockattr_init(&attr);
	pthread_rwlockattr_setkind_np(&attr,
				      PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	pthread_rwlock_init(lock, &attr);
}

static void create_vm(uint32_t nr_vcpus, uint32_t entries)
{
	uint64_t gpa;
	uint32_t i;

	rv = ring_vm_create(entries, nr_vcpus, BASE_PAGES,
			    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	page_bytes = getpagesize();
	sync_global_to_guest(rv->vm, page_bytes);
	virt_map(rv->vm, RING_VM_GVA + BASE_PAGES * page_bytes,
		 RING_VM_GPA + BASE_PAGES * page_bytes,
		 vm_num_guest_pages(VM_MODE_DEFAULT, WINDOWS * WINDOW_PAGES),
		 0);
	windows = addr_gva2hva(rv->vm, (vm_vaddr_t)&guest_windows);
	area_init(BASE, 0);
	area_init(GONE, WINDOW_GONE);
	area_init(MOVE, WINDOW_MOVE);

	for (i = 0; i < nr_vcpus; i++) {
		/* Have the vCPUs run this test's code. */
		ring_vm_set_code(rv, i, guest_code,
				 (i + 1) * 0x9e3779b97f4a7c15 ^ seed);
		gpa = RING_VM_GPA + i * page_bytes;
		if (!ring_vm_set_steal_time(rv, i, gpa))
			ksft_print_msg("no steal time\n");
		/* Map the ring while there is one thread. */
		vcpu_dirty_ring(rv->vm, i);
		pthread_mutex_init(&ring_lock[i], NULL);
	}
	for (i = 0; i < PAGE_LOCKS; i++)
		pthread_mutex_init(&page_lock[i], NULL);
	init_lock(&vcpus_lock);
	init_lock(&rounds_lock);
}

static void start_thread(pthread_t *thread, void *(*fn)(void *), uintptr_t nr)
{
	TEST_ASSERT(!pthread_create(thread, NULL, fn, (void *)nr),
		    "pthread_create failed");
}

static void stress(uint32_t seconds)
{
	static const unsigned int pauses[] = { 0, 0, 2000, 200000 };
	/* Without SA_RESTART, to see an interrupted ioctl */
	struct sigaction sa = { .sa_handler = handle_signal };
	unsigned int random = seed + 300;
	struct harvest h;
	struct timespec start;
	pthread_t rain;
	uint32_t i;

	harvest_init(&h);
	sigaction(SIGUSR1, &sa, NULL);
	for (i = 0; i < rv->nr_vcpus; i++)
		start_thread(&threads[nr_threads++], vcpu_thread, i);
	for (i = 0; i < HARVESTERS; i++)
		start_thread(&threads[nr_threads++], harvest_thread, i);
	start_thread(&rain, rain_thread, 0);

	clock_gettime(CLOCK_MONOTONIC, &start);
	while (timespec_diff_now(start).tv_sec < seconds) {
		usleep(rand_r(&random) % 20000);
		switch (rand_r(&random) % 4) {
		case 0:
			compare_all(&h, false);
			WRITE_ONCE(harvest_pause, pauses[rand_r(&random) %
							 ARRAY_SIZE(pauses)]);
			break;
		case 1:
			move();
			break;
		default:
			delete_and_create(&h, &random);
		}
	}
	compare_all(&h, true);

	pthread_join(rain, NULL);
	for (i = 0; i < nr_threads; i++)
		pthread_join(threads[i], NULL);
	free(h.page);
}

static void help(const char *name, int status)
{
	printf("usage: %s [-h] [-t seconds] [-s seed] [-v vCPUs] [-r entries]\n"
	       " -t: how long (default: 5)\n"
	       " -s: what the random numbers start with (default: the time)\n"
	       " -v: how many vCPUs, up to %d (default: 4)\n"
	       " -r: size of a ring, in entries (default: the smallest there is)\n",
	       name, RING_VM_MAX_VCPUS);
	exit(status);
}

int main(int argc, char **argv)
{
	uint32_t seconds = 5, nr_vcpus = 4, entries = 0;
	struct timespec now;
	int opt;

	clock_gettime(CLOCK_REALTIME, &now);
	seed = now.tv_sec ^ now.tv_nsec;

	while ((opt = getopt(argc, argv, "ht:s:v:r:")) != -1) {
		switch (opt) {
		case 't':
			seconds = strtoul(optarg, NULL, 0);
			break;
		case 's':
			seed = strtoul(optarg, NULL, 0);
			break;
		case 'v':
			nr_vcpus = strtoul(optarg, NULL, 0);
			break;
		case 'r':
			entries = strtoul(optarg, NULL, 0);
			break;
		default:
			help(argv[0], opt == 'h' ? 0 : KSFT_FAIL);
		}
	}
	if (optind != argc || !nr_vcpus || nr_vcpus > RING_VM_MAX_VCPUS)
		help(argv[0], KSFT_FAIL);

	dirty_ring_check_supported();
	if (!entries)
		entries = ring_vm_min_entries();

	setbuf(stdout, NULL);
	ksft_print_header();
	ksft_set_plan(1);
	ksft_print_msg("seed %u\n", seed);

	create_vm(nr_vcpus, entries);
	stress(seconds);

	ksft_print_msg("%lu pushes harvested, %lu resets, %lu ring-full exits\n",
		       total.harvested, total.resets, total.full);
	ksft_print_msg("%lu slot changes, %lu late writes, %lu writes by KVM, %lu signals\n",
		       total.slot_changes, total.mmio, total.kvm_writes,
		       total.signals);
	TEST_ASSERT(total.harvested, "No page was reported");
	ksft_test_result_pass("%lu times the copy equals the memory\n",
			      total.compared);
	ring_vm_free(rv);
	ksft_exit_pass();
}
