#!/usr/bin/env python3
"""One long prompt over several ranks: tokens, log-probabilities of the answer and of every prompt token are those of one rank, and
ranks together hold a sequence that is too long for one of them alone.

usage: long_context.py [--tokens N] [--models a,b]"""
import argparse
import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import shoaltest as st


def prompt(n):
    return [20 + (i * 131 + i * i * 7) % 1900 for i in range(n)]


def requests(n):
    """Greedy and drawn answers to the prompt, its own score, and short ones beside it."""
    return [st.completion("greedy", prompt(n), max_tokens=6, temperature=0, logprobs=3, return_token_ids=True),
            st.completion("score", prompt(n), max_tokens=0, echo=True, logprobs=1, temperature=0),
            st.completion("half", prompt(n // 2 + 7), max_tokens=9, temperature=1, seed=5, return_token_ids=True),
            st.completion("short", prompt(40), max_tokens=20, temperature=1, seed=6, return_token_ids=True)]


def sum_of_members(s, check):
    """In bf16 this model has 640 bytes of sliding K/V per token, of which 4 pages of 32 tokens are needed with chunks of 64, and 64
    bytes of global V: 4,000 tokens need 82 kB and 256 kB. With 240,000 bytes a rank they fit on four ranks and not on one."""
    model, req = os.path.join(st.MODELS, "26b-a4b-sharded"), requests(3900)[:1]
    options = ("--max-context", 4000, "--max-seqs", 1, "--chunk", 64, "--kv-memory", 240000)
    code, got, err = st.run(s, model, req, "-n", 1, *options)
    error = (got.get("greedy") or {}).get("error") or {}
    check("can hold" in str(error), f"one rank: exit {code}, {error}: {err[-300:]}")
    code, got, err = st.run(s, model, req, "-n", 4, "--cp", 4, "--launcher", "local", *options)
    check(code == 0 and (got.get("greedy") or {}).get("error") is None, f"four ranks: exit {code}, {got}: {err[-300:]}")


def main():
    a = argparse.ArgumentParser()
    a.add_argument("--tokens", type=int, default=4000)
    a.add_argument("--models", default="26b-a4b-sharded,e2b-like")
    a = a.parse_args()
    check, limit = st.Checks(), 60 + a.tokens // 50
    with st.Scratch() as s:
        for name in a.models.split(","):
            model, req = os.path.join(st.MODELS, name), requests(a.tokens)

            def run(what, *options):
                t0 = time.time()
                code, got, err = st.run(s, model, req, "--max-context", a.tokens + 64, "--max-seqs", 4, *options, timeout=limit)
                print(f"{name} {what}: {time.time() - t0:.1f} s", flush=True)
                check(code == 0 and len(got) == len(req), f"{name} {what}: exit {code}: {err[-300:]}")
                return got

            want = run("1 rank", "-n", 1)
            check(all(r.get("error") is None for r in want.values()), f"{name}: the reference has errors")
            for what, options in (("4 MPI ranks", ("-n", 4, "--cp", 4)), ("2 × 2 local ranks", ("-n", 4, "--cp", 2, "--pp", 2, "--launcher", "local"))):
                check(not st.difference(want, run(what, *options)), f"{name} {what}: other rows")
        sum_of_members(s, check)
        left = st.left_behind(s)
        check(not left, f"left behind: {left}")
    check.finish()


main()
