// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test that KVM's dirty rings come and go with what they belong to
 *
 * Show, one case each, that
 *  - vCPUs can be added while rings are harvested and reset,
 *  - what is in the overflow is in the ring of a vCPU that is created,
 *  - file descriptors can be closed, and rings unmapped, in any order, and
 *    nothing is left behind, with empty rings and with full ones, also if a
 *    child still has the mappings,
 *  - a process that was forked can read the rings, but not reset them,
 *  - a VMM can die at any time, and its file descriptors be closed in any order,
 *    with all rings full, pages in the overflow, and memslots that are tracked,
 *  - what a vCPU wrote to a memslot until it was deleted, or moved, is in a
 *    ring when that returns,
 *  - entries of a memslot that is no more do no harm to the one that has got
 *    its id.
 */

#define _GNU_SOURCE /* for program_invocation_name */

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>

#include "test_util.h"
#include "kvm_util.h"
#include "lib/kvm_util_internal.h"
#include "dirty_ring_vm.h"
#include "processor.h"
#include "test_cases.h"

/* The kinds of memory that rings, and the rest of a VM, are made of, in KiB */
static long vm_memory(void)
{
	FILE *file = fopen("/proc/meminfo", "r");
	long kib, sum = 0;
	char line[128];
	int found = 0;

	TEST_ASSERT(file, "No /proc/meminfo");
	while (fgets(line, sizeof(line), file)) {
		if (sscanf(line, "VmallocUsed: %ld kB", &kib) == 1 ||
		    sscanf(line, "Unevictable: %ld kB", &kib) == 1) {
			sum += kib;
			found++;
		}
	}
	fclose(file);
	TEST_ASSERT(found == 2, "No VmallocUsed or Unevictable in /proc/meminfo");
	return sum;
}

/* Seconds to wait for what RCU, or the end of a child, frees */
#define PATIENCE	20

static void expect_memory_below(long limit)
{
	uint64_t end = now_s() + PATIENCE;

	while (vm_memory() >= limit) {
		TEST_ASSERT(now_s() < end, "%ld KiB of memory, not less than %ld",
			    vm_memory(), limit);
		usleep(100000);
	}
}

static void wait_for_no_vm(pid_t pid)
{
	uint64_t end = now_s() + PATIENCE;

	while (vms_of(pid)) {
		TEST_ASSERT(now_s() < end, "A VM is left behind");
		usleep(1000);
	}
}

/*
 * A thread that does nothing but reset
 */

static struct ring_vm *reset_rv;
static bool reset_quit;
static uint64_t reset_count;

static void *reset_fn(void *unused)
{
	while (!READ_ONCE(reset_quit))
		reset_count += vm_reset_dirty_rings(reset_rv->vm);
	return NULL;
}

#define PLUG_PAGES	100

static void hot_plug(void)
{
	struct ring_vm *rv = ring_vm_create(ring_vm_min_entries(), 1,
					    PLUG_PAGES * RING_VM_MAX_VCPUS,
					    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	uint64_t harvested = 0, i;
	pthread_t thread;
	uint32_t vcpu;

	reset_rv = rv;
	pthread_create(&thread, NULL, reset_fn, NULL);
	for (vcpu = 0; vcpu < RING_VM_MAX_VCPUS; vcpu++) {
		if (vcpu)
			ring_vm_add_vcpu(rv);
		/* Have the older vCPUs write again, and the new one. */
		for (i = 0; i <= vcpu; i++)
			ring_vm_write(rv, i, i * PLUG_PAGES, PLUG_PAGES);
		for (i = 0; i <= vcpu; i++)
			harvested += ring_vm_harvest(rv, i,
						     DIRTY_RING_HARVEST_ALL);
		while (READ_ONCE(reset_count) != harvested)
			;
		for (i = 0; i < rv->pages; i++)
			TEST_ASSERT(!!rv->seen[i] == (i / PLUG_PAGES <= vcpu),
				    "%u vCPUs: page %lu was reported %u times",
				    vcpu + 1, i, rv->seen[i]);
		ring_vm_forget(rv);
	}
	WRITE_ONCE(reset_quit, true);
	pthread_join(thread, NULL);
	EXPECT(reset_count, harvested);
	ring_vm_free(rv);
}

#ifdef __x86_64__

#define OVERFLOW	40

/* A new ring takes from the overflow at once, without a reset. */
static void plug_overflow(void)
{
	struct ring_vm *rv = ring_vm_create(ring_vm_min_entries(), 1, 4096,
					    KVM_MEM_LOG_DIRTY_PAGES, NULL);

	ring_vm_write_by_ioctl(rv, 0, 100, rv->entries + OVERFLOW);
	ring_vm_add_vcpu(rv);
	EXPECT(ring_vm_harvest(rv, 1, DIRTY_RING_HARVEST_ALL), OVERFLOW);
	ring_vm_expect(rv, 100 + rv->entries, OVERFLOW);

	EXPECT(ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL), rv->entries);
	ring_vm_expect(rv, 100, rv->entries);
	EXPECT(vm_reset_dirty_rings(rv->vm), rv->entries + OVERFLOW);
	EXPECT(ring_vm_collect(rv), 0);
	ring_vm_free(rv);
}

#endif

/*
 * What holds a ring: the VM's file descriptor, the vCPU's, and the mapping
 */

enum { HOLD_VM, HOLD_VCPU, HOLD_MAP, NR_HOLDS };

static void let_go(const int *order)
{
	struct kvm_enable_cap cap = { .cap = dirty_ring_cap() };
	size_t size = dirty_ring_max_size();
	int kvm, vm, vcpu, i;
	uint8_t *ring;

	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	TEST_ASSERT(kvm >= 0 && vm >= 0, "No VM");
	close(kvm);
	cap.args[0] = size;
	EXPECT(ioctl(vm, KVM_ENABLE_CAP, &cap), 0);
	vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	TEST_ASSERT(vcpu >= 0, "No vCPU");
	ring = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu,
		    KVM_DIRTY_LOG_PAGE_OFFSET * getpagesize());
	TEST_ASSERT(ring != MAP_FAILED, "mmap failed");
	ring[0] = 1;

	for (i = 0; i < NR_HOLDS; i++) {
		switch (order[i]) {
		case HOLD_VM:
			EXPECT(close(vm), 0);
			break;
		case HOLD_VCPU:
			EXPECT(close(vcpu), 0);
			break;
		case HOLD_MAP:
			EXPECT(munmap(ring, size), 0);
			ring = NULL;
			break;
		}
		/* While it is mapped it is there, touched before or not. */
		if (ring) {
			EXPECT(ring[0], i + 1);
			ring[0]++;
			EXPECT(ring[(i + 1) * getpagesize()], 0);
		}
	}
	wait_for_no_vm(getpid());
}

static void any_order(void)
{
	static const int orders[][NR_HOLDS] = {
		{ HOLD_VM, HOLD_VCPU, HOLD_MAP },
		{ HOLD_VM, HOLD_MAP, HOLD_VCPU },
		{ HOLD_VCPU, HOLD_VM, HOLD_MAP },
		{ HOLD_VCPU, HOLD_MAP, HOLD_VM },
		{ HOLD_MAP, HOLD_VM, HOLD_VCPU },
		{ HOLD_MAP, HOLD_VCPU, HOLD_VM },
	};
	long before;
	int i;

	let_go(orders[0]);
	before = vm_memory();
	for (i = 0; i < 16 * ARRAY_SIZE(orders); i++)
		let_go(orders[i % ARRAY_SIZE(orders)]);
	/* A ring has 1024 KiB: one in six left behind would show. */
	expect_memory_below(before + 16 * 1024);
}

/*
 * The same with the rings of both vCPUs full and, where ioctls can have KVM
 * write that much, pages in the overflow. Memslots are not deleted.
 */

enum { FULL_VM, FULL_VCPU_0, FULL_VCPU_1, FULL_RING_0, FULL_RING_1, NR_FULL };

#define FULL_ORDERS	120	/* NR_FULL! */

/*
 * Try all orders; only some where the host's pages are large, and take long to
 * fill a ring with.
 */
static int order_step(void)
{
	return getpagesize() == 4096 ? 1 : 17;
}

/* Pages that go to the overflow */
#define FULL_OVERFLOW	(512 + 64)

/* Fork a child that keeps the rings, and nothing else, until it is let go. */
static pid_t keep_rings(struct ring_vm *rv, struct kvm_dirty_gfn **rings,
			int *go)
{
	int fds[2], i;
	pid_t pid;
	char c;

	EXPECT(pipe(fds), 0);
	*go = fds[1];
	fflush(NULL);
	pid = fork();
	if (pid) {
		close(fds[0]);
		return pid;
	}

	close(fds[1]);
	close(vm_get_fd(rv->vm));
	for (i = 0; i < 2; i++)
		close(vcpu_find(rv->vm, i)->fd);
	if (read(fds[0], &c, 1) != 1)
		_exit(1);
	/* All others have let go. */
	for (i = 0; i < 2; i++)
		if (rings[i][0].flags != KVM_DIRTY_GFN_F_DIRTY ||
		    rings[i][rv->limit - 1].flags != KVM_DIRTY_GFN_F_DIRTY)
			_exit(2);
	_exit(0);
}

static void let_full_go(int order, bool memory_first, bool with_child)
{
	uint32_t pages = 2 * ring_vm_min_entries() + FULL_OVERFLOW;
	struct ring_vm *rv = ring_vm_create(ring_vm_min_entries(), 2, pages,
					    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	size_t ring_size = rv->entries * sizeof(struct kvm_dirty_gfn);
	struct userspace_mem_region *region;
	struct kvm_dirty_gfn *rings[2];
	int parts[NR_FULL], fds[NR_FULL];
	int i, n, go, status;
	pid_t child = 0;

	for (i = 0; i < 2; i++) {
		rings[i] = vcpu_dirty_ring(rv->vm, i);
		ring_vm_set_task(rv, i, 0, pages, 1);
		EXPECT(ring_vm_run(rv, i), RING_VM_FULL);
	}
#ifdef __x86_64__
	ring_vm_write_by_ioctl(rv, 0, 0, pages);
#endif
	fds[FULL_VM] = vm_get_fd(rv->vm);
	for (i = 0; i < 2; i++) {
		fds[FULL_VCPU_0 + i] = vcpu_find(rv->vm, i)->fd;
		EXPECT(munmap(vcpu_find(rv->vm, i)->state,
			      sizeof(*vcpu_find(rv->vm, i)->state)), 0);
	}
	close(rv->vm->kvm_fd);
	if (with_child)
		child = keep_rings(rv, rings, &go);

	for (i = 0; i < NR_FULL; i++)
		parts[i] = i;
	for (n = NR_FULL; n; n--) {
		if (n == (memory_first ? NR_FULL : 2)) {
			/* The guest's memory, at the start or in the middle */
			list_for_each_entry(region,
					    &rv->vm->userspace_mem_regions,
					    list)
				munmap(region->mmap_start, region->mmap_size);
		}
		i = order % n;
		order /= n;
		if (parts[i] < FULL_RING_0)
			EXPECT(close(fds[parts[i]]), 0);
		else
			EXPECT(munmap(rings[parts[i] - FULL_RING_0],
				      ring_size), 0);
		parts[i] = parts[n - 1];
	}

	if (with_child) {
		EXPECT(write(go, "", 1), 1);
		EXPECT(waitpid(child, &status, 0), child);
		TEST_ASSERT(WIFEXITED(status) && !WEXITSTATUS(status),
			    "The child ended with %#x", status);
		close(go);
	}
	wait_for_no_vm(getpid());
	free(rv->seen);
	free(rv->order);
}

static void full_any_order(void)
{
	long before;
	int i;

	let_full_go(0, false, false);
	before = vm_memory();
	for (i = 0; i < FULL_ORDERS; i += order_step())
		let_full_go(i, i / 2 % 2, i % 3 == 0);
	expect_memory_below(before + 256);
}

static void forked(void)
{
	struct ring_vm *rv = ring_vm_create(ring_vm_min_entries(), 1, 64,
					    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	struct kvm_dirty_gfn *ring = vcpu_dirty_ring(rv->vm, 0);
	int status;
	pid_t pid;

	ring_vm_write(rv, 0, 0, 20);
	EXPECT(ring_vm_harvest(rv, 0, 10), 10);

	pid = fork();
	if (!pid) {
		/* The VM belongs to the parent's address space. */
		if (ioctl(vm_get_fd(rv->vm), KVM_RESET_DIRTY_RINGS, 0) != -1 ||
		    errno != EIO)
			_exit(1);
		if (ring[9].flags != KVM_DIRTY_GFN_F_RESET ||
		    ring[10].flags != KVM_DIRTY_GFN_F_DIRTY ||
		    ring[10].offset != 10)
			_exit(2);
		/* One ring for both: it can harvest for its parent. */
		dirty_gfn_set_harvested(&ring[10]);
		_exit(0);
	}
	EXPECT(waitpid(pid, &status, 0), pid);
	TEST_ASSERT(WIFEXITED(status) && !WEXITSTATUS(status),
		    "The child ended with %d", WEXITSTATUS(status));

	EXPECT(vm_reset_dirty_rings(rv->vm), 11);
	ring_vm_write(rv, 0, 0, 11);
	EXPECT(ring[20].offset, 0);
	EXPECT(ring[30].offset, 10);
	ring_vm_free(rv);
}

/* A VMM at work, until it is killed */
static void vmm(int ready)
{
	struct ring_vm *rv = ring_vm_create(ring_vm_min_entries(), 2, 1024,
					    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	struct ring_vm_runner runners[2];
	pthread_t thread;
	int i;

	reset_rv = rv;
	pthread_create(&thread, NULL, reset_fn, NULL);
	for (i = 0; i < 2; i++) {
		ring_vm_set_task(rv, i, 0, 1024, 1);
		ring_vm_task(rv, i)->spin = 1;
		ring_vm_runner_start(&runners[i], rv, i);
	}
	while (write(ready, "", 1) == 1)
		for (i = 0; i < 2; i++)
			ring_vm_harvest(rv, i, DIRTY_RING_HARVEST_ALL);
	_exit(1);
}

static void vmm_dies(void)
{
	int round, ready[2], status, flags;
	long before = 0;
	char c;
	pid_t pid;

	for (round = 0; round < 16; round++) {
		EXPECT(pipe(ready), 0);
		fflush(NULL);
		pid = fork();
		if (!pid)
			vmm(ready[1]);
		EXPECT(read(ready[0], &c, 1), 1);
		/* Go on reading, so that it does not block. */
		flags = fcntl(ready[0], F_GETFL);
		fcntl(ready[0], F_SETFL, flags | O_NONBLOCK);
		for (status = 0; status < round; status++) {
			usleep(1000);
			while (read(ready[0], &c, 1) == 1)
				;
		}
		kill(pid, SIGKILL);
		EXPECT(waitpid(pid, &status, 0), pid);
		TEST_ASSERT(WIFSIGNALED(status),
			    "The VMM was not killed but ended with %#x", status);
		close(ready[0]);
		close(ready[1]);
		wait_for_no_vm(pid);
		if (!round)
			before = vm_memory();
	}
	expect_memory_below(before + 256);
}

/*
 * The end of a VM of which everything is full
 */

#define FULL_VCPUS	3

/* KVM's file descriptors: the VM's, then those of its vCPUs */
static int kvm_fds(int *fds, int max)
{
	static const char * const names[] = {
		"anon_inode:kvm-vm", "anon_inode:kvm-vcpu:",
	};
	char path[64], name[64];
	int i, fd, len, nr = 0;

	for (i = 0; i < 2; i++) {
		for (fd = 3; fd < 256 && nr < max; fd++) {
			snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
			len = readlink(path, name, sizeof(name) - 1);
			name[max(len, 0)] = 0;
			if (!strncmp(name, names[i], strlen(names[i])))
				fds[nr++] = fd;
		}
	}
	return nr;
}

/*
 * Does not return. @order: one of 4 * 3 * 2, or 0: let the kernel close them.
 */
static void end_full(int order)
{
	uint32_t entries = ring_vm_min_entries();
	uint32_t steal_time = FULL_VCPUS * entries;
	struct ring_vm *rv = ring_vm_create(entries, FULL_VCPUS,
					    steal_time + FULL_VCPUS,
					    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	int fds[FULL_VCPUS + 1], i, n = order - 1;

	for (i = 0; i < FULL_VCPUS; i++) {
		ring_vm_set_task(rv, i, i * entries, rv->limit, 1);
		EXPECT(ring_vm_run(rv, i), RING_VM_FULL);
		ring_vm_set_steal_time(rv, i, RING_VM_GPA +
					      (steal_time + i) * getpagesize());
#ifdef __x86_64__
		ring_vm_write_by_ioctl(rv, i, i * entries, entries);
#endif
	}

	EXPECT(kvm_fds(fds, FULL_VCPUS + 1), FULL_VCPUS + 1);
	if (order)
		for (i = FULL_VCPUS + 1; i > 0; i--) {
			EXPECT(close(fds[n % i]), 0);
			fds[n % i] = fds[i - 1];
			n /= i;
		}
	_exit(0);
}

static void full(void)
{
	int order, status;
	pid_t pid;

	/* Mappings go last. */
	for (order = 0; order <= 4 * 3 * 2; order += order_step()) {
		fflush(NULL);
		pid = fork();
		if (!pid)
			end_full(order);
		EXPECT(waitpid(pid, &status, 0), pid);
		EXPECT(status, 0);
		wait_for_no_vm(pid);
	}
}

/*
 * Memslots that go while a vCPU writes to them
 */

#define SLOT_PAGES	3000
#define SLOT_ROUNDS	15

/* Create the slot with its log on, or move it; @pages 0: delete it. */
static void set_slot(struct ring_vm *rv, uint64_t gpa, uint64_t pages)
{
	ring_vm_set_slot(rv, gpa, rv->mem, pages * getpagesize(),
			 KVM_MEM_LOG_DIRTY_PAGES);
}

static uint64_t *page_of(struct ring_vm *rv, uint64_t page)
{
	return (uint64_t *)(rv->mem + page * getpagesize());
}

/* Let the guest end its task, beginning with the store that had no memslot. */
static void resume(struct ring_vm *rv)
{
	struct kvm_run *run = vcpu_state(rv->vm, 0);
	uint64_t ucall;

	/* On arm64 a ucall is MMIO, too. */
	do {
		vcpu_run(rv->vm, 0);
		vm_reset_dirty_rings(rv->vm);
		ucall = get_ucall(rv->vm, 0, NULL);
	} while (!ucall && run->exit_reason == KVM_EXIT_MMIO);
	TEST_ASSERT(ucall == UCALL_SYNC, "Unexpected exit: %s",
		    exit_reason_str(run->exit_reason));
}

/*
 * Delete or move the slot, by @change, while a vCPU writes page after page, or
 * is preempted while it does.
 */
static void slot_goes(void (*change)(struct ring_vm *rv), bool preempted)
{
	struct ring_vm *rv = ring_vm_create(4096, 1, SLOT_PAGES,
					    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	struct ring_vm_task *task = ring_vm_task(rv, 0);
	struct ring_vm_preempter preempter;
	struct ring_vm_runner runner;
	uint64_t before, i, written, halfway = 0, old[SLOT_PAGES];
	int round;

	for (round = 0; round < SLOT_ROUNDS; round++) {
		/* Have all pages mapped, clean, and known. */
		ring_vm_write(rv, 0, 0, SLOT_PAGES);
		ring_vm_collect_all(rv);
		ring_vm_forget(rv);
		for (i = 0; i < SLOT_PAGES; i++)
			old[i] = *page_of(rv, i);

		before = READ_ONCE(task->stores);
		ring_vm_set_task(rv, 0, 0, SLOT_PAGES, 1);
		ring_vm_runner_start(&runner, rv, 0);
		if (preempted)
			ring_vm_preempter_start(&preempter, &runner);
		while (READ_ONCE(task->stores) - before <
		       SLOT_PAGES * round / SLOT_ROUNDS)
			;
		if (preempted)
			/* With a limit: the change may wait for it. */
			ring_vm_preempt(&preempter, 50);
		change(rv);

		/*
		 * Nothing can write to it now: what has changed is in the ring.
		 */
		written = 0;
		ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL);
		for (i = 0; i < SLOT_PAGES; i++) {
			if (*page_of(rv, i) == old[i])
				continue;
			written++;
			TEST_ASSERT(rv->seen[i],
				    "Round %d: page %lu was written, and lost",
				    round, i);
		}
		halfway += written && written < SLOT_PAGES;
		if (preempted) {
			ring_vm_go_on(&preempter);
			ring_vm_preempter_stop(&preempter);
		}
		ring_vm_runner_stop(&runner);

		/* Have it back where it was, and let the guest go on. */
		vm_reset_dirty_rings(rv->vm);
		set_slot(rv, RING_VM_GPA, SLOT_PAGES);
		resume(rv);
		ring_vm_collect_all(rv);
		ring_vm_forget(rv);
	}
	printf("# %lu of %d times the slot went while the guest wrote\n", halfway,
	       SLOT_ROUNDS);
	ring_vm_free(rv);
}

static void delete_slot(struct ring_vm *rv)
{
	set_slot(rv, 0, 0);
}

static void slot_deleted(void)
{
	slot_goes(delete_slot, false);
}

static void slot_deleted_preempted(void)
{
	slot_goes(delete_slot, true);
}

static void move_slot(struct ring_vm *rv)
{
	set_slot(rv, 2 * RING_VM_GPA, SLOT_PAGES);
}

static void slot_moved(void)
{
	slot_goes(move_slot, false);
}

static void slot_recreated(void)
{
	struct ring_vm *rv = ring_vm_create(ring_vm_min_entries(), 1, 128,
					    KVM_MEM_LOG_DIRTY_PAGES, NULL);

	ring_vm_write(rv, 0, 0, 128);
	set_slot(rv, 0, 0);
	set_slot(rv, RING_VM_GPA, 64);

	/* Half of the entries are beyond its end now; all are counted. */
	EXPECT(ring_vm_collect(rv), 128);
	ring_vm_expect(rv, 0, 128);

	ring_vm_write(rv, 0, 0, 64);
	EXPECT(ring_vm_collect(rv), 64);
	ring_vm_expect(rv, 0, 64);
	ring_vm_write(rv, 0, 0, 64);
	EXPECT(ring_vm_collect(rv), 64);
	ring_vm_expect(rv, 0, 64);

	/* Have the slot as it was, for ring_vm_free(). */
	set_slot(rv, 0, 0);
	set_slot(rv, RING_VM_GPA, 128);
	ring_vm_free(rv);
}

static const struct test_case cases[] = {
	{ "hot-plug: a vCPU comes while others are reset", hot_plug },
#ifdef __x86_64__
	{ "plug-overflow: what was left over is in the new vCPU's ring",
	  plug_overflow },
#endif
	{ "any-order: file descriptors and the mapping go", any_order },
	/* One VM after another */
	{ "full-any-order: the same, everything full", full_any_order,
	  .seconds = 400 },
	{ "forked: reads the ring, EIO for a reset", forked },
	{ "vmm-dies: nothing is left behind", vmm_dies },
	{ "full: a VM ends in every order, with everything full", full },
	{ "slot-deleted: what was written is in the ring", slot_deleted },
	{ "slot-deleted-preempted: the same, of a preempted vCPU",
	  slot_deleted_preempted },
	{ "slot-moved: what was written is in the ring", slot_moved },
	{ "slot-recreated: old entries do no harm", slot_recreated },
};

int main(int argc, char **argv)
{
	dirty_ring_check_supported();
	test_cases_main(argc, argv, cases, ARRAY_SIZE(cases));
}
