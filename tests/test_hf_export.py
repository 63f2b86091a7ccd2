"""From a checkpoint to a folder that transformers loads by itself, and what the tools do with it."""

import io
import json
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from htc_megatron.checkpoint.writer import CheckpointWriter
from htc_megatron.config import ConfigError
from htc_megatron.data.shards import Index
from htc_megatron.evaluation.attention import draw, voco_attention
from htc_megatron.inference import answer, ask, load
from htc_megatron.weights import weights
from htc_megatron.weights.export import export, hf_from_tensors, hf_tensors
from tests.data_tiny import noise
from tests.hf_tiny import made, tiny_images, tiny_training_config, tiny_weights

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A checkpoint on disk and its export, made by the tool."""
    folder = tmp_path_factory.mktemp("export")
    reader, mgvq = made(folder)
    with CheckpointWriter(folder / "checkpoints", reader.config) as writer:
        for name, tensor in reader.tensors.items():
            writer.add(name, tensor)
    done = tool("convert.py", "export", folder / "checkpoints", folder / "hf")
    assert done.status == 0, done.error
    noise(20, 13).convert("RGB").save(folder / "picture.png")
    return folder / "hf", reader, mgvq


class Done(NamedTuple):
    status: int
    out: str
    error: str


def tool(name: str, *arguments) -> Done:
    """A tool's run in this process: starting Python and importing torch takes longer than the tool's work."""
    out, error, status = io.StringIO(), io.StringIO(), 0
    before = sys.argv
    sys.argv = [name, *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(error):
            runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")
    except SystemExit as end:
        status = end.code
    finally:
        sys.argv = before
    return Done(status, out.getvalue(), error.getvalue())


@pytest.mark.parametrize(
    "variant",
    [
        dict(),
        dict(qkv_bias=True, fusion="parallel"),
        dict(qkv_bias=True, tied=True),
        dict(channels="continuous", projector="linear", mask="full"),
        dict(channels="discrete", num_voco_tokens=2, image_sees="prefix"),
        dict(mask="none", num_voco_tokens=0),
        dict(mask="none"),
        dict(channels="continuous", resampler="qformer", mask="none", num_voco_tokens=0),
        dict(resampler="average", num_resampled_tokens=3, anchor_source="topk_attention"),
        dict(anchor_source="random", anchor_seed=2),
        dict(anchor_source="kmeans"),
    ],
    ids=str,
)
def test_every_variant_exports_and_loads(tmp_path, variant):
    reader, mgvq = made(tmp_path, **variant)
    written = export(reader, tmp_path / "hf", shard_bytes=50_000)
    assert len(written.files) > 1
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]
    model, processor = load(tmp_path / "hf")
    same = hf_from_tensors(reader.config.model, reader.tensors, mgvq)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in same.state_dict().items())
    picture = noise(20, 13)
    inputs = processor(text="what <image> is it", images=picture, return_tensors="pt")
    # mapped files are aligned otherwise than tensors in memory, which changes the order of sums
    torch.testing.assert_close(model(**inputs).logits, same(**inputs).logits, atol=1e-6, rtol=0)
    assert isinstance(ask(model, processor, [picture], "is it red ?", 3), str)


def test_voco_row_is_the_embedding_of_its_id():
    model = tiny_training_config()
    tensors, mgvq = tiny_weights(model)
    named = dict(hf_tensors(model, tensors.__getitem__, mgvq))
    rows = named["model.language_model.embed_tokens.weight"]
    table = tensors["backbone.embedding.word_embeddings.weight"]
    voco = model.method.voco_token_id
    assert torch.equal(rows[voco], tensors["frontend.voco.weight"][0])
    others = torch.arange(len(rows)) != voco
    assert torch.equal(rows[others], table[others])
    assert not torch.equal(table[voco], rows[voco])  # the checkpoint's own row is not read, and not overwritten


@pytest.mark.parametrize("variant", [dict(), dict(resampler="qformer", num_resampled_tokens=3, resampler_layers=1)], ids=str)
def test_a_changed_weight_changes_the_logits(variant):
    """No weight of the table is left out: moving any of them moves the logits (MGVQ's codebook: its codes)."""
    model = tiny_training_config(**variant)
    tensors, mgvq = tiny_weights(model)
    images, ids = tiny_images(1), torch.tensor([[1, 5, 60, 6, 7]])
    before = hf_from_tensors(model, tensors, mgvq)(ids, **images).logits
    for weight in weights(model):
        if weight.name == "frontend.codebook.weight" or weight.name.endswith("k_proj.bias"):  # which softmax does not see
            continue
        moved = tensors[weight.name].clone()
        if weight.name.startswith("backbone.embedding"):
            moved[5] += torch.randn(32)
        else:
            moved += torch.randn(moved.shape)
        after = hf_from_tensors(model, tensors | {weight.name: moved}, mgvq)(ids, **images).logits
        assert (after - before).abs().max() > 1e-6, weight.name


def test_low_precision_keeps_mgvq(tmp_path):
    reader, mgvq = made(tmp_path, precision="bf16")
    reader.tensors = {name: tensor.bfloat16() for name, tensor in reader.tensors.items()}
    export(reader, tmp_path / "hf")
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    for name, tensor in stored.items():
        assert tensor.dtype == (torch.float32 if name.startswith("model.mgvq.") else torch.bfloat16), name
    assert torch.equal(stored["model.mgvq.quantize.embedding.weight"], mgvq["quantize.embedding.weight"])
    model, processor = load(tmp_path / "hf")
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert {p.dtype for p in model.model.mgvq.parameters()} == {torch.float32}
    assert isinstance(ask(model, processor, [noise(20, 13)], "is it red ?", 3), str)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda r, f: r.names.remove("frontend.voco.weight"), "missing: frontend.voco.weight"),
        (lambda r, f: r.names.append("frontend.extra"), "unknown: frontend.extra"),
        (lambda r, f: r.tensors.update({"frontend.voco.weight": torch.zeros(2, 32)}), r"voco.weight has shape \(2, 32\), wanted \(1, 32\)"),
        (lambda r, f: r.tensors.update({"frontend.projector.fc1.bias": torch.zeros(5)}), r"has shape \(5,\), wanted \(32,\)"),
        (lambda r, f: r.tensors.update({"frontend.codebook.weight": torch.zeros(32, 4)}), "codebook is not the one in the checkpoint"),
        (lambda r, f: setattr(r.config, "mgvq_checkpoint", ""), "needs the MGVQ file"),
        (lambda r, f: setattr(r.config, "mgvq_checkpoint", str(f / "absent.safetensors")), "absent.safetensors"),
        (lambda r, f: setattr(r.config, "tokenizer", ""), "tokenizer '.*' does not exist"),
        (lambda r, f: setattr(r.config.model.method, "voco_token_id", 3), "but the model has it at 3"),
        (lambda r, f: (f / "hf").mkdir(), "exists already"),
    ],
)
def test_bad_exports_are_refused_and_leave_nothing(tmp_path, change, sentence):
    reader, _ = made(tmp_path)
    change(reader, tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ConfigError, match=sentence):
        export(reader, tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_dtype_is_one_of_three(tmp_path):
    reader, _ = made(tmp_path)
    with pytest.raises(ConfigError, match="dtype is 'int8'; wanted one of fp32, bf16, fp16, stored"):
        export(reader, tmp_path / "hf", dtype="int8")


@pytest.mark.parametrize("variant", [dict(), dict(mask="none"), dict(image_sees="prefix", num_voco_tokens=2)], ids=str)
def test_many_questions_get_the_answers_of_one(tmp_path, variant):
    reader, _ = made(tmp_path, seed=3, **variant)
    export(reader, tmp_path / "hf")
    model, processor = load(tmp_path / "hf")
    pictures = [noise(20, 13 + i) for i in range(5)]
    texts = ["what shape is in the image ?", "is it red ?", "<image> is in front", "green"]
    texts[2] = "what is the color of the circle ?"
    questions = [(i % 5, texts[i % 3 + i % 2]) for i in range(13)]
    found = answer(model, processor, pictures, questions, max_new_tokens=4, batch_size=3, images_at_once=2)
    assert found == [ask(model, processor, [pictures[image]], text, 4) for image, text in questions]
    with pytest.raises(ConfigError, match="question 0 is about image 5, but there are 5 images"):
        answer(model, processor, pictures, [(5, "what?")])
    with pytest.raises(ConfigError, match="has 2 <image>, but 1 images"):
        ask(model, processor, pictures[:1], "<image> or <image>?")


def test_attention_is_a_share_of_one(exported, tmp_path):
    folder, reader, _ = exported
    model, processor = load(folder)
    pictures = [noise(30, 18), noise(10, 18)]
    found = voco_attention(model, processor, pictures)
    assert model.config._attn_implementation == "sdpa"
    anchors, patches = torch.tensor(found.anchor_weights), torch.tensor(found.patch_weights)
    assert anchors.shape == (2, 4, 2) and patches.shape == (2, 4)
    visual = torch.tensor(found.visual_share)
    torch.testing.assert_close(anchors.mean(1).sum(-1) + patches.sum(-1), visual)
    assert (visual < 1).all()  # the voco row sees itself
    torch.testing.assert_close(torch.tensor(found.anchor_share), anchors.mean(1).sum(-1) / visual)
    assert found.uniform_share == 2 / 6
    draw(found, pictures[0], tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size[0] > 1000
    draw(replace(found, patch_weights=[layer[:3] for layer in found.patch_weights]), pictures[0], tmp_path / "three.png")


def test_attention_of_one_layer_by_hand(exported):
    """First layer, straight from the weights: softmax of the voco row's scores over V_hy and itself."""
    folder, _, _ = exported
    model, processor = load(folder)
    picture = noise(30, 18)
    found = voco_attention(model, processor, [picture])
    v_hy = model.get_image_features(**processor.image_processor.preprocess([picture]))
    voco = model.get_input_embeddings()(torch.tensor([[processor.image_token_id]]))
    layer = model.model.language_model.layers[0]
    with torch.no_grad():
        x = layer.input_layernorm(torch.cat([v_hy, voco], 1))
        q, k = (p(x)[0].view(7, -1, 8).transpose(0, 1) for p in (layer.self_attn.q_proj, layer.self_attn.k_proj))
        cos, sin = model.model.language_model.rotary_emb(x, torch.arange(7)[None])
        q, k = (t * cos + torch.cat([-t[..., 4:], t[..., :4]], -1) * sin for t in (q, k))
        scores = (q[:, -1:] @ k.repeat_interleave(2, 0).transpose(1, 2) / 8**0.5).softmax(-1)[:, 0]
    torch.testing.assert_close(torch.tensor(found.anchor_weights)[0], scores[:, :2], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.tensor(found.patch_weights)[0], scores[:, 2:6].mean(0), atol=1e-5, rtol=1e-4)


def test_tools_answer_and_draw(exported, tmp_path):
    folder, _, _ = exported
    picture = folder.parent / "picture.png"
    asked = tool("ask.py", folder, "is it red ?", "--image", picture, "--image", picture, "--max-new-tokens", 3)
    assert asked.status == 0, asked.error
    drawn = tool("attention_map.py", folder, "--image", picture, "--out", tmp_path / "deep" / "a.png")
    assert drawn.status == 0, drawn.error
    assert "uniform: 0.333" in drawn.out
    one = json.loads((tmp_path / "deep" / "a.json").read_text())
    (tmp_path / "pictures").mkdir()
    noise(13, 13).save(tmp_path / "pictures" / "other.png")
    for given, name in (([tmp_path / "pictures"], "b"), ([picture, tmp_path / "pictures"], "c")):
        images = [word for path in given for word in ("--image", path)]
        assert tool("attention_map.py", folder, *images, "--out", tmp_path / f"{name}.png").status == 0
    other, both = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "bc")
    assert (one["num_images"], both["num_images"]) == (1, 2)
    first, second, mean = (torch.tensor(found["visual_share"]) for found in (one, other, both))
    assert len(mean) == 2 and not torch.equal(first, second)
    torch.testing.assert_close(mean, (first + second) / 2)


def test_the_tool_takes_the_system_prompt_of_the_data(exported, tmp_path):
    _, reader, _ = exported
    data = tmp_path / "data"
    data.mkdir()
    words = dict(fingerprint="", vocab_size=1, voco_token_id=0)
    Index(tokenizer=words, template=dict(name="vicuna_v1", system="Look closely."), mgvq=None, counts=dict(samples=0)).write(data)
    config = replace(reader.config, data=replace(reader.config.data, train=str(data)))
    with CheckpointWriter(tmp_path / "checkpoints", config) as writer:
        for name, tensor in reader.tensors.items():
            writer.add(name, tensor)
    for out, options, begun in (("a", [], "Look closely. USER: "), ("b", ["--system", ""], "USER: ")):
        assert tool("convert.py", "export", tmp_path / "checkpoints", tmp_path / out, *options).status == 0
        _, processor = load(tmp_path / out)
        assert processor.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True) == begun + "hi ASSISTANT:"


@pytest.mark.parametrize(
    "name, arguments, sentence",
    [
        ("convert.py", ["export", "{tmp}/absent", "{tmp}/hf"], "absent"),
        ("ask.py", ["{tmp}", "what?"], "no exported model"),
        ("ask.py", ["{model}", "what?", "--image", "{tmp}/absent.png"], "absent.png"),
        ("ask.py", ["{model}", "<image> what?"], "has 1 <image>, but 0 images"),
        ("attention_map.py", ["{model}", "--image", "{model}/config.json", "--out", "{tmp}/a.png"], "not an image"),
        ("attention_map.py", ["{model}", "--image", "{picture}", "--out", "{tmp}/a.jpg"], "ends in .png"),
        ("attention_map.py", ["{model}", "--image", "{tmp}", "--out", "{tmp}/a.png"], "no image was found"),
    ],
)
def test_tools_refuse_in_one_sentence(exported, tmp_path, name, arguments, sentence):
    folder = exported[0]
    filled = [a.format(tmp=tmp_path, model=folder, picture=folder.parent / "picture.png") for a in arguments]
    done = tool(name, *filled)
    assert done.status == 2
    assert sentence in done.error.splitlines()[-1]
    assert not list(tmp_path.iterdir())
