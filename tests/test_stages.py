"""What no pipeline stage and no rank may do: lose the mask, go another road for want of images, hold more than its share."""

import pytest

from htc_megatron.config_io import load_zero
from htc_megatron.parallel.support import Layout
from tests.parity_worker import run_steps
from tests.stage_worker import construction_memory, image_less, text_logits
from tests.test_parity import assert_same, changes_of

LAYOUTS = [Layout(), Layout(pp=2), Layout(pp=4), Layout(tp=2), Layout(tp=2, pp=2, sequence_parallel=True), Layout(pp=2, zero=3)]


@pytest.mark.parametrize("attention", ["split", "dense"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_text_reads_images_only_through_voco(ranks, layout, attention):
    """With voco rows cut off, a changed pixel or code changes no text logit, bit for bit; otherwise both do."""
    changes, zero = changes_of(layout) | {"parallel__attention": attention}, load_zero(f"zero{layout.zero}.json")
    for cut in (True, False):
        answers = [found for found in ranks(layout.world_size).run(text_logits, changes, zero, cut, timeout=120) if found]
        assert answers
        for pixel, code in answers:
            if cut:
                assert pixel[2] and code[2], f"text saw an image past the voco rows: {pixel}, {code}"
            else:
                assert pixel[0] > 1e-6 * pixel[1] and code[0] > 1e-6 * code[1], f"text does not see the image: {pixel}, {code}"


@pytest.mark.parametrize("mask", ["full", "none"])
def test_cut_holds_for_other_masks(ranks, mask):
    """`full` leaks no more than `star`; under `none` text must see patches even with voco rows cut off (the check can fail)."""
    changes = changes_of(Layout(pp=2)) | {"model__method__mask": mask}
    answers = [found for found in ranks(2).run(text_logits, changes, load_zero("zero1.json"), True, timeout=120) if found]
    assert all(pixel[2] == code[2] == (mask == "full") for pixel, code in answers)


@pytest.mark.parametrize("frozen", [[], ["vision"]], ids=["trained tower", "frozen tower"])
@pytest.mark.parametrize("layout", [Layout(dp=2, zero=3), Layout(pp=2, dp=2, zero=3), Layout(tp=2, dp=2, zero=3)], ids=str)
def test_rank_without_images(ranks, layout, frozen):
    """The second data-parallel rank has no image in any micro-batch: nothing hangs and no gradient changes."""
    kinds = ("it", "dt", "t", "t")
    changes, zero = {"training__freeze": frozen}, load_zero(f"zero{layout.zero}.json")
    reference = ranks(1).run(image_less, changes, load_zero("zero1.json"), kinds)[0]
    assert_same(ranks(layout.world_size).run(image_less, changes_of(layout) | changes, zero, kinds, timeout=120)[0], reference)


def test_blank_image_adds_nothing(ranks):
    """Text alone: the front-end's gradients are zero, so training it or not gives the same norm."""
    zero = load_zero("zero1.json")
    trained = ranks(1).run(run_steps, {"optimizer__weight_decay": 0.0}, zero, ("t",))[0]
    frozen = {"training__freeze": ["vision", "projector", "anchors", "voco"], "optimizer__weight_decay": 0.0}
    assert_same(ranks(1).run(run_steps, frozen, zero, ("t",))[0], trained)


def test_no_rank_holds_more_than_its_share(ranks):
    """While a ZeRO-3 model is built and filled, a rank holds its share and about one gathered weight; without ZeRO-3, all of it."""
    sizes = dict(hidden_size=512, ffn_hidden_size=1536, num_layers=20, num_attention_heads=8, num_query_groups=8, vocab_size=8001)
    changes = {f"model__backbone__{key}": value for key, value in sizes.items()} | {"model__method__voco_token_id": 8000}
    whole = ranks(1).run(construction_memory, changes, load_zero("zero1.json"))[0]
    assert whole[0] > 0.9 * whole[2]
    largest = 8001 * 512 * 4 / 2**20
    for peak, share, everything in ranks(4).run(construction_memory, changes, load_zero("zero3.json"), timeout=120):
        assert share < 1.02 * everything / 4
        # the share, and a gathered weight with its initial value and DeepSpeed's buffers for gathering and cutting it
        assert peak < share + 4 * largest < 0.5 * everything
