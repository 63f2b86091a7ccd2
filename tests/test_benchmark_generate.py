"""The `generate` benchmark's figures are of what they say."""

import argparse

import pytest
import torch

from htc_megatron.benchmarks import generate
from htc_megatron.benchmarks.answering import Asked, Sizes
from htc_megatron.benchmarks.generate import build, step_bytes
from htc_megatron.config import ConfigError
from htc_megatron.inference.onednn import OneDnnLinear

TINY = dict(hidden=32, layers=3, heads=4, vocabulary=64, tower_hidden=16, tower_layers=3, tower_heads=2, image_size=32, patch_size=8)


def arguments(**changed):
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    values = TINY | dict(prompt=6, answer=5, batch=3, rounds=2) | changed
    words = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return parser.parse_args([*words, "--mgvq", "tiny"])


def test_what_answers_cost():
    """Parts add up to no more than the whole, bytes are those of real tensors, and what is compared answers alike."""
    said = []
    result = generate.run(arguments(voco=2), said.append)
    found, parts, seconds = result.figures, result.figures["parts"], result.figures["seconds"]
    assert found["same_answer"]
    assert found["visual_tokens"] == {"uncompressed": 16, "ours": 20}
    assert found["kv_bytes"] == {"uncompressed": 20 * 3 * 2 * 32 * 4, "stored": 2 * 3 * 2 * 32 * 4}
    assert result.ratios["kv_uncompressed_over_ours"] == 10
    layer = 4 * 32 * 32 + 3 * 32 * 88 + 2 * 32
    assert found["step_bytes"] == 4 * (3 * layer + 32 + 64 * 32)
    for name, runs in found["rounds"].items():
        assert len(runs) == 2 and min(runs) > 0, name
    for name, part in parts.items():
        assert min(part["before"], part["prefill"], part["step"]) > 0, name
        slowest = max(found["rounds"][name])
        assert part["before"] + part["prefill"] + 2 * part["step"] < slowest  # half of the steps take the median or longer
    for name in ("uncompressed", "same_products", "first", "first_with_mgvq"):
        assert 0 < parts[name]["tower"] < parts[name]["before"], name
    assert parts["first"].keys() == parts["uncompressed"].keys() and parts["cached"].keys() == {"before", "prefill", "step"}
    assert 0 < parts["first_with_mgvq"]["mgvq"] < parts["first_with_mgvq"]["before"]
    assert found["step_bytes_per_s"]["cached"] == pytest.approx(found["step_bytes"] / parts["cached"]["step"])
    pairs = zip(found["rounds"]["uncompressed"], found["rounds"]["cached"], strict=True)
    assert result.ratios["uncompressed_over_ours"] == pytest.approx(sum(a / b for a, b in pairs) / 2)
    assert result.ratios["uncompressed_batched_over_ours_batched"] == seconds["uncompressed_batched"] / seconds["batched"]
    assert "10" in result.table() and said[-1] == "3 uncompressed questions together"


def test_both_are_one_backbone_and_tower():
    peer, same, ours = build(Sizes(**TINY), "tiny")
    pixels = torch.randn(1, 3, 32, 32)
    patches = peer.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(ours.model.vision_tower(pixels).last_hidden_state[:, 1:], patches, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        ours.get_image_features(pixel_values=pixels, mgvq_pixel_values=pixels.clamp(-1, 1))[:, 4:],
        peer.model.get_image_features(pixels).pooler_output[0][None],
        atol=1e-6,
        rtol=0,
    )
    ids = torch.randint(3, 63, (1, 7))
    assert torch.equal(peer(input_ids=ids).logits.argmax(-1), ours(ids).logits.argmax(-1))
    assert torch.equal(peer(input_ids=ids).logits.argmax(-1), same(input_ids=ids).logits.argmax(-1))
    for weights in zip(*(step_bytes(model) for model in (peer, same, ours)), strict=True):
        assert len({weight.data_ptr() for weight in weights}) == 1
    kinds = [type(model.lm_head) for model in (peer, same, ours)]
    assert kinds == [torch.nn.Linear, OneDnnLinear, OneDnnLinear]


def test_the_answer_has_its_length():
    """Greedy to the end, though the model would end it: the end of sequence is the likeliest token."""
    peer, *_ = build(Sizes(**TINY), "tiny")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        hidden = peer.model(input_ids=ids).last_hidden_state[0, -1]
        peer.lm_head.weight[2] = hidden / hidden.norm() * 100
    asked = Asked(peer, lambda: {"input_ids": ids}, 6, {})
    asked()
    assert asked.tokens.shape == (1, 6) and asked.tokens[0, 0] == 2


def test_sizes_that_make_no_model_are_refused():
    with pytest.raises(ConfigError, match="these sizes make no model"):
        generate.run(arguments(hidden=30), lambda sentence: None)
    with pytest.raises(ConfigError, match="got 6 and 2 tokens, wanted at least 2 and 3"):
        generate.run(arguments(answer=2), lambda sentence: None)
