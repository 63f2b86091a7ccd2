"""Learning rate as a function of the step."""

import math

from htc_megatron.config import OptimizerConfig


def learning_rate(options: OptimizerConfig, step: int, train_iters: int) -> float:
    """Rate of step `step` (from 0): linear warm-up over warmup_ratio of the run, then cosine to min_lr, or constant."""
    warmup = round(options.warmup_ratio * train_iters)
    if step < warmup:
        return options.lr * (step + 1) / warmup
    if options.schedule == "constant":
        return options.lr
    progress = (step - warmup) / max(train_iters - warmup, 1)
    return options.min_lr + 0.5 * (options.lr - options.min_lr) * (1 + math.cos(math.pi * min(progress, 1.0)))
