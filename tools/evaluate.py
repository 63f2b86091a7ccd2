"""Score an exported model on the paper's benchmarks, and say how much it retains between two bounds.

python tools/evaluate.py --model runs/instruct/hf --benchmarks all --data playground/data/eval --out runs/instruct/evaluation --bounds paper

Each benchmark's files stand in DATA/{name}, or as LLaVA's evaluation lays them out; htc_megatron/evaluation/tasks says which they are.
Answers go to OUT/{name}.jsonl as they are made, and a run that was cut off goes on from there; figures go to OUT/summary.json, which
--lower and --upper take. name.option=value sets a benchmark's option, such as vqav2.split=test-dev2015.
"""

import argparse
import inspect
import json
import sys
from dataclasses import asdict
from pathlib import Path

import yaml

from htc_megatron.config import ConfigError
from htc_megatron.evaluation.retention import PAPER, PAPER_BOUNDS, TITLES, Bounds, markdown, mean, read_figures, result_table, table
from htc_megatron.evaluation.run import Settings, run
from htc_megatron.evaluation.task import Scores, Task
from htc_megatron.evaluation.tasks import TASKS

DTYPES = ("auto", "float32", "bfloat16", "float16")
LLAVA_FOLDERS = {"gqa": "gqa/data", "mme": "MME", "seed": "seed_bench", "sqa": "scienceqa"}  # where they are not named as here


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        if options.paper:
            print(table(PAPER, TITLES, PAPER_BOUNDS))
        else:
            evaluate(options)
    except ConfigError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    settings = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="exported folder")
    parser.add_argument("--benchmarks", default="all", help=f"names with commas between, of {', '.join(TASKS)}; all: those of the paper")
    parser.add_argument("--data", type=Path, default=Path(), help="folder of the benchmarks' folders (default: the current one)")
    parser.add_argument("--out", type=Path, help="folder of answers, submissions and summary.json")
    parser.add_argument("--lower", type=Path, help="JSON of the lower bound's figures, or its summary.json")
    parser.add_argument("--upper", type=Path, help="JSON of the upper bound's figures, or its summary.json")
    parser.add_argument("--bounds", choices=["paper"], help="take the paper's bounds")
    parser.add_argument("--paper", action="store_true", help="print the paper's table with its retentions, and nothing else")
    parser.add_argument("--images-at-once", type=int, default=settings.images_at_once, help="compressed together (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=settings.batch_size, help="prompts answered together (default %(default)s)")
    parser.add_argument("--dtype", default=settings.dtype, choices=DTYPES, help="that the model is loaded in (default: as exported)")
    parser.add_argument("--device", default=settings.device)
    parser.add_argument("--store", default=settings.store, help="folder where images' keys and values are kept for other runs")
    parser.add_argument("settings", nargs="*", metavar="name.option=value", help="options of benchmarks")
    options = parser.parse_intermixed_args(arguments)
    if not options.paper and not (options.model and options.out):
        parser.error("--model and --out are wanted, or --paper")
    return options


def evaluate(options: argparse.Namespace) -> None:
    bounds, tasks = wanted_bounds(options), wanted_tasks(options)
    settings = Settings(options.images_at_once, options.batch_size, options.dtype, options.device, options.store)
    answered = run(tasks, options.model, options.out, settings)
    benchmarks = {}
    for task in tasks:
        scores = task.score(answered.answers[task.name])
        submission = task.submission(answered.answers[task.name], options.out)
        print(shown(task, scores, submission))
        benchmarks[task.name] = {
            "questions": len(task.items),
            **(asdict(scores) if scores else {"figure": None}),
            "submission": submission and submission.name,
        }
    figures = {name: scored["figure"] for name, scored in benchmarks.items()}
    summary = {"model": asdict(answered.maker), "benchmarks": benchmarks}
    if bounds:
        retention = bounds.retention(figures)
        summary |= {"bounds": asdict(bounds), "retention": retention, "mean_retention": mean(retention)}
    (options.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(result_table(str(options.model), figures, {task.name: task.title for task in tasks}, bounds))


def wanted_bounds(options: argparse.Namespace) -> Bounds | None:
    files = options.upper, options.lower
    if options.bounds and any(files):
        raise ConfigError("--bounds paper stands for both bounds; wanted no --upper and no --lower beside it")
    if options.bounds:
        return PAPER_BOUNDS
    if any(files) and not all(files):
        raise ConfigError(f"--{'lower' if options.upper else 'upper'} is missing; wanted both bounds or none")
    return Bounds(*map(read_figures, files)) if all(files) else None


def wanted_tasks(options: argparse.Namespace) -> list[Task]:
    """The benchmarks, made from their files. Raises ConfigError where one is unknown, lacks a file or has a faulty one."""
    names = [name for name in TASKS if name in TITLES] if options.benchmarks == "all" else options.benchmarks.split(",")
    for name in names:
        if name not in TASKS:
            raise ConfigError(f"there is no benchmark {name!r}, wanted some of {', '.join(TASKS)}")
    chosen = {name: {} for name in dict.fromkeys(names)}
    for setting in options.settings:
        key, _, value = setting.partition("=")
        name, _, option = key.partition(".")
        if name not in chosen:
            raise ConfigError(f"{setting!r} is for none of the benchmarks {', '.join(chosen)}; wanted name.option=value")
        known = [*inspect.signature(TASKS[name]).parameters][1:]
        if option not in known:
            raise ConfigError(f"{setting!r}: {name} has no such option, wanted one of {known}")
        chosen[name][option] = yaml.safe_load(value)
    return [TASKS[name](folder_of(name, options.data), **settings) for name, settings in chosen.items()]


def folder_of(name: str, data: Path) -> Path:
    elsewhere = data / LLAVA_FOLDERS.get(name, name)
    return elsewhere if elsewhere.is_dir() else data / name


def shown(task: Task, scores: Scores | None, submission: Path | None) -> str:
    """What is printed of one benchmark."""
    lines = [f"\n{task.title}: {len(task.items)} questions"]
    if scores:
        rows = [(part, str(scores.counts.get(part, "")), f"{value:.1f}") for part, value in scores.parts.items()]
        lines.append(markdown(("", "questions", "score"), rows))
    else:
        lines.append("only its server has the answers")
    if submission:
        lines.append(f"submission: {submission}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
