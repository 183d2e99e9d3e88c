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

@test "bisect: nonsense in --from and --to" {
	toy
	refused "--from nope: no section and no patch" maint/bisect --from nope
	refused "--to KVM-Nope: no section and no patch" maint/bisect --to KVM-Nope
	refused "--to wants a section or a patch" maint/bisect --to
	refused "--from ring comes after --to KVM-Prepare" \
		maint/bisect --from ring --to KVM-Prepare
	refused "--boot and --no-boot exclude each other" maint/bisect --boot --no-boot
}

@test "series: git am makes the commits of the tree, one series after the other" {
	toy_tree
	run -0 maint/series
	[[ $output == "build/series: 2 patches, 1 in preparation, 1 in ring" ]]
	git -C "$linux" checkout -q -b am base
	(. "$repo/maint/lib.sh"; fixed_identity
	 git -C "$linux" am -q "$repo"/build/series/preparation/*.patch
	 git -C "$linux" am -q "$repo"/build/series/ring/*.patch)
	[[ $(git -C "$linux" rev-parse 'am^{tree}') == $(git -C "$linux" rev-parse 'dirty-ring^{tree}') ]]
	[[ $(git -C "$linux" log --format=%B base..am) == \
	   $(git -C "$linux" log --format=%B base..dirty-ring) ]]
	[[ $(cat build/series/series) == $(cd build/series && ls ./*/*.patch | sed 's|./||') ]]
	[[ ! -e build/series/fixes ]]
	grep -q '^Subject: \[PATCH 0/1\] KVM: Toy box$' build/series/preparation/0000-cover-letter
	grep -q '^Subject: \[PATCH 0/1\] KVM: Toy$' build/series/ring/0000-cover-letter
	grep -q '^  1: KVM: Add the ring$' build/series/ring/0000-cover-letter
	grep -q '^Subject: \[PATCH 1/1\] KVM: Prepare$' build/series/preparation/0001-KVM-Prepare.patch
	run ! grep -qr New-file build/series
}

@test "series: --check applies each series after the one before" {
	command -v quilt > /dev/null || skip "there is no quilt"
	toy
	run -0 maint/series --check
	[[ $output == *"applies to $KSRC, with git am and with quilt" ]]

	# The preparation cannot need the ring.
	sed -i 's/^ 12$/ ring/' patches/KVM-Prepare.patch
	run -1 maint/series --check
	[[ $output == *"git am of preparation to $KSRC: "* ]]
}

@test "series: refuses fixes and preparation that come after the ring" {
	toy
	sed -i 's/^# ring$/# fixes/' patches/series
	refused "KVM-Add-the-ring.patch: section 'fixes' comes after" maint/series
	[[ ! -e build/series ]]
}

@test "series: names a cover letter that is missing" {
	toy
	rm patches/cover-letter-preparation
	refused "patches/cover-letter-preparation is missing" maint/series
}

@test "series: names a new file that is missing" {
	toy
	rm virt/kvm/ring.c
	refused "virt/kvm/ring.c is missing" maint/series
	[[ ! -e build/series ]]
}

# origin LINE...: what lint says of a patch with these before Signed-off-by
origin() {
	local line

	sed -i '/^Forwarded:/d' patches/KVM-Prepare.patch
	for line; do
		sed -i "/^Signed-off-by:/i\\$line" patches/KVM-Prepare.patch
	done
	run maint/lint --origin
	sed -i '/^Signed-off-by:/i Forwarded: not-needed' patches/KVM-Prepare.patch
	sed -i '/^Make room/,/^Signed-off-by:/{/^Make room\|^$\|^Forw\|^Sign/!d}' patches/KVM-Prepare.patch
}

@test "lint: every patch names its origin, and only one" {
	toy
	run -0 maint/lint --origin
	[[ $output == "lint: nothing found" ]]

	for line in 'Origin: base 5.10' 'Upstream: "KVM: Prepare" (v5.11)' \
		    'Fixes: 0123456789ab ("KVM: Unprepared")'; do
		origin "$line"
		[[ $status == 0 ]] || { echo "$line: $output"; false; }
	done
	origin 'Upstream: "KVM: Prepare for a ring whose subject is of' ' two lines" (v5.11)'
	[[ $status == 0 ]]

	origin
	[[ $status == 1 && $output == "origin: KVM-Prepare.patch: one of "* ]]
	origin 'Origin: base 5.10' 'Forwarded: not-needed'
	[[ $status == 1 && $output == "origin: KVM-Prepare.patch: one of "* ]]
	for line in 'Origin: somewhere' 'Fixes: v5.10' 'Fixes: 0123 ("KVM: Short")' \
		    'Upstream: v5.11' 'Upstream: "KVM: Prepare"' 'Forwarded: yes'; do
		origin "$line"
		[[ $status == 1 ]] || { echo "$line: $output"; false; }
		[[ ${lines[0]} == "origin: KVM-Prepare.patch: no origin: $line" ]]
	done

	# Not behind the others, nor in the middle of the text.
	sed -i 's/^Forwarded/xForwarded/; /^Signed/a Forwarded: not-needed' patches/KVM-Prepare.patch
	run -1 maint/lint --origin
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
		[[ -f $s && -x $s ]] || continue
		run -0 "$s" --help
		[[ $output == *usage:* ]]
		[[ $s != maint/help ]] || continue
		refused banana "$s" banana
	done
}
