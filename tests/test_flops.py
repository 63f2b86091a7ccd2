"""The operations MFU counts, against the mask itself and against torch's own counter."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from htc_megatron.config_io import load_zero
from htc_megatron.model.layout import ImageShape
from htc_megatron.model.mask import MaskRule, dense_mask
from htc_megatron.parallel import groups as process_groups
from htc_megatron.training.build import build_engine
from htc_megatron.training.flops import attention_pairs, peak_flops, step_flops
from tests.parity_worker import micro_batch, tiny_config
from tests.test_attention import RULES, build


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("shape", [ImageShape(2, 5, 1), ImageShape(1, 3, 3)], ids=["K=1", "K=3"])
def test_pairs_are_those_of_the_mask(rule, shape):
    layout = build([[[3, 5], [7]], [[0, 4, 2, 1], [6]], [[2, 1]]], shape)
    batch = replace(micro_batch(tiny_config(), 0), layout=layout)
    padding = layout.rows * layout.seq_length - int((layout.samples[:, 2] - layout.samples[:, 1]).sum())
    assert sum(attention_pairs(batch, rule)) == int(dense_mask(layout, rule).sum()) - padding


def matrix_flops(**method) -> tuple[float, float]:
    """Forward operations of a batch without padding, attention left out: ours, torch's."""
    frozen = ["vision", "resampler", "projector", "anchors", "voco", "backbone"]
    changes = {f"model__method__{key}": value for key, value in method.items()}
    config = tiny_config(training__seq_length=27, training__freeze=frozen, **changes)
    groups = process_groups.initialise(config.parallel, 0)
    engine = build_engine(config, load_zero("zero1.json"), groups)
    batch = micro_batch(config, 3, "i")
    length = int(batch.layout.samples[0, 2])
    layout = replace(batch.layout, seq_length=length)
    batch = replace(batch, input_ids=batch.input_ids[:, :length], labels=batch.labels[:, :length], layout=layout)
    rule = MaskRule.from_config(config.model.method)
    vision, bb = config.model.vision, config.model.backbone
    text, images = attention_pairs(batch, rule)
    attention = 4 * bb.hidden_size * (bb.num_layers * text + (bb.num_layers - 1) * images)  # nobody reads V and Z rows of the last layer
    attention += layout.num_images * 4 * vision.hidden_size * vision.num_layers * (vision.num_patches + 1) ** 2
    if config.model.has_qformer:
        queries = config.model.num_patches
        per_layer = 4 * vision.hidden_size * queries * (queries + vision.num_patches)
        attention += layout.num_images * config.model.method.resampler_layers * per_layer
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        engine.module(batch)
    counts = counter.get_flop_counts()["Global"]
    products = sum(value for op, value in counts.items() if "attention" not in str(op) and "bmm" not in str(op))  # bmm: voco rows'
    engine.destroy()
    return step_flops(config, [batch]) - attention, products


@pytest.mark.parametrize(
    "method",
    [{}, dict(resampler="qformer", num_resampled_tokens=3), dict(resampler="average"), dict(anchor_source="random")],
    ids=str,
)
def test_matrix_products_are_those_torch_counts(ranks, method):
    ours, theirs = ranks(1).run(matrix_flops, **method)[0]
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_backward_costs_twice_the_forward_where_all_is_trained():
    config, batch = tiny_config(), micro_batch(tiny_config(), 0)
    alone = tiny_config(training__freeze=["vision", "projector", "anchors", "voco", "backbone"])
    assert step_flops(config, [batch]) == pytest.approx(3 * step_flops(alone, [batch]))


def test_adapters_are_trained_and_the_backbone_around_them_passes_gradients_on():
    everything = ["vision", "projector", "anchors", "voco", "backbone"]
    batch, alone, lora = (
        micro_batch(tiny_config(), 0),
        tiny_config(training__freeze=everything),
        {"rank": 4, "targets": ["q_proj", "o_proj"]},
    )
    config = tiny_config(training__freeze=everything, model__lora=lora)
    tokens = int((batch.layout.samples[:, 2] - batch.layout.samples[:, 1]).sum())
    adapters = 4 * 2 * (4 * (32 + 32))  # layers, targets, rank (in + out)
    frozen = tiny_config(training__freeze=["vision", "projector", "anchors", "backbone"])  # the voco row wants gradients of the backbone
    trunk = step_flops(frozen, [batch]) - step_flops(alone, [batch])
    assert step_flops(config, [batch]) == pytest.approx(step_flops(alone, [batch]) + trunk + 6 * adapters * tokens)


def test_measuring_the_peak_draws_nothing_from_the_run():
    """It runs after a resumed run's random state was restored, which must stay what the checkpoint says."""
    before = torch.get_rng_state()
    assert peak_flops(torch.device("cpu"), torch.float32) > 0
    assert torch.equal(torch.get_rng_state(), before)
