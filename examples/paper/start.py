"""A model's first weights: what stage 1 has of them, and a new model's own where it has none."""

from pathlib import Path

from htc_megatron.checkpoint import CheckpointReader, CheckpointWriter
from htc_megatron.config import RunConfig
from htc_megatron.model.initialisation import initial_value
from htc_megatron.model.mgvq import load_codebook
from htc_megatron.weights import weights

CODEBOOK = "frontend.codebook.weight"


def write_start(source: Path, config: RunConfig, out: Path) -> None:
    """A checkpoint of `config.model` in the folder `out`.

    Every weight that the checkpoint in `source` has is taken from there. MGVQ's codebook comes from its file, and all others, such as
    the anchors' projector, are drawn from training.seed. Raises CheckpointError where a weight has another shape there.
    """
    reader = CheckpointReader(source)
    known = set(reader.names)
    with CheckpointWriter(out, config) as writer:
        for weight in weights(config.model):
            if weight.name in known:
                tensor = reader.tensor(weight.name)
            elif weight.name == CODEBOOK:
                tensor = load_codebook(config.mgvq_checkpoint, config.model.mgvq)
            else:
                tensor = initial_value(weight, config.training.seed, 0, 1)
            writer.add(weight.name, tensor)
