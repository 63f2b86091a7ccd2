"""MGVQ weights: build from the configuration, load the public checkpoint or our own file, save.

Two kinds of file are read: the public `mgvq_*.pt` (a pickle with the weights under "model", loaded without running code)
and our `.safetensors`, whose metadata holds the MGVQConfig. Both use the same tensor names; see hf/modeling_mgvq.py.
"""

import argparse
import hashlib
import json
import os
import pickle
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from htc_megatron.config import ConfigError, MGVQConfig
from htc_megatron.hf.modeling_mgvq import MGVQ

METADATA_KEY = "mgvq_config"
# What encoding and looking up need; the rest of a file reconstructs pixels or trains.
ENCODING_TENSORS = ("encoder.", "quant_conv.", "quantize.embedding.")
CODEBOOK = "quantize.embedding.weight"
LISTED = 12  # tensor names a sentence lists before it counts the rest


def build_mgvq(config: MGVQConfig, encoder_only: bool = False) -> MGVQ:
    """A new MGVQ with random weights. ConfigError if its sizes do not fit together."""
    try:
        return MGVQ(**asdict(config), encoder_only=encoder_only)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def load_mgvq(path: str | Path, config: MGVQConfig | None = None, encoder_only: bool = False) -> MGVQ:
    """MGVQ with the weights of `path`, on CPU, fp32, in eval mode, frozen.

    config: the sizes wanted. None: those in a .safetensors file's metadata; the public f16c32 g8 for a .pt file.
    Sizes in the metadata must equal the wanted ones, save image_size: MGVQ is convolutional and takes any side.
    encoder_only: leave out the decoder and the statistics of training; the file may lack them too.
    ConfigError with the list if a tensor is missing, unknown or misshapen, or the file cannot be read.
    """
    path = Path(path)
    stored = read_mgvq_config(path)
    wanted = config or stored or MGVQConfig()
    if stored is not None:
        differing = [name for name, value in asdict(stored).items() if name != "image_size" and value != getattr(wanted, name)]
        if differing:
            seen = ", ".join(f"{name} {getattr(stored, name)} (wanted {getattr(wanted, name)})" for name in differing)
            raise ConfigError(f"MGVQ file {path} was made with other sizes than model.mgvq: {seen}.")
    with torch.device("meta"):
        model = build_mgvq(wanted, encoder_only)
    tensors = _read_tensors(path)
    if encoder_only:
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(ENCODING_TENSORS)}
    _check_tensors(path, tensors, model.state_dict())
    model.load_state_dict({name: tensor.to(_stored_dtype(tensor)).contiguous() for name, tensor in tensors.items()}, assign=True)
    return model.eval().requires_grad_(False)


def load_codebook(path: str | Path, config: MGVQConfig) -> Tensor:
    """The raw table [codebook_size, group_channels] fp32 of an MGVQ file: all that training from codes needs of it."""
    path = Path(path)
    tensors = {name: tensor for name, tensor in _read_tensors(path).items() if name == CODEBOOK}
    expected = {CODEBOOK: torch.empty(config.codebook_size, config.group_channels, device="meta")}
    _check_tensors(path, tensors, expected)
    return tensors[CODEBOOK].float().contiguous()


def read_mgvq_config(path: str | Path) -> MGVQConfig | None:
    """The sizes stored in a .safetensors file; None for a .pt file, which has none. ConfigError if there is nothing to read."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"MGVQ file {path} does not exist.")
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ConfigError(f"MGVQ file {path} is not a readable safetensors file: {error}.") from error
    if METADATA_KEY not in metadata:
        raise ConfigError(f"MGVQ file {path} has no {METADATA_KEY} in its metadata; files written by tools/train_mgvq.py have it.")
    try:
        return TypeAdapter(MGVQConfig).validate_json(metadata[METADATA_KEY])
    except ValidationError as error:
        raise ConfigError(f"MGVQ file {path} has an unusable {METADATA_KEY}: {error.errors()[0]['msg']}.") from error


def save_mgvq(model: MGVQ, config: MGVQConfig, path: str | Path) -> None:
    """Write weights and sizes to a .safetensors file; a reader sees the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_safetensors(tensors, path, {METADATA_KEY: json.dumps(asdict(config))})


def write_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Safetensors through a temporary name, synced and renamed."""
    partial = path.with_name(f".{path.name}.partial")
    partial.touch()
    mode = partial.stat().st_mode  # what the umask allows; safetensors itself writes for the owner alone
    save_file(tensors, partial, metadata={"format": "pt", **metadata})
    partial.chmod(mode)
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def mgvq_fingerprint(model: MGVQ) -> str:
    """SHA-256 of the weights that decide codes: equal for the public .pt and a .safetensors copy of it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(ENCODING_TENSORS):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().float().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ConfigError(f"MGVQ file {path} does not exist.")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            raise ConfigError(f"MGVQ file {path} is not a readable safetensors file: {error}.") from error
    try:
        # Training scripts put their arguments beside the weights; a Namespace holds plain values and runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ConfigError(f"MGVQ file {path} cannot be loaded as weights: {str(error).splitlines()[0]}") from error
    weights = content.get("model") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        seen = f"the keys {_listed(map(str, content))}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ConfigError(f'MGVQ file {path} holds {seen}; the public form is a dict with the tensors under "model".')
    # Saved from DistributedDataParallel, every name starts with "module.".
    wrapped = bool(weights) and all(name.startswith("module.") for name in weights)
    return {name.removeprefix("module.") if wrapped else name: tensor for name, tensor in weights.items()}


def _check_tensors(path: Path, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    faults = []
    if missing := sorted(expected.keys() - found.keys()):
        faults.append(f"lacks {_listed(missing)}")
    if unknown := sorted(found.keys() - expected.keys()):
        faults.append(f"has the unknown {_listed(unknown)}")
    shapes = [
        f"{name} of shape {tuple(found[name].shape)} (wanted {tuple(expected[name].shape)})"
        for name in sorted(expected.keys() & found.keys())
        if found[name].shape != expected[name].shape
    ]
    if shapes:
        faults.append(f"has {_listed(shapes)}")
    if faults:
        raise ConfigError(f"MGVQ file {path} {'; '.join(faults)}.")


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    rest = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + rest


def _stored_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.is_floating_point() else tensor.dtype
