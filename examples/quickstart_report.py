"""Collect what a quick start has measured into report.json, and show it: `python examples/quickstart_report.py runs/quickstart`."""

import argparse
import json
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from htc_megatron.checkpoint.reader import CheckpointReader
from htc_megatron.config import ConfigError
from htc_megatron.evaluation.easy_vqa import baselines, load_questions, table

STAGES = {"align": "align", "shapes": "shapes", "instruct": "."}  # the trainings and their folders
WAIT = "speed/data_wait_share"


def data_wait(run: Path) -> dict[str, float]:
    """Share of the time since its first step that a training's slowest rank has waited for data, over all of its steps."""
    shares = {}
    for stage, folder in STAGES.items():
        path = run / folder / "tensorboard"
        events = EventAccumulator(str(path))
        if not path.is_dir() or WAIT not in events.Reload().Tags()["scalars"]:
            raise ConfigError(f"{path} has no {WAIT}; wanted that of a finished training")
        shares[stage] = events.Scalars(WAIT)[-1].value
    return shares


def collect(run: Path) -> dict:
    """The report's content. Raises ConfigError where a part of the quick start is missing."""
    try:
        summary = json.loads((run / "evaluation" / "summary.json").read_text(encoding="utf-8"))
        phases = dict(line.split() for line in (run / "phases.txt").read_text(encoding="utf-8").splitlines())
        mgvq = json.loads((run / "mgvq" / "report.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{error.filename} is missing; wanted a finished quick start, bash examples/quickstart.sh makes one") from error
    reader = CheckpointReader(run / "checkpoints")
    config = reader.config
    easy = summary["benchmarks"]["easy_vqa"]
    shares, counts = ({kind: value for kind, value in easy[part].items() if kind != "all"} for part in ("parts", "counts"))
    seconds = {name: float(value) for name, value in phases.items()}
    return {
        "data": "easy-vqa 1.0, official test split",
        "questions": easy["questions"],
        "accuracy": easy["figure"] / 100,
        "accuracy_by_type": {kind: share / 100 for kind, share in shares.items()},
        "questions_by_type": counts,
        "baselines": baselines(load_questions("train"), load_questions("test")),
        "layout": {**reader.layout, "precision": config.training.precision, "zero": config.zero},
        "train_iters": config.training.train_iters,
        "mgvq_psnr_db": mgvq["validation"]["psnr"],
        "data_wait_share": data_wait(run),
        "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of the quick start")
    options = parser.parse_args()
    try:
        report = collect(options.run)
    except ConfigError as error:
        print(f"quickstart_report: {error}", file=sys.stderr)
        return 2
    (options.run / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"\n== Done in {report['seconds']['total']:.0f} s\n")
    print(table(report, report["baselines"]))
    waits = ", ".join(f"{stage} {share:.2%}" for stage, share in report["data_wait_share"].items())
    print(f"\ntime spent waiting for data since each training's first step: {waits}")
    print(
        f"\n{options.run}/report.json      what was measured"
        f"\n{options.run}/attention.png    where the voco token looks"
        f"\n{options.run}/hf               the model: AutoModelForImageTextToText, AutoProcessor"
        f"\n{options.run}/checkpoints      to go on from, on any layout"
        f"\n{options.run}/tensorboard      tensorboard --logdir {options.run}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
