"""Adapters on their way out and in: peft loads them, merged models compute the same, imports bring them back bit for bit."""

import json
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from htc_megatron.checkpoint import CheckpointReader, CheckpointWriter
from htc_megatron.config import ConfigError, LoraConfig
from htc_megatron.inference.answer import load
from htc_megatron.weights.table import is_adapter
from tests.data_tiny import noise
from tests.hf_tiny import made, tiny_weights
from tests.import_tiny import llama
from tests.test_hf_export import tool
from tests.test_import import CONTINUOUS, imported, small_tower

TARGETS = {"all": LoraConfig(rank=4, alpha=6.0), "q and v": LoraConfig(rank=2, alpha=2.0, targets=("q_proj", "v_proj"))}


@pytest.fixture(scope="module", params=TARGETS, ids=str)
def run(request, tmp_path_factory):
    """A checkpoint with adapters that were trained (B is not zero), its base and its merged model, and both adapters, by the tool."""
    folder = tmp_path_factory.mktemp("lora")
    reader, _ = made(folder)
    model = replace(reader.config.model, lora=TARGETS[request.param])
    config = replace(reader.config, model=model, training=replace(reader.config.training, freeze=("vision", "backbone")))
    tensors = tiny_weights(model)[0] | reader.tensors
    with CheckpointWriter(folder / "checkpoint", config) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    for out, *options in (
        ("base", "--no-merge"),
        ("merged",),
        ("adapter", "--part", "adapter", "--base", folder / "base"),
        ("backbone", "--part", "backbone", "--no-merge"),
        ("backbone-merged", "--part", "backbone"),
        ("backbone-adapter", "--part", "backbone-adapter", "--base", folder / "backbone"),
    ):
        done = tool("convert.py", "export", folder / "checkpoint", folder / out, *options)
        assert done.status == 0, done.error
    return folder, tensors


def test_peft_loads_the_adapter_and_computes_what_the_merged_model_does(run):
    """Logits behind a picture, adapter beside the weights against adapter merged into them, to 1e-5; and peft merges alike."""
    folder, _ = run
    merged, processor = load(folder / "merged")
    base, _ = load(folder / "base")
    inputs = processor(text="what <image> is it red ?", images=noise(20, 13), return_tensors="pt")
    with torch.no_grad():
        plain = base(**inputs).logits
        adapted = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
        found = adapted(**inputs).logits
        wanted = merged(**inputs).logits
    assert (plain - wanted).abs().max() > 1e-2, "the adapters must matter"
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    folded = adapted.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(folded[name], tensor, atol=1e-6, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_peft_loads_the_backbones_adapter(run):
    folder, tensors = run
    base = AutoModelForCausalLM.from_pretrained(folder / "backbone").eval()
    adapted = peft.PeftModel.from_pretrained(base, folder / "backbone-adapter").eval()
    modules = [name for name, module in adapted.named_modules() if isinstance(module, peft.tuners.lora.Linear)]
    stored = load_file(folder / "backbone-adapter" / "adapter_model.safetensors")
    assert 2 * len(modules) == len(stored)
    merged = AutoModelForCausalLM.from_pretrained(folder / "backbone-merged").eval()
    ids = torch.tensor([[1, 5, 9, 30, 7]])
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=ids).logits, merged(input_ids=ids).logits, atol=1e-5, rtol=0)


def test_adapters_alone_are_in_the_file(run):
    folder, tensors = run
    stored = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert sum(t.numel() for t in stored.values()) == sum(t.numel() for name, t in tensors.items() if is_adapter(name))
    content = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == str(folder / "base") and content["peft_type"] == "LORA"


@pytest.mark.parametrize("part, base", [("adapter", "base"), ("backbone-adapter", "base")])
def test_an_adapter_comes_back_bit_for_bit(run, tmp_path, part, base):
    folder, tensors = run
    done = tool("convert.py", "import", folder / base, folder / part, folder / "mgvq.safetensors", tmp_path / "in")
    assert done.status == 0, done.error
    found = CheckpointReader(tmp_path / "in")
    assert set(found.names) == set(tensors)
    lora, wanted = found.config.model.lora, CheckpointReader(folder / "checkpoint").config.model.lora
    assert (lora.rank, lora.alpha, lora.targets) == (wanted.rank, wanted.alpha, wanted.targets)
    for name in found.names:
        if name != "backbone.embedding.word_embeddings.weight":  # its voco row is another parameter's
            assert torch.equal(found.tensor(name), tensors[name]), name
    for other in (folder / "checkpoint", folder / "merged"):
        done = tool("convert.py", "verify", tmp_path / "in", other)
        assert done.status == 0, done.out
    assert tool("convert.py", "verify", tmp_path / "in", folder / "base").status == 1


def test_an_adapter_of_pefts_own_making(tmp_path):
    """Trained elsewhere by peft, imported with its base: the merged export is peft's own merged model."""
    llama().save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj", "o_proj"]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    checkpoint = imported(tmp_path / "in", tmp_path / "base", tmp_path / "adapter", draw=["vision"], settings=[*CONTINUOUS, *small_tower()])
    config = CheckpointReader(checkpoint).config
    assert config.model.lora.targets == ("q_proj", "o_proj", "up_proj")
    assert set(config.training.freeze) == {"vision", "backbone"}, "a run that starts from it trains the adapters, not the backbone"
    assert tool("convert.py", "export", "--part", "backbone", checkpoint, tmp_path / "out").status == 0
    wanted = adapted.merge_and_unload().state_dict()
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(tensor, wanted[name], atol=1e-6, rtol=0)


def config_with(**values):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def without_one(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(next(name for name in tensors if "layers.1" in name))
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "change, sentence",
    [
        (config_with(use_dora=True), "use_dora is True, wanted False"),
        (config_with(use_rslora=True), "use_rslora is True, wanted False"),
        (config_with(bias="all"), "bias is 'all', wanted 'none'"),
        (config_with(peft_type="IA3"), "peft_type is 'IA3', wanted LORA"),
        (config_with(r=5), "cannot be made from"),
        (without_one, "lacks model.language_model.layers.1"),
    ],
    ids=["dora", "rslora", "bias", "type", "rank", "incomplete"],
)
def test_other_adapters_are_refused(tmp_path, change, sentence):
    llama().save_pretrained(tmp_path / "base")
    peft.get_peft_model(llama(), peft.LoraConfig(r=3, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    change(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=sentence):
        imported(tmp_path / "in", tmp_path / "base", tmp_path / "adapter", draw=["vision"], settings=[*CONTINUOUS, *small_tower()])


def test_a_model_without_adapters_has_none_to_export(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    checkpoint = imported(tmp_path / "in", tmp_path / "base", draw=["vision"], settings=[*CONTINUOUS, *small_tower()])
    done = tool("convert.py", "export", "--part", "adapter", checkpoint, tmp_path / "out")
    assert done.status == 2 and "has no adapters (model.lora.rank is 0)" in done.error
