"""Linear probes: how much of an image's labels can be read off each representation by a linear map (the paper's table 3).

v_d: the anchors. patches: the mean of the projected patches. z_voco: the voco rows' hidden state, after the last layer's norm
or at layers that are asked for. What a model lacks is left out.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from htc_megatron.config import ConfigError
from htc_megatron.evaluation.attention import split_visual
from htc_megatron.evaluation.labels import KINDS, LabelSet
from htc_megatron.evaluation.retention import markdown
from htc_megatron.hf.mask_htc_vlm import VOCO
from htc_megatron.hf.modeling_htc_vlm import HTCVLMForConditionalGeneration
from htc_megatron.hf.processing_htc_vlm import HTCVLMProcessor
from htc_megatron.inference import read_image
from htc_megatron.inference.answer import beginning, image_inputs

STRENGTHS = [10.0**power for power in range(-4, 2)]  # inverse of the regularisation, as scikit-learn's C
ITERATIONS = 500  # of L-BFGS at most; the least regularised of hard labels would go on for thousands and gain nothing


@dataclass(frozen=True)
class Probe:
    """accuracy: share of the `test` images that are right; low, high: its 95 % interval by Wilson.

    majority: accuracy of the training images' most frequent value. strength: the inverse regularisation that cross-validation took.
    """

    accuracy: float
    low: float
    high: float
    majority: float
    classes: int
    train: int
    test: int
    strength: float


@torch.no_grad()
def extract(
    model: HTCVLMForConditionalGeneration,
    processor: HTCVLMProcessor,
    images: Sequence[str],
    layers: Sequence[int] = (-1,),
    pooling: str = "flat",
    batch_size: int = 16,
) -> dict[str, np.ndarray]:
    """Representations of image files, [images, size] float32 each, by name: v_d, patches, z_voco; z_voco_{n} for layer n < the last.

    layers: 0 is what goes into the first; negative ones count from the last. pooling: of anchors and of several voco rows,
    flat (side by side) or mean. Images stand behind what the chat template begins with. Raises ConfigError.
    """
    if pooling not in ("flat", "mean"):
        raise ConfigError(f"pooling is {pooling!r}; wanted flat or mean")
    depth = model.config.text_config.num_hidden_layers
    for layer in layers:
        if not -depth <= layer + 1 <= depth + 1:
            raise ConfigError(f"layer {layer} is not one of the model's; wanted {-depth - 1} to {depth}")
    numbers = [layer % (depth + 1) for layer in layers]
    ids = torch.tensor([beginning(processor)], device=model.device)
    found: dict[str, list[Tensor]] = {}
    for first in tqdm(range(0, len(images), batch_size), desc="representations", unit=" batches", mininterval=0.5):
        opened = [read_image(path) for path in images[first : first + batch_size]]
        rows = ids.expand(len(opened), -1)
        outputs = model.model(rows, output_hidden_states=True, **image_inputs(model, processor, opened, None))
        anchors, patches = split_visual(model.config, outputs.image_hidden_states, dim=1)
        parts = {"v_d": anchors, "patches": patches.mean(1, keepdim=True) if patches.shape[1] else patches}
        voco = outputs.expansion.tokens.kind == VOCO
        for number in numbers:
            name = "z_voco" if number == depth else f"z_voco_{number}"
            parts[name] = outputs.hidden_states[number][voco].unflatten(0, (len(opened), -1)) if voco.any() else anchors[:, :0]
        for name, part in parts.items():
            if part.shape[1]:
                pooled = part.flatten(1) if pooling == "flat" else part.mean(1)
                found.setdefault(name, []).append(pooled.float().cpu())
    return {name: torch.cat(parts).numpy() for name, parts in found.items()}


def require_sklearn() -> None:
    """Raises ConfigError where scikit-learn, which only probes need, is not installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise ConfigError("probes need scikit-learn, which is not installed: pip install -c constraints.txt -e '.[evaluation]'") from None


def fit(
    train: np.ndarray, train_values: Sequence[str], test: np.ndarray, test_values: Sequence[str], folds: int = 5, seed: int = 0
) -> Probe:
    """A multinomial logistic regression from [images, size] to values, scored on the test images.

    Representations are standardised by the training images, and L2's strength is the one of STRENGTHS that `folds`-fold
    cross-validation on the training images finds best; at a tie, the most regularised. Raises ConfigError.
    """
    require_sklearn()
    from scipy.stats import binomtest
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    counts = Counter(train_values)
    if len(counts) < 2 or min(counts.values()) < folds or not len(test_values):
        rare = min(counts.items(), key=lambda item: item[1], default=("none", 0))
        seen = f"{len(counts)} values in training, the rarest, {rare[0]!r}, at {rare[1]} images, and {len(test_values)} test images"
        raise ConfigError(f"{seen}; wanted at least 2 values at {folds} images each, and a test image")
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=ITERATIONS)),
        {"logisticregression__C": STRENGTHS},
        cv=StratifiedKFold(folds, shuffle=True, random_state=seed),
    )
    with warnings.catch_warnings():  # a fit that is not at its end is a candidate like any other: cross-validation judges it
        warnings.simplefilter("ignore", ConvergenceWarning)
        search.fit(train.astype(np.float64), list(train_values))
    guessed = search.predict(test.astype(np.float64))
    right = sum(a == b for a, b in zip(guessed, test_values, strict=True))
    interval = binomtest(right, len(test_values)).proportion_ci(0.95, "wilson")
    usual = max(sorted(counts), key=counts.__getitem__)
    return Probe(
        accuracy=right / len(test_values),
        low=float(interval.low),
        high=float(interval.high),
        majority=list(test_values).count(usual) / len(test_values),
        classes=len(counts),
        train=len(train_values),
        test=len(test_values),
        strength=search.best_params_["logisticregression__C"],
    )


def probe(representations: dict[str, np.ndarray], labels: LabelSet, folds: int = 5, seed: int = 0) -> dict[str, dict[str, Probe]]:
    """Probes by representation and label. `labels` are of the representations' rows, and divided. Raises ConfigError."""
    found: dict[str, dict[str, Probe]] = {name: {} for name in representations}
    for label, (name, rows) in tqdm([(label, item) for label in labels.labels for item in representations.items()], desc="probes"):
        taken = {
            split: [i for i, image in enumerate(labels.images) if image.split == split and label in image.labels]
            for split in ("train", "test")
        }
        values = {split: [labels.images[i].labels[label] for i in numbers] for split, numbers in taken.items()}
        try:
            found[name][label] = fit(rows[taken["train"]], values["train"], rows[taken["test"]], values["test"], folds, seed)
        except ConfigError as error:
            raise ConfigError(f"label {label!r}: {error}") from None
    return found


def by_kind(probes: dict[str, Probe], labels: LabelSet, figure: str = "accuracy") -> dict[str, float]:
    """The mean figure of each kind's labels."""
    figures = {kind: [getattr(probes[name], figure) for name, its in labels.labels.items() if its == kind] for kind in KINDS}
    return {kind: mean(values) for kind, values in figures.items() if values}


def table(found: dict[str, dict[str, Probe]], labels: LabelSet) -> str:
    """Accuracies in percent with their intervals, beside the majority's, and the mean of each kind."""

    def percent(value: float) -> str:
        return f"{100 * value:.1f}"

    def interval(one: Probe) -> str:
        return f"{percent(one.accuracy)} ({percent(one.low)} to {percent(one.high)})"

    rows = [
        [name, *(interval(probes[label]) for label in labels.labels), *map(percent, by_kind(probes, labels).values())]
        for name, probes in found.items()
    ]
    first = next(iter(found.values()))
    usual = [percent(first[label].majority) for label in labels.labels]
    rows.append(["majority", *usual, *map(percent, by_kind(first, labels, "majority").values())])
    return markdown(["", *(f"{name} ({kind})" for name, kind in labels.labels.items()), *by_kind(first, labels)], rows)
