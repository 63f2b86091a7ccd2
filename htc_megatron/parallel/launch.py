"""How this process was started: its rank among the others, and where they meet, from what the environment shows.

| launcher | seen by | ranks from | meeting point |
| --- | --- | --- | --- |
| torchrun, or a script | RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT | these | these |
| srun | SLURM_STEP_ID and SLURM_PROCID | SLURM_PROCID, SLURM_LOCALID | the step's first host, a port by job number |
| mpiexec, mpirun | PMI_SIZE (MPICH, Intel MPI), OMPI_COMM_WORLD_SIZE (Open MPI) | mpi4py | told by rank 0 over MPI |
| none | nothing of these | one process | this machine |

MASTER_ADDR and MASTER_PORT go before what srun and mpiexec would give. Afterwards all five variables of torchrun are set, so that
whatever reads them (torch, DeepSpeed) sees one launcher. A copy that takes itself for the only process is what must never come out
of it: N of them would train N models over each other's checkpoints. What contradicts itself is refused.
"""

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

from htc_megatron.config import ConfigError

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
LAUNCH_VARIABLES = (*RANKS, "MASTER_ADDR", "MASTER_PORT")
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
MPI_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")
FIRST_PORT, PORTS = 10000, 20000  # below what Linux gives to outgoing connections


@dataclass(frozen=True)
class Launch:
    """This process among those that were started together."""

    launcher: str  # torchrun, srun, mpiexec, the environment or alone
    rank: int
    world_size: int
    local_rank: int  # on this node
    address: str  # of rank 0
    port: int


def discover() -> Launch:
    """Find out how this process was started and set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT accordingly.

    Raises ConfigError. Safe to be called again.
    """
    environment = os.environ
    tasks, mpi_size = _srun_tasks(environment), _mpi_size(environment)
    if all(name in environment for name in LAUNCH_VARIABLES):
        launch = _given(environment, tasks, mpi_size)
    elif tasks and mpi_size in (1, tasks):  # 1: no MPI, or a job that each task could be for itself
        launch = _from_srun(environment, tasks)
    elif mpi_size > 1:
        launch = _from_mpi(environment, mpi_size)
    else:
        launch = _alone(environment)
    environment.update(
        RANK=str(launch.rank),
        WORLD_SIZE=str(launch.world_size),
        LOCAL_RANK=str(launch.local_rank),
        MASTER_ADDR=launch.address,
        MASTER_PORT=str(launch.port),
    )
    _lead_gloo(launch)
    return launch


def speaks(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the one that tells the user what is wrong, as far as can be seen before `discover` has succeeded."""
    found = [environment[name] for name in ("RANK", *MPI_RANKS, "SLURM_PROCID") if name in environment]
    return not found or found[0] == "0"


def first_host(nodes: str) -> str:
    """The first host of a SLURM list such as gpu[003-006,011],login1. Raises ConfigError."""
    if shutil.which("scontrol"):
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=60)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    return expand_hosts(nodes)[0]


def expand_hosts(nodes: str) -> list[str]:
    """All hosts of a SLURM list, where scontrol is not at hand: numbers in brackets keep their zeros. Raises ConfigError."""
    hosts: list[str] = []
    for entry in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", nodes):
        parts = [_numbers(part[1:-1], nodes) if part[0] == "[" else [part] for part in re.findall(r"\[[^\]]*\]|[^\[\]]+", entry)]
        hosts += ["".join(choice) for choice in product(*parts)]
    if not hosts or "".join(nodes.split()) != nodes:
        raise ConfigError(f"SLURM's list of nodes: got {nodes!r}, wanted one such as gpu[003-006,011]")
    return hosts


def _numbers(text: str, nodes: str) -> list[str]:
    found = []
    for span in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", span)
        if match is None:
            raise ConfigError(f"SLURM's list of nodes: got {nodes!r}, wanted numbers such as [003-006,011] in its brackets")
        low, high = match[1], match[2] or match[1]
        found += [str(number).zfill(len(low)) for number in range(int(low), int(high) + 1)]
    return found


def _whole(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise ConfigError(f"{name} in the environment: got {text!r}, wanted a whole number")
    return int(text)


def _srun_tasks(environment: Mapping[str, str]) -> int:
    """Number of processes that srun started together with this one; 0 without srun. A batch script alone is no step."""
    if "SLURM_STEP_ID" not in environment or "SLURM_PROCID" not in environment:
        return 0
    return _whole(environment, "SLURM_STEP_NUM_TASKS", 1)


def _mpi_size(environment: Mapping[str, str]) -> int:
    return next((_whole(environment, name) for name in MPI_SIZES if name in environment), 1)


def _given(environment: Mapping[str, str], tasks: int, mpi_size: int) -> Launch:
    """torchrun's environment, or one made by hand."""
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "the environment"
    rank, world_size, local_rank = (_whole(environment, name) for name in RANKS)
    if rank >= world_size:
        raise ConfigError(f"RANK in the environment: got {rank}, wanted less than WORLD_SIZE, {world_size}")
    for outer, started in (("srun", tasks), ("mpiexec", mpi_size)):
        if started > 1 and world_size % started:
            raise ConfigError(
                f"WORLD_SIZE in the environment: got {world_size}, wanted a multiple of the {started} processes that {outer} started: each "
                f"would train alone; unset {', '.join(RANKS)}, or give torchrun --nnodes and --rdzv-endpoint"
            )
    return Launch(launcher, rank, world_size, local_rank, environment["MASTER_ADDR"], _whole(environment, "MASTER_PORT"))


def _agrees(launch: Launch, environment: Mapping[str, str]) -> Launch:
    """`launch`, if no variable of another launcher says otherwise."""
    for name, value in zip(RANKS, (launch.rank, launch.world_size, launch.local_rank), strict=True):
        if environment.get(name, str(value)) != str(value):
            raise ConfigError(f"{name} in the environment: got {environment[name]!r}, but {launch.launcher} says {value}; unset {name}")
    return launch


def _from_srun(environment: Mapping[str, str], tasks: int) -> Launch:
    address = environment.get("MASTER_ADDR")
    if not address:
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
        if not nodes:
            raise ConfigError("srun started this process, but SLURM_STEP_NODELIST is not set: set MASTER_ADDR to the job's first host")
        address = first_host(nodes)
    numbers = _whole(environment, "SLURM_JOB_ID", 0), _whole(environment, "SLURM_STEP_ID")
    port = _whole(environment, "MASTER_PORT", FIRST_PORT + (7 * numbers[0] + numbers[1]) % PORTS)
    launch = Launch("srun", _whole(environment, "SLURM_PROCID"), tasks, _whole(environment, "SLURM_LOCALID"), address, port)
    return _agrees(launch, environment)


def _from_mpi(environment: Mapping[str, str], size: int) -> Launch:
    """MPI is asked for ranks and for a meeting point, and then left: the ranks talk over gloo and NCCL, and a process that dies
    must not wait in MPI's own ending for others."""
    try:
        import mpi4py

        mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"mpiexec started {size} processes, but mpi4py cannot be used ({str(error).splitlines()[0]}): pip install mpi4py beside the "
            "MPI that mpiexec belongs to, or start with torchrun or srun"
        ) from error
    world = MPI.COMM_WORLD
    if world.size != size:
        raise ConfigError(
            f"mpiexec started {size} processes, but mpi4py sees {world.size}: it was built for another MPI than mpiexec belongs to"
        )
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    address = environment.get("MASTER_ADDR") or ("127.0.0.1" if node.size == size else _public_name())
    port = _whole(environment, "MASTER_PORT", free_port())
    address, port = world.bcast((address, port))
    launch = Launch("mpiexec", world.rank, size, node.rank, address, port)
    node.Free()
    MPI.Finalize()
    return _agrees(launch, environment)


def _alone(environment: Mapping[str, str]) -> Launch:
    present = [name for name in LAUNCH_VARIABLES if name in environment]
    missing = [name for name in LAUNCH_VARIABLES if name not in environment]
    if present:
        raise ConfigError(
            f"the launcher set {', '.join(present)} but not {', '.join(missing)}: start with torchrun, srun or mpiexec, or without any of "
            "them"
        )
    return Launch("alone", 0, 1, 0, "127.0.0.1", free_port())


def free_port() -> int:
    """A TCP port of this machine that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _public_name() -> str:
    """A name of this machine for others: the one it has, or its address on the default route where that name means loopback here."""
    name = socket.getfqdn()
    try:
        if not socket.gethostbyname(name).startswith("127."):
            return name
    except OSError:
        pass  # a name that is not even known here
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # an address kept for documentation: nothing is sent to it
        return probe.getsockname()[0]


def own_address(launch: Launch) -> str:
    """This machine's address on the network that leads to rank 0: the one that other ranks can reach. Raises ConfigError."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(launch.address, launch.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # nothing is sent: the kernel only looks up the way
            return probe.getsockname()[0]
    except OSError as error:
        raise ConfigError(f"MASTER_ADDR: {launch.address!r} leads nowhere from host {socket.gethostname()} ({error})") from error


def _lead_gloo(launch: Launch) -> None:
    """Let gloo listen on the network that leads to rank 0. By itself it takes the address that this host's name resolves to, and
    where that is 127.0.1.1, as Debian writes it into /etc/hosts, no other node could reach it."""
    if launch.world_size == 1 or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    import psutil

    address = own_address(launch)
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return
