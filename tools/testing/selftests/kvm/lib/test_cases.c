// SPDX-License-Identifier: GPL-2.0-only
/*
 * A test made of cases: each runs in a process of its own, has a time limit
 * and gets one line of TAP.
 *
 * A process of its own makes an assertion that fails the end of one case
 * only, and returns whatever the case still holds: memory, VMs, threads.
 */

#include "test_util.h"
#include "test_cases.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>

/* Emulation of nested virtualization on a busy machine is slow. */
#define TEST_CASE_SECONDS	120

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

static void run_case(const struct test_case *c)
{
	int status;
	pid_t pid;

	skip_reason[0] = 0;
	fflush(NULL);

	pid = fork();
	if (pid < 0)
		ksft_exit_fail_msg("fork: %s\n", strerror(errno));
	if (!pid) {
		alarm(TEST_CASE_SECONDS);
		c->run();
		exit(KSFT_PASS);
	}

	while (waitpid(pid, &status, 0) != pid)
		;
	if (WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM)
		ksft_print_msg("no end after %d s\n", TEST_CASE_SECONDS);
	else if (WIFSIGNALED(status))
		ksft_print_msg("killed by signal %d\n", WTERMSIG(status));

	/*
	 * A skip has a reason; a failed assertion that happens to see EACCES
	 * in errno has the same exit code, but none.
	 */
	if (WIFEXITED(status) && WEXITSTATUS(status) == KSFT_SKIP &&
	    skip_reason[0])
		ksft_test_result_skip("%s: %s\n", c->name, skip_reason);
	else
		ksft_test_result(WIFEXITED(status) &&
				 WEXITSTATUS(status) == KSFT_PASS,
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
	unsigned int i, plan = 0;
	int opt;

	while ((opt = getopt(argc, argv, "hlx")) != -1) {
		switch (opt) {
		case 'l':
			for (i = 0; i < nr; i++)
				printf("%s\n", cases[i].name);
			exit(0);
		case 'x':
			exclude = true;
			break;
		default:
			printf("usage: %s [-h] [-l] [-x] [case...]\n"
			       " -l: list the cases\n"
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

	ksft_print_header();
	ksft_set_plan(plan);

	for (i = 0; i < nr; i++)
		if (!argc || is_named(&cases[i], argv, argc) != exclude)
			run_case(&cases[i]);

	ksft_print_cnts();
	exit(ksft_get_fail_cnt() ? KSFT_FAIL : KSFT_PASS);
}
