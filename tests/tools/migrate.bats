# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# migrate/run and bench/migrate take no nonsense, and say so in one line before they
# do anything. The migrations themselves: tests/run migrate.

load refuses

setup() {
	top=$(realpath "$BATS_TEST_DIRNAME/../..")
	clean_environment
	script=migrate/run
}

@test "MEM that is no sensible number of MiB is refused" {
	for v in 0 127 1025 -256 256M 0x100 2.5 abc ' ' 99999999999999999999; do
		refuses "$script" "MEM='$v' must be a number from 128 to 1024" MEM="$v"
	done
}

@test "RATE that is no sensible number of pages is refused" {
	for v in 0 -1 1000001 1e3 fast '1 000' 18446744073709551617; do
		refuses "$script" "RATE='$v' must be a number from 1 to 1000000" RATE="$v"
	done
}

@test "RING that is no number of entries is refused" {
	for v in 0 128 65537 131072 4096K -4096 '$(id)' 4294971392; do
		refuses "$script" "RING='$v' must be a number from 256 to 65536" RING="$v"
	done
}

@test "RING that is no power of two is refused" {
	for v in 1025 3000 4095 65535; do
		refuses "$script" "RING=$v is no power of two" RING="$v"
	done
}

@test "CPUS, BANDWIDTH, RUNS and LIMIT are looked at too" {
	refuses "$script" "CPUS='9' must be a number from 1 to 8" CPUS=9
	refuses "$script" "BANDWIDTH='0' must be a number from 1 to 10000" BANDWIDTH=0
	refuses "$script" "RUNS='101' must be a number from 1 to 100" RUNS=101
	refuses "$script" "LIMIT='never' must be a number" LIMIT=never
	refuses "$script" "HOT='0' must be a number from 1 to 100" HOT=0
	refuses "$script" "READ='2' must be a number from 0 to 1" READ=2
	refuses "$script" "HUGE='2M' must be a number from 0 to 1" HUGE=2M
	refuses "$script" "BITMAP='no' must be a number from 0 to 1" BITMAP=no
}

@test "an ARCH that is no machine is refused" {
	for v in mips ../arch/arm64 'x86_64 arm64'; do
		refuses "$script" "ARCH=$v is unknown here; known: arm64 x86_64" ARCH="$v"
	done
}

@test "an unknown argument is refused" {
	refuses "$script" "unknown argument '--frob', see --help" -- --frob
	refuses "$script" "unknown argument 'x', see --help" -- --tap x
}

@test "--help tells of every variable" {
	run "$top/$script" --help
	[[ $status -eq 0 ]]
	for v in ARCH MEM RATE RING CPUS BANDWIDTH RUNS LIMIT HOT READ HUGE BITMAP --tap; do
		[[ $output == *"$v"* ]]
	done
}

@test "bench/migrate is as strict" {
	script=bench/migrate
	refuses "$script" "RUNS='0' must be a number from 1 to 100" RUNS=0
	refuses "$script" "RUNS='five' must be a number from 1 to 100" RUNS=five
	refuses "$script" "BANDWIDTH='10001' must be a number from 1 to 10000" BANDWIDTH=10001
	refuses "$script" "RING=3000 is no power of two" RING=3000
	refuses "$script" "unknown argument 'x', see --help" -- x
	run "$top/$script" --help
	[[ $status -eq 0 ]]
	for v in MEM RATE RING CPUS BANDWIDTH RUNS LIMIT KVM_OPTS; do
		[[ $output == *"$v"* ]]
	done
}
