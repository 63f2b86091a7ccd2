"""MGVQ: the public model's tensors and shapes, networks against a second implementation, quantiser against brute force, files."""

import argparse
from ast import literal_eval
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from htc_megatron.config import ConfigError, MGVQConfig
from htc_megatron.hf.modeling_mgvq import MGVQ, codebook_lookup, mgvq_pixels
from htc_megatron.model.mgvq import build_mgvq, load_codebook, load_mgvq, mgvq_fingerprint, read_mgvq_config, save_mgvq
from tests.mgvq_tiny import TINY, reference_latents, reference_pixels, tiny_mgvq, tiny_pixels

KEYS = Path(__file__).parent / "data" / "mgvq_f16c32_g8_keys.txt"


def published() -> dict[str, tuple[tuple[int, ...], str, str]]:
    """Name -> shape, dtype and kind of every tensor of the public f16c32 g8 checkpoint."""
    rows = [line.split("\t") for line in KEYS.read_text().splitlines() if not line.startswith("#")]
    return {name: (literal_eval(shape), dtype, kind) for name, shape, dtype, kind in rows}


def described(model: MGVQ) -> dict[str, tuple[tuple[int, ...], str, str]]:
    parameters = dict(model.named_parameters())
    return {
        name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), "param" if name in parameters else "buffer")
        for name, tensor in model.state_dict().items()
    }


def test_every_tensor_of_the_public_model():
    with torch.device("meta"):
        model = build_mgvq(MGVQConfig())
    assert len(published()) == 297
    assert described(model) == published()
    assert sum(p.numel() for p in model.encoder.parameters()) == 87_069_984


def test_encoder_only_has_what_encoding_needs():
    with torch.device("meta"):
        model = build_mgvq(MGVQConfig(), encoder_only=True)
    needed = ("encoder.", "quant_conv.", "quantize.embedding.weight")
    assert described(model) == {name: row for name, row in published().items() if name.startswith(needed)}


def test_full_size_shapes_at_336_pixels():
    with torch.device("meta"):
        model = build_mgvq(MGVQConfig())
        codes = model.encode(torch.empty(1, 3, 336, 336))
        assert (tuple(codes.shape), codes.dtype) == ((1, 441, 8), torch.int16)
        assert tuple(model.lookup(codes).shape) == (1, 14112)
        assert tuple(model.decode(codes).shape) == (1, 3, 336, 336)
    assert MGVQConfig().flat_size == 14112


# fp32 with sums in another order: 3e-6 was seen, on values up to 4.
def test_encoder_equals_reference():
    model, pixels = tiny_mgvq(), tiny_pixels()
    expected = reference_latents(model.state_dict(), pixels, TINY)
    torch.testing.assert_close(model.quant_conv(model.encoder(pixels)), expected, rtol=1e-5, atol=1e-5)


def test_decoder_equals_reference():
    model = tiny_mgvq()
    latents = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(3))
    expected = reference_pixels(model.state_dict(), latents, TINY)
    torch.testing.assert_close(model.decode_latents(latents), expected, rtol=1e-5, atol=1e-5)


def test_codes_are_the_nearest_rows_of_their_group():
    model, pixels = tiny_mgvq(), tiny_pixels()
    codes = model.encode(pixels).numpy()
    latents = reference_latents(model.state_dict(), pixels, TINY).detach().double().numpy()
    table = model.quantize.embedding.weight.detach().double().numpy()
    rows, width = 64 // 4, 8 // 4
    for b in range(2):
        for position in range(16):
            for g in range(4):
                z = latents[b, g * width : (g + 1) * width, position // 4, position % 4]
                own = table[g * rows : (g + 1) * rows]
                distances = np.linalg.norm(z / np.linalg.norm(z) - own / np.linalg.norm(own, axis=1, keepdims=True), axis=1)
                # Within 1e-5 of the least distance: fp32 may break a near tie the other way.
                assert distances[codes[b, position, g]] <= distances.min() + 1e-5


def test_lookup_is_channel_major():
    codebook = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    codes = torch.randint(0, 16, (3, 9, 4), generator=torch.Generator().manual_seed(1)).to(torch.int16)
    q = codebook_lookup(codes, codebook, groups=4)
    assert tuple(q.shape) == (3, 8 * 9)
    for b, position, g, j in [(0, 0, 0, 0), (1, 5, 2, 1), (2, 8, 3, 0), (2, 3, 1, 1)]:
        row = codebook[16 * g + int(codes[b, position, g])]
        assert q[b, (2 * g + j) * 9 + position].item() == pytest.approx((row[j] / row.norm()).item(), abs=1e-6)
    assert torch.equal(codebook_lookup(codes[0], codebook, 4), q[0])  # without a batch dimension
    assert codebook_lookup(codes, codebook.bfloat16(), 4).dtype == torch.bfloat16


@pytest.mark.parametrize("code", [16, -17])
def test_lookup_refuses_codes_of_other_groups(code):
    codes = torch.zeros(1, 9, 4, dtype=torch.int16)
    codes[0, 0, 1] = code  # the table has such a row, but it is another group's
    with pytest.raises(IndexError):
        codebook_lookup(codes, torch.randn(64, 2), groups=4)


def test_groups_are_independent():
    model, pixels = tiny_mgvq(), tiny_pixels()
    before = model.encode(pixels)
    with torch.no_grad():
        model.quantize.embedding.weight[16:32] = torch.randn(16, 2, generator=torch.Generator().manual_seed(5))
    after = model.encode(pixels)
    assert torch.equal(before[:, :, [0, 2, 3]], after[:, :, [0, 2, 3]])
    assert not torch.equal(before[:, :, 1], after[:, :, 1])
    q_before, q_after = model.lookup(before).view(2, 4, -1), model.lookup(after).view(2, 4, -1)
    assert torch.equal(q_before[:, [0, 2, 3]], q_after[:, [0, 2, 3]])


def test_lookup_of_codes_is_what_the_decoder_gets():
    model, pixels = tiny_mgvq(), tiny_pixels()
    seen = []
    model.post_quant_conv.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    out = model(pixels)
    assert torch.equal(out.codes, model.encode(pixels))
    # Straight through adds and subtracts the latents: one rounding of numbers up to 1.
    torch.testing.assert_close(model.lookup(out.codes), seen[0].flatten(1), rtol=0, atol=3e-7)
    torch.testing.assert_close(model.decode(out.codes), out.pixels, rtol=0, atol=1e-5)


def test_gradients_pass_straight_through():
    model, pixels = tiny_mgvq(), tiny_pixels()
    latents = []
    model.quant_conv.register_forward_hook(lambda module, inputs, output: latents.append(output))
    out = model(pixels)
    out.pixels.square().sum().backward()
    assert model.quantize.embedding.weight.grad is None  # reconstruction reaches the encoder, not the rows
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.encoder.parameters())
    out = model(pixels)
    (rows,) = torch.autograd.grad(out.codebook_loss, [model.quantize.embedding.weight], retain_graph=True)
    assert rows.abs().sum() > 0
    assert torch.autograd.grad(out.codebook_loss, latents[-1], allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.grad(out.commitment_loss, latents[-1])[0].abs().sum() > 0


def test_eval_changes_nothing_and_encoding_never_does():
    model, pixels = tiny_mgvq(), tiny_pixels()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(pixels)
    model.decode(model.encode(pixels))
    model.train().encode(pixels)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    model(pixels)  # training mode: usage and batch norm statistics move, the codebook does not
    after = model.state_dict()
    assert not torch.equal(before["quantize.codebook_used"], after["quantize.codebook_used"])
    assert torch.equal(before["quantize.embedding.weight"], after["quantize.embedding.weight"])


def test_attention_and_quantiser_stay_fp32_under_autocast():
    model, pixels = tiny_mgvq(), tiny_pixels()
    directions = model.directions(pixels)
    expected = model.quantize.codes(directions)
    attention = model.encoder.stages[2].op_list[0].context_module.main
    attention.qkv, attention.proj = torch.nn.Identity(), torch.nn.Identity()
    heads = torch.rand(1, 48, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.quantize.codes(directions), expected)
        inside = attention(heads)
    assert torch.equal(inside, attention(heads))
    model = tiny_mgvq()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(pixels)
    assert out.directions.dtype == torch.float32 and out.codebook_loss.dtype == torch.float32


@pytest.mark.parametrize(("size", "offset"), [((64, 32), (16, 0)), ((32, 64), (0, 16)), ((32, 32), (0, 0))])
def test_preparation_crops_the_centre(size, offset):
    data = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    pixels = mgvq_pixels(Image.fromarray(data), 32)  # the short side has 32 pixels already: no resampling
    left, top = offset
    expected = data[top : top + 32, left : left + 32].transpose(2, 0, 1).astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(pixels.numpy(), expected, atol=1e-6)


def test_preparation_resizes_bicubic_and_takes_any_mode():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70), dtype=np.uint8)).convert("LA")
    pixels = mgvq_pixels(image, 32)
    resized = np.asarray(image.convert("RGB").resize((45, 32), Image.Resampling.BICUBIC))[:, 6:38]
    np.testing.assert_allclose(pixels.numpy(), resized.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)


def write_public(path: Path, state: dict[str, torch.Tensor], **beside: object) -> Path:
    torch.save({"model": state, **beside}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "module."])
def test_public_checkpoint(tmp_path, prefix):
    model, pixels = tiny_mgvq(), tiny_pixels()
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    path = write_public(tmp_path / "mgvq.pt", state, steps=3, args=argparse.Namespace(lr=1.0))
    for encoder_only in (False, True):
        loaded = load_mgvq(path, TINY, encoder_only)
        assert torch.equal(loaded.encode(pixels), model.encode(pixels))
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
        assert mgvq_fingerprint(loaded) == mgvq_fingerprint(model)
    assert torch.equal(load_codebook(path, TINY), model.quantize.embedding.weight)


def test_own_file_knows_its_sizes(tmp_path):
    model, path = tiny_mgvq(), tmp_path / "new" / "mgvq.safetensors"
    save_mgvq(model, TINY, path)
    assert read_mgvq_config(path) == TINY
    loaded = load_mgvq(path)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert load_mgvq(path, replace(TINY, image_size=64), encoder_only=True).image_size == 64
    assert [file.name for file in path.parent.iterdir()] == ["mgvq.safetensors"]
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_encoder_only_file_loads_as_encoder_only(tmp_path):
    path = tmp_path / "encoder.safetensors"
    save_mgvq(tiny_mgvq(encoder_only=True), TINY, path)
    load_mgvq(path, encoder_only=True)
    with pytest.raises(ConfigError, match=r"lacks decoder\.project_in.* more"):
        load_mgvq(path)


def test_weights_that_do_not_fit_are_listed(tmp_path):
    state = dict(tiny_mgvq().state_dict())
    del state["quant_conv.bias"]
    state["quant_conv.scale"] = torch.ones(1)
    state["quantize.embedding.weight"] = torch.ones(32, 2)
    path = write_public(tmp_path / "mgvq.pt", state)
    with pytest.raises(ConfigError) as refusal:
        load_mgvq(path, TINY)
    for part in ("lacks quant_conv.bias", "unknown quant_conv.scale", "quantize.embedding.weight of shape (32, 2) (wanted (64, 2))"):
        assert part in str(refusal.value)
    with pytest.raises(ConfigError, match="wanted \\(64, 2\\)"):
        load_codebook(path, TINY)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_mgvq(tmp_path / "absent.pt")
    for name in ("broken.pt", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(ConfigError, match=f"{name} "):
            load_mgvq(tmp_path / name)
    torch.save({"state_dict": tiny_mgvq().state_dict()}, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match='holds the keys state_dict; the public form is a dict with the tensors under "model"'):
        load_mgvq(tmp_path / "other.pt")
    torch.save({"model": tiny_mgvq()}, tmp_path / "module.pt")  # a whole module: loading it would run code
    with pytest.raises(ConfigError, match="cannot be loaded as weights"):
        load_mgvq(tmp_path / "module.pt")
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ConfigError, match="has no mgvq_config in its metadata"):
        load_mgvq(tmp_path / "foreign.safetensors")


def test_other_sizes_than_the_file_are_named(tmp_path):
    path = tmp_path / "mgvq.safetensors"
    save_mgvq(tiny_mgvq(), TINY, path)
    with pytest.raises(ConfigError, match=r"head_dim 8 \(wanted 4\)"):
        load_mgvq(path, replace(TINY, head_dim=4))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"depths": (1, 1)}, r"mgvq\.depths has 2 entries; widths has 3"),
        ({"image_size": 30}, r"image_size is 30; with 3 stages it must be a positive multiple of 8"),
        ({"groups": 3}, "must be multiples of groups, 3"),
        ({"codebook_size": 4 * 40000}, "codes are int16"),
        ({"head_dim": 6}, r"widths\[1\] is 16; .* multiple of 4 and of head_dim 6"),
        ({"widths": (8, 16, 24), "head_dim": 8}, r"widths\[2\] is 24; it must divide 4 times the width before it, 64"),
        ({"latent_channels": 12}, "latent_channels is 12; it must divide the last width, 16"),
    ],
)
def test_impossible_sizes(change, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build_mgvq(replace(TINY, **change))


def test_normalisation_is_over_a_groups_channels():
    directions = tiny_mgvq().directions(tiny_pixels())
    assert tuple(directions.shape) == (2, 16, 4, 2)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(2, 16, 4))
    q = tiny_mgvq().lookup(tiny_mgvq().encode(tiny_pixels())).view(2, 4, 2, 16)
    torch.testing.assert_close(q.norm(dim=2), torch.ones(2, 4, 16))
    cosine = (F.normalize(q, dim=2).permute(0, 3, 1, 2) * directions).sum(-1)
    assert cosine.mean() > 0.9  # 16 rows on a circle: chance alone would give about 0
