"""From other people's weights to one HTC-VLM: which source gives which part, what is drawn anew, and the stream of weights.

    plan = plan_import(["vicuna-7b", "clip-vit-large-patch14-336", "mgvq_f16c32_g8.pt"], config)
    with CheckpointWriter(out, plan.config) as writer:
        for name, tensor in plan.tensors():
            writer.add(name, tensor)

Each part (backbone, vision tower, projector, MGVQ's codebook) comes from the last source that has it. One weight is in memory
at a time.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import Tensor

from htc_megatron.config import ConfigError, ModelConfig, RunConfig
from htc_megatron.config_checks import check_model
from htc_megatron.config_io import to_dict
from htc_megatron.data.tokenizer import FOLDER_FILES, Tokenizer, load_tokenizer
from htc_megatron.model.initialisation import initial_value
from htc_megatron.model.mgvq import load_codebook, read_mgvq_config
from htc_megatron.weights.convert import from_hf
from htc_megatron.weights.export import EMBEDDING, VOCO
from htc_megatron.weights.families import MGVQ, Recognised, Sizes, is_spare, part_named, recognise
from htc_megatron.weights.new_parts import anchors_at_mean, grown, voco_row
from htc_megatron.weights.table import ADAPTER, Weight, component, weights

OUTPUT = "backbone.output_layer.weight"
EMBEDDING_NAME, OUTPUT_NAME = "model.language_model.embed_tokens.weight", "lm_head.weight"
ANCHORS_OUT = "frontend.anchors.fc2."
NEW_BY_NATURE = ("resampler", "projector", "anchors", "voco", ADAPTER)  # what the method adds to a language model and a tower


@dataclass(frozen=True)
class Plan:
    """An import that fits together: nothing is left to be found missing but a damaged file.

    config: the run's configuration with the model that will be written. origins: part -> where it comes from, for people.
    """

    config: RunConfig
    origins: dict[str, str]
    sources: dict[str, Recognised]
    new: str
    seed: int
    voco_from_embedding: bool

    def __len__(self) -> int:
        return len(weights(self.config.model))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Global name and stored global form of every weight, in the table's order."""
        for weight in weights(self.config.model):
            yield weight.name, self._tensor(weight)

    def _tensor(self, weight: Weight) -> Tensor:
        model, part = self.config.model, component(weight.name)
        if weight.name == VOCO:
            return self._voco()
        if part == "codebook" and "mgvq" not in self.sources:
            return load_codebook(self.config.mgvq_checkpoint, model.mgvq)
        if part == "codebook":
            return self._read(weight, "mgvq")
        if weight.name in (EMBEDDING, OUTPUT) and part in self.sources:
            return grown(self._table(weight.hf[0]), weight.shape[0])
        if part in self.sources:
            return self._read(weight, part)
        if self.new == "mean" and weight.name.startswith(ANCHORS_OUT):
            return anchors_at_mean(weight, self._table(), model.method.num_anchors)
        return initial_value(weight, self.seed, 0, 1)

    def _read(self, weight: Weight, part: str) -> Tensor:
        found = self.sources[part]
        return from_hf(weight, {name: found.source.tensor(found.names[name]) for name in weight.hf})

    def _table(self, ours: str = EMBEDDING_NAME) -> Tensor:
        """A vocabulary matrix as its source has it; the new model's own where the backbone is drawn."""
        found = self.sources.get("backbone")
        if found is None:
            embedding = next(w for w in weights(self.config.model) if w.name == EMBEDDING)
            return initial_value(embedding, self.seed, 0, 1)
        return found.source.tensor(found.names[ours])

    def _voco(self) -> Tensor:
        if self.voco_from_embedding:
            return self._table()[self.config.model.method.voco_token_id][None].clone()
        return voco_row(self._table(), self.new, self.seed)


def plan_import(
    paths: Iterable[str | Path],
    base: RunConfig,
    *,
    tokenizer: str | Path | None = None,
    voco_token_id: int | None = None,
    new: str = "mean",
    draw: Iterable[str] = (),
    seed: int = 0,
) -> Plan:
    """Look at every source and decide where each weight comes from. Raises ConfigError, before anything is written.

    base: what no source says (the method's choices, sizes of parts that are drawn). tokenizer: default: the one beside the
    backbone, else base's. voco_token_id: default: the id `<voco>` has or gets in the tokenizer, else the first row behind the
    vocabulary. new: mean | random: how the voco row and the anchors' projector begin. draw: parts of backbone, vision, codebook
    that may be drawn from the seed although no source has them.
    """
    if new not in ("mean", "random"):
        raise ConfigError(f"new is {new!r}; wanted mean or random")
    sources: dict[str, Recognised] = {}
    tree, files = to_dict(base.model), []
    for path in paths:
        found = recognise(path)
        files.append(found)
        sizes = _mgvq_sizes(found) if found.family is MGVQ else found.sizes
        for section, values in sizes.items():
            tree[section] |= values
        for part in found.parts:
            sources[part] = found
    if "projector" in sources:
        tree["method"] |= sources["projector"].sizes["method"]
    config = replace(base, mgvq_checkpoint=_mgvq_file(sources, base))
    words, place = _tokenizer(tokenizer, sources.get("backbone"), base.tokenizer)
    config = replace(config, tokenizer=str(place or ""))
    taken = _vocabulary(tree, sources.get("backbone"), words, voco_token_id)
    model = TypeAdapter(ModelConfig).validate_python(tree)
    check_model(model)
    _check_features(model, sources)
    freeze = base.training.freeze
    if model.lora.rank and "backbone" not in freeze:  # as every run with adapters must
        freeze = (*freeze, "backbone")
    config = replace(config, model=model, training=replace(base.training, freeze=freeze))
    origins = _origins(config, sources, draw, new, taken)
    _check_names(config, sources, files)
    return Plan(config, origins, sources, new, seed, taken)


def _mgvq_sizes(found: Recognised) -> Sizes:
    stored = read_mgvq_config(found.source.path)
    return {"mgvq": to_dict(stored)} if stored else {}


def _mgvq_file(sources: dict[str, Recognised], base: RunConfig) -> str:
    found = sources.get("mgvq")
    if found is not None and found.family is MGVQ:
        del sources["mgvq"]  # read by the loader of such files, which knows both of their forms
        return str(found.source.path)
    return base.mgvq_checkpoint


def _tokenizer(given: str | Path | None, backbone: Recognised | None, default: str) -> tuple[Tokenizer | None, Path | None]:
    place = Path(given) if given else None
    if place is None and backbone is not None and any((backbone.source.path / name).is_file() for name in FOLDER_FILES):
        place = backbone.source.path
        if not (place / "tokenizer_config.json").is_file() and (place / "tokenizer.model").is_file():
            place = place / "tokenizer.model"
    if place is None and default:
        place = Path(default)
    return (load_tokenizer(place), place) if place else (None, None)


def _vocabulary(tree: dict, backbone: Recognised | None, words: Tokenizer | None, chosen: int | None) -> bool:
    """Set vocabulary size and voco id in the tree. Returns whether the voco row is one that the source has trained."""
    if backbone is None:
        rows = tree["backbone"]["vocab_size"]
    elif EMBEDDING_NAME in backbone.names:
        rows = backbone.source.shapes[backbone.names[EMBEDDING_NAME]][0]
    else:
        raise ConfigError(f"{backbone.source.path} has no input embedding ({EMBEDDING_NAME})")
    stated = tree["method"]["voco_token_id"] if backbone is not None and "voco_token_id" in backbone.sizes.get("method", {}) else None
    known = words is not None and words.knows_voco
    if chosen is None:
        chosen = stated if stated is not None else words.voco_token_id if words else rows if backbone else tree["method"]["voco_token_id"]
    if words is not None and chosen != words.voco_token_id:
        raise ConfigError(f"voco_token_id is {chosen}, but the tokenizer has or gives <voco> the id {words.voco_token_id}")
    tree["method"]["voco_token_id"] = chosen
    tree["backbone"]["vocab_size"] = max(rows, chosen + 1, words.vocab_size if words else 0)
    return backbone is not None and chosen < rows and (stated == chosen or known)


def _origins(config: RunConfig, sources: dict[str, Recognised], draw: Iterable[str], new: str, taken: bool) -> dict[str, str]:
    """Where each part comes from. Refuses parts that nobody brings and that are not new by nature."""
    wanted = list(dict.fromkeys(component(weight.name) for weight in weights(config.model)))
    found: dict[str, str] = {}
    for part in wanted:
        if part == "codebook" and (config.mgvq_checkpoint or "mgvq" in sources):
            found[part] = str(sources["mgvq"].source.path if "mgvq" in sources else config.mgvq_checkpoint)
        elif part in sources:
            found[part] = f"{sources[part].source.path} ({sources[part].family.title})"
        elif part == "voco" and taken:
            found[part] = f"row {config.model.method.voco_token_id} of the backbone's embedding"
        elif part in NEW_BY_NATURE or part in draw:
            found[part] = f"new ({new})" if part in ("voco", "anchors") else "new (random)"
    if missing := [part for part in wanted if part not in found]:
        hints = {"codebook": "name MGVQ's file, or set model.method.channels=continuous", "vision": "name a CLIP folder"}
        what = "; ".join(f"{part}: {hints.get(part, 'name a folder that has it')}" for part in missing)
        raise ConfigError(
            f"no source holds these parts of the model: {what}; or let them be drawn at random with --draw {' '.join(missing)}"
        )
    return found


def _check_features(model: ModelConfig, sources: dict[str, Recognised]) -> None:
    """Refuse a tower whose features are of another layer than those that the projector was trained on."""
    projector = sources.get("projector")
    wanted = projector.sizes.get("vision", {}).get("num_layers") if projector is not None else None
    if wanted is not None and wanted != model.vision.num_layers:
        raise ConfigError(f"the tower's features are of layer {model.vision.num_layers}, but {projector.source.path} has them of {wanted}")


def _check_names(config: RunConfig, sources: dict[str, Recognised], files: list[Recognised]) -> None:
    """Every tensor that is needed is there, of its shape but for the vocabulary's rows, and none is left over unused."""
    model, faults = config.model, []
    wanted = weights(model)
    names = {name for weight in wanted for name in weight.hf}
    for weight in wanted:
        found = sources.get("mgvq" if component(weight.name) == "codebook" else component(weight.name))
        if found is None or weight.name == VOCO:
            continue
        if missing := [name for name in weight.hf if name not in found.names]:
            faults.append(f"{found.source.path} lacks {', '.join(missing)}")
            continue
        shapes = {name: found.source.shapes[found.names[name]] for name in weight.hf}
        if weight.name in (EMBEDDING, OUTPUT):
            shapes = {name: (weight.shape[0], *shape[1:]) for name, shape in shapes.items() if shape[0] <= weight.shape[0]}
        try:
            from_hf(weight, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
        except ConfigError as error:
            faults.append(f"{found.source.path}: {error}")
    for found in files:
        if found.family is MGVQ:
            continue
        for name in found.names:
            part = part_named(name)
            spare = is_spare(name, model.vision.num_layers)
            unused = sources.get(part) is not found or part not in {component(w.name) for w in wanted}
            spare = spare or (name == OUTPUT_NAME and model.backbone.tie_word_embeddings and _is_tied(found))
            if name not in names and not spare and not (unused and part is not None):
                faults.append(f"{found.source.path} has {found.names[name]}, which no weight of the model is made from")
    if faults:
        raise ConfigError("\n".join(faults[:20] + ([f"and {len(faults) - 20} more"] if len(faults) > 20 else [])))


def _is_tied(found: Recognised) -> bool:
    """Whether the output matrix that a tied model's file holds beside its embedding is that embedding."""
    return torch.equal(*(found.source.tensor(found.names[name]) for name in (EMBEDDING_NAME, OUTPUT_NAME)))
