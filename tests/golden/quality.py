#!/usr/bin/env python3
"""What q8 and q4 cost in quality, on the demo model, and keys and values in 8 bits (--kv q8) in each mode: perplexity of the texts of
demo-tests/nll.json against the float32 golden, how often the likeliest next token is the reference's, and for --kv q8 how often it is that
of the same mode with its usual KV type. Prompts are scored, nothing is generated."""
import json
import math
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import shoaltest as st

# mode, KV type: most that perplexity may rise over the golden, least share of equal best tokens
LIMITS = {("exact", "f32"): (0.0001, 0.999), ("bf16", "bf16"): (0.005, 0.985), ("q8", "bf16"): (0.01, 0.97), ("q4", "bf16"): (0.03, 0.93),
          ("exact", "q8"): (0.005, 0.985), ("bf16", "q8"): (0.005, 0.98), ("q8", "q8"): (0.01, 0.97), ("q4", "q8"): (0.03, 0.93)}
SAME = 0.975  # least share of best tokens that --kv q8 leaves as they were


def best_tokens(rows, texts):
    """The likeliest token after each of all texts' prefixes."""
    lp = [rows[f"t{i}"]["response"]["body"]["choices"][0]["logprobs"]["top_logprobs"] for i in range(len(texts))]
    return [max(top, key=top.get) for one in lp for top in one[1:]]


def main():
    with open(os.path.join(st.ROOT, "tests", "data", "demo-tests", "nll.json")) as f:
        texts = json.load(f)["texts"]
    golden = math.exp(sum(sum(t["nll"]) for t in texts) / sum(len(t["nll"]) for t in texts))
    check = st.Checks()
    req = [st.completion(f"t{i}", t["ids"], max_tokens=0, echo=True, logprobs=1) for i, t in enumerate(texts)]
    with st.Scratch() as s:
        usual = {}
        for (mode, kv), (worse, agree) in LIMITS.items():
            code, rows, err = st.run(s, os.path.join(st.ROOT, "share", "minnow"), req, "-n", 1, "--mode", mode, "--kv", kv)
            if not check(code == 0 and len(rows) == len(req), f"{mode}, kv {kv}: exit {code}: {err[-300:]}"):
                continue
            best_of = best_tokens(rows, texts)
            kept = [x == y for x, y in zip(best_of, usual.setdefault(mode, best_of))]
            nll = n = same = 0
            for i, t in enumerate(texts):
                lp = rows[f"t{i}"]["response"]["body"]["choices"][0]["logprobs"]
                for k in range(1, len(t["ids"])):
                    best = max(lp["top_logprobs"][k].values())
                    nll -= lp["token_logprobs"][k]
                    # the golden's best token is the text's own: so must ours be
                    if t["argmax"][k - 1] == t["ids"][k]:
                        same += lp["token_logprobs"][k] >= best
                        n += 1
            ppl = math.exp(nll / sum(len(t["nll"]) for t in texts))
            print(f"{mode:6} kv {kv:5} perplexity {ppl:.4f} ({100 * (ppl / golden - 1):+.2f} %), best token kept in {100 * same / n:.2f} % of {n}, "
                  f"as with the usual KV type in {100 * sum(kept) / len(kept):.2f} % of {len(kept)}", flush=True)
            check(ppl < golden * (1 + worse), f"{mode}, kv {kv}: perplexity {ppl} against {golden}")
            check(same >= agree * n, f"{mode}, kv {kv}: {same} of {n} best tokens")
            check(sum(kept) >= SAME * len(kept), f"{mode}, kv {kv}: {sum(kept)} of {len(kept)} best tokens as with the usual KV type")
    check.finish()


main()
