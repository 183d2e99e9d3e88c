# SPDX-License-Identifier: GPL-2.0
"""Run the litmus tests, and the same tests with each ordering weakened; compare
the orderings in them with those in the code. Prints KTAP. See maint/litmus.

In a test, a comment in a line of its own says what the lines below it are from:
	// ring_add()				a function of the code
	// ring_used(), ring_add(); why	several that have this in common
	// ring_add() again			called once more by the same process
	// f() in include/linux/kvm_host.h	code that is not looked at here
	// userspace				anything else
An ordering is identified by its function, what it does, the variable's name without
digits at the end, and its number among those that are alike. In a test it may be
weaker than in the code, but not in all tests.
"""

import argparse
import collections
import concurrent.futures
import os
import re
import subprocess
import sys

# --- orderings ---------------------------------------------------------------------

# What a name orders. A site is one use of one: what it does, to which variable,
# in which function; and how strongly.
Site = collections.namedtuple("Site", "function does var nth")

ONCE = "once"
NAMES = {
    "READ_ONCE": ("load", ONCE),
    "atomic_read": ("load", ONCE),
    "local64_read": ("load", ONCE),
    "smp_load_acquire": ("load", "acquire"),
    "atomic_read_acquire": ("load", "acquire"),
    "WRITE_ONCE": ("store", ONCE),
    "atomic_set": ("store", ONCE),
    "local64_set": ("store", ONCE),
    "smp_store_release": ("store", "release"),
    "atomic_set_release": ("store", "release"),
    "smp_store_mb": ("store", "mb"),
}
CALL = re.compile(
    r"\b((?:smp|dma|virt|mb|rmb|wmb)_\w+|[rw]?mb|barrier|barrier_data"
    r"|(?:READ|WRITE)_ONCE|(?:arch_)?(?:try_)?(?:cmp)?xchg\w*"
    r"|(?:atomic(?:64|_long)?|local(?:64)?)_(?!irq|bh)\w+"
    r"|test_and_\w+_bit\w*|clear_bit_unlock\w*|rcu_assign_pointer"
    r"|(?:(?:raw_)?spin|mutex|read|write)_(?:try)?lock\w*)\s*\(")
# Locks of KVM that the ring takes for what they are there for.
FOREIGN = {"mmu_lock"}
# What is local to a CPU is atomic for its interrupts, which the memory model does not
# know: in a test they are another process.
RMW = re.compile(r"^(?:atomic_|local64_)?(?:try_)?(\w+?)(_relaxed|_acquire|_release)?$")


def meaning(name, arg):
    """What a call does, how strongly, and to which variable; None for nothing."""
    if name in NAMES:
        does, strength = NAMES[name]
        return does, strength, variable(arg)
    if name.endswith("_lock_init"):
        return None
    if re.match(r"((raw_)?spin|mutex|read|write)_(try)?lock", name):
        return "lock", "lock", variable(arg)
    if name.startswith(("atomic", "local", "xchg", "cmpxchg", "try_cmpxchg")):
        does, suffix = RMW.match(name).groups()
        # Those without a result order nothing.
        full = re.search(r"xchg|_return|fetch_|_and_test|_negative|_unless|_if_", name)
        return does, (suffix or ("_full" if full else "_relaxed"))[1:], variable(arg)
    return name, "fence", variable(arg)


def variable(arg):
    """&vcpu->dirty_ring.push_seq, and *push_seq, are push_seq; of locks called
    just lock the structure is part of the name."""
    while re.search(r"\[[^][]*\]", arg):
        arg = re.sub(r"\[[^][]*\]", "", arg)
    parts = re.sub(r"[\s&*()]", "", arg).replace("->", ".").split(".")
    return "_".join(parts[-2:]) if parts[-1] == "lock" else parts[-1]


def calls(text):
    """All calls in text: where they begin and end, name, first argument."""
    for m in CALL.finditer(text):
        depth, end = 1, m.end()
        comma = None
        while depth and end < len(text):
            c = text[end]
            depth += (c in "([") - (c in ")]")
            if c == "," and depth == 1 and comma is None:
                comma = end
            end += 1
        yield m.start(), end, m.group(1), text[m.end():comma or end - 1]


# --- the code ----------------------------------------------------------------------

def blank(m):
    return re.sub(r"[^\n]", " ", m.group(0))


FUNCTION = re.compile(r"^[^\s{}#][^;{}]*?(\w+)\s*\([^;{}]*\)\s*\n\{\n(.*?)^\}",
                      flags=re.M | re.S)


def functions(text):
    """Name and body of each function, as the kernel writes them, then the rest."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*|\"(?:\\.|[^\"\\\n])*\"", blank, text, flags=re.S)
    for m in FUNCTION.finditer(text):
        yield m.group(1), m.group(2)
    yield "no function", FUNCTION.sub("", text)


def code_sites(paths):
    """Where the code orders something, and how strongly; all functions' names."""
    sites, names = {}, set()
    for path in paths:
        with open(path, encoding="utf-8") as f:
            text = f.read()
        for function, body in functions(text):
            names.add(function)
            count = collections.Counter()
            for _, _, name, arg in calls(body):
                what = meaning(name, arg)
                if not what or what[2] in FOREIGN:
                    continue
                does, strength, var = what
                count[does, var] += 1
                sites[Site(function, does, var, count[does, var])] = strength
    return sites, names


# --- the tests ---------------------------------------------------------------------

Use = collections.namedtuple("Use", "line start end name arg process tag site strength")


class Test:
    """A litmus test: its text, and the orderings in it."""

    def __init__(self, path):
        self.name = os.path.basename(path)[:-len(".litmus")]
        with open(path, encoding="utf-8") as f:
            self.lines = f.read().split("\n")
        self.uses = []
        self.problems = []
        if self.lines[0] != "C " + self.name:
            self.problems.append("does not begin with 'C %s'" % self.name)
        if not re.search(r"^ \* Result: Never$", "\n".join(self.lines), flags=re.M):
            self.problems.append("does not say 'Result: Never'")
        process = tag = None
        count = collections.Counter()
        for n, line in enumerate(self.lines):
            m = re.match(r"(P\d+)\(", line)
            if m:
                process, tag = m.group(1), None
                count.clear()
            elif re.match(r"\s*//", line):
                tag = line.strip(" \t/").split(";")[0]
                if tag.endswith(" again"):
                    tag = tag[:-len(" again")]
                    for key in [k for k in count if k[0] + "()" == tag]:
                        del count[key]
            elif process and not line.startswith(("P", "exists")):
                code = re.sub(r"//.*", "", line)
                for start, end, name, arg in calls(code):
                    self.add(n, start, end, name, arg, process, tag, count)

    def add(self, n, start, end, name, arg, process, tag, count):
        what = meaning(name, arg)
        if not what:
            return
        if not tag:
            self.problems.append("%s: nothing says whose %s() this is" % (process, name))
            return
        does, strength, var = what
        var = re.sub(r"\d+$", "", var)
        # Code elsewhere is named with its file, what is no code with other words.
        ours = re.fullmatch(r"\w+\(\)(, \w+\(\))*", tag)
        sites = []
        for function in re.findall(r"\w+(?=\(\))", tag) if ours else []:
            count[function, does, var] += 1
            sites.append(Site(function, does, var, count[function, does, var]))
        self.uses.append(Use(n, start, end, name, arg, process, tag, sites, strength))

    def replaced(self, use, text):
        lines = list(self.lines)
        line = lines[use.line]
        lines[use.line] = line[:use.start] + text + line[use.end:]
        return lines

    def weakened(self, use):
        """Each way to weaken an ordering by one step: what to, and the test then."""
        call = self.lines[use.line][use.start:use.end]
        rest = call[len(use.name):]

        def renamed(name):
            return name, self.replaced(use, name + rest)

        if use.name == "rcu_assign_pointer":
            yield renamed("WRITE_ONCE")
        elif use.name == "smp_store_mb":
            yield renamed("WRITE_ONCE")
        elif use.name in ("smp_load_acquire", "smp_store_release"):
            once = "READ_ONCE" if use.name == "smp_load_acquire" else "WRITE_ONCE"
            yield once, self.replaced(use, once + "(*" + rest[1:])
        elif use.name in ("atomic_read_acquire", "atomic_set_release"):
            yield renamed(use.name.rsplit("_", 1)[0])
        elif use.strength in ("acquire", "release"):
            yield renamed(use.name.rsplit("_", 1)[0] + "_relaxed")
        elif use.strength == "full":
            yield renamed(use.name + "_acquire")
            yield renamed(use.name + "_release")
        elif use.name == "barrier":
            # It is for this CPU's interrupts; the memory model knows of none.
            pass
        elif use.strength == "fence":
            yield "nothing", without(self.replaced(use, ""))
            if use.name == "smp_mb":
                yield renamed("smp_rmb")
                yield renamed("smp_wmb")
        elif use.strength == "lock":
            lines = self.replaced(use, "")
            var = re.escape(use.arg.strip())
            for n in range(use.line, len(lines)):
                if re.search(r"\bspin_unlock\(%s\)" % var, lines[n]):
                    lines[n] = re.sub(r"\bspin_unlock\(%s\)" % var, "", lines[n])
                    break
            yield "nothing", without(lines)
        elif use.strength not in (ONCE, "relaxed"):
            self.problems.append("there is no weaker %s() to try" % use.name)

    def broken(self, use):
        """The test with a plain access instead of READ_ONCE() or WRITE_ONCE(), or
        with two accesses instead of an atomic one; None if it is neither."""
        line = self.lines[use.line]
        args = line[use.start + len(use.name) + 1:use.end - 1].split(", ")
        if use.name == "READ_ONCE":
            return self.replaced(use, args[0])
        if use.name == "WRITE_ONCE":
            return self.replaced(use, "%s = %s" % tuple(args))
        does = use.site[0].does
        result = line[:use.start].strip(" \t=") or "r"
        read, write = "READ_ONCE(*%s)", "WRITE_ONCE(*%s, %s)"
        if use.name.startswith("atomic"):
            read, write = "atomic_read(%s)", "atomic_set(%s, %s)"
        if does == "cmpxchg":
            write = "if (%s == %s) %s" % (result, args[1], write)
        elif does in ("inc", "dec", "inc_return", "dec_return", "fetch_inc"):
            args.append(result + (" + 1" if "inc" in does else " - 1"))
        elif does != "xchg":
            return None
        return self.replaced(use._replace(start=0, end=len(line)), "%s%s = %s; %s;" % (
            "" if "=" in line else "int ", result, read % args[0],
            write % (args[0], args[-1])))


def without(lines):
    """What is taken out leaves an empty statement, which herd7 does not know."""
    return [re.sub(r"^\s*;$", "", line) for line in lines]


# --- running them ------------------------------------------------------------------

class Herd:
    """Asks herd7 what the memory model says of tests, several at a time."""

    def __init__(self, herd, model, folder):
        self.herd, self.model, self.folder = herd, model, folder
        self.pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())

    def ask(self, test, number, lines):
        os.makedirs(os.path.join(self.folder, test.name), exist_ok=True)
        path = os.path.join(self.folder, test.name, "%02d.litmus" % number)
        with open(path, "w", encoding="utf-8") as f:
            f.write("\n".join(lines))
        return self.pool.submit(self.run, path)

    def run(self, path):
        """never, sometimes or racy, and if not that, what herd7 said; the file."""
        try:
            p = subprocess.run(
                [self.herd, "-conf", "linux-kernel.cfg", path], cwd=self.model,
                stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
                check=False)
        except subprocess.TimeoutExpired:
            return "no answer within 60 s", path
        m = re.search(r"^Observation \S+ (Never|Sometimes|Always)", p.stdout, flags=re.M)
        if not m or p.returncode:
            return "herd7: " + ((p.stderr or p.stdout).strip() or "nothing"), path
        if m.group(1) == "Never" and re.search(r"^Flag data-race", p.stdout, flags=re.M):
            return "racy", path
        return "never" if m.group(1) == "Never" else "sometimes", path


class Report:
    """KTAP, and the count."""

    def __init__(self, planned):
        self.passed = self.failed = self.skipped = self.number = 0
        print("KTAP version 1\n1..%d" % planned)

    def cases(self, results):
        """The cases of the test to come: name, and whether it passed."""
        print("    1..%d" % len(results))
        for n, (name, ok) in enumerate(results, 1):
            print("    %s %d %s" % ("ok" if ok else "not ok", n, name))
        failed = sum(not ok for _, ok in results)
        self.failed += failed
        self.passed += len(results) - failed

    def result(self, name, problems, counted=False, skip=None):
        self.number += 1
        skip = None if problems else skip
        print("%s %d %s%s" % ("not ok" if problems else "ok", self.number, name,
                              " # SKIP " + skip if skip else ""))
        for line in problems:
            print("# " + line.replace("\n", "; "))
        sys.stdout.flush()
        if skip:
            self.skipped += 1
        elif not counted:
            self.failed += bool(problems)
            self.passed += not problems

    def end(self):
        print("%d passed, %d failed, %d skipped" % (self.passed, self.failed,
                                                    self.skipped))
        sys.exit(self.failed != 0)


def describe(use):
    return "%s %s: %s(%s)" % (use.process, use.tag, use.name,
                              re.sub(r"\W", "", use.arg))


def run_tests(tests, herd, report):
    """Run all tests; what became of them at each site without READ_ONCE(),
    WRITE_ONCE() or atomicity."""
    broken = {}
    asked = []
    for test in tests:
        variants = [("never happens", None, test.lines)]
        for use in test.uses:
            variants += [(describe(use) + " weakened to " + to, None, lines)
                         for to, lines in test.weakened(use)]
            lines = use.site and test.broken(use)
            if lines:
                variants.append((None, use, lines))
        asked.append((test, [(name, use, herd.ask(test, n, lines))
                             for n, (name, use, lines) in enumerate(variants)]))
    for test, answers in asked:
        results, problems, fails = [], list(test.problems), False
        for name, use, answer in answers:
            got, path = answer.result()
            happens = got in ("sometimes", "racy")
            if use:
                fails |= happens
                for site in use.site:
                    broken.setdefault(site, []).append((got, test.name))
                if happens or got == "never":
                    continue
                name = describe(use) + " broken"
            ok = happens if results else got == "never"
            fails |= ok and bool(results)
            results.append((name, ok))
            if not ok:
                problems.append("%s: %s (%s)" % (name, got, os.path.relpath(path)))
        if test.problems:
            results.append(("says what it has to", False))
        if not fails:
            results.append(("can fail", False))
        report.cases(results)
        report.result(test.name, problems, counted=True)
    return broken


def show(site, strength):
    name = {("load", ONCE): "READ_ONCE", ("store", ONCE): "WRITE_ONCE",
            ("load", "acquire"): "load-acquire", ("store", "release"): "store-release",
            }.get((site.does, strength), site.does)
    if name == site.does and strength not in ("fence", "lock"):
        name += " (%s)" % strength
    return "%s(): %s%s%s" % (site.function, name, " of " + site.var if site.var else "",
                             ", number %d" % site.nth if site.nth > 1 else "")


def weaker_or_same(test, code):
    order = {ONCE: 0, "relaxed": 0, "acquire": 1, "release": 1, "full": 2, "mb": 2}
    if test in order and code in order:
        return test == code or order[test] < order[code]
    return test == code


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--herd", help="herd7; without it, only compare with the code")
    parser.add_argument("--why", help="why there is no herd7")
    parser.add_argument("--model", help="folder with the memory model")
    parser.add_argument("--out", help="folder for the weakened tests")
    parser.add_argument("--some", action="store_true", help="not all tests")
    parser.add_argument("--code", nargs="+", required=True)
    parser.add_argument("--tests", nargs="+", required=True)
    args = parser.parse_args()

    sites, names = code_sites(args.code)
    tests = [Test(path) for path in args.tests]
    report = Report(len(tests) + (1 if args.some else 3))

    broken = None
    if args.herd:
        broken = run_tests(tests, Herd(args.herd, args.model, args.out), report)
    else:
        for test in tests:
            report.result(test.name, test.problems, skip=args.why)

    # What the tests say of the code.
    wrong, seen = [], {}
    for test in tests:
        for use in test.uses:
            for site in use.site:
                have = sites.get(site)
                if site.function not in names:
                    wrong.append("%s: there is no function %s()" % (test.name,
                                                                   site.function))
                elif have is None:
                    wrong.append("%s: not in the code: %s" % (
                        test.name, show(site, use.strength)))
                elif not weaker_or_same(use.strength, have):
                    wrong.append("%s: weaker in the code: %s" % (
                        test.name, show(site, use.strength)))
                else:
                    seen.setdefault(site, set()).add(use.strength)
    report.result("every ordering in a test is in the code", sorted(set(wrong)))

    if args.some:
        report.end()

    missing = []
    for site, have in sorted(sites.items()):
        if have not in seen.get(site, ()) and not (
                have == "full" and {"acquire", "release"} <= seen.get(site, set())):
            missing.append("in no test%s: %s" % (
                " as strong as this" if site in seen else "", show(site, have)))
    report.result("every ordering in the code is in a test", missing)

    name = "READ_ONCE(), WRITE_ONCE() and atomicity are needed"
    if broken is None:
        report.result(name, [], skip=args.why)
    else:
        report.result(name, [
            "not in %s: %s" % (", ".join(t for _, t in answers), show(site, sites[site]))
            for site, answers in sorted(broken.items())
            if (sites.get(site) == ONCE or site.does not in ("load", "store")) and
            site in sites and not any(got in ("racy", "sometimes") for got, _ in answers)])

    report.end()


main()
