"""What a run shows: TensorBoard scalars, a progress bar, one line a step and its status file, all from the first rank."""

import resource
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from htc_megatron.cluster.status import StatusFile, node_name
from htc_megatron.config import RunConfig
from htc_megatron.parallel.bubble import StageClock, Times, measured_times
from htc_megatron.parallel.groups import Groups
from htc_megatron.training.life import Lives
from htc_megatron.training.step import StepResult


def peak_memory(device: torch.device) -> float:
    """GiB this rank has held at most: of the GPU, or of the process where it computes on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Logger:
    """Collects the figures of steps and writes them every `log_interval` steps. Called by every rank."""

    def __init__(self, config: RunConfig, groups: Groups, first_step: int, peak: float, clock: StageClock):
        self.config, self.groups, self.clock = config, groups, clock
        self.bubble: dict[str, str] = {}  # what the progress bar shows of it
        (self.peak,) = self._over_ranks(dist.ReduceOp.SUM, peak)
        self.waited = 0.0
        self.writer = self.bar = self.status = None
        self.hosts: list[str] = [""] * groups.world_size
        dist.all_gather_object(self.hosts, node_name(), group=groups.checkpoint)
        if groups.rank == 0:
            from torch.utils.tensorboard import SummaryWriter

            # what an earlier life showed of the steps that are made again is hidden
            self.writer = SummaryWriter(Path(config.output_dir) / "tensorboard", purge_step=first_step + 1)
            self.bar = tqdm(
                total=config.training.train_iters, initial=first_step, desc="training", unit="step", dynamic_ncols=True, smoothing=0.1
            )
            restarts = max(0, len(Lives(config.output_dir).read()) - 1)
            self.write(first_step, {"run/restarts": restarts})
            self.status = StatusFile(config.output_dir)
            self.status.update(state="starting", step=first_step, train_iters=config.training.train_iters, restarts=restarts)
        self._reset()

    def _over_ranks(self, op: dist.ReduceOp, *values: float) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self.groups.device)
        dist.all_reduce(tensor, op)
        return tensor.tolist()

    def _reset(self) -> None:
        self.began, self.steps, self.tokens, self.images, self.flops = time.perf_counter(), 0, 0, 0, 0.0

    def step(self, step: int, result: StepResult, lr: float, tokens: int, flops: float, waited: float) -> None:
        """Take in step `step` (counted from 1). tokens, flops: of the global batch. waited: share of the time since
        the first step that this rank has waited for data; shown is the rank that has waited most."""
        self.steps += 1
        self.tokens += tokens
        self.images += result.images
        self.flops += flops
        due = step % self.config.training.log_interval == 0 or step == self.config.training.train_iters
        times = measured_times(self.clock, self.groups) if due else None
        if times is not None:
            self._times(step, times)
        if self.bar is not None:
            self.bar.update(1)
            figures = {"loss": f"{result.loss:.4f}", "norm": f"{result.grad_norm:.3f}", "lr": f"{lr:.2e}", "waited": f"{self.waited:.1%}"}
            self.bar.set_postfix(figures | self.bubble, refresh=False)
        if not due:
            return
        memory, self.waited = self._over_ranks(dist.ReduceOp.MAX, peak_memory(self.groups.device), waited)
        seconds = (time.perf_counter() - self.began) / self.steps
        if self.writer is not None:
            self.write(
                step,
                {
                    "train/loss": result.loss,
                    "train/lr": lr,
                    "train/grad_norm": result.grad_norm,
                    "speed/seconds_per_step": seconds,
                    "speed/tokens_per_second": self.tokens / self.steps / seconds,
                    "speed/images_per_second": self.images / self.steps / seconds,
                    "speed/mfu": self.flops / self.steps / seconds / self.peak,
                    "speed/data_wait_share": self.waited,
                    "memory/peak_gib_per_rank": memory,
                },
            )
            said = {"loss": result.loss, "seconds_per_step": round(seconds, 4), "data_wait_share": round(self.waited, 4)}
            self.state("training", step=step, **said)
        self._reset()

    def _times(self, step: int, times: Times) -> None:
        """Seconds of the stages a step, the share of the passes since the last time in which they stood still, and the slowest rank.
        The slowest stage is idle least."""
        rank, ratio = times.slowest
        figures = {f"pipeline/seconds_stage_{stage}": times.of_stage(stage) / self.steps for stage in range(self.groups.pp_size)}
        figures |= {"ranks/slowest": rank, "ranks/slowest_over_median": ratio, "ranks/slowest_seconds": times.own[rank] / self.steps}
        said = {"slowest_rank": {"rank": rank, "host": self.hosts[rank], "over_median": round(ratio, 3)}}
        if self.groups.pp_size > 1:
            idle = times.idle_shares
            mean, slowest = sum(idle) / len(idle), min(range(len(idle)), key=lambda stage: idle[stage])
            figures |= {"pipeline/idle_share": mean} | {f"pipeline/idle_share_stage_{i}": share for i, share in enumerate(idle)}
            self.bubble = {"idle": f"{mean:.0%} (stage {slowest}, the slowest: {idle[slowest]:.0%})"}
            said["bubble"] = round(mean, 4)
        self.write(step, figures)
        if self.status is not None:
            self.status.keep(**said)

    def state(self, name: str, **more: object) -> None:
        """What the run is at, in the status file."""
        if self.status is not None:
            self.status.update(state=name, **more)

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Scalars of a step, on the first rank only."""
        if self.writer is not None:
            for name, value in figures.items():
                self.writer.add_scalar(name, value, step)

    def say(self, sentence: str) -> None:
        """A line above the progress bar, on the first rank only."""
        if self.bar is not None:
            self.bar.write(sentence)

    def close(self) -> None:
        """Finish the progress bar and flush what was written."""
        if self.writer is not None:
            self.bar.close()
            self.writer.close()
