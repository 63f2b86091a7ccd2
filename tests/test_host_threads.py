"""On CPU every thread of a rank runs in turn, those of gloo's groups too; and destroyed engines take theirs with them."""

import gc
import os
import subprocess
import sys
import weakref

import pytest

from htc_megatron.config_io import load_zero
from tests.parity_worker import MIXED, local_batches, tiny_config

POLICIES = """
import os
{before}
from htc_megatron.config import ParallelConfig
from htc_megatron.parallel import groups
groups.initialise(ParallelConfig(), 0)
threads = os.listdir("/proc/self/task")
print(len(threads), *{{os.sched_getscheduler(int(one)) for one in threads}})
"""

linux = pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="threads have policies on Linux alone")


@linux
@pytest.mark.parametrize("chosen", [None, "SCHED_IDLE"])
def test_every_thread_runs_in_turn(chosen):
    """Or under the policy that the process was given."""
    before = "" if chosen is None else f"os.sched_setscheduler(0, os.{chosen}, os.sched_param(0))"
    done = subprocess.run([sys.executable, "-c", POLICIES.format(before=before)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    threads, *policies = map(int, done.stdout.splitlines()[-1].split())
    assert threads > 10 and policies == [os.SCHED_BATCH if chosen is None else getattr(os, chosen)]


def engine_is_freed(zero: dict) -> tuple[bool, int, int]:
    """Whether a stage is gone after a step, `destroy` and a collection; gloo's threads with the groups and after them."""
    from htc_megatron.parallel import groups as process_groups
    from htc_megatron.training.build import build_engine
    from htc_megatron.training.step import train_step

    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    config = tiny_config(parallel__pipeline_model_parallel_size=2)
    groups = process_groups.initialise(config.parallel, config.training.seed)
    engine = build_engine(config, zero, groups)
    train_step(engine, local_batches(config, 0, MIXED, groups), config.optimizer.lr)
    stage, most = weakref.ref(engine.module), threads()
    engine.destroy()
    del engine, groups
    gc.collect()
    gone = stage() is None
    process_groups.destroy()
    gc.collect()
    return gone, most, threads()


@linux
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_destroyed_engine_is_freed(ranks, zero):
    """Its threads, of which each group has three, end with the groups: a process that trains one model after another keeps none."""
    for gone, most, left in ranks(2).run(engine_is_freed, load_zero(f"zero{zero}.json"), init=False):
        assert gone and most > 30 and left < most / 2
