"""The language model alone, as the plain LlamaForCausalLM or Qwen2ForCausalLM that it is."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast

from htc_megatron.config import ConfigError, ModelConfig
from htc_megatron.weights.convert import to_hf
from htc_megatron.weights.export import EMBEDDING, Exported, Reader, base_weights, check_export, merged, new_folder, text_config
from htc_megatron.weights.families import LLAMA, QWEN2
from htc_megatron.weights.safetensors_stream import Entry, write_files
from htc_megatron.weights.table import Weight
from htc_megatron.weights.tokenizer import open_tokenizer


def export_backbone(
    reader: Reader,
    out: str | Path,
    tokenizer: str | Path | None = None,
    dtype: str | None = None,
    merge: bool = True,
    shard_bytes: int = 5 * 10**9,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Exported:
    """Write the backbone of the checkpoint behind `reader` as a Hugging Face folder `out`, which must not exist yet.

    A `<voco>` row that stands behind all others was added to the vocabulary and is left out. tokenizer: default: the run's own;
    without one the folder has none. dtype, merge: as in `export`. Raises ConfigError.
    """
    out, kind_of = check_export(reader, out, dtype)
    model = reader.config.model
    family = QWEN2 if model.backbone.qkv_bias else LLAMA
    rows = vocabulary(model)
    config = text_config(model.backbone)
    config.vocab_size, config.tie_word_embeddings, config.dtype = rows, model.backbone.tie_word_embeddings, kind_of(EMBEDDING)
    config.architectures = ["Qwen2ForCausalLM" if model.backbone.qkv_bias else "LlamaForCausalLM"]
    words = _words(tokenizer or reader.config.tokenizer, rows)
    if words is not None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(words, name))
    parts = [weight for weight in base_weights(model) if weight.name.startswith("backbone.")]
    read = merged(model, reader.tensor) if merge else reader.tensor

    def tensors(read: Callable[[Weight], Tensor]) -> Iterator[tuple[str, Tensor]]:
        for weight in parts:
            for name, tensor in to_hf(weight, read(weight)).items():
                yield family.theirs(name), (tensor[:rows] if weight.rule == "vocab" else tensor).to(kind_of(weight.name))

    announced = tensors(lambda weight: torch.empty(weight.shape, device="meta"))
    entries = [Entry(name, tuple(tensor.shape), tensor.dtype) for name, tensor in announced]
    with new_folder(out) as temporary:
        files = write_files(temporary, entries, progress(tensors(lambda weight: read(weight.name))), shard_bytes)
        config.save_pretrained(temporary)
        if words is not None:
            words.save_pretrained(temporary)
            GenerationConfig(bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id).save_pretrained(temporary)
    return Exported.of(out, files, entries)


def vocabulary(model: ModelConfig) -> int:
    """Rows of the language model's own vocabulary."""
    size, voco = model.backbone.vocab_size, model.method.voco_token_id
    return size - 1 if voco == size - 1 else size


def _words(path: str | Path, rows: int) -> PreTrainedTokenizerFast | None:
    if not str(path):
        return None
    words = open_tokenizer(path)
    if len(words) > rows + 1:  # a tokenizer may name <voco>, whose row is left out
        raise ConfigError(f"tokenizer {path} has {len(words)} tokens, but the backbone's vocabulary ends at {rows}")
    return words
