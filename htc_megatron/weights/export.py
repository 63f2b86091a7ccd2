"""From a checkpoint to a Hugging Face folder: weights, configuration, processor and the code that loads them."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig, PreTrainedTokenizerBase, Qwen2Config

import htc_megatron.hf
from htc_megatron.config import BackboneConfig, ConfigError, ModelConfig, RunConfig
from htc_megatron.hf.configuration_htc_vlm import HTCVLMConfig
from htc_megatron.hf.modeling_htc_vlm import HTCVLMForConditionalGeneration
from htc_megatron.hf.processing_htc_vlm import SYSTEM_PROMPT, HTCVLMImageProcessor, HTCVLMProcessor, vicuna_template
from htc_megatron.model.mgvq import load_mgvq
from htc_megatron.weights.convert import merge_lora, to_hf
from htc_megatron.weights.families import METHOD_FIELDS, TEXT_FIELDS, VISION_FIELDS
from htc_megatron.weights.safetensors_stream import Entry, write_files
from htc_megatron.weights.table import Weight, is_adapter, weights
from htc_megatron.weights.tokenizer import export_tokenizer

STORED = "stored"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MGVQ_PREFIX, LM_HEAD = "model.mgvq.", "lm_head.weight"
EMBEDDING, VOCO, CODEBOOK = "backbone.embedding.word_embeddings.weight", "frontend.voco.weight", "frontend.codebook.weight"
CODE_PARTS = ("anchors", "cache", "configuration", "generation", "image", "mask", "modeling", "processing", "resampler")
CODE_FILES = (*(f"{part}_htc_vlm" for part in CODE_PARTS), "modeling_mgvq")
AUTO_CONFIG = {  # in config.json; the processor's file gets its own from register_for_auto_class
    "AutoConfig": "configuration_htc_vlm.HTCVLMConfig",
    "AutoModel": "modeling_htc_vlm.HTCVLMModel",
    "AutoModelForImageTextToText": "modeling_htc_vlm.HTCVLMForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_htc_vlm.HTCVLMForConditionalGeneration",
    "AutoProcessor": "processing_htc_vlm.HTCVLMProcessor",
}
MAX_NEW_TOKENS = 256  # what pipeline() takes too; without it generate() stops after 20


class Reader(Protocol):
    """What an export needs of a checkpoint."""

    config: RunConfig

    @property
    def names(self) -> list[str]: ...

    def tensor(self, name: str) -> Tensor: ...

    def dtype(self, name: str) -> torch.dtype: ...


@dataclass(frozen=True)
class Exported:
    """What was written. num_tensors and num_parameters: of the exported model."""

    folder: Path
    files: list[str]
    num_tensors: int
    num_parameters: int

    @classmethod
    def of(cls, folder: Path, files: list[str], entries: list[Entry]) -> "Exported":
        return cls(folder, files, len(entries), sum(entry.nbytes // entry.dtype.itemsize for entry in entries))


def hf_config(model: ModelConfig, dtype: torch.dtype = torch.float32) -> HTCVLMConfig:
    """The export's configuration, without token ids other than the voco's."""
    vision, method = model.vision, model.method
    clip = CLIPVisionConfig(**{theirs: getattr(vision, ours) for ours, theirs in VISION_FIELDS.items()}, hidden_act="quick_gelu")
    return HTCVLMConfig(
        text_config=text_config(model.backbone),
        vision_config=clip,
        mgvq_config={name: list(value) if isinstance(value, tuple) else value for name, value in asdict(model.mgvq).items()},
        image_token_id=method.voco_token_id,
        dtype=dtype,
        **{name: getattr(method, name) for name in METHOD_FIELDS},
    )


def text_config(backbone: BackboneConfig) -> LlamaConfig | Qwen2Config:
    """The backbone's configuration in transformers, untied and without token ids."""
    common: dict[str, Any] = dict(
        **{theirs: getattr(backbone, ours) for ours, theirs in TEXT_FIELDS.items()},
        rope_parameters={"rope_type": "default", "rope_theta": backbone.rotary_base},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return Qwen2Config(**common) if backbone.qkv_bias else LlamaConfig(**common)


def hf_tensors(model: ModelConfig, tensor: Callable[[str], Tensor], mgvq: dict[str, Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything in the export, one weight in memory at a time.

    tensor: the stored global form of a weight by its global name. mgvq: state dict of the frozen encoder and quantiser, needed
    where anchors are MGVQ's; its codebook must be the one that the model was trained with. Raises ConfigError.
    """
    table = {weight.name: weight for weight in weights(model)}
    for weight in base_weights(model):
        if weight.name == VOCO:
            continue
        value = tensor(weight.name)
        if weight.name == EMBEDDING and model.backbone.tie_word_embeddings:
            yield LM_HEAD, value  # the output layer's own from here on: its voco row is the table's, the embedding's is not
        if weight.name == EMBEDDING and VOCO in table:
            row = tensor(VOCO)
            to_hf(table[VOCO], row)  # checks its shape; it has no tensor of its own there
            value = value.clone()
            value[model.method.voco_token_id] = row[0].to(value.dtype)
        if weight.name == CODEBOOK:
            value = _codebook(value, mgvq)
        yield from to_hf(weight, value).items()
    if model.has_mgvq:
        for name, value in (mgvq or {}).items():
            if name != "quantize.embedding.weight":
                yield MGVQ_PREFIX + name, value


def base_weights(model: ModelConfig) -> list[Weight]:
    """The weights that are left when adapters are merged into theirs or taken off."""
    return [weight for weight in weights(model) if not is_adapter(weight.name)]


def merged(model: ModelConfig, tensor: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """`tensor`, by name, with the adapters of the backbone's linears added to them."""
    adapted = {weight.name: weight for weight in weights(model) if weight.adapted}

    def read(name: str) -> Tensor:
        value = tensor(name)
        if name not in adapted:
            return value
        lora_a, lora_b = (tensor(name.removesuffix("weight") + part) for part in ("lora_A", "lora_B"))
        return merge_lora(adapted[name], value, lora_a, lora_b, model.lora.scale)

    return read


def _codebook(trained: Tensor, mgvq: dict[str, Tensor] | None) -> Tensor:
    if mgvq is None:
        raise ConfigError("the model has a discrete channel, so the export needs the MGVQ file that its codes were made with (--mgvq)")
    given = mgvq["quantize.embedding.weight"]
    if given.shape != trained.shape or not torch.equal(given.to(trained.dtype), trained):
        raise ConfigError("the MGVQ file's codebook is not the one in the checkpoint; give the file that the model was trained with")
    return given


def hf_from_tensors(
    model: ModelConfig, tensors: dict[str, Tensor], mgvq: dict[str, Tensor] | None = None, dtype: torch.dtype = torch.float32
) -> HTCVLMForConditionalGeneration:
    """The Hugging Face model of weights in their stored global form, in memory, in eval mode."""
    _check_names(model, tensors)
    built = HTCVLMForConditionalGeneration(hf_config(model, dtype)).eval()
    built.load_state_dict(dict(hf_tensors(model, merged(model, tensors.__getitem__), mgvq)), strict=True)
    for name, parameter in built.named_parameters():
        parameter.data = parameter.data.to(_dtype(name, dtype))
    return built


def _dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name.startswith(MGVQ_PREFIX) else dtype  # codes are an argmax: other precision, other codes


def export(
    reader: Reader,
    out: str | Path,
    mgvq: str | Path | None = None,
    tokenizer: str | Path | None = None,
    dtype: str | None = None,
    system: str = SYSTEM_PROMPT,
    merge: bool = True,
    shard_bytes: int = 5 * 10**9,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Exported:
    """Write the checkpoint behind `reader` as a Hugging Face folder `out`, which must not exist yet.

    mgvq, tokenizer: files, if others than the run's own. dtype: fp32 | bf16 | fp16 | stored (each weight in the checkpoint's type),
    by default the run's precision; MGVQ stays in fp32. system: system prompt of the chat template. Everything is checked before a
    byte is written, and the folder appears only when it is complete. merge: add LoRA's adapters to the weights, or leave them out:
    the model that an exported adapter belongs to. Raises ConfigError.
    """
    config = reader.config
    model = config.model
    out, kind_of = check_export(reader, out, dtype)
    words = export_tokenizer(tokenizer or config.tokenizer, model.method.voco_token_id, model.backbone.vocab_size)
    frozen = None
    if model.has_mgvq:
        path = mgvq or config.mgvq_checkpoint
        if not path:
            raise ConfigError("the model has a discrete channel, so the export needs the MGVQ file that its codes were made with (--mgvq)")
        frozen = load_mgvq(path, model.mgvq, encoder_only=True).state_dict()
    settings = hf_config(model, kind_of(EMBEDDING))
    entries = planned_entries(model, settings, frozen, kind_of)

    read = merged(model, reader.tensor) if merge else reader.tensor
    with new_folder(out) as temporary:
        kinds = {entry.name: entry.dtype for entry in entries}
        stream = ((name, tensor.to(kinds[name])) for name, tensor in hf_tensors(model, read, frozen))
        files = write_files(temporary, entries, progress(stream), shard_bytes)
        _write_settings(temporary, settings, words, system)
    return Exported.of(out, files, entries)


def check_export(reader: Reader, out: str | Path, dtype: str | None) -> tuple[Path, Callable[[str], torch.dtype]]:
    """Refuse what no export of `reader` to `out` can be. Returns the new folder's path and the type of each weight by its name."""
    out = Path(out)
    if out.exists():
        raise ConfigError(f"{out} exists already; wanted a new folder to export to")
    if dtype is not None and dtype not in (*DTYPES, STORED):
        raise ConfigError(f"dtype is {dtype!r}; wanted one of {', '.join((*DTYPES, STORED))}")
    _check_names(reader.config.model, reader.names)
    if dtype == STORED:
        return out, reader.dtype
    kind = DTYPES[dtype or reader.config.training.precision]
    return out, lambda name: kind


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into that gets its name at the end of the block, and is gone after an error in it."""
    temporary = out.parent / f".{out.name}.{os.getpid()}.partial"
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _check_names(model: ModelConfig, found: Iterable[str]) -> None:
    wanted, found = {weight.name for weight in weights(model)}, set(found)
    faults = [f"{kind}: {', '.join(sorted(names))}" for kind, names in (("missing", wanted - found), ("unknown", found - wanted)) if names]
    if faults:
        raise ConfigError(f"the checkpoint's weights are not those of its configuration; {'; '.join(faults)}")


def planned_entries(
    model: ModelConfig, settings: HTCVLMConfig, mgvq: dict[str, Tensor] | None, kind_of: Callable[[str], torch.dtype]
) -> list[Entry]:
    """All tensors in the order in which they will come; they must be exactly those of the model that will load them.

    kind_of: type of a weight by its global name.
    """

    def nothing(weight: Weight) -> Tensor:
        return torch.empty(weight.shape, device="meta")

    shapes: dict[str, tuple[int, ...]] = {}
    kinds: dict[str, torch.dtype] = {}
    for weight in base_weights(model):
        parts = {name: tuple(tensor.shape) for name, tensor in to_hf(weight, nothing(weight)).items()}
        if weight.name == EMBEDDING and model.backbone.tie_word_embeddings:
            parts = {LM_HEAD: weight.shape, **parts}
        shapes |= parts
        kinds |= {name: _dtype(name, kind_of(weight.name)) for name in parts}
    shapes |= {MGVQ_PREFIX + name: tuple(tensor.shape) for name, tensor in (mgvq or {}).items() if MGVQ_PREFIX + name not in shapes}
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in HTCVLMForConditionalGeneration(settings).state_dict().items()}
    faults = sorted({name for name, _ in shapes.items() ^ wanted.items()})
    if faults:
        listed = ", ".join(f"{name} (written {shapes.get(name)}, wanted {wanted.get(name)})" for name in faults)
        raise ConfigError(f"the export does not fit the model that loads it: {listed}")
    return [Entry(name, shape, kinds.get(name, torch.float32)) for name, shape in shapes.items()]


def _write_settings(folder: Path, settings: HTCVLMConfig, tokenizer: PreTrainedTokenizerBase, system: str) -> None:
    """Configuration, generation defaults, processor and the code that trust_remote_code loads."""
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, value in special.items():
        setattr(settings.text_config, name, value)
    settings.architectures = ["HTCVLMForConditionalGeneration"]
    settings.auto_map = dict(AUTO_CONFIG)
    settings.save_pretrained(folder)
    GenerationConfig(max_new_tokens=MAX_NEW_TOKENS, **special).save_pretrained(folder)
    pixels = settings.channels if settings.has_mgvq else "continuous"  # which of both kinds the model takes
    images = HTCVLMImageProcessor(settings.vision_config.image_size, settings.mgvq_config["image_size"], pixels)
    template = vicuna_template(system)
    processor = HTCVLMProcessor(images, tokenizer, chat_template=template, num_image_tokens=settings.image_seq_length)
    processor.save_pretrained(folder)
    source = Path(htc_megatron.hf.__file__).parent
    for name in CODE_FILES:
        shutil.copyfile(source / f"{name}.py", folder / f"{name}.py")
