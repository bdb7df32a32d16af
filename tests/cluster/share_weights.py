#!/usr/bin/env python3
"""--share-weights, from outside: rows are those of one rank, on threads and over MPI, for every way of dividing a model; the load report
says that all ranks together read what one rank reads, and less than without it; GGUF is shared alike; a damaged checkpoint is refused with the text that it
has without it; a rank that is killed while it loads ends in a new start and the same rows; with a packed folder one sentence says that
it does nothing."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "golden"))
import make_gguf
import shoaltest as st

MODEL = os.path.join(st.MODELS, "26b-a4b-like")
LAYOUTS = (("--ep", 2), ("--tp", 2), ("--cp", 2), ("--pp", 2, "--ep", 2), ("--pp", 2, "--prefill", 1))


def requests(n):
    prompts = [c["ids"] for c in st.golden("26b-a4b-like")["greedy"]]
    return [st.completion(f"q{k}", prompts[k % len(prompts)], max_tokens=3 + k % 8, temperature=(k % 3) * 0.6, seed=k, return_token_ids=True,
                          **({"logprobs": k % 5} if k % 2 else {})) for k in range(n)]


def run(s, model, req, *options, name="r"):
    """Exit status, rows, standard error, and the load report of the end: of all, and of each rank."""
    for _ in range(5):  # a run of a moment may end before its ranks have told the coordinator how they loaded
        code, rows, err = st.run(s, model, req, *options, "--progress", "json", name=name)
        end = [json.loads(t) for t in err.splitlines() if t.startswith("{") and '"event":"end"' in t]
        if code or (end and "load" in end[-1] and all(x["load"]["seconds"] > 0 for x in end[-1]["stages"])):
            break
    load = end[-1].get("load", {}) if end else {}
    return code, rows, err, dict({"file_bytes": -1, "received_bytes": -1}, **load), ([x["load"] for x in end[-1]["stages"]] if end else [])


def equal_rows(s, check, pool):
    """The jobs of this, begun: most of their time is waiting for a rank's next report."""
    req, jobs = requests(12), []
    for mode in ("bf16", "q4"):
        code, want, err, one, _ = run(s, MODEL, req, "-n", 1, "--mode", mode, "--share-weights")
        check(code == 0 and len(want) == len(req) and one["received_bytes"] == 0, f"{mode}: one rank: exit {code}: {err[-300:]}")
        for layout in LAYOUTS:
            for link in (("--launcher", "local"), ()):
                if (mode == "bf16") == bool(link) and not os.environ.get("SHOAL_LONG"):
                    continue  # each layout over MPI once and over threads once; the long tier has all four
                jobs.append(pool.submit(with_and_without, s, check, (mode, layout, link), want, one, name=f"r{len(jobs)}"))
    return jobs


def with_and_without(s, check, what, want, one, name):
    mode, layout, link = what
    what, req, o = f"{mode} {layout} {link or 'MPI'}", requests(12), (*layout, "--mode", mode, *link)
    code, got, err, plain, _ = run(s, MODEL, req, *o, name=name)
    check(code == 0 and not st.difference(want, got), f"{what}: without: exit {code}; {st.difference(want, got)}")
    code, got, err, load, ranks = run(s, MODEL, req, *o, "--share-weights", name=name)
    check(code == 0 and not st.difference(want, got), f"{what}: exit {code}; {st.difference(want, got)} {err[-300:] if code else ''}")
    check(load.get("file_bytes") == one["file_bytes"] == sum(r["file_bytes"] for r in ranks), f"{what}: {load} of files, one rank {one}")
    check(plain["file_bytes"] > one["file_bytes"] and plain["received_bytes"] == 0, f"{what}: without: {plain}")
    check(load.get("received_bytes", 0) > 0 and all(r["received_bytes"] > 0 for r in ranks if "--prefill" not in layout), f"{what}: {ranks}")
    check(all(r["exchange"] <= r["seconds"] for r in ranks), f"{what}: {ranks}")


def closing_table(s, check):
    code, got, err = st.run(s, MODEL, requests(12), "--ep", 2, "--mode", "q4", "--share-weights", "--progress", "plain", name="table")
    check("from rank to rank" in err and "exchange" in err, f"the closing table: {err[-600:]}")


def gguf(s, check):
    """Blocks, and experts whose gate and up rows are two tensors."""
    folder, req = s.file("gguf"), requests(6)
    make_gguf.make(MODEL, folder, "Q8_0", split=True)
    for mode in ("bf16", "q8"):
        code, want, err, one, _ = run(s, folder, req, "-n", 1, "--mode", mode, name="gguf")
        check(code == 0, f"GGUF {mode}: one rank: exit {code}: {err[-300:]}")
        for layout in (("--tp", 2), ("--pp", 2, "--ep", 3)):
            code, got, err, load, _ = run(s, folder, req, *layout, "--mode", mode, "--launcher", "local", "--share-weights", name="gguf")
            check(code == 0 and not st.difference(want, got), f"GGUF {mode} {layout}: exit {code}; {st.difference(want, got)} {err[-300:] if code else ''}")
            check(load["file_bytes"] == one["file_bytes"] and load["received_bytes"] > 0, f"GGUF {mode} {layout}: {load}, one rank {one}")


def damaged(s, check):
    """Found in the headers, and while values are packed."""
    for what, change in (("truncated", lambda f: os.truncate(f, os.path.getsize(f) - 4096)), ("a name", rename)):
        m = s.file("damaged")
        shutil.rmtree(m, ignore_errors=True)
        shutil.copytree(MODEL, m)
        change(os.path.join(m, "model.safetensors"))
        said = []
        for o in ((), ("--share-weights",)):
            t0 = time.time()
            code, rows, err = st.run(s, m, requests(2), "--ep", 2, *o)
            last = [t for t in err.splitlines() if t.startswith("shoal run: ")][-1:]
            check(code == 3 and not rows and "starting again" not in err, f"{what} {o}: exit {code}: {err[-400:]}")
            check(time.time() - t0 < 20, f"{what} {o}: {time.time() - t0:.1f} s")
            said.append(last[0].split(": ", 2)[-1] if last else "")
        text = [t[t.find(m):] for t in said]
        check(m in said[0] and text[0] == text[1], f"{what}: {said}")


def rename(path):
    with open(path, "r+b") as f:
        data = f.read(1 << 20)
        at = data.find(b"layers.3.mlp.down_proj")
        f.seek(at)
        f.write(b"layers.3.mlp.down_porj")


def killed(s, check):
    model = s.file("small")
    subprocess.run([os.path.join(os.path.dirname(st.shoal()), "tests", "make_shape"), "small-moe", model], check=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if os.path.exists(os.path.join(st.DEMO, name)):
            shutil.copy(os.path.join(st.DEMO, name), model)
    req = [st.completion(f"q{k}", [2, 5 + k, 7], max_tokens=4, ignore_eos=True, seed=k) for k in range(6)]
    options = ("--ep", 2, "--mode", "q4", "--threads", 1)
    code, want, err = st.run(s, model, req, *options)
    check(code == 0 and len(want) == len(req), f"undisturbed: exit {code}: {err[-300:]}")
    inp, out = s.file("k.in.jsonl"), s.file("k.out.jsonl")
    st.write_lines(inp, req)
    for sig in (signal.SIGKILL, signal.SIGTERM):
        if os.path.exists(out):
            os.remove(out)
        p = subprocess.Popen(st.command(model, inp, out, *options, "--share-weights", "--progress", "plain"), env=s.env(), stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, text=True)
        hit, end = False, time.time() + 60
        while not hit and p.poll() is None and time.time() < end:
            for q in st.children(p.pid):
                if not hit and is_rank(q) and has_mapped(q, model):
                    os.kill(q, sig)
                    hit = True
        _, err = p.communicate(timeout=120)
        lines = err.splitlines(True)
        got = st.rows(out) if os.path.exists(out) else {}
        again = any("starting again" in t for t in lines)
        check(hit and again and p.returncode == 0, f"{sig.name}: {'' if hit else 'no rank was seen loading; '}exit {p.returncode}: {''.join(lines)[-600:]}")
        check(not st.difference(want, got), f"{sig.name}: {st.difference(want, got)}")
    left = st.left_behind(s)
    check(not left, f"left behind: {left}")


def is_rank(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as f:
            words = f.read().split(b"\0")
    except OSError:
        return False
    return os.path.basename(words[0]) == b"shoal" and b"worker" in words


def has_mapped(pid, model):
    try:
        with open(f"/proc/{pid}/maps") as f:
            return os.path.join(model, "model.safetensors") in f.read()
    except OSError:
        return False


def packed(s, check):
    folder, req = s.file("packed"), requests(4)
    subprocess.run([st.shoal(), "pack", "-m", MODEL, "-o", folder, "--mode", "q8"], check=True, capture_output=True)
    code, want, err = st.run(s, folder, req, "-n", 1)
    for _ in range(5):  # a run of a moment may end before the sentence is heard
        code, got, err = st.run(s, folder, req, "--ep", 2, "--share-weights", "--progress", "plain")
        if code or "--share-weights does nothing here" in err:
            break
    check(code == 0 and not st.difference(want, got), f"packed: exit {code}: {st.difference(want, got)}")
    check("--share-weights does nothing here" in err and "from rank to rank" not in err, f"packed: {err[-600:]}")


def main():
    check = st.Checks()
    with st.Scratch() as s:
        with ThreadPoolExecutor(4) as pool:
            jobs = [pool.submit(closing_table, s, check), pool.submit(gguf, s, check), *equal_rows(s, check, pool)]
        for j in jobs:
            j.result()
        damaged(s, check)
        killed(s, check)
        packed(s, check)
    check.finish()


main()
