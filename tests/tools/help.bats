#!/usr/bin/env bats
# SPDX-License-Identifier: GPL-2.0
# shellcheck disable=SC2154
# Every script tells how it is used, and does nothing else then.

bats_require_minimum_version 1.5.0

setup() {
	top=$(realpath "$BATS_TEST_DIRNAME/../..")
	unset ARCH CONFIG KVERSION KSRC KDIR KERNEL RUN SHARE MEM RATE RING
	cd "$BATS_TEST_TMPDIR" || return
}

@test "--help: every script prints its usage, and no error" {
	local n=0 script scripts
	mapfile -t scripts < <(cd "$top" &&
		find .ci bench kmod maint migrate tests vm -type f -perm -u+x | sort)
	for script in "${scripts[@]}"; do
		# Of the machine, and not for the host.
		[[ $script != vm/init ]] || continue
		run --separate-stderr timeout 20 "$top/$script" --help < /dev/null
		echo "$script: status $status, stderr '$stderr', output '$output'"
		[[ $status -eq 0 && $output == usage:* && ! $stderr ]]
		n=$((n + 1))
	done
	((n > 20))
}

@test "--help: vm/run names the machines" {
	local machine
	run -0 "$top/vm/run" --help
	for machine in "$top"/maint/arch/*; do
		[[ $output =~ "one of: "[^$'\n']*"${machine##*/}" ]]
	done
}
