"""Benchmarks through an exported model: answers once made are kept, a run goes on from them, and another model's are refused."""

import json
import re
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest

import htc_megatron.evaluation.run as running
from htc_megatron.config import ConfigError
from htc_megatron.data.images import open_image
from htc_megatron.evaluation.run import Settings, check, chunked, run
from htc_megatron.evaluation.task import Item
from htc_megatron.evaluation.tasks import TASKS
from htc_megatron.inference import ask, load
from htc_megatron.weights.export import export
from tests.benchmark_sets import SETS, gqa, picture, vqav2, write
from tests.hf_tiny import made
from tests.test_hf_export import tool
from tests.test_image_store import blind

NAMES = ",".join(SETS)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An exported model."""
    folder = tmp_path_factory.mktemp("model")
    reader, _ = made(folder, seed=2, num_voco_tokens=2)
    export(reader, folder / "hf")
    return folder / "hf"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """All benchmarks, GQA where LLaVA has it."""
    root = tmp_path_factory.mktemp("data")
    for name, writer in SETS.items():
        writer(root / (name if name != "gqa" else "gqa/data"))
    return root


@pytest.fixture(scope="module")
def evaluated(model, data, tmp_path_factory):
    """Where the tool has put what it found, and what it printed."""
    out = tmp_path_factory.mktemp("evaluated")
    done = tool("evaluate.py", "--model", model, "--benchmarks", NAMES, "--data", data, "--out", out, "--bounds", "paper")
    assert done.status == 0, done.error
    return out, done.out


def task_of(name, folder):
    return TASKS[name](SETS[name](folder / name))


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def loads(monkeypatch):
    """The folders that models were loaded from."""
    seen = []
    monkeypatch.setattr(running, "load", lambda folder, *rest: (seen.append(folder), load(folder, *rest))[1])
    return seen


def test_the_tool_scores_what_the_model_says(model, data, evaluated):
    """Answers are those to each question alone; the summary has the tasks' scores, and the last table the paper's bounds."""
    out, printed = evaluated
    summary = json.loads((out / "summary.json").read_text())
    loaded, processor = load(model)
    for name in SETS:
        task = TASKS[name](data / (name if name != "gqa" else "gqa/data"))
        header, *rows = lines_of(out / f"{name}.jsonl")
        assert header["maker"] == summary["model"] and header["maker"]["folder"] == str(model)
        assert header["maker"]["generation"] == {"dtype": "auto", "do_sample": False}
        answers = {row["key"]: row["answer"] for row in rows}
        assert len(rows) == len(answers) == len(task.items)
        assert len(set(answers.values())) > 1
        for item in task.items[:6]:
            picture = open_image(item.image) if isinstance(item.image, bytes) else item.image
            assert answers[item.key] == ask(loaded, processor, [picture], item.prompt, item.max_new_tokens)
        scores = task.score(answers)
        assert summary["benchmarks"][name]["figure"] == scores.figure
        assert summary["benchmarks"][name]["parts"] == scores.parts
        assert f"\n{task.title}: {len(task.items)} questions\n" in printed
    assert (out / "testdev_balanced_predictions.json").is_file() and (out / "mme_results" / "OCR.txt").is_file()
    assert (out / "mmbench_dev_20230712.xlsx").is_file() and (out / "results.json").is_file()
    table = printed.rstrip().splitlines()[-6:]
    assert table[0] == "|  | GQA | VQAv2 | MMBench | MME-P | POPE | SEED | SQA-I | Avg. % |"
    assert table[2] == "| upper bound | 61.1 | 77.7 | 64.0 | 1487.2 | 85.0 | 57.9 | 66.5 | 100.0 |"
    assert table[4] == "| lower bound | 37.7 | 41.2 | 22.3 | 617.3 | 53.9 | 36.9 | 60.7 | 0.0 |"
    wanted = [100 * (summary["benchmarks"]["gqa"]["figure"] - 37.7) / (61.1 - 37.7), summary["mean_retention"]]
    cells = table[5].strip("| ").split(" | ")
    assert cells[0] == "retention %" and [cells[1], cells[-1]] == [f"{value:.1f}" for value in wanted]


def test_a_second_run_asks_nothing_and_prints_the_same(model, data, evaluated, loads):
    out, printed = evaluated
    before = {path.name: path.read_bytes() for path in out.glob("*.json*")}
    done = tool("evaluate.py", "--model", model, "--benchmarks", NAMES, "--data", data, "--out", out, "--bounds", "paper")
    assert (done.status, done.out, loads) == (0, printed, [])
    assert {path.name: path.read_bytes() for path in out.glob("*.json*")} == before


@pytest.mark.parametrize("kept", [0, 1, 3, 9], ids=lambda kept: f"{kept} lines")
@pytest.mark.parametrize("torn", [False, True], ids=["whole", "torn"])
def test_a_run_goes_on_where_it_was_cut_off(model, tmp_path, loads, monkeypatch, kept, torn):
    """The same answers as in one go, and nothing asked again but the chunk that was not whole."""
    task = task_of("pope", tmp_path)
    settings = Settings(images_at_once=1)
    whole = run([task], model, tmp_path / "whole", settings).answers
    lines = (tmp_path / "whole" / "pope.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 13  # two images, of six questions each
    path = tmp_path / "cut" / "pope.jsonl"
    path.parent.mkdir()
    path.write_bytes(b"".join(lines[:kept]) + (lines[kept][:-4] if torn else b""))
    asked = []
    original = running.answer
    monkeypatch.setattr(running, "answer", lambda *given, **named: (asked.append(len(given[3])), original(*given, **named))[1])
    assert run([task], model, tmp_path / "cut", settings).answers == whole
    assert asked == ([6] if kept == 9 else [6, 6])
    rows = lines_of(path)
    assert rows[0] == json.loads(lines[0]) and {row["key"]: row["answer"] for row in rows[1:]} == whole["pope"]
    assert run([task], model, tmp_path / "cut", Settings()).answers == whole
    assert len(loads) == 2  # not for the last, which was complete


def other_model(model, folder):
    shutil.copytree(model, folder / "other")
    write(folder / "other" / "generation_config.json", {"max_length": 7})
    return folder / "other"


def reworded(task):
    task.items[2] = Item(task.items[2].key, task.items[2].image, "Is it?")


def doubled(path):
    path.write_text(path.read_text().replace('"answer": ', '"answer": 3, "said": ', 1))


REFUSED = {
    "another model": (
        lambda task, path, model: other_model(model, path.parent),
        Settings(),
        "holds answers of another model, .*hf .*other",
    ),
    "other settings": (lambda *_: None, Settings(dtype="float64"), "made with the settings .*auto.*wanted .*float64.*name another --out"),
    "another prompt": (lambda task, *_: reworded(task), Settings(), "gqa.jsonl answers '203' to another prompt"),
    "another limit": (
        lambda task, *_: task.items.__setitem__(0, Item("201", task.items[0].image, task.items[0].prompt, 9)),
        Settings(),
        "'201'",
    ),
    "fewer questions": (lambda task, *_: task.items.pop(), Settings(), "answers '204', which is none of the 3 questions"),
    "a faulty line": (lambda task, path, _: doubled(path), Settings(), "gqa.jsonl: line 2: answer: input should be a valid string, got 3"),
    "another task": (
        lambda task, path, _: path.write_text(path.read_text().replace("gqa", "pope", 1)),
        Settings(),
        "benchmark 'pope', wanted 'gqa'",
    ),
    "no header": (lambda task, path, _: path.write_text("{}\n"), Settings(), "gqa.jsonl: line 1: task: field required"),
    "an empty line": (lambda task, path, _: path.write_text(path.read_text() + "\n"), Settings(), "gqa.jsonl: line 6: invalid JSON"),
}


@pytest.mark.parametrize("spoil, settings, sentence", REFUSED.values(), ids=REFUSED)
def test_answers_that_are_not_this_runs_are_refused(model, tmp_path, loads, spoil, settings, sentence):
    task = task_of("gqa", tmp_path)
    run([task], model, tmp_path / "out", Settings())
    path = tmp_path / "out" / "gqa.jsonl"
    folder = spoil(task, path, model)
    path.write_text(path.read_text() + '{"key": "torn')  # which stays where the rest is refused
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=sentence) as refused:
        run([task], folder if isinstance(folder, Path) else model, tmp_path / "out", settings)
    assert "\n" not in str(refused.value) and path.read_bytes() == before and len(loads) == 1


def test_a_copy_of_the_model_goes_on(model, tmp_path, loads):
    """What counts is what the folder holds, not where it lies."""
    task = task_of("gqa", tmp_path)
    first = run([task], model, tmp_path / "out", Settings())
    copy = shutil.copytree(model, tmp_path / "copy")
    (copy / "README.md").write_text("a copy")
    assert run([task], copy, tmp_path / "out", Settings()).answers == first.answers
    assert loads == [model]


def test_a_store_gives_the_same_answers(model, tmp_path, monkeypatch):
    """Of files, encoded images and several images a question; the second run encodes none."""
    task = task_of("gqa", tmp_path)
    first, second = (item.image for item in task.items[1:3])
    task.items += [Item("bytes", first.read_bytes(), "Is it blue?"), Item("frames", (second, first, second), "What is it?", 5)]
    plain = run([task], model, tmp_path / "plain", Settings(images_at_once=2)).answers
    kept = Settings(images_at_once=2, store=str(tmp_path / "store"))
    assert run([task], model, tmp_path / "stored", kept).answers == plain
    with ExitStack() as stack:

        def load_blind(*given):
            loaded = load(*given)
            stack.enter_context(blind(loaded[0]))
            return loaded

        monkeypatch.setattr(running, "load", load_blind)
        assert run([task], model, tmp_path / "again", kept).answers == plain


@pytest.mark.parametrize("stored", [False, True])
def test_a_picture_that_is_none_is_refused(model, tmp_path, stored):
    task = task_of("gqa", tmp_path)
    task.items[0].image.write_bytes(b"no picture")
    with pytest.raises(ConfigError, match="gqa: .*n1.jpg.*not an image of a known format"):
        run([task], model, tmp_path / "out", Settings(store=str(tmp_path / "store") if stored else ""))


def test_chunks_hold_whole_images_and_one_limit(tmp_path):
    a, b, c = (picture(tmp_path / f"{seed}.png", seed) for seed in range(3))
    items = [Item("0", a, "?"), Item("1", b, "?"), Item("2", a, "!"), Item("3", (a, b), "?"), Item("4", c, "?", 4), Item("5", c, "?")]
    keys = lambda at_once: [[item.key for item in chunk] for chunk in chunked(items, at_once)]  # noqa: E731
    assert keys(1) == [["4"], ["0", "2"], ["1"], ["3"], ["5"]]
    assert keys(9) == [["4"], ["0", "2", "1", "3", "5"]]
    assert keys(2) == [["4"], ["0", "2", "1"], ["3"], ["5"]]


def test_questions_that_cannot_be_asked_are_refused(tmp_path):
    task = task_of("gqa", tmp_path)
    task.items.append(task.items[0])
    with pytest.raises(ConfigError, match="gqa has two questions of key '201'"):
        check(task)
    task.items[:] = []
    with pytest.raises(ConfigError, match="gqa has no question"):
        check(task)


FAULTS = {
    "no files": (["--benchmarks", "gqa,vqav2"], "vqav2/v2_OpenEnded_mscoco_val2014_questions.json does not exist, nor does"),
    "no image": (["--benchmarks", "pope"], "pope: 1 images do not exist, .*COCO_val2014_000000000001.jpg among them"),
    "unknown": (["--benchmarks", "gqa,vqa"], "there is no benchmark 'vqa', wanted some of gqa, vqav2"),
    "no option": (["--benchmarks", "gqa", "gqa.split=val"], "'gqa.split=val': gqa has no such option"),
    "no such": (["--benchmarks", "gqa", "vqav2.split=val2014"], "is for none of the benchmarks gqa"),
    "split": (["--benchmarks", "vqav2", "vqav2.split=x"], "vqav2.split is 'x', wanted one of val2014"),
    "one bound": (["--benchmarks", "gqa", "--lower", "lower.json"], "--upper is missing; wanted both bounds or none"),
    "two kinds": (["--benchmarks", "gqa", "--lower", "lower.json", "--bounds", "paper"], "--bounds paper stands for both"),
    "no bound": (["--benchmarks", "gqa", "--lower", "lower.json", "--upper", "upper.json"], "upper.json cannot be read"),
    "no room": (["--benchmarks", "gqa", "--batch-size", "0"], "32 images at once in batches of 0 prompts"),
    "no model": (["--benchmarks", "gqa", "--model", "nothing"], "nothing is no exported model"),
}


@pytest.mark.parametrize("arguments, sentence", FAULTS.values(), ids=FAULTS)
def test_what_is_missing_is_said_before_the_model_is_loaded(model, tmp_path, loads, arguments, sentence):
    gqa(tmp_path / "gqa")
    SETS["pope"](tmp_path / "pope")
    (tmp_path / "pope" / "val2014" / "COCO_val2014_000000000001.jpg").unlink()
    done = tool("evaluate.py", "--model", model, *arguments, "--data", tmp_path, "--out", tmp_path / "out")
    assert done.status == 2 and loads == [] and not (tmp_path / "out").exists()
    assert done.error.startswith("evaluate: ") and done.error.count("\n") == 1
    assert re.search(sentence, done.error), done.error


def test_two_models_bound_a_third(model, data, evaluated, tmp_path):
    """An earlier summary is a bound, and so are figures in a file; what only the server scores is submitted and does not count."""
    figures = {"gqa": 50.0, "vqav2": 70.0}
    lower = write(tmp_path / "lower.json", figures)
    vqav2(tmp_path / "vqav2", ("test-dev2015", "test2015"))
    gqa(tmp_path / "gqa")
    arguments = ["--model", model, "--benchmarks", "gqa,vqav2", "--data", tmp_path, "--out", tmp_path / "out"]
    done = tool("evaluate.py", *arguments, "--lower", lower, "--upper", evaluated[0] / "summary.json", "vqav2.split=test-dev2015")
    assert done.status == 0, done.error
    assert "VQAv2: 2 questions\nonly its server has the answers\nsubmission: " in done.out
    assert len(json.loads((tmp_path / "out" / "vqav2_test-dev2015_submission.json").read_text())) == 3
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["benchmarks"]["vqav2"]["figure"] is None
    assert summary["retention"] == {"gqa": 100.0} and summary["mean_retention"] == 100.0  # it is its own upper bound
    assert done.out.splitlines()[-1] == "| retention % | 100.0 | - | 100.0 |"


def test_the_papers_table_needs_no_model():
    done = tool("evaluate.py", "--paper")
    assert done.status == 0
    assert [line.split(" | ")[-1].rstrip(" |") for line in done.out.splitlines()[3:7]] == ["57.2", "64.1", "81.0", "87.2"]
    assert tool("evaluate.py", "--model", "somewhere").status == 2


def test_out_that_is_a_file_is_refused(model, tmp_path, loads):
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match="answers cannot be kept in .*out: File exists"):
        run([task_of("gqa", tmp_path)], model, tmp_path / "out", Settings())
    assert loads == []
