#!/usr/bin/env python3
"""Two incarnations on one store. The same command typed while the first works is refused and harms nothing. When the first runs
on a host whose processes cannot be seen (its note names another host), the second takes the store over: the first is fenced and
ends by itself within the stated seconds, the second finishes, no row is missing or twice. The same for two services."""
import json
import os
import signal
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import shoaltest as st

MODEL = os.path.join(st.MODELS, "e2b-like")
FENCED = 30  # seconds within which the older run must have ended by itself


def wait_for(what, seconds):
    end = time.time() + seconds
    while time.time() < end:
        if what():
            return True
        time.sleep(0.02)
    return False


def end_of(p, seconds):
    """(exit status or None, standard error)"""
    try:
        _, err = p.communicate(timeout=seconds)
        return p.returncode, err
    except subprocess.TimeoutExpired:
        return None, ""


def runs(s, check):
    g = st.golden("e2b-like")
    req = [st.completion(f"r{k}", g["greedy"][k % 6]["ids"], max_tokens=300, temperature=0.9, seed=k, ignore_eos=True,
                         return_token_ids=True) for k in range(150)]
    options = ["-n", 2, "--mode", "exact"]
    code, want, err = st.run(s, MODEL, req, *options, name="want")
    check(code == 0, f"undisturbed: exit {code}: {err[-300:]}")
    inp, out = s.file("in.jsonl"), s.file("out.jsonl")
    st.write_lines(inp, req)
    cmd = st.command(MODEL, inp, out, *options)

    def begin():
        p = subprocess.Popen(cmd, env=s.env(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        return p

    # on one host: refused, naming the pid
    store = out + ".store"
    first = begin()
    check(wait_for(lambda: os.path.exists(os.path.join(store, "1", "store.db")), 30), "the first run made no store")
    time.sleep(0.5)
    p = subprocess.run(cmd, env=s.env(), capture_output=True, text=True, timeout=60)
    check(p.returncode == 2 and p.stderr == f"shoal run: {store}: shoal run with pid {first.pid} works on it: wait for it, or end it "
          f"first (kill {first.pid})\n", f"same host: exit {p.returncode}: {p.stderr}")
    check(first.poll() is None, "same host: the first run ended")

    # the note names another host: the second takes over, in a mount of its own it could not see the first's processes either
    owner = os.path.join(store, "owner")
    with open(owner) as f:
        note = json.load(f)
    note["host"] = "elsewhere.invalid"
    with open(owner + ".new", "w") as f:
        json.dump(note, f)
    os.rename(owner + ".new", owner)
    t0 = time.time()
    second = begin()
    code1, err1 = end_of(first, FENCED)
    took = time.time() - t0
    check(code1 is not None, f"the first run did not end within {FENCED} s")
    check(code1 == 2, f"the first run: exit {code1}: {err1[-300:]}")
    check("newer run has taken it over" in err1, f"the first run said: {err1[-300:]}")
    print(f"the older run ended after {took:.1f} s, exit {code1}: {err1.strip().splitlines()[-1:]}", flush=True)
    try:
        with open(owner) as f:
            check(json.load(f)["pid"] == second.pid, "the older run wrote the newer one's note")
    except FileNotFoundError:
        check(second.poll() is not None or not os.path.exists(store), "the older run removed the newer one's note")
    check(second.poll() is None or second.returncode == 0, "the second run ended early")
    code2, err2 = end_of(second, 180)
    check(code2 == 0, f"the second run: exit {code2}: {err2[-400:]}")
    d = st.difference(want, st.rows(out)) if os.path.exists(out) else "no output"
    check(not d, f"after the take-over: {d}")
    left = st.left_behind(s)
    check(not left, f"left behind: {left}")
    st.kill_all(s)


def late(s, check):
    """A run that has to start its coordinator anew looks first whose store it is: it does not take it back from a newer run."""
    inp, out = s.file("late.jsonl"), s.file("late.out")
    st.write_lines(inp, [st.completion(f"r{k}", [2, 5, 7 + k], max_tokens=400, temperature=0.9, seed=k, ignore_eos=True) for k in range(150)])
    p = subprocess.Popen(st.command(MODEL, inp, out, "-n", 1), env=s.env(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    owner, store = out + ".store/owner", out + ".store/1/store.db"
    check(wait_for(lambda: os.path.exists(store), 30), "late: the run made no store")
    with open(owner) as f:
        note = json.load(f)
    with open(owner + ".new", "w") as f:
        json.dump(dict(note, host="elsewhere.invalid", ipc="/tmp/shoal-elsewhere"), f)
    os.rename(owner + ".new", owner)
    coordinators = [c for c in st.children(p.pid) if " serve --run " in command_line(c)]
    check(len(coordinators) == 1, f"late: coordinators {coordinators}")
    for c in coordinators:
        os.kill(c, signal.SIGKILL)
    code, err = end_of(p, FENCED)
    check(code == 2 and "newer run has taken it over" in err, f"late: exit {code}: {err[-400:]}")
    check(not os.path.exists(out + ".store/2"), "late: it took the store back")
    check(os.path.exists(owner), "late: it removed the newer run's note")
    left = st.left_behind(s)
    check(not left, f"late: left behind: {left}")
    st.kill_all(s)


def command_line(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as f:
            return f.read().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def services(s, check):
    """Two coordinators on one store, at two endpoints; ranks of the first find no second and leave by themselves."""
    store, sock = s.file("service.store"), os.path.join(s.tmp, "a")
    req = [st.completion(f"r{k}", [2, 5, 7 + k], max_tokens=400, temperature=0.9, seed=k, ignore_eos=True) for k in range(80)]
    inp = s.file("service.jsonl")
    st.write_lines(inp, req)
    os.chmod(s.tmp, 0o700)

    def serve(endpoint, log):
        with open(s.file(log), "w") as f:
            return subprocess.Popen([st.shoal(), "serve", "-m", MODEL, "--mode", "exact", "--listen", endpoint, "--store", store],
                                    env=s.env(), stderr=f)

    def ask(endpoint, *args):
        p = subprocess.run([st.shoal(), args[0], "--connect", endpoint, *args[1:]], env=s.env(), capture_output=True, text=True,
                           timeout=120)
        return p.returncode, p.stdout, p.stderr

    a = serve("ipc://" + sock + "1", "a.log")
    check(wait_for(lambda: os.path.exists(sock + "1"), 20), "the first service does not listen")
    w = subprocess.Popen([st.shoal(), "worker", "--connect", "ipc://" + sock + "1", "--link", "local", "-n", "2"], env=s.env(),
                         stderr=subprocess.DEVNULL)
    code, job, err = ask("ipc://" + sock + "1", "submit", "-i", inp, "--name", "j")
    check(code == 0, f"submit: exit {code}: {err}")
    wait_for(lambda: " 0 " not in ask("ipc://" + sock + "1", "status", "j")[1].splitlines()[1][:40], 20)
    t0 = time.time()
    b = serve("ipc://" + sock + "2", "b.log")
    code, _ = end_of(a, 20)
    with open(s.file("a.log")) as f:
        said = f.read().strip().splitlines()[-1:]
    check(code == 4 and "newer coordinator" in "".join(said), f"the older service: exit {code}: {said}")
    print(f"the older service ended after {time.time() - t0:.1f} s: {said}", flush=True)
    code, _ = end_of(w, 20)
    check(code == 0, f"the older service's ranks did not leave: {code}")
    w = subprocess.Popen([st.shoal(), "worker", "--connect", "ipc://" + sock + "2", "--link", "local", "-n", "2"], env=s.env(),
                         stderr=subprocess.DEVNULL)
    out = s.file("service.out")
    code, _, err = ask("ipc://" + sock + "2", "submit", "-i", inp, "--name", "j", "--wait", "-o", out, "--progress", "none")
    check(code == 0, f"the second service: exit {code}: {err}")
    check(len(st.rows(out)) == len(req) if os.path.exists(out) else False, "the second service: not every row is there")
    for p in (w, b):
        p.send_signal(signal.SIGTERM)
    code, _ = end_of(b, 20)
    check(code == 0, f"SIGTERM to the service: exit {code}")
    end_of(w, 20)
    left = st.left_behind(s)
    check(not left, f"services left behind: {left}")


def main():
    check = st.Checks()
    with st.Scratch() as s:
        try:
            runs(s, check)
            late(s, check)
            services(s, check)
        finally:
            st.kill_all(s)
    check.finish()


main()
