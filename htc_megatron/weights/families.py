"""Families of models that are imported: what their files call our weights, and how their config.json gives the sizes.

The table of weights (table.py) says what a model consists of, by the names of our export. A family adds only prefixes: rows
that turn a name of its files into the export's, first match wins, and back for what is exported in its form. Another
LLaMA-like family is another row of FAMILIES.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from transformers import AutoConfig, CLIPVisionConfig, PreTrainedConfig

from htc_megatron.config import ConfigError, LoraTarget, MethodConfig
from htc_megatron.weights.sources import Source, open_source, read_json
from htc_megatron.weights.table import ADAPTER

LLM, HEAD, VIT, PROJECTOR = "model.language_model.", "lm_head.", "model.vision_tower.", "model.projector."
PARTS = {  # what a source may bring, by the prefix of its tensors in the export
    "backbone": (LLM, HEAD),
    "vision": (VIT,),
    "resampler": ("model.resampler.",),
    "projector": (PROJECTOR,),
    "anchors": ("model.anchors.",),
    "mgvq": ("model.mgvq.",),
}
PEFT_PREFIX, CODEBOOK = "base_model.model.", "model.mgvq.quantize.embedding.weight"
_TOWER_LAYER = re.compile(re.escape(VIT) + r"encoder\.layers\.(\d+)\.")
# Values of our configuration by transformers' names; what is no mere name stands in _text and export.text_config.
TEXT_FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "norm_epsilon": "rms_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
}
VISION_FIELDS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "norm_epsilon": "layer_norm_eps",
}
METHOD_FIELDS = (  # named alike in MethodConfig and HTCVLMConfig
    "channels", "num_anchors", "anchor_hidden_size", "anchor_source", "anchor_seed", "projector", "resampler", "num_resampled_tokens",
    "resampler_layers", "fusion", "num_voco_tokens", "mask", "image_sees", "text_sees",
)  # fmt: skip
Sizes = dict[str, dict[str, Any]]  # values of ModelConfig's sections, as far as a source knows them


@dataclass(frozen=True)
class Family:
    """A kind of files.

    model_types: of config.json. rows: (prefix in the files, prefix in the export). ignored: beginnings and ends of names that a
    model of ours has no use for. sizes: config.json -> Sizes; raises ConfigError for what our model is not.
    """

    title: str
    model_types: tuple[str, ...]
    rows: tuple[tuple[str, str], ...]
    ignored: tuple[str, ...] = ()
    sizes: Callable[[Path, dict[str, Any]], Sizes] = field(default=lambda path, config: {})

    def ours(self, name: str) -> str | None:
        """The export's name of a tensor of the files; None if it is left out."""
        if name.startswith(self.ignored) or name.endswith(self.ignored):
            return None
        for theirs, ours in self.rows:
            if name.startswith(theirs):
                return ours + name.removeprefix(theirs)
        return name

    def theirs(self, name: str) -> str:
        """The family's name of a tensor of the export."""
        for theirs, ours in self.rows:
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name


@dataclass(frozen=True)
class Recognised:
    """A source and what is in it. names: the export's name -> the files' name. sizes: what its configuration says."""

    family: Family
    source: Source
    names: dict[str, str]
    sizes: Sizes
    config: dict[str, Any]

    @property
    def parts(self) -> list[str]:
        return [part for part in dict.fromkeys(map(part_named, self.names)) if part is not None]


def part_named(name: str) -> str | None:
    """The part of a model that a tensor of the export belongs to."""
    if ".lora_A." in name or ".lora_B." in name:
        return ADAPTER
    return next((part for part, prefixes in PARTS.items() if name.startswith(prefixes)), None)


def is_spare(name: str, tower_layers: float) -> bool:
    """Whether a model may be without a tensor: a layer of the tower behind those that are run, or MGVQ's beside its codebook."""
    layer = _TOWER_LAYER.match(name)
    return (name.startswith("model.mgvq.") and name != CODEBOOK) or (layer is not None and int(layer[1]) >= tower_layers)


def _refuse(path: Path, key: str, seen: Any, wanted: str) -> None:
    raise ConfigError(f"{path}: {key} is {seen!r}, wanted {wanted}")


def _text(path: Path, text: PreTrainedConfig) -> dict[str, Any]:
    """BackboneConfig's values of a LLaMA or Qwen2 configuration."""
    heads = text.num_attention_heads
    if text.hidden_act != "silu":
        _refuse(path, "hidden_act", text.hidden_act, "silu")
    for name in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if getattr(text, name, False):
            _refuse(path, name, getattr(text, name), "false: such a backbone is not implemented")
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    if head_dim * heads != text.hidden_size:
        _refuse(path, "head_dim", head_dim, f"hidden_size / num_attention_heads, {text.hidden_size / heads:g}")
    rope = text.rope_parameters
    if rope.get("rope_type", "default") != "default":
        _refuse(path, "rope_type", rope["rope_type"], "default: scaled rotary embeddings are not implemented")
    return {ours: getattr(text, theirs) for ours, theirs in TEXT_FIELDS.items()} | dict(
        rotary_base=float(rope["rope_theta"]),
        qkv_bias=text.model_type == "qwen2",
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )


def _vision(path: Path, vision: CLIPVisionConfig, select_layer: int = -2) -> dict[str, Any]:
    """VisionConfig's values: of the layers only those are run whose output is the feature, `hidden_states[select_layer]`."""
    if vision.model_type != "clip_vision_model":
        _refuse(path, "vision_config.model_type", vision.model_type, "clip_vision_model")
    if vision.hidden_act != "quick_gelu":
        _refuse(path, "vision_config.hidden_act", vision.hidden_act, "quick_gelu")
    layers = select_layer if select_layer >= 0 else vision.num_hidden_layers + 1 + select_layer
    if not 0 < layers <= vision.num_hidden_layers:
        _refuse(path, "vision_feature_layer", select_layer, f"one that is the output of one of {vision.num_hidden_layers} layers")
    return {ours: getattr(vision, theirs) for ours, theirs in VISION_FIELDS.items()} | {"num_layers": layers}


def _read(path: Path, config: dict[str, Any], kind: str | None = None) -> PreTrainedConfig:
    """A configuration by transformers, which knows the older spellings of its keys."""
    values = dict(config)
    found = values.pop("model_type")
    try:
        return AutoConfig.for_model(kind or found, **values)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path}: transformers does not read this configuration: {str(error).splitlines()[0]}") from error


def _llama_sizes(path: Path, config: dict[str, Any]) -> Sizes:
    return {"backbone": _text(path, _read(path, config))}


def _clip_sizes(path: Path, config: dict[str, Any]) -> Sizes:
    read = _read(path, config)
    return {"vision": _vision(path, getattr(read, "vision_config", read))}


def _llava_sizes(path: Path, config: dict[str, Any]) -> Sizes:
    read = _read(path, config)
    if read.vision_feature_select_strategy != "default":
        _refuse(path, "vision_feature_select_strategy", read.vision_feature_select_strategy, "default: CLS is left out")
    if not isinstance(read.vision_feature_layer, int):
        _refuse(path, "vision_feature_layer", read.vision_feature_layer, "one layer")
    if read.projector_hidden_act != "gelu":
        _refuse(path, "projector_hidden_act", read.projector_hidden_act, "gelu")
    return {"backbone": _text(path, read.text_config), "vision": _vision(path, read.vision_config, read.vision_feature_layer)}


def _llava_llama_sizes(path: Path, config: dict[str, Any]) -> Sizes:
    """The original LLaVA's flat configuration; its tower is named there and described nowhere."""
    wanted = {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_use_im_start_end": False}
    for key, value in wanted.items():
        if config.get(key, value) != value:
            _refuse(path, key, config[key], repr(value))
    projector = config.get("mm_projector_type", "linear")
    if projector not in ("linear", "mlp2x_gelu"):
        _refuse(path, "mm_projector_type", projector, "linear or mlp2x_gelu")
    return {"backbone": _text(path, _read(path, config, "llama")), "method": {"projector": projector}}


def _htc_sizes(path: Path, config: dict[str, Any]) -> Sizes:
    text, vision = config["text_config"], config["vision_config"]
    chosen = {name: config.get(name, getattr(MethodConfig, name)) for name in METHOD_FIELDS}  # an older export had but the default
    sizes: Sizes = {"backbone": _text(path, _read(path, text)), "method": chosen}
    sizes["method"]["voco_token_id"] = config["image_token_id"]
    if config["channels"] != "discrete":
        sizes["vision"] = _vision(path, _read(path, vision), -1)
    if config["channels"] != "continuous":
        sizes["mgvq"] = {key: tuple(value) if isinstance(value, list) else value for key, value in config["mgvq_config"].items()}
    return sizes


def _lora_sizes(path: Path, config: dict[str, Any]) -> Sizes:
    """peft's LoRA, plain: what it may be beside that is refused. Targets are read from the tensors."""
    if config.get("peft_type") != "LORA":
        _refuse(path, "peft_type", config.get("peft_type"), "LORA")
    plain = {"use_dora": False, "use_rslora": False, "bias": "none", "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None}
    for key, value in plain.items():
        if (config.get(key) or value) != value:
            _refuse(path, key, config[key], repr(value))
    return {"lora": {"rank": config["r"], "alpha": float(config["lora_alpha"])}}


_DECODER = (("model.", LLM),)
_BUFFERS = (".rotary_emb.inv_freq", ".position_ids")
_UNUSED_TOWER = ("post_layernorm.weight", "post_layernorm.bias")
LLAMA = Family("LLaMA / Vicuna", ("llama",), _DECODER, _BUFFERS, _llama_sizes)
QWEN2 = Family("Qwen2 / Qwen2.5", ("qwen2",), _DECODER, _BUFFERS, _llama_sizes)
CLIP = Family(
    "CLIP",
    ("clip", "clip_vision_model"),
    (("vision_model.", VIT), *((name, VIT + name) for name in ("embeddings.", "pre_layrnorm.", "encoder."))),
    ("text_model.", "text_projection.", "visual_projection.", "logit_scale", *_BUFFERS, *_UNUSED_TOWER),
    _clip_sizes,
)
LLAVA = Family(
    "LLaVA, transformers' form",
    ("llava",),
    (
        ("language_model.model.", LLM),
        ("language_model.lm_head.", HEAD),
        ("model.language_model.", LLM),
        *((f"{model}vision_tower.{inner}", VIT) for model in ("", "model.") for inner in ("vision_model.", "")),
        *((f"{model}multi_modal_projector.linear_{n}.", f"{PROJECTOR}fc{n}.") for model in ("", "model.") for n in (1, 2)),
    ),
    (*_BUFFERS, *_UNUSED_TOWER),
    _llava_sizes,
)
LLAVA_LLAMA = Family(
    "LLaVA, its authors' form",
    ("llava", "llava_llama"),
    (
        ("model.mm_projector.0.", PROJECTOR + "fc1."),
        ("model.mm_projector.2.", PROJECTOR + "fc2."),
        ("model.mm_projector.", PROJECTOR + "fc1."),
        ("model.vision_tower.vision_tower.vision_model.", VIT),
        ("model.vision_tower.vision_tower.", VIT),
        *_DECODER,
    ),
    (*_BUFFERS, *_UNUSED_TOWER),
    _llava_llama_sizes,
)
HTC = Family("HTC-VLM, exported", ("htc_vlm",), (), (), _htc_sizes)
_MM = (("0.", "fc1."), ("2.", "fc2."), ("", "fc1."))  # nn.Sequential of two linears with GELU between, or one linear
MM_PROJECTOR = Family(
    "LLaVA's projector alone",
    (),
    tuple((f"{model}mm_projector.{theirs}", PROJECTOR + ours) for model in ("model.", "") for theirs, ours in _MM),
)
LORA = Family(
    "LoRA adapter, peft's",
    (),
    ((PEFT_PREFIX + LLM, LLM), *((PEFT_PREFIX + theirs, ours) for theirs, ours in _DECODER)),
    sizes=_lora_sizes,
)
MGVQ = Family("MGVQ", (), (("module.", "model.mgvq."), ("", "model.mgvq.")))  # module.: saved from DistributedDataParallel
FAMILIES = (LLAMA, QWEN2, CLIP, LLAVA, LLAVA_LLAMA, HTC)


def recognise(path: str | Path) -> Recognised:
    """What a folder or file is, by its config.json, or by its tensors where it has none. Raises ConfigError."""
    path = Path(path)
    source = open_source(path)
    described, adapter = path / "config.json", path / "adapter_config.json"
    if adapter.is_file():
        config, family = read_json(adapter), LORA
        sizes = family.sizes(adapter, config)
    elif described.is_file():
        config = read_json(described)
        kind = config.get("model_type")
        families = [family for family in FAMILIES if kind in family.model_types]
        if kind == "llava":  # both forms say so
            families = [LLAVA if "text_config" in config else LLAVA_LLAMA]
        if not families:
            known = sorted({kind for family in FAMILIES for kind in family.model_types})
            raise ConfigError(f"{described}: model_type is {kind!r}, wanted one of {', '.join(known)}")
        (family,) = families
        sizes = family.sizes(described, config)
    else:
        config, sizes = {}, {}
        if any("mm_projector." in name for name in source.shapes):
            family = MM_PROJECTOR
        elif "quantize.embedding.weight" in {name.removeprefix("module.") for name in source.shapes}:
            family = MGVQ
        else:
            some = ", ".join(list(source.shapes)[:4])
            raise ConfigError(f"{path} has no config.json, and its tensors ({some}, ...) are neither LLaVA's mm_projector nor MGVQ's")
    names: dict[str, str] = {}
    for name in source.shapes:
        ours = family.ours(name)
        if ours is None:
            continue
        if ours in names:
            raise ConfigError(f"{path}: {names[ours]} and {name} are both {ours}")
        names[ours] = name
    if family is LORA:
        sizes["lora"]["targets"] = tuple(target for target in get_args(LoraTarget) if any(f".{target}." in name for name in names))
    if any(name.startswith(PROJECTOR) for name in names):
        sizes.setdefault("method", {})["projector"] = "mlp2x_gelu" if PROJECTOR + "fc2.weight" in names else "linear"
    return Recognised(family, source, names, sizes, config)
