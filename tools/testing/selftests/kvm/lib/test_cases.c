// SPDX-License-Identifier: GPL-2.0-only
/*
 * A test made of cases: each runs in a process group of its own, has a time
 * limit and gets one line of TAP.
 *
 * With a process of its own, an assertion that fails ends one case only, and
 * memory, VMs and threads go with the case. With a process group, its children
 * go as well, however the case ended.
 */

#include "test_util.h"
#include "test_cases.h"

#include <linux/kernel.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>

/* Emulation of nested virtualization on a busy machine is slow. */
#define TEST_CASE_SECONDS	120

/* Signals that end the program, and the case with it. */
static const int end_signals[] = { SIGHUP, SIGINT, SIGQUIT, SIGTERM };

/* Process group of the case that runs, or 0. */
static pid_t running;

/* Shared by the case and its parent. */
static char *skip_reason;
#define SKIP_REASON_SIZE	256

void test_case_skip(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(skip_reason, SKIP_REASON_SIZE, fmt, ap);
	va_end(ap);
	exit(KSFT_SKIP);
}

/* Neither ^C nor a kill of the program's group reaches the case. */
static void end(int sig)
{
	pid_t group = READ_ONCE(running);

	if (group)
		kill(-group, SIGKILL);
	/* Pending until this returns, and then the default action. */
	raise(sig);
}

static void catch_end(sigset_t *set)
{
	struct sigaction sa = { .sa_handler = end, .sa_flags = SA_RESETHAND };
	struct sigaction old;
	int i;

	sigemptyset(set);
	for (i = 0; i < ARRAY_SIZE(end_signals); i++) {
		sigaddset(set, end_signals[i]);
		/* Leave alone what nohup, or a shell, has set to be ignored. */
		sigaction(end_signals[i], NULL, &old);
		if (old.sa_handler != SIG_IGN)
			sigaction(end_signals[i], &sa, NULL);
	}
}

/* Wait for the case, kill what it left running, and return its status. */
static int wait_for_case(pid_t pid)
{
	siginfo_t info;
	int status;

	/* Not reaped as yet, the case keeps its group's number from reuse. */
	while (waitid(P_PID, pid, &info, WEXITED | WNOWAIT))
		;
	kill(-pid, SIGKILL);
	while (waitpid(pid, &status, 0) != pid)
		;
	/* Let the next case find nothing of theirs: memory, VMs. */
	while (waitpid(-pid, NULL, 0) > 0)
		;
	return status;
}

static void run_case(const struct test_case *c, unsigned int slow,
		     const sigset_t *end_set)
{
	unsigned int seconds = (c->seconds ?: TEST_CASE_SECONDS) * slow;
	sigset_t old;
	int status;
	pid_t pid;

	skip_reason[0] = 0;
	fflush(NULL);

	/* Let no signal find a case that end() does not know of. */
	sigprocmask(SIG_BLOCK, end_set, &old);
	pid = fork();
	if (pid < 0)
		ksft_exit_fail_msg("fork: %s\n", strerror(errno));
	/* In both: either may be first. The case itself has nothing to kill. */
	setpgid(pid, pid);
	WRITE_ONCE(running, pid);
	sigprocmask(SIG_SETMASK, &old, NULL);
	if (!pid) {
		alarm(seconds);
		c->run();
		exit(KSFT_PASS);
	}

	status = wait_for_case(pid);
	WRITE_ONCE(running, 0);

	if (WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM)
		ksft_print_msg("no end after %u s\n", seconds);
	else if (WIFSIGNALED(status))
		ksft_print_msg("killed by signal %d\n", WTERMSIG(status));

	if (WIFEXITED(status) && WEXITSTATUS(status) == KSFT_SKIP) {
		if (skip_reason[0]) {
			ksft_test_result_skip("%s: %s\n", c->name, skip_reason);
			return;
		}
		/* TEST_ASSERT() takes it for a lack of rights. */
		ksft_print_msg("exit code %d without a reason: an assertion with EACCES?\n",
			       KSFT_SKIP);
	}
	ksft_test_result(WIFEXITED(status) && WEXITSTATUS(status) == KSFT_PASS,
			 "%s\n", c->name);
}

/* Is the first word of the case's name among the words? */
static bool is_named(const struct test_case *c, char **words, int nr)
{
	size_t len = strcspn(c->name, " :");

	while (nr-- > 0)
		if (strlen(words[nr]) == len &&
		    !strncmp(words[nr], c->name, len))
			return true;

	return false;
}

void test_cases_main(int argc, char **argv, const struct test_case *cases,
		     unsigned int nr)
{
	bool exclude = false;
	unsigned int i, plan = 0, slow = 1;
	sigset_t end_set;
	int opt;

	while ((opt = getopt(argc, argv, "hls:x")) != -1) {
		switch (opt) {
		case 'l':
			for (i = 0; i < nr; i++)
				printf("%s\n", cases[i].name);
			exit(0);
		case 's':
			slow = atoi(optarg);
			if (slow >= 1 && slow <= 100)
				break;
			fprintf(stderr, "-s wants a number from 1 to 100\n");
			exit(KSFT_FAIL);
		case 'x':
			exclude = true;
			break;
		default:
			printf("usage: %s [-h] [-l] [-s n] [-x] [case...]\n"
			       " -l: list the cases\n"
			       " -s: give each case n times its time, for a slow kernel or machine\n"
			       " -x: run all cases but those named (default: only those named, or all)\n",
			       argv[0]);
			exit(opt == 'h' ? 0 : KSFT_FAIL);
		}
	}
	argv += optind;
	argc -= optind;

	skip_reason = mmap(NULL, SKIP_REASON_SIZE, PROT_READ | PROT_WRITE,
			   MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	TEST_ASSERT(skip_reason != MAP_FAILED, "mmap failed");

	for (i = 0; i < nr; i++)
		plan += !argc || is_named(&cases[i], argv, argc) != exclude;
	if (!plan) {
		fprintf(stderr, "no such case, -l lists them\n");
		exit(KSFT_FAIL);
	}

	catch_end(&end_set);
	/* Be the parent of processes whose case has ended, to wait for them. */
	prctl(PR_SET_CHILD_SUBREAPER, 1);

	ksft_print_header();
	ksft_set_plan(plan);

	for (i = 0; i < nr; i++)
		if (!argc || is_named(&cases[i], argv, argc) != exclude)
			run_case(&cases[i], slow, &end_set);

	ksft_print_cnts();
	exit(ksft_get_fail_cnt() ? KSFT_FAIL : KSFT_PASS);
}
