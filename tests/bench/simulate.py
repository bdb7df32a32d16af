#!/usr/bin/env python3
"""Throughput of a model on clusters that are not here: plans of many layouts, their timetables (timetable_bench), and what
SimGrid says of them (replay.c as an MPI program on a simulated network). Appends rows to a table; docs/scaling.md says what is assumed.

    tests/bench/simulate.py [--machine FILE] [--model DIR] [--workload FILE] [-o TABLE.tsv] LAYOUT…
    LAYOUT: GROUPSxSTAGESxMEMBERS[:SEQS], SEQS at once in a group (else as many as the planner finds worth it), one rank a node;
            or a set of them: full (as many sequences as nodes hold), few (64 sequences in all)

Needs a release build, smpicc and smpirun (deploy/install-deps --simulate); exit status 77 without them."""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BENCH = os.path.join(ROOT, "build/release/tests/timetable_bench")
COLUMNS = ["set", "layout", "nodes", "groups", "stages", "members", "seqs", "chunk", "rows", "predicted", "simulated", "compute",
           "rows_wait", "results_wait", "batch_wait", "answers_wait", "round_trip", "bytes_per_token"]


POWERS = [1, 2, 4, 8, 16, 32, 64, 128, 256]
SETS = {
    "full": [("replicas", f"{n}x1x1") for n in POWERS] +
            [("pp", f"1x{n}x1") for n in (1, 2, 4, 8, 16, 30)] +
            [("pp 4, replicas", f"{n // 4}x4x1") for n in POWERS if n >= 4] +
            [("ep", f"1x1x{n}") for n in POWERS if n <= 64] +
            [("ep 16, replicas", f"{n // 16}x1x16") for n in POWERS if n >= 16] +
            [("ep 16, stages", f"1x{n // 16}x16") for n in POWERS if n >= 16],
    "few": [("replicas", f"{n}x1x1:{64 // n}") for n in POWERS if n <= 64] +
           [("pp", f"1x{n}x1:64") for n in (1, 2, 4, 8, 16, 30)] +
           [("ep", f"1x1x{n}:64") for n in POWERS if n <= 64] +
           [("ep 8, replicas", f"{n // 8}x1x8:{64 * 8 // n}") for n in POWERS if 8 <= n <= 64],
}


class Misfit(Exception):
    pass


def values(line):
    return {k: float(v) for k, v in (x.split("=") for x in line.split() if "=" in x)}


def timetable(o, groups, stages, members, seqs, chunk):
    """The text of a timetable and what the planner predicts."""
    args = [BENCH, "-m", o.model, "--machine", o.machine, "--groups", groups, "--pp", stages, "--ep", members, "--seqs", seqs, "--chunk",
            chunk] + (["--workload", o.workload] if o.workload else [])
    p = subprocess.run([str(a) for a in args], capture_output=True, text=True)
    if p.returncode == 3:
        raise Misfit(p.stderr.strip())
    if p.returncode:
        sys.exit(p.stderr)
    return p.stdout, values(p.stdout.split("\n", 1)[0])


def in_step(text, mixed, members):
    """Share of its speed that a stage keeps although its lanes get their prompts at different times: everyone waits for the lane that has
    a piece. 1 when every micro-batch of every lane has one."""
    seconds = [0, 0]
    for line in text.splitlines():
        if line.startswith("layer "):
            kind, *cost = line.split()[1:]
            seconds[int(kind)] += sum(float(x) for x in cost[2:])
    some = 1 - (1 - mixed) ** members
    mean, slowest = ((1 - q) * seconds[0] + q * seconds[1] for q in (mixed, some))
    return mean / slowest


def best_timetable(o, groups, stages, members, seqs):
    """With the chunk of prompt rows that the planner's forecast, lanes out of step counted, likes best."""
    best, most = None, 0
    for chunk in [o.chunk] if o.chunk else sorted({min(8192, rows * members) for rows in (8, 16, 32, 64, 128, 256, 512, 1024) if rows * members >= 64}):
        text, predicted = timetable(o, groups, stages, members, seqs, chunk)
        speed = predicted["tokens_per_second"] * in_step(text, predicted["mixed"], members)
        if speed > 1.005 * most:
            best, most = (text, predicted, chunk), speed
    return best


def write_platform(folder, nodes, gbit, latency_us):
    """One switch that blocks nobody: every node has a cable to it, each direction for itself. Half the latency on each cable."""
    path, hosts = os.path.join(folder, "platform.xml"), os.path.join(folder, "hosts")
    with open(path, "w") as f:
        f.write(f"""<?xml version='1.0'?>
<!DOCTYPE platform SYSTEM "https://simgrid.org/simgrid.dtd">
<platform version="4.1">
  <cluster id="nodes" prefix="n" suffix="" radical="0-{max(nodes, 2) - 1}" speed="1Tf" bw="{gbit / 8:.9f}GBps" lat="{latency_us / 2:.9f}us"
           sharing_policy="SPLITDUPLEX"/>
</platform>
""")
    with open(hosts, "w") as f:
        f.write("".join(f"n{i}\n" for i in range(nodes)))
    return path, hosts


def build(folder, simulated):
    out = os.path.join(folder, "replay.smpi" if simulated else "replay")
    compiler = ["smpicc", "-DSIMULATED"] if simulated else ["mpicc"]
    subprocess.run([*compiler, "-O2", "-std=gnu2x", "-o", out, os.path.join(ROOT, "tests/bench/replay.c"), "-lm"], check=True)
    return out


def simulate(o, program, text, ranks, steps):
    """What replay reports, in simulated seconds."""
    folder = os.path.dirname(program)
    platform, hosts = write_platform(folder, ranks, o.gbit, o.latency_us)
    table = os.path.join(folder, "timetable")
    with open(table, "w") as f:
        f.write(text)
    # The network is what the platform says: no factors of the testbed that SMPI was fitted to. Small messages go without asking, large ones
    # wait for their receiver, as in Open MPI over TCP. Each message costs its sender and its receiver CPU time.
    settings = {"smpi/cpu-threshold": "1e9", "smpi/bw-factor": "0:1", "smpi/lat-factor": "0:1", "smpi/async-small-thresh": "65536",
                "smpi/send-is-detached-thresh": "65536", "smpi/ois": f"0:{o.message_us * 1e-6:g}:0", "smpi/or": f"0:{o.message_us * 1e-6:g}:0",
                "network/crosstraffic": "0"}
    p = subprocess.run(["smpirun", "-np", str(ranks), "-platform", platform, "-hostfile", hosts, "--log=root.thresh:error",
                        *(f"--cfg={k}:{v}" for k, v in settings.items()), program, table, str(steps)], capture_output=True, text=True)
    if p.returncode or not p.stdout.startswith("ranks="):
        sys.exit(f"smpirun: {p.returncode}\n{p.stdout}{p.stderr}")
    return values(p.stdout)


KNOWN = {}  # what a group of one shape does, in this run


def group_of(o, program, groups, stages, members, seqs):
    """Predicted and simulated, for one group: replicas share nothing and the switch blocks nobody."""
    key = stages, members, seqs
    if key not in KNOWN:
        text, predicted, chunk = best_timetable(o, 1, stages, members, seqs)
        cycle = max(1, round(1 / max(predicted["mixed"], 0.05)))  # micro-batches until each kind had its turn
        steps = o.steps or (200 if members == 1 else 2 if members > 16 else max(4 * cycle, 2 * stages))
        KNOWN[key] = predicted, chunk, simulate(o, program, text, stages * members, steps)
    return KNOWN[key]


def row_of(o, program, name, groups, stages, members, seqs):
    began = time.time()
    predicted, chunk, seen = group_of(o, program, groups, stages, members, seqs)
    row = {"set": name, "layout": f"{groups}x{stages}x{members}", "nodes": groups * stages * members, "groups": groups, "stages": stages,
           "members": members, "seqs": int(predicted["seqs"]), "chunk": chunk, "rows": predicted["decode"] + predicted["mixed"] * predicted["piece"],
           "predicted": predicted["tokens_per_second"] * groups, "simulated": seen["tokens_per_second"] * groups, "compute": seen["compute"],
           "rows_wait": seen["rows"], "results_wait": seen["results"], "batch_wait": seen["batch"], "answers_wait": seen["answers"],
           "round_trip": predicted["round_trip"], "bytes_per_token": predicted["bytes_per_token"]}
    print("%-16s %4d nodes  %-10s seqs %5d  rows %6.1f  predicted %8.1f  simulated %8.1f tokens/s  compute %5.1f %%  waits %4.1f %4.1f %4.1f %4.1f %%"
          "  (%.0f s)" % (name, row["nodes"], row["layout"], row["seqs"], row["rows"], row["predicted"], row["simulated"], 100 * row["compute"],
                          100 * row["rows_wait"], 100 * row["results_wait"], 100 * row["batch_wait"], 100 * row["answers_wait"],
                          time.time() - began), flush=True)
    return row


def choose_links(o, folder):
    """The links as the machine's description has them, or the description with those that were asked for."""
    with open(o.machine) as f:
        m = json.load(f)
    for key in ("gbit", "latency_us"):
        if getattr(o, key) is None:
            setattr(o, key, m["between"][key])
        m["between"][key] = getattr(o, key)
    o.machine = os.path.join(folder, "machine.json")
    with open(o.machine, "w") as f:
        json.dump(m, f)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=os.path.join(ROOT, "tests/data/configs/26b-a4b"))
    p.add_argument("--machine", default=os.path.join(ROOT, "tests/data/machines/epyc-256-100g.json"))
    p.add_argument("--workload")
    p.add_argument("--gbit", type=float, help="of the links between nodes, in place of the machine's")
    p.add_argument("--latency-us", type=float, help="of a message between nodes, likewise")
    p.add_argument("--message-us", type=float, default=1, help="CPU time of a message, for its sender and for its receiver")
    p.add_argument("--chunk", type=int, default=0, help="prompt rows of a step, over all lanes; 0: the best that keeps lanes in step")
    p.add_argument("--steps", type=int, default=0, help="that count; 0: enough")
    p.add_argument("--within", type=float, help="fail where simulated over predicted is further from 1 than this")
    p.add_argument("-o", "--output")
    p.add_argument("layouts", nargs="+")
    o = p.parse_args()
    if not shutil.which("smpicc") or not shutil.which("smpirun"):
        print("SimGrid is missing: deploy/install-deps --simulate")
        sys.exit(77)
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        choose_links(o, folder)
        program = build(folder, True)
        for name, layout in [x for l in o.layouts for x in SETS.get(l, [("try", l)])]:
            shape, _, seqs = layout.partition(":")
            groups, stages, members = (int(x) for x in shape.split("x"))
            try:
                row = row_of(o, program, name, groups, stages, members, int(seqs or 0))
            except Misfit as e:
                print(f"{name:16} {layout}: {e}")
                wrong += o.within is not None
                continue
            if o.within is not None and abs(row["simulated"] / row["predicted"] - 1) > o.within:
                print(f"{layout}: simulated is {row['simulated'] / row['predicted']:.2f} of what is predicted")
                wrong += 1
            if o.output:
                new = not os.path.exists(o.output)
                with open(o.output, "a") as f:
                    if new:
                        f.write("\t".join(COLUMNS) + "\n")
                    f.write("\t".join(f"{row[c]:.6g}" if isinstance(row[c], float) else str(row[c]) for c in COLUMNS) + "\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
