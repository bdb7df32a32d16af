#!/usr/bin/env python3
"""What a common beginning of prompts costs, with its pages shared and without: runs of N requests that begin with the same tokens,
in turn, and the seconds in which the ranks were at work. All rows must be equal.

usage: prefix.py [-m MODEL] [--requests N] [--system TOKENS] [--own TOKENS] [--output TOKENS] [--repeat R] [-- OPTIONS OF RUN]"""
import argparse
import json
import os
import statistics
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import shoaltest as st


def main():
    a = argparse.ArgumentParser()
    a.add_argument("-m", "--model", default=st.DEMO)
    for name, n in (("requests", 1000), ("system", 1000), ("own", 30), ("output", 16), ("repeat", 3)):
        a.add_argument("--" + name, type=int, default=n)
    a.add_argument("rest", nargs="*")
    a = a.parse_args()
    ids = lambda n, k: [100 + (i * 131 + i * i * k + k * 7) % 2900 for i in range(n)]
    req = [st.completion(f"r{k}", ids(a.system, 1) + ids(a.own, k + 2), max_tokens=a.output, ignore_eos=True, temperature=0)
           for k in range(a.requests)]
    with st.Scratch() as s:
        inp, out = s.file("in.jsonl"), s.file("out.jsonl")
        st.write_lines(inp, req)
        seen, first = {True: [], False: []}, None
        for _ in range(a.repeat):
            for shared in (True, False):
                subprocess.run(["rm", "-rf", out, out + ".store"])
                p = subprocess.run([st.shoal(), "run", "-m", a.model, "-i", inp, "-o", out, "--progress", "json", "-n", "1",
                                    *([] if shared else ["--no-prefix-sharing"]), *a.rest], capture_output=True, text=True, env=s.env())
                if p.returncode:
                    sys.exit(p.stderr)
                end = next(x for x in map(json.loads, p.stderr.splitlines()) if x["event"] == "end")
                seen[shared].append((end["seconds_at_work"], end["tokens_shared"], end["tokens_in"]))
                rows = st.rows(out)
                first = first or rows
                if st.difference(first, rows):
                    sys.exit(f"rows differ: {st.difference(first, rows)}")
                print(f"{'shared' if shared else 'each its own':12}  {seen[shared][-1][0]:8.2f} s  {seen[shared][-1][1]} of {seen[shared][-1][2]} prompt tokens shared", flush=True)
        with_, without = (statistics.median(x[0] for x in seen[k]) for k in (True, False))
        print(f"medians of {a.repeat}: {with_:.2f} s shared, {without:.2f} s each its own: {without / with_:.1f} times")


main()
