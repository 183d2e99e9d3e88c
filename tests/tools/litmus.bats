# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# maint/litmus notices what it has to notice: with a toy ring, a toy test, and a herd7
# that knows just this test.

setup() {
	top=$BATS_TEST_DIRNAME/../..
	toy=$BATS_TEST_TMPDIR/toy
	dir=$toy/Documentation/litmus-tests/kvm
	mkdir -p "$toy/virt/kvm" "$toy/include/linux" "$dir"
	code=$toy/virt/kvm/dirty_ring.c
	cat > "$code" <<-'END'
		/* smp_wmb() in a comment */
		static int pop(struct ring *ring)
		{
			/* Pairs with push(). */
			if (!smp_load_acquire(&ring->slot[ring->nr].full))
				return pr_info("smp_wmb()");

			return READ_ONCE(ring->slot[ring->nr]
					 .value);
		}

		static void push(struct ring *ring, int value)
		{
			WRITE_ONCE(ring->slot[ring->nr].value, value);
			smp_store_release(&ring->slot[ring->nr].full, 1);
		}
	END
	: > "$toy/virt/kvm/dirty_ring_setup.c"
	: > "$toy/include/linux/kvm_dirty_ring.h"
	litmus=$dir/toy.litmus
	cat > "$litmus" <<-'END'
		C toy

		(*
		 * Result: Never
		 *)

		{
		}

		P0(int *value, int *full)
		{
			// push(); nobody else
			WRITE_ONCE(*value, 1);
			smp_store_release(full, 1);
		}

		P1(int *value, int *full)
		{
			int f;
			int v;

			// pop()
			f = smp_load_acquire(full);
			if (f == 1)
				v = READ_ONCE(*value);
		}

		exists (1:f=1 /\ 1:v=0)
	END
}

# compares STATUS TEXT...: the comparison ends like this, and says all of this
compares() {
	local want=$1 text
	shift
	run "$top/maint/litmus" --compare "$toy"
	echo "status $status: $output"
	[[ $status -eq $want ]] || return
	for text; do
		[[ $output == *"$text"* ]] || { echo "missing: $text"; return 1; }
	done
}

# checks STATUS TEXT...: the same, of a run with the herd7 on stdin
checks() {
	local want=$1 text
	shift
	cat > "$BATS_TEST_TMPDIR/herd7"
	chmod +x "$BATS_TEST_TMPDIR/herd7"
	run python3 "$top/maint/litmus.py" --herd "$BATS_TEST_TMPDIR/herd7" --model "$toy" \
		--out "$BATS_TEST_TMPDIR/out" --tests "$litmus" --code "$code"
	echo "status $status: $output"
	[[ $status -eq $want ]] || return
	for text; do
		[[ $output == *"$text"* ]] || { echo "missing: $text"; return 1; }
	done
}

# What the memory model says of this test
model() {
	cat <<-'END'
		#!/bin/bash
		if grep -q 'smp_load_acquire(full)' "$3" && grep -q 'smp_store_release(full' "$3"
		then
			said=Never
		else
			said=Sometimes
		fi
		echo "Observation toy $said 0 0"
		grep -q 'READ_ONCE(\*value)' "$3" && grep -q 'WRITE_ONCE(\*value' "$3" ||
			echo "Flag data-race"
	END
}

@test "litmus: a test that is like the code" {
	compares 0 "ok 1 toy # SKIP only compared" "2 passed, 0 failed, 2 skipped"
}

@test "litmus: an ordering that is new in the code" {
	sed -i '/Pairs with/i smp_mb();' "$code"
	compares 1 "not ok 3 every ordering in the code is in a test" \
		"# in no test: pop(): smp_mb" "1 passed, 1 failed"
}

@test "litmus: the same once more, in the same function" {
	sed -i 's/^WRITE_ONCE.*/&\n&/' "$code"
	compares 1 "# in no test: push(): WRITE_ONCE of value, number 2"
}

@test "litmus: one that is new outside of functions, and a lock" {
	printf '#define later(x) smp_store_mb(x, 1)\nmutex_lock(&ring->lock);\n' >> "$code"
	compares 1 "# in no test: no function(): lock of ring_lock" \
		"# in no test: no function(): store (mb) of x"
}

@test "litmus: one that is local to a CPU" {
	printf 'void count(struct ring *ring)\n{\n\tlocal64_inc(&ring->count);\n}\n' >> "$code"
	compares 1 "# in no test: count(): inc (relaxed) of count"
}

@test "litmus: an ordering that has gone from the code" {
	sed -i '/WRITE_ONCE/d' "$code"
	compares 1 "not ok 2 every ordering in a test is in the code" \
		"# toy: not in the code: push(): WRITE_ONCE of value"
}

@test "litmus: one that has become weaker in the code" {
	sed -i 's/smp_load_acquire(&/READ_ONCE(/' "$code"
	compares 1 "# toy: weaker in the code: pop(): load-acquire of full"
}

@test "litmus: one that has become stronger in the code" {
	sed -i 's/WRITE_ONCE(/smp_store_release(\&/' "$code"
	compares 1 "# in no test as strong as this: push(): store-release of value"
}

@test "litmus: a function that has another name" {
	sed -i 's/push(/shove(/' "$code"
	compares 1 "# toy: there is no function push()"
}

@test "litmus: a test that does not say what it is" {
	sed -i '1s/toy/tory/; /Result/d; /\/\/ pop/d' "$litmus"
	compares 1 "not ok 1 toy" "does not begin with 'C toy'" "does not say 'Result: Never'" \
		"P1: nothing says whose smp_load_acquire() this is"
}

@test "litmus: each ordering is weakened" {
	model | checks 0 "ok 1 never happens" \
		"ok 2 P0 push(): smp_store_release(full) weakened to WRITE_ONCE" \
		"ok 3 P1 pop(): smp_load_acquire(full) weakened to READ_ONCE" \
		"6 passed, 0 failed, 0 skipped"
	grep -q 'WRITE_ONCE(\*full, 1)' "$BATS_TEST_TMPDIR"/out/toy/*
	grep -q 'f = READ_ONCE(\*full)' "$BATS_TEST_TMPDIR"/out/toy/*
	grep -q 'v = \*value;' "$BATS_TEST_TMPDIR"/out/toy/*
}

@test "litmus: what must never happen can happen" {
	checks 1 "not ok 1 never happens" "not ok 1 toy" "# never happens: sometimes" <<-'END'
		#!/bin/bash
		echo "Observation toy Sometimes 1 1"
	END
}

@test "litmus: an ordering that is not needed" {
	model | sed 's/smp_load_acquire(full)/f = /' |
		checks 1 "not ok 3 P1 pop(): smp_load_acquire(full) weakened to READ_ONCE"
}

@test "litmus: a READ_ONCE() that is not needed" {
	model | sed "s/'READ_ONCE[^']*'/v/" |
		checks 1 "not ok 4 READ_ONCE(), WRITE_ONCE() and atomicity are needed" \
			"# not in toy: pop(): READ_ONCE of value"
}

@test "litmus: a race in the test itself" {
	checks 1 "not ok 1 never happens" "# never happens: racy" <<-'END'
		#!/bin/bash
		echo "Observation toy Never 0 1"
		echo "Flag data-race"
	END
}

@test "litmus: herd7 that does not understand, or dies" {
	checks 1 "not ok 1 never happens" "herd7: no idea" <<-'END'
		#!/bin/bash
		echo no idea >&2
	END
	checks 1 "not ok 1 never happens" <<-'END'
		#!/bin/bash
		echo "Observation toy Never 0 1"
		kill -9 $$
	END
}

@test "litmus: nonsense is refused" {
	local args
	for args in --bogus /nowhere/at-all 'no-such-test' '../toy'; do
		run "$top/maint/litmus" "$args"
		echo "$args: status $status: $output"
		[[ $status -eq 1 && ${#lines[@]} -eq 1 ]]
	done
	run "$top/maint/herd" x
	[[ $status -eq 1 && $output == *"unknown argument 'x'"* ]]
}
