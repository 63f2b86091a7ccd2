"""The one table of weights: our name, Hugging Face's name(s) and how tensor parallelism cuts each of them.

A checkpoint stores every weight in its *stored global form*, which no layout can be read from: the true vocabulary
without padding rows, gate and up projection as [2, ffn, H], fused qkv in mcore's order (per key/value group its query
heads, then the key head, then the value head; Megatron-LM `Attention.linear_qkv`). LoRA's adapters are rows like any
other: one A [rank, in] and one B [out, rank] for each Hugging Face linear that is a target, those of a fused linear stored
together.
"""

from dataclasses import dataclass
from typing import Literal

from htc_megatron.config import ConfigError, ModelConfig

Rule = Literal["replicated", "column", "row", "vocab", "qkv", "gated", "stacked"]

# One row a weight: (our name, stored shape, rule, Hugging Face name, present if).
# {i} is the global layer number; {x} runs over the Hugging Face linears in one of ours (LINEARS), in an adapter's row over
# those that are targets: n of them.
# Sizes: H, F, V hidden, MLP and vocabulary size of the backbone, QKV the heads of a row's linears, R an adapter's rank;
# h, f of the tower and the Q-Former, P its positions (patches and CLS), p its patch; M queries; A, D width and output of the
# anchors' projector, q its input; C, c codebook rows and columns.
_VIS, _VIT, _LLM = "frontend.vision.", "model.vision_tower.", "model.language_model."
_RES = "frontend.resampler."
_VIS_I, _VIT_I = _VIS + "encoder.layers.{i}.", _VIT + "encoder.layers.{i}."
_DEC_I, _LLM_I = "backbone.decoder.layers.{i}.", _LLM + "layers.{i}."


def _norm_rows(name: str) -> list[tuple[str, str, Rule]]:
    return [(f"{name}.weight", "h", "replicated"), (f"{name}.bias", "h", "replicated")]


def _linear_rows(name: str, outputs: str, inputs: str, rule: Rule) -> list[tuple[str, str, Rule]]:
    return [(f"{name}.weight", f"{outputs} {inputs}", rule), (f"{name}.bias", outputs, rule if rule == "column" else "replicated")]


# Name, shape and rule of the Q-Former's weights, which are named alike in the export.
_QFORMER = [
    ("queries", "M h", "replicated"),
    *_norm_rows("input_layernorm"),
    *(
        row
        for name in ("self_attention", "cross_attention")
        for row in (
            *_norm_rows(f"layers.{{i}}.{name}.layernorm"),
            *(row for x in ("q_proj", "k_proj", "v_proj") for row in _linear_rows(f"layers.{{i}}.{name}.{x}", "h", "h", "column")),
            *_linear_rows(f"layers.{{i}}.{name}.out_proj", "h", "h", "row"),
        )
    ),
    *_norm_rows("layers.{i}.mlp.layernorm"),
    *_linear_rows("layers.{i}.mlp.fc1", "f", "h", "column"),
    *_linear_rows("layers.{i}.mlp.fc2", "h", "f", "row"),
    *_norm_rows("final_layernorm"),
]
TABLE: tuple[tuple[str, str, Rule, str, str], ...] = (
    ("frontend.voco.weight", "1 H", "replicated", "", "voco"),  # in the export: row voco_token_id of embed_tokens
    ("frontend.codebook.weight", "C c", "replicated", "model.mgvq.quantize.embedding.weight", "mgvq"),
    ("frontend.anchors.fc1.weight", "A q", "column", "model.anchors.fc1.weight", "discrete"),
    ("frontend.anchors.fc1.bias", "A", "column", "model.anchors.fc1.bias", "discrete"),
    ("frontend.anchors.fc2.weight", "D A", "row", "model.anchors.fc2.weight", "discrete"),
    ("frontend.anchors.fc2.bias", "D", "replicated", "model.anchors.fc2.bias", "discrete"),
    *((_RES + name, shape, rule, "model.resampler." + name, "qformer") for name, shape, rule in _QFORMER),
    ("frontend.projector.fc1.weight", "H h", "column", "model.projector.fc1.weight", "continuous"),
    ("frontend.projector.fc1.bias", "H", "column", "model.projector.fc1.bias", "continuous"),
    ("frontend.projector.fc2.weight", "H H", "row", "model.projector.fc2.weight", "mlp"),
    ("frontend.projector.fc2.bias", "H", "replicated", "model.projector.fc2.bias", "mlp"),
    (_VIS + "patch_embedding.weight", "h 3 p p", "replicated", _VIT + "embeddings.patch_embedding.weight", "continuous"),
    (_VIS + "class_embedding", "h", "replicated", _VIT + "embeddings.class_embedding", "continuous"),
    (_VIS + "position_embedding.weight", "P h", "replicated", _VIT + "embeddings.position_embedding.weight", "continuous"),
    (_VIS + "pre_layernorm.weight", "h", "replicated", _VIT + "pre_layrnorm.weight", "continuous"),  # sic, in transformers
    (_VIS + "pre_layernorm.bias", "h", "replicated", _VIT + "pre_layrnorm.bias", "continuous"),
    (_VIS_I + "input_layernorm.weight", "h", "replicated", _VIT_I + "layer_norm1.weight", "continuous"),
    (_VIS_I + "input_layernorm.bias", "h", "replicated", _VIT_I + "layer_norm1.bias", "continuous"),
    (_VIS_I + "self_attention.linear_qkv.weight", "3h h", "qkv", _VIT_I + "self_attn.{x}.weight", "continuous"),
    (_VIS_I + "self_attention.linear_qkv.bias", "3h", "qkv", _VIT_I + "self_attn.{x}.bias", "continuous"),
    (_VIS_I + "self_attention.linear_proj.weight", "h h", "row", _VIT_I + "self_attn.out_proj.weight", "continuous"),
    (_VIS_I + "self_attention.linear_proj.bias", "h", "replicated", _VIT_I + "self_attn.out_proj.bias", "continuous"),
    (_VIS_I + "pre_mlp_layernorm.weight", "h", "replicated", _VIT_I + "layer_norm2.weight", "continuous"),
    (_VIS_I + "pre_mlp_layernorm.bias", "h", "replicated", _VIT_I + "layer_norm2.bias", "continuous"),
    (_VIS_I + "mlp.linear_fc1.weight", "f h", "column", _VIT_I + "mlp.fc1.weight", "continuous"),
    (_VIS_I + "mlp.linear_fc1.bias", "f", "column", _VIT_I + "mlp.fc1.bias", "continuous"),
    (_VIS_I + "mlp.linear_fc2.weight", "h f", "row", _VIT_I + "mlp.fc2.weight", "continuous"),
    (_VIS_I + "mlp.linear_fc2.bias", "h", "replicated", _VIT_I + "mlp.fc2.bias", "continuous"),
    ("backbone.embedding.word_embeddings.weight", "V H", "vocab", _LLM + "embed_tokens.weight", ""),
    (_DEC_I + "input_layernorm.weight", "H", "replicated", _LLM_I + "input_layernorm.weight", ""),
    (_DEC_I + "self_attention.linear_qkv.weight", "QKV H", "qkv", _LLM_I + "self_attn.{x}.weight", ""),
    (_DEC_I + "self_attention.linear_qkv.bias", "QKV", "qkv", _LLM_I + "self_attn.{x}.bias", "qkv_bias"),
    (_DEC_I + "self_attention.linear_proj.weight", "H H", "row", _LLM_I + "self_attn.{x}.weight", ""),
    (_DEC_I + "pre_mlp_layernorm.weight", "H", "replicated", _LLM_I + "post_attention_layernorm.weight", ""),
    (_DEC_I + "mlp.linear_fc1.weight", "2 F H", "gated", _LLM_I + "mlp.{x}.weight", ""),
    (_DEC_I + "mlp.linear_fc2.weight", "H F", "row", _LLM_I + "mlp.{x}.weight", ""),
    ("backbone.decoder.final_layernorm.weight", "H", "replicated", _LLM + "norm.weight", ""),
    ("backbone.output_layer.weight", "V H", "vocab", "lm_head.weight", "untied"),
    (_DEC_I + "self_attention.linear_qkv.lora_A", "n R H", "stacked", _LLM_I + "self_attn.{x}.lora_A.weight", "lora"),
    (_DEC_I + "self_attention.linear_qkv.lora_B", "QKV R", "qkv", _LLM_I + "self_attn.{x}.lora_B.weight", "lora"),
    (_DEC_I + "self_attention.linear_proj.lora_A", "R H", "row", _LLM_I + "self_attn.{x}.lora_A.weight", "lora"),
    (_DEC_I + "self_attention.linear_proj.lora_B", "H R", "replicated", _LLM_I + "self_attn.{x}.lora_B.weight", "lora"),
    (_DEC_I + "mlp.linear_fc1.lora_A", "n R H", "stacked", _LLM_I + "mlp.{x}.lora_A.weight", "lora"),
    (_DEC_I + "mlp.linear_fc1.lora_B", "n F R", "gated", _LLM_I + "mlp.{x}.lora_B.weight", "lora"),
    (_DEC_I + "mlp.linear_fc2.lora_A", "R F", "row", _LLM_I + "mlp.{x}.lora_A.weight", "lora"),
    (_DEC_I + "mlp.linear_fc2.lora_B", "H R", "replicated", _LLM_I + "mlp.{x}.lora_B.weight", "lora"),
)
# Hugging Face's linears in each of ours, in the order in which ours fuses them. LoRA's targets are named by them, as in peft.
LINEARS = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}


# The parts of a model, by the beginnings of their weights' names; LoRA's adapters are none of the backbone. All but the codebook,
# which is frozen always, may be named in `training.freeze`.
COMPONENTS = {
    "vision": "frontend.vision.",
    "resampler": _RES,
    "projector": "frontend.projector.",
    "anchors": "frontend.anchors.",
    "voco": "frontend.voco.",
    "codebook": "frontend.codebook.",
    "backbone": "backbone.",
}
ADAPTER = "adapter"


@dataclass(frozen=True)
class Weight:
    """One weight of a model.

    name: global name, `{i}` filled with the global layer number.
    shape: stored global shape.
    rule: replicated | column (dim 0 cut) | row (dim 1 cut) | vocab (dim 0 cut after padding to a multiple of TP) |
        qkv (dim 0 cut by key/value groups) | gated ([linears, ffn, ...], dim 1 cut) | stacked ([linears, ...], whole on
        every TP rank).
    hf: names in the export; qkv, gated and stacked have one for each of their linears, all others one.
    groups, queries_per_group, head_dim: of a qkv weight; 0 otherwise.
    linears: Hugging Face's linears that a weight is of, in hf's order: all that ours fuses, in an adapter the targets among
        them. Empty for weights that are of none; a qkv weight without any named has q, k and v.
    adapted: those of a backbone weight's linears that have adapters, stored under its name with lora_A and lora_B for weight.
    """

    name: str
    shape: tuple[int, ...]
    rule: Rule
    hf: tuple[str, ...]
    groups: int = 0
    queries_per_group: int = 0
    head_dim: int = 0
    linears: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()

    @property
    def is_cut(self) -> bool:
        """Whether TP ranks hold different parts of it; otherwise each holds all of it."""
        return self.rule not in ("replicated", "stacked")

    @property
    def heads_per_group(self) -> tuple[int, ...]:
        """Heads that each of a qkv weight's linears has in one key/value group."""
        return tuple(self.queries_per_group if x == "q_proj" else 1 for x in self.linears or LINEARS["linear_qkv"])


@dataclass(frozen=True)
class Partition:
    """What one tensor-parallel rank holds of a weight.

    local_shape: shape of the parameter as the rank's module holds it.
    view_shape: the same memory seen with the stored form's dimensions; in local_shape the first two of `gated` and
        `stacked` are one.
    offset: place of the view's first element in the stored global tensor.
    size: part of the view, from its first element on, that exists in the stored tensor; smaller than view_shape only
        where a `vocab` shard holds padding rows (possibly 0 rows).
    """

    local_shape: tuple[int, ...]
    view_shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]


def hf_names(name: str, hf: str) -> list[str]:
    """Names of all tensors that a row of the table may stand for in the export, `{i}` left open."""
    return [hf.replace("{x}", x) for x in _linears(name, hf) or ("",)] if hf else []


def _linears(name: str, hf: str) -> tuple[str, ...]:
    """Hugging Face's linears in a row of the table."""
    return LINEARS[name.split(".")[-2]] if "{x}" in hf else ()


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Rows of the embedding over all TP ranks: the next multiple of `tp_size`. Rows beyond `vocab_size` are never stored."""
    return -(-vocab_size // tp_size) * tp_size


def partition(weight: Weight, tp_rank: int = 0, tp_size: int = 1) -> Partition:
    """The share of TP rank `tp_rank` of `tp_size`. Raises ConfigError where the weight cannot be cut into equal shares."""
    if not 0 <= tp_rank < tp_size:
        raise ConfigError(f"TP rank {tp_rank} does not exist among {tp_size}")
    shape = weight.shape
    if not weight.is_cut:
        local = (shape[0] * shape[1], *shape[2:]) if weight.rule == "stacked" else shape
        return Partition(local, shape, (0,) * len(shape), shape)
    if weight.rule == "vocab":
        rows = padded_vocab_size(shape[0], tp_size) // tp_size
        view = (rows, *shape[1:])
        first = min(tp_rank * rows, shape[0])
        return Partition(view, view, (first, *(0,) * (len(shape) - 1)), (min(rows, shape[0] - first), *shape[1:]))
    dim = 1 if weight.rule in ("row", "gated") else 0
    whole = weight.groups if weight.rule == "qkv" else shape[dim]
    if whole % tp_size:
        what = "key/value groups" if weight.rule == "qkv" else f"entries of dimension {dim}"
        raise ConfigError(f"{weight.name}: {whole} {what} cannot be split over tensor_model_parallel_size {tp_size}; it must divide them")
    share = shape[dim] // tp_size
    view = (*shape[:dim], share, *shape[dim + 1 :])
    offset = tuple(tp_rank * share if d == dim else 0 for d in range(len(shape)))
    local = (shape[0] * share, *shape[2:]) if weight.rule == "gated" else view
    return Partition(local, view, offset, view)


def weights(model: ModelConfig) -> list[Weight]:
    """Every weight a model of this configuration holds, frozen ones included, in the table's order."""
    method, bb, vision, mgvq, lora = model.method, model.backbone, model.vision, model.mgvq, model.lora
    present = {
        "": True,
        "voco": method.num_voco_tokens > 0,
        "discrete": method.channels != "continuous",
        "mgvq": model.has_mgvq,
        "continuous": model.has_tower,
        "qformer": model.has_qformer,
        "mlp": model.has_tower and method.projector == "mlp2x_gelu",
        "qkv_bias": bb.qkv_bias,
        "untied": not bb.tie_word_embeddings,
        "lora": lora.rank > 0,
    }
    head_dim = bb.hidden_size // bb.num_attention_heads
    sizes = {"H": bb.hidden_size, "F": bb.ffn_hidden_size, "V": bb.vocab_size, "R": lora.rank}
    sizes |= {"h": vision.hidden_size, "3h": 3 * vision.hidden_size, "f": vision.ffn_hidden_size}
    sizes |= {"P": vision.num_patches + 1, "p": vision.patch_size, "M": method.num_resampled_tokens}
    sizes |= {"A": method.anchor_hidden_size, "D": method.num_anchors * bb.hidden_size, "q": model.anchor_inputs}
    sizes |= {"C": mgvq.codebook_size, "c": mgvq.group_channels}
    heads = {
        _VIS: (vision.num_attention_heads, 1, vision.hidden_size // vision.num_attention_heads),
        "backbone.": (bb.num_query_groups, bb.num_attention_heads // bb.num_query_groups, head_dim),
    }
    depths = {_VIS: vision.num_layers, _RES: method.resampler_layers, "backbone.": bb.num_layers}
    found = []
    for name, symbols, rule, hf, condition in TABLE:
        linears = _linears(name, hf)
        targets = tuple(x for x in linears if lora.rank and x in lora.targets)
        if not present[condition] or (condition == "lora" and not targets):
            continue
        if condition == "lora":
            linears, targets = targets, ()
        elif not name.startswith("backbone.") or not name.endswith(".weight"):
            targets = ()
        layers = next(depth for key, depth in depths.items() if name.startswith(key)) if "{i}" in name else 1
        rows = {"n": len(linears), "QKV": head_dim * sum(bb.num_attention_heads if x == "q_proj" else bb.num_query_groups for x in linears)}
        shape = tuple(int(s) if s.isdigit() else (sizes | rows)[s] for s in symbols.split())
        qkv = next(value for key, value in heads.items() if name.startswith(key)) if rule == "qkv" else (0, 0, 0)
        for i in range(layers):
            theirs = tuple(hf.format(i=i, x=x) for x in linears or ("",)) if hf else ()
            found.append(Weight(name.format(i=i), shape, rule, theirs, *qkv, linears, targets))
    return found


def is_adapter(name: str) -> bool:
    """Whether a weight of this name is a part of a LoRA adapter."""
    return name.endswith((".lora_A", ".lora_B"))


def component(name: str) -> str:
    """The part of a model that a weight of this name belongs to: one of COMPONENTS, or `adapter`."""
    return ADAPTER if is_adapter(name) else next(part for part, prefix in COMPONENTS.items() if name.startswith(prefix))
