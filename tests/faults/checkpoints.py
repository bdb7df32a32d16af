#!/usr/bin/env python3
"""Checkpoints and plans that cannot work, through the whole of `shoal run`: the message names file and tensor, the status is the
stated one, it comes at once (what files or options are to blame for is not tried again), and no process is left. A checkpoint
that is mended afterwards goes on with the same command."""
import json
import os
import shutil
import struct
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import shoaltest as st

MODEL = os.path.join(st.MODELS, "e2b-like")
SOON = 15  # seconds; three tries with their pauses and MPI's start would take longer on one rank already
EMBED = "model.language_model.embed_tokens.weight"


def copy(s, name):
    to = s.file(name)
    shutil.copytree(MODEL, to, copy_function=shutil.copyfile)
    for d, _, files in os.walk(to):
        os.chmod(d, 0o755)
        for f in files:
            os.chmod(os.path.join(d, f), 0o644)
    return to


def rewrite(path, change):
    """Applies change(header) to the header of a safetensors file; its data stay."""
    with open(path, "rb") as f:
        n = struct.unpack("<Q", f.read(8))[0]
        header, data = json.loads(f.read(n)), f.read()
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + data)


def spoil(path, tensor, bits):
    """The first item of a BF16 tensor becomes bits."""
    with open(path, "r+b") as f:
        n = struct.unpack("<Q", f.read(8))[0]
        f.seek(8 + n + json.loads(f.read(n))[tensor]["data_offsets"][0])
        f.write(struct.pack("<H", bits))


def damaged(s):
    """(name, checkpoint, what the message must hold)"""
    cases = []

    def case(name, *words):
        m = copy(s, name)
        file = os.path.join(m, "model.safetensors")
        cases.append((name, m, [file, *words]))
        return m, file

    _, f = case("truncated", "data_offsets", "truncated")
    os.truncate(f, os.path.getsize(f) // 2)
    _, f = case("cut-in-header", "header")
    os.truncate(f, 1000)
    _, f = case("empty", "")
    os.truncate(f, 0)
    _, f = case("absurd-header", "header")
    with open(f, "r+b") as h:
        h.write(struct.pack("<Q", 1 << 60))
    _, f = case("missing-tensor", EMBED)
    rewrite(f, lambda h: h.update(another=h.pop(EMBED)))
    cases[-1] = ("missing-tensor", cases[-1][1], [cases[-1][1], "missing tensor", EMBED])
    _, f = case("wrong-dtype", EMBED, "I16")
    rewrite(f, lambda h: h[EMBED].update(dtype="I16"))
    _, f = case("wrong-shape", EMBED)
    rewrite(f, lambda h: h[EMBED].update(shape=h[EMBED]["shape"][::-1]))
    _, f = case("beyond-the-end", EMBED, "data_offsets")
    rewrite(f, lambda h: h[EMBED].update(data_offsets=[0, 1 << 50]))
    last, norm = (f"model.language_model.layers.14.{x}.weight" for x in ("mlp.down_proj", "input_layernorm"))
    case("not-a-number", last, "not a number", "finite")
    spoil(cases[-1][2][0], last, 0x7fc1)
    case("infinite", norm, "infinite", "finite")
    spoil(cases[-1][2][0], norm, 0xff80)
    m, f = case("no-weights")
    os.remove(f)
    cases[-1] = ("no-weights", m, ["model.safetensors"])
    return cases


def configs(s):
    cases = []

    def case(name, words, change):
        m = copy(s, name)
        path = os.path.join(m, "config.json")
        with open(path) as f:
            c = json.load(f)
        change(c)
        with open(path, "w") as f:
            json.dump(c, f)
        cases.append((name, m, ["config.json", *words]))

    def other(c):
        c.update(model_type="llama", architectures=["LlamaForCausalLM"])

    case("other-architecture", ["llama"], other)
    case("no-layers", ["num_hidden_layers"], lambda c: c.get("text_config", c).update(num_hidden_layers=0))
    m = copy(s, "config-is-no-json")
    with open(os.path.join(m, "config.json"), "w") as f:
        f.write("{\"model_type\": ")
    cases.append(("config-is-no-json", m, ["config.json"]))
    m = copy(s, "no-tokenizer")
    os.remove(os.path.join(m, "tokenizer.json"))
    cases.append(("no-tokenizer", m, ["tokenizer.json"]))
    return cases


def main():
    check = st.Checks()
    with st.Scratch() as s:
        request = [st.completion("a", [2, 5, 7], max_tokens=4, ignore_eos=True)]
        inp = s.file("in.jsonl")
        st.write_lines(inp, request)

        def refused(name, args, words, codes):
            t0 = time.time()
            try:
                p = subprocess.run([st.shoal(), "run", "-i", inp, "-o", s.file(name + ".out"), *args], env=s.env(),
                                   capture_output=True, text=True, timeout=120)
            except subprocess.TimeoutExpired:
                check(False, f"{name}: never ended")
                st.kill_all(s)
                return
            took = time.time() - t0
            check(p.returncode in codes, f"{name}: exit {p.returncode}, not {codes}: {p.stderr[-400:]}")
            lines = p.stderr.strip().split("\n")
            last = lines[-2 if "--help" in lines[-1] and len(lines) > 1 else -1] # usage errors end with a hint
            for w in words:
                check(w in last, f"{name}: the last line does not name {w!r}: {last}")
            check(last.startswith("shoal run: "), f"{name}: last line: {last}")
            check("starting again" not in p.stderr, f"{name}: was tried again: {p.stderr[-600:]}")
            check(took < SOON, f"{name}: took {took:.1f} s")
            check(not os.path.exists(s.file(name + ".out")), f"{name}: made an output")
            left = st.left_behind(s, 10)
            check(not left, f"{name}: left behind: {left}")
            print(f"{name} ({took:.1f} s): {last[:260]}", flush=True)

        for i, (name, m, words) in enumerate(damaged(s)):
            refused(name, ["-m", m, "-n", "2" if i % 4 == 0 else "1"], words, (3,))
        for name, m, words in configs(s):
            refused(name, ["-m", m, "-n", "1"], words, (2, 3))
        refused("no-model", ["-m", s.file("nowhere")], [s.file("nowhere")], (3,))
        refused("too-many-ranks", ["-m", MODEL, "-n", "16"], ["16 ranks", "15 layers"], (2,))
        refused("cut-at-0", ["-m", MODEL, "-n", "2", "--cuts", "0"], ["--cuts", "0"], (2,))
        refused("cut-at-end", ["-m", MODEL, "-n", "2", "--cuts", "15"], ["--cuts", "15"], (2,))
        refused("cuts-descend", ["-m", MODEL, "-n", "3", "--cuts", "9,5"], ["--cuts", "9,5"], (2,))
        refused("cuts-are-words", ["-m", MODEL, "-n", "2", "--cuts", "five"], ["--cuts", "five"], (2,))
        refused("unknown-option", ["-m", MODEL, "--rank", "2", "--nonsense"], ["--nonsense"], (2,))
        refused("option-without-number", ["-m", MODEL, "--chunk", "many"], ["--chunk", "many"], (2,))

        m = copy(s, "mended")
        f = os.path.join(m, "model.safetensors")
        os.truncate(f, os.path.getsize(f) // 2)
        refused("mended", ["-m", m, "-n", "1"], [f], (3,))
        shutil.copyfile(os.path.join(MODEL, "model.safetensors"), f)
        p = subprocess.run([st.shoal(), "run", "-i", inp, "-o", s.file("mended.out"), "-m", m, "-n", "1"], env=s.env(),
                           capture_output=True, text=True, timeout=120)
        check(p.returncode == 0, f"mended: exit {p.returncode}: {p.stderr[-300:]}")
        check(len(st.rows(s.file("mended.out"))) == 1 if p.returncode == 0 else False, "mended: no row")
    check.finish()


main()
