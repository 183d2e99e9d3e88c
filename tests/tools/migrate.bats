# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# migrate/run and bench/migrate take no nonsense, and say so in one line before they
# do anything. The migrations themselves: tests/run migrate.

setup() {
	script=migrate/run
	unset ARCH MEM RATE RING CPUS LIMIT BANDWIDTH RUNS
}

# refuses TEXT [VARIABLE=VALUE...] [-- ARGUMENT...]: fails with one line, with TEXT in it
refuses() {
	local text=$1 vars=()
	shift
	while (($#)) && [[ $1 != -- ]]; do
		vars+=("$1")
		shift
	done
	run env "${vars[@]}" timeout 10 "$BATS_TEST_DIRNAME/../../$script" "${@:2}"
	echo "status $status: $output"
	[[ $status -eq 1 && ${#lines[@]} -eq 1 && $output == "$script: "*"$text"* ]]
}

@test "MEM that is no sensible number of MiB is refused" {
	for v in 0 127 1025 -256 256M 0x100 2.5 abc ' ' 99999999999999999999; do
		refuses "MEM='$v' must be a number from 128 to 1024" MEM="$v"
	done
}

@test "RATE that is no sensible number of pages is refused" {
	for v in 0 -1 1000001 1e3 fast '1 000' 18446744073709551617; do
		refuses "RATE='$v' must be a number from 1 to 1000000" RATE="$v"
	done
}

@test "RING that is no number of entries is refused" {
	for v in 0 512 65537 131072 4096K -4096 '$(id)' 4294971392; do
		refuses "RING='$v' must be a number from 1024 to 65536" RING="$v"
	done
}

@test "RING that is no power of two is refused" {
	for v in 1025 3000 4095 65535; do
		refuses "RING=$v is no power of two" RING="$v"
	done
}

@test "CPUS, BANDWIDTH, RUNS and LIMIT are looked at too" {
	refuses "CPUS='9' must be a number from 1 to 8" CPUS=9
	refuses "BANDWIDTH='0' must be a number from 1 to 10000" BANDWIDTH=0
	refuses "RUNS='101' must be a number from 1 to 100" RUNS=101
	refuses "LIMIT='never' must be a number" LIMIT=never
}

@test "an ARCH that is no machine is refused" {
	for v in mips ../arch/arm64 'x86_64 arm64'; do
		refuses "ARCH=$v is unknown here; known: arm64 x86_64" ARCH="$v"
	done
}

@test "an unknown argument is refused" {
	refuses "unknown argument '--frob', see --help" -- --frob
	refuses "unknown argument 'x', see --help" -- --tap x
}

@test "--help tells of every variable" {
	run "$BATS_TEST_DIRNAME/../../$script" --help
	[[ $status -eq 0 ]]
	for v in ARCH MEM RATE RING CPUS BANDWIDTH RUNS LIMIT --tap; do
		[[ $output == *"$v"* ]]
	done
}

@test "bench/migrate is as strict" {
	script=bench/migrate
	refuses "RUNS='0' must be a number from 1 to 100" RUNS=0
	refuses "RUNS='five' must be a number from 1 to 100" RUNS=five
	refuses "BANDWIDTH='10001' must be a number from 1 to 10000" BANDWIDTH=10001
	refuses "RING=3000 is no power of two" RING=3000
	refuses "unknown argument 'x', see --help" -- x
	run "$BATS_TEST_DIRNAME/../../$script" --help
	[[ $status -eq 0 ]]
	for v in MEM RATE RING CPUS BANDWIDTH RUNS LIMIT KVM_OPTS; do
		[[ $output == *"$v"* ]]
	done
}
