# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# bench/ takes no nonsense, and bench/report reads figures right.

load refuses

setup() {
	top=$(realpath "$BATS_TEST_DIRNAME/../..")
	clean_environment
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

@test "bench/record: a mark that is not there is refused" {
	refuses bench/record "no mark 'nonsense'" -- nonsense
	refuses bench/record "no mark ''"
}
