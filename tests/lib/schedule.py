"""The order of tests and builds on the processors of this machine. Tests with deadlines run one after the other, other tests with ranks
two at a time. What they leave of the processors goes, at a low priority, to what needs none at any moment: first the builds of the
sanitizers, then programs of one process. Tests of the long tier, which may measure, come last and have the machine to themselves."""
import collections
import os
import queue
import subprocess
import threading
import time

import onetest

ROOT = onetest.ROOT
CPUS = len(os.sched_getaffinity(0))


class Builds:
    """The builds by preset: whether they are there, and what went wrong."""

    def __init__(self, presets, needed):
        self.events = {p: threading.Event() for p in presets}
        self.failed = {}
        if not needed:
            for e in self.events.values():
                e.set()

    def log(self, preset):
        return os.path.join(ROOT, "build", preset + ".log")

    def make(self, preset, background=False):
        """What to say of it: how long it took, or the end of its log."""
        began = time.time()
        try:
            self._make(preset, background)
        except Exception as e:  # whoever waits for it must hear
            self.failed[preset] = f"the {preset} build failed: {e!r}"
        finally:
            self.events[preset].set()
        if preset not in self.failed:
            return f"built {preset} in {time.time() - began:.0f} s"
        try:
            with open(self.log(preset), errors="replace") as f:
                return "".join(f.readlines()[-40:]) + self.failed[preset]
        except OSError:
            return self.failed[preset]

    def _make(self, preset, background):
        targets = [] if preset == "release" else ["--target", preset + "_tests"]
        os.makedirs(os.path.join(ROOT, "build"), exist_ok=True)
        with open(self.log(preset), "wb") as out:
            for words in (["cmake", "--preset", preset, "-DSHOAL_TESTS=ON"], ["cmake", "--build", "--preset", preset, *targets]):
                words = onetest.in_background(words, onetest.BUILD_PRIORITY) if background else words
                if not self._done(words, out, preset, background):
                    self.failed[preset] = f"the {preset} build failed: see {os.path.relpath(self.log(preset), ROOT)}"
                    break

    @staticmethod
    def _done(words, out, preset, background):
        try:
            return subprocess.run(words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=background,
                                  env=dict(os.environ, SHOAL_TEST=onetest.MARK + preset)).returncode == 0
        except OSError as e:
            out.write(f"{e}\n".encode())
            return False

    def wait(self, preset):
        """"" when it is there, else what went wrong."""
        self.events[preset].wait()
        return self.failed.get(preset, "")


class Schedule:
    def __init__(self, builds, long_tier, say):
        self.builds, self.long_tier, self.say = builds, long_tier, say
        self.results = queue.Queue()

    def _run(self, test, background=False):
        wrong = self.builds.wait(test.build)
        try:
            result = onetest.Result("failed", 0, 0, wrong, None) if wrong else onetest.run(test, self.long_tier, background)
        except Exception as e:  # whatever happens, every test is answered for
            result = onetest.Result("failed", 0, 0, repr(e), None)
        self.results.put((test, result))

    def _some(self, tests, at_once, background=False):
        """All of these tests, so many at a time."""
        todo = collections.deque(tests)

        def work():
            while True:
                try:
                    test = todo.popleft()
                except IndexError:
                    return
                self._run(test, background)

        hands = [threading.Thread(target=work, daemon=True) for _ in range(min(at_once, len(todo)))]
        for h in hands:
            h.start()
        for h in hands:
            h.join()

    def _say(self, text):
        try:
            self.say(text)
        except (OSError, ValueError):
            pass  # nobody reads it: no reason to leave tests unanswered

    def _back(self, tests, background):
        for preset, ready in self.builds.events.items():
            if not ready.is_set():
                self._say(self.builds.make(preset, background))
        self._some(tests, CPUS if onetest.own_shm() else 1, background)

    def _front(self, tests, pairs):
        for release in (True, False):  # those of the other builds when they are there
            for beside in ("pair", "alone"):
                some = [t for t in tests if t.beside == beside and (t.build == "release") == release]
                self._some(sorted(some, key=lambda t: t.early), 2 if beside == "pair" and pairs else 1)

    def _all(self, tests, last):
        mixed = onetest.own_shm() and CPUS > 1  # else nobody could tell whose shared memory is left
        back = sorted((t for t in tests if t.beside == "any"), key=lambda t: t.early)
        side = threading.Thread(target=self._back, args=(back, mixed), daemon=True)
        side.start()
        if not mixed:
            side.join()
        self._front(tests, mixed)
        side.join()
        self._some(last, 1)

    def _whole(self, first, last):
        try:
            self._all(first, last)
        except BaseException as e:  # else whoever reads the results waits for ever
            self.results.put((None, e))

    def run(self, tests):
        """(test, result) of each, as they end."""
        first, last = [t for t in tests if t.tier != "long"], [t for t in tests if t.tier == "long"]
        threading.Thread(target=self._whole, args=(first, last), daemon=True).start()
        for _ in tests:
            test, result = self.results.get()
            if test is None:
                raise result
            yield test, result
