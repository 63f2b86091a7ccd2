"""The paper in small: train every model of its main table and ablations on generated scenes, and evaluate each.

python examples/paper/run.py                      all models, three seeds, two runs side by side, in runs/paper
python examples/paper/run.py --only main          the main table alone; also: ablations, or models by name
python examples/paper/report.py runs/paper        the tables, plots and what the paper claims, from all that is finished

models/ has a file for each model, laid on base.yaml. All start from the same weights of a seed (stage1.yaml), and learn for the same
number of steps from the same conversations, about as many a step. What is finished is not done again. Settings are those of the YAML
files; a folder holds results of one setting.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

import steps  # noqa: E402

from htc_megatron.config import ConfigError, RunConfig  # noqa: E402
from htc_megatron.config_io import load_config, to_dict  # noqa: E402
from htc_megatron.training.mgvq_trainer import REPORT, WEIGHTS  # noqa: E402

MODELS = HERE / "models"
STAGE1 = [HERE / "base.yaml", MODELS / "upper.yaml", HERE / "stage1.yaml"]
MAIN = ("upper", "lower", "qformer", "average", "voco_llama", "discrete", "htc")


CONVERSATION = 80  # text tokens of a conversation, on average over captions and questions


@dataclass(frozen=True)
class Step:
    """Work of a worker process. result: the file or folder that is there when it is done. needs: steps before it."""

    result: Path
    needs: tuple[str, ...]
    work: Callable
    arguments: tuple

    @property
    def trains(self) -> bool:
        """Each training has a process of its own: megatron-core's for good, and with it go the threads that gloo's groups leave behind,
        each of which wakes a hundred times a second."""
        return self.work in (steps.make_stage1, steps.make_model)


def model_names(only: list[str]) -> list[str]:
    """The models to run: main, ablations, names; all where nothing is named. Raises ConfigError for a name that is not known."""
    known = [*MAIN, *sorted(path.stem for path in MODELS.glob("*.yaml") if path.stem not in MAIN)]
    groups = {"main": known[: len(MAIN)], "ablations": known[len(MAIN) :]}
    wanted = {name for word in only or groups for name in groups.get(word, [word])}
    if unknown := sorted(wanted - set(known)):
        raise ConfigError(f"--only: got {', '.join(unknown)}, wanted main, ablations or some of {', '.join(known)}")
    if "lower" in wanted:
        wanted.add("upper")  # whose weights it has
    return [name for name in known if name in wanted and compresses(name)]


def compresses(name: str) -> bool:
    """Whether a model has fewer voco tokens than there are patches, or as many: the paper's largest budgets exceed the small picture."""
    model = load_config([HERE / "base.yaml", MODELS / f"{name}.yaml"]).model
    return model.method.num_voco_tokens <= model.vision.num_patches


def seq_length(config: RunConfig) -> int:
    """Length of packed rows that hold as many conversations as those of the upper bound, of base.yaml's length, however many tokens
    the model's images take: a step is then one of as many conversations for every model."""
    of_upper = load_config(STAGE1).model.tokens_per_image
    return round(config.training.seq_length * (CONVERSATION + config.model.tokens_per_image) / (CONVERSATION + of_upper))


def plan(options: argparse.Namespace) -> dict[str, Step]:
    """All steps by name."""
    out: Path = options.out
    data = out / "data"
    tokenizer = f"tokenizer={data / 'tokenizer.model'}"
    found = {"scenes": Step(data, (), steps.make_data, (data, options.train_pictures, options.test_pictures, 0))}
    captions = out / "prepared" / "captions"
    found["captions"] = Step(captions, ("scenes",), steps.make_prepared, (data, "captions", captions, None))
    for seed in range(options.seeds):
        folder = out / "stage1" / str(seed)
        settings = [f"training.seed={seed}", f"data.seed={seed}", f"data.train={captions}", f"output_dir={folder}", tokenizer]
        result = folder / "checkpoints" / "latest"
        stage1 = Step(result, ("captions",), steps.make_stage1, (load_config(STAGE1, settings),))
        found[f"stage1/{seed}"] = stage1
        for name in model_names(options.only):
            found |= _model(name, seed, out, tokenizer)
    return found


def _model(name: str, seed: int, out: Path, tokenizer: str) -> dict[str, Step]:
    """The steps of a model: its own, and those of the MGVQ and the codes that it reads."""
    data, folder = out / "data", out / "models" / name / str(seed)
    files = [HERE / "base.yaml", MODELS / f"{name}.yaml"]
    sizes = load_config(files).model.mgvq
    codes = f"g{sizes.groups}c{sizes.codebook_size}"  # what an MGVQ and the data with its codes are called
    mgvq, train = out / "mgvq" / codes / WEIGHTS, out / "prepared" / codes
    settings = [f"training.seed={seed}", f"data.seed={seed}", f"data.train={train}", f"mgvq_checkpoint={mgvq}", tokenizer]
    settings += [f"training.seq_length={seq_length(load_config(files))}", f"output_dir={folder}", f"init_from={folder / 'start'}"]
    config = load_config(files, settings)
    of_mgvq = [f"model.groups={sizes.groups}", f"model.codebook_size={sizes.codebook_size}"]
    of_mgvq += [f"images={data / 'train'}", f"output_dir={mgvq.parent}"]
    trained = config.training.train_iters > 0  # else it has the weights of the upper bound
    before = f"stage1/{seed}" if trained else f"upper/{seed}"
    source = out / ("stage1" if trained else "models/upper") / str(seed) / "checkpoints"
    return {
        f"mgvq/{codes}": Step(mgvq.with_name(REPORT), ("scenes",), steps.make_mgvq, (HERE / "mgvq.yaml", of_mgvq)),
        f"codes/{codes}": Step(train, (f"mgvq/{codes}",), steps.make_prepared, (data, "train", train, mgvq)),
        f"{name}/{seed}": Step(folder / "hf", (before, f"codes/{codes}"), steps.make_model, (config, source)),
        f"{name}/{seed}/answers": Step(folder / steps.RESULTS, (f"{name}/{seed}",), steps.make_answers, (config, data)),
    }


def check_finished(plan: dict[str, Step]) -> None:
    """Refuse results of other settings than these."""
    for step in plan.values():
        config = step.arguments[0]
        if step.result.name != steps.RESULTS or not step.result.exists():
            continue
        if json.loads(step.result.read_text(encoding="utf-8"))["config"] != to_dict(config):
            raise ConfigError(
                f"{step.result} is of other settings than these: name another folder with --out, or remove {step.result.parent}"
            )


def carry_out(plan: dict[str, Step], jobs: int, logs: Path) -> list[str]:
    """Do the steps that are not done, so many side by side, each as soon as what it needs is there. Returns those that failed.

    What needs a failed step is left out.
    """
    todo = {name: step for name, step in plan.items() if not step.result.exists()}
    order = TopologicalSorter({name: [need for need in step.needs if need in todo] for name, step in todo.items()})
    order.prepare()
    began, failed, ready, running = time.monotonic(), [], [], {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn) as others:
        while True:
            ready += order.get_ready()
            ready.sort(key=lambda name: todo[name].trains)  # the short ones first
            while ready and len(running) < jobs:
                name = ready.pop(0)
                pool, log = ProcessPoolExecutor(1, spawn) if todo[name].trains else others, logs / f"{name.replace('/', '-')}.txt"
                running[pool.submit(steps.in_log, log, todo[name].work, *todo[name].arguments)] = name
                if todo[name].trains:
                    pool.shutdown(wait=False)  # it ends with its work
            if not running:
                return failed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                if (error := future.exception()) is None:
                    order.done(name)  # and only then: nothing is begun that needs a step which failed
                    print(f"{time.monotonic() - began:6.0f} s  {name}: {future.result():.0f} s", flush=True)
                else:
                    failed.append(name)
                    print(f"{name} failed, see {logs}/{name.replace('/', '-')}.txt: {error}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", default=[], metavar="MODELS", help="main, ablations, or names of files in models/ (default: all)")
    add("--seeds", type=int, default=3, help="seeds of each model (default %(default)s)")
    add("--jobs", type=int, default=2, help="runs side by side, a core each (default %(default)s)")
    add("--out", type=Path, default=Path("runs/paper"), help="folder to work in (default %(default)s)")
    add("--train-pictures", type=int, default=10000, help="(default %(default)s)")
    add("--test-pictures", type=int, default=600, help="(default %(default)s)")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}  # of the workers
    try:
        found = plan(options)
        check_finished(found)
    except ConfigError as error:
        print(f"run: {error}", file=sys.stderr)
        return 2
    failed = carry_out(found, options.jobs, options.out / "logs")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
