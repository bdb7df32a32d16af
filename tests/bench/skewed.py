#!/usr/bin/env python3
"""What hot experts cost in seconds, and what copies of them bring back. Needs root and iproute2.

    tests/bench/skewed.py [--members 8] [--repeat 3] [--isa model:6G,20G]

A small random checkpoint (make_shape small-moe) answers requests on virtual nodes that divide the experts, with kernels that sleep
for the modelled time: with experts chosen evenly; with half of the rows choosing expert 0 in every layer; then with experts placed
by the counts of that, and with copies of the hot ones as well. The four take turns. Exit status 1:
with copies the job takes more than 1.25 times as long as where all are chosen evenly."""
import argparse
import os
import re
import signal
import statistics
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import predicted
from predicted import netns, st


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("--members", type=int, default=8)
    a.add_argument("--repeat", type=int, default=3)
    a.add_argument("--folder", default="/tmp/shoal-predicted")
    a.add_argument("--isa", default="model:6G,20G")
    a.add_argument("--mbit", type=float, default=1000)
    a.add_argument("--requests", type=int, default=192)
    a.add_argument("--prompt", type=int, default=16)
    a.add_argument("--output", type=int, default=16)
    a.add_argument("--lock", default="")
    a.add_argument("--verbose", action="store_true")
    o = a.parse_args()
    os.makedirs(o.folder, exist_ok=True)
    model, hot = predicted.checkpoint(o.folder, "small-moe"), o.isa + ",0.5"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with st.Scratch() as s:
        inp, counts = s.file("in.jsonl"), s.file("routing.json")
        predicted.workload(inp, o.requests, o.prompt, o.output)
        layout = ["-n", str(o.members), "--ep", str(o.members), "--max-seqs", "64", "--chunk", "128"]
        cases = {"evenly chosen": (o.isa, []), "half choose one": (hot, ["--save-routing", counts]),
                 "placed by counts": (hot, ["--routing", counts]), "with copies": (hot, ["--routing", counts, "--replicate", "32MiB"])}
        got, busiest = {name: [] for name in cases}, {}
        nodes = netns.Nodes(s.file("net"), o.members)
        try:
            nodes.shape(o.mbit)
            for name in list(cases) * o.repeat:
                isa, options = cases[name]
                seconds, table = predicted.Job(s, nodes, model, inp, isa, o.lock).run(layout + options, o.members)
                got[name].append(seconds)
                busiest[name] = float(re.search(r"busiest rank ([0-9.]+) of the mean", table)[1])
                print(f"{name}: {seconds:.1f} s" + ("\n" + table if o.verbose else ""), flush=True)
        finally:
            st.kill_all(s)
            nodes.down()
    median = {name: statistics.median(t) for name, t in got.items()}
    base = median["evenly chosen"]
    print(f"{'':20s} {'median s':>8s} {'least':>6s} {'most':>6s} {'of the first':>12s} {'rows of the busiest / mean':>26s}")
    for name, t in median.items():
        print(f"{name:20s} {t:8.1f} {min(got[name]):6.1f} {max(got[name]):6.1f} {t / base:12.2f} {busiest[name]:26.2f}")
    sys.exit(0 if median["with copies"] <= 1.25 * base else 1)


if __name__ == "__main__":
    main()
