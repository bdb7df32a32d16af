#!/usr/bin/env python3
"""Too little memory for the model: refused before weights are loaded, with all numbers and the limit's name, exit status 3, and
nothing killed by the kernel. By a control group (v1 or v2; needs root), and by RLIMIT_AS. With more memory the same command
goes on."""
import os
import re
import resource
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import shoaltest as st

MIB = 1 << 20
SOON = 20


class Group:
    """A memory control group of one's own."""

    def __init__(self):
        self.path = None
        name = f"shoal-test-{os.getpid()}"
        for base, limit, used in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
                                  ("/sys/fs/cgroup", "memory.max", "memory.peak")):
            path = os.path.join(base, name)
            try:
                os.mkdir(path)
            except OSError:
                continue
            if os.path.exists(os.path.join(path, limit)):
                self.path, self.limit_file = path, os.path.join(path, limit)
                return
            os.rmdir(path)

    def limit(self, n):
        with open(self.limit_file, "w") as f:
            f.write(str(n))

    def enter(self):
        with open(os.path.join(self.path, "cgroup.procs"), "w") as f:
            f.write(str(os.getpid()))

    def oom_kills(self):
        for name in ("memory.oom_control", "memory.events"):
            try:
                with open(os.path.join(self.path, name)) as f:
                    m = re.search(r"oom_kill (\d+)", f.read())
                    if m:
                        return int(m.group(1))
            except OSError:
                pass
        return 0

    def remove(self):
        for _ in range(100):
            try:
                os.rmdir(self.path)
                return
            except OSError:
                time.sleep(0.05)


def main():
    check = st.Checks()
    group = Group()
    with st.Scratch() as s:
        inp = s.file("in.jsonl")
        st.write_lines(inp, [st.completion("a", [2, 5, 7], max_tokens=4, ignore_eos=True)])

        def run(name, ranks, before, *options):
            out = s.file(f"{name}.out")
            cmd = st.command(st.DEMO, inp, out, "-n", ranks, *options)
            t0 = time.time()
            try:
                p = subprocess.run(cmd, env=s.env(), capture_output=True, text=True, timeout=120, preexec_fn=before)
            except subprocess.TimeoutExpired:
                st.kill_all(s)
                check(False, f"{name}: never ended")
                return -1, "", 0
            return p.returncode, p.stderr, time.time() - t0

        def refused(name, ranks, limit, word, before, *options):
            code, err, took = run(name, ranks, before, *options)
            last = err.strip().split("\n")[-1]
            print(f"{name} ({took:.1f} s): {last}", flush=True)
            check(code == 3, f"{name}: exit {code}, not 3: {err[-600:]}")
            m = re.search(r"needs ([\d.]+) MiB of memory \(weights ([\d.]+), work ([\d.]+), reserve ([\d.]+), KV (?:more than )?"
                          r"([\d.]+)\) and may use ([\d.]+) MiB", last)
            if check(m, f"{name}: not all numbers are given: {last}"):
                need, *parts, may = map(float, m.groups())
                check(abs(need - sum(parts)) < 0.3, f"{name}: {need} is not the sum of {parts}")
                check(may <= need, f"{name}: {may} would have been enough for {need}")
                check(limit is None or may * ranks <= limit / MIB, f"{name}: {may} on {ranks} ranks of {limit / MIB if limit else 0}")
            check(word in last, f"{name}: the limit is not named {word!r}: {last}")
            check(took < SOON and "starting again" not in err, f"{name}: {took:.1f} s: {err[-600:]}")
            left = st.left_behind(s, 10)
            check(not left, f"{name}: left behind: {left}")

        refused("kv-too-large", 1, None, "the node's limit is", None, "--kv-memory", "4000GiB")
        if group.path:
            for ranks, mib in ((1, 80), (3, 224)):
                group.limit(mib * MIB)
                name = f"group-{ranks}"
                refused(name, ranks, mib * MIB, os.path.basename(group.path), group.enter)
                check(group.oom_kills() == 0, f"{name}: the kernel killed {group.oom_kills()} processes")
                group.limit(2048 * MIB)
                code, err, _ = run(name, ranks, group.enter)
                check(code == 0, f"{name}: with enough memory: exit {code}: {err[-400:]}")
            group.remove()
        else:
            print("no memory control group can be made here: that part is skipped")

        # address space: libraries alone map some; below what the ranks map they cannot even start, above it they refuse
        def address_space():
            resource.setrlimit(resource.RLIMIT_AS, (640 * MIB, 640 * MIB))
        refused("address-space", 1, 640 * MIB, "RLIMIT_AS", address_space, "--kv-memory", "600MiB")
    check.finish()


main()
