"""lmms-eval runs its own tasks with the model that our entry point adds, and gets what the model itself says."""

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps

from htc_megatron.inference import answer, ask, load
from htc_megatron.weights.export import export
from tests.hf_tiny import made
from tests.test_likelihood import plain_loss

ROOT = Path(__file__).parent.parent
LMMS_EVAL = find_spec("lmms_eval")
pytestmark = pytest.mark.skipif(LMMS_EVAL is None, reason="lmms-eval is not installed: tools/environment.sh does it")

QUESTIONS = [(0, "is there a circle ?", "yes"), (0, "is it red ?", "no"), (1, "is there a circle ?", "no"), (1, "yes or no ?", "yes")] * 2
SHORT = "\nAnswer the question using a single word or phrase."
POPE = """\
include: {package}/tasks/pope/pope.yaml
task: pope_local
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
generation_kwargs: {{max_new_tokens: {tokens}}}
"""
CHOICE = """\
task: choice_local
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_visual: !function choice.pictures
doc_to_text: question
doc_to_choice: ["yes", "no there is not"]
doc_to_target: "{{{{0 if answer == 'yes' else 1}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
TOKENS = 12  # random weights soon go round in circles, and how often decides itself by the order of additions
CHOICES = ["yes", "no there is not"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What lmms-eval made of eight questions about two pictures, the model, and the pictures."""
    import datasets

    folder = tmp_path_factory.mktemp("lmms")
    reader, _ = made(folder, seed=26, num_voco_tokens=2)  # one that says different things to different pictures
    export(reader, folder / "hf")
    picture = Image.radial_gradient("L").convert("RGB")
    pictures = [ImageOps.invert(picture), picture]
    columns = {
        "question_id": [str(number) for number in range(len(QUESTIONS))],
        "question": [question for _, question, _ in QUESTIONS],
        "answer": [right for _, _, right in QUESTIONS],
        "image": [pictures[number] for number, _, _ in QUESTIONS],
    }
    kinds = {name: datasets.Image() if name == "image" else datasets.Value("string") for name in columns}
    datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)).to_parquet(folder / "data.parquet")
    (folder / "tasks").mkdir()
    for name, text in (("pope", POPE), ("choice", CHOICE)):
        package = Path(LMMS_EVAL.origin).parent
        (folder / "tasks" / f"{name}.yaml").write_text(text.format(package=package, data=folder / "data.parquet", tokens=TOKENS))
    (folder / "tasks" / "choice.py").write_text("def pictures(doc):\n    return [doc['image']]\n")
    # one thread here and there: a model of random weights has near ties, which another order of additions decides otherwise
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.lmms_eval_worker", folder / "hf", folder / "tasks", folder / "out.json"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield json.loads((folder / "out.json").read_text()), *load(folder / "hf"), pictures
    torch.set_num_threads(threads)


def test_lmms_eval_finds_the_plugin():
    (found,) = [point for point in entry_points(group="lmms_eval.models") if point.name == "htc_vlm"]
    manifest = found.load()
    assert (manifest.__module__, manifest.__name__) == ("htc_megatron.evaluation.lmms_eval_plugin", "manifest")


def test_its_pope_task_scores_the_models_answers(run):
    out, model, processor, pictures = run
    asked = [(number, question + SHORT) for number, question, _ in QUESTIONS]
    wanted = sum((answer(model, processor, pictures, asked[first : first + 4], TOKENS, batch_size=4) for first in (0, 4)), [])
    given = [texts[0] if isinstance(texts, list) else texts for texts in out["samples"]["pope_local"]]
    assert given == wanted and given[0] != given[2]  # one question, two pictures
    right = sum(text.lower() == answer for text, (_, _, answer) in zip(given, QUESTIONS, strict=True))
    assert out["results"]["pope_local"]["pope_accuracy,none"] == right / len(QUESTIONS)


def test_multiple_choice_by_likelihood(run):
    """Losses are those of a plain pass over each whole prompt with its answer, and the smallest is chosen."""
    out, model, processor, pictures = run
    hits = 0
    for losses, (number, question, right) in zip(out["samples"]["choice_local"], QUESTIONS, strict=True):
        wanted = [plain_loss(model, processor, [pictures[number]], question, choice) for choice in CHOICES]
        assert [float(loss) for loss, _ in losses] == pytest.approx(wanted, abs=1e-5)
        hits += (wanted[0] < wanted[1]) == (right == "yes")
    assert out["results"]["choice_local"]["acc,none"] == hits / len(QUESTIONS)


def test_what_requests_may_ask(run):
    out, model, processor, _ = run
    direct, picture, question = out["direct"], Image.linear_gradient("L").convert("RGB"), "what shape is in the image ?"
    plain, blind = ask(model, processor, [picture], question, 8), ask(model, processor, [], question, 8)
    assert direct["plain"] == direct["unsampled"] == direct["sampled"] == [plain]
    assert direct["together"] == [blind, plain, blind, ask(model, processor, [picture], question, 3)] and plain != blind
    assert direct["until"] == [plain.split(plain[4])[0].strip(), plain.split(plain[2])[0].strip()] and direct["until"][0] != plain


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("rounds", "1 requests are of several rounds, wanted tasks of one"),
        ("beams", "num_beams is 2, wanted 1"),
        ("blind", "without an image is answered greedily: got {'do_sample': True, 'temperature': 0.5}"),
        ("film", "task task shows a str, wanted pictures alone"),
    ],
)
def test_what_cannot_be_done_is_refused(run, name, sentence):
    assert sentence in run[0]["direct"][name]
