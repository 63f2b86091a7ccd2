"""Matrix products of fp32 weights on CPU by oneDNN, which torch has but asks for bf16 only.

torch's own fp32 product (MKL) reads the weights of a step of decoding at half the machine's rate, and is slow at the few rows of a
question. Weights stay as and where they are. The op is not a public one: where torch lacks it, nothing changes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def available() -> bool:
    """Whether this torch has the op."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class OneDnnLinear(nn.Linear):
    """nn.Linear whose products of fp32 on CPU, where no gradient is asked for, are oneDNN's."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        fp32 = input.dtype == self.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if not fp32 or input.device.type != "cpu" or not input.numel() or torch.is_grad_enabled():
            return F.linear(input, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")


def use_onednn(model: nn.Module) -> nn.Module:
    """Have all plain linears of `model` multiply by oneDNN, where there is one. Returns the model."""
    if available():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDnnLinear
    return model
