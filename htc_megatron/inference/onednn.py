"""Matrix products of fp32 on CPU by oneDNN, which torch has but asks for bf16 only.

torch's own fp32 product, MKL's, reads the weights of a step of decoding at half the machine's rate where it does not know the CPU, and
is slow at the few rows of a question. Weights stay as and where they are. oneDNN makes a kernel for each new shape, which answering
repeats; training, whose number of rows is another in each step, would pay for it and does not use it. The op is not a public one:
where torch lacks it, nothing changes.
"""

import torch
from torch import Tensor, nn

AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # whether this torch has the op


class OneDnnLinear(nn.Linear):
    """nn.Linear whose products of fp32 on CPU are oneDNN's. Where a gradient is asked for, which the op has not, they are torch's."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        fp32 = input.dtype == self.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if not fp32 or input.device.type != "cpu" or not input.numel() or torch.is_grad_enabled():
            return super().forward(input)
        return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")


def use_onednn(model: nn.Module) -> nn.Module:
    """Have all plain linears of `model` multiply by oneDNN, where there is one. Returns the model."""
    if AVAILABLE:
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDnnLinear
    return model
