#!/usr/bin/env python3
"""Thousands of requests through the demo model: the anonymous memory of every process stays within its budget and does not grow
once the run is warm; every request has its row; nothing is left. Prints requests a second.

usage: long_run.py [--requests N] [--ranks N]

Budgets, in MiB (docs/operations.md): a rank may hold what it is told to: weights, work, reserve and --kv-memory as in its refusals;
a coordinator 256, whatever the number of requests; the supervisor 64."""
import argparse
import json
import os
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import shoaltest as st

KV = 64            # MiB, --kv-memory
RANK = 96 + KV     # what a rank of the demo model states (tests/faults/memory.py reads it), and its KV
COORDINATOR = 256
SUPERVISOR = 64
GROWTH = {"rank": 6, "coordinator": 16, "supervisor": 4}  # MiB that may come after a third of the requests
WARM = 1 / 3


def role(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as f:
            args = f.read().decode(errors="replace").split("\0")
        if not args[0].endswith("shoal") or len(args) < 2:
            return None
        return {"worker": "rank", "serve": "coordinator", "run": "supervisor"}.get(args[1])
    except OSError:
        return None


def anonymous(pid):
    """MiB of anonymous memory, resident."""
    try:
        with open(f"/proc/{pid}/status") as f:
            for line in f:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) / 1024
    except OSError:
        pass
    return None


def main():
    a = argparse.ArgumentParser()
    a.add_argument("--requests", type=int, default=5000)
    a.add_argument("--ranks", type=int, default=2)
    a = a.parse_args()
    check = st.Checks()
    with open(os.path.join(st.ROOT, "share", "demo-batch.jsonl")) as f:
        demo = [json.loads(line) for line in f]
    with st.Scratch() as s:
        req = []
        for k in range(a.requests):
            r = json.loads(json.dumps(demo[k % len(demo)]))
            r["custom_id"] = f"r{k}"
            r["body"].pop("max_completion_tokens", None)
            r["body"].update(max_tokens=4 + k % 29, temperature=0.8, seed=k)
            if k % 3 == 0:
                r["body"].update(stop=[".", "!"])
            if k % 5 == 0:
                r["body"].update(logprobs=True, top_logprobs=3)
            req.append(r)
        inp, out = s.file("in.jsonl"), s.file("out.jsonl")
        st.write_lines(inp, req)
        t0 = time.time()
        with open(s.file("err"), "w") as err:
            p = subprocess.Popen([st.shoal(), "run", "-i", inp, "-o", out, "-n", str(a.ranks), "--kv-memory", f"{KV}MiB", "--progress",
                                  "json"], env=s.env(), stderr=err)
        seen, done = {}, 0  # pid → role, [(share done, MiB)]
        pos = 0
        while p.poll() is None:
            time.sleep(0.2)
            with open(s.file("err")) as f:
                f.seek(pos)
                for line in f:
                    if not line.endswith("\n"):
                        break
                    pos += len(line)
                    if '"progress"' in line:
                        done = json.loads(line).get("done", done)
            for pid in [p.pid] + st.children(p.pid):
                what, mib = role(pid), anonymous(pid)
                if what and mib is not None:
                    seen.setdefault(pid, (what, []))[1].append((done / a.requests, mib))
            if time.time() - t0 > 3600:
                p.kill()
        took = time.time() - t0
        with open(s.file("err")) as f:
            err = f.read()
        check(p.returncode == 0, f"exit {p.returncode}: {err[-400:]}")
        check(os.path.exists(out) and len(st.rows(out)) == a.requests, "not every request has its row")
        counts = {r: sum(1 for w, _ in seen.values() if w == r) for r in GROWTH}
        check(counts == {"rank": a.ranks, "coordinator": 1, "supervisor": 1}, f"processes: {counts}; were some started again? {err[-400:]}")
        budget = {"rank": RANK, "coordinator": COORDINATOR, "supervisor": SUPERVISOR}
        for pid, (what, points) in sorted(seen.items()):
            most = max(m for _, m in points)
            warm = [m for d, m in points if WARM * 0.8 <= d <= WARM]
            late = [m for d, m in points if d >= WARM]
            if not check(warm and late, f"{what} {pid}: too few samples ({len(points)})"):
                continue
            growth = max(late) - max(warm)
            print(f"{what} {pid}: at most {most:.1f} MiB of {budget[what]}; {max(warm):.1f} after a third, {growth:+.1f} after that, "
                  f"{len(points)} samples", flush=True)
            check(most <= budget[what], f"{what} {pid}: {most:.1f} MiB: {budget[what]} are allowed")
            check(growth <= GROWTH[what], f"{what} {pid}: grew by {growth:.1f} MiB: {GROWTH[what]} are allowed")
        left = st.left_behind(s)
        check(not left, f"left behind: {left}")
        check(not os.path.exists(out + ".store") and os.listdir(s.tmp) == [], f"left: {os.listdir(s.path)} {os.listdir(s.tmp)}")
        print(f"{a.requests} requests in {took:.1f} s: {a.requests / took:.1f} requests/s")
        st.kill_all(s)
    check.finish()


main()
