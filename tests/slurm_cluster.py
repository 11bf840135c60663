"""A real SLURM cluster on loopback: two nodes of eight pretended GPUs, in a folder of its own, for root alone.

1 munged, slurmdbd with MariaDB, slurmctld and a slurmd per node start in a mount namespace that knows the nodes' names.
2 `Cluster.command` runs sbatch, scontrol, sacct, … for it. PYTHON=FOLDER/warm forks the tasks' programs (slurm_task),
  PYTHON=FOLDER/cold starts them as a user's are.
3 `close` ends what was started, by its process id.

Partitions: `low` is pre-empted by `high` at once, `grace` after GRACE_SECONDS, `cancelled` is pre-empted for good.
Not as on a cluster of many machines: tasks are found by their parents, the network is loopback, GPUs are devices that
hold nothing. `--mem` confines cold programs alone, and only where there are control groups of version 1. A requeued job
starts after seconds, not two minutes: a message to a node that was slow to answer (a stopped task keeps it for
KillWait) would be repeated after a minute and reach the next start, and is therefore waited for (MessageTimeout).
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.forked import ADDRESS, parent

PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmdbd", "mariadbd", "sbatch", "srun", "sacct")
NODES = ("n1", "n2")
GRACE_SECONDS = 20
START_SECONDS = 60

SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmUser=root
SlurmdUser=root
FirstJobId={first}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin={task}
SwitchType=switch/none
MpiDefault=none
LaunchParameters=use_interactive_step
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_min_interval=1,batch_sched_delay=0,preempt_youngest_first
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerNode=4000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PreemptExemptTime=0
JobRequeue=1
KillWait=20
MessageTimeout=60
SlurmdTimeout=10
InactiveLimit=0
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd}
AccountingStoragePass={folder}/munge.socket
AccountingStoreFlags=job_comment
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=8 RealMemory=64000 Gres=gpu:8
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=8 RealMemory=64000 Gres=gpu:8
PartitionName=DEFAULT Nodes=n1,n2 MaxTime=INFINITE State=UP
PartitionName=low Default=YES PriorityTier=1 PreemptMode=REQUEUE
PartitionName=grace PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=cancelled PriorityTier=1 PreemptMode=CANCEL GraceTime={grace}
PartitionName=high PriorityTier=10 PreemptMode=OFF
"""
CGROUP_CONF = """
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
ConstrainRAMSpace=yes
"""
SLURMDBD_CONF = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={dbd}
SlurmUser=root
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database}
StorageUser=root
StorageLoc=slurm_acct_db
"""


def free_ports(count: int) -> list[int]:
    """Returns ports of loopback that nobody listens at, below those that the kernel gives to clients meanwhile."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(16000, 32000), 1000):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports.append(port)
        if len(ports) == count:
            return ports
    raise AssertionError("no free ports")


class Cluster:
    """The running daemons and the commands to use them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen] = {}
        names = ("ctld", "dbd", "database", "n1", "n2")
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.values = ports | {"folder": folder, "host": socket.gethostname(), "grace": GRACE_SECONDS}
        self.values["first"] = (
            1 + os.getpid() % 9000
        )  # the ranks' port follows from it, and is shared by all clusters here
        self.confines_memory = os.access("/sys/fs/cgroup/memory", os.W_OK)
        self.values["task"] = "task/cgroup" if self.confines_memory else "task/none"
        self.environment = {"SLURM_CONF": f"{folder}/slurm.conf", "PYTHON": f"{folder}/warm", ADDRESS: parent()}

    def open(self) -> "Cluster":
        """Starts everything; returns when both nodes are idle."""
        folder = self.folder
        for name in ("state", "spool-n1", "spool-n2", "database"):
            (folder / name).mkdir()
        chosen = '[ -z "$SLURM_TASK_PROGRAM" ] || { shift; set -- "$SLURM_TASK_PROGRAM" "$@"; }\n'
        for name, program, before in (("warm", f"-SE {ROOT}/tests/slurm_task.py", ""), ("cold", "", chosen)):
            (folder / name).write_text(f'#!/bin/sh\n{before}cd {ROOT} && exec {sys.executable} {program} "$@"\n')
            (folder / name).chmod(0o755)
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        (folder / "slurm.conf").write_text(SLURM_CONF.format_map(self.values))
        if self.confines_memory:
            (folder / "cgroup.conf").write_text(CGROUP_CONF)
        (folder / "slurmdbd.conf").write_text(SLURMDBD_CONF.format_map(self.values))
        (folder / "slurmdbd.conf").chmod(0o600)
        (folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={folder}/gpu[0-7]\n")
        for gpu in range(8):
            os.mknod(folder / f"gpu{gpu}", 0o600 | 0o020000, os.makedev(1, 3))
        (folder / "hosts").write_text(Path("/etc/hosts").read_text() + "127.0.0.1 n1\n127.0.0.1 n2\n")
        socket_file = folder / "munge.socket"
        files = ("key", "pid", "log", "seed")
        words = [f"--{name}-file={folder}/munge.{name}" for name in files]
        self._start("munged", "munged", "--foreground", "--force", f"--socket={socket_file}", *words)
        self._await(socket_file.exists, "munged")
        self._start_accounting()
        self._start("slurmctld", "slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        self._await(lambda: self.command("sinfo", "-hN", "-p", "low", "-o", "%t").split() == ["idle"] * 2, "SLURM")
        return self

    def _start_accounting(self) -> None:
        folder, port = self.folder, self.values["database"]
        data = f"--datadir={folder}/database"
        quick = ["--innodb-log-file-size=8M", "--innodb-buffer-pool-size=32M", "--innodb-flush-log-at-trx-commit=0"]
        mariadb = ["--no-defaults", data, "--user=root", *quick]
        words = ["mariadb-install-db", *mariadb, "--auth-root-authentication-method=normal", "--skip-test-db"]
        subprocess.run(words, check=True, capture_output=True)
        database = f"{folder}/database.socket"
        self._start(
            "mariadbd", "mariadbd", *mariadb, f"--port={port}", "--bind-address=127.0.0.1", f"--socket={database}"
        )
        self._await(Path(database).exists, "MariaDB")
        self._start("slurmdbd", "slurmdbd", "-D")
        self._await(lambda: self._connects(int(self.values["dbd"])), "slurmdbd")
        self.command("sacctmgr", "-i", "add", "cluster", "test")

    @staticmethod
    def _connects(port: int) -> bool:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            return False
        return True

    def _start(self, name: str, *words: str) -> None:
        """Starts a daemon in a mount namespace in which the nodes' names are known."""
        inside = f'mount --bind {self.folder}/hosts /etc/hosts && exec "$@"'
        with open(self.folder / f"{name}.out", "ab") as output:
            self.daemons[name] = subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", inside, "sh", *words],
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _await(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            ended = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            logs = "\n".join((self.folder / f"{name}.out").read_text()[-2000:] for name in ended)
            assert time.monotonic() < deadline and not ended, f"{what} does not start; ended: {ended}\n{logs}"
            time.sleep(0.1)

    def start_node(self, node: str) -> None:
        self._start(node, "slurmd", "-D", "-N", node)

    def break_node(self, node: str, task: int) -> None:
        """Kills a node's daemon with a task and what holds it, as a power cut does, and has SLURM notice at once."""
        stat = Path(f"/proc/{task}/stat").read_text()
        for pid in (int(stat.rpartition(")")[2].split()[1]), task):
            os.kill(pid, signal.SIGKILL)
        self.daemons[node].kill()
        self.daemons[node].wait()
        self.command("scontrol", "update", f"node={node}", "state=down", "reason=broken")

    def mend_node(self, node: str) -> None:
        self.start_node(node)
        self.command("scontrol", "update", f"node={node}", "state=resume", code=None)  # it may have come back by itself

    def command(self, *words: str, code: int | None = 0, **environment: str) -> str:
        """Runs one of SLURM's commands and returns what it says."""
        settings = os.environ | self.environment | environment
        done = subprocess.run(words, env=settings, capture_output=True, text=True, timeout=120)
        assert code is None or done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def show(self, job: str) -> dict[str, str]:
        """Returns what `scontrol show job` says."""
        words = self.command("scontrol", "-o", "show", "job", job).split()
        return dict(word.partition("=")[::2] for word in words if "=" in word)

    def states(self, job: str) -> list[str]:
        """Returns how sacct names the end of each start, the first one first."""
        return self.command("sacct", "-nDXPj", job, "-o", "State").replace(" by 0", "").split()

    def close(self) -> None:
        self.command("scancel", "--full", "--signal=KILL", "--user=root", code=None)
        for name in reversed(self.daemons):
            daemon = self.daemons[name]
            if daemon.poll() is None:
                daemon.send_signal(signal.SIGTERM)
                try:
                    daemon.wait(20)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
        for step in _started_here(self.folder):
            os.kill(step, signal.SIGKILL)
        for node in NODES:  # the groups of other clusters are not empty
            for group in sorted(Path(f"/sys/fs/cgroup/memory/slurm_{node}").glob("**/"), reverse=True):
                with suppress(OSError):
                    group.rmdir()
        shutil.rmtree(self.folder)


def _started_here(folder: Path) -> list[int]:
    """Returns the processes whose environment names this cluster."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"SLURM_CONF={folder}/slurm.conf".encode() in words and int(process.name) != os.getpid():
            found.append(int(process.name))
    return found


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A real SLURM cluster of two nodes."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs apt-get install slurm-wlm slurmdbd munge mariadb-server: no {', '.join(missing)}")
    if subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode:
        pytest.skip("may not mount: SLURM's daemons are started as root")
    running = Cluster(Path(tempfile.mkdtemp(prefix="slurm-")))
    try:
        yield running.open()
    finally:
        running.close()


if __name__ == "__main__":
    opened = Cluster(Path(sys.argv[1]))
    began = time.monotonic()
    try:
        opened.open()
        print(f"open after {time.monotonic() - began:.1f} s", flush=True)
        sys.stdin.read()
    finally:
        opened.close()
