"""A folder of checkpoints: which of them are complete, which is the latest, and how a new one becomes visible at once.

    checkpoints/
      latest                 the name of the newest complete checkpoint
      step_00000100/         complete: it got this name only after every byte was on disk
      .saving_step_00000200/ being written, or left by a run that was killed; removed by the next save

A step that is saved a second time becomes step_00000200-1: the old one stays until `latest` has moved.
"""

import os
import re
import shutil
from pathlib import Path

from htc_megatron.checkpoint.box_file import write_bytes
from htc_megatron.checkpoint.errors import CheckpointError

MANIFEST = "checkpoint.json"
LATEST = "latest"
TEMPORARY = ".saving_"
NAME = re.compile(r"step_(\d{8,})(?:-(\d+))?")


def checkpoints(root: str | Path) -> list[Path]:
    """The complete checkpoints in `root`, oldest step first."""
    root = Path(root)
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if NAME.fullmatch(p.name) and (p / MANIFEST).is_file()), key=_age)


def latest(root: str | Path) -> Path | None:
    """The checkpoint `latest` names; without that file, or if it names none, the newest complete one; None if there is none."""
    root = Path(root)
    complete = checkpoints(root)
    if (root / LATEST).is_file():
        name = (root / LATEST).read_text(errors="replace").strip()
        for folder in complete:
            if folder.name == name:
                return folder
    return complete[-1] if complete else None


def step_of(folder: Path) -> int:
    """The step of a complete checkpoint, by its name."""
    return _age(folder)[0]


def resolve(folder: str | Path) -> Path:
    """A checkpoint from what a user gives: the checkpoint's own folder, or a folder of checkpoints, whose latest is meant."""
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        return folder
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; a checkpoint is wanted")
    if folder.name.startswith(TEMPORARY):
        raise CheckpointError(f"{folder}: a save that was never completed; a folder named step_... is wanted")
    found = latest(folder)
    if found is None:
        raise CheckpointError(f"{folder}: holds no complete checkpoint (no {MANIFEST}, and no step_... folder with one)")
    return found


def begin(root: Path, step: int) -> Path:
    """A new empty folder to write a checkpoint into. Removes what earlier saves left unfinished."""
    root.mkdir(parents=True, exist_ok=True)
    for stale in root.glob(f"{TEMPORARY}*"):
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    folder = root / f"{TEMPORARY}step_{step:08d}"
    folder.mkdir()
    return folder


def commit(temporary: Path, keep: int = 0) -> Path:
    """Make a written folder the latest checkpoint and return its new name. keep > 0: only the newest `keep` stay."""
    root, name = temporary.parent, temporary.name.removeprefix(TEMPORARY)
    sync(temporary)
    final, copy = root / name, 0
    while final.exists():
        copy += 1
        final = root / f"{name}-{copy}"
    os.rename(temporary, final)
    sync(root)
    pointer = root / f"{TEMPORARY}{LATEST}"
    pointer.unlink(missing_ok=True)
    write_bytes(pointer, f"{final.name}\n".encode())
    os.replace(pointer, root / LATEST)
    sync(root)
    others = [folder for folder in checkpoints(root) if folder != final]
    kept = [folder for folder in others if _age(folder)[0] != _age(final)[0]]
    kept = kept[max(0, len(kept) + 1 - keep) :] if keep else kept
    for folder in others:
        if folder not in kept:
            _remove(folder)
    return final


def discard(temporary: Path) -> None:
    """Remove what a failed save has written."""
    shutil.rmtree(temporary, ignore_errors=True)


def sync(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    """Delete a checkpoint so that no half of it is ever taken for one."""
    doomed = folder.parent / f"{TEMPORARY}removed_{folder.name}"
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def _age(folder: Path) -> tuple[int, int]:
    step, copy = NAME.fullmatch(folder.name).groups()
    return int(step), int(copy or 0)
