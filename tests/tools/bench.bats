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
	refuses bench/run "unknown argument 'here-64k'" -- here-64k
	refuses bench/run "unknown argument '5.10'" ARCH=arm64 -- 6.1 5.10
	refuses bench/run "ARCH=mips is unknown here" ARCH=mips
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

@test "bench/report: arm64 has rows and columns of its own, and some without a target" {
	local dir=$BATS_TEST_TMPDIR
	{
		echo kernel,way,slot,backing,pattern,pages,entries,vcpus,threads,write,collect,protect,log_on,log_off,stall_log_on,stall_protect
		figure k get 1 random 4096 1000 20 135 5
		figure k get 1 sequential 4096 1000 20 46 5
		figure k clear 1 random 4096 1000 20 137 5
		figure k get 2 random 60000 1000 20 46 5 | sed 's/$/,201000,7000/'
	} > "$dir/here.csv"
	cp "$dir/here.csv" "$dir/6.12.csv"
	figure k ring 1 random 4096 1016 10 100 5 >> "$dir/here.csv"
	{
		head -n 1 "$dir/here.csv"
		figure k ring 1 every-64 256 1010 10 90 5
	} > "$dir/here-64k.csv"
	: > "$dir/6.1.csv"
	run "$top/bench/report" "$dir" arm64
	echo "$output"
	[[ $status -eq 2 && $output == *"8 of 12 targets"* ]]
	[[ $output =~ "6.1 ring"\ +"6.12 bitmap"\ +here\ +here-64k ]]
	[[ $output =~ push:[^$'\n']*\ 16\.0\ [^$'\n']*NOT ]]
	[[ $output =~ "every 64th"[^$'\n']*\ 100\ [^$'\n']*"not measured" ]]
	[[ $output =~ "GET_DIRTY_LOG, 4096 random"[^$'\n']*\ 135\ [^$'\n']*ok ]]
	[[ $output =~ "GET_DIRTY_LOG, 4096 sequential"[^$'\n']*NOT ]]
	[[ $output =~ "CLEAR_DIRTY_LOG, 4096 random"[^$'\n']*\ 137\ +-$'\n' ]]
	[[ $output =~ "kept for"[^$'\n']*\ "201 us"[^$'\n']*NOT ]]
	run "$top/bench/report" "$dir" mips
	[[ $status -eq 1 && $output == usage:* ]]
}

@test "bench/record: a mark that is not there is refused" {
	refuses bench/record "no mark 'nonsense'" -- nonsense
	refuses bench/record "no mark ''"
}
