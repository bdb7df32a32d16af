#!/usr/bin/env python3
"""What `shoal run` chooses by the cost model: sequences at once and prompt tokens of a step, for the lengths of its own requests and the
speeds of this machine, as `shoal plan` finds them; and when it measures those speeds: once, for a job that is forecast to take long.

usage: tuned.py"""
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import shoaltest as st

USUAL = (32, 512)  # without measured speeds, one rank
MEASURING = "measuring the speed of this machine, once"


def requests(n, prompt, output):
    ids = lambda k: [20 + (i * 131 + 7 * k) % 400 for i in range(prompt)]
    return [st.completion(f"r{k}", ids(k), max_tokens=output, ignore_eos=True, temperature=0) for k in range(n)]


def batch_of(said):
    """Sequences at once and rows of a chunk, as a run's first line has them."""
    m = re.search(r"; (\d+) sequences at once, (\d+) prompt tokens a step", said)
    return m and (int(m[1]), int(m[2]))


class Runs:
    def __init__(self, check, scratch):
        self.check, self.s, self.inp, self.out = check, scratch, scratch.file("in.jsonl"), scratch.file("out.jsonl")
        self.env = scratch.env(XDG_CACHE_HOME=scratch.file("cache"))

    def command(self, req, *options):
        for path in (self.out, self.out + ".store", self.s.file("trace.json")):
            shutil.rmtree(path, ignore_errors=True) if os.path.isdir(path) else os.path.exists(path) and os.remove(path)
        st.write_lines(self.inp, req)
        ranks = () if "-n" in options else ("-n", "1")
        return [st.shoal(), "run", "-i", self.inp, "-o", self.out, *ranks, "--progress", "json", *map(str, options)]

    def whole(self, req, *options):
        """A job from start to end: what it said."""
        p = subprocess.run(self.command(req, *options), capture_output=True, text=True, env=self.env, timeout=60)
        self.check(p.returncode == 0, f"{options}: exit {p.returncode}: {p.stderr[-300:]}")
        return p.stderr

    def begun(self, req, *options):
        """A job that is interrupted when it works: what it said until then."""
        p = subprocess.Popen(self.command(req, *options), stderr=subprocess.PIPE, text=True, env=self.env)
        late = threading.Timer(60, p.kill)
        late.start()
        said = ""
        for line in p.stderr:
            said += line
            if '"event":"start"' in line:
                p.send_signal(signal.SIGINT)
        late.cancel()
        self.check(p.wait() == 4, f"interrupted: exit {p.returncode}: {said[-300:]}")
        return said

    def planned(self, *options):
        """What the planner says of the last job."""
        p = subprocess.run([st.shoal(), "plan", "-n", "1", "--brief", "--workload", self.inp, *map(str, options)], capture_output=True, text=True,
                           env=self.env)
        m = re.search(r"--max-seqs (\d+) --chunk (\d+)", p.stdout)
        self.check(m, f"shoal plan: {p.stdout[:300]} {p.stderr[:300]}")
        return m and (int(m[1]), int(m[2]))

    def cut(self, *options):
        """First layers of all ranks, as the planner has them for the last job."""
        p = subprocess.run([st.shoal(), "plan", "--brief", "--workload", self.inp, "-o", self.s.file("plan.json"), *map(str, options)],
                           capture_output=True, text=True, env=self.env)
        self.check(p.returncode == 0, f"shoal plan: {p.stdout[:300]} {p.stderr[:300]}")
        with open(self.s.file("plan.json")) as f:
            return [r["first"] for r in json.load(f)["rank"]]

    def machine(self):
        found = glob.glob(os.path.join(self.s.file("cache"), "shoal", "machine-*.json"))
        return found[0] if len(found) == 1 else None


def check_measuring(check, r):
    """A job of seconds is begun with what is usual; one of hours is worth measuring, once."""
    said = r.whole(requests(40, 5, 10))
    check(MEASURING not in said and r.machine() is None, f"a short job: {said[:300]}")
    check(batch_of(said) == USUAL, f"a short job: {said[:300]}")
    hours = requests(4000, 5, 4000)
    said = r.begun(hours)
    check(said.count(MEASURING) == 1 and all(json.loads(x) for x in said.splitlines() if x.startswith("{")), f"a long job: {said[:600]}")
    check(r.machine() is not None, "a long job: nothing was kept")
    check(batch_of(said) == r.planned(), f"a long job: {batch_of(said)}, planned {r.planned()}")
    said = r.begun(hours)
    check(MEASURING not in said, f"a long job, again: {said[:300]}")


def check_choice(check, r):
    """Speeds made up, so that what is best is the same everywhere: it differs by lengths, and what is given stays."""
    with open(r.machine()) as f:
        m = json.load(f)
    m["node"][0].update(read_gbs=20, fma_gflops=200)
    m["kernels"] = {"weights_read": 0.9, "weights_fma": 0.8, "layer_us": 20}
    with open(r.machine(), "w") as f:
        json.dump(m, f)
    got = {}
    for name, req in (("prompts", requests(150, 600, 2)), ("answers", requests(150, 3, 40))):
        said = r.whole(req)
        got[name] = batch_of(said)
        check(got[name] == r.planned(), f"{name}: {got[name]} at once and a step, planned {r.planned()}")
        check(MEASURING not in said, f"{name}: {said[:300]}")
    check(got["prompts"] != got["answers"] and USUAL not in got.values(), f"lengths make no difference: {got}")
    said = r.whole(requests(150, 3, 40), "--max-seqs", 5)
    check(batch_of(said) == (5, r.planned("--max-seqs", 5)[1]), f"with --max-seqs 5: {batch_of(said)}, planned {r.planned('--max-seqs', 5)}")
    trace = r.s.file("trace.json")
    said = r.whole(requests(got["answers"][0] + 50, 3, 40), "--trace", trace)
    with open(trace) as f:
        most = max(e["args"]["decode_rows"] for e in json.load(f)["traceEvents"] if e["ph"] == "X" and e["name"].startswith("step "))
    check(most == batch_of(said)[0], f"ranks ran {most} sequences at once, not {batch_of(said)}")


def check_cuts(check, r):
    """Stages, and ranks that only read prompts, are cut where the planner would: the ranks say so, who have the plan from the coordinator."""
    got = set()
    for req in (requests(150, 600, 2), requests(150, 3, 40)):
        for options, division in ((("-n", 2), ("--pp", 2, "--ep", 1, "--tp", 1, "--cp", 1)), (("-n", 3, "--prefill", 2), ("--pp", 1))):
            said = r.whole(req, *options)
            m = re.search(r"layers ([0-9| +head-]+)(?:; prompts on 2 more: layers ([0-9| -]+))?", said)
            first = m and [int(x.split("-")[0]) for part in m.groups() if part for x in part.replace("+ head", "").split("|")]
            want = r.cut(*options, *division, "--replicas", 1)
            check(first == want, f"{options}: cut at {first}, planned {want}: {said[:400]}")
            got.add((options, tuple(want)))
    said = r.whole(requests(20, 60, 2), "-n", 2, "--cuts", 5)
    check("layers 0-4 | 5 + head" in said, f"cuts that are given: {said[:400]}")
    check(len({cuts for options, cuts in got if options == ("-n", 2)}) == 2, f"lengths make no difference to cuts: {got}")


def main():
    check = st.Checks()
    with st.Scratch() as s:
        r = Runs(check, s)
        check_measuring(check, r)
        if r.machine():
            check_choice(check, r)
            check_cuts(check, r)
        left = st.left_behind(s)
        check(not left, f"left behind: {left}")
    check.finish()


main()
