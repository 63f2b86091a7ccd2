"""The paper in small: intervals and verdicts against figures worked out by hand, and the report of a made-up table."""

import json
import math
import sys
from pathlib import Path

import pytest

from htc_megatron.config import ConfigError
from htc_megatron.evaluation.scenes import Question, write_questions
from htc_megatron.evaluation.seeds import FAILS, HOLDS, OPEN, Estimate, difference, verdict

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "paper"))

import report  # noqa: E402


def figures(*values: float) -> dict[int, dict[str, float]]:
    return {seed: {"semantic": value + 1, "detail": value - 1, "all": value} for seed, value in enumerate(values)}


# retention between 40 and 80: htc 75, voco_llama 50; differences of htc and voco_llama: 10, 11, 9; of htc and full: 4, 0, -1
TABLE = {
    "upper": figures(80, 80, 80),
    "lower": figures(40, 40, 40),
    "htc": figures(70, 71, 69),
    "voco_llama": figures(60, 60, 60),
    "average": figures(65, 64, 66),
    "mask_full": figures(66, 71, 70),
}


def test_interval_of_three_seeds():
    """1, 2, 3: standard deviation 1, t(2) = 4.3027, so 2 +- 4.3027 / sqrt(3)."""
    found = Estimate.of([1, 2, 3])
    assert found.mean == 2 and found.half == pytest.approx(4.3027 / math.sqrt(3))
    assert str(found) == "2.0 ± 2.5"


def test_interval_of_other_numbers_of_seeds():
    assert Estimate.of([5.0]) == Estimate(5.0, math.inf) and str(Estimate.of([5.0])) == "5.0 (one seed)"
    assert Estimate.of([1, 3]).half == pytest.approx(12.7062)  # standard deviation sqrt(2), over sqrt(2)
    assert Estimate.of([0, 2] * 20).half == pytest.approx(2.1314 * math.sqrt(40 / 39) / math.sqrt(40))
    with pytest.raises(ValueError, match="no value"):
        Estimate.of([])


@pytest.mark.parametrize(
    "mean, half, said", [(2, 1, HOLDS), (-2, 1, FAILS), (2, 3, OPEN), (-2, 3, OPEN), (1, 1, OPEN), (-1, 1, OPEN), (2, math.inf, OPEN)]
)
def test_verdicts(mean, half, said):
    assert verdict(Estimate(mean, half)) == said


def test_differences_are_paired_by_seed():
    """Models that move together from seed to seed differ surely, however far they move; seeds that one lacks are left out."""
    found = difference({0: 50, 1: 62, 2: 70, 7: 0}, {0: 48, 1: 60, 2: 68, 5: 99})
    assert found == Estimate(2, 0) and verdict(found) == HOLDS


def test_retention_is_the_way_from_lower_to_upper():
    assert report.retentions(TABLE, "htc") == [75.0, 77.5, 72.5]
    assert report.retentions({"htc": figures(1), "upper": figures(2)}, "htc") == []


def test_claims_of_a_table():
    """htc - voco_llama: 10 +- 2.5 holds; voco_llama - average: -5 +- 2.5 does not; htc - full: 1 +- 6.6 is open; the rest was not run."""
    found = {claim.text: (differences["all"], said) for claim, differences, said in report.judged(TABLE)}
    assert {text: said for text, (_, said) in found.items()} == {
        "HTC-VLM > VoCo-LLaMA": HOLDS,
        "VoCo-LLaMA > average pooling": FAILS,
        "star mask > full mask": OPEN,
    }
    assert str(found["HTC-VLM > VoCo-LLaMA"][0]) == "10.0 ± 2.5" and str(found["star mask > full mask"][0]) == "1.0 ± 6.6"
    kept = report.claim_table(TABLE).splitlines()[-1]
    assert "| HTC-VLM keeps 87.2 % or more | retention |  |  | 75.0 ± 6.2 | does not hold |" == kept  # 2.5 * 4.3027 / sqrt(3)


def test_every_model_of_a_claim_has_a_place_in_a_table():
    placed = set(report.MAIN).union(*report.ABLATIONS.values())
    assert {name for claim in report.CLAIMS for name in (claim.better, claim.worse)} <= placed


def run_in(folder: Path, models: dict[str, dict[int, dict[str, float]]]) -> None:
    """What examples/paper/run.py leaves of these models."""
    for model, seeds in models.items():
        for seed, values in seeds.items():
            results = folder / "models" / model / str(seed) / "results.json"
            results.parent.mkdir(parents=True)
            results.write_text(json.dumps({"accuracy": {k: v / 100 for k, v in values.items()} | {"shape": 0.5}}))
    (folder / "data").mkdir()
    for split in ("train", "test"):
        questions = [Question(0, "what shape?", "circle", "shape"), Question(0, "where?", "top left", "position")]
        write_questions(questions, folder / f"data/{split}.jsonl")


def test_report_of_a_run(tmp_path):
    """From results on disk to Markdown and plots; a model with fewer seeds is in it, one that is not finished is not."""
    run_in(tmp_path, TABLE | {"fusion_post": figures(50)})
    (tmp_path / "models" / "qformer" / "0").mkdir(parents=True)
    table, blind = report.read(tmp_path)
    assert blind == {"semantic": 100, "detail": 100, "all": 100}  # the test's questions are those of training
    assert table.keys() == TABLE.keys() | {"fusion_post"} and table["htc"][1]["all"] == pytest.approx(71)
    text = report.report(table, {"semantic": 40, "detail": 30, "all": 50})
    assert "| HTC-VLM | 71.0 ± 2.5 | 69.0 ± 2.5 | 70.0 ± 2.5 | 75.0 ± 6.2 | 87.2 |" in text
    assert "| reading without looking | 40.0 | 30.0 | 50.0 | 25.0 ± 0.0 |  |" in text
    assert "| full | 70.0 ± 6.6 | 68.0 ± 6.6 | 69.0 ± 6.6 | -1.0 ± 6.6 |" in text and "Q-Former" not in text
    with pytest.raises(ConfigError, match="has no results"):
        report.read(tmp_path / "models")


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path)])
    assert report.main() == 2 and "has no results" in capsys.readouterr().err
    run_in(tmp_path, {model: TABLE[model] for model in ("upper", "lower", "htc", "mask_full")})
    assert report.main() == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {"main.png", "mask.png"}
    assert (tmp_path / "report.md").read_text(encoding="utf-8").rstrip() == capsys.readouterr().out.rstrip()


def test_figures_are_kept_and_make_the_same_report(tmp_path, monkeypatch, capsys):
    run, kept = tmp_path / "run", tmp_path / "kept" / report.FIGURES
    run_in(run, {"htc": TABLE["htc"], "mask_full": TABLE["mask_full"]})
    monkeypatch.setattr("sys.argv", ["report.py", str(run)])
    assert report.main() == 0
    whole = capsys.readouterr().out
    assert "| full |" in whole and "main.png" not in whole  # a main table of one model says nothing
    kept.parent.mkdir()
    kept.write_text((run / report.FIGURES).read_text())
    monkeypatch.setattr("sys.argv", ["report.py", str(kept)])
    assert report.main() == 0 and capsys.readouterr().out == whole
    assert {path.name for path in kept.parent.iterdir()} == {report.FIGURES, "mask.png", "report.md"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"models": {"htc": {"0": {"all": 1}}}, "blind": {}}', '{"models": {"htc": {"x": {}}}}'])
def test_other_files_are_refused(tmp_path, monkeypatch, capsys, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    monkeypatch.setattr("sys.argv", ["report.py", str(path)])
    assert report.main() == 2 and "is not a file of figures" in capsys.readouterr().err
