// SPDX-License-Identifier: GPL-2.0
/*
 * What dirty logging costs: by ring, by KVM_GET_DIRTY_LOG, and by
 * KVM_CLEAR_DIRTY_LOG
 *
 * vCPUs write to a list of pages, the log is collected, the pages are
 * write-protected again, and so on; before and after, logging is switched on
 * and off. Each step is measured on its own. Every collection must bring
 * exactly the pages that were written, each of them once: costs of a log that
 * is wrong are of no interest.
 *
 * Time is that of the TSC where there is one. On a machine that is emulated so
 * that its TSC counts instructions (QEMU: -icount shift=0), all figures are
 * instructions, and come out the same again and again. All vCPUs run in one
 * thread, one after the other, so that nothing depends on the scheduler; only
 * harvesting by several threads (-t), by its nature, takes real time. Switching
 * logging on and off has KVM wait for grace periods, perhaps on an idle CPU: what
 * counts is the CPU time of the thread, in ns.
 *
 * With -g, all of the slot's memory is huge pages, and it is the guest's side that is
 * measured: what its passes over all of this memory take once logging was switched
 * on, and off again.
 *
 * With -l, a thread of real-time priority looks at the clock all the time: for how
 * long does KVM keep the processor to itself? With one processor and a kernel that
 * is not preemptible, no lock that spins is held for longer than that.
 *
 * It needs nothing from KVM but dirty logging, and runs on any kernel: a way of
 * logging that KVM does not have is left out, and said so.
 */

#define _GNU_SOURCE /* for program_invocation_name, pthread_barrier_t */

#include <fcntl.h>
#include <linux/bits.h>
#include <linux/kernel.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>

#include "test_util.h"
#include "kvm_util.h"
#include "processor.h"
#include "dirty_ring.h"
#include "../kselftest.h"

#define SLOT		1
/* What all of a slot of 1 TiB is mapped from; all else is below. */
#define SLOT_GPA	(4UL << 30)
#define SLOT_GVA	BIT(39)
/* Where ucall() may write to, if it has no use for another way. */
#define UCALL_GPA	(SLOT_GPA - HUGE_SIZE)

#define MAX_PAGES	65536
#define MAX_VCPUS	64
#define MAX_ROUNDS	100

#define HUGE_SIZE	(2UL << 20)
#define GUEST_SIZE	(128UL << 20)

#ifndef KVM_DIRTY_RING_EXT_VCPU_RESET
#define KVM_DIRTY_RING_EXT_VCPU_RESET	BIT(0)
#endif

enum way {
	WAY_RING,
	WAY_GET,
	WAY_CLEAR,
	NR_WAYS,
};

static const char * const way_name[] = {
	[WAY_RING] = "ring",
	[WAY_GET] = "get",
	[WAY_CLEAR] = "clear",
};

/* What to measure, and how */
static struct options {
	enum way way;
	uint64_t slot_size;
	bool huge;
	bool random;
	/* Pages from one dirty page to the next, if not at random. */
	uint32_t stride;
	uint32_t pages;
	uint32_t entries;
	uint32_t vcpus;
	uint32_t rounds;
	uint32_t threads;
	/* Each with a process of its own; what is above is each one's part. */
	uint32_t vms;
	uint64_t seed;
	bool latency;
	/* The guest's side; whether log start is to split huge pages */
	bool guest;
	bool eager;
} opt = {
	.slot_size = 1UL << 30,
	.random = true,
	.stride = 1,
	.pages = 4096,
	.entries = 65536,
	.vcpus = 1,
	.rounds = 5,
	.vms = 1,
	.seed = 1,
};

/* Ticks. A round's are for all pages. */
struct round {
	uint64_t write;
	uint64_t collect;
	uint64_t protect;
	uint32_t full_exits;
};

static struct figures {
	/* Writes before there is a log: the first ones, and others. */
	uint64_t populate;
	uint64_t idle;
	uint64_t log_on;
	struct round first;
	struct round round[MAX_ROUNDS];
	uint64_t log_off;
} fig;

/*
 * Ticks of the guest's passes: reads of all pages before, writes to a page of each
 * huge page, reads and then writes of all pages, and reads once logging is off; and
 * how many pages were reported that it only read
 */
static struct {
	uint64_t idle;
	uint64_t first;
	uint64_t read;
	uint64_t write;
	uint64_t after;
	uint32_t not_written;
} guest;

/* Real time with several threads, in ns: of the log only, and with copies */
static uint64_t elapsed[2][MAX_ROUNDS];

/* A vCPU's part of the pages; shared with the guest. */
static struct {
	uint32_t first;
	uint32_t end;
} task[MAX_VCPUS];
static uint32_t list[MAX_PAGES];
static bool read_only;

static struct kvm_vm *vm;
static uint8_t *mem;
static uint64_t slot_pages;
static uint64_t *bitmap;
/* What this round's collections found, and must have found in the end */
static uint64_t *collected;
static uint32_t nr_collected;
static uint64_t *expected;
/* The next entry of each vCPU's ring to harvest. */
static uint32_t next_entry[MAX_VCPUS];

static uint64_t clock_ns(clockid_t clock)
{
	struct timespec ts;

	clock_gettime(clock, &ts);
	return timespec_to_ns(ts);
}

/* --- For how long nobody else gets the processor ------------------------------ */

#define PROBE_NS	20000

enum phase {
	PHASE_NONE,
	PHASE_LOG_ON,
	PHASE_PROTECT,
	PHASE_LOG_OFF,
	NR_PHASES,
};

/* The longest, in ns; nothing uses that of PHASE_NONE. */
static uint64_t stall[NR_PHASES];
static enum phase phase;

/* Sleep for a moment, and see how long that took. */
static void *probe(void *unused)
{
	const struct timespec nap = { .tv_nsec = PROBE_NS };
	uint64_t start, slept;
	enum phase now_in;

	while (true) {
		start = clock_ns(CLOCK_MONOTONIC);
		nanosleep(&nap, NULL);
		slept = clock_ns(CLOCK_MONOTONIC) - start;
		/* To leave the kernel is to let this thread run first. */
		now_in = READ_ONCE(phase);
		if (slept > stall[now_in])
			stall[now_in] = slept;
	}
	return NULL;
}

static void start_probe(void)
{
	struct sched_param param = { .sched_priority = 50 };
	pthread_attr_t attr;
	pthread_t thread;

	pthread_attr_init(&attr);
	pthread_attr_setinheritsched(&attr, PTHREAD_EXPLICIT_SCHED);
	pthread_attr_setschedpolicy(&attr, SCHED_FIFO);
	pthread_attr_setschedparam(&attr, &param);
	TEST_ASSERT(!pthread_create(&thread, &attr, probe, NULL),
		    "No thread of real-time priority");
}

/* --- What differs between architectures ----------------------------------- */

#ifdef __x86_64__

static uint64_t now(void)
{
	return rdtsc();
}

#define SLOT_MAX	BIT(40)
#define SLOT_MAX_NAME	"1T"

#define PTE_TABLE	0x63UL		/* present, writable, accessed, dirty */
#define PTE_BLOCK	(PTE_TABLE | 0x80UL)

#define EAGER	"/sys/module/kvm/parameters/eager_page_split"

static bool can_split_eagerly(void)
{
	return !access(EAGER, F_OK);
}

/* Have log start split huge pages, or not, where that can be chosen. */
static void set_eager(void)
{
	int fd = open(EAGER, O_WRONLY);

	if (fd < 0)
		return;
	TEST_ASSERT(write(fd, opt.eager ? "Y" : "N", 1) == 1, "%s: %s", EAGER,
		    strerror(errno));
	close(fd);
}

static uint64_t root_table(void)
{
	struct kvm_sregs sregs;

	vcpu_sregs_get(vm, 0, &sregs);
	return sregs.cr3;
}

#else

static uint64_t now(void)
{
	return clock_ns(CLOCK_MONOTONIC_RAW);
}

/* The library's VMs have 40 bits of guest physical address. */
#define SLOT_MAX	(BIT(40) - SLOT_GPA)
#define SLOT_MAX_NAME	"1020G"

#define PTE_TABLE	0x3UL
#define PTE_BLOCK	0x411UL		/* valid, normal memory, accessed */

#ifndef KVM_CAP_ARM_EAGER_SPLIT_CHUNK_SIZE
#define KVM_CAP_ARM_EAGER_SPLIT_CHUNK_SIZE	228
#define KVM_CAP_ARM_SUPPORTED_BLOCK_SIZES	229
#endif

static bool can_split_eagerly(void)
{
	return kvm_check_cap(KVM_CAP_ARM_SUPPORTED_BLOCK_SIZES) & HUGE_SIZE;
}

/* Have log start split huge pages; before there is a memslot. */
static void set_eager(void)
{
	struct kvm_enable_cap cap = {
		.cap = KVM_CAP_ARM_EAGER_SPLIT_CHUNK_SIZE,
		.args[0] = HUGE_SIZE,
	};

	if (opt.eager)
		vm_enable_cap(vm, &cap);
}

static uint64_t root_table(void)
{
	uint64_t ttbr;

	get_reg(vm, 0, ARM64_SYS_REG(TTBR0_EL1), &ttbr);
	return ttbr;
}

#endif

/* --- The VM ----------------------------------------------------------------- */

#define PTE_PRESENT	0x1UL
#define PTE_ADDR	0x0000fffffffff000UL

/*
 * The entry for @gva in the guest's page table at @table; make what is missing.
 */
static uint64_t *table_entry(uint64_t table, uint64_t gva, int shift)
{
	return (uint64_t *)addr_gpa2hva(vm, table) + ((gva >> shift) & 0x1ff);
}

static uint64_t next_table(uint64_t table, uint64_t gva, int shift)
{
	uint64_t *entry = table_entry(table, gva, shift);

	if (!(*entry & PTE_PRESENT))
		*entry = vm_phy_page_alloc(vm, KVM_UTIL_MIN_VADDR, 0) |
			 PTE_TABLE;
	return *entry & PTE_ADDR;
}

/* Pages for map_slot(), with some to spare. */
static uint64_t map_slot_pages(void)
{
	return opt.slot_size / (1UL << 30) + 16;
}

/* Map the slot by large pages: the page tables of 1 TiB of small ones are 2 GiB. */
static void map_slot(void)
{
	uint64_t i, table, root = root_table() & PTE_ADDR;

	for (i = 0; i < opt.slot_size; i += HUGE_SIZE) {
		table = next_table(root, SLOT_GVA + i, 39);
		table = next_table(table, SLOT_GVA + i, 30);
		*table_entry(table, SLOT_GVA + i, 21) =
			(SLOT_GPA + i) | PTE_BLOCK;
	}
}

static void guest_code(uint64_t vcpu, uint64_t page_size)
{
	uint32_t i, end;

	while (true) {
		i = READ_ONCE(task[vcpu].first);
		end = READ_ONCE(read_only) ? READ_ONCE(task[vcpu].end) : 0;
		for (; i < end; i++)
			READ_ONCE(*(uint64_t *)(SLOT_GVA + list[i] * page_size));
		for (; i < READ_ONCE(task[vcpu].end); i++)
			WRITE_ONCE(*(uint64_t *)(SLOT_GVA + list[i] * page_size),
				   i);

		GUEST_SYNC(0);
	}
}

/* A pseudo-random number, always of the same sequence (xorshift64*) */
static uint64_t next_random(uint64_t *state)
{
	*state ^= *state >> 12;
	*state ^= *state << 25;
	*state ^= *state >> 27;
	return *state * 0x2545f4914f6cdd1dUL;
}

static uint64_t bitmap_bytes(void)
{
	return (slot_pages + 63) / 64 * 8;
}

static int compare_u64(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

/* Leave room for more than there should be, to notice it. */
static uint32_t room_for_pages(void)
{
	return opt.pages * 2 + 1;
}

/* Choose the pages to write to, no page twice. */
static void choose_pages(void)
{
	uint64_t state = opt.seed * 2 + 1, page;
	uint32_t *guest_list, i;

	for (i = 0; i < opt.pages; ) {
		page = opt.random ? next_random(&state) % slot_pages :
				    (uint64_t)i * opt.stride;
		/* The bitmap is not in use as yet. */
		if (bitmap[page / 64] & (1UL << (page % 64)))
			continue;
		bitmap[page / 64] |= 1UL << (page % 64);
		expected[i] = page;
		list[i++] = page;
	}
	qsort(expected, opt.pages, sizeof(*expected), compare_u64);
	/* Clear the bitmap, and have all of its memory there from now on. */
	memset(bitmap, 0, bitmap_bytes());

	guest_list = addr_gva2hva(vm, (vm_vaddr_t)list);
	memcpy(guest_list, list, opt.pages * sizeof(*list));

	for (i = 0; i < opt.vcpus; i++) {
		task[i].first = (uint64_t)opt.pages * i / opt.vcpus;
		task[i].end = (uint64_t)opt.pages * (i + 1) / opt.vcpus;
	}
	sync_global_to_guest(vm, task);
}

/* Set the slot's flags. Return: what that cost. */
static uint64_t set_slot(uint32_t flags)
{
	struct kvm_userspace_memory_region region = {
		.slot = SLOT,
		.flags = flags,
		.guest_phys_addr = SLOT_GPA,
		.memory_size = opt.slot_size,
		.userspace_addr = (uintptr_t)mem,
	};
	uint64_t start = clock_ns(CLOCK_THREAD_CPUTIME_ID);
	int ret;

	ret = ioctl(vm_get_fd(vm), KVM_SET_USER_MEMORY_REGION, &region);
	TEST_ASSERT(!ret, "KVM_SET_USER_MEMORY_REGION failed: %s",
		    strerror(errno));
	return clock_ns(CLOCK_THREAD_CPUTIME_ID) - start;
}

/* Reserve address space for @size bytes, of which few are used. */
static void *map_sparse(uint64_t size)
{
	void *addr = mmap(NULL, size, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	TEST_ASSERT(addr != MAP_FAILED, "mmap of %lu bytes failed: %s", size,
		    strerror(errno));
	return addr;
}

static void create_vm(void)
{
	struct kvm_enable_cap manual = {
		.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
		.args[0] = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE |
			   (opt.guest ? KVM_DIRTY_LOG_INITIALLY_SET : 0),
	};
	uint64_t pages = DEFAULT_GUEST_PHY_PAGES + map_slot_pages() +
			 sizeof(list) / getpagesize() +
			 opt.vcpus * DEFAULT_STACK_PGS * 2;
	uint32_t i, n;

	vm = vm_create(VM_MODE_DEFAULT, 0, O_RDWR);
	if (opt.guest)
		set_eager();
	vm_userspace_mem_region_add(vm, VM_MEM_SRC_ANONYMOUS, 0, 0,
				    vm_adjust_num_guest_pages(VM_MODE_DEFAULT,
							      pages), 0);
	kvm_vm_elf_load(vm, program_invocation_name, 0, 0);
#ifdef __x86_64__
	vm_create_irqchip(vm);
#endif
	if (opt.way == WAY_RING)
		vm_enable_dirty_ring(vm, opt.entries *
					 sizeof(struct kvm_dirty_gfn));
	if (opt.way == WAY_CLEAR)
		vm_enable_cap(vm, &manual);

	for (i = 0; i < opt.vcpus; i++) {
		vm_vcpu_add_default(vm, i, guest_code);
#ifdef __x86_64__
		vcpu_set_cpuid(vm, i, kvm_get_supported_cpuid());
#endif
		vcpu_args_set(vm, i, 2, (uint64_t)i, (uint64_t)getpagesize());
	}
	/* Not where the library thinks that nothing is: it does not know the slot. */
	ucall_init(vm, (void *)UCALL_GPA);

	mem = map_sparse(opt.slot_size + HUGE_SIZE);
	mem = (void *)(((uintptr_t)mem + HUGE_SIZE - 1) & ~(HUGE_SIZE - 1));
	TEST_ASSERT(!madvise(mem, opt.slot_size, opt.huge ? MADV_HUGEPAGE :
							    MADV_NOHUGEPAGE),
		    "madvise failed: %s", strerror(errno));
	set_slot(0);
	map_slot();

	bitmap = map_sparse(bitmap_bytes());
	collected = calloc(room_for_pages(), sizeof(*collected));
	expected = calloc(opt.pages, sizeof(*expected));
	TEST_ASSERT(collected && expected, "Insufficient Memory");
	choose_pages();

	/* Touch everything first, so that this is not measured. */
	memset(collected, 0xff, room_for_pages() * sizeof(*collected));
	for (i = 0; opt.way == WAY_RING && i < opt.vcpus; i++)
		for (n = 0; n < opt.entries; n++)
			READ_ONCE(vcpu_dirty_ring(vm, i)[n].flags);
}

/* --- One round -------------------------------------------------------------- */

/* Harvest a vCPU's ring into @to, at most @max pages. Return: how many. */
static uint32_t harvest(uint32_t vcpu, uint64_t *to, uint32_t max)
{
	struct kvm_dirty_gfn *ring = vcpu_dirty_ring(vm, vcpu), *gfn;
	uint32_t n, first = next_entry[vcpu];

	for (n = 0; n < max; n++) {
		gfn = &ring[(first + n) & (opt.entries - 1)];
		if (!dirty_gfn_is_dirty(gfn))
			break;
		to[n] = gfn->offset;
		dirty_gfn_set_harvested(gfn);
	}
	next_entry[vcpu] = first + n;

	return n;
}

static uint32_t find_in_bitmap(uint64_t *to, uint32_t max)
{
	uint64_t i, bits, words = bitmap_bytes() / 8;
	uint32_t n = 0;

	for (i = 0; i < words; i++)
		for (bits = bitmap[i]; bits && n < max; bits &= bits - 1)
			to[n++] = i * 64 + __builtin_ctzl(bits);

	return n;
}

/*
 * Collect what is dirty, and write-protect it again. KVM_GET_DIRTY_LOG does
 * both; count it as the latter.
 */
static void collect_and_protect(struct round *r)
{
	uint32_t room = room_for_pages() - nr_collected, found = 0, i;
	uint64_t *to = collected + nr_collected;
	uint64_t start, middle, end;
	int reset;

	WRITE_ONCE(phase, PHASE_PROTECT);
	start = now();
	switch (opt.way) {
	case WAY_RING:
		for (i = 0; i < opt.vcpus; i++)
			found += harvest(i, to + found, room - found);
		middle = now();
		reset = vm_reset_dirty_rings(vm);
		end = now();
		TEST_ASSERT(reset == found,
			    "Harvested %u entries but %d got reset", found,
			    reset);
		break;
	case WAY_GET:
		kvm_vm_get_dirty_log(vm, SLOT, bitmap);
		middle = now();
		found = find_in_bitmap(to, room);
		end = now();
		break;
	default:
		kvm_vm_get_dirty_log(vm, SLOT, bitmap);
		found = find_in_bitmap(to, room);
		middle = now();
		kvm_vm_clear_dirty_log(vm, SLOT, bitmap, 0, slot_pages);
		end = now();
	}
	WRITE_ONCE(phase, PHASE_NONE);

	nr_collected += found;
	r->collect += opt.way == WAY_GET ? end - middle : middle - start;
	r->protect += opt.way == WAY_GET ? middle - start : end - middle;
}

/* Have the vCPUs write to their pages. */
static void write_pages(struct round *r)
{
	struct kvm_run *run;
	uint64_t start;
	uint32_t i;

	memset(r, 0, sizeof(*r));
	nr_collected = 0;

	for (i = 0; i < opt.vcpus; i++) {
		run = vcpu_state(vm, i);
		while (true) {
			start = now();
			vcpu_run(vm, i);
			r->write += now() - start;
			if (run->exit_reason != KVM_EXIT_DIRTY_RING_FULL)
				break;
			r->full_exits++;
			collect_and_protect(r);
		}
		TEST_ASSERT(get_ucall(vm, i, NULL) == UCALL_SYNC,
			    "Unexpected exit: %s",
			    exit_reason_str(run->exit_reason));
	}
}

/*
 * Expect that exactly the pages that were written are collected. A write that
 * finds the ring full may be logged twice: before KVM_RUN returns and, since
 * its page is then protected again, when it is done at last.
 */
static void check_collected(uint32_t full_exits)
{
	uint32_t i, n = 0;

	qsort(collected, nr_collected, sizeof(*collected), compare_u64);
	for (i = 0; i < nr_collected; i++)
		if (!n || collected[i] != collected[n - 1])
			collected[n++] = collected[i];
	TEST_ASSERT(nr_collected - n <= full_exits,
		    "%u pages were collected twice", nr_collected - n);
	TEST_ASSERT(n == opt.pages, "%u pages were written, %u collected",
		    opt.pages, n);
	TEST_ASSERT(!memcmp(collected, expected, n * sizeof(*collected)),
		    "Other pages were collected than written");
}

static void measure_round(struct round *r, uint64_t idle)
{
	write_pages(r);
	r->write -= idle;
	collect_and_protect(r);
	check_collected(r->full_exits);
}

static void measure(void)
{
	struct round idle;
	uint32_t i;

	/* Map all pages, then measure the vCPUs' loop without faults. */
	write_pages(&idle);
	fig.populate = idle.write;
	write_pages(&idle);
	fig.idle = idle.write;

	if (opt.latency)
		start_probe();
	WRITE_ONCE(phase, PHASE_LOG_ON);
	fig.log_on = set_slot(KVM_MEM_LOG_DIRTY_PAGES);
	WRITE_ONCE(phase, PHASE_NONE);
	measure_round(&fig.first, idle.write);
	for (i = 0; i < opt.rounds; i++)
		measure_round(&fig.round[i], idle.write);
	WRITE_ONCE(phase, PHASE_LOG_OFF);
	fig.log_off = set_slot(0);
	WRITE_ONCE(phase, PHASE_NONE);
}

/* --- The guest's side ---------------------------------------------------------- */

/* Have the vCPU read or write list[first] to list[end - 1]. Return: the ticks. */
static uint64_t pass(bool reads, uint32_t first, uint32_t end)
{
	struct round r;

	read_only = reads;
	sync_global_to_guest(vm, read_only);
	task[0].first = first;
	task[0].end = end;
	sync_global_to_guest(vm, task);
	write_pages(&r);
	TEST_ASSERT(!r.full_exits, "The ring got full");
	return r.write;
}

/* The guest's list: a page of each huge page, then all pages of the slot, in order. */
static void measure_guest(void)
{
	uint32_t nr_huge = opt.slot_size / HUGE_SIZE, all = opt.pages, i;
	uint32_t *guest_list = addr_gva2hva(vm, (vm_vaddr_t)list);
	struct round r;

	for (i = 0; i < nr_huge; i++)
		guest_list[i] = i * (HUGE_SIZE / getpagesize()) + 3;
	for (i = 0; i < all; i++)
		guest_list[nr_huge + i] = i;

	fig.populate = pass(false, nr_huge, nr_huge + all);
	guest.idle = pass(true, nr_huge, nr_huge + all);

	if (opt.latency)
		start_probe();
	WRITE_ONCE(phase, PHASE_LOG_ON);
	fig.log_on = set_slot(KVM_MEM_LOG_DIRTY_PAGES);
	WRITE_ONCE(phase, PHASE_NONE);
	/* With all bits set, there is nothing to protect or split before this. */
	nr_collected = 0;
	memset(&r, 0, sizeof(r));
	if (opt.way == WAY_CLEAR)
		collect_and_protect(&r);
	fig.first.protect = r.protect;

	guest.first = pass(false, 0, nr_huge);
	guest.read = pass(true, nr_huge, nr_huge + all);
	nr_collected = 0;
	collect_and_protect(&r);
	TEST_ASSERT(nr_collected >= nr_huge, "Of %u pages written %u were found",
		    nr_huge, nr_collected);
	guest.not_written = nr_collected - nr_huge;
	guest.write = pass(false, nr_huge, nr_huge + all);
	collect_and_protect(&r);
	check_collected(0);

	WRITE_ONCE(phase, PHASE_LOG_OFF);
	fig.log_off = set_slot(0);
	WRITE_ONCE(phase, PHASE_NONE);
	guest.after = pass(true, nr_huge, nr_huge + all);
}

/* --- Several threads --------------------------------------------------------- */

/* Of the threads of all VMs */
static struct {
	pthread_barrier_t barrier;
	uint64_t start[MAX_VCPUS];
	uint64_t end[MAX_VCPUS];
} *shared;
/* This VM's first thread among them */
static uint32_t first_thread;
static uint32_t thread_reset[MAX_VCPUS];
static bool vcpu_reset;

static void copy_pages(const uint64_t *pages, uint32_t n, uint8_t *copy)
{
	size_t size = getpagesize();
	uint32_t i;

	for (i = 0; i < n; i++) {
		memcpy(copy, mem + pages[i] * size, size);
		/* Keep the compiler from dropping the copy. */
		asm volatile("" : : "r" (copy) : "memory");
	}
}

/*
 * Harvest and reset the rings of some vCPUs; each has a part of collected[]. In
 * the second half of the rounds also copy the pages, as a migration does.
 */
static void *harvester(void *data)
{
	uint32_t thread = (uintptr_t)data, round, i, n;
	uint8_t *copy = malloc(getpagesize());
	int ret;

	TEST_ASSERT(copy, "Insufficient Memory");
	for (round = 0; round < 2 * opt.rounds; round++) {
		pthread_barrier_wait(&shared->barrier);
		shared->start[first_thread + thread] = clock_ns(CLOCK_MONOTONIC);
		n = 0;
		for (i = thread; i < opt.vcpus; i += opt.threads) {
			harvest(i, collected + task[i].first,
				task[i].end - task[i].first);
			if (!vcpu_reset)
				continue;
			ret = _vcpu_ioctl(vm, i, KVM_RESET_DIRTY_RINGS, NULL);
			TEST_ASSERT(ret >= 0, "KVM_RESET_DIRTY_RINGS failed");
			n += ret;
		}
		if (!vcpu_reset)
			n = vm_reset_dirty_rings(vm);
		if (round >= opt.rounds)
			for (i = thread; i < opt.vcpus; i += opt.threads)
				copy_pages(collected + task[i].first,
					   task[i].end - task[i].first, copy);
		shared->end[first_thread + thread] = clock_ns(CLOCK_MONOTONIC);
		thread_reset[thread] = n;
		pthread_barrier_wait(&shared->barrier);
	}
	free(copy);
	return NULL;
}

/*
 * In each round, have the vCPUs write and stop, and threads share the rings.
 * Take the time from when the first of them begins until the last, of all VMs, has
 * reset its own, or also copied.
 */
static void measure_threads(void)
{
	pthread_t thread[MAX_VCPUS];
	uint64_t start, end;
	struct round written;
	uint32_t round, i, reset;

	vcpu_reset = kvm_check_cap(KVM_CAP_DIRTY_RING_EXT) &
		     KVM_DIRTY_RING_EXT_VCPU_RESET;

	write_pages(&written);
	fig.log_on = set_slot(KVM_MEM_LOG_DIRTY_PAGES);
	measure_round(&fig.first, 0);

	for (i = 0; i < opt.threads; i++)
		TEST_ASSERT(!pthread_create(&thread[i], NULL, harvester,
					    (void *)(uintptr_t)i),
			    "pthread_create failed");

	for (round = 0; round < 2 * opt.rounds; round++) {
		write_pages(&written);
		TEST_ASSERT(!written.full_exits,
			    "%u pages do not fit into the rings", opt.pages);
		pthread_barrier_wait(&shared->barrier);
		pthread_barrier_wait(&shared->barrier);
		start = UINT64_MAX;
		end = 0;
		reset = 0;
		for (i = 0; i < opt.threads * opt.vms; i++) {
			start = min(start, shared->start[i]);
			end = max(end, shared->end[i]);
		}
		for (i = 0; i < opt.threads; i++)
			reset += thread_reset[i];
		elapsed[round / opt.rounds][round % opt.rounds] = end - start;
		nr_collected = reset;
		check_collected(0);
	}

	for (i = 0; i < opt.threads; i++)
		pthread_join(thread[i], NULL);
	fig.log_off = set_slot(0);
}

/* A process that failed is waited for in vain. */
static void other_vm_gone(int sig)
{
	int status;

	while (waitpid(-1, &status, WNOHANG) > 0)
		if (status)
			_exit(KSFT_FAIL);
}

/* Have the same done for other VMs, in processes of their own. */
static void start_vms(void)
{
	pthread_barrierattr_t attr;
	uint32_t i;

	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE,
		      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	TEST_ASSERT(shared != MAP_FAILED, "mmap failed: %s", strerror(errno));
	pthread_barrierattr_init(&attr);
	pthread_barrierattr_setpshared(&attr, PTHREAD_PROCESS_SHARED);
	pthread_barrier_init(&shared->barrier, &attr,
			     opt.vms * (opt.threads + 1));

	signal(SIGCHLD, other_vm_gone);
	for (i = 1; i < opt.vms; i++) {
		pid_t pid = fork();

		TEST_ASSERT(pid >= 0, "fork failed");
		if (!pid) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			first_thread = i * opt.threads;
			return;
		}
	}
}

/* --- What comes of it ---------------------------------------------------------- */

static const char * const csv_fields[] = {
	"kernel", "way", "slot", "backing", "pattern", "pages", "entries",
	"vcpus", "threads", "vms", "populate", "idle", "first_write", "write",
	"collect", "protect", "log_on", "log_off", "full_exits", "elapsed_ns",
	"elapsed_copy_ns", "stall_log_on", "stall_protect", "stall_log_off",
	"guest", "guest_idle", "guest_first", "guest_read", "guest_write",
	"guest_after", "not_written",
};

static char kernel[65];

/* The median of one field of all rounds, per page. */
#define median(field) ({					\
	uint64_t _values[MAX_ROUNDS];				\
	uint32_t _i;						\
								\
	for (_i = 0; _i < opt.rounds; _i++)			\
		_values[_i] = field;				\
	qsort(_values, opt.rounds, sizeof(*_values), compare_u64); \
	_values[opt.rounds / 2];				\
})

static double per_page(uint64_t ticks)
{
	return (double)(int64_t)ticks / (opt.pages * opt.vms);
}

static const char *size_name(uint64_t size)
{
	static char name[32];
	const char *unit = "BKMGT";

	while (size && !(size & 1023) && unit[1]) {
		size >>= 10;
		unit++;
	}
	snprintf(name, sizeof(name), "%lu%c", size, *unit);
	return name;
}

static const char *pattern_name(void)
{
	static char name[32];

	if (opt.random)
		return "random";
	if (opt.stride == 1)
		return "sequential";
	snprintf(name, sizeof(name), "every-%u", opt.stride);
	return name;
}

static void print_case_csv(void)
{
	printf("%s,%s,%lu,%s,%s,%u,%u,%u,%u,%u,", kernel, way_name[opt.way],
	       opt.slot_size, opt.huge ? "2M" : "4K", pattern_name(),
	       opt.pages * opt.vms, opt.way == WAY_RING ? opt.entries : 0,
	       opt.vcpus * opt.vms, opt.threads * opt.vms, opt.vms);
}

static void print_figures(bool csv)
{
	double write = per_page(median(fig.round[_i].write));
	double collect = per_page(median(fig.round[_i].collect));
	double protect = per_page(median(fig.round[_i].protect));

	if (csv) {
		print_case_csv();
		if (opt.threads)
			printf(",,,,,,,,,%lu,%lu,,,", median(elapsed[0][_i]),
			       median(elapsed[1][_i]));
		else
			printf("%.1f,%.1f,%.1f,%.1f,%.1f,%.1f,%lu,%lu,%u,,,",
			       per_page(fig.populate), per_page(fig.idle),
			       per_page(fig.first.write), write, collect,
			       protect, fig.log_on, fig.log_off,
			       fig.round[0].full_exits);
		if (opt.latency)
			printf("%lu,%lu,%lu", stall[PHASE_LOG_ON],
			       stall[PHASE_PROTECT], stall[PHASE_LOG_OFF]);
		else if (!opt.threads)
			printf(",,");
		printf(",,,,,,,\n");
	} else if (opt.threads) {
		printf("%-5s  %u threads, %u VMs, %s reset: %.0f ns a page, with copies %.0f\n",
		       way_name[opt.way], opt.threads * opt.vms, opt.vms,
		       vcpu_reset ? "each ring's own" : "the VM's",
		       per_page(median(elapsed[0][_i])),
		       per_page(median(elapsed[1][_i])));
	} else {
		printf("%-5s  %11.1f %9.1f %9.1f %9.1f  %13lu %13lu  %u\n",
		       way_name[opt.way], per_page(fig.first.write), write,
		       collect, protect, fig.log_on, fig.log_off,
		       fig.round[0].full_exits);
		if (opt.latency)
			printf("       stalls of %lu us, %lu us, %lu us: on, protect, off\n",
			       stall[PHASE_LOG_ON] / 1000,
			       stall[PHASE_PROTECT] / 1000,
			       stall[PHASE_LOG_OFF] / 1000);
	}
}

static void print_guest_figures(bool csv)
{
	uint32_t nr_huge = opt.slot_size / HUGE_SIZE;
	double first = (double)guest.first / nr_huge;
	double protect = per_page(fig.first.protect);

	if (csv) {
		print_case_csv();
		printf("%.1f,,,,,%.1f,%lu,%lu,,,,", per_page(fig.populate), protect,
		       fig.log_on, fig.log_off);
		if (opt.latency)
			printf("%lu,%lu,%lu,", stall[PHASE_LOG_ON],
			       stall[PHASE_PROTECT], stall[PHASE_LOG_OFF]);
		else
			printf(",,,");
		printf("%s,%.1f,%.1f,%.1f,%.1f,%.1f,%u\n",
		       opt.eager ? "eager" : "fault", per_page(guest.idle),
		       first, per_page(guest.read), per_page(guest.write),
		       per_page(guest.after), guest.not_written);
		return;
	}

	printf("%-5s  logging on %lu, off %lu; first clear, a page %.1f\n"
	       "       guest: a first write %.1f, then a page: read %.1f, write %.1f\n"
	       "       guest: read a page before %.1f, once logging is off %.1f\n"
	       "       %u pages reported that were only read\n",
	       way_name[opt.way], fig.log_on, fig.log_off, protect, first,
	       per_page(guest.read), per_page(guest.write), per_page(guest.idle),
	       per_page(guest.after), guest.not_written);
	if (opt.latency)
		printf("       stalls of %lu us, %lu us, %lu us: on, protect, off\n",
		       stall[PHASE_LOG_ON] / 1000, stall[PHASE_PROTECT] / 1000,
		       stall[PHASE_LOG_OFF] / 1000);
}

/* Why a way cannot be measured here, or NULL */
static const char *not_supported(void)
{
	if (opt.way == WAY_RING && !dirty_ring_max_size())
		return "KVM has no dirty ring";
	if (opt.way == WAY_CLEAR &&
	    !(kvm_check_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) &
	      KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE))
		return "KVM has no KVM_CLEAR_DIRTY_LOG";
	if (opt.guest && opt.eager && !can_split_eagerly())
		return "log start does not split huge pages";
	return NULL;
}

/* Measure one way, in a process of its own: whatever is left goes with it. */
static void run_way(bool csv)
{
	const char *why = not_supported();
	int status;
	pid_t pid;

	if (why && csv) {
		print_case_csv();
		printf(",,,,,,,,,,,,,,,,,,,,\n");
	} else if (why) {
		printf("%-5s  %s\n", way_name[opt.way], why);
	}
	if (why)
		return;

	fflush(NULL);
	pid = fork();
	TEST_ASSERT(pid >= 0, "fork failed");
	if (!pid) {
		if (opt.threads)
			start_vms();
		create_vm();
		if (opt.guest) {
			measure_guest();
			print_guest_figures(csv);
			exit(0);
		}
		if (opt.threads)
			measure_threads();
		else
			measure();
		if (!first_thread)
			print_figures(csv);
		while (wait(NULL) > 0)
			;
		exit(0);
	}
	TEST_ASSERT(waitpid(pid, &status, 0) == pid && !status,
		    "Measuring %s failed", way_name[opt.way]);
}

static void help(const char *name)
{
	printf("usage: %s [-h] [-c] [-l] [-M way]... [-b size] [-s backing] [-p pattern]\n"
	       "       [-n pages] [-r entries] [-v vcpus] [-i rounds] [-S seed] [-t threads [-m]]\n"
	       "       %s [-h] [-c] [-l] [-M way]... [-b size] -g eager|fault\n"
	       " -c: print CSV; with it twice, only its header\n"
	       " -M: ring, get (KVM_GET_DIRTY_LOG), clear (KVM_CLEAR_DIRTY_LOG), or best:\n"
	       "     ring, or else get; default: all there are\n"
	       " -b: bytes of the memslot, sparsely backed, such as 16G (default 1G)\n"
	       " -s: pages it is backed with, 4K or 2M (default 4K)\n"
	       " -p: random, sequential, or a number: every so many pages (default random)\n"
	       " -n: dirty pages in each round, up to %u (default %u)\n"
	       " -r: entries of each ring (default %u)\n"
	       " -v: vCPUs that share the pages, up to %u (default 1)\n"
	       " -i: rounds, of which the median counts, up to %u (default %u)\n"
	       " -S: seed of the random pages (default %lu)\n"
	       " -l: also say for how long KVM keeps the processor to itself; this costs time\n"
	       " -t: have threads harvest and reset all vCPUs' rings, without and with a copy\n"
	       "     of each page, and take real time\n"
	       " -m: give each of the threads a VM of its own, with its part of pages and vCPUs\n"
	       " -g: measure the guest's passes over huge pages (default 128M), which log start\n"
	       "     splits, or the first write to each; with clear, all bits are set initially\n",
	       name, name, MAX_PAGES, opt.pages, opt.entries, MAX_VCPUS, MAX_ROUNDS,
	       opt.rounds, opt.seed);
}

/* A number from @min to @max */
static uint64_t in_range(const char *arg, char option, uint64_t min, uint64_t max)
{
	char *end;
	uint64_t value;

	errno = 0;
	value = strtoull(arg, &end, 0);
	if (errno || *end || end == arg || *arg == '-' || value < min ||
	    value > max) {
		fprintf(stderr, "-%c %s is not from %lu to %lu\n", option,
			arg, min, max);
		exit(KSFT_FAIL);
	}
	return value;
}

static void refuse(const char *what)
{
	fprintf(stderr, "%s; see -h\n", what);
	exit(KSFT_FAIL);
}

int main(int argc, char **argv)
{
	bool ways[NR_WAYS] = {}, any = false, sized = false, other = false;
	bool many = false;
	struct utsname uts;
	int o, csv = 0;

	while ((o = getopt(argc, argv, "hclM:b:s:p:n:r:v:i:S:t:mg:")) != -1) {
		other |= !!strchr("spnrviStm", o);
		switch (o) {
		case 'c':
			csv++;
			break;
		case 'l':
			opt.latency = true;
			break;
		case 'M':
			any = true;
			if (!strcmp(optarg, "best")) {
				ways[dirty_ring_max_size() ? WAY_RING :
							     WAY_GET] = true;
				break;
			}
			for (o = 0; o < NR_WAYS; o++)
				if (!strcmp(optarg, way_name[o]))
					break;
			if (o == NR_WAYS)
				refuse("-M: ring, get, clear or best");
			ways[o] = true;
			break;
		case 'b':
			opt.slot_size = parse_size(optarg);
			sized = true;
			break;
		case 's':
			opt.huge = !strcmp(optarg, "2M");
			if (!opt.huge && strcmp(optarg, "4K"))
				refuse("-s: 4K or 2M");
			break;
		case 'p':
			opt.random = !strcmp(optarg, "random");
			if (!opt.random && !strcmp(optarg, "sequential"))
				opt.stride = 1;
			else if (!opt.random)
				opt.stride = in_range(optarg, o, 1, 1 << 20);
			break;
		case 'n':
			opt.pages = in_range(optarg, o, 1, MAX_PAGES);
			break;
		case 'r':
			opt.entries = in_range(optarg, o, 1, 1 << 20);
			break;
		case 'v':
			opt.vcpus = in_range(optarg, o, 1, MAX_VCPUS);
			break;
		case 'i':
			opt.rounds = in_range(optarg, o, 1, MAX_ROUNDS);
			break;
		case 'S':
			opt.seed = in_range(optarg, o, 0, UINT32_MAX);
			break;
		case 't':
			opt.threads = in_range(optarg, o, 1, MAX_VCPUS);
			break;
		case 'm':
			many = true;
			break;
		case 'g':
			opt.guest = true;
			opt.eager = !strcmp(optarg, "eager");
			if (!opt.eager && strcmp(optarg, "fault"))
				refuse("-g: eager or fault");
			break;
		default:
			help(argv[0]);
			exit(o == 'h' ? 0 : KSFT_FAIL);
		}
	}
	if (optind < argc)
		refuse("Unknown argument");

	if (opt.guest) {
		if (other)
			refuse("-g: with no others than -c, -l, -M and -b");
		if (!sized)
			opt.slot_size = GUEST_SIZE;
		opt.huge = true;
		opt.random = false;
		opt.stride = 1;
		opt.pages = opt.slot_size / getpagesize();
	}

	slot_pages = opt.slot_size / getpagesize();
	if (opt.slot_size % HUGE_SIZE || !opt.slot_size ||
	    opt.slot_size > SLOT_MAX)
		refuse("-b: whole 2 MiB, up to " SLOT_MAX_NAME);
	if (opt.random ? opt.pages > slot_pages / 2 :
			 (uint64_t)opt.pages * opt.stride > slot_pages)
		refuse("-n: too many pages for the slot");
	if (opt.guest && opt.pages + opt.slot_size / HUGE_SIZE > MAX_PAGES)
		refuse("-b: too much for -g");
	if (opt.pages < opt.vcpus)
		refuse("-n: a page for each vCPU at least");
	if (opt.threads && opt.latency)
		refuse("-t and -l exclude each other");
	if (opt.threads && (opt.threads > opt.vcpus || ways[WAY_GET] ||
			    ways[WAY_CLEAR]))
		refuse("-t: at most a thread for each vCPU, and only with -M ring");
	if (many && (!opt.threads || opt.vcpus % opt.threads ||
		     opt.pages % opt.threads))
		refuse("-m: with -t, and as many vCPUs and pages for each thread");
	if (many) {
		opt.vms = opt.threads;
		opt.pages /= opt.vms;
		opt.vcpus /= opt.vms;
		opt.threads = 1;
	}

	TEST_ASSERT(!uname(&uts), "uname failed");
	snprintf(kernel, sizeof(kernel), "%s", uts.release);
	for (o = 0; o < NR_WAYS; o++)
		ways[o] |= !any && (!opt.threads || o == WAY_RING);

	if (csv > 1) {
		for (o = 0; o < ARRAY_SIZE(csv_fields); o++)
			printf("%s%s", o ? "," : "", csv_fields[o]);
		printf("\n");
		return 0;
	}
	if (!csv) {
		printf("%s: %u pages, %s, in %s of %s pages; %u vCPUs\n",
		       kernel, opt.pages * opt.vms, pattern_name(),
		       size_name(opt.slot_size), opt.huge ? "2M" : "4K",
		       opt.vcpus * opt.vms);
		if (!opt.threads && !opt.guest)
			printf("%-5s  %11s %9s %9s %9s  %13s %13s  %s\n", "way",
			       "first write", "write", "collect", "protect",
			       "logging: on", "off", "ring-full");
	}
	for (o = 0; o < NR_WAYS; o++) {
		opt.way = o;
		if (ways[o])
			run_way(csv);
	}
	return 0;
}
