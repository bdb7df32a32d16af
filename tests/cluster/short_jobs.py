#!/usr/bin/env python3
"""Jobs of a moment: nothing is missing from their first line, closing table, timeline and counts of experts, though they end before
any heartbeat is due, and nobody waits for one."""
import json
import os
import statistics
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import shoaltest as st

RUNS = 9
MODEL = os.path.join(st.MODELS, "26b-a4b-like")


def run(s, inp, *options):
    """Seconds, exit status and standard error of one job."""
    out = s.file("out.jsonl")
    if os.path.exists(out):
        os.remove(out)
    t = time.time()
    p = subprocess.run([st.shoal(), "run", "-m", MODEL, "-i", inp, "-o", out, *map(str, options)], env=s.env(), capture_output=True,
                       text=True, timeout=60)
    return time.time() - t, p.returncode, p.stderr


def main():
    check = st.Checks()
    config = json.load(open(os.path.join(MODEL, "config.json")))
    top_k, layers = (config.get("text_config", config)[k] for k in ("top_k_experts", "num_hidden_layers"))
    with st.Scratch() as s:
        inp = s.file("in.jsonl")
        st.write_lines(inp, [st.completion("a", [2, 5, 7], max_tokens=1)])
        silent, shown, complete = [], [], 0
        for _ in range(RUNS):
            silent.append(run(s, inp, "-n", 1, "--progress", "none")[0])
            took, code, err = run(s, inp, "-n", 1, "--progress", "json")
            shown.append(took)
            events = [json.loads(line) for line in err.splitlines()]
            end = events[-1]
            told = any(e["event"] == "start" for e in events)
            complete += code == 0 and told and "load" in end and [x["steps"] for x in end["stages"]] == [1] and end["seconds_at_work"] > 0
        check(complete == RUNS, f"{complete} of {RUNS} jobs of one token had first line, load, time at work and stage times: {err}")
        waited = statistics.median(shown) - statistics.median(silent)
        check(waited < 0.7, f"a job with progress took {waited:.2f} s longer than one without: {shown}, {silent}")

        # Every step and every choice is told, and the run does not wait for heartbeats to be due.
        n = 12
        st.write_lines(inp, [st.completion(f"r{k}", [2, 5 + k, 7, 9], max_tokens=4, ignore_eos=True) for k in range(n)])
        trace, counts, took, plain = s.file("trace.json"), s.file("counts.json"), [], []
        for _ in range(3):
            plain.append(run(s, inp, "-n", 2, "--progress", "none", "--no-prefix-sharing")[0])
            t, code, err = run(s, inp, "-n", 2, "--progress", "json", "--no-prefix-sharing", "--trace", trace, "--trace-steps",
                               "0:100000", "--save-routing", counts)
            took.append(t)
            check(code == 0, f"with --trace and --save-routing: exit {code}: {err[-300:]}")
            if code != 0:
                break
            end = json.loads(err.splitlines()[-1])
            steps = {}
            for e in json.load(open(trace))["traceEvents"]:
                if e.get("ph") == "X" and e["name"].startswith("step"):
                    steps[e["tid"]] = steps.get(e["tid"], 0) + 1
            table = {x["rank"]: x["steps"] for x in end["stages"]}
            check(steps == table and len(steps) == 2, f"steps in the timeline {steps}, in the closing table {table}")
            chosen = {k: sum(v) for k, v in json.load(open(counts))["layers"].items()}
            rows = n * (4 + 4 - 1)  # the last token of each is not computed with
            check(chosen.get("0") == rows * top_k, f"experts of layer 0 were chosen {chosen.get('0')} times, not {rows * top_k}")
            check(len(chosen) == layers, f"counts of {len(chosen)} of {layers} layers")
        waited = statistics.median(took) - statistics.median(plain)
        check(waited < 2, f"a job with --trace and --save-routing took {waited:.2f} s longer than one without: {took}, {plain}")
        print(f"progress costs a short job {statistics.median(shown) - statistics.median(silent):.2f} s, trace and counts {waited:.2f} s")
    check.finish()


main()
