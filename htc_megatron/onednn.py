"""Matrix products of fp32 on CPU by oneDNN, which torch has but asks for bf16 only.

torch's own fp32 product, MKL's, reads the weights of a step of decoding at half the machine's rate where it does not know the CPU, is
slow at the few rows of a question, and some percent slower in the forward and the input-gradient products of training. Weights stay
as and where they are. The op is not a public one: where torch lacks it, nothing changes.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # whether this torch has the op

if AVAILABLE:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def operations(rows: tuple[int, ...], weight: tuple[int, ...], *rest: Any, **more: Any) -> int:
        """Of a product of these shapes, for torch's FlopCounterMode, which does not know the op; a multiply-add is two."""
        return 2 * math.prod(rows) * weight[0]


def serves(rows: Tensor, weight: Tensor) -> bool:
    """Whether `product` of these is oneDNN's."""
    return AVAILABLE and rows.dtype == weight.dtype == torch.float32 and rows.device.type == "cpu" and rows.numel() > 0


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows [..., in] times weight [out, in] transposed, and bias [out]: [..., out]. It has no gradient where it is oneDNN's."""
    if not serves(rows, weight):
        return F.linear(rows, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


class Product(torch.autograd.Function):
    """`product` without bias, and its gradients. The weight's own, which MKL makes as fast, is torch's."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        found = product(rows.flatten(0, -2), weight)
        return torch.ops.aten._unsafe_view(found, (*rows.shape[:-1], len(weight)))  # no view: it may be changed where it lies

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, weight = ctx.saved_tensors
        d_rows = product(grad, weight.T) if ctx.needs_input_grad[0] else None
        return d_rows, grad.flatten(0, -2).T @ rows.flatten(0, -2) if ctx.needs_input_grad[1] else None


class OneDnnLinear(nn.Linear):
    """nn.Linear whose products, where no gradient is asked for, are oneDNN's."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        return product(input, self.weight, self.bias)


def use_onednn(model: nn.Module) -> nn.Module:
    """Have all plain linears of `model` multiply by oneDNN, where there is one. Returns the model."""
    if AVAILABLE:
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDnnLinear
    return model
