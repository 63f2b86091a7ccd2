"""tools/convert.py as a user calls it: import, show, verify, export, and what it says when something is wrong."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from htc_megatron.checkpoint import CheckpointReader
from htc_megatron.data.tokenizer import load_tokenizer
from htc_megatron.weights.listing import listing
from tests import data_tiny
from tests.import_tiny import VOCAB, clip, llama, llava, mgvq_file, original_llava, write
from tests.test_hf_export import tool
from tests.test_import import CONTINUOUS, HYBRID

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tool")
    words = data_tiny.byte_level_folder(root)
    llama(vocab_size=400).save_pretrained(root / "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(words / name, root / "llama" / name)
    clip().save_pretrained(root / "clip")
    llava().save_pretrained(root / "llava")
    tensors, flat = original_llava(llava(), tower=False)
    write(root / "original", tensors, flat)
    mgvq_file(root / "mgvq.pt")
    data_tiny.noise(30, 20).convert("RGB").save(root / "picture.png")
    made = tool("convert.py", "import", root / "llama", root / "clip", root / "mgvq.pt", root / "hybrid", "--set", *HYBRID)
    assert made.status == 0, made.error
    made = tool("convert.py", "import", root / "llava", root / "uncompressed", "--set", *CONTINUOUS, *UNCOMPRESSED)
    assert made.status == 0, made.error
    return root


UNCOMPRESSED = ["model.method.mask=none", "model.method.num_voco_tokens=0", "model.method.image_sees=prefix"]


def test_show_says_what_a_checkpoint_holds(files):
    said = tool("convert.py", "show", files / "hybrid").out
    assert re.search(r"^step: +0 of 1000$", said, re.M) and re.search(r"^written by: one process", said, re.M)
    assert "LLaMA, 2 layers of 64, 8 heads in 4 groups, MLP 48, vocabulary 400" in said
    voco = load_tokenizer(files / "llama").voco_token_id
    assert f"hybrid, pre-fusion, mask star, 6 visual tokens, <voco> x 1 (id {voco})" in said
    assert re.search(r"^optimizer: +none", said, re.M) and "CLIP)" in said and "voco: new (mean)" in said
    reader = CheckpointReader(files / "hybrid")
    entries = sum(reader.tensor(name).numel() for name in reader.names if name.startswith("backbone."))
    assert re.search(rf"^backbone +\d+ +{entries:,} +{4 * entries:,}  F32$", said, re.M)


@pytest.mark.parametrize(
    "a, b, looks",
    [("hybrid", "llama", "text alone"), ("llava", "uncompressed", "text behind a picture"), ("original", "uncompressed", "text alone")],
)
def test_verify_agrees_where_models_are_the_same(files, a, b, looks):
    done = tool("convert.py", "verify", files / a, files / b, "--image", files / "picture.png")
    assert done.status == 0, done.error + done.out
    assert done.out.splitlines()[-1] == "the same" and f"logits of {looks}: differ by up to" in done.out


def test_export_and_verify_any_pair(files, tmp_path):
    assert tool("convert.py", "export", files / "hybrid", tmp_path / "hf").status == 0
    assert tool("convert.py", "export", "--part", "backbone", files / "hybrid", tmp_path / "backbone").status == 0
    for other, rows in ((files / "hybrid", "<voco>"), (tmp_path / "backbone", "backbone"), (files / "llama", "backbone")):
        done = tool("convert.py", "verify", tmp_path / "hf", other, "--image", files / "picture.png")
        assert done.status == 0, done.out + done.error
        assert re.search(rf"^{rows} +\d+ +0$", done.out, re.M)
    assert (tmp_path / "backbone" / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "backbone" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert tool("convert.py", "import", tmp_path / "hf", files / "mgvq.pt", tmp_path / "again").status == 0
    done = tool("convert.py", "verify", tmp_path / "again", files / "hybrid")
    assert done.status == 0, done.out
    assert not re.search(r"only in", done.out)


def test_verify_knows_single_parts(files):
    for part, name, count in (("clip", "vision", 37), ("mgvq.pt", "mgvq", 1)):
        done = tool("convert.py", "verify", files / "hybrid", files / part, "--no-logits")
        assert done.status == 0, done.out
        assert re.search(rf"^{name} +{count} +0$", done.out, re.M), done.out


def test_verify_tells_what_differs(files, tmp_path):
    shutil.copytree(files / "llama", tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 0.25
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * torch.tensor([float("nan")] + [1.0] * 63)
    save_file(tensors, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    done = tool("convert.py", "verify", files / "hybrid", tmp_path / "other", "--no-logits")
    assert done.status == 1
    assert re.search(r"^backbone +19 +2$", done.out, re.M)
    assert "layers.1.mlp.up_proj.weight: differs by up to 0.25" in done.out and "norm.weight: differs by up to inf" in done.out
    assert done.out.splitlines()[-1] == "NOT the same" and "logits" not in done.out
    done = tool("convert.py", "verify", files / "hybrid", files / "llava", "--no-logits")
    assert done.status == 1 and re.search(rf"embed_tokens.weight: 400 rows and {VOCAB}, the first {VOCAB} compared", done.out)


def test_a_model_that_lacks_a_layer_is_not_the_same(files, tmp_path):
    """Every tensor of both is equal, and yet one of them is another model."""
    shutil.copytree(files / "llama", tmp_path / "short")
    tensors = load_file(tmp_path / "short" / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1." not in name}
    save_file(kept, tmp_path / "short" / "model.safetensors", {"format": "pt"})
    for pair in ((files / "hybrid", tmp_path / "short"), (tmp_path / "short", files / "hybrid")):
        done = tool("convert.py", "verify", *pair, "--no-logits")
        assert done.status == 1 and "9 of these should be in both" in done.out, done.out
        assert re.search(r"^backbone +12 +0$", done.out, re.M)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["import", "{f}/llama", "{f}/hybrid"], "hybrid exists already; wanted a new folder to import to"),
        (["import", "{f}/absent", "{t}/out"], "absent does not exist"),
        (["import", "{f}/llama", "{t}/out"], "no source holds these parts of the model"),
        (["import", "{f}/llama", "{t}/out", "--set", "model.method.mask=moon"], "model.method.mask: got 'moon'"),
        (["show", "{f}/llama"], "holds no complete checkpoint"),
        (["verify", "{f}/llama", "{t}"], "has no weights"),
        (["verify", "{f}/llama", "{f}/clip"], "CLIP, which gives no logits"),
        (["export", "{f}/hybrid", "{f}/llama"], "exists already"),
    ],
)
def test_the_tool_refuses_in_a_sentence(files, tmp_path, arguments, sentence):
    done = tool("convert.py", *(argument.format(f=files, t=tmp_path) for argument in arguments))
    assert done.status == 2
    assert sentence in done.error
    assert not list(tmp_path.iterdir())


def test_the_page_of_weights_is_the_table(tmp_path):
    assert tool("convert.py", "table").out == listing()
    assert (ROOT / "htc_megatron" / "weights" / "WEIGHTS.md").read_text() == listing(), "run: python tools/convert.py table"
