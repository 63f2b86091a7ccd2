"""Tables, plots and verdicts of a comparison: `python examples/paper/report.py runs/paper` writes report.md and its pictures there,
and figures.json with the figures of every model and seed. It takes such a file as well, and then writes beside it.

Every figure is a mean over seeds with its 95% confidence interval (Student's t). A claim that one model is better than another is
judged by their differences seed by seed: it holds where the whole interval of these is above zero, does not hold where it is below,
and is within the error otherwise. The paper's own figures stand beside: retention in percent, one run.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from htc_megatron.config import ConfigError  # noqa: E402
from htc_megatron.evaluation import scenes  # noqa: E402
from htc_megatron.evaluation.retention import LOWER, PAPER, PAPER_BOUNDS, UPPER, Bounds, markdown, mean  # noqa: E402
from htc_megatron.evaluation.seeds import Estimate, difference, verdict  # noqa: E402

SCORES = ("semantic", "detail", "all")
FIGURES = "figures.json"
Table = dict[str, dict[int, dict[str, float]]]  # figures in percent, by model, seed and score

MAIN = {  # by the name of the model's file
    "upper": UPPER,
    "qformer": "Q-Former",
    "average": "average pooling",
    "voco_llama": "VoCo-LLaMA",
    "discrete": "discrete channel only",
    "htc": "HTC-VLM",
    "lower": LOWER,
}
PAPER_KEPT = {title: mean(PAPER_BOUNDS.retention(row)) for title, row in PAPER.items()} | {MAIN["discrete"]: 33.0}  # retention, percent
ABLATIONS = {  # by title: the models by what they differ in; htc is the paper's choice
    "mask": {"htc": "star", "mask_full": "full"},
    "fusion": {"htc": "pre", "fusion_post": "post", "fusion_parallel": "parallel"},
    "anchors from": {"htc": "MGVQ", "anchors_random": "random", "anchors_topk": "top-k attention", "anchors_kmeans": "k-means"},
    "number of anchors": {"num_anchors_1": "1", "num_anchors_2": "2", "htc": "4", "num_anchors_8": "8", "num_anchors_16": "16"},
    "voco tokens": {"htc": "1", **{f"num_voco_{k}": str(k) for k in (2, 4, 8, 16, 32, 64)}},
    "MGVQ groups": {"mgvq_groups_4": "4", "htc": "8", "mgvq_groups_16": "16"},
    "MGVQ codebook": {"mgvq_codebook_4096": "4,096", "htc": "16,384", "mgvq_codebook_65536": "65,536"},
}


@dataclass(frozen=True)
class Claim:
    """The paper's claim that `better` is better than `worse`. paper: how much, in its own words."""

    better: str
    worse: str
    text: str
    paper: str


CLAIMS = (
    Claim("htc", "voco_llama", "HTC-VLM > VoCo-LLaMA", "87.2 / 81.0 % retention"),
    Claim("voco_llama", "average", "VoCo-LLaMA > average pooling", "81.0 / 64.1 %"),
    Claim("average", "qformer", "average pooling > Q-Former", "64.1 / 57.2 %"),
    Claim("qformer", "discrete", "Q-Former > discrete only, the last of the trained", "57.2 / about 33 %"),
    Claim("htc", "mask_full", "star mask > full mask", "1.8 points"),
    Claim("htc", "fusion_post", "pre-fusion > post-fusion", "no figure"),
    Claim("htc", "fusion_parallel", "pre-fusion > parallel fusion", "no figure"),
    Claim("htc", "anchors_random", "MGVQ anchors > random", "no figure"),
    Claim("htc", "anchors_topk", "MGVQ anchors > top-k attention", "no figure"),
    Claim("htc", "anchors_kmeans", "MGVQ anchors > k-means", "no figure"),
    Claim("num_voco_64", "htc", "64 voco tokens > 1", "89.8 / 87.2 %"),
)


def read(run: Path) -> tuple[Table, dict[str, float]]:
    """Figures of all finished models of a folder, and those of who does not look. Raises ConfigError where there is none."""
    table: Table = {}
    for path in sorted(run.glob("models/*/*/results.json")):
        accuracy = json.loads(path.read_text(encoding="utf-8"))["accuracy"]
        table.setdefault(path.parent.parent.name, {})[int(path.parent.name)] = {name: 100 * accuracy[name] for name in SCORES}
    if not table:
        raise ConfigError(f"{run} has no results; examples/paper/run.py makes them")
    train, test = (scenes.read_questions(run / "data" / f"{split}.jsonl") for split in ("train", "test"))
    blind = scenes.score(test, scenes.blind(train, test))
    return table, {name: 100 * blind[name] for name in SCORES}


def read_figures(path: Path) -> tuple[Table, dict[str, float]]:
    """The same from a file that `write_figures` wrote. Raises ConfigError where it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        table = {
            model: {int(seed): {score: float(figures[score]) for score in SCORES} for seed, figures in seeds.items()}
            for model, seeds in found["models"].items()
        }
        return table, {score: float(found["blind"][score]) for score in SCORES}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not a file of figures that this program writes: {type(error).__name__} {error}") from None


def write_figures(path: Path, table: Table, blind: dict[str, float]) -> None:
    """Percent to four places, by model, seed and score."""
    models = {model: {seed: {k: round(v, 4) for k, v in one.items()} for seed, one in seeds.items()} for model, seeds in table.items()}
    text = json.dumps({"blind": {name: round(share, 4) for name, share in blind.items()}, "models": models}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def of(table: Table, model: str, score: str) -> dict[int, float]:
    """A model's figure by seed."""
    return {seed: figures[score] for seed, figures in table[model].items()}


def retentions(table: Table, model: str, score: str = "all") -> list[float]:
    """A model's retention in percent of each seed, between the bounds of the same seed."""
    upper, lower = table.get("upper", {}), table.get("lower", {})
    return [
        Bounds(upper[seed], lower[seed]).retention({score: figures[score]})[score]
        for seed, figures in table[model].items()
        if seed in upper and seed in lower
    ]


def _cells(table: Table, model: str) -> list[str]:
    return [str(Estimate.of([*of(table, model, score).values()])) for score in SCORES]


def main_table(table: Table, blind: dict[str, float]) -> str:
    """Markdown. blind: figures in percent of who does not look; as retention they say how little a low one means."""
    lines = []
    table = table | {"blind": dict.fromkeys(table.get("upper", ()), blind)}
    for model, title in (MAIN | {"blind": "reading without looking"}).items():
        if table.get(model):
            kept = retentions(table, model)
            cells = [f"{blind[score]:.1f}" for score in SCORES] if model == "blind" else _cells(table, model)
            paper = f"{PAPER_KEPT[title]:.1f}" if title in PAPER_KEPT else ""
            lines.append([title, *cells, str(Estimate.of(kept)) if kept else "", paper])
    return markdown(["model", *SCORES, "retention, %", "in the paper, %"], lines)


def ablation_table(table: Table, models: dict[str, str], title: str) -> str:
    """Markdown of one ablation, with the difference to the paper's choice seed by seed."""
    lines = []
    for model, label in models.items():
        if model in table:
            less = "" if model == "htc" or "htc" not in table else str(difference(of(table, model, "all"), of(table, "htc", "all")))
            lines.append([label, *_cells(table, model), less])
    return markdown([title, *SCORES, "all, less that of HTC-VLM"], lines)


def judged(table: Table) -> Iterator[tuple[Claim, dict[str, Estimate], str]]:
    """Each claim whose models were run: the differences in points by score, and the verdict on that of all questions."""
    for claim in CLAIMS:
        if table.get(claim.better, {}).keys() & table.get(claim.worse, {}).keys():
            found = {score: difference(of(table, claim.better, score), of(table, claim.worse, score)) for score in SCORES}
            yield claim, found, verdict(found["all"])


def claim_table(table: Table) -> str:
    """Markdown of all claims."""
    lines = [[claim.text, claim.paper, *(str(found[score]) for score in SCORES), said] for claim, found, said in judged(table)]
    if kept := retentions(table, "htc") if "htc" in table else []:
        found, wanted = Estimate.of(kept), PAPER_KEPT["HTC-VLM"]
        said = verdict(Estimate(found.mean - wanted, found.half))
        lines.append([f"HTC-VLM keeps {wanted:.1f} % or more", "retention", "", "", str(found), said])
    return markdown(["the paper says", "there", *(f"here: {score}" for score in SCORES), "verdict"], lines)


def plot(table: Table, models: dict[str, str], title: str, path: Path) -> None:
    """Bars with error bars for semantic and detail questions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [model for model in models if model in table]
    figure, axes = pyplot.subplots(figsize=(2 + 1.1 * len(shown), 3.6), layout="constrained")
    for place, (score, colour) in enumerate(zip(SCORES, ("#4878a8", "#d08030", "#707070"), strict=True)):
        found = [Estimate.of([*of(table, model, score).values()]) for model in shown]
        errors = [estimate.half if isfinite(estimate.half) else 0.0 for estimate in found]  # one seed has no error bar
        at = [index + 0.27 * (place - 1) for index in range(len(shown))]
        axes.bar(at, [estimate.mean for estimate in found], 0.25, yerr=errors, capsize=3, label=score, color=colour)
    axes.set_xticks(range(len(shown)), [models[model].replace(" ", "\n") for model in shown], fontsize=8)
    axes.set(xlabel=title, ylabel="accuracy, %", ylim=(0, 100))
    axes.legend(ncols=3, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def ablations(table: Table) -> dict[str, dict[str, str]]:
    """The ablations of which there is more than one model."""
    return {title: models for title, models in ABLATIONS.items() if len(models.keys() & table.keys()) > 1}


def has_main(table: Table) -> bool:
    """Whether the main table compares anything."""
    return len(MAIN.keys() & table.keys()) > 1


def report(table: Table, blind: dict[str, float]) -> str:
    """The whole report in Markdown, with the plots' names in it."""
    seeds = {len(figures) for figures in table.values()}
    many = f"{min(seeds)} to {max(seeds)} seeds" if len(seeds) > 1 else f"{max(seeds)} seed{'s' * (max(seeds) > 1)}"
    parts = [f"Means over {many} with 95% confidence intervals, in percent."]
    if has_main(table):
        parts += ["", main_table(table, blind), "", "![](main.png)"]
    for title, models in ablations(table).items():
        parts += ["", ablation_table(table, models, title), "", f"![]({file_name(title)})"]
    return "\n".join([*parts, "", claim_table(table), ""])


def file_name(title: str) -> str:
    return f"{title.replace(' ', '_').lower()}.png"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help=f"folder that examples/paper/run.py worked in, or a {FIGURES}")
    options = parser.parse_args()
    folder = options.run.parent if options.run.is_file() else options.run
    try:
        table, blind = read_figures(options.run) if options.run.is_file() else read(options.run)
        text = report(table, blind)
        if has_main(table):
            plot(table, MAIN, "model", folder / "main.png")
        for title, models in ablations(table).items():
            plot(table, models, title, folder / file_name(title))
    except ConfigError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    except ImportError:
        print("report: matplotlib is not installed: pip install -c constraints.txt -e '.[examples]'", file=sys.stderr)
        return 2
    if not options.run.is_file():
        write_figures(folder / FIGURES, table, blind)
    (folder / "report.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
