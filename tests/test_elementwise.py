"""Row-wise functions with backwards of their own, against the same formulas differentiated by autograd.

float64: 1e-12 relative to the largest entry, which leaves no room for a wrong term; bf16: both round the same intermediate
results, so they agree to a few units in the last place.
"""

import pytest
import torch
from torch import Tensor

from htc_megatron.model.elementwise import forget, rms_norm, rotary_, swiglu

ROWS, WIDTH = 7, 16


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (precise * torch.rsqrt(precise.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def plain_swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def compare(ours, theirs, leaves: list[Tensor], tolerance: float) -> None:
    upstream = torch.randn_like(theirs(*leaves))
    found, wanted = ours(*leaves), theirs(*leaves)
    pairs = [(found, wanted)] + list(
        zip(torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(wanted, leaves, upstream), strict=True)
    )
    for one, other in pairs:
        assert one.dtype == other.dtype
        assert (one - other).abs().max() <= tolerance * other.abs().max()


def leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 2**-6)], ids=str)
def test_norm_and_swiglu(dtype, tolerance):
    torch.manual_seed(0)
    compare(lambda x, w: rms_norm(x, w, 1e-5), plain_norm, [leaf(ROWS, 1, WIDTH, dtype=dtype), leaf(WIDTH, dtype=dtype)], tolerance)
    compare(swiglu, plain_swiglu, [leaf(ROWS, 1, 2 * WIDTH, dtype=dtype)], tolerance)


def test_rotary_turns_some_heads_and_leaves_the_others():
    torch.manual_seed(0)
    angles = torch.rand(ROWS, 1, WIDTH // 2, dtype=torch.float64) * 6
    cos, sin = angles.cos(), angles.sin()

    def ours(x: Tensor) -> Tensor:
        return rotary_(x * 1.0, lambda flat: [(flat.view(ROWS, 3, WIDTH)[:, :2], cos, sin)])

    def theirs(x: Tensor) -> Tensor:
        turned, kept = x.view(ROWS, 3, WIDTH).split([2, 1], 1)
        a, b = turned.chunk(2, -1)
        return torch.cat([torch.cat([a * cos - b * sin, b * cos + a * sin], -1), kept], 1).flatten()

    compare(ours, theirs, [leaf(ROWS * 3 * WIDTH, dtype=torch.float64)], 1e-12)


def test_what_is_forgotten_is_made_again():
    """The memory is gone after forward and the gradient is the same."""
    torch.manual_seed(0)
    x, weight, matrix = (leaf(*shape, dtype=torch.float64) for shape in ((ROWS, WIDTH), (WIDTH,), (WIDTH, WIDTH)))
    kept = torch.autograd.grad((rms_norm(x, weight, 1e-5) @ matrix).square().sum(), [x, weight, matrix])
    normed = rms_norm(x, weight, 1e-5)
    out = normed @ matrix
    forget(normed, lambda: rms_norm(x.detach(), weight.detach(), 1e-5), out)
    assert normed.untyped_storage().size() == 0
    again = torch.autograd.grad(out.square().sum(), [x, weight, matrix])
    for one, other in zip(again, kept, strict=True):
        assert torch.equal(one, other)
