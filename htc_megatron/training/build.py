"""From a configuration and process groups to an engine with filled weights."""

import torch
from torch import Tensor, nn

from htc_megatron.checkpoint import Place
from htc_megatron.checkpoint.zero_state import EngineState
from htc_megatron.config import OptimizerConfig, RunConfig
from htc_megatron.model.htc_vlm import HTCVLM
from htc_megatron.model.initialisation import initial_value
from htc_megatron.model.naming import Entry, is_decayed, stage_entries
from htc_megatron.model.stages import layers_of_stages
from htc_megatron.parallel import progress
from htc_megatron.parallel.groups import Groups
from htc_megatron.parallel.zero import ZeroEngine


def build_engine(config: RunConfig, zero: dict, groups: Groups, codebook: Tensor | None = None) -> ZeroEngine:
    """This rank's stage of a new model under ZeRO, its weights drawn from training.seed: the same model on every layout.

    codebook: MGVQ's, [codebook_size, group_channels]; None draws one, which is of use to tests only.
    """

    def build() -> HTCVLM:
        return HTCVLM(config, groups.first_stage, groups.last_stage, groups.tp_rank, groups.device)

    def fill(module: nn.Module, whole) -> None:
        for entry in entries_of_stage(module, config, groups):
            progress.mark("build")
            # mcore sets this where it initialises; the gradient norm counts a weight on every TP rank, or once, by it
            entry.param.tensor_model_parallel = entry.weight.is_cut
            with whole([entry.param], write=True), torch.no_grad():
                if codebook is not None and entry.name == "frontend.codebook.weight":
                    entry.param.copy_(codebook)
                else:
                    entry.param.copy_(initial_value(entry.weight, config.training.seed, groups.tp_rank, groups.tp_size))

    return ZeroEngine(config, zero, groups, build, fill, lambda module: make_optimizer(module, config.optimizer))


def make_optimizer(module: nn.Module, options: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over the stage's trained parameters in two groups, with and without weight decay.

    The same two groups on every stage, neither of them empty: DeepSpeed sums the gradient norm over the stages once a group.
    """
    groups_of: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups_of[is_decayed(name, parameter)].append(parameter)
    parameter_groups = [{"params": groups_of[decayed], "weight_decay": options.weight_decay * decayed} for decayed in (True, False)]
    return torch.optim.AdamW(parameter_groups, lr=options.lr, betas=(options.beta1, options.beta2), eps=options.eps, fused=True)


def entries_of_stage(module: nn.Module, config: RunConfig, groups: Groups) -> list[Entry]:
    """The stage's parameters with their global names."""
    return stage_entries(module, config.model, sum(layers_of_stages(config)[: groups.pp_rank]))


def checkpoint_state(engine: ZeroEngine, config: RunConfig) -> EngineState:
    """What a checkpoint of this rank holds, and where a load goes."""
    g = engine.groups
    ranks = (g.rank, g.world_size, g.tp_rank, g.tp_size, g.pp_rank, g.pp_size, g.dp_rank, g.dp_size)
    place = Place(*ranks, engine.stage, config.training.precision)
    return EngineState(engine.engine, entries_of_stage(engine.module, config, g), place)
