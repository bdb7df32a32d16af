#!/usr/bin/env python3
"""Weight files that are cut while ranks compute with them (packed folders, and the embedding table of a checkpoint): the run says which
file, byte and end it was, does not compute on, and ends with status 3 once the restarted ranks find the file as it is; when it is whole
again the same command goes on, and the rows are those of an undisturbed run. A file that is whole again at once costs a restart.

usage: cut_files.py [CASE]..."""
import os
import re
import shutil
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import shoaltest as st

N = 120
MODEL = os.path.join(st.MODELS, "e2b-like")
LINE = r"(\S+): byte (\d+) cannot be read any more: the file was cut while it was in use: it had (\d+) bytes, and ends at offset 4096"


def requests():
    ids = [c["ids"] for c in st.golden("e2b-like")["greedy"]]
    return [st.completion(f"r{k}", ids[k % len(ids)], max_tokens=250, temperature=0.9, seed=k, ignore_eos=True, return_token_ids=True)
            for k in range(N)]


def copy(s, name):
    """A checkpoint of its own that may be written."""
    to = s.file(name)
    shutil.copytree(MODEL, to, copy_function=shutil.copyfile)
    os.chmod(to, 0o755)
    return to


class Case:
    def __init__(self, s, check, what, model, file, options, want):
        self.s, self.check, self.what, self.file, self.want = s, check, what, os.path.join(model, file), want
        with open(self.file, "rb") as f:
            self.bytes = f.read()
        inp, self.out = s.file(what + ".in.jsonl"), s.file(what + ".out.jsonl")
        st.write_lines(inp, requests())
        self.command = st.command(model, inp, self.out, "--max-seqs", 8, *options)

    def start(self):
        p = subprocess.Popen(self.command, env=self.s.env(SHOAL_LOG="info"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        end = time.time() + 60
        while self.log().count(" loaded: ") < 2 and p.poll() is None and time.time() < end:
            time.sleep(0.01)
        time.sleep(0.3)  # now it computes, for some seconds
        self.check(p.poll() is None, f"{self.what}: still at work when the file is cut")
        return p

    def cut(self):
        os.truncate(self.file, 4096)

    def mend(self):
        with open(self.file, "r+b") as f:
            f.write(self.bytes)

    def log(self):
        try:
            with open(self.out + ".store/run.log") as f:
                return f.read()
        except OSError:
            return ""

    def said(self, text, where):
        m = re.search(LINE, text)
        ok = m and m[1] == self.file and 4096 <= int(m[2]) < int(m[3]) == len(self.bytes)
        self.check(ok, f"{self.what}: {where} names file, byte and end: {text[-600:]}")

    def wait(self, p, what, most=90):
        t0 = time.time()
        try:
            _, err = p.communicate(timeout=most)
        except subprocess.TimeoutExpired:
            self.check(False, f"{self.what}: {what}: never ended")
            st.kill_all(self.s)
            return -1, ""
        print(f"{self.what}: {what} after {time.time() - t0:.1f} s", flush=True)
        return p.returncode, err

    def ends(self):
        """The file stays as it is: the run ends; made whole, the same command goes on."""
        p = self.start()
        self.cut()
        code, err = self.wait(p, "ended")
        self.check(code == 3 and not os.path.exists(self.out), f"{self.what}: exit {code}: {err[-500:]}")
        self.said(err, "the run")
        self.said(self.log(), "the log")
        self.check(any(self.file in t for t in err.splitlines()[-2:]), f"{self.what}: the reason at the end: {err[-300:]}")
        self.mend()
        p = subprocess.run(self.command, env=self.s.env(), capture_output=True, text=True, timeout=180)
        self.whole(p.returncode, p.stderr)

    def goes_on(self):
        """The file is whole again before the ranks are: one restart."""
        p = self.start()
        self.cut()
        end = time.time() + 60
        while "cannot be read any more" not in self.log() and p.poll() is None and time.time() < end:
            time.sleep(0.002)
        self.mend()
        code, err = self.wait(p, "went on", 180)
        self.said(err, "the run")
        self.whole(code, err)

    def whole(self, code, err):
        d = st.difference(self.want, st.rows(self.out)) if os.path.exists(self.out) else "no output"
        self.check(code == 0 and not d, f"{self.what}: made whole: exit {code}; {d} {err[-300:]}")
        left = st.left_behind(self.s)
        self.check(not left, f"{self.what}: left behind: {left}")


def main():
    check, chosen = st.Checks(), sys.argv[1:] or ["mpi", "threads", "again", "checkpoint"]
    with st.Scratch() as s:
        packed, model = s.file("packed"), copy(s, "checkpoint")
        p = subprocess.run([st.shoal(), "pack", "-m", MODEL, "-o", packed, "--mode", "q4"], capture_output=True, text=True, env=s.env())
        check(p.returncode == 0, f"pack: {p.stderr[-300:]}")
        want = {}
        for folder in {model if c == "checkpoint" else packed for c in chosen}:
            code, want[folder], err = st.run(s, folder, requests(), "-n", 1, name="want")
            check(code == 0 and len(want[folder]) == N, f"undisturbed: exit {code}: {err[-300:]}")
        last = sorted(n for n in os.listdir(packed) if n.startswith("pack-layer-"))[-1]
        cases = {"mpi": (packed, last, ("-n", 2, "--threads", 2)), "threads": (packed, "pack-head.bin", ("-n", 2, "--launcher", "local")),
                 "again": (packed, last, ("-n", 2)), "checkpoint": (model, "model.safetensors", ("-n", 2))}
        for name in chosen:
            folder, file, options = cases[name]
            c = Case(s, check, name, folder, file, options, want[folder])
            c.goes_on() if name == "again" else c.ends()
    check.finish()


main()
