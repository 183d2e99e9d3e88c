#!/usr/bin/env bats
# SPDX-License-Identifier: GPL-2.0
# shellcheck disable=SC2012,SC2154
# maint/tree, maint/series, and input that makes no sense.

load toy

@test "tree: one commit for the base and one for each patch" {
	toy_tree
	run git -C "$linux" log --reverse --format=%s
	[[ ${#lines[@]} == 3 ]]
	[[ ${lines[1]} == "KVM: Prepare" ]]
	[[ ${lines[2]} == "KVM: Add the ring" ]]
	cmp virt/kvm/ring.c "$linux/virt/kvm/ring.c"
	[[ $(sed -n 13p "$linux/virt/kvm/kvm_main.c") == room ]]
	[[ $(git -C "$linux" rev-parse base) == $(git -C "$linux" rev-parse HEAD~2) ]]
	[[ -z $(git -C "$linux" status --porcelain --ignored) ]]
}

@test "tree: ordinary git sees a new file" {
	toy_tree
	echo > "$linux/virt/kvm/new.c"
	[[ $(git -C "$linux" status --porcelain) == "?? virt/kvm/new.c" ]]
}

@test "tree: the same commits each time" {
	toy_tree
	first=$(git -C "$linux" rev-parse HEAD)
	rm -rf build "$XDG_CACHE_HOME"
	git config --file "$HOME/.gitconfig" user.name "Somebody Else"
	maint/tree
	[[ $(git -C "$linux" rev-parse HEAD) == "$first" ]]
}

@test "tree: a second time does nothing" {
	toy_tree
	touch "$BATS_TEST_TMPDIR/now"
	run -0 maint/tree
	[[ $output == "build/linux is up to date" ]]
	[[ -z $(find "$linux" -path "$linux/.git" -prune -o -newer "$BATS_TEST_TMPDIR/now" -print) ]]
}

@test "tree: follows a series that changed" {
	toy_tree
	echo Third >> virt/kvm/ring.c
	run -0 maint/tree
	cmp virt/kvm/ring.c "$linux/virt/kvm/ring.c"
	[[ $(git -C "$linux" rev-list --count base..HEAD) == 2 ]]
}

@test "tree: keeps work in progress while the series is the same" {
	toy_tree
	echo work >> "$linux/virt/kvm/kvm_main.c"
	run -0 maint/tree
	[[ $(tail -n 1 "$linux/virt/kvm/kvm_main.c") == work ]]
}

@test "tree: refuses to destroy changes that are not committed" {
	toy_tree
	echo work >> "$linux/virt/kvm/kvm_main.c"
	echo Third >> virt/kvm/ring.c
	refused "not committed" maint/tree
}

@test "tree: refuses to destroy a new file that git does not know" {
	toy_tree
	echo work > "$linux/virt/kvm/new.c"
	echo Third >> virt/kvm/ring.c
	refused "not committed" maint/tree
}

@test "tree: refuses to destroy commits that are not folded back" {
	toy_tree
	echo work >> "$linux/virt/kvm/kvm_main.c"
	commit "KVM: Work"
	echo Third >> virt/kvm/ring.c
	refused "not folded back" maint/tree
}

@test "tree: names a patch that does not apply, and keeps the tree" {
	toy_tree
	sed -i 's/^ 12$/ twelve/' patches/KVM-Prepare.patch
	refused "KVM-Prepare.patch does not apply.*virt/kvm/kvm_main.c" maint/tree
}

@test "tree: names a patch that does not apply, without a tree" {
	toy
	sed -i 's/^ 12$/ twelve/' patches/KVM-Prepare.patch
	refused "KVM-Prepare.patch does not apply.*virt/kvm/kvm_main.c" maint/tree
	[[ ! -e $linux ]]
}

@test "tree: no fuzz: one line of context that differs is too much" {
	toy
	sed -i 's/^ 16$/ sixteen/' patches/KVM-Prepare.patch
	refused "KVM-Prepare.patch does not apply" maint/tree
}

@test "tree: names a new file that is missing" {
	toy
	rm virt/kvm/ring.c
	refused "virt/kvm/ring.c" maint/tree
}

@test "tree: names a patch that is missing" {
	toy
	rm patches/KVM-Prepare.patch
	refused "KVM-Prepare.patch" maint/tree
}

@test "tree: a new file outside of the layout is refused" {
	toy
	sed -i 's|^New-file: .*|New-file: virt/kvm/../../README|' patches/KVM-Add-the-ring.patch
	refused "README" maint/tree
}

@test "tree: KSRC may be a tarball" {
	toy
	tar -cJf "$BATS_TEST_TMPDIR/linux.tar.xz" -C "$BATS_TEST_TMPDIR" src
	KSRC=$BATS_TEST_TMPDIR/linux.tar.xz maint/tree
	cmp virt/kvm/ring.c "$linux/virt/kvm/ring.c"
}

@test "tree: nonsense in KSRC" {
	toy
	KSRC=/nowhere refused "KSRC=/nowhere" maint/tree
	KSRC=$repo refused "KSRC=$repo is not the source of Linux 5.10" maint/tree
	mkdir "$BATS_TEST_TMPDIR/empty"
	KSRC=$BATS_TEST_TMPDIR/empty refused "empty is not the source of Linux 5.10" maint/tree
	KSRC=$repo/Makefile refused "Makefile cannot be unpacked" maint/tree
	touch "$KSRC/.config"
	refused "was built in" maint/tree
	rm "$KSRC/.config"
	sed -i 's/PATCHLEVEL = 10/PATCHLEVEL = 11/' "$KSRC/Makefile"
	refused "is not the source of Linux 5.10" maint/tree
	[[ ! -e $linux ]]
}

@test "tree: nonsense in KVERSION" {
	toy
	KVERSION=5.10.223-1 refused "KSRC and KVERSION" maint/tree
	unset KSRC
	KVERSION=banana refused "'banana' is no package's version" maint/tree
	KVERSION='5.10; true' refused "is no package's version" maint/tree
}

@test "kernel: nonsense in ARCH and CONFIG" {
	toy
	ARCH=vax refused "ARCH=vax" maint/kernel
	ARCH=../x86_64 refused "ARCH=../x86_64" maint/kernel
	CONFIG=banana refused "CONFIG=banana" maint/kernel
}

@test "series: git am makes the commits of the tree" {
	toy_tree
	maint/series
	git -C "$linux" checkout -q -b am base
	(. "$repo/maint/lib.sh"; fixed_identity
	 git -C "$linux" am -q "$repo"/build/series/*.patch)
	[[ $(git -C "$linux" rev-parse 'am^{tree}') == $(git -C "$linux" rev-parse 'dirty-ring^{tree}') ]]
	[[ $(git -C "$linux" log --format=%B base..am) == \
	   $(git -C "$linux" log --format=%B base..dirty-ring) ]]
	[[ $(cat build/series/series) == $(cd build/series && ls ./*.patch | sed 's|./||') ]]
	grep -q '^Subject: \[PATCH 0/2\] KVM: Toy$' build/series/0000-cover-letter
	run ! grep -q New-file build/series/*
}

@test "series: names a new file that is missing" {
	toy
	rm virt/kvm/ring.c
	refused "virt/kvm/ring.c is missing" maint/series
	[[ ! -e build/series ]]
}

@test "help: lists every target" {
	toy
	run -0 make -s help
	while read -r target; do
		[[ $output == *"  $target "* ]] || { echo "no $target"; false; }
	done < <(sed -n '/^\.PHONY:/{s/.*: //; s/ /\n/g; p}' Makefile)
	for variable in KVERSION KSRC KDIR ARCH CONFIG RUN SHARE KERNEL MEM RATE RING; do
		[[ $output == *$variable* ]] || { echo "no $variable"; false; }
	done
}

@test "scripts: --help helps, an unknown argument is named" {
	toy
	for s in maint/*; do
		[[ -x $s ]] || continue
		run -0 "$s" --help
		[[ $output == *usage:* ]]
		[[ $s != maint/help ]] || continue
		refused banana "$s" banana
	done
}
