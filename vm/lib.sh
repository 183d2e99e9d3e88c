# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash disable=SC2034,SC2154
# What those that boot machines share, and what checks them; to be sourced after
# maint/lib.sh.

# number NAME MIN MAX: a whole number in a range, or one clear line.
number() {
	local name=$1 min=$2 max=$3
	[[ ${!name} =~ ^[0-9]{1,7}$ ]] && ((10#${!name} >= min && 10#${!name} <= max)) ||
		die "$name='${!name}' must be a number from $min to $max"
	printf -v "$name" %d "$((10#${!name}))"
}

# kvm_opts: have the module parameters of KVM_OPTS in the array opts
kvm_opts() {
	local o

	opts=()
	read -ra opts <<< "${KVM_OPTS:-}"
	for o in "${opts[@]}"; do
		[[ $o =~ ^kvm(_[a-z]+)?\.[a-z0-9_]+=[^[:space:]]+$ ]] ||
			die "KVM_OPTS: '$o' is not of the form kvm_amd.npt=0"
	done
}

# is_kernel FILE SAID: is it a kernel for the machine of maint/arch?
is_kernel() {
	[[ $(dd if="$1" bs=1 skip="$magic_at" count="${#magic}" status=none |
		tr -d '\0') == "$magic" ]] || die "$2$1 is no kernel for $arch"
}

# pack_init DIR ROOT: begin an initramfs: busybox, vm/init, what opts must have done
pack_init() {
	local fs=$1 root=$2 o

	mkdir -p "$fs/bin" "$fs/modules" "$fs/vm"
	cp "$root/bin/busybox" "$fs/bin"
	cp "$top/vm/init" "$fs/init"
	: > "$fs/vm/modules"
	for o in "${opts[@]}"; do
		echo "${o%%=*}"
	done > "$fs/vm/params"
}

# pack_command DIR LINE...: have RUN run, by bash, after these lines
pack_command() {
	local fs=$1
	shift
	{
		echo 'cd '"$(printf %q "$PWD")"' 2>/dev/null || cd /'
		echo 'export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'
		echo 'export HOME=/root USER=root LANG=C.UTF-8'
		echo "export TERM=$(printf %q "${TERM:-linux}")"
		printf '%s\n' "$@"
	} > "$fs/vm/env"
	printf '%s\n' "$RUN" > "$fs/vm/command"
}

# pack DIR FILE: make the initramfs
pack() {
	(cd "$1" && find . | cpio -o -H newc -R 0:0 --quiet) > "$2"
}

# fail CODE MESSAGE: give up, and say where the kernel's log is
fail() {
	local code=$1
	shift
	echo "$script: $*; kernel log: $log" >&2
	exit "$code"
}

# judge RESULT TAINT: end as the machine did. The result is what vm/init reported
# last, the taint what it reported of the kernel.
judge() {
	local result=$1 taint=$2 splat complaints code

	# The kernel's words for what must never happen. A machine that died has
	# most likely said why.
	complaints='WARNING: |BUG: |BUG kvm_|kernel BUG|Oops|Kernel panic|Call Trace'
	complaints+='|general protection fault|invalid opcode|rcu: INFO: |rcu_.*stall'
	complaints+='|INFO: (task .* blocked|trying to register)|inconsistent lock state'
	complaints+='|possible (circular|recursive) locking|Slab cache still has objects'
	complaints+='|UBSAN: |KASAN: |KCSAN: '
	splat=$(grep -am 1 -E "$complaints" "$log" | tr -d '\r') || :
	# Proprietary, forced, out-of-tree and unsigned modules taint too; these are
	# bad page, died, warned, soft lockup.
	if [[ ! $splat && $taint ]] &&
			((taint & (1 << 5 | 1 << 7 | 1 << 9 | 1 << 14))); then
		splat="the kernel is tainted: $taint"
	fi

	[[ $result != broken\ * ]] || fail 1 "${result#broken }"
	if [[ ! $result =~ ^exit\ ([0-9]+)$ ]]; then
		fail 98 "the machine died before the command ended${splat:+: $splat}"
	fi
	code=${BASH_REMATCH[1]}
	grep -aq "vm: exit $code" "$log" ||
		fail 98 "the kernel's log is cut short"
	if [[ $splat && ${ALLOW_SPLAT:-0} != 1 ]]; then
		echo "$script: the kernel complained: $splat; kernel log: $log" >&2
		((code)) || code=99
	elif ((code)); then
		echo "$script: the command ended with $code; kernel log: $log" >&2
	fi
	exit "$code"
}

n=0
failed=0

# check NAME STATUS OUT ERR [VARIABLE=VALUE...]: the script $checked must end with
# STATUS, and its output and errors must match the patterns; then command $also
# must succeed. Leaves files in $tmp; reports as TAP.
also=true
check() {
	local name=$1 status=$2 out=$3 err=$4 rc=0
	shift 4
	n=$((n + 1))
	env "$@" "$checked" < /dev/null > "$tmp/out" 2> "$tmp/err" || rc=$?
	if [[ $rc == "$status" && $(< "$tmp/out") =~ ^$out$ &&
	      $(< "$tmp/err") =~ ^$err$ ]] && $also; then
		echo "ok $n $name"
		return
	fi
	failed=1
	echo "not ok $n $name"
	echo "# exit status $rc"
	sed 's/^/# out: /' "$tmp/out"
	sed 's/^/# err: /' "$tmp/err"
}
