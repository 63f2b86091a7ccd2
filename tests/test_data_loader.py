"""The loader: expanded ids, labels, layout and images against the samples they come from; order, resuming, threads."""

import threading
from collections import Counter

import numpy as np
import pytest
import torch

from htc_megatron.config import ConfigError
from htc_megatron.data.collate import Collator, expand_sample
from htc_megatron.data.conversation import IMAGE_TOKEN_INDEX, examples_to_samples
from htc_megatron.data.dataset import PreparedData
from htc_megatron.data.images import clip_pixels, open_image
from htc_megatron.data.loader import DataLoader, Prefetcher, ValidationLoader, open_data
from htc_megatron.data.tokenizer import load_tokenizer
from htc_megatron.hf.modeling_mgvq import mgvq_pixels
from htc_megatron.model.layout import ImageShape
from htc_megatron.model.mask import PADDING, TEXT, VISUAL, VOCO, token_kinds
from htc_megatron.model.mgvq import build_mgvq, save_mgvq
from tests.data_tiny import MGVQ, TEMPLATE, encoder, png, prepared, records, run_config, sentencepiece_model

RECORDS = {record["id"]: record for record in records()}


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    return sentencepiece_model(tmp_path_factory.mktemp("sp"))


@pytest.fixture(scope="module")
def tokenizer(model_file):
    return load_tokenizer(model_file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return prepared(tmp_path_factory.mktemp("data"), tokenizer, shard_bytes=3000)


def steps(config, folder, count, rank=0, size=1, pixels=False, **options):
    loader = DataLoader(config, folder, rank, size, pixels, **options)
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


def same(a, b):
    pairs = [(a.input_ids, b.input_ids), (a.labels, b.labels), (a.layout.samples, b.layout.samples), (a.layout.images, b.layout.images)]
    pairs += [(a.pixel_values, b.pixel_values), (a.codes, b.codes)]
    return all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize(("anchors", "patches", "voco"), [(4, 9, 1), (0, 3, 2), (2, 0, 1), (2, 3, 0)])
def test_expansion_by_hand(anchors, patches, voco):
    visual = anchors + patches
    ids, labels, starts = expand_sample(
        [1, IMAGE_TOKEN_INDEX, 5, IMAGE_TOKEN_INDEX, 6, 2], [False, False, False, False, True, True], ImageShape(anchors, patches, voco), 99
    )
    image = [0] * visual + [99] * voco
    assert ids.tolist() == [1, *image, 5, *image, 6, 2]
    assert labels.tolist() == [-100] * (len(ids) - 2) + [6, 2]
    assert starts.tolist() == [1, 2 + visual + voco]


@pytest.mark.parametrize(
    "method",
    [
        {},
        {"fusion": "post", "num_voco_tokens": 3},
        {"mask": "none", "num_voco_tokens": 0},
        {"channels": "continuous"},
        {"channels": "discrete"},
    ],
)
def test_batches_hold_the_samples(folder, tokenizer, method):
    """Every row is cut open again by its layout, and each piece compared with the record it came from."""
    config = run_config(tokenizer, micro_batch_size=2)
    for name, value in method.items():
        setattr(config.model.method, name, value)
    wanted = {tuple(s.ids): s for s in examples_to_samples(RECORDS.values(), tokenizer, TEMPLATE)}
    model, seen = encoder().model, Counter()
    for batch in [batch for step in steps(config, folder, 3, pixels=True) for batch in step]:
        layout, shape = batch.layout, batch.layout.image
        assert batch.input_ids.shape == batch.labels.shape == (2, 160) and batch.input_ids.dtype == batch.labels.dtype == torch.int64
        kind = token_kinds(layout)[0]
        assert (batch.input_ids[kind == VOCO] == config.model.method.voco_token_id).all()
        assert (batch.input_ids[kind == VISUAL] == 0).all() and (batch.input_ids[kind == PADDING] == 0).all()
        assert (batch.labels[kind != TEXT] == -100).all()
        assert config.model.method.voco_token_id not in batch.input_ids[kind == TEXT]
        image = 0
        for number, (row, start, stop) in enumerate(layout.samples.tolist()):
            starts = [s - start for n, s in layout.images.tolist() if n == number]
            ids, labels, column = [], [], 0
            for place in [*starts, stop - start]:
                ids += batch.input_ids[row, start + column : start + place].tolist() + [IMAGE_TOKEN_INDEX]
                labels += batch.labels[row, start + column : start + place].tolist() + [-100]
                column = place + shape.length
            sample = wanted[tuple(ids[:-1])]
            assert sample.labels == labels[:-1]
            seen[sample.name] += 1
            for name in sample.images:
                picture = open_image(png(int(name[0]), 20 + int(name[0]), 20))
                if shape.num_patches:
                    assert np.array_equal(batch.pixel_values[image].numpy(), clip_pixels(picture, 16))
                if shape.num_anchors:
                    assert torch.equal(batch.codes[image], model.encode(mgvq_pixels(picture, MGVQ.image_size)[None])[0])
                image += 1
        assert image == layout.num_images
        assert (batch.pixel_values is None) == (shape.num_patches == 0) and (batch.codes is None) == (shape.num_anchors == 0)
    assert len(seen) > 12


def test_batch_without_image_carries_a_blank_one(folder, tokenizer):
    config = run_config(tokenizer)
    data = PreparedData(folder)
    textual = np.flatnonzero(data.image_counts == 0)[:1].tolist()
    batch = Collator(data, config.model, 160, needs_pixels=True)([textual])
    assert batch.layout.num_images == 0
    assert batch.pixel_values.shape == (1, 3, 16, 16) and batch.codes.shape == (1, 16, 2) and batch.codes.dtype == torch.int16
    assert not batch.pixel_values.any() and not batch.codes.any()


def test_other_stages_see_the_same_without_pixels(folder, tokenizer, monkeypatch):
    config = run_config(tokenizer)
    with_pixels = steps(config, folder, 4, pixels=True)
    monkeypatch.setattr("htc_megatron.data.collate.open_image", None)  # decoding would fail
    for a, b in zip(with_pixels, steps(config, folder, 4), strict=True):
        for x, y in zip(a, b, strict=True):
            assert y.pixel_values is None and y.codes is None
            x.pixel_values = x.codes = None
            assert same(x, y)


@pytest.mark.parametrize("sizes", [(1, 2), (4, 1), (2, 4)])
def test_resumes_exactly_on_another_dp_size(folder, tokenizer, sizes):
    config = run_config(tokenizer)
    whole = steps(config, folder, 7)  # three epochs
    before, after = sizes
    ranks = [steps(config, folder, 4, rank, before) for rank in range(before)]
    ranks_after = [steps(config, folder, 3, rank, after, consumed_batches=4) for rank in range(after)]
    for parts, wanted in ((ranks, whole[:4]), (ranks_after, whole[4:])):
        for step, micro_batches in enumerate(wanted):
            together = [batch for micro in zip(*[rank[step] for rank in parts], strict=True) for batch in micro]
            assert len(together) == len(micro_batches) and all(same(a, b) for a, b in zip(together, micro_batches, strict=True))


def test_state(folder, tokenizer):
    config = run_config(tokenizer)
    loader = DataLoader(config, folder, 0, 1, needs_pixels=True)
    epochs = []
    for count in range(1, 7):
        next(loader)
        epochs.append(loader.epoch)
        assert loader.consumed_batches == count
    assert epochs == sorted(epochs) and epochs[0] == 0 and epochs[-1] > 0
    assert 0 <= loader.padding_share < 1 and 0 < loader.wait_seconds and 0 < loader.wait_share <= 1
    loader.close()
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)
    assert not [t for t in threading.enumerate() if t.name.startswith("data")]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_threads_do_not_change_the_order(folder, tokenizer, workers):
    config = run_config(tokenizer)
    wanted = steps(config, folder, 6, pixels=True)
    config.data.num_workers = workers
    for a, b in zip(wanted, steps(config, folder, 6, pixels=True), strict=True):
        assert all(same(x, y) for x, y in zip(a, b, strict=True))


def test_validation_takes_every_sample_once_each_pass(folder, tokenizer):
    config = run_config(tokenizer, micro_batch_size=2, global_batch_size=8, seq_length=128)
    loaders = [ValidationLoader(config, folder, rank, 2, needs_pixels=True) for rank in range(2)]
    assert len(loaders[0]) == len(loaders[1])
    passes = [[step for step in loader] for loader in loaders]
    samples = sum(len(batch.layout.samples) for rank in passes for step in rank for batch in step)
    assert samples == len(RECORDS) and all(len(step) == 2 for rank in passes for step in rank)
    wanted = sum(sum(s.supervised) for s in examples_to_samples(RECORDS.values(), tokenizer, TEMPLATE))
    assert sum(batch.num_supervised for rank in passes for step in rank for batch in step) == wanted
    again = [step for step in loaders[0]]
    assert all(same(a, b) for x, y in zip(passes[0], again, strict=True) for a, b in zip(x, y, strict=True))
    assert len(list(ValidationLoader(config, folder, 0, 2, False, max_batches=1))) == 1
    iterator = iter(loaders[0])
    next(iterator)
    iterator.close()  # left early: its threads end too
    assert not [t for t in threading.enumerate() if t.name.startswith("data")]


def test_errors_while_building_reach_the_trainer():
    def collate(rows):
        if rows == [[2]]:
            raise ConfigError("shard x: broken")
        return rows

    prefetch = Prefetcher(((i, [[[i]]]) for i in range(5)), collate, workers=2)
    assert [next(prefetch), next(prefetch)] == [(0, [[[0]]]), (1, [[[1]]])]
    with pytest.raises(ConfigError, match="broken"):
        next(prefetch)
    with pytest.raises(RuntimeError, match="closed"):
        next(prefetch)


def test_damaged_image_in_a_shard_is_named(tmp_path, tokenizer):
    out = prepared(tmp_path, tokenizer, records(4))
    data = PreparedData(out)
    shard = data.locate(0)[0]
    content = bytearray(shard.path.read_bytes())
    place = content.find(shard.image_bytes(0))
    content[place : place + 40] = bytes(40)
    shard.path.write_bytes(content)
    with pytest.raises(ConfigError, match="shard-00000.safetensors: image 0: .* not an image"):
        steps(run_config(tokenizer, global_batch_size=1), out, 3, pixels=True)


def test_impossible_runs_are_refused(folder, tmp_path, tokenizer):
    config = run_config(tokenizer, seq_length=20)
    with pytest.raises(ConfigError, match="seq_length is 20, but .* of 24 samples of data .* are longer, images included"):
        DataLoader(config, folder, 0, 1, False)
    with pytest.raises(ConfigError, match="seq_length is 20"):
        ValidationLoader(config, folder, 0, 1, False)
    with pytest.raises(ConfigError, match="global_batch_size is 400, but data .* packs into"):
        DataLoader(run_config(tokenizer, global_batch_size=400), folder, 0, 1, False)
    with pytest.raises(ConfigError, match="global_batch_size is 4, wanted a multiple of micro_batch_size 1 x 3 data-parallel ranks"):
        DataLoader(run_config(tokenizer), folder, 0, 3, False)


def test_named_tokenizer_and_mgvq_are_compared(folder, tmp_path, tokenizer, model_file):
    config = run_config(tokenizer)
    config.tokenizer = str(model_file)
    torch.manual_seed(0)
    save_mgvq(build_mgvq(MGVQ, encoder_only=True), MGVQ, tmp_path / "same.safetensors")
    config.mgvq_checkpoint = str(tmp_path / "same.safetensors")
    open_data(config, folder)
    save_mgvq(build_mgvq(MGVQ, encoder_only=True), MGVQ, tmp_path / "other.safetensors")
    config.mgvq_checkpoint = str(tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="mgvq_checkpoint: its fingerprint is .*, but the codes of"):
        open_data(config, folder)
