"""Save and load: one process and several, synchronous and not, and other programs."""

import dataclasses
import math
import os
import pickle
import random
from unittest import mock

import numpy
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from htc_megatron import checkpoint
from htc_megatron.checkpoint import CheckpointError, CheckpointReader, CheckpointWriter, Place, box_file, latest
from htc_megatron.checkpoint.dcp import DcpReader
from htc_megatron.checkpoint.rng import rng_state, set_rng_state
from htc_megatron.config import RunConfig
from tests.checkpoint_tiny import MODEL, check, plain, save, whole_model


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 96 bytes, so that small files have many and entries straddle them."""
    monkeypatch.setattr(box_file, "BLOCK", 96)


def test_reader_gives_back_what_was_saved(tmp_path):
    folder = save(tmp_path, step=7, extra={"consumed": 56, "lr": 1e-4})
    assert folder == tmp_path / "step_00000007" == latest(tmp_path)
    for path in (tmp_path, folder):
        reader = CheckpointReader(path)
        assert (reader.step, reader.extra, reader.config) == (7, {"consumed": 56, "lr": 1e-4}, RunConfig(model=MODEL))
        assert reader.layout["tp_size"] == 1 and reader.manifest.optimizer_step is None
        assert reader.names == list(whole_model())
        assert reader.shape("backbone.decoder.layers.1.mlp.linear_fc1.weight") == (2, 12, 8)
    check(tmp_path, 0)
    with pytest.raises(CheckpointError, match="holds no tensor model/other"):
        CheckpointReader(tmp_path).tensor("other")


def test_files_are_plain_safetensors(tmp_path):
    stored = load_file(save(tmp_path) / "rank_00000.safetensors")
    assert torch.equal(stored["model/backbone.output_layer.weight[0,0]"], whole_model()["backbone.output_layer.weight"])


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    """Python's and torch's unpicklers are put out of action, and a checkpoint still loads."""
    folder = save(tmp_path, rng=rng_state())

    def refuse(*args, **kwargs):
        raise AssertionError("a pickle was loaded")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, refuse)
    state = plain(whole_model(), fill=9.0)
    assert checkpoint.load(folder, state).rng.keys() == rng_state().keys()
    assert torch.equal(state.entries[0].param, whole_model()["frontend.voco.weight"])


def test_random_states_come_back(tmp_path):
    random.gauss(0, 1), numpy.random.randn()
    folder = save(tmp_path, rng=rng_state())
    draw = lambda: (torch.rand(3).tolist(), random.gauss(0, 1), random.random(), numpy.random.randn(3).tolist())  # noqa: E731
    before = draw()
    set_rng_state(checkpoint.load(folder, plain(whole_model())).rng)
    assert draw() == before
    with pytest.raises(CheckpointError, match="random states .* are wanted"):
        set_rng_state({"torch": torch.get_rng_state()})


def test_extra_state_must_survive_json(tmp_path):
    for extra, word in (({"a": (1, 2)}, "'a'"), ({1: 2}, "1"), ({"t": torch.ones(1)}, "Tensor"), ({"x": math.nan}, "JSON")):
        with pytest.raises(CheckpointError, match=word):
            save(tmp_path, extra=extra)
    assert latest(tmp_path) is None and list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_model_is_noticed(tmp_path):
    """config.yaml and weights must be of one model."""
    CheckpointReader(save(tmp_path / "right")).check_model()
    other = dataclasses.replace(MODEL, backbone=dataclasses.replace(MODEL.backbone, vocab_size=14, num_layers=3))
    folder = checkpoint.save(tmp_path / "wrong", plain(whole_model()), step=1, config=RunConfig(model=other))
    with pytest.raises(CheckpointError, match=r"layers.2.input_layernorm.weight is missing; .*output_layer.weight is \(13, 8\) instead of"):
        CheckpointReader(folder).check_model()


def test_weights_that_may_be_missing(tmp_path):
    """All of a part may, and stay as they are; some of one alone may not, nor any other weight."""
    state = plain(whole_model(1))
    norms = [entry for entry in state.entries if "backbone" in entry.name and "layernorm" in entry.name]
    others = [entry for entry in state.entries if entry not in norms]
    all_missing, some_missing, one_more = ([*others], [*others, norms[0]], others[1:])
    folders = [
        checkpoint.save(tmp_path / str(i), checkpoint.PlainState(entries, Place()), step=1, config=RunConfig(model=MODEL))
        for i, entries in enumerate((all_missing, some_missing, one_more))
    ]

    def may_lack(name: str) -> str:
        if name in {entry.name for entry in norms}:
            return "norms"
        return "projector" if "projector" in name else ""  # there in all three: no part answers for another

    target, new = plain(whole_model(2)), {entry.name: entry.param for entry in plain(whole_model(2)).entries}
    checkpoint.load(folders[0], target, may_lack=may_lack)
    for loaded, saved in zip(target.entries, state.entries, strict=True):
        assert torch.equal(loaded.param, new[loaded.name] if may_lack(loaded.name) == "norms" else saved.param), loaded.name
    for folder, missing in ((folders[1], norms[1:]), (folders[2], [others[0]])):
        with pytest.raises(CheckpointError, match=f"tensors {len(missing)} missing: .*{missing[0].name}"):
            checkpoint.load(folder, plain(whole_model(2)), may_lack=may_lack)
    with pytest.raises(CheckpointError, match=f"tensors {len(norms)} missing: .*{norms[0].name}"):
        checkpoint.load(folders[0], plain(whole_model(2)))


def test_writer_streams_weights(tmp_path):
    values = {name: value.bfloat16() if "fc1" in name else value for name, value in whole_model().items()}
    with CheckpointWriter(tmp_path, RunConfig(model=MODEL), file_bytes=2000) as writer:
        for name, value in values.items():
            writer.add(name, value)
    reader = CheckpointReader(tmp_path)
    assert writer.folder == reader.folder and len(list(reader.folder.glob("part_*.safetensors"))) > 3
    assert reader.manifest.optimizer_step is None
    for name, value in values.items():
        assert reader.tensor(name).dtype == value.dtype and torch.equal(reader.tensor(name), value)
    state = plain(whole_model(), fill=3.0)
    checkpoint.load(tmp_path, state, optimizer=False)
    check_state = {entry.name: entry.param.detach() for entry in state.entries}
    assert torch.equal(check_state["backbone.output_layer.weight"], values["backbone.output_layer.weight"])


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        ("other", (1,), "other is not a weight of this model"),
        ("frontend.voco.weight", (1, 9), r"frontend.voco.weight has shape \(1, 9\), \(1, 8\) is wanted"),
        ("frontend.voco.weight", (1, 8), r"\d+ weights of this model are missing: frontend.codebook.weight, "),
    ],
)
def test_writer_refuses_and_leaves_nothing(tmp_path, name, shape, sentence):
    with pytest.raises(CheckpointError, match=sentence), CheckpointWriter(tmp_path, RunConfig(model=MODEL)) as writer:
        writer.add(name, torch.zeros(shape))
    assert list(tmp_path.iterdir()) == []


def place_of(tp: int) -> Place:
    rank, world = dist.get_rank(), dist.get_world_size()
    return Place(rank, world, tp_rank=rank % tp, tp_size=tp, dp_rank=rank // tp, dp_size=world // tp)


def save_job(root, tp, asynchronous):
    state = plain(whole_model(), place_of(tp))
    arguments = dict(step=1, config=RunConfig(model=MODEL))
    if not asynchronous:
        return checkpoint.save(root, state, **arguments)
    with pytest.raises(CheckpointError, match="a process group of its own"):
        checkpoint.save_async(root, state, group=None, **arguments)
    pending = checkpoint.save_async(root, state, group=dist.new_group(backend="gloo"), **arguments)
    for entry in state.entries:
        entry.param.data.fill_(-1.0)  # training goes on: what is written is what was there
    for _ in range(20):
        dist.all_reduce(torch.ones(4))
    assert pending.stall < 30
    return pending.wait()


def load_job(root, tp):
    state = plain(whole_model(), place_of(tp), fill=7.0)
    checkpoint.load(root, state)
    for mine, right in zip(state.entries, plain(whole_model(), place_of(tp)).entries, strict=True):
        assert torch.equal(mine.param, right.param), mine.name  # padding rows of the vocabulary included: zero
    return True


@pytest.mark.parametrize(("world", "tp", "asynchronous"), [(1, 1, False), (2, 2, True), (4, 2, False)])
def test_tensor_parallel_shares(ranks, tmp_path, world, tp, asynchronous):
    """A vocabulary of 13 that no TP divides, gated pairs, fused QKV: written at one TP size and read at the others."""
    assert ranks(world).run(save_job, tmp_path, tp, asynchronous) == [tmp_path / "step_00000001"] * world
    check(tmp_path, 0)
    for other_world, other_tp in ((1, 1), (2, 2), (2, 1)):
        assert all(ranks(other_world).run(load_job, tmp_path, other_tp))


def failing_async_job(root):
    state = plain(whole_model(), place_of(1))
    full = OSError(28, "No space left on device") if dist.get_rank() == 1 else None
    with mock.patch.object(os, "fsync", side_effect=full):
        pending = checkpoint.save_async(root, state, group=dist.new_group(backend="gloo"), step=2, config=RunConfig(model=MODEL))
        return str(pytest.raises(CheckpointError, pending.wait).value)


def test_a_rank_with_a_full_disk_ends_the_save_on_all(ranks, tmp_path):
    save(tmp_path)
    told = ranks(2).run(failing_async_job, tmp_path)
    assert all("No space left on device" in sentence for sentence in told)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]


def dcp_job(folder):
    """What FSDP2 does: parameters as DTensors, here cut along the columns."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = {
        f"model/{name}": distribute_tensor(torch.zeros_like(value), mesh, [Shard(value.ndim - 1)]) for name, value in whole_model().items()
    }
    dcp.load(state, storage_reader=DcpReader(folder))
    return {key: value.full_tensor() for key, value in state.items()}


def test_programs_on_torch_distributed_checkpoint_can_read_it(ranks, tmp_path):
    ranks(2).run(save_job, tmp_path, 2, False)
    key = "model/backbone.output_layer.weight"
    state = {key: torch.zeros(13, 8)}
    dcp.load(state, storage_reader=DcpReader(tmp_path), no_dist=True)
    assert torch.equal(state[key], whole_model()["backbone.output_layer.weight"])
    for found in ranks(2).run(dcp_job, tmp_path):
        assert all(torch.equal(found[f"model/{name}"], value) for name, value in whole_model().items())
