#!/usr/bin/env python3
"""Does the time of a step grow as the cost model says? `shoal bench` on two layers of 26B-A4B's shapes beside what the model says of the
same steps (build/release/tests/step_cost) with the speeds measured here: decode over sequences at once, decode and prompts over
tokens of context, and the experts that a step touches.

    build/release/tests/make_shape 26b-a4b /tmp/26b && build/release/shoal pack -m /tmp/26b -o /tmp/26b.q4 --mode q4
    chrt -r 1 tests/bench/cost.py measure /tmp/26b /tmp/26b.q4 steps.json [--only machine|batch|context] [--modes q4] [--kv q8] [--rounds 2]
    tests/bench/cost.py table steps.json;  tests/bench/cost.py plot steps.json > docs/cost/steps.svg

measure keeps what steps.json has of other parts. Minutes: batch 2, context 3."""
import argparse
import json
import os
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import plot_scaling as ps
import shoaltest as st

BATCHES, BEHIND = [1, 2, 4, 8, 16, 32, 64, 128, 256], 512
CONTEXTS, BESIDE = [1024, 2048, 4096, 8192, 16384, 32768], [1, 8]
CHUNK = 512
EXPERT = {"bf16": 2.0, "q4": 0.5625}  # bytes of a weight: 4 bits and a scale of 16 for each 32
STEP_COST = os.path.join(os.path.dirname(st.shoal()), "tests", "step_cost")


def bench(model, kv, batches, prompt, generate, rounds):
    p = subprocess.run([st.shoal(), "bench", "-m", model, "--kv", kv, "--prompt", str(prompt), "--batch", ",".join(map(str, batches)), "--generate",
                        str(generate), "--chunk", str(CHUNK), "--rounds", str(rounds), "--json"], capture_output=True, text=True, check=True)
    return json.loads(p.stdout)


def entry(b, d, prompt):
    """One line of a report: milliseconds, whole and by cause, and GB of weights."""
    ms = d.get("step_ms", d.get("ms"))
    e = {"mode": b["mode"], "batch": d.get("batch", 0), "context": prompt, "ms": ms, "best_ms": d.get("best_step_ms", d.get("best_ms"))}
    e.update({k: v * ms for k, v in d["time_share"].items()})
    if "weight_gbs" in d:
        e["weight_gb"] = d["weight_gbs"] * ms * 1e-3
    return e


def save(o, have):
    with open(o.file, "w") as f:
        json.dump(have, f, indent=1)


def measure(o):
    have = {}
    if os.path.exists(o.file):
        with open(o.file) as f:
            have = json.load(f)
    have["models"] = {"bf16": os.path.abspath(o.bf16), "q4": os.path.abspath(o.q4)}
    if have.setdefault("kv", o.kv) != o.kv:
        sys.exit(f"{o.file} has --kv {have['kv']}: a file has one")
    if o.only in (None, "machine"):
        path = o.file + ".machine"
        subprocess.run([st.shoal(), "plan", "-m", o.q4, "--probe", "--save-machine", path, "--brief"], stdout=subprocess.DEVNULL, check=True)
        with open(path) as f:
            have["machine"] = json.load(f)
        have["date"] = time.strftime("%Y-%m-%d")
        save(o, have)
    if o.only in (None, "batch"):
        for mode in o.modes.split(","):
            b = bench({"q4": o.q4, "bf16": o.bf16}[mode], o.kv, BATCHES, BEHIND, 24, o.rounds)
            have["batch"] = [e for e in have.get("batch", []) if e["mode"] != b["mode"]] + [entry(b, d, BEHIND) for d in b["decode"]]
            have.setdefault("limits", {})[b["mode"]] = b["limits"]
            save(o, have)
    if o.only in (None, "context"):
        new = [int(n) for n in o.contexts.split(",")]
        for part in ("decode", "prompt"):
            have[part] = [e for e in have.get(part, []) if e["context"] not in new]
        for n in new:
            b = bench(o.q4, o.kv, BESIDE, n, 16, 1)
            have["decode"] += [entry(b, d, n) for d in b["decode"]]
            have["prompt"].append(entry(b, b["prefill"], n))
            for part in ("decode", "prompt"):
                have[part].sort(key=lambda e: (e["batch"], e["context"]))
            save(o, have)


def modelled(o, have):
    """Beside each measured step what the model says of it; decode steps begin behind the prompt, the median one in the middle."""
    machine = o.file + ".machine"
    with open(machine, "w") as f:
        json.dump(have["machine"], f)
    for part, what in (("batch", lambda e: f"decode:{e['batch']}:{e['context'] + 12}"), ("decode", lambda e: f"decode:{e['batch']}:{e['context'] + 8}"),
                       ("prompt", lambda e: f"prompt:{CHUNK}:{e['context']}")):
        for mode in ("q4", "bf16"):
            these = [e for e in have.get(part, []) if e["mode"] == mode]
            if not these:
                continue
            p = subprocess.run([STEP_COST, have["models"][mode], machine, mode, have.get("kv", "bf16"), *map(what, these), "decode:1:1"], capture_output=True,
                               text=True, check=True)
            said = [json.loads(x) for x in p.stdout.splitlines()]
            with open(os.path.join(have["models"][mode], "config.json")) as f:
                c = json.load(f)
            c = c.get("text_config", c)
            expert = 3 * c["hidden_size"] * c["moe_intermediate_size"] * EXPERT[mode]
            for e, m in zip(these, said):
                e["model"] = m
                if "weight_gb" in e:
                    e["touched"] = (e["weight_gb"] - said[-1]["dense_gb"]) * 1e9 / expert / c["num_hidden_layers"]
    return have


def rows(name, these, key, more=()):
    print(f"| {name} | median ms | quickest | model ms | quickest to model | weights, ms | attention | experts | other |" + "".join(f" {m} |" for m in more))
    print("|---|---|---|---|---|---|---|---|---|" + "---|" * len(more))
    for e in these:
        m = e["model"]
        causes = " | ".join(f"{e[c]:.3g} ({m[c]:.3g})" for c in ("weights", "attention", "experts", "other"))
        print(f"| {key(e)} | {e['ms']:.4g} | {e['best_ms']:.4g} | {m['ms']:.4g} | {e['best_ms'] / m['ms']:.2f} | {causes} |"
              + (f" {e['touched']:.1f} ({m['touched']:.1f}) |" if more else ""))
    print()


def table(have):
    node = have["machine"]["node"][0]
    print(f"{have['date']}, {node['cpu']}, {node['cores']} cores, reading {node['read_gbs']:.1f} GB/s, {node['fma_gflops']:.0f} GFLOP/s; {have['machine']['kernels']}\n"
          f"bench's own limits: {have.get('limits')}\n\nIn brackets: the model.\n")
    for mode in ("q4", "bf16"):
        these = [e for e in have["batch"] if e["mode"] == mode]
        if these:
            rows(f"{mode}, {BEHIND} tokens, sequences", these, lambda e: e["batch"], ["experts of a layer"])
    if have.get("decode"):
        rows("q4, tokens, sequences", have["decode"], lambda e: f"{e['context']}, {e['batch']}")
        rows("q4, prompt", have["prompt"], lambda e: e["context"])


def thousands(v):
    return str(v) if v < 1024 else f"{v // 1024}k"


def panel(left, width, curves, label_y, title, label_x):
    """curves: name → (colour, mark, [(x, measured)], [(x, model)]): marks are measured, lines the model's."""
    xs = [x for _, _, a, _ in curves.values() for x, _ in a]
    ys = [y for _, _, a, b in curves.values() for _, y in a + b]
    axes = ps.Axes(left, width, (min(xs), max(xs)), (min(ys) * 0.8, max(ys) * 1.25), True)
    out = ps.frame(axes, ps.decades(*axes.y), label_y, title, label_x, thousands)
    y = ps.TOP + 10
    for name, (colour, kind, measured, model) in curves.items():
        path = " ".join(f"{axes.px(x):.1f},{axes.py(v):.1f}" for x, v in model)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        out += [ps.mark(axes.px(x), axes.py(v), kind, colour) for x, v in measured]
        out += [ps.mark(left + 14, y, kind, colour), ps.text(left + 24, y + 4.5, name, 12, "start")]
        y += 17
    return out


def points(these, key, what):
    """Quickest steps where it is about time: other work on the machine can only add."""
    return [(e[key], e["best_ms" if what == "ms" else what]) for e in these], [(e[key], e["model"][what]) for e in these]


def plot(have):
    of = lambda part, **want: [e for e in have[part] if all(e[k] == v for k, v in want.items())]
    blue, red, green, black = "#0072b2", "#d55e00", "#009e73", "#000000"
    contexts = bool(have.get("decode"))
    width, node = 1500 if contexts else 780, have["machine"]["node"][0]
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {ps.HEIGHT}" font-family="DejaVu Sans, Helvetica, Arial, sans-serif" fill="#222222">',
           f'<rect width="{width}" height="{ps.HEIGHT}" fill="#ffffff"/>',
           ps.text(40, 24, "Steps of two layers of 26B-A4B: quickest measured (marks), cost model (lines)", 15, "start", 'font-weight="bold"'),
           ps.text(40, 46, f"{have['date']}, {node['cpu']}, {node['cores']} cores: reading {node['read_gbs']:.0f} GB/s, {node['fma_gflops']:.0f} GFLOP/s", 12, "start")]
    bf16, q4 = of("batch", mode="bf16"), of("batch", mode="q4")
    curves = {"q4": (red, "circle", *points(q4, "batch", "ms"))}
    if bf16:
        curves["bf16"] = (blue, "square", *points(bf16, "batch", "ms"))
    out += panel(80, 290, curves, "ms of a decode step", f"Batch, behind {BEHIND} tokens", "sequences at once")
    out += panel(460, 290, {"q4": (red, "circle", *points(q4, "batch", "touched"))}, "experts of a layer that a step reads, of 128", "Experts touched",
                 "sequences at once")
    if contexts:
        out += panel(830, 290, {f"{n} at once" if n > 1 else "one sequence": (c, k, *points(of("decode", batch=n), "context", "ms"))
                                for n, c, k in zip(BESIDE, (green, black), ("up", "diamond"))}, "ms of a decode step", "Context, decode in q4", "tokens of each sequence")
        out += panel(1200, 280, {f"chunks of {CHUNK}": (red, "circle", *points(have["prompt"], "context", "ms"))}, "ms of the prompt", "Context, a prompt in q4", "tokens")
    print("\n".join(out + ["</svg>"]))


def main():
    a = argparse.ArgumentParser()
    sub = a.add_subparsers(dest="do", required=True)
    m = sub.add_parser("measure")
    m.add_argument("bf16")
    m.add_argument("q4")
    m.add_argument("file")
    m.add_argument("--only", choices=["machine", "batch", "context"])
    m.add_argument("--modes", default="q4,bf16", help="of batch")
    m.add_argument("--kv", default="bf16", help="type of the KV cache")
    m.add_argument("--rounds", type=int, default=3, help="of batch")
    m.add_argument("--contexts", default=",".join(map(str, CONTEXTS)))
    for name in ("table", "plot"):
        sub.add_parser(name).add_argument("file")
    o = a.parse_args()
    if o.do == "measure":
        measure(o)
        return
    with open(o.file) as f:
        have = json.load(f)
    {"table": table, "plot": plot}[o.do](modelled(o, have))


if __name__ == "__main__":
    main()
