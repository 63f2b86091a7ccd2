"""The order of rows, and the loss on some of them."""

import pytest
import torch
import torch.nn.functional as F

from htc_megatron.model import output
from htc_megatron.model.layout import ImageShape
from htc_megatron.model.mask import TEXT, VISUAL, VOCO, token_kinds
from htc_megatron.model.output import OutputLayer
from htc_megatron.model.rows import RowOrder, capacity, fill_up, wanted_rows
from tests.parity_worker import tiny_config
from tests.test_attention import build

IMAGE = ImageShape(2, 5, 2)


def layouts():
    return [build([[[3, 5], [7]], [[0, 4, 2, 1], [6]], [[2, 1]]], IMAGE), build([[[4], [3]]], IMAGE), build([[[1, 1]]], IMAGE, padding=0)]


@pytest.mark.parametrize("shares", [1, 2, 4])
@pytest.mark.parametrize("layout", layouts(), ids=["images", "text alone", "one image"])
def test_every_token_has_one_row_in_its_zone(layout, shares):
    order = RowOrder.of(layout, shares)
    kind = token_kinds(layout)[0].reshape(-1)
    language, visual = order.places.split([order.language, order.visual])
    for zone, kinds in ((language, (TEXT, VOCO)), (visual, (VISUAL,))):
        places = zone[zone >= 0]
        assert sorted(places.tolist()) == [i for i, k in enumerate(kind.tolist()) if k in kinds]
        assert len(zone) % shares == 0
    assert torch.equal(visual[: order.num_visual], layout.visual_places.reshape(-1))
    assert torch.equal(language[order.num_text :][: order.num_voco], layout.voco_places.reshape(-1))
    assert sum(order.local) * shares <= capacity(layout.rows, layout.seq_length, shares)


@pytest.mark.parametrize("shares", [1, 2, 4])
def test_shares_are_equal_parts_of_both_zones(shares):
    order = RowOrder.of(layouts()[0], shares)
    language, visual = torch.arange(order.language)[:, None], 1000 + torch.arange(order.visual)[:, None]
    shared = order.share_out(language, visual)
    assert torch.equal(order.gathered(shared), torch.cat([language, visual]))
    for rank, mine in enumerate(shared.chunk(shares)):
        assert torch.equal(mine, torch.cat([language.chunk(shares)[rank], visual.chunk(shares)[rank]]))


def test_rows_at_their_places():
    layout = layouts()[0]
    order = RowOrder.of(layout, 2)
    rows = fill_up(torch.arange(1.0, 1 + len(order.places))[:, None], len(order.places))
    found = order.at_places(rows)[:, 0]
    assert torch.equal(found != 0, token_kinds(layout)[0].reshape(-1) != 0)
    assert torch.equal(found[order.places[order.places >= 0]], rows[order.places >= 0, 0])


def test_the_row_before_a_label_predicts_it():
    layout = build([[[0, 3]]], IMAGE, padding=1)  # an image, three tokens, padding
    order = RowOrder.of(layout)
    labels = torch.full((1, layout.seq_length), -100)
    labels[0, [9, 11]] = torch.tensor([4, 5])
    rows, targets = wanted_rows(order, labels)
    assert order.places[rows].tolist() == [8, 10] and targets.tolist() == [4, 5]  # the last voco token, and a text token
    labels[0, 3] = 7
    with pytest.raises(ValueError, match="inside an image"):
        wanted_rows(order, labels)


def losses(changes: dict, chunk: int, dtype: torch.dtype) -> tuple:
    """Loss and gradients of this TP rank's output layer, its own and F.cross_entropy's on the whole matrix."""
    from htc_megatron.model.layers import backbone_config
    from htc_megatron.parallel import groups as process_groups

    config = tiny_config(**changes)
    groups = process_groups.initialise(config.parallel, 0)
    mcore, hidden, real, padded = backbone_config(config, True), 32, 61, 64
    mcore.params_dtype = dtype
    layer = OutputLayer(hidden, padded, config=mcore, init_method=mcore.init_method, vocab_size=real, tp_rank=groups.tp_rank)
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(padded, hidden, generator=generator).to(dtype)
    layer.weight.data.copy_(whole.chunk(groups.tp_size)[groups.tp_rank])
    rows = torch.randn(11, hidden, generator=generator).to(dtype).requires_grad_()
    targets = torch.tensor([0, 60, 31, 32, 33, 5, 59, 2, 2, 17, 40])
    before, output.LOGITS_AT_ONCE = output.LOGITS_AT_ONCE, chunk
    try:
        loss = layer(rows, targets)
        (loss * 0.5).backward()
        with torch.no_grad():
            assert torch.equal(layer(rows, targets), loss)
    finally:
        output.LOGITS_AT_ONCE = before
    ours = (loss.detach(), rows.grad, layer.weight.grad)
    leaves = [rows.detach().float().requires_grad_(), whole[:real].float().requires_grad_()]
    wanted = F.cross_entropy(leaves[0] @ leaves[1].T, targets, reduction="sum")
    (wanted * 0.5).backward()
    of_weight = F.pad(leaves[1].grad, (0, 0, 0, padded - real)).chunk(groups.tp_size)[groups.tp_rank]
    return ours, (wanted.detach(), leaves[0].grad, of_weight)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("chunk", [1, 4 * 64, 2**23], ids=["a row at a time", "some rows", "all at once"])
def test_loss_by_chunks(ranks, tp, chunk):
    """fp32: 1e-5 of the largest entry, eleven rows' sums in another order. bf16: its own rounding, 2^-8, a few times over."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2**-6)):
        for ours, theirs in ranks(tp).run(losses, {"parallel__tensor_model_parallel_size": tp}, chunk, dtype):
            for one, other in zip(ours, theirs, strict=True):
                assert (one.float() - other).abs().max() <= tolerance * other.abs().max()
