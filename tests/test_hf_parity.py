"""A model trained on a layout, saved, exported: its logits are the trained model's, and decoding follows them."""

from dataclasses import replace

import pytest
import torch

from htc_megatron.checkpoint import CheckpointReader, save
from htc_megatron.model.mgvq import build_mgvq
from htc_megatron.weights.export import hf_from_tensors, hf_tensors
from tests.parity_worker import micro_batch, tiny_config

TOLERANCE = 5e-6  # fp32; the promise is 1e-4, seen are 5e-7
LLAMA = dict(model__backbone__qkv_bias=False)
VARIANTS = {
    "star": {},
    "star, prefix, K 2, post": dict(model__method__image_sees="prefix", model__method__num_voco_tokens=2, model__method__fusion="post"),
    "full, prefix, voco on, Llama": LLAMA
    | dict(model__method__mask="full", model__method__image_sees="prefix", model__method__text_sees="voco_on"),
    "none, prefix, K 0": dict(model__method__mask="none", model__method__image_sees="prefix", model__method__num_voco_tokens=0),
    "parallel, linear, Llama": LLAMA | dict(model__method__fusion="parallel", model__method__projector="linear"),
    "discrete": dict(model__method__channels="discrete"),
    "continuous": dict(model__method__channels="continuous"),
    "Q-Former": dict(model__method__channels="continuous", model__method__resampler="qformer", model__method__mask="none")
    | dict(model__method__num_voco_tokens=0),
    "average of four, K 4": dict(model__method__resampler="average", model__method__num_resampled_tokens=4)
    | dict(model__method__num_voco_tokens=4),
    "random anchors": dict(model__method__anchor_source="random", model__method__anchor_seed=3),
    "anchors by attention": dict(model__method__anchor_source="topk_attention"),
    "anchors by k-means": dict(model__method__anchor_source="kmeans"),
}


def frozen_mgvq(config):
    torch.manual_seed(3)
    return build_mgvq(config.model.mgvq, encoder_only=True).eval()


def example(config, kinds: str = "di"):
    """A batch whose codes are those of pixels, and these pixels [images, 3, s, s]."""
    batch = micro_batch(config, 11, kinds)
    side = config.model.mgvq.image_size
    pixels = torch.rand(batch.layout.num_images, 3, side, side, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return replace(batch, codes=frozen_mgvq(config).encode(pixels)), pixels


def trained_logits(changes: dict, zero: dict, folder):
    """Two optimiser steps, a checkpoint, and on the last stage the logits of the example."""
    from htc_megatron.parallel import groups as process_groups
    from htc_megatron.training.build import build_engine, checkpoint_state
    from htc_megatron.training.step import train_step

    config = tiny_config(**changes, optimizer__lr=3e-2)
    groups = process_groups.initialise(config.parallel, config.training.seed)
    engine = build_engine(config, zero, groups, frozen_mgvq(config).quantize.embedding.weight.detach().clone())
    batch, _ = example(config)
    mine = batch if groups.first_stage else replace(batch, pixel_values=None, codes=None)
    share = 4 // groups.dp_size
    for _ in range(2):
        train_step(engine, [mine] * share, config.optimizer.lr)
    save(folder, checkpoint_state(engine, config), step=2, config=config)

    def forward_step(batches, model):
        return model(next(batches), logits=True), lambda logits: (logits.sum(), torch.tensor(1, dtype=torch.int), logits)

    found = engine.evaluate(forward_step, iter([mine]), 1, engine.module.shape_between_stages(batch.layout))
    engine.destroy()
    return found[0] if groups.last_stage else None


def check(folder, logits):
    """Every sample of the example through the exported model, alone, at its text and voco places."""
    reader = CheckpointReader(folder)
    config = reader.config
    frozen = frozen_mgvq(config).state_dict() if config.model.has_mgvq else None
    model = hf_from_tensors(config.model, {name: reader.tensor(name) for name in reader.names}, frozen)
    batch, mgvq_pixels = example(config)
    layout, image = batch.layout, batch.layout.image
    first = 0
    for number, (row, start, stop) in enumerate(layout.samples.tolist()):
        count = int((layout.images[:, 0] == number).sum())
        ids, kept = batch.input_ids[row, start:stop].clone(), torch.ones(stop - start, dtype=torch.bool)
        for begin in (layout.images[first : first + count, 1] - start).tolist():
            ids[begin : begin + image.length] = config.model.method.voco_token_id
            kept[begin : begin + image.num_visual] = config.model.method.mask == "none"
        pixels = dict(pixel_values=batch.pixel_values[first : first + count], mgvq_pixel_values=mgvq_pixels[first : first + count])
        with torch.no_grad():
            ours = model(ids[kept][None], **(pixels if count else {})).logits[0]
        torch.testing.assert_close(ours, logits[row, start:stop][kept], atol=TOLERANCE, rtol=0)
        first += count
    assert first == layout.num_images >= 3


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_equals_its_export(ranks, tmp_path, name):
    """One process."""
    logits = ranks(1).run(trained_logits, VARIANTS[name], {"zero_optimization": {"stage": 1}}, tmp_path)
    check(tmp_path, logits[-1])


TIED = dict(model__backbone__tie_word_embeddings=True)


@pytest.mark.parametrize("world_size, stage, sizes", [(1, 3, (1, 1)), (4, 1, (2, 2)), (4, 3, (2, 2))], ids=str)
def test_export_of_tied_embeddings(ranks, tmp_path, world_size, stage, sizes):
    """One matrix here, two tensors there: only the embedding's voco row is `<voco>`'s."""
    changes = TIED | dict(parallel__tensor_model_parallel_size=sizes[0], parallel__pipeline_model_parallel_size=sizes[1])
    logits = ranks(world_size).run(trained_logits, changes, {"zero_optimization": {"stage": stage}}, tmp_path)
    check(tmp_path, next(found for found in logits if found is not None))
    reader = CheckpointReader(tmp_path)
    named = dict(hf_tensors(reader.config.model, reader.tensor, frozen_mgvq(reader.config).state_dict()))
    differ = (named["lm_head.weight"] != named["model.language_model.embed_tokens.weight"]).any(-1)
    assert differ.nonzero().flatten().tolist() == [reader.config.model.method.voco_token_id]


@pytest.mark.parametrize("stage", [1, 3])
def test_export_of_a_model_trained_on_tp_and_pp(ranks, tmp_path, stage):
    """TP2 x PP2, without and with ZeRO-3."""
    changes = dict(parallel__tensor_model_parallel_size=2, parallel__pipeline_model_parallel_size=2)
    logits = ranks(4).run(trained_logits, changes, {"zero_optimization": {"stage": stage}}, tmp_path)
    check(tmp_path, next(found for found in logits if found is not None))
