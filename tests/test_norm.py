"""The gradient norm by pieces: as exact as DeepSpeed's fp64 copy, which it takes the place of."""

import pytest
import torch

from htc_megatron.parallel.patches import PIECE, piece_norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entries", [0, 1, PIECE - 1, PIECE, PIECE + 3, 2**22 + 5])
def test_norm_of_the_pieces_is_the_gradients(entries, dtype):
    gradient = (torch.randn(entries) * 1e-6).to(dtype)
    wanted = torch.linalg.vector_norm(gradient, dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.vector_norm(piece_norms(gradient).double()), wanted, rtol=3e-7, atol=0)


def test_a_transposed_gradient_has_the_norm_of_its_entries():
    gradient = torch.randn(300, 200)
    assert piece_norms(gradient.t()).norm() == pytest.approx(float(gradient.norm()), rel=1e-5)


def test_padding_stays_marked():
    padding = torch.zeros(8)
    padding._zero_padding = True
    assert piece_norms(padding) is padding
