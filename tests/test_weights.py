"""The table of weights: partition over TP, conversion to Hugging Face's tensors and back, safetensors written piece by piece."""

import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from htc_megatron.config import BackboneConfig, ConfigError, LoraConfig, ModelConfig
from htc_megatron.hf.modeling_htc_vlm import HTCVLMForConditionalGeneration
from htc_megatron.hf.modeling_mgvq import MGVQ
from htc_megatron.weights import Weight, padded_vocab_size, partition, weights
from htc_megatron.weights.convert import from_hf, merge_lora, to_hf
from htc_megatron.weights.export import hf_config, planned_entries
from htc_megatron.weights.safetensors_stream import INDEX_NAME, Entry, plan_files, write_files
from htc_megatron.weights.table import is_adapter
from tests.hf_tiny import tiny_training_config, tiny_weights

VARIANTS = [
    dict(),
    dict(qkv_bias=True),
    dict(qkv_bias=True, tied=True),
    dict(channels="continuous", projector="linear"),
    dict(channels="discrete"),
    dict(mask="none", num_voco_tokens=0),
    dict(channels="continuous", resampler="qformer", num_resampled_tokens=3),
    dict(anchor_source="random"),
    dict(lora=LoraConfig(3)),
    dict(lora=LoraConfig(3, targets=("v_proj", "q_proj", "down_proj")), qkv_bias=True),
    dict(lora=LoraConfig(3, targets=("k_proj", "v_proj", "o_proj", "up_proj"))),
]
LORA = [variant["lora"] for variant in VARIANTS if "lora" in variant]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_shares_of_all_ranks_make_up_every_weight(variant, tp):
    for weight in weights(tiny_training_config(vocab_size=61, **variant)):
        stored = torch.arange(math.prod(weight.shape), dtype=torch.float64).reshape(weight.shape)
        rebuilt = torch.full_like(stored, -1)
        for rank in range(tp):
            part = partition(weight, rank, tp)
            place = tuple(slice(o, o + n) for o, n in zip(part.offset, part.size, strict=True))
            inside = tuple(slice(0, n) for n in part.size)
            assert math.prod(part.local_shape) == math.prod(part.view_shape)
            local = torch.zeros(part.view_shape, dtype=torch.float64)
            local[inside] = stored[place]
            rebuilt[place] = local.view(part.local_shape).view(part.view_shape)[inside]
        assert torch.equal(rebuilt, stored), weight.name


def test_gated_share_is_gate_then_up_of_the_rank():
    weight = next(w for w in weights(tiny_training_config()) if w.rule == "gated")
    part = partition(weight, 1, 2)
    assert (part.local_shape, part.view_shape, part.offset) == ((48, 32), (2, 24, 32), (0, 24, 0))
    gate, up = torch.randn(2, 48, 32)
    local = torch.cat([gate[24:], up[24:]])  # what mcore's linear_fc1 holds on rank 1
    assert torch.equal(local.view(part.view_shape), torch.stack([gate, up])[:, 24:])


@pytest.mark.parametrize("tp, rows", [(1, 32001), (2, 32002), (4, 32004), (8, 32008), (16, 32016)])
def test_vocabulary_is_padded_and_clipped(tp, rows):
    weight = Weight("w", (32001, 2), "vocab", ())
    assert padded_vocab_size(32001, tp) == rows
    parts = [partition(weight, rank, tp) for rank in range(tp)]
    assert {part.local_shape for part in parts} == {(rows // tp, 2)}
    assert sum(part.size[0] for part in parts) == 32001
    assert parts[-1].offset[0] + parts[-1].size[0] == 32001


def test_a_rank_may_hold_padding_only():
    part = partition(Weight("w", (5, 2), "vocab", ()), 3, 4)
    assert (part.local_shape, part.offset, part.size) == ((2, 2), (5, 0), (0, 2))


@pytest.mark.parametrize("rule, shape", [("column", (6, 2)), ("row", (2, 6)), ("gated", (2, 6, 2)), ("qkv", (24, 2))])
def test_uneven_shares_are_refused(rule, shape):
    weight = Weight("w", shape, rule, (), groups=6, queries_per_group=2, head_dim=1)
    with pytest.raises(ConfigError, match="w: 6 .* cannot be split over tensor_model_parallel_size 4"):
        partition(weight, 0, 4)


def test_full_size_table_has_the_published_sizes():
    table = {weight.name: weight for weight in weights(ModelConfig())}
    assert table["backbone.embedding.word_embeddings.weight"].shape == (32001, 4096)
    assert table["frontend.anchors.fc1.weight"].shape == (4096, 14112)
    assert table["frontend.anchors.fc2.weight"].shape == (4 * 4096, 4096)
    assert table["frontend.vision.position_embedding.weight"].shape == (577, 1024)
    assert table["frontend.codebook.weight"].shape == (16384, 4)
    backbone = sum(math.prod(w.shape) for name, w in table.items() if name.startswith("backbone."))
    assert backbone == 6_738_415_616 + 2 * 4096  # LLaMA-7B, and <voco> in both vocabulary matrices
    assert sum(".layers.22." in name and "vision" in name for name in table) == 12
    assert not any(".vision.encoder.layers.23." in name for name in table)


@pytest.mark.parametrize("qkv_bias, tied", [(False, False), (True, False), (True, True)])
def test_full_size_export_fits_the_model_that_loads_it(qkv_bias, tied):
    """Names and shapes only: every tensor of the 7B model is planned, none beside them, MGVQ's public sizes included."""
    model = ModelConfig(backbone=BackboneConfig(qkv_bias=qkv_bias, tie_word_embeddings=tied))
    with torch.device("meta"):
        mgvq = MGVQ(encoder_only=True).state_dict()
    entries = planned_entries(model, hf_config(model), mgvq, lambda name: torch.bfloat16)
    assert len({entry.name for entry in entries}) == len(entries) == 789 + 96 * qkv_bias
    files = plan_files(entries, 5 * 10**9)
    assert [sum(entry.nbytes for entry in group) <= 5 * 10**9 for group in files.values()] == [True] * 3


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_to_hugging_face_and_back(variant):
    model = tiny_training_config(**variant)
    tensors, _ = tiny_weights(model)
    for weight in weights(model):
        if weight.hf:
            there = to_hf(weight, tensors[weight.name])
            assert torch.equal(from_hf(weight, there), tensors[weight.name])


@pytest.mark.parametrize("bias", [False, True])
def test_fused_qkv_gives_each_group_its_queries_key_and_value(bias):
    """mcore reads linear_qkv's output as [groups, (queries, key, value), head_dim]; q, k and v projections must give the same heads."""
    weight = Weight("w", (32, 8), "qkv", ("q", "k", "v"), groups=2, queries_per_group=2, head_dim=4)
    fused, x = torch.randn(32, 8), torch.randn(8)
    groups = (fused @ x).view(2, 4, 4)
    if bias:
        weight = Weight("w", (32,), "qkv", ("q", "k", "v"), groups=2, queries_per_group=2, head_dim=4)
        fused = fused @ x
    parts = to_hf(weight, fused)
    q, k, v = ((parts[n] if bias else parts[n] @ x).view(-1, 4) for n in "qkv")
    torch.testing.assert_close(q, groups[:, :2].reshape(4, 4))
    torch.testing.assert_close(k, groups[:, 2])
    torch.testing.assert_close(v, groups[:, 3])


@pytest.mark.parametrize("lora", LORA, ids=str)
def test_adapters_are_pefts(lora):
    """Exactly an A [rank, in] and a B [out, rank] for each target of each layer, under the linear's own name."""
    model = tiny_training_config(lora=lora)
    found = {}
    for weight in weights(model):
        if is_adapter(weight.name):
            found |= {name: tuple(part.shape) for name, part in to_hf(weight, torch.zeros(weight.shape)).items()}
    linears = {name: module for name, module in HTCVLMForConditionalGeneration(hf_config(model)).named_modules() if _targeted(name, lora)}
    assert len(linears) == model.backbone.num_layers * len(lora.targets)
    wanted = {f"{name}.lora_A.weight": (lora.rank, linear.in_features) for name, linear in linears.items()}
    assert found == wanted | {f"{name}.lora_B.weight": (linear.out_features, lora.rank) for name, linear in linears.items()}


def _targeted(name: str, lora: LoraConfig) -> bool:
    return name.startswith("model.language_model.layers.") and name.split(".")[-1] in lora.targets


def test_a_model_without_adapters_has_no_rows_of_them():
    model = tiny_training_config(lora=LoraConfig(0, targets=("q_proj",)))
    assert not any(is_adapter(weight.name) or weight.adapted for weight in weights(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", LORA, ids=str)
def test_merging_is_pefts(lora, dtype):
    """peft: W + (B A) alpha / rank for each of Hugging Face's linears, here rounded to the base's type once; all else untouched."""
    model = tiny_training_config(lora=lora)
    tensors = {name: tensor.to(dtype) for name, tensor in tiny_weights(model)[0].items()}
    parts: dict[str, torch.Tensor] = {}
    for weight in weights(model):
        parts |= to_hf(weight, tensors[weight.name])
    merged = 0
    for weight in weights(model):
        if is_adapter(weight.name) or not weight.adapted:
            assert is_adapter(weight.name) or not any(_targeted(name.removesuffix(".weight"), lora) for name in weight.hf)
            continue
        stem = weight.name.removesuffix("weight")
        ours = merge_lora(weight, tensors[weight.name], tensors[stem + "lora_A"], tensors[stem + "lora_B"], lora.scale)
        assert ours.dtype == dtype
        for name, part in to_hf(weight, ours).items():
            linear = name.removesuffix(".weight")
            wanted = parts[name]
            if _targeted(linear, lora):
                a, b = parts[f"{linear}.lora_A.weight"].float(), parts[f"{linear}.lora_B.weight"].float()
                wanted, merged = (wanted.float() + (b @ a) * (lora.alpha / lora.rank)).to(dtype), merged + 1
                assert not torch.equal(wanted, parts[name])
            torch.testing.assert_close(part, wanted, rtol=1e-6 if dtype is torch.float32 else 2**-8, atol=1e-6)
    assert merged == model.backbone.num_layers * len(lora.targets)


def test_merging_refuses_what_does_not_fit():
    model = tiny_training_config(lora=LORA[1])
    table = {weight.name: weight for weight in weights(model)}
    name = "backbone.decoder.layers.0.self_attention.linear_qkv."
    base, a, b = (torch.zeros(table[name + last].shape) for last in ("weight", "lora_A", "lora_B"))
    with pytest.raises(ConfigError, match=r"lora_A of .*linear_qkv.weight has shape \(1, 3, 32\), wanted \(2, 3, 32\)"):
        merge_lora(table[name + "weight"], base, a[:1], b, 1.0)
    with pytest.raises(ConfigError, match=r"lora_B of .*linear_qkv.weight has shape \(64, 3\), wanted \(48, 3\)"):
        merge_lora(table[name + "weight"], base, a, torch.zeros(64, 3), 1.0)
    with pytest.raises(ConfigError, match="linear_fc1.weight has no adapters"):
        merge_lora(table["backbone.decoder.layers.0.mlp.linear_fc1.weight"], base, a, b, 1.0)


def test_conversion_refuses_what_does_not_fit():
    weight = Weight("w", (2, 4, 3), "gated", ("gate", "up"))
    with pytest.raises(ConfigError, match=r"w has shape \(8, 3\), wanted \(2, 4, 3\)"):
        to_hf(weight, torch.zeros(8, 3))
    with pytest.raises(ConfigError, match="up is missing"):
        from_hf(weight, {"gate": torch.zeros(4, 3)})
    with pytest.raises(ConfigError, match="cannot be made from"):
        from_hf(weight, {"gate": torch.zeros(4, 3), "up": torch.zeros(4, 2)})


def test_streamed_safetensors_are_safetensors(tmp_path):
    tensors = {f"t{i}": torch.randn(i + 1, 3).to(dtype) for i, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16))}
    tensors["scalar"], tensors["none"] = torch.tensor(2.5), torch.zeros(0, 4)
    entries = [Entry(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    assert write_files(tmp_path, entries, tensors.items()) == ["model.safetensors"]
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert not (tmp_path / INDEX_NAME).exists()
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_large_exports_are_cut_into_files():
    entries = [Entry(str(i), (size,), torch.float32) for i, size in enumerate((10, 20, 30, 200, 5))]
    files = plan_files(entries, 200)
    assert [[e.name for e in group] for group in files.values()] == [["0", "1"], ["2"], ["3"], ["4"]]
    assert list(files)[0] == "model-00001-of-00004.safetensors"


@pytest.mark.parametrize("name, tensor", [("b", torch.zeros(2)), ("a", torch.zeros(3)), ("a", torch.zeros(2, dtype=torch.float16))])
def test_another_tensor_than_announced_is_refused(tmp_path, name, tensor):
    with pytest.raises(ValueError, match=r"expected a \(2,\) torch.float32, got"):
        write_files(tmp_path, [Entry("a", (2,), torch.float32)], [(name, tensor)])
    with pytest.raises(ValueError, match="got nothing"):
        write_files(tmp_path, [Entry("a", (2,), torch.float32)], [])


def test_configuration_of_the_export_says_what_the_model_is():
    model = tiny_training_config(fusion="parallel", mask="full", image_sees="prefix", text_sees="voco_on", num_voco_tokens=3)
    config = hf_config(model)
    assert (config.visual_per_image, config.image_seq_length, config.image_token_id) == (6, 3, 60)
    for name in ("channels", "fusion", "mask", "image_sees", "text_sees", "num_voco_tokens", "num_anchors", "projector"):
        assert getattr(config, name) == getattr(model.method, name)
    assert config.text_config.rope_parameters["rope_theta"] == 5000.0
    assert config.text_config.rms_norm_eps == 1e-4
    assert hf_config(tiny_training_config(qkv_bias=True)).text_config.model_type == "qwen2"
