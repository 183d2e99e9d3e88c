# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# vm/run, vm/bochs/run, tests/run and kmod/build say in one line what is wrong with what they are
# given, before they do anything. What they do when nothing is: vm/check.

setup() {
	top=$BATS_TEST_DIRNAME/../..
	unset ARCH KERNEL KVERSION RELEASE MODULES SHARE KDIR KSRC KVM_OPTS ICOUNT TIMEOUT
	unset VM_MEM VM_CPUS VM_APPEND VM_QEMU VM_LOG VM_MODEL FILES
	export RUN=true
}

# refuses SCRIPT TEXT [VARIABLE=VALUE...] [-- ARGUMENT...]: the script fails with
# one line, with TEXT in it
refuses() {
	local script=$1 text=$2 vars=()
	shift 2
	while (($#)) && [[ $1 != -- ]]; do
		vars+=("$1")
		shift
	done
	run env "${vars[@]}" timeout 20 "$top/$script" "${@:2}" < /dev/null
	echo "status $status: $output"
	[[ $status -eq 1 && ${#lines[@]} -eq 1 && $output =~ ^[a-z/-]+:\ .*"$text" ]]
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
		refuses vm/run "TIMEOUT='$v' must be a number from 1" TIMEOUT="$v"
	done
	refuses vm/run "ICOUNT='yes' must be a number" ICOUNT=yes
}

@test "vm/run: a version that Debian cannot have is refused" {
	refuses vm/run "'banana' is no version" KVERSION=banana MODULES=stock
	refuses vm/run "is no version" KVERSION='5.10.223-1 x' MODULES=stock
	refuses vm/run "KVERSION: there is no stock kernel for arm64" ARCH=arm64 \
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
	refuses maint/fetch "'../x' is no release" -- from ../x deb bochs
	refuses maint/fetch "deb, record or version?" -- from trixie upstream bochs
	refuses maint/fetch "unknown argument 'x'" -- x
}

@test "vm/run, vm/stock: another release must look like one" {
	refuses vm/stock "'Bookworm' is no other release" -- release Bookworm
	refuses vm/stock "'bullseye' is no other release" -- release bullseye
	refuses vm/stock "'bookworm' is no version" -- headers bookworm
	refuses vm/run "'bookworm/..' is no other release" RELEASE=bookworm/..
}

@test "bench/run: what makes no sense is refused" {
	refuses bench/run "unknown argument '5.4'" -- 5.4
	refuses bench/run "unknown argument '-x'" -- --quick -x
	refuses bench/run "PROGRAM=/nowhere cannot be run" PROGRAM=/nowhere -- --no-build
}

# figure FIELD...: a line of CSV: kernel, way, slot in GiB, pattern, pages, write,
# collect, protect, log_on
figure() {
	echo "$1,$2,$(($3 << 30)),4K,$4,$5,65536,1,0,$6,$7,$8,$9,0"
}

@test "bench/report: targets are reached, missed, or not measured" {
	local dir=$BATS_TEST_TMPDIR
	{
		echo kernel,way,slot,backing,pattern,pages,entries,vcpus,threads,write,collect,protect,log_on,log_off
		figure k get 1 random 4096 1000 20 200 5
	} > "$dir/5.10.csv"
	{
		cat "$dir/5.10.csv"
		figure k ring 1 random 4096 1012 10 150 5
		figure k ring 1 sequential 4096 1012 10 101 5
		figure k ring 1 random 1024 1012 10 100 5
		figure k ring 16 random 1024 1012 10 104 5
		figure k ring 256 random 1024 1012 10 105 1100000
		figure k ring 1024 random 1024 1012 10 105 5
	} > "$dir/here.csv"
	run "$top/bench/report" "$dir"
	echo "$output"
	[[ $status -eq 2 && $output == *"3 of 7 targets"* ]]
	[[ $output =~ push:[^$'\n']*\ 12\.0\ [^$'\n']*ok ]]
	[[ $output =~ "4096 random"[^$'\n']*\ 220\ [^$'\n']*\ 160\ [^$'\n']*ok ]]
	[[ $output =~ "4096 sequential"[^$'\n']*\ 111\ [^$'\n']*NOT ]]
	[[ $output =~ "60000 random"[^$'\n']*"not measured" ]]
	[[ $output =~ "logging on"[^$'\n']*NOT ]]
	[[ $output =~ "largest over smallest"[^$'\n']*\ "+5.0 %"[^$'\n']*ok ]]
	[[ -s $dir/slot-size.svg && -s $dir/bench.csv && -s $dir/table.txt ]]
}

@test "tests/run: a pattern that no test matches is refused" {
	refuses tests/run "no test is called nonsense" -- nonsense
	refuses tests/run "no test is called nonsense" -- tools nonsense
	refuses tests/run "unknown option '--nonsense'" -- --nonsense
}

@test "tests/run: the list has every machine and every test" {
	run "$top/tests/run" --list
	[[ $status -eq 0 ]]
	for line in tools check migrate npt:dirty_ring_test shadow:unload tdp-mmu:steal_time \
		debug:dirty_ring_test vmx-pml:pml_test arm64-check arm64-migrate \
		arm64:dirty_ring_test arm64-64k:dirty_ring_its_test; do
		[[ $'\n'$output$'\n' == *$'\n'"$line"$'\n'* ]]
	done
	run "$top/tests/run" --list 'vmx-*'
	[[ $status -eq 0 && $output == *vmx-pml:pml_test* && $output != *npt:* ]]
}

@test "tests/run: ARCH takes one architecture, and both make the whole" {
	local x86 arm
	refuses tests/run "ARCH=mips is unknown here" ARCH=mips
	refuses tests/run "no test is called npt" ARCH=arm64 -- npt
	x86=$(ARCH=x86_64 "$top/tests/run" --list)
	arm=$(ARCH=arm64 "$top/tests/run" --list)
	[[ $x86 == *npt:dirty_ring_test* && $x86 != *arm64* ]]
	[[ $arm == *arm64:dirty_ring_test* && $arm != *npt:* ]]
	sort <(echo "$x86") <(echo "$arm") | diff - <("$top/tests/run" --list | sort)
}

@test "kmod/build: a KDIR that holds no headers is refused" {
	refuses kmod/build "KDIR=/nowhere holds no kernel headers" KDIR=/nowhere
	refuses kmod/build "unknown argument 'x'" -- x
}

@test "tests/ktap: each way a test may end is told apart" {
	cd "$BATS_TEST_TMPDIR"
	mkdir -p logs
	cat > skips <<-'END'
		#!/bin/sh
		echo "no such device, skipping test"
		exit 4
	END
	cat > cases <<-'END'
		#!/bin/sh
		echo TAP version 13
		echo 1..3
		echo ok 1 first
		echo ok 2 second \# SKIP because
	END
	chmod +x skips cases
	printf '%s\n' '5 good true' '5 bad false' '1 slow sleep 20' '5 skipped skips' \
		'5 short cases' '5 gone nosuchcommand' > list
	run "$top/tests/ktap" list logs
	echo "$output"
	[[ $status -eq 0 ]]
	grep -v '^#' <<< "$output" | diff - /dev/fd/3 3<<-'END'
		KTAP version 1
		1..6
		ok 1 good
		not ok 2 bad
		not ok 3 slow
		ok 4 skipped # SKIP no such device, skipping test
		  1..3
		  ok 1 first
		  ok 2 second # SKIP because
		not ok 5 short
		not ok 6 gone
	END
	grep -qx '# took more than 1 s: sleep 20' <<< "$output"
}

@test "maint/lib.sh: a script that is ended takes along what it has started" {
	cat > "$BATS_TEST_TMPDIR/script" <<-END
		. "$top/maint/lib.sh"
		trap end_children EXIT
		trap 'exit 143' TERM
		while read -r line; do echo "\$line"; done \\
			< <(bash -c 'sleep 7654.321 & echo started; wait'; echo ended)
	END
	bash "$BATS_TEST_TMPDIR/script" > "$BATS_TEST_TMPDIR/out" 3>&- &
	until [[ -s $BATS_TEST_TMPDIR/out ]]; do sleep 0.1; done
	kill $!
	wait $! || status=$?
	echo "status $status"
	[[ $status -eq 143 ]]
	! grep -qz 7654.321 /proc/[0-9]*/cmdline 2>/dev/null
}
