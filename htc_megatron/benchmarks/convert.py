"""Import and export beside `cp` of the same bytes: seconds and peak resident memory, on synthetic files of true shapes.

Every program starts with its files out of the page cache, and ends with what it wrote on disk.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from htc_megatron.benchmarks.result import Result, Say
from htc_megatron.config import BackboneConfig, ConfigError, ModelConfig, VisionConfig
from htc_megatron.weights.convert import to_hf
from htc_megatron.weights.export import hf_config
from htc_megatron.weights.families import LLAMA, VIT
from htc_megatron.weights.safetensors_stream import Entry, write_files
from htc_megatron.weights.table import Weight, weights

SIZES = {  # name: (backbone, tower with all of CLIP's layers)
    "7b": (BackboneConfig(vocab_size=32000), VisionConfig(num_layers=24)),
    "1b": (
        BackboneConfig(num_layers=16, hidden_size=2048, ffn_hidden_size=8192, num_query_groups=8, vocab_size=32000),
        VisionConfig(num_layers=24),
    ),
    "tiny": (
        BackboneConfig(num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2, vocab_size=320),
        VisionConfig(image_size=28, hidden_size=32, ffn_hidden_size=64, num_layers=3, num_attention_heads=2),
    ),
}
NOISE = 1 << 25  # random entries that tensors are cut from


def write_synthetic(folder: Path, size: str, seed: int = 0) -> list[Path]:
    """Folders `llama` and `clip` as their publishers write them, fp16, random. Returns their paths. Raises ConfigError."""
    if size not in SIZES:
        raise ConfigError(f"size is {size!r}; wanted one of {', '.join(SIZES)}")
    backbone, vision = SIZES[size]
    model = replace(ModelConfig(), backbone=backbone, vision=vision)
    noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(seed)).mul_(0.02).half()
    shapes = {"llama": {}, "clip": {}}
    for weight in weights(model):
        parts = dict(zip(weight.hf, _shapes(weight), strict=True))
        for name, shape in parts.items():
            if weight.name.startswith("backbone."):
                shapes["llama"][LLAMA.theirs(name)] = shape
            elif name.startswith(VIT):
                shapes["clip"]["vision_model." + name.removeprefix(VIT)] = shape
    shapes["clip"] |= {f"vision_model.post_layernorm.{kind}": (vision.hidden_size,) for kind in ("weight", "bias")}
    for name, found in shapes.items():
        (folder / name).mkdir(parents=True)
        entries = [Entry(key, shape, torch.float16) for key, shape in found.items()]
        write_files(folder / name, entries, _random(entries, noise))
    settings = hf_config(model)
    for name, config in (("llama", settings.text_config), ("clip", settings.vision_config)):
        config.save_pretrained(folder / name)
    return [folder / name for name in shapes]


def _shapes(weight: Weight) -> list[tuple[int, ...]]:
    """Shapes of the tensors that a weight is made from."""
    return [tuple(tensor.shape) for tensor in to_hf(weight, torch.empty(weight.shape, device="meta")).values()] if weight.hf else []


def _random(entries: list[Entry], noise: Tensor) -> Iterator[tuple[str, Tensor]]:
    for number, entry in enumerate(entries):
        count = entry.nbytes // 2
        start = (number * 7919) % 1000
        repeats = -(-(count + start) // len(noise))
        yield entry.name, noise.repeat(repeats)[start : start + count].view(entry.shape)


def measure_converting(convert: Path, folder: Path, size: str, rounds: int, say: Say) -> dict[str, Any]:
    """Medians over `rounds` of seconds and peak memory of import, export and `cp`. convert: the tool. folder: new, removed at the end."""
    folder.mkdir(parents=True)
    try:
        say(f"writing synthetic {size} files into {folder}")
        sources = write_synthetic(folder / "source", size)
        size_bytes = _bytes(folder / "source")
        _forget(folder / "source")
        found: dict[str, list[tuple[float, int]]] = {"cp": [], "import": [], "cp of the checkpoint": [], "export": []}
        settings = ["--set", "model.method.channels=continuous"]
        imports = [sys.executable, convert, "import", *sources, folder / "checkpoint", *settings]
        exports = [sys.executable, convert, "export", "--part", "backbone", folder / "checkpoint", folder / "hf"]
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            found["cp"].append(_run(["cp", "-r", folder / "source", folder / "copy"], folder / "copy", folder / "source"))
            shutil.rmtree(folder / "copy")
            found["import"].append(_run(imports, folder / "checkpoint", folder / "source"))
            found["export"].append(_run(exports, folder / "hf", folder / "checkpoint"))
            written = _bytes(folder / "hf")
            shutil.rmtree(folder / "hf")
            found["cp of the checkpoint"].append(
                _run(["cp", "-r", folder / "checkpoint", folder / "copy"], folder / "copy", folder / "checkpoint")
            )
            shutil.rmtree(folder / "copy")
            shutil.rmtree(folder / "checkpoint")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    seconds = {name: statistics.median(s for s, _ in runs) for name, runs in found.items()}
    memory = {name: max(m for _, m in runs) for name, runs in found.items()}
    return dict(
        size=size,
        rounds=rounds,
        source_bytes=size_bytes,
        exported_bytes=written,
        seconds=seconds,
        peak_resident_bytes=memory,
        import_over_cp=seconds["import"] / seconds["cp"],
        export_over_cp=seconds["export"] / seconds["cp of the checkpoint"],
        cpus=os.cpu_count(),
    )


def _run(command: list, written: Path, read: Path) -> tuple[float, int]:
    """Seconds until everything is on disk, and the program's peak resident memory in bytes."""
    _forget(read)
    started = time.perf_counter()
    peak = 0
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            peak = max(peak, _peak_resident(process.pid))
            time.sleep(0.02)
        if process.returncode:
            errors.seek(0)
            said = errors.read().strip().splitlines()[-1:]
            raise ConfigError(f"{' '.join(map(str, command))} ended with status {process.returncode}: {' '.join(said)}")
    for file in _files(written):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    return time.perf_counter() - started, peak


def _peak_resident(pid: int) -> int:
    """Linux's high-water mark of a process, mapped files included; getrusage's would begin with this process's own."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in _files(folder))


def _forget(folder: Path) -> None:
    """Let the page cache go of a folder's files, so that they are read from disk."""
    for file in _files(folder):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--size", choices=("7b", "1b", "tiny"), default="7b", help="of the synthetic LLaMA (default: %(default)s)")
    command.add_argument("--rounds", type=int, default=3, help="seconds are medians over them (default: %(default)s)")
    command.add_argument("--folder", type=Path, help="where files are written and removed again, four times the model (default: TMPDIR)")


def run(args: argparse.Namespace, say: Say) -> Result:
    """The figures of `measure_converting`, by the convert.py that stands beside the tool. Raises ConfigError."""
    folder = (args.folder or Path(tempfile.gettempdir())) / f"benchmark_convert_{os.getpid()}"
    found = measure_converting(Path(sys.argv[0]).resolve().with_name("convert.py"), folder, args.size, args.rounds, say)
    rows = [("synthetic files", f"{found['source_bytes'] / 2**30:.2f} GiB")]
    for name, seconds in found["seconds"].items():
        peak = found["peak_resident_bytes"][name]
        rows.append((name, f"{seconds:.1f} s, {peak / 2**30:.2f} GiB resident at most"))
    return Result(rows, {name: found[name] for name in ("import_over_cp", "export_over_cp")}, found)
