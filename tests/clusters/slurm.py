"""A real Slurm of some nodes on this machine, in a folder of its own: as root, without systemd, cgroups or accounting.

Partitions of the same nodes: a job of ``high`` preempts those of ``low`` and ``wide``, which Slurm then requeues. A job
of ``wide`` starts on the node that has least to do, one of ``low`` on the first that has room.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from diffusion_core.machine.processes import end_with_parent

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol")
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
CPUS = 4
WITHIN_S = 30.0

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/%n
StateSaveLocation={folder}/state
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits for longer than a credential is valid.
AuthInfo=socket={folder}/munge.socket,cred_expire=3
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=30
MinJobAge=600
SlurmdTimeout=60
SlurmdParameters=config_overrides
{nodes}
PartitionName=low Nodes={names} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=high Nodes={names} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=wide Nodes={names} MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=0 LLN=YES
"""


def missing() -> str:
    """Why there can be no cluster here; empty if there can."""
    absent = [name for name in DAEMONS if shutil.which(name, path=PATH) is None]
    if absent:
        return f"needs {', '.join(absent)}: apt-get install slurmctld slurmd slurm-client munge"
    return "" if os.geteuid() == 0 else "needs root: Slurm's daemons run jobs of users"


class Cluster:
    """A cluster that runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}

    def ask(self, *command: str) -> str:
        """The output of a command of Slurm."""
        environment = {**os.environ, **self.environment}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def states(self) -> dict[str, str]:
        """The state of each job by its name."""
        rows = self.ask("squeue", "--array", "--states=all", "-h", "-o", "%j|%T").splitlines()
        return dict(row.split("|") for row in rows)

    def preempt(self, node: str) -> None:
        """Run a short job that takes all of a node from jobs of lower rank, and wait for its end."""
        words = ["--partition=high", f"--nodelist={node}", f"--cpus-per-task={CPUS}", "--output=/dev/null", "--wait"]
        self.ask("sbatch", *words, "--wrap=true")

    def lose(self, node: str) -> None:
        """Kill a node's daemon. Its jobs run on, but Slurm takes them for failed and requeues them.

        It would notice by itself after SlurmdTimeout.
        """
        self.daemons[node].kill()
        self.ask("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")

    @contextmanager
    def hurrying(self) -> Iterator[None]:
        """Inside this context requeued jobs start after 5 s, and not after two minutes."""
        over = threading.Event()

        def hurry() -> None:
            since: dict[str, float] = {}
            while not over.wait(0.5):
                waiting = self.ask("squeue", "--array", "--states=PENDING", "-h", "-o", "%i").split()
                since = {job: since.get(job, time.monotonic()) for job in waiting}
                # The daemon of a node refuses a job whose last credential is not older than cred_expire.
                if any(time.monotonic() - start > 5 for start in since.values()):
                    self.start_now()

        thread = threading.Thread(target=hurry)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def start_now(self) -> None:
        """Let requeued jobs start without their wait."""
        for job in self.ask("squeue", "--array", "--states=PENDING", "-h", "-o", "%i").split():
            with suppress(AssertionError):  # It has just started.
                self.ask("scontrol", "update", f"jobid={job}", "StartTime=now")


@contextmanager
def cluster(folder: Path, nodes: int = 2) -> Iterator[Cluster]:
    """Start a cluster of nodes ``n1``, ``n2``, ... At the end its jobs and daemons end."""
    (folder / "state").mkdir(parents=True)
    names = [f"n{number}" for number in range(1, nodes + 1)]
    for name in names:
        (folder / name).mkdir()
    folder.chmod(0o755)  # munge insists.
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    host = socket.gethostname().split(".")[0]
    first, *ports = free_ports(1 + nodes)
    each = f"NodeHostname={host} NodeAddr=127.0.0.1 CPUs={CPUS} RealMemory=4000 State=UNKNOWN"
    rows = "\n".join(f"NodeName={name} Port={port} {each}" for name, port in zip(names, ports, strict=True))
    text = CONFIGURATION.format(folder=folder, host=host, port=first, nodes=rows, names=",".join(names))
    (folder / "slurm.conf").write_text(text)
    running = Cluster(folder)
    with ExitStack() as stack:
        munged = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder / 'munge.socket'}"]
        munged += [f"--{what}-file={folder / f'munged.{what}'}" for what in ("pid", "log", "seed")]
        stack.enter_context(daemon(munged, running))
        wait_for((folder / "munge.socket").exists, "munged")
        stack.enter_context(daemon(["slurmctld", "-D"], running))
        for node in names:
            running.daemons[node] = stack.enter_context(daemon(["slurmd", "-D", "-N", node], running))

        def idle() -> bool:
            with suppress(AssertionError):
                return running.ask("sinfo", "-h", "-N", "-p", "low", "-o", "%T").split() == ["idle"] * nodes
            return False

        wait_for(idle, f"Slurm, see {folder}")
        try:
            yield running
        finally:
            end_jobs(running)


def end_jobs(running: Cluster) -> None:
    """Cancel all jobs and wait for their end: the processes that run them outlive the daemons."""
    running.ask("scancel", "--user=root")
    wait_for(lambda: not running.ask("squeue", "-h"), "the end of all jobs")


@contextmanager
def daemon(command: list[str], running: Cluster) -> Iterator[subprocess.Popen[bytes]]:
    """Run a daemon. It ends with this context, and with this process."""
    own = os.getpid()
    process = subprocess.Popen(
        [shutil.which(command[0], path=PATH) or command[0], *command[1:]],
        env={**os.environ, **running.environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: end_with_parent(own, signal.SIGKILL),
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens at."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_for(condition: Callable[[], bool], what: str, within_s: float = WITHIN_S) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)
