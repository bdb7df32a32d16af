#!/usr/bin/env python3
"""The demo batch on 4 ranks: content, finish reason, token ids and usage of all 64 chats as expected, in exact and bf16 mode. Ids may
differ from the expectation only in bf16 mode and only where the expected margin is thin."""
import json
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import shoaltest as st

THIN = 0.05


def load(path):
    with open(path) as f:
        return [json.loads(x) for x in f]


def main():
    check = st.Checks()
    batch = load(os.path.join(st.ROOT, "share", "demo-batch.jsonl"))
    for r in batch:
        r["body"]["return_token_ids"] = True
    expected = {e["custom_id"]: e for e in load(os.path.join(st.DATA, "demo-tests", "batch64.expected.jsonl"))}
    with st.Scratch() as s:
        for mode, ranks in (("exact", 4), ("bf16", 4), ("bf16", 1)):
            code, got, err = st.run(s, st.DEMO, batch, "-n", ranks, "--mode", mode)
            check(code == 0 and len(got) == 64, f"{mode} on {ranks}: exit {code}, {len(got)} rows: {err[-300:]}")
            for cid, e in expected.items():
                try:
                    body = got[cid]["response"]["body"]
                    c = body["choices"][0]
                except (KeyError, TypeError):
                    check(False, f"{mode} {cid}: no answer: {got.get(cid)}")
                    continue
                thin = mode != "exact" and e["min_top2_margin"] < THIN
                check(thin or c["token_ids"] == e["output_ids"], f"{mode} {cid}: ids {c['token_ids']} not {e['output_ids']}")
                check(thin or c["message"]["content"] == e["content"], f"{mode} {cid}: {c['message']['content']!r} not {e['content']!r}")
                check(thin or c["finish_reason"] == e["finish_reason"], f"{mode} {cid}: finish {c['finish_reason']}")
                u = body["usage"]
                check(u["prompt_tokens"] == e["prompt_tokens"], f"{mode} {cid}: prompt_tokens {u['prompt_tokens']}")
                check(thin or u["completion_tokens"] == e["completion_tokens"], f"{mode} {cid}: completion_tokens {u['completion_tokens']}")
        check(not st.left_behind(s), f"left behind: {st.left_behind(s)}")
    check.finish()


main()
