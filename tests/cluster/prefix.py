#!/usr/bin/env python3
"""Sequences that begin alike share pages: the rows are those of a run in which each computes all of its prompt, over pipeline,
expert and head cuts, KV types, little KV and few sequences, equal and scored prompts among them; and prompts are computed
once: what the closing table and the progress lines count says how many tokens were not.

usage: prefix.py [--models a,b]"""
import argparse
import json
import os
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import shoaltest as st

LITTLE = {"e2b-like": 320, "26b-a4b-like": 800}  # KiB for which bf16 holds a few sequences
SYSTEM, N = 200, 16  # tokens of the common beginning; requests of a family


def ids(n, k):
    return [20 + (i * 131 + i * i * k + k) % 400 for i in range(n)]


def requests():
    """Two families, one of which parts again behind 100 tokens; equal prompts; a scored one."""
    out = []
    for k in range(N):
        other = {"temperature": 0.8 * (k % 3), "seed": k, "return_token_ids": True, "max_tokens": 3 + (k * 5) % 30}
        out.append(st.completion(f"a{k}", ids(SYSTEM, 1) + ids(5 + 7 * (k % 6), k + 2), **other))
        out.append(st.completion(f"b{k}", ids(70, 90) + ids(100, 91 + k % 3) + ids(9, k + 200), logprobs=k % 4, **other))
    out += [st.completion(f"equal{k}", ids(130, 7), temperature=1, seed=k, max_tokens=20, return_token_ids=True) for k in range(4)]
    out.append(st.completion("scored", ids(SYSTEM, 1) + ids(20, 5), max_tokens=3, echo=True, logprobs=1, temperature=0, return_token_ids=True))
    return out


def end_of(scratch, model, req, *options):
    """The closing object of a run, its last progress line and its closing table's text."""
    inp, out = scratch.file("p.in.jsonl"), scratch.file("p.out.jsonl")
    st.write_lines(inp, req)
    said = []
    for style in ("json", "plain"):
        for path in (out, out + ".store"):
            subprocess.run(["rm", "-rf", path])
        p = subprocess.run([st.shoal(), "run", "-m", model, "-i", inp, "-o", out, "--progress", style, *map(str, options)],
                           capture_output=True, text=True, env=scratch.env(), timeout=300)
        said.append(p.stderr)
    lines = [json.loads(x) for x in said[0].splitlines()]
    progress = [x for x in lines if x["event"] == "progress"]
    return next(x for x in lines if x["event"] == "end"), progress[-1], said[1]


def check_counts(check, scratch):
    """48 prompts of 200 + 20 tokens: the first computes all of its own, the others what lies behind the last full page."""
    req = [st.completion(f"c{k}", ids(SYSTEM, 1) + ids(20, k + 2), max_tokens=2, temperature=0) for k in range(48)]
    model, options = os.path.join(st.MODELS, "e2b-like"), ("-n", 1, "--max-seqs", 8)
    end, last, table = end_of(scratch, model, req, *options)
    want = 47 * (SYSTEM // 32 * 32)
    check(end["tokens_in"] == 48 * (SYSTEM + 20), f"tokens in: {end['tokens_in']}")
    check(end["tokens_shared"] == want, f"{end['tokens_shared']} tokens shared: {want} were expected")
    check(0 < last["tokens_shared"] <= want, f"progress: {last}")
    check(f"{want} tokens of prompts" in table, f"closing table: {table}")
    end, last, table = end_of(scratch, model, req, *options, "--no-prefix-sharing")
    check(end["tokens_shared"] == 0 and last["tokens_shared"] == 0 and "shared" not in table, f"not shared: {end}, {table}")
    end, _, _ = end_of(scratch, model, req, "-n", 2, "--cp", 2, "--launcher", "local")
    check(end["tokens_shared"] == 0, f"shared with --cp: {end}")


def check_rows(check, scratch, name, all_types):
    model, req = os.path.join(st.MODELS, name), requests()
    for kv in ("bf16", "f32", "q8") if all_types else ("bf16",):
        numbers = ("--kv", kv)
        little = ("--max-context", 512, "--kv-memory", f"{LITTLE[name] * (2 if kv == 'f32' else 1)}KiB")
        code, want, err = st.run(scratch, model, req, "-n", 1, "--no-prefix-sharing", *numbers)
        if not check(code == 0 and len(want) == len(req), f"{name} {kv}: exit {code}, {len(want)} rows: {err[-300:]}"):
            continue
        ways = [("3 sequences, chunk 64", ("-n", 1, "--max-seqs", 3, "--chunk", 64)), ("a cut, little KV", ("--pp", 2, *little))]
        if kv == "bf16":
            ways += [("as it comes", ("-n", 1)), ("heads", ("--tp", 2)), ("positions", ("--cp", 2)), ("ranks for prompts", ("--pp", 1, "--prefill", 1))]
            ways += [("experts", ("--ep", 2)), ("experts and a cut", ("--pp", 2, "--ep", 2))] if "26b" in name else []
        for what, o in ways:
            code, got, err = st.run(scratch, model, req, *numbers, *o, "--launcher", "local")
            d = st.difference(want, got)
            check(code == 0 and not d, f"{name} {kv} {what}: exit {code}; {d} {err[-300:] if code else ''}")


def main():
    a = argparse.ArgumentParser()
    a.add_argument("--models", default="e2b-like,26b-a4b-like")
    a = a.parse_args()
    check = st.Checks()
    with st.Scratch() as s:
        check_counts(check, s)
        for i, name in enumerate(a.models.split(",")):
            check_rows(check, s, name, i == 0)
        left = st.left_behind(s)
        check(not left, f"left behind: {left}")
    check.finish()


main()
