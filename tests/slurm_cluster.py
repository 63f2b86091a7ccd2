"""A real SLURM on this machine: slurmctld and as many slurmd as there are to be nodes, on loopback, without munge and without services.

    with SlurmCluster(nodes=2) as cluster:
        job = cluster.run("sbatch", "--parsable", "job.sh").strip()

Nodes are called 127.0.0.11, 127.0.0.12, ...: names that resolve wherever a script asks for its first host. Everything the daemons
write is in a temporary folder; they end, and it goes, with the block.
"""

import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

LOG_TAIL = 3000
DAEMONS = ("slurmctld", "slurmd")
PATH = os.pathsep.join(["/usr/sbin", "/usr/local/sbin", os.environ.get("PATH", "")])
CONFIGURATION = """
ClusterName=htc
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
# requeued jobs may start after this many seconds instead of 120. Not the least, 5: on a busy machine a launch may take longer, and its
# credential would have expired
AuthInfo=cred_expire=20
MessageTimeout=60
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
SlurmctldTimeout=300
SlurmdTimeout=300
KillWait=30
JobRequeue=1
NodeName={names} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports} CPUs=8 RealMemory=100000 State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why no cluster can be made here; empty if one can."""
    absent = [name for name in (*DAEMONS, "sbatch") if shutil.which(name, path=PATH) is None]
    return f"SLURM is not installed ({', '.join(absent)} not found)" if absent else ""


def _free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody uses."""
    for first in range(21000 + os.getpid() % 5000, 32000, count):
        with suppress(OSError):
            sockets = [socket.socket() for _ in range(count)]
            try:
                for offset, one in enumerate(sockets):
                    one.bind(("127.0.0.1", first + offset))
                return first
            finally:
                for one in sockets:
                    one.close()
    raise RuntimeError("no free ports")


class SlurmCluster:
    """See the module. `nodes`: their names."""

    def __init__(self, nodes: int):
        folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))  # a short name: paths of sockets may have 108 bytes
        self.folder, self.nodes = folder, [f"127.0.0.{11 + i}" for i in range(nodes)]
        self.processes: list[subprocess.Popen] = []
        self.shown = [folder]  # whose logs are shown when something does not come
        (folder / "state").mkdir()
        (folder / "spool").mkdir()
        port = _free_ports(nodes + 1)
        names, ports = f"127.0.0.[11-{10 + nodes}]", f"[{port + 1}-{port + nodes}]"
        if nodes == 1:
            names, ports = self.nodes[0], str(port + 1)
        host, user = socket.gethostname().split(".")[0], getpass.getuser()
        text = CONFIGURATION.format(folder=folder, host=host, user=user, port=port, names=names, ports=ports)
        (folder / "slurm.conf").write_text(text)
        inside = ("SLURM_", "SBATCH_", "PMI_", "OMPI_")  # of a job that the tests may themselves run in
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(inside)}
        self.environment |= {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> "SlurmCluster":
        try:
            self._start("slurmctld", "-D", "-i")
            for node in self.nodes:
                self._start("slurmd", "-D", "-N", node)
            self.wait(lambda: self._idle() == len(self.nodes), "idle nodes", 60)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(subprocess.SubprocessError, TimeoutError):
            self.run("scancel", "--full", "--signal=KILL", "--user", getpass.getuser())
            self.run("scancel", "--user", getpass.getuser())
            self.wait(lambda: not self.run("squeue", "-h").strip(), "an empty queue", 10)
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}{len(self.processes)}.out", "w") as log:
            self.processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=self.environment, start_new_session=True))

    def _idle(self) -> int:
        with suppress(subprocess.CalledProcessError):
            return self.run("sinfo", "-h", "-N", "-t", "idle").count("\n")
        return 0

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """What a command of SLURM's prints. Raises CalledProcessError."""
        done = subprocess.run(command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What scontrol shows of a job."""
        return dict(word.split("=", 1) for word in self.run("scontrol", "-o", "show", "job", number).split() if "=" in word)

    def wait(self, done, what: str, seconds: float) -> None:
        """Ask again and again until `done()` holds. Raises TimeoutError with the logs."""
        until = time.monotonic() + seconds
        while not done():
            if time.monotonic() > until:
                raise TimeoutError(f"waited {seconds:g} s for {what}\n{self.logs()}")
            time.sleep(0.1)

    def logs(self) -> str:
        """The ends of the logs of the daemons and of the folders in `shown`."""
        files = [path for folder in self.shown for path in sorted(folder.glob("*.log"))]
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-LOG_TAIL:]}" for path in files)
