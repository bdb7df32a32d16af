#!/usr/bin/env python3
"""--trace through the command line, for many layouts: the file is JSON in Chrome's trace event format; the slices of a rank are
apart or nested; every rank has every step of the window once; steps go through the stages in order; causes add up to what the
closing table says. A trace that cannot be written is refused at the start, and one that fails later harms nothing."""
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import shoaltest as st

CAUSES = ("weights", "attention", "experts", "exchange", "other")
check = st.Checks()
files = {}  # bytes of weight files that all ranks of a layout read


def requests(n=14, tokens=9):
    return [st.completion(f"r{i}", [20 + (i * 131 + j * 17) % 1900 for j in range(4 + 11 * (i % 5))], max_tokens=tokens + i % 4)
            for i in range(n)]


class Trace:
    def __init__(self, path):
        with open(path) as f:
            self.file = json.load(f)
        self.slices, self.process, self.thread, self.counters = {}, {}, {}, []
        for e in self.file["traceEvents"]:
            if e["ph"] == "M" and e["name"] == "process_name":
                self.process[e["pid"]] = e["args"]["name"]
            elif e["ph"] == "M" and e["name"] == "thread_name":
                self.thread[e["pid"], e["tid"]] = e["args"]["name"]
            elif e["ph"] == "X":
                # nanoseconds as integers: what is compared is exact
                start, length = round(e["ts"] * 1000), round(e["dur"] * 1000)
                self.slices.setdefault((e["pid"], e["tid"]), []).append((start, start + length, e["name"], e.get("args")))
            elif e["ph"] == "C":
                self.counters.append(e)
            else:
                check(e["ph"] == "M", f"an event of kind {e['ph']}")
        for s in self.slices.values():
            s.sort(key=lambda x: (x[0], -x[1], not x[2].startswith("step")))

    def walk(self, row, what):
        """Steps of a row in order, and seconds by name with nested slices taken out."""
        steps, own, open_ = [], {}, []
        for start, end, name, args in self.slices[row]:
            kind = name.split()[0]
            while open_ and open_[-1][1] <= start:
                open_.pop()
            if open_:
                check(end <= open_[-1][1], f"{what}: {name} at {start} ns reaches out of {open_[-1][2]}")
                own[open_[-1][2].split()[0]] -= end - start
            inside = [o[2].split()[0] for o in open_]
            if kind == "step":
                check(not inside, f"{what}: {name} lies within {inside}")
                check(name == f"step {args['step']}" and args["rows"] == args["decode_rows"] + args["prompt_rows"], f"{what}: {name}: {args}")
                steps.append((start, end, args))
            elif kind != "idle" and not (kind == "exchange" and not inside):  # between steps a rank waits or receives
                check(inside[:1] == ["step"], f"{what}: {name} at {start} ns lies within {inside}, not within a step")
            own[kind] = own.get(kind, 0) + end - start
            open_.append((start, end, name))
        return steps, {k: v * 1e-9 for k, v in own.items()}


def ends(p):
    """The closing object of --progress json."""
    return [json.loads(x) for x in p.stderr.splitlines() if x.startswith("{") and '"event":"end"' in x]


def run(s, name, model, options, window=None, progress="json", reqs=None):
    out, trace = s.file(name + ".out"), s.file(name + ".json")
    inp = s.file(name + ".in")
    st.write_lines(inp, reqs or requests())
    command = [st.shoal(), "run", "-m", model, "-i", inp, "-o", out, "--progress", progress, "--trace", trace, *options.split()]
    if window:
        command += ["--trace-steps", window]
    p = subprocess.run(command, capture_output=True, text=True, timeout=200, env=s.env())
    check(p.returncode == 0, f"{name}: exit status {p.returncode}: {p.stderr[-600:]}")
    if not check(os.path.exists(trace), f"{name}: no trace: {p.stderr[-600:]}"):
        sys.exit(1)
    return p, Trace(trace)


def layout(s, name, model, options, ranks, width=1, prefill=0, replicas=1, lanes=False, n=14):
    p, t = run(s, name, os.path.join(st.MODELS, model), options, "0:100000", reqs=requests(n))
    decode = ranks - prefill
    check(len(t.process) == replicas and len(set(t.process.values())) == replicas, f"{name}: processes {t.process}")
    check(sorted(t.thread) == [(g + 1, r) for g in range(replicas) for r in range(ranks)] and sorted(t.slices) == sorted(t.thread),
          f"{name}: threads {sorted(t.thread)}, with slices {sorted(t.slices)}")
    table = {(x["group"], x["rank"]): x for e in ends(p) for x in e["stages"]}
    check(len(table) == ranks * replicas, f"{name}: the closing table has {len(table)} ranks")
    tokens = 0
    for g in sorted(t.process):
        steps = {}
        for r in range(ranks):
            what = f"{name}, group {g}, rank {r}"
            steps[r], own = t.walk((g, r), what)
            numbers = [x[2]["step"] for x in steps[r]]
            check(numbers == list(range(len(numbers))), f"{what}: steps {numbers[:20]} …")
            stage, member = (r - decode, 0) if r >= decode else (r // width, r % width)
            named = t.thread[g, r]
            check(f"rank {r}:" in named and f"stage {stage}" in named and ("prompts" in named) == (r >= decode), f"{what}: {named}")
            check(width == 1 or r >= decode or f"member {member}" in named, f"{what}: {named}")
            samples = stage == decode // width - 1 and r < decode and (lanes or width == 1 or member == 0)
            check(("sampling" in own) == samples or (stage == decode // width - 1 and width > 1), f"{what}: samples: {sorted(own)}")
            said = table[t.process[g].split()[1], r]
            load = said["load"]
            check(load["file_bytes"] > 0 and 0 <= load["reading"] + load["packing"] <= 1.01 * load["seconds"], f"{what}: {load}")
            # the table is of the last heartbeat: it may know less than the trace, but not more
            check(len(numbers) >= said["steps"] > 0, f"{what}: {len(numbers)} steps, the table has {said['steps']}")
            for cause in CAUSES:  # slices below a quarter of a microsecond are left out, at most a few per layer
                least = 0.97 * said[cause] - 25e-6 * len(numbers) - 1e-4
                check(own.get(cause, 0) >= least, f"{what}: {cause} {own.get(cause, 0):.6f} s, the table has {said[cause]:.6f}")
                if len(numbers) == said["steps"]:
                    check(own.get(cause, 0) <= 1.03 * said[cause] + 1e-3, f"{what}: {cause} {own.get(cause, 0):.6f} s, the table has {said[cause]:.6f}")
            if r < width and (lanes or r == 0):
                tokens += sum(x[2]["decode_rows"] for x in steps[r])
        for r in list(range(width, decode)) + list(range(decode + 1, ranks)):  # against the stage before
            before = r - width if r < decode else r - 1
            check(len(steps[r]) == len(steps[before]), f"{name}: rank {r} has {len(steps[r])} steps, rank {before} {len(steps[before])}")
            for a, b in zip(steps[before], steps[r]):
                if not check(a[2] == b[2] and a[0] < b[0], f"{name}: {a} on rank {before}, {b} on rank {r}"):
                    break
        for m in range(1, width):
            check(len(steps[m]) == len(steps[0]), f"{name}: member {m} has {len(steps[m])} steps, member 0 {len(steps[0])}")
            check(lanes or [x[2] for x in steps[m]] == [x[2] for x in steps[0]], f"{name}: members 0 and {m} computed other rows")
    check(tokens > 50, f"{name}: {tokens} decode rows")
    flying = [e for e in t.counters if e["name"] == "in flight"]
    check({e["pid"] for e in flying} == set(t.process) and max(e["args"]["micro-batches"] for e in flying) >= 1, f"{name}: counters")
    for g in t.process:
        last = max((e for e in flying if e["pid"] == g), key=lambda e: e["ts"])
        check(last["args"]["micro-batches"] == 0, f"{name}: group {g} ends with {last['args']} in flight")
    check(t.file["otherData"]["dropped_slices"] == 0, f"{name}: {t.file['otherData']}")
    read = ends(p)[0]["load"]
    check(read["file_bytes"] == sum(x["load"]["file_bytes"] for x in table.values()), f"{name}: {read} of {table}")
    files.setdefault(model, {})[name] = read["file_bytes"]
    check('"event":"trace"' in p.stderr, f"{name}: the trace is not mentioned: {p.stderr[-300:]}")


def window(s):
    _, t = run(s, "window", os.path.join(st.MODELS, "e2b-like"), "--launcher local --pp 2", "3:5", "none")
    for row in t.slices:
        steps, _ = t.walk(row, f"window, {row}")
        check([x[2]["step"] for x in steps] == [3, 4], f"window: {row} has steps {[x[2]['step'] for x in steps]}")
    check(len(t.slices) == 2, f"window: {sorted(t.slices)}")


def refused(s, name, options, *said):
    inp, out = s.file(name + ".in"), s.file(name + ".out")
    st.write_lines(inp, requests(2))
    p = subprocess.run([st.shoal(), "run", "-m", os.path.join(st.MODELS, "e2b-like"), "-i", inp, "-o", out, *options],
                       capture_output=True, text=True, timeout=60, env=s.env())
    check(p.returncode == 2, f"{name}: exit status {p.returncode}: {p.stderr[-300:]}")
    check(all(x in p.stderr for x in said), f"{name}: {p.stderr[-300:]}")
    check(not os.path.exists(out) and not os.path.exists(out + ".store"), f"{name}: left something behind")


def refusals(s):
    refused(s, "no folder", ["--trace", s.file("nowhere/t.json")], "--trace", "nowhere/t.json")
    refused(s, "a folder", ["--trace", s.path], "--trace", "not a regular file")
    refused(s, "a device", ["--trace", "/dev/full"], "--trace", "not a regular file")
    refused(s, "read-only", ["--trace", "/proc/t.json"], "--trace", "/proc/t.json")
    refused(s, "the output", ["--trace", s.file("the output.out")], "is the input or the output")
    refused(s, "no file", ["--trace-steps", "0:5"], "--trace FILE")
    for bad in ("5", "5:5", "7:2", "-1:5", "a:b", "1:2:3", ""):
        refused(s, "bad window", ["--trace", s.file("t.json"), "--trace-steps", bad], "--trace-steps", "A:B")


def later(s):
    """The folder of the trace goes away while the job runs: a warning, and every row."""
    folder, out, inp = s.file("gone"), s.file("later.out"), s.file("later.in")
    os.mkdir(folder)
    st.write_lines(inp, requests(12, 40))
    p = subprocess.Popen([st.shoal(), "run", "-m", os.path.join(st.MODELS, "e2b-like"), "-i", inp, "-o", out, "--launcher", "local", "--trace",
                          os.path.join(folder, "t.json")], stderr=subprocess.PIPE, text=True, env=s.env())
    while not os.path.exists(out + ".store") and p.poll() is None:
        time.sleep(0.01)
    shutil.rmtree(folder)
    err = p.communicate(timeout=100)[1]
    if check(p.returncode == 0, f"later: exit status {p.returncode}: {err[-400:]}"):
        check(len(st.rows(out)) == 12, "later: rows are missing")
    check("--trace" in err and "t.json" in err, f"later: no warning: {err[-400:]}")


def bench(s):
    path = s.file("bench.json")
    command = [st.shoal(), "bench", "-m", os.path.join(st.MODELS, "26b-a4b-like"), "--rounds", "1", "--prompt", "48", "--chunk", "32",
               "--generate", "6", "--batch", "1,4", "--threads", "1", "--trace"]
    p = subprocess.run(command + [path], capture_output=True, text=True, timeout=100, env=s.env())
    check(p.returncode == 0, f"bench: exit status {p.returncode}: {p.stderr[-300:]}")
    t = Trace(path)
    check(list(t.slices) == [(1, 0)], f"bench: {list(t.slices)}")
    steps, own = t.walk((1, 0), "bench")
    rows = [(x[2]["step"], x[2]["decode_rows"], x[2]["prompt_rows"]) for x in steps]
    prompt = [(0, 32), (0, 16)]
    check(rows == [(i, *x) for i, x in enumerate(2 * prompt + 6 * [(1, 0)] + 6 * [(4, 0)])], f"bench: {rows}")
    check({"weights", "attention", "experts", "other", "sampling"} <= set(own), f"bench: {own}")
    for options, said in (([s.file("nowhere/t.json")], "nowhere/t.json"), ([path, "--trace-steps", "3:1"], "A:B")):
        p = subprocess.run(command + options, capture_output=True, text=True, timeout=100, env=s.env())
        check(p.returncode == 2 and said in p.stderr, f"bench {options}: {p.returncode}: {p.stderr[-300:]}")


with st.Scratch() as s:
    local = "--launcher local --threads 1 --chunk 16 --max-seqs 6 "
    with ThreadPoolExecutor(4) as pool:  # most of their time is waiting for the next heartbeat
        jobs = [pool.submit(layout, s, *a, **k) for a, k in (
            (("mpi", "26b-a4b-like", "--threads 1 --chunk 16 --max-seqs 6 --pp 2", 2), {}),
            (("one", "e2b-like", local, 1), {}),
            (("pp", "e2b-like", local + "--pp 4", 4), {}),
            (("ep", "26b-a4b-like", local + "--pp 2 --ep 2", 4), dict(width=2, lanes=True)),
            (("tp", "31b-like", local + "--pp 2 --tp 2", 4), dict(width=2)),
            (("cp", "31b-like", local + "--pp 1 --cp 2", 2), dict(width=2)),
            (("prefill", "e2b-like", local + "--pp 2 --prefill 2", 4), dict(prefill=2)),
            (("replicas", "26b-a4b-like", local + "--pp 2 --replicas 2 --max-seqs 2", 2), dict(replicas=2, n=200)))]
        jobs += [pool.submit(f, s) for f in (window, later, bench, refusals)]
    for j in jobs:
        j.result()
    e2b, moe = files["e2b-like"], files["26b-a4b-like"]
    check(e2b["one"] <= e2b["pp"] < 1.02 * e2b["one"], f"a pipeline reads each byte once: {e2b}")
    check(moe["replicas"] == 2 * moe["mpi"] and moe["mpi"] < moe["ep"] < 2 * moe["mpi"], f"members read what they share twice: {moe}")
    left = st.left_behind(s)
    check(not left, f"left behind: {left}")
print(f"trace: {check.n} checks, {check.bad} failed, {time.time() - check.t0:.1f} s")
sys.exit(1 if check.bad else 0)
