"""A toy model under a DeepSpeed engine, every element of which trains by itself, and the same on whole tensors."""

import contextlib
import zlib
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import partitioned_param_coordinator
from megatron.core import parallel_state as mpu
from torch import nn

from htc_megatron.checkpoint import Place, load, save
from htc_megatron.checkpoint.rng import rng_state, set_rng_state
from htc_megatron.checkpoint.zero_state import EngineState
from htc_megatron.config import RunConfig
from htc_megatron.model.naming import Entry
from htc_megatron.weights.table import Weight, partition

STAGES = [  # (name, stored shape, rule, trained), by half of the model; odd sizes, so that parameters straddle the cuts
    [
        ("embedding.weight", (11, 3), "vocab", True),
        ("fc1.weight", (2, 8, 3), "gated", True),
        ("norm.weight", (7,), "replicated", True),
        ("patches.weight", (4, 3, 2, 2), "replicated", False),
        ("tower.weight", (5, 8), "row", False),
    ],
    [
        ("qkv.weight", (12, 5), "qkv", True),
        ("qkv.bias", (12,), "qkv", True),
        ("proj.weight", (5, 8), "row", True),
        ("scale", (1,), "replicated", True),
        ("head.weight", (11, 3), "vocab", True),
        ("codebook.weight", (9, 4), "replicated", False),
    ],
]
KINDS = ("model", "optimizer/exp_avg", "optimizer/exp_avg_sq")
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


def weight_of(name: str, shape: tuple[int, ...], rule: str) -> Weight:
    return Weight(name, shape, rule, (), *((4, 1, 3) if rule == "qkv" else ()))


def is_matrix(name: str, shape: tuple[int, ...], rule: str, trained: bool) -> bool:
    return len(shape) > 1


def value_of(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))).bfloat16().float()


def local_part(whole: torch.Tensor, weight: Weight, tp_rank: int, tp_size: int) -> torch.Tensor:
    """This TP rank's parameter, padding rows zero."""
    part = partition(weight, tp_rank, tp_size)
    local = torch.zeros(part.view_shape)
    place = tuple(slice(a, a + n) for a, n in zip(part.offset, part.size, strict=True))
    local[tuple(slice(0, n) for n in part.size)] = whole[place]
    return local.reshape(part.local_shape)


class Part(nn.Module):
    """One parameter that is drawn towards a moving target, element by element."""

    def __init__(self, value: torch.Tensor, target: torch.Tensor, trained: bool):
        super().__init__()
        self.weight = nn.Parameter(value, requires_grad=trained)
        self.register_buffer("target", target)

    def forward(self, x):
        return ((self.weight - self.target * x) ** 2).sum()


class Toy(nn.Module):
    """The rows of one stage. seed: initial values are those of the reference if empty, others otherwise."""

    def __init__(self, rows: list, tp_rank: int, tp_size: int, seed: str = ""):
        super().__init__()
        self.rows = rows
        self.parts = nn.ModuleList()
        for name, shape, rule, trained in rows:
            weight = weight_of(name, shape, rule)
            value, target = (local_part(value_of(n, shape), weight, tp_rank, tp_size) for n in (name + seed, name + " target"))
            self.parts.append(Part(value, target, trained))
        self.idle_plain = nn.Parameter(torch.zeros(1), requires_grad=any(row[3] for row in rows))  # as the model's stages have it

    def forward(self, x):
        return sum(part(x) for part in self.parts) + 0.0 * self.idle_plain.sum()

    def entries(self) -> list[Entry]:
        return [Entry(r[0], part.weight, weight_of(*r[:3])) for r, part in zip(self.rows, self.parts, strict=True)]


class DeepSpeedMpu:
    get_model_parallel_group = staticmethod(mpu.get_model_parallel_group)
    get_data_parallel_group = staticmethod(mpu.get_data_parallel_group)
    get_data_parallel_rank = staticmethod(mpu.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(mpu.get_data_parallel_world_size)
    get_tensor_model_parallel_group = staticmethod(mpu.get_tensor_model_parallel_group)
    get_tensor_model_parallel_rank = staticmethod(mpu.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(mpu.get_tensor_model_parallel_world_size)
    get_model_parallel_rank = staticmethod(
        lambda: mpu.get_pipeline_model_parallel_rank() * mpu.get_tensor_model_parallel_world_size() + mpu.get_tensor_model_parallel_rank()
    )
    get_model_parallel_world_size = staticmethod(
        lambda: mpu.get_pipeline_model_parallel_world_size() * mpu.get_tensor_model_parallel_world_size()
    )


def build(layout: tuple[int, int], stage: int, precision: str = "fp32", seed: str = "", trained: bool = True, init: bool = False, **zero):
    """An engine of the toy model and its State. layout: (TP, PP); what is left of the world is DP. init: under zero.Init."""
    tp, pp = layout
    deepspeed.init_distributed("gloo")
    mpu.initialize_model_parallel(tp, pp)
    dp_rank, dp = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    tp_rank, pp_rank = mpu.get_tensor_model_parallel_rank(), mpu.get_pipeline_model_parallel_rank()
    rows = sum(STAGES, []) if pp == 1 else STAGES[pp_rank]
    rows = rows if trained else [row for row in rows if not row[3]]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,  # it is 1.0 by default, and a norm would couple the elements
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "overlap_comm": False, **zero},
    }
    if precision == "bf16":
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    partitioned = deepspeed.zero.Init(data_parallel_group=mpu.get_data_parallel_group(), config_dict_or_path=config, mpu=DeepSpeedMpu)
    with partitioned if init else contextlib.nullcontext():
        toy = Toy(rows, tp_rank, tp, seed)
    groups = [[part.weight for row, part in zip(rows, toy.parts, strict=True) if is_matrix(*row) == matrix] for matrix in (True, False)]
    groups = [{"params": group, "weight_decay": decay} for group, decay in zip(groups, (0.1, 0.0), strict=True)]
    groups[1]["params"].append(toy.idle_plain)
    optimizer = torch.optim.AdamW(groups, lr=0.05) if trained else None
    engine, *_ = deepspeed.initialize(model=toy, optimizer=optimizer, mpu=DeepSpeedMpu, config=config)
    place = Place(dist.get_rank(), dist.get_world_size(), tp_rank, tp, pp_rank, pp, dp_rank, dp, stage, precision)
    return engine, EngineState(engine, toy.entries(), place)


@contextlib.contextmanager
def stages_may_differ():
    """DeepSpeed compares ZeRO-3's trace over the world, but pipeline stages are different modules."""
    with mock.patch.object(partitioned_param_coordinator, "assert_ints_same_as_other_ranks", lambda ints: None):
        yield


def train(engine, first: int, steps: int) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        x = torch.tensor(1.0 + 0.25 * step, dtype=next(engine.module.buffers()).dtype)
        loss = engine(x)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def job(layout, stage, start=None, steps=0, folder=None, optimizer=True, warm=0, **settings):
    """Build, train `warm` steps, load `start` if given, train, save to `folder` if given. Returns losses, random draws, what was loaded."""
    with stages_may_differ():
        engine, state = build(layout, stage, seed=" another" if start else "", **settings)
        train(engine, 0, warm)
        loaded = load(start, state, optimizer=optimizer) if start else None
        if loaded and loaded.rng:
            set_rng_state(loaded.rng)
        torch.rand(3 if not loaded else 0)
        losses = train(engine, loaded.step if loaded else 0, steps)
        if folder:
            step = steps + (loaded.step if loaded else 0)
            save(folder, state, step=step, config=RunConfig(), extra={"consumed": 8 * step}, rng=rng_state())
        return losses, torch.rand(3).tolist(), loaded and (loaded.step, loaded.extra, loaded.rng is not None)


def expected(steps: int) -> dict[str, torch.Tensor]:
    """Five lines of training on whole tensors with torch's own AdamW; nothing here knows of shards."""
    found = {}
    for row in sum(STAGES, []):
        name, shape, _, trained = row
        param = nn.Parameter(value_of(name, shape))
        found[f"model/{name}"] = param
        if trained:
            adam = torch.optim.AdamW([param], lr=0.05, weight_decay=0.1 if is_matrix(*row) else 0.0)
            for step in range(steps):
                ((param - value_of(name + " target", shape) * (1.0 + 0.25 * step)) ** 2).sum().backward()
                adam.step()
                adam.zero_grad()
            for moment in KINDS[1:]:
                found[f"{moment}/{name}"] = adam.state[param][moment.removeprefix("optimizer/")] if steps else torch.zeros(shape)
    return {key: value.detach() for key, value in found.items()}
