#!/usr/bin/env python3
"""Writes tests/data/odd: tiny random checkpoints whose shapes no released model has, and their logits.

The released shapes are kind: widths are multiples of 32, heads are powers of two, every model has both kinds of
layers. A program can lean on that without anybody noticing. These checkpoints are not kind. The logits come from
forward() below: float64, one sequence, no cache, written from the formulas (docs/model.md) and from nothing else.

    python3 -P tests/golden/make_odd_models.py                  needs numpy
    python3 -P tests/golden/make_odd_models.py --compare DIR    DIR has ref_text_numpy.py, a float32 implementation with
                                                                caches: prints how far its logits are
    python3 -P tests/golden/make_odd_models.py --random N SEED DIR    N more of any shape into DIR, for odd_golden_test DIR/*/
"""
import json, os, struct, sys
import numpy as np

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "data", "odd")
S, G = "sliding_attention", "full_attention"


def rope(kind="default", theta=1e4, **more):
    return dict(rope_type=kind, rope_theta=theta, **more)


BASE = dict(model_type="gemma4_text", rms_norm_eps=1e-6, final_logit_softcapping=30.0, hidden_size_per_layer_input=0,
            tie_word_embeddings=True, pad_token_id=0, bos_token_id=2, eos_token_id=[1, 3])

# Fields of config.json; "_" fields steer the writer: tokens to score, what the file looks like.
MODELS = {
    # Odd hidden and vocabulary, heads in threes, heads of 10 and 18, window inside a page, scaled frequencies, another
    # partial factor, no softcap, own head, no layer_scalar; the last layer is full although the list says otherwise.
    "odd-widths": dict(
        hidden_size=37, intermediate_size=45, num_hidden_layers=5, num_attention_heads=6, num_key_value_heads=3,
        head_dim=10, global_head_dim=18, num_global_key_value_heads=2, attention_k_eq_v=True, vocab_size=61,
        sliding_window=5, layer_types=[S, G, S, G, S], final_logit_softcapping=None, tie_word_embeddings=False,
        rope_parameters={S: rope(theta=5e3),
                         G: rope("proportional", 2.5e5, partial_rotary_factor=0.4, factor=8.0)},
        _tokens=283, _scalar=False),
    # One head, a window wider than a segment of attention and no multiple of a page, sliding layers but for the last;
    # an empty per_layer_config: full layers have the sliding layers' head_dim. Rotation by default values.
    "wide-window": dict(
        hidden_size=33, intermediate_size=31, num_hidden_layers=3, num_attention_heads=1, num_key_value_heads=1,
        head_dim=34, per_layer_config={}, vocab_size=47, sliding_window=203, layer_types=[S, S, S], rms_norm_eps=1e-5,
        _tokens=611),
    # Full layers only, rotated whole; producers and consumers of that one kind; per-layer embeddings 7 wide with
    # more rows than the vocabulary; double-wide consumers.
    "full-only": dict(
        hidden_size=40, intermediate_size=23, num_hidden_layers=4, num_attention_heads=12, num_key_value_heads=4,
        head_dim=8, global_head_dim=20, vocab_size=66, layer_types=[G, G, G, G], num_kv_shared_layers=2,
        use_double_wide_mlp=True, hidden_size_per_layer_input=7, vocab_size_per_layer_input=71,
        rope_parameters={G: rope(theta=3e4)}, _tokens=419),
    # K = V with consumers; per_layer_config gives the sliding layers a shape of their own, with numbers padded.
    # Sliding consumers read a producer far below; frequencies of the sliding kind proportional.
    "shared-values": dict(
        hidden_size=46, intermediate_size=38, num_hidden_layers=7, num_attention_heads=4, num_key_value_heads=1,
        head_dim=24, attention_k_eq_v=True, vocab_size=59, sliding_window=39,
        per_layer_config={"00": dict(head_dim=14, num_key_value_heads=4), "02": dict(head_dim=14, num_key_value_heads=2),
                          "4": dict(head_dim=14, num_key_value_heads=2)},
        layer_types=[S, G, S, G, S, G, G], num_kv_shared_layers=3, hidden_size_per_layer_input=5,
        vocab_size_per_layer_input=59,
        rope_parameters={S: rope("proportional", 1e4, partial_rotary_factor=0.75),
                         G: rope("proportional", 1e6, partial_rotary_factor=0.25)},
        _tokens=330),
    # Five experts of 13, one of them per token, stored one by one, under the other names of the fields; F32 items.
    "one-expert": dict(
        hidden_size=35, intermediate_size=21, num_hidden_layers=3, num_attention_heads=5, num_key_value_heads=1,
        head_dim=12, global_head_dim=12, vocab_size=65, sliding_window=32, layer_types=[S, S, G],
        attention_k_eq_v=True, enable_moe_block=True, num_local_experts=5, num_experts_per_tok=1,
        expert_intermediate_size=13, _tokens=150, _unfused=True, _f32=True),
    # All three experts for every token, fused, names ending in .weight, a composite file.
    "all-experts": dict(
        hidden_size=34, intermediate_size=33, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3,
        head_dim=16, global_head_dim=30, vocab_size=33, sliding_window=64, enable_moe_block=True, num_experts=3,
        top_k_experts=3, moe_intermediate_size=9, final_logit_softcapping=7.5, _tokens=140, _composite=True,
        _suffix=True),
    # A single layer, and more query heads on one KV head than attention takes at once.
    "one-layer": dict(
        hidden_size=19, intermediate_size=1, num_hidden_layers=1, num_attention_heads=70, num_key_value_heads=1,
        head_dim=4, global_head_dim=4, vocab_size=31, layer_types=[S], _tokens=290),
}


# --- the layer table ---------------------------------------------------------------------------------------------------

def layers_of(c):
    L, k_eq_v = c["num_hidden_layers"], c.get("attention_k_eq_v", False)
    types = list(c.get("layer_types") or [G if (i + 1) % 6 == 0 else S for i in range(L)])
    types[-1] = G
    ropes = c.get("rope_parameters") or {S: rope(), G: rope("proportional", 1e6, partial_rotary_factor=0.25)}
    plc = c.get("per_layer_config")
    over = {int(k): v for k, v in (plc or {}).items()}
    first = L - c.get("num_kv_shared_layers", 0)
    out = []
    for i, t in enumerate(types):
        hd, kv = c["head_dim"], c["num_key_value_heads"]
        if plc is not None:
            hd, kv = over.get(i, {}).get("head_dim", hd), over.get(i, {}).get("num_key_value_heads", kv)
        elif t == G:
            hd = c.get("global_head_dim", 512)
            kv = c.get("num_global_key_value_heads", kv) if k_eq_v else kv
        own = i < first
        out.append(dict(
            type=t, hd=hd, kv=kv, own=own, same=k_eq_v and t == G, rope=ropes[t],
            source=i if own else max(j for j in range(first) if types[j] == t),
            window=c.get("sliding_window", 512) if t == S else None,
            ff=c["intermediate_size"] * (2 if c.get("use_double_wide_mlp") and not own else 1)))
    return out


def experts_of(c):
    if not c.get("enable_moe_block"):
        return 0, 0, 0
    return (c.get("num_experts") or c["num_local_experts"], c.get("top_k_experts") or c["num_experts_per_tok"],
            c.get("moe_intermediate_size") or c["expert_intermediate_size"])


# --- random tensors, exact in bf16 -------------------------------------------------------------------------------------

def bf16(x):
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def tensors_of(c, r):
    H, V, P, L = c["hidden_size"], c["vocab_size"], c["hidden_size_per_layer_input"], c["num_hidden_layers"]
    heads, (E, _, I) = c["num_attention_heads"], experts_of(c)
    t = {}

    def mat(name, *shape):
        t[name] = bf16(r.standard_normal(shape) * 1.4 / np.sqrt(shape[-1]))

    def vec(name, n, mean=1.0):
        t[name] = bf16(mean * (1 + 0.3 * r.standard_normal(n)))

    t["embed_tokens.weight"] = bf16(r.standard_normal((V, H)) / np.sqrt(H) * 2)
    vec("norm.weight", H)
    if not c["tie_word_embeddings"]:
        mat("lm_head.weight", V, H)
    if P:
        t["embed_tokens_per_layer.weight"] = bf16(r.standard_normal((c["vocab_size_per_layer_input"], L * P)) / np.sqrt(P))
        mat("per_layer_model_projection.weight", L * P, H)
        vec("per_layer_projection_norm.weight", P)
    for i, l in enumerate(layers_of(c)):
        p = f"layers.{i}."
        for n in ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"):
            vec(p + n + ".weight", H)
        a = p + "self_attn."
        mat(a + "q_proj.weight", heads * l["hd"], H)
        mat(a + "o_proj.weight", H, heads * l["hd"])
        vec(a + "q_norm.weight", l["hd"], 0.5)
        if l["own"]:
            vec(a + "k_norm.weight", l["hd"], 0.5)
            mat(a + "k_proj.weight", l["kv"] * l["hd"], H)
            if not l["same"]:
                mat(a + "v_proj.weight", l["kv"] * l["hd"], H)
        mat(p + "mlp.gate_proj.weight", l["ff"], H)
        mat(p + "mlp.up_proj.weight", l["ff"], H)
        mat(p + "mlp.down_proj.weight", H, l["ff"])
        if c.get("_scalar", True):
            vec(p + "layer_scalar", 1)
        if P:
            mat(p + "per_layer_input_gate.weight", P, H)
            mat(p + "per_layer_projection.weight", H, P)
            vec(p + "post_per_layer_input_norm.weight", H)
        if E:
            for n in ("post_feedforward_layernorm_1", "post_feedforward_layernorm_2", "pre_feedforward_layernorm_2"):
                vec(p + n + ".weight", H)
            t[p + "router.proj.weight"] = bf16(r.standard_normal((E, H)) * 2)
            vec(p + "router.scale", H)
            vec(p + "router.per_expert_scale", E)
            mat(p + "experts.gate_up_proj", E, 2 * I, H)
            mat(p + "experts.down_proj", E, H, I)
    return t


def file_names(c, t):
    """The tensors under the names and in the pieces that the file has."""
    prefix = "model.language_model." if c.get("_composite") else "model."
    E, _, I = experts_of(c)
    out = {}
    for name, x in t.items():
        if ".experts." in name and c.get("_unfused"):
            base = name[:name.index("experts.") + 8]
            for e in range(E):
                if "gate_up" in name:
                    out[f"{prefix}{base}{e}.gate_proj.weight"] = x[e, :I]
                    out[f"{prefix}{base}{e}.up_proj.weight"] = x[e, I:]
                else:
                    out[f"{prefix}{base}{e}.down_proj.weight"] = x[e]
        elif ".experts." in name and c.get("_suffix"):
            out[f"{prefix}{name}.weight"] = x
        else:
            out[name if name.startswith("lm_head") else prefix + name] = x
    return out


def write_safetensors(path, tensors, f32):
    header, data = {}, b""
    for name in sorted(tensors):
        x = np.ascontiguousarray(tensors[name], np.float32)
        raw = x.tobytes() if f32 else (x.view(np.uint32) >> 16).astype("<u2").tobytes()
        header[name] = dict(dtype="F32" if f32 else "BF16", shape=list(x.shape), data_offsets=[len(data), len(data) + len(raw)])
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + data)


# --- the model in float64 ----------------------------------------------------------------------------------------------

def rms(x, w, eps):
    y = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps)
    return y if w is None else y * w


def gelu(z):
    return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z ** 3)))


def rotate(x, l):
    """x [T, heads, hd]; the angle is a float32 product of position and frequency, as the model was trained with."""
    p, hd, half = l["rope"], l["hd"], l["hd"] // 2
    whole = p["rope_type"] == "default"
    n = half if whole else int(p.get("partial_rotary_factor", 1.0) * hd // 2)
    f = np.zeros(half, np.float32)
    f[:n] = 1 / np.power(np.float32(p["rope_theta"]), np.arange(0, 2 * n, 2, dtype=np.float32) / np.float32(hd))
    if not whole:
        f /= np.float32(p.get("factor", 1.0))
    a = (np.arange(len(x), dtype=np.float32)[:, None] * f).astype(np.float64)[:, None, :]
    u, v = x[..., :half], x[..., half:]
    return np.concatenate([u * np.cos(a) - v * np.sin(a), v * np.cos(a) + u * np.sin(a)], -1)


def attention(q, k, v, window):
    T, heads, _ = q.shape
    g = heads // k.shape[1]
    k, v = np.repeat(k, g, 1), np.repeat(v, g, 1)
    s = np.einsum("thd,shd->hts", q, k)
    t = np.arange(T)
    ok = t[None, :] <= t[:, None]
    if window:
        ok &= t[None, :] > t[:, None] - window
    s = np.where(ok, s, -np.inf)
    e = np.exp(s - s.max(-1, keepdims=True))
    return np.einsum("hts,shd->thd", e / e.sum(-1, keepdims=True), v).reshape(T, -1)


def experts(c, x, w, eps, gaps):
    E, K, _ = experts_of(c)
    z = (rms(x, None, eps) * w("router.scale") / np.sqrt(x.shape[1])) @ w("router.proj.weight").T
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    order = np.argsort(-p, -1, kind="stable")
    if K < E:
        best = np.take_along_axis(p, order, -1)
        gaps.append(np.min(best[:, K - 1] / best[:, K] - 1))
    m, out = rms(x, w("pre_feedforward_layernorm_2.weight"), eps), np.zeros_like(x)
    for t in range(len(x)):
        chosen = order[t, :K]
        for e in chosen:
            gate, up = np.split(w("experts.gate_up_proj")[e] @ m[t], 2)
            y = w("experts.down_proj")[e] @ (gelu(gate) * up)
            out[t] += p[t, e] / p[t, chosen].sum() * w("router.per_expert_scale")[e] * y
    return out


def forward(c, tensors, ids, gaps):
    T64 = {k: v.astype(np.float64) for k, v in tensors.items()}
    H, P, L, eps = c["hidden_size"], c["hidden_size_per_layer_input"], c["num_hidden_layers"], c["rms_norm_eps"]
    table = layers_of(c)
    x = T64["embed_tokens.weight"][ids] * np.sqrt(H)
    if P:
        ctx = (x @ T64["per_layer_model_projection.weight"].T / np.sqrt(H)).reshape(len(ids), L, P)
        tok = (T64["embed_tokens_per_layer.weight"][ids] * np.sqrt(P)).reshape(len(ids), L, P)
        ple = (rms(ctx, T64["per_layer_projection_norm.weight"], eps) + tok) / np.sqrt(2)
    kept = {}
    for i, l in enumerate(table):
        def w(name, i=i):
            return T64[f"layers.{i}.{name}"]
        h = rms(x, w("input_layernorm.weight"), eps)
        q = (h @ w("self_attn.q_proj.weight").T).reshape(len(ids), -1, l["hd"])
        q = rotate(rms(q, w("self_attn.q_norm.weight"), eps), l)
        if l["own"]:
            raw = (h @ w("self_attn.k_proj.weight").T).reshape(len(ids), -1, l["hd"])
            val = raw if l["same"] else (h @ w("self_attn.v_proj.weight").T).reshape(len(ids), -1, l["hd"])
            kept[i] = rotate(rms(raw, w("self_attn.k_norm.weight"), eps), l), rms(val, None, eps)
        a = attention(q, *kept[l["source"]], l["window"])
        x = x + rms(a @ w("self_attn.o_proj.weight").T, w("post_attention_layernorm.weight"), eps)
        h = rms(x, w("pre_feedforward_layernorm.weight"), eps)
        y = (gelu(h @ w("mlp.gate_proj.weight").T) * (h @ w("mlp.up_proj.weight").T)) @ w("mlp.down_proj.weight").T
        if c.get("enable_moe_block"):
            y = rms(y, w("post_feedforward_layernorm_1.weight"), eps) + \
                rms(experts(c, x, w, eps, gaps), w("post_feedforward_layernorm_2.weight"), eps)
        x = x + rms(y, w("post_feedforward_layernorm.weight"), eps)
        if P:
            g = gelu(x @ w("per_layer_input_gate.weight").T) * ple[:, i]
            x = x + rms(g @ w("per_layer_projection.weight").T, w("post_per_layer_input_norm.weight"), eps)
        x = x * T64.get(f"layers.{i}.layer_scalar", 1.0)
    head = T64.get("lm_head.weight", T64["embed_tokens.weight"])
    y = rms(x, T64["norm.weight"], eps) @ head.T
    cap = c["final_logit_softcapping"]
    return np.tanh(y / cap) * cap if cap else y


# --- writing -----------------------------------------------------------------------------------------------------------

def config_of(c):
    text = {k: v for k, v in c.items() if not k.startswith("_")}
    if not c.get("_composite"):
        return dict(text, architectures=["Gemma4ForCausalLM"])
    return dict(model_type="gemma4", architectures=["Gemma4ForConditionalGeneration"], text_config=text,
                image_token_id=258880)


def other_logits(compare, c, folder, ids):
    sys.path.insert(0, compare)
    import ref_text_numpy as ref
    fields = config_of(c)
    text = fields.get("text_config", fields)
    text["num_experts"], text["top_k_experts"], text["moe_intermediate_size"] = experts_of(c)  # it knows one name of each
    ref.Config.load = staticmethod(lambda path: ref.Config(fields))
    return ref.Pipeline(folder).forward(ids)


def make(name, fields, compare, where=HERE):
    c = dict(BASE, **fields)
    for seed in range(100):
        r = np.random.default_rng([*name.encode(), seed])
        tensors, gaps = tensors_of(c, r), []
        ids = r.integers(0, c["vocab_size"], c["_tokens"])
        logits = forward(c, tensors, ids, gaps)
        if not gaps or min(gaps) > 1e-3:  # no router's choice is too close to call in float32
            break
    folder = os.path.join(where, name)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config_of(c), f, indent=1)
        f.write("\n")
    write_safetensors(os.path.join(folder, "model.safetensors"), file_names(c, tensors), c.get("_f32"))
    n = len(ids)
    at = sorted({*range(0, 6), *range(8, n, 29), 31, 32, 127, 128, n - 2, n - 1} & set(range(n)))
    golden = dict(ids=ids.tolist(), positions=at, logits=[[float(f"{v:.7g}") for v in logits[p]] for p in at])
    with open(os.path.join(where, name + ".json"), "w") as f:
        json.dump(golden, f, separators=(",", ":"))
        f.write("\n")
    print(f"{name:14} {n} tokens, logits {logits.min():.1f} to {logits.max():.1f}", end="")
    if compare:
        print(f", float32 differs by {np.abs(other_logits(compare, c, folder, ids) - logits).max():.1e}", end="")
    print()


def random_fields(r):
    """Any legal shape: what the fields may be, not what models look like."""
    def pick(*values):
        return values[r.integers(len(values))]
    L, kv, P = int(r.integers(1, 9)), pick(1, 2, 3, 5), pick(0, 0, 3, 8, 17)
    types = [pick(S, G) for _ in range(L)]
    types[-1] = G
    shared = int(r.integers(0, L))
    while any(t not in types[:L - shared] for t in types[L - shared:]):
        shared -= 1
    f = dict(hidden_size=int(r.integers(2, 80)), intermediate_size=int(r.integers(1, 70)), num_hidden_layers=L,
             num_attention_heads=kv * pick(1, 2, 3, 7), num_key_value_heads=kv, head_dim=2 * int(r.integers(1, 24)),
             global_head_dim=2 * int(r.integers(1, 40)), vocab_size=int(r.integers(4, 90)),
             sliding_window=pick(1, 2, 31, 32, 33, 64, 127, 128, 129, 200), layer_types=types, num_kv_shared_layers=shared,
             attention_k_eq_v=bool(r.integers(2)), use_double_wide_mlp=bool(r.integers(2)),
             final_logit_softcapping=pick(None, 5.0, 30.0), tie_word_embeddings=bool(r.integers(2)),
             hidden_size_per_layer_input=P, _scalar=bool(r.integers(2)), _tokens=pick(1, 33, 129, 257, 390),
             rope_parameters={t: rope(pick("default", "proportional"), pick(1e2, 1e4, 1e6),
                                      partial_rotary_factor=pick(0.1, 0.25, 0.5, 0.77, 1.0), factor=pick(1.0, 4.0))
                              for t in (S, G)})
    if P:
        f["vocab_size_per_layer_input"] = f["vocab_size"] + pick(0, 3)
    if f["attention_k_eq_v"] and r.integers(2):
        f["num_global_key_value_heads"] = 1
    if r.integers(3) == 0:
        E = int(r.integers(1, 9))
        f.update(enable_moe_block=True, num_experts=E, top_k_experts=int(r.integers(1, E + 1)),
                 moe_intermediate_size=int(r.integers(1, 40)), _unfused=bool(r.integers(2)))
    return f


def main():
    if len(sys.argv) == 5 and sys.argv[1] == "--random":
        for i in range(int(sys.argv[2])):
            name = f"random-{sys.argv[3]}-{i}"
            make(name, random_fields(np.random.default_rng([int(sys.argv[3]), i])), None, sys.argv[4])
        return
    compare = sys.argv[2] if len(sys.argv) == 3 and sys.argv[1] == "--compare" else None
    for name, fields in MODELS.items():
        make(name, fields, compare)


if __name__ == "__main__":
    main()
