# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash disable=SC2034
# What every script of this repository needs; to be sourced. Sets
#	top	the repository's root
#	script	the script's path in it
#	build	the folder for everything that is made, not created here
#	cache	the folder for what clones share; created

top=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
script=$(realpath "$0")
script=${script#"$top"/}
build=$top/build
cache=${XDG_CACHE_HOME:-$HOME/.cache}/kvm-dirty-ring
mkdir -p "$cache"

# Where the programs of kmod and others are, which a user's own path lacks.
PATH=$PATH:/usr/sbin:/sbin

# Variables that were given to make are for these scripts, not for the kernel's make.
unset MAKEFLAGS MFLAGS MAKEOVERRIDES MAKELEVEL

# The user's git configuration must not change what these scripts make.
export GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_SYSTEM=/dev/null GIT_ATTR_NOSYSTEM=1
export GIT_CONFIG_COUNT=2
export GIT_CONFIG_KEY_0=core.attributesFile GIT_CONFIG_VALUE_0=/dev/null
export GIT_CONFIG_KEY_1=core.excludesFile GIT_CONFIG_VALUE_1=/dev/null
unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE GIT_DIFF_OPTS GIT_EXTERNAL_DIFF
export LC_ALL=C.UTF-8

# die MESSAGE: give up, with one line on stderr
die() {
	echo "$script: $*" >&2
	exit 1
}

# say MESSAGE: tell how things go
say() {
	echo "$*"
}

# end_children [PID]: end what this script has started, and what that has, last first
end_children() {
	local child

	for child in $(cat /proc/"${1:-$$}"/task/*/children 2>/dev/null); do
		end_children "$child"
		kill "$child" 2>/dev/null || :
	done
}

# leave_nothing: whatever ends this script also ends what it has started, as soon as a
# command that it waits for in the foreground lets it
leave_nothing() {
	trap end_children EXIT
	trap 'exit 130' INT
	trap 'exit 143' TERM HUP
}

# need PACKAGE...: have these Debian packages installed
need() {
	local p missing=() sudo=()

	for p in "$@"; do
		[[ $(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null) == installed ]] ||
			missing+=("$p")
	done
	((${#missing[@]})) || return 0

	if ((EUID)); then
		sudo=(sudo -n)
		sudo -n true 2>/dev/null ||
			die "packages are missing; as root: apt-get install ${missing[*]}"
	fi
	say "installing: ${missing[*]}" >&2
	{
		# Sources that cannot be read may be others than those that are needed.
		"${sudo[@]}" apt-get -q update || :
		"${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qy \
			-o DPkg::Lock::Timeout=600 --no-install-recommends \
			install "${missing[@]}" < /dev/null
	} > "$cache/apt-install.log" 2>&1 ||
		die "apt-get cannot install ${missing[*]}; see $cache/apt-install.log"
}

# known: the names of the architectures
known() {
	local files=("$top"/maint/arch/*)
	echo "${files[*]##*/}"
}

# arch_of [NAME]: have what maint/arch says of this architecture, x86_64 without a name, and
#	arch	its name
#	cross	what the names of its tools begin with, if they are not the host's
arch_of() {
	arch=${1:-x86_64}
	case $arch in
	amd64)		arch=x86_64 ;;
	aarch64)	arch=arm64 ;;
	esac
	[[ $arch != */* && -f $top/maint/arch/$arch ]] ||
		die "ARCH=$arch is unknown here; known: $(known)"
	# shellcheck source=../maint/arch/x86_64
	. "$top/maint/arch/$arch"
	cross=$native-linux-gnu-
	[[ $(uname -m) != "$native" ]] || cross=
}

# need_compiler: install what builds programs for the architecture of arch_of
need_compiler() {
	need gcc libc6-dev
	[[ ! $cross ]] || need "gcc-${native/_/-}-linux-gnu" "libc6-dev-$debian-cross"
}

# series_patches: print the patches of the series, in order
series_patches() {
	sed 's/[[:space:]]*#.*//; /^$/d' "$top/patches/series"
}

# series_sections: print them, each behind its section and a tab
series_sections() {
	awk '/^# / && past { section = substr($0, 3) }
	     !NF { past = 1 }
	     { sub(/[[:space:]]*#.*/, "") }
	     NF { print section "\t" $0 }' "$top/patches/series"
}

# patch_name SUBJECT: print the name of the patch with this subject. Numbers are not
# in it: the order stands in patches/series alone.
patch_name() {
	local name

	name=$(sed -E 's/[^A-Za-z0-9._]+/-/g; s/\.+/./g; s/^-//' <<< "$1" | cut -c1-80 |
		sed 's/[-.]*$//')
	echo "$name.patch"
}

# new_files PATCH...: print the new files that the patches name
new_files() {
	((!$#)) || sed -n 's/^New-file: //p' "$@"
}

# layout_allows PATH: may the series touch this file of Linux? Anything else is
# none of its business.
layout_allows() {
	local dir='Documentation/(admin-guide|litmus-tests|virt/kvm)|arch/[a-z0-9]+/(kvm|include)'
	dir+='|include/(linux|trace/events|uapi/linux)'
	dir+='|tools/testing/selftests/kvm|virt/kvm'

	[[ $1 =~ ^($dir)/ && ! $1 =~ (^|/)\.\.?(/|$) ]]
}

# series_id: identify the series, new files included, by its content
series_id() {
	(
		cd "$top/patches" || exit
		mapfile -t patches < <(series_patches)
		mapfile -t files < <(new_files "${patches[@]}")
		sha256sum series "${patches[@]}"
		((!${#files[@]})) || (cd "$top" && sha256sum "${files[@]}")
	) | sha256sum | cut -d' ' -f1
}

# fixed_identity: make commits that do not depend on who makes them, or when
fixed_identity() {
	. "$top/linux-version"
	export GIT_AUTHOR_NAME=$base_author GIT_AUTHOR_EMAIL=$base_email
	export GIT_AUTHOR_DATE=$base_date GIT_COMMITTER_DATE=$base_date
	export GIT_COMMITTER_NAME=$base_author GIT_COMMITTER_EMAIL=$base_email
}
