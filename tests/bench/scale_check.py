#!/usr/bin/env python3
"""The simulation of docs/scaling.md beside real runs: virtual nodes with shaped links (network namespaces), one rank each.

    tests/bench/scale_check.py [--plans "ep2,pp2 ep4"] [--repeat 3] [--mbit 100] [--folder DIR]

For each plan, tokens/s in steady state: predicted by the planner; simulated (simulate.py); replayed, which is the simulated program itself
with sleeps over real MPI and TCP; measured, which is shoal with kernels that sleep for the modelled time (SHOAL_ISA=model:FMA,BYTES). The
last from two jobs of different length, whose beginnings and ends cancel. Medians of the repeats. Needs root, iproute2, SimGrid."""
import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import netns
import predicted
import shoaltest as st
import simulate

SHARES = ("compute", "rows", "results", "batch", "answers")


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
                                              "--mca", "btl", "tcp,self", "--mca", "pml", "ob1", program, table, "12"]),
                       env=s.env(**nodes.environment()), capture_output=True, text=True, timeout=600)
    lines = [x for x in p.stdout.splitlines() if x.startswith("ranks=")]
    if p.returncode or not lines:
        raise RuntimeError(f"replay: exit {p.returncode}: {p.stdout[-300:]}{p.stderr[-500:]}")
    return simulate.values(lines[0])


def steady(o, job, requests, short, long, ranks, options):
    """Tokens per second between the ends of a short and of a long job."""
    seconds = []
    for inp in (short, long):
        job.inp = inp
        work, text = job.run(options, ranks)
        seconds.append(work)
        if o.verbose:
            print(text, flush=True)
    return (requests[1] - requests[0]) * o.output / (seconds[1] - seconds[0])


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--plans", default="pp2,ep2,pp4,ep4,pp2 ep2,pp8,ep8,pp2 ep4,pp4 ep2")
    a.add_argument("--repeat", type=int, default=3)
    a.add_argument("--mbit", type=float, default=100)
    a.add_argument("--latency-us", type=float, default=50, help="of a message between two virtual nodes")
    a.add_argument("--message-us", type=float, default=5)
    a.add_argument("--layer-us", type=float, default=0)
    a.add_argument("--sample-ns", type=float, default=2)
    a.add_argument("--isa", default="model:10G,0.5G")
    a.add_argument("--shape", default="small-moe")
    a.add_argument("--prompt", type=int, default=4)
    a.add_argument("--output", type=int, default=8)
    a.add_argument("--rows", type=int, default=64, help="sequences of a rank")
    a.add_argument("--chunk", type=int, default=32, help="prompt rows of a rank and step")
    a.add_argument("--lengths", default="1,3", help="sequences of each job, in rounds of what runs at once")
    a.add_argument("--folder", default="/tmp/shoal-scale")
    a.add_argument("--verbose", action="store_true", help="also the closing table of each run")
    a.add_argument("--no-shoal", action="store_true", help="without the product: simulated and replayed alone")
    o = a.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the nodes go down too
    os.nice(-5)  # before what else the machine does; not so far that the kernel's network threads starve
    o.gbit, o.steps = o.mbit * predicted.GOODPUT / 1000, 0
    os.makedirs(o.folder, exist_ok=True)
    o.model = predicted.checkpoint(o.folder, o.shape)
    o.machine = machine(o, os.path.join(o.folder, "machine.json"))
    o.workload = os.path.join(o.folder, "workload.json")
    with open(o.workload, "w") as f:
        json.dump({"lengths": [{"prompt": o.prompt, "output": o.output}], "requests": 1e6}, f)
    with st.Scratch() as s:
        simulated, real = simulate.build(o.folder, True), simulate.build(o.folder, False)
        plans = {p: {k: int(v) for k, v in re.findall(r"(pp|ep)(\d+)", p)} for p in o.plans.split(",")}
        for name, p in plans.items():
            p["ranks"], p["options"] = predicted.options_of(name)
        nodes = netns.Nodes(s.file("net"), max(p["ranks"] for p in plans.values()))
        try:
            nodes.jumbo(9000)  # fewer frames: two CPUs carry them all
            nodes.shape(o.mbit, 65536)
            for name, p in plans.items():
                forecast(o, s, nodes, simulated, real, name, p)
            for turn in range(0 if o.no_shoal else o.repeat):  # in turns, so that a busy hour hits all alike
                for name, p in plans.items():
                    p["measured"].append(measure(o, s, nodes, p))
                table(plans, turn + 1)
        finally:
            st.kill_all(s)
            nodes.down()


def forecast(o, s, nodes, simulated, real, name, p):
    """All but the product: predicted, simulated, replayed."""
    pp, ep = p.get("pp", 1), p.get("ep", 1)
    p["seqs"], p["chunk"], p["measured"] = o.rows * p["ranks"], o.chunk * ep, []
    text, p["predicted"] = simulate.timetable(o, 1, pp, ep, p["seqs"], p["chunk"])
    p["simulated"] = simulate.simulate(o, simulated, text, p["ranks"], 200 if ep == 1 else 12)
    p["replayed"] = replay(o, s, nodes, real, text, p["ranks"])
    print(f"{name:10s} {p['ranks']} ranks: predicted {p['predicted']['tokens_per_second']:.1f}" + "".join(
        f", {k} {p[k]['tokens_per_second']:.1f} ({' '.join(f'{w} {100 * p[k][w]:.0f} %' for w in SHARES)})" for k in ("simulated", "replayed")), flush=True)


def measure(o, s, nodes, p):
    requests = [int(x) * p["seqs"] for x in o.lengths.split(",")]
    job = predicted.Job(s, nodes, o.model, None, o.isa, None)
    options = [*map(str, p["options"]), "--max-seqs", str(p["seqs"]), "--chunk", str(p["chunk"])]
    for i, n in enumerate(requests):
        predicted.workload(s.file(f"in{i}.jsonl"), n, o.prompt, o.output)
    return steady(o, job, requests, s.file("in0.jsonl"), s.file("in1.jsonl"), p["ranks"], options)


def table(plans, turns):
    print(f"\nafter {turns} turns\n{'plan':10s} {'ranks':>5s} {'predicted':>9s} {'simulated':>9s} {'replayed':>9s} {'measured':>9s} {'least':>7s} {'most':>7s}"
          "  simulated/measured  replayed/measured")
    for name, p in plans.items():
        m = statistics.median(p["measured"])
        a, b, c = (p[k]["tokens_per_second"] for k in ("predicted", "simulated", "replayed"))
        print(f"{name:10s} {p['ranks']:5d} {a:9.1f} {b:9.1f} {c:9.1f} {m:9.1f} {min(p['measured']):7.1f} {max(p['measured']):7.1f}"
              f"  {b / m:18.2f} {c / m:18.2f}", flush=True)


if __name__ == "__main__":
    main()
