// SPDX-License-Identifier: GPL-2.0-only
/*
 * A VM for tests of the dirty ring: its vCPUs write to the pages they are told
 * to, and to nothing else in the one memslot that is tracked.
 */

#define _GNU_SOURCE /* for program_invocation_name, pthread_tryjoin_np */

#include <dirent.h>
#include <sched.h>
#include <signal.h>

#include "test_util.h"
#include "kvm_util.h"
#include "processor.h"
#include "dirty_ring_vm.h"
#include "test_cases.h"

#ifdef __x86_64__
#include <asm/kvm_para.h>
#endif

/* Shared with the guest. */
static struct ring_vm_task tasks[RING_VM_MAX_VCPUS];
static uint64_t page_size;

static void guest_code(uint64_t vcpu)
{
	struct ring_vm_task *task = &tasks[vcpu];
	uint64_t i, *page;

	while (true) {
		do {
			for (i = 0; i < READ_ONCE(task->count); i++) {
				page = (void *)RING_VM_GVA +
				       (task->first + i * task->stride) *
				       page_size;
				guest_store(page, ++task->stores);
			}
		} while (READ_ONCE(task->spin));

		GUEST_SYNC(0);
	}
}

uint32_t ring_vm_min_entries(void)
{
	uint32_t entries = getpagesize() / sizeof(struct kvm_dirty_gfn);

	while (entries < dirty_ring_reserved_entries())
		entries *= 2;

	return entries;
}

/* Add a vCPU, with the next id. */
void ring_vm_add_vcpu(struct ring_vm *rv)
{
	uint32_t id = rv->nr_vcpus;

	TEST_ASSERT(id < RING_VM_MAX_VCPUS, "Too many vCPUs");
	vm_vcpu_add_default(rv->vm, id, guest_code);
#ifdef __x86_64__
	vcpu_set_cpuid(rv->vm, id, kvm_get_supported_cpuid());
#endif
	vcpu_args_set(rv->vm, id, 1, (uint64_t)id);
	rv->nr_vcpus++;
}

#if defined(__x86_64__) || defined(__aarch64__)

/* Have a vCPU run other code than what works on its task. */
void ring_vm_set_code(struct ring_vm *rv, uint32_t vcpu, void *code,
		      uint64_t arg)
{
#ifdef __x86_64__
	struct kvm_regs regs;

	vcpu_regs_get(rv->vm, vcpu, &regs);
	regs.rip = (uintptr_t)code;
	vcpu_regs_set(rv->vm, vcpu, &regs);
#else
	set_reg(rv->vm, vcpu, ARM64_CORE_REG(regs.pc), (uintptr_t)code);
#endif
	vcpu_args_set(rv->vm, vcpu, 1, arg);
}

/*
 * Have KVM write the steal time of a vCPU to 64 bytes of guest memory, when it
 * schedules the vCPU. On arm64 it can be told so only once.
 *
 * Return: false if KVM knows no steal time.
 */
bool ring_vm_set_steal_time(struct ring_vm *rv, uint32_t vcpu, uint64_t gpa)
{
#ifdef __x86_64__
	return _vcpu_set_msr(rv->vm, vcpu, MSR_KVM_STEAL_TIME, gpa | 1) == 1;
#else
	struct kvm_device_attr attr = {
		.group = KVM_ARM_VCPU_PVTIME_CTRL,
		.attr = KVM_ARM_VCPU_PVTIME_IPA,
		.addr = (uintptr_t)&gpa,
	};

	if (_vcpu_ioctl(rv->vm, vcpu, KVM_HAS_DEVICE_ATTR, &attr))
		return false;
	vcpu_ioctl(rv->vm, vcpu, KVM_SET_DEVICE_ATTR, &attr);
	return true;
#endif
}

#endif

/*
 * Create a VM with a tracked memslot
 *
 * Input Args:
 *   entries - Entries of each ring; 0: no ring but a bitmap
 *   nr_vcpus - Number of vCPUs, with the ids 0, 1, ...
 *   pages - Size of the memslot, in pages of the host
 *   flags - Flags of the memslot, and RING_VM_WITH_BITMAP
 *   before_ring - Called before the ring is enabled; may be NULL
 */
struct ring_vm *ring_vm_create(uint32_t entries, uint32_t nr_vcpus,
			       uint64_t pages, uint32_t flags,
			       void (*before_ring)(struct kvm_vm *vm))
{
	struct kvm_enable_cap bitmap = {
		.cap = KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP,
	};
	struct ring_vm *rv = calloc(1, sizeof(*rv));
	uint64_t guest_pages, more_pages;
	struct kvm_vm *vm;
	uint32_t i;

	TEST_ASSERT(rv, "Insufficient Memory");
	guest_pages = vm_num_guest_pages(VM_MODE_DEFAULT, pages);

	vm = vm_create(VM_MODE_DEFAULT, 0, O_RDWR);
#ifdef __x86_64__
	vm_create_irqchip(vm);
#endif
	if (before_ring)
		before_ring(vm);
	if (entries)
		vm_enable_dirty_ring(vm, entries *
					 sizeof(struct kvm_dirty_gfn));
	if (flags & RING_VM_WITH_BITMAP)
		vm_enable_cap(vm, &bitmap);

	/* Page tables for the slot, and for slots that a test adds. */
	more_pages = vm_adjust_num_guest_pages(VM_MODE_DEFAULT,
					       DEFAULT_GUEST_PHY_PAGES + 64 +
					       guest_pages / 512 * 2);
	vm_userspace_mem_region_add(vm, VM_MEM_SRC_ANONYMOUS, 0, 0, more_pages,
				    0);
	kvm_vm_elf_load(vm, program_invocation_name, 0, 0);
	vm_userspace_mem_region_add(vm, VM_MEM_SRC_ANONYMOUS, RING_VM_GPA,
				    RING_VM_SLOT, guest_pages,
				    flags & ~RING_VM_WITH_BITMAP);
	virt_map(vm, RING_VM_GVA, RING_VM_GPA, guest_pages, 0);

	rv->vm = vm;
	for (i = 0; i < nr_vcpus; i++)
		ring_vm_add_vcpu(rv);
	ucall_init(vm, NULL);

	page_size = getpagesize();
	sync_global_to_guest(vm, page_size);

	rv->entries = entries;
	rv->limit = entries ? entries - dirty_ring_reserved_entries() : 0;
	rv->pages = pages;
	rv->mem = addr_gpa2hva(vm, RING_VM_GPA);
	rv->seen = calloc(pages, sizeof(*rv->seen));
	rv->order = calloc(entries, sizeof(*rv->order));
	TEST_ASSERT(rv->seen && rv->order, "Insufficient Memory");

	return rv;
}

void ring_vm_free(struct ring_vm *rv)
{
	ucall_uninit(rv->vm);
	kvm_vm_free(rv->vm);
	free(rv->seen);
	free(rv->order);
	free(rv);
}

/* The task of a vCPU, as the guest sees it. */
struct ring_vm_task *ring_vm_task(struct ring_vm *rv, uint32_t vcpu)
{
	return addr_gva2hva(rv->vm, (vm_vaddr_t)&tasks[vcpu]);
}

void ring_vm_set_task(struct ring_vm *rv, uint32_t vcpu, uint64_t first,
		      uint64_t count, uint64_t stride)
{
	struct ring_vm_task *task = ring_vm_task(rv, vcpu);

	task->first = first;
	task->count = count;
	task->stride = stride;
}

/* Let a vCPU work on its task, until that is done or its ring is full. */
enum ring_vm_exit ring_vm_run(struct ring_vm *rv, uint32_t vcpu)
{
	struct kvm_run *run = vcpu_state(rv->vm, vcpu);

	vcpu_run(rv->vm, vcpu);
	if (run->exit_reason == KVM_EXIT_DIRTY_RING_FULL)
		return RING_VM_FULL;

	TEST_ASSERT(get_ucall(rv->vm, vcpu, NULL) == UCALL_SYNC,
		    "Unexpected exit: %s", exit_reason_str(run->exit_reason));
	return RING_VM_DONE;
}

/* Write to pages that are known to fit into the ring. */
void ring_vm_write(struct ring_vm *rv, uint32_t vcpu, uint64_t first,
		   uint64_t count)
{
	ring_vm_set_task(rv, vcpu, first, count, 1);
	TEST_ASSERT(ring_vm_run(rv, vcpu) == RING_VM_DONE,
		    "The ring is full too early");
}

static void runner_kick(int sig)
{
}

static void *runner_fn(void *data)
{
	struct ring_vm_runner *runner = data;
	struct kvm_run *run = vcpu_state(runner->rv->vm, runner->vcpu);
	int ret;

	while (!READ_ONCE(runner->quit)) {
		/* Unlike _vcpu_run() this ends when a signal comes. */
		ret = _vcpu_ioctl(runner->rv->vm, runner->vcpu, KVM_RUN, NULL);
		TEST_ASSERT(!ret || errno == EINTR, "KVM_RUN failed: %s",
			    strerror(errno));
		TEST_ASSERT(ret || run->exit_reason != KVM_EXIT_SHUTDOWN,
			    "The guest died");
		WRITE_ONCE(runner->exits, runner->exits + 1);
	}
	return NULL;
}

/* Have a thread run a vCPU, whatever it comes back for. */
void ring_vm_runner_start(struct ring_vm_runner *runner, struct ring_vm *rv,
			  uint32_t vcpu)
{
	struct sigaction sa = { .sa_handler = runner_kick };

	sigaction(SIGUSR1, &sa, NULL);
	runner->rv = rv;
	runner->vcpu = vcpu;
	runner->quit = false;
	runner->exits = 0;
	TEST_ASSERT(!pthread_create(&runner->thread, NULL, runner_fn, runner),
		    "pthread_create failed");
}

void ring_vm_runner_stop(struct ring_vm_runner *runner)
{
	WRITE_ONCE(ring_vm_task(runner->rv, runner->vcpu)->spin, 0);
	WRITE_ONCE(runner->quit, true);
	/* The first signal may come just before KVM_RUN. */
	while (pthread_tryjoin_np(runner->thread, NULL)) {
		pthread_kill(runner->thread, SIGUSR1);
		usleep(1000);
	}
}

static void *preempter_fn(void *data)
{
	struct ring_vm_preempter *preempter = data;
	struct timespec start;

	while (true) {
		sem_wait(&preempter->wanted);
		if (READ_ONCE(preempter->quit))
			return NULL;
		clock_gettime(CLOCK_MONOTONIC, &start);
		WRITE_ONCE(preempter->has_cpu, true);
		WRITE_ONCE(preempter->times, preempter->times + 1);
		while (READ_ONCE(preempter->held)) {
			if (preempter->limit &&
			    timespec_to_ns(timespec_diff_now(start)) / 1000000 >=
			    preempter->limit)
				break;
		}
		WRITE_ONCE(preempter->has_cpu, false);
	}
}

/*
 * Leave a CPU to the runner and to a real-time thread, which waits until it is
 * wanted there; the calling thread goes elsewhere. Skips the case if there is
 * but one CPU, or no right to real-time threads.
 */
void ring_vm_preempter_start(struct ring_vm_preempter *preempter,
			     struct ring_vm_runner *runner)
{
	struct sched_param param = { .sched_priority = 1 };
	pthread_attr_t attr;
	cpu_set_t all, one;
	int cpu, ret;

	TEST_ASSERT(!sched_getaffinity(0, sizeof(all), &all),
		    "sched_getaffinity failed");
	preempter->cpus = all;
	if (CPU_COUNT(&all) < 2)
		test_case_skip("there is only one CPU");
	for (cpu = CPU_SETSIZE - 1; !CPU_ISSET(cpu, &all); cpu--)
		;
	CPU_ZERO(&one);
	CPU_SET(cpu, &one);
	CPU_CLR(cpu, &all);
	TEST_ASSERT(!sched_setaffinity(0, sizeof(all), &all),
		    "sched_setaffinity failed");
	TEST_ASSERT(!pthread_setaffinity_np(runner->thread, sizeof(one), &one),
		    "pthread_setaffinity_np failed");

	preempter->times = 0;
	preempter->has_cpu = false;
	preempter->held = false;
	preempter->quit = false;
	sem_init(&preempter->wanted, 0, 0);
	pthread_attr_init(&attr);
	pthread_attr_setaffinity_np(&attr, sizeof(one), &one);
	pthread_attr_setinheritsched(&attr, PTHREAD_EXPLICIT_SCHED);
	pthread_attr_setschedpolicy(&attr, SCHED_FIFO);
	pthread_attr_setschedparam(&attr, &param);
	ret = pthread_create(&preempter->thread, &attr, preempter_fn,
			     preempter);
	if (ret == EPERM)
		test_case_skip("no right to real-time threads");
	TEST_ASSERT(!ret, "pthread_create failed: %s", strerror(ret));
	pthread_attr_destroy(&attr);
}

/*
 * When this returns, the vCPU does not run, wherever it was in the kernel. Who
 * then waits for the vCPU's thread, perhaps inside the kernel, must set a limit.
 */
void ring_vm_preempt(struct ring_vm_preempter *preempter, unsigned int limit)
{
	uint32_t times = READ_ONCE(preempter->times);

	preempter->limit = limit;
	WRITE_ONCE(preempter->held, true);
	sem_post(&preempter->wanted);
	while (READ_ONCE(preempter->times) == times)
		;
}

/* Does nothing if the limit is over. */
void ring_vm_go_on(struct ring_vm_preempter *preempter)
{
	WRITE_ONCE(preempter->held, false);
	while (READ_ONCE(preempter->has_cpu))
		;
}

void ring_vm_preempter_stop(struct ring_vm_preempter *preempter)
{
	WRITE_ONCE(preempter->quit, true);
	sem_post(&preempter->wanted);
	pthread_join(preempter->thread, NULL);
	sem_destroy(&preempter->wanted);
	sched_setaffinity(0, sizeof(preempter->cpus), &preempter->cpus);
}

#ifdef __x86_64__

#define MSRS_PER_IOCTL	100

/*
 * Have KVM write to pages, in ioctls on a vCPU, one at a time and in order:
 * KVM writes the wall clock when its address is set. The version in it makes
 * each write another one.
 */
void ring_vm_write_by_ioctl(struct ring_vm *rv, uint32_t vcpu, uint64_t first,
			    uint64_t count)
{
	struct {
		struct kvm_msrs header;
		struct kvm_msr_entry entries[MSRS_PER_IOCTL];
	} msrs;
	uint64_t i;
	int n;

	for (i = 0; i < count; i += n) {
		memset(&msrs, 0, sizeof(msrs));
		for (n = 0; n < MSRS_PER_IOCTL && i + n < count; n++) {
			msrs.entries[n].index = MSR_KVM_WALL_CLOCK_NEW;
			msrs.entries[n].data = RING_VM_GPA +
					       (first + i + n) * getpagesize();
		}
		msrs.header.nmsrs = n;
		TEST_ASSERT(_vcpu_ioctl(rv->vm, vcpu, KVM_SET_MSRS,
					&msrs) == n, "KVM_SET_MSRS failed");
	}
}

#endif /* __x86_64__ */

static void ring_vm_mark(uint32_t slot, uint64_t offset, void *data)
{
	struct ring_vm *rv = data;

	TEST_ASSERT(slot == RING_VM_SLOT,
		    "Slot %#x is reported but not tracked", slot);
	TEST_ASSERT(offset < rv->pages,
		    "Page %#lx is reported but not in the slot", offset);
	rv->seen[offset]++;
	rv->order[rv->nr_order++ % rv->entries] = offset;
}

uint32_t ring_vm_harvest(struct ring_vm *rv, uint32_t vcpu, uint32_t max)
{
	return vcpu_harvest_dirty_ring(rv->vm, vcpu, max, ring_vm_mark, rv);
}

/* Harvest and reset the rings of all vCPUs once. */
uint32_t ring_vm_collect(struct ring_vm *rv)
{
	uint32_t i, harvested = 0;
	int reset;

	for (i = 0; i < rv->nr_vcpus; i++)
		harvested += ring_vm_harvest(rv, i, DIRTY_RING_HARVEST_ALL);

	reset = vm_reset_dirty_rings(rv->vm);
	TEST_ASSERT(reset == harvested, "Harvested %u entries but %d got reset",
		    harvested, reset);
	return harvested;
}

/*
 * Harvest and reset until nothing is left. That is more than once if KVM
 * had to keep pages aside, because a ring was full for real.
 */
void ring_vm_collect_all(struct ring_vm *rv)
{
	while (ring_vm_collect(rv))
		;
}

void ring_vm_forget(struct ring_vm *rv)
{
	memset(rv->seen, 0, rv->pages * sizeof(*rv->seen));
	rv->nr_order = 0;
}

/* Exactly these pages were harvested since the last call, each of them once. */
void ring_vm_expect(struct ring_vm *rv, uint64_t first, uint64_t count)
{
	uint64_t i;

	for (i = 0; i < rv->pages; i++)
		TEST_ASSERT(rv->seen[i] == (i >= first && i < first + count),
			    "Page %lu was reported %u times, written: %lu to %lu",
			    i, rv->seen[i], first, first + count);
	ring_vm_forget(rv);
}

/* The VMs of a process that KVM shows in debugfs; 0 also if there is none. */
int vms_of(pid_t pid)
{
	DIR *dir = opendir("/sys/kernel/debug/kvm");
	struct dirent *d;
	char prefix[32];
	int n = 0;

	if (!dir)
		return 0;
	snprintf(prefix, sizeof(prefix), "%d-", pid);
	while ((d = readdir(dir)))
		n += !strncmp(d->d_name, prefix, strlen(prefix));
	closedir(dir);
	return n;
}
