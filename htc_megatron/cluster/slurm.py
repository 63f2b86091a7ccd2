"""A run as a SLURM job: the sbatch script of tools/launch.py, filled into job.sh beside this file."""

import os
import shlex
import shutil
import string
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from htc_megatron.config import ConfigError, RunConfig
from htc_megatron.config_io import check, load_zero, to_yaml
from htc_megatron.parallel.support import refuse_untested

HERE = Path(__file__).parent
ROOT = HERE.parent.parent  # of the repository
SCRIPT, CONFIG = "job.sh", "job.yaml"
MAX_FALSE_STARTS = 5  # lives in a row that may end before training does


@dataclass(frozen=True)
class Job:
    """What a job asks of SLURM. sbatch: further options as (name, value), a value "" for a flag."""

    nodes: int  # at most
    min_nodes: int  # it starts, and goes on, with so many
    ranks_per_node: int
    gpus: bool = True  # one for each rank
    time: str = ""  # as SLURM writes it: 24:00:00
    name: str = ""  # default: htc-, and the last part of output_dir
    partition: str = ""
    account: str = ""
    constraint: str = ""
    signal_before: int = 300  # seconds
    preflight: bool = True
    min_free_gib: float = 10.0
    setup: tuple[str, ...] = ()  # shell commands before anything else, such as module load
    sbatch: tuple[tuple[str, str], ...] = ()


class _Template(string.Template):
    """@{name} instead of ${name}, which is the shell's."""

    delimiter = "@"
    pattern = r"(?P<escaped>(?!))|@\{(?P<braced>[a-z_]+)\}|(?P<named>(?!))|(?P<invalid>(?!))"


def node_counts(config: RunConfig, job: Job) -> list[int]:
    """How many nodes the layout can use, most first, up to what the job asks for. Raises ConfigError where that number is none of them,
    before anything is queued for days to fail."""
    if not 1 <= job.min_nodes <= job.nodes:
        raise ConfigError(f"--nodes: got {job.min_nodes}-{job.nodes}, wanted a number, or the least and the most with the least first")
    if job.ranks_per_node < 1:
        raise ConfigError(f"--gpus-per-node: got {job.ranks_per_node}, wanted at least 1")
    stage = load_zero(config.zero)["zero_optimization"]["stage"]

    def refuse(nodes: int) -> None:
        check(config, nodes * job.ranks_per_node)
        refuse_untested(config, nodes * job.ranks_per_node, stage)

    refuse(job.nodes)
    found = []
    for nodes in range(job.nodes, 0, -1):
        try:
            refuse(nodes)
        except ConfigError:
            continue
        found.append(nodes)
    return found


def job_script(config: RunConfig, job: Job) -> str:
    """The text of the sbatch script. Raises ConfigError where the layout cannot run on these nodes."""
    counts = node_counts(config, job)
    output_dir = Path(config.output_dir).absolute()
    if any(sign in str(output_dir) for sign in "\"'%\\\n "):
        raise ConfigError(
            f"output_dir: got {str(output_dir)!r}, wanted a path without spaces, quotes, % and \\, which SLURM would not take"
        )
    asked = {
        "job-name": job.name or f"htc-{output_dir.name}",
        "nodes": str(job.nodes) if job.min_nodes == job.nodes else f"{job.min_nodes}-{job.nodes}",
        "gpus-per-node": str(job.ranks_per_node) if job.gpus else "",
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "constraint": job.constraint,
    }
    directives = [f"#SBATCH --{name}={value}" for name, value in asked.items() if value]
    directives += [f"#SBATCH --{name}={value}" if value else f"#SBATCH --{name}" for name, value in job.sbatch]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    values = {
        "output_dir": str(output_dir),
        "quoted_output_dir": shlex.quote(str(output_dir)),
        "logs": str(output_dir / "logs"),
        "script": str(output_dir / SCRIPT),
        "config": shlex.quote(str(output_dir / CONFIG)),
        "directives": "\n".join(directives),
        "signal_before": str(job.signal_before),
        "ranks_per_node": str(job.ranks_per_node),
        "node_counts": " ".join(map(str, counts)),
        "workdir": shlex.quote(os.getcwd()),  # what relative paths of the configuration are relative to
        "setup": "\n".join([*job.setup, f"export PYTHONPATH={shlex.quote(path)}"]),
        "python": shlex.quote(sys.executable),
        "entry": shlex.quote(str(ROOT / "pretrain" / "pretrain_htc.py")),
        "preflight_entry": shlex.quote(str(ROOT / "tools" / "preflight.py")),
        "min_free_gib": f"{job.min_free_gib:g}",
        "max_false_starts": str(MAX_FALSE_STARTS),
    }
    preflight = _Template((HERE / "preflight.sh").read_text(encoding="utf-8")).substitute(values) if job.preflight else ""
    return _Template((HERE / "job.sh").read_text(encoding="utf-8")).substitute(values, preflight=preflight)


def write_job(config: RunConfig, job: Job) -> Path:
    """Write the script and the whole configuration into output_dir, where later edits of the YAML do not reach the run. Returns the
    script's path. Raises ConfigError."""
    text = job_script(config, job)
    folder = Path(config.output_dir).absolute()
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(to_yaml(config), encoding="utf-8")
        (folder / SCRIPT).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"output_dir: {error.filename or folder} cannot be written ({error.strerror})") from error
    return folder / SCRIPT


def submit(script: Path, options: Sequence[str] = ()) -> str:
    """Hand a script to sbatch. Returns the job's number. Raises ConfigError with what sbatch says against it."""
    if shutil.which("sbatch") is None:
        raise ConfigError(f"sbatch was not found: log in where SLURM is, and there run sbatch {script}")
    done = subprocess.run(["sbatch", "--parsable", *options, str(script)], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"sbatch refused {script}: {' '.join(done.stderr.split())}")
    return done.stdout.strip().partition(";")[0]
