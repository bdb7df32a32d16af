#!/usr/bin/env python3
"""What hot experts cost in seconds, and what copies of them bring back. Needs root and iproute2.

    tests/bench/skewed.py [--members 8] [--repeat 3] [--isa model:8G,1G]

A small random checkpoint (make_shape small-moe), and one whose router prefers expert 0 in every layer, so that about half of the
rows choose it. Both answer the same requests on virtual nodes that divide the experts, with kernels that sleep for the modelled
time; the second also with experts placed by its counts, and with copies of the hot ones. The four take turns. Exit status 1:
with copies the job takes more than 1.25 times as long as with a router that prefers nobody."""
import argparse
import json
import os
import re
import shutil
import signal
import statistics
import struct
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import predicted
from predicted import netns, st

PREFERS = 3  # added to the exponent of the router's row: eight times the logit, the largest of all whenever it is positive


def prefer(source, to):
    """A copy of a checkpoint in which each router's first row is 2**PREFERS as large."""
    if os.path.exists(os.path.join(to, "done")):
        return to
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(source, to)
    with open(os.path.join(to, "model.safetensors"), "r+b") as f:
        n = struct.unpack("<Q", f.read(8))[0]
        for name, t in json.loads(f.read(n)).items():
            if not name.endswith("router.proj.weight"):
                continue
            f.seek(8 + n + t["data_offsets"][0])
            row = struct.unpack(f"<{t['shape'][1]}H", f.read(2 * t["shape"][1]))
            f.seek(8 + n + t["data_offsets"][0])
            f.write(struct.pack(f"<{len(row)}H", *(w + (PREFERS << 7) if w & 0x7F80 else w for w in row)))
    open(os.path.join(to, "done"), "w").close()
    return to


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("--members", type=int, default=8)
    a.add_argument("--repeat", type=int, default=3)
    a.add_argument("--folder", default="/tmp/shoal-predicted")
    a.add_argument("--isa", default="model:8G,1G")
    a.add_argument("--mbit", type=float, default=1000)
    a.add_argument("--requests", type=int, default=192)
    a.add_argument("--prompt", type=int, default=16)
    a.add_argument("--output", type=int, default=16)
    a.add_argument("--lock", default="")
    a.add_argument("--verbose", action="store_true")
    o = a.parse_args()
    os.makedirs(o.folder, exist_ok=True)
    even = predicted.checkpoint(o.folder, "small-moe")
    hot = prefer(even, os.path.join(o.folder, "small-moe-hot"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with st.Scratch() as s:
        inp, counts = s.file("in.jsonl"), s.file("routing.json")
        predicted.workload(inp, o.requests, o.prompt, o.output)
        layout = ["-n", str(o.members), "--ep", str(o.members), "--max-seqs", "64", "--chunk", "128"]
        cases = {"no expert preferred": (even, []), "one preferred": (hot, ["--save-routing", counts]),
                 "placed by counts": (hot, ["--routing", counts]), "with copies": (hot, ["--routing", counts, "--replicate", "32MiB"])}
        got, busiest = {name: [] for name in cases}, {}
        nodes = netns.Nodes(s.file("net"), o.members)
        try:
            nodes.shape(o.mbit)
            for name in list(cases) * o.repeat:
                model, options = cases[name]
                seconds, table = predicted.Job(s, nodes, model, inp, o.isa, o.lock).run(layout + options, o.members)
                got[name].append(seconds)
                busiest[name] = float(re.search(r"busiest rank ([0-9.]+) of the mean", table)[1])
                print(f"{name}: {seconds:.1f} s" + ("\n" + table if o.verbose else ""), flush=True)
        finally:
            st.kill_all(s)
            nodes.down()
    median = {name: statistics.median(t) for name, t in got.items()}
    base = median["no expert preferred"]
    print(f"{'':20s} {'median s':>8s} {'least':>6s} {'most':>6s} {'of the first':>12s} {'rows of the busiest / mean':>26s}")
    for name, t in median.items():
        print(f"{name:20s} {t:8.1f} {min(got[name]):6.1f} {max(got[name]):6.1f} {t / base:12.2f} {busiest[name]:26.2f}")
    sys.exit(0 if median["with copies"] <= 1.25 * base else 1)


if __name__ == "__main__":
    main()
