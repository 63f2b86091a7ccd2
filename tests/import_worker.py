"""What ranks do with imported checkpoints: load them on a layout, write them again, compute logits and features."""

from pathlib import Path

import torch

from htc_megatron.checkpoint import CheckpointReader, load, save
from htc_megatron.config import RunConfig
from htc_megatron.config_io import from_dict, load_zero, to_dict
from htc_megatron.model.layout import ImageShape, MicroBatch, SequenceLayout
from htc_megatron.parallel import groups as process_groups
from htc_megatron.training.build import build_engine, checkpoint_state


def config_of(folder: Path, tp: int, pp: int) -> RunConfig:
    tree = to_dict(CheckpointReader(folder).config)
    tree["parallel"] |= {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    tree["training"] |= {"precision": "fp32", "freeze": []}
    return from_dict(tree)


def engine_of(folder: Path, tp: int, pp: int, groups=None, zero: int = 1):
    """The model of a checkpoint on a layout."""
    config = config_of(folder, tp, pp)
    groups = groups or process_groups.initialise(config.parallel, 0)
    engine = build_engine(config, load_zero(f"zero{zero}.json"), groups)
    state = checkpoint_state(engine, config)
    load(folder, state, optimizer=False)
    return config, groups, engine, state


def relay(pairs: list[tuple[Path, Path]], tp: int, pp: int, zero: int = 1) -> None:
    """Each first checkpoint through the layout into the second."""
    groups = None
    for source, target in pairs:
        config, groups, engine, state = engine_of(source, tp, pp, groups, zero)
        save(target, state, step=1, config=config)
        engine.destroy()


def logits_of(folder: Path, tp: int, pp: int, before: list[int], pixels: torch.Tensor | None, after: list[int]):
    """Logits of the text's rows; None off the last stage."""
    config, groups, engine, _ = engine_of(folder, tp, pp)
    shape = ImageShape.from_config(config.model)
    run = [0] * (shape.length if pixels is not None else 0)
    ids = before + run + after
    images = torch.tensor([[0, len(before)]] if run else [], dtype=torch.int64).view(-1, 2)
    layout = SequenceLayout(1, len(ids), torch.tensor([[0, 0, len(ids)]]), images, shape)
    batch = MicroBatch(torch.tensor([ids]), torch.full((1, len(ids)), -100), layout, pixels if groups.first_stage else None, None)

    def step(steps, model):
        return model(next(steps), logits=True), lambda logits: (logits.sum(), torch.tensor(1, dtype=torch.int), logits)

    reports = engine.evaluate(step, iter([batch]), 1, (1, len(ids)))
    engine.destroy()
    rows = [*range(len(before)), *range(len(before) + len(run), len(ids))]
    return reports[0][0, rows] if groups.last_stage else None


def features_of(folder: Path, tp: int, pixels: torch.Tensor) -> torch.Tensor:
    """The tower's output, [images, patches, h]."""
    _, _, engine, _ = engine_of(folder, tp, 1)
    with torch.no_grad():
        found = engine.module.frontend.vision(pixels).transpose(0, 1)
    engine.destroy()
    return found
