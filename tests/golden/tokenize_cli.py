#!/usr/bin/env python3
"""shoal tokenize and detokenize: the recorded small tokenizer cases through the program, files and standard input, and what it
says about bad lines."""
import json
import os
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import shoaltest as st

MODEL = os.path.join(st.MODELS, "31b-like")


def run(args, data=b""):
    p = subprocess.run([st.shoal(), *args], input=data, capture_output=True, timeout=60)
    return p.returncode, p.stdout, p.stderr.decode()


def expect(what, got, want):
    if got != want:
        sys.exit(f"{what}: got {got!r}, not {want!r}")


def main():
    cases = st.golden("tokenizer_small")["cases"]
    lines = [c for c in cases if "\n" not in c["text"]]
    text = "".join(c["text"] + "\n" for c in lines).encode()
    ids = "".join(" ".join(map(str, c["ids"])) + "\n" for c in lines).encode()
    expect("tokenize", run(["tokenize", "-m", MODEL], text), (0, ids, ""))
    decoded = "".join(c["decoded"] + "\n" for c in lines).encode()
    expect("detokenize", run(["detokenize", "-m", MODEL, "-"], ids), (0, decoded, ""))
    skipped = "".join(c["decoded_skip_special"] + "\n" for c in lines).encode()
    expect("--skip-special", run(["detokenize", "-m", MODEL, "--skip-special"], ids), (0, skipped, ""))
    rc, out, err = run(["tokenize", "-m", MODEL, "--json"], "".join(json.dumps(c["text"]) + "\n" for c in cases).encode())
    expect("tokenize --json", (rc, [json.loads(x) for x in out.splitlines()], err), (0, [c["ids"] for c in cases], ""))
    rc, out, err = run(["detokenize", "-m", MODEL, "--json"], out)
    expect("detokenize --json", (rc, [json.loads(x) for x in out.split(b"\n")[:-1]], err), (0, [c["decoded"] for c in cases], ""))
    with st.Scratch() as s:
        with open(s.file("a.txt"), "wb") as f:
            f.write(text)
        expect("files", run(["tokenize", "-m", MODEL, s.file("a.txt"), s.file("a.txt")]), (0, ids + ids, ""))
        rc, _, err = run(["tokenize", "-m", MODEL, s.file("none")])
        expect("no such file", (rc, s.file("none") in err), (2, True))
        rc, _, err = run(["tokenize", "-m", s.path], b"x\n")
        expect("no such model", (rc, "tokenizer.json" in err), (3, True))
    for command, data, said in (("tokenize", b"good\nb\xffd\n", "line 2: byte 1"), ("detokenize", b"1 2\n3\n4 x\n", "line 3: 'x'"),
                                ("detokenize", b"99999\n", "line 1: token id 99999"), ("detokenize", b"1 -2\n", "line 1: '-2'")):
        rc, _, err = run([command, "-m", MODEL], data)
        expect(f"{command} {data!r}", (rc, said in err), (2, True))
    rc, out, err = run(["tokenize"], b"Hello\n")
    expect("demo model", (rc, len(out.split()) > 0, err), (0, True, ""))
    print("tokenize and detokenize agree with", len(cases), "recorded cases")


main()
