"""Two models, each a checkpoint or a Hugging Face folder of any known family, tensor by tensor and by their logits.

Tensors are compared under the names of our export, one weight in memory at a time. Logits are computed in fp32 from the same
token ids and the same picture, by transformers' own class of each family where it has one.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

from htc_megatron.checkpoint import CheckpointReader
from htc_megatron.checkpoint.folder import MANIFEST, checkpoints
from htc_megatron.config import ConfigError
from htc_megatron.hf.modeling_htc_vlm import HTCVLMForConditionalGeneration
from htc_megatron.hf.modeling_mgvq import mgvq_pixels
from htc_megatron.hf.processing_htc_vlm import clip_pixels
from htc_megatron.model.mgvq import load_mgvq
from htc_megatron.weights import weights
from htc_megatron.weights.convert import to_hf
from htc_megatron.weights.export import VOCO, hf_from_tensors, merged
from htc_megatron.weights.families import HTC, LLAVA, LLAVA_LLAMA, Recognised, is_spare, part_named, recognise

VOCABULARY = ("model.language_model.embed_tokens.weight", "lm_head.weight")
VOCO_ROW = "<voco>"  # our name of the row that images are compressed into, which is compared apart from the embedding
LENGTH = 24  # random token ids of the logits' comparison


class Checkpoint:
    """A checkpoint's tensors under the names of the export, LoRA's adapters merged into the backbone and by themselves."""

    def __init__(self, path: Path):
        self.path, self.reader = path, CheckpointReader(path)
        self.model = self.reader.config.model
        self.tower_layers = self.model.vision.num_layers
        self.read = merged(self.model, self.reader.tensor)
        self.owner = {name: weight for weight in weights(self.model) for name in weight.hf}
        if self.model.backbone.tie_word_embeddings:
            self.owner[VOCABULARY[1]] = self.owner[VOCABULARY[0]]
        self.voco_id = self.model.method.voco_token_id if self.model.method.num_voco_tokens else None
        self.names = [*self.owner, *([VOCO_ROW] if self.voco_id is not None else [])]
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def tensor(self, name: str) -> Tensor:
        if name == VOCO_ROW:
            return self.reader.tensor(VOCO)[0]
        weight = self.owner[name]
        if self._last[0] != weight.name:  # a fused weight is read once for all of its parts
            self._last = (weight.name, to_hf(weight, self.read(weight.name)))
        parts = self._last[1]
        return parts[name] if name in parts else parts[VOCABULARY[0]]

    def build(self, mgvq: str | Path | None) -> "Runner":
        frozen = None
        if self.model.has_mgvq:
            path = mgvq or self.reader.config.mgvq_checkpoint
            if not path:
                raise ConfigError(f"{self.path} makes anchors of MGVQ's codes: name the MGVQ file that its codes were made with (--mgvq)")
            frozen = load_mgvq(path, self.model.mgvq, encoder_only=True).state_dict()
        tensors = {name: self.reader.tensor(name).float() for name in self.reader.names}
        return Runner(hf_from_tensors(self.model, tensors, frozen), _htc_image)


class Folder:
    """A Hugging Face folder's tensors under the names of the export."""

    def __init__(self, path: Path):
        self.path, self.found = path, recognise(path)
        self.voco_id = self.found.sizes.get("method", {}).get("voco_token_id")
        self.tower_layers = self.found.sizes.get("vision", {}).get("num_layers", math.inf)
        self.places = dict(self.found.names)
        if self.found.sizes.get("backbone", {}).get("tie_word_embeddings"):
            self.places.setdefault(VOCABULARY[1], self.places[VOCABULARY[0]])
        self.names = [*self.places, *([VOCO_ROW] if self.voco_id is not None else [])]

    def tensor(self, name: str) -> Tensor:
        found = self.found
        if name == VOCO_ROW:
            return found.source.tensor(found.names[VOCABULARY[0]])[self.voco_id]
        return found.source.tensor(self.places[name])

    def build(self, mgvq: str | Path | None) -> "Runner":
        return _runner(self.path, self.found)


PictureInputs = Callable[[Any, Image.Image], tuple[list[int], dict[str, Tensor]]]


class Runner:
    """A model that gives logits of text; with `image`, which gives the ids and inputs of a picture, also behind one."""

    def __init__(self, model: Any, image: PictureInputs | None = None):
        self.model, self.image = model.eval(), image

    @torch.no_grad()
    def logits(self, before: list[int], after: list[int], picture: Image.Image | None) -> Tensor:
        """[len(before) + len(after), vocabulary], fp32, of the text's rows."""
        run, inputs = self.image(self.model.config, picture) if picture is not None else ([], {})
        ids = torch.tensor([before + run + after])
        rows = [i for i in range(ids.shape[1]) if not len(before) <= i < len(before) + len(run)]
        return self.model(input_ids=ids, **inputs).logits[0, rows].float()


def _htc_image(config: Any, picture: Image.Image) -> tuple[list[int], dict[str, Tensor]]:
    inputs = {}
    if config.channels != "discrete":
        inputs["pixel_values"] = clip_pixels(picture, config.vision_config.image_size)[None]
    if config.has_mgvq:
        inputs["mgvq_pixel_values"] = mgvq_pixels(picture, config.mgvq_config["image_size"])[None]
    return [config.image_token_id] * config.image_seq_length, inputs


def _llava_image(config: Any, picture: Image.Image) -> tuple[list[int], dict[str, Tensor]]:
    side = config.vision_config.image_size
    count = (side // config.vision_config.patch_size) ** 2
    return [config.image_token_id] * count, {"pixel_values": clip_pixels(picture, side)[None]}


def _runner(path: Path, found: Recognised) -> Runner:
    options = dict(dtype=torch.float32, local_files_only=True)
    if found.family is HTC:
        return Runner(HTCVLMForConditionalGeneration.from_pretrained(path, **options), _htc_image)
    if found.family is LLAVA:
        return Runner(LlavaForConditionalGeneration.from_pretrained(path, **options), _llava_image)
    if found.family is LLAVA_LLAMA:  # transformers has no class of this form: its language model alone
        values = {key: value for key, value in found.config.items() if key not in ("model_type", "architectures")}
        return Runner(LlamaForCausalLM.from_pretrained(path, config=LlamaConfig(**values), **options))
    return Runner(AutoModelForCausalLM.from_pretrained(path, **options))


def open_model(path: str | Path) -> Checkpoint | Folder:
    """A checkpoint (or folder of checkpoints), or a Hugging Face folder. Raises ConfigError or CheckpointError."""
    path = Path(path)
    if (path / MANIFEST).is_file() or (path.is_dir() and checkpoints(path)):
        return Checkpoint(path)
    return Folder(path)


@dataclass
class Difference:
    """A tensor that is not the same: greatest difference of an entry, and the shapes where they differ."""

    name: str
    greatest: float
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None


@dataclass
class Comparison:
    """equal, different: tensors of both, by part. only_a, only_b: names. rounded: tensors compared in the coarser of two types.

    logits: (greatest difference, share of rows whose best token is the same, with a picture), None where not computed.
    """

    equal: dict[str, int] = field(default_factory=dict)
    different: dict[str, list[Difference]] = field(default_factory=dict)
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)
    rounded: int = 0
    rows: list[str] = field(default_factory=list)
    logits: tuple[float, float, bool] | None = None

    def same(self, tolerance: float) -> bool:
        """No common tensor differs, there are some, none is lacking, and logits agree to `tolerance`."""
        return (
            bool(self.equal)
            and not self.lacking
            and not any(self.different.values())
            and (self.logits is None or self.logits[0] <= tolerance)
        )


def compare_tensors(a: Checkpoint | Folder, b: Checkpoint | Folder, progress: Callable[[Iterable], Iterable] = iter) -> Comparison:
    """Every tensor of either. Of vocabulary matrices the rows of both are compared, the `<voco>` row apart."""
    found = Comparison()
    known = set(b.names)
    found.only_a = [name for name in a.names if name not in known]
    found.only_b = sorted(known - set(a.names))
    both = {part_named(name) for name in a.names} & {part_named(name) for name in b.names} - {None}
    layers = min(model.tower_layers for model in (a, b))
    found.lacking = [n for n in (*found.only_a, *found.only_b) if part_named(n) in both and not is_spare(n, layers)]
    voco = {model.voco_id for model in (a, b)} - {None}
    for name in progress([name for name in a.names if name in known]):
        one, other = a.tensor(name), b.tensor(name)
        part = part_named(name) or VOCO_ROW
        if name in VOCABULARY and one.shape[1:] == other.shape[1:]:
            count = min(len(one), len(other))
            if len(one) != len(other):
                found.rows.append(f"{name}: {len(one)} rows and {len(other)}, the first {count} compared")
            one, other = one[:count], other[:count]
            if name == VOCABULARY[0] and any(row < count for row in voco):
                kept = torch.tensor([row for row in range(count) if row not in voco])
                one, other = one[kept], other[kept]
        if one.shape != other.shape:
            difference = Difference(name, float("nan"), (tuple(one.shape), tuple(other.shape)))
        else:
            found.rounded += one.dtype != other.dtype
            greatest = _greatest(one, other)
            difference = Difference(name, greatest) if greatest else None
        if difference is None:
            found.equal[part] = found.equal.get(part, 0) + 1
        else:
            found.different.setdefault(part, []).append(difference)
    return found


def _greatest(one: Tensor, other: Tensor) -> float:
    """Greatest difference of an entry, in the coarser of both types; infinite where one side is not a number."""
    coarser = min(one.dtype, other.dtype, key=lambda dtype: torch.finfo(dtype).bits) if one.is_floating_point() else one.dtype
    one, other = one.to(coarser), other.to(coarser)
    if torch.equal(one, other):
        return 0.0
    greatest = 0.0
    for x, y in zip(one.reshape(-1).split(1 << 24), other.reshape(-1).split(1 << 24), strict=True):
        distance = (x.double() - y.double()).abs().max()
        greatest = max(greatest, float(distance) if torch.isfinite(distance) else float("inf"))
    return greatest


def compare_logits(
    a: Checkpoint | Folder, b: Checkpoint | Folder, picture: Image.Image | None, mgvq: str | Path | None = None, seed: int = 0
) -> tuple[float, float, bool]:
    """Greatest difference of a logit, share of text rows with the same best token, and whether the picture was looked at.

    Both models read the same random token ids, behind the same picture if both can see. One of them is in memory at a time.
    """
    size = min(_vocabulary(model) for model in (a, b))
    generator = torch.Generator().manual_seed(seed)
    taken = {model.voco_id for model in (a, b)} | {m.found.config.get("image_token_index") for m in (a, b) if isinstance(m, Folder)}
    ids = [i for i in torch.randint(3, size, (LENGTH,), generator=generator).tolist() if i not in taken]
    sees = picture is not None and all(_sees(model) for model in (a, b))
    half = len(ids) // 3
    found = []
    for model in (a, b):
        runner = model.build(mgvq)
        found.append(runner.logits(ids[:half], ids[half:], picture if sees else None)[:, :size])
        del runner
    one, other = found
    return float((one - other).abs().max()), float((one.argmax(-1) == other.argmax(-1)).float().mean()), sees


def _sees(model: Checkpoint | Folder) -> bool:
    return isinstance(model, Checkpoint) or model.found.family in (HTC, LLAVA)


def _vocabulary(model: Checkpoint | Folder) -> int:
    """Rows of the embedding."""
    if isinstance(model, Checkpoint):
        return model.model.backbone.vocab_size
    if "backbone" not in model.found.parts:
        raise ConfigError(f"{model.path} is {model.found.family.title}, which gives no logits; --no-logits compares tensors alone")
    return model.found.source.shapes[model.found.names[VOCABULARY[0]]][0]


def report(found: Comparison, tolerance: float, listed: int = 12) -> Iterator[str]:
    """The comparison as lines of a table and a verdict."""
    yield f"{'part':<12}{'equal':>8}{'different':>11}"
    for part in dict.fromkeys((*found.equal, *found.different)):
        yield f"{part:<12}{found.equal.get(part, 0):>8}{len(found.different.get(part, [])):>11}"
    if found.rounded:
        yield f"{found.rounded} tensors have another type in A than in B and were compared in the coarser one"
    yield from found.rows
    for title, names in (("only in A", found.only_a), ("only in B", found.only_b)):
        if names:
            yield f"{title}: {len(names)}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
    if found.lacking:
        yield f"{len(found.lacking)} of these should be in both: {', '.join(found.lacking[:4])}{', ...' if len(found.lacking) > 4 else ''}"
    different = [difference for group in found.different.values() for difference in group]
    for difference in different[:listed]:
        seen = (
            f"shapes {difference.shapes[0]} and {difference.shapes[1]}"
            if difference.shapes
            else f"differs by up to {difference.greatest:.3g}"
        )
        yield f"  {difference.name}: {seen}"
    if len(different) > listed:
        yield f"  and {len(different) - listed} more"
    if found.logits is not None:
        greatest, agree, sees = found.logits
        what = "text behind a picture" if sees else "text alone"
        yield f"logits of {what}: differ by up to {greatest:.3g} (tolerance {tolerance:g}); same best token in {agree:.0%} of rows"
    yield "the same" if found.same(tolerance) else "NOT the same"
