#!/usr/bin/env python3
"""A rank that stops answering without dying (SIGSTOP), the coordinator stopped, Ctrl-C, and a terminal that goes away: the run goes on or ends within the
stated seconds, and the rows are those of an undisturbed run."""
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import shoaltest as st

LIMIT = 90  # seconds within which a stopped process must have been noticed and the job finished


def named(pid, word):
    found = []
    for p in st.children(pid):
        try:
            with open(f"/proc/{p}/cmdline", "rb") as f:
                args = f.read().split(b"\0")
        except OSError:
            continue
        if word.encode() in args and args[0].endswith(b"shoal"):
            found.append(p)
    return found


def start(s, cmd):
    p = subprocess.Popen(cmd, env=s.env(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return p


def wait_for(p, word, n, limit=30):
    end = time.time() + limit
    while time.time() < end and p.poll() is None:
        got = named(p.pid, word)
        if len(got) >= n:
            return got
        time.sleep(0.05)
    return []


def stopped(check, model, req, want, options, what, word, n):
    """The last of n processes is stopped: the job is finished in time, and its rows are those of an undisturbed run."""
    with st.Scratch() as s:
        inp, out = s.file("in.jsonl"), s.file("out.jsonl")
        st.write_lines(inp, req)
        p = start(s, st.command(model, inp, out, *options))
        victims = wait_for(p, word, n)
        if not check(victims, f"{what}: no process to stop"):
            p.kill()
            return
        time.sleep(0.7)
        try:
            os.kill(victims[-1], signal.SIGSTOP)
        except ProcessLookupError:
            check(False, f"{what}: ended before it could be stopped; the job is too short for this test")
        t0 = time.time()
        try:
            _, err = p.communicate(timeout=LIMIT + 60)
            took = time.time() - t0
            check(p.returncode == 0, f"{what} stopped: exit {p.returncode}: {err[-300:]}")
            check(took < LIMIT, f"{what} stopped: {took:.0f} s until the end, not {LIMIT}")
            d = st.difference(want, st.rows(out)) if os.path.exists(out) else "no output"
            check(not d, f"{what} stopped: {d}")
            print(f"{what} stopped: {took:.1f} s until the end", flush=True)
        except subprocess.TimeoutExpired:
            check(False, f"{what} stopped: never noticed: {named(p.pid, word)}")
            p.kill()
        left = st.left_behind(s)
        check(not left, f"{what} stopped: left behind: {left}")
        st.kill_all(s)


def interrupted(check, model, req, want, options):
    """Ctrl-C, and the same command again."""
    with st.Scratch() as s:
        inp, out = s.file("in.jsonl"), s.file("out.jsonl")
        st.write_lines(inp, req)
        cmd = st.command(model, inp, out, *options)
        p = start(s, cmd)
        wait_for(p, "worker", 2)
        time.sleep(0.7)
        p.send_signal(signal.SIGINT)
        try:
            _, err = p.communicate(timeout=30)
            check(p.returncode == 4, f"Ctrl-C: exit {p.returncode}, not 4: {err[-300:]}")
            check("shoal run" in err, f"Ctrl-C: the command to resume is not printed: {err[-300:]}")
        except subprocess.TimeoutExpired:
            check(False, "Ctrl-C: did not end within 30 s")
            p.kill()
        left = st.left_behind(s)
        check(not left, f"Ctrl-C: left behind: {left}")
        r = subprocess.run(cmd, env=s.env(), capture_output=True, text=True, timeout=200)
        d = st.difference(want, st.rows(out)) if os.path.exists(out) else "no output"
        check(r.returncode == 0 and not d, f"after Ctrl-C: exit {r.returncode}: {d} {r.stderr[-200:]}")


def hung_up(check, model, req, want, options):
    """The terminal goes away: the run ends as by Ctrl-C, but under nohup it goes on."""
    for ignored in (True, False):
        with st.Scratch() as s:
            inp, out = s.file("in.jsonl"), s.file("out.jsonl")
            st.write_lines(inp, req)
            p = subprocess.Popen(st.command(model, inp, out, *options), env=s.env(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                 text=True, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL))
            wait_for(p, "worker", 2)
            p.send_signal(signal.SIGHUP)  # the others are in process groups of their own
            try:
                _, err = p.communicate(timeout=100)
            except subprocess.TimeoutExpired:
                check(False, f"SIGHUP, ignored {ignored}: did not end")
                st.kill_all(s)
                continue
            check(p.returncode == (0 if ignored else 4), f"SIGHUP, ignored {ignored}: exit {p.returncode}: {err[-300:]}")
            if ignored:
                d = st.difference(want, st.rows(out)) if os.path.exists(out) else "no output"
                check(not d, f"SIGHUP under nohup: {d}")
            left = st.left_behind(s)
            check(not left, f"SIGHUP, ignored {ignored}: left behind: {left}")


def main():
    check = st.Checks()
    g = st.golden("e2b-like")
    req = [st.completion(f"r{k}", g["greedy"][k % 6]["ids"], max_tokens=400, temperature=0.9, seed=k, ignore_eos=True,
                         return_token_ids=True) for k in range(120)]
    model, options = os.path.join(st.MODELS, "e2b-like"), ["-n", 2, "--mode", "exact"]
    with st.Scratch() as s:
        code, want, err = st.run(s, model, req, *options, name="want")
        check(code == 0 and len(want) == len(req), f"undisturbed: exit {code}: {err[-300:]}")
    with ThreadPoolExecutor(2) as pool:  # most of the time nothing moves, until the silence is noticed
        jobs = [pool.submit(stopped, check, model, req, want, options, *case) for case in (("rank", "worker", 2), ("coordinator", "serve", 1))]
    for j in jobs:
        j.result()
    interrupted(check, model, req, want, options)
    hung_up(check, model, req, want, options)
    check.finish()


main()
