"""The life of a job: what asks it to stop, the status it ends with, and how often it may begin without getting on.

Imports nothing heavy: signals are watched before torch is there.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from htc_megatron.cluster.status import EXIT_FILE, FAILED, FAULT, REFUSED, STOPPED
from htc_megatron.config import ConfigError, LifeConfig

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
LIVES_FILE = "restarts.json"
STATUS_VARIABLE = "HTC_EXIT_STATUS"  # names the status file in place of <output_dir>/exit_status


class TrainingError(RuntimeError):
    """Training cannot go on, and would not if it began again; a sentence for the user."""


class NoProgress(TrainingError):
    """The run has begun too often at the same step."""


class Fault(RuntimeError):
    """Something broke that may be whole when the run begins again; a sentence for the user."""


class Stopped(Exception):
    """The run was asked to stop, has saved and ends. A sentence for the user."""


SENTENCES = {ConfigError: REFUSED, TrainingError: FAILED, Fault: FAULT, Stopped: STOPPED}


def is_sentence(error: Exception) -> bool:
    """Whether an error is one of ours, made to be read by a user."""
    return isinstance(error, tuple(SENTENCES))


def status_of(error: Exception) -> int:
    """The status that a run ends with for an error.

    What a library raises as RuntimeError may be a peer's death, a broken link or GPU, and OSError a lost disk: begun again, the run
    may be spared it. A RuntimeError of a program's own fault comes again, and then the bound on restarts ends the run.
    """
    for kind, status in SENTENCES.items():
        if isinstance(error, kind):
            return status
    again = isinstance(error, RuntimeError | OSError) and not isinstance(error, NotImplementedError | RecursionError)
    return FAULT if again and type(error).__name__ != "OutOfMemoryError" else FAILED


class ExitStatus:
    """The file in which a run's status is left for the job script: what srun and torchrun return is another's as often as not.

    The first rank that writes wins: what it ends of is the cause, the others' is the effect.
    """

    def __init__(self):
        self.path: Path | None = Path(os.environ[STATUS_VARIABLE]) if os.environ.get(STATUS_VARIABLE) else None

    def belongs_to(self, output_dir: str | Path, first: bool) -> None:
        """Settle where the file is. first: whether this is rank 0, which removes the one of the life before."""
        self.path = self.path or Path(output_dir) / EXIT_FILE
        if first:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)

    def write(self, status: int) -> None:
        """Leave `status`, unless one is there. A refused run makes no folder for it. Never raises: the process is about to end."""
        if self.path is None:
            return
        with suppress(OSError):
            if status != REFUSED:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            os.write(descriptor, f"{status}\n".encode())
            os.close(descriptor)


class Interrupt:
    """Why this rank should save and stop, if it should: SIGUSR1, SIGTERM, or the end of its time.

    As a context it catches the signals. Until `arm` is called there is nothing to save, and a signal ends the process at once with
    STOPPED, also while the main thread waits inside a library; afterwards it is taken down and `reason` tells of it. Ranks agree on
    it before each step, each step of an evaluation and while any of them waits for data; the step under way is finished, because a
    stage of a pipeline cannot leave 1F1B without the others. So a run stops one optimiser step after it was asked to at the latest.
    """

    def __init__(self, status: ExitStatus | None = None):
        self.status = status or ExitStatus()
        self.began = time.monotonic()
        self.until: list[tuple[float, str]] = []  # moments of time.monotonic() at which to stop, and what they are called
        self._signal, self._armed = "", False
        self._before: dict[int, object] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "Interrupt":
        self._reading, writing = os.pipe()
        os.set_blocking(writing, False)
        self._old_wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)  # written to as a signal comes, whatever Python is at
        self._writing = writing
        self._before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self._writing)  # ends the thread
        self._thread.join()
        os.close(self._reading)

    def _listen(self) -> None:
        while found := os.read(self._reading, 1):
            if found[0] in SIGNALS:
                with self._lock:
                    self._signal = self._signal or signal.Signals(found[0]).name
                    if not self._armed:
                        self.status.write(STOPPED)
                        os._exit(STOPPED)

    def arm(self) -> None:
        """From now on there is someone who asks for `reason`."""
        with self._lock:
            self._armed = True

    def limit(self, life: LifeConfig, environment: Mapping[str, str] = os.environ) -> None:
        """Take in the configured limit, and the end of the SLURM job."""
        if life.time_limit_s:
            self.until.append((self.began + life.time_limit_s, f"life.time_limit_s, {life.time_limit_s:g}"))
        end, begin = (environment.get(f"SLURM_JOB_{name}_TIME", "") for name in ("END", "START"))
        if life.end_margin_s and end.isdigit():
            margin = min(life.end_margin_s, (int(end) - int(begin)) / 4) if begin.isdigit() else life.end_margin_s
            left = int(end) - margin - time.time()
            self.until.append((time.monotonic() + left, f"the SLURM job's end less {margin:g} s"))

    @property
    def reason(self) -> str:
        """Why to stop; empty: there is no reason."""
        if self._signal:
            return self._signal
        now = time.monotonic()
        return next((name for moment, name in self.until if now >= moment), "")


class Lives:
    """The steps at which each life of a run began, in <output_dir>/restarts.json. Used by rank 0 alone."""

    def __init__(self, output_dir: str | Path):
        self.path = Path(output_dir) / LIVES_FILE

    def read(self) -> list[dict]:
        """One {step, began, job} a life, oldest first; began: unix time. An unreadable file tells of none."""
        try:
            lives = json.loads(self.path.read_text())["lives"]
            return [life for life in lives if isinstance(life["step"], int)]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def begin(self, step: int, most: int) -> int:
        """Take down a life that begins at `step`, and return the number of restarts. Raises NoProgress if more than `most` restarts
        have ended without a checkpoint of a later step."""
        lives = self.read()
        here = 0
        while here < len(lives) and lives[-1 - here]["step"] == step:
            here += 1
        if here > most:
            raise NoProgress(
                f"step {step}: the run has begun {here} times there without getting on, life.max_restarts_without_progress is {most}: "
                f"see its log for what ends it; to let it begin again, remove {self.path}"
            )
        self._write([*lives, {"step": step, "began": round(time.time(), 3), "job": os.environ.get("SLURM_JOB_ID", "")}])
        return len(lives)

    def finish(self) -> None:
        """The run is complete: what is done with it from now on is no restart."""
        self.path.unlink(missing_ok=True)

    def _write(self, lives: list[dict]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_name(f".{self.path.name}")
        new.write_text(json.dumps({"lives": lives}) + "\n")
        os.replace(new, self.path)
