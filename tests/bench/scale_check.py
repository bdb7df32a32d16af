#!/usr/bin/env python3
"""The simulation of docs/scaling.md beside real runs: virtual nodes with shaped links (network namespaces), one rank each.

    tests/bench/scale_check.py [--plans "ep2,pp2 ep4"] [--repeat 3] [--mbit 200] [--folder DIR]

For each plan, tokens/s in steady state: predicted by the planner; simulated (simulate.py); replayed, which is the simulated program itself
with sleeps over real MPI and TCP; measured, which is shoal with kernels that sleep for the modelled time (SHOAL_ISA=model:FMA,BYTES). The
last from two jobs of different length, whose beginnings and ends cancel. Medians of the repeats. Needs root, iproute2, SimGrid."""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import netns
import predicted
import shoaltest as st
import simulate

MEASURED = ("compute", "rows", "results", "batch", "answers")


def machine(o, path):
    """The description of a virtual node: what the sleeping kernels are told, and the shaped link."""
    fma, read = (float(x[:-1]) for x in o.isa.split(":")[1].split(","))
    with open(path, "w") as f:
        json.dump({"name": "virtual", "node": [{"cpu": "virtual", "packages": 1, "numa": 1, "cores": 1, "memory_gib": 64, "read_gbs": read,
                                                "fma_gflops": 2 * fma}],
                   "between": {"gbit": o.gbit, "latency_us": o.latency_us},
                   "kernels": {"weights_read": 1, "weights_fma": 1, "attention_read": 1, "attention_fma": 1, "layer_us": o.layer_us,
                               "sample_ns": o.sample_ns}}, f)
    return path


def replay(o, s, nodes, program, text, ranks):
    """The simulated program on real links."""
    table = s.file("timetable")
    with open(table, "w") as f:
        f.write(text)
    p = subprocess.run(nodes.command("head", ["mpirun", "--host", ",".join(nodes.names[1:ranks + 1]), "-np", str(ranks), "--bind-to", "none",
                                              "--mca", "btl", "tcp,self", "--mca", "pml", "ob1", program, table, "40"]),
                       env=s.env(**nodes.environment()), capture_output=True, text=True, timeout=600)
    lines = [x for x in p.stdout.splitlines() if x.startswith("ranks=")]
    if p.returncode or not lines:
        raise RuntimeError(f"replay: exit {p.returncode}: {p.stdout[-300:]}{p.stderr[-500:]}")
    return simulate.values(lines[0])


def steady(o, job, short, long, ranks, options):
    """Tokens per second between the ends of a short and of a long job."""
    seconds = []
    for inp in (short, long):
        job.inp = inp
        work, _, text = job.run(ranks, options)
        seconds.append(work)
        if o.verbose:
            print(text, flush=True)
    return (o.requests[1] - o.requests[0]) * o.output / (seconds[1] - seconds[0])


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--plans", default="pp2,ep2,pp4,ep4,pp2 ep2,pp8,ep8,pp2 ep4,pp4 ep2")
    a.add_argument("--repeat", type=int, default=3)
    a.add_argument("--mbit", type=float, default=800)
    a.add_argument("--latency-us", type=float, default=300, help="of a message between two virtual nodes")
    a.add_argument("--message-us", type=float, default=5)
    a.add_argument("--layer-us", type=float, default=0)
    a.add_argument("--sample-ns", type=float, default=2)
    a.add_argument("--isa", default="model:80G,4G")
    a.add_argument("--shape", default="small-moe")
    a.add_argument("--prompt", type=int, default=16)
    a.add_argument("--output", type=int, default=32)
    a.add_argument("--rows", type=int, default=16, help="sequences of a rank")
    a.add_argument("--chunk", type=int, default=8, help="prompt rows of a rank and step")
    a.add_argument("--lengths", default="2,5", help="sequences of each job, in rounds of what runs at once")
    a.add_argument("--folder", default="/tmp/shoal-scale")
    a.add_argument("--verbose", action="store_true", help="also the closing table of each run")
    a.add_argument("--no-shoal", action="store_true", help="without the product: simulated and replayed alone")
    o = a.parse_args()
    o.gbit, o.steps = o.mbit * predicted.GOODPUT / 1000, 0
    os.makedirs(o.folder, exist_ok=True)
    o.model = predicted.checkpoint(o.folder, o.shape)
    o.machine = machine(o, os.path.join(o.folder, "machine.json"))
    o.workload = os.path.join(o.folder, "workload.json")
    with open(o.workload, "w") as f:
        json.dump({"lengths": [{"prompt": o.prompt, "output": o.output}], "requests": 1e6}, f)
    with st.Scratch() as s:
        simulated, real = simulate.build(o.folder, True), simulate.build(o.folder, False)
        plans = {p: predicted.layout(p) for p in o.plans.split(",")}
        nodes = netns.Nodes(s.file("net"), max(p["ranks"] for p in plans.values()))
        try:
            nodes.shape(o.mbit)
            print(f"{'plan':10s} {'ranks':>5s} {'predicted':>9s} {'simulated':>9s} {'replayed':>9s} {'measured':>9s}  simulated/measured, replayed/measured",
                  flush=True)
            for name, p in plans.items():
                check(o, s, nodes, simulated, real, name, p)
        finally:
            st.kill_all(s)
            nodes.down()


def check(o, s, nodes, simulated, real, name, p):
    ranks, pp, ep = p["ranks"], p.get("pp", 1), p.get("ep", 1)
    seqs, chunk = o.rows * ranks, o.chunk * ep
    text, want = simulate.timetable(o, 1, pp, ep, seqs, chunk)
    seen = simulate.simulate(o, simulated, text, ranks, 200 if ep == 1 else 40)
    played = [replay(o, s, nodes, real, text, ranks) for _ in range(o.repeat)]
    again = statistics.median(x["tokens_per_second"] for x in played)
    got = []
    if not o.no_shoal:
        o.requests = [int(x) * seqs for x in o.lengths.split(",")]
        for i in range(2):
            predicted.workload(s.file(f"in{i}.jsonl"), o.requests[i], o.prompt, o.output)
        job = predicted.Job(s, nodes, o.model, None, o.isa)
        options = ["--max-seqs", str(seqs), "--chunk", str(chunk), "--pp", str(pp), "--ep", str(ep)]
        got = [steady(o, job, s.file("in0.jsonl"), s.file("in1.jsonl"), ranks, options) for _ in range(o.repeat)]
    measured = statistics.median(got) if got else float("nan")
    print(f"{name:10s} {ranks:5d} {want['tokens_per_second']:9.1f} {seen['tokens_per_second']:9.1f} {again:9.1f} {measured:9.1f}"
          f"  {seen['tokens_per_second'] / measured:.2f} {again / measured:.2f}  ({min(got, default=0):.1f} to {max(got, default=0):.1f});"
          f" simulated {' '.join(f'{k} {100 * seen[k]:.0f}' for k in MEASURED)}; replayed"
          f" {' '.join(f'{k} {100 * played[0][k]:.0f}' for k in MEASURED)}", flush=True)


if __name__ == "__main__":
    main()
