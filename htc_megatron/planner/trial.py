"""Stages as they are, built and run on the meta device under a fake process group of the true world size.

Nothing is computed: every operation of a real forward and backward is seen with its shapes, and the storages that live are
counted. Layers are alike, so a stage of many is counted from the same stage with a few and with one more.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from htc_megatron.config import RunConfig
from htc_megatron.model.htc_vlm import HTCVLM
from htc_megatron.model.layout import MicroBatch
from htc_megatron.model.naming import is_decayed
from htc_megatron.parallel import patches

META = torch.device("meta")
FEW = 2  # layers of a model that differ from those before them, its last ones: a stage that has them is run with so many, others with one


@dataclass(frozen=True)
class Counted:
    """Of one stage on one rank, before ZeRO shards it. Numbers of elements, and bytes where it says so.

    trained, frozen: of parameters. decayed: of the trained ones with weight decay, a parameter group of its own.
    largest: of the largest trained parameter. unit: of the largest part that ZeRO-3 gathers at once.
    kept: bytes that a micro-batch leaves behind its forward until its backward, what stages exchange included.
    forward, backward: bytes alive at most in a micro-batch's own pass, `kept` included; gradients of parameters are let go as they come.
    """

    trained: float
    frozen: float
    decayed: float
    largest: float
    unit: float
    kept: float = 0.0
    forward: float = 0.0
    backward: float = 0.0

    def with_layers(self, more: "Counted", layers: int) -> "Counted":
        """A stage with `layers` layers more than this one. more: the same stage with one layer more."""
        names = [field.name for field in fields(self)]
        grown = {name: getattr(self, name) + layers * (getattr(more, name) - getattr(self, name)) for name in names}
        return Counted(**grown | {"largest": max(self.largest, more.largest), "unit": max(self.unit, more.unit)})


class Live(TorchDispatchMode):
    """Counts the bytes of meta storages that operations made and that are still alive, the module's own aside. most: there ever were."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self._known = {p.untyped_storage()._cdata for p in (*module.parameters(), *module.buffers())}
        self._alive: dict[int, weakref.ref] = {}
        self._sizes: dict[int, int] = {}  # when last asked
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = [self._add(tensor) for tensor in tree_iter(out) if isinstance(tensor, Tensor) and tensor.device.type == "meta"]
        if any(found):
            self.most = max(self.most, self.bytes())
        return out

    def _add(self, tensor: Tensor) -> bool:
        """Take note of a tensor's storage. Returns whether there may be more bytes alive than before."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return False
        known = key in self._alive and self._alive[key]() is not None
        if not known:
            self._alive[key] = weakref.ref(storage)
        return not known or storage.nbytes() > self._sizes.get(key, 0)

    def bytes(self) -> int:
        """Alive now. Sizes are asked for each time: model/elementwise.py empties storages in between."""
        total, gone = 0, []
        for key, reference in self._alive.items():
            storage = reference()
            if storage is None:
                self._sizes.setdefault(key, 0)
                gone.append(key)
            else:
                self._sizes[key] = storage.nbytes()
                total += self._sizes[key]
        for key in gone:
            del self._alive[key], self._sizes[key]
        return total


class _Flash(torch.autograd.Function):
    """What SDPA's fused kernels keep: their arguments, the result and a number a row. (On the meta device torch would take the
    road that writes all logits down.)"""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(query.transpose(1, 2).shape).transpose(1, 2)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _flash(query: Tensor, key: Tensor, value: Tensor, **_) -> Tensor:
    """SDPA's signature."""
    return _Flash.apply(query, key, value)


@contextmanager
def _on_meta() -> Iterator[None]:
    """Within it SDPA keeps what a fused kernel does, and megatron-core, which asks for the current device, makes its buffers on META."""
    attention, device = F.scaled_dot_product_attention, torch.cuda.current_device
    F.scaled_dot_product_attention, torch.cuda.current_device = _flash, lambda: META
    try:
        yield
    finally:
        F.scaled_dot_product_attention, torch.cuda.current_device = attention, device


class FakeWorld:
    """A context: `world_size` ranks of which this process is the first, in groups that exchange nothing.

    No other process group may be there. Stages of every (tp, pp) that divides the world can be counted in it.
    """

    def __init__(self, world_size: int):
        self.world_size = world_size
        self._tp: int | None = None
        self._known: dict[tuple, Counted] = {}

    def __enter__(self) -> "FakeWorld":
        from torch.testing._internal.distributed.fake_pg import FakeStore

        if dist.is_initialized():
            raise RuntimeError("a plan is made in a process without process groups, but there are some")
        patches.megatron_on_cpu()
        dist.init_process_group("fake", rank=0, world_size=self.world_size, store=FakeStore())
        return self

    def __exit__(self, *_) -> None:
        from megatron.core import parallel_state as mpu

        mpu.destroy_model_parallel()
        dist.destroy_process_group()

    def _place(self, tp: int, pp: int, stage: int) -> None:
        """Have megatron-core's groups for this TP size, and let it take this process for one of that stage."""
        from megatron.core import parallel_state as mpu
        from megatron.core import tensor_parallel

        if tp != self._tp:
            mpu.destroy_model_parallel()
            mpu.initialize_model_parallel(tp, self.world_size // tp, create_gloo_process_groups=False)
            tensor_parallel.model_parallel_cuda_manual_seed(0)
            self._tp = tp
        mpu.set_pipeline_model_parallel_world_size(pp)
        mpu.set_pipeline_model_parallel_rank(stage)

    def build(self, config: RunConfig, stage: int) -> HTCVLM:
        """The project's own module of a stage, without memory. config: with explicit layers_per_stage."""
        parallel = config.parallel
        layers = parallel.layers_per_stage
        self._place(parallel.tensor_model_parallel_size, len(layers), stage)
        with META:
            module = HTCVLM(config, stage == 0, stage == len(layers) - 1, 0, torch.device("cpu"))
        module.to(META)
        module.device = META
        for number, layer in enumerate(module.backbone.decoder.layers, 1):  # numbers come from the rank's group, and ours is rank 0's
            layer.behind = sum(layers[stage:]) - number
        return module

    def count(self, config: RunConfig, layers: tuple[int, ...], stage: int, batch: MicroBatch | None) -> Counted:
        """What a stage holds, and with a batch what a micro-batch needs on it. layers: of each stage.

        The same answer is not worked out twice: calls of one world differ in layout and batch alone.
        """
        few = [min(count, FEW) for count in layers]
        if sum(few[stage + 1 :]) >= FEW:
            few[stage] = 1
        found = self._once(config, few, stage, batch)
        if layers[stage] == few[stage]:
            return found
        few[stage] += 1
        return found.with_layers(self._once(config, few, stage, batch), layers[stage] - few[stage] + 1)

    def _once(self, config: RunConfig, layers: list[int], stage: int, batch: MicroBatch | None) -> Counted:
        parallel, behind = config.parallel, min(sum(layers[stage + 1 :]), FEW)
        key = (parallel.tensor_model_parallel_size, stage == 0, stage == len(layers) - 1, layers[stage], behind, config.training.precision)
        if batch is not None:
            key += (parallel.sequence_parallel, parallel.recompute, batch.layout.rows, batch.layout.seq_length)
        if key not in self._known:
            self._known[key] = self._counted(config, layers, stage, batch)
        return self._known[key]

    def _counted(self, config: RunConfig, layers: list[int], stage: int, batch: MicroBatch | None) -> Counted:
        model = replace(config.model, backbone=replace(config.model.backbone, num_layers=sum(layers)))
        sizes = {"pipeline_model_parallel_size": len(layers), "layers_per_stage": tuple(layers), "attention": "split"}
        config = replace(config, model=model, parallel=replace(config.parallel, **sizes))
        counted = parameters_of(self.build(config, stage))
        if batch is None:
            return counted
        if "vision" in config.training.freeze:  # keeps nothing, and its layers need the same in turn
            vision = replace(model.vision, num_layers=1)
            config = replace(config, model=replace(model, vision=vision))
        return replace(counted, **activations_of(self.build(config, stage), batch))


def parameters_of(module: HTCVLM) -> Counted:
    """The parameters of a stage. module: whole."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    layers = [m for m in module.modules() if isinstance(m, TransformerLayer)]
    units = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    return Counted(
        trained=sum(p.numel() for _, p in trained),
        frozen=sum(p.numel() for p in module.parameters() if not p.requires_grad),
        decayed=sum(p.numel() for name, p in trained if is_decayed(name, p)),
        largest=max((p.numel() for _, p in trained), default=0),
        unit=max([*units, *(p.numel() for p in module.parameters())], default=0),
    )


def activations_of(module: HTCVLM, batch: MicroBatch) -> dict[str, float]:
    """kept, forward and backward of one micro-batch: forward and backward are run on the meta device."""
    hooks = [p.register_post_accumulate_grad_hook(_let_go) for p in module.parameters() if p.requires_grad]
    rows, length = module.shape_between_stages(batch.layout)
    shape = (length // module.shares * rows, 1, module.config.hidden_size)
    with Live(module) as live, _on_meta():
        if not module.first:
            module.set_input_tensor([torch.empty(shape, dtype=module.config.params_dtype, device=META, requires_grad=True)])
        out = module(batch)
        kept, forward = live.bytes(), live.most
        live.most = 0
        grad = None if out.ndim == 0 else torch.empty_like(out)
        if out.requires_grad:
            out.backward(grad)
        backward = live.most
    for hook in hooks:
        hook.remove()
    return {"kept": kept, "forward": forward, "backward": max(kept, backward)}


def _let_go(parameter: nn.Parameter) -> None:
    parameter.grad = None
