/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A test made of cases: each runs in a process group of its own, has a time
 * limit and gets one line of TAP.
 *
 * kselftest_harness.h, too, runs each test in a process with a time limit. This
 * is here because of what it does not do:
 *  - choose tests by name, or leave some out,
 *  - skip from a helper: SKIP() needs the test function's context, and the
 *    result of a skipped test loses its name,
 *  - kill what a test leaves running when it ends, or crashes, or the program is
 *    ended: it does so at a timeout only.
 * It has fixtures, variants and tests that must die of a signal; nothing here
 * needs these.
 */
#ifndef SELFTEST_KVM_TEST_CASES_H
#define SELFTEST_KVM_TEST_CASES_H

#include <errno.h>
#include <linux/compiler.h>

#include "test_util.h"

/* Fail the case, with both values, unless they are equal. */
#define EXPECT(expr, want) do {						\
	long __want = (want), __ret;					\
									\
	errno = 0;							\
	__ret = (expr);							\
	TEST_ASSERT(__ret == __want, "%s: got %ld (%s), want %ld",	\
		    #expr, __ret, strerror(errno), __want);		\
} while (0)

/* Fail the case unless @expr is -1, and errno is @want. */
#define EXPECT_ERROR(expr, want) do {					\
	long __want = (want), __ret;					\
									\
	errno = 0;							\
	__ret = (long)(expr);						\
	TEST_ASSERT(__ret == -1 && errno == __want,			\
		    "%s: got %ld (%s), want -1 (%s)",			\
		    #expr, __ret, strerror(errno), strerror(__want));	\
} while (0)

struct test_case {
	/* What the case shows; the first word, up to a colon, is its name. */
	const char *name;
	/* Returns if the case passes, else fails an assertion. */
	void (*run)(void);
	/* Time limit; 0: the default. */
	unsigned int seconds;
};

/* End the case. Always give a reason. */
void test_case_skip(const char *fmt, ...) __printf(1, 2) __noreturn;

/* Run the cases that the command line asks for; do not return. */
void test_cases_main(int argc, char **argv, const struct test_case *cases,
		     unsigned int nr) __noreturn;

#endif /* SELFTEST_KVM_TEST_CASES_H */
