"""A real Slurm on one machine for the tests: munged, slurmctld and slurmd, without systemd.

Everything of it is in one folder and on ports of its own: keys, sockets, spool, logs. Runs as root
or as an ordinary user, who can then submit for himself alone. Wants no cgroups, since containers
often lack them. Debian: apt-get install slurm-wlm munge.
"""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")
CPUS = 4  # said to be there; only Slurm believes it

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# Credentials of a few seconds: a requeued job waits for its old ones to expire.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=2
MinJobAge=300
JobRequeue=1
PreemptMode=REQUEUE
PreemptType=preempt/partition_prio
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=60 State=UP PriorityTier=1
PartitionName=high Nodes=ALL MaxTime=60 State=UP PriorityTier=10
"""


def missing() -> list[str]:
    """Programs that are not installed."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class SlurmCluster:
    """Daemons that run between `start` and `stop`; commands find them by SLURM_CONF."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.host = socket.gethostname().split(".")[0]
        self.config = folder / "slurm.conf"
        self.path = os.environ["PATH"] + ":/usr/sbin:/sbin"
        self.daemons: list[subprocess.Popen] = []

    def start(self) -> None:
        """Returns when the node takes jobs.

        Raises:
            RuntimeError: a daemon does not come up; with its log.
        """
        for name in ("state", "spool"):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)  # munged refuses sockets that others could not reach
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        ctld_port, slurmd_port = _free_ports(2)
        self.config.write_text(
            CONFIG.format(
                host=self.host,
                user=getpass.getuser(),
                folder=self.folder,
                ctld_port=ctld_port,
                slurmd_port=slurmd_port,
                cpus=CPUS,
            )
        )
        # Where Slurm has cgroup support at all, newer versions want to be told that they get none.
        (self.folder / "cgroup.conf").write_text("")
        files = ("key-file", "socket", "pid-file", "log-file", "seed-file")
        munge = [f"--{name}={self.folder}/munge.{name.removesuffix('-file')}" for name in files]
        self._daemon("munged", "--foreground", "--force", *munge)
        self._wait("munged", (self.folder / "munge.socket").exists)
        self._daemon("slurmctld", "-D", "-f", str(self.config))
        self._daemon("slurmd", "-D", "-f", str(self.config), "-N", self.host)
        self._wait("slurmd", lambda: self.run("sinfo", "-h", "-o", "%T").stdout.startswith("idle"))

    def _daemon(self, program: str, *arguments: str) -> None:
        with (self.folder / f"{program}.out").open("w") as log:
            self.daemons.append(
                subprocess.Popen(
                    [shutil.which(program, path=self.path), *arguments],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self.environment(),
                )
            )

    def environment(self) -> dict[str, str]:
        """What a process needs to find this cluster and no other."""
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
        return {**plain, "SLURM_CONF": str(self.config), "PATH": self.path}

    def run(self, *command: str) -> subprocess.CompletedProcess:
        """A Slurm command; its status is the caller's to look at."""
        return subprocess.run(
            command, capture_output=True, text=True, env=self.environment(), timeout=120
        )

    def jobs(self, state: str = "R") -> list[str]:
        """Numbers of the jobs in a state."""
        return self.run("squeue", "-h", "-r", "-t", state, "-o", "%i").stdout.split()

    def _wait(self, what: str, ready) -> None:
        deadline = time.monotonic() + 30
        while not ready():
            dead = [daemon.args[0] for daemon in self.daemons if daemon.poll() is not None]
            if dead or time.monotonic() > deadline:
                logs = [*self.folder.glob("*.out"), *self.folder.glob("*.log")]
                said = "\n".join(f"{log.name}: {log.read_text()[-500:]}" for log in logs)
                self.stop()
                raise RuntimeError(f"{what} did not come up (ended: {dead})\n{said}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Cancels what runs, which would outlive its daemon, and ends the daemons."""
        if all(daemon.poll() is None for daemon in self.daemons):
            user = ("-u", getpass.getuser())
            self.run("scancel", "--full", "--signal=KILL", *user)
            self.run("scancel", *user)
            deadline = time.monotonic() + 20
            while self.run("squeue", "-h", *user).stdout and time.monotonic() < deadline:
                time.sleep(0.2)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in reversed(self.daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self.daemons.clear()
