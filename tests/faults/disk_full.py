#!/usr/bin/env python3
"""The disk that holds the store, and the one that holds the output, are full (small tmpfs; needs root): a clear error that names
the file, exit status 3, nothing lost; after room was made the same command goes on, and the rows are those of an undisturbed run."""
import os
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import shoaltest as st

MODEL = os.path.join(st.MODELS, "e2b-like")
SOON = 60


def mount(path, size):
    os.makedirs(path, exist_ok=True)
    return subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "shoal-test", path], stderr=subprocess.DEVNULL).returncode == 0


def fill(path, leave):
    """Fills the file system of path up to `leave` bytes."""
    v = os.statvfs(path)
    n = max(0, v.f_bavail * v.f_frsize - leave)
    with open(os.path.join(path, "ballast"), "wb") as f:
        left = n
        while left > 0:
            left -= f.write(b"\0" * min(left, 1 << 20))
    return n


def main():
    check = st.Checks()
    with st.Scratch() as s:
        small = s.file("small")
        if not mount(small, "12m"):
            print("skipped: no tmpfs can be mounted here")
            sys.exit(77)
        try:
            job(s, small, check)
        finally:
            st.kill_all(s)
            subprocess.run(["umount", "-l", small])
    check.finish()


def job(s, small, check):
    req = [st.completion(f"r{k}", [2, 5, 7 + k % 50], max_tokens=60, temperature=0.9, seed=k, ignore_eos=True,
                         return_token_ids=True, logprobs=3) for k in range(120)]
    inp = s.file("in.jsonl")
    st.write_lines(inp, req)
    code, want, err = st.run(s, MODEL, req, "-n", 2, "--mode", "exact", name="want")
    check(code == 0, f"undisturbed: exit {code}: {err[-300:]}")

    def run(out, store):
        cmd = [st.shoal(), "run", "-m", MODEL, "-i", inp, "-o", out, "--store", store, "-n", "2", "--mode", "exact", "--progress", "none"]
        t0 = time.time()
        try:
            p = subprocess.run(cmd, env=s.env(), capture_output=True, text=True, timeout=180)
        except subprocess.TimeoutExpired:
            st.kill_all(s)
            return -1, ["did not end within 180 s"], 180
        return p.returncode, p.stderr.strip().split("\n"), time.time() - t0

    def full(name, out, store, leave, file):
        fill(small, leave)
        code, lines, took = run(out, store)
        said = [x for x in lines if file in x]
        print(f"{name} ({took:.1f} s, exit {code}): {' / '.join(lines)[:500]}", flush=True)
        check(code == 3, f"{name}: exit {code}, not 3: {lines}")
        check(said, f"{name}: {file} is not named: {lines}")
        check(any("full" in x or "No space left" in x for x in lines), f"{name}: does not say that the disk is full: {lines}")
        check(took < SOON, f"{name}: took {took:.0f} s")
        check(not os.path.exists(out), f"{name}: made an output")
        left = st.left_behind(s)
        check(not left, f"{name}: left behind: {left}")

    def goes_on(name, out, store):
        os.remove(os.path.join(small, "ballast"))
        code, lines, _ = run(out, store)
        d = st.difference(want, st.rows(out)) if os.path.exists(out) else "no output"
        check(code == 0 and not d, f"{name}: with room: exit {code}: {d} {lines}")
        check(not os.path.exists(store), f"{name}: the store was left after exit 0")
        if os.path.exists(out):
            os.remove(out)

    # at several moments: when the store is made, when the input is stored, when progress is saved, near the end
    store = os.path.join(small, "store")
    for leave in (0, 40 << 10, 160 << 10, 360 << 10, 800 << 10):
        out = s.file(f"out-{leave}")
        name = f"store, {leave >> 10} KiB left"
        full(name, out, store, leave, small)
        goes_on(name, out, store)

    # the output's disk
    out = os.path.join(small, "out")
    full("output", out, s.file("store"), 16 << 10, out)
    goes_on("output", out, s.file("store"))
    check(sorted(os.listdir(small)) == [], f"left on the small disk: {os.listdir(small)}")


main()
