"""What a device and its links can do. GPUs by the vendors' data sheets; the machine at hand is measured."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from htc_megatron.config import ConfigError

GB, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Hardware:
    """One kind of device in its usual node. Bandwidths in bytes/s, each way.

    memory: bytes of a device. bf16, fp32: peak FLOP/s of dense products. memory_bandwidth: of the device's own memory.
    node_link: between devices of a node. network: of a device's own adapter to other nodes.
    reserved: share of memory that tensors cannot have: driver's context, NCCL's buffers, gaps of the allocator (assumed).
    achievable: share of the peak that products reach in training (assumed; 1 where the peak was measured with real products).
    cores: devices that really compute at once; ranks beyond them share (a machine's CPU cores). None: every rank has its own.
    """

    name: str
    memory: float
    bf16: float
    fp32: float
    memory_bandwidth: float
    node_link: float
    network: float
    source: str
    reserved: float = 0.08
    achievable: float = 0.55
    node_latency: float = 10e-6  # seconds a collective takes beside its bytes, within a node and between nodes (assumed)
    network_latency: float = 30e-6
    cores: float | None = None
    hides: bool = True  # whether collectives can run beside products
    scatter_rounds: int = 1  # of a ring that a reduce-scatter takes; under gloo it is no faster than an all-reduce

    def peak(self, precision: str) -> float:
        """FLOP/s of dense products in training.precision."""
        return self.bf16 if precision == "bf16" else self.fp32

    @property
    def usable(self) -> float:
        """Bytes of a device that tensors can have."""
        return self.memory * (1 - self.reserved)


A100 = "NVIDIA A100 Tensor Core GPU data sheet; DGX A100 data sheet"
H100 = "NVIDIA H100 Tensor Core GPU data sheet (SXM); DGX H100 data sheet"
H200 = "NVIDIA H200 Tensor Core GPU data sheet (SXM); DGX H200 data sheet"
B200 = "NVIDIA DGX B200 data sheet, an eighth of its figures"

# Dense peaks without sparsity; NVLink's figures in data sheets are both ways together and halved here; one adapter a GPU as in the
# vendor's own DGX node: ConnectX-6 HDR 200 Gbit/s (A100), ConnectX-7 NDR 400 Gbit/s (H100, H200, B200). fp32 is without TF32.
_TABLE = (
    Hardware(
        "a100-40g",
        40 * GB,
        312 * TERA,
        19.5 * TERA,
        1555 * GB,
        300 * GB,
        25 * GB,
        A100,
    ),
    Hardware(
        "a100-80g",
        80 * GB,
        312 * TERA,
        19.5 * TERA,
        2039 * GB,
        300 * GB,
        25 * GB,
        A100,
    ),
    Hardware(
        "h100-80g",
        80 * GB,
        989 * TERA,
        67 * TERA,
        3350 * GB,
        450 * GB,
        50 * GB,
        H100,
    ),
    Hardware(
        "h200-141g",
        141 * GB,
        989 * TERA,
        67 * TERA,
        4800 * GB,
        450 * GB,
        50 * GB,
        H200,
    ),
    Hardware("b200", 180 * GB, 2250 * TERA, 75 * TERA, 8000 * GB, 900 * GB, 50 * GB, B200),
)
TABLE = {one.name: one for one in _TABLE}
CPU = "cpu"


def hardware(name: str) -> Hardware:
    """By name; `cpu` is this machine, measured now (a second). Raises ConfigError."""
    if name == CPU:
        return measured_cpu()
    if name not in TABLE:
        raise ConfigError(f"--gpu: got {name}, wanted one of {', '.join((*TABLE, CPU))}")
    return TABLE[name]


def _best(work: Callable[[], object], times: int = 5) -> float:
    """Seconds of the fastest of some calls."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)


def measured_cpu() -> Hardware:
    """This machine: products and copies timed in this process, with the threads it has. Ranks exchange through its memory."""
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(768, 768).to(dtype)
        rates[dtype] = 2 * 768**3 / _best(lambda a=a: a @ a)
    source, target = torch.ones(2**24), torch.empty(2**24)
    copied = 2 * source.nbytes / _best(lambda: target.copy_(source))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = max(1, len(os.sched_getaffinity(0)) // torch.get_num_threads())
    return Hardware(
        CPU,
        memory / cores,
        rates[torch.bfloat16],
        rates[torch.float32],
        copied,
        copied / 8,  # gloo over the loopback: a message is copied into and out of the kernel's buffers, and added up
        copied / 8,
        "measured on this machine",
        achievable=1.0,
        node_latency=200e-6,
        network_latency=200e-6,
        cores=cores,
        hides=False,
        scatter_rounds=2,
    )
