"""Imported models compute what transformers computes with the same files, on one process and cut by TP and PP.

To 1e-4 in fp32: sums are taken in another order, which rounds at 2^-24 of logits of size 10 over a few dozen layers. Widths are
small; all else is as in the models: 576 patches of 336 px, 24 tower layers of which 23 run, mlp2x_gelu, GQA, QKV bias, tied output.
"""

from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionModel, LlamaForCausalLM, LlavaForConditionalGeneration, Qwen2ForCausalLM

from htc_megatron.evaluation.compare import compare_logits, open_model
from htc_megatron.hf.processing_htc_vlm import clip_pixels
from tests.data_tiny import noise
from tests.import_tiny import VOCAB, clip, llama, llava, qwen2
from tests.import_worker import features_of, logits_of
from tests.test_import import CONTINUOUS, imported, small_tower

LAYOUTS = {"TP 1": (1, 1), "TP 2": (2, 1), "PP 2": (1, 2)}
TRUE_TOWER = dict(image_size=336, patch_size=14, num_hidden_layers=24)
UNCOMPRESSED = [*CONTINUOUS, "model.method.mask=none", "model.method.num_voco_tokens=0", "model.method.image_sees=prefix"]
BEFORE, AFTER = [1, 5, 9, 30], [7, 11, 2, 40, 33, 21, 8]


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    return clip_pixels(noise(300, 200).convert("RGB"), 336)[None]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("parity")
    llava(vision=TRUE_TOWER).save_pretrained(root / "llava")
    clip(**TRUE_TOWER).save_pretrained(root / "clip")
    llama(num_hidden_layers=4).save_pretrained(root / "llama")
    qwen2(num_hidden_layers=4).save_pretrained(root / "qwen2")
    qwen2(tied=True, num_hidden_layers=4).save_pretrained(root / "qwen2-tied")
    imported(root / "llava-in", root / "llava", settings=UNCOMPRESSED)
    imported(root / "clip-in", root / "llama", root / "clip")
    for name in ("llama", "qwen2", "qwen2-tied"):
        imported(root / f"{name}-in", root / name, draw=["vision"], settings=[*CONTINUOUS, *small_tower()])
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
def test_llava_behind_a_picture(ranks, files, picture, layout):
    model = LlavaForConditionalGeneration.from_pretrained(files / "llava").eval()
    ids = torch.tensor([[*BEFORE, *[VOCAB - 2] * 576, *AFTER]])
    with torch.no_grad():
        wanted = model(input_ids=ids, pixel_values=picture).logits[0]
        blind = model(input_ids=ids, pixel_values=torch.zeros_like(picture)).logits[0]
    kept = [*range(len(BEFORE)), *range(len(BEFORE) + 576, ids.shape[1])]
    assert (wanted - blind)[kept[-1]].abs().max() > 1e-2, "the picture must matter"
    tp, pp = LAYOUTS[layout]
    answers = ranks(tp * pp).run(logits_of, files / "llava-in", tp, pp, BEFORE, picture, AFTER, timeout=240)
    found = next(answer for answer in answers if answer is not None)
    torch.testing.assert_close(found[:, :VOCAB], wanted[kept], atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name, kind", [("llama", LlamaForCausalLM), ("qwen2", Qwen2ForCausalLM), ("qwen2-tied", Qwen2ForCausalLM)])
def test_text_alone(ranks, files, name, kind, layout):
    """Also the promise of a warm start: with <voco> and both projectors new, text alone is answered as by the backbone."""
    model = kind.from_pretrained(files / name).eval()
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([BEFORE + AFTER])).logits[0]
    tp, pp = LAYOUTS[layout]
    answers = ranks(tp * pp).run(logits_of, files / f"{name}-in", tp, pp, BEFORE, None, AFTER, timeout=240)
    found = next(answer for answer in answers if answer is not None)
    assert found.shape == (len(BEFORE + AFTER), VOCAB + 1)
    torch.testing.assert_close(found[:, :VOCAB], wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tp", [1, 2])
def test_clip_features(ranks, files, picture, tp):
    """LLaVA's features: hidden_states[-2] without CLS."""
    model = CLIPVisionModel.from_pretrained(files / "clip").eval()
    with torch.no_grad():
        wanted = model(picture, output_hidden_states=True).hidden_states[-2][:, 1:]
    for found in ranks(tp).run(features_of, files / "clip-in", tp, picture, timeout=240):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name, sees", [("llava", True), ("llama", False), ("qwen2-tied", False)])
def test_verify_finds_the_same_logits(files, name, sees):
    """The user's own check, between a checkpoint and what it was imported from."""
    picture = noise(300, 200).convert("RGB")
    greatest, agree, seen = compare_logits(open_model(files / name), open_model(files / f"{name}-in"), picture)
    assert greatest < 1e-4 and agree == 1.0 and seen == sees
    greatest, agree, _ = compare_logits(open_model(files / "llama"), open_model(files / "qwen2-in"), None)
    assert greatest > 0.1 and agree < 1.0
