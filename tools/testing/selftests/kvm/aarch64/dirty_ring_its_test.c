// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test that no page is lost that KVM writes for a GIC's ITS
 *
 * An ITS keeps its tables to itself until userspace has them saved to guest
 * memory; and it reads and clears bits of pending tables there. Nobody need run
 * a vCPU for that. Show, one case each, that such a page is
 *  - in the memslot's bitmap, and in no ring, with
 *    KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP,
 *  - in a ring without that, if need be after there is room in one,
 *  - in the ring of the vCPU that makes the ITS write it, with or without.
 */

#include <linux/bits.h>
#include <linux/sizes.h>
#include <sys/ioctl.h>

#include "test_util.h"
#include "kvm_util.h"
#include "dirty_ring_vm.h"
#include "processor.h"
#include "test_cases.h"

/* Guest addresses, none of them in a memslot */
#define GICD_GPA		0x08000000UL
#define ITS_GPA			0x08080000UL
#define GICR_GPA		0x080c0000UL

#define GICR_CTLR		0x0000
#define GICR_PROPBASER		0x0070
#define GICR_PENDBASER		0x0078
#define GICR_CTLR_ENABLE_LPIS	BIT(0)

#define GITS_CTLR		0x0000
#define GITS_CBASER		0x0080
#define GITS_CWRITER		0x0088
#define GITS_BASER0		0x0100
#define GITS_BASER1		0x0108
#define GITS_TRANSLATER		0x10040
#define GITS_CTLR_ENABLE	BIT(0)
#define GITS_VALID		BIT_ULL(63)

#define CMD_MAPD		0x08
#define CMD_MAPC		0x09
#define CMD_MAPTI		0x0a
#define CMD_BYTES		32
#define ENTRY_BYTES		8

/*
 * The first pages of the tracked memslot. Tables of KVM's ITS have pages of 64
 * KiB, whatever the host's pages are.
 */
enum {
	QUEUE		= 0 * SZ_64K,
	DEVICES		= 1 * SZ_64K,
	COLLECTIONS	= 2 * SZ_64K,
	ITT_A		= 3 * SZ_64K,
	ITT_B		= 4 * SZ_64K,
	PROPERTIES	= 5 * SZ_64K,
	PENDING		= 6 * SZ_64K,	/* a vCPU */
	TABLES_END	= 8 * SZ_64K,
};

/* Two devices with three LPIs, as far apart in all tables as possible */
#define DEV_A			0x10
#define DEV_B			0x1fff
#define EVENT_BITS		10
#define EVENT_A_FAR		1000
#define LPI_A			8192
#define LPI_A_FAR		65535
#define LPI_B			8193

struct its_vm {
	struct ring_vm *rv;
	uint32_t nr_vcpus;
	bool with_bitmap;
	int gic;
	int its;
	uint64_t cwriter;
	/* Pages of the memslot that must be reported */
	bool *want;
};

/* In pages of the host */
static uint64_t page_at(uint64_t bytes)
{
	return bytes / getpagesize();
}

/*
 * The GIC
 */

static int create_device(struct kvm_vm *vm, uint32_t type)
{
	struct kvm_create_device device = { .type = type };

	if (ioctl(vm_get_fd(vm), KVM_CREATE_DEVICE, &device)) {
		TEST_ASSERT(errno == ENODEV, "KVM_CREATE_DEVICE: %s",
			    strerror(errno));
		test_case_skip("the host has no GICv3");
	}
	return device.fd;
}

static void device_set(int fd, uint32_t group, uint64_t attr, void *value)
{
	struct kvm_device_attr args = {
		.group = group,
		.attr = attr,
		.addr = (uintptr_t)value,
	};

	TEST_ASSERT(!ioctl(fd, KVM_SET_DEVICE_ATTR, &args),
		    "KVM_SET_DEVICE_ATTR %u %#lx: %s", group, attr,
		    strerror(errno));
}

static void device_set_addr(int fd, uint64_t attr, uint64_t gpa)
{
	device_set(fd, KVM_DEV_ARM_VGIC_GRP_ADDR, attr, &gpa);
}

static void device_ctrl(int fd, uint64_t attr)
{
	device_set(fd, KVM_DEV_ARM_VGIC_GRP_CTRL, attr, NULL);
}

static void set_redist(struct its_vm *v, uint32_t vcpu, uint32_t offset,
		       uint32_t value)
{
	/* The affinity of vCPU 0 is 0.0.0.0, and that of vCPU 1 is 0.0.0.1. */
	device_set(v->gic, KVM_DEV_ARM_VGIC_GRP_REDIST_REGS,
		   (uint64_t)vcpu << 32 | offset, &value);
}

static void set_redist_64(struct its_vm *v, uint32_t vcpu, uint32_t offset,
			  uint64_t value)
{
	set_redist(v, vcpu, offset, value);
	set_redist(v, vcpu, offset + 4, value >> 32);
}

static void set_its(struct its_vm *v, uint64_t offset, uint64_t value)
{
	device_set(v->its, KVM_DEV_ARM_VGIC_GRP_ITS_REGS, offset, &value);
}

/* Put a command into the queue, for a write to GITS_CWRITER. */
static void queue_command(struct its_vm *v, uint64_t dw0, uint64_t dw1,
			  uint64_t dw2)
{
	uint64_t *command = (void *)(v->rv->mem + QUEUE + v->cwriter);

	command[0] = dw0;
	command[1] = dw1;
	command[2] = dw2;
	command[3] = 0;
	v->cwriter += CMD_BYTES;
	TEST_ASSERT(v->cwriter < SZ_4K, "The command queue is full");
}

static void map_device(struct its_vm *v, uint64_t device, uint64_t itt)
{
	queue_command(v, device << 32 | CMD_MAPD, EVENT_BITS - 1,
		      GITS_VALID | (RING_VM_GPA + itt));
}

static void unmap_device(struct its_vm *v, uint64_t device)
{
	queue_command(v, device << 32 | CMD_MAPD, 0, 0);
}

static void map_collection(struct its_vm *v, uint64_t collection,
			   uint64_t vcpu)
{
	queue_command(v, CMD_MAPC, 0, GITS_VALID | vcpu << 16 | collection);
}

static void map_event(struct its_vm *v, uint64_t device, uint64_t event,
		      uint64_t lpi, uint64_t collection)
{
	queue_command(v, device << 32 | CMD_MAPTI, lpi << 32 | event,
		      collection);
}

static void run_commands(struct its_vm *v)
{
	set_its(v, GITS_CWRITER, v->cwriter);
}

static void set_tables(struct its_vm *v)
{
	set_its(v, GITS_CBASER, GITS_VALID | (RING_VM_GPA + QUEUE));
	set_its(v, GITS_BASER0, GITS_VALID | (RING_VM_GPA + DEVICES));
	set_its(v, GITS_BASER1, GITS_VALID | (RING_VM_GPA + COLLECTIONS));
	v->cwriter = 0;
}

static void save_tables(struct its_vm *v)
{
	device_ctrl(v->its, KVM_DEV_ARM_ITS_SAVE_TABLES);
}

static void signal_event(struct its_vm *v, uint32_t device, uint32_t event)
{
	struct kvm_msi msi = {
		.address_lo = ITS_GPA + GITS_TRANSLATER,
		.data = event,
		.flags = KVM_MSI_VALID_DEVID,
		.devid = device,
	};

	EXPECT(ioctl(vm_get_fd(v->rv->vm), KVM_SIGNAL_MSI, &msi), 1);
}

/* The byte and the bit of an LPI in the pending table of a vCPU */
static uint64_t pending_byte(uint32_t vcpu, uint32_t lpi)
{
	return PENDING + vcpu * SZ_64K + lpi / 8;
}

static bool is_pending(struct its_vm *v, uint32_t vcpu, uint32_t lpi)
{
	return v->rv->mem[pending_byte(vcpu, lpi)] & 1 << lpi % 8;
}

static void set_pending(struct its_vm *v, uint32_t vcpu, uint32_t lpi)
{
	v->rv->mem[pending_byte(vcpu, lpi)] |= 1 << lpi % 8;
}

/* The vCPU that gets LPI_A_FAR; vCPU 0 gets the others. */
static uint32_t far_vcpu(struct its_vm *v)
{
	return v->nr_vcpus - 1;
}

static struct its_vm *its_vm_create(uint32_t nr_vcpus, uint64_t more_pages,
				    bool with_bitmap)
{
	struct its_vm *v = calloc(1, sizeof(*v));
	uint32_t i, flags = KVM_MEM_LOG_DIRTY_PAGES;
	struct ring_vm *rv;

	TEST_ASSERT(v, "Insufficient Memory");
	if (with_bitmap)
		flags |= RING_VM_WITH_BITMAP;
	rv = ring_vm_create(ring_vm_min_entries(), nr_vcpus,
			    page_at(TABLES_END) + more_pages, flags, NULL);
	v->rv = rv;
	v->nr_vcpus = nr_vcpus;
	v->with_bitmap = with_bitmap;
	v->want = calloc(rv->pages, sizeof(*v->want));
	TEST_ASSERT(v->want, "Insufficient Memory");

	v->gic = create_device(rv->vm, KVM_DEV_TYPE_ARM_VGIC_V3);
	device_set_addr(v->gic, KVM_VGIC_V3_ADDR_TYPE_DIST, GICD_GPA);
	device_set_addr(v->gic, KVM_VGIC_V3_ADDR_TYPE_REDIST, GICR_GPA);
	device_ctrl(v->gic, KVM_DEV_ARM_VGIC_CTRL_INIT);
	v->its = create_device(rv->vm, KVM_DEV_TYPE_ARM_VGIC_ITS);
	device_set_addr(v->its, KVM_VGIC_ITS_ADDR_TYPE, ITS_GPA);
	device_ctrl(v->its, KVM_DEV_ARM_VGIC_CTRL_INIT);
	virt_map(rv->vm, ITS_GPA, ITS_GPA, SZ_128K / vm_get_page_size(rv->vm),
		 0);

	/* 16 bits for an LPI; leave all of them disabled. */
	set_redist_64(v, 0, GICR_PROPBASER, (RING_VM_GPA + PROPERTIES) | 15);
	for (i = 0; i < nr_vcpus; i++) {
		set_redist_64(v, i, GICR_PENDBASER,
			      RING_VM_GPA + PENDING + i * SZ_64K);
		set_redist(v, i, GICR_CTLR, GICR_CTLR_ENABLE_LPIS);
	}

	set_tables(v);
	set_its(v, GITS_CTLR, GITS_CTLR_ENABLE);
	map_collection(v, 0, 0);
	map_collection(v, 1, far_vcpu(v));
	map_device(v, DEV_A, ITT_A);
	map_device(v, DEV_B, ITT_B);
	map_event(v, DEV_A, 0, LPI_A, 0);
	map_event(v, DEV_A, EVENT_A_FAR, LPI_A_FAR, 1);
	map_event(v, DEV_B, 0, LPI_B, 0);
	run_commands(v);

	/* They have run; take what they wrote out of the log. */
	for (i = 0; i < nr_vcpus; i++)
		ring_vm_write(rv, i, page_at(TABLES_END) + i, 1);
	ring_vm_collect_all(rv);
	ring_vm_forget(rv);
	return v;
}

static void its_vm_free(struct its_vm *v)
{
	close(v->its);
	close(v->gic);
	ring_vm_free(v->rv);
	free(v->want);
	free(v);
}

/*
 * What is reported
 */

static void want(struct its_vm *v, uint64_t byte)
{
	v->want[page_at(byte)] = true;
}

static void want_nothing(struct its_vm *v)
{
	memset(v->want, 0, v->rv->pages * sizeof(*v->want));
}

/* Each table has an entry that was saved, and the device tables two. */
static void want_saved_tables(struct its_vm *v)
{
	want(v, DEVICES + DEV_A * ENTRY_BYTES);
	want(v, DEVICES + DEV_B * ENTRY_BYTES);
	want(v, ITT_A);
	want(v, ITT_A + EVENT_A_FAR * ENTRY_BYTES);
	want(v, ITT_B);
	want(v, COLLECTIONS);
}

/* Expect exactly what is wanted in the bitmap, and nothing after that. */
static void expect_bitmap(struct its_vm *v)
{
	uint64_t bytes = DIV_ROUND_UP(v->rv->pages, 64) * 8, page;
	uint64_t *bitmap = malloc(bytes);
	bool in;

	TEST_ASSERT(bitmap, "Insufficient Memory");
	memset(bitmap, 0xff, bytes);
	kvm_vm_get_dirty_log(v->rv->vm, RING_VM_SLOT, bitmap);
	for (page = 0; page < v->rv->pages; page++) {
		in = bitmap[page / 64] >> page % 64 & 1;
		TEST_ASSERT(in == v->want[page], "Page %lu is %sin the bitmap",
			    page, in ? "" : "not ");
	}
	free(bitmap);
	want_nothing(v);
}

/* Expect that exactly what is wanted was harvested, at least once. */
static void expect_harvested(struct its_vm *v)
{
	uint64_t page;

	for (page = 0; page < v->rv->pages; page++)
		TEST_ASSERT(!!v->rv->seen[page] == v->want[page],
			    "Page %lu was reported %u times", page,
			    v->rv->seen[page]);
	ring_vm_forget(v->rv);
	want_nothing(v);
}

/* Expect it in the bitmap if there is one, else in the rings. */
static void expect_reported(struct its_vm *v)
{
	if (v->with_bitmap)
		expect_bitmap(v);
	EXPECT(ioctl(vm_get_fd(v->rv->vm), KVM_SYNC_DIRTY_RINGS, 0), 0);
	ring_vm_collect(v->rv);
	expect_harvested(v);
}

/*
 * The cases
 */

static void saved_tables(bool with_bitmap)
{
	struct its_vm *v = its_vm_create(2, 100, with_bitmap);
	uint64_t *entry;
	int i;

	expect_reported(v);
	/* Twice: what was reported must be reported again. */
	for (i = 0; i < 2; i++) {
		save_tables(v);
		want_saved_tables(v);
		expect_reported(v);
	}
	entry = (void *)(v->rv->mem + DEVICES + DEV_B * ENTRY_BYTES);
	TEST_ASSERT(*entry & GITS_VALID, "The tables were not saved");

	/* Pages of vCPUs, meanwhile, are in the rings only. */
	ring_vm_write(v->rv, 0, page_at(TABLES_END), 50);
	save_tables(v);
	ring_vm_write(v->rv, 1, page_at(TABLES_END) + 50, 50);
	want_saved_tables(v);
	if (with_bitmap)
		expect_bitmap(v);
	for (i = 0; i < 100; i++)
		want(v, TABLES_END + i * getpagesize());
	ring_vm_collect(v->rv);
	expect_harvested(v);
	its_vm_free(v);
}

static void tables_bitmap(void)
{
	saved_tables(true);
}

static void tables_ring(void)
{
	saved_tables(false);
}

static void saved_pending(bool with_bitmap)
{
	struct its_vm *v = its_vm_create(2, 2, with_bitmap);

	signal_event(v, DEV_A, 0);
	signal_event(v, DEV_A, EVENT_A_FAR);
	expect_reported(v);

	device_ctrl(v->gic, KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES);
	want(v, pending_byte(0, LPI_A));
	want(v, pending_byte(1, LPI_A_FAR));
	expect_reported(v);
	EXPECT(is_pending(v, 0, LPI_A), true);
	EXPECT(is_pending(v, 0, LPI_B), false);
	EXPECT(is_pending(v, 1, LPI_A_FAR), true);

	/* KVM writes only what changes: the page of vCPU 0 */
	signal_event(v, DEV_B, 0);
	device_ctrl(v->gic, KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES);
	want(v, pending_byte(0, LPI_B));
	expect_reported(v);
	EXPECT(is_pending(v, 0, LPI_B), true);
	its_vm_free(v);
}

static void pending_bitmap(void)
{
	saved_pending(true);
}

static void pending_ring(void)
{
	saved_pending(false);
}

static void restored(bool with_bitmap)
{
	struct its_vm *v = its_vm_create(2, 2, with_bitmap);

	save_tables(v);
	want_saved_tables(v);
	expect_reported(v);

	/* Once the LPIs are back, KVM clears their pending bits. */
	device_ctrl(v->its, KVM_DEV_ARM_ITS_CTRL_RESET);
	set_pending(v, 1, LPI_A_FAR);
	set_tables(v);
	expect_reported(v);
	device_ctrl(v->its, KVM_DEV_ARM_ITS_RESTORE_TABLES);
	want(v, pending_byte(1, LPI_A_FAR));
	expect_reported(v);
	EXPECT(is_pending(v, 1, LPI_A_FAR), false);
	its_vm_free(v);
}

static void restore_bitmap(void)
{
	restored(true);
}

static void restore_ring(void)
{
	restored(false);
}

/* Fill the rings first: the pages are in the overflow until there is room. */
static void tables_overflow(void)
{
	uint64_t fill = ring_vm_min_entries(), page;
	struct its_vm *v = its_vm_create(1, fill, false);
	struct ring_vm *rv = v->rv;

	ring_vm_set_task(rv, 0, page_at(TABLES_END), fill, 1);
	EXPECT(ring_vm_run(rv, 0), RING_VM_FULL);
	save_tables(v);
	TEST_ASSERT(ioctl(vm_get_fd(rv->vm), KVM_SYNC_DIRTY_RINGS, 0) == -1 &&
		    errno == ENOSPC, "Nothing is in the overflow");

	EXPECT(ring_vm_collect(rv), rv->limit);
	for (page = 0; page < page_at(TABLES_END); page++)
		EXPECT(rv->seen[page], 0);
	ring_vm_forget(rv);

	EXPECT(ioctl(vm_get_fd(rv->vm), KVM_SYNC_DIRTY_RINGS, 0), 0);
	ring_vm_collect(rv);
	want_saved_tables(v);
	expect_harvested(v);

	/* The vCPU goes on with the store that it stopped at. */
	EXPECT(ring_vm_run(rv, 0), RING_VM_DONE);
	for (page = rv->limit - 1; page < fill; page++)
		want(v, TABLES_END + page * getpagesize());
	ring_vm_collect(rv);
	expect_harvested(v);
	EXPECT(ring_vm_collect(rv), 0);
	its_vm_free(v);
}

/* A full ring makes no difference to the bitmap. */
static void tables_full(void)
{
	uint64_t fill = ring_vm_min_entries(), page;
	struct its_vm *v = its_vm_create(1, fill, true);
	struct ring_vm *rv = v->rv;

	ring_vm_set_task(rv, 0, page_at(TABLES_END), fill, 1);
	EXPECT(ring_vm_run(rv, 0), RING_VM_FULL);
	save_tables(v);
	want_saved_tables(v);
	expect_bitmap(v);
	for (page = 0; page < rv->limit; page++)
		want(v, TABLES_END + page * getpagesize());
	EXPECT(ring_vm_collect(rv), rv->limit);
	expect_harvested(v);
	its_vm_free(v);
}

static void guest_code(uint64_t cwriter)
{
	guest_store((uint64_t *)(ITS_GPA + GITS_CWRITER), cwriter);
	GUEST_SYNC(0);
}

/*
 * Unmapping a device clears its entry, mapping an LPI clears its pending bit.
 */
static void commands(bool with_bitmap)
{
	struct its_vm *v = its_vm_create(2, 2, with_bitmap);

	/* The vCPU that writes to GITS_CWRITER */
	unmap_device(v, DEV_B);
	run_commands(v);
	want(v, DEVICES + DEV_B * ENTRY_BYTES);
	expect_reported(v);

	set_pending(v, 0, LPI_B);
	map_device(v, DEV_B, ITT_B);
	map_event(v, DEV_B, 0, LPI_B, 0);
	unmap_device(v, DEV_A);
	ring_vm_set_code(v->rv, 1, guest_code, v->cwriter);
	EXPECT(ring_vm_run(v->rv, 1), RING_VM_DONE);
	EXPECT(is_pending(v, 0, LPI_B), false);

	if (with_bitmap)
		expect_bitmap(v);
	EXPECT(ring_vm_harvest(v->rv, 0, DIRTY_RING_HARVEST_ALL), 0);
	EXPECT(ring_vm_harvest(v->rv, 1, DIRTY_RING_HARVEST_ALL), 2);
	want(v, pending_byte(0, LPI_B));
	want(v, DEVICES + DEV_A * ENTRY_BYTES);
	expect_harvested(v);
	its_vm_free(v);
}

static void commands_bitmap(void)
{
	commands(true);
}

static void commands_ring(void)
{
	commands(false);
}

static const struct test_case cases[] = {
	{ "tables-bitmap: saved, they are in the bitmap", tables_bitmap },
	{ "tables-ring: without it, in a ring", tables_ring },
	{ "tables-full: in the bitmap, if the ring is full", tables_full },
	{ "tables-overflow: without it, in the overflow until there is room",
	  tables_overflow },
	{ "pending-bitmap: saved, they are in the bitmap", pending_bitmap },
	{ "pending-ring: without it, in a ring", pending_ring },
	{ "restore-bitmap: what it clears is in the bitmap", restore_bitmap },
	{ "restore-ring: without it, in a ring", restore_ring },
	{ "commands-bitmap: a vCPU's writes are in its ring", commands_bitmap },
	{ "commands-ring: and without the bitmap, too", commands_ring },
};

int main(int argc, char **argv)
{
	dirty_ring_check_supported();
	test_cases_main(argc, argv, cases, ARRAY_SIZE(cases));
}
