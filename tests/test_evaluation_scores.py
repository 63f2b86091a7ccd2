"""Each benchmark's rules against cases worked out by hand, and its files refused in a sentence where they are not as they should be."""

import json

import pytest

from htc_megatron.config import ConfigError
from htc_megatron.evaluation.retention import LOWER, PAPER, PAPER_BOUNDS, Bounds, mean, read_figures
from htc_megatron.evaluation.tasks import TASKS
from htc_megatron.evaluation.tasks.gqa import GQA
from htc_megatron.evaluation.tasks.mme import GROUPS, MME, judge
from htc_megatron.evaluation.tasks.pope import POPE, says_yes
from htc_megatron.evaluation.tasks.vqav2 import VQAv2
from htc_megatron.evaluation.vqa_answers import accuracy, for_server, process
from tests.benchmark_sets import SETS, gqa, mme, pope, vqav2, write


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("The cat and an apple on a mat", "cat and apple on mat"),  # articles
        ("Two or ten, none", "2 or 10 0"),  # number words
        ("eleven zero", "eleven 0"),
        ("dont wouldn'tve Oclock", "don't wouldn't've o'clock"),  # contractions
        ("somebody'd", "somebodyd"),  # the table's slip
        ("Im here", "im here"),  # a key with a capital never matches
        ("black-white", "black white"),  # punctuation between letters: a space
        ("yes, no", "yes no"),  # beside a space: nothing
        ("black -white a-b", "black white ab"),  # and then wherever it stands
        ("1,000", "1000"),  # a comma between digits
        ("1,000 red/blue", "1000 redblue"),  # which takes every mark's space
        ("2.5", "2.5"),  # a period before a digit stays
        ("U.S.A.", "usa"),
        ("." * 40, "." * 8),  # no more than 32 periods go
        ("what's", "what's"),  # an apostrophe is none of the marks
        ("  ", ""),
    ],
)
def test_vqa_answers_are_processed_by_the_published_rules(text, wanted):
    assert process(text) == wanted


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("The man's hat?", "man 's hat"),
        ("1,000\nmen", "1000 men"),
        ("Yes, two.", "yes 2"),
        ("3-d", "3 d"),
    ],
)
def test_vqa_answers_for_the_server(text, wanted):
    assert for_server(text) == wanted


@pytest.mark.parametrize(
    "answer, given, wanted",
    [
        ("yes", ["yes"] * 10, 1.0),
        ("The cat", ["cat"] * 10, 0.0),  # unanimous: nothing is processed
        ("The cat", ["cat"] * 9 + ["dog"], 1.0),
        ("cat\n", ["cat\t"] * 10, 1.0),  # but white space is
        ("cat", ["cat"] * 3 + ["dog"] * 7, 0.9),  # 3 annotators have two others with them, 7 have three
        ("cat", ["cat"] * 2 + ["dog"] * 8, 0.6),
        ("cat", ["cat"] + ["dog"] * 9, 0.3),
        ("cat", ["cat"] * 4 + ["dog"] * 6, 1.0),
        ("2", ["two"] * 3 + ["3"] * 7, 0.9),
        ("bird", ["cat"] * 5 + ["dog"] * 5, 0.0),
    ],
)
def test_vqa_accuracy_leaves_each_annotator_out_in_turn(answer, given, wanted):
    assert accuracy(answer, given) == pytest.approx(wanted)


@pytest.mark.parametrize(
    "text, yes",
    [
        ("Yes", True),
        ("No", False),
        ("no, there is none", False),
        ("Yes. No dog", True),  # the first sentence alone
        ("There is not a dog", False),
        ("nothing, I know", True),  # words, not letters
        ("NO", True),  # of three spellings
        ("", True),
    ],
)
def test_pope_reads_the_first_sentence(text, yes):
    assert says_yes(text) is yes


@pytest.mark.parametrize(
    "text, wanted", [("Yes", "yes"), ("NO.", "no"), ("not", "no"), ("it is yes", "other"), ("", "other"), ("a yes", "other")]
)
def test_mme_reads_four_characters(text, wanted):
    assert judge(text) == wanted


def test_gqa_scores(tmp_path):
    task = GQA(gqa(tmp_path))
    assert task.items[0].prompt == "Is it red?\nAnswer the question using a single word or phrase."
    answers = {"201": "Yes.", "202": "yes", "203": "light blue..", "204": "Red"}
    scores = task.score(answers)
    assert scores.figure == 50
    assert list(scores.parts.items()) == [
        ("binary", pytest.approx(100 / 3)),
        ("open", 100),
        ("semantic: attribute", pytest.approx(200 / 3)),
        ("semantic: relation", 0),
        ("structural: choose", 0),
        ("structural: query", 100),
        ("structural: verify", 50),
        ("all", 50),
    ]
    assert scores.counts["binary"] == 3 and scores.counts["all"] == 4
    made = json.loads(task.submission(answers, tmp_path).read_text())
    assert made[0] == {"questionId": "201", "prediction": "yes"} and len(made) == 4


def test_vqav2_scores(tmp_path):
    task = VQAv2(vqav2(tmp_path))
    answers = {"421": "Two", "422": "Yes", "73001": "mugs"}
    scores = task.score(answers)  # unanimous "yes" is not "Yes"
    assert scores.parts == {"yes/no": 0, "number": 100, "other": 0, "all": pytest.approx(100 / 3)}
    assert task.submission(answers, tmp_path) is None
    assert task.score(answers | {"73001": "The mug", "422": "yes"}).parts["other"] == pytest.approx(60)


def test_vqav2_submissions(tmp_path):
    """test-dev goes before test where both are there; the server wants every question of test2015."""
    vqav2(tmp_path, ("test-dev2015", "test2015"))
    task = VQAv2(tmp_path)
    answers = {"421": "The two", "422": "Yes."}
    assert [item.image.name for item in task.items] == ["COCO_test2015_000000000042.jpg"] * 2
    assert task.score(answers) is None
    path = task.submission(answers, tmp_path)
    assert path.name == "vqav2_test-dev2015_submission.json"
    made = [{"question_id": 421, "answer": "2"}, {"question_id": 422, "answer": "yes"}, {"question_id": 73001, "answer": ""}]
    assert json.loads(path.read_text()) == made
    whole = VQAv2(tmp_path, split="test2015")
    assert len(whole.items) == 3 and whole.split == "test2015"
    with pytest.raises(ConfigError, match="vqav2: 1 of 3 questions have no answer, '73001'"):
        whole.submission(answers, tmp_path)


def test_pope_scores(tmp_path):
    task = POPE(pope(tmp_path))
    answers = {item.key: "Yes" for item in task.items}
    answers |= {"popular/2": "No", "popular/3": "no", "popular/4": "No", "adversarial/1": "no", "adversarial/2": "no"}
    answers |= {"adversarial/3": "No", "adversarial/4": "No"}
    scores = task.score(answers)
    of = lambda category: [scores.parts[f"{category} {m}"] for m in ("accuracy", "precision", "recall", "F1", "yes ratio")]  # noqa: E731
    assert of("random") == pytest.approx([50, 50, 100, 200 / 3, 100])
    assert of("popular") == pytest.approx([75, 100, 50, 200 / 3, 25])
    assert of("adversarial") == [50, 0, 0, 0, 0]  # nobody said yes
    assert scores.figure == scores.parts["mean F1"] == pytest.approx(400 / 9)


@pytest.mark.parametrize("deep", [False, True])
def test_mme_scores(tmp_path, deep):
    """One image of `count` has both answers right, the other one; everything else is right."""
    task = MME(mme(tmp_path, deep))
    assert {item.prompt for item in task.items[:2]} == {
        f"Is it {text}?\nAnswer the question using a single word or phrase." for text in ("existence", "a cat")
    }
    answers = {item.key: ("Yes", "no.")[int(item.key[-1])] for item in task.items} | {"count/0001/1": "it is no"}
    scores = task.score(answers)
    assert scores.parts["existence"] == 200 and scores.parts["count"] == 75 + 50
    assert scores.figure == scores.parts["perception"] == 9 * 200 + 125
    assert scores.parts["cognition"] == 800
    assert list(scores.parts) == [*GROUPS["perception"], *GROUPS["cognition"], "perception", "cognition"]
    assert scores.counts["count"] == 4 and scores.counts["perception"] == 40
    lines = (task.submission(answers, tmp_path) / "count.txt").read_text().splitlines()
    assert lines[3] == "0001.txt\tIs it a cat?  Please answer yes or no.\tNo\tit is no"


def test_easy_vqa_scores():
    task = TASKS["easy_vqa"]()
    answers = {item.key: "yes" for item in task.items}
    scores = task.score(answers)
    assert scores.counts["all"] == len(task.items) == 9673
    assert scores.parts["shape"] == scores.parts["color"] == 0
    assert scores.figure == pytest.approx(scores.parts["yes/no"] * scores.counts["yes/no"] / 9673)


@pytest.mark.parametrize("name", SETS)
def test_answers_must_be_those_to_the_questions(tmp_path, name):
    task = TASKS[name](SETS[name](tmp_path))
    answers = {item.key: "yes" for item in task.items}
    first = next(iter(answers))
    for give in (task.score, lambda given: task.submission(given, tmp_path)):
        if give({**answers}) is None:
            continue
        with pytest.raises(ConfigError, match=f"{name}: 1 of {len(answers)} questions have no answer, '{first}' among them"):
            give({key: text for key, text in answers.items() if key != first})
        with pytest.raises(ConfigError, match=f"{name}: 1 answers belong to none of {len(answers)} questions, 'other' among them"):
            give(answers | {"other": "yes"})


def change(path, *place, to=None):
    """A JSON file with one value replaced, or taken out."""
    tree = json.loads(path.read_text())
    at = tree
    for step in place[:-1]:
        at = at[step]
    if to is None:
        del at[place[-1]]
    else:
        at[place[-1]] = to
    write(path, tree)


GQA_FILE, VQA_FILE = "testdev_balanced_questions.json", "v2_OpenEnded_mscoco_val2014_questions.json"
NOTES, POPE_FILE = "v2_mscoco_val2014_annotations.json", "coco/coco_pope_popular.json"
MME_FILE = "MME_Benchmark_release_version/existence/0001.txt"
FAULTS = {
    "gqa: no file": ("gqa", lambda f: (f / GQA_FILE).unlink(), f"{GQA_FILE} does not exist"),
    "gqa: no JSON": ("gqa", lambda f: (f / GQA_FILE).write_text("{"), f"{GQA_FILE}: invalid JSON"),
    "gqa: a list": ("gqa", lambda f: write(f / GQA_FILE, []), r"input should be an object, got \[\]"),
    "gqa: no answer": ("gqa", lambda f: change(f / GQA_FILE, "203", "answer"), f"{GQA_FILE}: 203: answer: field required"),
    "gqa: answer 3": ("gqa", lambda f: change(f / GQA_FILE, "203", "answer", to=3), "203: answer: input should be a valid string, got 3"),
    "gqa: no types": ("gqa", lambda f: change(f / GQA_FILE, "204", "types", "semantic"), "204: types: semantic: field required"),
    "gqa: no images": ("gqa", lambda f: (f / "images").rename(f / "pictures"), "images does not exist"),
    "vqav2: no question": ("vqav2", lambda f: change(f / VQA_FILE, "questions", 1, "question"), "questions: 1: question: field required"),
    "vqav2: id": (
        "vqav2",
        lambda f: change(f / VQA_FILE, "questions", 0, "question_id", to="4"),
        "question_id: input should be a valid int",
    ),
    "vqav2: no annotations": ("vqav2", lambda f: (f / NOTES).unlink(), f"{NOTES} does not exist"),
    "vqav2: one lacks": ("vqav2", lambda f: change(f / NOTES, "annotations", 1), f"{NOTES}: question 422 has no annotation"),
    "vqav2: no answers": ("vqav2", lambda f: change(f / NOTES, "annotations", 0, "answers", to=[]), "question 421 has no answer, wanted"),
    "vqav2: answer": (
        "vqav2",
        lambda f: change(f / NOTES, "annotations", 0, "answers", 3, "answer", to=2),
        "answers: 3: answer: input sho",
    ),
    "pope: label": (
        "pope",
        lambda f: (f / POPE_FILE).write_text('\n{"question_id": 1, "image": "a", "text": "b", "label": "maybe"}'),
        "maybe",
    ),
    "pope: torn": ("pope", lambda f: (f / POPE_FILE).write_text('{"question_id": 1,'), f"{POPE_FILE}: line 1: invalid JSON"),
    "pope: no file": ("pope", lambda f: (f / POPE_FILE).unlink(), f"{POPE_FILE} does not exist"),
    "mme: no tab": (
        "mme",
        lambda f: (f / MME_FILE).write_text("Is it? Yes\n"),
        r"0001.txt: line 1 is 'Is it\? Yes', wanted a question, a tab",
    ),
    "mme: answer": ("mme", lambda f: (f / MME_FILE).write_text("Is it?\tMaybe\n"), "0001.txt: line 1 is .*wanted a question"),
    "mme: one question": ("mme", lambda f: (f / MME_FILE).write_text("Is it?\tYes\n"), "0001.txt has 1 questions, wanted 2"),
    "mme: Latin-1": ("mme", lambda f: (f / MME_FILE).write_bytes(b"caf\xe9\tYes\n"), "0001.txt is not UTF-8 text"),
    "mme: no image": ("mme", lambda f: (f / MME_FILE).with_suffix(".png").unlink(), "0001.jpg does not exist, nor does .*0001.png"),
    "mme: no task": ("mme", lambda f: (f / MME_FILE).parent.rename(f / "gone"), "existence does not exist"),
    "mme: empty task": ("mme", lambda f: [p.unlink() for p in (f / MME_FILE).parent.glob("*.txt")], "existence has no question file"),
}


@pytest.mark.parametrize("name, spoil, sentence", FAULTS.values(), ids=FAULTS)
def test_faulty_files_are_refused(tmp_path, name, spoil, sentence):
    folder = SETS[name](tmp_path)
    TASKS[name](folder)
    spoil(folder)
    with pytest.raises(ConfigError, match=sentence) as refused:
        TASKS[name](folder)
    assert "\n" not in str(refused.value)


def test_an_unknown_split_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="vqav2.split is 'val', wanted one of val2014, test-dev2015, test2015"):
        VQAv2(tmp_path, split="val")


def test_the_papers_averages():
    averages = [mean(PAPER_BOUNDS.retention(row)) for row in PAPER.values()]
    assert [round(average, 1) for average in averages] == [100, 57.2, 64.1, 81.0, 87.2, 0]


def test_retention_of_what_has_figures():
    """A benchmark without a figure, here or in a bound, does not count; equal bounds are refused."""
    bounds = Bounds(upper={"gqa": 60.0, "pope": 80.0, "sqa": None}, lower={"gqa": 40.0, "pope": 60.0, "sqa": 1.0})
    assert bounds.retention({"gqa": 45.0, "pope": None, "sqa": 3.0, "mme": 1.0}) == {"gqa": 25.0}
    assert mean({}) is None
    with pytest.raises(ConfigError, match="pope: both bounds are 53.9"):
        Bounds({"pope": 53.9, "sqa": 1.0}, PAPER[LOWER])


@pytest.mark.parametrize(
    "tree, sentence", [({"gqa": "61"}, 'gqa is "61", wanted a number'), ({"gqa": True}, "gqa is true"), ([1], "should be an object")]
)
def test_faulty_figures_are_refused(tmp_path, tree, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read_figures(write(tmp_path / "bound.json", tree))
