#!/usr/bin/env python3
"""shoal under a real Slurm (tests/lib/slurm.py: slurmctld, slurmd and munged on virtual nodes; needs root): job scripts of several
nodes give the rows of a local run, byte for byte; a node that dies, a batch script that outlives its slurmd, scancel, the time
limit, preemption and suspension lose no row, give none twice, and leave nothing on the nodes. The job script is the one of
deploy/slurm.
    slurm.py [PART…]   of those in PARTS; all by default"""
import os
import re
import shutil
import signal
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import netns
import shoaltest as st
import slurm

BATCH = os.path.join(st.ROOT, "share", "demo-batch.jsonl")
SCRIPT = os.path.join(st.ROOT, "deploy", "slurm", "shoal.sbatch")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
AT_WORK = "tokens of KV fit"
PARTS = ("layouts", "tasks", "components", "array", "service", "cancelled", "preempted", "suspended", "limit", "node", "unnoticed",
         "outlived", "spared")
ROOT_MPI = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}  # jobs are root's here


def lines(path):
    """The rows as they are, but for the time of day, in the order of the requests' names."""
    with open(path, "rb") as f:
        return sorted(re.sub(rb'"created":\d+', b'"created":0', x) for x in f)


def long_requests(n, tokens):
    return [{"custom_id": f"r{k}", "method": "POST", "url": "/v1/chat/completions",
             "body": {"model": "minnow", "messages": [{"role": "user", "content": f"Count from {k}. What is the opposite of left?"}],
                      "max_tokens": tokens, "temperature": 0.9, "seed": k, "ignore_eos": True}} for k in range(n)]


class Test:
    def __init__(self, s, cluster, check):
        self.s, self.cluster, self.check = s, cluster, check
        self.env = s.env(**ROOT_MPI)
        self.long = s.file("long.jsonl")
        st.write_lines(self.long, long_requests(500, 300))
        self.want = {BATCH: self._local(BATCH), self.long: self._local(self.long)}

    def _local(self, inp):
        out = self.s.file("want.jsonl")
        p = self.cluster.run([st.shoal(), "run", "-m", st.DEMO, "-i", inp, "-o", out, "-n", "1", "--progress", "none"], host="node0",
                             env=self.env, timeout=200)
        self.check(p.returncode == 0, f"a local run: exit {p.returncode}: {p.stderr[-400:]}")
        rows = lines(out)
        os.remove(out)
        return rows

    def script(self, name, inp, options=(), out=None):
        """The example job script with this test's files in place of those that are to be changed; its results and its log."""
        with open(SCRIPT) as f:
            text = f.read()
        out = self.s.file(out or name + ".jsonl")
        for old, new in ((r"^model=.*", f"model={st.DEMO}"), (r"^requests=.*", f"requests={inp}"), (r"^results=.*", f"results={out}"),
                         (r"^export TMPDIR=.*", f"export TMPDIR={self.s.tmp}"),
                         (r"^shoal run", " ".join([st.shoal(), "run", *map(str, options)]))):
            text, n = re.subn(old, new, text, flags=re.M)
            self.check(n == 1, f"{SCRIPT}: {n} lines like {old}")
        return self._script(name, text), out, self.s.file(name + ".log")

    def _script(self, name, text):
        path = self.s.file(name + ".sh")
        with open(path, "w") as f:
            f.write(text)
        return path

    def submit(self, script, log, *options, env=None):
        return self.cluster.submit("-D", self.s.path, "-o", log, *map(str, options), script, env=env or self.env)

    def read(self, path):
        try:
            with open(path, errors="replace") as f:
                return f.read()
        except OSError:
            return ""

    def wait_text(self, log, words, seconds=60):
        end = time.time() + seconds
        while words not in self.read(log):
            if time.time() > end:
                self.check(False, f"no '{words}' within {seconds} s: {self.read(log)[-800:]}")
                return False
            time.sleep(0.1)
        return True

    def complete(self, what, out, inp, log):
        got = lines(out) if os.path.exists(out) else []
        self.check(got == self.want[inp], f"{what}: {len(got)} rows of {len(self.want[inp])}, "
                   f"{len(set(got) - set(self.want[inp]))} of them other ones: {self.read(log)[-1200:]}")
        self.check(not os.path.exists(out + ".store"), f"{what}: its store is still there")

    def tidy(self, what, hosts=None, seconds=10):
        """Neither processes nor files of shoal or MPI are on the nodes."""
        hosts = hosts or [h for h in self.cluster.names if self.cluster.nodes.lives(h)]
        end = time.time() + seconds
        while True:
            left = [f"{h}: {x}" for h in hosts for x in self.left(h)]
            if not left or time.time() > end:
                self.check(not left, f"{what}: left on the nodes: {left}")
                return
            time.sleep(0.2)

    def left(self, host):
        files = self.cluster.run(["ls", "-1", "/dev/shm", self.s.tmp], host=host).stdout.split("\n")
        words = [self.cluster.nodes.command_line(p) for p in self.cluster.nodes.processes(host)]
        return [f for f in files if f and not f.endswith(":")] + [w[:80] for w in words if re.search(r"shoal |orted|mpirun", w)]

    def workers(self, host):
        return sum(bool(re.match(r"\S*/shoal\S* worker ", self.cluster.nodes.command_line(p))) for p in self.cluster.nodes.processes(host))

    def ends(self, what, job, log, seconds, state="COMPLETED", status="0:0", restarts=0):
        j = self.cluster.wait_job(job, ENDED, seconds, restarts)
        ok = j.get("JobState") == state and j.get("ExitCode") == status
        self.check(ok, f"{what}: {j.get('JobState')}, exit {j.get('ExitCode')}, {j.get('Restarts')} restarts, not {state}, {status}: "
                   f"{self.read(log)[-1200:]}" + ("" if ok else self.cluster.logs()[-3000:]))
        return j

    # --- what works ---

    def layouts(self):
        """Each on nodes of its own, one after the other."""
        several = [("default", 2, BATCH, [], [], "ranks 2/2"), ("pp", 2, BATCH, ["--pp", 2], [], "ranks 2/2"),
                   ("ep", 2, BATCH, ["--ep", 2], [], "ranks 2/2"), ("three", 3, BATCH, ["-n", 3], [], "ranks 3/3"),
                   ("pp-ep", 2, BATCH, ["--pp", 2, "--ep", 2], [], "ranks 4/4"),
                   ("replicas", 3, self.long, ["--replicas", 3, "-n", 1], [], "ranks 3/3"),
                   ("crowded", 2, self.long, ["--replicas", 4, "-n", 1], [], "ranks 4/4"),
                   ("empty", 2, BATCH, ["--pp", 2], ["--export=NONE"], "ranks 2/2")]
        for name, nodes, inp, options, more, ranks in several:
            script, out, log = self.script(name, inp, options)
            if more:  # root's mpirun wants these, and the job is given nothing
                text = self.read(script).replace("export TMPDIR", "".join(f"export {k}={v}\n" for k, v in ROOT_MPI.items()) + "export TMPDIR")
                self._script(name, text)
            job = self.submit(script, log, "-N", nodes, *more)
            self.ends(name, job, log, 120)
            self.complete(name, out, inp, log)
            self.check(ranks in self.read(log), f"{name}: no '{ranks}': {self.read(log)[-1500:]}")
        self.tidy("layouts")

    def tasks(self):
        """Started by srun: as one of several it refuses, as one alone it works, on the login node of an allocation too."""
        out = self.s.file("tasks.jsonl")
        run = [st.shoal(), "run", "-m", st.DEMO, "-i", BATCH, "-o", out, "--progress", "plain"]
        p = self.cluster.run(["srun", "-N2", "-n2", *run], env=self.env, check=False)
        said = "shoal run: was started as one of 2 tasks (SLURM_STEP_NUM_TASKS): start it once, without mpirun or srun; it starts its ranks " \
               "itself with -n 2"
        self.check(p.returncode == 2 and p.stderr.count(said) == 2, f"srun -n2: exit {p.returncode}: {p.stderr[-600:]}")
        self.check(not os.path.exists(out) and not os.path.exists(out + ".store"), "srun -n2: something was made")
        for name, how in (("srun -n1", ["srun", "-N1", "-n1", "-c2"]),
                          ("srun -n1 of two nodes", ["salloc", "-N2", "--ntasks-per-node=1", "-c2", "srun", "-N1", "-n1"]),
                          ("salloc", ["salloc", "-N2", "--ntasks-per-node=1", "-c2"])):
            p = self.cluster.run([*how, *run, *([] if name == "srun -n1" else ["--pp", "2"])], env=self.env, check=False)
            self.check(p.returncode == 0, f"{name}: exit {p.returncode}: {p.stderr[-800:]}")
            self.complete(name, out, BATCH, "")
            if os.path.exists(out):
                os.remove(out)
        self._launched("srun as launcher", [*run, "--pp", "2", "--launcher", "'srun --overlap --mpi=pmix -N2 -n $SHOAL_RANKS'"], out)
        said = "was started as one of 2 tasks (SLURM_STEP_NUM_TASKS) that no MPI joins: srun needs --mpi=pmix"
        self._launched("srun without MPI", [*run, "--pp", "2", "--launcher", "'srun --overlap --mpi=none -N2 -n $SHOAL_RANKS'"], None, "3:0", said)
        shutil.rmtree(out + ".store")
        self._launched("another job's node", [*run, "--hosts", "node0,head"], None, "2:0", "--hosts: 'head' is not in this Slurm job", hosts="")
        self.tidy("tasks")

    def _launched(self, name, run, out, status="0:0", said="", hosts='--hosts "$hosts"', nodes=("-N2", "--ntasks-per-node=1", "-c2")):
        """A batch script that starts one run; its results, or what it says."""
        log = self.s.file("launched.log")
        text = f"""#!/bin/bash
hosts=$(for n in $SLURM_JOB_NODELIST_HET_GROUP_0 $SLURM_JOB_NODELIST_HET_GROUP_1 ${{SLURM_HET_SIZE:-$SLURM_JOB_NODELIST}}; do
    scontrol show hostnames $n; done | grep node | paste -sd,)
exec {' '.join(run)} {hosts}
"""
        job = self.submit(self._script("launched", text), log, "--open-mode=truncate", *nodes)
        self.ends(name, job, log, 60, "COMPLETED" if status == "0:0" else "FAILED", status)
        self.check(said in self.read(log), f"{name}: no '{said}': {self.read(log)[-1500:]}")
        if out:
            self.complete(name, out, BATCH, log)
            os.remove(out)

    def components(self):
        """A heterogeneous job: mpirun knows the nodes of its first component, which is said; srun all."""
        out = self.s.file("components.jsonl")
        run = [st.shoal(), "run", "-m", st.DEMO, "-i", BATCH, "-o", out, "--progress", "plain"]
        nodes = ["-N1", "--ntasks-per-node=1", "-c2", ":", "-N2", "--ntasks-per-node=1", "-c2"]
        self._launched("components", run, out, hosts="", nodes=nodes,
                       said="a job of 2 components (SLURM_HET_SIZE): the nodes of the first are used, node0, and no others")
        self._launched("components by mpirun", run, None, "2:0", "is not in this Slurm job: its nodes are node0", nodes=nodes)
        self._launched("components by srun", [*run, "-n", "3", "--launcher", "'srun --overlap --mpi=pmix --het-group=0,1'"], out,
                       said="ranks 3/3", nodes=nodes)
        self.tidy("components")

    def array(self):
        """Each task has files of its own. One of them bears the number of the array: when its time is up it alone is queued again."""
        script, out, _ = self.script("array", self.long, out="array.$SLURM_ARRAY_TASK_ID.jsonl")
        job = self.submit(script, self.s.file("array.%a.log"), "--array=0-1")
        logs = [self.s.file(f"array.{k}.log") for k in (0, 1)]
        for log in logs:
            self.wait_text(log, AT_WORK)
        time.sleep(2)
        self.check(self.cluster.job(job + "_1").get("JobId") == job, "array: another task bears its number")
        self.cluster.run(["scancel", "--signal=USR1", "--batch", job + "_1"])
        for k, restarts in ((0, "0"), (1, "1")):
            j = self.ends(f"task {k}", f"{job}_{k}", logs[k], 150, restarts=int(restarts))
            self.check(j.get("Restarts") == restarts, f"task {k}: {j.get('Restarts')} restarts")
            self.complete(f"task {k}", out.replace("$SLURM_ARRAY_TASK_ID", str(k)), self.long, logs[k])
        self.check(f"queueing job {job}_1 again" in self.read(logs[1]), f"array: {self.read(logs[1])[-800:]}")
        self.tidy("array")

    def service(self):
        """A coordinator on one node, ranks by srun on two, a client on another."""
        keys, out, log = self.s.file("keys"), self.s.file("service.jsonl"), self.s.file("service.log")
        text = f"""#!/bin/bash
hosts=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
at="--connect tcp://${{hosts[0]}}:5555 --keys {keys}"
{st.shoal()} keygen {keys}
{st.shoal()} serve -m {st.DEMO} --listen tcp://*:5555 --keys {keys} --store {self.s.file("service.store")} & serve=$!
srun --overlap --mpi=pmix -N2 -n2 -w "${{hosts[1]}},${{hosts[2]}}" {st.shoal()} worker $at & workers=$!
srun --overlap -N1 -n1 -w "${{hosts[2]}}" {st.shoal()} submit $at -i {BATCH} --name night --wait -o {out}
echo "submit $?"
kill $workers; wait $workers
kill $serve; wait $serve
echo "serve $?"
"""
        job = self.submit(self._script("service", text), log, "-N3", "--ntasks-per-node=1", "-c2")
        self.ends("service", job, log, 90)
        self.check("submit 0\n" in self.read(log), f"service: {self.read(log)[-1000:]}")
        self.complete("service", out, BATCH, log)
        self.tidy("service")

    # --- what ends ---

    def cancelled(self):
        """scancel: SIGTERM to all processes at once. Twice: with the example, whose script tells shoal too, and with a bare one."""
        script, out, log = self.script("cancelled", self.long, ["-n", 4])
        bare = self._script("bare", f"#!/bin/bash\nexec {st.shoal()} run -n 4 -m {st.DEMO} -i {self.long} -o {out} --progress plain\n")
        for name, path, more in (("scancel", script, []), ("scancel of exec", bare, ["-N2", "--ntasks-per-node=1", "-c2"])):
            job = self.submit(path, log, "--open-mode=truncate", *more)
            self.wait_text(log, AT_WORK)
            time.sleep(2)
            self.cluster.run(["scancel", job])
            self.ends(name, job, log, 30, "CANCELLED", "4:0")
            said = self.read(log)
            self.check("shoal run: interrupted: " in said and "queueing" not in said, f"{name}: said {said[-800:]}")
            self.check(os.path.exists(out + ".store") and not os.path.exists(out), f"{name}: the store is gone, or there are results")
            self.tidy(name)
        job = self.submit(script, log, "--open-mode=truncate")
        self.ends("after scancel", job, log, 120)
        self.check("going on from" in self.read(log), f"after scancel: {self.read(log)[:400]}")
        self.complete("after scancel", out, self.long, log)
        job = self.submit(script, log, "--open-mode=truncate")
        self.ends("once more", job, log, 30)
        self.check("is complete: nothing to do" in self.read(log), f"once more: {self.read(log)}")
        self.tidy("after scancel")

    def preempted(self):
        """A job of more priority takes the nodes after some seconds of grace, at whose beginning the ranks on other nodes get SIGTERM,
        and at whose end all; Slurm itself queues the job again."""
        self.cluster.reconfigure(grace=6)
        longer = self.longer()  # than the grace, on any machine
        script, out, log = self.script("preempted", longer, ["--pp", 2])
        job = self.submit(script, log)
        self.begun(job, log)
        urgent = self.submit(self._script("urgent", "#!/bin/bash\nsleep 1\n"), self.s.file("urgent.log"), "-p", "urgent", "-N4", "--exclusive")
        self.ends("urgent", urgent, log, 60)
        j = self.ends("preempted", job, log, 150, restarts=1)
        self.check(j.get("Restarts") == "1", f"preempted: {j.get('Restarts')} restarts")
        said = self.read(log)
        self.check("going on from" in said and "queueing" not in said, f"preempted: {said[-1500:]}")
        self.complete("preempted", out, longer, log)
        self.tidy("preempted")
        self.cluster.reconfigure()

    def suspended(self):
        """All processes stop for longer than a silence is allowed, and go on: with their group, or with another if the coordinator
        is back before the ranks can speak."""
        script, out, log = self.script("suspended", self.long, ["--pp", 2])
        job = self.submit(script, log)
        self.begun(job, log)
        self.cluster.run(["scontrol", "suspend", job])
        time.sleep(15)
        self.check(self.cluster.job(job).get("JobState") == "SUSPENDED", "suspended: it is not")
        self.cluster.run(["scontrol", "resume", job])
        j = self.ends("suspended", job, log, 150)
        said = self.read(log)
        self.check(j.get("Restarts") == "0" and ("lost" not in said or "nothing heard for" in said), f"suspended: {said[-1500:]}")
        self.complete("suspended", out, self.long, log)
        self.tidy("suspended")

    def longer(self):
        """A job of half a minute and more: Slurm looks at time limits and dead daemons now and then only."""
        path = self.s.file("longer.jsonl")
        if path not in self.want:
            st.write_lines(path, long_requests(1500, 300))
            self.want[path] = self._local(path)
        return path

    def limit(self):
        """The time limit comes near: the example queues the job again until it is done; a bare script ends with 4."""
        longer = self.longer()
        script, out, log = self.script("limit", longer, ["--pp", 2])
        job = self.submit(script, log, "-t", 1, "--signal=B:USR1@53")
        j = self.ends("time limit", job, log, 280)
        self.check(int(j.get("Restarts", 0)) >= 1, f"time limit: {j.get('Restarts')} restarts: {self.read(log)[-800:]}")
        self.check("queueing job" in self.read(log) and "going on from" in self.read(log), f"time limit: {self.read(log)[-800:]}")
        self.complete("time limit", out, longer, log)
        out, log = self.s.file("term.jsonl"), self.s.file("term.log")
        bare = self._script("term", f"#!/bin/bash\nexec {st.shoal()} run --pp 2 -m {st.DEMO} -i {longer} -o {out} --progress plain\n")
        job = self.submit(bare, log, "-N2", "--ntasks-per-node=1", "-c2", "-t", 1, "--signal=B:TERM@53")
        self.ends("B:TERM", job, log, 90, "FAILED", "4:0")
        self.check("shoal run: interrupted: " in self.read(log), f"B:TERM: {self.read(log)[-800:]}")
        self.check(os.path.exists(out + ".store"), "B:TERM: the store is gone")
        self.tidy("B:TERM")

    # --- what breaks ---

    def begun(self, job, log):
        """The job's nodes, the one of its script first, once it has tokens."""
        self.wait_text(log, AT_WORK)
        time.sleep(3)
        j = self.cluster.job(job)
        hosts = self.cluster.run(["scontrol", "show", "hostnames", j["NodeList"]]).stdout.split()
        first = j["BatchHost"]
        return [first, *[h for h in hosts if h != first]]

    def node(self):
        """A node without power: Slurm queues the job again, and it goes on from the store on other nodes. First one that has
        ranks alone, then the one of the script."""
        for name, which in (("a node of ranks", 1), ("the node of the script", 0)):
            script, out, log = self.script(f"node{which}", self.long, ["--pp", 2])
            job = self.submit(script, log)
            hosts = self.begun(job, log)
            self.check([self.workers(h) for h in hosts] == [1, 1], f"{name}: ranks on {hosts}: {[self.workers(h) for h in hosts]}")
            self.cluster.power_off(hosts[which])
            t0 = time.time()
            self.cluster.wait_job(job, ("RUNNING",), 90, 1)
            print(f"{name} died: the job ran again {time.time() - t0:.0f} s later", flush=True)
            j = self.ends(name, job, log, 120, restarts=1)
            self.check(j.get("Restarts") == "1", f"{name}: {j.get('Restarts')} restarts")
            self.check("going on from" in self.read(log), f"{name}: {self.read(log)[-1200:]}")
            self.complete(name, out, self.long, log)
            self.tidy(name)
            self.cluster.start(hosts[which])

    def unnoticed(self):
        """A node dies, and Slurm takes longer to notice than shoal: it gives up with status 3, and the script queues the job again."""
        self.cluster.reconfigure(silence=1000)
        script, out, log = self.script("unnoticed", self.long, ["--pp", 2])
        job = self.submit(script, log)
        hosts = self.begun(job, log)
        t0 = time.time()
        self.cluster.power_off(hosts[1])
        self.wait_text(log, "queueing job", 220)
        print(f"unnoticed: given up {time.time() - t0:.0f} s after a node died", flush=True)
        self.check("gave up after 3 tries without progress" in self.read(log), f"unnoticed: {self.read(log)[-1200:]}")
        self.cluster.run(["scontrol", "update", f"nodename={hosts[1]}", "state=down", "reason=dead"])  # what Slurm does in the end
        self.cluster.reconfigure()
        self.ends("unnoticed", job, log, 120, restarts=1)
        self.check("going on from" in self.read(log), f"unnoticed: {self.read(log)[-1200:]}")
        self.complete("unnoticed", out, self.long, log)
        self.tidy("unnoticed")
        self.cluster.start(hosts[1])

    def outlived(self):
        """slurmd and its steps' daemons die, the batch script lives: the job is queued again while the old one is at work (slowly,
        two requests at once: Slurm takes half a minute; the new one may hurry)."""
        longer, seqs = self.longer(), self.s.file("seqs")
        st.write_lines(seqs, ["2"])
        script, out, log = self.script("outlived", longer, ["-n", 2, "--max-seqs", f"$(cat {seqs})"])
        job = self.submit(script, log, "-N1")
        host = self.begun(job, log)[0]
        st.write_lines(seqs, ["32"])
        self.cluster.kill_daemons(host)
        self.cluster.wait_job(job, ("RUNNING",), 90, 1)
        self.check(self.left(host) != [], f"outlived: the old run had ended before the new one began: {self.read(log)[-1200:]}")
        self.ends("outlived", job, log, 150, restarts=1)
        said = self.read(log)
        self.check(f"shoal run: {out}.store: a newer run has taken it over" in said, f"outlived: {said[-1500:]}")
        self.check("queueing" not in said, f"outlived: the old script queued the job: {said[-1500:]}")
        self.complete("outlived", out, longer, log)
        self.tidy("outlived")
        self.cluster.start(host)

    def spared(self):
        """--no-kill and a group on each node: a node that dies takes its group along, not the job."""
        script, out, log = self.script("spared", self.long, ["--replicas", 2, "-n", 1])
        job = self.submit(script, log, "--no-kill")
        hosts = self.begun(job, log)
        self.cluster.power_off(hosts[1])
        j = self.ends("spared", job, log, 150)
        self.check(j.get("Restarts") == "0", f"spared: {j.get('Restarts')} restarts")
        self.complete("spared", out, self.long, log)
        self.cluster.start(hosts[1])
        self.tidy("spared")


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # daemons live on their own: they are ended on the way out
    check = st.Checks()
    wanted = sys.argv[1:] or PARTS
    for p in wanted:
        if p not in PARTS:
            sys.exit(f"'{p}' is no part: allowed are {', '.join(PARTS)}")
    with st.Scratch() as s:
        try:
            cluster = slurm.Slurm(s.file("net"), s.tmp, 4)
        except netns.Unavailable as e:
            print("skipped:", e)
            sys.exit(77)
        try:
            t = Test(s, cluster, check)
            for p in wanted:
                t0 = time.time()
                getattr(t, p)()
                print(f"{p}: {time.time() - t0:.0f} s", flush=True)
        finally:
            st.kill_all(s)
            cluster.down()
    check.finish()


main()
