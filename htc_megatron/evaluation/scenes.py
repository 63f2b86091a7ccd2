"""Generated scenes: pictures of 64 pixels with two to four objects, and questions whose answers are known from how they were drawn.

Every scene is a function of (seed, split, index). An object has a quadrant and a colour, neither of which another one has,
a shape, a shade, a texture and a size. Questions are of two kinds, which are scored apart:

SEMANTIC   what there is and how it stands to the rest: shape, colour, exists, left, above
DETAIL     how it looks exactly: shade, texture, size, position, count

Attributes are drawn uniformly and independently, and what is asked of a pair is asked in random order, so each question text
has its answers equally often: who does not look cannot do better than `chance_of` the question's type.
"""

import hashlib
import io
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw

from htc_megatron.evaluation.easy_vqa import is_correct, majority_answers

SIDE = 64  # pixels
FINE = 4  # pictures are drawn this many times larger and reduced, which smooths edges
COLOURS = {"red": (205, 45, 45), "green": (40, 160, 60), "blue": (50, 80, 215), "yellow": (215, 190, 35)}
SHAPES = {"square": (1.0, 1.0), "bar": (1.0, 0.5), "pillar": (0.5, 1.0)}  # width and height, of the size's
SHADES = ("light", "dark")
TEXTURES = ("plain", "striped", "dotted")
SIZES = {"small": (6.0, 7.5), "large": (11.0, 12.5)}  # half of an object's longer side in pixels, from and to
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
COUNTS = (2, 3, 4)
KINDS = {"semantic": ("shape", "colour", "exists", "left", "above"), "detail": ("shade", "texture", "size", "position", "count")}
LOOKS = {  # questions about one object's attribute
    "shape": "what shape is {}?",
    "colour": "what colour is {}?",
    "shade": "is {} light or dark?",
    "texture": "what texture is {}?",
    "size": "is {} small or large?",
}
CHOICES = {"shape": 3, "colour": 4, "texture": 3, "count": 3, "position": 4}  # answers that a question of the type may have; else two


@dataclass(frozen=True)
class Thing:
    """An object of a scene. x, y: its middle, radius: half its longer side, all in pixels."""

    colour: str
    shape: str
    shade: str
    texture: str
    size: str
    quadrant: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """things: in reading order of their quadrants. grey: the background's level."""

    things: tuple[Thing, ...]
    grey: int


@dataclass(frozen=True)
class Question:
    """image: the number of its picture in the split. type: one of KINDS' values."""

    image: int
    text: str
    answer: str
    type: str

    @property
    def kind(self) -> str:
        """semantic or detail."""
        return next(kind for kind, types in KINDS.items() if self.type in types)


def make_scene(chance: random.Random) -> Scene:
    """A scene drawn from `chance`."""
    count = chance.choice(COUNTS)
    quadrants = sorted(chance.sample(QUADRANTS, count), key=QUADRANTS.index)
    things = []
    for colour, quadrant in zip(chance.sample([*COLOURS], count), quadrants, strict=True):
        size = chance.choice([*SIZES])
        radius = chance.uniform(*SIZES[size])
        room = SIDE / 4 - 1 - radius  # an object stays within its quadrant
        middle_x = SIDE / 4 + SIDE / 2 * quadrant.endswith("right")
        middle_y = SIDE / 4 + SIDE / 2 * quadrant.startswith("bottom")
        looks = chance.choice([*SHAPES]), chance.choice(SHADES), chance.choice(TEXTURES)
        place = middle_x + chance.uniform(-room, room), middle_y + chance.uniform(-room, room)
        things.append(Thing(colour, *looks, size, quadrant, *place, radius))
    return Scene(tuple(things), chance.randrange(105, 150))


def draw(scene: Scene) -> Image.Image:
    """The scene's picture, RGB, SIDE x SIDE."""
    picture = Image.new("RGB", (SIDE * FINE, SIDE * FINE), (scene.grey,) * 3)
    half = SIDE * FINE // 2
    for thing in scene.things:
        corner = half * thing.quadrant.endswith("right"), half * thing.quadrant.startswith("bottom")
        picture.paste(_paint(thing), corner, ImageChops.multiply(_outline(thing, corner), _texture(thing.texture)))
    return picture.reduce(FINE)


def ask(scene: Scene, image: int, chance: random.Random) -> list[Question]:
    """One question of each type that the scene allows, about objects drawn from `chance`, in random order.

    Left and above are asked of two objects whose quadrants differ in that direction, so that there is no doubt; whether a shape
    exists where one is there and one is not.
    """
    things = scene.things
    found = [("count", "how many objects are there?", str(len(things)))]
    for type, text in LOOKS.items():
        thing = chance.choice(things)
        found.append((type, text.format(thing.quadrant), getattr(thing, type)))
    thing = chance.choice(things)
    found.append(("position", f"where is {thing.colour}?", thing.quadrant))
    there = sorted({thing.shape for thing in things})
    if missing := [shape for shape in SHAPES if shape not in there]:
        answer = chance.choice(("yes", "no"))
        found.append(("exists", f"is there a {chance.choice(there if answer == 'yes' else missing)}?", answer))
    for type, word, side in (("left", "left", "left"), ("above", "higher", "top")):
        here = [thing for thing in things if side in thing.quadrant]
        there = [thing for thing in things if side not in thing.quadrant]
        if here and there:
            pair = [answer := chance.choice(here), chance.choice(there)]
            chance.shuffle(pair)
            found.append((type, f"which is {word}, {pair[0].colour} or {pair[1].colour}?", answer.colour))
    chance.shuffle(found)
    return [Question(image, text, answer, type) for type, text, answer in found]


def describe(scene: Scene) -> str:
    """A caption that names every attribute of every object in reading order."""
    return ", ".join(f"{t.quadrant} {t.size} {t.shade} {t.texture} {t.colour} {t.shape}" for t in scene.things)


@dataclass(frozen=True)
class Picture:
    """A scene of a split with its PNG and questions."""

    scene: Scene
    png: bytes
    questions: tuple[Question, ...]


def pictures(split: str, count: int, seed: int = 0, unlike: frozenset[bytes] = frozenset()) -> Iterator[Picture]:
    """`count` pictures of a split; scenes whose picture's digest is in `unlike` are passed over."""
    index = made = 0
    while made < count:
        chance = random.Random(f"{seed}/{split}/{index}")
        index += 1
        scene = make_scene(chance)
        data = io.BytesIO()
        draw(scene).save(data, "PNG", compress_level=1)
        if digest(data.getvalue()) in unlike:
            continue
        yield Picture(scene, data.getvalue(), tuple(ask(scene, made, chance)))
        made += 1


def digest(png: bytes) -> bytes:
    """What pictures are told apart by."""
    return hashlib.sha256(png).digest()


def caption_records(scenes: Sequence[Scene]) -> list[dict]:
    """LLaVA records that ask for each picture's caption."""
    return [
        {
            "id": f"{i}",
            "image": f"{i}.png",
            "conversations": [{"from": "human", "value": "<image>\ndescribe it."}, {"from": "gpt", "value": describe(scene)}],
        }
        for i, scene in enumerate(scenes)
    ]


def write_questions(questions: Iterable[Question], path: Path) -> None:
    """JSON lines; `read_questions` reads them."""
    path.write_text("".join(json.dumps(vars(question)) + "\n" for question in questions), encoding="utf-8")


def read_questions(path: Path) -> list[Question]:
    """What `write_questions` wrote."""
    return [Question(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def chance_of(type: str) -> float:
    """Share of a type's questions that is answered right without looking, at best."""
    return 1 / CHOICES.get(type, 2)


def blind(train: Sequence[Question], test: Sequence[Question]) -> list[str]:
    """Answers to `test` of who reads but does not look: the most frequent answer to the same words in `train`."""
    answers = majority_answers(train, lambda question: question.text)
    return [answers.get(question.text, "") for question in test]


def score(questions: Sequence[Question], predictions: Sequence[str]) -> dict[str, float]:
    """Accuracy, in [0, 1], of each type, of "semantic" and "detail", and of "all" questions."""
    asked, right = Counter(), Counter()
    for question, prediction in zip(questions, predictions, strict=True):
        for group in (question.type, question.kind, "all"):
            asked[group] += 1
            right[group] += is_correct(prediction, question.answer)
    return {group: right[group] / asked[group] for group in (*KINDS["semantic"], *KINDS["detail"], *KINDS, "all") if asked[group]}


def _paint(thing: Thing) -> tuple[int, int, int]:
    """The object's colour, mixed with white or black."""
    towards, share = (255, 0.5) if thing.shade == "light" else (0, 0.35)
    return tuple(round(level + (towards - level) * share) for level in COLOURS[thing.colour])


def _outline(thing: Thing, corner: tuple[int, int]) -> Image.Image:
    """A mask of the object in its quadrant, which begins at `corner`."""
    mask = Image.new("L", (SIDE * FINE // 2,) * 2)
    canvas, (width, height) = ImageDraw.Draw(mask), SHAPES[thing.shape]
    x, y, r = FINE * thing.x - corner[0], FINE * thing.y - corner[1], FINE * thing.radius
    canvas.rectangle((x - r * width, y - r * height, x + r * width, y + r * height), fill=255)
    return mask


@cache
def _texture(name: str) -> Image.Image:
    """A mask of a quadrant that lets an object show between its stripes or dots, which have the background's colour."""
    mask = Image.new("L", (SIDE * FINE // 2,) * 2, 255)
    canvas, step = ImageDraw.Draw(mask), 4 * FINE
    for y in range(0, mask.height, step):
        if name == "striped":
            canvas.rectangle((0, y, mask.width, y + step // 3), fill=0)
        elif name == "dotted":
            for x in range(0, mask.width, step):
                canvas.ellipse((x, y, x + step // 2, y + step // 2), fill=0)
    return mask
