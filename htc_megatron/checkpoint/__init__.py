"""Checkpoints that belong to the model, not to the layout that wrote them.

boxes.py       flat ranges of tensor-parallel shards as boxes of global tensors
box_file.py    safetensors files of boxes, checked block by block
manifest.py    checkpoint.json: tensors, files, checksums
folder.py      which checkpoints are complete; how a new one becomes visible at once
reader.py      CheckpointReader: any process, no process group
writer.py      CheckpointWriter: one process, tensor by tensor (imports)
shards.py      State, Shard, Place: what a rank holds, without DeepSpeed
store.py       save, save_async, load: all ranks
host.py        HostBuffers: the copy that save_async writes from
together.py    all ranks succeed or all fail
zero_state.py  EngineState: a DeepSpeed engine as a State (the only file that imports DeepSpeed)
dcp.py         DcpReader: our checkpoints for programs that use torch.distributed.checkpoint
rng.py         random states as tensors
"""

from htc_megatron.checkpoint.errors import CheckpointError, PeerLost
from htc_megatron.checkpoint.folder import checkpoints, latest
from htc_megatron.checkpoint.host import HostBuffers
from htc_megatron.checkpoint.reader import CheckpointReader
from htc_megatron.checkpoint.shards import Place, PlainState
from htc_megatron.checkpoint.store import Loaded, PendingSave, load, save, save_async
from htc_megatron.checkpoint.writer import CheckpointWriter

__all__ = [
    "CheckpointError",
    "PeerLost",
    "CheckpointReader",
    "CheckpointWriter",
    "HostBuffers",
    "Loaded",
    "PendingSave",
    "Place",
    "PlainState",
    "checkpoints",
    "latest",
    "load",
    "save",
    "save_async",
]
