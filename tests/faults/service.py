#!/usr/bin/env python3
"""The service as a user types it: serve, worker under mpirun and on the local link, submit, status, watch, results, cancel; over
ipc, and over tcp with keys of keygen. The coordinator is killed and started again under way: ranks and clients reconnect, and the
rows are those of an undisturbed run. Strangers are not let in.

usage: service.py [ipc|tcp ...]"""
import os
import re
import signal
import socket
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import shoaltest as st

MODEL = os.path.join(st.MODELS, "e2b-like")


class Service:
    def __init__(self, s, check, name, endpoint, keys):
        self.s, self.check, self.name, self.endpoint = s, check, name, endpoint
        self.keys = ["--keys", keys] if keys else []
        self.store = s.file(name + ".store")
        self.procs = []

    def start(self, args, log):
        f = open(self.s.file(f"{self.name}-{log}.log"), "a")
        p = subprocess.Popen(args, env=self.s.env(OMPI_MCA_orte_tmpdir_base=self.s.tmp), stdin=subprocess.DEVNULL, stdout=f, stderr=f)
        f.close()
        self.procs.append(p)
        return p

    def serve(self):
        return self.start([st.shoal(), "serve", "-m", MODEL, "--mode", "exact", "--listen", self.endpoint, "--store", self.store, *self.keys],
                          "serve")

    def mpi_worker(self, ranks):
        return self.start(["mpirun", "--oversubscribe", "--bind-to", "none", "-n", str(ranks), st.shoal(), "worker", "--connect",
                           self.endpoint, *self.keys], "worker")

    def ask(self, command, *args, timeout=120, keys=None):
        cmd = [st.shoal(), command, "--connect", self.endpoint, *(self.keys if keys is None else keys), *map(str, args)]
        try:
            p = subprocess.run(cmd, env=self.s.env(), capture_output=True, text=True, timeout=timeout)
            return p.returncode, p.stdout, p.stderr
        except subprocess.TimeoutExpired:
            return -1, "", f"{command}: no end after {timeout} s"

    def log(self, which):
        with open(self.s.file(f"{self.name}-{which}.log")) as f:
            return f.read()

    def end(self):
        for p in self.procs:
            if p.poll() is None:
                p.terminate()
        for p in self.procs:
            try:
                p.wait(15)
            except subprocess.TimeoutExpired:
                p.kill()


def wait_for(what, seconds):
    end = time.time() + seconds
    while time.time() < end:
        if what():
            return True
        time.sleep(0.1)
    return False


def requests(n, tokens):
    g = st.golden("e2b-like")
    return [st.completion(f"r{k}", g["greedy"][k % 6]["ids"], max_tokens=tokens, temperature=0.9 if k % 2 else 0, seed=k,
                          ignore_eos=True, return_token_ids=True) for k in range(n)]


def drive(v, s, check, want, req, many, want_many):
    inp, big, out = s.file("in.jsonl"), s.file("big.jsonl"), s.file(v.name + ".out")
    st.write_lines(inp, req)
    st.write_lines(big, many)
    say = lambda ok, what: check(ok, f"{v.name}: {what}")

    serve = v.serve()
    say(wait_for(lambda: v.ask("status", "--timeout", "2")[0] == 0, 20), "the service does not answer: " + v.log("serve")[-300:])
    code, text, err = v.ask("status")
    say(code == 0 and "No group is connected" in text, f"status without group: {code} {text} {err}")
    group = v.mpi_worker(2)

    # a whole job by one command
    code, text, err = v.ask("submit", "-i", inp, "--wait", "-o", out, "--progress", "none")
    say(code == 0 and text == "1\n", f"submit --wait: exit {code}: {text!r} {err[-300:]}")
    d = st.difference(want, st.rows(out)) if os.path.exists(out) else "no output"
    say(not d, f"submit --wait: {d}")

    # step by step, and the coordinator killed under way
    code, text, err = v.ask("submit", "-i", big, "--name", "big")
    say(code == 0 and text == "2\n", f"submit: exit {code}: {text!r} {err[-300:]}")
    code, text, err = v.ask("submit", "-i", big, "--name", "big")
    say(code == 0 and text == "2\n", f"the same again: exit {code}: {text!r} {err[-300:]}")
    code, text, err = v.ask("submit", "-i", inp, "--name", "big")
    say(code == 2 and "another file" in err, f"another file under that name: exit {code}: {text!r} {err[-300:]}")
    code, text, err = v.ask("status")
    say(code == 0 and re.search(r"2  running .* big\n", text) and re.search(r"group \S+: ready, 2 of 2 ranks up", text), f"status: {code} {text}")
    code, text, err = v.ask("results", "big")
    say(code == 4 and "not finished" in err, f"results too early: exit {code}: {err[-200:]}")
    watch = v.start([st.shoal(), "watch", "--connect", v.endpoint, *v.keys, "--progress", "plain", "big"], "watch")
    time.sleep(1.0)
    serve.send_signal(signal.SIGKILL)
    serve.wait()
    time.sleep(1.5)
    say(group.poll() is None, "the ranks left when the coordinator was killed: " + v.log("worker")[-300:])
    serve = v.serve()
    try:
        say(watch.wait(120) == 0, f"watch: exit {watch.returncode}: {v.log('watch')[-300:]}")
    except subprocess.TimeoutExpired:
        say(False, f"watch did not end: {v.log('watch')[-300:]} {v.log('serve')[-600:]}")
    say(group.poll() is None, "the ranks did not outlive the coordinator")
    code, text, err = v.ask("results", "big", "-o", out + "2", "--ordered")
    d = st.difference(want_many, st.rows(out + "2")) if os.path.exists(out + "2") else "no output"
    say(code == 0 and not d, f"results: exit {code}: {d} {err[-200:]}")
    with open(out + "2") as f:
        ids = [re.search(r'"custom_id": ?"([^"]*)"', line).group(1) for line in f]
    say(ids == [r["custom_id"] for r in many], "--ordered: not in the order of the input")
    code, text, err = v.ask("results", "2")
    say(code == 0 and len(text.splitlines()) == len(many), f"results to standard output: exit {code}: {len(text.splitlines())} lines")

    # cancel
    code, text, err = v.ask("submit", "-i", big, "--name", "gone")
    code, text, err = v.ask("cancel", "gone")
    say(code == 0 and text == "", f"cancel: exit {code}: {text!r} {err[-200:]}")
    code, text, err = v.ask("watch", "gone", "--progress", "none", timeout=60)
    say(code == 1, f"watch of a cancelled job: exit {code}, not 1: {err[-200:]}")
    code, text, err = v.ask("results", "gone")
    say(code == 1 and len(text.splitlines()) == len(many) and '"cancelled"' in text, f"results of a cancelled job: exit {code}: {text[:200]}")
    code, text, err = v.ask("status", "none-such")
    say(code == 2 and "none-such" in err, f"status of no job: exit {code}: {err[-200:]}")
    code, text, err = v.ask("cancel", "77")
    say(code == 2 and "no job 77" in err, f"cancel of no job: exit {code}: {err[-200:]}")

    # after the cancelled job the group still works
    code, text, err = v.ask("submit", "-i", inp, "--wait", "-o", out + "3", "--progress", "none", timeout=60)
    d = st.difference(want, st.rows(out + "3")) if os.path.exists(out + "3") else "no output"
    say(code == 0 and not d, f"after a cancel: exit {code}: {d} {err[-200:]}")
    return serve, group


def strangers(v, s, check):
    """Other keys, no keys, and bytes that are no ZeroMQ."""
    strange = s.file("strange")
    if not os.path.exists(strange):
        subprocess.run([st.shoal(), "keygen", strange], check=True, env=s.env(), stdout=subprocess.DEVNULL)
    for name, mixed in (("other keys", None), ("the server's public key alone", "server.pub")):
        if mixed:
            with open(os.path.join(v.keys[1], mixed)) as f, open(os.path.join(strange, mixed), "w") as t:
                t.write(f.read())
        code, text, err = v.ask("status", "--timeout", "3", keys=["--keys", strange])
        check(code == 3 and text == "" and "no answer within 3 s" in err, f"{v.name}: {name}: exit {code}: {text[:100]} {err[-200:]}")
    host, port = v.endpoint[6:].split(":")
    for data in (b"GET / HTTP/1.0\r\n\r\n", os.urandom(4096), b"\xff" + b"\0" * 8 + b"\x7f\x03\0NULL" + b"\0" * 48):
        with socket.create_connection((host, int(port)), 5) as c:
            try:
                c.sendall(data)
            except OSError:
                pass
    code, _, err = v.ask("status")
    check(code == 0, f"{v.name}: after strangers: exit {code}: {err[-200:]}")
    code, _, err = v.ask("status", keys=[])
    check(code == 2 and "keys" in err, f"{v.name}: tcp without keys: exit {code}: {err[-200:]}")


def main():
    check = st.Checks()
    kinds = sys.argv[1:] or ["ipc", "tcp"]
    with st.Scratch() as s:
        os.chmod(s.tmp, 0o700)
        req, many = requests(12, 40), requests(100, 300)
        want = st.run(s, MODEL, req, "-n", 1, "--mode", "exact", name="want")[1]
        want_many = st.run(s, MODEL, many, "-n", 2, "--mode", "exact", name="many")[1]
        check(len(want) == len(req) and len(want_many) == len(many), "undisturbed runs failed")
        keys = s.file("keys")
        p = subprocess.run([st.shoal(), "keygen", keys], env=s.env(), capture_output=True, text=True)
        check(p.returncode == 0, f"keygen: {p.stderr}")
        check(all(os.stat(os.path.join(keys, f)).st_mode & 0o077 == 0 for f in os.listdir(keys) if f.endswith(".key")),
              "others may read a secret key")
        with socket.create_server(("127.0.0.1", 0)) as c:
            port = c.getsockname()[1]
        services = [Service(s, check, "ipc", "ipc://" + os.path.join(s.tmp, "s"), None),
                    Service(s, check, "tcp", f"tcp://127.0.0.1:{port}", keys)]
        for v in services:
            if v.name not in kinds:
                continue
            t0 = time.time()
            try:
                serve, group = drive(v, s, check, want, req, many, want_many)
                if v.name == "tcp":
                    strangers(v, s, check)
                serve.terminate()
                check(serve.wait(20) == 0, f"{v.name}: SIGTERM: exit {serve.returncode}: {v.log('serve')[-300:]}")
                check(group.wait(20) == 0, f"{v.name}: the group: exit {group.returncode}: {v.log('worker')[-300:]}")
            except subprocess.TimeoutExpired as e:
                check(False, f"{v.name}: {e}")
            finally:
                v.end()
            left = st.left_behind(s)
            check(not left, f"{v.name}: left behind: {left}")
            print(f"{v.name}: {time.time() - t0:.0f} s", flush=True)
        st.kill_all(s)
    check.finish()


main()
