#!/usr/bin/env python3
"""shoal plan as it is typed: a model that is config.json alone, machines from files, a plan written, edited, refused and run, workloads
of both kinds, the table of models, the measurement that is made once; and what a run says beside its measured times."""
import json
import os
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import shoaltest as st

CONFIGS = os.path.join(st.DATA, "configs")
MACHINES = os.path.join(st.DATA, "machines")


class Named(st.Checks):
    """Checks with what was seen."""

    def check(self, what, ok, seen=None):
        return self(ok, f"{what}: {seen}")


def plan(scratch, *args, timeout=120):
    env = scratch.env(XDG_CACHE_HOME=scratch.file("cache"))
    p = subprocess.run([st.shoal(), "plan", *map(str, args)], capture_output=True, text=True, timeout=timeout, env=env)
    return p.returncode, p.stdout, p.stderr


def from_files(c, s):
    a4b, xeon = os.path.join(CONFIGS, "26b-a4b"), os.path.join(MACHINES, "xeon-4-25g.json")
    rc, out, err = plan(s, "-m", a4b, "--machine", xeon)
    c.check("config alone", rc == 0 and "from config.json alone" in out and not err, (rc, err))
    for words in ("why the other ways lost:", "what a better machine would bring:", "4 nodes of 2 × Xeon", "by nodes and mode"):
        c.check(words, words in out, out)
    rc, out, err = plan(s, "-m", a4b, "--machine", os.path.join(MACHINES, "box-24g.json"), "--brief")
    c.check("does not fit", rc == 3 and "needs 49935." in out and "may use 24576.0 MiB" in out, (rc, out))
    rc, out, err = plan(s, "-m", a4b, "-m", os.path.join(CONFIGS, "31b"), "--machine", xeon, "--nodes", 2)
    c.check("two models", rc == 0 and out.count("26b-a4b ") >= 5 and out.count("  31b ") >= 4, out)
    rc, out, err = plan(s, "-m", a4b, "--machine", xeon, "--pp", 2, "--ep", 2, "--replicas", 1, "--brief")
    c.check("forced", rc == 0 and "pipeline of 2 stages × 2 ranks that divide sequences and experts" in out, out)
    box = ("--machine", os.path.join(MACHINES, "box-24g.json"), "--brief")
    for more, ranks in (("--replicas", 4), 1), (("--pp", 2, "--replicas", 2), 2):  # one NUMA node that groups share
        rc, out, err = plan(s, "-m", st.DEMO, *box, *more, "-o", s.file("shared.json"))
        c.check(f"{more}", rc == 0 and len(json.load(open(s.file("shared.json")))["rank"]) == ranks, (rc, out, err))
    rc, out, err = plan(s, "-m", st.DEMO, *box[:2], "--replicas", 2)  # on more nodes groups have more than the rank that they share one with
    speed = {w[1]: float(w[2]) for w in (line.split() for line in out.split("\n") if line.startswith("  minnow "))}
    c.check("more nodes are used", rc == 0 and speed["8"] > 1.5 * speed["2"], (rc, out[-1500:]))
    rc, _, err = plan(s, "-m", a4b, "--machine", s.file("none.json"))
    c.check("no machine file", rc == 3 and "none.json" in err, (rc, err))
    with open(s.file("bad.json"), "w") as f:
        f.write('{"node": [{"cores": 4, "memory": 8}]}')
    rc, _, err = plan(s, "-m", a4b, "--machine", s.file("bad.json"))
    c.check("bad machine file", rc == 2 and "node[0].memory: no such field: allowed are count" in err, (rc, err))


def workloads(c, s):
    box = ("--machine", os.path.join(MACHINES, "box-24g.json"), "--brief")
    with open(s.file("lengths.json"), "w") as f:
        json.dump({"lengths": [{"prompt": 100, "output": 20, "requests": 3}, {"prompt": 300, "output": 60}], "requests": 4000}, f)
    rc, out, err = plan(s, "-m", st.DEMO, *box, "--workload", s.file("lengths.json"))
    c.check("histogram", rc == 0 and "4000 requests of 150 prompt and 30 output tokens" in out, (rc, out, err))
    st.write_lines(s.file("in.jsonl"), [st.completion(f"r{i}", list(range(5, 5 + 10 * (1 + i % 2))), max_tokens=7) for i in range(40)])
    rc, out, err = plan(s, "-m", st.DEMO, *box, "--workload", s.file("in.jsonl"))
    c.check("requests", rc == 0 and "40 requests of 15 prompt and 7 output tokens" in out and "counted by the tokenizer" in out, (rc, out, err))
    rc, out, err = plan(s, "-m", os.path.join(CONFIGS, "e2b"), *box, "--workload", s.file("in.jsonl"))
    c.check("without tokenizer", rc == 0 and "estimated: there is no tokenizer here" in out, (rc, out, err))
    st.write_lines(s.file("none.jsonl"), ["not JSON"])
    rc, _, err = plan(s, "-m", st.DEMO, *box, "--workload", s.file("none.jsonl"))
    c.check("no request", rc == 2 and "has no request that could be read" in err, (rc, err))


def measured_once(c, s):
    rc, out, err = plan(s, "-m", st.DEMO, "--brief", "--save-machine", s.file("here.json"))
    c.check("this machine", rc == 0 and "figures: " in out and len(os.listdir(s.file("cache/shoal"))) == 1, (rc, out, err))
    found = json.load(open(s.file("here.json")))
    here, kernels = found["node"][0], found["kernels"]
    c.check("its numbers", here["read_gbs"] > 0.1 and here["fma_gflops"] > 0.1 and here["cores"] >= 1, here)
    shares = [kernels.get(f"{k}_{what}", 0) for k in ("weights", "q8", "q4") for what in ("read", "fma")]
    c.check("its kernels", all(0 < x <= 64 for x in shares) and len(set(shares)) > 1, kernels)
    few = [kernels.get(f"{k}_few", []) for k in ("weights", "q8", "q4")]
    c.check("few rows", all(len(x) == 6 and 0 < min(x) and max(x) <= 16 for x in few), kernels)
    rc, out2, err = plan(s, "-m", st.DEMO, "--brief", "--machine", s.file("here.json"))
    c.check("read back", rc == 0, (rc, err))
    before = os.stat(os.path.join(s.file("cache/shoal"), os.listdir(s.file("cache/shoal"))[0])).st_mtime_ns
    rc, out2, _ = plan(s, "-m", st.DEMO, "--brief")
    after = os.stat(os.path.join(s.file("cache/shoal"), os.listdir(s.file("cache/shoal"))[0])).st_mtime_ns
    c.check("kept", rc == 0 and before == after)
    p = subprocess.run([st.shoal(), "plan", "-m", st.DEMO, "--brief", "--save-machine", s.file("modelled.json")], capture_output=True,
                       text=True, env=s.env(XDG_CACHE_HOME=s.file("cache"), SHOAL_ISA="model:9G,1G"), timeout=120)
    kernels = json.load(open(s.file("modelled.json")))["kernels"]
    c.check("other instructions are measured for themselves", p.returncode == 0 and len(os.listdir(s.file("cache/shoal"))) == 2, p.stderr)
    c.check("what only takes time is not measured", "weights_fma" not in kernels, kernels)


def edited(c, s):
    path = s.file("plan.json")
    box = ("--machine", os.path.join(MACHINES, "box-24g.json"), "--brief")
    rc, _, err = plan(s, "-m", st.DEMO, *box, "--nodes", 4, "--pp", 2, "--ep", 2, "--replicas", 1, "-o", path)
    c.check("written", rc == 0 and os.path.exists(path), (rc, err))
    p = json.load(open(path))
    c.check("named", len(p["rank"]) == 4 and p["model"]["layers"] == 6 and p["forecast"]["tokens_out_per_s"] > 0, p)
    requests = [st.completion(f"r{i}", list(range(5, 25 + i)), max_tokens=8, temperature=0) for i in range(6)]
    rc, alone, err = st.run(s, st.DEMO, requests, "-n", 1)
    c.check("one rank", rc == 0 and len(alone) == 6, (rc, err))
    for r in p["rank"]:  # another cut, and the experts of the stages with it
        r["first"], r["last"] = (0, 2) if r["first"] == 0 else (2, 6)
        e = r["experts"][0]["expert"]
        r["experts"] = [{"layer": i, "expert": e} for i in range(r["first"], r["last"])]
    e = p["rank"][0]["experts"][0]["expert"]
    p["rank"][0]["experts"][0]["expert"] = sorted(e + [15])  # and one of them on two ranks
    with open(path, "w") as f:
        json.dump(p, f)
    rc, rows, err = st.run(s, st.DEMO, requests, "--plan", path, "--launcher", "local")
    c.check("edited plan runs to the same rows", rc == 0 and rows == alone, (rc, err))
    rc, out, err = plan(s, "-m", st.DEMO, *box, "--nodes", 4, "--plan", path)
    c.check("explained", rc == 0 and "  2-5 " in out and "pipeline of 2 stages" in out, (rc, out, err))
    rc, _, err = plan(s, "-m", os.path.join(CONFIGS, "26b-a4b"), *box, "--plan", path)
    c.check("another model", rc == 2 and "model.layers: 6: the plan was made for another model: this one has 30" in err, (rc, err))
    for what, change, said in (("lost layer", lambda q: q["rank"][2].update(first=3), "must begin at layer 2"),
                               ("lost expert", lambda q: q["rank"][1]["experts"][0]["expert"].pop(), "is on no rank"),
                               ("unknown field", lambda q: q.update(stages=2), "stages: no such field")):
        q = json.loads(json.dumps(p))
        q["rank"][0]["experts"][0]["expert"] = e
        change(q)
        with open(s.file("q.json"), "w") as f:
            json.dump(q, f)
        rc, _, err = st.run(s, st.DEMO, requests, "--plan", s.file("q.json"))
        c.check(what, rc == 2 and said in err, (rc, err))
    for option, said in ((("--pp", 2), "leave --pp away"), (("-n", 2), "-n: 2, but the plan says 4"), (("--mode", "exact"), "but the plan says bf16")):
        rc, _, err = st.run(s, st.DEMO, requests, "--plan", path, *option)
        c.check(option[0], rc == 2 and said in err, (rc, err))


def quantized(c, s):
    """The mode is the plan's, also in what the store says the rows were made with."""
    path, requests = s.file("q8.json"), [st.completion(f"r{i}", list(range(5, 25)), max_tokens=4, temperature=0) for i in range(2)]
    box = ("--machine", os.path.join(MACHINES, "box-24g.json"), "--brief")
    rc, _, err = plan(s, "-m", st.DEMO, *box, "--mode", "q8", "--pp", 2, "--replicas", 1, "-o", path)
    c.check("q8 plan written", rc == 0 and json.load(open(path))["mode"] == "q8", (rc, err))
    run = ("--plan", path, "--launcher", "local")
    rc, rows, err = st.run(s, st.DEMO, requests, *run, "--keep-store", name="q8")
    c.check("q8 plan runs as q8", rc == 0 and len(rows) == 2, (rc, err))
    job = json.load(open(s.file("q8.out.jsonl.store/job.json")))
    c.check("the store says q8", job["--mode"] == "q8", job)
    rc, _, err = st.run(s, st.DEMO, requests, *run, "--mode", "q8")
    c.check("the same mode beside it", rc == 0, (rc, err))
    for mode in ("bf16", "q4"):
        rc, _, err = st.run(s, st.DEMO, requests, *run, "--mode", mode)
        c.check(f"q8 plan, --mode {mode}", rc == 2 and f"--mode: {mode}, but the plan says q8" in err, (rc, err))


def prompts_apart(c, s):
    """Ranks that only read prompts: searched for, asked for, written, explained, edited, run, and predicted beside what was measured."""
    path, box = s.file("prefill.json"), ("--machine", os.path.join(MACHINES, "box-24g.json"), "--brief", "--nodes", 4)
    rc, out, err = plan(s, "-m", os.path.join(CONFIGS, "e4b"), *box)
    c.check("weighed", rc == 0 and "  prompts on ranks of their own (prefill): slower, " in out, (rc, out, err))
    rc, out, err = plan(s, "-m", st.DEMO, *box, "--prefill", 1, "--pp", 2, "--replicas", 1, "--max-seqs", 8, "--chunk", 64, "-o", path)
    c.check("asked for", rc == 0 and "pipeline of 2 stages + 1 rank that only reads prompts" in out and "K/V of prompts" in out, (rc, out, err))
    p = json.load(open(path))
    c.check("written", p["prefill"] == 1 and [(r["first"], r["last"]) for r in p["rank"]][2] == (0, 6) and len(p["forecast"]["rank"]) == 3
            and p["forecast"]["rank"][2]["sent"] > 0 and p["forecast"]["seconds"] > 0, p)
    rc, out2, err = plan(s, "-m", st.DEMO, *box, "--plan", path)
    c.check("explained", rc == 0 and "\n  2           2  0-5 " in out2 and "sequences are being read" in out2, (rc, out2, err))
    speed = [line for line in out.splitlines() if line.startswith("  speed")]
    c.check("the same forecast", speed and speed[0] in out2, (speed, out2))
    requests = [st.completion(f"r{i}", list(range(5, 45 + 9 * i)), max_tokens=8, temperature=0) for i in range(6)]
    rc, alone, err = st.run(s, st.DEMO, requests, "-n", 1)
    c.check("one rank", rc == 0 and len(alone) == 6, (rc, err))
    rc, rows, err = st.run(s, st.DEMO, requests, "--plan", path, "--launcher", "local")
    c.check("runs to the same rows", rc == 0 and rows == alone, (rc, err))
    p["rank"][0]["last"] = p["rank"][1]["first"] = 1  # another cut; and two ranks that read, with a cut of their own
    p["rank"] = p["rank"][:2] + [{"first": 0, "last": 4}, {"first": 4, "last": 6}]
    p["prefill"] = 2
    with open(path, "w") as f:
        json.dump(p, f)
    rc, out, err = plan(s, "-m", st.DEMO, *box, "--plan", path)
    c.check("edited and explained", rc == 0 and "+ 2 ranks that only read prompts" in out, (rc, out, err))
    st.write_lines(s.file("e.jsonl"), requests)
    for style in ("plain", "json"):
        q = subprocess.run([st.shoal(), "run", "-m", st.DEMO, "-i", s.file("e.jsonl"), "-o", s.file(f"e.{style}"), "--plan", path, "--launcher",
                            "local", "--progress", style], capture_output=True, text=True, timeout=120, env=s.env(XDG_CACHE_HOME=s.file("nowhere")))
        c.check("edited plan runs", q.returncode == 0, q.stderr)
        if style == "plain":
            c.check("words", q.stderr.count("  measured ") == 4 and q.stderr.count("  predicted") == 5, q.stderr)
        else:
            end = [e for e in map(json.loads, q.stderr.splitlines()) if e["event"] == "end"][0]
            ranks = end["predicted"]["stages"]
            c.check("json", len(ranks) == 4 and end["predicted"]["seconds"] > 0 and ranks[3]["weights"] > 0, end)
    p["rank"][3]["first"] = 5
    with open(s.file("q.json"), "w") as f:
        json.dump(p, f)
    rc, _, err = plan(s, "-m", st.DEMO, *box, "--plan", s.file("q.json"))
    c.check("lost layer", rc == 2 and "must begin at layer 4" in err, (rc, err))
    rc, _, err = plan(s, "-m", st.DEMO, *box, "--prefill", 1, "--ep", 2)
    c.check("divided", rc == 2 and "prompts are handed over between stages of one rank" in err, (rc, err))


def beside_measured(c, s):
    requests = [st.completion(f"r{i}", list(range(5, 25)), max_tokens=8, temperature=0) for i in range(6)]
    st.write_lines(s.file("p.jsonl"), requests)
    for style in ("plain", "json"):
        p = subprocess.run([st.shoal(), "run", "-m", st.DEMO, "-i", s.file("p.jsonl"), "-o", s.file(f"p.{style}"), "-n", "2", "--launcher", "local",
                            "--progress", style], capture_output=True, text=True, timeout=120, env=s.env(XDG_CACHE_HOME=s.file("nowhere")))
        if style == "plain":
            c.check("words", p.stderr.count("  measured ") == 2 and p.stderr.count("  predicted") == 3 and "assumed speeds" in p.stderr, p.stderr)
        else:
            end = [e for e in map(json.loads, p.stderr.splitlines()) if e["event"] == "end"][0]
            c.check("json", len(end["predicted"]["stages"]) == 2 and end["predicted"]["assumed"] and end["predicted"]["seconds"] > 0, end)


def main():
    c = Named()
    with st.Scratch() as s:
        from_files(c, s)
        workloads(c, s)
        edited(c, s)
        quantized(c, s)
        prompts_apart(c, s)
        beside_measured(c, s)
        measured_once(c, s)
        c.check("nothing left behind", not st.left_behind(s), st.left_behind(s, 0))
    c.finish()


main()
