"""MMBench, SEED-Bench and ScienceQA: read as they are handed out, asked as LLaVA-1.5 asks, scored by their official rules."""

import json
import sys

import pytest
from openpyxl import load_workbook

from htc_megatron.config import ConfigError
from htc_megatron.evaluation.choices import INSTRUCTION, chosen
from htc_megatron.evaluation.tasks.mmbench import MMBench
from htc_megatron.evaluation.tasks.seed import SEEDBench
from htc_megatron.evaluation.tasks.sqa import ScienceQA
from tests.benchmark_sets_mcq import STEP, mmbench_rows, seed_annotations, sqa_problems, write_mmbench, write_seed, write_sqa

OPTIONS = ["a red circle", "two circles", "Acquired.", "no"]


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"), (" b\n", "B"), ("B.", "B"), ("B)", "B"), ("(B)", "B"), ("(b).", "B"), ("B:", "B"),
        ("B. two circles", "B"), ("(C) acquired", "C"), ("d) yes", "D"), ("A: it has\nthree", "A"),
        ("The answer is C.", "C"), ("I think the correct answer is (D), no.", "D"), ("Answer is: **B**", "B"),
        ("two circles", "B"), ("Two  circles.", "B"), ("acquired", "C"), ("NO", "D"),
        ("", None), ("E", None), ("(E)", None), ("E. none", None), ("The answer is E.", None), ("AB", None), ("A circle", None),
        ("two", None), ("The answer is A. The answer is B.", None), ("the answer is unknown", None), ("B or C", None), ("?", None),
    ],
)  # fmt: skip
def test_an_answer_names_a_letter(text, letter):
    assert chosen(text, OPTIONS) == letter


def test_options_that_say_the_same_or_are_letters():
    assert chosen("yes", ["yes", "Yes.", "no"]) is None
    assert chosen("A", ["B", "A"]) == "A"


@pytest.mark.parametrize("copies", ["whole", "index"])
def test_mmbench_asks_every_row_of_the_file(tmp_path, copies):
    task = MMBench(write_mmbench(tmp_path, mmbench_rows(copies)))
    by_key = {item.key: item for item in task.items}
    assert list(by_key) == ["0", "1", "2", "1000000", "1000001", "1000002", "2000000", "3000000"]
    assert by_key["2000000"].prompt == f"what shape is it ?\nA. star\nB. line\nC. circle\nD. square\n{INSTRUCTION}"
    assert by_key["1"].prompt == f"look at the image .\nis it red ?\nA. yes\nB. no\n{INSTRUCTION}"
    assert by_key["1000002"].prompt == f"where is it ?\nA. right\nB. left\nC. none of them\n{INSTRUCTION}"
    for key, item in by_key.items():
        assert item.image is by_key[str(int(key) % STEP)].image and item.image.startswith(b"\x89PNG")
    assert len({item.image for item in task.items}) == 3


def test_mmbench_turns_options_where_the_file_has_no_copies(tmp_path):
    """As the official copies turn them, but for an option that they leave in its place."""
    whole = {item.key: item for item in MMBench(write_mmbench(tmp_path / "whole")).items}
    task = MMBench(write_mmbench(tmp_path, mmbench_rows("none")))
    assert {key: item for key, item in whole.items() if key[-1] in "01"} == {i.key: i for i in task.items if i.key[-1] in "01"}
    turned = next(item for item in task.items if item.key == "1000002")
    assert "A. none of them\nB. left\nC. right\n" in turned.prompt and task.rows["1000002"].answer == "A"
    assert sum(item.key[-1] == "2" for item in task.items) == 3


def test_mmbench_scores(tmp_path):
    """Question 0 is right in all four orders, 1 in one of two, 2 in its first and not readable in the other."""
    root = write_mmbench(tmp_path)
    answers = {
        "0": "B",
        "1000000": "c",
        "2000000": "(D)",
        "3000000": "square",
        "1": "A",
        "1000001": "A",
        "2": "C.",
        "1000002": "left or so",
    }
    found = MMBench(root).score(answers)
    assert found.parts == {
        "l2-category: perception": 50.0, "l2-category: reasoning": 0.0,
        "category: colour": 0.0, "category: object_shape": 100.0, "category: place": 0.0,
        "first order": 100.0, "all": pytest.approx(100 / 3),
    }  # fmt: skip
    assert found.figure == found.parts["all"] and list(found.parts)[-1] == "all"
    assert found.counts == dict.fromkeys(found.parts, 1) | {"l2-category: perception": 2, "first order": 3, "all": 3}
    assert MMBench(root).score(answers | {"1000001": "B"}).figure == pytest.approx(200 / 3)
    one = MMBench(root, circular=False)
    assert [item.key for item in one.items] == ["0", "1", "2"] and one.submission({}, tmp_path) is None
    plain = one.score({"0": "B", "1": "B", "2": "C"})
    assert plain.figure == pytest.approx(200 / 3) and "first order" not in plain.parts


def test_mmbench_submission(tmp_path, monkeypatch):
    task = MMBench(write_mmbench(tmp_path))
    answers = {item.key: "B" for item in task.items} | {"1": "=1+1\x07"}
    path = task.submission(answers, tmp_path)
    head, *rows = load_workbook(path).active.iter_rows(values_only=True)
    assert path.suffix == ".xlsx" and head == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert len(rows) == 8 and rows[1] == (1, "is it red ?", "yes", "no", None, None, "=1+1", "A", "dev")
    assert load_workbook(path).active["G3"].data_type == "s"
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(ConfigError, match=r"mmbench's submission needs openpyxl, which is not installed: pip install .*\[evaluation\]"):
        MMBench(tmp_path)
    assert MMBench(tmp_path, circular=False).items


def test_seed_scores(tmp_path):
    task = SEEDBench(write_seed(tmp_path))
    assert [item.key for item in task.items] == ["101669", "7", "8", "v9"]
    assert task.items[0].image == tmp_path / "SEED-Bench-image" / "1454426_2591111986"
    assert task.items[3].image == tmp_path / "SEED-Bench-video-image" / "10_v9.png"
    assert task.items[0].prompt == f"How many towels?\nA. One\nB. Two\nC. Three\nD. Four\n{INSTRUCTION}"
    answers = {"101669": "A", "7": "One", "8": "Three.", "v9": "maybe"}
    found = task.score(answers)
    assert found.parts == {
        "Scene Understanding": 50.0, "Text Recognition": 100.0, "Action Recognition": 0.0,
        "image": pytest.approx(200 / 3), "video": 0.0, "all": 50.0,
    }  # fmt: skip
    assert found.figure == 50.0 and list(found.counts.values()) == [2, 1, 1, 3, 1, 4]
    lines = task.submission(answers, tmp_path).read_text().splitlines()
    assert [json.loads(line)["prediction"] for line in lines] == ["A", "A", "C", "maybe"]
    assert json.loads(lines[3])["question_id"] == "v9"


def test_seed_without_videos(tmp_path):
    root = write_seed(tmp_path, frames=False)
    sentence = "1 of 1 videos have no frame, .*10_v9.png among them; wanted all, or seed.images_only=true"
    with pytest.raises(ConfigError, match=sentence):
        SEEDBench(root)
    found = SEEDBench(root, images_only=True).score({"101669": "A", "7": "B", "8": "A"})
    assert found.figure == pytest.approx(200 / 3) and list(found.parts) == ["Scene Understanding", "Text Recognition", "image", "all"]


def test_sqa_scores(tmp_path):
    task = ScienceQA(write_sqa(tmp_path))
    assert [item.key for item in task.items] == ["3", "11", "20"]  # of the test split, and with an image
    assert task.items[0].prompt == f"Which is number 3?\nA. Maine\nB. Ohio\n{INSTRUCTION}"
    assert task.items[1].prompt.startswith("Context: The is camouflaged.\nWhich is number 11?\nA. a weasel\n")
    assert task.items[1].image == tmp_path / "images" / "test" / "11" / "image.png" and task.items[1].image.is_file()
    found = task.score({"3": "b", "11": "The answer is E.", "20": "B"})
    assert found.parts == {
        "natural science": 50.0, "social science": 100.0, "grades 1-6": 50.0, "grades 7-12": 100.0, "all": pytest.approx(200 / 3),
    }  # fmt: skip
    assert found.figure == found.parts["all"] and list(found.counts.values()) == [2, 1, 2, 1, 3]
    assert task.submission({}, tmp_path) is None


WRITERS = {MMBench: write_mmbench, SEEDBench: write_seed, ScienceQA: write_sqa}


def rows_with(place, **changed):
    rows = mmbench_rows()
    rows[place].update(changed)
    return rows


def seed_with(place, **changed):
    annotations = seed_annotations()
    annotations["questions"][place].update(changed)
    return annotations


def sqa_with(pid, **changed):
    problems = sqa_problems()
    problems[pid].update(changed)
    return problems


@pytest.mark.parametrize(
    "kind, data, sentence",
    [
        (MMBench, [{"index": 0, "question": "?"}], "no column 'hint', wanted index, question"),
        (MMBench, rows_with(1, index="x"), "line 3: index is 'x', wanted a number"),
        (MMBench, rows_with(1, index=0), "line 3: index 0 is there twice"),
        (MMBench, rows_with(1, answer="C"), "line 3: answer is 'C', wanted a letter of its 2 options"),
        (MMBench, rows_with(1, answer="AB"), "answer is 'AB'"),
        (MMBench, rows_with(1, B="nan"), "line 3: 1 options, wanted 2 to 4"),
        (MMBench, rows_with(0, index=9), "index 1000000 is a copy of 0, which is not there"),
        (MMBench, rows_with(0, image="no base64!"), "image of index 0 is 'no base64!', wanted base64, or the index of a row that has it"),
        (MMBench, rows_with(0, image=""), "image of index 0 is ''"),
        (SEEDBench, [], "SEED-Bench.json: "),
        (SEEDBench, seed_with(1, answer="E"), r"questions: 1: answer: .*'E'"),
        (SEEDBench, seed_with(1, data_type="sound"), r"questions: 1: data_type: .*'sound'"),
        (SEEDBench, seed_with(1, question_id="101669"), "questions: 1: question_id 101669 is there twice"),
        (SEEDBench, seed_with(1, question_type_id=13), "questions: 1: question_type_id is 13, wanted one of question_type's"),
        (SEEDBench, seed_with(1, choice_d=None), r"questions: 1: choice_d: .*None"),
        (ScienceQA, sqa_with("3", answer=2), "problems.json: 3: answer is 2, wanted the number of one of its 2 choices"),
        (ScienceQA, sqa_with("3", answer="A"), "problems.json: 3: answer: .*'A'"),
        (ScienceQA, sqa_with("3", choices=["x"]), "3 has 1 choices, wanted 2 to 5"),
        (ScienceQA, sqa_with("3", choices=list("uvwxyz")), "3 has 6 choices, wanted 2 to 5"),
        (ScienceQA, sqa_with("3", grade="college"), "3: grade is 'college', wanted grade1 to grade12"),
    ],
)  # fmt: skip
def test_annotations_that_are_not_as_they_should_be_are_refused(tmp_path, kind, data, sentence):
    with pytest.raises(ConfigError, match=sentence):
        kind(WRITERS[kind](tmp_path, data))


@pytest.mark.parametrize(
    "kind, missing", [(MMBench, "mmbench_dev_20230712.tsv"), (SEEDBench, "SEED-Bench.json"), (ScienceQA, "problems.json")]
)
def test_missing_files_are_named(tmp_path, kind, missing):
    with pytest.raises(ConfigError, match=f"{missing} does not exist"):
        kind(tmp_path)


@pytest.mark.parametrize(
    "splits, sentence",
    [
        ({"train": ["3"]}, "pid_splits.json has no split 'test', only train"),
        ({"test": ["3", "99"]}, "test: 1 of 2 problems are not in .*problems.json, '99' among them"),
        ({"test": "3"}, "pid_splits.json: test: "),
    ],
)
def test_splits_that_do_not_fit_are_refused(tmp_path, splits, sentence):
    with pytest.raises(ConfigError, match=sentence):
        ScienceQA(write_sqa(tmp_path, splits=splits))


def test_a_broken_table_is_refused(tmp_path):
    path = write_mmbench(tmp_path) / "mmbench_dev_20230712.tsv"
    whole = path.read_bytes()
    for damaged, sentence in (
        (whole[:-5], "line 9: 13 cells, wanted 14"),
        (b"", "no column 'index'"),
        (whole + b"\xff", "cannot be read: .*utf-8"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=sentence):
            MMBench(tmp_path)
