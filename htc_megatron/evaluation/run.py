"""Tasks through an exported model: each image is compressed once a task, and what is answered already is not asked again."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from htc_megatron.config import ConfigError
from htc_megatron.data.images import BadImage, open_image
from htc_megatron.evaluation.answers import AnswerFile, Maker, fingerprint
from htc_megatron.evaluation.records import read_bytes
from htc_megatron.evaluation.task import Item, Picture, Task
from htc_megatron.inference import ImageStore, answer, compress_into, load, require_export


@dataclass(frozen=True)
class Settings:
    """images_at_once: images compressed together. batch_size: prompts answered together. store: folder of images' keys and values,
    which is filled and then answered from; "" for none.
    """

    images_at_once: int = 32
    batch_size: int = 320
    dtype: str = "auto"
    device: str = "cpu"
    store: str = ""

    def __post_init__(self):
        if min(self.images_at_once, self.batch_size) < 1:
            raise ConfigError(f"{self.images_at_once} images at once in batches of {self.batch_size} prompts; wanted at least 1 of each")


@dataclass(frozen=True)
class Answered:
    """answers: by task and item key."""

    maker: Maker
    answers: dict[str, dict[str, str]]


def run(tasks: Sequence[Task], folder: Path, out: Path, settings: Settings) -> Answered:
    """Greedy answers of the exported model in `folder`, kept in out/{task}.jsonl chunk by chunk.

    The model is loaded only where an answer is missing, and after all that can be refused is known. Raises ConfigError.
    """
    require_export(folder)
    for task in tasks:
        check(task)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"answers cannot be kept in {out}: {error.strerror}") from None
    maker = Maker(fingerprint(folder), str(folder), {"dtype": settings.dtype, "do_sample": False})
    files = {task.name: AnswerFile(out, task, maker) for task in tasks}
    waiting = [task for task in tasks if not files[task.name].complete]
    if waiting:
        asker = Asker(folder, settings)
        for task in waiting:
            asker.ask(task, files[task.name])
    return Answered(maker, {name: file.answers for name, file in files.items()})


def check(task: Task) -> None:
    """Raises ConfigError where a task has no question, two of one key, or an image that is not there."""
    if not task.items:
        raise ConfigError(f"{task.name} has no question")
    seen: set[str] = set()
    for item in task.items:
        if item.key in seen:
            raise ConfigError(f"{task.name} has two questions of key {item.key!r}")
        seen.add(item.key)
    missing = [str(p) for p in _pictures(task.items) if isinstance(p, Path) and not p.is_file()]
    if missing:
        raise ConfigError(f"{task.name}: {len(missing)} images do not exist, {missing[0]} among them")


class Asker:
    """An exported model that answers tasks."""

    def __init__(self, folder: Path, settings: Settings):
        self.settings, self.store = settings, None
        self.model, self.processor = load(folder, settings.dtype, settings.device)
        if settings.store:
            self.store = ImageStore(settings.store, self.model, self.processor.image_processor, create=True)

    def ask(self, task: Task, file: AnswerFile) -> None:
        """Answer what is missing in `file`. A chunk is asked whole, so that answers do not depend on where a run was cut off."""
        chunks = [chunk for chunk in chunked(task.items, self.settings.images_at_once) if any(i.key not in file.answers for i in chunk)]
        if self.store is not None:
            self._compress(task.name, _pictures(item for chunk in chunks for item in chunk))
        with tqdm(total=len(task.items), desc=task.title, unit=" questions", mininterval=0.5) as bar:
            bar.update(len(task.items) - sum(map(len, chunks)))
            for chunk in chunks:
                file.append(self._answer(task.name, chunk))
                bar.update(len(chunk))

    def _answer(self, name: str, chunk: list[Item]) -> dict[str, str]:
        pictures = _pictures(chunk)
        place = {picture: number for number, picture in enumerate(pictures)}
        texts = answer(
            self.model,
            self.processor,
            [_opened(name, picture) for picture in pictures] if self.store is None else pictures,
            [(tuple(place[picture] for picture in _of(item)), item.prompt) for item in chunk],
            max_new_tokens=chunk[0].max_new_tokens,
            batch_size=self.settings.batch_size,
            images_at_once=len(pictures),
            store=self.store,
        )
        return {item.key: text for item, text in zip(chunk, texts, strict=True)}

    def _compress(self, name: str, pictures: list[Picture]) -> None:
        said: list[str] = []
        with tqdm(pictures, desc=f"{name}: images", unit=" images", mininterval=0.5) as bar:
            counts = compress_into(
                self.store, self.model, self.processor.image_processor, bar, self.settings.images_at_once, say=said.append
            )
        if counts.bad:
            raise ConfigError(f"{name}: {counts.bad} images cannot be used: {next(text for text in said if 'left out' in text)}")


def chunked(items: Sequence[Item], images_at_once: int) -> Iterator[list[Item]]:
    """Items in stretches of about so many images, those to the same images side by side, and of one `max_new_tokens` each."""
    groups: dict[tuple, list[Item]] = {}
    for item in items:
        groups.setdefault((item.max_new_tokens, _of(item)), []).append(item)
    chunk: list[Item] = []
    images = 0
    for (limit, pictures), group in sorted(groups.items(), key=lambda entry: entry[0][0]):
        if chunk and (images >= images_at_once or limit != chunk[0].max_new_tokens):
            yield chunk
            chunk, images = [], 0
        chunk += group
        images += len(pictures)
    if chunk:
        yield chunk


def _of(item: Item) -> tuple[Picture, ...]:
    return item.image if isinstance(item.image, tuple) else (item.image,)


def _pictures(items: Iterable[Item]) -> list[Picture]:
    """Each picture once, in the order of the items."""
    return list(dict.fromkeys(picture for item in items for picture in _of(item)))


def _opened(name: str, picture: Picture) -> Image.Image:
    try:
        return open_image(picture if isinstance(picture, bytes) else read_bytes(picture))
    except BadImage as error:
        shown = f"{len(picture)} bytes" if isinstance(picture, bytes) else picture
        raise ConfigError(f"{name}: image {shown}: {error}") from None
