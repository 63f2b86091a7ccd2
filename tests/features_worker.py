"""Runs with a feature cache on every rank of a test, and what the cache did in them."""

import os
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from htc_megatron.config import VisionConfig
from htc_megatron.config_io import load_config, load_zero
from htc_megatron.data import collate
from htc_megatron.data.dataset import PreparedData
from htc_megatron.data.feature_cache import FeatureCache
from htc_megatron.parallel import groups as process_groups
from htc_megatron.training.build import build_engine
from htc_megatron.training.tower_features import TowerFeatures, tower_fingerprint
from tests.train_worker import train


@dataclass
class Told:
    """steps: of `train`. decoded: images. spared, computed: of this rank. skipped: micro-batches without the tower; idle: those with
    it on a blank image, for the others' sake; textual: those without an image."""

    steps: list
    decoded: int = 0
    spared: int = 0
    computed: int = 0
    skipped: int = 0
    idle: int = 0
    textual: int = 0


def run_cached(yaml: str, overrides: list[str], forgetful_tp_rank: int | None = None) -> Told:
    """A whole run. forgetful_tp_rank: this one finds nothing of images of odd number, whatever is in the cache."""
    told = Told([])
    agree, read, open_image = TowerFeatures.agree, FeatureCache.read, collate.open_image

    def noted(self, batches):
        agree(self, batches)
        told.textual += sum(not batch.layout.num_images for batch in batches)
        told.skipped += sum(not batch.features.run_tower for batch in batches)
        told.idle += sum(batch.features.run_tower and not batch.features.missing for batch in batches)

    def forgetful(self, shard, image):
        from megatron.core import parallel_state as mpu

        forgets = forgetful_tp_rank == mpu.get_tensor_model_parallel_rank() and image % 2
        return None if forgets else read(self, shard, image)

    def counted(data):
        told.decoded += 1
        return open_image(data)

    def watch(trainer):
        told.trainer = trainer

    with mock.patch.object(TowerFeatures, "agree", noted), mock.patch.object(FeatureCache, "read", forgetful):
        with mock.patch.object(collate, "open_image", counted):
            told.steps = train(yaml, overrides, watch)
    features = told.__dict__.pop("trainer").features
    if features is not None:
        told.spared, told.computed = features.spared, features.computed
    return told


def fingerprint(yaml: str, overrides: list[str]) -> str | None:
    """Of the tower of a new model; None off the first stage."""
    config = load_config(yaml, overrides)
    groups = process_groups.initialise(config.parallel, config.training.seed)
    engine = build_engine(config, load_zero(config.zero), groups)
    found = tower_fingerprint(engine, config, groups) if groups.first_stage else None
    engine.destroy()
    return found


def write_slots(folder: Path, data: Path, tower: str, times: int) -> None:
    """Every rank writes all slots over and over, each time other features, as no two towers would, so that tears show."""
    vision = VisionConfig(image_size=64, patch_size=8, hidden_size=128)
    cache = FeatureCache(folder, tower, vision, torch.float32)
    (shard,) = PreparedData(data).shards()
    for number in range(times):
        for image in range(shard.num_images):
            cache.write(shard, image, torch.full(cache.shape, float(2 * number + int(os.environ["RANK"]))))
            found = cache.read(shard, image)
            assert found is None or found.unique().numel() == 1, "a torn slot was read"
    cache.close()
