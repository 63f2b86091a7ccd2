"""Our checkpoints for programs that use torch.distributed.checkpoint.

    dcp.load({"model/backbone.output_layer.weight": tensor}, storage_reader=DcpReader(folder))

Keys are those of the manifest; values any tensors DCP can fill (DTensors of FSDP2 or of another trainer included). Read from
torch 2.13's `StorageReader`. Unlike DCP's own file system reader this one loads no pickle.
"""

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import Metadata, StorageReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.futures import Future

from htc_megatron.checkpoint.box_file import DTYPES
from htc_megatron.checkpoint.boxes import Box
from htc_megatron.checkpoint.errors import CheckpointError
from htc_megatron.checkpoint.reader import CheckpointReader


class DcpReader(StorageReader):
    """Reads a checkpoint folder, or the latest of a folder of checkpoints."""

    def __init__(self, folder: str | Path):
        self.reader = CheckpointReader(folder)

    def reset(self, checkpoint_id: str | Path | None = None) -> None:
        if checkpoint_id is not None and Path(checkpoint_id) != self.reader.folder:
            self.reader = CheckpointReader(checkpoint_id)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | Path) -> bool:
        return Path(checkpoint_id).is_dir()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        found = {}
        for key, tensor in self.reader.manifest.tensors.items():
            boxes = [entry.box for _, entry in self.reader.index[key]]
            chunks = [ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.size)) for box in boxes]
            properties = TensorProperties(dtype=DTYPES[tensor.dtype])
            found[key] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
        return Metadata(state_dict_metadata=found)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            if item.type != LoadItemType.TENSOR:
                raise CheckpointError(f"{item.storage_index.fqn}: checkpoints hold tensors only, DCP asks for bytes")
            chunk = item.storage_index.offset or torch.Size([0] * len(item.lengths))
            offset = tuple(a + b for a, b in zip(chunk, item.storage_offsets, strict=True))
            target = planner.resolve_tensor(item).detach()
            self.reader.read_box(item.storage_index.fqn, Box(offset, tuple(item.lengths)), out=target)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done
