#!/usr/bin/env python3
"""Packed folders, from outside: rows of `shoal run` on a packed folder are those of its checkpoint in every mode, for one rank and for
every way of dividing a model; the folder's mode is the default and another is refused; a store that the checkpoint began goes on with
the folder in its place; what is damaged, missing or foreign is refused by file and place; writing leaves nothing half done.

usage: packed.py [--models a,b]"""
import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import shoaltest as st

ALL = ["e2b-like", "e4b-like", "31b-like", "26b-a4b-like", "26b-a4b-sharded"]
INDEX = "shoal-pack.json"


def requests(name, n=12):
    g = st.golden(name)
    prompts = [c["ids"] for c in g["greedy"]] + [f["ids"] for f in g["forward"]]
    return [st.completion(f"q{k}", prompts[k % len(prompts)], max_tokens=3 + k % 8, temperature=(k % 3) * 0.6, seed=k, return_token_ids=True,
                          **({"logprobs": k % 5} if k % 2 else {})) for k in range(n)]


def pack(s, *options, timeout=120):
    p = subprocess.run([st.shoal(), "pack", *map(str, options)], capture_output=True, text=True, timeout=timeout, env=s.env())
    return p.returncode, p.stderr


def files(folder):
    out = {}
    for name in sorted(os.listdir(folder)):
        with open(os.path.join(folder, name), "rb") as f:
            out[name] = f.read()
    return out


def layouts(name, mode, first):
    yield "one rank", ("-n", 1)
    yield "--pp 2", ("--pp", 2, "--launcher", "local")
    yield "--tp 2", ("--tp", 2, "--launcher", "local")
    if name.startswith("26b"):
        yield "--ep 2", ("--ep", 2, "--launcher", "local")
    if mode != "q4" and not first:
        return
    if first:
        yield "--pp 2, MPI", ("--pp", 2)
        yield "--pp 2 --tp 2, MPI", ("--pp", 2, "--tp", 2)
    yield "--tp 4", ("--tp", 4, "--launcher", "local")
    yield "--cp 2", ("--cp", 2, "--launcher", "local")
    yield "--pp 2 --prefill 1", ("--pp", 2, "--prefill", 1, "--launcher", "local")
    if name.startswith("26b"):
        yield "--pp 2 --ep 5", ("--pp", 2, "--ep", 5, "--launcher", "local")


def equal_rows(s, check, name, first):
    model, req = os.path.join(st.MODELS, name), requests(name)
    for mode in ("bf16", "q8", "q4"):
        folder = s.file(f"{name}.{mode}")
        code, err = pack(s, "-m", model, "-o", folder, "--mode", mode)
        if not check(code == 0, f"{name} {mode}: pack: exit {code}: {err[-300:]}"):
            continue
        code, want, err = st.run(s, model, req, "-n", 1, "--mode", mode)
        check(code == 0 and len(want) == len(req), f"{name} {mode}: the checkpoint: exit {code}: {err[-300:]}")
        for what, options in layouts(name, mode, first and mode == "q8"):
            c, got, e = st.run(s, folder, req, *options)
            d = st.difference(want, got)
            check(c == 0 and not d, f"{name} {mode} {what}: exit {c}; {d} {e[-300:] if c else ''}")
        if mode == "bf16":
            _, want, _ = st.run(s, model, req, "-n", 1, "--mode", "exact")
            c, got, e = st.run(s, folder, req, "-n", 1, "--mode", "exact")
            check(c == 0 and not st.difference(want, got), f"{name} exact: exit {c}; {st.difference(want, got)} {e[-300:] if c else ''}")
        summed(s, check, name, mode, model, folder, req)
        c, err = pack(s, "--verify", folder)
        check(c == 0, f"{name} {mode}: --verify: exit {c}: {err[-300:]}")


def summed(s, check, name, mode, model, folder, req):
    """Ranges of inputs: the checkpoint's rows in the same layout, or a refusal that says why."""
    o = ("--tp", 2, "--tp-reduce", "sum", "--launcher", "local")
    _, want, _ = st.run(s, model, req, *o, "--mode", mode)
    c, got, e = st.run(s, folder, req, *o)
    if mode != "bf16" and c == 3:
        check("share a scale" in e and "gather" in e, f"{name} {mode} sum: refused with: {e[-300:]}")
    else:
        check(c == 0 and not st.difference(want, got), f"{name} {mode} sum: exit {c}; {st.difference(want, got)} {e[-300:] if c else ''}")


def copied(s, check, model, folder):
    here, there = files(model), files(folder)
    for name, data in here.items():
        if not name.endswith((".safetensors", ".index.json")):
            check(there.get(name) == data, f"{name} is copied as it is")
    check(not any(n.endswith(".bin") and not n.startswith("pack-") for n in there), f"files: {sorted(there)}")


def modes(s, check, folder, req):
    for mode in ("exact", "bf16", "q8"):
        c, _, e = st.run(s, folder, req, "-n", 1, "--mode", mode)
        check(c == 2 and f"--mode: {mode}" in e and "packed for q4" in e, f"--mode {mode} of q4: exit {c}: {e[-300:]}")
    for command in (("bench", "-m", folder, "--mode", "q8"), ("plan", "-m", folder, "--mode", "q8", "--brief"),
                    ("serve", "-m", folder, "--mode", "q8", "--listen", "ipc://" + s.file("x.sock"), "--store", s.file("x.store"))):
        p = subprocess.run([st.shoal(), *command], capture_output=True, text=True, env=s.env(), timeout=60)
        check(p.returncode != 0 and "q8" in p.stderr and "packed for q4" in p.stderr, f"{command[0]}: exit {p.returncode}: {p.stderr[-200:]}")
    p = subprocess.run([st.shoal(), "inspect", folder], capture_output=True, text=True, env=s.env())
    q = subprocess.run([st.shoal(), "inspect", os.path.join(st.MODELS, "e2b-like")], capture_output=True, text=True, env=s.env())
    check(p.returncode == 0 and "packed for q4" in p.stdout, f"inspect: {p.stdout[-300:]}{p.stderr}")
    prints = [t.split("fingerprint ")[-1].split() for t in (p.stdout, q.stdout)]
    check(prints[0][0] == prints[1][0] and len(prints[0]) == 1, f"the fingerprint is the checkpoint's: {prints}")
    figures = [t.rstrip().rsplit("\n\n", 1)[0] for t in (p.stdout, q.stdout)]
    check(figures[0] == figures[1], "inspect: the figures are the checkpoint's")
    p = subprocess.run([st.shoal(), "plan", "-m", folder, "-n", "2", "--brief"], capture_output=True, text=True, env=s.env(), timeout=100)
    check(p.returncode == 0 and "mode q4" in p.stdout and "no weights" not in p.stdout, f"plan: exit {p.returncode}: {p.stdout[:300]}{p.stderr}")
    p = subprocess.run([st.shoal(), "bench", "-m", folder, "--prompt", "8", "--generate", "2", "--batch", "1", "--rounds", "1", "--json"],
                       capture_output=True, text=True, env=s.env(), timeout=100)
    check(p.returncode == 0 and json.loads(p.stdout or "{}").get("mode") == "q4", f"bench: exit {p.returncode}: {p.stderr[-300:]}")


def goes_on(s, check, folder):
    """A finished store of the checkpoint: with the folder in the checkpoint's place its rows are fetched; other weights are refused."""
    model, req = s.file("place"), requests("e2b-like")
    shutil.copytree(os.path.join(st.MODELS, "e2b-like"), model)
    inp, out = s.file("on.in.jsonl"), s.file("on.out.jsonl")
    st.write_lines(inp, req)
    again = lambda: subprocess.run(st.command(model, inp, out, "-n", 1, "--mode", "q4", "--keep-store"), capture_output=True, text=True, env=s.env(), timeout=120)
    p = again()
    want = st.rows(out)
    check(p.returncode == 0 and len(want) == len(req), f"the checkpoint's run: exit {p.returncode}: {p.stderr[-300:]}")
    os.remove(out)
    shutil.rmtree(model)
    shutil.copytree(folder, model)
    p = again()
    check(p.returncode == 0 and os.path.exists(out) and not st.difference(want, st.rows(out)), f"goes on with the folder: exit {p.returncode}: {p.stderr[-300:]}")
    if os.path.exists(out):
        os.remove(out)
    shutil.rmtree(model)
    pack(s, "-m", os.path.join(st.MODELS, "e4b-like"), "-o", model, "--mode", "q4")
    p = again()
    check(p.returncode not in (0, 1) and "fingerprint" in p.stderr, f"other weights: exit {p.returncode}: {p.stderr[-300:]}")


def flip(path, at, bit=1):
    with open(path, "r+b") as f:
        f.seek(at)
        b = f.read(1)[0]
        f.seek(at)
        f.write(bytes([b ^ bit]))


def damaged(s, check, folder, req):
    def case(name):
        to = s.file("damaged")
        shutil.rmtree(to, ignore_errors=True)
        shutil.copytree(folder, to)
        return to, os.path.join(to, name)

    def refused(what, d, *words):
        for k, (c, e) in enumerate([pack(s, "--verify", d), (lambda r: (r[0], r[2]))(st.run(s, d, req, "-n", 1))]):
            check(c in (2, 3) and all(w in e for w in words), f"{what} ({'run' if k else 'verify'}): exit {c}: {e[-300:]}")

    names = [n for n in sorted(os.listdir(folder)) if n.startswith("pack-")]
    for name in names:  # truncation and length: found at start
        d, f = case(name)
        size = os.path.getsize(f)
        os.truncate(f, size - 1)
        refused(f"{name} truncated", d, name, f"offset {size - 1}", "truncated")
    d, f = case("pack-head.bin")
    os.remove(f)
    refused("file missing", d, "pack-head.bin", "missing")
    d, f = case(INDEX)
    os.truncate(f, os.path.getsize(f) // 2)
    refused("index truncated", d, INDEX)
    d, f = case(INDEX)
    with open(f) as h:
        text = h.read()
    for what, old, new in (("offset", '"offset": 64', '"offset": 128'), ("version", '"version": 1', '"version": 7'), ("format", '"shoal-pack"', '"shoal-sack"')):
        with open(f, "w") as h:
            h.write(text.replace(old, new, 1))
        refused(f"index: {what}", d, INDEX, "checksum" if what == "offset" else what)
    for name in sorted(os.listdir(folder)):  # a bit in every file
        if name == INDEX:
            continue
        for at in (0, os.path.getsize(os.path.join(folder, name)) // 2, os.path.getsize(os.path.join(folder, name)) - 1):
            d, f = case(name)
            flip(f, at, 0x40)
            c, e = pack(s, "--verify", d)
            check(c == 3 and name in e and "bytes 0 to" in e, f"bit of {name} at {at}: exit {c}: {e[-200:]}")


def writing(s, check, folder):
    model = os.path.join(st.MODELS, "e2b-like")
    left = lambda: [n for n in os.listdir(s.path) if ".tmp." in n]
    before = files(folder)
    c, e = pack(s, "-m", model, "-o", folder, "--mode", "q8")
    check(c == 2 and "--force" in e and files(folder) == before, f"a folder that exists: exit {c}: {e}")
    plain = s.file("plain")
    os.mkdir(plain)
    st.write_lines(os.path.join(plain, "mine"), ["x"])
    c, e = pack(s, "-m", model, "-o", plain, "--force")
    check(c == 2 and os.listdir(plain) == ["mine"], f"--force of another folder: exit {c}: {e}")
    again = s.file("again")
    check(pack(s, "-m", model, "-o", again, "--mode", "q4")[0] == 0 and files(again) == before, "packed again, the same bytes")
    check(pack(s, "-m", model, "-o", again + "/", "--mode", "q8", "--force")[0] == 0 and files(again) != before, "--force")
    check(pack(s, "-m", model, "-o", again, "--mode", "q4", "--force", "--threads", 1)[0] == 0 and files(again) == before, "and back, one thread")
    c, e = pack(s, "-m", folder, "-o", s.file("twice"))
    check(c == 2 and "packed folder" in e, f"packing a packed folder: exit {c}: {e}")
    for args, word in ((("-m", model), "-o"), (("--verify", model), INDEX), (("--verify", folder, "-o", "x"), "alone"), (("-m", model, "-o", s.file("no/such/x")), "no/such")):
        c, e = pack(s, *args)
        check(c in (2, 3) and word in e, f"{args}: exit {c}: {e}")
    dead = s.file("later.tmp.999999999")  # no such process can be
    os.mkdir(dead)
    st.write_lines(os.path.join(dead, "x"), ["x"])
    check(pack(s, "-m", model, "-o", s.file("later"))[0] == 0 and not os.path.exists(dead), "what a killed one left is removed")
    check(not left(), f"left behind: {left()}")


def interrupted(s, check):
    """On SIGTERM nothing is left; on SIGKILL the target is as it was, and the next command clears up."""
    big, target = s.file("big"), s.file("big.q4")
    tool = os.path.join(os.path.dirname(st.shoal()), "tests", "make_shape")
    subprocess.run([tool, "small-dense", big], check=True)
    for sig in (signal.SIGTERM, signal.SIGKILL):
        p = subprocess.Popen([st.shoal(), "pack", "-m", big, "-o", target, "--mode", "q4"], stderr=subprocess.PIPE, text=True, env=s.env())
        end = time.time() + 60
        while not any(n.startswith("big.q4.tmp.") for n in os.listdir(s.path)) and p.poll() is None and time.time() < end:
            time.sleep(0.005)
        p.send_signal(sig)
        _, e = p.communicate(timeout=60)
        check(p.returncode == (4 if sig == signal.SIGTERM else -9) and not os.path.exists(target), f"{sig}: exit {p.returncode}: {e}")
        left = [n for n in os.listdir(s.path) if ".tmp." in n]
        check(len(left) == (sig == signal.SIGKILL), f"{sig}: left {left}")
    c, e = pack(s, "-m", big, "-o", target, "--mode", "q4")
    left = [n for n in os.listdir(s.path) if ".tmp." in n]
    check(c == 0 and not left and pack(s, "--verify", target)[0] == 0, f"afterwards: exit {c}: {e} {left}")


def main():
    a = argparse.ArgumentParser()
    a.add_argument("--models", default=",".join(ALL))
    models = a.parse_args().models.split(",")
    check = st.Checks()
    with st.Scratch() as s:
        for name in models:
            equal_rows(s, check, name, name == models[0])
        folder, req = s.file("e2b-like.q4"), requests("e2b-like")[:3]
        if os.path.exists(folder):
            copied(s, check, os.path.join(st.MODELS, "e2b-like"), folder)
            modes(s, check, folder, req)
            goes_on(s, check, folder)
            damaged(s, check, folder, req)
            writing(s, check, folder)
            interrupted(s, check)
        left = st.left_behind(s)
        check(not left, f"left behind: {left}")
    check.finish()


main()
