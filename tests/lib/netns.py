"""A few virtual nodes on this machine for tests that need several hosts: namespaces of their own for network, host name, mounts
and processes, joined by a bridge. Needs root and iproute2; raises Unavailable where the kernel does not allow it."""
import ctypes
import fcntl
import heapq
import os
import select
import shlex
import shutil
import signal
import struct
import subprocess
import time

NET = "10.88"


class Unavailable(Exception):
    pass


def _sh(command, check=True):
    p = subprocess.run(command, shell=True, capture_output=True, text=True)
    if check and p.returncode:
        raise Unavailable(f"{command}: {p.stderr.strip()}")
    return p


class Switch:
    """Joins nodes by TAP devices and a process that passes frames on after a delay: for kernels without netem."""

    def __init__(self, pids, delay):
        self.ports = [self._tap(pid) for pid in pids]
        self.child = os.fork()
        if self.child == 0:
            try:
                self._pass_on(delay)
            finally:
                os._exit(1)
        for fd in self.ports:
            os.close(fd)

    @staticmethod
    def _tap(pid):
        """A device eth0 in the network namespace of a process."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open("/proc/self/ns/net") as own, open(f"/proc/{pid}/ns/net") as there:
            if libc.setns(there.fileno(), 0x40000000):
                raise Unavailable("setns: " + os.strerror(ctypes.get_errno()))
            try:
                fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
                fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH14x", b"eth0", 0x1002))  # TUNSETIFF: TAP, no packet information
                return fd
            except OSError as e:
                raise Unavailable(f"/dev/net/tun: {e}")
            finally:
                libc.setns(own.fileno(), 0x40000000)

    def _pass_on(self, delay):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        where, late, order = {}, [], 0  # port of each address; frames by the time when they are due
        while True:
            wait = max(0, late[0][0] - time.monotonic()) if late else None
            for fd in select.select(self.ports, [], [], wait)[0]:
                for _ in range(64):
                    try:
                        frame = os.read(fd, 65536)
                    except BlockingIOError:
                        break
                    where[frame[6:12]] = fd
                    to = where.get(frame[:6])
                    for port in [to] if to else [p for p in self.ports if p != fd]:
                        heapq.heappush(late, (time.monotonic() + delay, order, port, frame))
                        order += 1
            while late and late[0][0] <= time.monotonic():
                _, _, port, frame = heapq.heappop(late)
                try:
                    os.write(port, frame)
                except OSError:
                    pass  # a full queue or a device that is down: lost, as on any network

    def down(self):
        os.kill(self.child, signal.SIGKILL)
        os.waitpid(self.child, 0)


class Nodes:
    """head (no process namespace of its own: it starts the others' processes) and node0, node1, …; files go to `folder`."""

    def __init__(self, folder, n, delay=0, one_cpu=False):
        """delay: seconds that every frame takes from one node to another. one_cpu: what is started in node K has this machine's
        K-th CPU and no other; else every node has them all, and ranks of one thread all choose the same."""
        if os.geteuid() != 0:
            raise Unavailable("needs root")
        self.folder, self.names, self.holders, self.switch = folder, ["head"] + [f"node{k}" for k in range(n)], {}, None
        os.makedirs(folder, exist_ok=True)
        with open(self._file("hosts"), "w") as f:
            f.write("127.0.0.1 localhost\n" + "".join(f"{self._address(h)} {h}\n" for h in self.names))
        with open(self._file("agent"), "w") as f:  # in place of ssh: HOST WORD…, the words are a shell command
            f.write(f"#!/bin/sh\nhost=$1; shift\n{self._pin() if one_cpu else ''}"
                    f"exec nsenter -t $(cat {folder}/$host.pid) -n -u -m -p sh -c \"$*\"\n")
        os.chmod(self._file("agent"), 0o755)
        try:
            for h in self.names:
                self._boot(h)
            self._join(delay) if delay else self._wire()
        except Exception:
            self.down()
            raise

    @staticmethod
    def _pin():
        """A line of the agent: the shell, and so all that it starts, on the CPU of its host."""
        cpus = sorted(os.sched_getaffinity(0))
        choice = " ".join(map(str, cpus))
        return f"cpus='{choice}'; k=$((${{host#node}} % {len(cpus)} + 1)); cpu=$(echo $cpus | cut -d' ' -f$k)\n" \
               "taskset -cp $cpu $$ > /dev/null\n"

    def _file(self, name):
        return os.path.join(self.folder, name)

    def _address(self, host):
        return f"{NET}.0.{self.names.index(host) + 1}"

    def _boot(self, host):
        setup = (f"mount --bind {self._file('hosts')} /etc/hosts && hostname {host} && ip link set lo up && "
                 f"mkdir -p {self._file(host + '.shm')} && mount --bind {self._file(host + '.shm')} /dev/shm")
        spaces = ["--net", "--uts", "--mount"] + ([] if host == "head" else ["--pid", "--fork", "--mount-proc", "--kill-child"])
        # the first process waits; when it ends, so do all in its process namespace
        p = subprocess.Popen(["unshare", *spaces, "sh", "-c", f"{setup} && echo up && exec sleep 100000"], stdin=subprocess.DEVNULL,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.holders[host] = p
        if p.stdout.readline() != "up\n":
            p.kill()
            raise Unavailable(f"{host}: {p.stderr.read().strip()}")
        pid = p.pid
        if host != "head":
            with open(f"/proc/{pid}/task/{pid}/children") as f:
                pid = int(f.read().split()[0])
        with open(self._file(host + ".pid"), "w") as f:
            f.write(f"{pid}\n")

    def pid(self, host):
        with open(self._file(host + ".pid")) as f:
            return int(f.read())

    def command(self, host, args):
        """args as they are run in a node."""
        return ["nsenter", "-t", str(self.pid(host)), "-n", "-u", "-m", *([] if host == "head" else ["-p"]), *args]

    def inside(self, host, text, check=True):
        """Shell text as it is run in a node."""
        return _sh(shlex.join(self.command(host, ["sh", "-c", text])), check)

    def _wire(self):
        self.inside("head", f"ip link add br0 type bridge && ip addr add {self._address('head')}/16 dev br0 && ip link set br0 up")
        for h in self.names[1:]:
            self._plug(h)

    def _plug(self, h):
        """The address of the device is the node's: its neighbours know it again when it is started anew."""
        mac = "02:88:" + ":".join(f"{int(x):02x}" for x in self._address(h).split("."))
        self.inside("head", f"ip link add p-{h} type veth peer name e-{h} && ip link set p-{h} master br0 up && "
                            f"ip link set e-{h} netns {self.pid(h)}")
        _sh(f"nsenter -t {self.pid(h)} -n sh -c 'ip link set e-{h} name eth0 address {mac} && ip addr add {self._address(h)}/16 dev eth0 && "
            "ip link set eth0 up'")

    def _join(self, delay):
        self.switch = Switch([self.pid(h) for h in self.names], delay)
        for h in self.names:
            _sh(f"nsenter -t {self.pid(h)} -n sh -c 'ip addr add {self._address(h)}/16 dev eth0 && ip link set eth0 up'")

    def link(self, host, up):
        """Pulls or plugs the cable: nobody is told, no FIN, no RST."""
        self.inside("head", f"ip link set p-{host} {'up' if up else 'down'}")

    def shape(self, mbit, burst=0):
        """Every node's cable carries so many Mbit/s each way; a message of up to `burst` bytes after a silence passes at once."""
        burst = int(burst) or max(65536, int(mbit * 1e6 / 8 / 250))
        for h in self.names[1:]:
            qdisc = f"root tbf rate {mbit}mbit burst {burst} latency 400ms"
            self.inside("head", f"tc qdisc replace dev p-{h} {qdisc}")
            _sh(f"nsenter -t {self.pid(h)} -n tc qdisc replace dev eth0 {qdisc}")

    def jumbo(self, mtu):
        """Larger frames on every cable."""
        for h in self.names[1:]:
            self.inside("head", f"ip link set p-{h} mtu {mtu}")
            self.inside(h, f"ip link set eth0 mtu {mtu}")

    def environment(self):
        """What makes mpirun start its daemons here."""
        mca = {"plm": "rsh", "plm_rsh_agent": self._file("agent"), "plm_rsh_no_tree_spawn": "1", "ras": "^slurm",
               "btl_tcp_if_include": f"{NET}.0.0/16", "oob_tcp_if_include": f"{NET}.0.0/16", "orte_tmpdir_base": self.folder}
        return {"OMPI_MCA_" + k: v for k, v in mca.items()}

    def processes(self, host):
        """pids (as seen from outside) in a node, without the one that waits."""
        try:
            own = os.readlink(f"/proc/{self.pid(host)}/ns/pid")
        except OSError:
            return []
        found = []
        for p in filter(str.isdigit, os.listdir("/proc")):
            try:
                if int(p) != self.pid(host) and os.readlink(f"/proc/{p}/ns/pid") == own:
                    found.append(int(p))
            except OSError:
                pass
        return found

    @staticmethod
    def command_line(pid):
        """Words joined by spaces; "" when the process is gone."""
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as f:
                return f.read().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            return ""

    def lives(self, host):
        return self.holders[host].poll() is None

    def kill(self, host):
        """All its processes end at once, and its devices with them."""
        os.kill(self.pid(host), signal.SIGKILL)
        self.holders[host].wait()
        self.inside("head", f"ip link del p-{host}", check=False)

    def start(self, host):
        """Boots a node that was killed, its shared memory empty; not with a delay."""
        shutil.rmtree(self._file(host + ".shm"))
        self._boot(host)
        self._plug(host)

    def down(self):
        for h, p in self.holders.items():
            try:
                if h != "head":
                    os.kill(self.pid(h), signal.SIGKILL)
            except (OSError, ValueError):
                pass
            p.kill()
            p.wait()
        self.holders = {}
        if self.switch:
            self.switch.down()
            self.switch = None
        time.sleep(0.1)
