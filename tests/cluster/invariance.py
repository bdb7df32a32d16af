#!/usr/bin/env python3
"""The promise of equal bytes, from outside: 40 mixed requests (greedy and drawn, log-probabilities, stop strings, seeds, long
and short prompts, scoring) give the same rows for every number of ranks, every cut, batch size, chunk, thread count, instruction
set and transport, with and without ranks that read prompts for the others. Each dimension alone, then seeded combinations. With --cp
instead: for these numbers of ranks that share positions out in each stage, with long prompts among the requests. With --few: every way of
dividing once, and chunks.

usage: invariance.py [--long | --few] [--combinations N] [--seed S] [--models a,b] [--cp 2,4] [--mode M] [--kv TYPE]"""
import argparse
import os
import random
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import shoaltest as st


def requests(name, n=40):
    g = st.golden(name)
    prompts = [c["ids"] for c in g["greedy"]] + [f["ids"] for f in g["forward"]]
    out = []
    for k in range(n):
        p = prompts[k % len(prompts)]
        p = p[: 1 + (k * 7) % len(p)] if k % 5 == 4 else p
        body = {"max_tokens": 3 + (k * 5) % 22, "return_token_ids": True, "temperature": 0 if k % 3 == 0 else 0.7 + 0.1 * (k % 4)}
        if k % 2:
            body["seed"] = k
        if k % 4 == 1:
            body["logprobs"] = k % 6
        if k % 6 == 2:
            body["stop"] = ["a", "the", "\n"]
        if k % 7 == 3:
            body.update(top_p=0.9, top_k=(k % 3) * 20)
        if k % 9 == 5:
            body.update(ignore_eos=True, min_tokens=4 if body["max_tokens"] >= 4 else 0)
        if k % 13 == 7:
            body.update(max_tokens=0, echo=True, logprobs=1, temperature=0)
        if k % 11 == 6:
            body["min_p"] = 0.05
        out.append(st.completion(f"q{k}", p, **body))
    return out


def long_requests():
    """Prompts of several blocks, so that every rank stores some of each."""
    ids = lambda n, k: [20 + (i * 131 + i * i * k) % 1900 for i in range(n)]
    return [st.completion(f"long{k}", ids(260 + 190 * k, k + 3), max_tokens=8 + k, temperature=k % 2, seed=k, logprobs=2, return_token_ids=True)
            for k in range(6)] + [st.completion("score", ids(700, 11), max_tokens=0, echo=True, logprobs=1, temperature=0)]


def check_cp(same, members, first):
    for cp in members:
        for pp in (1, 2) if cp == members[0] else (1,):
            o = ("-n", cp * pp, "--cp", cp, "--pp", pp)
            same(f"cp {cp}, {pp} stages, MPI", *o) if first else None
            same(f"cp {cp}, {pp} stages, local", *o, "--launcher", "local")
        o = ("-n", cp, "--cp", cp, "--launcher", "local")
        same(f"cp {cp}, chunk 7, 3 sequences", *o, "--chunk", 7, "--max-seqs", 3)
        same(f"cp {cp}, chunk 100, little KV", *o, "--chunk", 100, "--kv-memory", "768KiB", "--max-context", 2048)
        same(f"cp {cp}, two threads", *o, "--threads", 2)


def check_few(same, experts):
    ways = [("cut", ("--pp", 2)), ("heads", ("--tp", 2)), ("positions", ("--cp", 2)), ("heads and a cut", ("--pp", 2, "--tp", 2)),
            ("a rank for prompts", ("--pp", 1, "--prefill", 1))]
    ways += [("experts", ("--ep", 2))] if experts else []
    for what, o in ways:
        same(what, *o, "--launcher", "local", "--chunk", 16)
    same("chunk 7, 3 sequences", "-n", 1, "--chunk", 7, "--max-seqs", 3)
    same("plain C", "-n", 1, SHOAL_ISA="ref")


def isa_levels():
    text = subprocess.run([st.shoal(), "--version"], capture_output=True, text=True).stdout
    return [i for i in ("ref", "avx2", "avxvnni", "avx512", "avx512vnni") if i in text]


def layers(name):
    import json
    with open(os.path.join(st.MODELS, name, "config.json")) as f:
        c = json.load(f)
    return c.get("text_config", c)["num_hidden_layers"]


def has_experts(name):
    return name.startswith("26b")


def main():
    a = argparse.ArgumentParser()
    a.add_argument("--long", action="store_true")
    a.add_argument("--combinations", type=int, default=0)
    a.add_argument("--seed", type=int, default=1)
    a.add_argument("--models", default="e2b-like,26b-a4b-like")
    a.add_argument("--mode", default="bf16")
    a.add_argument("--kv", default="")
    a.add_argument("--cp", default="")
    a.add_argument("--few", action="store_true")
    a = a.parse_args()
    combos = a.combinations or (150 if a.long else 30)
    check, rnd = st.Checks(), random.Random(a.seed)
    models = a.models.split(",") if not a.long else ["e2b-like", "e4b-like", "31b-like", "26b-a4b-like", "26b-a4b-sharded"]
    with st.Scratch() as s:
        for name in models:
            model, req, n_layers = os.path.join(st.MODELS, name), requests(name) + (long_requests() if a.cp else []), layers(name)
            numbers = ["--mode", a.mode] + (["--kv", a.kv] if a.kv else [])
            code, want, err = st.run(s, model, req, "-n", 1, *numbers)
            if not check(code == 0 and len(want) == len(req), f"{name}: reference run: exit {code}, {len(want)} rows: {err[-300:]}"):
                continue

            def same(what, *options, **env):
                c, got, e = st.run(s, model, req, *numbers, *options, env=s.env(**env))
                d = st.difference(want, got)
                check(c == 0 and not d, f"{name} {what}: exit {c}; {d} {e[-200:] if c else ''}")

            first = name == models[0]
            if a.few:
                check_few(same, has_experts(name))
                continue
            if a.cp:
                check_cp(same, [int(c) for c in a.cp.split(",")], first or a.long)
                continue
            for n in (2, 3, 4, 6):
                same(f"{n} MPI ranks", "-n", n) if first or n == 3 or a.long else None
                same(f"{n} local ranks", "-n", n, "--launcher", "local")
            for pp, prefill in ((1, 1), (2, 2)):
                same(f"{prefill} ranks for prompts, MPI", "--pp", pp, "--prefill", prefill) if first or prefill == 1 or a.long else None
                same(f"{prefill} ranks for prompts, local", "--pp", pp, "--prefill", prefill, "--launcher", "local", "--chunk", 16)
            if first or a.long:  # every legal cut of two stages, then one layer per rank
                for c in range(1, n_layers):
                    same(f"cut {c}", "-n", 2, "--launcher", "local", "--cuts", c)
                same("a layer per rank", "-n", n_layers, "--launcher", "local")
            for pp, tp in ((1, 2), (1, 4), (2, 2)) + (((1, 8), (3, 4)) if a.long and name == "31b-like" else ()):
                same(f"{pp} stages of {tp} local ranks by heads", "--pp", pp, "--tp", tp, "--launcher", "local", "--chunk", 9 * tp)
            for pp, ep in ((1, 2), (1, 5), (2, 2)) + (((1, 3), (1, 8), (3, 4)) if a.long else ()):
                if has_experts(name):
                    same(f"{pp} stages of {ep} local ranks by experts", "--pp", pp, "--ep", ep, "--launcher", "local", "--chunk", 9 * ep)
            same("2 stages of 2 MPI ranks by experts", "--pp", 2, "--ep", 2) if has_experts(name) else None
            same("2 stages of 2 MPI ranks by heads", "--pp", 2, "--tp", 2) if first or a.long else None
            if first or a.long:  # few sequences at once, so that every group gets some
                same("2 groups of 2 ranks", "-n", 2, "--replicas", 2, "--max-seqs", 4)
                same("3 groups of a rank", "-n", 1, "--replicas", 3, "--max-seqs", 4)
            if "a4b" in name:
                same("2 groups of 2 ranks by experts", "--ep", 2, "--replicas", 2, "--max-seqs", 4)
            for m in ((1, 2, 7, 16, 40) if first else (1, 40)):
                same(f"--max-seqs {m}", "-n", 1, "--max-seqs", m)
            for c in (1, 7, 64):
                same(f"--chunk {c}", "-n", 1, "--chunk", c)
            for t in (1, 2):
                same(f"--threads {t}", "-n", 1, "--threads", t)
            for isa in isa_levels():
                same(f"SHOAL_ISA={isa}", "-n", 1, SHOAL_ISA=isa)
            for k in range(combos // len(models)):
                ranks = rnd.choice([1, 2, 3, 4, 6])
                prefill = rnd.choice([0, 0, 1, 2]) if ranks < 6 else 0
                o = ["-n", ranks + prefill, *(["--prefill", prefill] if prefill else []), "--max-seqs", rnd.choice([1, 2, 3, 5, 8, 16, 40]), "--chunk", rnd.choice([1, 3, 7, 16, 64, 512]),
                     "--threads", rnd.choice([1, 1, 2])]
                if rnd.random() < 0.7:
                    o += ["--launcher", "local"]
                if ranks > 1 and rnd.random() < 0.7:
                    o += ["--cuts", ",".join(map(str, sorted(rnd.sample(range(1, n_layers), ranks - 1))))]
                if rnd.random() < 0.3:
                    o += ["--kv-memory", rnd.choice(["512KiB", "1MiB", "2MiB"])]
                same(f"combination {k}: {' '.join(map(str, o))}", *o, SHOAL_ISA=rnd.choice(isa_levels()))
        left = st.left_behind(s)
        check(not left, f"left behind: {left}")
    check.finish()


main()
