#!/usr/bin/env python3
"""Ranks on several nodes (network namespaces; needs root), MPI over TCP, `shoal run --hosts`. A node that vanishes without a word
(link down: no FIN, no RST) and a rank that stops without dying (SIGSTOP) end the group within the stated seconds; the run goes on
when the node is back, and the rows are those of an undisturbed run. A node that never comes back ends the run with the reason
(--forever: three minutes)."""
import os
import signal
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import netns
import shoaltest as st

MODEL = os.path.join(st.MODELS, "e2b-like")
NOTICE = 20   # seconds until the group is given up: heartbeats or keep-alive, whichever is first, and the launcher's end
FINISH = 150  # until all is answered after the node is back


class Run:
    """shoal run in the head node; its lines are kept with their times."""

    def __init__(self, nodes, cmd, env):
        self.lines = []
        self.p = subprocess.Popen(nodes.command("head", cmd), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self):
        for line in self.p.stderr:
            self.lines.append((time.time(), line.rstrip("\n")))

    def text(self):
        return "\n".join(line for _, line in self.lines)

    def wait_line(self, word, since, seconds):
        end = time.time() + seconds
        while time.time() < end:
            for t, line in list(self.lines):
                if t >= since and word in line:
                    return t - since
            if self.p.poll() is not None and not self.reader.is_alive():
                break
            time.sleep(0.05)
        return None

    def end(self, seconds):
        try:
            self.p.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        self.reader.join(5)
        return self.p.returncode


def ranks(nodes, host):
    found = []
    for p in nodes.processes(host):
        try:
            with open(f"/proc/{p}/cmdline", "rb") as f:
                args = f.read().split(b"\0")
        except OSError:
            continue
        if args[0].endswith(b"shoal") and b"worker" in args:
            found.append(p)
    return found


def main():
    check = st.Checks()
    forever = "--forever" in sys.argv
    with st.Scratch() as s:
        try:
            nodes = netns.Nodes(s.file("net"), 2)
        except netns.Unavailable as e:
            print("skipped:", e)
            sys.exit(77)
        try:
            job(s, nodes, check, forever)
        finally:
            st.kill_all(s)
            nodes.down()
    check.finish()


def job(s, nodes, check, forever):
    g = st.golden("e2b-like")
    req = [st.completion(f"r{k}", g["greedy"][k % 6]["ids"], max_tokens=400, temperature=0.9, seed=k, ignore_eos=True,
                         return_token_ids=True) for k in range(160)]
    code, want, err = st.run(s, MODEL, req, "-n", 2, "--mode", "exact", name="want")
    check(code == 0, f"undisturbed: exit {code}: {err[-300:]}")
    inp = s.file("in.jsonl")
    st.write_lines(inp, req)
    env = s.env(**nodes.environment())

    def start(name):
        out = s.file(name + ".out")
        cmd = [st.shoal(), "run", "-m", MODEL, "-i", inp, "-o", out, "-n", "2", "--mode", "exact", "--hosts", "node0,node1", "--progress", "plain"]
        r = Run(nodes, cmd, env)
        up = r.wait_line("tokens of KV fit", 0, 60)
        ok = check(up is not None, f"{name}: the group never came up: {r.text()[-600:]} {log(out)}")
        if not ok:
            r.p.kill()
            return None, out
        time.sleep(1.5)
        return r, out

    def log(out):
        try:
            with open(out + ".store/run.log") as f:
                return f.read()[-1500:]
        except OSError:
            return "(no log)"

    def finished(name, r, out):
        code = r.end(FINISH)
        if not check(code is not None, f"{name}: not finished {FINISH} s later: {r.text()[-800:]} {log(out)}"):
            r.p.kill()
            return
        d = st.difference(want, st.rows(out)) if os.path.exists(out) else "no output"
        check(code == 0 and not d, f"{name}: exit {code}: {d} {r.text()[-600:]}")
        end = time.time() + 15
        while time.time() < end and any(ranks(nodes, h) for h in ("node0", "node1")):
            time.sleep(0.2)
        left = {h: ranks(nodes, h) for h in ("node0", "node1")}
        check(not any(left.values()) or name == "vanished", f"{name}: ranks left: {left}")

    for name in ("vanished", "stopped"):
        r, out = start(name)
        if not r:
            continue
        t0 = time.time()
        if name == "vanished":
            nodes.link("node1", False)
        elif name == "stopped":
            victims = ranks(nodes, "node1")
            check(len(victims) == 1, f"{name}: ranks of node1: {victims}")
            os.kill(victims[0], signal.SIGSTOP)
        took = r.wait_line("starting again", t0, NOTICE + 20)
        check(took is not None and took <= NOTICE, f"{name}: noticed after {took} s, not {NOTICE}: {r.text()[-600:]} {log(out)}")
        said = [x for _, x in r.lines if "starting again" in x][:1]
        check("node1" in "".join(said), f"{name}: the node is not named: {said}")
        print(f"{name}: noticed after {took if took is None else round(took, 1)} s: {said}", flush=True)
        nodes.link("node1", True)
        finished(name, r, out)
        print(f"{name}: finished {time.time() - t0:.0f} s after", flush=True)

    if forever:
        r, out = start("forever")
        if r:
            t0 = time.time()
            nodes.link("node1", False)
            code = r.end(260)
            check(code == 3 and "gave up after 3 tries" in r.text(), f"forever: exit {code} after {time.time() - t0:.0f} s: {r.text()[-500:]}")
            print(f"forever: ended after {time.time() - t0:.0f} s: {r.text().splitlines()[-1:]}", flush=True)
            nodes.link("node1", True)
            if code is None:
                r.p.kill()


main()
