"""DeepSpeed JSON files, read as they are: every key in them acts or is refused.

Batch sizes, clipping, precision and optimizer have one home each, the run's YAML; the file says how ZeRO shards. The
tables below name every key of DeepSpeed 0.19.8's `zero_optimization`: a test compares them with DeepSpeed's own.
"""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from htc_megatron.config import ConfigError

DS_CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"


@dataclass(frozen=True)
class Key:
    """A key that acts: its type, its least value if it is a number, and the stages in which DeepSpeed reads it."""

    kind: type
    stages: tuple[int, ...] = (1, 2, 3)
    least: int = 0
    multiple_of: int = 1


ACTING = {
    "stage": Key(int),
    "contiguous_gradients": Key(bool),
    "reduce_scatter": Key(bool),
    "reduce_bucket_size": Key(int, least=1),
    "overlap_comm": Key(bool),  # on GPU; on CPU there are no streams and the order of work is the same
    "allgather_bucket_size": Key(int, (1, 2), least=2, multiple_of=2),  # DeepSpeed aligns flat buffers to two elements
    "use_multi_rank_bucket_allreduce": Key(bool, (1, 2)),
    "sub_group_size": Key(int, (3,), least=1),
    # the next four act in parallel/gather.py, which says what they mean there
    "stage3_prefetch_bucket_size": Key(int, (3,)),
    "stage3_param_persistence_threshold": Key(int, (3,)),
    "stage3_model_persistence_threshold": Key(int, (3,)),
    "stage3_max_live_parameters": Key(int, (3,)),
    "stage3_use_all_reduce_for_fetch_params": Key(bool, (3,)),
    "stage3_allgather_sequential": Key(bool, (3,)),
}

_OFFLOAD = "offloading to CPU or NVMe is not supported"
_CHECKPOINT = "checkpoints are written by this project and not by DeepSpeed, so the key would do nothing"
_EXPORT = "weights are exported by tools/convert.py from any checkpoint, so the key would do nothing"
_LAYOUT = "it changes the order of the optimizer's flat buffers, which checkpoints rely on to reshard"
_QUANTIZED = "it quantizes what is sent, so layouts would no longer compute the same"
_DEPRECATED = "DeepSpeed has deprecated it"
_GATHERING = "which parameters stay whole is decided here, within stage3_max_live_parameters"
REFUSED = {
    "allgather_partitions": "DeepSpeed no longer reads it",
    "compute_grad_norm": "the gradient norm is always computed: clipping and the log need it",
    "cpu_offload": _OFFLOAD,
    "cpu_offload_param": _OFFLOAD,
    "cpu_offload_use_pin_memory": _OFFLOAD,
    "elastic_checkpoint": _CHECKPOINT,
    "enable_sanity_checks": "its checks compare all ranks, but pipeline stages differ",
    "gather_16bit_weights_on_model_save": _EXPORT,
    "ignore_unused_parameters": "frozen components and images missing from a batch are handled here",
    "leaf_module": "which modules ZeRO-3 fetches as one is decided here",
    "legacy_stage1": _DEPRECATED,
    "load_from_fp32_weights": _CHECKPOINT,
    "log_trace_cache_warnings": "DeepSpeed's trace is not used: parameters are gathered by the order of the pipeline's passes",
    "memory_efficient_linear": "megatron-core's linears are in use, so the key would do nothing",
    "offload_optimizer": _OFFLOAD,
    "offload_param": _OFFLOAD,
    "override_module_apply": "construction under zero.Init is decided here",
    "parameter_alignment": _LAYOUT,
    "pipeline_loading_checkpoint": _CHECKPOINT,
    "round_robin_gradients": _LAYOUT,
    "save_muon_momentum_buffer_in_memory": "the optimizer is AdamW",
    "stage3_gather_16bit_weights_on_model_save": _EXPORT,
    "stage3_gather_fp16_weights_on_model_save": _DEPRECATED,
    "stage3_max_reuse_distance": _GATHERING,
    "stage3_module_granularity_threshold": "which modules ZeRO-3 fetches as one is decided here",
    "zenflow": _OFFLOAD,
    "zero_hpz_partition_size": "a second partition of the parameters is not supported",
    "zero_quantized_gradients": _QUANTIZED,
    "zero_quantized_nontrainable_weights": _QUANTIZED,
    "zero_quantized_weights": _QUANTIZED,
}
# Top-level keys whose home is the run's YAML.
OWNED = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size and training.micro_batch_size",
    "gradient_clipping": "optimizer.clip_grad",
    "optimizer": "the section optimizer",
    "scheduler": "optimizer.schedule, optimizer.warmup_ratio and optimizer.min_lr",
    "bf16": "training.precision: bf16",
    "data_types": "training.precision (gradients are always accumulated in fp32)",
    "communication_data_type": "training.precision (gradients are always reduced in fp32)",
    "activation_checkpointing": "parallel.recompute",
    "tensorboard": "output_dir",
    "tensor_parallel": "parallel.tensor_model_parallel_size",
    "pipeline": "parallel.pipeline_model_parallel_size",
}


def load_zero(name: str | Path) -> dict:
    """A DeepSpeed JSON file by path, or by its name in ds_configs/, as a dictionary with `zero_optimization` in it.

    Raises ConfigError for a file that is missing or broken and for every key that would not act.
    """
    path = _find(str(name))
    try:
        tree = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_twins)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from error
    faults = _faults(tree)
    if faults:
        raise ConfigError("\n".join(f"{path}: {fault}" for fault in faults))
    return tree


def zero_stage(zero: dict) -> int:
    """1, 2 or 3, from what `load_zero` gave."""
    return int(zero["zero_optimization"]["stage"])


def _find(name: str) -> Path:
    for path in (Path(name), DS_CONFIGS / name):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.name for path in DS_CONFIGS.glob("*.json"))) or "no file"
    raise ConfigError(f"zero: got {name!r}, wanted a DeepSpeed JSON file by path or by its name in ds_configs/ ({known})")


def _no_twins(pairs: list[tuple[str, Any]]) -> dict:
    tree: dict = {}
    for key, value in pairs:
        if key in tree:
            raise ConfigError(f"key {key!r} stands twice")
        tree[key] = value
    return tree


def _faults(tree: Any) -> list[str]:
    if not isinstance(tree, dict) or not isinstance(tree.get("zero_optimization"), dict):
        return ['wanted an object with the key "zero_optimization", such as {"zero_optimization": {"stage": 1}}']
    faults = [_top_level(key, value) for key, value in tree.items() if key != "zero_optimization"]
    zero = tree["zero_optimization"]
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        return [*faults, f"zero_optimization.stage: got {stage!r}, wanted 1, 2 or 3"]
    if stage == 0:
        return [*faults, "zero_optimization.stage: got 0, which cannot run a torch-style backward in DeepSpeed; use zero1.json"]
    return [*faults, *(fault for key, value in zero.items() for fault in _zero_key(key, value, stage))]


def _top_level(key: str, value: Any) -> str:
    if key == "fp16":
        return "fp16: is refused because it raises on pipeline stages that do not hold the loss; use training.precision: bf16 or fp32"
    if key in OWNED:
        return f"{key}: got {json.dumps(value)}, but this belongs in the run's YAML: set {OWNED[key]}"
    return f"{key}: this key is not supported; zero_optimization is the only one a file has"


def _zero_key(key: str, value: Any, stage: int) -> list[str]:
    full = f"zero_optimization.{key}"
    if key in REFUSED:
        return [f"{full}: is refused: {REFUSED[key]}"]
    if key not in ACTING:
        near = difflib.get_close_matches(key, ACTING, 1, 0.6)
        return [f"{full}: unknown key; " + (f"did you mean {near[0]}?" if near else f"known are {', '.join(ACTING)}")]
    rule = ACTING[key]
    if stage not in rule.stages:
        return [f"{full}: acts only in stage {' and '.join(map(str, rule.stages))}, got stage {stage}"]
    if value == "auto":
        return [f"{full}: got 'auto', which only the Hugging Face Trainer fills in; wanted a value"]
    if rule.kind is bool:
        return [] if isinstance(value, bool) else [f"{full}: got {json.dumps(value)}, wanted true or false"]
    whole = not isinstance(value, bool) and isinstance(value, int | float) and value % 1 == 0  # 5e8 is a float in JSON
    if not whole or value < rule.least or value % rule.multiple_of:
        even = f" and a multiple of {rule.multiple_of}" if rule.multiple_of > 1 else ""
        return [f"{full}: got {json.dumps(value)}, wanted a whole number, at least {rule.least}{even}"]
    return []
