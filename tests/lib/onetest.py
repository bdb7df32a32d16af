"""Runs one test: with a time limit, a TMPDIR and, where the machine allows it, a /dev/shm of its own, and a log that is kept when it
fails; looks afterwards for processes, sockets and shared memory that it left behind, and tells what it cost."""
import collections
import functools
import glob
import os
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time

import shoaltest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
LOGS = os.path.join(ROOT, "build", "test-logs")
SKIPPED = 77
stopping = threading.Event()  # nothing more is started
MARK = f"{os.getpid()}-"  # what the marks of all that this runner starts begin with
BUILD_PRIORITY, TEST_PRIORITY = 19, 10  # nice values of what runs beside the tests with deadlines

# outcome: passed, failed, skipped; wall and cpu: seconds; note: what to say; log: None when it did not run
Result = collections.namedtuple("Result", "outcome wall cpu note log")


def in_background(words, nice):
    """The command at a low priority, within its session and, where the kernel weighs sessions (autogroup), as a session."""
    return ["sh", "-c", f'{{ echo {nice} > /proc/self/autogroup; }} 2> /dev/null; exec nice -n {nice} "$@"', "sh", *words]


@functools.cache
def own_shm():
    """Whether a test can have a /dev/shm of its own here: then what is left in it is this test's, whoever runs beside it."""
    return shoaltest.own_mounts("/dev/shm")


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
    """pids of processes that this test started, wherever they are in the tree. A mark that ends with - stands for all that begin with it."""
    mark = b"SHOAL_TEST=" + mark.encode()
    is_it = (lambda e: e.startswith(mark)) if mark.endswith(b"-") else (lambda e: e == mark)
    found = []
    for p in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{p}/environ", "rb") as f:
                if any(map(is_it, f.read().split(b"\0"))):
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


class Place:
    """Where a test runs: its TMPDIR, its shared memory, and the mark of its processes."""

    taken = set()

    def __init__(self):
        self.tmp = self.shm = None
        Place.taken.add(self)
        self.tmp = tempfile.mkdtemp(prefix="sht-")
        os.chmod(self.tmp, 0o711)  # a test may go on as another user
        self.mark = MARK + os.path.basename(self.tmp)
        self.shm = tempfile.mkdtemp(prefix="sht-", dir="/dev/shm") if own_shm() else None
        if self.shm:
            os.chmod(self.shm, 0o1777)
        self.shm_before = set(os.listdir("/dev/shm"))

    def inside(self, words):
        return ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /dev/shm && exec "$@"', self.shm, *words] if self.shm else words

    def shm_left(self):
        if self.shm:
            return [os.path.join("/dev/shm", n) for n in os.listdir(self.shm)]
        new = [os.path.join("/dev/shm", n) for n in set(os.listdir("/dev/shm")) - self.shm_before]
        left = lambda: [p for p in new if os.path.exists(p) and not in_use(p)]
        if left():
            time.sleep(2)  # another program may be just about to use or remove it
        return left()

    def left_behind(self):
        end = time.time() + 5  # what is about to end may do so
        while (pids := marked(self.mark)) and time.time() < end:
            time.sleep(0.1)
        found = [f"process {p}: {command_line(p)}" for p in pids]
        shoaltest.kill(pids)
        return found + [f"socket {s}" for s in sockets_in(self.tmp)] + [f"shared memory {p}" for p in self.shm_left()]

    def remove(self):
        for folder in filter(None, (self.tmp, self.shm)):
            shutil.rmtree(folder, ignore_errors=True)
        Place.taken.discard(self)


def stop():
    """Ends whatever was started here, builds too, and removes its folders."""
    stopping.set()
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, signal.SIG_IGN)
    for _ in range(10):  # what was just about to start is seen a moment later
        shoaltest.kill(marked(MARK))
        time.sleep(0.1)
    for place in list(Place.taken):
        place.remove()


def finished(test, words, env, out):
    """(exit status, processor seconds of it and of all it waited for, what to say)"""
    p = subprocess.Popen(words, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    late = threading.Event()

    def end():
        late.set()
        try:
            os.killpg(p.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # just ended

    limit = threading.Timer(test.seconds, end)
    limit.daemon = True
    limit.start()
    _, status, used = os.wait4(p.pid, 0)
    limit.cancel()
    p.returncode = code = os.waitstatus_to_exitcode(status)
    cpu = used.ru_utime + used.ru_stime
    if late.is_set():
        return 1, cpu, f"not finished after {test.seconds} s"
    return code, cpu, f"killed by signal {-code}" if code < 0 else f"exit status {code}" if code not in (0, SKIPPED) else ""


def run(test, long_tier, background=False):
    if stopping.is_set():
        return Result("failed", 0, 0, "interrupted", None)
    log = os.path.join(LOGS, test.name.replace("/", "-") + ".log")
    if not os.access(os.path.join(ROOT, test.command[0]), os.X_OK):
        return Result("failed", 0, 0, f"{test.command[0]}: no such program", None)
    place, began = Place(), time.time()
    words = place.inside(test.command)
    with open(log, "wb") as out:
        code, cpu, note = finished(test, in_background(words, TEST_PRIORITY) if background else words,
                                   environment(test, place.tmp, place.mark, long_tier), out)
    wall = time.time() - began
    left = place.left_behind()
    if left and code in (0, SKIPPED):
        code, note = 1, "left behind: " + "; ".join(left)
    place.remove()
    if code == 0:
        os.remove(log)
    return Result("passed" if code == 0 else "skipped" if code == SKIPPED else "failed", wall, cpu, note, log)
