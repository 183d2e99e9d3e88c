# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash disable=SC2034,SC2154
# For tests of what a script refuses: one line says what is wrong, and nothing is done.

# Without the variables that scripts take.
clean_environment() {
	unset ARCH CONFIG KERNEL KVERSION RELEASE MODULES SHARE KDIR KSRC KVM_OPTS ICOUNT
	unset TIMEOUT FILES VM_MEM VM_CPUS VM_APPEND VM_QEMU VM_LOG VM_MODEL
	unset MEM RATE RING CPUS LIMIT BANDWIDTH RUNS
	export RUN=true
}

# refuses SCRIPT TEXT [VARIABLE=VALUE...] [-- ARGUMENT...]: the script fails with
# one line, which has its name, or that of a script it calls, and the text
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
