#!/usr/bin/env python3
"""Checkpoints as GGUF through the program: fixtures written by make_gguf.py answer as the safetensors they come from (BF16, F32, one
file or parts, experts fused or not) or as what is left of their values (F16, Q8_0, Q6_K, Q4_0); several ranks give the bytes of one;
a file without any other beside it answers as the folder that it was made of; what cannot be is refused by name."""
import json
import os
import random
import shutil
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import make_gguf
import shoaltest as st

REQUESTS = [st.completion("a", "Hello world, this is", max_tokens=12, temperature=0, logprobs=5),
            st.completion("b", "The quick brown fox jumps over", max_tokens=8, seed=3, temperature=1, logprobs=2),
            st.completion("c", "x", max_tokens=8, temperature=0, logprobs=1)]


def answers(s, model, *options):
    code, rows, err = st.run(s, model, REQUESTS, *options)
    if code != 0 or len(rows) != len(REQUESTS):
        sys.exit(f"{model} {options}: exit status {code}, {len(rows)} rows: {err}")
    return rows


def same(what, got, want):
    if got != want:
        sys.exit(f"{what}: " + (st.difference(want, got) if isinstance(want, dict) else f"{got}, not {want}"))


def refused(s, model, words, *options):
    code, _, err = st.run(s, model, REQUESTS, *options)
    if code == 0 or words not in err:
        sys.exit(f"{model}: exit status {code}, without {words!r}: {err}")


def spoiled(s, source, to, kind):
    """The third block of a matrix has an infinite scale: refused by item in every mode that reads blocks, and when it is packed."""
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    make_gguf.make(source, to, kind)
    shape, b = make_gguf.read_checkpoint(source)[name]
    blocks, path = make_gguf.convert(name, shape, b, kind)[1], os.path.join(to, "model.gguf")
    with open(path, "rb") as f:
        whole = f.read()
    at = whole.index(blocks) + 2 * len(blocks) * 32 // (shape[0] * shape[1])
    with open(path, "r+b") as f:
        f.seek(at)
        f.write(b"\0\x7c")
    said = f"{name}: the {kind} value of item 64 is infinite: allowed are finite numbers"
    for options in (["bf16"], ["q8"], ["q4", "--ranks", "2"]):
        refused(s, to, said, "--mode", *options)
    p = subprocess.run([st.shoal(), "pack", "-q", "-m", to, "-o", to + ".packed", "--mode", "q4"], capture_output=True, text=True, timeout=60)
    if p.returncode != 3 or said not in p.stderr or os.path.exists(to + ".packed"):
        sys.exit(f"pack of {to}: exit status {p.returncode}: {p.stderr}")


def packs(s, want):
    """What a packed folder answers is what the file would; blocks are packed in the modes that make codes of them."""
    pack = lambda source, to, *o: subprocess.run([st.shoal(), "pack", "-q", "-m", s.file(source), "-o", s.file(to), *o], capture_output=True,
                                                 text=True, timeout=60)
    same("pack of F32", pack("plain3", "packed").returncode, 0)
    same("packed F32", answers(s, s.file("packed")), want)
    for kind, mode in (("Q4_0", "q4"), ("Q4_0", "q8"), ("Q8_0", "q8"), ("Q8_0", "q4"), ("Q4_0-ple", "q4"), ("Q8_0-ple", "q8")):
        to = f"packed-{kind}-{mode}"
        p = pack(kind, to, "--mode", mode)
        same(f"pack of {kind} in {mode}", (p.returncode, p.stderr), (0, ""))
        same(f"packed {kind} in {mode}", answers(s, s.file(to)), answers(s, s.file(kind), "--mode", mode))
    p = pack("Q4_0", "never")
    if p.returncode == 0 or "is Q4_0: allowed in a packed folder of mode bf16 are BF16, F16 and F32" not in p.stderr or \
            os.path.exists(s.file("never")):
        sys.exit(f"pack of blocks: exit status {p.returncode}: {p.stderr}")


def without(folder, *names):
    for name in names:
        if os.path.exists(os.path.join(folder, name)):
            os.remove(os.path.join(folder, name))
    return folder


def tokens(model, text):
    p = subprocess.run([st.shoal(), "tokenize", "-m", model, "--json"], input=json.dumps(text), capture_output=True, text=True, timeout=60)
    same(f"tokenize -m {model}", p.returncode, 0)
    return p.stdout


CHAT = {"custom_id": "d", "method": "POST", "url": "/v1/chat/completions",
        "body": {"model": "m", "messages": [{"role": "user", "content": "Where is the cat?"}], "max_tokens": 12, "temperature": 0}}


def alone(s):
    """A file with nothing beside it, of the demo model and of fixtures, whole and in parts: configuration, ids, answers (chats and
    prompts), plan and packed folder are those of the folder. The converter always writes add_bos_token true, and only what
    generation_config.json has of sampling: the folder is compared with the same."""
    for source, how in ((st.DEMO, {}), (os.path.join(st.MODELS, "e2b-like"), {"parts": 2}), (os.path.join(st.MODELS, "26b-a4b-sharded"), {}),
                        (os.path.join(st.MODELS, "26b-a4b-like"), {"kind": "Q4_0"})):
        name = os.path.basename(source)
        one, beside = s.file("alone-" + name), s.file("beside-" + name)
        make_gguf.make(source, one, alone=True, **how)
        make_gguf.make(source, beside, **how)
        files = os.listdir(one)
        if any(not f.endswith(".gguf") for f in files):
            sys.exit(f"{one}: not alone: {files}")
        with open(os.path.join(beside, "tokenizer_config.json")) as f:
            c = json.load(f)
        with open(os.path.join(beside, "tokenizer_config.json"), "w") as f:
            json.dump(dict(c, add_bos_token=True), f)
        if name == "minnow":
            without(beside, "generation_config.json")  # says do_sample false, for which there is no key
        reports = [subprocess.run([st.shoal(), "inspect", m], capture_output=True, text=True, timeout=60).stdout for m in (one, beside)]
        same(f"inspect of {one}", reports[0], reports[1] + "from the metadata of GGUF: configuration and tokenizer\n")
        machine = ["--machine", os.path.join(st.DATA, "machines", "epyc-1.json")]
        plans = [subprocess.run([st.shoal(), "plan", "-m", m, *machine], capture_output=True, text=True, timeout=60) for m in (one, beside)]
        same(f"plan of {one}", (plans[0].returncode, plans[0].stdout.replace("alone-", "beside-").split()), (0, plans[1].stdout.split()))
        for text in ("Hello world, caf\u00e9 <|turn>user\n\n\n  x<|channel><|tool>y", "\t\t \U0001f600 \u4f60\u597d <bos>"):
            same(f"ids of {one}", tokens(one, text), tokens(beside, text))
        requests = REQUESTS + ([CHAT] if name != "26b-a4b-sharded" else [])
        path = os.path.join(one, sorted(files)[0])
        got, want = [st.run(s, m, requests) for m in (path, beside)]
        same(f"answers of {path}", (got[0], got[1]), (want[0], want[1]))
        mode = ["--mode", "q4" if "kind" in how else "q8"]
        p = subprocess.run([st.shoal(), "pack", "-q", "-m", path, "-o", s.file("packed-" + name), *mode], capture_output=True, text=True,
                           timeout=60)
        same(f"pack of {path}", (p.returncode, p.stderr), (0, ""))
        packed, want = [st.run(s, m, requests, *mode) for m in (s.file("packed-" + name), one)]
        same(f"packed {path}", (packed[0], packed[1]), (want[0], want[1]))
    os.remove(os.path.join(s.file("alone-e2b-like"), "model-00001-of-00002.gguf"))
    refused(s, s.file("alone-e2b-like"), "model-00001-of-00002.gguf: missing: part 1 of 2")


def no_tokenizer(s):
    """A file that says that it has none: what needs no text works, the rest names the missing file."""
    model, out = s.file("mute"), s.file("mute.q4")
    tool = os.path.join(os.path.dirname(st.shoal()), "tests", "make_shape")
    subprocess.run([tool, "small-dense", model, "Q4_0"], check=True, timeout=120)
    subprocess.run([st.shoal(), "pack", "-q", "-m", model, "-o", out, "--mode", "q4"], check=True, timeout=120)
    r = subprocess.run([st.shoal(), "bench", "-m", out, "--prompt", "8", "--generate", "2", "--batch", "1", "--rounds", "1", "--no-limits", "--json"],
                       capture_output=True, text=True, timeout=120)
    same("bench without a tokenizer", (r.returncode, r.stderr), (0, ""))
    refused(s, model, "mute/tokenizer.json: cannot be opened")


def wide(folder, source):
    """A checkpoint with rows of 256, of random numbers and with the tokenizer of `source`. Its embedding is exact in Q6_K: each 16
    values are codes from -32 to 31 times a power of two."""
    r, h, ff = random.Random(3), 256, 256
    os.mkdir(folder)
    make_gguf.copy_rest(source, folder)
    with open(os.path.join(folder, "config.json")) as f:
        c = json.load(f)
    t = c["text_config"]
    t.update(hidden_size=h, intermediate_size=ff, num_hidden_layers=2, num_kv_shared_layers=0, use_double_wide_mlp=False,
             layer_types=["sliding_attention", "full_attention"], hidden_size_per_layer_input=0)
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(c, f)
    table = []
    for _ in range(t["vocab_size"] * h // 16):
        q, step = [-32] + [r.randint(-32, 31) for _ in range(15)], 2.0 ** -r.randint(10, 12)
        r.shuffle(q)
        table += [v * step for v in q]
    tensors = {"model.language_model.embed_tokens.weight": ([t["vocab_size"], h], make_gguf.to_bf16(table))}
    random_tensor = lambda *shape: (list(shape), make_gguf.to_bf16([r.gauss(0, 0.06) for _ in range(shape[0] * shape[-1])]))
    ones = lambda n: ([n], make_gguf.to_bf16([1.0] * n))
    for i, hd in ((0, t["head_dim"]), (1, t["global_head_dim"])):
        p, q = f"model.language_model.layers.{i}.", t["num_attention_heads"] * hd
        for name, shape in (("q_proj", (q, h)), ("k_proj", (hd, h)), ("v_proj", (hd, h)), ("o_proj", (h, q))):
            tensors[f"{p}self_attn.{name}.weight"] = random_tensor(*shape)
        for name, shape in (("gate_proj", (ff, h)), ("up_proj", (ff, h)), ("down_proj", (h, ff))):
            tensors[f"{p}mlp.{name}.weight"] = random_tensor(*shape)
        for name in ("q_norm", "k_norm"):
            tensors[f"{p}self_attn.{name}.weight"] = ones(hd)
        for name in ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"):
            tensors[f"{p}{name}.weight"] = ones(h)
    tensors["model.language_model.norm.weight"] = ones(h)
    make_gguf.write_safetensors(os.path.join(folder, "model.safetensors"), tensors)


def six_bits(s, source):
    """Q6_K: as an embedding that it holds exactly, beside Q4_0 as llama.cpp's quantiser makes it, and in matrices."""
    model = s.file("wide")
    wide(model, source)
    make_gguf.make(model, s.file("six-table"), tables="Q6_K")
    for mode in ("exact", "bf16", "q8", "q4"):
        same(f"Q6_K table in {mode}", answers(s, s.file("six-table"), "--mode", mode), answers(s, model, "--mode", mode))
    make_gguf.make(model, s.file("six-four"), "Q4_0", tables="Q6_K")
    make_gguf.make(model, s.file("six"), "Q6_K", rounded=s.file("six-rounded"))
    same("Q6_K rounded", answers(s, s.file("six")), answers(s, s.file("six-rounded")))
    refused(s, s.file("six"), "the Q6_K value", "--mode", "exact")
    for folder, modes in (("six-four", ("q4", "q8")), ("six", ("q4", "bf16"))):
        for mode in modes:
            one = answers(s, s.file(folder), "--mode", mode)
            for layout in (["--pp", "2"], ["--tp", "2"]):
                same(f"{folder} {mode} {layout}", answers(s, s.file(folder), "--mode", mode, "--ranks", "2", *layout), one)
    answers(s, s.file("six"), "--mode", "q4", "--tp", "2", "--tp-reduce", "sum")  # a part's columns begin inside a block of 256
    pack = subprocess.run([st.shoal(), "pack", "-q", "-m", s.file("six-four"), "-o", s.file("six-packed"), "--mode", "q4"],
                          capture_output=True, text=True, timeout=60)
    same("pack of Q6_K", (pack.returncode, pack.stderr), (0, ""))
    same("packed Q6_K", answers(s, s.file("six-packed")), answers(s, s.file("six-four"), "--mode", "q4"))


def main():
    with st.Scratch() as s:
        moe, ple = os.path.join(st.MODELS, "26b-a4b-sharded"), os.path.join(st.MODELS, "e2b-like")
        want = answers(s, moe), answers(s, ple)
        for i, (source, how) in enumerate([(moe, {}), (ple, {}), (moe, {"parts": 3, "split": True}), (moe, {"kind": "F32"})]):
            to = s.file(f"plain{i}")
            make_gguf.make(source, to, **how)
            same(f"{source} {how}", answers(s, to), want[source == ple])
        same("exact", answers(s, s.file("plain1"), "--mode", "exact"), answers(s, ple, "--mode", "exact"))
        same("q8", answers(s, s.file("plain0"), "--mode", "q8"), answers(s, moe, "--mode", "q8"))
        make_gguf.make(ple, s.file("half"), "F16", rounded=s.file("half-rounded"))
        same("F16", answers(s, s.file("half")), answers(s, s.file("half-rounded")))
        for kind in ("Q8_0", "Q4_0"):
            for source in (moe, ple):  # the tables stay BF16, for blocks are looked up unrounded
                to, rounded = s.file(f"{kind}-{os.path.basename(source)}"), s.file("r" + kind + os.path.basename(source))
                make_gguf.make(source, to, kind, tables="BF16", rounded=rounded)
                same(f"{kind} rounded", answers(s, to), answers(s, rounded))
            all_blocks = s.file(kind)
            make_gguf.make(moe, all_blocks, kind)
            make_gguf.make(ple, all_blocks + "-ple", kind)
            for mode in ("bf16", "q8", "q4"):
                one = answers(s, all_blocks, "--mode", mode)
                for layout in (["--pp", "2"], ["--tp", "2"], ["--ep", "2"]):
                    same(f"{kind} {mode} {layout}", answers(s, all_blocks, "--mode", mode, "--ranks", "2", *layout), one)
            answers(s, all_blocks, "--mode", "q4", "--tp", "2", "--tp-reduce", "sum")
            refused(s, all_blocks, "is not exact in BF16, and mode exact rounds nothing: allowed are bf16", "--mode", "exact")
        for kind in ("Q8_0", "Q4_0"):
            spoiled(s, moe, s.file("spoiled" + kind), kind)
        report = subprocess.run([st.shoal(), "inspect", s.file("Q4_0")], capture_output=True, text=True, timeout=60).stdout
        same("inspect", report.splitlines()[-1].split(" ")[:6], ["types:", "Q4_0", "in", "42", "tensors", "(300.4"])
        of_file = subprocess.run([st.shoal(), "inspect", s.file("Q4_0/model.gguf")], capture_output=True, text=True, timeout=60)
        same("inspect of the file", of_file.stdout, report)
        same("-m FILE", answers(s, s.file("Q4_0/model.gguf")), answers(s, s.file("Q4_0")))
        os.mkdir(s.file("linked"))  # as in a cache: the file itself lies elsewhere under another name
        for name in os.listdir(s.file("Q4_0")):
            os.symlink(s.file("Q4_0/" + name), s.file("linked/" + name))
        os.rename(s.file("Q4_0/model.gguf"), s.file("blob"))
        os.symlink(s.file("blob"), s.file("Q4_0/model.gguf"))
        same("-m LINK", answers(s, s.file("linked/model.gguf")), answers(s, s.file("Q4_0")))
        ids = [subprocess.run([st.shoal(), "tokenize", "-m", m], input="Hello", capture_output=True, text=True, timeout=60).stdout
               for m in (moe, s.file("linked/model.gguf"))]
        same("tokenize -m FILE", ids[1], ids[0])
        packs(s, want[0])
        six_bits(s, ple)
        alone(s)
        no_tokenizer(s)
        shutil.copy(s.file("rQ4_0e2b-like/model.safetensors"), s.file("Q8_0"))
        refused(s, s.file("Q8_0/model.gguf"), "model.safetensors lies beside it and counts before GGUF")
        shutil.copy(s.file("Q4_0/model.gguf"), s.file("Q4_0-e2b-like/second.gguf"))
        refused(s, s.file("Q4_0-e2b-like/model.gguf"), "two models: model.gguf and second.gguf")
        os.truncate(s.file("Q4_0/model.gguf"), 300000)
        refused(s, s.file("Q4_0"), "is the file truncated?")
        os.remove(s.file("plain2/model-00002-of-00003.gguf"))
        refused(s, s.file("plain2"), "model-00002-of-00003.gguf: missing: part 2 of 3")


if __name__ == "__main__":
    main()
