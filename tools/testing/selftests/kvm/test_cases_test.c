// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test the frame for tests made of cases
 *
 * Run this program once more for each case, with samples that pass, fail, skip,
 * hang or leave a child behind, and look at what the frame makes of them. KVM is
 * not needed.
 *
 * Every process of a sample has the pipe open that its output comes through: its
 * end is there when all of them are gone.
 */

#define _GNU_SOURCE /* for program_invocation_name */

#include <linux/kernel.h>
#include <signal.h>
#include <sys/wait.h>

#include "test_util.h"
#include "test_cases.h"

/* Longer than any case may take */
#define FOREVER	100

static void leave_child(void)
{
	if (!fork()) {
		/* As a child that holds on to a VM: only SIGKILL ends it. */
		signal(SIGTERM, SIG_IGN);
		sleep(FOREVER);
		_exit(0);
	}
}

static void sample_pass(void)
{
}

static void sample_fail(void)
{
	EXPECT(1 + 1, 3);
}

static void sample_skip(void)
{
	test_case_skip("no %s", "rain");
}

static void sample_no_reason(void)
{
	/* As TEST_ASSERT() does, unless dumping the stack changed errno. */
	exit(KSFT_SKIP);
}

static void sample_dies(void)
{
	leave_child();
	raise(SIGKILL);
}

static void sample_leaves(void)
{
	leave_child();
}

static void sample_hangs(void)
{
	leave_child();
	sleep(FOREVER);
}

static void sample_started(void)
{
	leave_child();
	/* To be seen before the case ends. */
	printf("started\n");
	fflush(stdout);
	sleep(FOREVER);
}

static const struct test_case samples[] = {
	{ "pass: it does", sample_pass },
	{ "fail", sample_fail },
	{ "skip", sample_skip },
	{ "no-reason", sample_no_reason },
	{ "dies", sample_dies },
	{ "leaves", sample_leaves },
	{ "hangs", sample_hangs, .seconds = 1 },
	{ "started", sample_started },
};

/* Run the samples that @args name; their output is to be read from @out. */
static pid_t start(const char *args, FILE **out)
{
	char *argv[16] = { program_invocation_name, "samples" };
	char *words = strdup(args);
	int fds[2], n = 2;
	pid_t pid;

	TEST_ASSERT(words, "Insufficient Memory");
	argv[n] = strtok(words, " ");
	while (argv[n])
		argv[++n] = strtok(NULL, " ");

	EXPECT(pipe(fds), 0);
	fflush(NULL);
	pid = fork();
	if (!pid) {
		dup2(fds[1], STDOUT_FILENO);
		dup2(fds[1], STDERR_FILENO);
		close(fds[0]);
		close(fds[1]);
		execv(argv[0], argv);
		_exit(127);
	}
	close(fds[1]);
	free(words);
	*out = fdopen(fds[0], "r");
	TEST_ASSERT(pid > 0 && *out, "Cannot run samples %s", args);
	return pid;
}

/* The samples end with this exit code, and say these lines, in this order. */
static void expect_output(const char *args, int code, const char *const *want)
{
	char line[256];
	int status;
	FILE *out;
	pid_t pid = start(args, &out);

	while (fgets(line, sizeof(line), out)) {
		line[strcspn(line, "\n")] = 0;
		printf("# %s: %s\n", args, line);
		if (*want && !strcmp(line, *want))
			want++;
	}
	fclose(out);
	EXPECT(waitpid(pid, &status, 0), pid);
	TEST_ASSERT(!*want, "%s: no line '%s'", args, *want);
	TEST_ASSERT(WIFEXITED(status) && WEXITSTATUS(status) == code,
		    "%s: ended with %#x", args, status);
}

#define EXPECT_OUTPUT(args, code, ...) \
	expect_output(args, code, (const char *const []){ __VA_ARGS__, NULL })

static void check_results(void)
{
	EXPECT_OUTPUT("pass", KSFT_PASS, "1..1", "ok 1 pass: it does");
	EXPECT_OUTPUT("fail", KSFT_FAIL, "not ok 1 fail");
	EXPECT_OUTPUT("skip", KSFT_PASS, "ok 1 # SKIP skip: no rain");
	EXPECT_OUTPUT("fail pass", KSFT_FAIL, "1..2", "ok 1 pass: it does",
		      "not ok 2 fail");
}

static void check_names(void)
{
	EXPECT_OUTPUT("-x fail no-reason dies leaves hangs started", KSFT_PASS,
		      "1..2", "ok 1 pass: it does",
		      "ok 2 # SKIP skip: no rain");
	EXPECT_OUTPUT("none", KSFT_FAIL, "no such case, -l lists them");
}

static void check_no_reason(void)
{
	EXPECT_OUTPUT("no-reason", KSFT_FAIL,
		      "# exit code 4 without a reason: an assertion with EACCES?",
		      "not ok 1 no-reason");
}

static void check_left(void)
{
	EXPECT_OUTPUT("leaves", KSFT_PASS, "ok 1 leaves");
	EXPECT_OUTPUT("dies", KSFT_FAIL, "# killed by signal 9",
		      "not ok 1 dies");
}

static void check_limit(void)
{
	EXPECT_OUTPUT("hangs pass", KSFT_FAIL, "ok 1 pass: it does",
		      "# no end after 1 s", "not ok 2 hangs");
}

static void check_ended(void)
{
	static const int signals[] = { SIGINT, SIGTERM };
	char line[256];
	int status, i;
	FILE *out;
	pid_t pid;

	for (i = 0; i < ARRAY_SIZE(signals); i++) {
		pid = start("started", &out);
		while (fgets(line, sizeof(line), out) &&
		       strcmp(line, "started\n"))
			;
		EXPECT(kill(pid, signals[i]), 0);
		while (fgets(line, sizeof(line), out))
			;
		fclose(out);
		EXPECT(waitpid(pid, &status, 0), pid);
		TEST_ASSERT(WIFSIGNALED(status) &&
			    WTERMSIG(status) == signals[i],
			    "ended with %#x, not by signal %d", status,
			    signals[i]);
	}
}

static const struct test_case cases[] = {
	{ "results: pass, fail and skip", check_results },
	{ "names: of cases to run, or to leave out", check_names },
	{ "no-reason: a failure, not a skip", check_no_reason },
	{ "left: children go with their case", check_left, .seconds = 60 },
	{ "limit: of a case's own, children go too", check_limit, .seconds = 60 },
	{ "ended: a signal ends the case as well", check_ended, .seconds = 60 },
};

int main(int argc, char **argv)
{
	if (argc > 1 && !strcmp(argv[1], "samples"))
		test_cases_main(argc - 1, argv + 1, samples,
				ARRAY_SIZE(samples));
	test_cases_main(argc, argv, cases, ARRAY_SIZE(cases));
}
