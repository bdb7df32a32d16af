"""Runs the registered tests: each with a time limit, a TMPDIR of its own and a log that is kept when it fails, and looks afterwards for
processes, sockets and shared memory that it left behind. Programs of one process (unit, golden, kernels) run two at a time, then the
others, which have ranks and deadlines, one after the other. See tests/run."""
import argparse
import concurrent.futures
import fnmatch
import glob
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
LOGS = os.path.join(ROOT, "build", "test-logs")
SKIPPED = 77
# Which kinds of C programs run under which build, and how long each may take.
PROGRAMS = {"release": (("unit", "golden", "kernels", "cluster"), 300), "asan": (("unit", "golden", "cluster"), 900),
            "tsan": (("cluster",), 1200)}


# MPI is not instrumented: what starts ranks by mpirun runs in release alone. The thread sanitizer does not follow a fork.
# Sanitizers replace malloc, whose calls alloc_test and model_alloc_test count: what else these do, others do too.
LEFT_OUT = {"asan": {"mpi_test", "alloc_test", "model_alloc_test"}, "tsan": {"mpi_test", "coordinator_test", "tail_test", "alloc_test"}}
ADDED = {"tsan": ["unit/link_local_test"]}
# The longest of those that run two at a time begin first: none is left alone at the end.
LONGEST = ("asan/golden/invariance_test", "asan/unit/packed_test", "asan/unit/leader_test", "asan/unit/attention_test")


class Test:
    def __init__(self, name, tier, seconds, build, command, alone=True):
        self.name, self.tier, self.seconds, self.build, self.command, self.alone = name, tier, seconds, build, command, alone


def registered():
    tests = []
    for build, (kinds, seconds) in PROGRAMS.items():
        for name in ADDED.get(build, ()):
            program = os.path.join(ROOT, "build", build, "tests", os.path.basename(name))
            tests.append(Test(f"{build}/{name}", "ci", seconds, build, [program]))
        for kind in kinds:
            for source in sorted(glob.glob(os.path.join(ROOT, "tests", kind, "*_test.c"))):
                base = os.path.basename(source)[:-2]
                if base in LEFT_OUT.get(build, ()):
                    continue
                program = os.path.join(ROOT, "build", build, "tests", base)
                tests.append(Test(f"{build}/{kind}/{base}", "ci", seconds, build, [program], alone=kind == "cluster"))
    with open(os.path.join(ROOT, "tests", "list")) as f:
        for line in f:
            if not line.strip() or line.startswith("#"):
                continue
            name, tier, seconds, build, command = line.split(None, 4)
            if tier not in ("ci", "long"):
                sys.exit(f"tests/list: {name}: '{tier}' is no tier: allowed are ci, long")
            tests.append(Test(f"{build}/{name}", tier, int(seconds), build, shlex.split(command)))
    return tests


def environment(test, tmp, mark, long_tier):
    supp = os.path.join(ROOT, "tests", "lib")
    env = dict(os.environ, TMPDIR=tmp, SHOAL=os.path.join(ROOT, "build", test.build, "shoal"), SHOAL_TEST=mark,
               OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
               ASAN_OPTIONS="detect_leaks=1:abort_on_error=0", UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1",
               LSAN_OPTIONS=f"suppressions={supp}/lsan.supp:print_suppressions=0",
               TSAN_OPTIONS=f"suppressions={supp}/tsan.supp:halt_on_error=1:exitcode=66")
    if test.build == "tsan":
        env["OMP_NUM_THREADS"] = "1"
    if long_tier:
        env["SHOAL_LONG"] = "1"
    return env


def marked(mark):
    """pids of processes that this test started, wherever they are in the tree."""
    found = []
    for p in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{p}/environ", "rb") as f:
                if b"SHOAL_TEST=" + mark.encode() in f.read().split(b"\0"):
                    found.append(int(p))
        except OSError:
            pass
    return found


def command_line(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as f:
            return f.read().replace(b"\0", b" ").decode(errors="replace")[:140]
    except OSError:
        return "?"


def in_use(path):
    """By a process that lives, which then is none of this test: mapped, or named in its environment."""
    for place in glob.glob("/proc/[0-9]*/maps") + glob.glob("/proc/[0-9]*/environ"):
        try:
            with open(place, "rb") as f:
                if path.encode() in f.read():
                    return True
        except OSError:
            pass
    return False


def sockets_in(folder):
    found = []
    for base, _, files in os.walk(folder):
        for name in files:
            path = os.path.join(base, name)
            try:
                if stat.S_ISSOCK(os.lstat(path).st_mode):
                    found.append(path)
            except OSError:
                pass
    return found


def left_behind(mark, tmp, shm_before):
    end = time.time() + 5  # what is about to end may do so
    while (pids := marked(mark)) and time.time() < end:
        time.sleep(0.1)
    found = [f"process {p}: {command_line(p)}" for p in pids]
    for p in pids:
        try:
            os.kill(p, signal.SIGKILL)
        except OSError:
            pass
    found += [f"socket {s}" for s in sockets_in(tmp)]
    new = [os.path.join("/dev/shm", n) for n in set(os.listdir("/dev/shm")) - shm_before]
    left = lambda: [p for p in new if os.path.exists(p) and not in_use(p)]
    if left():
        time.sleep(2)  # another program may be just about to use or remove it
    found += [f"shared memory {p}" for p in left()]
    return found


def run(test, long_tier):
    """(outcome, seconds, what to say, log)"""
    log = os.path.join(LOGS, test.name.replace("/", "-") + ".log")
    tmp = tempfile.mkdtemp(prefix="sht-")
    os.chmod(tmp, 0o711)  # a test may go on as another user
    mark = f"{os.getpid()}-{os.path.basename(tmp)}"
    shm = set(os.listdir("/dev/shm"))
    began, note = time.time(), ""
    with open(log, "wb") as out:
        try:
            p = subprocess.Popen(test.command, cwd=ROOT, env=environment(test, tmp, mark, long_tier), stdin=subprocess.DEVNULL,
                                 stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
            code = p.wait(timeout=test.seconds)
            if code < 0:
                note = f"killed by signal {-code}"
            elif code not in (0, SKIPPED):
                note = f"exit status {code}"
        except subprocess.TimeoutExpired:
            os.killpg(p.pid, signal.SIGKILL)
            p.wait()
            code, note = 1, f"not finished after {test.seconds} s"
        except OSError as e:
            code, note = 1, str(e)
    took = time.time() - began
    left = left_behind(mark, tmp, shm)
    if left and code in (0, SKIPPED):
        code, note = 1, "left behind: " + "; ".join(left)
    shutil.rmtree(tmp, ignore_errors=True)
    if code == 0:
        os.remove(log)
    return ("passed" if code == 0 else "skipped" if code == SKIPPED else "failed"), took, note, log


def results(chosen, long_tier):
    """(test, what run gave) of each, as they end."""
    with concurrent.futures.ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        pairs = sorted((t for t in chosen if not t.alone), key=lambda t: LONGEST.index(t.name) if t.name in LONGEST else len(LONGEST))
        under_way = {pool.submit(run, t, long_tier): t for t in pairs}
        for done in concurrent.futures.as_completed(under_way):
            yield under_way[done], done.result()
    for t in chosen:
        if t.alone:
            yield t, run(t, long_tier)


def tell(number, test, outcome, took, note, log):
    print(f"{number} {outcome:8}{took:7.1f} s  {test.name}{': ' + note if note else ''}", flush=True)
    if outcome == "passed":
        return
    with open(log, errors="replace") as f:
        lines = f.read().strip().splitlines()
    if outcome == "skipped":
        print("        " + (lines or ["no reason given"])[-1], flush=True)
        return
    for line in lines[-25:]:
        print("        " + line[:220])
    print(f"        log: {os.path.relpath(log, ROOT)}", flush=True)


def main():
    a = argparse.ArgumentParser()
    a.add_argument("--long", action="store_true")
    a.add_argument("--only", default="")
    a.add_argument("--no-build", action="store_true")
    a.add_argument("--list", action="store_true")
    a = a.parse_args()
    chosen = [t for t in registered() if (a.long or t.tier == "ci") and
              (not a.only or a.only in t.name or fnmatch.fnmatch(t.name, a.only))]
    if a.list:
        for t in chosen:
            print(t.name)
        return 0
    os.makedirs(LOGS, exist_ok=True)
    count = {"passed": 0, "failed": 0, "skipped": 0}
    began = time.time()
    for k, (test, result) in enumerate(results(chosen, a.long)):
        count[result[0]] += 1
        tell(f"{k + 1:3}/{len(chosen)}", test, *result)
    print(f"{time.time() - began:.0f} s")
    if not chosen:
        print("no test has such a name", file=sys.stderr)
    print(f"{count['passed']} passed, {count['failed']} failed, {count['skipped']} skipped")
    missed = count["skipped"] and os.environ.get("CI")  # there nothing may be left out
    return 1 if count["failed"] or missed or not chosen else 0


sys.exit(main())
