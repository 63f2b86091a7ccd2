"""Process groups: from the launcher's environment to the ranks and groups of TP, PP and DP."""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from htc_megatron.config import ParallelConfig
from htc_megatron.parallel import patches
from htc_megatron.parallel.host_memory import keep_freed_memory
from htc_megatron.parallel.host_threads import run_in_turn
from htc_megatron.parallel.launch import discover


@dataclass(frozen=True)
class Groups:
    """This rank's place among all of them. Groups are torch process groups."""

    device: torch.device
    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    tp: dist.ProcessGroup
    pp: dist.ProcessGroup
    dp: dist.ProcessGroup
    model: dist.ProcessGroup  # TP x PP of one data-parallel rank
    checkpoint: dist.ProcessGroup  # all ranks, gloo on every device: saves talk over it from a thread while training uses the others

    @property
    def first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1


def initialise(parallel: ParallelConfig, seed: int) -> Groups:
    """Make every process group: gloo on CPU, NCCL on GPU. `parallel` must have been checked against the world size."""
    patches.check_versions()
    launch = discover()  # alone it gives DeepSpeed a whole environment, or its MPI discovery runs
    on_gpu = torch.cuda.is_available()
    patches.megatron_on_cpu()
    patches.name_collectives()
    import deepspeed
    from megatron.core import parallel_state as mpu
    from megatron.core import tensor_parallel

    patches.deepspeed_without_shm_op()
    device = torch.device("cuda", launch.local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
        run_in_turn()  # before the first group has threads
    timeout = timedelta(seconds=parallel.timeout_s)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout)
    deepspeed.init_distributed("nccl" if on_gpu else "gloo", auto_mpi_discovery=False, timeout=timeout, verbose=False)
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    mpu.initialize_model_parallel(tp, pp, distributed_timeout_minutes=max(1, round(parallel.timeout_s / 60)))
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Groups(
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        tp_size=tp,
        pp_rank=mpu.get_pipeline_model_parallel_rank(),
        pp_size=pp,
        dp_rank=mpu.get_data_parallel_rank(),
        dp_size=mpu.get_data_parallel_world_size(),
        tp=mpu.get_tensor_model_parallel_group(),
        pp=mpu.get_pipeline_model_parallel_group(),
        dp=mpu.get_data_parallel_group(),
        model=mpu.get_model_parallel_group(),
        checkpoint=dist.new_group(backend="gloo", timeout=timeout),
    )


def destroy() -> None:
    """Take down what `initialise` made."""
    from megatron.core import parallel_state as mpu

    mpu.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
