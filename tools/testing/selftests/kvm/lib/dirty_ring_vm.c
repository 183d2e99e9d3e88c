// SPDX-License-Identifier: GPL-2.0-only
/*
 * A VM for tests of the dirty ring: its vCPUs write to given pages of the one
 * tracked memslot, and to nothing else in it.
 */

#define _GNU_SOURCE /* for program_invocation_name, pthread_tryjoin_np */

#include <dirent.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>

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

/* Have a vCPU run other code instead of its task. */
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
 * Have KVM write the steal time of a vCPU to 64 bytes of guest memory whenever
 * it schedules the vCPU. On arm64 this works only once.
 *
 * Return: false if KVM has no steal time.
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

#define TAINT_WARN	9

/* Has the kernel warned of a fault of its own since it was started? */
bool kernel_warned(void)
{
	FILE *file = fopen("/proc/sys/kernel/tainted", "r");
	unsigned long taint = 0;

	TEST_ASSERT(file && fscanf(file, "%lu", &taint) == 1,
		    "Cannot read the kernel's taint");
	fclose(file);
	return taint & (1UL << TAINT_WARN);
}

/*
 * Does KVM use two-dimensional paging, without regard to the guest's page
 * tables?
 */
bool two_dimensional_paging(void)
{
#ifdef __x86_64__
	/* A built-in kvm_intel has the parameter even if it is not in use. */
	const char *file = is_intel_cpu() ?
			   "/sys/module/kvm_intel/parameters/ept" :
			   "/sys/module/kvm_amd/parameters/npt";
	FILE *f = fopen(file, "r");
	char c = '?';

	TEST_ASSERT(f && fread(&c, 1, 1, f) == 1, "Cannot read %s", file);
	fclose(f);
	return c == 'Y' || c == '1';
#else
	return true;
#endif
}

#ifdef __x86_64__
/* Does KVM use the TDP MMU for the guest's own pages? */
bool uses_tdp_mmu(void)
{
	FILE *f = fopen("/sys/module/kvm/parameters/tdp_mmu", "r");
	int c = 'N';

	if (f) {
		c = fgetc(f);
		fclose(f);
	}
	return c == 'Y';
}
#endif

/* One vCPU with the smallest ring, and a memslot whose pages are logged */
struct ring_vm *ring_vm_create_small(uint64_t pages)
{
	return ring_vm_create(ring_vm_min_entries(), 1, pages,
			      KVM_MEM_LOG_DIRTY_PAGES, NULL);
}

void ring_vm_free(struct ring_vm *rv)
{
	ucall_uninit(rv->vm);
	kvm_vm_free(rv->vm);
	free(rv->seen);
	free(rv->order);
	free(rv);
}

/*
 * Create, move or resize a memslot, or set its flags; size 0: delete it. The
 * library's functions would map and unmap its memory, too.
 */
void vm_set_slot(struct kvm_vm *vm, uint32_t slot, uint64_t gpa, void *mem,
		 size_t size, uint32_t flags)
{
	struct kvm_userspace_memory_region region = {
		.slot = slot,
		.flags = flags,
		.guest_phys_addr = gpa,
		.memory_size = size,
		.userspace_addr = (uintptr_t)mem,
	};

	vm_ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region);
}

/* The same for the tracked memslot */
void ring_vm_set_slot(struct ring_vm *rv, uint64_t gpa, void *mem, size_t size,
		      uint32_t flags)
{
	vm_set_slot(rv->vm, RING_VM_SLOT, gpa, mem, size, flags);
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

/* Run a vCPU until its task is done or its ring is full. */
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

/* Have a vCPU write to pages, which must fit into its ring. */
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
		/* Unlike _vcpu_run(), let a signal end it. */
		ret = _vcpu_ioctl(runner->rv->vm, runner->vcpu, KVM_RUN, NULL);
		TEST_ASSERT(!ret || errno == EINTR, "KVM_RUN failed: %s",
			    strerror(errno));
		TEST_ASSERT(ret || run->exit_reason != KVM_EXIT_SHUTDOWN,
			    "The guest died");
		WRITE_ONCE(runner->exits, runner->exits + 1);
	}
	return NULL;
}

/* Have a thread run a vCPU, whatever the exits. */
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

/* Wait for a store to a page that began after the call. */
void ring_vm_wait_for_store(uint64_t *page)
{
	uint64_t before = READ_ONCE(*page);

	while (READ_ONCE(*page) < before + 2)
		;
}

/*
 * Add a memslot and delete it: as it goes, x86 unmaps all of the VM's pages, and frees
 * their page tables.
 */
void ring_vm_other_slot(struct ring_vm *rv)
{
	size_t page = getpagesize();
	uint64_t gpa = RING_VM_GPA + 2 * rv->pages * page;
	void *mem;

	mem = mmap(NULL, page, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	TEST_ASSERT(mem != MAP_FAILED, "mmap: %s", strerror(errno));
	vm_set_slot(rv->vm, RING_VM_SLOT + 1, gpa, mem, page, 0);
	usleep(100);
	vm_set_slot(rv->vm, RING_VM_SLOT + 1, gpa, mem, 0, 0);
	munmap(mem, page);
}

static void *other_slot_fn(void *data)
{
	struct ring_vm_other_slot *other = data;

	while (!READ_ONCE(other->quit)) {
		ring_vm_other_slot(other->rv);
		other->times++;
		/* Let the vCPUs get on. */
		usleep(500);
	}
	return NULL;
}

/* Have a thread do that over and over. */
void ring_vm_other_slot_start(struct ring_vm_other_slot *other,
			      struct ring_vm *rv)
{
	other->rv = rv;
	other->quit = false;
	other->times = 0;
	TEST_ASSERT(!pthread_create(&other->thread, NULL, other_slot_fn, other),
		    "pthread_create failed");
}

void ring_vm_other_slot_stop(struct ring_vm_other_slot *other)
{
	WRITE_ONCE(other->quit, true);
	pthread_join(other->thread, NULL);
	printf("# Another memslot went %u times\n", other->times);
	TEST_ASSERT(other->times, "No memslot went");
}

static void *preempter_fn(void *data)
{
	struct ring_vm_preempter *preempter = data;
	uint64_t start;

	while (true) {
		sem_wait(&preempter->wanted);
		if (READ_ONCE(preempter->quit))
			return NULL;
		start = now_ns();
		WRITE_ONCE(preempter->has_cpu, true);
		WRITE_ONCE(preempter->times, preempter->times + 1);
		while (READ_ONCE(preempter->held)) {
			if (preempter->limit &&
			    (now_ns() - start) / 1000000 >= preempter->limit)
				break;
		}
		WRITE_ONCE(preempter->has_cpu, false);
	}
}

/* The CPUs that the calling thread may use; skip the case if that is only one. */
void need_two_cpus(cpu_set_t *cpus)
{
	TEST_ASSERT(!sched_getaffinity(0, sizeof(*cpus), cpus),
		    "sched_getaffinity failed");
	if (CPU_COUNT(cpus) < 2)
		test_case_skip("there is only one CPU");
}

/* Leave the first CPU of a set to somebody else. */
void take_first_cpu(cpu_set_t *cpus, cpu_set_t *first)
{
	int cpu;

	for (cpu = 0; !CPU_ISSET(cpu, cpus); cpu++)
		;
	CPU_ZERO(first);
	CPU_SET(cpu, first);
	CPU_CLR(cpu, cpus);
}

/* Start a thread that preempts others on these CPUs. */
void start_real_time(pthread_t *thread, const cpu_set_t *cpus,
		     void *(*fn)(void *data), void *data)
{
	struct sched_param param = { .sched_priority = 1 };
	pthread_attr_t attr;
	int ret;

	pthread_attr_init(&attr);
	pthread_attr_setaffinity_np(&attr, sizeof(*cpus), cpus);
	pthread_attr_setinheritsched(&attr, PTHREAD_EXPLICIT_SCHED);
	pthread_attr_setschedpolicy(&attr, SCHED_FIFO);
	pthread_attr_setschedparam(&attr, &param);
	ret = pthread_create(thread, &attr, fn, data);
	if (ret == EPERM)
		test_case_skip("no right to real-time threads");
	TEST_ASSERT(!ret, "pthread_create failed: %s", strerror(ret));
	pthread_attr_destroy(&attr);
}

/*
 * Move the calling thread off one CPU, and leave it to the runner and to a
 * real-time thread that waits until it is wanted. Skip the case if there is
 * only one CPU, or no right to real-time threads.
 */
void ring_vm_preempter_start(struct ring_vm_preempter *preempter,
			     struct ring_vm_runner *runner)
{
	cpu_set_t all, one;
	int cpu;

	need_two_cpus(&all);
	preempter->cpus = all;
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
	start_real_time(&preempter->thread, &one, preempter_fn, preempter);
}

/*
 * Take the CPU from the vCPU's thread, wherever that is in the kernel, for at
 * most @limit ms. Set a limit before waiting for that thread, also in a system
 * call.
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

/* Give the CPU back, if the limit has not done so. */
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
 * Have KVM write to pages, one at a time and in order, by ioctls on a vCPU: KVM
 * writes the wall clock when its address is set. Each write changes the version
 * in it.
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
 * Harvest and reset until nothing is left. That takes more than one round if
 * a ring had no room and pages went to the overflow.
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

/*
 * Expect that exactly these pages were harvested since the last call, once
 * each.
 */
void ring_vm_expect(struct ring_vm *rv, uint64_t first, uint64_t count)
{
	uint64_t i;

	for (i = 0; i < rv->pages; i++)
		TEST_ASSERT(rv->seen[i] == (i >= first && i < first + count),
			    "Page %lu was reported %u times, written: %lu to %lu",
			    i, rv->seen[i], first, first + count);
	ring_vm_forget(rv);
}

/* Expect exactly these flags in entries of a vCPU's ring, from @first on. */
void ring_vm_expect_flags(struct ring_vm *rv, uint32_t vcpu, uint32_t first,
			  uint32_t count, uint32_t flags)
{
	struct kvm_dirty_gfn *ring = vcpu_dirty_ring(rv->vm, vcpu);
	uint32_t i;

	for (i = first; i < first + count; i++)
		TEST_ASSERT(READ_ONCE(ring[i % rv->entries].flags) == flags,
			    "Entry %u: flags are %#x, want %#x", i,
			    ring[i % rv->entries].flags, flags);
}

#define KVM_DEBUGFS	"/sys/kernel/debug/kvm"

/* A statistic of all VMs, by its path below KVM's folder in debugfs */
long kvm_stat(const char *name)
{
	char path[128];
	FILE *file;
	long value;

	if (access(KVM_DEBUGFS, F_OK))
		test_case_skip("no debugfs at /sys/kernel/debug");
	snprintf(path, sizeof(path), KVM_DEBUGFS "/%s", name);
	file = fopen(path, "r");
	TEST_ASSERT(file && fscanf(file, "%ld", &value) == 1, "Cannot read %s",
		    path);
	fclose(file);
	return value;
}

/* A statistic of one VM; "vcpu0/..." for one of a vCPU */
long ring_vm_stat(struct ring_vm *rv, const char *name)
{
	char path[128];

	snprintf(path, sizeof(path), "%d-%d/%s", getpid(), vm_get_fd(rv->vm),
		 name);
	return kvm_stat(path);
}

/* How many VMs of a process are in debugfs; 0 if there is no debugfs */
int vms_of(pid_t pid)
{
	DIR *dir = opendir(KVM_DEBUGFS);
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

/* Map huge pages of 1 << @shift bytes; skip the case if too few are free. */
void *map_huge_pages(size_t size, unsigned int shift)
{
	void *mem = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE |
			 MAP_ANONYMOUS | MAP_HUGETLB | MAP_POPULATE |
			 shift << MAP_HUGE_SHIFT, -1, 0);

	if (mem == MAP_FAILED)
		test_case_skip("no free huge pages of this size");
	return mem;
}

static int kvm_fd = -1;
static uint32_t ring_cap;

/* Open /dev/kvm, and ask it, once: a case may give up the right to. */
int kvm_fd_get(void)
{
	if (kvm_fd < 0) {
		ring_cap = dirty_ring_cap();
		kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
		TEST_ASSERT(kvm_fd >= 0, "/dev/kvm: %s", strerror(errno));
	}
	return kvm_fd;
}

int vm_fd_create(void)
{
	int vm = ioctl(kvm_fd_get(), KVM_CREATE_VM, 0);

	TEST_ASSERT(vm >= 0, "KVM_CREATE_VM: %s", strerror(errno));
	return vm;
}

/* Enable a ring, or its bitmaps. Return: what the ioctl returns. */
int vm_fd_enable(int vm, uint32_t cap, uint64_t size, uint32_t flags)
{
	struct kvm_enable_cap args = {
		.cap = cap,
		.flags = flags,
		.args[0] = size,
	};

	return ioctl(vm, KVM_ENABLE_CAP, &args);
}

/* Create a vCPU of a new VM, with a ring unless @ring_pages is 0. */
int vcpu_fd_create(uint32_t ring_pages)
{
	int vm = vm_fd_create(), vcpu;

	if (ring_pages)
		EXPECT(vm_fd_enable(vm, ring_cap, ring_pages * getpagesize(),
				    0), 0);
	vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	TEST_ASSERT(vcpu >= 0, "KVM_CREATE_VCPU: %s", strerror(errno));
	close(vm);
	return vcpu;
}

/* Map pages of a vCPU; MAP_FAILED if KVM refuses. */
uint8_t *vcpu_fd_try_map(int vcpu, int first, int pages, int prot, int flags)
{
	return mmap(NULL, pages * getpagesize(), prot, flags, vcpu,
		    (off_t)first * getpagesize());
}

/* Map pages of a vCPU. */
uint8_t *vcpu_fd_map(int vcpu, int first, int pages, int prot, int flags)
{
	uint8_t *map = vcpu_fd_try_map(vcpu, first, pages, prot, flags);

	TEST_ASSERT(map != MAP_FAILED, "mmap of %d pages from %d on: %s", pages,
		    first, strerror(errno));
	return map;
}
