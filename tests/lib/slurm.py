"""A small real Slurm on virtual nodes (tests/lib/netns.py): slurmctld on the head, a slurmd and a munged on every node. Raises
netns.Unavailable where Slurm is not installed (deploy/install-deps --slurm) or virtual nodes are not allowed, and AssertionError
with the daemons' words where both are there and Slurm does not come up. Every node has a TMPDIR of its own (a tmpfs over
`tmp`); the rest of the file system is shared, as on a cluster. Nothing is asked of the machine's own configuration."""
import ctypes
import os
import shutil
import signal
import subprocess
import time

import netns

CONF = """ClusterName=test
SlurmctldHost=head
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
CryptoType=crypto/munge
MpiDefault=none
MpiParams=ports=12000-12999
StateSaveLocation={folder}/ctl
SlurmdSpoolDir={folder}/%n.spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.slurmd.log
MailProg=/bin/true
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout={silence}
InactiveLimit=0
KillWait={kill_wait}
BatchStartTimeout=10
MessageTimeout=5
TCPTimeout=2
Waittime=0
JobRequeue=1
UnkillableStepTimeout=30
NodeName={nodes} CPUs={cpus} RealMemory=4000 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes={nodes} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=1 GraceTime={grace}
PartitionName=urgent Nodes={nodes} MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=9
"""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "salloc", "scancel", "scontrol", "sinfo")


def _which(name):
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def _end_with_parent():
    """A test that is killed leaves no daemon: slurmctld drops the environment by which it would be found."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Slurm:
    def __init__(self, folder, tmp, n):
        missing = [d for d in PROGRAMS if not _which(d)]
        if missing:
            raise netns.Unavailable(f"{', '.join(missing)}: not installed: deploy/install-deps --slurm")
        self.folder, self.tmp, self.daemons = folder, tmp, {}
        self.nodes = netns.Nodes(folder, n)
        self.names = self.nodes.names[1:]
        try:
            self._configure()
            self._make_key()
            for host in self.nodes.names:
                self._prepare(host)
            self._daemon("head", ["slurmctld", "-D", "-c"])
            for host in self.names:
                self._daemon(host, ["slurmd", "-D", "-N", host])
            self.wait_states(self.names, "idle", 30)
        except Exception as e:  # virtual nodes were allowed: what is wrong now is a fault
            said = self.logs()
            self.down()
            raise AssertionError(f"Slurm does not come up: {e}\n{said}")

    def _configure(self, cpus=2, silence=6, kill_wait=8, grace=0):
        """cpus: of each node, whatever the machine has. silence: seconds until a node that does not answer is down (SlurmdTimeout).
        kill_wait: seconds from SIGTERM to SIGKILL. grace: seconds from being preempted to SIGTERM (GraceTime)."""
        etc = os.path.join(self.folder, "etc")
        os.makedirs(etc, exist_ok=True)
        os.makedirs(os.path.join(self.folder, "ctl"), exist_ok=True)
        files = {"slurm.conf": CONF.format(folder=self.folder, nodes=",".join(self.names), cpus=cpus, silence=silence, kill_wait=kill_wait,
                                           grace=grace),
                 "cgroup.conf": "CgroupPlugin=cgroup/v1\n", "mpi.conf": "PMIxCliTmpDirBase=/run/pmix\n"}
        for name, text in files.items():
            with open(os.path.join(etc, name), "w") as f:
                f.write(text)

    def reconfigure(self, **settings):
        """As at the start but for these."""
        self._configure(**settings)
        self.run(["scontrol", "reconfigure"])

    def _make_key(self):
        key = os.path.join(self.folder, "munge.key")
        with open(os.open(key, os.O_WRONLY | os.O_CREAT, 0o400), "wb") as f:
            f.write(os.urandom(128))

    def _prepare(self, host):
        """Folders that no two nodes share, Slurm's configuration where its programs look for it, and munged."""
        self.nodes.inside(host, "mount -t tmpfs -o mode=755 tmpfs /run && mkdir -p /run/munge /run/pmix && mkdir -p /etc/slurm && "
                                f"mount --bind {self.folder}/etc /etc/slurm && mount -t tmpfs -o mode=1777 tmpfs {self.tmp}")
        os.makedirs(f"{self.folder}/{host}.spool", exist_ok=True)
        self._daemon(host, ["munged", "--foreground", "--force", f"--key-file={self.folder}/munge.key",
                            "--socket=/run/munge/munge.socket.2", "--pid-file=/run/munge/munged.pid",
                            f"--log-file={self.folder}/{host}.munged.log", f"--seed-file={self.folder}/{host}.munged.seed"])
        end = time.time() + 10
        while self.nodes.inside(host, "test -S /run/munge/munge.socket.2", check=False).returncode:
            self._watch()
            if time.time() > end:
                raise AssertionError(f"munged on {host} did not start")
            time.sleep(0.05)

    def _daemon(self, host, args):
        with open(os.path.join(self.folder, f"{host}.{args[0]}.out"), "ab") as out:
            p = subprocess.Popen(self.nodes.command(host, [_which(args[0]), *args[1:]]), stdin=subprocess.DEVNULL, stdout=out,
                                 stderr=out, start_new_session=True, preexec_fn=_end_with_parent)
        self.daemons[host, args[0]] = p

    def _watch(self):
        """A daemon that has ended by itself is what is wrong."""
        for (host, name), p in self.daemons.items():
            if p.poll() is not None:
                raise AssertionError(f"{name} on {host} ended with status {p.returncode}: {self._tail(f'{host}.{name}.out')}")

    def _tail(self, name):
        try:
            with open(os.path.join(self.folder, name), errors="replace") as f:
                return f.read()[-1500:]
        except OSError as e:
            return str(e)

    def logs(self):
        names = ["slurmctld.log", *(h + ".slurmd.log" for h in self.names), *(h + ".munged.log" for h in self.nodes.names)]
        return "\n".join(f"--- {n}\n{self._tail(n)}" for n in names if os.path.exists(os.path.join(self.folder, n)))

    def run(self, args, host="head", timeout=60, env=None, check=True):
        """A command of Slurm, or another, in a node."""
        try:
            p = subprocess.run(self.nodes.command(host, args), capture_output=True, text=True, timeout=timeout, env=env)
        except subprocess.TimeoutExpired as e:
            said = (e.stderr or b"").decode(errors="replace")[-800:]
            queue = subprocess.run(self.nodes.command("head", ["squeue", "-l"]), capture_output=True, text=True, timeout=30).stdout
            raise AssertionError(f"{args}: not finished after {timeout} s: {said}\n{queue}\n{self.logs()}")
        if check and p.returncode:
            raise AssertionError(f"{args}: exit {p.returncode}: {p.stderr.strip()}")
        return p

    def submit(self, *args, env=None):
        return self.run(["sbatch", "--parsable", *args], env=env).stdout.strip()

    def job(self, number):
        """What scontrol says of a job: {"JobState": "RUNNING", "BatchHost": "node0", …}."""
        text = self.run(["scontrol", "show", "job", "-o", number], check=False).stdout
        return dict(w.split("=", 1) for w in text.split() if "=" in w)

    def wait_job(self, number, states, seconds, restarts=0):
        """Waits until the job is in one of the states, having been started again at least so often; what is known of it then."""
        end = time.time() + seconds
        while True:
            j = self.job(number)
            if j.get("JobState") in states and int(j.get("Restarts", 0)) >= restarts:
                return j
            if time.time() > end:
                return j
            time.sleep(0.1)

    def wait_states(self, hosts, state, seconds):
        end = time.time() + seconds
        while True:
            p = self.run(["sinfo", "-h", "-N", "-n", ",".join(hosts), "-o", "%t"], check=False)
            if set(p.stdout.split()) == {state}:
                return
            self._watch()
            if time.time() > end:
                raise AssertionError(f"nodes did not become {state} within {seconds} s: {p.stdout.split()} {p.stderr}")
            time.sleep(0.1)

    def power_off(self, host):
        """Nobody is told: the cable goes first."""
        self.nodes.link(host, False)
        self.nodes.kill(host)
        self._forget(lambda h, name: h == host)

    def kill_daemons(self, host):
        """slurmd and its job steps' daemons vanish; what they started goes on."""
        for pid in self.nodes.processes(host):
            if self.nodes.command_line(pid).split(" ")[0].split("/")[-1].rstrip(":") in ("slurmd", "slurmstepd"):
                os.kill(pid, signal.SIGKILL)
        self._forget(lambda h, name: (h, name) == (host, "slurmd"))

    def _forget(self, which):
        """Daemons that were killed here."""
        for key in [k for k in self.daemons if which(*k)]:
            self.daemons.pop(key).wait()

    def start(self, host):
        """A node that has no slurmd has one again."""
        if not self.nodes.lives(host):
            self.nodes.start(host)
            self._prepare(host)
        self._daemon(host, ["slurmd", "-D", "-N", host])
        end = time.time() + 30
        while time.time() < end:
            self.run(["scontrol", "update", f"nodename={host}", "state=resume"], check=False)
            if set(self.run(["sinfo", "-h", "-N", "-n", host, "-o", "%t"]).stdout.split()) == {"idle"}:
                return
            time.sleep(0.5)
        raise AssertionError(f"{host} did not come back\n{self.logs()}")

    def down(self):
        self.nodes.down()  # whatever lives in a node's process namespace goes with it
        for p in self.daemons.values():
            if p.poll() is None:
                p.kill()
            p.wait()
        self.daemons = {}
