/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A VM for tests of the dirty ring: its vCPUs write to the pages they are told
 * to, and to nothing else in the one memslot that is tracked.
 */
#ifndef SELFTEST_KVM_DIRTY_RING_VM_H
#define SELFTEST_KVM_DIRTY_RING_VM_H

#include <linux/bits.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>

#include "dirty_ring.h"

#define RING_VM_MAX_VCPUS	8
#define RING_VM_SLOT		1
#define RING_VM_GPA		0x40000000UL
#define RING_VM_GVA		0xc0000000UL

/*
 * With the flags of the memslot: dirty pages that no vCPU writes go to a
 * bitmap, on an architecture that has this.
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
} __aligned(64);	/* Within a page, whatever the array's address. */

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
 * A thread that runs a vCPU until it is told to stop, and counts the times the
 * vCPU came back to userspace.
 */
struct ring_vm_runner {
	struct ring_vm *rv;
	uint32_t vcpu;
	bool quit;
	uint32_t exits;
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
	/* For how long at most, in ms; 0 means until it is to go on. */
	unsigned int limit;
	/* The CPUs the calling thread may run on, before and after. */
	cpu_set_t cpus;
	pthread_t thread;
};

/*
 * A store of the guest, to memory that may not be there: then KVM has to know
 * what is stored, and on arm64 the CPU tells it for simple instructions only.
 */
static inline void guest_store(uint64_t *addr, uint64_t value)
{
#ifdef __aarch64__
	asm volatile("str %1, [%0]" : : "r" (addr), "r" (value) : "memory");
#else
	WRITE_ONCE(*addr, value);
#endif
}

/* The smallest ring that KVM accepts, in entries. */
uint32_t ring_vm_min_entries(void);

struct ring_vm *ring_vm_create(uint32_t entries, uint32_t nr_vcpus,
			       uint64_t pages, uint32_t flags,
			       void (*before_ring)(struct kvm_vm *vm));
void ring_vm_add_vcpu(struct ring_vm *rv);
void ring_vm_set_code(struct ring_vm *rv, uint32_t vcpu, void *code,
		      uint64_t arg);
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

int vms_of(pid_t pid);

#endif /* SELFTEST_KVM_DIRTY_RING_VM_H */
