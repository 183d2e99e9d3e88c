/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A test made of cases: each runs in a process of its own, has a time limit
 * and gets one line of TAP.
 */
#ifndef SELFTEST_KVM_TEST_CASES_H
#define SELFTEST_KVM_TEST_CASES_H

#include <errno.h>
#include <linux/compiler.h>

#include "test_util.h"

/* Fails the case, with both values, unless they are equal. */
#define EXPECT(expr, want) do {						\
	long __want = (want), __ret;					\
									\
	errno = 0;							\
	__ret = (expr);							\
	TEST_ASSERT(__ret == __want, "%s: got %ld (%s), want %ld",	\
		    #expr, __ret, strerror(errno), __want);		\
} while (0)

struct test_case {
	/* What the case shows; the first word, up to a colon, is its name. */
	const char *name;
	/* Returns if the case passes, else fails an assertion. */
	void (*run)(void);
};

/* Ends the case. A reason is always given. */
void test_case_skip(const char *fmt, ...) __printf(1, 2) __noreturn;

/* Runs the cases that the command line asks for; does not return. */
void test_cases_main(int argc, char **argv, const struct test_case *cases,
		     unsigned int nr) __noreturn;

#endif /* SELFTEST_KVM_TEST_CASES_H */
