"""What one rank does in the tests of LoRA: the parity steps with adapters whose B is not zero, and adapters' gradients."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor

from htc_megatron.checkpoint import load, save
from htc_megatron.model import initialisation, lora
from htc_megatron.model.htc_vlm import HTCVLM
from htc_megatron.model.naming import stage_entries
from htc_megatron.parallel import groups as process_groups
from htc_megatron.training import build
from htc_megatron.training.step import train_step
from htc_megatron.weights.table import Weight, is_adapter
from tests.parity_worker import MICROS, MIXED, ROWS, global_batch, micro_batch, tiny_config
from tests.stage_worker import replaced

RANK = 4


def lora_config(**changes):
    """The tiny model with adapters, its backbone and tower frozen."""
    return tiny_config(**{"model__lora": {"rank": RANK, "alpha": 6.0}, "training__freeze": ["vision", "backbone"]} | changes)


def random_b(weight: Weight, seed: int, tp_rank: int, tp_size: int) -> Tensor:
    """`initial_value`, but for a B that is not zero: otherwise A's first gradient would be, and half of the terms with it."""
    if weight.name.endswith(".lora_B"):
        weight = replace(weight, name=weight.name + ".drawn")
    return initialisation.initial_value(weight, seed, tp_rank, tp_size)


def lora_steps(
    changes: dict, zero: dict, first: int = 0, last: int = 4, start: str = "", out: str = ""
) -> tuple[list[tuple[float, float]], dict[str, bool]]:
    """Loss and norm of steps [first, last), and whether each of this rank's weights moved.

    start, out: checkpoints that the steps go on from and that is written after them.
    """
    config = lora_config(**changes)
    groups = process_groups.initialise(config.parallel, config.training.seed)
    with replaced(build, "initial_value", random_b):
        engine = build.build_engine(config, zero, groups)
    state = build.checkpoint_state(engine, config)
    if start:
        load(start, state)
    entries = build.entries_of_stage(engine.module, config, groups)

    def values() -> list[Tensor]:
        found = []
        for entry in entries:
            with engine.whole([entry.param]):
                found.append(entry.param.detach().clone())
        return found

    before, results = values(), []
    for step in range(first, last):
        share = MICROS // groups.dp_size
        mine = global_batch(config, step, MIXED)[groups.dp_rank * share : (groups.dp_rank + 1) * share]
        if not groups.first_stage:
            mine = [replace(batch, pixel_values=None, codes=None) for batch in mine]
        result = train_step(engine, mine, config.optimizer.lr)
        results.append((result.loss, result.grad_norm))
    moved = {entry.name: not torch.equal(*pair) for entry, *pair in zip(entries, before, values(), strict=True)}
    if out:
        save(out, state, step=last, config=config)
    engine.destroy()
    return results, moved


def without(name: str):
    """LoRA's linears without one of their collectives: "copy" leaves a gradient unsummed over TP."""
    if not name:
        return nullcontext()
    tensor_parallel = SimpleNamespace(**vars(lora.tensor_parallel))
    setattr(tensor_parallel, name, lambda tensor, group=None: tensor)
    return replaced(lora, "tensor_parallel", tensor_parallel)


def adapter_gradients(changes: dict, left_out: str = "") -> dict[str, Tensor]:
    """Gradients of this TP rank's adapters on one micro-batch, by name, without ZeRO."""
    config = lora_config(training__micro_batch_size=ROWS, **changes)
    groups = process_groups.initialise(config.parallel, 0)
    stage = HTCVLM(config, True, True, groups.tp_rank, torch.device("cpu"))
    entries = stage_entries(stage, config.model, 0, 1)
    for entry in entries:
        entry.param.data.copy_(random_b(entry.weight, 1, groups.tp_rank, groups.tp_size).view(entry.param.shape))
    stage.train()
    with without(left_out):
        stage(micro_batch(config, 4, "id")).backward()
    return {entry.name: entry.param.grad for entry in entries if is_adapter(entry.name)}
