# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash disable=SC2154
# A repository like this one, with a kernel and a series that fit on a page.

here=$(realpath "$BATS_TEST_DIRNAME/../..")
bats_require_minimum_version 1.5.0

# Make $repo, a repository with this one's scripts, and the toy's series in it.
toy() {
	unset ARCH CONFIG KVERSION KSRC KDIR KERNEL RUN SHARE MEM RATE RING
	export XDG_CACHE_HOME=$BATS_TEST_TMPDIR/cache HOME=$BATS_TEST_TMPDIR
	export KSRC=$BATS_TEST_TMPDIR/src
	repo=$BATS_TEST_TMPDIR/repo
	linux=$repo/build/linux

	mkdir -p "$KSRC"/{virt/kvm,include/linux,Documentation/virt/kvm}
	printf 'VERSION = 5\nPATCHLEVEL = 10\nSUBLEVEL = 999\n' > "$KSRC/Makefile"
	seq 1 30 > "$KSRC/virt/kvm/kvm_main.c"
	seq 1 30 > "$KSRC/include/linux/kvm_host.h"
	seq 1 9 > "$KSRC/Documentation/virt/kvm/api.rst"
	seq 1 9 > "$KSRC/README"
	printf '*.o\n# Debian packaging:\n/*\n' > "$KSRC/.gitignore"

	mkdir -p "$repo/patches" "$repo/virt/kvm"
	cp -r "$here"/{maint,configs,Makefile,linux-version} "$repo"
	printf 'First\nSecond\n' > "$repo/virt/kvm/ring.c"
	cat > "$repo/patches/series" <<-EOF
		# SPDX-License-Identifier: GPL-2.0
		# The toy's series.

		# preparation
		KVM-Prepare.patch

		# ring
		KVM-Add-the-ring.patch
	EOF
	cat > "$repo/patches/KVM-Prepare.patch" <<-EOF
		From: $(. "$here/linux-version"; echo "$base_author <$base_email>")
		Subject: KVM: Prepare

		Make room.

		Forwarded: not-needed
		Signed-off-by: Somebody <somebody@example.org>
		---

		diff --git a/virt/kvm/kvm_main.c b/virt/kvm/kvm_main.c
		--- a/virt/kvm/kvm_main.c
		+++ b/virt/kvm/kvm_main.c
		@@ -10,7 +10,7 @@
		 10
		 11
		 12
		-13
		+room
		 14
		 15
		 16
	EOF
	cat > "$repo/patches/KVM-Add-the-ring.patch" <<-EOF
		From: $(. "$here/linux-version"; echo "$base_author <$base_email>")
		Subject: KVM: Add the ring

		It has two lines.

		Forwarded: not-needed
		Signed-off-by: Somebody <somebody@example.org>
		---
		New-file: virt/kvm/ring.c

		diff --git a/include/linux/kvm_host.h b/include/linux/kvm_host.h
		--- a/include/linux/kvm_host.h
		+++ b/include/linux/kvm_host.h
		@@ -28,3 +28,4 @@
		 28
		 29
		 30
		+ring
	EOF
	printf 'KVM: Toy\n\nA cover letter.\n' > "$repo/patches/cover-letter"
	printf 'KVM: Toy box\n\nBefore it.\n' > "$repo/patches/cover-letter-preparation"
	cd "$repo" || return
}

# The same, and its tree, on which commit writes.
toy_tree() {
	toy
	maint/tree
	git -C "$linux" config user.name Somebody
	git -C "$linux" config user.email somebody@example.org
}

# commit SUBJECT: commit everything in the tree
commit() {
	git -C "$linux" add -A -f
	git -C "$linux" commit -q -m "$1"
}

# Name and content of all that refresh may write, and the tree's own state.
state() {
	(
		cd "$repo" || exit
		find . -path ./build -prune -o -type f -print0 | sort -z |
			xargs -0 sha256sum
		[[ -d build/linux ]] || exit 0
		git -C build/linux rev-parse HEAD
		git -C build/linux status --porcelain
	)
}

# refused PATTERN COMMAND...: it fails with one line on stderr that matches, and
# changes nothing.
refused() {
	local pattern=$1 before

	shift
	before=$(state 2>/dev/null)
	run -1 --separate-stderr "$@"
	echo "stderr: $stderr"
	[[ $stderr =~ $pattern ]]
	[[ ${#stderr_lines[@]} == 1 ]]
	[[ $(state 2>/dev/null) == "$before" ]]
}
