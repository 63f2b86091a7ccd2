"""LLaVA JSON and an image folder to shards: tokenised, checked, every image encoded once, in a thread beside what reads the next.

Nothing half-written is ever seen: the folder is built under a temporary name and renamed when it is whole. Records that cannot
be used are named with their reason in quarantine.jsonl and left out, up to a share; beyond it the preparation is refused.
"""

import json
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from htc_megatron.config import ConfigError
from htc_megatron.data.conversation import BadRecord, Sample, Template, tokenize_record
from htc_megatron.data.images import BadImage, open_image
from htc_megatron.data.known_codes import KnownCodes, image_digest
from htc_megatron.data.shards import Index, Shard, ShardBuilder, fsync
from htc_megatron.data.tokenizer import Tokenizer
from htc_megatron.hf.modeling_mgvq import MGVQ, mgvq_pixels

QUARANTINE = "quarantine.jsonl"
ENCODING = 2  # batches of images that wait for the encoder or are in it; more would only hold memory


@dataclass(frozen=True)
class CodeEncoder:
    """A frozen MGVQ as preparation uses it.

    fingerprint: of the weights (model/mgvq.py), kept in the index. batch_size: images encoded together.
    """

    model: MGVQ
    fingerprint: str
    batch_size: int = 16
    device: str = "cpu"

    def describe(self) -> dict:
        """What the index keeps: fingerprint, image_size, and the codes' shape (positions, groups)."""
        size = self.model.image_size
        positions, groups = self.encode([torch.zeros(3, size, size)]).shape[1:]
        return {"fingerprint": self.fingerprint, "image_size": size, "positions": positions, "groups": groups}

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """[3, s, s] float32 in [-1, 1]."""
        return mgvq_pixels(image, self.model.image_size)

    def encode(self, pixels: list[torch.Tensor]) -> np.ndarray:
        """Codes [images, positions, groups] int16."""
        return self.model.encode(torch.stack(pixels).to(self.device)).cpu().numpy()


@dataclass(frozen=True)
class Preparation:
    """What to prepare and how.

    data: LLaVA JSON, a .json list or .jsonl. images: folder the records' file names are relative to. output: folder to write.
    encoder: None leaves out the codes; then only `channels: continuous` can train on the result.
    codes_from: earlier outputs whose images, told by their bytes, keep the codes they have there.
    seq_length, tokens_per_image: samples longer than seq_length with their images expanded are left out; 0: no limit.
    max_bad_share: records that may be left out, as a share of all.
    shard_bytes: a shard is closed when it holds this much. part: (I, N): the I-th of N stretches of the records.
    """

    data: Path
    images: Path
    output: Path
    tokenizer: Tokenizer
    template: Template = Template()
    encoder: CodeEncoder | None = None
    codes_from: tuple[Path, ...] = ()
    seq_length: int = 0
    tokens_per_image: int = 0
    max_bad_share: float = 0.001
    shard_bytes: int = 512 << 20
    part: tuple[int, int] = (0, 1)
    overwrite: bool = False
    progress: bool = True

    @property
    def target(self) -> Path:
        """The folder that appears: output, or its part."""
        number, count = self.part
        return self.output if count == 1 else self.output / f"part-{number}-of-{count}"


@dataclass
class Work:
    """What a preparation did. encoded: images; known: those whose codes were there already.

    seconds: wall-clock time of each kind of work; encode runs beside the others, wait is for it alone. total: of all.
    """

    encoded: int = 0
    known: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("read", "decode", "resize", "encode", "wait", "write", "total"), 0.0)
    )

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[kind] += time.perf_counter() - began

    @property
    def images_per_second(self) -> float:
        """Encoded ones, over the whole time."""
        return self.encoded / self.seconds["total"] if self.seconds["total"] else 0.0


def prepare(job: Preparation, work: Work | None = None) -> Index:
    """Run the job and return the index of what was written. work: told what was done.

    Raises ConfigError where the input cannot be read, the output exists, no record is usable or too many are not; then
    nothing is written but, for the last two, <output>.quarantine.jsonl.
    """
    _check(job)
    work = work or Work()
    partial = job.target.with_name(f".{job.target.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        with work.timed("total"):
            index = _write(job, partial, work)
        index.write(partial)
        fsync(partial)
        if job.target.exists():
            shutil.rmtree(job.target)
        os.replace(partial, job.target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return index


def _write(job: Preparation, folder: Path, work: Work) -> Index:
    lines = _read_lines(job)
    index = Index(_tokenizer_entry(job.tokenizer), asdict(job.template), job.encoder and job.encoder.describe(), {}, part=list(job.part))
    counts = dict.fromkeys(("records", "samples", "images", "text_tokens", "supervised_tokens", "bad"), 0)
    bar = tqdm(lines, unit=" records", desc=f"prepare {job.data.name}", disable=not job.progress, mininterval=0.5)
    known = KnownCodes(job.codes_from, index.mgvq)
    with open(folder / QUARANTINE, "w", encoding="utf-8") as quarantine, ThreadPoolExecutor(1, "encode") as thread:
        writer = _Writer(job, folder, index, known, work, thread)
        for number, content in bar:
            counts["records"] += 1
            try:
                record = json.loads(content) if isinstance(content, str) else content
                sample = tokenize_record(record, job.tokenizer, job.template, str(number))
                _check_length(sample, job)
                writer.add(sample)
            except json.JSONDecodeError as error:
                reason, name = f"line {number + 1} is not JSON: {error}", None
            except (BadRecord, BadImage) as error:
                reason, name = str(error), record.get("id") if isinstance(record, dict) else None
            else:
                counts["samples"] += 1
                counts["text_tokens"] += sample.num_text_tokens
                counts["supervised_tokens"] += sum(sample.supervised)
                continue
            counts["bad"] += 1
            quarantine.write(json.dumps({"record": number, "id": name, "reason": reason}) + "\n")
            bar.set_postfix(bad=counts["bad"])
        writer.close()
    _check_bad(job, counts, folder)
    counts["images"] = sum(shard.images for shard in index.shards)
    index.counts = counts
    return index


class _Writer:
    """Fills shards: reads and checks the images of the samples it is given, and has a thread encode them meanwhile."""

    def __init__(self, job: Preparation, folder: Path, index: Index, known: KnownCodes, work: Work, thread: ThreadPoolExecutor):
        self.job, self.folder, self.index, self.known, self.work, self.thread = job, folder, index, known, work, thread
        self.shard = ShardBuilder()
        self.waiting: list[tuple[int, torch.Tensor]] = []  # the shard's images that go into the next batch, and their pixels
        self.encoding: deque[tuple[list[int], Future[np.ndarray]]] = deque()

    def add(self, sample: Sample) -> None:
        """Raises BadImage, and leaves the shard as it was, where an image is missing or broken."""
        fresh = {name: self._open(name) for name in dict.fromkeys(sample.images) if not self.shard.has_image(name)}
        for name, (data, digest, codes, pixels) in fresh.items():
            number = self.shard.add_image(name, data, digest, codes)
            self.work.known += codes is not None
            if pixels is not None:
                self.waiting.append((number, pixels))
                if len(self.waiting) == self.job.encoder.batch_size:
                    self._encode()
        self.shard.add_sample(sample)
        if self.shard.bytes >= self.job.shard_bytes:
            self.close()

    def close(self) -> None:
        """Write the shard at hand, if it holds a sample, and begin the next."""
        self._encode()
        self._collect(0)
        if len(self.shard):
            with self.work.timed("write"):
                name = f"shard-{len(self.index.shards):05d}.safetensors"
                entry = self.shard.write(self.folder, name, with_codes=self.job.encoder is not None)
            self.index.shards.append(entry)
            if self.job.encoder is not None:
                self.known.add(Shard(self.folder, entry), self.shard.digests)
        self.shard = ShardBuilder()

    def _open(self, name: str) -> tuple[bytes, bytes, np.ndarray | None, torch.Tensor | None]:
        """An image's bytes, digest, codes where they are known, and pixels where they have to be encoded."""
        with self.work.timed("read"):
            data = _read_image(self.job.images, name)
        digest = image_digest(data)
        codes = self.known.get(digest)
        if codes is not None:  # whoever encoded it has decoded it
            return data, digest, codes, None
        try:
            with self.work.timed("decode"):
                image = open_image(data)
        except BadImage as error:
            raise BadImage(f"image {name}: {error}") from None
        if self.job.encoder is None:
            return data, digest, None, None
        with self.work.timed("resize"):
            return data, digest, None, self.job.encoder.pixels(image)

    def _encode(self) -> None:
        """Hand the waiting images to the thread."""
        if not self.waiting:
            return
        self._collect(ENCODING - 1)
        numbers, pixels = map(list, zip(*self.waiting, strict=True))
        self.waiting = []

        def encode() -> np.ndarray:
            with self.work.timed("encode"):
                return self.job.encoder.encode(pixels)

        self.encoding.append((numbers, self.thread.submit(encode)))
        self.work.encoded += len(numbers)

    def _collect(self, left: int) -> None:
        """Put codes in their places until no more than `left` batches are under way."""
        with self.work.timed("wait"):
            while len(self.encoding) > left:
                numbers, codes = self.encoding.popleft()
                for number, one in zip(numbers, codes.result(), strict=True):
                    self.shard.codes[number] = one


def _check(job: Preparation) -> None:
    number, count = job.part
    if not 0 <= number < count:
        raise ConfigError(f"--part is {number}/{count}, wanted I/N with I from 0 to N - 1")
    if not job.data.is_file():
        raise ConfigError(f"--data {job.data}: no such file; wanted a LLaVA .json or .jsonl")
    if not job.images.is_dir():
        raise ConfigError(f"--images {job.images}: no such folder")
    if job.codes_from and job.encoder is None:
        raise ConfigError("--codes-from is given without --mgvq: name the MGVQ that made these codes")
    if job.target.exists() and not job.overwrite:
        raise ConfigError(f"--output {job.target}: it exists; name another folder or give --overwrite")


def _read_lines(job: Preparation) -> list[tuple[int, str | dict]]:
    """(number, record or line) of this part's records. A .json file must be whole; a .jsonl file is judged line by line."""
    try:
        text = job.data.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"--data {job.data}: it cannot be read as UTF-8 text: {error}") from None
    if job.data.suffix == ".jsonl":
        records = [(number, line) for number, line in enumerate(text.split("\n")) if line.strip()]
    else:
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"--data {job.data}: it is not JSON: {error}") from None
        if not isinstance(content, list):
            raise ConfigError(f"--data {job.data}: it holds a {type(content).__name__}, wanted a list of records")
        records = list(enumerate(content))
    if not records:
        raise ConfigError(f"--data {job.data}: it holds no record")
    number, count = job.part
    return records[len(records) * number // count : len(records) * (number + 1) // count]


def _read_image(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise BadImage(f"image {name} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise BadImage(f"image {name!r} is no file name: {error}") from None


def _check_length(sample: Sample, job: Preparation) -> None:
    length = sample.num_text_tokens + len(sample.images) * job.tokens_per_image
    if job.seq_length and length > job.seq_length:
        raise BadRecord(f"the sample has {length} tokens with its {len(sample.images)} images, wanted at most {job.seq_length}")


def _check_bad(job: Preparation, counts: dict, folder: Path) -> None:
    allowed = job.max_bad_share * counts["records"]
    if counts["bad"] <= allowed and counts["samples"]:
        return
    kept = job.target.with_name(f"{job.target.name}.{QUARANTINE}")
    os.replace(folder / QUARANTINE, kept)
    first = json.loads(kept.read_text().splitlines()[0]) if counts["bad"] else {"record": None, "reason": "there is none"}
    raise ConfigError(
        f"{counts['bad']} of {counts['records']} records of {job.data} cannot be used, wanted at most a share of {job.max_bad_share} "
        f"(--max-bad-share); the first is record {first['record']}: {first['reason']}; all are in {kept}"
    )


def _tokenizer_entry(tokenizer: Tokenizer) -> dict:
    return {
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "voco_token_id": tokenizer.voco_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
