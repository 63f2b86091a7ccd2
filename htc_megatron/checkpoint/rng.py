"""Random states of a rank as named tensors: torch (CPU and GPU), NumPy, Python, and megatron-core's tracker."""

import random

import numpy
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from htc_megatron.checkpoint.errors import CheckpointError

TRACKER = "megatron."


def rng_state() -> dict[str, Tensor]:
    """This process's random states. CPU tensors; `set_rng_state` is the inverse."""
    _, keys, position, has_gauss, gauss = numpy.random.get_state()
    _, words, next_gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state().clone(),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor(gauss, dtype=torch.float64),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if next_gauss is None else [next_gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state().cpu().clone()
    for name, state in get_cuda_rng_tracker().get_states().items():
        if not torch.is_tensor(state):
            raise CheckpointError(f"random state {name} is a {type(state).__name__}, a tensor is wanted (graph-safe trackers are not)")
        states[TRACKER + name] = state.cpu().clone()
    return states


def set_rng_state(states: dict[str, Tensor]) -> None:
    """Restore what `rng_state` returned. Raises CheckpointError if states are missing or too many for this process."""
    tracker = get_cuda_rng_tracker()
    ours = {"torch", "numpy", "numpy_gauss", "python", "python_gauss", *(TRACKER + name for name in tracker.get_states())}
    ours |= {"cuda"} if torch.cuda.is_available() else set()
    if ours != states.keys():
        raise CheckpointError(f"random states {sorted(states)} were saved, {sorted(ours)} are wanted")
    torch.set_rng_state(states["torch"])
    *keys, position, has_gauss = states["numpy"].tolist()
    numpy.random.set_state(("MT19937", numpy.array(keys, dtype=numpy.uint32), position, has_gauss, states["numpy_gauss"].item()))
    gauss = states["python_gauss"].tolist()
    random.setstate((3, tuple(states["python"].tolist()), gauss[0] if gauss else None))
    if "cuda" in ours:
        torch.cuda.set_rng_state(states["cuda"])
    tracker.set_states({name.removeprefix(TRACKER): state.clone() for name, state in states.items() if name.startswith(TRACKER)})
