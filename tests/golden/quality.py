#!/usr/bin/env python3
"""What q8 and q4 cost in quality, on the demo model: perplexity of the texts of demo-tests/nll.json against the float32 golden, and how
often the likeliest next token is the reference's. Prompts are scored, nothing is generated."""
import json
import math
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import shoaltest as st

# mode: most that perplexity may rise over the golden, least share of equal best tokens
LIMITS = {"exact": (0.0001, 0.999), "bf16": (0.005, 0.985), "q8": (0.01, 0.97), "q4": (0.03, 0.93)}


def main():
    with open(os.path.join(st.ROOT, "tests", "data", "demo-tests", "nll.json")) as f:
        texts = json.load(f)["texts"]
    golden = math.exp(sum(sum(t["nll"]) for t in texts) / sum(len(t["nll"]) for t in texts))
    check = st.Checks()
    req = [st.completion(f"t{i}", t["ids"], max_tokens=0, echo=True, logprobs=1) for i, t in enumerate(texts)]
    with st.Scratch() as s:
        for mode, (worse, agree) in LIMITS.items():
            code, rows, err = st.run(s, os.path.join(st.ROOT, "share", "minnow"), req, "-n", 1, "--mode", mode)
            if not check(code == 0 and len(rows) == len(req), f"{mode}: exit {code}: {err[-300:]}"):
                continue
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
            print(f"{mode:6} perplexity {ppl:.4f} ({100 * (ppl / golden - 1):+.2f} %), best token kept in {100 * same / n:.2f} % of {n}", flush=True)
            check(ppl < golden * (1 + worse), f"{mode}: perplexity {ppl} against {golden}")
            check(same >= agree * n, f"{mode}: {same} of {n} best tokens")
    check.finish()


main()
