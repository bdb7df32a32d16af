"""What the system tests share: running shoal, reading rows, and looking for what a run left behind. Standard library only."""
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DATA = os.path.join(ROOT, "tests", "data")
MODELS = os.path.join(DATA, "text", "models")
GOLDEN = os.path.join(DATA, "text", "golden")
DEMO = os.path.join(ROOT, "share", "minnow")


def shoal():
    """The program under test: $SHOAL, else the release build."""
    return os.environ.get("SHOAL", os.path.join(ROOT, "build", "release", "shoal"))


def golden(name):
    with open(os.path.join(GOLDEN, name + ".json")) as f:
        return json.load(f)


def own_mounts(folder="/dev/shm"):
    """Whether a test may put one folder in another's place for itself alone: root, a mount namespace, and mount --bind in it."""
    try:
        return subprocess.run(["unshare", "--mount", "mount", "--bind", folder, folder], stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL).returncode == 0 and os.geteuid() == 0
    except FileNotFoundError:
        return False


class Scratch:
    """A private folder that is also TMPDIR of every run, so that whatever is left in it is seen."""

    def __enter__(self):
        self.path = tempfile.mkdtemp(prefix="shoal-test-")
        self.tmp = os.path.join(self.path, "tmp")
        os.mkdir(self.tmp)
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.path, ignore_errors=True)

    def file(self, name):
        return os.path.join(self.path, name)

    def env(self, **extra):
        e = dict(os.environ, TMPDIR=self.tmp, OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
        e.update({k: str(v) for k, v in extra.items()})
        return e


def write_lines(path, requests):
    with open(path, "w") as f:
        for r in requests:
            f.write((r if isinstance(r, str) else json.dumps(r)) + "\n")


def completion(cid, prompt, **body):
    return {"custom_id": cid, "method": "POST", "url": "/v1/completions", "body": dict({"model": "m", "prompt": prompt}, **body)}


def command(model, inp, out, *options):
    return [shoal(), "run", "-m", model, "-i", inp, "-o", out, "--progress", "none", *map(str, options)]


def run(scratch, model, requests, *options, name="r", env=None, timeout=300):
    """One whole job; returns (exit status, rows by custom_id without `created`, standard error)."""
    inp, out = scratch.file(name + ".in.jsonl"), scratch.file(name + ".out.jsonl")
    write_lines(inp, requests)
    if os.path.exists(out):
        os.remove(out)
    shutil.rmtree(out + ".store", ignore_errors=True)
    p = subprocess.run(command(model, inp, out, *options), capture_output=True, text=True, timeout=timeout,
                       env=env or scratch.env())
    return p.returncode, (rows(out) if os.path.exists(out) else {}), p.stderr


def strip(row):
    """A row without what may differ between runs: `created`, wherever it stands."""
    if isinstance(row, dict):
        return {k: strip(v) for k, v in row.items() if k != "created"}
    return [strip(v) for v in row] if isinstance(row, list) else row


def rows(path):
    got = {}
    with open(path) as f:
        for line in f:
            r = json.loads(line)
            key = r["custom_id"] if r["custom_id"] is not None else ("line", (r.get("error") or {}).get("line"))
            if key in got:
                raise AssertionError(f"{key} twice in {path}")
            got[key] = strip(r)
    return got


def children(pid):
    """pids below pid, found by parent, whatever their process group."""
    out = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout
    kids = {}
    for line in out.splitlines():
        p, q = map(int, line.split())
        kids.setdefault(q, []).append(p)
    todo, found = [pid], []
    while todo:
        for k in kids.get(todo.pop(), []):
            found.append(k)
            todo.append(k)
    return found


def left_behind(scratch, wait=15.0):
    """Processes whose environment or command line names this scratch folder, and sockets in it, after up to `wait` seconds."""
    end = time.time() + wait
    while True:
        found = []
        for p in filter(str.isdigit, os.listdir("/proc")):
            if int(p) == os.getpid():
                continue
            try:
                with open(f"/proc/{p}/environ", "rb") as f:
                    mine = scratch.path.encode() in f.read()
                with open(f"/proc/{p}/cmdline", "rb") as f:
                    cmd = f.read().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if mine and "shoal" in cmd.split(" ")[0] + " " + cmd and "pytest" not in cmd:
                found.append(f"process {p}: {cmd[:120]}")
        if not found or time.time() > end:
            return found
        time.sleep(0.2)


def kill(pids):
    """Ends processes at once; some may be gone already."""
    for p in pids:
        try:
            os.kill(p, signal.SIGKILL)
        except OSError:
            pass


def kill_all(scratch):
    kill(int(line.split()[1].rstrip(":")) for line in left_behind(scratch, 0))


class Checks:
    """Counts checks; prints failures at once; exit status at the end."""

    def __init__(self):
        self.n, self.bad, self.t0 = 0, 0, time.time()

    def __call__(self, ok, what):
        self.n += 1
        if not ok:
            self.bad += 1
            print("FAILED:", what, flush=True)
        return ok

    def finish(self):
        print(f"{self.n} checks, {self.bad} failed, {time.time() - self.t0:.0f} s")
        sys.exit(1 if self.bad or not self.n else 0)


def difference(want, got):
    """A short text of how two sets of rows differ, "" when they are equal."""
    if want == got:
        return ""
    missing, extra = [k for k in want if k not in got], [k for k in got if k not in want]
    diff = [k for k in want if k in got and want[k] != got[k]]
    text = f"{len(missing)} missing {missing[:3]}, {len(extra)} extra {extra[:3]}, {len(diff)} different {diff[:3]}"
    if diff:
        a, b = json.dumps(want[diff[0]]), json.dumps(got[diff[0]])
        i = next((j for j in range(min(len(a), len(b))) if a[j] != b[j]), 0)
        text += f"; first: …{a[max(0, i - 40):i + 60]}… against …{b[max(0, i - 40):i + 60]}…"
    return text
