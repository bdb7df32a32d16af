#!/usr/bin/env python3
"""Several groups: the rows of one rank, whatever happens to a group. One is killed and the other goes on; all is killed and the same
command goes on; one that never comes up is given up with a warning, all of them end the run; groups of one node have CPUs of their
own; a request that ends every worker gets an error row and the others theirs."""
import json
import os
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import shoaltest as st

MODEL = os.path.join(st.MODELS, "e2b-like")
N = 72
TWO = ["-n", 2, "--replicas", 2, "--mode", "exact"]


def environ(pid):
    try:
        with open(f"/proc/{pid}/environ", "rb") as f:
            return dict(e.split("=", 1) for e in f.read().decode(errors="replace").split("\0") if "=" in e)
    except OSError:
        return {}


def groups(pid):
    """group number → pids of its launcher and ranks."""
    got = {}
    for p in st.children(pid):
        name = environ(p).get("SHOAL_GROUP", "")
        if name.startswith("run-"):
            got.setdefault(int(name.split("-")[2]), []).append(p)
    return got


def ranks(pids):
    got = []
    for p in pids:
        try:
            with open(f"/proc/{p}/cmdline", "rb") as f:
                cmd = f.read().split(b"\0")
            if len(cmd) > 1 and cmd[1] == b"worker":
                got.append(p)
        except OSError:
            pass
    return got


def thread_cpus(pid):
    """CPUs that compute threads are bound to: every thread bound to one CPU counts."""
    got = set()
    try:
        for t in os.listdir(f"/proc/{pid}/task"):
            cpus = os.sched_getaffinity(int(t))
            if len(cpus) == 1:
                got |= cpus
    except OSError:
        pass
    return got


def bound(pid, group):
    return set().union(*(thread_cpus(r) for r in ranks(groups(pid).get(group, []))))


def apart(pid):
    """Both groups are bound, to CPUs that they do not share, and stay so: reading the machine binds a thread for moments."""
    for _ in range(4):
        a, b = bound(pid, 1), bound(pid, 2)
        if not a or not b or a & b:
            return False
        time.sleep(0.1)
    return True


def wait_for(what, seconds=30.0):
    end = time.time() + seconds
    while time.time() < end:
        got = what()
        if got:
            return got
        time.sleep(0.02)
    return None


def varints(ids):
    out = b""
    for v in ids:
        while v > 127:
            out += bytes([v & 127 | 128])
            v >>= 7
        out += bytes([v])
    return out


class Case:
    def __init__(self, check, scratch, name, req, options, style="plain", **env):
        self.check, self.s, self.name = check, scratch, name
        self.inp, self.out = scratch.file(name + ".in.jsonl"), scratch.file(name + ".out.jsonl")
        st.write_lines(self.inp, req)
        self.cmd = [st.shoal(), "run", "-m", MODEL, "-i", self.inp, "-o", self.out, "--progress", style, *map(str, options)]
        self.env = scratch.env(**env)

    def start(self):
        self.began = time.time()
        self.p = subprocess.Popen(self.cmd, env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        return self.p

    def end(self, timeout=120):
        try:
            _, self.err = self.p.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.p.kill()
            self.err = "did not end"
        self.took = time.time() - self.began
        return self.p.returncode

    def working(self, group, after):
        """Waits until ranks of `group` are there and `after` s have passed since the start: short enough, they are at work."""
        wait_for(lambda: ranks(groups(self.p.pid).get(group, [])))
        time.sleep(max(0.0, self.began + after - time.time()))
        self.check(self.p.poll() is None, f"{self.name}: ended within {after:.2f} s, before anything was killed")

    def rows(self):
        return st.rows(self.out) if os.path.exists(self.out) else {}

    def expect(self, code, want, what):
        got = self.end()
        self.check(got == code, f"{self.name}: {what}: exit {got}, not {code}: {self.err[-600:]}")
        if want is not None:
            d = st.difference(want, self.rows())
            self.check(not d, f"{self.name}: {what}: {d}")
        left = st.left_behind(self.s)
        self.check(not left, f"{self.name}: left behind: {left}")
        st.kill_all(self.s)


def main():
    check = st.Checks()
    with st.Scratch() as s:
        ids = [r["ids"] for r in st.golden("e2b-like")["greedy"]]
        req = [st.completion(f"r{k}", ids[k % len(ids)], max_tokens=300, temperature=0.8 if k % 2 else 0, seed=k,
                             ignore_eos=True, return_token_ids=True, **({"logprobs": 2} if k % 4 == 0 else {})) for k in range(N)]
        code, want, err = st.run(s, MODEL, req, "-n", 1, "--mode", "exact", name="want")
        check(code == 0 and len(want) == N, f"undisturbed: exit {code}: {err[-300:]}")

        # undisturbed; both groups work, on CPUs of their own
        c = Case(check, s, "two", req, [*TWO, "--max-seqs", 4])
        p = c.start()
        up = wait_for(lambda: (lambda g: g if all(len(ranks(g.get(k, []))) == 2 for k in (1, 2)) else None)(groups(p.pid)))
        check(up is not None, "two: two groups of two ranks")
        if len(os.sched_getaffinity(0)) > 1:
            check(wait_for(lambda: apart(p.pid), 10), f"two: groups share CPUs: {[bound(p.pid, k) for k in (1, 2)]}")
        c.expect(0, want, "two groups of two ranks")
        check("2 groups, each a pipeline of 2 stages" in c.err, f"two: the first line: {c.err[:300]}")
        check("ranks 4/4" in c.err, f"two: the progress line: {c.err[:600]}")
        early = 0.4 * c.took

        # one group is killed: the other goes on
        c = Case(check, s, "one-killed", req, [*TWO, "--max-seqs", 4], style="json")
        p = c.start()
        c.working(2, early)
        first = set(ranks(groups(p.pid).get(1, [])))
        st.kill(groups(p.pid).get(2, []))
        time.sleep(0.25 * early)
        check(first and first <= set(ranks(groups(p.pid).get(1, []))) or p.poll() is not None, "one-killed: the first group ended, too")
        c.expect(0, want, "one group killed")
        check("group 2: was killed by signal 9 (Killed); starting again" in c.err, f"one-killed: what was said: {c.err[-800:]}")

        # everything is killed; the same command goes on, with other replicas, and takes what was left beside OUTPUT away
        c = Case(check, s, "all-killed", req, [*TWO, "--max-seqs", 4])
        p = c.start()
        c.working(1, early)
        st.kill(st.children(p.pid) + [p.pid])
        c.end()
        with open(c.out + f".tmp.{p.pid}", "w") as f:
            f.write("half a row")
        c.cmd = [x if x != "2" else "1" for x in c.cmd] + ["--replicas", "3"]
        c.start()
        c.expect(0, want, "everything killed, then 3 groups of one rank")
        check(not os.path.exists(c.out + f".tmp.{p.pid}"), "all-killed: what a killed writer left is still there")

        # a group that never comes up is given up; without any group the run ends
        script = s.file("launcher.sh")
        with open(script, "w") as f:
            f.write("#!/bin/sh\ncase $SHOAL_GROUP in run-*-$BAD-*) echo \"no such node\" >&2; exit 7;; esac\n"
                    "exec mpirun --oversubscribe --bind-to none -n $SHOAL_RANKS \"$@\"\n")
        os.chmod(script, 0o755)
        c = Case(check, s, "one-bad", req, [*TWO, "--launcher", script], BAD="2")
        c.start()
        c.expect(0, want, "a group that never comes up")
        said = "group 2: gave up after 3 tries without progress: ended with status 7: no such node; the run goes on with 1 of 2 groups"
        check(said in c.err or "group 2: ended with status 7: no such node; starting again" in c.err,
              f"one-bad: what was said: {c.err[-800:]}")
        c = Case(check, s, "all-bad", req, [*TWO, "--launcher", script], BAD="[12]")
        c.start()
        c.expect(3, None, "no group comes up")
        check("no group is left: group" in c.err and "no such node" in c.err, f"all-bad: what was said: {c.err[-800:]}")

        # a request that ends every worker it is given to
        shim, bad = s.file("poison.so"), list(range(301, 349))
        subprocess.run(["cc", "-shared", "-fPIC", "-D_GNU_SOURCE", "-o", shim, os.path.join(st.ROOT, "tests", "lib", "poison.c"), "-ldl"],
                       check=True)
        poisoned = req[:20] + [st.completion("poison", bad, max_tokens=20)] + req[20:]
        c = Case(check, s, "poison", poisoned, ["-n", 1, "--replicas", 2, "--mode", "exact", "--max-seqs", 4,
                                                "--launcher", f"env LD_PRELOAD={shim}"], POISON=varints(bad)[:40].hex())
        c.start()
        c.expect(1, None, "a poisonous request")
        got = c.rows()
        row = got.pop("poison", {})
        check(row.get("response", {}).get("status_code") == 500, f"poison: its row: {json.dumps(row)[:400]}")
        check("the worker ended" in json.dumps(row) and "signal 9" in json.dumps(row), f"poison: its message: {json.dumps(row)[:400]}")
        check(not st.difference(want, got), f"poison: the others: {st.difference(want, got)}")
    check.finish()


main()
