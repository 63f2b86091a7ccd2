"""ZeRO 1 to 3 under megatron-core's schedules: mcore owns 1F1B, a plain DeepSpeed engine shards, and four mends join them.

Which parameters ZeRO-3 has whole, and when, is decided in gather.py. Mends 1, 2 and 4 live in patches.py. Mend 3 is here:
DeepSpeed divides gradients by gradient_accumulation_steps on every stage they pass, so that number stays 1, the loss arrives
scaled, and the accumulation boundary is marked by hand.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from htc_megatron.config import ConfigError, RunConfig
from htc_megatron.parallel import patches, progress
from htc_megatron.parallel.bubble import StageClock
from htc_megatron.parallel.gather import Gatherer, GatherOptions, Pass, passes_of_1f1b
from htc_megatron.parallel.groups import Groups
from htc_megatron.parallel.tied import TiedEmbedding
from htc_megatron.zero_json import zero_stage


class ZeroMpu:
    """The groups in the words DeepSpeed asks for. Its model-parallel rank names files, so it spans TP x PP."""

    def __init__(self, groups: Groups):
        self.groups = groups

    def get_model_parallel_rank(self) -> int:
        return self.groups.pp_rank * self.groups.tp_size + self.groups.tp_rank

    def get_model_parallel_world_size(self) -> int:
        return self.groups.tp_size * self.groups.pp_size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.groups.model

    def get_tensor_model_parallel_rank(self) -> int:
        return self.groups.tp_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.groups.tp_size

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self.groups.tp

    def get_data_parallel_rank(self) -> int:
        return self.groups.dp_rank

    def get_data_parallel_world_size(self) -> int:
        return self.groups.dp_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.groups.dp


def deepspeed_config(config: RunConfig, zero: dict) -> dict:
    """The user's DeepSpeed JSON and what the run's YAML decides."""
    training = config.training
    whole = {
        **zero,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": 1,  # mend 3
        "gradient_clipping": config.optimizer.clip_grad,
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",  # bf16 gradients are summed over ranks in fp32
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    if training.precision == "bf16":
        whole["bf16"] = {"enabled": True}
    if zero_stage(zero) == 3:  # gather.py acts on the file's value; DeepSpeed would gather small parameters once more after each step
        whole["zero_optimization"] = zero["zero_optimization"] | {"stage3_param_persistence_threshold": 0}
    return whole


class ZeroEngine:
    """One stage's module under ZeRO.

    Args:
        build: makes the stage's module, whose `tied` is its TiedEmbedding or None; under ZeRO-3 each layer is cut as soon as
            it stands, so no rank ever holds more than its share and one layer.
        fill: fills a new module's weights, given parameter by parameter (whole TP shares, gathered under ZeRO-3).
        make_optimizer: parameters' module -> torch optimizer over the trainable ones.
        zero: the DeepSpeed JSON as read by `load_zero`.
    """

    def __init__(
        self,
        config: RunConfig,
        zero: dict,
        groups: Groups,
        build: Callable[[], nn.Module],
        fill: Callable[[nn.Module, Callable], None],
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    ):
        import deepspeed

        self.groups, self.reduce_once = groups, config.parallel.reduce_once
        self.stage = zero_stage(zero)
        ds_config, mpu = deepspeed_config(config, zero), ZeroMpu(groups)
        if self.stage == 3:
            # no dtype argument: DeepSpeed 0.19.8 takes float32 there for bfloat16 on CPU; without it the config decides
            construction = deepspeed.zero.Init(data_parallel_group=groups.dp, config_dict_or_path=ds_config, mpu=mpu)
        else:
            construction = nullcontext()
        with construction:
            module = build()
        patches.megatron_on_cpu()  # zero.Init has undone a part of it
        if self.stage != 3:
            module.to(groups.device)
        wrong = [name for name, p in module.named_parameters() if p.dtype != module.config.params_dtype]
        if wrong:
            raise RuntimeError(f"parameters {wrong[:3]} were not made in {module.config.params_dtype}")
        self.gatherer: Gatherer | None = None
        fill(module, self.whole)
        engine, optimizer, *_ = deepspeed.initialize(model=module, optimizer=make_optimizer(module), mpu=mpu, config=ds_config)
        self.engine, self.optimizer = engine, optimizer
        self.module = module
        self.tied: TiedEmbedding | None = module.tied
        engine.config = module.config  # where mcore's schedules look for it
        patches.count_norm_by_tp_rank(engine, groups.tp_rank)  # mend 4
        patches.norm_by_pieces(engine)
        patches.before_backward(engine, self._before_backward)
        self._backwards, self._micro_batches = 0, 1
        self.clock = StageClock(groups.device)  # of the passes of training
        if self.stage == 3:
            from megatron.core.transformer.transformer_layer import TransformerLayer

            patches.without_trace(engine)  # mend 1
            self.gatherer = Gatherer(module, (TransformerLayer,), GatherOptions.from_zero(zero), groups.dp)

    def whole(self, parameters: list[nn.Parameter], write: bool = False):
        """A context in which `parameters` hold this TP rank's whole share; changes are kept where `write` is set, taken from
        the first data-parallel rank."""
        import deepspeed

        if self.stage != 3:
            return nullcontext()
        if self.gatherer is not None and write:
            self.gatherer.forget(parameters)
        elif self.gatherer is not None:
            if self.gatherer.active:
                self.gatherer.take(parameters)
            parameters = [p for p in parameters if patches.is_cut(p)]
        if not parameters:
            return nullcontext()
        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None)

    def _before_backward(self) -> None:
        patches.clear_seen_flag(self.engine)  # mend 2
        self._backwards += 1
        final = self._backwards == self._micro_batches
        self.engine.set_gradient_accumulation_boundary(final)
        if self.tied is not None:
            self.tied.due = final
        if self.gatherer is not None:
            self.gatherer.begin_pass("backward")

    def _gathered(self, passes: list[Pass]):
        """The context of a phase: ZeRO-3 gathers parameters for these passes."""
        return nullcontext() if self.gatherer is None else self.gatherer.phase(passes)

    def _schedule(self, forward_step: Callable, batches: Iterator, count: int, shape: tuple[int, int], forward_only: bool) -> list:
        from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

        if self.tied is not None:
            self.tied.send_weight(self.whole)
        self.engine.config.timers = None if forward_only else self.clock
        rows, seq_length = shape
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches,
            model=self.engine,
            num_microbatches=count,
            seq_length=seq_length,
            micro_batch_size=rows,
            forward_only=forward_only,
        )

    def train(self, forward_step: Callable, batches: Iterator, count: int, shape: tuple[int, int]) -> list:
        """Forward and backward of `count` micro-batches of [rows, seq_length] under 1F1B. Returns the last stage's reports."""
        self.engine.train()
        self._backwards, self._micro_batches = 0, count
        passes = passes_of_1f1b(count, self.groups.pp_rank, self.groups.pp_size)
        with self.engine.coalesce_grad_reduction() if self.reduce_once else nullcontext(), self._gathered(passes):
            reports = self._schedule(forward_step, batches, count, shape, forward_only=False)
            if self.tied is not None:
                self.tied.send_gradient()
        if self._backwards not in (0, count):
            raise RuntimeError(f"{self._backwards} backward passes ran for {count} micro-batches")
        return reports

    def evaluate(self, forward_step: Callable, batches: Iterator, count: int, shape: tuple[int, int]) -> list:
        """Forward of `count` micro-batches. Returns the last stage's reports."""
        progress.mark("evaluate")
        self.engine.eval()
        with self._gathered(["forward"] * count), torch.no_grad():
            return self._schedule(forward_step, batches, count, shape, forward_only=True)

    def step(self, lr: float, is_bad: Callable[[float], bool] | None = None) -> float:
        """One optimiser step on the gradients of `train`. Returns the global gradient norm before clipping.

        is_bad: called once by every rank with that norm; where it is true, on all ranks alike, weights and optimiser stay as they are.
        """
        progress.mark("step")
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.set_gradient_accumulation_boundary(True)
        norms: list[float] = []

        def judge(norm: float) -> bool:
            norms.append(math.inf if norm < 0 else norm)  # DeepSpeed says -1 of one that is not finite
            return is_bad(norms[-1])

        whole = nullcontext() if self.gatherer is None else patches.frozen_stay_whole(self.optimizer, self.gatherer.check_cut)
        judged = nullcontext() if is_bad is None else patches.judged_step(self.optimizer, judge)
        with whole, judged:
            self.engine.step()
        if is_bad is not None and len(norms) != 1:
            raise RuntimeError(f"the step was judged {len(norms)} times, wanted once: read patches.py against this DeepSpeed")
        return norms[0] if norms else float(self.engine.get_global_grad_norm())

    def destroy(self) -> None:
        """Free the engine's hooks and buffers, and whatever held the model."""
        if self.gatherer is not None:
            self.gatherer.destroy()
        self.engine.destroy()
        patches.release(self.engine)


def sum_over(value: Tensor, *groups: dist.ProcessGroup) -> Tensor:
    """Sum a tensor over several groups in turn."""
    for group in groups:
        dist.all_reduce(value, group=group)
    return value


def refuse_unsupported(config: RunConfig) -> None:
    """What DeepSpeed cannot do right, in a sentence."""
    if config.parallel.reduce_once and config.training.precision == "bf16":
        raise ConfigError(
            "parallel.reduce_once: true adds up micro-batches in the parameters' precision, which training.precision 'bf16' makes "
            "too coarse: use reduce_once: false or precision fp32"
        )
