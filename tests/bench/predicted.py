#!/usr/bin/env python3
"""Predicted against measured: jobs on virtual nodes with shaped links, whose plans were costed beforehand.

    tests/bench/predicted.py [--real] [--repeat 5] [--only WORD] [--folder DIR]

Default: kernels that sleep for the modelled time (SHOAL_ISA=model:FMA,BYTES), so that many ranks have two cores; network,
schedule and exchange are real. --real: real kernels, at most two compute threads in all. Needs root and iproute2. Prints one
line per plan: medians of the repeats, predicted over measured. Layouts are run in turns, so that a busy hour hits all alike."""
import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import netns
import shoaltest as st

GOODPUT = 0.95  # of a shaped link, without the frames' headers
TESTS = os.path.join(os.path.dirname(st.shoal()), "tests")


def checkpoint(folder, shape):
    """A small random checkpoint with the demo model's tokenizer."""
    to = os.path.join(folder, shape)
    if not os.path.exists(os.path.join(to, "config.json")):
        subprocess.run([os.path.join(TESTS, "make_shape"), shape, to], check=True)
        for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(os.path.join(st.DEMO, name), to)
    return to


def workload(path, requests, prompt, output):
    st.write_lines(path, [st.completion(f"r{k}", [200 + (7 * i + 13 * k) % 2800 for i in range(prompt)], max_tokens=output,
                                        ignore_eos=True, temperature=0) for k in range(requests)])


class Job:
    def __init__(self, s, nodes, model, inp, isa):
        self.s, self.nodes, self.model, self.inp = s, nodes, model, inp
        self.env = s.env(**(nodes.environment() if nodes else {}), **({"SHOAL_ISA": isa} if isa else {}))

    def run(self, ranks, options):
        """Seconds with the ranks at work, tokens out per second, and the closing table's text."""
        out = self.s.file("out.jsonl")
        shutil.rmtree(out + ".store", ignore_errors=True)
        if os.path.exists(out):
            os.remove(out)
        cmd = [st.shoal(), "run", "-m", self.model, "-i", self.inp, "-o", out, "-n", str(ranks), "--threads", "1", "--progress", "plain",
               *options]
        if self.nodes:
            cmd = self.nodes.command("head", cmd + ["--hosts", ",".join(self.nodes.names[1:ranks + 1])])
        p = subprocess.run(cmd, env=self.env, capture_output=True, text=True, timeout=600)
        work = re.search(r"([0-9.]+) s of it with the ranks at work", p.stderr)
        speed = re.search(r"([0-9.]+) tokens/s out", p.stderr[p.stderr.find("wall time"):])
        if p.returncode or not work or not speed:
            raise RuntimeError(f"{' '.join(options)}: exit {p.returncode}: {p.stderr[-800:]}")
        return float(work[1]), float(speed[1]), p.stderr[p.stderr.find("  requests"):]


def layout(text):
    """{"ranks": 4, "pp": 2, "ep": 2} from "pp2 ep2"."""
    d = {k: int(v) for k, v in re.findall(r"(pp|ep|tp|cp)(\d+)", text)}
    ranks = 1
    for v in d.values():
        ranks *= v
    return dict(d, ranks=ranks)


def foretell(model, plan, o):
    fma, read = (float(x[:-1]) * 1e9 for x in o.isa.split(":")[1].split(","))
    keys = dict(plan, seqs=o.seqs, chunk=o.chunk, requests=o.requests, prompt=o.prompt, output=o.output, fma=fma, read=read,
                latency=o.latency, bandwidth=o.mbit * 1e6 / 8 * GOODPUT, sample=2e-9)
    p = subprocess.run([os.path.join(TESTS, "foretell"), model, *(f"{k}={v}" for k, v in keys.items())], capture_output=True, text=True)
    if p.returncode:
        raise RuntimeError(p.stderr)
    return json.loads(p.stdout)


def main():
    a = argparse.ArgumentParser()
    a.add_argument("--real", action="store_true")
    a.add_argument("--repeat", type=int, default=5)
    a.add_argument("--only", default="")
    a.add_argument("--folder", default="/tmp/shoal-predicted")
    a.add_argument("--mbit", type=float, default=200)
    a.add_argument("--latency", type=float, default=3e-4)
    a.add_argument("--isa", default="model:20G,1G")
    a.add_argument("--shape", default="small-moe")
    a.add_argument("--requests", type=int, default=256)
    a.add_argument("--prompt", type=int, default=16)
    a.add_argument("--output", type=int, default=32)
    a.add_argument("--seqs", type=int, default=64)
    a.add_argument("--chunk", type=int, default=64)
    a.add_argument("--plans", default="pp1,pp2,pp4,tp2,tp4,pp2 tp2,ep2,ep4,pp2 ep2")
    a.add_argument("--verbose", action="store_true")
    o = a.parse_args()
    os.makedirs(o.folder, exist_ok=True)
    model = checkpoint(o.folder, o.shape)
    with st.Scratch() as s:
        plans = {p: layout(p) for p in o.plans.split(",") if o.only in p}
        nodes = netns.Nodes(s.file("net"), max(p["ranks"] for p in plans.values()))
        try:
            nodes.shape(o.mbit)
            workload(s.file("in.jsonl"), o.requests, o.prompt, o.output)
            job = Job(s, nodes, model, s.file("in.jsonl"), None if o.real else o.isa)
            got, want = {p: [] for p in plans}, {}
            for name, p in plans.items():
                want[name] = foretell(model, p, o)
                p["options"] = ["--max-seqs", str(o.seqs), "--chunk", str(o.chunk)]
                for k in ("pp", "ep", "tp", "cp"):
                    p["options"] += [f"--{k}", str(p.get(k, 1))]
            for k in range(o.repeat):
                for name, p in plans.items():
                    work, speed, text = job.run(p["ranks"], p["options"])
                    got[name].append(work)
                    if o.verbose:
                        print(f"{name}: {work:.2f} s, predicted {want[name]['seconds']:.2f} s\n{text}", json.dumps(want[name]), flush=True)
            print(f"{'plan':12s} {'ranks':>5s} {'predicted s':>11s} {'measured s':>11s} {'least':>7s} {'most':>7s}  measured/predicted")
            for name, times in got.items():
                m = statistics.median(times)
                print(f"{name:12s} {plans[name]['ranks']:5d} {want[name]['seconds']:11.2f} {m:11.2f} {min(times):7.2f} {max(times):7.2f}"
                      f"  {m / want[name]['seconds']:.2f}", flush=True)
        finally:
            st.kill_all(s)
            nodes.down()


if __name__ == "__main__":
    main()
