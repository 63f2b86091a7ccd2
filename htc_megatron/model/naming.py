"""From a stage's parameters to global weights: names count layers over all stages, shapes are those of the table."""

import re
from typing import NamedTuple

from torch import nn

from htc_megatron.config import ModelConfig
from htc_megatron.weights.table import Weight, weights

_LAYER = re.compile(r"^(backbone\.decoder\.layers\.)(\d+)(\..*)$")


class Entry(NamedTuple):
    """A parameter of this rank's module, its global name and its row of the weights table."""

    name: str
    param: nn.Parameter
    weight: Weight


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay acts on a parameter: on matrices, not on norms, biases, embeddings, the voco row or queries.

    Adapters are matrices: they decay as under transformers' Trainer, where peft leaves the choice.
    """
    shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves a cut parameter with shape [0]
    tables = ("position_embedding", "word_embeddings", "output_layer", "frontend.voco", "resampler.queries")
    return name.startswith("idle_decayed") or (len(shape) > 1 and not any(table in name for table in tables))


def stage_entries(stage: nn.Module, model: ModelConfig, first_layer: int) -> list[Entry]:
    """Every parameter of a pipeline stage with its weight, in the stage's own order (the `idle_` stand-ins left out).

    first_layer: number of the stage's first layer over all stages, from 0.
    Raises RuntimeError for a parameter that the table does not know: it would be lost from every checkpoint.
    """
    table = {weight.name: weight for weight in weights(model)}
    found = []
    for local_name, parameter in stage.named_parameters():
        if local_name.startswith("idle_"):
            continue
        name = _LAYER.sub(lambda m: f"{m[1]}{int(m[2]) + first_layer}{m[3]}", local_name)
        if name not in table:
            raise RuntimeError(f"parameter {local_name!r} has no row in the table of weights")
        found.append(Entry(name, parameter, table[name]))
    return found
