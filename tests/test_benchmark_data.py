"""The data benchmark's figures are of what they say, at tiny sizes. Nothing here asks how fast."""

from dataclasses import replace

import pytest
from torch import nn

from htc_megatron.benchmarks.data import encoder_flops, measure_loading, measure_preparing, measure_training, run_config
from htc_megatron.config_io import check
from htc_megatron.data.dataset import PreparedData
from htc_megatron.data.prepare import CodeEncoder
from htc_megatron.data.tokenizer import load_tokenizer
from htc_megatron.model.mgvq import build_mgvq
from tests.data_tiny import MGVQ


def test_the_encoders_operations_are_those_of_its_convolutions():
    """Counted again by each convolution's own formula. The rest, linear attention and the search of codes, is less than a fifth."""
    model = build_mgvq(replace(MGVQ, image_size=32), encoder_only=True).eval()
    found = []

    def count(module: nn.Conv2d, inputs, output):
        found.append(2 * output[0].numel() * module.in_channels // module.groups * module.kernel_size[0] * module.kernel_size[1])

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    flops = encoder_flops(CodeEncoder(model, "", 3))
    assert len(found) >= 5
    assert sum(found) <= flops < 1.25 * sum(found)


def measure(folder, data) -> tuple[dict, dict]:
    from htc_megatron.parallel import groups as process_groups

    config = run_config(data, MGVQ, load_tokenizer(data / "tokenizer.model"), 1)
    config.training.seq_length = 256
    config.output_dir = str(folder)
    check(config, 1)
    loading = measure_loading(config, 3)
    groups = process_groups.initialise(config.parallel, 0)
    return loading, measure_training(config, groups, 3, 2, lambda sentence: None)


def test_figures(ranks, tmp_path):
    found = measure_preparing(tmp_path / "data", MGVQ, (20, 16, "png"), 30, 8)
    data = PreparedData(tmp_path / "data" / "out")
    assert found["images"] == 30 == data.index.counts["images"] and len(data) == 60
    assert found["rate_over_bound"] == pytest.approx(found["images_per_second"] / found["bound_images_per_second"])
    assert found["bound_images_per_second"] == pytest.approx(found["peak_flops"] / found["encoder_flops"])
    assert all(0 < found["seconds"][kind] <= found["seconds"]["total"] for kind in ("read", "decode", "resize", "encode", "write"))
    loading, training = ranks(1).run(measure, tmp_path / "run", tmp_path / "data", timeout=240)[0]
    rows = 3 * 6 * 256
    assert rows * (1 - 2 * loading["padding_share"] - 0.1) < loading["tokens"] <= rows
    assert loading["samples"] == loading["images"] > 3 * 6
    assert loading["tokens_per_second"] == pytest.approx(loading["tokens"] / loading["seconds"])
    assert 0 < training["wait_share"] < 1 and training["wait_s"] > 0
    assert training["step_images"] >= 6 and training["tower_images"] == 0
    ratios = sorted(tower / cache for tower, cache in zip(training["step_s"]["tower"], training["step_s"]["cache"], strict=True))
    assert len(ratios) == 2 and training["tower_over_cache"] == pytest.approx(sum(ratios) / 2)
