"""What is on disk, and what of it is refused: missing, damaged, surplus, not fitting."""

import errno
import fcntl
import json
import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from htc_megatron import checkpoint
from htc_megatron.checkpoint import CheckpointError, CheckpointReader, box_file
from htc_megatron.checkpoint.box_file import BLOCK, CheckedReader, CheckedWriter, Piece, write_boxes, write_bytes
from htc_megatron.checkpoint.boxes import Box, flat_boxes
from htc_megatron.checkpoint.manifest import CONFIG, Manifest, StoredTensor, config_to_bytes
from htc_megatron.config import RunConfig
from htc_megatron.model.naming import Entry
from htc_megatron.weights.table import Weight
from tests.checkpoint_tiny import check, plain, save, whole_model


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 96 bytes, so that small files have many and entries straddle them."""
    monkeypatch.setattr(box_file, "BLOCK", 96)


@st.composite
def cut_tensors(draw):
    """A tensor, the flat cuts its files were made with, and a box to ask for."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    cuts = sorted(draw(st.lists(st.integers(0, math.prod(shape)), max_size=5)))
    low = [draw(st.integers(0, n - 1)) for n in shape]
    size = [draw(st.integers(1, n - a)) for n, a in zip(shape, low, strict=True)]
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.uint8]))
    return shape, [0, *cuts, math.prod(shape)], Box(tuple(low), tuple(size)), dtype


@given(cut_tensors())
@settings(max_examples=80)
def test_any_box_of_any_cut(tmp_path_factory, case):
    """A file for every flat range, and a box read across them, compared with slicing."""
    shape, cuts, box, dtype = case
    folder = tmp_path_factory.mktemp("cut")
    whole = (torch.arange(math.prod(shape)) % 251).to(dtype).view(shape)
    files = {CONFIG: write_bytes(folder / CONFIG, config_to_bytes(RunConfig()))}
    for i, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False)):
        pieces, at = [], start
        for part in flat_boxes(start, stop, shape):
            pieces.append(Piece("model/w", part, whole.view(-1)[at : at + part.numel], dtype))
            at += part.numel
        files[f"{i}.safetensors"] = write_boxes(folder / f"{i}.safetensors", pieces)
    Manifest(1, None, {}, {"model/w": StoredTensor(shape, box_file.DTYPE_NAMES[dtype])}, files).write(folder)
    reader = CheckpointReader(folder)
    reader.verify()
    region = tuple(slice(a, a + n) for a, n in zip(box.offset, box.size, strict=True))
    assert torch.equal(reader.read_box("model/w", box), whole[region])
    assert torch.equal(reader.tensor("w"), whole)


def test_a_part_costs_a_part(tmp_path, monkeypatch):
    """One row of a tensor of 400 kB: no more than its blocks are read."""
    value = torch.randn(1000, 100)
    record = write_boxes(tmp_path / "f", [Piece("w", Box((0, 0), (1000, 100)), value, torch.float32)])
    file = box_file.BoxFile(tmp_path / "f", record)
    sizes = []
    fill = CheckedReader._fill
    monkeypatch.setattr(CheckedReader, "_fill", lambda self, f, block, out: (sizes.append(len(out)), fill(self, f, block, out)))
    assert torch.equal(file.read(file.boxes[0], Box((500, 20), (1, 5))), value[500:501, 20:25])
    assert sum(sizes) <= 400 + 2 * 96


FILES = ["rank_00000.safetensors", "config.yaml", "checkpoint.json"]
READ_BY = {  # the two ways into a checkpoint
    "reader": lambda folder: CheckpointReader(folder).verify(),
    "load": lambda folder: checkpoint.load(folder, plain(whole_model())),
}


def damaged(data: bytes, damage: str) -> bytes:
    middle = len(data) // 2
    return {
        "truncated": data[:-1],
        "longer": data + b"\n\0",
        "empty": b"",
        "flipped": data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :],
    }[damage]


@pytest.mark.parametrize("read", READ_BY.values(), ids=READ_BY)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "longer", "empty", "flipped"])
def test_damaged_files_are_named(tmp_path, name, damage, read):
    path = save(tmp_path) / name
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(damaged(data, damage))
    with pytest.raises(CheckpointError, match=name) as error:
        read(path.parent)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("read", READ_BY.values(), ids=READ_BY)
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path, read):
    """60 places over each file. In the manifest a flip may fall on white space; then nothing it says may have changed."""
    folder = save(tmp_path)
    whole = Manifest.read(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for i in range(60):
            place, bit = i * len(data) // 60, i % 8
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
            try:
                read(folder)
            except CheckpointError as error:
                assert str(path) in str(error) and "\n" not in str(error)[:200]
            else:
                assert path.name == "checkpoint.json" and Manifest.read(folder) == whole
        path.write_bytes(data)
    check(folder, 0)


@pytest.mark.parametrize("read", READ_BY.values(), ids=READ_BY)
def test_surplus_files_are_refused(tmp_path, read):
    folder = save(tmp_path)
    (folder / "rank_00001.safetensors").write_bytes(b"")
    (folder / "notes").mkdir()
    (folder / "link").symlink_to("config.yaml")
    with pytest.raises(
        CheckpointError, match="link does not .*; notes does not belong to it; rank_00001.safetensors does not belong to it"
    ):
        read(folder)


def rewrite(folder, change) -> None:
    """Change checkpoint.json and give it a fitting checksum, as someone with an editor and patience could."""
    manifest = Manifest.read(folder)
    (folder / "checkpoint.json").unlink()
    change(manifest)
    manifest.write(folder)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m: m.files.update({"../x": m.files[CONFIG]}), "'../x' is not the name of a file"),
        (lambda m: m.files.pop(CONFIG), "config.yaml does not belong to it"),
        (lambda m: m.tensors.pop("model/frontend.voco.weight"), "model/frontend.voco.weight, which the checkpoint does not list"),
        (lambda m: m.tensors.update({"model/x": StoredTensor((2,), "F32")}), r"model/x of shape \(2,\) has 0 entries stored, 2 expected"),
        (lambda m: m.tensors.update({"model/frontend.voco.weight": StoredTensor((8, 1), "F32")}), "boxes outside its shape"),
        (lambda m: m.tensors.update({"model/frontend.voco.weight": StoredTensor((8,), "F32")}), "number of dimensions"),
        (lambda m: m.tensors.update({"model/x": StoredTensor((2,), "F4")}), "model/x has the type 'F4'"),
    ],
)
def test_a_manifest_that_does_not_fit(tmp_path, change, sentence):
    folder = save(tmp_path)
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=sentence):
        CheckpointReader(folder)


def test_other_kinds_of_folders(tmp_path):
    for path, sentence in (
        (tmp_path / "none", "no such folder"),
        (tmp_path, "holds no complete checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            CheckpointReader(path)
    folder = save(tmp_path)
    document = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(json.dumps({**document, "version": 2}))
    with pytest.raises(CheckpointError, match="version 2, 'htc-megatron checkpoint' version 1 is wanted"):
        CheckpointReader(folder)
    rewritten = tmp_path / "old"
    rewritten.mkdir()
    files = {CONFIG: write_bytes(rewritten / CONFIG, b"model: {mystery: 1}\n")}
    Manifest(1, None, {}, {}, files).write(rewritten)
    with pytest.raises(CheckpointError, match="config.yaml: not a configuration this version reads"):
        CheckpointReader(rewritten)


def test_tensors_that_do_not_fit_are_listed(tmp_path):
    folder = save(tmp_path)
    state = plain(whole_model(), fill=5.0)
    state.entries[0] = Entry("frontend.voco.bias", nn.Parameter(torch.ones(3)), Weight("frontend.voco.bias", (3,), "replicated", ()))
    state.entries[1] = Entry(state.entries[1].name, nn.Parameter(torch.ones(4)), Weight("", (4,), "replicated", ()))
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(folder, state)
    assert "1 missing: model/frontend.voco.bias; 1 not part of this model: model/frontend.voco.weight; 1 of another shape: model/" in str(
        error.value
    )
    assert all((entry.param == 5.0).all() or (entry.param == 1.0).all() for entry in state.entries), (
        "something was written before the check"
    )


@pytest.mark.parametrize("refuses", [False, True])
def test_blocks_go_past_the_page_cache_where_they_can(tmp_path, monkeypatch, refuses):
    """Whole blocks and a rest, in pieces that fit neither; and on a file system that allows O_DIRECT and then takes no write of it."""
    monkeypatch.setattr(box_file, "BLOCK", BLOCK)
    data, write, direct = os.urandom(2 * BLOCK + 4096 + 5), os.write, []

    def watched(descriptor: int, block: memoryview) -> int:
        direct.append(bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT))
        if direct[-1] and refuses:
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(descriptor, block)

    monkeypatch.setattr(os, "write", watched)
    writer = CheckedWriter(tmp_path / "file")
    for start in range(0, len(data), 999_999):
        writer.write(data[start : start + 999_999])
    record = writer.close()
    assert (tmp_path / "file").read_bytes() == data
    CheckedReader(tmp_path / "file", record).verify()
    if direct[0]:  # some file systems, such as older tmpfs, know nothing of it
        assert direct == ([True, False, False, False] if refuses else [True, True, False])
