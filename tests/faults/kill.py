#!/usr/bin/env python3
"""SIGKILL at random moments, of any process or of all at once; the same command again until it ends; the rows must equal those of
an undisturbed run, none missing, none twice, nothing left behind.

usage: kill.py [--kills N] [--seed S] [--ranks N] [--model NAME] [--options "--ep 2 --pp 2"]"""
import argparse
import os
import random
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import shoaltest as st


def requests(name, n, tokens):
    g = st.golden(name)
    out = []
    for k in range(n):
        body = {"max_tokens": tokens, "temperature": 0.8 if k % 2 else 0, "seed": k, "return_token_ids": True, "ignore_eos": k % 3 != 0}
        if k % 4 == 0:
            body["logprobs"] = 2
        if k % 5 == 0:
            body["stop"] = ["zzz", "the"]
        out.append(st.completion(f"r{k}", g["greedy"][k % len(g["greedy"])]["ids"], **body))
    return out


def main():
    a = argparse.ArgumentParser()
    a.add_argument("--kills", type=int, default=6)
    a.add_argument("--seed", type=int, default=1)
    a.add_argument("--ranks", type=int, default=3)
    a.add_argument("--model", default="e2b-like")
    a.add_argument("--requests", type=int, default=60)
    a.add_argument("--tokens", type=int, default=96)
    a.add_argument("--options", default="", help="of the run besides -n and --mode")
    a = a.parse_args()
    check, rnd = st.Checks(), random.Random(a.seed)
    with st.Scratch() as s:
        model, req = os.path.join(st.MODELS, a.model), requests(a.model, a.requests, a.tokens)
        options = ["-n", a.ranks, "--mode", "exact", *a.options.split()]
        t0 = time.time()
        code, want, err = st.run(s, model, req, *options, name="want")
        took = time.time() - t0
        check(code == 0 and len(want) == a.requests, f"undisturbed run: exit {code}, {len(want)} rows, {err[-300:]}")
        print(f"undisturbed: {took:.1f} s", flush=True)
        for k in range(a.kills):
            inp, out = s.file(f"k{k}.in.jsonl"), s.file(f"k{k}.out.jsonl")
            st.write_lines(inp, req)
            cmd = st.command(model, inp, out, *options)
            p = subprocess.Popen(cmd, env=s.env(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            time.sleep(rnd.uniform(0.1, max(1.0, took)))
            procs = st.children(p.pid) + [p.pid]
            victims = procs if k % 4 == 3 else [rnd.choice(procs)]
            st.kill(victims)
            try:
                _, err = p.communicate(timeout=120)
            except subprocess.TimeoutExpired:
                check(False, f"kill {k}: the run did not end after its process was killed")
                st.kill_all(s)
                continue
            tries = 0
            # A store that is still there says that the run was not finished, though its OUTPUT may be.
            while (not os.path.exists(out) or os.path.exists(out + ".store")) and tries < 4:
                tries += 1
                r = subprocess.run(cmd, env=s.env(), capture_output=True, text=True, timeout=180)
                err = r.stderr
            d = st.difference(want, st.rows(out)) if os.path.exists(out) else f"no output after {tries} tries: {err[-300:]}"
            check(not d, f"kill {k} ({len(victims)} of {len(procs)} processes): {d}")
            left = st.left_behind(s)
            check(not left, f"kill {k}: left behind: {left}")
            st.kill_all(s)
    check.finish()


main()
