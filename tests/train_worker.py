"""Whole runs, as the entry point makes them, on every rank of a test."""

import torch

from htc_megatron.config_io import check, load_config, load_zero
from htc_megatron.parallel import groups as process_groups
from htc_megatron.training import trainer as trainer_module
from htc_megatron.training.trainer import Trainer, check_files


def train(yaml: str, overrides: list[str]) -> list[tuple[int, float, float]]:
    """Step number, loss and gradient norm of every step this run makes."""
    config = load_config(yaml, overrides)
    parallel = config.parallel
    zero = load_zero(config.zero)
    check_files(config)
    groups = process_groups.initialise(parallel, config.training.seed)
    check(config, groups.world_size)
    trainer = Trainer(config, zero, groups)
    found = []
    original = trainer_module.train_step

    def recorded(engine, batches, lr):
        result = original(engine, batches, lr)
        found.append((trainer.step_number + 1, result.loss, result.grad_norm))
        return result

    trainer_module.train_step = recorded
    try:
        trainer.run()
    finally:
        trainer_module.train_step = original
        trainer.engine.destroy()
    return found


def logits_of(yaml: str, overrides: list[str]):
    """The first validation batch of data-parallel rank 0 and its logits by the run's latest checkpoint; None off the last stage."""
    config = load_config(yaml, [*overrides, "training.eval_interval=1", "training.eval_iters=1"])
    groups = process_groups.initialise(config.parallel, config.training.seed)
    trainer = Trainer(config, load_zero(config.zero), groups)
    assert trainer.step_number > 0, "no checkpoint was found"
    (batches,) = trainer.validation

    def step(steps, model):
        output = model(next(steps), logits=True)
        return output, lambda logits: (logits.sum(), torch.tensor(1, dtype=torch.int), logits)

    shape = (batches[0].layout.rows, batches[0].layout.seq_length)
    reports = trainer.engine.evaluate(step, iter(batches[:1]), 1, shape)
    trainer.loader.close()
    trainer.logger.close()
    trainer.engine.destroy()
    return (batches[0].input_ids, reports[0]) if groups.last_stage else None
