/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A VM for tests of the dirty ring: its vCPUs write to given pages of the one
 * tracked memslot, and to nothing else in it.
 */
#ifndef SELFTEST_KVM_DIRTY_RING_VM_H
#define SELFTEST_KVM_DIRTY_RING_VM_H

#include <linux/bits.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <time.h>

#include "dirty_ring.h"

#define RING_VM_MAX_VCPUS	8
#define RING_VM_SLOT		1
#define RING_VM_GPA		0x40000000UL
#define RING_VM_GVA		0xc0000000UL

/*
 * With the flags of the memslot: have a bitmap for pages that no vCPU writes,
 * where the architecture has that.
 */
#define RING_VM_WITH_BITMAP	BIT(31)

#ifndef KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP
#define KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP	225
#endif

/*
 * What a vCPU does, shared with the guest: write to @count pages, @stride
 * apart, from @first on; again as long as @spin is set.
 */
struct ring_vm_task {
	uint64_t first;
	uint64_t count;
	uint64_t stride;
	uint64_t spin;
	/* Number of stores so far; each store writes its own number. */
	uint64_t stores;
} __aligned(64);	/* Never across pages */

struct ring_vm {
	struct kvm_vm *vm;
	uint32_t nr_vcpus;
	/* Entries in the ring of each vCPU, and how many until it is full. */
	uint32_t entries;
	uint32_t limit;
	/* The tracked memslot, in pages of the host. */
	uint64_t pages;
	uint8_t *mem;
	/* How often each page was harvested, and all of them in order. */
	uint32_t *seen;
	uint64_t *order;
	uint32_t nr_order;
};

enum ring_vm_exit {
	RING_VM_DONE,
	RING_VM_FULL,
};

/*
 * A thread that runs a vCPU until it is stopped, and counts exits to userspace.
 */
struct ring_vm_runner {
	struct ring_vm *rv;
	uint32_t vcpu;
	bool quit;
	uint32_t exits;
	pthread_t thread;
};

/* A thread that adds and deletes a memslot besides the VM's, and counts how often. */
struct ring_vm_other_slot {
	struct ring_vm *rv;
	bool quit;
	uint32_t times;
	pthread_t thread;
};

/* A real-time thread that takes the CPU away from a thread that runs a vCPU. */
struct ring_vm_preempter {
	sem_t wanted;
	/* How often it got the CPU; whether it has it; whether to keep it. */
	uint32_t times;
	bool has_cpu;
	bool held;
	bool quit;
	/* Keep it for at most so many ms; 0: until ring_vm_go_on(). */
	unsigned int limit;
	/* The CPUs that the calling thread gets back. */
	cpu_set_t cpus;
	pthread_t thread;
};

/*
 * Store, in the guest, to memory that may not be there: KVM then emulates the
 * store, which on arm64 works for simple instructions only.
 */
static inline void guest_store(uint64_t *addr, uint64_t value)
{
#ifdef __aarch64__
	asm volatile("str %1, [%0]" : : "r" (addr), "r" (value) : "memory");
#else
	WRITE_ONCE(*addr, value);
#endif
}

static inline uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return timespec_to_ns(now);
}

static inline uint64_t now_s(void)
{
	return now_ns() / 1000000000;
}

/* The smallest ring that KVM accepts, in entries. */
uint32_t ring_vm_min_entries(void);

bool two_dimensional_paging(void);
bool kernel_warned(void);
bool uses_tdp_mmu(void);

struct ring_vm *ring_vm_create(uint32_t entries, uint32_t nr_vcpus,
			       uint64_t pages, uint32_t flags,
			       void (*before_ring)(struct kvm_vm *vm));
struct ring_vm *ring_vm_create_small(uint64_t pages);
void ring_vm_add_vcpu(struct ring_vm *rv);
void ring_vm_set_code(struct ring_vm *rv, uint32_t vcpu, void *code,
		      uint64_t arg);
void vm_set_slot(struct kvm_vm *vm, uint32_t slot, uint64_t gpa, void *mem,
		 size_t size, uint32_t flags);
void ring_vm_set_slot(struct ring_vm *rv, uint64_t gpa, void *mem, size_t size,
		      uint32_t flags);
bool ring_vm_set_steal_time(struct ring_vm *rv, uint32_t vcpu, uint64_t gpa);
void ring_vm_free(struct ring_vm *rv);

struct ring_vm_task *ring_vm_task(struct ring_vm *rv, uint32_t vcpu);
void ring_vm_set_task(struct ring_vm *rv, uint32_t vcpu, uint64_t first,
		      uint64_t count, uint64_t stride);
enum ring_vm_exit ring_vm_run(struct ring_vm *rv, uint32_t vcpu);
void ring_vm_write(struct ring_vm *rv, uint32_t vcpu, uint64_t first,
		   uint64_t count);
void ring_vm_runner_start(struct ring_vm_runner *runner, struct ring_vm *rv,
			  uint32_t vcpu);
void ring_vm_runner_stop(struct ring_vm_runner *runner);
void ring_vm_wait_for_store(uint64_t *page);
void ring_vm_other_slot(struct ring_vm *rv);
void ring_vm_other_slot_start(struct ring_vm_other_slot *other,
			      struct ring_vm *rv);
void ring_vm_other_slot_stop(struct ring_vm_other_slot *other);

void need_two_cpus(cpu_set_t *cpus);
void take_first_cpu(cpu_set_t *cpus, cpu_set_t *first);
void start_real_time(pthread_t *thread, const cpu_set_t *cpus,
		     void *(*fn)(void *data), void *data);
void ring_vm_preempter_start(struct ring_vm_preempter *preempter,
			     struct ring_vm_runner *runner);
void ring_vm_preempter_stop(struct ring_vm_preempter *preempter);
void ring_vm_preempt(struct ring_vm_preempter *preempter, unsigned int limit);
void ring_vm_go_on(struct ring_vm_preempter *preempter);

#ifdef __x86_64__
void ring_vm_write_by_ioctl(struct ring_vm *rv, uint32_t vcpu, uint64_t first,
			    uint64_t count);
#endif

uint32_t ring_vm_harvest(struct ring_vm *rv, uint32_t vcpu, uint32_t max);
uint32_t ring_vm_collect(struct ring_vm *rv);
void ring_vm_collect_all(struct ring_vm *rv);
void ring_vm_forget(struct ring_vm *rv);
void ring_vm_expect(struct ring_vm *rv, uint64_t first, uint64_t count);
void ring_vm_expect_flags(struct ring_vm *rv, uint32_t vcpu, uint32_t first,
			  uint32_t count, uint32_t flags);

long kvm_stat(const char *name);
long ring_vm_stat(struct ring_vm *rv, const char *name);
int vms_of(pid_t pid);

void *map_huge_pages(size_t size, unsigned int shift);

/*
 * File descriptors of a VM, and of a vCPU that holds its VM, for what KVM is to
 * refuse: the functions with a struct kvm_vm would fail an assertion.
 */

/* Bytes of the largest ring */
#define RING_MAX_SIZE		0x100000UL

/*
 * In a vCPU's mapping: first page of the ring, and how many are there before it
 */
#define RING_PAGE		KVM_DIRTY_LOG_PAGE_OFFSET
#ifdef __x86_64__
#define VCPU_MMAP_PAGES		3
#else
#define VCPU_MMAP_PAGES		2
#endif

int kvm_fd_get(void);
int vm_fd_create(void);
int vm_fd_enable(int vm, uint32_t cap, uint64_t size, uint32_t flags);
int vcpu_fd_create(uint32_t ring_pages);
uint8_t *vcpu_fd_try_map(int vcpu, int first, int pages, int prot, int flags);
uint8_t *vcpu_fd_map(int vcpu, int first, int pages, int prot, int flags);

#endif /* SELFTEST_KVM_DIRTY_RING_VM_H */
