# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# tests/run and tests/ktap: what is run, and how its end is told.

load refuses

setup() {
	top=$(realpath "$BATS_TEST_DIRNAME/../..")
	clean_environment
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
		leave_nothing
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
