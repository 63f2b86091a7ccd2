"""bf16 follows fp32: the quick start's model and data, PP 2 x DP 2 under ZeRO-3, 200 steps."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from htc_megatron.config_io import load_config, to_yaml
from htc_megatron.data.conversation import Template
from htc_megatron.data.prepare import CodeEncoder, Preparation, prepare
from htc_megatron.data.tokenizer import load_tokenizer
from htc_megatron.evaluation.easy_vqa import conversations, load_questions, train_tokenizer, write_images
from htc_megatron.model.mgvq import build_mgvq, load_mgvq, mgvq_fingerprint, save_mgvq
from tests.train_worker import train

RECIPE = Path(__file__).parent.parent / "pretrain" / "recipes" / "quickstart.yaml"
STEPS, WINDOW = 200, 20


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> Path:
    """The quick start's run with an untrained MGVQ: its codes are as good as others for comparing precisions."""
    folder = tmp_path_factory.mktemp("quickstart")
    config = load_config(RECIPE)
    write_images(folder, "train")
    records = conversations(load_questions("train"))
    train_tokenizer(records, folder / "tokenizer.model", config.model.backbone.vocab_size - 1)
    (folder / "some.json").write_text(json.dumps(records[:3000]))
    torch.manual_seed(0)
    save_mgvq(build_mgvq(config.model.mgvq), config.model.mgvq, folder / "mgvq.safetensors")
    encoder = load_mgvq(folder / "mgvq.safetensors", encoder_only=True)
    prepare(
        Preparation(
            data=folder / "some.json",
            images=folder / "train",
            output=folder / "prepared",
            tokenizer=load_tokenizer(folder / "tokenizer.model"),
            template=Template(""),
            encoder=CodeEncoder(encoder, mgvq_fingerprint(encoder), 16),
            progress=False,
        )
    )
    config = replace(
        config,
        data=replace(config.data, train=str(folder / "prepared")),
        training=replace(config.training, train_iters=STEPS, micro_batch_size=2, global_batch_size=4),
        tokenizer=str(folder / "tokenizer.model"),
        mgvq_checkpoint=str(folder / "mgvq.safetensors"),
        init_from="",
    )
    (folder / "run.yaml").write_text(to_yaml(config))
    return folder / "run.yaml"


def smooth(losses: np.ndarray) -> np.ndarray:
    return np.convolve(losses, np.ones(WINDOW) / WINDOW, "valid")


@pytest.mark.slow
def test_bf16_follows_fp32(ranks, quickstart, tmp_path):
    """Averaged over 20 steps the two curves differ by less than single losses scatter about their average."""
    curves = {}
    for precision in ("fp32", "bf16"):
        overrides = [f"training.precision={precision}", f"output_dir={tmp_path}/{precision}"]
        curves[precision] = np.array([loss for _, loss, _ in ranks(4).run(train, str(quickstart), overrides, timeout=400)[0]])
    full, half = smooth(curves["fp32"]), smooth(curves["bf16"])
    noise = np.std(curves["fp32"][WINDOW - 1 :] - full)
    assert np.isfinite(half).all() and full[-1] < 0.7 * full[0], "the curve must fall, or there is nothing to follow"
    assert np.abs(half - full).max() < noise, f"bf16 leaves fp32 by {np.abs(half - full).max():.4f}, single losses scatter by {noise:.4f}"
