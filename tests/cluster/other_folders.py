#!/usr/bin/env python3
"""Ranks that find different models under the same path, as on nodes with disks of their own: a mount of its own puts another folder in one
rank's place (needs root). Whatever differs (a packed folder, its mode, other weights, config.json), with --share-weights and without, the
run ends at once with status 3, and the reason names the rank, the folder and what each found. Equal copies are fine."""
import json
import os
import shutil
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import shoaltest as st


def model(name):
    return os.path.join(st.MODELS, name)


def launcher(s, there, other):
    """mpirun, whose rank 1 has `other` mounted over `there`."""
    path = s.file("launcher")
    with open(path, "w") as f:
        f.write(f"""#!/bin/sh
[ "$OMPI_COMM_WORLD_RANK" = 1 ] && exec unshare --mount sh -c 'mount --bind {other} {there} && exec "$@"' rank "$@"
exec "$@"
""")
    os.chmod(path, 0o755)
    return f"mpirun --oversubscribe --bind-to none -n $SHOAL_RANKS {path}"


def main():
    if not st.own_mounts():
        print("skipped: unshare --mount and mount --bind are not both allowed here")
        sys.exit(77)
    check = st.Checks()
    with st.Scratch() as s:
        folder = {"checkpoint": s.file("checkpoint"), "copy": s.file("copy"), "other": model("e4b-like"), "edited": s.file("edited")}
        for name in ("checkpoint", "copy", "edited"):
            shutil.copytree(model("e2b-like"), folder[name], copy_function=shutil.copyfile)
        with open(os.path.join(folder["edited"], "config.json"), "r+") as f:
            c = json.load(f)
            c.get("text_config", c)["rms_norm_eps"] = 1e-5
            f.seek(0)
            json.dump(c, f)
            f.truncate()
        for mode in ("q4", "q8"):
            folder[mode] = s.file(mode)
            p = subprocess.run([st.shoal(), "pack", "-m", folder["checkpoint"], "-o", folder[mode], "--mode", mode], capture_output=True, text=True, env=s.env())
            check(p.returncode == 0, f"pack: {p.stderr[-300:]}")
        req = [st.completion("a", [2, 5, 7], max_tokens=4, ignore_eos=True)]
        for here, there, words in (("checkpoint", "copy", ()), ("checkpoint", "q4", ("finds a folder packed for q4", "finds a checkpoint")),
                                   ("q4", "checkpoint", ("finds a checkpoint", "finds a folder packed for q4")),
                                   ("q4", "q8", ("finds a folder packed for q8", "finds a folder packed for q4")),
                                   ("checkpoint", "other", ("finds weights with fingerprint",)), ("checkpoint", "edited", ("config.json", "another one"))):
            for share in ((), ("--share-weights",)):
                t0 = time.time()
                what = f"{here}, and {there} on rank 1, {share}"
                code, rows, err = st.run(s, folder[here], req, "-n", 2, "--cp", 2, "--mode", "q4", *share,
                                         "--launcher", launcher(s, folder[here], folder[there]), timeout=100)
                if not words:
                    check(code == 0 and len(rows) == 1, f"{what}: exit {code}: {err[-400:]}")
                    continue
                words = (folder[here], "rank 1 (", "rank 0 (", "all ranks must find the same", *words)
                check(code == 3 and all(w in err for w in words), f"{what}: exit {code}: {err[-500:]}")
                check(time.time() - t0 < 20, f"{what}: took {time.time() - t0:.1f} s")
        left = st.left_behind(s)
        check(not left, f"left behind: {left}")
    check.finish()


main()
