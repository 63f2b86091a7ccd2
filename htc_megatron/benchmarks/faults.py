"""The fault campaign: short runs whose ranks are killed at random, begun again until they finish, against the same runs left in peace.

Every run must end with the weights, the optimiser's state and the losses of the undisturbed one, bit for bit, and no kill may cost a
checkpoint that was complete before it.
"""

import argparse
import random
import shutil
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml

from htc_megatron.benchmarks.data import write_pictures
from htc_megatron.benchmarks.result import Result, Say
from htc_megatron.benchmarks.scale import layout_of
from htc_megatron.benchmarks.supervised import PHASES, FaultAt, begins_again, live, losses
from htc_megatron.checkpoint import CheckpointReader, checkpoints, latest
from htc_megatron.checkpoint.folder import step_of
from htc_megatron.config import (
    BackboneConfig,
    ConfigError,
    DataConfig,
    LifeConfig,
    MethodConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
    VisionConfig,
)
from htc_megatron.config_io import check, to_dict
from htc_megatron.data.conversation import Template
from htc_megatron.data.prepare import Preparation, prepare
from htc_megatron.data.tokenizer import load_tokenizer
from htc_megatron.parallel.support import Layout

LAYOUTS = (Layout(dp=2, zero=2), Layout(pp=2), Layout(dp=2, zero=3))
STEPS, SAVES, MICRO_BATCHES = 6, 2, 2  # of a run: its steps, steps between two checkpoints, micro-batches of a data-parallel rank
LIMIT = 180.0  # seconds of a life: it takes a few, and many times that on a machine that does other things


def make_run(folder: Path, layout: Layout) -> Path:
    """A run of a few seconds a life: its data, and its YAML, whose path is returned."""
    data = folder / "data"
    if not data.exists():
        records, images, tokenizer = write_pictures(folder, 24, 16, 16, "png")
        prepare(Preparation(records, images, data, tokenizer, Template(""), None, progress=False))
    else:
        tokenizer = load_tokenizer(folder / "tokenizer.model")
    config = RunConfig(
        model=ModelConfig(
            backbone=BackboneConfig(2, 32, 64, 4, 4, tokenizer.vocab_size),
            vision=VisionConfig(16, 8, 32, 64, 1, 4),
            method=MethodConfig(channels="continuous", voco_token_id=tokenizer.voco_token_id),
        ),
        parallel=ParallelConfig(tensor_model_parallel_size=layout.tp, pipeline_model_parallel_size=layout.pp),
        data=DataConfig(train=str(data)),
        training=TrainingConfig(STEPS, 1, MICRO_BATCHES * layout.dp, 256, "fp32", freeze=(), save_interval=SAVES),
        life=LifeConfig(max_restarts_without_progress=1000, heartbeat_limit_s=6.0, hang_limit_s=60.0),
        zero=f"zero{layout.zero}.json",
    )
    check(config, layout.world_size)
    path = folder / f"tp{layout.tp}_pp{layout.pp}_dp{layout.dp}_zero{layout.zero}.yaml"
    path.write_text(yaml.safe_dump(to_dict(config)))
    return path


def draw(generator: random.Random, layout: Layout, done: int, phase: str) -> FaultAt:
    """A kill in one of the steps after `done`."""
    steps = [step for step in range(done + 1, STEPS + 1) if phase != "save" or step % SAVES == 0]
    # a save goes on in a thread beside training: killed at its beginning, or at some moment of the next quarter of a second
    delay = generator.choice((0.0, generator.uniform(0.0, 0.25))) if phase == "save" else 0.0
    count = generator.randint(1, MICRO_BATCHES) if phase in ("forward", "backward") else 1
    return FaultAt(generator.randrange(layout.world_size), generator.choice(steps), phase, count, delay)


def holds(root: Path) -> dict[str, torch.Tensor]:
    """Weights and optimiser of the last checkpoint, each byte of which is compared with its checksum. Python's and NumPy's random
    states are each process's own: a run seeds and uses neither."""
    reader = CheckpointReader(root)
    reader.verify()
    return {key: reader.read(key) for key in reader.manifest.tensors if not key.startswith("rng/")}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def disturbed(yaml_file: Path, output_dir: Path, layout: Layout, phases: list[str], generator: random.Random, say: Say) -> dict[str, Any]:
    """One run, killed once in each of `phases` and then left to finish. Raises AssertionError where a checkpoint is lost."""
    arguments, root = ["--config", str(yaml_file), f"output_dir={output_dir}"], output_dir / "checkpoints"
    kills: list[dict[str, Any]] = []
    left = list(phases)
    while True:
        before = {step_of(folder) for folder in checkpoints(root)}  # a step saved again is a folder of another name
        done = step_of(latest(root)) if before else 0
        fault = draw(generator, layout, done, left.pop(0)) if left and done < STEPS else None
        life = live(arguments, output_dir, layout.world_size, fault, LIMIT)
        after = {step_of(folder) for folder in checkpoints(root)}
        if not before <= after:
            raise AssertionError(f"{fault}: there were checkpoints of steps {sorted(before)}, and of {sorted(after)} are left")
        if after:
            CheckpointReader(root).verify()
        if fault is not None and -fault.number in life.ends:
            kills.append(asdict(fault) | {"ends": life.ends, "status": life.status, "ended_after_s": life.last_end - life.first_end})
            kills[-1]["named"] = any("no sign of life for" in log and f"rank {fault.rank} on " in log for log in life.logs)
            say(f"{fault}: {life.ends}, {kills[-1]['ended_after_s']:.1f} s")
        if not begins_again(life.status):
            tensors = holds(root) if after else {}
            return {"kills": kills, "status": life.status, "losses": losses(output_dir), "tensors": tensors, "logs": life.logs}


def campaign(folder: Path, layouts: list[Layout], kills: int, a_run: int, seed: int, say: Say) -> dict[str, Any]:
    """Runs with `a_run` kills each, phases and layouts in turn, until `kills` have happened."""
    generator, found, references = random.Random(seed), [], {}
    for layout in layouts:
        yaml_file = make_run(folder, layout)
        peace = disturbed(yaml_file, folder / f"peace_{yaml_file.stem}", layout, [], generator, say)
        if peace["status"]:
            raise RuntimeError(f"{layout}: the undisturbed run ended with {peace['status']}\n{peace['logs'][0][-3000:]}")
        references[layout] = (yaml_file, peace)
    number = total = 0
    while total < kills:
        layout = layouts[number % len(layouts)]
        yaml_file, peace = references[layout]
        phases = [PHASES[(total + i) % len(PHASES)] for i in range(min(a_run, kills - total))]
        output_dir = folder / f"run{number}"
        run = disturbed(yaml_file, output_dir, layout, phases, generator, say)
        equal = run["status"] == 0 and run["losses"] == peace["losses"] and same(run["tensors"], peace["tensors"])
        if not equal:
            say(f"{layout}, run {number}: status {run['status']}, losses {run['losses']} instead of {peace['losses']}")
        found.append({"layout": asdict(layout), "kills": run["kills"], "status": run["status"], "equal": equal, "folder": str(output_dir)})
        total, number = total + len(run["kills"]), number + 1
        say(f"{total} of {kills} kills, {sum(run['equal'] for run in found)} of {number} runs equal to the undisturbed one")
        if equal:
            shutil.rmtree(output_dir)
        if number > 4 * kills:
            raise RuntimeError(f"{number} runs were made for {total} kills: faults do not happen where they should")
    return {"runs": found, "kills": total}


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--kills", type=int, default=100, help="in all (default: %(default)s)")
    command.add_argument("--a-run", type=int, default=3, metavar="KILLS", help="in one run (default: %(default)s)")
    command.add_argument(
        "--layouts", type=layout_of, nargs="+", default=LAYOUTS, metavar="TP,PP,DP,ZERO", help="default: three of two ranks"
    )
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--folder", type=Path, help="where everything is written and removed again (default: TMPDIR)")


def run(args: argparse.Namespace, say: Say) -> Result:
    """The whole campaign. A run that differs leaves its folder, with each rank's log. Raises ConfigError."""
    if min(args.kills, args.a_run) < 1:
        raise ConfigError(f"--kills, --a-run: got {args.kills} and {args.a_run}, wanted positive numbers")
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="benchmark_faults_", dir=args.folder))
    found = campaign(folder, list(args.layouts), args.kills, args.a_run, args.seed, say)
    if all(one["equal"] for one in found["runs"]):
        shutil.rmtree(folder, ignore_errors=True)
    return summary(found)


def summary(found: dict[str, Any]) -> Result:
    runs, kills = found["runs"], [kill for one in found["runs"] for kill in one["kills"]]
    phases = Counter(kill["phase"] for kill in kills)
    rows = [
        ("kills", f"{len(kills)}"),
        *((f"  in {phase}", f"{phases[phase]}") for phase in PHASES),
        ("runs", f"{len(runs)}"),
        ("  equal to the undisturbed one, bit for bit", f"{sum(one['equal'] for one in runs)}"),
        ("checkpoints lost", "0"),  # or an AssertionError had ended the campaign
        ("the killed rank was named", f"{sum(kill['named'] for kill in kills)}"),
        ("the last rank's end after the kill, s (median)", f"{median(kill['ended_after_s'] for kill in kills):.1f}"),
        ("  (longest)", f"{max(kill['ended_after_s'] for kill in kills):.1f}"),
    ]
    return Result(rows, {"equal": sum(one["equal"] for one in runs) / len(runs)}, found)
