#!/usr/bin/env python3
"""shoal bench on small models: the counts of its JSON agree with counts made here from config.json and the tensors' shapes,
the figures with each other, and what it cannot do is refused by name. Says nothing of speed."""
import json
import math
import os
import struct
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import shoaltest as st

failures = []


def check(name, ok, what=""):
    if not ok:
        failures.append(name)
        print(f"FAIL {name}: {what}")


def near(name, got, want, rel=2e-3):
    check(name, math.isclose(got, want, rel_tol=rel), f"{got} is not {want}")


def bench(s, *options):
    return subprocess.run([st.shoal(), "bench", *map(str, options)], capture_output=True, text=True, timeout=120, env=s.env())


class Counts:
    """Multiplications and weights of a model, from the shapes of its tensors."""

    def __init__(self, folder):
        with open(os.path.join(folder, "config.json")) as f:
            c = json.load(f)
        c = c.get("text_config", c)
        with open(os.path.join(folder, "model.safetensors"), "rb") as f:
            header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
        self.layers, self.heads = c["num_hidden_layers"], c["num_attention_heads"]
        self.shared = self.layers - (c.get("num_kv_shared_layers") or 0)  # the first consumer
        self.experts, self.top_k = c.get("num_experts") or 0, c.get("top_k_experts") or 0
        self.window = [c["sliding_window"] if t == "sliding_attention" else 0 for t in c["layer_types"]]
        self.matrix, self.expert, self.q = [0] * self.layers, [0] * self.layers, [0] * self.layers
        self.head = 0
        for name, t in header.items():
            if name == "__metadata__" or len(t["shape"]) < 2:
                continue
            items = math.prod(t["shape"])
            if "layers." in name and "per_layer_model" not in name:
                i = int(name.split("layers.")[1].split(".")[0])
                if i >= self.shared and ("k_proj" in name or "v_proj" in name):
                    continue
                if ".experts." in name:
                    self.expert[i] += items // self.experts
                else:
                    self.matrix[i] += items
                if "q_proj" in name:
                    self.q[i] = t["shape"][0]
            elif "per_layer_model_projection" in name:
                self.matrix = [m + items // self.layers for m in self.matrix]
            elif "embed_tokens.weight" in name:
                self.head = items

    def flops(self, pos, rows, kept):
        total = 2 * self.head * kept
        for i in range(self.layers):
            first = 0 if i < self.shared else rows - kept
            for r in range(first, rows):
                keys = min(pos + r + 1, self.window[i] or 1 << 30)
                total += 2 * (self.matrix[i] + self.expert[i] * self.top_k) + 4 * self.q[i] * keys
        return total

    def dense_bytes(self):
        return 2 * (sum(self.matrix) + self.head)

    def expert_bytes(self, batch):  # at least, at most
        least, most = self.top_k, min(self.experts, batch * self.top_k)
        return 2 * sum(self.expert) * least, 2 * sum(self.expert) * most


def one_model(s, name, *options):
    folder = os.path.join(st.MODELS, name)
    prompt, steps, batches = 70, 5, [1, 6]
    p = bench(s, "-m", folder, "--prompt", prompt, "--generate", steps, "--batch", "1,6", "--chunk", 32, "--rounds", 1,
              "--threads", 2, "--json", *options)
    check(f"{name}: exit", p.returncode == 0, p.stderr)
    if p.returncode:
        return
    j, n = json.loads(p.stdout), Counts(folder)
    check(f"{name}: threads", j["threads"] == 2 and j["layers"] == [0, n.layers], j)
    check(f"{name}: limits", j["limits"]["read_gbs"] > 0.1 and j["limits"]["fma_gflops"] > 0.1, j["limits"])
    pre = j["prefill"]
    near(f"{name}: prompt tokens", pre["tokens_per_s"], prompt / pre["ms"] * 1e3)
    chunks = [(a, min(32, prompt - a)) for a in range(0, prompt, 32)]
    want = sum(n.flops(a, r, 1 if a + r == prompt else 0) for a, r in chunks)
    near(f"{name}: prompt operations", pre["gflops"] * pre["ms"] * 1e6, want)
    check(f"{name}: steps of the prompt", pre["steps"] == len(chunks), pre["steps"])
    check(f"{name}: batches", [d["batch"] for d in j["decode"]] == batches, j["decode"])
    for b, d in zip(batches, j["decode"]):
        what = f"{name}: decode {b}"
        near(f"{what}: tokens", d["tokens_per_s"], b / d["step_ms"] * 1e3)
        near(f"{what}: operations", d["gflops"] * d["step_ms"] * 1e6, b * sum(n.flops(prompt + k, 1, 1) for k in range(steps)) / steps)
        read = d["weight_gbs"] * d["step_ms"] * 1e6 - n.dense_bytes()
        least, most = n.expert_bytes(b)
        slack = n.dense_bytes() * 2e-3
        check(f"{what}: weights", least - slack <= read <= most + slack, f"experts: {read}, not {least} to {most}")
        near(f"{what}: share of reading", d["read_share"], d["weight_gbs"] / j["limits"]["read_gbs"], 0.9)
        check(f"{what}: order", d["best_step_ms"] <= d["step_ms"] * 1.001 and d["best_step_ms"] <= d["mean_step_ms"] * 1.001, d)
        near(f"{what}: time", sum(d["time_share"].values()), 1)
        check(f"{what}: causes", all(0 <= v <= 1 for v in d["time_share"].values()), d["time_share"])


def refused(s, options, status, message):
    p = bench(s, *options)
    check(f"refused {options}", p.returncode == status and message in p.stderr, f"exit {p.returncode}: {p.stderr}")


def main():
    with st.Scratch() as s:
        one_model(s, "e2b-like")
        one_model(s, "31b-like", "--mode", "exact")
        one_model(s, "26b-a4b-like", "--kv", "f32")
        p = bench(s, "-m", os.path.join(st.MODELS, "e2b-like"), "--layers", "4:9", "--prompt", 9, "--generate", 2, "--batch", "3",
                  "--rounds", 1, "--json")
        check("a stage in the middle", p.returncode == 0 and json.loads(p.stdout)["layers"] == [4, 9], p.stdout + p.stderr)
        p = bench(s, "--prompt", 33, "--generate", 2, "--batch", "2", "--rounds", 1)
        check("the table", p.returncode == 0 and "decode      2" in p.stdout and "prefill" in p.stdout, p.stdout + p.stderr)
        refused(s, ["--batch", "1,,2"], 2, "--batch: '1,,2': up to 32 numbers from 1 to 4096 are allowed, such as 1,8,32")
        refused(s, ["--batch", "0"], 2, "--batch: '0'")
        refused(s, ["--layers", "3:99"], 2, "--layers: '3:99': A:B with 0 ≤ A < B ≤ 6 is allowed")
        refused(s, ["--prompt", "4096"], 2, "--prompt: 4096 tokens and 128 more: the model's context is 4096")
        refused(s, ["-m", s.path], 2, "has no config.json")
        refused(s, ["more"], 2, "'more': no operands are allowed")
    print("bench_smoke:", f"{len(failures)} failed" if failures else "passed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
