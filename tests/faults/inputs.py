#!/usr/bin/env python3
"""Inputs of unusual form through the whole of `shoal run`: a 50 MB line, invalid UTF-8, no final newline, CRLF, a million empty
lines, NUL bytes, nothing at all. One row for each non-empty line, with the number of its line; the other requests are answered
as if they were alone; memory does not grow with the longest line."""
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import shoaltest as st

MODEL = os.path.join(st.MODELS, "e2b-like")


def good(cid):
    return json.dumps(st.completion(cid, [2, 5, 7], max_tokens=4, ignore_eos=True, return_token_ids=True)).encode()


def main():
    check = st.Checks()
    with st.Scratch() as s:
        def run(name, data):
            inp, out = s.file(name + ".jsonl"), s.file(name + ".out")
            with open(inp, "wb") as f:
                f.write(data)
            p = subprocess.run(st.command(MODEL, inp, out, "-n", 1), env=s.env(), capture_output=True, text=True, timeout=120)
            rows = []
            if os.path.exists(out):
                with open(out) as f:
                    rows = [json.loads(line) for line in f]
            check(not os.path.exists(out + ".store") or p.returncode != 0, f"{name}: the store was left after exit 0")
            return p.returncode, rows, p.stderr

        def by_id(rows):
            return {r["custom_id"]: st.strip(r) for r in rows if r["custom_id"] is not None}

        def refusals(rows):
            return {r["error"]["line"]: r for r in rows if r["custom_id"] is None}

        code, rows, err = run("alone", good("a") + b"\n")
        check(code == 0 and len(rows) == 1, f"alone: exit {code}, {len(rows)} rows: {err[-300:]}")
        want = by_id(rows).get("a")

        def both(name, data, code_wanted, bad_lines, word):
            code, rows, err = run(name, data)
            check(code == code_wanted, f"{name}: exit {code}, not {code_wanted}: {err[-300:]}")
            check(by_id(rows).get("a") == want, f"{name}: the good request was not answered as alone")
            bad = refusals(rows)
            check(sorted(bad) == bad_lines, f"{name}: rows of lines {sorted(bad)}, not {bad_lines}")
            for n, r in bad.items():
                check(word in r["error"]["message"], f"{name}: line {n}: {r['error']['message'][:200]}")
                check(r["response"]["status_code"] in (400, 413), f"{name}: line {n}: status {r['response']['status_code']}")
                print(f"{name}: {r['response']['status_code']} {r['error']['message'][:160]}", flush=True)
            check(len(rows) == len(bad) + len(by_id(rows)), f"{name}: {len(rows)} rows")

        out = s.file("pipe.out")
        p = subprocess.run(st.command(MODEL, "/dev/stdin", out, "-n", 1), input=good("a") + b"\n" + good("b") + b"\n",
                           env=s.env(), capture_output=True, timeout=120)
        rows = [json.loads(line) for line in open(out)] if os.path.exists(out) else []
        check(p.returncode == 0 and len(rows) == 2 and by_id(rows).get("a") == want,
              f"pipe: exit {p.returncode}, {len(rows)} rows: {p.stderr[-300:]}")

        p = subprocess.Popen(st.command(MODEL, "-", s.file("ctrl-c.out"), "-n", 1), stdin=subprocess.PIPE, env=s.env(),
                             stderr=subprocess.PIPE)
        time.sleep(1)
        p.send_signal(signal.SIGINT)
        try:
            err = p.communicate(timeout=20)[1] if p.wait(20) is not None else b""
        except subprocess.TimeoutExpired:
            p.kill()
            err = b"it reads on"
        check(p.returncode == 4 and b"interrupted" in err, f"ctrl-c while reading: exit {p.returncode}: {err[-300:]}")

        both("long-line", b'{"custom_id": "x", "prompt": "' + b"a" * 50_000_000 + b'"}\n' + good("a") + b"\n", 1, [1], "line")
        both("long-line-last", good("a") + b"\n" + b"b" * 50_000_000, 1, [2], "line")
        both("invalid-utf8", b'{"custom_id": "\xff\xfe", "prompt": "x"}\n' + good("a") + b"\n", 1, [1], "UTF-8")
        both("invalid-utf8-in-prompt", b'{"prompt": "caf\xe9", "max_tokens": 1, "custom_id": "y"}\n' + good("a"), 1, [1], "UTF-8")
        both("overlong-utf8", b'{"prompt": "\xc0\xaf", "custom_id": "y"}\n' + good("a"), 1, [1], "UTF-8")
        both("surrogate", b'{"prompt": "\xed\xa0\x80", "custom_id": "y"}\n' + good("a"), 1, [1], "UTF-8")
        both("no-final-newline", b"\n" + good("a"), 0, [], "")
        both("crlf", b"\r\n" + good("a") + b"\r\n\r\n", 0, [], "")
        both("byte-order-mark", b"\xef\xbb\xbf" + good("a") + b"\r\n", 0, [], "")
        both("byte-order-mark-blank", b"\xef\xbb\xbf \r\n" + good("a") + b"\n", 0, [], "")
        both("byte-order-mark-later", good("a") + b"\n\xef\xbb\xbf" + good("b") + b"\n", 1, [2], "JSON")
        both("nul", b"\0\0\n" + good("a") + b"\n", 1, [1], "")
        both("million-empty", b"\n" * 500_000 + good("a") + b"\n" * 500_001 + b"{\n", 1, [1_000_002], "")
        both("deep", b"[" * 100_000 + b"\n" + good("a") + b"\n", 1, [1], "")
        both("not-an-object", b'[1]\n"x"\n3\nnull\n' + good("a") + b"\n", 1, [1, 2, 3, 4], "object")

        # An input that grows while it is read is no fixed job: said so, nothing written, and no promise that it goes on.
        grows, stop = s.file("grows.jsonl"), threading.Event()
        with open(grows, "wb") as f:
            f.write(b"".join(good(f"g{k}") + b"\n" for k in range(2000)))

        def grow():
            with open(grows, "ab", 0) as f:
                while not stop.wait(0.001):
                    f.write(b'{"prompt": [2], "max_tokens": 1}\n')

        writer = threading.Thread(target=grow)
        writer.start()
        p = subprocess.run(st.command(MODEL, grows, s.file("grows.out"), "-n", 1), env=s.env(), capture_output=True, text=True, timeout=120)
        stop.set()
        writer.join()
        said = "changed while it was read" in p.stderr and "begin again" in p.stderr and "goes on" not in p.stderr
        check(p.returncode == 2 and said and not os.path.exists(s.file("grows.out")), f"grows: exit {p.returncode}: {p.stderr[-300:]}")

        for name, data in (("empty", b""), ("only-a-mark", b"\xef\xbb\xbf"), ("only-newlines", b"\n" * 1_000_000)):
            code, rows, err = run(name, data)
            check(code == 0 and rows == [], f"{name}: exit {code}, {len(rows)} rows")
            check("is empty: nothing to answer" in err, f"{name}: said {err[-200:]}")

        # a coordinator that keeps a line of any length would need far more than this
        most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
        print(f"largest process: {most} MiB")
        check(most < 400, f"the largest process had {most} MiB")
        left = st.left_behind(s)
        check(not left, f"left behind: {left}")
    check.finish()


main()
