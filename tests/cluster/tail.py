#!/usr/bin/env python3
"""The end of a job with real ranks: a long request in the last line of the input costs hardly more steps than one in the first line,
far fewer than the lines in their order would take, over one group, a pipeline, lanes and two groups; a killed group changes nothing
but the time; and the rows are the same everywhere.

usage: tail.py"""
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import shoaltest as st

MODEL = os.path.join(st.MODELS, "26b-a4b-like")
SHORT, LONG, N, SEQS = 60, 800, 50, 4
PROMPT, LONG_PROMPT = 9, 40  # tokens; a step's rows of prompts tell whether the long one's is among them


def requests(n=N, short=SHORT, length=LONG):
    """n short ones and a long one behind them; of different prompts, so that nothing is shared."""
    ids = lambda k, length=PROMPT: [20 + (i * 131 + i * i * k + 7 * k) % 400 for i in range(length)]
    body = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
    req = [st.completion(f"r{k}", ids(k), max_tokens=short, **body) for k in range(n)]
    return req + [st.completion("long", ids(n, LONG_PROMPT), max_tokens=length, **body)]


def late(scratch):
    """A launcher whose groups come when all lines are there: until then the order is that of the lines."""
    path = scratch.file("late.sh")
    with open(path, "w") as f:
        f.write("sleep 0.5\nexec mpirun --oversubscribe --bind-to none -n $SHOAL_RANKS \"$@\"\n")
    return path


def steps(scratch, name, req, *options):
    """Rows of a run, the most steps that one of its ranks did, the step at which its rank began the long one, what was said."""
    inp, out, trace = (scratch.file(f"{name}.{kind}") for kind in ("in.jsonl", "out.jsonl", "trace.json"))
    st.write_lines(inp, req)
    subprocess.run(["rm", "-rf", out, out + ".store"])
    cmd = [st.shoal(), "run", "-m", MODEL, "-i", inp, "-o", out, "--progress", "json", "--max-seqs", SEQS, "--trace", trace,
           "--trace-steps", "0:1000000", "--launcher", "sh " + late(scratch), *options]
    p = subprocess.run([str(x) for x in cmd], capture_output=True, text=True, env=scratch.env(), timeout=120)
    if p.returncode:
        return {}, 0, 0, p.stderr
    with open(trace) as f:
        events = [e for e in json.load(f)["traceEvents"] if e["ph"] == "X" and e["name"].startswith("step ")]
    seen = [e["args"]["step"] for e in events]
    began = [e for e in events if e["args"]["prompt_rows"] % PROMPT == LONG_PROMPT % PROMPT and e["args"]["prompt_rows"] >= LONG_PROMPT]
    first = min(began, key=lambda e: e["ts"])["args"]["step"] if began else 1 << 30
    return st.rows(out), max(seen) - min(seen) + 1, first - min(seen), ""


def worker_of(pid, group):
    """A process of that group of a run: its rank, or its launcher."""
    for p in st.children(pid):
        try:
            with open(f"/proc/{p}/environ", "rb") as f:
                if any(e.startswith(b"SHOAL_GROUP=run-") and e.split(b"-")[2] == b"%d" % group for e in f.read().split(b"\0")):
                    return p
        except OSError:
            pass
    return None


def killed(scratch, req, at):
    """Two groups, one of which is killed when so many rows are there. Exit status, rows, and whether it was killed at work."""
    inp, out = scratch.file("k.in.jsonl"), scratch.file("k.out.jsonl")
    st.write_lines(inp, req)
    cmd = [st.shoal(), "run", "-m", MODEL, "-i", inp, "-o", out, "--progress", "json", "--max-seqs", str(SEQS), "-n", "1", "--replicas", "2"]
    p = subprocess.Popen(cmd, stderr=subprocess.PIPE, text=True, env=scratch.env())
    hit, text = False, ""
    for line in p.stderr:
        text += line
        e = json.loads(line)
        if not hit and e["event"] == "progress" and e["done"] >= at:
            victim = worker_of(p.pid, 2)
            if victim:
                os.kill(victim, signal.SIGKILL)
                hit = True
    p.wait(timeout=120)
    return p.returncode, st.rows(out) if os.path.exists(out) else {}, hit, text


def main():
    check = st.Checks()
    with st.Scratch() as s:
        req = requests()
        want, tokens = None, N * SHORT
        # steps in the order of lines: the short ones' with all places taken, then the long one's alone
        for name, options, flat in (("one rank", ("-n", 1), tokens // SEQS + LONG),
                                    ("two stages", ("--pp", 2), 2 * tokens // SEQS + LONG),  # half of the places in a step
                                    ("two lanes", ("--ep", 2), tokens // SEQS + LONG),
                                    ("two groups", ("-n", 1, "--replicas", 2), 0)):  # one of them may come late
            with ThreadPoolExecutor(2) as pool:  # half of their time they wait for the trace's last pieces
                jobs = [pool.submit(steps, s, what, r, *options) for what, r in (("last", req), ("first", req[-1:] + req[:-1]))]
            (last, n_last, began, e1), (first, n_first, _, e2) = (j.result() for j in jobs)
            if not check(last and first, f"{name}: {e1[-300:]} {e2[-300:]}"):
                continue
            want = want or last
            check(not st.difference(want, last) and not st.difference(want, first), f"{name}: {st.difference(want, last)} {st.difference(want, first)}")
            if not flat:  # a quicker group may take the long one over in the end: how many steps that makes says nothing
                most = (tokens + LONG) / SEQS - LONG + SHORT  # of one group, if the other came too late for anything
                print(f"{name}: the long one began at step {began}; at most {most:.0f}, in the order of lines about {tokens // SEQS // 2}")
                check(began <= most, f"{name}: the long one began at step {began}, allowed are {most:.0f}")
                continue
            print(f"{name}: {n_last} steps with the long one last, {n_first} with it first; about {flat} in the order of lines")
            check(n_last <= n_first * 1.1, f"{name}: {n_last} steps with the long one last, {n_first} with it first")
            check(n_last <= 0.9 * flat, f"{name}: {n_last} steps, in the order of lines about {flat}")
        long = requests(60, 400, 2500)
        code, got, err = st.run(s, MODEL, long, "-n", 1, "--max-seqs", SEQS, name="whole")
        check(code == 0 and len(got) == len(long), f"undisturbed: exit {code}: {err[-300:]}")
        code, rows, hit, text = killed(s, long, 4)
        check(code == 0 and not st.difference(got, rows), f"a killed group: exit {code}: {st.difference(got, rows)} {text[-300:]}")
        check(hit and "starting again" in text, f"no group was killed at work: {text[-600:]}")
        left = st.left_behind(s)
        check(not left, f"left behind: {left}")
    check.finish()


main()
