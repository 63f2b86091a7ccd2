"""What one rank does in the tests of ZeRO-3's gathering. Each function runs on every rank."""

import hashlib

import torch
import torch.distributed as dist

from htc_megatron.benchmarks.counting import counted
from htc_megatron.parallel import groups as process_groups
from htc_megatron.parallel import patches
from htc_megatron.parallel.gather import Gatherer, passes_of_1f1b
from tests.parity_worker import MICROS, MIXED, STEPS, local_batches, tiny_config
from tests.stage_worker import replaced


def limited(zero: dict, stage_parameters: int, share: float) -> dict:
    """`zero` with room for a share of the stage's parameters, small ones not excepted."""
    keys = {"stage3_max_live_parameters": int(share * stage_parameters), "stage3_param_persistence_threshold": 0}
    return {"zero_optimization": zero["zero_optimization"] | keys}


def gathered_steps(changes: dict, zero: dict, share: float | None) -> dict:
    """The parity steps with an evaluation after the second and a look at the parameters after each.

    share: of the largest stage's parameters that may be whole; None: ZeRO-1, or the JSON as it is.
    """
    from htc_megatron.training.build import build_engine, checkpoint_state
    from htc_megatron.training.step import evaluate, train_step

    config = tiny_config(**changes)
    groups = process_groups.initialise(config.parallel, config.training.seed)
    if share is not None:
        zero = limited(zero, 40_000 // groups.tp_size, share)
    engine = build_engine(config, zero, groups)
    gatherer, found = engine.gatherer, {"results": [], "whole": [], "most": [], "saved": [], "gathers": [], "evaluated": []}
    passes: list[str] = []
    begin = Gatherer.begin_pass

    def noted(self, kind):
        passes.append(kind)
        begin(self, kind)

    for step in range(STEPS):
        passes.clear()
        with replaced(Gatherer, "begin_pass", noted), counted() as traffic:
            result = train_step(engine, local_batches(config, step, MIXED, groups), config.optimizer.lr)
        found["results"].append((result.loss, result.grad_norm))
        found["gathers"].append(traffic.of("all-gather", group=groups.dp).calls)
        if gatherer is not None:
            assert passes == passes_of_1f1b(MICROS // groups.dp_size, groups.pp_rank, groups.pp_size)
            assert gatherer.most_live <= gatherer.limit, (gatherer.most_live, gatherer.limit)
            whole = [p for p in engine.module.parameters() if not patches.is_cut(p)]
            assert not any(p.requires_grad for p in whole), "trained parameters are whole after a step"
            assert sum(p.numel() for p in whole) <= gatherer.limit + gatherer.kept.numel
            found["whole"].append(sum(p.numel() for p in whole))
        found["saved"].append(digest(checkpoint_state(engine, config)))
        if step == 1:
            found["evaluated"].append(evaluate(engine, iter([local_batches(config, 99, MIXED, groups)])))
    engine.destroy()
    return found


def digest(state) -> str:
    """Of all that a checkpoint would hold of this rank."""
    found = hashlib.sha256()
    for shard in state.shards(optimizer=True):
        found.update(shard.read().detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def count_known() -> dict:
    """Traffic of one collective of each kind, of 12 floats, between two ranks."""
    rank, x = dist.get_rank(), torch.ones(12)
    alone = [dist.new_group([0]), dist.new_group([1])][rank]
    dist.all_reduce(x)  # not counted
    with counted() as traffic:
        dist.all_reduce(x)
        dist.all_gather_into_tensor(torch.empty(12), torch.ones(6))
        dist.reduce_scatter_tensor(torch.empty(6), torch.ones(12))
        dist.broadcast(x, 0)
        dist.all_reduce(x, group=alone)
        work = [dist.P2POp(dist.isend, x, 1 - rank), dist.P2POp(dist.irecv, torch.empty(12), 1 - rank)]
        for request in dist.batch_isend_irecv(work):
            request.wait()
        loss = (torch.ones(3, requires_grad=True) * 2).sum()
        loss.register_hook(lambda gradient: dist.all_reduce(torch.ones(5)))
        loss.backward()
    dist.all_reduce(x)  # not counted
    return {kind: (count.calls, count.payload, count.sent) for (kind, ranks), count in traffic.counts.items() if ranks == (0, 1)}


def different_orders() -> None:
    """A stage whose data-parallel ranks use its modules in different orders."""
    import deepspeed

    from htc_megatron.parallel.gather import GatherOptions

    deepspeed.init_distributed("gloo", verbose=False)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    with deepspeed.zero.Init(config_dict_or_path=config):
        module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    engine, *_ = deepspeed.initialize(model=module, optimizer=torch.optim.AdamW(module.parameters()), config=config)
    patches.without_trace(engine)
    gatherer = Gatherer(module, (), GatherOptions(1000, 1000, 0, 0), dist.group.WORLD)
    gatherer.units.sort(key=lambda unit: unit.name, reverse=dist.get_rank() == 1)
    with gatherer.phase(["forward"]):
        gatherer.begin_pass("forward")
        for unit in gatherer.units:
            gatherer.use(unit)
