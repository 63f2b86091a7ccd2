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
        precise = x.float()
        scale = precise.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (precise * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, scale = ctx.saved_tensors
        grad, normed = grad.float(), x.float() * scale
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        d_normed = grad * weight.float()
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


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    found = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (a, b), (turned_a, turned_b) = x.chunk(2, -1), found.chunk(2, -1)
    torch.mul(a, cos, out=turned_a).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=turned_b).addcmul_(a, sin, value=sign)
    return found


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _turn(grad, *ctx.saved_tensors, -1), None, None


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE by halves, as LLaMA's: x [n, ..., d], cos and sin [n, 1..., d / 2] in x's dtype -> contiguous [n, ..., d]."""
    return _Rotary.apply(x, cos, sin)


def forget(made: Tensor, again: Callable[[], Tensor], used_by: Tensor) -> None:
    """Let go of a tensor's memory until backward, which makes it again.

    made: an operation's whole result, that only `used_by`'s operation and those before it need. again: computes it anew, without
    a graph, from tensors that are kept anyway. used_by: computed from `made`; when its gradient comes, `made` is filled again.
    """
    storage = made.untyped_storage()
    size, data = storage.size(), made.data  # .data: filling it up again is no change that autograd would have to know of

    def fill(_: Tensor) -> None:
        storage.resize_(size)
        with torch.no_grad():
            data.copy_(again())

    if used_by.requires_grad:
        used_by.register_hook(fill)
        storage.resize_(0)
