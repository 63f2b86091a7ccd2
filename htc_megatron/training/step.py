"""One optimiser step, and one evaluation, over the micro-batches of a global batch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from htc_megatron.model.layout import MicroBatch
from htc_megatron.parallel.groups import Groups
from htc_megatron.parallel.zero import ZeroEngine, sum_over


@dataclass(frozen=True)
class StepResult:
    """loss: mean over the supervised tokens of the global batch. tokens, images: of the global batch. applied: whether the optimiser
    made the step; False: it was bad, and weights and optimiser are as they were."""

    loss: float
    grad_norm: float
    supervised_tokens: int
    images: int
    applied: bool = True


def _forward_step(scale: float):
    """mcore's forward step: the model's summed loss, scaled so that all micro-batches of all ranks add up to the global mean."""

    def forward_step(batches: Iterator[MicroBatch], model):
        batch = next(batches)
        output = model(batch)

        def loss(loss_sum: torch.Tensor):
            count = torch.tensor(batch.num_supervised, dtype=torch.int, device=loss_sum.device)
            return loss_sum * scale, count, loss_sum.detach()

        return output, loss

    return forward_step


def _global_counts(batches: list[MicroBatch], groups: Groups) -> tuple[int, int]:
    """Supervised tokens and images of the global batch."""
    mine = [sum(b.num_supervised for b in batches), sum(b.layout.num_images for b in batches)]
    counts = sum_over(torch.tensor(mine, dtype=torch.int64, device=groups.device), groups.dp)
    return int(counts[0]), int(counts[1])


def _mean_loss(reports: list[torch.Tensor], tokens: int, groups: Groups) -> float:
    """The global mean on every rank, from the last stage's sums."""
    total = torch.zeros((), dtype=torch.float64, device=groups.device)
    for report in reports:
        total += report
    return float(sum_over(total, groups.dp, groups.pp)) / max(tokens, 1)


def train_step(
    engine: ZeroEngine, batches: list[MicroBatch], lr: float, is_bad: Callable[[float, float], bool] | None = None
) -> StepResult:
    """Forward, backward and update on this data-parallel rank's micro-batches. Called by every rank.

    is_bad: called with loss and gradient norm before the update, which is left out where it is true, on all ranks alike.
    """
    groups = engine.groups
    tokens, images = _global_counts(batches, groups)
    scale = groups.dp_size / max(tokens, 1)  # DeepSpeed averages gradients over the data-parallel ranks
    reports = engine.train(_forward_step(scale), iter(batches), len(batches), engine.module.shape_between_stages(batches[0].layout))
    loss = _mean_loss(reports, tokens, groups)
    if is_bad is None:
        return StepResult(loss, engine.step(lr), tokens, images)
    bad = False

    def judge(norm: float) -> bool:
        nonlocal bad
        bad = is_bad(loss, norm)
        return bad

    norm = engine.step(lr, judge)
    return StepResult(loss, norm, tokens, images, applied=not bad)


def evaluate(engine: ZeroEngine, steps: Iterator[list[MicroBatch]]) -> float:
    """Mean loss over the supervised tokens of all given steps. Called by every rank."""
    groups = engine.groups
    loss, tokens = 0.0, 0
    for batches in steps:
        count, _ = _global_counts(batches, groups)
        reports = engine.evaluate(_forward_step(1.0), iter(batches), len(batches), engine.module.shape_between_stages(batches[0].layout))
        loss += _mean_loss(reports, count, groups) * max(count, 1)
        tokens += count
    return loss / max(tokens, 1)
