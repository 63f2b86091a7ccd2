"""Products by oneDNN: the same as torch's, and only where they may stand in for them."""

import pytest
import torch
from torch import nn

from htc_megatron.inference.onednn import AVAILABLE, OneDnnLinear, use_onednn

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this torch has no oneDNN linear")


def pair(dtype=torch.float32, bias=True) -> tuple[nn.Linear, nn.Linear]:
    plain = nn.Linear(96, 40, bias=bias, dtype=dtype)
    fast = nn.Linear(96, 40, bias=bias, dtype=dtype)
    fast.load_state_dict(plain.state_dict())
    return plain, use_onednn(fast)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 96), (5, 96), (96,), (2, 3, 96), (0, 96)])
@torch.no_grad()
def test_product_is_torchs(shape, bias):
    plain, fast = pair(bias=bias)
    assert type(fast) is OneDnnLinear and isinstance(fast, nn.Linear)
    given = torch.randn(shape)
    torch.testing.assert_close(fast(given), plain(given), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_rows_and_weights_need_not_lie_in_order():
    plain, fast = pair()
    given = torch.randn(96, 7).t()
    torch.testing.assert_close(fast(given), plain(given), rtol=1e-5, atol=1e-6)
    weight = nn.Parameter(torch.randn(96, 40).t())
    plain.weight = fast.weight = weight
    torch.testing.assert_close(fast(given), plain(given), rtol=1e-5, atol=1e-6)


def test_gradients_and_other_precisions_are_torchs_own():
    plain, fast = pair()
    for linear in (plain, fast):
        linear(torch.ones(3, 96)).sum().backward()
    assert torch.equal(fast.weight.grad, plain.weight.grad) and fast.weight.grad.abs().sum() > 0
    plain, fast = pair(torch.bfloat16)
    given = torch.randn(3, 96, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(fast(given), plain(given))


def test_only_plain_linears_change():
    class Own(nn.Linear):
        pass

    model = use_onednn(nn.Sequential(Own(2, 2), nn.Linear(2, 2), nn.ReLU()))
    assert [type(module) for module in model] == [Own, OneDnnLinear, nn.ReLU]
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
