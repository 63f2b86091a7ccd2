"""The MGVQ trainer: it learns, revives dead codes, resumes bit for bit, and says what is wrong with bad input."""

import json
import math
import runpy
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from htc_megatron.config import ConfigError
from htc_megatron.model.mgvq import load_mgvq, save_mgvq
from htc_megatron.training.mgvq_codes import damp_residuals, reset_dead_codes, spread_latents, used_codes
from htc_megatron.training.mgvq_images import Batches, ImageStore, find_images
from htc_megatron.training.mgvq_trainer import MGVQTrainingConfig, build_optimizer, learning_rate, train_mgvq, train_step
from tests.mgvq_tiny import TINY, tiny_mgvq, tiny_pixels

TOOL = runpy.run_path(str(Path(__file__).parent.parent / "tools" / "train_mgvq.py"))["main"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """24 images: a coloured square on a coloured ground, in two subfolders and two formats."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for index in range(24):
        data = np.empty((40, 36, 3), dtype=np.uint8)
        data[:] = rng.integers(0, 256, 3)
        top, left = rng.integers(0, 20, 2)
        data[top : top + 14, left : left + 14] = rng.integers(0, 256, 3)
        path = root / ("a" if index % 2 else "b") / f"{index}.{'png' if index % 3 else 'jpg'}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(data).save(path)
    return root


def run(folder: Path, output: Path, **changes) -> MGVQTrainingConfig:
    base = MGVQTrainingConfig(
        model=TINY, images=str(folder), output_dir=str(output), steps=12, batch_size=4, lr=4e-3, validation_images=4, log_interval=1
    )
    return replace(base, **{"reset_interval": 4, **changes})


def scalars(output: Path, tag: str) -> list[float]:
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    return [event.value for event in events.Scalars(tag)]


def test_training_lowers_the_loss_and_leaves_a_usable_file(folder, tmp_path):
    report = train_mgvq(run(folder, tmp_path, steps=40, batch_size=20, eval_interval=20), progress=False)
    losses = scalars(tmp_path, "train/loss")
    assert len(losses) == 40 and losses[-1] < 0.5 * losses[0]  # each over all training images; 0.18 against 0.48
    psnr = scalars(tmp_path, "validation/psnr")
    assert len(psnr) == 2 and psnr[1] == pytest.approx(report["validation"]["psnr"]) and psnr[1] > psnr[0]
    assert all(len(scalars(tmp_path, f"{tag}/group_3")) == 40 for tag in ("codes_used", "perplexity"))
    assert json.loads((tmp_path / "report.json").read_text())["steps"] == 40
    assert Image.open(tmp_path / "reconstructions.png").size == (4 * 32, 2 * 32)
    # The PSNR of the report, from the file and the images alone.
    model, paths = load_mgvq(tmp_path / "mgvq.safetensors"), find_images(folder)
    held_out = torch.randperm(24, generator=torch.Generator().manual_seed(0))[:4].tolist()
    store = ImageStore(paths, 32, tmp_path / "broken.txt", 0.0)
    pixels = torch.stack([store[index] for index in held_out]).float() / 127.5 - 1
    error = (model.decode(model.encode(pixels)).clamp(-1, 1) - pixels).pow(2).mean().item()
    assert report["validation"]["psnr"] == pytest.approx(10 * math.log10(4 / error), abs=1e-3)


def test_stopped_and_resumed_equals_uninterrupted(folder, tmp_path):
    train_mgvq(run(folder, tmp_path / "whole"), progress=False)
    for steps in (5, 12):
        train_mgvq(run(folder, tmp_path / "parts"), stop_after=steps, progress=False)
    whole, parts = (load_mgvq(tmp_path / name / "mgvq.safetensors").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert scalars(tmp_path / "whole", "train/loss") == scalars(tmp_path / "parts", "train/loss")
    with pytest.raises(ConfigError, match=r"other settings: lr 0\.004 \(now 0\.1\)"):
        train_mgvq(run(folder, tmp_path / "parts", lr=0.1), progress=False)


def test_seed_decides(folder, tmp_path):
    losses = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_mgvq(run(folder, tmp_path / name, seed=seed, steps=3), progress=False)
        losses.append(scalars(tmp_path / name, "train/loss"))
    assert losses[0] == losses[1] != losses[2]


def test_start_from_a_file(folder, tmp_path):
    model = tiny_mgvq()
    save_mgvq(model, TINY, tmp_path / "start.safetensors")
    train_mgvq(
        run(folder, tmp_path / "tuned", init_from=str(tmp_path / "start.safetensors"), steps=1, lr=1e-9, reset_interval=0), progress=False
    )
    tuned = load_mgvq(tmp_path / "tuned" / "mgvq.safetensors")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.data, tuned.state_dict()[name], rtol=0, atol=1e-7)


def test_bf16_trains(folder, tmp_path):
    train_mgvq(run(folder, tmp_path, steps=12, batch_size=20, precision="bf16"), progress=False)
    losses = scalars(tmp_path, "train/loss")
    assert np.isfinite(losses).all() and losses[-1] < 0.8 * losses[0]


def test_dead_codes_are_reseeded_from_latents_and_live_ones_stay():
    model = tiny_mgvq().train()
    pixels = tiny_pixels(4)
    optimizer = build_optimizer(model, MGVQTrainingConfig(model=TINY))
    train_step(model, optimizer, pixels, MGVQTrainingConfig(model=TINY, reset_interval=0), 0)
    directions = model(pixels).directions
    window = 2 * 4 * 16  # the two forward passes
    alive = used_codes(model.quantize, window)
    expected = [set(model.quantize.codebook_used[g, -window:].int().tolist()) for g in range(4)]
    assert [set(alive[g].nonzero().flatten().tolist()) for g in range(4)] == expected
    assert not alive.all()
    table = model.quantize.embedding.weight
    before = table.detach().clone().view(4, 16, 2)
    optimizer.state[table]["exp_avg"].fill_(1.0)
    assert reset_dead_codes(model.quantize, optimizer, directions, window, seed=0) == int((~alive).sum())
    after, moment = table.detach().view(4, 16, 2), optimizer.state[table]["exp_avg"].view(4, 16, 2)
    assert torch.equal(before[alive], after[alive])
    assert (moment[alive] == 1).all() and (moment[~alive] == 0).all()
    for g in range(4):
        seeds = directions[:, :, g].flatten(0, 1)
        assert all((seeds == row).all(1).any() for row in after[g][~alive[g]])
    codes = model.encode(pixels)
    assert all(len(codes[:, :, g].unique()) > len(expected[g]) for g in range(4) if not alive[g].all())


def test_a_collapsed_codebook_comes_back(folder, tmp_path):
    """Every row of a group at one place: without resets a few codes are used; with them most are."""
    model = tiny_mgvq()
    with torch.no_grad():
        model.quantize.embedding.weight.fill_(1.0)
    save_mgvq(model, TINY, tmp_path / "collapsed.safetensors")
    used = {}
    for interval in (0, 2):
        report = train_mgvq(
            run(folder, tmp_path / str(interval), init_from=str(tmp_path / "collapsed.safetensors"), reset_interval=interval),
            progress=False,
        )
        used[interval] = report["training"]["used_codes_share"]
    assert used[0] <= 0.25 and used[2] >= 0.5, used


def test_window_ignores_what_is_older_and_what_is_not_there_yet():
    quantiser = tiny_mgvq().quantize
    assert not used_codes(quantiser, 10**9).any()
    quantiser.record(torch.tensor([[[1, 2, 3, 4]]], dtype=torch.int16))
    quantiser.record(torch.tensor([[[5, 5, 5, 5]]], dtype=torch.int16))
    assert used_codes(quantiser, 1).nonzero().tolist() == [[g, 5] for g in range(4)]
    assert used_codes(quantiser, 2).nonzero().tolist() == [[0, 1], [0, 5], [1, 2], [1, 5], [2, 3], [2, 5], [3, 4], [3, 5]]
    quantiser.record(torch.zeros(1, 70000, 4, dtype=torch.int16))  # more than the window holds
    assert used_codes(quantiser, 10**9).nonzero().tolist() == [[g, 0] for g in range(4)]


def test_start_spreads_latents_over_the_sphere():
    torch.manual_seed(0)
    model, pixels = tiny_mgvq(), tiny_pixels(8)
    damp_residuals(model)
    spread_latents(model, pixels, seed=0)
    latents = model.quant_conv(model.encoder(pixels)).transpose(0, 1).flatten(1)
    # Whitening in fp64, applied in fp32 to latents with a mean of about their spread: 1e-3 of the unit variance.
    for group in latents.split(2):
        torch.testing.assert_close(group.mean(1), torch.zeros(2), rtol=0, atol=1e-3)
        torch.testing.assert_close(torch.cov(group, correction=0), torch.eye(2), rtol=0, atol=1e-3)
    flat = torch.zeros(2, 3, 32, 32)
    spread_latents(model, flat, seed=0)  # images of one colour: nothing to spread, nothing broken
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_learning_rate():
    config = MGVQTrainingConfig(steps=100, lr=1.0, min_lr=0.1, warmup_ratio=0.1)
    assert learning_rate(config, 0) == pytest.approx(0.1)
    assert learning_rate(config, 10) == pytest.approx(1.0)
    assert learning_rate(config, 55) == pytest.approx(0.55)
    assert learning_rate(config, 100) == pytest.approx(0.1)


def test_order_is_a_function_of_the_seed_and_covers_an_epoch(folder, tmp_path):
    store = ImageStore(find_images(folder), 32, tmp_path / "broken.txt", 0.0)
    first, second = (Batches(store, torch.arange(24), 5, seed, 1) for seed in (0, 1))
    epoch = sum((first.batch_indices(step) for step in range(4)), [])
    assert len(set(epoch)) == 20  # the tail of 4 is dropped
    assert first.batch_indices(6) == Batches(store, torch.arange(24), 5, 0, 1).batch_indices(6) != second.batch_indices(6)
    assert torch.equal(first[3], torch.stack([store[index] for index in first.batch_indices(3)]))
    first.close()


def test_images_from_a_list(folder, tmp_path):
    names = [str(path) for path in find_images(folder)][:5]
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(names) + "\n\n")
    assert [str(path) for path in find_images(listed)] == names
    listed.write_text("gone.png\n")
    with pytest.raises(ConfigError, match="1 of 1 paths listed in .*list.txt do not exist, the first is .*gone.png"):
        find_images(listed)


def test_bad_images_are_named_and_skipped_up_to_a_share(folder, tmp_path):
    for index, path in enumerate(find_images(folder)[:8]):
        (tmp_path / f"{index}.png").write_bytes(path.read_bytes() if index != 3 else b"no image")
    report = train_mgvq(run(tmp_path, tmp_path / "out", steps=2, max_bad_share=0.2, validation_images=0), progress=False)
    assert report["broken_images"] == 1 and "validation" not in report
    assert (tmp_path / "out" / "broken_images.txt").read_text().startswith(str(tmp_path / "3.png"))
    with pytest.raises(ConfigError, match="1 of 8 are broken, such as .*3.png .*max_bad_share allows 0"):
        train_mgvq(run(tmp_path, tmp_path / "strict", steps=2), progress=False)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"images": ""}, "images is empty; it must name a folder"),
        ({"images": "absent"}, "images: absent does not exist"),
        ({"batch_size": 21}, "batch_size is 21, but only 20 images are left for training"),
        ({"validation_images": 24}, "only 0 images are left for training"),
        ({"model": replace(TINY, groups=5)}, "must be multiples of groups, 5"),
        ({"init_from": "absent.pt"}, "absent.pt does not exist"),
        ({"lr": 1e30, "clip_grad": 0.0}, "the loss is (nan|inf) after .* lr 1e[+]30 is too high"),
    ],
)
def test_refusals(folder, tmp_path, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        train_mgvq(run(folder, tmp_path, **changes), progress=False)
    assert not (tmp_path / "mgvq.safetensors").exists()


def test_more_processes_than_one_are_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2; the MGVQ trainer runs in one process"):
        train_mgvq(run(folder, tmp_path), progress=False)


def test_empty_folder(tmp_path):
    with pytest.raises(ConfigError, match="has no images; it must be a folder with images"):
        find_images(tmp_path)


def test_tool(folder, tmp_path, capsys):
    path = tmp_path / "mgvq.yaml"
    path.write_text(json.dumps(asdict(run("", "", steps=2))))  # JSON is YAML
    out = f"output_dir={tmp_path / 'out'}"
    assert TOOL(["--config", str(path), out, f"images={folder}"]) == 0
    said = capsys.readouterr()
    assert "2 of 2 steps" in said.out and "2/2" in said.err
    assert TOOL(["--config", str(path), out, f"images={folder}", "lr=-1"]) == 2
    assert "lr: got -1, wanted" in capsys.readouterr().err
    assert TOOL(["--config", str(path), out, "images=absent"]) == 2
    assert "images: absent does not exist" in capsys.readouterr().err
