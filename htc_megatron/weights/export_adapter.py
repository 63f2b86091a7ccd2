"""LoRA adapters in peft's format, for the exported model or for its backbone alone."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from htc_megatron.config import ConfigError
from htc_megatron.weights.convert import to_hf
from htc_megatron.weights.export import Exported, Reader, check_export, new_folder
from htc_megatron.weights.families import LLAMA, LLM, PEFT_PREFIX
from htc_megatron.weights.safetensors_stream import Entry, write_files
from htc_megatron.weights.sources import ADAPTERS
from htc_megatron.weights.table import Weight, is_adapter, weights

CONFIG = "adapter_config.json"


def export_adapter(
    reader: Reader,
    out: str | Path,
    base: str | Path = "",
    of_backbone: bool = False,
    dtype: str | None = "fp32",
    progress: Callable[[Iterable], Iterable] = iter,
) -> Exported:
    """Write the adapters of the checkpoint behind `reader` as a peft folder `out`, which must not exist yet.

    base: the model that they belong to, exported without merging; written down for peft, not read. of_backbone: whether that is
    the backbone alone. What else was trained (projectors, voco row) is in the base. Raises ConfigError.
    """
    out, kind_of = check_export(reader, out, dtype)
    lora = reader.config.model.lora
    parts = [weight for weight in weights(reader.config.model) if is_adapter(weight.name)]
    if not parts:
        raise ConfigError("the checkpoint has no adapters (model.lora.rank is 0); export its model instead")

    def tensors(read: Callable[[Weight], Tensor]) -> Iterator[tuple[str, Tensor]]:
        for weight in parts:
            for name, tensor in to_hf(weight, read(weight)).items():
                theirs = PEFT_PREFIX + (LLAMA.theirs(name) if of_backbone else name)
                yield theirs, tensor.to(kind_of(weight.name))

    announced = tensors(lambda weight: torch.empty(weight.shape, device="meta"))
    entries = [Entry(name, tuple(tensor.shape), tensor.dtype) for name, tensor in announced]
    layers = LLAMA.theirs(LLM) if of_backbone else LLM  # CLIP's linears have the same names: a list of them would mean its too
    with new_folder(out) as temporary:
        stream = progress(tensors(lambda weight: reader.tensor(weight.name)))
        (written,) = write_files(temporary, entries, stream, limit=1 << 62)
        (temporary / written).rename(temporary / ADAPTERS[0])
        content = dict(
            peft_type="LORA",
            task_type="CAUSAL_LM" if of_backbone else None,
            base_model_name_or_path=str(base),
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=0.0,
            bias="none",
            target_modules=rf"{layers.replace('.', chr(92) + '.')}.*\.({'|'.join(lora.targets)})",
            inference_mode=True,
        )
        (temporary / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return Exported.of(out, [ADAPTERS[0]], entries)
