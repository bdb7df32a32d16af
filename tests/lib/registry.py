"""Which tests there are; builds what they need and runs them: see tests/run. schedule.py has the order, onetest.py runs one."""
import argparse
import fnmatch
import glob
import os
import shlex
import signal
import sys
import time
import traceback

import onetest
import schedule

ROOT = onetest.ROOT
# Which kinds of C programs run under which build, and how long each may take.
PROGRAMS = {"release": (("unit", "golden", "kernels", "cluster"), 300), "asan": (("unit", "golden", "cluster"), 900),
            "tsan": (("cluster",), 1200)}


# MPI is not instrumented: what starts ranks by mpirun runs in release alone. The thread sanitizer does not follow a fork.
# Sanitizers replace malloc, whose calls alloc_test and model_alloc_test count: what else these do, others do too.
LEFT_OUT = {"asan": {"mpi_test", "alloc_test", "model_alloc_test"}, "tsan": {"mpi_test", "coordinator_test", "tail_test", "alloc_test"}}
ADDED = {"tsan": ["unit/link_local_test"]}
# Programs of one process that have deadlines all the same.
PROMPT = {"client_test", "load_link_test", "supervise_test", "wire_test"}
# The longest, which begin first; then those with more seconds allowed.
LONGEST = ("asan/golden/invariance_test", "asan/unit/packed_test", "asan/unit/leader_test", "asan/unit/attention_test")


class Test:
    """beside: what may run at the same time. `alone`: nothing but what has a low priority, for it has deadlines; `pair`: one more of this
    kind; `any`: it has a low priority itself. early: its place among those that run two at a time: what takes longest is not left to the end."""

    def __init__(self, name, tier, seconds, build, command, beside):
        self.name, self.tier, self.seconds, self.build, self.command, self.beside = name, tier, seconds, build, command, beside
        self.early = (LONGEST.index(name) if name in LONGEST else len(LONGEST), -seconds)


def programs(build, kinds, seconds):
    sources = [s for kind in kinds for s in sorted(glob.glob(os.path.join(ROOT, "tests", kind, "*_test.c")))]
    sources += [os.path.join(ROOT, "tests", name + ".c") for name in ADDED.get(build, ())]
    for source in sources:
        kind, base = os.path.basename(os.path.dirname(source)), os.path.basename(source)[:-2]
        if base not in LEFT_OUT.get(build, ()):
            yield Test(f"{build}/{kind}/{base}", "ci", seconds, build, [os.path.join(ROOT, "build", build, "tests", base)],
                       "pair" if kind == "cluster" or base in PROMPT else "any")


def scripts():
    with open(os.path.join(ROOT, "tests", "list")) as f:
        for line in f:
            if not line.strip() or line.startswith("#"):
                continue
            name, tier, seconds, build, beside, command = line.split(None, 5)
            if tier not in ("ci", "long"):
                sys.exit(f"tests/list: {name}: '{tier}' is no tier: allowed are ci, long")
            if beside not in ("alone", "pair"):
                sys.exit(f"tests/list: {name}: '{beside}': allowed are alone, pair")
            yield Test(f"{build}/{name}", tier, int(seconds), build, shlex.split(command), beside)


def registered():
    """Those of the release build first: they run while the others are built."""
    tests = list(scripts()) + [t for build, (kinds, seconds) in PROGRAMS.items() for t in programs(build, kinds, seconds)]
    return sorted(tests, key=lambda t: t.build != "release")


def tell(number, test, result):
    print(f"{number} {result.outcome:8}{result.wall:7.1f} s  {test.name}{': ' + result.note if result.note else ''}", flush=True)
    if result.outcome == "passed" or not result.log:
        return
    with open(result.log, errors="replace") as f:
        lines = f.read().strip().splitlines()
    if result.outcome == "skipped":
        print("        " + (lines or ["no reason given"])[-1], flush=True)
        return
    for line in lines[-25:]:
        print("        " + line[:220])
    print(f"        log: {os.path.relpath(result.log, ROOT)}", flush=True)


def tell_times(results):
    """What each test took and cost, the longest first: one that has few processors' seconds for its length waits."""
    print("   wall s    cpu s  cpu/wall")
    for test, r in sorted(results, key=lambda x: -x[1].wall):
        print(f"{r.wall:9.1f}{r.cpu:9.1f}{r.cpu / max(r.wall, 0.001):10.2f}  {test.name}  ({test.beside})")
    for beside in ("alone", "pair", "any"):
        some = [r for t, r in results if t.beside == beside]
        print(f"{sum(r.wall for r in some):9.1f}{sum(r.cpu for r in some):9.1f}            {len(some)} tests: {beside}")


def build_release(builds):
    print("building release", flush=True)
    print(builds.make("release"), flush=True)
    if builds.failed:
        print("0 passed, 1 failed, 0 skipped")
    return not builds.failed


def options():
    a = argparse.ArgumentParser()
    a.add_argument("--long", action="store_true")
    a.add_argument("--only", default="")
    a.add_argument("--no-build", action="store_true")
    a.add_argument("--times", action="store_true")
    a.add_argument("--list", action="store_true")
    return a.parse_args()


def main():
    a = options()
    chosen = [t for t in registered() if (a.long or t.tier == "ci") and
              (not a.only or a.only in t.name or fnmatch.fnmatch(t.name, a.only))]
    if a.list:
        for t in chosen:
            print(t.name)
        return 0
    os.makedirs(onetest.LOGS, exist_ok=True)
    began = time.time()
    presets = dict.fromkeys(t.build for t in chosen)
    builds = schedule.Builds(presets, not a.no_build)
    if "release" in presets and not a.no_build and not build_release(builds):
        return 1
    count = {"passed": 0, "failed": 0, "skipped": 0}
    results = []
    for k, (test, result) in enumerate(schedule.Schedule(builds, a.long, lambda text: print(text, flush=True)).run(chosen)):
        count[result.outcome] += 1
        results.append((test, result))
        tell(f"{k + 1:3}/{len(chosen)}", test, result)
    if a.times:
        tell_times(results)
    print(f"{time.time() - began:.0f} s")
    if not chosen:
        print("no test has such a name", file=sys.stderr)
    print(f"{count['passed']} passed, {count['failed']} failed, {count['skipped']} skipped")
    missed = count["skipped"] and os.environ.get("CI")  # there nothing may be left out
    return 1 if count["failed"] or missed or not chosen else 0


signal.signal(signal.SIGTERM, signal.default_int_handler)
try:
    status = main()
except KeyboardInterrupt:
    onetest.stop()
    status = 130
except Exception:  # what runs must not outlive this program
    traceback.print_exc()
    onetest.stop()
    status = 1
sys.stdout.flush()
os._exit(status)  # threads that wait for what was interrupted are no reason to stay
