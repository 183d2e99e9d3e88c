# SPDX-License-Identifier: GPL-2.0
# The KVM dirty ring for Linux 5.10. Each target is one script; `make help`
# lists them with the variables they take. Variables reach the scripts through
# the environment.

export ARCH CONFIG KVERSION KSRC KDIR KERNEL RUN SHARE MEM RATE RING BANDWIDTH RUNS

.PHONY: help run test test-long test-pml bench bench-migrate tree refresh series lint litmus bisect modules kernel vm clean

help:		## list the targets
	@maint/help Makefile

run:		## migrate a guest under 5.10: bitmap, then ring [ARCH=arm64 MEM=MiB RATE=pages/s RING=entries]
	@migrate/run

test:		## build and run every test; the last line counts them [ARCH=x86_64|arm64]
	@tests/run

test-long:	## the same, and what takes too long for every time [ARCH=x86_64|arm64]
	@tests/run --long

test-pml:	## the same under Bochs, which has Intel's VMX, with PML and without
	@tests/run 'vmx-*'

bench:		## count what dirty logging costs, here and on other kernels, in instructions [QUICK=1 ARCH=arm64]
	@bench/run $(if $(QUICK),--quick)

bench-migrate:	## time migrations, bitmap and ring, by QEMU, on huge pages, and by an example VMM [RUNS=n BANDWIDTH=MiB/s MEM RATE RING]
	@bench/migrate

tree:		## build/linux: a git tree of 5.10 with one commit per patch [KVERSION=5.10.223-1 | KSRC=dir or tarball]
	@maint/tree

refresh:	## fold the commits of build/linux back into patches/ and the new files
	@maint/refresh

series:		## build/series: fixes, preparation and ring as git am mails, and a quilt series
	@maint/series

lint:		## checkpatch, sparse, W=1, kernel-doc, shellcheck
	@maint/lint

litmus:		## ask the kernel's memory model whether the ring's orderings are enough, and all needed
	@maint/litmus

bisect:		## build every step of the series for x86_64 and arm64, and boot some
	@maint/bisect

modules:	## build/modules/*.ko: KVM for a stock 5.10 kernel [KDIR=headers]
	@kmod/build

kernel:		## build/ARCH/: a whole kernel [ARCH=x86_64|arm64 CONFIG=debug|64k|file]
	@maint/kernel

vm:		## boot and run RUN='command', or a shell [KERNEL=file ARCH=… SHARE=dir]
	@vm/run

clean:		## remove build/; caches stay
	rm -rf build
