"""One GPU in under ten minutes: is it right, how fast is it, how much memory does it take, and what do the peers do beside it.

1. Correct: loss and gradients of a small model on the device against the same model on CPU in fp32.
2. Attention in bf16 beside SDPA with the dense mask and plain causal SDPA (torch picks FlashAttention's kernels for what has no mask).
3. A training step in bf16 of each backbone in --sizes that fits, CLIP-L's tower included: seconds, tokens/s, MFU, peak memory, and
   transformers' LLaMA with the 4-D mask beside it where that fits as well.

Without a GPU the same runs on CPU at whatever sizes are given: that is how it is tested.
"""

import argparse
import gc
import time
from dataclasses import replace
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch

from htc_megatron.benchmarks import attention, train
from htc_megatron.benchmarks.memory import peak_allocated
from htc_megatron.benchmarks.result import Result, Say, alternated, median_ratio, timed
from htc_megatron.benchmarks.workload import num_parameters, random_batch
from htc_megatron.config import BackboneConfig, ConfigError, OptimizerConfig, RunConfig, TrainingConfig, VisionConfig
from htc_megatron.config_io import check, load_zero
from htc_megatron.parallel import groups as process_groups

SIZES = {  # name: backbone, tower, rows of one image and --text tokens in a micro-batch
    "3b": (BackboneConfig(26, 3072, 8192, 24, 24), VisionConfig(), 8),
    "1b": (BackboneConfig(16, 2048, 5632, 32, 32), VisionConfig(), 16),
    "tiny": (
        BackboneConfig(2, 64, 96, 4, 4, vocab_size=301),
        VisionConfig(image_size=42, hidden_size=32, ffn_hidden_size=64, num_layers=1, num_attention_heads=2),
        2,
    ),
}
OPTIONAL = ("flash_attn", "transformer_engine", "apex")  # not needed; named so that a figure can be read
ERRORS = {"fp32": 1e-4, "bf16": 2**-4}  # of a weight's gradient in its norm, from the CPU's in fp32: sums in another order; bf16's rounding


def configured(args: argparse.Namespace, size: str, precision: str) -> RunConfig:
    """A run of micro-batches of that size. Raises ConfigError."""
    if size not in SIZES:
        raise ConfigError(f"--sizes: got {size!r}, wanted some of {', '.join(SIZES)}")
    backbone, vision, rows = SIZES[size]
    shape = argparse.Namespace(
        hidden=64, layers=1, head_dim=16, vocabulary=backbone.vocab_size, batch=rows, text=args.text, question=0, patch_side=2
    )
    config = train.step_config(argparse.Namespace(**vars(shape), recompute=args.recompute))
    method = replace(config.model.method, anchor_hidden_size=backbone.hidden_size)
    config.model = replace(config.model, backbone=backbone, vision=vision, method=method)
    length = config.model.tokens_per_image + args.text
    config.training = TrainingConfig(micro_batch_size=rows, global_batch_size=rows, seq_length=length, precision=precision)
    config.optimizer = OptimizerConfig(lr=1e-5)
    check(config, 1)
    return config


def errors(args: argparse.Namespace, device: torch.device) -> dict[str, dict[str, float]]:
    """Of the smallest size on `device`, from CPU in fp32: the loss's relative error, and the largest of a weight's gradient."""
    config = configured(args, "tiny", "fp32")
    batch = random_batch(config, 1, True)
    *_, wanted, loss = train.our_gradients(config, batch, torch.device("cpu"))
    found = {}
    for precision in ERRORS:
        config = configured(args, "tiny", precision)
        *_, ours, mine = train.our_gradients(config, batch, device)
        largest = max(gradient.norm() for gradient in wanted.values())
        worst = max(float((ours[n].float().cpu() - g).norm() / g.norm().clamp_min(1e-3 * largest)) for n, g in wanted.items())
        found[precision] = {"loss": abs(mine - loss) / abs(loss), "gradients": worst}
    return found


def measure(config: RunConfig, groups: process_groups.Groups, rounds: int, say: Say) -> dict[str, Any]:
    """Ours and, where it fits, the peer: seconds and peak memory of a step. Memory is of the whole process here, weights and all."""
    from htc_megatron.training.build import build_engine
    from htc_megatron.training.step import train_step

    batch = random_batch(config, 1, True)
    found: dict[str, Any] = {"parameters": num_parameters(config.model), "seconds": {}, "memory_mib": {}}

    def run_one(name: str, make) -> None:
        try:
            step = make()
            step()
            with peak_allocated() as peak:
                step()
            found["seconds"][name] = alternated({name: timed(step)}, rounds, say)[name]
            found["memory_mib"][name] = peak.mib
        except torch.OutOfMemoryError:
            say(f"{name}: does not fit")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def ours():
        engine = build_engine(config, load_zero("zero2.json"), groups)
        made.append(engine)
        return lambda: train_step(engine, [batch], config.optimizer.lr)

    def peer():
        model = train.random_export(config, groups.device)
        return train.peer_step(train.Transformers(model, config, batch, groups.device), config)

    made: list[Any] = []
    run_one("ours", ours)
    while made:
        made.pop().destroy()
    run_one("transformers", peer)
    return found


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--sizes", default="1b,3b", help=f"of {', '.join(SIZES)} (default: %(default)s)")
    command.add_argument("--text", type=int, default=128, help="tokens a row beside the image (default: %(default)s)")
    command.add_argument("--recompute", choices=("none", "selective", "full"), default="selective", help="of ours (default: %(default)s)")
    command.add_argument("--rounds", type=int, default=5, help="seconds are medians over them (default: %(default)s)")


def run(args: argparse.Namespace, say: Say) -> Result:
    """Raises ConfigError for sizes that are unknown, and RuntimeError where the device computes something else than the CPU."""
    from htc_megatron.training.flops import peak_flops, step_flops

    configs = {size: configured(args, size, "bf16") for size in args.sizes.split(",")}
    began = time.perf_counter()
    groups = process_groups.initialise(next(iter(configs.values())).parallel, 0)
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        device = groups.device
        found_errors = errors(args, device)
        for precision, error in found_errors.items():
            if max(error.values()) > ERRORS[precision]:
                worst, limit = max(error.values()), ERRORS[precision]
                raise RuntimeError(f"{device} in {precision} is {worst:.1e} from the CPU in fp32, wanted at most {limit:.1e}")
        peak = peak_flops(device, torch.bfloat16)
        installed = [name for name in OPTIONAL if find_spec(name)]
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        rows = [("device", name), ("bf16 peak", f"{peak / 1e12:.2f} TFLOP/s"), ("optional packages there", ", ".join(installed) or "none")]
        rows += [(f"largest error in {p} from CPU", f"{max(e.values()):.1e}") for p, e in found_errors.items()]
        sample = attention.sample_layout(4, 576 if device.type == "cuda" else 12, args.text)
        roads = attention.works(sample, 32, 128 if device.type == "cuda" else 16, torch.bfloat16, device.type)
        seconds = alternated({key: timed(work) for key, work in roads.items()}, 4 * args.rounds, say)
        ratios = {f"attention_{key}_over_ours": median_ratio(seconds[key], seconds["ours"]) for key in ("dense", "causal")}
        measured = {}
        for size, config in configs.items():
            say(f"training step, {size}")
            measured[size] = one = measure(config, groups, args.rounds, say)
            batch = random_batch(config, 1, True)
            tokens, work = int(batch.layout.samples[:, 2].sum()), step_flops(config, [batch])
            for who, several in one["seconds"].items():
                second = median(several)
                figures = f"{second:.3f} s, {tokens / second:,.0f} tokens/s, MFU {work / second / peak:.1%}, "
                figures += f"{one['memory_mib'][who] / 1024:.1f} GiB"
                rows.append((f"{size} ({one['parameters'] / 1e9:.2f}e9), {who}", figures))
            if len(one["seconds"]) == 2:
                ratios[f"{size}_peer_over_ours"] = median_ratio(one["seconds"]["transformers"], one["seconds"]["ours"])
                ratios[f"{size}_peer_memory_over_ours"] = one["memory_mib"]["transformers"] / one["memory_mib"]["ours"]
    finally:
        process_groups.destroy()
    rows.append(("all of this took", f"{time.perf_counter() - began:.0f} s"))
    return Result(rows, ratios, {"errors": found_errors, "attention_seconds": seconds, "steps": measured})
