"""Tensors of other people's files, one at a time: safetensors and pytorch_model.bin, single, sharded by an index, or one file.

A source keeps names and shapes only. Files are opened anew for a tensor and closed with it, so that mapped pages of a whole
checkpoint never pile up in resident memory.
"""

import argparse
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from htc_megatron.config import ConfigError

SAFETENSORS, PICKLES = "model.safetensors", "pytorch_model.bin"
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")  # peft's
REOPEN = 1 << 30  # bytes handed out before a mapped .bin is let go of


class Source:
    """The tensors of some files. path: what the user named. shapes: of every tensor, by its name in the files."""

    def __init__(self, path: Path, files: dict[str, Path], shapes: dict[str, tuple[int, ...]]):
        self.path, self.files, self.shapes = path, files, shapes
        self._mapped: tuple[Path, dict[str, Tensor]] | None = None
        self._handed_out = 0

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU, in its stored type. Raises ConfigError where its file cannot be read any more."""
        file = self.files[name]
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt") as opened:
                    return opened.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"{file}: {name} cannot be read: {error}") from error
        if self._mapped is None or self._mapped[0] != file or self._handed_out > REOPEN:
            self._mapped, self._handed_out = None, 0
            self._mapped = (file, _read_pickle(file))
        tensor = self._mapped[1][name]
        self._handed_out += tensor.numel() * tensor.element_size()
        return tensor


def open_source(path: str | Path) -> Source:
    """The weights in a folder (its index, or its one file of weights), or in one file. Raises ConfigError if there are none."""
    path = Path(path)
    if path.is_file():
        return _files(path, [path])
    if not path.is_dir():
        raise ConfigError(f"{path} does not exist; wanted a folder with weights, or a .safetensors, .bin or .pt file")
    for name in (SAFETENSORS, PICKLES, *ADAPTERS):
        if (path / f"{name}.index.json").is_file():
            return _sharded(path, path / f"{name}.index.json")
        if (path / name).is_file():
            return _files(path, [path / name])
    raise ConfigError(f"{path} has no weights; wanted {SAFETENSORS} or {PICKLES}, or an index of either ({SAFETENSORS}.index.json)")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object. Raises ConfigError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}; wanted keys and values")
    return content


def _sharded(path: Path, index: Path) -> Source:
    """Files of an index, which must hold exactly what it says."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ConfigError(f"{index} has no weight_map; wanted the file of every tensor")
    names = sorted(set(places.values()))
    if absent := [name for name in names if Path(name).name != name or not (path / name).is_file()]:
        raise ConfigError(f"{index} names files that are not in its folder: {', '.join(absent)}")
    source = _files(path, [path / name for name in names])
    found = {name: file.name for name, file in source.files.items()}
    if wrong := sorted(name for name in places.keys() | found.keys() if places.get(name) != found.get(name)):
        seen = ", ".join(f"{n} (index: {places.get(n)}, found in: {found.get(n)})" for n in wrong[:4])
        raise ConfigError(f"{index} and its files disagree about {len(wrong)} tensors: {seen}")
    return source


def _files(path: Path, files: list[Path]) -> Source:
    where: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        for name, shape in _shapes(file).items():
            if name in where:
                raise ConfigError(f"{name} stands in {where[name].name} and in {file.name}; wanted it once")
            where[name], shapes[name] = file, shape
    if not shapes:
        raise ConfigError(f"{path} holds no tensors")
    return Source(path, where, shapes)


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as opened:
                return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{file} is not a readable safetensors file: {error}") from error
    return {name: tuple(tensor.shape) for name, tensor in _read_pickle(file).items()}


def _read_pickle(file: Path) -> dict[str, Tensor]:
    """A .bin or .pt file's tensors, mapped where its form allows. No code of the file is run."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # training scripts keep their arguments beside the weights
            try:
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # a file of the form before torch 1.6 cannot be mapped
                content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise ConfigError(f"{file} cannot be loaded as weights: {str(error).splitlines()[0]}") from error
    if isinstance(content, dict):
        for key in ("model", "state_dict"):
            if isinstance(content.get(key), dict):
                content = content[key]
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise ConfigError(f"{file} holds a {type(content).__name__} without tensors; wanted names and tensors")
    return tensors
