"""The `latency` benchmark's parts are of what they say, and of one run."""

import argparse

import pytest
import torch

from htc_megatron.benchmarks import latency
from htc_megatron.benchmarks.answering import Asked
from htc_megatron.config import ConfigError
from htc_megatron.weights.export import export
from tests import data_tiny
from tests.hf_tiny import made
from tests.test_benchmark_generate import TINY

IMAGE = {"tower", "projector", "anchors", "compress"}
AFTER = {"other", "prefill", "step"}


def measured(*words, **sizes):
    parser = argparse.ArgumentParser()
    latency.add_arguments(parser)
    values = dict(prompt=6, answer=5, rounds=2) | sizes
    given = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return latency.run(parser.parse_args([*map(str, words), *given]), lambda sentence: None)


def check(result):
    """Parts are there and add up to no more than the whole."""
    for name, parts in result.figures["parts"].items():
        runs = result.figures["rounds"][name]
        assert len(runs) == 2 and min(parts.values()) > 0, name
        assert sum(parts.values()) + parts["step"] < max(runs)  # half of the four steps take the median or longer
    return {name: set(parts) for name, parts in result.figures["parts"].items()}


def test_parts_of_random_weights():
    result = measured("--mgvq", "tiny", voco=2, **TINY)
    assert check(result) == {
        "pixels": {"prepare", "mgvq"} | IMAGE | AFTER,
        "codes": {"prepare"} | IMAGE | AFTER,
        "cached": {"load"} | AFTER,
    }
    assert result.figures["same_answer"] and result.figures["visual_tokens"] == 20
    assert result.ratios.keys() == {"pixels_over_cached", "codes_over_cached"}
    assert "MGVQ's encoder and quantiser" in result.table() and result.figures["sizes"]["hidden"] == 32


@pytest.mark.parametrize(
    "variant, wanted",
    [
        (dict(channels="continuous"), {"pixels": {"prepare"} | IMAGE - {"anchors"}, "cached": {"load"}}),
        (dict(anchor_source="kmeans", resampler="qformer"), {"pixels": {"prepare", "resampler"} | IMAGE, "cached": {"load"}}),
        (
            dict(channels="discrete"),
            {"pixels": {"prepare", "mgvq", "anchors", "compress"}, "codes": {"anchors", "compress"}, "cached": {"load"}},
        ),
        (dict(mask="none"), {"pixels": {"prepare", "mgvq"} | IMAGE - {"compress"}, "codes": {"prepare"} | IMAGE - {"compress"}}),
    ],
    ids=data_tiny.in_order,
)
def test_parts_of_an_export(tmp_path, variant, wanted):
    reader, _ = made(tmp_path, seed=3, **variant)
    export(reader, tmp_path / "hf")
    result = measured("--export", tmp_path / "hf")
    assert check(result) == {name: parts | AFTER for name, parts in wanted.items()}
    assert result.figures["same_answer"] and result.figures["sizes"]["export"] == str(tmp_path / "hf")
    with pytest.raises(ConfigError, match="--hidden is given beside --export, whose model has its own"):
        measured("--export", tmp_path / "hf", hidden=64)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ConfigError, match="got 6 and 2 tokens, wanted at least 2 and 3"):
        measured("--mgvq", "tiny", **TINY, answer=2)
    with pytest.raises(ConfigError, match="picture absent.png"):
        measured("--mgvq", "tiny", "--image", "absent.png", **TINY)


def test_functions_that_were_timed_are_put_back():
    """A method of a class and a function of a module, also where the question fails; what else they do stays the same."""
    module = torch.nn.Linear(2, 2)
    asked = Asked(module, dict, 3, {"a": (module, "forward"), "b": (latency.modeling_htc_vlm, "compress_images")})
    module.device, original = torch.device("cpu"), latency.modeling_htc_vlm.compress_images
    with pytest.raises(KeyError, match="input_ids"):
        asked()
    assert "forward" not in vars(module) and latency.modeling_htc_vlm.compress_images is original
