#!/usr/bin/env python3
"""Nobody at the endpoint, somebody else there, endpoints that cannot be: every command ends within its stated seconds, says which
endpoint and what is allowed, and leaves nothing."""
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import shoaltest as st

MODEL = os.path.join(st.MODELS, "e2b-like")


def main():
    check = st.Checks()
    with st.Scratch() as s:
        os.chmod(s.tmp, 0o700)
        inp, keys, strange = s.file("in.jsonl"), s.file("keys"), s.file("strange")
        st.write_lines(inp, [st.completion("a", [2, 5, 7], max_tokens=2)])
        for k in (keys, strange):
            p = subprocess.run([st.shoal(), "keygen", k], capture_output=True, text=True, env=s.env())
            check(p.returncode == 0, f"keygen: {p.stderr}")

        def say(name, args, codes, words, least, most):
            t0 = time.time()
            try:
                p = subprocess.run([st.shoal(), *args], capture_output=True, text=True, timeout=most + 30, env=s.env(), cwd=s.path)
            except subprocess.TimeoutExpired:
                check(False, f"{name}: did not end within {most + 30} s")
                return
            took = time.time() - t0
            check(p.returncode in codes, f"{name}: exit {p.returncode}, not {codes}: {p.stderr[-300:]}")
            check(least <= took <= most, f"{name}: {took:.1f} s, not {least} to {most}")
            for w in words:
                check(w in p.stderr, f"{name}: does not say {w!r}: {p.stderr[-300:]}")
            check(p.stdout == "", f"{name}: standard output: {p.stdout[:100]}")
            print(f"{name} ({took:.1f} s): {p.stderr.strip().splitlines()[-1:]}", flush=True)

        none = "ipc://" + os.path.join(s.tmp, "none")
        with ThreadPoolExecutor(8) as pool:  # they wait for what does not come
            at_once = lambda *case: jobs.append(pool.submit(say, *case))
            jobs = []
            for cmd in (["status"], ["submit", "-i", inp], ["watch", "1"], ["results", "1"], ["cancel", "1"]):
                at_once(f"{cmd[0]} at nothing", [cmd[0], "--connect", none, "--timeout", "1", *cmd[1:]], (3,),
                        [none, "no answer within 1 s"], 0.9, 25)
            at_once("status, usual patience", ["status", "--connect", none], (3,), [none, "no answer within 10 s"], 9, 20)
            at_once("worker at nothing", ["worker", "--connect", none, "--link", "local", "--connect-timeout", "2"], (3,),
                    [none, "2 s"], 1.5, 15)
            at_once("no host of that name", ["status", "--connect", "tcp://no.such.host.invalid:5555", "--keys", keys, "--timeout", "1"], (2, 3),
                    ["no.such.host.invalid"], 0, 25)
        for j in jobs:
            j.result()

        with socket.create_server(("127.0.0.1", 0)) as server:  # accepts and says nothing
            port = server.getsockname()[1]
            conns, stop = [], threading.Event()

            def accept():
                server.settimeout(0.2)
                while not stop.is_set():
                    try:
                        conns.append(server.accept()[0])
                    except OSError:
                        pass
            t = threading.Thread(target=accept)
            t.start()
            tcp = f"tcp://127.0.0.1:{port}"
            say("status at a stranger", ["status", "--connect", tcp, "--keys", keys, "--timeout", "1"], (3,), [tcp, "no answer within 1 s"],
                0.9, 10)
            stop.set()
            t.join()
            for c in conns:
                c.close()
        say("tcp without keys", ["status", "--connect", tcp], (2, 3), ["key"], 0, 5)
        say("tcp with a folder that has none", ["status", "--connect", tcp, "--keys", s.tmp], (2, 3), ["key"], 0, 5)
        say("no scheme", ["status", "--connect", "/run/shoal"], (2,), ["/run/shoal", "ipc://", "tcp://"], 0, 5)
        say("other scheme", ["status", "--connect", "http://localhost:1"], (2,), ["http://localhost:1", "ipc://", "tcp://"], 0, 5)
        say("path too long", ["status", "--connect", "ipc://" + "x" * 200], (2, 3), ["x" * 50], 0, 5)
        say("worker without endpoint", ["worker"], (2,), ["--connect"], 0, 5)
        say("worker, no scheme", ["worker", "--connect", "/run/shoal"], (2, 3), ["/run/shoal"], 0, 5)
        say("serve, nowhere to listen", ["serve", "-m", MODEL, "--store", s.file("st"), "--listen", f"ipc://{inp}/x"], (2, 3),
            [inp], 0, 15)
        say("serve, tcp without keys", ["serve", "-m", MODEL, "--store", s.file("st2"), "--listen", "tcp://127.0.0.1:0"], (2, 3), ["key"], 0, 15)
        left = st.left_behind(s, 5)
        check(not left, f"left behind: {left}")
    check.finish()


main()
