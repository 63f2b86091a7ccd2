"""The output layer and its loss: cross-entropy a few rows at a time, so that the logits of a micro-batch never exist at once."""

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

LOGITS_AT_ONCE = 2**23  # entries on one rank: 32 MiB in fp32; enough rows for a matrix product to run at full speed


class OutputLayer(ColumnParallelLinear):
    """Logits of the vocabulary, cut over TP; rows come gathered, whatever sequence parallelism does elsewhere.

    Its arguments are ColumnParallelLinear's and vocab_size: columns behind it are padding and take no probability in any layout.
    """

    def __init__(self, input_size: int, output_size: int, *, vocab_size: int, tp_rank: int, **options):
        super().__init__(input_size, output_size, bias=False, **options)
        self.sequence_parallel = False
        self.first = tp_rank * self.output_size_per_partition
        self.real = min(max(vocab_size - self.first, 0), self.output_size_per_partition)  # columns here that are no padding

    def forward(self, rows: Tensor, targets: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """rows [n, H] -> this TP rank's logits in fp32 [n, padded vocab / tp]; with targets [n] their summed loss in fp32 [].

        weight: used instead of the layer's own (tied embeddings).
        """
        weight = self.weight if weight is None else weight
        rows = tensor_parallel.copy_to_tensor_model_parallel_region(rows, group=self.tp_group)
        if targets is None:
            return self._closed((rows @ weight.T).float())
        return _CrossEntropy.apply(rows, weight, targets, self, torch.is_grad_enabled())

    def _closed(self, logits: Tensor) -> Tensor:
        if self.real == logits.shape[-1]:
            return logits
        padding = torch.arange(logits.shape[-1], device=logits.device) >= self.real
        return logits.masked_fill(padding, torch.finfo(logits.dtype).min)


class _CrossEntropy(torch.autograd.Function):
    """Gradients are computed along with the loss, chunk by chunk, and scaled in backward: no logits are kept or made twice."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, targets: Tensor, layer: OutputLayer, with_grad: bool) -> Tensor:
        chunk = max(1, LOGITS_AT_ONCE // len(weight))
        loss = torch.zeros((), dtype=torch.float32, device=rows.device)
        of_rows, of_weight = (with_grad and needed for needed in ctx.needs_input_grad[:2])
        d_rows = torch.empty_like(rows) if of_rows else None
        d_weight: Tensor | None = None  # summed in fp32 where there are several chunks
        for part, target, at in zip(rows.split(chunk), targets.split(chunk), range(0, len(rows), chunk), strict=True):
            share, wrong = _softmax(part @ weight.T, target - layer.first, layer.real, layer.tp_group)
            loss += wrong.sum()
            share = share.to(weight.dtype)
            if of_rows:
                torch.mm(share, weight, out=d_rows[at : at + chunk])
            if not of_weight:
                continue
            if d_weight is None and len(rows) <= chunk:
                d_weight = share.T @ part
            elif d_weight is None:
                d_weight = (share.T @ part).float()
            elif weight.dtype == torch.float32:
                d_weight.addmm_(share.T, part)
            else:
                d_weight += share.T @ part
        ctx.found = [d_rows, None if d_weight is None else d_weight.to(weight.dtype)]
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor):
        found, ctx.found = ctx.found, None  # scaled where they lie: a second backward through the same loss is refused
        if found is None:
            raise RuntimeError("the loss was differentiated already, and its gradients are gone")
        return *(None if one is None else one.mul_(grad.to(one.dtype)) for one in found), None, None, None


def _softmax(logits: Tensor, target: Tensor, real: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """The loss's gradient by the logits, softmax less one at the target, [n, columns here] fp32; and the loss of each row [n].

    logits: [n, columns here], overwritten where they are fp32. target: [n], relative to the first column here; those outside lie on
    another TP rank. real: columns here that are no padding.
    """
    share = logits.float()
    share[:, real:] = float("-inf")
    here = (target >= 0) & (target < share.shape[1])
    at = torch.where(here, target, 0)[:, None]
    largest = share.amax(-1)
    parallel = dist.get_world_size(group) > 1
    if parallel:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    share -= largest[:, None]
    sums = torch.stack([share.gather(1, at).squeeze(1) * here, torch.zeros_like(largest)])
    torch.exp(share, out=share)
    sums[1] = share.sum(-1)
    if parallel:
        dist.all_reduce(sums, group=group)
    share /= sums[1][:, None]
    share.scatter_add_(1, at, -here.to(share.dtype)[:, None])
    return share, sums[1].log() - sums[0]
