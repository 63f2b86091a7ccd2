"""Generated scenes: the same from a seed, answered as the description says, balanced, and no test picture among the training ones."""

import io
import random
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from htc_megatron.evaluation import scenes
from htc_megatron.evaluation.scenes import KINDS, Question, Thing

TRAIN = [*scenes.pictures("train", 400, seed=3)]


def thing(colour: str, shape: str, quadrant: str, x: float, y: float, **looks: str) -> Thing:
    looks = {"shade": "dark", "texture": "plain", "size": "small"} | looks
    return Thing(colour=colour, shape=shape, quadrant=quadrant, x=x, y=y, radius=7.0, **looks)


def answer_of(question: Question, caption: str, scene: scenes.Scene) -> str:
    """The answer from the caption's words and the objects' coordinates, without the generator's own way to it."""
    objects = [phrase.split() for phrase in caption.split(", ")]
    words = question.text.rstrip("?").replace(",", "").split()
    if question.type == "count":
        return str(len(objects))
    if question.type == "exists":
        return "yes" if words[-1] in [o[-1] for o in objects] else "no"
    if question.type in ("left", "above"):
        axis = "x" if question.type == "left" else "y"
        return min((thing for thing in scene.things if thing.colour in words), key=lambda thing: getattr(thing, axis)).colour
    (row, column, size, shade, texture, colour, shape), *others = [o for o in objects if {*o[:2]} <= {*words} or o[-2] in words]
    assert not others
    return {"shape": shape, "colour": colour, "shade": shade, "texture": texture, "size": size, "position": f"{row} {column}"}[
        question.type
    ]


def test_a_seed_gives_the_same_bytes():
    again = [*scenes.pictures("train", 400, seed=3)]
    assert again == TRAIN
    assert [p.png for p in scenes.pictures("train", 5, seed=4)] != [p.png for p in TRAIN[:5]]


def test_answers_are_those_of_the_description():
    asked = Counter()
    for number, picture in enumerate(TRAIN):
        for question in picture.questions:
            assert question.answer == answer_of(question, scenes.describe(picture.scene), picture.scene), question
            assert question.image == number
            asked[question.type] += 1
    assert [kind for kind in asked if asked[kind] < 150] == [] and asked.keys() == {t for types in KINDS.values() for t in types}


@pytest.mark.parametrize("index", range(12))
def test_the_picture_shows_what_is_described(index):
    """Pixels of a colour's hue lie in its quadrant; a light object's brightest is brighter than a dark one's."""
    picture = TRAIN[index]
    hsv = np.asarray(Image.open(io.BytesIO(picture.png)).convert("HSV"), np.int16)
    hues = {name: int(np.asarray(Image.new("RGB", (1, 1), rgb).convert("HSV"))[0, 0, 0]) for name, rgb in scenes.COLOURS.items()}
    coloured = hsv[..., 1] > 60
    assert hsv.shape == (64, 64, 3)
    for name, hue in hues.items():
        distance = np.abs((hsv[..., 0] - hue + 128) % 256 - 128)
        ys, xs = np.nonzero(coloured & (distance < 10))
        found = next((t for t in picture.scene.things if t.colour == name), None)
        assert (found is None) == (len(xs) == 0)
        if found is not None:
            assert (xs.min() >= 32) == (xs.max() >= 32) == found.quadrant.endswith("right")
            assert (ys.min() >= 32) == (ys.max() >= 32) == found.quadrant.startswith("bottom")
            width, height = xs.max() - xs.min() + 1, ys.max() - ys.min() + 1
            assert (max(width, height) > 18) == (found.size == "large"), (width, height, found)
            assert found.shape == ("bar" if width > 1.3 * height else "pillar" if height > 1.3 * width else "square")


@pytest.mark.parametrize("attribute", ["shape", "shade", "texture"])
def test_every_look_changes_the_picture(attribute):
    choices = {"shape": scenes.SHAPES, "shade": scenes.SHADES, "texture": scenes.TEXTURES}[attribute]
    other = thing("red", "square", "bottom right", 48, 48)
    looks = {"shape": "square"} | {attribute: None}
    drawn = set()
    for choice in choices:
        made = thing("blue", quadrant="top left", x=16, y=16, **(looks | {attribute: choice}))
        drawn.add(scenes.draw(scenes.Scene((made, other), 120)).tobytes())
    assert len(drawn) == len(choices)


def test_test_pictures_are_not_among_the_training_ones():
    """Where a scene is drawn again in the other split it is passed over, and the split is as large as it was to be."""
    seen = frozenset(scenes.digest(picture.png) for picture in TRAIN)
    test = [*scenes.pictures("test", 50, seed=3, unlike=seen)]
    assert seen.isdisjoint(scenes.digest(picture.png) for picture in test)
    passed = [*scenes.pictures("train", 10, seed=3, unlike=frozenset(scenes.digest(p.png) for p in TRAIN[:4]))]
    assert [p.png for p in passed] == [p.png for p in TRAIN[4:14]]
    assert [q.image for p in passed for q in p.questions] == [i for i, p in enumerate(TRAIN[4:14]) for _ in p.questions]


def test_answers_are_balanced():
    """No answer to a type's questions is much more frequent than chance, and who reads but does not look is at chance."""
    given = defaultdict(Counter)
    chance = random.Random(5)
    for number in range(2000):
        for question in scenes.ask(scenes.make_scene(chance), number, chance):
            given[question.type][question.answer] += 1
    for type, answers in given.items():
        choices = len(scenes.COLOURS) if type in ("left", "above", "colour") else scenes.CHOICES.get(type, 2)
        assert len(answers) == choices and max(answers.values()) / answers.total() < 1 / choices + 0.05, (type, answers)
    train = [q for p in TRAIN for q in p.questions]
    test = [q for p in scenes.pictures("test", 400, seed=3) for q in p.questions]
    blind = scenes.score(test, scenes.blind(train, test))
    for type in given:
        assert blind[type] == pytest.approx(scenes.chance_of(type), abs=0.09)


def test_quadrants_and_colours_name_one_object_each():
    for picture in TRAIN:
        things = picture.scene.things
        assert len({thing.colour for thing in things}) == len({thing.quadrant for thing in things}) == len(things)


def test_scores_of_both_kinds(tmp_path):
    questions = [Question(0, "a", "bar", "shape"), Question(0, "b", "red", "left"), Question(1, "c", "top left", "position")]
    scenes.write_questions(questions, tmp_path / "q.jsonl")
    assert scenes.read_questions(tmp_path / "q.jsonl") == questions
    found = scenes.score(questions, ["Bar ", "blue", "top left"])
    assert found == {"shape": 1.0, "left": 0.0, "position": 1.0, "semantic": 0.5, "detail": 1.0, "all": 2 / 3}
    with pytest.raises(ValueError):
        scenes.score(questions, ["bar"])


def test_scenes_are_drawn_from_the_given_chance_alone():
    random.seed(0)
    first = scenes.make_scene(random.Random(1))
    random.seed(1)
    assert scenes.make_scene(random.Random(1)) == first
