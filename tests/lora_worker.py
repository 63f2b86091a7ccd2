"""What one rank does in the tests of LoRA: the parity steps with adapters whose B is not zero, and adapters' gradients."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor

from htc_megatron.checkpoint import load, save
from htc_megatron.config import LoraConfig, RunConfig
from htc_megatron.model import initialisation, lora
from htc_megatron.model.htc_vlm import HTCVLM
from htc_megatron.model.naming import Entry, stage_entries
from htc_megatron.parallel import groups as process_groups
from htc_megatron.training import build
from htc_megatron.training.step import train_step
from htc_megatron.weights.convert import to_hf
from htc_megatron.weights.table import Weight, is_adapter
from tests.parity_worker import MIXED, local_batches, micro_batch, tiny_config
from tests.stage_worker import replaced
from tests.test_gradients import in_transformers

RANK = 4


def lora_config(**changes) -> RunConfig:
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
        mine = local_batches(config, step, MIXED, groups)
        result = train_step(engine, mine, config.optimizer.lr)
        results.append((result.loss, result.grad_norm))
    moved = {entry.name: not torch.equal(*pair) for entry, *pair in zip(entries, before, values(), strict=True)}
    if out:
        save(out, state, step=last, config=config)
    engine.destroy()
    return results, moved


def without(name: str):
    """LoRA's linears without one of their collectives: a copy_to_... leaves a gradient unsummed over TP."""
    if not name:
        return nullcontext()
    tensor_parallel = SimpleNamespace(**vars(lora.tensor_parallel))
    setattr(tensor_parallel, name, lambda tensor, group=None: tensor)
    return replaced(lora, "tensor_parallel", tensor_parallel)


def adapter_gradients(changes: dict, left_out: str = "") -> dict[str, Tensor]:
    """Gradients of this TP rank's adapters on one micro-batch, by name, without ZeRO."""
    config = lora_config(**changes)
    groups = process_groups.initialise(config.parallel, 0)
    stage, entries = whole_model(config, groups.tp_rank, groups.tp_size)
    with without(left_out):
        stage(micro_batch(config, 4, "id")).backward()
    return {entry.name: entry.param.grad for entry in entries if is_adapter(entry.name)}


def whole_model(config: RunConfig, tp_rank: int = 0, tp_size: int = 1) -> tuple[HTCVLM, list[Entry]]:
    """A TP rank's share of the model, without pipeline and ZeRO, filled."""
    stage = HTCVLM(config, True, True, tp_rank, torch.device("cpu"))
    entries = stage_entries(stage, config.model, 0)
    for entry in entries:
        entry.param.data.copy_(random_b(entry.weight, 1, tp_rank, tp_size).view(entry.param.shape))
    return stage.train(), entries


def beside_transformers(changes: dict) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs, ours and transformers', of logits of every sample and of every adapter's gradient.

    transformers' model has the adapters merged into its linears by hand, W + s B A, and their gradients follow from its dW:
    dA = s B^T dW and dB = s dW A^T.
    """
    config = lora_config(**changes)
    process_groups.initialise(config.parallel, 0)
    stage, entries = whole_model(config)
    batch = micro_batch(config, 4, "id")
    stage(batch).backward()
    with torch.no_grad():
        logits = stage(batch, logits=True)
    ours, adapters, base = {}, {}, {}
    for entry in entries:
        value = entry.param.detach().view(entry.weight.shape).clone()
        if is_adapter(entry.name):
            adapters |= to_hf(entry.weight, value)
            ours |= to_hf(entry.weight, entry.param.grad.view(entry.weight.shape))
        else:
            base[entry.name] = value
    scale = config.model.lora.alpha / config.model.lora.rank
    linears = sorted({name.rsplit(".lora_", 1)[0] for name in adapters})

    def merge(model):
        for name in linears:
            model.get_submodule(name).weight.data += scale * adapters[f"{name}.lora_B.weight"] @ adapters[f"{name}.lora_A.weight"]

    plain = replace(config, model=replace(config.model, lora=LoraConfig()))
    model, samples = in_transformers(plain, base, batch, merge)
    pairs = {}
    for index, (row, columns, theirs) in enumerate(samples):
        text = batch.input_ids[row, columns] != config.model.method.voco_token_id
        pairs[f"logits of sample {index}"] = logits[row, columns][text], theirs[text]
    for name in linears:
        gradient, a, b = model.get_submodule(name).weight.grad, adapters[f"{name}.lora_A.weight"], adapters[f"{name}.lora_B.weight"]
        pairs[f"{name} A"] = ours[f"{name}.lora_A.weight"], scale * b.T @ gradient
        pairs[f"{name} B"] = ours[f"{name}.lora_B.weight"], scale * gradient @ a.T
    return pairs
