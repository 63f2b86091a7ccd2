"""A frozen tower's features on disk: only whole slots of this tower and this image are ever read, and training does not notice."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from htc_megatron.config import ConfigError, VisionConfig
from htc_megatron.config_io import check, load_config
from htc_megatron.data.dataset import PreparedData
from htc_megatron.data.feature_cache import FeatureCache, check_sums, tower_key
from htc_megatron.data.loader import DataLoader
from htc_megatron.data.tokenizer import load_tokenizer
from htc_megatron.training.flops import step_flops
from htc_megatron.training.trainer import check_files
from tests import data_tiny
from tests.features_worker import fingerprint, run_cached, write_slots
from tests.training_tiny import make_run

VISION = VisionConfig(image_size=16, patch_size=8, hidden_size=24)
COMMON = ["training.freeze=[vision]", "training.train_iters=6", "training.seq_length=160", "data.validation="]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Rows of a few samples, some of text alone, over twelve pictures that come again and again."""
    return make_run(tmp_path_factory.mktemp("run"), count=40)


@pytest.fixture(scope="module")
def uncached(ranks, run, tmp_path_factory) -> list:
    """Steps of one process that computes all features every time."""
    told = ranks(1).run(run_cached, str(run), [*COMMON, f"output_dir={tmp_path_factory.mktemp('uncached')}"])[0]
    assert told.decoded > 60 and told.computed == 0
    return told.steps


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return data_tiny.prepared(folder, load_tokenizer(data_tiny.sentencepiece_model(folder)), codes=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_written_is_read(tmp_path, data, dtype):
    (shard,) = PreparedData(data).shards()
    cache, other = (FeatureCache(tmp_path, "tower", VISION, dtype) for _ in range(2))
    features = [torch.randn(4, 24).to(dtype) for _ in range(shard.num_images)]
    for image in (0, 3, 5):
        assert cache.read(shard, image) is None
        cache.write(shard, image, features[image])
    for image in range(shard.num_images):
        for reader in (cache, other):
            found = reader.read(shard, image)
            assert found is None if image in (1, 2, 4) else torch.equal(found, features[image])
    assert FeatureCache(tmp_path, "another", VISION, dtype).read(shard, 0) is None
    (file,) = (tmp_path / "tower").iterdir()
    assert file.stat().st_size == cache.size_of(PreparedData(data)) == shard.num_images * cache.stride
    with pytest.raises(ValueError, match="features are .4, 23. torch"):
        cache.write(shard, 0, features[0][:, :23])
    cache.close()


def test_only_whole_slots_of_the_same_image_are_read(tmp_path, data):
    """Any byte of a slot that is not written yet, and another picture of the same name and number, leave it empty."""
    (shard,) = PreparedData(data).shards()
    cache = FeatureCache(tmp_path, "tower", VISION, torch.float32)
    features = torch.randn(cache.shape)
    cache.write(shard, 2, features)
    (file,) = cache.folder.iterdir()
    whole = file.read_bytes()
    begin = 2 * cache.stride
    for byte in (0, 1, cache.bytes // 2, cache.bytes - 1, cache.bytes, cache.bytes + 15):
        content = bytearray(whole)
        content[begin + byte] ^= 1
        file.write_bytes(content)
        assert cache.read(shard, 2) is None, byte
    for written in (100, cache.bytes, cache.bytes + 8):  # a writer that was ended in between
        file.write_bytes(whole[: begin + written] + bytes(len(whole) - begin - written))
        assert cache.read(shard, 2) is None, written
    file.write_bytes(whole)
    assert torch.equal(cache.read(shard, 2), features)
    place = int(shard.arrays["image_offsets"][2])
    shard.arrays["image_bytes"] = np.array(shard.arrays["image_bytes"])
    shard.arrays["image_bytes"][place] ^= 1
    assert cache.read(shard, 2) is None
    cache.close()


def test_a_tower_has_a_key_of_its_own():
    keys = {tower_key(weights, vision, dtype) for weights in "ab" for vision in (VISION, replace(VISION, image_size=24)) for dtype in
            (torch.float32, torch.bfloat16)}  # fmt: skip
    assert len(keys) == 8 and tower_key("a", VISION, torch.float32) in keys


def test_writers_of_one_slot_leave_no_torn_one(ranks, tmp_path, data):
    """Two processes write the same slots without a break, as data-parallel ranks with one picture do; what is read is of one of them."""
    ranks(2).run(write_slots, tmp_path, data, "tower", 40)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_process_computes_the_same_bits(ranks, run, uncached, tmp_path, precision):
    """With an empty cache, and with a full one: then no picture is decoded and the tower never runs, in evaluation neither."""
    options = [*COMMON, f"training.precision={precision}"]
    if precision == "bf16":
        uncached = ranks(1).run(run_cached, str(run), [*options, f"output_dir={tmp_path}/uncached"])[0].steps
    options += [f"data.feature_cache={tmp_path}/cache"]
    empty = ranks(1).run(run_cached, str(run), [*options, f"output_dir={tmp_path}/empty"])[0]
    assert empty.steps == uncached
    assert empty.computed >= 12 and empty.spared > 20 and empty.textual > 0
    output = ranks(1).output[0]
    assert f"tower ran on {empty.computed} images and was spared {empty.spared}" in output and "takes up to 0.00 GiB, 4096 bytes" in output
    evaluated = [*options, f"output_dir={tmp_path}/full", f"data.validation={run.parent}/data", "training.eval_interval=3"]
    full = ranks(1).run(run_cached, str(run), evaluated)[0]
    assert full.steps == uncached
    assert (full.decoded, full.computed) == (0, 0) and full.spared > empty.spared + empty.computed


LAYOUTS = {
    "DP 2, ZeRO-3": (2, ["zero=zero3.json"], None),
    "TP 2, one rank finds less": (2, ["parallel.tensor_model_parallel_size=2"], 1),
    "PP 2": (2, ["parallel.pipeline_model_parallel_size=2", "zero=zero2.json"], None),
    "TP 2 x DP 2, ZeRO-3, one rank finds less": (4, ["parallel.tensor_model_parallel_size=2", "zero=zero3.json"], 0),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_compute_the_same(ranks, run, uncached, tmp_path, name):
    """To 1e-5 of one process without a cache, which is the parity of layouts. Ranks find different pictures all the time."""
    world_size, layout, forgetful = LAYOUTS[name]
    options = [*COMMON, *layout, f"data.feature_cache={tmp_path}/cache"]
    told = ranks(world_size).run(run_cached, str(run), [*options, f"output_dir={tmp_path}/run"], forgetful, timeout=300)
    for ours, theirs in zip(told[0].steps, uncached, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    first_stage = [one for one in told if one.spared + one.computed]
    assert all(one.computed and one.spared and (one.skipped or forgetful is not None) for one in first_stage)
    assert sum(one.textual for one in first_stage)
    if "ZeRO-3" in name:
        assert sum(one.idle for one in first_stage), "no rank ever ran its tower for another's sake"
        assert len({one.skipped for one in first_stage}) == 1
    if forgetful is not None:
        assert told[0].computed == told[1].computed and told[0].decoded != told[1].decoded


def test_another_layout_reads_what_one_wrote(ranks, run, uncached, tmp_path):
    """The tower's key does not depend on the layout; it does on its weights."""
    cache = f"data.feature_cache={tmp_path}/cache"
    ranks(1).run(run_cached, str(run), [*COMMON, cache, f"output_dir={tmp_path}/one"])
    layout = ["parallel.tensor_model_parallel_size=2", "zero=zero3.json"]
    told = ranks(4).run(run_cached, str(run), [*COMMON, cache, *layout, f"output_dir={tmp_path}/four"])
    assert [one.computed for one in told] == [0] * 4 and [one.decoded for one in told] == [0] * 4
    for ours, theirs in zip(told[0].steps, uncached, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    one, other = ranks(1).run(fingerprint, str(run), COMMON)[0], ranks(1).run(fingerprint, str(run), [*COMMON, "training.seed=5"])[0]
    assert one != other
    assert ranks(4).run(fingerprint, str(run), [*COMMON, *layout]) == [one] * 4


def test_what_the_tower_does_not_see_is_no_work(run, tmp_path):
    config = load_config(run, COMMON)
    cache = FeatureCache(tmp_path, "tower", config.model.vision, torch.float32)

    def batches(cache):
        loader = DataLoader(config, config.data.train, 0, 1, True, cache=cache)
        try:
            return next(loader)
        finally:
            loader.close()

    assert [b.num_tower_images for b in batches(None)] == [b.layout.num_images for b in batches(None)]
    images, distinct = sum(b.layout.num_images for b in batches(None)), sum(b.num_tower_images for b in batches(cache))
    per_image = (step_flops(config, batches(None)) - step_flops(config, batches(cache))) / max(images - distinct, 1)
    for batch in batches(cache):
        for shard, image in batch.features.missing:
            cache.write(shard, image, torch.zeros(cache.shape))
    known = batches(cache)
    assert sum(b.num_tower_images for b in known) == 0 and all(not b.pixel_values.any() for b in known)
    tower = (step_flops(config, batches(None)) - step_flops(config, known)) / images
    vision = config.model.vision
    layer = 2 * (vision.num_patches + 1) * vision.hidden_size * (4 * vision.hidden_size + 2 * vision.ffn_hidden_size)
    assert tower > vision.num_layers * layer and (images == distinct or per_image == pytest.approx(tower))


def test_impossible_caches_are_refused(run, tmp_path):
    for overrides, sentence in (
        (["training.freeze=[backbone]"], "wanted nothing, or vision in training.freeze: a tower that is trained gives other features each"),
        (["model.method.channels=discrete"], "wanted nothing with channels discrete: there is no vision tower"),
    ):
        with pytest.raises(ConfigError, match=f"data.feature_cache: got /cache, {sentence}"):
            check(load_config(run, [*COMMON, "data.feature_cache=/cache", *overrides]))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="data.feature_cache: .*file/tower cannot be made: Not a directory"):
        FeatureCache(tmp_path / "file", "tower", VISION, torch.float32)
    old = tmp_path / "old"
    shutil.copytree(run.parent / "data", old)
    index = json.loads((old / "index.json").read_text())
    for shard in index["shards"]:
        shard["sha256"] = ""
    (old / "index.json").write_text(json.dumps(index))
    check_sums(PreparedData(run.parent / "data"))
    with pytest.raises(ConfigError, match="data.feature_cache: the index of .*old is too old to tell its shards apart: prepare the data"):
        check_files(load_config(run, [*COMMON, "data.feature_cache=/cache", f"data.train={old}"]))
