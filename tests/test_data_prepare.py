"""Preparation: what goes in comes out of the shards; what is broken is named or refused, and nothing is half-written."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from htc_megatron.config import ConfigError
from htc_megatron.data.conversation import examples_to_samples
from htc_megatron.data.dataset import PreparedData
from htc_megatron.data.images import open_image
from htc_megatron.data.prepare import QUARANTINE, Preparation, Work, prepare
from htc_megatron.data.shards import Index
from htc_megatron.data.tokenizer import load_tokenizer
from htc_megatron.hf.modeling_mgvq import mgvq_pixels
from htc_megatron.model.mgvq import build_mgvq, save_mgvq
from tests.data_tiny import MGVQ, TEMPLATE, encoder, png, prepared, records, run_config, sentencepiece_model, turns, write_source


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(sentencepiece_model(tmp_path_factory.mktemp("sp")))


def job(folder, tokenizer, made=None, **options):
    data, images = write_source(folder / "source", made)
    options = {"template": TEMPLATE, "progress": False, **options}
    return Preparation(data=data, images=images, output=folder / "out", tokenizer=tokenizer, **options)


def leftovers(folder):
    return sorted(p.name for p in folder.iterdir() if p.name != "source")


@pytest.mark.parametrize("shard_bytes", [1, 4000, 1 << 30])
def test_round_trip(tmp_path, tokenizer, shard_bytes):
    source = job(tmp_path, tokenizer, encoder=encoder(), shard_bytes=shard_bytes)
    index = prepare(source)
    data = PreparedData(source.output)
    wanted = examples_to_samples(records(), tokenizer, TEMPLATE)
    assert len(data) == len(wanted) == index.counts["samples"] == index.counts["records"]
    assert len(index.shards) == (24 if shard_bytes == 1 else len(index.shards)) and (len(index.shards) == 1) == (shard_bytes == 1 << 30)
    model = encoder().model
    for number, sample in enumerate(wanted):
        shard, place = data.locate(number)
        ids, supervised = shard.tokens(place)
        assert (ids.tolist(), supervised.tolist(), shard.name(place)) == (sample.ids, sample.supervised, sample.name)
        assert (data.text_tokens[number], data.image_counts[number]) == (sample.num_text_tokens, len(sample.images))
        images = shard.images_of(place)
        files = [(source.images / name).read_bytes() for name in sample.images]
        assert [shard.image_bytes(image) for image in images] == files
        for image, file in zip(images, files, strict=True):
            codes = model.encode(mgvq_pixels(open_image(file), MGVQ.image_size)[None])[0]
            assert np.array_equal(shard.codes[image], codes.numpy())
    assert index.counts["text_tokens"] == sum(s.num_text_tokens for s in wanted)
    assert index.counts["supervised_tokens"] == sum(sum(s.supervised) for s in wanted)
    assert leftovers(tmp_path) == ["out"]


@pytest.fixture
def watched(monkeypatch):
    """An encoder, and the number of images it is given each time: once for the codes' shape, then batches."""
    seen, coder = [], encoder(batch_size=4)
    encode = coder.model.encode
    monkeypatch.setattr(coder.model, "encode", lambda pixels: seen.append(len(pixels)) or encode(pixels))
    return coder, seen


@pytest.mark.parametrize(("shard_bytes", "batches", "held"), [(1 << 30, [4, 2], 6), (1, [2, 1, 1, 1, 1], 24)])
def test_an_image_is_encoded_once(tmp_path, tokenizer, watched, shard_bytes, batches, held):
    """In one shard, and in shards of one sample each, where every image stands in several."""
    coder, seen = watched
    work = Work()
    index = prepare(job(tmp_path, tokenizer, encoder=coder, shard_bytes=shard_bytes), work)
    assert index.counts["images"] == (
        held if held == 6 else sum(len(set(s.images)) for s in examples_to_samples(records(), tokenizer, TEMPLATE))
    )
    assert sorted(seen[1:]) == sorted(batches)
    assert (work.encoded, work.known) == (6, index.counts["images"] - 6)
    assert all(work.seconds[kind] > 0 for kind in ("read", "decode", "resize", "encode", "write"))
    assert work.images_per_second == pytest.approx(6 / work.seconds["total"])


def test_codes_of_earlier_outputs_are_taken(tmp_path, tokenizer, watched):
    """Other records over the same pictures, one under another name and one of other content under a known name: only that is encoded."""
    coder, seen = watched
    made = records()
    prepare(job(tmp_path / "first", tokenizer, encoder=coder))
    second = job(
        tmp_path / "second", tokenizer, made[::-1] + [{"id": "new", "image": "renamed.png", "conversations": turns("<image>?", "a")}]
    )
    (second.images / "renamed.png").write_bytes((second.images / "3.png").read_bytes())
    (second.images / "5.png").write_bytes(png(50, 25, 20))
    del seen[:]
    work, options = (
        Work(),
        dict(data=second.data, images=second.images, tokenizer=tokenizer, template=TEMPLATE, progress=False, encoder=coder),
    )
    index = prepare(Preparation(output=tmp_path / "taken", codes_from=(tmp_path / "first" / "out",), **options), work)
    assert seen == [1, 1] and (work.encoded, work.known) == (1, 6)
    anew = prepare(Preparation(output=tmp_path / "anew", **options))
    ours, theirs = (PreparedData(tmp_path / name).locate(0)[0] for name in ("taken", "anew"))
    assert index.counts == anew.counts and np.array_equal(ours.codes, theirs.codes) and len(np.unique(ours.codes, axis=0)) == 6

    other = {**options, "encoder": encoder(seed=1), "output": tmp_path / "other"}
    with pytest.raises(ConfigError, match=r"--codes-from .*taken: it has codes of MGVQ \w{12} at 16 pixels, wanted \w{12} at 16 pixels"):
        prepare(Preparation(codes_from=(tmp_path / "taken",), **other))
    with pytest.raises(ConfigError, match="--codes-from is given without --mgvq"):
        prepare(Preparation(codes_from=(tmp_path / "taken",), **{**other, "encoder": None}))


def test_jsonl_parts_make_the_whole(tmp_path, tokenizer):
    source = job(tmp_path, tokenizer)
    lines = tmp_path / "source" / "data.jsonl"
    made = records()
    made[2]["conversations"] = turns("line\u2028separator?", "yes")  # legal inside a JSON string, and no end of a line
    lines.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in made) + "\n\n")
    for number in range(3):
        prepare(Preparation(lines, source.images, source.output, tokenizer, TEMPLATE, part=(number, 3), progress=False))
    data = PreparedData(source.output)
    names = [shard.name(place) for shard, place in map(data.locate, range(len(data)))]
    assert names == [f"r{i}" for i in range(24)]
    (source.output / "part-1-of-3").rename(tmp_path / "away")
    with pytest.raises(ConfigError, match="wanted all of part-0-of-3 to the last; missing: ..part-1-of-3"):
        PreparedData(source.output)
    (tmp_path / "away").rename(source.output / "part-1-of-3")
    file = source.output / "part-2-of-3" / "index.json"
    content = json.loads(file.read_text())
    content["template"]["system"] = "Another."
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="prepared with another tokenizer, template or MGVQ"):
        PreparedData(source.output)


def broken_source(folder, good=20):
    """Records of which five are broken, each in its own way; the images are written too."""
    made = [r for r in records(good)]
    made += [
        {"id": "missing", "image": "no.png", "conversations": turns("<image>?", "a")},
        {"id": "cut", "image": "cut.png", "conversations": turns("<image>?", "a")},
        {"id": "text", "image": "text.png", "conversations": turns("<image>?", "a")},
        {"id": "silent", "conversations": []},
        {"id": "long", "conversations": turns("a", "blue " * 500)},
    ]
    data, images = write_source(folder, made)
    (images / "cut.png").write_bytes(png(9)[:-200])
    (images / "text.png").write_text("no image")
    return data, images


REASONS = {
    "missing": "image no.png cannot be read: No such file or directory",
    "cut": "image cut.png: the image cannot be decoded",
    "text": "image text.png: the file's 8 bytes are not an image of a known format",
    "silent": "the record has no conversations",
    "long": "tokens with its 0 images, wanted at most 300",
    None: "line 26 is not JSON",
}


def test_broken_records_are_named_and_left_out(tmp_path, tokenizer):
    data, images = broken_source(tmp_path / "source")
    lines = tmp_path / "source" / "data.jsonl"
    lines.write_text("\n".join(json.dumps(r) for r in json.loads(data.read_text())) + '\n{"id": "half')
    options = dict(template=TEMPLATE, progress=False, seq_length=300, tokens_per_image=7, encoder=encoder())
    index = prepare(Preparation(lines, images, tmp_path / "out", tokenizer, max_bad_share=0.25, **options))
    assert (index.counts["samples"], index.counts["bad"]) == (20, 6)
    named = [json.loads(line) for line in (tmp_path / "out" / QUARANTINE).read_text().splitlines()]
    assert [entry["id"] for entry in named] == list(REASONS) and [entry["record"] for entry in named] == list(range(20, 26))
    for entry in named:
        assert REASONS[entry["id"]] in entry["reason"]
    assert len(PreparedData(tmp_path / "out")) == 20

    with pytest.raises(ConfigError, match="6 of 26 records of .* cannot be used, wanted at most a share of 0.2 .*the first is record 20"):
        prepare(Preparation(lines, images, tmp_path / "strict", tokenizer, max_bad_share=0.2, **options))
    assert leftovers(tmp_path) == ["out", f"strict.{QUARANTINE}"]
    assert len((tmp_path / f"strict.{QUARANTINE}").read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[{", "it is not JSON: "),
        ('{"a": 1}', "it holds a dict, wanted a list of records"),
        ("[]", "it holds no record"),
        (b"\xff\xfe\xff", "cannot be read as UTF-8 text"),
    ],
)
def test_unreadable_input_is_refused(tmp_path, tokenizer, content, sentence):
    source = job(tmp_path, tokenizer)
    source.data.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=sentence):
        prepare(source)
    assert leftovers(tmp_path) == []


def test_wrong_paths_are_refused(tmp_path, tokenizer):
    source = job(tmp_path, tokenizer)
    arguments = dict(data=source.data, images=source.images, output=source.output, tokenizer=tokenizer)
    for change, sentence in (
        ({"data": tmp_path / "x.json"}, "no such file"),
        ({"images": tmp_path / "x"}, "no such folder"),
        ({"output": tmp_path / "source"}, "it exists; name another folder or give --overwrite"),
        ({"part": (2, 2)}, "--part is 2/2, wanted I/N"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            prepare(Preparation(**{**arguments, **change}))
    assert leftovers(tmp_path) == []


def test_a_crash_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    source = job(tmp_path, tokenizer, encoder=encoder(), shard_bytes=1)
    encode, calls = source.encoder.model.encode, []

    def fail(pixels):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return encode(pixels)

    monkeypatch.setattr(source.encoder.model, "encode", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare(source)
    assert leftovers(tmp_path) == []


def test_overwrite_replaces(tmp_path, tokenizer):
    prepare(job(tmp_path, tokenizer))
    index = prepare(job(tmp_path, tokenizer, made=records(8), overwrite=True))
    assert index.counts["samples"] == len(PreparedData(tmp_path / "out")) == 8


def edited(key, value):
    def edit(folder):
        content = json.loads((folder / "index.json").read_text())
        content[key] = value
        (folder / "index.json").write_text(json.dumps(content))

    return edit


def cut_shard(folder):
    file = folder / "shard-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def scramble_header(folder):
    file = folder / "shard-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[8:40] = b"x" * 32
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: (f / "index.json").unlink(), "there is no index.json; wanted a folder written by tools/prepare_data.py"),
        (lambda f: (f / "index.json").write_text('{"format": 1, "sh'), "the index is damaged"),
        (lambda f: (f / "index.json").write_text("[]"), "format is list, this version reads format 1"),
        (edited("format", 99), "format is 99, this version reads format 1"),
        (edited("shards", []), "the index is damaged"),
        (edited("shards", 3), "the index is damaged"),
        (edited("tokenizer", {}), "the index is damaged"),
        (edited("surprise", 1), "the index is damaged"),
        (lambda f: (f / "shard-00000.safetensors").unlink(), "shard-00000.safetensors: it is missing"),
        (cut_shard, r"shard-00000.safetensors: it has \d+ bytes, the index wants \d+"),
        (scramble_header, "its header is damaged"),
    ],
)
def test_damaged_data_is_refused(tmp_path, tokenizer, damage, sentence):
    out = prepared(tmp_path, tokenizer, records(4))
    damage(out)
    with pytest.raises(ConfigError, match=sentence):
        PreparedData(out).locate(0)


def test_data_for_another_model_is_refused(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match="no such folder; wanted one written by tools/prepare_data.py"):
        PreparedData(tmp_path / "none")
    data = PreparedData(prepared(tmp_path, tokenizer))
    without = PreparedData(prepared(tmp_path / "without", tokenizer, codes=False))
    model = run_config(tokenizer).model
    data.check(model, tokenizer.fingerprint, encoder().fingerprint)
    with pytest.raises(
        ConfigError, match="channels is hybrid, but .* holds no MGVQ codes: prepare it with --mgvq, or set channels to continuous"
    ):
        without.check(model)
    model.method.channels = "continuous"
    without.check(model)
    model.method.channels = "hybrid"
    model.method.anchor_source = "kmeans"
    without.check(model)
    model.method.anchor_source = "mgvq"
    with pytest.raises(ConfigError, match="tokenizer: its fingerprint is other, but .* was prepared with"):
        data.check(model, "other")
    with pytest.raises(ConfigError, match="mgvq_checkpoint: its fingerprint is "):
        data.check(model, "", encoder(seed=1).fingerprint)
    model.mgvq.image_size = 32
    with pytest.raises(ConfigError, match=r"codes of shape \(16, 2\) .*image_size 32 and groups 2 wants \(64, 2\)"):
        data.check(model)
    model.backbone.vocab_size -= 1  # more rows than the tokenizer needs are right
    with pytest.raises(ConfigError, match="vocab_size is .*, but the tokenizer that prepared"):
        data.check(model)


def test_the_tool(tmp_path, tokenizer):
    """As users call it: exit 0 and a folder, or exit 2 and one sentence."""
    data, images = write_source(tmp_path / "source")
    sentencepiece_model(tmp_path)
    torch.manual_seed(0)
    save_mgvq(build_mgvq(MGVQ), MGVQ, tmp_path / "mgvq.safetensors")
    root = Path(__file__).resolve().parent.parent
    tool = root / "tools" / "prepare_data.py"

    def call(*more):
        arguments = [
            sys.executable,
            str(tool),
            "--data",
            str(data),
            "--images",
            str(images),
            "--tokenizer",
            str(tmp_path / "tokenizer.model"),
        ]
        return subprocess.run([*arguments, *more], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)})

    done = call("--mgvq", str(tmp_path / "mgvq.safetensors"), "--output", str(tmp_path / "out"), "--system-prompt", "", "--device", "cpu")
    assert done.returncode == 0 and "24 samples, 6 images in 1 shards" in done.stdout, done.stderr
    assert re.search(r"^6 images encoded, \d+\.\d a second; 0 had their codes already$", done.stdout, re.M)
    again = call("--mgvq", str(tmp_path / "mgvq.safetensors"), "--output", str(tmp_path / "again"), "--codes-from", str(tmp_path / "out"))
    assert "0 images encoded, 0.0 a second; 6 had their codes already" in again.stdout, again.stderr
    index = PreparedData(tmp_path / "out").index
    assert index.template == {"system": "", "name": "vicuna_v1"} and (index.mgvq["positions"], index.mgvq["groups"]) == (16, 2)
    again = call("--output", str(tmp_path / "out"))
    assert again.returncode == 2 and again.stderr.startswith("prepare_data: --output") and len(again.stderr.splitlines()) == 1


def test_a_fingerprint_is_of_the_content(tmp_path, tokenizer):
    """The same for the same records wherever they lie; another for one other image of as many bytes, of which no length tells."""
    one, same = (prepared(tmp_path / name, tokenizer, codes=False) for name in ("one", "same"))
    other = tmp_path / "other"
    data, images = write_source(other / "source")
    before = (images / "0.png").read_bytes()
    (images / "0.png").write_bytes(png(77, 20, 20))
    assert len(before) == (images / "0.png").stat().st_size and before != (images / "0.png").read_bytes()
    prepare(Preparation(data=data, images=images, output=other / "out", tokenizer=tokenizer, template=TEMPLATE, progress=False))
    fingerprints = [PreparedData(folder).fingerprint for folder in (one, same, other / "out")]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    sizes = [[shard.size for shard in Index.read(folder).shards] for folder in (one, other / "out")]
    assert sizes[0] == sizes[1]
