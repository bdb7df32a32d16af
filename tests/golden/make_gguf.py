#!/usr/bin/env python3
"""Writes a text checkpoint as GGUF, with llama.cpp's names, and the safetensors checkpoint that the GGUF's values make when they are
rounded to bf16. Standard library only.

  make_gguf.py FROM TO [--type BF16|F16|F32|Q8_0|Q6_K|Q4_0] [--parts N] [--tables TYPE] [--split-experts] [--rounded FOLDER]
               [--alone]

FROM is a checkpoint folder with BF16 tensors. As llama.cpp does: vectors and the router are F32, per_layer_model_proj is BF16, and
matrices whose rows are no multiple of a block stay BF16. With the package gguf installed, --check reads the result with it and compares.
--alone: with all metadata of llama.cpp's converter, and no file beside."""
import argparse
import array
import glob
import json
import os
import re
import shutil
import struct
import sys

LAYER = {
    "input_layernorm.weight": "attn_norm.weight", "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight", "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight", "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight", "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight", "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight", "mlp.up_proj.weight": "ffn_up.weight", "mlp.down_proj.weight": "ffn_down.weight",
    "layer_scalar": "layer_output_scale.weight", "per_layer_input_gate.weight": "inp_gate.weight",
    "per_layer_projection.weight": "proj.weight", "post_per_layer_input_norm.weight": "post_norm.weight",
    "router.proj.weight": "ffn_gate_inp.weight", "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale", "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight", "pre_feedforward_layernorm_2.weight": "pre_ffw_norm_2.weight",
    "post_feedforward_layernorm_1.weight": "post_ffw_norm_1.weight", "post_feedforward_layernorm_2.weight": "post_ffw_norm_2.weight"}
MODEL = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight",
         "embed_tokens_per_layer.weight": "per_layer_token_embd.weight",
         "per_layer_model_projection.weight": "per_layer_model_proj.weight",
         "per_layer_projection_norm.weight": "per_layer_proj_norm.weight"}
TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8, "Q6_K": 14, "BF16": 30}
BLOCK = {"Q4_0": 32, "Q8_0": 32, "Q6_K": 256}


def gguf_name(name):
    name = re.sub(r"^(model\.language_model\.|model\.|language_model\.)", "", name)
    m = re.match(r"layers\.(\d+)\.(.*)$", name)
    return f"blk.{m.group(1)}.{LAYER[m.group(2)]}" if m else "output.weight" if name == "lm_head.weight" else MODEL[name]


def read_checkpoint(folder):
    """name → (shape, bf16 bytes)"""
    found = {}
    for path in sorted(glob.glob(os.path.join(folder, "*.safetensors"))):
        with open(path, "rb") as f:
            data = f.read()
        n = struct.unpack("<Q", data[:8])[0]
        for name, t in json.loads(data[8:8 + n]).items():
            if name == "__metadata__":
                continue
            if t["dtype"] != "BF16":
                sys.exit(f"{path}: {name}: {t['dtype']}: BF16 is wanted")
            a, b = t["data_offsets"]
            found[name] = (t["shape"], data[8 + n + a:8 + n + b])
    return found


def floats(bf16):
    wide = array.array("I", [x << 16 for x in array.array("H", bf16)])
    return array.array("f", wide.tobytes())


def to_bf16(values):
    """Rounded to nearest even."""
    bits = array.array("I", array.array("f", values).tobytes())
    return array.array("H", [(u + 0x7fff + (u >> 16 & 1)) >> 16 for u in bits]).tobytes()


def half(x):
    b = struct.pack("<e", x)
    return b, struct.unpack("<e", b)[0]


def quantise(x, kind):
    """(bytes, values) of one row of blocks."""
    out, values = bytearray(), []
    for i in range(0, len(x), 32):
        w = x[i:i + 32]
        big = max(w, key=abs)
        if kind == "Q8_0":
            b, d = half(abs(big) / 127)
            q = [max(-127, min(127, round(v / d))) if d else 0 for v in w]
            out += b + struct.pack("32b", *q)
        else:
            b, d = half(big / -8)
            q = [max(-8, min(7, round(v / d))) if d else 0 for v in w]
            out += b + bytes(q[j] + 8 | q[16 + j] + 8 << 4 for j in range(16))
        values += [d * v for v in q]
    return bytes(out), values


def quantise_super(x):
    """(bytes, values) of one row in Q6_K: 16 scales a block, each from the largest of its 16 values. The largest scale is 64, so
    that powers of two stay exact."""
    out, values = bytearray(), []
    for i in range(0, len(x), 256):
        steps = [max(x[k:k + 16], key=abs) / -32 for k in range(i, i + 256, 16)]
        b, d = half(max(map(abs, steps)) / 64)
        scales = [max(-64, min(64, round(v / d))) if d else 0 for v in steps]
        q = []
        for k in range(256):
            step = d * scales[k // 16]
            q.append(max(-32, min(31, round(x[i + k] / step))) if step else 0)
        values += [d * scales[k // 16] * q[k] for k in range(256)]
        low, high = bytearray(128), bytearray(64)
        for k in range(256):
            part, run, place = k // 128, k % 128 // 32, k % 32
            low[64 * part + 32 * (run % 2) + place] |= (q[k] + 32 & 15) << 4 * (run // 2)
            high[32 * part + place] |= (q[k] + 32 >> 4) << 2 * run
        out += low + high + struct.pack("16b", *scales) + b
    return bytes(out), values


def convert(name, shape, bf16, kind, tables=None):
    """(type, bytes, values as bf16) of a tensor."""
    g = gguf_name(name)
    if len(shape) < 2 or g.endswith("ffn_gate_inp.weight"):
        return "F32", floats(bf16).tobytes(), bf16
    if kind in BLOCK and (shape[-1] % BLOCK[kind] or g == "per_layer_model_proj.weight"):
        kind = "BF16"
    if tables and g in ("token_embd.weight", "per_layer_token_embd.weight"):
        kind = tables
    if kind == "BF16":
        return kind, bf16, bf16
    x = floats(bf16)
    if kind == "F32":
        return kind, x.tobytes(), bf16
    if kind == "F16":
        b = struct.pack(f"<{len(x)}e", *x)  # small numbers lose bits
        return kind, b, to_bf16(struct.unpack(f"<{len(x)}e", b))
    out, values = quantise_super(x) if kind == "Q6_K" else quantise(x, kind)
    return kind, out, to_bf16(values)


def string(s):
    return struct.pack("<Q", len(s.encode())) + s.encode()


def typed(v):
    """Type and value of a key: bool, int (u32), float (f32), str, or a list of bool, int (i32) or str."""
    if isinstance(v, list):
        kind = type(v[0])
        each = {bool: 7, int: 5, str: 8}[kind]
        values = [string(x) if kind is str else struct.pack("<?" if kind is bool else "<i", x) for x in v]
        return struct.pack("<IIQ", 9, each, len(v)) + b"".join(values)
    if isinstance(v, str):
        return struct.pack("<I", 8) + string(v)
    return struct.pack("<I?", 7, v) if isinstance(v, bool) else struct.pack("<If", 6, v) if isinstance(v, float) else \
        struct.pack("<II", 4, v)


def write_gguf(path, tensors, keys):
    """tensors: [(name, shape, type, bytes)]; keys: [(name, value)]."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    for k, v in keys:
        head += string(k) + typed(v)
    at, data = 0, bytearray()
    for name, shape, kind, b in tensors:
        dims = list(reversed(shape)) or [1]
        head += string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, TYPES[kind], at)
        data += b + bytes(-len(b) % 32)
        at = len(data)
    with open(path, "wb") as f:
        f.write(head + bytes(-len(head) % 32) + data)


def write_safetensors(path, tensors):
    header, data = {}, bytearray()
    for name, (shape, b) in tensors.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [len(data), len(data) + len(b)]}
        data += b
    h = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(h)) + h + data)


def copy_rest(source, to):
    os.makedirs(to, exist_ok=True)
    for name in os.listdir(source):
        if not re.search(r"safetensors", name):
            shutil.copy(os.path.join(source, name), os.path.join(to, name))


def read_json(folder, name):
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def of_layers(c):
    """(head_dim, KV heads) of full layers, in either spelling."""
    head_dim, kv = c.get("global_head_dim"), c.get("num_global_key_value_heads")
    for i, o in (c.get("per_layer_config") or {}).items():
        if c["layer_types"][int(i)] == "full_attention":
            return o["head_dim"], o.get("num_key_value_heads")
    return head_dim, kv


def model_keys(source):
    """What llama.cpp's converter makes of config.json and generation_config.json."""
    c = read_json(source, "config.json")
    c = {**c, **c.get("text_config", {})}
    g, n, full = read_json(source, "generation_config.json"), c["num_hidden_layers"], of_layers(c)
    sliding = [t == "sliding_attention" for t in c["layer_types"]]
    shared, a = c["num_kv_shared_layers"], "gemma4.attention."
    keys = [("general.sampling." + k, g[j]) for k, j in (("temp", "temperature"), ("top_p", "top_p"), ("top_k", "top_k")) if j in g]
    keys += [("gemma4.block_count", n), ("gemma4.context_length", c["max_position_embeddings"]),
             ("gemma4.embedding_length", c["hidden_size"]),
             ("gemma4.embedding_length_per_layer_input", c.get("hidden_size_per_layer_input") or 0),
             ("gemma4.feed_forward_length", [c["intermediate_size"] * (2 if i >= n - shared else 1) for i in range(n)]
              if c.get("use_double_wide_mlp") else c["intermediate_size"]),
             (a + "head_count", c["num_attention_heads"]),
             (a + "head_count_kv", [c["num_key_value_heads"] if s else full[1] for s in sliding] if full[1] else c["num_key_value_heads"]),
             (a + "key_length", full[0]), (a + "value_length", full[0]), (a + "key_length_swa", c["head_dim"]),
             (a + "value_length_swa", c["head_dim"]), (a + "sliding_window", c["sliding_window"]),
             (a + "sliding_window_pattern", sliding), (a + "shared_kv_layers", shared),
             (a + "layer_norm_rms_epsilon", float(c["rms_norm_eps"])),
             ("gemma4.final_logit_softcapping", float(c["final_logit_softcapping"])),
             ("gemma4.rope.freq_base", float(c["rope_parameters"]["full_attention"]["rope_theta"])),
             ("gemma4.rope.freq_base_swa", float(c["rope_parameters"]["sliding_attention"]["rope_theta"])),
             ("gemma4.rope.dimension_count", full[0]), ("gemma4.rope.dimension_count_swa", c["head_dim"])]
    if c.get("num_experts"):
        keys += [("gemma4.expert_count", c["num_experts"]), ("gemma4.expert_used_count", c["top_k_experts"]),
                 ("gemma4.expert_feed_forward_length", c["moe_intermediate_size"])]
    pairs = full[0] // 2
    turned = int(full[0] * c["rope_parameters"]["full_attention"]["partial_rotary_factor"] / 2)
    return keys, struct.pack(f"<{pairs}f", *[1.0] * turned, *[1e30] * (pairs - turned))


SHOWN = {"<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", "<|\"|>"}


def tokenizer_keys(source):
    """What it makes of the tokenizer's files: tokens that tokenizer_config.json names are of type 3, some of type 4."""
    t, c = read_json(source, "tokenizer.json"), read_json(source, "tokenizer_config.json")
    vocab, a = t["model"]["vocab"], "tokenizer.ggml."
    tokens = sorted(vocab, key=vocab.get)
    named = {v for k, v in c.items() if k.endswith("_token") and isinstance(v, str)} | set(c.get("extra_special_tokens", []))
    kind = lambda x: 4 if x in SHOWN else 3 if x in named else 6 if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", x) else 1
    keys = [(a + "model", "gemma4"), (a + "tokens", tokens), (a + "token_type", [kind(x) for x in tokens]),
            (a + "merges", [x if isinstance(x, str) else " ".join(x) for x in t["model"]["merges"]])]
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad"), ("mask", "mask")):
        keys.append((f"{a}{key}_token_id", vocab[c[name + "_token"]]))
    path = os.path.join(source, "chat_template.jinja")
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            keys.append(("tokenizer.chat_template", f.read()))
    return keys + [(a + "add_space_prefix", False), (a + "add_bos_token", True)]


def split_experts(name, shape, kind, b):
    """ffn_gate_up_exps as ffn_gate_exps and ffn_up_exps."""
    if not name.endswith("ffn_gate_up_exps.weight"):
        return [(name, shape, kind, b)]
    one, half_shape = len(b) // shape[0] // 2, [shape[0], shape[1] // 2, shape[2]]
    parts = [b[i * one:(i + 1) * one] for i in range(2 * shape[0])]
    return [(name.replace("gate_up", "gate"), half_shape, kind, b"".join(parts[0::2])),
            (name.replace("gate_up", "up"), half_shape, kind, b"".join(parts[1::2]))]


def make(source, to, kind="BF16", parts=1, rounded=None, split=False, tables=None, alone=False):
    more, freqs = model_keys(source) if alone else ([], struct.pack("<4f", 1, 1, 1e30, 1e30))
    out, values = [("rope_freqs.weight", [len(freqs) // 4], "F32", freqs)], {}
    for name, (shape, b) in read_checkpoint(source).items():
        t, data, back = convert(name, shape, b, kind, tables)
        made = (gguf_name(name), shape, t, data)
        out += split_experts(*made) if split else [made]
        values[name] = (shape, back)
    keys = [("general.architecture", "gemma4"), ("general.name", "fixture")] + more
    if alone:
        os.makedirs(to, exist_ok=True)
        keys += tokenizer_keys(source)
    else:
        copy_rest(source, to)
    for p in range(parts):
        name = "model.gguf" if parts == 1 else f"model-{p + 1:05d}-of-{parts:05d}.gguf"
        mine = out[p * len(out) // parts:(p + 1) * len(out) // parts]
        split_keys = [("split.no", p), ("split.count", parts), ("split.tensors.count", len(out))] if parts > 1 else []
        write_gguf(os.path.join(to, name), mine, (keys if p == 0 else []) + split_keys)
    if rounded:
        copy_rest(source, rounded)
        write_safetensors(os.path.join(rounded, "model.safetensors"), values)


def check(source, to, kind, tables):
    """Reads the files with llama.cpp's package and compares bytes and, of blocks, values."""
    import gguf
    want = {}
    for name, (shape, b) in read_checkpoint(source).items():
        want[gguf_name(name)] = (shape, *convert(name, shape, b, kind, tables))
    for path in sorted(glob.glob(os.path.join(to, "*.gguf"))):
        for t in gguf.GGUFReader(path).tensors:
            if t.name == "rope_freqs.weight":
                continue
            shape, k, data, back = want.pop(t.name)
            same = t.tensor_type.name == k and [int(x) for x in t.shape] == (list(reversed(shape)) or [1]) and t.data.tobytes() == data
            if k in BLOCK:
                same = same and to_bf16(gguf.quants.dequantize(t.data, t.tensor_type).ravel().tolist()) == back
            if not same:
                sys.exit(f"{path}: {t.name}: the package gguf reads something else")
    print("left over:", list(want)) if want else print("the package gguf reads the same")


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("source"), a.add_argument("to")
    a.add_argument("--type", choices=TYPES, default="BF16")
    a.add_argument("--parts", type=int, default=1)
    a.add_argument("--split-experts", action="store_true")
    a.add_argument("--tables", choices=TYPES, help="of token_embd and per_layer_token_embd")
    a.add_argument("--rounded")
    a.add_argument("--check", action="store_true")
    a.add_argument("--alone", action="store_true")
    a = a.parse_args()
    make(a.source, a.to, a.type, a.parts, a.rounded, a.split_experts, a.tables, a.alone)
    if a.check:
        check(a.source, a.to, a.type, a.tables)


if __name__ == "__main__":
    main()
