"""Files that say of images what is in them, for probes. A label is semantic (what there is) or a detail (how it looks exactly).

JSON:  {"labels": {"shape": "semantic", "colour": "detail"},
        "images": [{"image": "0.png", "split": "train", "labels": {"shape": "circle", "colour": "red"}}, ...]}
CSV:   image,split,semantic:shape,detail:colour
       0.png,train,circle,red

Paths are relative to the file's folder. An image may lack a label (in CSV: an empty field). Either all images are of a split, train
or test, or none is.
"""

import csv
import json
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from htc_megatron.config import ConfigError
from htc_megatron.evaluation.records import parse, read_bytes, read_json

Kind = Literal["semantic", "detail"]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True)
class LabelledImage:
    """image: its path. labels: values by their names. split: None where the probe shall choose."""

    image: str
    labels: dict[str, str]
    split: Literal["train", "test"] | None = None


@dataclass(frozen=True)
class LabelSet:
    """labels: the kind of each label by its name."""

    labels: dict[str, Kind]
    images: list[LabelledImage]

    def write(self, path: str | Path) -> None:
        """As JSON; `read_labels` reads it."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def divided(self, test_share: float, seed: int) -> "LabelSet":
        """With every image in a split: as they are, or drawn from `seed` where none is. Raises ConfigError."""
        given = sum(image.split is not None for image in self.images)
        if given == len(self.images):
            return self
        if given:
            raise ConfigError(f"{given} of {len(self.images)} images are of a split; wanted all or none")
        if not 0 < test_share < 1:
            raise ConfigError(f"the test images' share is {test_share:g}; wanted above 0 and below 1")
        order = random.Random(seed).sample(range(len(self.images)), len(self.images))
        test = set(order[: round(test_share * len(order))])
        return replace(self, images=[replace(image, split="test" if i in test else "train") for i, image in enumerate(self.images)])


def read_labels(path: str | Path) -> LabelSet:
    """A file of labels, JSON or CSV by its name's end. Raises ConfigError."""
    path = Path(path)
    found = _of_csv(path) if path.suffix.lower() == ".csv" else read_json(path, LabelSet)
    unknown = {name for image in found.images for name in image.labels} - found.labels.keys()
    if unknown:
        raise ConfigError(f"{path}: label {min(unknown)!r} has no kind; wanted it among {sorted(found.labels)}")
    return replace(found, images=[replace(image, image=str(path.parent / image.image)) for image in found.images])


def _of_csv(path: Path) -> LabelSet:
    rows: Iterable[dict] = csv.DictReader(read_bytes(path).decode("utf-8-sig").splitlines())
    header = list(rows.fieldnames or [])
    columns = {name: name.partition(":")[::2] for name in header if name not in ("image", "split")}
    if "image" not in header or not columns or not all(kind in KINDS and label for kind, label in columns.values()):
        raise ConfigError(f"{path}: the header is {header}; wanted image, perhaps split, and columns like semantic:shape, detail:colour")
    images = []
    for number, row in enumerate(rows, 2):
        labels = {label: row[name] for name, (_, label) in columns.items() if row[name]}
        entry = {"image": row["image"], "labels": labels, "split": row.get("split") or None}
        images.append(parse(json.dumps(entry).encode(), LabelledImage, f"{path}: line {number}"))
    return LabelSet({label: kind for kind, label in columns.values()}, images)
