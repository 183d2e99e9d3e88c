#!/usr/bin/env bats
# SPDX-License-Identifier: GPL-2.0
# shellcheck disable=SC2012,SC2154
# maint/refresh: what it folds back, and what it refuses.

load toy

@test "refresh: right after tree changes nothing" {
	toy_tree
	before=$(state)
	run -0 maint/refresh
	[[ -z $output ]]
	[[ $(state) == "$before" ]]
}

@test "refresh: other line numbers, of another kernel, change nothing" {
	toy
	sed -i '1i one more line' "$KSRC/virt/kvm/kvm_main.c" "$KSRC/include/linux/kvm_host.h"
	maint/tree
	before=$(state)
	run -0 maint/refresh
	[[ -z $output ]]
	[[ $(state) == "$before" ]]
}

@test "refresh: the user's git configuration does not matter" {
	toy_tree
	before=$(state)
	mkdir -p "$HOME/.config/git"
	echo '*.c -diff' > "$HOME/.config/git/attributes"
	echo '*.h binary' > "$BATS_TEST_TMPDIR/attributes"
	git config --file "$HOME/.gitconfig" core.attributesFile "$BATS_TEST_TMPDIR/attributes"
	git config --file "$HOME/.gitconfig" diff.noprefix true
	git config --file "$HOME/.gitconfig" diff.context 7
	git config --file "$HOME/.gitconfig" diff.renames copies
	git config --file "$HOME/.gitconfig" core.abbrev 40
	git config --file "$HOME/.gitconfig" color.ui always
	git config --file "$HOME/.gitconfig" format.signature banana
	GIT_DIFF_OPTS=-u9 maint/refresh
	[[ $(state) == "$before" ]]
}

@test "refresh: an edit that was squashed changes its patch alone" {
	toy_tree
	cp -r patches "$BATS_TEST_TMPDIR/before"
	sed -i 's/room/more room/' "$linux/virt/kvm/kvm_main.c"
	git -C "$linux" commit -q -a --fixup HEAD~1
	GIT_EDITOR=true GIT_SEQUENCE_EDITOR=true \
		git -C "$linux" rebase -q -i --autosquash base
	run -0 maint/refresh
	[[ $output == "wrote patches/KVM-Prepare.patch" ]]
	grep -q '^+more room$' patches/KVM-Prepare.patch
	cmp patches/KVM-Add-the-ring.patch "$BATS_TEST_TMPDIR"/before/KVM-Add-the-ring.patch
	cmp patches/series "$BATS_TEST_TMPDIR/before/series"

	# And a tree made of it is the same.
	tree=$(git -C "$linux" rev-parse 'HEAD^{tree}')
	rm -rf build
	maint/tree
	[[ $(git -C "$linux" rev-parse 'HEAD^{tree}') == "$tree" ]]
}

@test "refresh: a change of a new file goes to the file, not to a patch" {
	toy_tree
	cp -r patches "$BATS_TEST_TMPDIR/before"
	echo Third >> "$linux/virt/kvm/ring.c"
	git -C "$linux" commit -q -a --amend --no-edit
	run -0 maint/refresh
	[[ $output == "wrote virt/kvm/ring.c" ]]
	cmp virt/kvm/ring.c "$linux/virt/kvm/ring.c"
	diff -r patches "$BATS_TEST_TMPDIR/before"
	run -0 maint/tree
	[[ $output == "build/linux is up to date" ]]
}

@test "refresh: a new patch gets its predecessor's section, and says so" {
	toy_tree
	echo more >> "$linux/Documentation/virt/kvm/api.rst"
	echo text > "$linux/Documentation/virt/kvm/ring.rst"
	commit "KVM: Document the ring"
	run -0 maint/refresh
	[[ $output == *"KVM-Document-the-ring.patch, in section 'ring'"* ]]
	[[ $(tail -n 1 patches/series) == KVM-Document-the-ring.patch ]]
	grep -q '^New-file: Documentation/virt/kvm/ring.rst$' patches/KVM-Document-the-ring.patch
	run ! grep -q '^+text' patches/KVM-Document-the-ring.patch
	[[ $(cat Documentation/virt/kvm/ring.rst) == text ]]
	run -0 maint/refresh
	[[ -z $output ]]
}

@test "refresh: no number in a name: another order changes patches/series alone" {
	toy_tree
	GIT_SEQUENCE_EDITOR='sed -i 1{h\;d}\;2G' git -C "$linux" rebase -q -i base
	run -0 maint/refresh
	[[ $output == "wrote patches/series" ]]
	[[ $(sed -n 's/^[^#].*/&/p' patches/series | paste -sd' ') == \
	   "KVM-Add-the-ring.patch KVM-Prepare.patch" ]]
	run ! ls patches/[0-9]*
}

@test "refresh: refuses two patches of one name" {
	toy_tree
	echo work >> "$linux/virt/kvm/kvm_main.c"
	commit "KVM: Prepare"
	refused "'KVM: Prepare' and 'KVM: Prepare' would both be KVM-Prepare.patch" maint/refresh
	git -C "$linux" commit -q --amend -m "KVM:  Prepare!"
	refused "'KVM: Prepare' and 'KVM:  Prepare!' would both be" maint/refresh
}

@test "refresh: a long subject is cut, and a subject alone is a name" {
	toy_tree
	echo work >> "$linux/virt/kvm/kvm_main.c"
	commit "KVM: $(printf 'very %.0s' {1..30})/../../long, ring's"
	maint/refresh
	name=$(tail -n 1 patches/series)
	[[ $name =~ ^KVM-(very-)+v.patch$ ]]
	((${#name} <= 86))
	grep -q "^Subject: KVM: very .*/../../long, ring's$" "patches/$name"
}

@test "refresh: a patch that is gone goes, with its new files" {
	toy_tree
	git -C "$linux" reset -q --hard HEAD~1
	maint/refresh
	[[ ! -e virt/kvm/ring.c ]]
	[[ ! -e patches/KVM-Add-the-ring.patch ]]
	[[ $(tail -n 1 patches/series) == KVM-Prepare.patch ]]
}

@test "refresh: patches have fixed authors, and no index, signature or date" {
	toy_tree
	echo work >> "$linux/Documentation/virt/kvm/api.rst"
	commit "KVM: Work"
	maint/refresh
	grep -q '^From: Seed' patches/KVM-Work.patch
	run ! grep -qE 'Somebody|^index |^Date:|^-- $|PATCH' patches/KVM-Work.patch
}

@test "refresh: refuses a change that is not committed" {
	toy_tree
	echo work >> "$linux/virt/kvm/kvm_main.c"
	refused "not committed: virt/kvm/kvm_main.c" maint/refresh
}

@test "refresh: refuses a new file that git does not know" {
	toy_tree
	echo work > "$linux/virt/kvm/new.c"
	refused "not committed: virt/kvm/new.c" maint/refresh
}

@test "refresh: refuses a tree in the middle of a rebase" {
	toy_tree
	GIT_SEQUENCE_EDITOR='sed -i 1s/pick/edit/' git -C "$linux" rebase -q -i base
	refused "rebase" maint/refresh
}

@test "refresh: refuses a tree in the middle of a merge" {
	toy_tree
	git -C "$linux" checkout -q -b other base
	echo 13th >> "$linux/README"
	commit "Other"
	git -C "$linux" checkout -q dirty-ring
	git -C "$linux" merge -q --no-commit --no-ff other
	refused "MERGE_HEAD" maint/refresh
}

@test "refresh: refuses a tree in the middle of git am" {
	toy_tree
	maint/series
	run ! git -C "$linux" am -q "$repo"/build/series/preparation/0001-* 2> /dev/null
	refused "rebase-apply" maint/refresh
}

@test "refresh: refuses a tree in the middle of a bisection" {
	toy_tree
	git -C "$linux" bisect start -q HEAD base
	refused "BISECT_LOG" maint/refresh
}

@test "refresh: refuses a tree that is not on a branch" {
	toy_tree
	git -C "$linux" checkout -q --detach HEAD~1
	refused "not on a branch" maint/refresh
}

@test "refresh: refuses fixup!, squash! and amend! commits" {
	for kind in fixup squash amend; do
		rm -rf "${BATS_TEST_TMPDIR:?}"/*
		toy_tree
		echo work >> "$linux/virt/kvm/kvm_main.c"
		commit "$kind! KVM: Prepare"
		refused "'$kind! KVM: Prepare' is not squashed" maint/refresh
	done
}

@test "refresh: refuses a merge" {
	toy_tree
	git -C "$linux" checkout -q -b other base
	echo 31 >> "$linux/virt/kvm/kvm_main.c"
	commit "KVM: Other"
	git -C "$linux" checkout -q dirty-ring
	git -C "$linux" merge -q -m "KVM: Merge" other
	refused "'KVM: Merge' is a merge" maint/refresh
}

@test "refresh: refuses to delete a file" {
	toy_tree
	rm "$linux/Documentation/virt/kvm/api.rst"
	commit "KVM: Delete"
	refused "'KVM: Delete' deletes or renames Documentation/virt/kvm/api.rst" maint/refresh
}

@test "refresh: refuses to rename a file" {
	toy_tree
	git -C "$linux" mv Documentation/virt/kvm/api.rst Documentation/virt/kvm/zzz.rst
	commit "KVM: Rename"
	refused "'KVM: Rename' deletes or renames Documentation/virt/kvm/api.rst" maint/refresh
}

@test "refresh: refuses to change a mode" {
	toy_tree
	chmod +x "$linux/Documentation/virt/kvm/api.rst"
	commit "KVM: Mode"
	refused "'KVM: Mode' changes the mode of Documentation/virt/kvm/api.rst" maint/refresh
}

@test "refresh: refuses a symbolic link" {
	toy_tree
	ln -s kvm_main.c "$linux/virt/kvm/link.c"
	commit "KVM: Link"
	refused "'KVM: Link' brings virt/kvm/link.c" maint/refresh
}

@test "refresh: refuses to touch a new file after its own patch" {
	toy_tree
	echo Third >> "$linux/virt/kvm/ring.c"
	commit "KVM: Extend"
	refused "'KVM: Extend' edits virt/kvm/ring.c, which 'KVM: Add the ring' brings" maint/refresh
}

@test "refresh: refuses a file that the layout does not allow" {
	toy_tree
	echo work >> "$linux/README"
	commit "Edit the readme"
	refused "'Edit the readme' touches README" maint/refresh
}

@test "refresh: refuses a new file where the layout has none" {
	toy_tree
	mkdir "$linux/maint"
	echo work > "$linux/maint/tree"
	commit "KVM: Take over"
	refused "'KVM: Take over' touches maint/tree" maint/refresh
}

@test "refresh: refuses to replace a file that is not the series'" {
	toy_tree
	mkdir -p Documentation/virt/kvm
	echo mine > Documentation/virt/kvm/notes.rst
	echo work > "$linux/Documentation/virt/kvm/notes.rst"
	commit "KVM: Notes"
	refused "Documentation/virt/kvm/notes.rst" maint/refresh
}

@test "refresh: refuses an empty commit" {
	toy_tree
	git -C "$linux" commit -q --allow-empty -m "KVM: Nothing"
	refused "'KVM: Nothing' is empty" maint/refresh
}

@test "refresh: refuses a message that a mail cannot hold" {
	toy_tree
	echo work >> "$linux/virt/kvm/kvm_main.c"
	commit $'KVM: Cut\n\nAbove\n---\nBelow'
	refused "'KVM: Cut' has a line" maint/refresh
}

@test "refresh: refuses if a patch changed since the tree was made" {
	toy_tree
	sed -i 's/Make room/Make more room/' patches/KVM-Prepare.patch
	refused "changed since the tree was made" maint/refresh
}

@test "refresh: refuses if a new file changed since the tree was made" {
	toy_tree
	echo Third >> virt/kvm/ring.c
	refused "changed since the tree was made" maint/refresh
}

@test "refresh: refuses without a tree" {
	toy
	refused "make tree" maint/refresh
}
