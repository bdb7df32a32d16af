#!/usr/bin/env python3
"""Experts on several ranks, from outside: the rows of one rank for --ep 2, 3, 4, 5 and 8, with pipelines and replicas, on the local
link and on MPI, with experts placed by the counts of an earlier run and hot ones copied. Counts that were saved are those of the
rows. --nodes: this and every other way of dividing a model on virtual nodes, MPI over TCP with 1 ms between them (needs root and iproute2)."""
import json
import os
import re
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import netns
import shoaltest as st

MODEL = os.path.join(st.MODELS, "26b-a4b-like")
EXPERTS, TOP_K, LAYERS = 16, 4, 12


def requests(n):
    g = st.golden("26b-a4b-like")
    prompts = [c["ids"] for c in g["greedy"]] + [f["ids"] for f in g["forward"]]
    return [st.completion(f"q{k}", prompts[k % len(prompts)], max_tokens=4 + k % 13, temperature=(k % 3) * 0.6, seed=k,
                          return_token_ids=True, **({"logprobs": k % 5} if k % 2 else {})) for k in range(n)]


def counts(path):
    with open(path) as f:
        d = json.load(f)
    return d["experts"], {int(k): v for k, v in d["layers"].items()}


def on_this_machine(s, check):
    req = requests(28)
    code, want, err = st.run(s, MODEL, req, "-n", 1, "--no-prefix-sharing", "--save-routing", s.file("one.json"))
    if not check(code == 0 and len(want) == len(req), f"one rank: exit {code}: {err[-300:]}"):
        return

    def same(what, *options):
        c, got, e = st.run(s, MODEL, req, *options)
        d = st.difference(want, got)
        check(c == 0 and not d, f"{what}: exit {c}; {d} {e[-300:] if c else ''}")
        return e

    experts, one = counts(s.file("one.json"))
    rows = sum(one[0]) // TOP_K
    check(experts == EXPERTS and sorted(one) == list(range(LAYERS)), f"counts of layers {sorted(one)}")
    check(all(sum(v) == rows * TOP_K for v in one.values()), "every row chooses as many experts in each layer")
    for ep in (3, 4, 5, 8):
        same(f"--ep {ep}, local", "--ep", ep, "--launcher", "local")
    same("--ep 2, MPI", "--ep", 2, "--no-prefix-sharing", "--save-routing", s.file("two.json"))  # only what is computed is counted
    check(counts(s.file("two.json")) == (experts, one), "two ranks count what one does")
    same("--ep 4, MPI, small steps", "--ep", 4, "--chunk", 12, "--max-seqs", 5)
    same("--pp 2 --ep 2, MPI", "--pp", 2, "--ep", 2)
    same("--pp 3 --ep 3, local", "--pp", 3, "--ep", 3, "--launcher", "local")
    same("2 replicas of --ep 2, MPI", "--replicas", 2, "--ep", 2)
    same("--ep 4 by counts", "--ep", 4, "--launcher", "local", "--routing", s.file("one.json"))
    same("--ep 3 by counts with copies, MPI", "--ep", 3, "--routing", s.file("one.json"), "--replicate", "2MiB")
    same("few rows, many ranks", "--ep", 8, "--launcher", "local", "--max-seqs", 1)
    planned(s, check, same)
    refused(s, check, req)


def planned(s, check, same):
    """A plan that says from how many rows on steps are cut into parts that overlap."""
    p = subprocess.run([st.shoal(), "plan", "-m", MODEL, "-n", "3", "--ep", "3", "-o", s.file("plan.json")], env=s.env(), capture_output=True, text=True)
    if not check(p.returncode == 0, f"plan: exit {p.returncode}: {p.stderr[-300:]}"):
        return
    with open(s.file("plan.json")) as f:
        plan = json.load(f)
    for rows in (1, 12000):
        plan["split_rows"] = rows
        with open(s.file("plan.json"), "w") as f:
            json.dump(plan, f)
        err = same(f"steps of {rows} rows and more are cut", "--plan", s.file("plan.json"), "--launcher", "local", "--progress", "plain")
        check("  experts    busiest rank " in err, f"the closing table tells of the exchange: {err[-1500:]}")
    plan["split_rows"] = -1
    with open(s.file("plan.json"), "w") as f:
        json.dump(plan, f)
    p = subprocess.run([st.shoal(), "plan", "-m", MODEL, "--plan", s.file("plan.json")], env=s.env(), capture_output=True, text=True)
    check(p.returncode != 0 and "split_rows: -1 is out of range" in p.stderr, f"split_rows -1: exit {p.returncode}: {p.stderr[-300:]}")


def refused(s, check, req):
    """Bad usage, said before anything is started."""
    for options, text in ((("--ep", 17), "--ep: 17: the model has 16 experts"), (("--replicate", "1MiB", "--ep", 2), "give --routing too"),
                          (("--routing", s.file("one.json")), "give --ep too"), (("--routing", s.file("none"), "--ep", 2), "none")):
        code, _, err = st.run(s, MODEL, req, *options)
        check(code in (2, 3) and text in err, f"{options}: exit {code}: {err[-300:]}")
    code, _, err = st.run(s, os.path.join(st.MODELS, "e2b-like"), req, "--save-routing", s.file("x"))
    check(code == 2 and "no experts" in err, f"--save-routing without experts: exit {code}: {err[-300:]}")


def hot(s, check):
    """Counts that say that one expert takes half the rows: with copies the plan is in balance, and so is what happens when it is so."""
    with open(s.file("hot.json"), "w") as f:
        json.dump({"experts": EXPERTS, "layers": {str(k): [EXPERTS * 100 if e == 3 else 100 for e in range(EXPERTS)] for k in range(LAYERS)}}, f)
    req = requests(8)
    st.write_lines(s.file("hot.jsonl"), req)
    cmd = [st.shoal(), "run", "-m", MODEL, "-i", s.file("hot.jsonl"), "-o", s.file("hot.out"), "--progress", "plain", "--ep", "4",
           "--launcher", "local", "--routing", s.file("hot.json"), "--replicate", "4MiB"]
    p = subprocess.run(cmd, env=s.env(), capture_output=True, text=True)
    m = re.search(r"experts by counts, (\d+) copies: busiest rank ([\d.]+) of the mean, ([\d.]+) with even shares", p.stderr)
    check(p.returncode == 0 and m, f"one hot expert: exit {p.returncode}: {p.stderr[-500:]}")
    if m:
        check(float(m[2]) <= 1.25 < float(m[3]) and int(m[1]) > 0, f"busiest rank {m[2]}, {m[3]} before, {m[1]} copies")
    check("experts    busiest rank" in p.stderr, "the closing table tells how evenly the work lay")


def round_trip(nodes):
    """Seconds from node0 to node1 and back, the best of some."""
    echo = "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('', 7)); print(flush=True)\nwhile True: m, a = s.recvfrom(9); s.sendto(m, a)"
    ask = ("import socket, time; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); t = []\nfor k in range(20):\n t0 = time.time(); "
           "s.sendto(b'x', ('node1', 7)); s.recv(9); t.append(time.time() - t0)\nprint(min(t))")
    p = subprocess.Popen(nodes.command("node1", [sys.executable, "-c", echo]), stdout=subprocess.PIPE)
    p.stdout.readline()
    try:
        return float(subprocess.run(nodes.command("node0", [sys.executable, "-c", ask]), capture_output=True, text=True, timeout=20).stdout)
    finally:
        p.kill()
        p.wait()


def on_nodes(s, check):
    req = requests(20)
    code, want, err = st.run(s, MODEL, req, "-n", 1)
    check(code == 0, f"one rank: exit {code}: {err[-300:]}")
    try:
        nodes = netns.Nodes(s.file("net"), 3, delay=1e-3)
    except netns.Unavailable as e:
        print("skipped:", e)
        sys.exit(77)
    try:
        check(round_trip(nodes) >= 2e-3, "the delay between the nodes takes effect")
        st.write_lines(s.file("in.jsonl"), req)
        # the other ways of dividing a model too: nowhere else do their messages meet a real network
        for slots, options in ((1, ["--ep", "3"]), (2, ["--pp", "2", "--ep", "3"]), (1, ["--cp", "3"]), (2, ["--pp", "3", "--tp", "2"]),
                               (1, ["--pp", "2", "--prefill", "1"]), (1, ["--cp", "3", "--share-weights"]), (1, ["--ep", "3", "--share-weights"])):
            out = s.file("".join(options) + ".jsonl")
            cmd = [st.shoal(), "run", "-m", MODEL, "-i", s.file("in.jsonl"), "-o", out, "--progress", "json", "--threads", "1",
                   "--hosts", ",".join(f"node{k}:{slots}" for k in range(3)), *options]
            p = subprocess.run(nodes.command("head", cmd), env={**s.env(), **nodes.environment()}, capture_output=True, text=True)
            d = st.difference(want, st.rows(out)) if p.returncode == 0 else p.stderr[-800:]
            check(p.returncode == 0 and not d, f"virtual nodes, {' '.join(options)}: exit {p.returncode}; {d}")
            if "--ep" in options:
                tell(p.stderr)
    finally:
        st.kill_all(s)
        nodes.down()


def tell(text):
    for line in text.splitlines():
        if '"event":"end"' not in line:
            continue
        e = json.loads(line)
        exposed = sum(x["exposed_sliding"] + x["exposed_global"] for x in e["stages"])
        travel = sum(x["travel_sliding"] + x["travel_global"] for x in e["stages"])
        sent = sum(x["sent_experts"] for x in e["stages"])
        print(f"{len(e['stages'])} ranks, 1 ms apart: {e['seconds_at_work']:.1f} s at work, exchanges {travel:.1f} s, waited {exposed:.1f} s, "
              f"{sent / 1e6:.1f} MB")


def main():
    check = st.Checks()
    with st.Scratch() as s:
        if "--nodes" in sys.argv:
            on_nodes(s, check)
        else:
            on_this_machine(s, check)
            hot(s, check)
        left = st.left_behind(s)
        check(not left, f"left behind: {left}")
    check.finish()


main()
