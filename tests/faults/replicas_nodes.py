#!/usr/bin/env python3
"""Two groups of two ranks on four nodes (network namespaces; needs root), MPI over TCP, `shoal run --hosts`: each group has nodes of
its own; a node that vanishes for good takes its group along and not the run, whose rows are those of one rank."""
import os
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import netns
import shoaltest as st

MODEL = os.path.join(st.MODELS, "e2b-like")
HOSTS = ["node0", "node1", "node2", "node3"]


def group_of(nodes, host):
    """Numbers of the groups whose ranks run on a node."""
    found = set()
    for p in nodes.processes(host):
        try:
            with open(f"/proc/{p}/cmdline", "rb") as f:
                args = f.read().split(b"\0")
            if args[0].endswith(b"shoal") and b"worker" in args:
                found.add(int(args[args.index(b"--group") + 1].split(b"-")[2]))
        except OSError:
            continue
    return found


def job(s, nodes, check):
    ids = [r["ids"] for r in st.golden("e2b-like")["greedy"]]
    req = [st.completion(f"r{k}", ids[k % len(ids)], max_tokens=250, temperature=0.9, seed=k, ignore_eos=True, return_token_ids=True)
           for k in range(80)]
    code, want, err = st.run(s, MODEL, req, "-n", 1, "--mode", "exact", name="want")
    check(code == 0, f"undisturbed: exit {code}: {err[-300:]}")
    inp, out = s.file("in.jsonl"), s.file("out.jsonl")
    st.write_lines(inp, req)
    cmd = [st.shoal(), "run", "-m", MODEL, "-i", inp, "-o", out, "-n", "2", "--replicas", "2", "--mode", "exact", "--max-seqs", "8",
           "--hosts", ",".join(HOSTS), "--progress", "plain"]
    p = subprocess.Popen(nodes.command("head", cmd), env=s.env(**nodes.environment()), stdout=subprocess.DEVNULL,
                         stderr=subprocess.PIPE, text=True)
    end, seen = time.time() + 60, None
    while time.time() < end and p.poll() is None:
        seen = [group_of(nodes, h) for h in HOSTS]
        if all(seen):
            break
        time.sleep(0.1)
    check(seen == [{1}, {1}, {2}, {2}], f"groups on {HOSTS}: {seen}")
    time.sleep(0.5)
    at_work = p.poll() is None
    check(at_work, "the run was over before a node vanished: more requests are needed")
    nodes.link("node3", False)
    t0 = time.time()
    try:
        _, err = p.communicate(timeout=150)
    except subprocess.TimeoutExpired:
        p.kill()
        err = "did not end"
    print(f"finished {time.time() - t0:.1f} s after the node vanished", flush=True)
    d = st.difference(want, st.rows(out)) if os.path.exists(out) else "no output"
    check(p.returncode == 0 and not d, f"a node vanished: exit {p.returncode}: {d} {err[-800:]}")
    check("ranks 4/4" in err, f"the progress line: {err[:600]}")
    nodes.link("node3", True)

    # a Slurm allocation, as the environment tells of it: its nodes are the hosts, and -n follows from them
    out = s.file("slurm.jsonl")
    cmd = [st.shoal(), "run", "-m", MODEL, "-i", inp, "-o", out, "--replicas", "2", "--mode", "exact", "--progress", "plain"]
    env = s.env(**nodes.environment(), SLURM_JOB_NODELIST="node[0-3]", SLURM_JOB_NUM_NODES="4")
    p = subprocess.run(nodes.command("head", cmd), env=env, capture_output=True, text=True, timeout=150)
    d = st.difference(want, st.rows(out)) if os.path.exists(out) else "no output"
    check(p.returncode == 0 and not d, f"allocation: exit {p.returncode}: {d} {p.stderr[-800:]}")
    if not os.path.exists("/sys/devices/system/node/node1"):  # one rank for each NUMA node of two nodes
        check("2 groups, each a pipeline of 2 stages" in p.stderr, f"allocation: {p.stderr[:400]}")


def main():
    check = st.Checks()
    with st.Scratch() as s:
        try:
            nodes = netns.Nodes(s.file("net"), 4)
        except netns.Unavailable as e:
            print("skipped:", e)
            sys.exit(77)
        try:
            job(s, nodes, check)
        finally:
            st.kill_all(s)
            nodes.down()
    check.finish()


main()
