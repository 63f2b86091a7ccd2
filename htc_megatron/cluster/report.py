"""What the machines of a run are: versions, GPUs, fabric. Told at the start by rank 0, with the nodes that are unlike the others."""

import os
import platform
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist

from htc_megatron.cluster.status import node_name
from htc_megatron.parallel.launch import Launch

PACKAGES = ("torch", "megatron-core", "deepspeed", "transformers", "transformer-engine", "flash-attn")
PREFIXES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "UCX_", "FI_")  # variables that choose and tune the fabric
INFINIBAND, NETWORK = Path("/sys/class/infiniband"), Path("/sys/class/net")
HOSTS_SHOWN = 8

Environment = dict[str, str]


def environment() -> Environment:
    """What this node is, in words: nothing heavier than torch is imported."""
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["CPU cores"] = str(os.cpu_count())
    found["memory"] = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
    if torch.cuda.is_available():
        names = Counter(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        found["GPUs"] = ", ".join(f"{count} x {name}" for name, count in names.items())
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    else:
        found["GPUs"] = "none"
    found["InfiniBand"] = ", ".join(_infiniband()) or "none"
    found["interfaces"] = ", ".join(_interfaces()) or "none"
    found["set"] = " ".join(f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(PREFIXES)) or "none"
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _infiniband() -> list[str]:
    """Each port of each device: mlx5_0:1 400 Gb/sec (4X NDR) ACTIVE."""
    return [
        f"{port.parent.parent.name}:{port.name} {_read(port / 'rate')} {_read(port / 'state').rpartition(' ')[2]}"
        for port in sorted(INFINIBAND.glob("*/ports/*"))
    ]


def _interfaces() -> list[str]:
    """Names of the network interfaces that are up; loopback says unknown."""
    return sorted(path.name for path in NETWORK.glob("*") if _read(path / "operstate") in ("up", "unknown"))


def describe(launch: Launch, nodes: dict[str, Environment]) -> list[str]:
    """The report's lines. nodes: the environment of each, by name, the first one's first."""
    first = next(iter(nodes.values()))
    names = list(nodes)
    shown = ", ".join(names[:HOSTS_SHOWN]) + (f" and {len(names) - HOSTS_SHOWN} more" if len(names) > HOSTS_SHOWN else "")
    usual = {key: Counter(node.get(key, "none") for node in nodes.values()).most_common(1)[0][0] for key in first}
    started = "one process" if launch.launcher == "alone" else f"{launch.world_size} ranks started by {launch.launcher}"
    software = ", ".join(f"{key} {usual[key]}" for key in ("Python", *PACKAGES, "CUDA", "NCCL") if usual.get(key, "none") != "none")
    lines = [
        f"environment: {software}",
        f"machines: {len(names)} {'node' if len(names) == 1 else 'nodes'} ({shown}), {started}, meeting at {launch.address}:{launch.port}",
        f"each node: GPUs: {usual['GPUs']}; {usual['CPU cores']} CPU cores, {usual['memory']}",
        f"fabric: InfiniBand: {usual['InfiniBand']}; interfaces: {usual['interfaces']}; set: {usual['set']}",
    ]
    for name, node in nodes.items():
        for key in sorted(usual.keys() | node.keys()):
            if node.get(key, "none") != usual.get(key, "none"):
                lines.append(f"unlike the others: node {name} has {key} {node.get(key, 'none')}, most have {usual.get(key, 'none')}")
    return lines


def tell_environment(launch: Launch, group: dist.ProcessGroup) -> None:
    """Print the report on rank 0. Called by every rank of `group`, which is all ranks on gloo."""
    ours = (node_name(), environment()) if launch.local_rank == 0 else None
    gathered = [None] * launch.world_size
    dist.all_gather_object(gathered, ours, group)
    if launch.rank == 0:
        print("\n".join(describe(launch, dict(node for node in gathered if node is not None))), flush=True)
