"""easy-VQA: its questions as conversations, and how answers to them are scored."""

import pytest

from htc_megatron.config import ConfigError
from htc_megatron.evaluation.easy_vqa import Question, baselines, conversations, image_paths, load_questions, score

TRAIN = [
    Question(0, "what shape is present?", "circle"),
    Question(0, "is a circle present?", "yes"),
    Question(0, "is there a red shape?", "no"),
    Question(0, "what color is the circle?", "blue"),
    Question(1, "what shape is present?", "circle"),
    Question(1, "is a circle present?", "yes"),
    Question(1, "is there a red shape?", "yes"),
]
TEST = [
    Question(0, "what shape is present?", "triangle"),
    Question(0, "is a circle present?", "no"),
    Question(1, "is there a red shape?", "no"),
    Question(1, "what color is the triangle?", "blue"),
]


def test_the_data_set_is_the_published_one():
    train, test = load_questions("train"), load_questions("test")
    assert (len(train), len(test)) == (38575, 9673)
    assert (len(image_paths("train")), len(image_paths("test"))) == (4000, 1000)
    assert {question.type for question in test} == {"yes/no", "shape", "color"}
    assert len({question.answer for question in train}) == 13


def test_kinds_of_questions():
    assert [question.type for question in TRAIN[:4]] == ["shape", "yes/no", "yes/no", "color"]
    assert [question.about_shape for question in TRAIN[:4]] == [True, True, False, False]


@pytest.mark.parametrize("per_sample, records", [(1, 7), (2, 4), (3, 2), (9, 2)])
def test_every_question_is_asked_once(per_sample, records):
    made = conversations(TRAIN, per_sample)
    assert len(made) == records
    asked = []
    for record in made:
        turns = record["conversations"]
        assert turns[0]["value"].startswith("<image>\n") and sum("<image>" in turn["value"] for turn in turns) == 1
        texts = [turn["value"].removeprefix("<image>\n") for turn in turns]
        asked += [(record["image"], question, answer) for question, answer in zip(texts[::2], texts[1::2], strict=True)]
    assert sorted(asked) == sorted((f"{question.image}.png", question.text, question.answer) for question in TRAIN)
    assert made == conversations(TRAIN, per_sample) and len({record["id"] for record in made}) == records


def test_no_question_a_conversation_is_refused():
    with pytest.raises(ConfigError, match="got 0, wanted at least 1"):
        conversations(TRAIN, 0)


def test_scores_by_type():
    found = score(TEST, [" Triangle\n", "yes", "no", "red"])
    assert found["accuracy"] == 0.5
    assert found["accuracy_by_type"] == {"yes/no": 0.5, "shape": 1.0, "color": 0.0}
    assert found["questions_by_type"] == {"yes/no": 2, "shape": 1, "color": 1}
    for predictions in ([], ["yes"]):
        with pytest.raises(ValueError, match="predictions for 4"):
            score(TEST, predictions)


def test_blind_baselines():
    """Learnt from TRAIN: "yes" is its most frequent answer, "circle" its shape, and "is a circle present?" was always yes."""
    found = baselines(TRAIN, TEST)
    assert found["majority"]["accuracy"] == 0.0
    assert found["majority_of_type"]["accuracy_by_type"] == {"yes/no": 0.0, "shape": 0.0, "color": 1.0}
    assert found["majority_of_question"]["accuracy_by_type"] == {"yes/no": 0.5, "shape": 0.0, "color": 0.0}
