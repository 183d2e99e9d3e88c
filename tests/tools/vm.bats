# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# The scripts of vm/, and those that fetch and build for it, say in one line what is wrong
# with what they are given, before they do anything. What they do when nothing is: vm/check.

load refuses

setup() {
	top=$(realpath "$BATS_TEST_DIRNAME/../..")
	clean_environment
}

@test "vm/run: a SHARE that is no folder is refused" {
	refuses vm/run "SHARE=/nowhere is no folder" SHARE=/nowhere
	refuses vm/run "is no folder" SHARE="$top/Makefile"
}

@test "vm/run: an unknown machine is refused, and the known ones are named" {
	refuses vm/run "ARCH=mips is unknown here; known: " ARCH=mips
	refuses vm/run "is unknown here" ARCH=../arch/x86_64
}

@test "vm/run: a KERNEL that is missing or no kernel is refused" {
	refuses vm/run "KERNEL=/nowhere cannot be read" KERNEL=/nowhere
	refuses vm/run "is no kernel for x86_64" KERNEL="$top/Makefile"
	refuses vm/run "KERNEL=/dev/zero cannot be read" KERNEL=/dev/zero
	: > "$BATS_TEST_TMPDIR/empty"
	refuses vm/run "is no kernel for x86_64" KERNEL="$BATS_TEST_TMPDIR/empty"
}

@test "vm/run: numbers that are none, or make no sense, are refused" {
	local v
	for v in 0 -1 abc 1e9 '1 2' 99999999999999999999; do
		refuses vm/run "VM_MEM='$v' must be a number from 256" VM_MEM="$v"
		refuses vm/run "VM_CPUS='$v' must be a number from 1" VM_CPUS="$v"
		refuses vm/run "VM_NODES='$v' must be a number from 1" VM_NODES="$v"
		refuses vm/run "TIMEOUT='$v' must be a number from 1" TIMEOUT="$v"
	done
	refuses vm/run "VM_MEM=1000 does not divide into 3 nodes" VM_MEM=1000 VM_NODES=3
	refuses vm/run "ICOUNT='yes' must be a number" ICOUNT=yes
}

@test "vm/run: a version that Debian cannot have is refused" {
	refuses vm/run "'banana' is no version" KVERSION=banana MODULES=stock
	refuses vm/run "is no version" KVERSION='5.10.223-1 x' MODULES=stock
	refuses vm/run "KVERSION: there is no stock kernel 5.10 for arm64" ARCH=arm64 \
		KVERSION=5.10.223-1
}

@test "vm/run: an arm64 machine wants an arm64 kernel" {
	printf 'MZ%512sHdrS%4096s' '' '' > "$BATS_TEST_TMPDIR/x86"
	refuses vm/run "is no kernel for arm64" ARCH=arm64 KERNEL="$BATS_TEST_TMPDIR/x86"
}

@test "vm/check, vm/userspace: an unknown machine is refused" {
	refuses vm/check "ARCH=mips is unknown here" ARCH=mips
	refuses vm/userspace "which machine?"
	refuses vm/userspace "ARCH=mips is unknown here; known: " -- mips
	refuses vm/userspace "ARCH=../run is unknown here" -- ../run
	refuses vm/userspace "unknown argument 'x'" -- arm64 x
	refuses vm/userspace "which packages?" -- --host
}

@test "vm/run: module parameters of another form are refused" {
	refuses vm/run "KVM_OPTS: 'npt=0' is not of the form" KVM_OPTS='npt=0'
	refuses vm/run "KVM_OPTS: 'kvm.x' is not of the form" KVM_OPTS='kvm.tdp_mmu=1 kvm.x'
}

@test "vm/run: a shell without a terminal, and unknown arguments, are refused" {
	refuses vm/run "a shell needs a terminal" RUN=
	refuses vm/run "unknown argument '-x'" -- -x
}

@test "vm/bochs/run: what makes no sense is refused" {
	refuses vm/bochs/run "RUN is empty" RUN=
	refuses vm/bochs/run "KERNEL=/nowhere cannot be read" KERNEL=/nowhere
	refuses vm/bochs/run "is no kernel for x86_64" KERNEL="$top/Makefile"
	refuses vm/bochs/run "VM_MEM='x' must be a number from 256" VM_MEM=x
	refuses vm/bochs/run "VM_CPUS='9' must be a number from 1" VM_CPUS=9
	refuses vm/bochs/run "TIMEOUT='0' must be a number from 1" TIMEOUT=0
	refuses vm/bochs/run "VM_MODEL='a b' is no model" VM_MODEL='a b'
	refuses vm/bochs/run "unknown argument '-x'" -- -x
	refuses vm/bochs/build "unknown argument '-x'" -- -x
}

@test "maint/fetch: what is no package, version or release is refused" {
	refuses maint/fetch "'Bochs' is no package's name" -- upstream trixie Bochs
	refuses maint/fetch "'../x' is no release" -- upstream ../x bochs
	refuses maint/fetch "'x' is no package's version" -- record bochs=x
	refuses maint/fetch "which package=version?" -- record bochs
	refuses maint/fetch "into which folder?" -- into
	refuses maint/fetch "'../x' is no release" -- into /tmp ../x arm64 bash
	refuses maint/fetch "'x/y' is no architecture" -- into /tmp trixie x/y bash
	refuses maint/fetch "which packages?" -- into /tmp trixie arm64
	refuses maint/fetch "'-y' is no package's name" -- into /tmp trixie arm64 -y
	refuses maint/fetch "'../x' is no release" -- from ../x arm64 deb bochs
	refuses maint/fetch "'x/y' is no architecture" -- from trixie x/y deb bochs
	refuses maint/fetch "deb, record or version?" -- from trixie arm64 upstream bochs
	refuses maint/fetch "unknown argument 'x'" -- x
}

@test "vm/run, vm/stock: another release must look like one" {
	refuses vm/stock "'Bookworm' is no other release" -- release Bookworm
	refuses vm/stock "'bullseye' is no other release" -- release bullseye
	refuses vm/stock "'bookworm' is no version" -- headers bookworm
	refuses vm/run "'bookworm/..' is no other release" RELEASE=bookworm/..
	refuses vm/run "'bookworm/..' is no other release" RELEASE=bookworm/.. ARCH=arm64
	refuses vm/stock "ARCH=mips is unknown here" ARCH=mips -- release bookworm
}

@test "kmod/build: a KDIR that holds no headers is refused" {
	refuses kmod/build "KDIR=/nowhere holds no kernel headers" KDIR=/nowhere
	refuses kmod/build "unknown argument 'x'" -- x
}
