"""What a checkpoint holds, in lines for people."""

import math
from collections.abc import Iterator

from htc_megatron.checkpoint.box_file import DTYPES
from htc_megatron.checkpoint.reader import CheckpointReader


def describe(reader: CheckpointReader) -> Iterator[str]:
    """Model card, the layout that wrote it, step, what is stored and how large it is."""
    manifest, config = reader.manifest, reader.config
    model, method, backbone = config.model, config.model.method, config.model.backbone
    yield f"{reader.folder}"
    yield f"step:       {reader.step} of {config.training.train_iters}"
    yield f"written by: {_layout(reader.layout)}"
    yield (
        f"backbone:   {'Qwen2' if backbone.qkv_bias else 'LLaMA'}, {backbone.num_layers} layers of {backbone.hidden_size}, "
        f"{backbone.num_attention_heads} heads in {backbone.num_query_groups} groups, MLP {backbone.ffn_hidden_size}, "
        f"vocabulary {backbone.vocab_size}"
    )
    if model.has_tower:
        vision = model.vision
        resampled = "" if method.resampler == "none" else f", {method.resampler} to {model.num_patches} tokens"
        yield (
            f"vision:     CLIP, {vision.num_layers} layers of {vision.hidden_size}, {vision.image_size} px, {vision.num_patches} patches"
            f"{resampled}"
        )
    if model.num_anchors and not model.has_mgvq:
        yield f"anchors:    {model.num_anchors} of the tower's features by {method.anchor_source}"
    if model.has_mgvq:
        mgvq, file = model.mgvq, config.mgvq_checkpoint or "not named"
        yield f"MGVQ:       {mgvq.groups} groups, {mgvq.codebook_size} codes, {model.num_anchors} anchors; file {file}"
    kept = f"<voco> x {method.num_voco_tokens} (id {method.voco_token_id})" if method.num_voco_tokens else "no voco token"
    yield (
        f"method:     {method.channels}, {method.fusion}-fusion, mask {method.mask}, {model.num_visual_tokens} visual tokens, {kept}, "
        f"image_sees {method.image_sees}, text_sees {method.text_sees}"
    )
    yield f"tokenizer:  {config.tokenizer or 'not named'}"
    yield f"frozen:     {', '.join(config.training.freeze) or 'nothing'}"
    yield ""
    yield f"{'stored':<24}{'tensors':>9}{'entries':>17}{'bytes':>17}  type"
    for title, prefix in _sections(reader):
        found = [tensor for key, tensor in manifest.tensors.items() if key.startswith(prefix)]
        entries = [math.prod(tensor.shape) for tensor in found]
        size = sum(n * DTYPES[t.dtype].itemsize for n, t in zip(entries, found, strict=True))
        kinds = ", ".join(sorted({tensor.dtype for tensor in found}))
        yield f"{title:<24}{len(found):>9,}{sum(entries):>17,}{size:>17,}  {kinds}"
    files = manifest.files.values()
    yield f"{len(files)} files, {sum(record.bytes for record in files):,} bytes"
    optimizer = "none" if manifest.optimizer_step is None else f"AdamW after {manifest.optimizer_step} steps"
    yield f"optimizer:  {optimizer}"
    for key, value in reader.extra.items():
        if isinstance(value, dict):
            yield f"{key}:"
            yield from (f"  {name}: {item}" for name, item in value.items())
        else:
            yield f"{key}: {value}"


def _sections(reader: CheckpointReader) -> list[tuple[str, str]]:
    """Title and key prefix of every group of tensors, the model by its parts."""
    parts = dict.fromkeys(".".join(name.split(".")[: 2 if name.startswith("frontend.") else 1]) for name in reader.names)
    kinds = dict.fromkeys(key.split("/")[0] for key in reader.manifest.tensors if not key.startswith("model/"))
    return [(part, f"model/{part}.") for part in parts] + [(kind, f"{kind}/") for kind in kinds]


def _layout(layout: dict) -> str:
    sizes = " x ".join(f"{name.upper()} {layout[f'{name}_size']}" for name in ("tp", "pp", "dp") if layout.get(f"{name}_size", 1) > 1)
    return f"{sizes or 'one process'}, ZeRO-{layout.get('zero_stage', '?')}, {layout.get('precision', '?')}"
