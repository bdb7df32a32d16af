#!/usr/bin/env python3
"""What `shoal` and `shoal run` refuse before anything is started: exit status and exact message; nothing is made or overwritten."""
import os
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import shoaltest as st

MODEL = os.path.join(st.MODELS, "e2b-like")


def main():
    check = st.Checks()
    with st.Scratch() as s:
        inp, out = s.file("in.jsonl"), s.file("out.jsonl")
        st.write_lines(inp, [st.completion("a", [2, 5, 7], max_tokens=2)])

        def say(args, code, message, env=None, keep=()):
            before = sorted(os.listdir(s.path)), sorted(os.listdir(s.tmp))
            p = subprocess.run([st.shoal(), *args], capture_output=True, text=True, timeout=60, env=s.env(**(env or {})), cwd=s.path)
            got = p.stderr.strip().split("\n")[0]
            check(p.returncode == code, f"{args}: exit {p.returncode}, not {code}: {got}")
            check(got == message, f"{args}:\n  said   {got}\n  wanted {message}")
            check(p.stdout == "", f"{args}: standard output: {p.stdout[:80]!r}")
            after = sorted(os.listdir(s.path)), sorted(os.listdir(s.tmp))
            check(before == after, f"{args}: made {set(after[0]) - set(before[0])} {set(after[1]) - set(before[1])}")

        def run(*options, code=2, message="", env=None, i=inp, o=out):
            args = ["run", "-m", MODEL, *(["-i", i] if i else []), *(["-o", o] if o else []), *options]
            say(args, code, "shoal run: " + message, env)

        say(["rnu"], 2, "shoal: 'rnu' is not a command: did you mean 'run'? 'shoal --help' lists them")
        run(i=None, message="-i: is missing: give a file of requests, or - for standard input")
        run(o=None, message="-o: is missing: give the file for the results, or - for standard output")
        run("extra", message="'extra': takes no operands: the input is given with -i")
        run(i=s.file("none"), message=f"-i: {s.file('none')}: cannot be opened: No such file or directory")
        run(i=s.path, message=f"-i: {s.path}: is a folder: allowed is a file of requests, one JSON object a line")
        run(o=s.path, message=f"-o: {s.path}: is a folder: give a file")
        run(o=inp, message=f"-o: {inp}: is the input: give another file")
        run(o=s.file("no/folder"), message=f"-o: {s.file('no/folder')}: its folder cannot be written: No such file or directory")
        run("--resume", message=f"--resume: there is no {out}.store to go on from")
        run("-n", "99", message="99 ranks: the model has 15 layers: at most 15 ranks")
        run("--cuts", "1,2", "-n", "2", message="--cuts 1,2: 3 stages, but there are 2 ranks: give 1 cuts, or -n 3")
        run("--mode", "q3", message="--mode: 'q3' is not provided: allowed are exact, bf16, q8, q4")
        run("--tp", "3", message="--tp: 3 does not divide the 4 query heads of the model: allowed are 1, 2, 4")
        run("--ep", "2", message="--ep: 2: the model has no experts: allowed is 1")
        run("--tp", "2", "--cp", "2", message="--ep 1, --tp 2, --cp 2: a stage is divided one way at a time: allowed is one of them "
            "above 1, with any --pp and --replicas")
        run("--pp", "2", "--tp", "2", "-n", "3", message="3 ranks: 2 stages of 2 ranks (ep 1, tp 2, cp 1) need 4: give -n 4")
        run(env={"OMPI_COMM_WORLD_SIZE": 4}, message="was started as one of 4 tasks (OMPI_COMM_WORLD_SIZE): start it once, without mpirun "
                                                      "or srun; it starts its ranks itself with -n 4")
        run(env={"SLURM_STEP_NUM_TASKS": 3}, message="was started as one of 3 tasks (SLURM_STEP_NUM_TASKS): start it once, without mpirun "
                                                      "or srun; it starts its ranks itself with -n 3")
        say(["run", "-m", s.path, "-i", inp, "-o", out], 3, f"shoal run: -m: {s.path}: has no config.json: allowed is a checkpoint folder")
        say(["run", "-m", s.file("none"), "-i", inp, "-o", out], 3,
            f"shoal run: -m: {s.file('none')}: No such file or directory: allowed is a checkpoint folder")
        say(["run", "-i", inp, "-o", out], 3, f"shoal run: SHOAL_SHARE: {s.path} has no minnow: allowed is the folder share/shoal of an "
            "installation", env={"SHOAL_SHARE": s.path})

        with open(out, "w") as f:
            f.write("precious\n")
        run(message=f"-o: {out}: exists already and has no {out}.store to go on from: remove it or give another file")
        with open(out) as f:
            check(f.read() == "precious\n", "an output that existed was changed")
        os.remove(out)

        os.makedirs(s.file("some/thing"))
        run("--store", s.file("some"), message=f"{s.file('some')}: is not the store of a run: name another folder with --store")

        empty = s.file("empty.jsonl")
        st.write_lines(empty, ["", "   "])
        p = subprocess.run(st.command(MODEL, empty, out), capture_output=True, text=True, timeout=60, env=s.env())
        check(p.returncode == 0, f"empty input: exit {p.returncode}")
        check(p.stderr == f"shoal run: -i: {empty}: is empty: nothing to answer\n", f"empty input: said {p.stderr!r}")
        check(os.path.exists(out) and os.path.getsize(out) == 0, "empty input: the output is not an empty file")
        check(not os.path.exists(out + ".store"), "empty input: a store was left")
    check.finish()


main()
