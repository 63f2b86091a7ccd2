"""How a run fares, in one line of JSON in its folder that rank 0 writes and tools/status.py reads. Imports no torch.

<output_dir>/status.json says what the run is at; <output_dir>/exit_status, which is there from a run's end to its next start, how it
ended. The second is right where the first could not be written any more: after a rank's death, a hang or a lost disk.
"""

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

FINISHED = 0
FAILED = 1  # an error that starting again will not mend
REFUSED = 2  # the configuration
FAULT = 70  # a rank died or hung, or storage was lost: starting again is likely to help (BSD's EX_SOFTWARE)
STOPPED = 75  # on request, with a checkpoint: to be started again (BSD's EX_TEMPFAIL)
ENDS = {FINISHED: "finished", FAILED: "failed", REFUSED: "failed", FAULT: "fault", STOPPED: "stopped"}

EXIT_FILE, FILE = "exit_status", "status.json"
STALE = 300.0  # seconds without a word after which a run is not taken to be running, at least
STALE_STEPS = 10  # and as many of its steps


def node_name() -> str:
    """This node's name: SLURM's, for the virtual nodes of one machine share its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


class StatusFile:
    """Writes <output_dir>/status.json, whole or not at all. A disk that takes no writes costs the status and nothing else."""

    def __init__(self, output_dir: str | Path):
        self.path = Path(output_dir) / FILE
        self.said: dict[str, object] = {"host": node_name(), "job": os.environ.get("SLURM_JOB_ID", "")}

    def keep(self, **said: object) -> None:
        """Take in what the next `update` will write."""
        self.said |= said

    def update(self, **said: object) -> None:
        """Write what has changed and all that was said before."""
        self.said |= said | {"updated": round(time.time(), 3)}
        new = self.path.with_name(f".{FILE}.{os.getpid()}")
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new.write_text(json.dumps(self.said) + "\n")
            os.replace(new, self.path)


def end(output_dir: str | Path, code: int, message: str) -> None:
    """Add to a run's status how it ended, with the sentence that its user was given."""
    file = StatusFile(output_dir)
    if (said := read(output_dir)) is not None:
        file.keep(**said)
    file.update(state=ENDS.get(code, "failed"), message=message)


def read(folder: str | Path) -> dict | None:
    """A run's status: its last words, and the state that it ended in if it has. None: there is none that can be read."""
    folder = Path(folder)
    try:
        said = json.loads((folder / FILE).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(said, dict) or not isinstance(said.get("updated"), int | float):
        return None
    with suppress(OSError, ValueError):
        said["state"] = ENDS.get(int((folder / EXIT_FILE).read_text()), "failed")
    return said


def silent(said: dict, stale: float = STALE, now: float | None = None) -> float:
    """Seconds for which a run that has not ended has said nothing, if they are too many for it; 0 otherwise."""
    age = (time.time() if now is None else now) - said["updated"]
    limit = max(stale, STALE_STEPS * (said.get("seconds_per_step") or 0.0))
    return age if said.get("state") not in ENDS.values() and age > limit else 0.0


def in_words(seconds: float) -> str:
    """40 s, 12 min, 3 h 20 min, 2 d 4 h."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def line(folder: str | Path, said: dict, stale: float = STALE, now: float | None = None) -> str:
    """A run in one line."""
    now = time.time() if now is None else now
    step, total = said.get("step", 0), said.get("train_iters", 0)
    words = [f"{folder}: {said.get('state', 'unknown')}, step {step}/{total}"]
    if "loss" in said:
        words.append(f"loss {said['loss']:.4f}")
    if seconds := said.get("seconds_per_step"):
        words.append(f"{seconds:.2f} s/step")
        if said.get("state") not in ENDS.values():
            words.append(f"{in_words(seconds * (total - step))} to go")
    if "data_wait_share" in said:
        words.append(f"waits for data {said['data_wait_share']:.1%}")
    if "bubble" in said:
        words.append(f"bubble {said['bubble']:.0%}")
    if rank := said.get("slowest_rank"):
        words.append(f"slowest rank {rank['rank']} on {rank['host']} ({rank['over_median']:.2f} x its stage's median)")
    if said.get("restarts"):
        words.append(f"{said['restarts']} restarts")
    if said.get("job"):
        words.append(f"job {said['job']}")
    quiet = silent(said, stale, now)
    words.append(f"SILENT for {in_words(quiet)}" if quiet else f"{in_words(now - said['updated'])} ago")
    text = ", ".join(words)
    return f"{text}: {said['message']}" if said.get("message") and said.get("state") not in ("training", "finished") else text
