"""What fits together: the checks of a configuration that are made before any process group is.

`check` raises ConfigError with one line for every fault found: the key, the value seen and the value wanted. Types are
checked before (config_io.py); which layouts are tested is another question (parallel/support.py).
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from htc_megatron.config import (
    BackboneConfig,
    ConfigError,
    LoraConfig,
    MethodConfig,
    MGVQConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    VisionConfig,
)

# Numbers that may be zero; every other number of a configuration is positive.
MAY_BE_ZERO = {
    "model.lora.rank",
    "model.method.num_voco_tokens",
    "model.method.voco_token_id",
    "model.method.num_anchors",
    "model.method.anchor_seed",
    "data.seed",
    "data.max_bad_share",
    "optimizer.min_lr",
    "optimizer.warmup_ratio",
    "optimizer.weight_decay",
    "optimizer.beta1",
    "optimizer.beta2",
    "optimizer.clip_grad",
    "training.seed",
    "training.train_iters",
    "training.eval_interval",
    "training.save_interval",
    "training.keep_checkpoints",
    "life.time_limit_s",
    "life.end_margin_s",
    "life.max_restarts_without_progress",
    "life.heartbeat_limit_s",
    "life.hang_limit_s",
    "life.slow_factor",
    "faults.max_loss_jump",
    "faults.max_norm_jump",
    "faults.max_skipped",
    "faults.max_rollbacks",
    "faults.storage_patience_s",
}
INT16_CODES = 2**15  # codes are stored as int16


def check(config: RunConfig, world_size: int | None = None) -> None:
    """Raise ConfigError if the run cannot work. world_size: number of processes; None: not known yet, left unchecked."""
    _raise(_numbers(config))  # first: the other checks divide by them
    _raise(
        [
            *_model(config.model),
            *_tensor_parallel(config.model, config.parallel),
            *_pipeline(config),
            *_sequence(config),
            *_optimizer(config),
            *_lora_training(config),
            *_training(config, world_size),
        ]
    )


def check_model(model: ModelConfig) -> None:
    """The part of `check` that concerns a model alone, whatever runs it."""
    _raise(_numbers(model, "model."))
    _raise(_model(model))


def _raise(faults: Any) -> None:
    sentences = list(faults)
    if sentences:
        raise ConfigError("\n".join(sentences))


def _numbers(section: Any, prefix: str = "") -> Iterator[str]:
    for item in dataclasses.fields(section):
        value, key = getattr(section, item.name), prefix + item.name
        if dataclasses.is_dataclass(value):
            yield from _numbers(value, key + ".")
            continue
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if not math.isfinite(number) or number < 0 or (number == 0 and key not in MAY_BE_ZERO):
                yield f"{key}: got {number}, wanted {'zero or a positive number' if key in MAY_BE_ZERO else 'a positive number'}"


def _divides(key: str, value: int, by: int, what: str) -> Iterator[str]:
    if value % by:
        yield f"{key}: got {value}, wanted a multiple of {what}, {by}"


def _model(model: ModelConfig) -> Iterator[str]:
    yield from _backbone(model.backbone)
    yield from _method(model.method, model.backbone)
    yield from _lora(model.lora)
    if model.has_tower:
        yield from _vision(model.vision)
        yield from _chosen_tokens(model.method, model.vision.num_patches)
    if model.has_mgvq:
        yield from _mgvq(model.mgvq)


def _backbone(backbone: BackboneConfig) -> Iterator[str]:
    key, hidden, heads = "model.backbone", backbone.hidden_size, backbone.num_attention_heads
    yield from _divides(f"{key}.hidden_size", hidden, heads, "num_attention_heads")
    if hidden % heads == 0 and (hidden // heads) % 2:
        yield f"{key}.hidden_size: got {hidden}, wanted an even size of each of the {heads} heads, not {hidden // heads}: RoPE turns pairs"
    yield from _divides(f"{key}.num_attention_heads", heads, backbone.num_query_groups, "num_query_groups")


def _method(method: MethodConfig, backbone: BackboneConfig) -> Iterator[str]:
    key = "model.method"
    if method.num_voco_tokens == 0 and method.mask != "none":
        yield f"{key}.num_voco_tokens: got 0, wanted at least 1 with mask {method.mask}: text would see nothing of an image"
    if method.mask == "none" and method.text_sees == "voco_on":
        yield f"{key}.text_sees: got voco_on, wanted all with mask none: voco_on hides what mask none shows"
    if method.fusion != "pre" and method.channels != "hybrid":
        yield f"{key}.fusion: got {method.fusion}, wanted pre with channels {method.channels}: there is one channel and nothing to fuse"
    if method.num_anchors == 0 and method.channels != "continuous":
        yield f"{key}.num_anchors: got 0, wanted at least 1 with channels {method.channels}"
    if method.resampler != "none" and method.channels == "discrete":
        yield f"{key}.resampler: got {method.resampler}, wanted none with channels discrete: there are no patches to resample"
    if method.anchor_source != "mgvq" and method.channels != "hybrid":
        yield (
            f"{key}.anchor_source: got {method.anchor_source}, wanted mgvq with channels {method.channels}: anchors from the tower's "
            "features take its place in the hybrid model alone"
        )
    if method.num_voco_tokens and method.voco_token_id >= backbone.vocab_size:
        yield f"{key}.voco_token_id: got {method.voco_token_id}, wanted less than model.backbone.vocab_size, {backbone.vocab_size}"


def _chosen_tokens(method: MethodConfig, patches: int) -> Iterator[str]:
    """Of the tower's features no more can be chosen than there are; queries may be as many as one likes."""
    key = "model.method"
    if method.resampler == "average" and method.num_resampled_tokens > patches:
        yield f"{key}.num_resampled_tokens: got {method.num_resampled_tokens}, wanted at most the {patches} patches that are averaged"
    if method.channels == "hybrid" and method.anchor_source != "mgvq" and method.num_anchors > patches:
        yield f"{key}.num_anchors: got {method.num_anchors}, wanted at most the {patches} patches that {method.anchor_source} chooses from"


def _lora(lora: LoraConfig) -> Iterator[str]:
    key = "model.lora.targets"
    if lora.rank and not lora.targets:
        yield f"{key}: got an empty list, wanted at least one of the backbone's linears with model.lora.rank {lora.rank}"
    if len(set(lora.targets)) != len(lora.targets):
        yield f"{key}: got {', '.join(lora.targets)}, wanted each linear once"


def _lora_training(config: RunConfig) -> Iterator[str]:
    if config.model.lora.rank and "backbone" not in config.training.freeze:
        yield (
            f"training.freeze: got {', '.join(config.training.freeze) or 'nothing'}, wanted backbone among them with model.lora.rank "
            f"{config.model.lora.rank}: adapters are trained instead of the backbone"
        )


def _vision(vision: VisionConfig) -> Iterator[str]:
    yield from _divides("model.vision.image_size", vision.image_size, vision.patch_size, "patch_size")
    yield from _divides("model.vision.hidden_size", vision.hidden_size, vision.num_attention_heads, "num_attention_heads")


def _mgvq(mgvq: MGVQConfig) -> Iterator[str]:
    key, stages = "model.mgvq", len(mgvq.widths)
    if not stages:
        yield f"{key}.widths: got an empty list, wanted the channels of at least one stage"
        return
    for name in ("depths", "decoder_depths", "blocks"):
        if len(getattr(mgvq, name)) != stages:
            yield f"{key}.{name}: got {len(getattr(mgvq, name))} entries, wanted one for each of the {stages} stages in widths"
    yield from _divides(f"{key}.image_size", mgvq.image_size, mgvq.downsample, f"the downsampling of {stages} stages")
    yield from _divides(f"{key}.latent_channels", mgvq.latent_channels, mgvq.groups, "groups")
    yield from _divides(f"{key}.codebook_size", mgvq.codebook_size, mgvq.groups, "groups")
    rows = mgvq.codebook_size // mgvq.groups
    if rows > INT16_CODES:
        yield f"{key}.codebook_size: got {mgvq.codebook_size}, wanted at most {INT16_CODES} rows a group, not {rows}: codes are int16"


def _tensor_parallel(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    tp, what = parallel.tensor_model_parallel_size, "tensor_model_parallel_size"
    shared = [("model.backbone", model.backbone, ("num_attention_heads", "num_query_groups", "ffn_hidden_size"))]
    if model.has_tower:  # the Q-Former has the tower's heads and width
        shared.append(("model.vision", model.vision, ("num_attention_heads", "ffn_hidden_size")))
    if model.method.channels != "continuous":
        shared.append(("model.method", model.method, ("anchor_hidden_size",)))
    for key, section, names in shared:
        for name in names:
            yield from _divides(f"{key}.{name}", getattr(section, name), tp, what)
    if parallel.sequence_parallel and tp == 1:
        yield "parallel.sequence_parallel: got true, wanted false with tensor_model_parallel_size 1: there is nothing to split over"


def _pipeline(config: RunConfig) -> Iterator[str]:
    parallel, layers = config.parallel, config.model.backbone.num_layers
    pp, wanted, key = parallel.pipeline_model_parallel_size, parallel.layers_per_stage, "parallel.layers_per_stage"
    if wanted == "even":
        yield from _divides("model.backbone.num_layers", layers, pp, "pipeline_model_parallel_size (layers_per_stage even)")
    elif wanted == "balanced":
        if layers < pp:
            yield f"model.backbone.num_layers: got {layers}, wanted a layer for each stage of pipeline_model_parallel_size, {pp}"
    elif len(wanted) != pp:
        yield f"{key}: got {len(wanted)} stages, wanted one for each of pipeline_model_parallel_size, {pp}"
    elif sum(wanted) != layers:
        yield f"{key}: got {sum(wanted)} layers together, wanted model.backbone.num_layers, {layers}"

    chunks = parallel.virtual_pipeline_model_parallel_size
    if chunks > 1:
        yield (
            f"parallel.virtual_pipeline_model_parallel_size: got {chunks}, wanted 1: a DeepSpeed engine for each model chunk would clip by "
            "that chunk's gradient norm alone, and one engine over several chunks is not tested equal to one process"
        )


def _sequence(config: RunConfig) -> Iterator[str]:
    key, length, model = "training.seq_length", config.training.seq_length, config.model
    if length <= model.tokens_per_image:
        yield f"{key}: got {length}, wanted more than the {model.tokens_per_image} tokens of one image"
    if length > model.backbone.max_position_embeddings:
        yield f"{key}: got {length}, wanted at most model.backbone.max_position_embeddings, {model.backbone.max_position_embeddings}"
    if config.parallel.sequence_parallel:
        yield from _divides(key, length, config.parallel.tensor_model_parallel_size, "tensor_model_parallel_size (sequence_parallel)")


def _optimizer(config: RunConfig) -> Iterator[str]:
    optimizer = config.optimizer
    for name in ("beta1", "beta2"):
        if getattr(optimizer, name) >= 1:
            yield f"optimizer.{name}: got {getattr(optimizer, name)}, wanted less than 1"
    if optimizer.warmup_ratio > 1:
        yield f"optimizer.warmup_ratio: got {optimizer.warmup_ratio}, wanted a share of train_iters from 0 to 1"
    if optimizer.min_lr > optimizer.lr:
        yield f"optimizer.min_lr: got {optimizer.min_lr}, wanted at most lr, {optimizer.lr}"
    if config.data.max_bad_share > 1:
        yield f"data.max_bad_share: got {config.data.max_bad_share}, wanted a share from 0 to 1"


def _training(config: RunConfig, world_size: int | None) -> Iterator[str]:
    training, parallel = config.training, config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    micro, dp, known = training.micro_batch_size, 1, "micro_batch_size"
    if world_size is not None:
        if world_size % (tp * pp):
            yield (
                f"parallel: got {world_size} processes for tensor_model_parallel_size {tp} x pipeline_model_parallel_size {pp}, "
                f"wanted a multiple of {tp * pp}"
            )
        else:
            dp, known = world_size // (tp * pp), f"micro_batch_size {micro} x data-parallel size {world_size // (tp * pp)}"
    yield from _divides("training.global_batch_size", training.global_batch_size, micro * dp, known)
    if not training.train_iters and not config.init_from:
        yield "training.train_iters: got 0, wanted a positive number, or a checkpoint in init_from: there would be nothing to do"
    parts = _trainable_parts(config.model)
    if parts <= set(training.freeze) and not config.model.lora.rank:
        yield f"training.freeze: got {', '.join(training.freeze)}, wanted one or more of {', '.join(sorted(parts))} left to train"
    if training.eval_interval and not config.data.validation:
        yield f"data.validation: got nothing, wanted a prepared folder with training.eval_interval {training.eval_interval}"
    if config.data.feature_cache and "vision" not in training.freeze:
        yield (
            f"data.feature_cache: got {config.data.feature_cache}, wanted nothing, or vision in training.freeze: a tower that is trained "
            "gives other features each step"
        )
    if config.data.feature_cache and config.model.method.channels == "discrete":
        yield f"data.feature_cache: got {config.data.feature_cache}, wanted nothing with channels discrete: there is no vision tower"
    if config.data.feature_cache and config.model.method.anchor_source == "topk_attention":
        yield (
            f"data.feature_cache: got {config.data.feature_cache}, wanted nothing with anchor_source topk_attention: features are kept "
            "there, but not the attention that chooses among them"
        )
    if not config.output_dir:
        yield "output_dir: got nothing, wanted a folder for checkpoints and logs"


def _trainable_parts(model: ModelConfig) -> set[str]:
    """Components this model has and `freeze` can name."""
    parts = {"backbone"}
    if model.method.num_voco_tokens:
        parts.add("voco")
    if model.has_tower:
        parts |= {"vision", "projector"}
    if model.has_qformer:
        parts.add("resampler")
    if model.method.channels != "continuous":
        parts.add("anchors")
    return parts
