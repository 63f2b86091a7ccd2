"""Attention of one sample, forward and backward: ours beside SDPA with the dense mask and plain causal SDPA."""

import argparse
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F

from htc_megatron.benchmarks.result import Result, Say, alternated, median_ratio, timed
from htc_megatron.config import ConfigError
from htc_megatron.model.attention import split_attention
from htc_megatron.model.attention_plan import plan_attention
from htc_megatron.model.layout import ImageShape, SequenceLayout
from htc_megatron.model.mask import MaskRule, dense_mask
from htc_megatron.model.rows import RowOrder

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
NAMES = {"ours": "ours", "dense": "SDPA with the dense mask", "causal": "plain causal SDPA"}


def sample_layout(anchors: int, patches: int, text: int) -> SequenceLayout:
    """One row of one sample: an image at its beginning and text behind it."""
    image = ImageShape(anchors, patches, 1)
    length = image.length + text
    return SequenceLayout(1, length, torch.tensor([[0, 0, length]]), torch.tensor([[0, 0]]), image)


def split_work(layout: SequenceLayout, *rows: torch.Tensor) -> Callable[[], list[torch.Tensor]]:
    """Forward and backward of the split attention. rows: query, key, value and the output's gradient in the order of rows."""
    order = RowOrder.of(layout)
    plan = plan_attention(layout, MaskRule(), order).to(rows[0].device)
    zones = [x.split([order.language, order.visual]) for x in rows]
    leaves = [x.clone().requires_grad_() for x in (zones[0][0], *zones[1], *zones[2])]
    upstream = [x.clone() for x in zones[3]]
    scale = rows[0].shape[-1] ** -0.5

    def work() -> list[torch.Tensor]:
        query, *others = leaves
        out = split_attention(query, tuple(others[:2]), tuple(others[2:]), plan, scale)
        return list(torch.autograd.grad(out, leaves, upstream))

    return work


def works(layout: SequenceLayout, heads: int, d: int, dtype: torch.dtype, device: str) -> dict[str, Callable[[], list[torch.Tensor]]]:
    """Forward and backward by each road, on the same values: ours, dense, causal. Each returns the gradients of query, key and value
    at the layout's places, [s, heads, d]; V rows' queries, which ours does not have, are zero."""
    order = RowOrder.of(layout)
    size, places = layout.seq_length, order.places.to(device)
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = (torch.randn(size, heads, d, generator=generator).to(device, dtype) for _ in range(4))
    ours = split_work(layout, *(x[places] for x in (query, key, value, grad)))

    whole = [x.transpose(0, 1)[None].contiguous().requires_grad_() for x in (query, key, value)]
    of_whole = grad.transpose(0, 1)[None].contiguous()
    mask = dense_mask(layout, MaskRule())[:, None].to(device)

    def dense() -> list[torch.Tensor]:
        return list(torch.autograd.grad(F.scaled_dot_product_attention(*whole, attn_mask=mask), whole, of_whole))

    def causal() -> list[torch.Tensor]:
        return list(torch.autograd.grad(F.scaled_dot_product_attention(*whole, is_causal=True), whole, of_whole))

    return {"ours": ours, "dense": dense, "causal": causal}


def largest_difference(layout: SequenceLayout, ours: list[torch.Tensor], dense: list[torch.Tensor]) -> float:
    """Largest difference of gradients over the largest gradient; of queries at the language rows alone, of V rows it is zero."""
    order = RowOrder.of(layout)
    q, key_mine, key_theirs, value_mine, value_theirs = ours
    q = F.pad(q, (0, 0, 0, 0, 0, order.visual))
    found = [q, torch.cat([key_mine, key_theirs]), torch.cat([value_mine, value_theirs])]
    wanted = [x[0].transpose(0, 1)[order.places.to(x.device)] for x in dense]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--patches", type=int, default=576)
    command.add_argument("--more-patches", type=int, default=9216, help="how time grows is measured from --patches to this many")
    command.add_argument("--text", type=int, default=128, help="tokens behind the image (default: %(default)s)")
    command.add_argument("--heads", type=int, default=16)
    command.add_argument("--head-dim", type=int, default=64)
    command.add_argument("--precision", choices=tuple(PRECISIONS), default="fp32")
    command.add_argument("--rounds", type=int, default=30, help="figures are medians over them (default: %(default)s)")


def run(args: argparse.Namespace, say: Say) -> Result:
    """Raises ConfigError where --more-patches is not more."""
    if args.more_patches <= args.patches:
        raise ConfigError(f"--more-patches is {args.more_patches}, wanted more than --patches, {args.patches}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (args.heads, args.head_dim, PRECISIONS[args.precision], device)
    layout, long = sample_layout(4, args.patches, args.text), sample_layout(4, args.more_patches, args.text)
    roads = works(layout, *shape)
    difference = largest_difference(layout, roads["ours"](), roads["dense"]())
    found = alternated({name: timed(work) for name, work in roads.items()}, args.rounds, say)
    # the dense mask of the long sample would take (more patches)^2 bytes: ours alone
    noise = [torch.randn(long.seq_length, args.heads, args.head_dim, device=device).to(shape[2]) for _ in range(4)]
    long_work = split_work(long, *noise)
    grown = alternated({"short": timed(roads["ours"]), "long": timed(long_work)}, args.rounds, say)
    linear = (args.more_patches + 5 + args.text) / (args.patches + 5 + args.text)
    growth = median_ratio(grown["long"], grown["short"])
    rows = [
        ("tokens", f"4 + {args.patches} + 1 + {args.text}, {args.heads} heads of {args.head_dim}, {args.precision}, {device}"),
        *((name, f"{1000 * median(found[key]):.2f} ms") for key, name in NAMES.items()),
        ("largest difference of gradients from the dense mask's", f"{difference:.1e}"),
        (f"ours with {args.more_patches} patches", f"{1000 * median(grown['long']):.2f} ms"),
        (f"growth, where linear would be {linear:.1f}", f"{growth:.1f}"),
    ]
    ratios = {
        "dense_over_ours": median_ratio(found["dense"], found["ours"]),
        "causal_over_ours": median_ratio(found["causal"], found["ours"]),
        "growth_over_linear": growth / linear,
    }
    return Result(rows, ratios, {"seconds": {**found, **grown}, "largest_difference": difference})
