"""The harness reports what happens on the ranks: values, errors, deaths and hangs; and leaves nothing behind."""

import os
import pickle
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import RankFailure, RankTimeout, Worker
from tests.worker import Job


def add(scale: float) -> tuple[int, float]:
    x = torch.ones(1) * scale
    dist.all_reduce(x)
    print(f"rank {dist.get_rank()} of {dist.get_world_size()}")
    return dist.get_rank(), x.item()


def raise_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"rank {rank} does not like it")
    dist.barrier()  # the others wait for a rank that never comes


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        print("going down", flush=True)
        os._exit(7)
    dist.barrier()


def wait_for_ever(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(1000)
    dist.barrier()


def leave_traces() -> None:
    os.environ["LEFT_BEHIND"] = "yes"
    torch.set_default_dtype(torch.float64)


def traces() -> tuple[str | None, torch.dtype]:
    return os.environ.get("LEFT_BEHIND"), torch.get_default_dtype()


def read_environment() -> dict[str, str]:
    assert not dist.is_initialized()
    return {key: os.environ[key] for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "EXTRA")}


def exit_quietly() -> None:
    raise SystemExit(2)


def return_unpicklable():
    return lambda: None


def zero3_and_mcore(tp: int) -> tuple[int, float]:
    """A ZeRO-3 step beside mcore's groups: what both libraries keep of their groups must not reach the next job."""
    import deepspeed
    from megatron.core import parallel_state

    assert not parallel_state.is_initialized() and deepspeed.comm.comm.cdb is None
    deepspeed.init_distributed("gloo", verbose=False)
    parallel_state.initialize_model_parallel(tp, 1)
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "zero_allow_untested_optimizer": True},
    )
    loss = engine(torch.ones(1, 8)).square().mean()
    engine.backward(loss)
    engine.step()
    after = engine(torch.ones(1, 8)).square().mean().item()
    return parallel_state.get_data_parallel_world_size(), after


def test_values_come_back_in_rank_order(ranks):
    assert ranks(3).run(add, 2.0) == [(0, 6.0), (1, 6.0), (2, 6.0)]
    assert ranks(3).output[1].strip() == "rank 1 of 3"
    assert ranks(2).run("tests.test_distributed_harness:add", 1.5) == [(0, 3.0), (1, 3.0)]
    assert ranks(1).run(add, 1.5) == [(0, 1.5)]


def test_an_error_is_reported_with_its_traceback(ranks):
    with pytest.raises(RankFailure, match="rank 1 does not like it") as caught:
        ranks(2).run(raise_on, 1)
    assert "in raise_on" in caught.value.errors[1]
    assert isinstance(caught.value.exceptions[1], ValueError)
    assert isinstance(caught.value.__cause__, ValueError)
    assert "rank 0, still running" in str(caught.value) or 0 in caught.value.errors
    assert ranks(2).run(add, 1.0) == [(0, 2.0), (1, 2.0)]


def test_a_dead_rank_is_reported(ranks):
    with pytest.raises(RankFailure, match="rank 0 died: exit status 7") as caught:
        ranks(2).run(die_on, 0)
    assert "going down" in str(caught.value)
    assert ranks(2).run(add, 1.0) == [(0, 2.0), (1, 2.0)]


def test_a_hanging_rank_is_killed_and_its_stack_shown(ranks):
    start = time.monotonic()
    with pytest.raises(RankTimeout, match="took longer than 2 s: no answer from rank 0, 1 of 2") as caught:
        ranks(2).run(wait_for_ever, 1, timeout=2)
    assert time.monotonic() - start < 30
    assert str(caught.value).count("in wait_for_ever") == 2
    assert "barrier" in str(caught.value)
    assert ranks(2).run(add, 1.0) == [(0, 2.0), (1, 2.0)]


def test_a_worker_ends_with_its_parent(ranks):
    """A killed pytest closes its end of the lifeline, also while the rank hangs."""
    pool = ranks(1).pool
    worker = Worker(pool.context, pool.folder, 99)
    worker.send(Job("time:sleep", pickle.dumps(((1000,), {})), 0, 1, 0, False, 1000, {}, list(sys.path), os.getcwd()))
    worker.lifeline.close()
    worker.process.join(30)
    assert worker.process.exitcode == 1
    worker.kill()


def test_every_job_starts_clean(ranks):
    ranks(1).run(leave_traces)
    assert ranks(1).run(traces) == [(None, torch.float32)]


def test_a_job_can_make_its_own_process_group(ranks):
    seen = ranks(2).run(read_environment, init=False, env={"EXTRA": "1"})
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "EXTRA": "1"}
    assert seen == [{"RANK": str(r), "LOCAL_RANK": str(r), **common} for r in range(2)]


def test_exits_and_unpicklable_values_are_errors(ranks):
    with pytest.raises(RankFailure, match="SystemExit: 2"):
        ranks(1).run(exit_quietly)
    with pytest.raises(RankFailure, match="pickle"):
        ranks(1).run(return_unpicklable)
    with pytest.raises(ValueError, match="must be a function at module level"):
        ranks(1).run(lambda: None)


def test_deepspeed_and_mcore_start_afresh_in_every_job(ranks):
    first = ranks(2).run(zero3_and_mcore, 1, init=False)
    assert ranks(4).run(zero3_and_mcore, 2, init=False) == [(2, first[0][1])] * 4
    assert ranks(2).run(zero3_and_mcore, 1) == first
