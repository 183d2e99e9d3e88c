# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash disable=SC2034
# What those that migrate guests share; to be sourced after vm/lib.sh.

# migration_numbers: what is migrated, and how, must make sense
migration_numbers() {
	number MEM 128 1024
	number RATE 1 1000000
	number RING 256 65536
	((!(RING & (RING - 1)))) || die "RING=$RING is no power of two"
	: "${HOT:=100}" "${READ:=0}" "${HUGE:=0}" "${BITMAP:=0}"
	number HOT 1 100
	number READ 0 1
	number HUGE 0 1
	number BITMAP 0 1
	number CPUS 1 8
	number BANDWIDTH 1 10000
	number RUNS 1 100
	number LIMIT 1 100000
}

# For the kernel of a machine in which migrations are timed. Under emulation the
# first write to a page in which code ran takes long, as what was translated from
# it is looked for: half a second for a huge page of an earlier guest's, in the
# middle of a migration if it is the destination that gets it. So it is written
# to, and cleared, when it is freed.
migration_append=init_on_free=1
