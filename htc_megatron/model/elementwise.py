"""Row-wise parts of a layer as single autograd functions that keep no more than they need for backward.

Written out of plain operations they would keep every intermediate result: for LLaMA's layer half as much again as its matrix
products keep.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = precise.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (precise * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, scale = ctx.saved_tensors
        grad, normed = grad.to(scale.dtype), x.to(scale.dtype) * scale
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        d_normed = grad * weight.to(scale.dtype)
        along = (d_normed * normed).mean(-1, keepdim=True)
        return d_normed.addcmul_(normed, along, value=-1).mul_(scale).to(x.dtype), d_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """LLaMA's norm, computed in fp32: [..., H], [H] -> [..., H] in x's dtype. Keeps x and one number a row."""
    return _RMSNorm.apply(x, weight, eps)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, -1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        found = torch.empty_like(x)
        d_gate, d_up = found.chunk(2, -1)
        torch.mul(grad, torch.nn.functional.silu(gate), out=d_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=d_gate)
        return found


def swiglu(x: Tensor) -> Tensor:
    """[..., 2 F] of gate and up -> silu(gate) * up, [..., F]. Keeps its input."""
    return _SwiGLU.apply(x)


def _turn_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    a, b = x.chunk(2, -1)
    first = a.clone()
    a.mul_(cos).addcmul_(b, sin, value=-1)
    b.mul_(cos).addcmul_(first, sin)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, flat: Tensor, heads: Callable[[Tensor], list[tuple[Tensor, Tensor, Tensor]]]) -> Tensor:
        ctx.heads = heads
        ctx.mark_dirty(flat)
        for x, cos, sin in heads(flat):
            _turn_(x, cos, sin)
        return flat

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.clone()
        for x, cos, sin in ctx.heads(grad):
            _turn_(x, cos, -sin)
        return grad, None


def rotary_(flat: Tensor, heads: Callable[[Tensor], list[tuple[Tensor, Tensor, Tensor]]]) -> Tensor:
    """RoPE by halves, as LLaMA's, in place: nothing is kept but what went in.

    flat: a linear's results, which nothing else needs. heads: views [n, ..., d] of a tensor like it that turn, each with cos and sin
    [n, 1..., d / 2] in its dtype.
    """
    return _Rotary.apply(flat, heads)


def forget(made: Tensor, again: Callable[[], Tensor], used_by: Tensor) -> None:
    """Let go of a tensor's memory until backward, which makes it again.

    made: an operation's whole result, that only `used_by`'s operation and those before it need. again: computes it anew, without
    a graph, from tensors that are kept anyway. used_by: computed from `made`; when its gradient comes, `made` is filled again.
    """
    if not used_by.requires_grad:
        return
    storage = made.untyped_storage()
    # .data: filling it up again is no change that autograd would have to know of
    held = [storage, storage.size(), made.data, again]

    def fill(_: Tensor) -> None:
        storage, size, data, again = held
        held.clear()  # the graph keeps its hooks to its own end, and all they hold
        storage.resize_(size)
        with torch.no_grad():
            data.copy_(again())

    used_by.register_hook(fill)
    storage.resize_(0)
