// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test the dirty ring, and the dirty bitmap's ioctls, with a VMM of 32 bits
 *
 * This is such a program, with no library but nolibc, so that any compiler for
 * x86 can build it. Its guest, in real mode, writes one byte to each of some
 * pages and halts. Show, one case each, that
 *  - the ring is enabled, mapped, harvested and reset as by a VMM of 64 bits,
 *    and what it does beyond the interface it has elsewhere is there, too,
 *  - a vCPU whose ring is full stops,
 *  - KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG, which have a structure of their
 *    own for 32 bits, get along with what is there, and lose nothing when they
 *    fail.
 */

#include "../../../../include/nolibc/nolibc.h"
#include <asm/kvm.h>
#include <linux/kvm.h>
#include <linux/mman.h>

#define ARRAY_SIZE(x)	(sizeof(x) / sizeof((x)[0]))

#define PAGE		4096U
#define RING_BYTES	(4 * PAGE)
#define RING_ENTRIES	(RING_BYTES / sizeof(struct kvm_dirty_gfn))

/* The guest's code, and the pages it writes to */
#define CODE_GPA	0x1000U
#define DATA_GPA	0x10000U
#define DATA_PAGES	80U

static int kvm;

static void put(const char *s)
{
	write(1, s, strlen(s));
}

static void put_number(long n)
{
	put(ltoa(n));
}

/* End all threads: some kernels add one for a VM. nolibc's exit() ends one. */
static void end(int status)
{
	my_syscall1(__NR_exit_group, status);
}

/* Fail the case, which has a process of its own, unless they are equal. */
#define EXPECT(expr, want)	expect(#expr, expr, want)

static void expect(const char *expr, long got, long want)
{
	if (got == want)
		return;

	put("# ");
	put(expr);
	put(": got ");
	put_number(got);
	put(", want ");
	put_number(want);
	put("\n");
	end(1);
}

/* Returns an address, or a negative error number. */
static long map(int fd, unsigned long pgoff, unsigned long bytes, int flags)
{
	/* nolibc's syscalls have too few arguments for mmap2. */
	unsigned long args[] = {
		0, bytes, PROT_READ | PROT_WRITE, flags, fd, pgoff * PAGE,
	};

	return my_syscall1(__NR_mmap, args);
}

/* The result, or a negative error number */
static long call(int fd, unsigned int cmd, unsigned long arg)
{
	return my_syscall3(__NR_ioctl, fd, cmd, arg);
}

/* The guest's code: write to ecx pages, from page number ebx on. */
static const unsigned char guest_code[] = {
	0x89, 0xd8,		/* next: mov ax, bx */
	0xc1, 0xe0, 0x08,	/* shl ax, 8: a segment for each page */
	0x8e, 0xd8,		/* mov ds, ax */
	0xfe, 0x06, 0x00, 0x00,	/* inc byte [0] */
	0x43,			/* inc bx */
	0xe2, 0xf2,		/* loop next */
	0xf4,			/* hlt */
	0xeb, 0xef,		/* jmp next */
};

struct vm {
	int fd;
	int vcpu;
	unsigned char *data;
	struct kvm_run *run;
	struct kvm_dirty_gfn *ring;
};

static long set_slot(struct vm *vm, unsigned int slot, unsigned int gpa,
		     unsigned int pages, unsigned char *mem, unsigned int flags)
{
	struct kvm_userspace_memory_region region = {
		.slot = slot,
		.flags = flags,
		.guest_phys_addr = gpa,
		.memory_size = pages * PAGE,
		.userspace_addr = (unsigned long)mem,
	};

	return call(vm->fd, KVM_SET_USER_MEMORY_REGION, (long)&region);
}

static long enable(struct vm *vm, unsigned int cap, unsigned long arg)
{
	struct kvm_enable_cap enable = { .cap = cap, .args[0] = arg };

	return call(vm->fd, KVM_ENABLE_CAP, (long)&enable);
}

/* Create a VM with rings, or with bitmaps. */
static void vm_create(struct vm *vm, int ring)
{
	unsigned char *code;
	struct kvm_sregs sregs;

	/* The point of this test */
	EXPECT(sizeof(long), 4);
	vm->fd = call(kvm, KVM_CREATE_VM, 0);
	EXPECT(vm->fd > 0, 1);
	/*
	 * For CPUs that need these for real mode: away from the guest's memory
	 */
	EXPECT(call(vm->fd, KVM_SET_TSS_ADDR, 0xfffbd000), 0);
	if (ring)
		EXPECT(enable(vm, KVM_CAP_DIRTY_LOG_RING, RING_BYTES), 0);
	else
		EXPECT(enable(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0), 0);

	code = (void *)map(-1, 0, PAGE, MAP_PRIVATE | MAP_ANONYMOUS);
	vm->data = (void *)map(-1, 0, DATA_PAGES * PAGE,
			       MAP_PRIVATE | MAP_ANONYMOUS);
	memcpy(code, guest_code, sizeof(guest_code));
	EXPECT(set_slot(vm, 0, CODE_GPA, 1, code, 0), 0);
	EXPECT(set_slot(vm, 1, DATA_GPA, DATA_PAGES, vm->data,
			KVM_MEM_LOG_DIRTY_PAGES), 0);

	vm->vcpu = call(vm->fd, KVM_CREATE_VCPU, 0);
	EXPECT(vm->vcpu > 0, 1);
	vm->run = (void *)map(vm->vcpu, 0, PAGE, MAP_SHARED);
	EXPECT(call(vm->vcpu, KVM_GET_SREGS, (long)&sregs), 0);
	sregs.cs.selector = 0;
	sregs.cs.base = 0;
	EXPECT(call(vm->vcpu, KVM_SET_SREGS, (long)&sregs), 0);
	if (ring) {
		vm->ring = (void *)map(vm->vcpu, KVM_DIRTY_LOG_PAGE_OFFSET,
				       RING_BYTES, MAP_SHARED);
		EXPECT((unsigned long)vm->ring < -4096UL, 1);
	}
}

/* Let the guest write to pages. Return: why it stopped. */
static long run(struct vm *vm, unsigned int first, unsigned int pages)
{
	struct kvm_regs regs = {};
	long ret;

	if (pages) {
		regs.rip = CODE_GPA;
		regs.rflags = 2;
		regs.rbx = DATA_GPA / PAGE + first;
		regs.rcx = pages;
		ret = call(vm->vcpu, KVM_SET_REGS, (long)&regs);
		if (ret)
			return ret;
	}
	ret = call(vm->vcpu, KVM_RUN, 0);
	return ret ? ret : vm->run->exit_reason;
}

/* Harvest entries from @at on, which must be for pages from @first on. */
static void harvest(struct vm *vm, unsigned int at, unsigned int first,
		    unsigned int pages)
{
	struct kvm_dirty_gfn *gfn;
	unsigned int i;

	for (i = 0; i < pages; i++) {
		gfn = &vm->ring[(at + i) % RING_ENTRIES];
		EXPECT(__atomic_load_n(&gfn->flags, __ATOMIC_ACQUIRE),
		       KVM_DIRTY_GFN_F_DIRTY);
		EXPECT(gfn->slot, 1);
		EXPECT(gfn->offset, first + i);
		__atomic_store_n(&gfn->flags, KVM_DIRTY_GFN_F_RESET,
				 __ATOMIC_RELEASE);
	}
	EXPECT(vm->ring[(at + i) % RING_ENTRIES].flags, 0);
}

static void vm_destroy(struct vm *vm)
{
	close(vm->vcpu);
	close(vm->fd);
}

/* As a program of 32 bits has this */
static long get_log(struct vm *vm, void *bitmap)
{
	struct kvm_dirty_log log = { .slot = 1, .dirty_bitmap = bitmap };

	return call(vm->fd, KVM_GET_DIRTY_LOG, (long)&log);
}

static long clear_log(struct vm *vm, unsigned int first, unsigned int pages,
		      void *bitmap)
{
	struct kvm_clear_dirty_log log = {
		.slot = 1,
		.num_pages = pages,
		.first_page = first,
		.dirty_bitmap = bitmap,
	};

	return call(vm->fd, KVM_CLEAR_DIRTY_LOG, (long)&log);
}

static void ring(void)
{
	struct vm vm = {};

	EXPECT(sizeof(struct kvm_dirty_gfn), 16);
	EXPECT(call(kvm, KVM_CHECK_EXTENSION, KVM_CAP_DIRTY_LOG_RING), 1048576);
	vm_create(&vm, 1);
	EXPECT(enable(&vm, KVM_CAP_DIRTY_LOG_RING, RING_BYTES), -EINVAL);
	/* The bitmap's ioctls are refused: there is no bitmap. */
	EXPECT(get_log(&vm, NULL), -ENXIO);
	EXPECT(clear_log(&vm, 0, 64, NULL), -ENXIO);

	EXPECT(run(&vm, 0, 20), KVM_EXIT_HLT);
	harvest(&vm, 0, 0, 20);
	/* Reported, and not again until the reset */
	EXPECT(run(&vm, 0, 20), KVM_EXIT_HLT);
	EXPECT(vm.ring[20].flags, 0);
	EXPECT(call(vm.fd, KVM_RESET_DIRTY_RINGS, 0), 20);
	EXPECT(vm.ring[0].flags, 0);
	EXPECT(run(&vm, 10, 20), KVM_EXIT_HLT);
	harvest(&vm, 20, 10, 20);
	EXPECT(call(vm.fd, KVM_RESET_DIRTY_RINGS, 0), 20);
	EXPECT(call(vm.fd, KVM_RESET_DIRTY_RINGS, 0), 0);
	EXPECT(vm.data[15 * PAGE], 3);
	vm_destroy(&vm);
}

static void beyond(void)
{
	struct vm vm = {};

	vm_create(&vm, 1);
	EXPECT(call(vm.fd, KVM_CHECK_EXTENSION, KVM_CAP_DIRTY_RING_EXT) > 0, 1);
	EXPECT(run(&vm, 0, 20), KVM_EXIT_HLT);
	EXPECT(call(vm.fd, KVM_SYNC_DIRTY_RINGS, 0), 0);
	harvest(&vm, 0, 0, 20);
	EXPECT(call(vm.vcpu, KVM_RESET_DIRTY_RINGS, 0), 20);
	EXPECT(run(&vm, 0, 20), KVM_EXIT_HLT);
	harvest(&vm, 20, 0, 20);
	vm_destroy(&vm);
}

static void full(void)
{
	unsigned int at = 0, pages, stops = 0;
	struct vm vm = {};
	long exit;

	vm_create(&vm, 1);
	/* Write all pages again and again; harvest only when the vCPU stops. */
	exit = run(&vm, 0, DATA_PAGES);
	while (stops < 3) {
		if (exit == KVM_EXIT_HLT) {
			/*
			 * More entries for the same pages: each is reported
			 * once.
			 */
			EXPECT(set_slot(&vm, 1, DATA_GPA, DATA_PAGES, vm.data,
					0), 0);
			EXPECT(set_slot(&vm, 1, DATA_GPA, DATA_PAGES, vm.data,
					KVM_MEM_LOG_DIRTY_PAGES), 0);
			exit = run(&vm, 0, DATA_PAGES);
			continue;
		}
		EXPECT(exit, KVM_EXIT_DIRTY_RING_FULL);
		EXPECT(run(&vm, 0, 0), KVM_EXIT_DIRTY_RING_FULL);
		stops++;
		for (pages = 0; vm.ring[(at + pages) % RING_ENTRIES].flags ==
				KVM_DIRTY_GFN_F_DIRTY; pages++) {
			vm.ring[(at + pages) % RING_ENTRIES].flags =
				KVM_DIRTY_GFN_F_RESET;
			if (pages == RING_ENTRIES)
				break;
		}
		EXPECT(pages >= RING_ENTRIES / 4 && pages < RING_ENTRIES, 1);
		EXPECT(call(vm.fd, KVM_RESET_DIRTY_RINGS, 0), pages);
		at += pages;
		exit = run(&vm, 0, 0);
	}
	vm_destroy(&vm);
}

static void expect_bits(struct vm *vm, unsigned int w0, unsigned int w1,
			unsigned int w2)
{
	/* In longs of 64 bits, and something behind them */
	unsigned int bitmap[6] = { ~0U, ~0U, ~0U, ~0U, 0x5a5a5a5a, 0x5a5a5a5a };

	EXPECT(get_log(vm, bitmap), 0);
	EXPECT(bitmap[0], w0);
	EXPECT(bitmap[1], w1);
	EXPECT(bitmap[2], w2);
	EXPECT(bitmap[3], 0);
	EXPECT(bitmap[4], 0x5a5a5a5a);
	EXPECT(bitmap[5], 0x5a5a5a5a);
}

static void bitmap(void)
{
	struct vm vm = {};

	vm_create(&vm, 0);
	EXPECT(run(&vm, 8, 60), KVM_EXIT_HLT);
	EXPECT(get_log(&vm, NULL), -EFAULT);
	expect_bits(&vm, ~0xffU, ~0U, 0xf);
	expect_bits(&vm, 0, 0, 0);
	EXPECT(run(&vm, DATA_PAGES - 3, 3), KVM_EXIT_HLT);
	expect_bits(&vm, 0, 0, 7U << (DATA_PAGES - 3) % 32);
	vm_destroy(&vm);
}

static void clear(void)
{
	unsigned int bits[4] = { 0x0f, 0, 0x3, 0 };
	struct vm vm = {};

	vm_create(&vm, 0);
	EXPECT(enable(&vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 1), 0);
	EXPECT(run(&vm, 0, 70), KVM_EXIT_HLT);
	expect_bits(&vm, ~0U, ~0U, 0x3f);
	EXPECT(clear_log(&vm, 0, DATA_PAGES, NULL), -EFAULT);
	expect_bits(&vm, ~0U, ~0U, 0x3f);
	EXPECT(clear_log(&vm, 0, DATA_PAGES, bits), 0);
	expect_bits(&vm, ~0xfU, ~0U, 0x3c);
	/* Only what was cleared is protected again. */
	EXPECT(run(&vm, 0, 2), KVM_EXIT_HLT);
	expect_bits(&vm, ~0xcU, ~0U, 0x3c);
	/* Neither the first page, nor all */
	bits[0] = 0x30;
	EXPECT(clear_log(&vm, 64, DATA_PAGES - 64, bits), 0);
	expect_bits(&vm, ~0xcU, ~0U, 0xc);
	EXPECT(clear_log(&vm, 1, 64, bits), -EINVAL);
	vm_destroy(&vm);
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		void (*run)(void);
		/* 1: the ring, 2: what it does beyond its interface */
		int needs;
	} cases[] = {
		{ "ring: enabled, mapped, harvested, reset", ring, 1 },
		{ "beyond: a sync, and a reset of one vCPU", beyond, 2 },
		{ "full: the vCPU stops, and goes on", full, 1 },
		{ "bitmap: KVM_GET_DIRTY_LOG", bitmap, 0 },
		{ "clear: KVM_CLEAR_DIRTY_LOG", clear, 0 },
	};
	int have, status, failed = 0;
	unsigned int i;

	kvm = open("/dev/kvm", O_RDWR, 0);
	if (kvm < 0) {
		put("1..0 # SKIP no /dev/kvm\n");
		return 4;
	}
	have = call(kvm, KVM_CHECK_EXTENSION, KVM_CAP_DIRTY_LOG_RING) > 0;
	have += have &&
		call(kvm, KVM_CHECK_EXTENSION, KVM_CAP_DIRTY_RING_EXT) > 0;
	put("TAP version 13\n1..");
	put_number(ARRAY_SIZE(cases));
	put("\n");
	for (i = 0; i < ARRAY_SIZE(cases); i++) {
		status = 0;
		if (cases[i].needs <= have) {
			if (!fork()) {
				cases[i].run();
				end(0);
			}
			if (wait(&status) < 0)
				status = 1;
		}
		failed += !!status;
		put(status ? "not ok " : "ok ");
		put_number(i + 1);
		put(" ");
		put(cases[i].name);
		if (cases[i].needs > have)
			put(" # SKIP KVM does not have it");
		put("\n");
	}

	return !!failed;
}
