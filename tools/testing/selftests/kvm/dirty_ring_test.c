// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test what gets into KVM's dirty ring, and what a reset does
 *
 * Show, one case each, that
 *  - every page a vCPU writes to in a tracked memslot is reported, in order,
 *    once, and again after it was reset, and nothing else is, nor what it only
 *    reads,
 *  - a reset protects the pages it was told to and no others, stops at the
 *    first entry that was not harvested and returns what it reset, and its TLB
 *    flush is done when it returns,
 *  - a vCPU stops, exactly, at the soft limit of its ring, and only that vCPU.
 *
 * What KVM refuses is in dirty_ring_abi_test, what userspace forges in
 * dirty_ring_forged_test.
 */

#define _GNU_SOURCE /* for program_invocation_name and CPU affinity */

#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <sys/mman.h>
#include <time.h>

#include "test_util.h"
#include "kvm_util.h"
#include "dirty_ring_vm.h"
#include "processor.h"
#include "test_cases.h"

/*
 * With a guest: what gets into the ring
 */

#define SLOT_PAGES	4096

static void entries(void)
{
	struct ring_vm *rv = ring_vm_create_small(SLOT_PAGES);
	struct kvm_dirty_gfn *ring = vcpu_dirty_ring(rv->vm, 0);
	uint32_t i;

	ring_vm_expect_flags(rv, 0, 0, rv->entries, 0);

	ring_vm_set_task(rv, 0, 3, 10, 7);
	EXPECT(ring_vm_run(rv, 0), RING_VM_DONE);
	for (i = 0; i < 10; i++) {
		EXPECT(ring[i].slot, RING_VM_SLOT);
		EXPECT(ring[i].offset, 3 + i * 7);
	}
	ring_vm_expect_flags(rv, 0, 0, 10, KVM_DIRTY_GFN_F_DIRTY);
	ring_vm_expect_flags(rv, 0, 10, rv->entries - 10, 0);

	/* Not harvested, thus not reset */
	EXPECT(vm_reset_dirty_rings(rv->vm), 0);
	ring_vm_expect_flags(rv, 0, 0, 10, KVM_DIRTY_GFN_F_DIRTY);

	EXPECT(ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL), 10);
	ring_vm_expect_flags(rv, 0, 0, 10, KVM_DIRTY_GFN_F_RESET);
	EXPECT(vm_reset_dirty_rings(rv->vm), 10);
	ring_vm_expect_flags(rv, 0, 0, rv->entries, 0);
	EXPECT(vm_reset_dirty_rings(rv->vm), 0);

	/* Backwards: ring order is the order of the writes. */
	ring_vm_set_task(rv, 0, 20, 20, -1);
	EXPECT(ring_vm_run(rv, 0), RING_VM_DONE);
	for (i = 0; i < 20; i++)
		EXPECT(ring[10 + i].offset, 20 - i);

	ring_vm_free(rv);
}

static void protected_again(void)
{
	struct ring_vm *rv = ring_vm_create_small(SLOT_PAGES);
	int i;

	ring_vm_write(rv, 0, 100, 30);
	/* Reported and not harvested: not reported twice */
	ring_vm_write(rv, 0, 100, 30);
	EXPECT(ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL), 30);
	/* Harvested and not reset: not reported twice */
	ring_vm_write(rv, 0, 100, 30);
	EXPECT(ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL), 0);
	EXPECT(vm_reset_dirty_rings(rv->vm), 30);
	ring_vm_expect(rv, 100, 30);

	/* Reset: reported again, if written to */
	EXPECT(ring_vm_collect(rv), 0);
	for (i = 0; i < 5; i++) {
		ring_vm_write(rv, 0, 105, 20);
		EXPECT(ring_vm_collect(rv), 20);
		ring_vm_expect(rv, 105, 20);
	}

	/* The rest is protected too, although none of it was rewritten. */
	ring_vm_write(rv, 0, 100, 30);
	EXPECT(ring_vm_collect(rv), 30);
	ring_vm_expect(rv, 100, 30);

	ring_vm_free(rv);
}

static void scattered_pages(void)
{
	static const uint64_t strides[] = { 1, 2, 31, 63, 64, 65, 511, -1, -3 };
	uint32_t i, j, count = 64;
	struct ring_vm *rv;
	uint64_t page;

	/* Distances at which a reset may join pages, or must not */
	rv = ring_vm_create(ring_vm_min_entries(), 1, 64 * 512,
			    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	for (i = 0; i < ARRAY_SIZE(strides); i++) {
		page = (int64_t)strides[i] < 0 ? 1000 : 3;
		ring_vm_set_task(rv, 0, page, count, strides[i]);
		for (j = 0; j < 2; j++) {
			EXPECT(ring_vm_run(rv, 0), RING_VM_DONE);
			EXPECT(ring_vm_collect(rv), count);
		}
		for (j = 0; j < count; j++, page += strides[i]) {
			EXPECT(rv->seen[page], 2);
			EXPECT(rv->order[j], page);
			EXPECT(rv->order[count + j], page);
		}
		ring_vm_forget(rv);
	}

	/* The last page of the slot, and the first */
	ring_vm_set_task(rv, 0, 64 * 512 - 1, 2, -(64 * 512 - 1));
	for (i = 0; i < 2; i++) {
		EXPECT(ring_vm_run(rv, 0), RING_VM_DONE);
		EXPECT(ring_vm_collect(rv), 2);
	}
	EXPECT(rv->seen[0], 2);
	EXPECT(rv->seen[64 * 512 - 1], 2);

	ring_vm_free(rv);
}

static void find_slot(uint32_t slot, uint64_t offset, void *data)
{
	uint64_t *found = data;

	found[0] = slot;
	found[1] = offset;
}

/*
 * A reset protects the pages of its entries, and none in between: those are
 * still dirty, and another write to them is not reported.
 */
static void exact_reset(void)
{
	/* Which pages vCPU 0 writes to, and vCPU 1 */
	static const struct {
		uint64_t stride;
		uint64_t others;
	} patterns[] = {
		{ 4, 2 },	/* Every second page, one half each */
		{ 2, 1 },
		{ 3, 1 },
		{ 31, 1 },
		{ 63, 1 },
		{ 65, 1 },
		{ 511, 1 },
	};
	const uint64_t pages = 512;
	struct ring_vm *rv = ring_vm_create(4096, 2, pages,
					    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	uint32_t count, others;
	uint64_t i, page;

	for (i = 0; i < ARRAY_SIZE(patterns); i++) {
		count = DIV_ROUND_UP(pages, patterns[i].stride);
		others = DIV_ROUND_UP(pages, patterns[i].others);

		/* vCPU 1 does not fault where vCPU 0 has written. */
		ring_vm_set_task(rv, 0, 0, count, patterns[i].stride);
		EXPECT(ring_vm_run(rv, 0), RING_VM_DONE);
		ring_vm_set_task(rv, 1, 0, others, patterns[i].others);
		EXPECT(ring_vm_run(rv, 1), RING_VM_DONE);

		EXPECT(ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL), count);
		EXPECT(vm_reset_dirty_rings(rv->vm), count);
		ring_vm_forget(rv);

		/* Whatever was protected, vCPU 0 faults on it now. */
		ring_vm_set_task(rv, 0, 0, others, patterns[i].others);
		EXPECT(ring_vm_run(rv, 0), RING_VM_DONE);
		ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL);
		for (page = 0; page < pages; page++)
			TEST_ASSERT(rv->seen[page] ==
				    !(page % patterns[i].stride),
				    "Page %lu was reported %u times, every %luth was reset",
				    page, rv->seen[page], patterns[i].stride);

		EXPECT(ring_vm_harvest(rv, 1, DIRTY_RING_HARVEST_ALL),
		       others - count);
		EXPECT(vm_reset_dirty_rings(rv->vm), others);
		ring_vm_forget(rv);
	}
	ring_vm_free(rv);
}

static void enable_manual_protect(struct kvm_vm *vm)
{
	struct kvm_enable_cap cap = {
		.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
		.args[0] = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
	};

	vm_enable_cap(vm, &cap);
}

/*
 * The same with a bitmap and KVM_CLEAR_DIRTY_LOG. Count exits: the bitmap does
 * not show a fault on a page that is still dirty.
 */
static void exact_clear(void)
{
	const uint64_t pages = 4096;
	struct ring_vm *rv = ring_vm_create(0, 1, pages,
					    KVM_MEM_LOG_DIRTY_PAGES,
					    enable_manual_protect);
	uint64_t bitmap[4096 / 64];
	long exits;
	int i;

	ring_vm_set_task(rv, 0, 0, pages / 2, 2);
	EXPECT(ring_vm_run(rv, 0), RING_VM_DONE);
	kvm_vm_get_dirty_log(rv->vm, RING_VM_SLOT, bitmap);
	for (i = 0; i < ARRAY_SIZE(bitmap); i++)
		EXPECT(bitmap[i], 0x5555555555555555);

	memset(bitmap, 0x11, sizeof(bitmap));
	kvm_vm_clear_dirty_log(rv->vm, RING_VM_SLOT, bitmap, 0, pages);
	exits = ring_vm_stat(rv, "exits");
	EXPECT(ring_vm_run(rv, 0), RING_VM_DONE);
	exits = ring_vm_stat(rv, "exits") - exits;

	/* Some are the timer's, and one is the end of the task. */
	printf("# %ld exits, %lu of %lu pages were protected\n", exits,
	       pages / 4, pages / 2);
	TEST_ASSERT(exits < pages * 3 / 8, "Pages that were not cleared were protected, too");

	/* All are reported: cleared pages again, the others still. */
	kvm_vm_get_dirty_log(rv->vm, RING_VM_SLOT, bitmap);
	for (i = 0; i < ARRAY_SIZE(bitmap); i++)
		EXPECT(bitmap[i], 0x5555555555555555);
	ring_vm_free(rv);
}

/* What a vCPU only reads */

#define READ_PAGES	128

static void read_code(uint64_t step)
{
	uint64_t i;

	while (true) {
		for (i = 0; i < READ_PAGES; i++)
			READ_ONCE(*(uint64_t *)(RING_VM_GVA + i * step));
		GUEST_SYNC(0);
	}
}

static uint64_t dirty_pages(struct ring_vm *rv, uint64_t *bitmap)
{
	uint64_t i, n = 0;

	if (rv->entries) {
		ring_vm_forget(rv);
		ring_vm_collect_all(rv);
		for (i = 0; i < READ_PAGES; i++)
			n += rv->seen[i];
		return n;
	}
	kvm_vm_get_dirty_log(rv->vm, RING_VM_SLOT, bitmap);
	for (i = 0; i < READ_PAGES / 64; i++)
		n += __builtin_popcountll(bitmap[i]);
	return n;
}

static void expect_reads_clean(uint32_t entries)
{
	struct ring_vm *rv = ring_vm_create(entries, 2, READ_PAGES,
					    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	size_t page = getpagesize(), size = READ_PAGES * page, i;
	uint64_t bitmap[READ_PAGES / 64];
	int round;

	ring_vm_set_code(rv, 1, read_code, page);
	/* Have the guest's page tables dirty where they would be. */
	ring_vm_write(rv, 0, 0, READ_PAGES);
	EXPECT(dirty_pages(rv, bitmap), READ_PAGES);
	for (round = 0; round < 3; round++) {
		/* Unmap all from the guest; have all mapped writable here. */
		EXPECT(mprotect(rv->mem, size, PROT_READ), 0);
		EXPECT(mprotect(rv->mem, size, PROT_READ | PROT_WRITE), 0);
		for (i = 0; i < size; i += page)
			WRITE_ONCE(rv->mem[i], rv->mem[i]);
		EXPECT(ring_vm_run(rv, 1), RING_VM_DONE);
		EXPECT(dirty_pages(rv, bitmap), 0);

		/* The first write to each is reported nevertheless. */
		ring_vm_write(rv, 0, 3, 40);
		EXPECT(ring_vm_run(rv, 1), RING_VM_DONE);
		EXPECT(dirty_pages(rv, bitmap), 40);
		ring_vm_write(rv, 0, 0, READ_PAGES);
		EXPECT(dirty_pages(rv, bitmap), READ_PAGES);
	}
	ring_vm_free(rv);
}

static void read_ring(void)
{
	expect_reads_clean(ring_vm_min_entries());
}

static void read_bitmap(void)
{
	expect_reads_clean(0);
}

#define SHARED_PAGES	64
#define FRESH_SECONDS	4

static void read_write_code(uint64_t step)
{
	uint64_t i;

	while (true) {
		for (i = 0; i < SHARED_PAGES; i++)
			READ_ONCE(*(uint64_t *)(RING_VM_GVA + i * step));
		GUEST_SYNC(0);
		for (i = 0; i < SHARED_PAGES; i++)
			WRITE_ONCE(*(uint64_t *)(RING_VM_GVA + i * step), i);
		GUEST_SYNC(1);
	}
}

/*
 * vCPU 1 may have pages read-only in its CPU's TLB, from reading them, when vCPU 0 has
 * written to them, and writes to them, too: they are in the ring of vCPU 0 only.
 */
static void shared_pages(void)
{
	struct ring_vm *rv = ring_vm_create(ring_vm_min_entries(), 2, SLOT_PAGES,
					    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	cpu_set_t cpus, cpu[2];
	int round;

	need_two_cpus(&cpus);
	take_first_cpu(&cpus, &cpu[0]);
	take_first_cpu(&cpus, &cpu[1]);
	ring_vm_set_code(rv, 1, read_write_code, getpagesize());

	for (round = 0; round < 10; round++) {
		EXPECT(sched_setaffinity(0, sizeof(cpu[1]), &cpu[1]), 0);
		EXPECT(ring_vm_run(rv, 1), RING_VM_DONE);
		ring_vm_collect_all(rv);

		EXPECT(sched_setaffinity(0, sizeof(cpu[0]), &cpu[0]), 0);
		ring_vm_write(rv, 0, 0, SHARED_PAGES);

		EXPECT(sched_setaffinity(0, sizeof(cpu[1]), &cpu[1]), 0);
		EXPECT(ring_vm_run(rv, 1), RING_VM_DONE);
		EXPECT(ring_vm_harvest(rv, 1, DIRTY_RING_HARVEST_ALL), 0);
		EXPECT(ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL),
		       SHARED_PAGES);
		EXPECT(vm_reset_dirty_rings(rv->vm), SHARED_PAGES);
	}

	ring_vm_free(rv);
}

/*
 * Two vCPUs map pages at the same time, one by reads, the other by writes, which are
 * harvested and reset at once: no page stays writable.
 */
static void fresh_pages(void)
{
	struct ring_vm *rv = ring_vm_create(ring_vm_min_entries(), 2, SLOT_PAGES,
					    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	size_t page = getpagesize(), size = READ_PAGES * page, i;
	struct ring_vm_runner reader, writer;
	uint64_t stop;
	int round;

	ring_vm_set_code(rv, 1, read_code, page);
	ring_vm_runner_start(&reader, rv, 1);

	for (stop = now_s() + FRESH_SECONDS; now_s() < stop; ) {
		ring_vm_set_task(rv, 0, 0, READ_PAGES, 1);
		ring_vm_task(rv, 0)->spin = 1;
		ring_vm_runner_start(&writer, rv, 0);
		for (round = 0; round < 200; round++) {
			/* Unmap them from the guest; have them writable here. */
			if (round % 4 == 0) {
				EXPECT(madvise(rv->mem, size, MADV_DONTNEED),
				       0);
				for (i = 0; i < size; i += page)
					WRITE_ONCE(rv->mem[i], 0);
			}
			ring_vm_collect(rv);
		}
		ring_vm_runner_stop(&writer);
		while (ring_vm_run(rv, 0) == RING_VM_FULL)
			ring_vm_collect(rv);
		ring_vm_collect_all(rv);

		ring_vm_forget(rv);
		ring_vm_write(rv, 0, 0, READ_PAGES);
		ring_vm_collect_all(rv);
		ring_vm_expect(rv, 0, READ_PAGES);
	}

	ring_vm_runner_stop(&reader);
	ring_vm_free(rv);
}

static void many_slots(void)
{
	uint32_t ids[] = { 2, 31, 100, kvm_check_cap(KVM_CAP_NR_MEMSLOTS) - 1 };
	uint32_t i, pages = vm_num_guest_pages(VM_MODE_DEFAULT, 16);
	size_t size = 16UL * getpagesize();
	struct ring_vm *rv = ring_vm_create_small(SLOT_PAGES);
	uint64_t first, offset, found[2];

	for (i = 0; i < ARRAY_SIZE(ids); i++) {
		first = SLOT_PAGES + i * 16;
		offset = (uint64_t)SLOT_PAGES * getpagesize() + i * size;
		vm_userspace_mem_region_add(rv->vm, VM_MEM_SRC_ANONYMOUS,
					    RING_VM_GPA + offset, ids[i], pages,
					    KVM_MEM_LOG_DIRTY_PAGES);
		virt_map(rv->vm, RING_VM_GVA + offset, RING_VM_GPA + offset,
			 pages, 0);
		ring_vm_write(rv, 0, first + i, 1);
		EXPECT(vcpu_harvest_dirty_ring(rv->vm, 0, 9, find_slot, found),
		       1);
		EXPECT(found[0], ids[i]);
		EXPECT(found[1], i);
		EXPECT(vm_reset_dirty_rings(rv->vm), 1);
		ring_vm_write(rv, 0, first, 16);
		EXPECT(vcpu_harvest_dirty_ring(rv->vm, 0, 99, NULL, NULL), 16);
		EXPECT(vm_reset_dirty_rings(rv->vm), 16);
	}

	ring_vm_free(rv);
}

#ifndef __x86_64__
/* What vCPUs write is in their rings only, not in the bitmap. */
static void with_bitmap_vcpus(void)
{
	struct ring_vm *rv = ring_vm_create(ring_vm_min_entries(), 2, 512,
					    KVM_MEM_LOG_DIRTY_PAGES |
					    RING_VM_WITH_BITMAP, NULL);
	uint64_t bitmap[512 / 64];
	int i, round;

	for (round = 0; round < 3; round++) {
		ring_vm_write(rv, 0, 10, 100);
		ring_vm_write(rv, 1, 110, 100);
		memset(bitmap, 0xff, sizeof(bitmap));
		kvm_vm_get_dirty_log(rv->vm, RING_VM_SLOT, bitmap);
		for (i = 0; i < ARRAY_SIZE(bitmap); i++)
			EXPECT(bitmap[i], 0);
		EXPECT(ring_vm_collect(rv), 200);
		ring_vm_expect(rv, 10, 200);
	}
	ring_vm_free(rv);
}
#endif

static void untracked_slot(void)
{
	struct ring_vm *rv = ring_vm_create(ring_vm_min_entries(), 1,
					    SLOT_PAGES, 0, NULL);

	/* More than fit into the ring */
	ring_vm_write(rv, 0, 0, 1000);
	EXPECT(ring_vm_collect(rv), 0);

	/* Switch logging on: whatever is mapped gets protected. */
	vm_mem_region_set_flags(rv->vm, RING_VM_SLOT, KVM_MEM_LOG_DIRTY_PAGES);
	EXPECT(ring_vm_collect(rv), 0);
	ring_vm_write(rv, 0, 950, 100);
	EXPECT(ring_vm_collect(rv), 100);
	ring_vm_expect(rv, 950, 100);

	/* Off, with entries in the ring */
	ring_vm_write(rv, 0, 500, 10);
	vm_mem_region_set_flags(rv->vm, RING_VM_SLOT, 0);
	ring_vm_write(rv, 0, 0, 1000);
	EXPECT(ring_vm_collect(rv), 10);
	ring_vm_expect(rv, 500, 10);
	ring_vm_write(rv, 0, 0, 1000);
	EXPECT(ring_vm_collect(rv), 0);

	/* And on once more */
	vm_mem_region_set_flags(rv->vm, RING_VM_SLOT, KVM_MEM_LOG_DIRTY_PAGES);
	ring_vm_write(rv, 0, 490, 30);
	EXPECT(ring_vm_collect(rv), 30);
	ring_vm_expect(rv, 490, 30);

	ring_vm_free(rv);
}

/* A large memslot, sparsely mapped */
#define SPARSE_PAGES	(64 * 1024)
#define SPARSE_STRIDE	1021

static void sparse_slot(void)
{
	struct ring_vm *rv = ring_vm_create(ring_vm_min_entries(), 1,
					    SPARSE_PAGES, 0, NULL);
	uint32_t round, i, count = SPARSE_PAGES / SPARSE_STRIDE;

	for (round = 0; round < 3; round++) {
		ring_vm_set_task(rv, 0, 5, count, SPARSE_STRIDE);
		EXPECT(ring_vm_run(rv, 0), RING_VM_DONE);
		EXPECT(ring_vm_collect(rv), 0);

		vm_mem_region_set_flags(rv->vm, RING_VM_SLOT,
					KVM_MEM_LOG_DIRTY_PAGES);
		ring_vm_set_task(rv, 0, 5, count, SPARSE_STRIDE);
		EXPECT(ring_vm_run(rv, 0), RING_VM_DONE);
		EXPECT(ring_vm_collect(rv), count);
		for (i = 0; i < count; i++)
			EXPECT(rv->seen[5 + i * SPARSE_STRIDE], 1);
		ring_vm_forget(rv);

		vm_mem_region_set_flags(rv->vm, RING_VM_SLOT, 0);
	}
	ring_vm_free(rv);
}

#ifdef __x86_64__
static void set_tss_and_identity_map(struct kvm_vm *vm)
{
	uint64_t identity_map = 0xfffbc000;

	vm_ioctl(vm, KVM_SET_IDENTITY_MAP_ADDR, &identity_map);
	vm_ioctl(vm, KVM_SET_TSS_ADDR, (void *)0xfffbd000);
}

static void slots_of_kvm(void)
{
	struct ring_vm *rv;

	rv = ring_vm_create(ring_vm_min_entries(), 2, SLOT_PAGES,
			    KVM_MEM_LOG_DIRTY_PAGES, set_tss_and_identity_map);
	EXPECT(ring_vm_collect(rv), 0);
	ring_vm_write(rv, 0, 5, 3);
	ring_vm_write(rv, 1, 8, 3);
	EXPECT(ring_vm_collect(rv), 6);
	ring_vm_expect(rv, 5, 6);

	ring_vm_free(rv);
}

/*
 * The handler runs in real mode, in its own address space. It writes to its
 * second page; KVM saves the guest's state into the last one.
 */
#define SMRAM_GPA	0x1000000
#define SMRAM_PAGES	16
#define SMRAM_SLOT	0x10005
#define SMI_PORT	0xe
#define SMI_DONE	0xfe

static const uint8_t smi_handler[] = {
	0xb0, SMI_DONE,			/* mov $SMI_DONE, %al */
	0x2e, 0xa2, 0x34, 0x12,		/* mov %al, %cs:0x1234 */
	0xe4, SMI_PORT,			/* in $SMI_PORT, %al */
	0x0f, 0xaa,			/* rsm */
};

static void smi_guest(void)
{
	uint64_t apicbase = rdmsr(MSR_IA32_APICBASE);

	wrmsr(MSR_IA32_APICBASE, apicbase | X2APIC_ENABLE);
	while (true)
		wrmsr(APIC_BASE_MSR + (APIC_ICR >> 4),
		      APIC_DEST_SELF | APIC_INT_ASSERT | APIC_DM_SMI);
}

static void smi_mark(uint32_t slot, uint64_t offset, void *data)
{
	uint32_t *seen = data;

	EXPECT(slot, SMRAM_SLOT);
	TEST_ASSERT(offset < SMRAM_PAGES, "Page %#lx is reported but not in the slot", offset);
	seen[offset]++;
}

static void smm_address_space(void)
{
	uint32_t seen[SMRAM_PAGES], n, i;
	struct kvm_regs regs;
	struct kvm_run *run;
	struct kvm_vm *vm;
	uint8_t *smram;
	int round;

	if (!kvm_check_cap(KVM_CAP_X86_SMM))
		test_case_skip("KVM has no SMM");

	vm = vm_create(VM_MODE_DEFAULT, DEFAULT_GUEST_PHY_PAGES, O_RDWR);
	kvm_vm_elf_load(vm, program_invocation_name, 0, 0);
	vm_create_irqchip(vm);
	vm_enable_dirty_ring(vm, ring_vm_min_entries() *
				 sizeof(struct kvm_dirty_gfn));
	vm_vcpu_add_default(vm, 0, smi_guest);
	vcpu_set_cpuid(vm, 0, kvm_get_supported_cpuid());

	vm_userspace_mem_region_add(vm, VM_MEM_SRC_ANONYMOUS, SMRAM_GPA,
				    SMRAM_SLOT, SMRAM_PAGES,
				    KVM_MEM_LOG_DIRTY_PAGES);
	smram = addr_gpa2hva(vm, SMRAM_GPA);
	memcpy(smram + 0x8000, smi_handler, sizeof(smi_handler));
	vcpu_set_msr(vm, 0, MSR_IA32_SMBASE, SMRAM_GPA);

	run = vcpu_state(vm, 0);
	for (round = 0; round < 3; round++) {
		smram[0x1234] = 0;
		vcpu_run(vm, 0);
		vcpu_regs_get(vm, 0, &regs);
		TEST_ASSERT(run->exit_reason == KVM_EXIT_IO &&
			    (regs.rax & 0xff) == SMI_DONE,
			    "Unexpected exit: %s",
			    exit_reason_str(run->exit_reason));
		EXPECT(smram[0x1234], SMI_DONE);

		memset(seen, 0, sizeof(seen));
		n = vcpu_harvest_dirty_ring(vm, 0, DIRTY_RING_HARVEST_ALL,
					    smi_mark, seen);
		/*
		 * Allow for the page of the code: KVM maps for writing what the
		 * guest only reads, if it may. The TDP MMU does so in each
		 * round, since it drops the mappings of an address space that
		 * no vCPU uses.
		 */
		for (i = 0; i < SMRAM_PAGES; i++)
			TEST_ASSERT(!!seen[i] == (i == 1 || i == 15) ||
				    i == 8,
				    "Page %u was reported %u times", i,
				    seen[i]);
		EXPECT(vm_reset_dirty_rings(vm), n);
	}

	kvm_vm_free(vm);
}
#endif

/*
 * Harvest and reset
 */

static void partial_harvest(void)
{
	struct ring_vm *rv = ring_vm_create_small(SLOT_PAGES);

	ring_vm_write(rv, 0, 50, 10);
	EXPECT(ring_vm_harvest(rv, 0, 4), 4);
	EXPECT(vm_reset_dirty_rings(rv->vm), 4);
	ring_vm_expect(rv, 50, 4);
	ring_vm_expect_flags(rv, 0, 0, 4, 0);
	ring_vm_expect_flags(rv, 0, 4, 6, KVM_DIRTY_GFN_F_DIRTY);

	/* The four are protected again, the other six not yet. */
	ring_vm_write(rv, 0, 50, 10);
	EXPECT(ring_vm_harvest(rv, 0, 6), 6);
	ring_vm_expect(rv, 54, 6);
	EXPECT(ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL), 4);
	ring_vm_expect(rv, 50, 4);
	EXPECT(vm_reset_dirty_rings(rv->vm), 10);

	ring_vm_free(rv);
}

static void harvest_with_gap(void)
{
	struct ring_vm *rv = ring_vm_create_small(SLOT_PAGES);
	struct kvm_dirty_gfn *ring = vcpu_dirty_ring(rv->vm, 0);

	ring_vm_write(rv, 0, 0, 6);
	dirty_gfn_set_harvested(&ring[0]);
	dirty_gfn_set_harvested(&ring[1]);
	dirty_gfn_set_harvested(&ring[3]);
	EXPECT(vm_reset_dirty_rings(rv->vm), 2);
	ring_vm_expect_flags(rv, 0, 0, 2, 0);
	ring_vm_expect_flags(rv, 0, 2, 1, KVM_DIRTY_GFN_F_DIRTY);
	ring_vm_expect_flags(rv, 0, 3, 1, KVM_DIRTY_GFN_F_RESET);
	ring_vm_expect_flags(rv, 0, 4, 2, KVM_DIRTY_GFN_F_DIRTY);
	EXPECT(vm_reset_dirty_rings(rv->vm), 0);

	dirty_gfn_set_harvested(&ring[2]);
	EXPECT(vm_reset_dirty_rings(rv->vm), 2);
	dirty_gfn_set_harvested(&ring[4]);
	dirty_gfn_set_harvested(&ring[5]);
	EXPECT(vm_reset_dirty_rings(rv->vm), 2);
	ring_vm_expect_flags(rv, 0, 0, rv->entries, 0);

	ring_vm_free(rv);
}

static void dirty_and_reset_set(void)
{
	struct ring_vm *rv = ring_vm_create_small(SLOT_PAGES);
	struct kvm_dirty_gfn *ring = vcpu_dirty_ring(rv->vm, 0);
	int i, round;

	/* Userspace may leave DIRTY alone when it sets RESET. */
	for (round = 0; round < 3; round++) {
		ring_vm_write(rv, 0, 7, 5);
		for (i = 0; i < 5; i++)
			WRITE_ONCE(ring[round * 5 + i].flags,
				   KVM_DIRTY_GFN_F_MASK);
		EXPECT(vm_reset_dirty_rings(rv->vm), 5);
		ring_vm_expect_flags(rv, 0, 0, rv->entries, 0);
	}

	ring_vm_free(rv);
}

static void several_vcpus(void)
{
	struct ring_vm *rv = ring_vm_create(ring_vm_min_entries(), 4,
					    SLOT_PAGES,
					    KVM_MEM_LOG_DIRTY_PAGES, NULL);

	/* Each vCPU reports into its own ring. */
	ring_vm_write(rv, 0, 0, 3);
	ring_vm_write(rv, 2, 100, 5);
	ring_vm_write(rv, 3, 200, 11);
	ring_vm_expect_flags(rv, 0, 0, 3, KVM_DIRTY_GFN_F_DIRTY);
	ring_vm_expect_flags(rv, 0, 3, rv->entries - 3, 0);
	ring_vm_expect_flags(rv, 1, 0, rv->entries, 0);
	ring_vm_expect_flags(rv, 2, 5, rv->entries - 5, 0);
	ring_vm_expect_flags(rv, 3, 11, rv->entries - 11, 0);

	/* A reset returns the sum, */
	EXPECT(ring_vm_harvest(rv, 2, DIRTY_RING_HARVEST_ALL), 5);
	ring_vm_expect(rv, 100, 5);
	EXPECT(ring_vm_harvest(rv, 3, 7), 7);
	ring_vm_expect(rv, 200, 7);
	EXPECT(vm_reset_dirty_rings(rv->vm), 12);
	/* and a ring that is not harvested holds up no other. */
	EXPECT(ring_vm_harvest(rv, 3, DIRTY_RING_HARVEST_ALL), 4);
	ring_vm_expect(rv, 207, 4);
	EXPECT(ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL), 3);
	ring_vm_expect(rv, 0, 3);
	EXPECT(vm_reset_dirty_rings(rv->vm), 7);

	/* A page that another vCPU reported is in one ring only. */
	ring_vm_write(rv, 0, 300, 8);
	ring_vm_write(rv, 1, 300, 8);
	EXPECT(ring_vm_harvest(rv, 1, DIRTY_RING_HARVEST_ALL), 0);
	EXPECT(ring_vm_collect(rv), 8);
	ring_vm_expect(rv, 300, 8);
	/* After the reset, the first to write reports it. */
	ring_vm_write(rv, 1, 300, 8);
	EXPECT(ring_vm_harvest(rv, 1, DIRTY_RING_HARVEST_ALL), 8);
	EXPECT(vm_reset_dirty_rings(rv->vm), 8);

	ring_vm_free(rv);
}

#ifdef __x86_64__
/* vCPUs in different modes, for which KVM has page tables of their own */
static void several_roots(void)
{
	struct ring_vm *rv = ring_vm_create(ring_vm_min_entries(), 2,
					    SLOT_PAGES,
					    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	struct kvm_sregs sregs;
	int round;

	vcpu_sregs_get(rv->vm, 1, &sregs);
	sregs.cr0 ^= X86_CR0_WP;
	vcpu_sregs_set(rv->vm, 1, &sregs);

	for (round = 0; round < 3; round++) {
		ring_vm_write(rv, 0, 100, 8);
		ring_vm_write(rv, 1, 100, 8);
		EXPECT(ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL), 8);
		ring_vm_expect(rv, 100, 8);
		EXPECT(ring_vm_harvest(rv, 1, DIRTY_RING_HARVEST_ALL), 8);
		ring_vm_expect(rv, 100, 8);
		EXPECT(vm_reset_dirty_rings(rv->vm), 16);
	}

	ring_vm_free(rv);
}
#endif

static void wrap_around(void)
{
	struct ring_vm *rv = ring_vm_create_small(SLOT_PAGES);
	struct kvm_dirty_gfn *ring = vcpu_dirty_ring(rv->vm, 0);
	uint32_t i, pos = 0, batch = 37, page = 0;

	while (pos < 7 * rv->entries) {
		ring_vm_write(rv, 0, page, batch);
		for (i = 0; i < batch; i++)
			EXPECT(ring[(pos + i) % rv->entries].offset, page + i);
		ring_vm_expect_flags(rv, 0, pos, batch, KVM_DIRTY_GFN_F_DIRTY);
		ring_vm_expect_flags(rv, 0, pos + batch, rv->entries - batch,
				     0);
		EXPECT(ring_vm_collect(rv), batch);
		ring_vm_expect(rv, page, batch);
		pos += batch;
		page = (page + 29) % (SLOT_PAGES - batch);
	}

	ring_vm_free(rv);
}

static void soft_limit(void)
{
	struct ring_vm *rv = ring_vm_create_small(SLOT_PAGES);
	uint32_t i, limit = rv->limit;

	/* One entry less than the limit: the vCPU runs. */
	ring_vm_write(rv, 0, 0, limit - 1);
	EXPECT(vm_reset_dirty_rings(rv->vm), 0);

	/* The next write takes the last entry; its store has to wait. */
	ring_vm_set_task(rv, 0, limit - 1, 2, 1);
	for (i = 0; i < 5; i++) {
		EXPECT(ring_vm_run(rv, 0), RING_VM_FULL);
		ring_vm_expect_flags(rv, 0, 0, limit, KVM_DIRTY_GFN_F_DIRTY);
		ring_vm_expect_flags(rv, 0, limit, rv->entries - limit, 0);
	}

	/* Harvesting makes no room, */
	EXPECT(ring_vm_harvest(rv, 0, 1), 1);
	EXPECT(ring_vm_run(rv, 0), RING_VM_FULL);
	/* a reset does, even of one entry: for one more page. */
	EXPECT(vm_reset_dirty_rings(rv->vm), 1);
	EXPECT(ring_vm_run(rv, 0), RING_VM_FULL);
	ring_vm_expect_flags(rv, 0, 1, limit, KVM_DIRTY_GFN_F_DIRTY);
	ring_vm_expect_flags(rv, 0, limit + 1, rv->entries - limit, 0);
	EXPECT(*(uint64_t *)(rv->mem + (limit - 1) * getpagesize()), limit);

	/* With an empty ring the last store faults once more, and is done. */
	EXPECT(ring_vm_harvest(rv, 0, DIRTY_RING_HARVEST_ALL), limit);
	ring_vm_expect(rv, 0, limit + 1);
	EXPECT(vm_reset_dirty_rings(rv->vm), limit);
	EXPECT(ring_vm_run(rv, 0), RING_VM_DONE);
	EXPECT(*(uint64_t *)(rv->mem + limit * getpagesize()), limit + 1);
	EXPECT(ring_vm_collect(rv), 1);
	ring_vm_expect(rv, limit, 1);

	/*
	 * The same anywhere in the ring; not if the CPU logs pages, since the
	 * vCPU then stops when that log is full, see pml_test.
	 */
	for (i = 0; i < 3 && !dirty_ring_cpu_logs_pages(); i++) {
		ring_vm_set_task(rv, 0, 0, limit + 10, 1);
		EXPECT(ring_vm_run(rv, 0), RING_VM_FULL);
		EXPECT(ring_vm_collect(rv), limit);
		EXPECT(ring_vm_run(rv, 0), RING_VM_DONE);
		/* The page of the store that waited is reported twice. */
		EXPECT(ring_vm_collect(rv), 11);
	}
	ring_vm_free(rv);

	/*
	 * The same in the biggest ring; without the pages that have been
	 * written, as with 64 KiB each they would be 4 GiB.
	 */
	rv = ring_vm_create(RING_MAX_SIZE / sizeof(struct kvm_dirty_gfn), 1,
			    RING_MAX_SIZE / sizeof(struct kvm_dirty_gfn),
			    KVM_MEM_LOG_DIRTY_PAGES, NULL);
	for (i = 0; i < rv->pages - SLOT_PAGES; i += SLOT_PAGES) {
		ring_vm_write(rv, 0, i, SLOT_PAGES);
		EXPECT(madvise(rv->mem + (uint64_t)i * getpagesize(),
			       SLOT_PAGES * getpagesize(), MADV_DONTNEED), 0);
	}
	ring_vm_set_task(rv, 0, i, SLOT_PAGES, 1);
	EXPECT(ring_vm_run(rv, 0), RING_VM_FULL);
	EXPECT(ring_vm_collect(rv), rv->limit);
	ring_vm_expect(rv, 0, rv->limit);
	ring_vm_free(rv);
}

static void only_one_is_full(void)
{
	uint32_t entries = ring_vm_min_entries();
	struct ring_vm *rv = ring_vm_create(entries, 2, 2 * entries,
					    KVM_MEM_LOG_DIRTY_PAGES, NULL);

	ring_vm_set_task(rv, 0, 0, rv->limit + 1, 1);
	EXPECT(ring_vm_run(rv, 0), RING_VM_FULL);
	ring_vm_write(rv, 1, entries, rv->limit - 1);
	EXPECT(ring_vm_run(rv, 0), RING_VM_FULL);

	/* A reset of the other ring does not help. */
	EXPECT(ring_vm_harvest(rv, 1, DIRTY_RING_HARVEST_ALL), rv->limit - 1);
	EXPECT(vm_reset_dirty_rings(rv->vm), rv->limit - 1);
	EXPECT(ring_vm_run(rv, 0), RING_VM_FULL);

	EXPECT(ring_vm_collect(rv), rv->limit);
	EXPECT(ring_vm_run(rv, 0), RING_VM_DONE);

	ring_vm_free(rv);
}

/*
 * A reset while the vCPU runs
 */

#define FLUSH_ROUNDS		2000
#define FLUSH_MIN_ROUNDS	50
#define FLUSH_SECONDS		20

static struct {
	struct ring_vm *rv;
	cpu_set_t cpus;
	sem_t go;
	sem_t done;
	bool quit;
} spinner;

static void *spin_vcpu(void *unused)
{
	TEST_ASSERT(!sched_setaffinity(0, sizeof(spinner.cpus), &spinner.cpus),
		    "sched_setaffinity: %s", strerror(errno));

	while (true) {
		sem_wait(&spinner.go);
		if (spinner.quit)
			return NULL;
		EXPECT(ring_vm_run(spinner.rv, 0), RING_VM_DONE);
		sem_post(&spinner.done);
	}
}

/*
 * Have a vCPU write to one page all the time, on a CPU of its own, and leave
 * the guest only to report it. Once a reset has returned, the page must be in
 * the ring before the next write can be seen. With a stale TLB entry, writes
 * are seen and the ring is empty.
 */
static void tlb_flush(void)
{
	struct ring_vm_task *task;
	struct timespec start;
	pthread_t thread;
	struct ring_vm *rv;
	cpu_set_t cpus;
	uint64_t *page;
	bool log;
	int i;

	need_two_cpus(&cpus);

	/* One CPU for the vCPU, the others for the resets */
	take_first_cpu(&cpus, &spinner.cpus);
	sched_setaffinity(0, sizeof(cpus), &cpus);

	rv = ring_vm_create_small(SLOT_PAGES);
	spinner.rv = rv;
	sem_init(&spinner.go, 0, 0);
	sem_init(&spinner.done, 0, 0);
	pthread_create(&thread, NULL, spin_vcpu, NULL);

	page = (uint64_t *)(rv->mem + 77 * getpagesize());
	task = ring_vm_task(rv, 0);
	ring_vm_set_task(rv, 0, 77, 1, 0);
	WRITE_ONCE(task->spin, 1);
	sem_post(&spinner.go);

	log = dirty_ring_cpu_logs_pages();
	ring_vm_wait_for_store(page);
	clock_gettime(CLOCK_MONOTONIC, &start);
	for (i = 0; i < FLUSH_ROUNDS; i++) {
		/* Do fewer rounds where emulation is slow. */
		if (i >= FLUSH_MIN_ROUNDS &&
		    timespec_diff_now(start).tv_sec >= FLUSH_SECONDS)
			break;

		EXPECT(ring_vm_collect(rv), 1);
		ring_vm_wait_for_store(page);
		if (!log)
			continue;

		/*
		 * If the CPU logs pages, the page is in the ring only after the
		 * next exit. Have the guest make it: a kick would flush the
		 * TLB.
		 */
		WRITE_ONCE(task->spin, 0);
		sem_wait(&spinner.done);
		WRITE_ONCE(task->spin, 1);
		sem_post(&spinner.go);
	}
	EXPECT(ring_vm_collect(rv), 1);
	EXPECT(rv->seen[77], i + 1);
	printf("# %d resets\n", i + 1);

	WRITE_ONCE(task->spin, 0);
	sem_wait(&spinner.done);
	spinner.quit = true;
	sem_post(&spinner.go);
	pthread_join(thread, NULL);
	ring_vm_free(rv);
}

static const struct test_case cases[] = {
	{ "entries: order, fields, states", entries },
	{ "protected-again: by a reset, not before", protected_again },
	{ "scattered-pages", scattered_pages },
	{ "exact-reset: protects no page in between", exact_reset },
	{ "exact-clear: nor does it with a bitmap", exact_clear },
	{ "read-ring: what is only read is not reported", read_ring },
	{ "read-bitmap: nor is it with a bitmap", read_bitmap },
	{ "many-slots", many_slots },
#ifndef __x86_64__
	{ "with-bitmap-vcpus: no page of theirs is in it", with_bitmap_vcpus },
#endif
	{ "untracked-slot: nothing is reported", untracked_slot },
	{ "sparse-slot: tracked from when logging is on until it is off",
	  sparse_slot },
#ifdef __x86_64__
	{ "slots-of-kvm: not tracked", slots_of_kvm },
	{ "smm: an address space of its own", smm_address_space },
#endif
	{ "partial-harvest", partial_harvest },
	{ "gap: a reset stops at an entry not harvested", harvest_with_gap },
	{ "dirty-and-reset: counts as harvested", dirty_and_reset_set },
	{ "several-vcpus: a ring each, a reset returns the sum",
	  several_vcpus },
#ifdef __x86_64__
	{ "several-roots: a reset protects a page for all vCPUs", several_roots },
#endif
	{ "shared-pages: in the ring of the first to write", shared_pages },
	{ "fresh-pages: mapped by reads and writes at once, and reset",
	  fresh_pages },
	{ "wrap-around", wrap_around },
	{ "soft-limit: exact", soft_limit },
	{ "only-one-full: the other vCPU runs", only_one_is_full },
	{ "tlb-flush: done when a reset returns", tlb_flush },
};

int main(int argc, char **argv)
{
	dirty_ring_check_supported();
	test_cases_main(argc, argv, cases, ARRAY_SIZE(cases));
}
