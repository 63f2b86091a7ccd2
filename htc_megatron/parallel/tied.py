"""Tied embeddings: one matrix for the input embedding and the output layer, on whichever stages of a pipeline they stand."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _AddGradient(torch.autograd.Function):
    """`hidden` as it is; backward also gives `weight` the gradient that `arriving` returns, or nothing for None."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, arriving: Callable[[], Tensor | None]) -> Tensor:
        ctx.arriving = arriving
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, ctx.arriving(), None


class TiedEmbedding:
    """The matrix of the output layer where it is the input embedding's.

    The parameter stands on the first stage alone: ZeRO shards it, the optimiser steps it, the gradient norm counts it and a
    checkpoint holds it once. With one stage the output layer uses the parameter itself, and autograd adds up both uses.

    With more stages the last one works with a copy that is no parameter, sent anew before every pass. Its gradient is summed
    over the micro-batches in fp32, rounded to the parameters' precision once and sent to the first stage, which takes it in
    as a part of the embedding's backward of the last micro-batch. So ZeRO sees one gradient, and as many backwards and
    reductions as without tying. The price is a whole copy of this TP rank's share on the last stage, whatever the ZeRO
    stage, an fp32 gradient of the same size while a step runs, and two messages of that size a step.

    Args:
        first, last: whether this stage embeds text, and whether it computes logits.
        shape: of this TP rank's share, [padded vocab / tp, H].
        trained: whether the matrix gets a gradient.
    """

    def __init__(self, first: bool, last: bool, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, trained: bool):
        self.first, self.last, self.trained = first, last, trained
        self.shape, self.dtype, self.device = shape, dtype, device
        self.due = False  # whether the backward that runs, or ran last, is the last of the step
        self._arrived = False  # whether the first stage has taken in the last stage's gradient of this step
        self._weight: Tensor | None = None  # the parameter on the first stage, the copy on the last
        self._gradient: Tensor | None = None  # of the copy, fp32, summed over the micro-batches so far

    @property
    def parted(self) -> bool:
        """Whether the two uses stand on different stages, one of which is this."""
        return self.first != self.last

    @property
    def weight(self) -> Tensor:
        """What the output layer computes with. Raises RuntimeError where no copy has come yet."""
        if self._weight is None:
            raise RuntimeError("the last stage was called without the tied embedding: passes go through ZeroEngine, which sends it")
        return self._weight

    def attach(self, embedding: nn.Module, output_layer: nn.Module | None) -> None:
        """Join the first stage's embedding. Before DeepSpeed sets its hooks: ZeRO-3 must gather ahead of ours and release behind.

        output_layer: the one of this stage, called with `weight=`; None where it stands on another stage.
        """
        self._weight = embedding.weight
        if output_layer is None:
            if self.trained:
                embedding.register_forward_hook(lambda module, _, hidden: _AddGradient.apply(hidden, module.weight, self._arriving))
        elif hasattr(self._weight, "ds_id"):  # ZeRO-3 gathers a module's own parameters, and those that it is told of
            import deepspeed

            deepspeed.zero.register_external_parameter(output_layer, self._weight)

    def send_weight(self, whole: Callable) -> None:
        """Give the last stage the matrix as it now is. whole: ZeroEngine.whole. To be called by every rank ahead of a pass."""
        self.due, self._arrived, self._gradient = False, False, None
        if not self.parted:
            return
        if self.first:
            with whole([self._weight]):
                self._broadcast(self._weight.detach(), 0)
            return
        if self._weight is None:  # made here and not sooner: zero.Init takes hold of every tensor made during construction
            self._weight = torch.empty(self.shape, dtype=self.dtype, device=self.device, requires_grad=self.trained)
            if self.trained:
                self._weight.register_post_accumulate_grad_hook(self._collect)
        self._broadcast(self._weight.detach(), 0)

    def send_gradient(self) -> None:
        """Send the first stage what the output layer's uses add up to. To be called by every rank after its last backward."""
        if not (self.parted and self.trained):
            return
        if not (self._arrived if self.first else self._gradient is not None):
            raise RuntimeError("the output layer's gradient of the tied embedding was not " + ("taken in" if self.first else "computed"))
        if self.last:
            self._broadcast(self._gradient.to(self.dtype), 1)
            self._gradient = None

    def _collect(self, weight: Tensor) -> None:
        if self._gradient is None:
            self._gradient = weight.grad.float()
        else:
            self._gradient += weight.grad
        weight.grad = None

    def _arriving(self) -> Tensor | None:
        if not self.due:
            return None
        gradient = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        self._broadcast(gradient, 1)
        self._arrived = True
        return gradient

    @staticmethod
    def _broadcast(tensor: Tensor, source: int) -> None:
        """Over mcore's embedding group, the first and the last stage of a pipeline, from member `source`."""
        from megatron.core import parallel_state

        group = parallel_state.get_embedding_group()
        dist.broadcast(tensor, src=dist.get_global_rank(group, source), group=group)
