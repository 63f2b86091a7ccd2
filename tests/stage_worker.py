"""What one rank does in the tests of mends, masks, image-less ranks and memory. Each function runs on every rank."""

import gc
from contextlib import contextmanager
from dataclasses import replace

import torch

from htc_megatron.benchmarks.memory import allocated, peak_allocated
from htc_megatron.model.layout import ImageShape
from htc_megatron.parallel import groups as process_groups
from htc_megatron.parallel import patches, zero
from tests.parity_worker import MICROS, MIXED, micro_batch, run_steps, tiny_config


@contextmanager
def replaced(owner, name: str, value):
    """An attribute replaced for a while: a worker serves other tests afterwards."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield original
    finally:
        setattr(owner, name, original)


def run_without(mend: str, changes: dict, zero_json: dict) -> list[tuple[float, float]]:
    """Loss and norm of the parity steps with one mend taken out."""
    if mend == "trace":
        with replaced(patches, "without_trace", lambda engine: None):
            return run_steps(changes, zero_json)
    if mend == "flag":
        with replaced(patches, "clear_seen_flag", lambda engine: None):
            return run_steps(changes, zero_json)
    if mend == "rank":  # DeepSpeed's own reading: the rank that names files

        def by_file_rank(engine, tp_rank):
            engine.optimizer.model_parallel_rank = engine.mpu.get_model_parallel_rank()

        with replaced(patches, "count_norm_by_tp_rank", by_file_rank):
            return run_steps(changes, zero_json)
    if mend == "pieces":
        with replaced(patches, "norm_by_pieces", lambda engine: None):
            return run_steps(changes, zero_json)
    assert mend == "gas"
    original = zero.deepspeed_config
    with replaced(zero, "deepspeed_config", lambda *args: original(*args) | {"gradient_accumulation_steps": MICROS}):
        return run_steps(changes, zero_json)


def text_logits(changes: dict, zero_json: dict, cut: bool) -> list[tuple[float, float, bool]]:
    """Text logits of a batch against the same batch with one pixel, or one code, changed.

    cut: text cannot see voco rows. Returns on the last stage, for pixel and code: the largest difference, the largest
    logit, whether all logits are bit-equal; on other stages nothing.
    """
    from htc_megatron.model import htc_vlm
    from htc_megatron.model.mask import TEXT, token_kinds
    from htc_megatron.training.build import build_engine

    config = tiny_config(**changes)
    groups = process_groups.initialise(config.parallel, 0)
    engine = build_engine(config, zero_json, groups)
    batch = micro_batch(config, 5, "di")
    kinds = token_kinds(batch.layout)[0]
    if cut:  # V_hy and voco rows become one block that no text row sees; positions stay
        original = htc_vlm.LayoutParams.from_layout
        shape = batch.layout.image
        blind = ImageShape(shape.num_anchors, shape.num_patches + shape.num_voco, 0)
        hidden = lambda layout, *args: original(replace(layout, image=blind), *args)  # noqa: E731
    else:
        hidden = htc_vlm.LayoutParams.from_layout

    def forward(one):
        def step(batches, model):
            output = model(next(batches), logits=True)
            return output, lambda logits: (logits.sum(), torch.tensor(1, dtype=torch.int), logits)

        with replaced(htc_vlm.LayoutParams, "from_layout", hidden):
            return engine.evaluate(step, iter([one]), 1, engine.module.shape_between_stages(batch.layout))

    pixels, codes = batch.pixel_values.clone(), batch.codes.clone()
    pixels[0, 1, 3, 2] += 1.0
    codes[0, 0, 0] = (codes[0, 0, 0] + 1) % (config.model.mgvq.codebook_size // config.model.mgvq.groups)
    found = []
    base = forward(batch)
    for changed in (replace(batch, pixel_values=pixels), replace(batch, codes=codes)):
        other = forward(changed)
        if groups.last_stage:
            a, b = base[0][kinds == TEXT], other[0][kinds == TEXT]
            found.append((float((a - b).abs().max()), float(a.abs().max()), torch.equal(a, b)))
    engine.destroy()
    return found


def image_less(changes: dict, zero_json: dict, kinds: tuple[str, ...] = MIXED) -> list[tuple[float, float]]:
    """The parity steps on micro-batches of these kinds."""
    return run_steps(changes, zero_json, kinds)


def construction_memory(changes: dict, zero_json: dict) -> tuple[float, float, float]:
    """MiB this rank held at most while the model was built and filled; its share of the parameters, and all of them."""
    from htc_megatron.training import build

    config = tiny_config(**changes)
    groups = process_groups.initialise(config.parallel, 0)
    build.build_engine(tiny_config(), zero_json, groups).destroy()  # imports and first buffers are not the model's
    gc.collect()
    began, sizes = allocated(), {}

    class Built(Exception):
        pass

    def stop_here(module, options):
        parameters = list(module.parameters())
        sizes["mine"] = sum(getattr(p, "ds_tensor", p).numel() * p.element_size() for p in parameters) / 2**20
        sizes["all"] = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in parameters) / 2**20
        raise Built

    with replaced(build, "make_optimizer", stop_here), peak_allocated() as peak:
        try:
            build.build_engine(config, zero_json, groups)
        except Built:
            pass
    return peak.mib - began, sizes["mine"], sizes["all"]
