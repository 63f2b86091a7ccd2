"""checkpoint.json: what a checkpoint holds, which files it consists of, and their checksums.

JSON on purpose. torch.distributed.checkpoint keeps this in `.metadata`, a pickle, whose loading can run any code that
whoever wrote the folder liked; its safetensors storage has room for one box a tensor and file only, where a ZeRO shard
is several. So the storage here is our own: safetensors for the boxes, JSON for the rest, and nothing is ever unpickled.
"""

import json
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from htc_megatron.checkpoint.box_file import DTYPES, FileRecord, write_bytes
from htc_megatron.checkpoint.errors import CheckpointError
from htc_megatron.checkpoint.folder import MANIFEST
from htc_megatron.config import ConfigError, RunConfig
from htc_megatron.config_io import from_dict, to_yaml

FORMAT, VERSION = "htc-megatron checkpoint", 1
CONFIG = "config.yaml"


@dataclass(frozen=True)
class StoredTensor:
    """Shape and safetensors type of a global tensor."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Manifest:
    """What checkpoint.json says.

    step: optimiser steps of the run when it was written.
    optimizer_step: the optimiser's own step count; None if the checkpoint holds weights only.
    layout: the layout that wrote it (for people, and to know whether random states can be restored).
    tensors: every global tensor by key (`model/<name>`, `optimizer/<moment>/<name>`, `rng/<rank>/<name>`).
    files: every other file of the folder by name.
    extra: what the trainer keeps (schedule, data position); any JSON.
    """

    step: int
    optimizer_step: int | None
    layout: dict[str, Any]
    tensors: dict[str, StoredTensor]
    files: dict[str, FileRecord]
    extra: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write checkpoint.json, to disk. It carries its own checksum."""
        content = json.loads(json.dumps(asdict(self)))
        document = {"format": FORMAT, "version": VERSION, "crc32": _sum(content), "content": content}
        write_bytes(folder / MANIFEST, json.dumps(document, indent=1).encode())

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read and check checkpoint.json. Raises CheckpointError if it is damaged or of another kind."""
        path = folder / MANIFEST
        try:
            document = json.loads(path.read_bytes())
            kind, version = document["format"], document["version"]
            if (kind, version) != (FORMAT, VERSION):
                raise CheckpointError(f"{path}: is {kind!r} version {version!r}, {FORMAT!r} version {VERSION} is wanted")
            content = document["content"]
            if document["crc32"] != _sum(content):
                raise CheckpointError(f"{path}: is damaged (its CRC-32 does not match)")
            tensors = {key: StoredTensor(tuple(t["shape"]), t["dtype"]) for key, t in content.pop("tensors").items()}
            files = {name: FileRecord(f["bytes"], f["block"], tuple(f["crc32"])) for name, f in content.pop("files").items()}
            manifest = cls(tensors=tensors, files=files, **content)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path}: is damaged ({type(error).__name__}: {error})") from error
        for name, record in files.items():
            if record.block < 1 or len(record.crc32) != -(-record.bytes // record.block):
                raise CheckpointError(f"{path}: {len(record.crc32)} checksums of {name} do not fit its {record.bytes} bytes")
        for key, tensor in tensors.items():
            if tensor.dtype not in DTYPES:
                raise CheckpointError(f"{path}: tensor {key} has the type {tensor.dtype!r}, one of {', '.join(DTYPES)} is wanted")
        return manifest

    def check_files(self, folder: Path) -> None:
        """Compare names and lengths of the folder's files with the manifest. Raises CheckpointError with the whole list."""
        wrong = []
        for name, record in sorted(self.files.items()):
            path = folder / name
            if Path(name).name != name:
                wrong.append(f"{name!r} is not the name of a file in this folder")
            elif not path.is_file():
                wrong.append(f"{name} is missing")
            elif path.stat().st_size != record.bytes:
                wrong.append(f"{name} has {path.stat().st_size} bytes instead of {record.bytes}")
        known = {*self.files, MANIFEST}
        wrong += [f"{path.name} does not belong to it" for path in sorted(folder.iterdir()) if path.name not in known]
        if wrong:
            raise CheckpointError(f"{folder}: not the checkpoint that was written: {'; '.join(wrong)}")


def config_to_bytes(config: RunConfig) -> bytes:
    """A run's whole configuration as YAML."""
    return to_yaml(config).encode()


def config_from_bytes(text: bytes, path: Path) -> RunConfig:
    """The configuration `config_to_bytes` wrote. Raises CheckpointError if this version of the code does not know a key of it."""
    try:
        tree = yaml.safe_load(text)
        if not isinstance(tree, dict):
            raise ConfigError(f"{path}: got {tree!r}, wanted a configuration")
        return from_dict(tree, RunConfig, str(path))
    except (yaml.YAMLError, ConfigError) as error:
        raise CheckpointError(f"{path}: not a configuration this version reads: {error}") from error


def check_json(extra: dict[str, Any]) -> dict[str, Any]:
    """`extra` itself if JSON gives it back unchanged. Raises CheckpointError otherwise (tuples, tensors, integer keys)."""
    try:
        back = json.loads(json.dumps(extra, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"extra state of a checkpoint must be JSON: {error}") from error
    if back != extra:
        changed = [key for key, value in extra.items() if not isinstance(key, str) or back[key] != value]
        raise CheckpointError(f"extra state of a checkpoint must be JSON; {changed} would come back changed (tuples, integer keys)")
    return extra


def _sum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
