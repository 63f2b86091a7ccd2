"""New processes for a benchmark of several ranks, on this machine."""

import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def in_processes(count: int, function: Callable, *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returns in each of `count` new processes, by rank. They find each other as under torchrun.

    function: of a module that can be imported; arguments and answers are pickled. On GPUs where there is one for each rank,
    otherwise all on CPU. Raises torch.multiprocessing's ProcessRaisedException where one fails; the others are ended.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        on_gpu = torch.cuda.device_count() >= count
        torch.multiprocessing.spawn(_rank, (count, port, on_gpu, folder, function, arguments), nprocs=count)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(count)]


def _rank(rank: int, count: int, port: int, on_gpu: bool, folder: str, function: Callable, arguments: tuple) -> None:
    ranks = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
    os.environ |= {key: str(value) for key, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if not on_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(function(*arguments)))
