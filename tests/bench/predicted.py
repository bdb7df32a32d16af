#!/usr/bin/env python3
"""Predicted against measured: `shoal plan` costs layouts for a cluster of virtual nodes with shaped links, then each of them runs
the job there. Needs root and iproute2.

    tests/bench/predicted.py [--layouts all|"ep8,pp2 ep4,…"] [--repeat N]      kernels that sleep (SHOAL_ISA=model:FMA,BYTES)
    tests/bench/predicted.py --real [--shape small-dense] [--repeat 5]         real kernels, at most two compute threads in all

Without --real many ranks have two cores: network, schedule and exchange are real, products and attention take the modelled time.
Layouts take turns, so that a busy moment of the machine hits them alike. One line per layout with the median of the repeats;
then what the planner would have chosen beside what was fastest. Exit status 1: a layout is off by more than a quarter, or the
planner's first choice is more than a tenth slower than the best."""
import argparse
import fcntl
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import netns
import shoaltest as st

GOODPUT = 0.95  # of a shaped link: without the frames' headers
LATENCY = 300   # microseconds between two ranks that share a CPU with others: each naps while it waits
BURST = 65536   # bytes that a shaped link passes at once after a silence: little beside a message
MAKE_SHAPE = os.path.join(os.path.dirname(st.shoal()), "tests", "make_shape")


def checkpoint(folder, shape):
    """A small random checkpoint with the demo model's tokenizer."""
    to = os.path.join(folder, shape)
    if not os.path.exists(os.path.join(to, "tokenizer_config.json")):
        subprocess.run([MAKE_SHAPE, shape, to], check=True)
        for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(os.path.join(st.DEMO, name), to)
    return to


def workload(path, requests, prompt, output):
    """Outputs of half to one and a half times the mean length, so that sequences do not end together."""
    st.write_lines(path, [st.completion(f"r{k}", [200 + (7 * i + 13 * k) % 2800 for i in range(prompt)],
                                        max_tokens=output // 2 + k % 5 * output // 4, ignore_eos=True, temperature=0)
                          for k in range(requests)])


def modelled_machine(o):
    fma, read = (float(x[:-1]) for x in o.isa.split(":")[1].split(","))  # both in G
    return {"node": [{"count": o.nodes, "cpu": "modelled", "packages": 1, "numa": 1, "cores": 1, "memory_gib": 4, "read_gbs": read,
                      "fma_gflops": 2 * fma}],
            "kernels": {"weights_read": 1, "weights_fma": 1, "attention_read": 1, "attention_fma": 1, "layer_us": 0, "sample_ns": 2,
                        "spanning": 1}}


def real_machine(s, o, model):
    """This machine as `shoal plan` measures it, cut into nodes of one core each."""
    path = s.file("this.json")
    with open(o.lock or s.file("lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        plan(model, ["--probe", "--save-machine", path, "--brief"], s.file("unused.json"))
    with open(path) as f:
        m = json.load(f)
    n = m["node"][0]
    cores = n["cores"]
    n.update(count=o.nodes, cores=1, numa=1, packages=1, memory_gib=4, read_gbs=n["read_gbs"] / cores, fma_gflops=n["fma_gflops"] / cores)
    return {"node": [n], "kernels": m.get("kernels", {})}


LINK = """import socket, sys, time
N, BYTES = 2000, 40_000_000
if sys.argv[1] == "answer":
    s = socket.create_server(("", 5999)); print("up", flush=True); c = s.accept()[0]
    c.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for _ in range(N): c.recv(1); c.send(b"x")
    got = 0
    while got < BYTES: got += len(c.recv(1 << 20))
    c.send(b"x")
else:
    c = socket.create_connection((sys.argv[1], 5999)); c.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    t = []
    for _ in range(N):
        a = time.perf_counter(); c.send(b"x"); c.recv(1); t.append(time.perf_counter() - a)
    a = time.perf_counter(); c.sendall(bytes(BYTES)); c.recv(1)
    print(sorted(t)[N // 2] / 2 * 1e6, BYTES * 8e-9 / (time.perf_counter() - a))"""


def link_of(nodes):
    """The link between two nodes that have a CPU each, as TCP has it: microseconds one way, Gbit/s of a stream."""
    cpus = sorted(os.sched_getaffinity(0))
    on = lambda k: ["taskset", "-c", str(cpus[k % len(cpus)]), sys.executable, "-c", LINK]
    answers = subprocess.Popen(nodes.command("node1", on(1) + ["answer"]), stdout=subprocess.PIPE, text=True)
    answers.stdout.readline()
    p = subprocess.run(nodes.command("node0", on(0) + ["node1"]), capture_output=True, text=True, check=True)
    answers.wait()
    us, gbit = map(float, p.stdout.split())
    print(f"link: {us:.0f} µs, {gbit:.3f} Gbit/s")
    return {"gbit": gbit, "latency_us": us}


def plan(model, options, out):
    p = subprocess.run([st.shoal(), "plan", "-m", model, "-o", out, *map(str, options)], capture_output=True, text=True)
    if p.returncode:
        raise RuntimeError(f"shoal plan {' '.join(map(str, options))}: {p.stderr}")
    return p.stdout


def members(kinds, nodes, experts):
    """All layouts of one group on at most so many nodes: stages, stages beside ranks that only read prompts, and what the members of
    a stage divide."""
    sizes = [n for n in (1, 2, 4, 8, 16) if n <= nodes]
    found = [f"pp{p}" for p in sizes]
    found += [f"prefill{n}" if p == 1 else f"prefill{n} pp{p}" for n, p in itertools.product(sizes, (1, 2, 3, 4)) if n + p <= nodes]
    for kind, p, n in itertools.product(kinds, sizes, sizes[1:]):
        if p * n <= nodes and (kind != "ep" or experts):
            found.append(f"{kind}{n}" if p == 1 else f"pp{p} {kind}{n}")
    return found


def options_of(layout):
    d = {k: int(v) for k, v in re.findall(r"(pp|ep|tp|cp|prefill)(\d+)", layout)}
    prefill, ranks = d.pop("prefill", 0), 1
    for v in d.values():
        ranks *= v
    ranks += prefill
    more = ["--prefill", prefill] if prefill else []
    return ranks, ["-n", ranks, *itertools.chain(*((f"--{k}", d.get(k, 1)) for k in ("pp", "ep", "tp", "cp"))), *more]


class Job:
    def __init__(self, s, nodes, model, inp, isa, lock):
        self.lock = lock or s.file("lock")
        self.s, self.nodes, self.model, self.inp = s, nodes, model, inp
        self.env = s.env(**nodes.environment(), **({"SHOAL_ISA": isa} if isa else {}))

    def run(self, options, ranks):
        """Seconds with the ranks at work, and the closing table."""
        out = self.s.file("out.jsonl")
        shutil.rmtree(out + ".store", ignore_errors=True)
        if os.path.exists(out):
            os.remove(out)
        cmd = [st.shoal(), "run", "-m", self.model, "-i", self.inp, "-o", out, *options, "--threads", "1", "--progress", "plain",
               "--hosts", ",".join(self.nodes.names[1:ranks + 1])]
        with open(self.lock, "w") as lock:  # where others measure too
            fcntl.flock(lock, fcntl.LOCK_EX)
            p = subprocess.run(self.nodes.command("head", cmd), env=self.env, capture_output=True, text=True, timeout=900)
        work = re.search(r"([0-9.]+) s of it with the ranks at work", p.stderr)
        if p.returncode or not work:
            raise RuntimeError(f"{' '.join(options)}: exit {p.returncode}: {p.stderr[-800:]}")
        return float(work[1]), p.stderr[p.stderr.find("  requests"):]


def report(o, want, got, ranks, choice):
    bad = []
    print(f"{'layout':12s} {'ranks':>5s} {'predicted s':>11s} {'measured s':>10s} {'least':>6s} {'most':>6s} {'measured/predicted':>18s}")
    median = {name: statistics.median(t) for name, t in got.items() if t}
    for name in sorted(median, key=median.get):
        ratio = median[name] / want[name]
        print(f"{name:12s} {ranks[name]:5d} {want[name]:11.1f} {median[name]:10.1f} {min(got[name]):6.1f} {max(got[name]):6.1f} {ratio:18.2f}")
        if not 0.75 <= ratio <= 1.25:
            bad.append(f"{name}: {ratio:.2f} of what was predicted")
    best = min(median, key=median.get)
    if choice in median:
        lost = median[choice] / median[best] - 1
        print(f"the planner's first choice: {choice}, {median[choice]:.1f} s; the fastest: {best}, {median[best]:.1f} s: {100 * lost:.0f} % lost")
        if lost > 0.1:
            bad.append(f"the planner's choice {choice} loses {100 * lost:.0f} %")
    for line in bad:
        print("FAIL", line)
    return 1 if bad else 0


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("--real", action="store_true")
    a.add_argument("--layouts", default="all")
    a.add_argument("--nodes", type=int, default=0)
    a.add_argument("--repeat", type=int, default=3)
    a.add_argument("--folder", default="/tmp/shoal-predicted", help="where checkpoints are kept")
    a.add_argument("--shape", default="small-moe")
    a.add_argument("--isa", default="model:20G,1G")
    a.add_argument("--mbit", type=float, default=400)
    a.add_argument("--requests", type=int, default=192)
    a.add_argument("--prompt", type=int, default=16)
    a.add_argument("--output", type=int, default=16)
    a.add_argument("--seqs", type=int, default=64)
    a.add_argument("--chunk", type=int, default=128)
    a.add_argument("--lock", default="", help="file to lock for each job")
    a.add_argument("--verbose", action="store_true")
    o = a.parse_args()
    o.nodes = o.nodes or (2 if o.real else 4)
    os.makedirs(o.folder, exist_ok=True)
    model = checkpoint(o.folder, o.shape)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # nodes go down
    with st.Scratch() as s:
        inp, machine = s.file("in.jsonl"), s.file("machine.json")
        workload(inp, o.requests, o.prompt, o.output)
        nodes = netns.Nodes(s.file("net"), o.nodes, one_cpu=o.real)
        try:
            nodes.shape(o.mbit, BURST if o.real else 0)
            m = real_machine(s, o, model) if o.real else modelled_machine(o)
            between = link_of(nodes) if o.real else {"gbit": o.mbit * GOODPUT / 1000, "latency_us": LATENCY}
            m.update(name="virtual nodes", between=between)
            with open(machine, "w") as f:
                json.dump(m, f)
            common = ["--machine", machine, "--workload", inp, "--max-seqs", o.seqs, "--chunk", o.chunk, "--replicas", 1, "--brief"]
            text = plan(model, common, s.file("best.json"))
            print(text[text.find("the best of"):])
            layouts = members(("ep", "tp", "cp"), o.nodes, "moe" in o.shape) if o.layouts == "all" else o.layouts.split(",")
            want, got, ranks, file = {}, {}, {}, {}
            with open(s.file("best.json")) as f:
                first = json.load(f)
            for k, name in enumerate(layouts):
                file[name] = s.file(f"plan{k}.json")
                ranks[name], options = options_of(name)
                plan(model, common + options, file[name])
                with open(file[name]) as f:
                    want[name], got[name] = json.load(f)["forecast"]["seconds"], []
            choice = min(want, key=want.get)
            if abs(first["forecast"]["seconds"] / want[choice] - 1) > 0.01:
                print(f"the planner's first choice takes {first['forecast']['seconds']:.1f} s: it is none of these")
                choice = None
            job = Job(s, nodes, model, inp, None if o.real else o.isa, o.lock)
            for name in layouts * o.repeat:
                seconds, table = job.run(["--plan", file[name]], ranks[name])
                got[name].append(seconds)
                print(f"{name}: {seconds:.1f} s, predicted {want[name]:.1f} s" + ("\n" + table if o.verbose else ""), flush=True)
        finally:
            st.kill_all(s)
            nodes.down()
        sys.exit(report(o, want, got, ranks, choice))


if __name__ == "__main__":
    main()
