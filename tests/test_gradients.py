"""Gradients of every weight against transformers' LLaMA/Qwen2 and CLIP with a dense mask, differentiated by plain autograd.

The parity tests compare layouts of our code with each other; this one would see a term that all of them lack. fp32: each
weight's gradient agrees to 1e-4 of its own norm (sums in another order, through six layers).
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from htc_megatron.config import RunConfig
from htc_megatron.model.htc_vlm import HTCVLM
from htc_megatron.model.initialisation import initial_value
from htc_megatron.model.layout import MicroBatch
from htc_megatron.model.mask import VISUAL, token_kinds
from htc_megatron.model.naming import stage_entries
from htc_megatron.parallel import groups as process_groups
from htc_megatron.weights.convert import to_hf
from htc_megatron.weights.export import hf_from_tensors
from tests.parity_worker import micro_batch, tiny_config

EMBEDDING, VOCO = "model.language_model.embed_tokens.weight", 60
VARIANTS = {
    "star": {},
    "full, prefix, voco_on, K=2": dict(mask="full", image_sees="prefix", text_sees="voco_on", num_voco_tokens=2),
    "none, prefix": dict(mask="none", image_sees="prefix", num_voco_tokens=0),
    "continuous, linear": dict(channels="continuous", projector="linear", image_sees="prefix"),
    "post": dict(fusion="post"),
    "Q-Former": dict(channels="continuous", resampler="qformer", num_resampled_tokens=3, mask="none", num_voco_tokens=0),
    "average of runs": dict(resampler="average", num_resampled_tokens=3),
    "average of cells": dict(resampler="average", num_resampled_tokens=4, anchor_source="random"),
    "top-k": dict(anchor_source="topk_attention"),
    "k-means": dict(anchor_source="kmeans", num_anchors=3),
}


def gradients(method: dict, recompute: str, **changes) -> tuple[dict, dict]:
    """Gradients by name in the export's form: ours, transformers'."""
    config = tiny_config(parallel__recompute=recompute, **{f"model__method__{key}": value for key, value in method.items()}, **changes)
    process_groups.initialise(config.parallel, 0)
    stage = HTCVLM(config, True, True, 0, torch.device("cpu"))
    entries = stage_entries(stage, config.model, 0)
    for entry in entries:
        entry.param.data.copy_(initial_value(entry.weight, 1, 0, 1).view(entry.param.shape))
    batch = micro_batch(config, 4, "id")
    stage.train()
    stage(batch).backward()
    ours = {}
    for entry in entries:
        if entry.param.grad is not None and entry.name != "frontend.voco.weight":
            ours |= to_hf(entry.weight, entry.param.grad.view(entry.weight.shape))
    tensors = {entry.name: entry.param.detach().view(entry.weight.shape).clone() for entry in entries}
    model = in_transformers(config, tensors, batch)[0]
    theirs = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return ours, theirs


def in_transformers(config: RunConfig, tensors: dict[str, Tensor], batch: MicroBatch, change: Callable = lambda model: None):
    """The Hugging Face model of these weights, `change`d, after forward and backward of the batch; and for each sample its logits
    with their row and columns in the batch: (row, columns, logits)."""
    from htc_megatron.model.mgvq import build_mgvq

    torch.manual_seed(0)
    hybrid = config.model.has_mgvq
    mgvq = build_mgvq(config.model.mgvq, encoder_only=True).state_dict() if hybrid else None
    if hybrid:
        mgvq["quantize.embedding.weight"] = tensors["frontend.codebook.weight"]
    model = hf_from_tensors(config.model, tensors, mgvq).train()
    change(model)
    kinds, image, samples = token_kinds(batch.layout)[0], 0, []
    for index, (row, start, stop) in enumerate(batch.layout.samples.tolist()):
        count = int((batch.layout.images[:, 0] == index).sum())
        keep = kinds[row, start:stop] != VISUAL
        ids, labels = batch.input_ids[row, start:stop], batch.labels[row, start:stop]
        if config.model.method.mask == "none":  # the export's placeholders are whole images there
            keep, ids = torch.ones_like(keep), ids.masked_fill(~keep, config.model.method.voco_token_id)
        inputs = {"pixel_values": batch.pixel_values[image : image + count]} if count else {}
        if count and hybrid:
            codes = batch.codes[image : image + count]
            model.model.mgvq.encode = lambda pixels, codes=codes: codes  # the batch's codes, not those of its noise
            inputs["mgvq_pixel_values"] = torch.zeros(count, 3, config.model.mgvq.image_size, config.model.mgvq.image_size)
        image += count
        logits = model(ids[keep][None], **inputs).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], labels[keep][1:], reduction="sum", ignore_index=-100).backward()
        samples.append((row, start + keep.nonzero()[:, 0], logits.detach()))
    return model, samples


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    largest = max(gradient.norm() for gradient in theirs.values())
    for name, gradient in theirs.items():
        # softmax does not see the tower's key biases: their true gradient is zero, what is left of it is rounding
        error = (ours[name] - gradient).norm() / gradient.norm().clamp_min(1e-3 * largest)
        assert error < 1e-4, f"{name}: {error:.2e}"


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_transformers(ranks, variant, recompute):
    ours, theirs = ranks(1).run(gradients, VARIANTS[variant], recompute)[0]
    ours[EMBEDDING][VOCO] = theirs[EMBEDDING][VOCO] = 0.0  # the voco row: its own parameter here
    assert_same(ours, theirs)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_tied_embeddings_equal_transformers(ranks, recompute):
    """The matrix's gradient is the sum of both uses'; the export has a tensor for each. The voco row is read by the output only."""
    ours, theirs = ranks(1).run(gradients, {}, recompute, model__backbone__tie_word_embeddings=True)[0]
    theirs[EMBEDDING][VOCO] = 0.0
    theirs[EMBEDDING] += theirs.pop("lm_head.weight")
    assert_same(ours, theirs)
