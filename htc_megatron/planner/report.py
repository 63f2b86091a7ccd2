"""Plans as a table for people."""

from collections.abc import Sequence

from htc_megatron.planner.search import Cluster, Plan

HEADINGS = ("TP", "PP", "DP", "ZeRO", "recompute", "micro-batch", "GiB a rank", "worst stage", "s a step", "MFU", "bubble")


def table(plans: Sequence[Plan], cluster: Cluster) -> str:
    """A line a plan, best first, under a line on what was assumed."""
    hardware = cluster.hardware
    rows = [HEADINGS, *(_row(plan) for plan in plans)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
    lines = ["  ".join(word.rjust(width) for word, width in zip(row, widths, strict=True)) for row in rows]
    assumed = (
        f"{cluster.nodes} x {cluster.per_node} {hardware.name} ({hardware.source}); "
        f"tensors can have {hardware.usable / 2**30:.1f} GiB a rank; products are taken to reach {hardware.achievable:.0%} of the peak"
    )
    return "\n".join([assumed, *lines])


def _row(plan: Plan) -> tuple[str, ...]:
    layout, idle = plan.layout, plan.speed.idle
    return (
        str(layout.tp),
        str(layout.pp),
        str(layout.dp),
        str(layout.zero),
        layout.recompute,
        str(plan.micro_batch_size),
        f"{plan.peak / 2**30:.1f}",
        str(plan.worst),
        f"{plan.speed.step_s:.3g}",
        f"{plan.mfu:.1%}",
        f"{sum(idle) / len(idle):.1%}",
    )
