"""The steps of the comparison, each a function that a worker process runs: scenes, MGVQ, preparation, training, evaluation.

Every step leaves its result complete or not at all, so a file that is there says that the step is done.
"""

import json
import logging
import os
import shutil
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from make_scenes import make
from start import write_start

from htc_megatron.checkpoint import CheckpointReader
from htc_megatron.config import RunConfig
from htc_megatron.config_io import check, load_config, load_zero, to_dict
from htc_megatron.data.conversation import Template
from htc_megatron.data.prepare import CodeEncoder, Preparation, prepare
from htc_megatron.data.tokenizer import load_tokenizer
from htc_megatron.evaluation import scenes
from htc_megatron.inference import answer, load
from htc_megatron.model.mgvq import load_mgvq, mgvq_fingerprint
from htc_megatron.parallel import groups as process_groups
from htc_megatron.training.mgvq_trainer import MGVQTrainingConfig, train_mgvq
from htc_megatron.training.trainer import Trainer, check_files
from htc_megatron.weights.export import export

RESULTS = "results.json"


def in_log(log: Path, step: Callable, *arguments) -> float:
    """Run a step with all that it prints going to the file `log`; returns its seconds."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    began = time.monotonic()
    try:
        step(*arguments)
    except BaseException:
        traceback.print_exc()
        raise
    return time.monotonic() - began


def make_data(folder: Path, train: int, test: int, seed: int) -> None:
    """Scenes and tokenizer."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    make(unfinished, train, test, seed)
    unfinished.rename(folder)


def make_mgvq(recipe: Path, overrides: list[str]) -> None:
    """MGVQ in the folder that the overrides name."""
    train_mgvq(load_config(recipe, overrides, MGVQTrainingConfig))


def make_prepared(data: Path, name: str, output: Path, mgvq: Path | None) -> None:
    """Shards of data/{name}.json, with codes where `mgvq` names a file."""
    encoder = None
    if mgvq is not None:
        model = load_mgvq(mgvq, encoder_only=True)
        encoder = CodeEncoder(model, mgvq_fingerprint(model))
    tokenizer = load_tokenizer(data / "tokenizer.model")
    prepare(Preparation(data / f"{name}.json", data / "train", output, tokenizer, Template(""), encoder))


def make_stage1(config: RunConfig) -> None:
    """Tower, projector and language model that every model of a seed starts from."""
    _train(config)


def make_model(config: RunConfig, source: Path) -> None:
    """Train a model from the weights in `source` and export it to hf/."""
    out = Path(config.output_dir)
    shutil.rmtree(out, ignore_errors=True)
    write_start(source, config, Path(config.init_from))
    _train(config)
    shutil.rmtree(config.init_from)
    export(CheckpointReader(out / "checkpoints"), out / "hf", system="")


def make_answers(config: RunConfig, data: Path) -> None:
    """What an exported model answers on the test split, in results.json beside it.

    In a process that has not trained: megatron-core's form for CPU and transformers' loading do not go together.
    """
    out = Path(config.output_dir)
    model, processor = load(out / "hf")
    questions = scenes.read_questions(data / "test.jsonl")
    images = [data / "test" / f"{number}.png" for number in range(questions[-1].image + 1)]
    began = time.monotonic()
    given = answer(model, processor, images, [(q.image, q.text) for q in questions], max_new_tokens=4)
    results = {
        "config": to_dict(config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracy": scenes.score(questions, given),
        "seconds": time.monotonic() - began,
        "answers": given,
    }
    unfinished = out / f"{RESULTS}.unfinished"
    unfinished.write_text(json.dumps(results) + "\n", encoding="utf-8")
    unfinished.rename(out / RESULTS)


def _train(config: RunConfig) -> None:
    check(config, 1)
    check_files(config)
    groups = process_groups.initialise(config.parallel, config.training.seed)
    try:
        Trainer(config, load_zero(config.zero), groups).run()
    finally:
        process_groups.destroy()
