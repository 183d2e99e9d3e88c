// SPDX-License-Identifier: GPL-2.0
/*
 * The only program of the guest that is migrated: PID 1 of a tiny initramfs.
 * It dirties memory at random and at a steady rate, and can say of each page
 * whether it holds what was last written to it.
 *
 * One writer per CPU has its own pages and makes numbered writes to them, 0, 1,
 * 2, ... Which page write n goes to, and all 4096 bytes it leaves there, follow
 * from the seed and n alone. The first writes fill all pages once in order, the
 * others go to pages at random.
 *
 * A page that migration missed holds, at the destination, the content of an
 * earlier write, and must be found although whatever the guest knows about its
 * pages was migrated in the same way. For each single page that may be missed:
 *
 * - A page of data. Before a page is overwritten, and again in the check, all
 *   of it is compared with the write it should hold. No two writes have a word
 *   in common at the same place, so an old page, or part of one, differs. As
 *   each page is looked at before it is overwritten, running on at the
 *   destination cannot paper over the damage.
 * - A page of the table, which knows the last write of each page. The table
 *   then asks for an older write than the data page holds. Should both be
 *   stale and agree, the check tells: it computes the table anew, from the seed
 *   and the number of writes.
 * - The number of writes. It is kept twice, on pages of their own, and the two
 *   must agree before each write. Should both be stale and agree, the number is
 *   behind the table, and behind the last one told to the host, which knows
 *   that it never goes back.
 * - The code, the stack, or the kernel's own pages. Nothing compares those; most
 *   are never written, or the guest will not get far without them.
 *
 * Kernel command line (the kernel passes it on as environment):
 *   seed=N     what to write (default 1)
 *   rate=N     pages a second, over all writers (default 1000)
 *   hot=N      per cent of the pages that are written at random (default 100)
 *   read=1     one reader per CPU reads a word of each of its writer's pages,
 *              round and round, in what time the writer leaves
 *   spare=MiB  memory to leave alone (default 8)
 *
 * On the console, each on a line: "ready: ..." once all pages are filled,
 * "at N M" ten times a second, the writes and reads so far, and "bad: ..." for
 * the first pages found wrong. A "c" read there asks for the check, answered by
 * "check: pages=N bad=N writes=N" with what was found wrong since the last one,
 * and mended. An "h" holds the writers between two writes, answered by "held",
 * until the next byte is read: who changes a page from outside must know that
 * no write to it is under way.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysinfo.h>
#include <sys/sysmacros.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define PAGE		4096
#define WORDS		(PAGE / 8)
#define STEP		0x9e3779b97f4a7c15ull	/* odd: steps never coincide */
#define PER_TABLE_PAGE	1022
#define MAX_WRITERS	16
#define NSEC		1000000000ull

/* The marks let a test recognize these pages from outside the guest. */
#define COUNT_MARK	0x746e756f63676e72ull	/* "rngcount" */
#define TABLE_MARK	0x656c626174676e72ull	/* "rngtable" */

struct count_page {
	uint64_t mark;
	volatile uint64_t writes;
	char rest[PAGE - 16];
};

struct table_page {
	uint64_t mark;
	uint32_t last[PER_TABLE_PAGE];
};

struct writer {
	int id;
	uint64_t seed;
	uint64_t rate;
	uint64_t pages;
	uint64_t hot;
	uint64_t (*data)[WORDS];
	struct table_page *table;
	struct count_page *count;	/* two of them */
	uint32_t *again;		/* the check's own table */
	uint64_t bad;
	volatile uint64_t reads;
	pthread_t thread;
	pthread_t reader;
};

static struct writer writers[MAX_WRITERS];
static int nr_writers;
static int console;
static pthread_mutex_t told = PTHREAD_MUTEX_INITIALIZER;
static pthread_rwlock_t writing = PTHREAD_RWLOCK_INITIALIZER;

static void tell(const char *fmt, ...)
{
	char line[256];
	va_list args;
	int len, done, n;

	va_start(args, fmt);
	len = vsnprintf(line, sizeof(line), fmt, args);
	va_end(args);

	pthread_mutex_lock(&told);
	for (done = 0; done < len; done += n) {
		n = write(console, line + done, len - done);
		if (n < 0)
			n = 0;
	}
	pthread_mutex_unlock(&told);
}

static void *memory(size_t size)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED) {
		tell("fail: no %zu bytes of memory: %s\n", size, strerror(errno));
		exit(1);
	}
	return p;
}

static uint64_t number(const char *name, uint64_t preset)
{
	const char *value = getenv(name);

	return value ? strtoull(value, NULL, 0) : preset;
}

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * NSEC + t.tv_nsec;
}

/* A bijection: different input, different output (splitmix64's finalizer). */
static uint64_t mix(uint64_t x)
{
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
	return x ^ (x >> 31);
}

static uint64_t target(const struct writer *w, uint64_t n)
{
	if (n < w->pages)
		return n;
	return (unsigned __int128)mix(w->seed + n * STEP) * w->hot >> 64;
}

static uint32_t *last(const struct writer *w, uint64_t page)
{
	return &w->table[page / PER_TABLE_PAGE].last[page % PER_TABLE_PAGE];
}

/* Write n of a writer: word 0 is n, the others step from a value n leads to. */
static void fill(const struct writer *w, uint64_t page, uint64_t n)
{
	uint64_t *word = w->data[page];
	uint64_t value = mix(~w->seed + n);
	int i;

	word[0] = n;
	for (i = 1; i < WORDS; i++)
		word[i] = value += STEP;
}

static int holds(const struct writer *w, uint64_t page, uint64_t n)
{
	const uint64_t *word = w->data[page];
	uint64_t value = mix(~w->seed + n);
	uint64_t wrong = word[0] ^ n;
	int i;

	for (i = 1; i < WORDS; i++)
		wrong |= word[i] ^ (value += STEP);
	return !wrong;
}

static void complain(struct writer *w, uint64_t page, uint64_t want, const char *when)
{
	if (w->bad++ < 4)
		tell("bad: writer %d, page %llu of %llu: write %llu expected, begins with %llu, %s\n",
		     w->id, (unsigned long long)page,
		     (unsigned long long)w->pages, (unsigned long long)want,
		     (unsigned long long)w->data[page][0], when);
}

/*
 * The number of writes; both pages that hold it must agree. If they do not, the
 * greater one wins, so as to go on, and to report it once.
 */
static uint64_t count(struct writer *w)
{
	uint64_t a = w->count[0].writes, b = w->count[1].writes;

	if (a == b)
		return a;

	if (w->bad++ < 4)
		tell("bad: writer %d: counted %llu and %llu writes\n", w->id,
		     (unsigned long long)a, (unsigned long long)b);
	if (a < b)
		a = b;
	w->count[0].writes = a;
	w->count[1].writes = a;
	return a;
}

static void write_one(struct writer *w)
{
	uint64_t n = count(w);
	uint64_t page = target(w, n);

	if (n >= w->pages && !holds(w, page, *last(w, page)))
		complain(w, page, *last(w, page), "about to be overwritten");
	fill(w, page, n);
	*last(w, page) = n;
	w->count[0].writes = n + 1;
	w->count[1].writes = n + 1;
}

static void *run(void *arg)
{
	struct timespec tick = { .tv_nsec = 2000000 };
	struct writer *w = arg;
	uint64_t start = now(), done = 0, due;

	for (;;) {
		nanosleep(&tick, NULL);
		pthread_rwlock_rdlock(&writing);
		due = (now() - start) * w->rate / NSEC;
		if (due > done + w->rate / 5) {
			/* Stopped for long: go on steadily, do not catch up. */
			start = now();
			done = 0;
			due = 1;
		}
		for (; done < due; done++)
			write_one(w);
		pthread_rwlock_unlock(&writing);
	}
	return NULL;
}

static void *read_all(void *arg)
{
	const struct sched_param none = { 0 };
	struct writer *w = arg;
	uint64_t page;

	sched_setscheduler(0, SCHED_IDLE, &none);
	for (;;)
		for (page = 0; page < w->pages; page++) {
			*(volatile uint64_t *)w->data[page];
			w->reads++;
		}
	return NULL;
}

static uint64_t all_reads(void)
{
	uint64_t sum = 0;
	int i;

	for (i = 0; i < nr_writers; i++)
		sum += writers[i].reads;
	return sum;
}

static uint64_t all_writes(void)
{
	uint64_t sum = 0, a, b;
	struct writer *w;

	for (w = writers; w < writers + nr_writers; w++) {
		a = w->count[0].writes;
		b = w->count[1].writes;
		sum += a > b ? a : b;
	}
	return sum;
}

static void check(void)
{
	uint64_t pages = 0, bad = 0, n, p;
	struct writer *w;

	pthread_rwlock_wrlock(&writing);
	for (w = writers; w < writers + nr_writers; w++) {
		n = count(w);
		memset(w->again, 0, w->pages * sizeof(*w->again));
		while (n--)
			if (!w->again[p = target(w, n)])
				w->again[p] = n;
		for (p = 0; p < w->pages; p++) {
			if (!holds(w, p, w->again[p]))
				complain(w, p, w->again[p], "in the check");
			else if (*last(w, p) != w->again[p])
				complain(w, p, *last(w, p), "in the table");
			else
				continue;
			fill(w, p, w->again[p]);
			*last(w, p) = w->again[p];
		}
		pages += w->pages;
		bad += w->bad;
		w->bad = 0;
	}
	tell("check: pages=%llu bad=%llu writes=%llu\n", (unsigned long long)pages,
	     (unsigned long long)bad, (unsigned long long)all_writes());
	pthread_rwlock_unlock(&writing);
}

static void hold(void)
{
	char c;

	pthread_rwlock_wrlock(&writing);
	tell("held\n");
	while (read(console, &c, 1) != 1)
		;
	pthread_rwlock_unlock(&writing);
}

static void set_up(struct writer *w, uint64_t pages)
{
	uint64_t tables = (pages + PER_TABLE_PAGE - 1) / PER_TABLE_PAGE;
	uint64_t i;

	w->id = w - writers;
	w->seed = mix(number("seed", 1) + w->id * STEP);
	w->rate = number("rate", 1000) / nr_writers;
	w->pages = pages;
	w->hot = pages * number("hot", 100) / 100;
	w->data = memory(pages * PAGE);
	w->table = memory(tables * PAGE);
	w->again = memory(pages * sizeof(*w->again));
	memset(w->again, 0, pages * sizeof(*w->again));
	w->count = memory(2 * PAGE);
	for (i = 0; i < tables; i++)
		w->table[i].mark = TABLE_MARK;
	w->count[0].mark = COUNT_MARK;
	w->count[1].mark = COUNT_MARK;
	for (i = 0; i < pages; i++)
		write_one(w);
}

/* The first serial port */
#ifdef __aarch64__
#define CONSOLE		"/dev/ttyAMA0"
#define CONSOLE_DEV	makedev(204, 64)
#else
#define CONSOLE		"/dev/ttyS0"
#define CONSOLE_DEV	makedev(4, 64)
#endif

static void open_console(void)
{
	struct termios t;

	mkdir("/dev", 0755);
	mknod(CONSOLE, S_IFCHR | 0600, CONSOLE_DEV);
	console = open(CONSOLE, O_RDWR | O_NOCTTY);
	if (console < 0)
		exit(1);
	tcgetattr(console, &t);
	cfmakeraw(&t);
	tcsetattr(console, TCSANOW, &t);
}

int main(void)
{
	struct pollfd input = { .events = POLLIN };
	struct sysinfo si;
	uint64_t pages, spare;
	char c;
	int i;

	open_console();
	nr_writers = sysconf(_SC_NPROCESSORS_ONLN);
	if (nr_writers > MAX_WRITERS)
		nr_writers = MAX_WRITERS;

	sysinfo(&si);
	pages = si.freeram * si.mem_unit / PAGE;
	spare = number("spare", 8) * (1 << 20) / PAGE;
	if (pages < spare + 1024) {
		tell("fail: only %llu pages are free\n", (unsigned long long)pages);
		exit(1);
	}
	/* The tables want 8 bytes a page, page tables the same again. */
	pages = (pages - spare) * 256 / 257 / nr_writers;

	for (i = 0; i < nr_writers; i++)
		set_up(&writers[i], pages);
	tell("ready: pages=%llu writers=%d\n",
	     (unsigned long long)pages * nr_writers, nr_writers);

	for (i = 0; i < nr_writers; i++)
		if (pthread_create(&writers[i].thread, NULL, run, &writers[i]) ||
		    (number("read", 0) &&
		     pthread_create(&writers[i].reader, NULL, read_all, &writers[i]))) {
			tell("fail: no thread\n");
			exit(1);
		}

	input.fd = console;
	for (;;) {
		if (poll(&input, 1, 100) == 1 && read(console, &c, 1) == 1) {
			if (c == 'c')
				check();
			else if (c == 'h')
				hold();
		}
		tell("at %llu %llu\n", (unsigned long long)all_writes(),
		     (unsigned long long)all_reads());
	}
}
