"""Launch discovery, the job script, and runs started by mpiexec and by torchrun on two nodes."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from htc_megatron.cluster.slurm import Job, job_script
from htc_megatron.config import ConfigError
from htc_megatron.config_io import load_config
from htc_megatron.parallel.launch import LAUNCH_VARIABLES, MPI_RANKS, MPI_SIZES, Launch, discover, expand_hosts, speaks
from tests.train_worker import ENTRY, train
from tests.training_tiny import make_run

ROOT = ENTRY.parent.parent
STEPS = 3
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "x",
}
SRUN = {
    "SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "127.0.0.[11-12]", "SLURM_JOB_NODELIST": "127.0.0.[10-12]", "SLURM_NTASKS": "6",
}  # fmt: skip


@contextmanager
def environment(**variables: str):
    """Only these variables of launchers."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_", "PMI_", "TORCHELASTIC_"))}
    kept = {name: value for name, value in kept.items() if name not in LAUNCH_VARIABLES}
    with mock.patch.dict(os.environ, kept | variables, clear=True):
        yield


# ------------------------------------------------------------------------------------------------- discovery


def test_a_step_of_one_task_meets_where_the_job_script_says():
    """What is left of a job whose other nodes are gone: the script sets the meeting point, and srun starts one process."""
    alone = SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    with environment(**alone, MASTER_ADDR="127.0.0.11", MASTER_PORT="10009"):
        assert discover() == Launch("srun", 0, 1, 0, "127.0.0.11", 10009)


def test_torchrun_is_found_and_srun_around_it_is_no_conflict():
    expected = Launch("torchrun", 3, 8, 1, "127.0.0.1", 29500)
    with environment(**TORCHRUN):
        assert discover() == expected
    with environment(**TORCHRUN, **SRUN):  # srun starts torchrun once a task, torchrun the ranks
        assert discover() == expected


def test_srun_is_found_and_what_the_script_exports_goes_before():
    with environment(**SRUN):
        found = discover()
        assert found == Launch("srun", 2, 4, 0, "127.0.0.11", 10000 + 7 * 1234 + 1)
        assert [os.environ[name] for name in LAUNCH_VARIABLES] == ["2", "4", "0", "127.0.0.11", str(found.port)]
        assert discover().world_size == 4  # once more, as the process groups do
    with environment(**SRUN, MASTER_ADDR="127.0.0.9", MASTER_PORT="777", WORLD_SIZE="4"):
        assert discover() == Launch("srun", 2, 4, 0, "127.0.0.9", 777)
    with environment(**SRUN, PMI_RANK="2", PMI_SIZE="4"):  # srun --mpi=pmi2
        assert discover().launcher == "srun"


def test_a_process_without_launcher_is_alone():
    batch = {name: value for name, value in SRUN.items() if not name.startswith("SLURM_STEP")}  # a batch script is no step
    for variables in ({}, batch):
        with environment(**variables):
            found = discover()
            assert (found.launcher, found.rank, found.world_size, found.local_rank) == ("alone", 0, 1, 0)
            assert os.environ["WORLD_SIZE"] == "1" and 0 < found.port < 65536


CONFLICTS = {
    "half of torchrun": (
        {"RANK": "0", "WORLD_SIZE": "2"},
        "the launcher set RANK, WORLD_SIZE but not LOCAL_RANK, MASTER_ADDR",
    ),
    "a master alone": ({"MASTER_ADDR": "x", "MASTER_PORT": "1"}, "the launcher set MASTER_ADDR, MASTER_PORT but not RANK"),
    "copies under srun": (
        TORCHRUN | SRUN | {"RANK": "0", "WORLD_SIZE": "1"},
        "WORLD_SIZE in the environment: got 1, wanted a multiple",
    ),
    "copies under mpiexec": (TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "PMI_SIZE": "3"}, "the 3 processes that mpiexec started"),
    "another world": (SRUN | {"WORLD_SIZE": "16"}, "WORLD_SIZE in the environment: got '16', but srun says 4"),
    "another rank": (SRUN | {"RANK": "0"}, "RANK in the environment: got '0', but srun says 2"),
    "no number": (SRUN | {"SLURM_PROCID": "two"}, "SLURM_PROCID in the environment: got 'two', wanted a whole number"),
    "rank too large": (TORCHRUN | {"RANK": "8"}, "RANK in the environment: got 8, wanted less than WORLD_SIZE, 8"),
    "no nodes": ({k: v for k, v in SRUN.items() if "NODELIST" not in k}, "SLURM_STEP_NODELIST is not set"),
    "an address of nowhere": (TORCHRUN | {"MASTER_ADDR": "no.such.host.invalid"}, "MASTER_ADDR: 'no.such.host.invalid' leads nowhere"),
}


@pytest.mark.parametrize("case", CONFLICTS)
def test_what_contradicts_itself_is_refused(case):
    variables, sentence = CONFLICTS[case]
    with environment(**variables):
        os.environ.pop("GLOO_SOCKET_IFNAME", None)
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            discover()


def test_gloo_takes_the_network_that_leads_to_rank_0():
    with environment(**TORCHRUN):
        os.environ.pop("GLOO_SOCKET_IFNAME", None)
        discover()
        assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    with environment(**TORCHRUN, GLOO_SOCKET_IFNAME="chosen"):
        discover()
        assert os.environ["GLOO_SOCKET_IFNAME"] == "chosen"


def test_lists_of_hosts():
    assert expand_hosts("a1") == ["a1"]
    assert expand_hosts("gpu[003-005,011],login1") == ["gpu003", "gpu004", "gpu005", "gpu011", "login1"]
    assert expand_hosts("r[1-2]n[08-09]x") == ["r1n08x", "r1n09x", "r2n08x", "r2n09x"]
    for bad in ("", "a[1-x]", "a b"):
        with pytest.raises(ConfigError, match="SLURM's list of nodes"):
            expand_hosts(bad)


def test_one_rank_speaks():
    for variables in ({}, {"RANK": "0"}, {"SLURM_PROCID": "0"}, {name: "0" for name in MPI_RANKS}):
        assert speaks(variables)
    for variables in ({"RANK": "1"}, {"SLURM_PROCID": "1"}, {"PMI_RANK": "2", "SLURM_PROCID": "0"}):
        assert not speaks(variables)
    assert len(MPI_SIZES) == len(MPI_RANKS)


# ------------------------------------------------------------------------------------------------- the job script


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


def test_the_script_asks_for_what_was_asked(run, tmp_path):
    config = load_config(run, [f"output_dir={tmp_path}/out", "parallel.tensor_model_parallel_size=2"])
    text = job_script(config, Job(2, 1, 2, time="24:00:00", account="a", sbatch=(("qos", "high"), ("nice", "")), setup=("module load x",)))
    for line in ("nodes=1-2", "gpus-per-node=2", "time=24:00:00", "account=a", "qos=high", "nice", "requeue", "signal=B:USR1@300"):
        assert f"#SBATCH --{line}\n" in text
    assert "--partition" not in text and "@{" not in text and "for count in 2 1; do" in text
    assert text.index("module load x") < text.index("tools/preflight.py") < text.index("pretrain_htc.py")
    assert "preflight.py" not in job_script(config, Job(2, 1, 2, preflight=False))
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""
    assert not (tmp_path / "out").exists()


IMPOSSIBLE = {
    "world size": (["parallel.tensor_model_parallel_size=4"], Job(3, 3, 2), "got 6 processes for tensor_model_parallel_size 4"),
    "batch": ([], Job(3, 3, 1), "training.global_batch_size: got 4, wanted a multiple of"),
    "nodes": ([], Job(2, 3, 1), "--nodes: got 3-2"),
    "no ranks": ([], Job(1, 1, 0), "--gpus-per-node: got 0"),
    "path": (["output_dir=/tmp/two words"], Job(1, 1, 1), "output_dir: got '/tmp/two words', wanted a path without spaces"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_jobs_are_refused_before_they_are_queued(run, case):
    overrides, job, sentence = IMPOSSIBLE[case]
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        job_script(load_config(run, overrides), job)


# ------------------------------------------------------------------------------------------------- real launchers


@pytest.fixture(scope="module")
def expected(ranks, run, tmp_path_factory) -> list[float]:
    """The losses of one process."""
    folder = tmp_path_factory.mktemp("one")
    return [loss for _, loss, _ in ranks(1).run(train, str(run), [f"training.train_iters={STEPS}", f"output_dir={folder}"])[0]]


def losses(output_dir: Path) -> list[float]:
    return [event.value for event in EventAccumulator(str(output_dir / "tensorboard")).Reload().Scalars("train/loss")]


def clean_environment() -> dict[str, str]:
    with environment():
        return dict(os.environ) | {"PYTHONPATH": str(ROOT)}


def finish(commands: list[list[str]], seconds: float, folder: Path, **options) -> str:
    """Run commands beside each other to their good ends. Returns what they wrote; after `seconds` all are killed and that is shown."""
    logs = [folder / f"command{i}.log" for i in range(len(commands))]
    files = [open(log, "w") for log in logs]
    processes = [
        subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True, cwd=ROOT, **options)
        for command, file in zip(commands, files, strict=True)
    ]
    until = time.monotonic() + seconds
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < until:
            if any(process.poll() for process in processes):
                until = min(until, time.monotonic() + 10)  # the others cannot come to a good end any more
            time.sleep(0.1)
    finally:
        for process, file in zip(processes, files, strict=True):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            file.close()
    output = "\n".join(log.read_text(errors="replace") for log in logs)
    assert [process.returncode for process in processes] == [0] * len(commands), output[-8000:]
    return output


def test_mpiexec_trains_like_one_process(run, expected, tmp_path):
    """mpiexec -n 4, TP 2 x PP 2, found through mpi4py."""
    mpiexec = Path(sys.executable).with_name("mpiexec")
    if not mpiexec.exists():
        pytest.skip("the mpich wheel (extra test) is not installed")
    layout = ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"]
    command = [str(mpiexec), "-n", "4", sys.executable, str(ENTRY), "--config", str(run)]
    command += [*layout, f"training.train_iters={STEPS}", f"output_dir={tmp_path}/run"]
    output = finish([command], 300, tmp_path, env=clean_environment())
    assert "4 ranks started by mpiexec" in output
    assert losses(tmp_path / "run") == pytest.approx(list(map(np.float32, expected)), rel=1e-5)


def _ip(*words: str) -> None:
    subprocess.run([shutil.which("ip", path="/usr/sbin:/sbin:/usr/bin"), *words], check=True, capture_output=True, timeout=20)


def no_namespaces() -> str:
    """Why there can be no two hosts on this machine; empty if there can."""
    if os.geteuid():
        return "network namespaces need root"
    if shutil.which("ip", path="/usr/sbin:/sbin:/usr/bin") is None:
        return "iproute2 is not installed"
    name = f"htc{os.getpid()}x"
    try:
        _ip("netns", "add", name)
        _ip("netns", "delete", name)
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be made here ({error.stderr.decode().strip()})"
    return ""


@pytest.fixture
def two_hosts():
    """Two network namespaces, each with an address of its own, joined by a cable: (namespace, address) of each."""
    if reason := no_namespaces():
        pytest.skip(reason)
    names = [f"htc{os.getpid()}{letter}" for letter in "ab"]
    hosts = [(name, f"10.77.0.{i + 1}") for i, name in enumerate(names)]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth0", "netns", names[1])
        for name, address in hosts:
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "veth0")
            for device in ("lo", "veth0"):
                _ip("-n", name, "link", "set", device, "up")
        yield hosts
    finally:
        for name in names:
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", name)


def test_torchrun_on_two_hosts_trains_like_one_process(run, expected, two_hosts, tmp_path):
    """Two node ranks in network namespaces: nothing but the cable between 10.77.0.1 and 10.77.0.2 joins them. No variable says so:
    the network is found by the way to rank 0, though both hosts have one name."""
    ip = shutil.which("ip", path="/usr/sbin:/sbin:/usr/bin")
    commands = []
    for rank, (name, _) in enumerate(two_hosts):
        command = [ip, "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        command += [f"--node-rank={rank}", f"--master-addr={two_hosts[0][1]}", "--master-port=29511", str(ENTRY), "--config", str(run)]
        commands.append([*command, f"training.train_iters={STEPS}", f"output_dir={tmp_path}/run"])
    variables = clean_environment()
    variables.pop("GLOO_SOCKET_IFNAME", None)
    output = finish(commands, 300, tmp_path, env=variables)
    assert "2 ranks started by torchrun, meeting at 10.77.0.1:29511" in output and "GLOO_SOCKET_IFNAME=veth0" in output
    assert losses(tmp_path / "run") == pytest.approx(list(map(np.float32, expected)), rel=1e-5)
