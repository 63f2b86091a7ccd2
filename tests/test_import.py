"""Other people's weights in, through any layout, and out again: every bit of every tensor."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from htc_megatron.checkpoint import CheckpointReader, CheckpointWriter
from htc_megatron.config import ConfigError, RunConfig
from htc_megatron.config_io import load_config
from htc_megatron.data.tokenizer import load_tokenizer
from htc_megatron.evaluation.compare import compare_tensors, open_model
from htc_megatron.model.mgvq import load_mgvq
from htc_megatron.weights.export import export, hf_tensors
from htc_megatron.weights.export_backbone import export_backbone
from htc_megatron.weights.families import recognise
from htc_megatron.weights.importing import plan_import
from htc_megatron.weights.new_parts import inverse_gelu
from htc_megatron.weights.sources import open_source
from tests import data_tiny, import_tiny
from tests.import_tiny import VOCAB, clip, llama, llava, mgvq_file, original_llava, qwen2, tensors_of, whole_clip, write
from tests.import_worker import relay

CONTINUOUS = ["model.method.channels=continuous"]
HYBRID = ["model.method.num_anchors=2", "model.method.anchor_hidden_size=24"]
HYBRID += [f"model.mgvq.{name}={json.dumps(value)}" for name, value in vars(data_tiny.MGVQ).items() if not name.startswith("_")]
LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2)]


def imported(out: Path, *sources: Path, settings=CONTINUOUS, base: RunConfig | None = None, **options) -> Path:
    plan = plan_import(sources, base or load_config(None, settings), **options)
    with CheckpointWriter(out, plan.config, extra={"imported": plan.origins}) as writer:
        for name, tensor in plan.tensors():
            writer.add(name, tensor)
    return out


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Files of every family, in every form of file."""
    root = tmp_path_factory.mktemp("files")
    llama().save_pretrained(root / "llama")
    llama().half().save_pretrained(root / "llama-half", max_shard_size="20KB")
    llama(tie_word_embeddings=True).save_pretrained(root / "llama-tied")
    state, config = llama().state_dict(), json.loads((root / "llama" / "config.json").read_text())
    write(root / "llama-bin", state, config, "bin")
    write(root / "llama-bins", {k: v.bfloat16() for k, v in state.items()}, config, "bin-sharded")
    write(root / "llama-shards", state, config, "safetensors-sharded")
    qwen2().save_pretrained(root / "qwen2")
    qwen2(tied=True).bfloat16().save_pretrained(root / "qwen2-tied")
    clip().save_pretrained(root / "clip")
    whole_clip().save_pretrained(root / "whole-clip")
    llava().save_pretrained(root / "llava")
    old = {
        name.replace("vision_tower.", "vision_tower.vision_model."): t for name, t in load_file(root / "llava/model.safetensors").items()
    }
    write(root / "llava-old", old, json.loads((root / "llava" / "config.json").read_text()))
    tensors, flat = original_llava(llava())
    write(root / "original", tensors, flat, "bin")
    (root / "words").mkdir()
    rows = load_tokenizer(data_tiny.byte_level_folder(root / "words", voco=True)).vocab_size
    voco, flat = original_llava(llava(text=dict(vocab_size=rows), seed=7), tower=False)
    write(root / "voco-llama", voco, flat | {"vocab_size": rows}, "bin-sharded")
    torch.save({k: v for k, v in tensors.items() if "mm_projector" in k}, root / "mm_projector.bin")
    mgvq_file(root / "mgvq_f16c32_g8.pt")
    return root


BACKBONES = ["llama", "llama-half", "llama-tied", "llama-bin", "llama-bins", "llama-shards", "qwen2", "qwen2-tied"]


def contents(folder: Path) -> dict[str, Tensor]:
    return {name: open_source(folder).tensor(name) for name in open_source(folder).shapes}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_come_out_as_they_went_in(files, tmp_path, name):
    """Same names, types and bits, and a configuration that gives the same model, <voco> row left behind."""
    checkpoint = imported(tmp_path / "checkpoint", files / name, draw=["vision"], settings=[*CONTINUOUS, *small_tower()])
    assert CheckpointReader(checkpoint).config.model.backbone.vocab_size == VOCAB + 1
    export_backbone(CheckpointReader(checkpoint), tmp_path / "hf", dtype="stored", shard_bytes=30_000)
    same(tensors_of(tmp_path / "hf"), contents(files / name))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (files / name, tmp_path / "hf"))
    apart = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert apart <= {"bos_token_id", "eos_token_id", "transformers_version", "dtype", "initializer_range", "use_cache", "torch_dtype"}


def small_tower() -> list[str]:
    return [f"model.vision.{key}={value}" for key, value in dict(image_size=16, patch_size=8, hidden_size=32, num_layers=2).items()] + [
        "model.vision.num_attention_heads=4",
        "model.vision.ffn_hidden_size=48",
    ]


WHOLE = {  # sources, settings, tensors of the sources that a model has no use for
    "LLaVA, transformers": (["llava"], CONTINUOUS),
    "LLaVA, older names": (["llava-old"], CONTINUOUS),
    "LLaVA, authors'": (["original"], [*CONTINUOUS, *small_tower()]),
    "VoCo-LLaMA with CLIP": (["voco-llama", "clip"], CONTINUOUS),
    "LLaMA, CLIP, mm_projector, MGVQ": (["llama", "whole-clip", "mm_projector.bin", "mgvq_f16c32_g8.pt"], HYBRID),
    "Qwen2, CLIP": (["qwen2", "clip"], CONTINUOUS),
    "Qwen2 tied, CLIP, MGVQ": (["qwen2-tied", "whole-clip", "mgvq_f16c32_g8.pt"], HYBRID),
    "LLaMA half, CLIP": (["llama-half", "clip"], CONTINUOUS),
}


@pytest.fixture(scope="module")
def checkpoints(files, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("imported")
    found = {}
    for number, (name, (sources, settings)) in enumerate(WHOLE.items()):
        words = dict(tokenizer=files / "words") if sources[0] == "voco-llama" else {}
        found[name] = imported(root / str(number), *(files / source for source in sources), settings=settings, **words)
    return found


def assert_brought(sources: list[Path], model: Path) -> None:
    """Every tensor of the sources that a model has a place for is in the model, bit for bit."""
    ours = open_model(model)
    left_over = ("post_layernorm", "encoder.layers.2.", "model.mgvq.")  # the tower's last layer is not run
    brought = 0
    for source in sources:
        if source.suffix == ".pt":
            continue
        theirs = open_model(source)
        found = compare_tensors(theirs, ours)
        assert not any(found.different.values()), found.different
        assert found.rounded == 0 or "half" in source.name or "tied" in source.name
        assert not [name for name in found.only_a if not any(part in name for part in left_over)]
        brought += sum(found.equal.values())
    assert brought > 20


@pytest.mark.parametrize("name", WHOLE)
def test_every_tensor_is_in_the_checkpoint_and_in_its_export(files, checkpoints, tmp_path, name):
    sources = [files / source for source in WHOLE[name][0]]
    assert_brought(sources, checkpoints[name])
    reader = CheckpointReader(checkpoints[name])
    reader.check_model()
    if name == "VoCo-LLaMA with CLIP":  # the one with a tokenizer
        export(reader, tmp_path / "hf", dtype="stored")
        assert_brought(sources, tmp_path / "hf")


@pytest.mark.parametrize("tp, pp", LAYOUTS, ids=lambda n: str(n))
def test_every_tensor_survives_every_layout(ranks, files, checkpoints, tmp_path, tp, pp):
    """Loaded and saved by TP x PP ranks: not a bit has changed, in whatever type the source has it, voco and new parts included."""
    pairs = [(source, tmp_path / str(number)) for number, source in enumerate(checkpoints.values())]
    ranks(tp * pp).run(relay, pairs, tp, pp, 3 if (tp, pp) == (2, 2) else 1, timeout=240)
    for (source, target), name in zip(pairs, WHOLE, strict=True):
        before, after = CheckpointReader(source), CheckpointReader(target)
        assert before.names and set(before.names) == set(after.names)
        for weight in before.names:
            stored = before.tensor(weight)
            assert torch.equal(after.tensor(weight).to(stored.dtype), stored), (name, weight)
        if "voco" not in name.lower() and "LLaVA" not in name:
            dtype = {"LLaMA half, CLIP": "fp16", "Qwen2 tied, CLIP, MGVQ": "bf16"}.get(name, "fp32")
            export_backbone(after, tmp_path / f"{target.name}-hf", dtype=dtype)
            same(tensors_of(tmp_path / f"{target.name}-hf"), contents(files / WHOLE[name][0][0]))


DECODING = tuple(f"model.mgvq.{part}" for part in ("decoder", "post_quant", "quantize"))  # what encoding does not need


def exported_tensors(reader: CheckpointReader) -> dict[str, Tensor]:
    """Everything that the whole model's export would hold, stored types kept."""
    model, path = reader.config.model, reader.config.mgvq_checkpoint
    frozen = load_mgvq(path, model.mgvq, encoder_only=True).state_dict() if path else None
    return dict(hf_tensors(model, reader.tensor, frozen))


@pytest.mark.parametrize("name", WHOLE)
def test_every_tensor_of_every_source_is_in_the_export(files, checkpoints, name):
    """By the sources' own names, without the comparison that users have: nothing but rows of <voco> is added to a matrix."""
    reader = CheckpointReader(checkpoints[name])
    found, voco, brought = exported_tensors(reader), reader.config.model.method.voco_token_id, 0
    for source in WHOLE[name][0]:
        known = recognise(files / source)
        for ours, theirs in known.names.items():
            tensor = known.source.tensor(theirs)
            if ours not in found:
                assert "encoder.layers.2." in ours or ours.startswith(
                    ("model.mgvq.decoder", "model.mgvq.post_quant", "model.mgvq.quantize")
                )
                continue
            mine = found[ours][: len(tensor)] if "embed_tokens" in ours or "lm_head" in ours else found[ours]
            kept = torch.arange(len(mine)) != (voco if "embed_tokens" in ours else -1)
            assert torch.equal(mine[kept] if mine.ndim else mine, tensor[kept] if tensor.ndim else tensor), (ours, theirs)
            brought += 1
    assert brought > 50


def test_tied_models_have_no_output_matrix(checkpoints):
    reader = CheckpointReader(checkpoints["Qwen2 tied, CLIP, MGVQ"])
    assert reader.config.model.backbone.tie_word_embeddings
    assert "backbone.output_layer.weight" not in reader.names


def test_the_voco_row_is_taken_where_it_was_trained(files, checkpoints):
    """VoCo-LLaMA's tokenizer names <voco>, and the embedding has its row."""
    table = contents(files / "voco-llama")["model.embed_tokens.weight"]
    reader = CheckpointReader(checkpoints["VoCo-LLaMA with CLIP"])
    row = reader.config.model.method.voco_token_id
    assert torch.equal(reader.tensor("backbone.embedding.word_embeddings.weight"), table)
    assert row < len(table)
    assert torch.equal(reader.tensor("frontend.voco.weight"), table[row][None])


def test_new_parts_begin_as_documented(files, tmp_path):
    sources = [files / name for name in ("llama", "clip", "mgvq_f16c32_g8.pt")]
    mean = CheckpointReader(imported(tmp_path / "mean", *sources, settings=HYBRID, new="mean"))
    drawn = CheckpointReader(imported(tmp_path / "random", *sources, settings=HYBRID, new="random", seed=5))
    again = CheckpointReader(imported(tmp_path / "again", *sources, settings=HYBRID, new="random", seed=5))
    table = contents(files / "llama")["model.embed_tokens.weight"]
    average = table.mean(0)
    torch.testing.assert_close(mean.tensor("frontend.voco.weight")[0], average)
    torch.testing.assert_close(mean.tensor("backbone.embedding.word_embeddings.weight")[-1], average)
    voco = drawn.tensor("frontend.voco.weight")
    assert torch.equal(voco, again.tensor("frontend.voco.weight"))
    assert 0.5 < voco.std() / table.std() < 1.5 and not torch.allclose(voco[0], average, atol=0.1)
    anchors = mean.tensor("frontend.anchors.fc2.weight"), mean.tensor("frontend.anchors.fc2.bias")
    begun = torch.nn.functional.gelu(anchors[0] @ torch.randn(24) + anchors[1]).view(2, -1)
    reached = average > -0.1699  # GELU gives nothing less
    assert reached.sum() > 40
    torch.testing.assert_close(begun[:, reached], average[reached].expand(2, -1), atol=1e-6, rtol=1e-5)
    assert drawn.tensor("frontend.anchors.fc2.weight").std() > 0.1
    for name in mean.names:
        if not name.startswith(("frontend.voco", "frontend.anchors")):
            assert torch.equal(mean.tensor(name), drawn.tensor(name)) or name.startswith("frontend.projector"), name


def test_inverse_gelu():
    x = torch.linspace(-0.74, 12, 500)
    torch.testing.assert_close(inverse_gelu(torch.nn.functional.gelu(x)), x, atol=2e-4, rtol=1e-5)
    assert inverse_gelu(torch.tensor([-0.5])).item() == pytest.approx(-0.7517, abs=1e-3)


def test_the_last_source_of_a_part_wins(files, tmp_path):
    clip(seed=9).save_pretrained(tmp_path / "other")
    reader = CheckpointReader(imported(tmp_path / "out", files / "llava", tmp_path / "other"))
    name = "frontend.vision.class_embedding"
    assert torch.equal(reader.tensor(name), load_file(tmp_path / "other" / "model.safetensors")["embeddings.class_embedding"])
    assert "clip" in reader.extra["imported"]["vision"].lower()
    assert "llava" in reader.extra["imported"]["backbone"]


def edited(files: Path, out: Path, name: str, change) -> Path:
    shutil.copytree(files / name, out)
    change(out)
    return out


def config_with(**values):
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def tensors_with(change_tensors):
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change_tensors(tensors)
        save_file(tensors, folder / "model.safetensors")

    return change


def cut(name: str, count: int):
    def change(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-count])

    return change


def without(name: str):
    return lambda folder: (folder / name).unlink()


def another_index(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model.norm.weight": ', '"model.other.weight": '))


SCALED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
UP = "model.layers.1.mlp.up_proj.weight"
NORM_SHAPE = r"final_layernorm.weight of shape \(64,\) cannot be made from model.language_model.norm.weight \(3,\)"
BAD = {  # source, what is done to it, what is said
    "rope": ("llama", config_with(rope_parameters=SCALED), "rope_type is 'linear', wanted default"),
    "activation": ("llama", config_with(hidden_act="gelu"), "hidden_act is 'gelu', wanted silu"),
    "bias": ("llama", config_with(attention_bias=True), "attention_bias is True, wanted false"),
    "head_dim": ("llama", config_with(head_dim=16), "head_dim is 16, wanted hidden_size / num_attention_heads, 8"),
    "family": ("llama", config_with(model_type="gpt2"), "model_type is 'gpt2', wanted one of clip"),
    "window": ("qwen2", config_with(use_sliding_window=True), "use_sliding_window is True, wanted false"),
    "layer": ("llava", config_with(vision_feature_layer=-9), "vision_feature_layer is -9"),
    "cls": ("llava", config_with(vision_feature_select_strategy="full"), "wanted default: CLS is left out"),
    "projector": ("original", config_with(mm_projector_type="resampler"), "is 'resampler', wanted linear or mlp2x_gelu"),
    "no config": ("llama", without("config.json"), "has no config.json, and its tensors"),
    "broken config": ("llama", cut("config.json", 3), "config.json cannot be read as JSON"),
    "no weights": ("llama", without("model.safetensors"), "has no weights; wanted model.safetensors"),
    "missing": ("llama", tensors_with(lambda t: t.pop(UP)), "lacks model.language_model.layers.1.mlp.up_proj.weight"),
    "extra": ("llama", tensors_with(lambda t: t.update(x=torch.zeros(1))), "has x, which no weight of the model is made from"),
    "misshapen": ("llama", tensors_with(lambda t: t.update({"model.norm.weight": torch.zeros(3)})), NORM_SHAPE),
    "more layers": ("llama", config_with(num_hidden_layers=1), "has model.layers.1"),
    "untied without output": ("qwen2-tied", config_with(tie_word_embeddings=False), "lacks lm_head.weight"),
    "tied with another output": ("llama", config_with(tie_word_embeddings=True), "has lm_head.weight, which no weight"),
    "cut file": ("llama", cut("model.safetensors", 9), "not a readable safetensors"),
    "cut bin": ("llama-bin", cut("pytorch_model.bin", 999), "cannot be loaded as weights"),
    "shard away": ("llama-shards", without("model-00002-of-00003.safetensors"), "files that are not in its folder: model-00002"),
    "index": ("llama-shards", another_index, "and its files disagree about 2 tensors"),
}


def test_features_of_another_layer_than_the_projectors_are_refused(files, tmp_path):
    """A tower by itself is run to its last layer but one; a LLaVA whose projector was trained on another layer's output differs."""
    folder = edited(files, tmp_path / "last", "llava", config_with(vision_feature_layer=-1))
    assert CheckpointReader(imported(tmp_path / "alone", folder)).config.model.vision.num_layers == 3
    with pytest.raises(ConfigError, match="features are of layer 2, but .*last has them of 3"):
        imported(tmp_path / "out", folder, files / "clip")


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_in_a_sentence(files, tmp_path, name):
    source, change, sentence = BAD[name]
    folder = edited(files, tmp_path / "bad", source, change)
    others = [] if source in ("llava", "original") else [files / "clip"]
    with pytest.raises(ConfigError, match=sentence):
        imported(tmp_path / "out", folder, *others, settings=[*CONTINUOUS, *small_tower()])
    assert not (tmp_path / "out").exists()


def test_no_code_of_a_pickle_is_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    (tmp_path / "evil").mkdir()
    torch.save({"model.norm.weight": Evil()}, tmp_path / "evil" / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot be loaded as weights"):
        open_source(tmp_path / "evil")
    assert not (tmp_path / "ran").exists()


def test_parts_that_nobody_brings_are_named(files, tmp_path):
    base = load_config(None, [])
    with pytest.raises(ConfigError, match=r"codebook: name MGVQ's file.*vision: name a CLIP folder.*--draw codebook vision"):
        plan_import([files / "llama"], base)
    plan = plan_import([files / "llama"], base, draw=["vision", "codebook"])
    assert plan.origins["vision"] == "new (random)"
    with pytest.raises(ConfigError, match="absent does not exist"):
        plan_import([tmp_path / "absent"], base)
    with pytest.raises(ConfigError, match="new is 'zero'; wanted mean or random"):
        plan_import([files / "llama"], base, new="zero")


def test_a_vocabulary_with_spare_rows_keeps_them(files, tmp_path):
    """Qwen2.5 and llava-hf pad their embeddings: <voco> takes the first spare row, and nothing grows."""
    tokenizer = data_tiny.byte_level_folder(tmp_path)
    words = import_tiny.qwen2(vocab_size=400)
    words.save_pretrained(tmp_path / "spare")
    reader = CheckpointReader(imported(tmp_path / "out", tmp_path / "spare", files / "clip", tokenizer=tokenizer))
    model = reader.config.model
    assert model.backbone.vocab_size == 400 and model.method.voco_token_id < 400
    export_backbone(reader, tmp_path / "hf", dtype="stored")
    same(tensors_of(tmp_path / "hf"), contents(tmp_path / "spare"))
    with pytest.raises(ConfigError, match="voco_token_id is 7, but the tokenizer"):
        imported(tmp_path / "other", tmp_path / "spare", files / "clip", tokenizer=tokenizer, voco_token_id=7)
