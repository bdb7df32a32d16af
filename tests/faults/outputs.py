#!/usr/bin/env python3
"""Outputs and stores that cannot be used: exact messages and statuses, nothing overwritten. Not writable, a store of another job
(other mode, model, input, option), a store whose coordinator file is damaged, an output that vanishes its folder under way."""
import os
import shutil
import signal
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import shoaltest as st

MODEL = os.path.join(st.MODELS, "e2b-like")
OTHER = os.path.join(st.MODELS, "e4b-like")


def snapshot(folder):
    got = {}
    for d, _, files in os.walk(folder):
        for f in files:
            with open(os.path.join(d, f), "rb") as h:
                got[os.path.join(d, f)] = h.read()
    return got


def nobody():
    os.setgid(65534)
    os.setuid(65534)


def reachable():
    """Whether that user can read the program and the model where this checkout lies (not below a closed home folder)."""
    seen = [["test", "-x", st.shoal()], ["test", "-r", os.path.join(MODEL, "config.json")]]
    ok = all(subprocess.run(c, preexec_fn=nobody).returncode == 0 for c in seen)
    if not ok:
        print("as another user: left out, that user cannot reach", st.ROOT)
    return ok


def main():
    check = st.Checks()
    with st.Scratch() as s:
        g = st.golden("e2b-like")
        req = [st.completion(f"r{k}", g["greedy"][k % 6]["ids"], max_tokens=150, temperature=0.9, seed=k, ignore_eos=True,
                             return_token_ids=True) for k in range(72)]
        inp, inp2, out = s.file("in.jsonl"), s.file("in2.jsonl"), s.file("out.jsonl")
        st.write_lines(inp, req)
        st.write_lines(inp2, req[:-1])
        code, want, err = st.run(s, MODEL, req, "-n", 1, "--mode", "exact", name="want")
        check(code == 0, f"undisturbed: exit {code}: {err[-300:]}")

        def run(*args, **more):
            p = subprocess.run([st.shoal(), "run", "--progress", "none", *map(str, args)], env=s.env(), capture_output=True,
                               text=True, timeout=120, **more)
            return p.returncode, p.stderr.strip().split("\n")

        # a store of another job: an interrupted run leaves one
        usual = ["-m", MODEL, "-i", inp, "-o", out, "-n", 1, "--mode", "exact"]
        p = subprocess.Popen([st.shoal(), "run", "--progress", "none", *map(str, usual)], env=s.env(), stderr=subprocess.PIPE, text=True)
        while p.poll() is None and not os.path.exists(os.path.join(out + ".store", "1", "store.db")):
            time.sleep(0.02)
        time.sleep(0.2)
        p.send_signal(signal.SIGINT)
        _, err = p.communicate(timeout=60)
        check(p.returncode == 4, f"interrupted: exit {p.returncode}, not 4 (was it too quick?): {err[-300:]}")
        store = out + ".store"
        before = snapshot(store)
        size, size2 = os.path.getsize(inp), os.path.getsize(inp2)
        tail = "finish that job, remove the folder, or name another one with --store"

        def other(name, args, start):
            code, lines = run(*args)
            check(code == 2, f"{name}: exit {code}, not 2: {lines}")
            check(lines[0].startswith(f"shoal run: {store}: belongs to another job: {start}") and lines[0].endswith(tail),
                  f"{name}: said {lines[0]}\n  wanted …{start}…{tail}")
            print(f"{name}: {lines[0][:230]}", flush=True)

        def args(**change):
            a = {"-m": MODEL, "-i": inp, "-o": out, "-n": 1, "--mode": "exact"}
            a.update(change)
            return [x for kv in a.items() for x in kv]

        other("other mode", args(**{"--mode": "bf16"}), "its --mode was exact, now it is bf16: ")
        other("other model", args(**{"-m": OTHER}), f"its model was {MODEL}, now it is {OTHER}: ")
        other("other input", args(**{"-i": inp2}), f"its input was {size} bytes, hash ")
        check(size != size2, "the two inputs are alike")
        other("other kv", args(**{"--kv": "bf16"}), "its --kv was f32, now it is bf16: ")
        other("other seed", args(**{"--seed": 7}), "its --seed was 0, now it is 7: ")
        after = snapshot(store)
        check({k: v for k, v in before.items()} == after, f"a refused command changed the store: "
              f"{[k for k in set(before) | set(after) if before.get(k) != after.get(k)]}")

        # an output that somebody else put there meanwhile is replaced only by the job's own end: the store says it is ours
        code, lines = run(*usual)
        d = st.difference(want, st.rows(out)) if os.path.exists(out) else "no output"
        check(code == 0 and not d, f"afterwards: exit {code}: {d} {lines}")
        code, lines = run(*usual)
        check(code == 2 and lines[0] == f"shoal run: -o: {out}: exists already and has no {store} to go on from: remove it or "
              "give another file", f"again: exit {code}: {lines[0]}")
        check(not st.difference(want, st.rows(out)), "the output was changed")

        # not writable, as a user who is not root
        if os.geteuid() == 0 and reachable():
            closed, pub = s.file("closed"), s.file("public")
            os.mkdir(closed, 0o755)
            os.mkdir(pub)
            os.chmod(pub, 0o777)
            os.chmod(s.path, 0o755)
            os.chmod(s.tmp, 0o777)
            for p in (s.path, ):
                os.chmod(p, 0o755)
            code, lines = run("-m", MODEL, "-i", inp, "-o", os.path.join(closed, "o"), preexec_fn=nobody)
            check(code == 2 and lines[0] == f"shoal run: -o: {closed}/o: its folder cannot be written: Permission denied",
                  f"closed folder: exit {code}: {lines}")
            code, lines = run("-m", MODEL, "-i", inp, "-o", os.path.join(pub, "o"), "--store", os.path.join(closed, "st"),
                              preexec_fn=nobody)
            check(code in (2, 3) and os.path.join(closed, "st") in lines[-1] and "Permission denied" in lines[-1],
                  f"closed store: exit {code}: {lines}")
            secret = s.file("secret.jsonl")
            shutil.copy(inp, secret)
            os.chmod(secret, 0o600)
            code, lines = run("-m", MODEL, "-i", secret, "-o", os.path.join(pub, "o"), preexec_fn=nobody)
            check(code == 2 and lines[0] == f"shoal run: -i: {secret}: cannot be opened: Permission denied", f"closed input: {lines}")
            check(os.listdir(pub) == [] and os.listdir(closed) == [], f"made {os.listdir(pub)} {os.listdir(closed)}")

        # the output's folder goes away under way: the results stay in the store, and the same command writes them later
        gone, moved = s.file("gone"), s.file("moved")
        os.mkdir(gone)
        a = ["-m", MODEL, "-i", inp, "-o", os.path.join(gone, "o"), "--store", s.file("kept"), "-n", 1, "--mode", "exact"]
        p = subprocess.Popen([st.shoal(), "run", "--progress", "none", *map(str, a)], env=s.env(), stderr=subprocess.PIPE, text=True)
        while p.poll() is None and not os.path.exists(os.path.join(s.file("kept"), "1", "store.db")):
            time.sleep(0.02)
        os.rename(gone, moved)
        _, err = p.communicate(timeout=120)
        check(p.returncode == 3 and os.path.join(gone, "o") in err and "No such file or directory" in err,
              f"vanished folder: exit {p.returncode}: {err[-400:]}")
        os.rename(moved, gone)
        code, lines = run(*a)
        d = st.difference(want, st.rows(os.path.join(gone, "o"))) if code == 0 else "no output"
        check(not d, f"folder back: exit {code}: {d} {lines}")

        # a damaged store is named, and nothing is overwritten
        out3 = s.file("out3.jsonl")
        a = ["-m", MODEL, "-i", inp, "-o", out3, "-n", 1, "--mode", "exact"]
        p = subprocess.Popen([st.shoal(), "run", "--progress", "none", *map(str, a)], env=s.env(), stderr=subprocess.PIPE, text=True)
        while p.poll() is None and not os.path.exists(os.path.join(out3 + ".store", "1", "store.db")):
            time.sleep(0.02)
        time.sleep(0.2)
        p.send_signal(signal.SIGTERM)
        _, err = p.communicate(timeout=60)
        check(p.returncode == 4, f"SIGTERM: exit {p.returncode}, not 4: {err[-300:]}")
        db = os.path.join(out3 + ".store", "1", "store.db")
        with open(db, "r+b") as f:
            f.seek(4096)
            f.write(b"\xa5" * 8192)
        with open(db, "rb") as f:
            was = f.read()
        code, lines = run(*a)
        check(code == 3 and db in lines[-1] and "damaged" in lines[-1] and "nothing was overwritten" in lines[-1],
              f"damaged store: exit {code}: {lines}")
        print("damaged store:", lines[-1][:300])
        with open(db, "rb") as f:
            check(f.read() == was, "a damaged store was written")
        left = st.left_behind(s)
        check(not left, f"left behind: {left}")
    check.finish()


main()
