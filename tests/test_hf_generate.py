"""Decoding from the voco cache equals the single masked pass, for every variant of the method."""

import itertools

import pytest
import torch
from transformers import GenerationConfig

import htc_megatron.hf.modeling_htc_vlm as modeling
from htc_megatron.hf.cache_htc_vlm import VocoCache
from htc_megatron.hf.mask_htc_vlm import TEXT, VISUAL, VOCO
from tests.hf_tiny import tiny_batch, tiny_images, tiny_model

TOLERANCE = 2e-5  # fp32, logits of order 1 to 5: sums over other numbers of keys, in another order
VARIANTS = [
    dict(mask=mask, image_sees=image_sees, text_sees=text_sees, num_voco_tokens=voco)
    for mask, image_sees, text_sees, voco in itertools.product(("star", "full", "none"), ("own", "prefix"), ("all", "voco_on"), (1, 2))
    if (mask, text_sees) != ("none", "voco_on")
] + [
    dict(mask="none", num_voco_tokens=0),
    dict(fusion="post"),
    dict(fusion="parallel", mask="full", num_voco_tokens=2),
    dict(channels="continuous", projector="linear"),
    dict(channels="discrete", image_sees="prefix"),
    dict(backbone="qwen2"),
]
ROWS = [[1, 5, 6, "image", 7, 8, 9], [1, 4, "image", "image", 3, "image", 11], [1, 3]]


def name(variant):
    return "-".join(str(value) for value in variant.values())


def reference(model, batch, images, steps):
    """Greedy tokens and their logits from one masked pass over the whole sequence a step. No cache, no generate()."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    logits = []
    with torch.no_grad():
        for _ in range(steps):
            last = model(ids, attention_mask=mask, **images).logits[:, -1].clone()
            last[:, model.config.image_token_id] = -torch.inf  # never generated
            logits.append(last)
            ids = torch.cat([ids, last.argmax(-1, keepdim=True)], 1)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return ids, torch.stack(logits, 1)


@pytest.mark.parametrize("variant", VARIANTS, ids=name)
def test_cached_generation_equals_the_masked_pass(variant):
    model = tiny_model(seed=3, **variant)
    batch, images = tiny_batch(model.config, ROWS), tiny_images(4)
    wanted, logits = reference(model, batch, images, 6)
    made = model.generate(
        **batch, **images, max_new_tokens=6, do_sample=False, eos_token_id=None, output_logits=True, return_dict_in_generate=True
    )
    assert torch.equal(made.sequences, wanted)
    got = torch.stack(made.logits, 1)
    got[:, :, model.config.image_token_id] = -torch.inf
    torch.testing.assert_close(got, logits, atol=TOLERANCE, rtol=0)
    cache = made.past_key_values
    assert isinstance(cache, VocoCache)
    assert cache.get_seq_length() == batch["input_ids"].shape[1] + 5  # the last token is not fed back
    if model.config.mask != "none":
        assert not (cache.tokens.kind == VISUAL).any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    model = tiny_model(seed=4, num_voco_tokens=2)
    images = tiny_images(4)
    batch = tiny_batch(model.config, ROWS, side)
    together = model(**batch, **images).logits
    first = 0
    for row, items in enumerate(ROWS):
        count = items.count("image")
        mine = {key: value[first : first + count] for key, value in images.items()} if count else {}
        alone = model(**tiny_batch(model.config, [items]), **mine).logits[0]
        torch.testing.assert_close(together[row][batch["attention_mask"][row].bool()], alone, atol=TOLERANCE, rtol=0)
        first += count


@pytest.mark.parametrize("mask, image_sees", [("star", "own"), ("star", "prefix"), ("full", "own"), ("full", "prefix")])
def test_text_sees_the_image_through_the_voco_only(mask, image_sees, monkeypatch):
    model = tiny_model(seed=5, mask=mask, image_sees=image_sees)
    batch, images = tiny_batch(model.config, [[1, 5, "image", 7, "image", 8, 9]]), tiny_images(2)
    moved = {key: value.clone() for key, value in images.items()}
    moved["pixel_values"][0, 1, 3, 3] += 1.0
    text = (batch["input_ids"][0] != model.config.image_token_id).nonzero()[:, 0]
    before, after = (model(**batch, **pixels).logits[0] for pixels in (images, moved))
    change = (before - after).abs().amax(1)
    assert change[text[:2]].max() == 0  # in front of the image
    assert change[text[2:]].min() > 1e-4

    def cut(config, q, k):
        return rule(config, q, k) & ~((q.kind == TEXT)[:, :, None] & (k.kind == VOCO)[:, None, :])

    rule = modeling.allowed
    monkeypatch.setattr(modeling, "allowed", cut)
    before, after = (model(**batch, **pixels).logits[0] for pixels in (images, moved))
    assert torch.equal(before[text], after[text])


@pytest.mark.parametrize("mask", ["star", "full", "none"])
def test_compressed_beginning_serves_many_prompts(mask):
    """One cache for questions of different lengths, padded between beginning and question; used twice, it gives the same."""
    model = tiny_model(seed=6, mask=mask)
    images = tiny_images(2)
    begun = tiny_batch(model.config, [[1, 5, "image"], [1, "image"]])
    cache = model.compress(**begun, **images)
    length = cache.get_seq_length()
    questions = [(0, [7, 8]), (1, [9]), (0, [11, 12, 13]), (1, [7])]
    rows = torch.tensor([row for row, _ in questions])
    tail = tiny_batch(model.config, [ids for _, ids in questions])
    whole = {key: torch.cat([begun[key][rows], tail[key]], 1) for key in begun}
    for _ in range(2):
        made = model.generate(**whole, past_key_values=cache.select(rows), max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert cache.get_seq_length() == length
        for index, (row, ids) in enumerate(questions):
            prefix = [[1, 5, "image"], [1, "image"]][row]
            mine = {key: value[row : row + 1] for key, value in images.items()}
            wanted, _ = reference(model, tiny_batch(model.config, [prefix + ids]), mine, 4)
            assert torch.equal(made[index, -4:], wanted[0, -4:])


def test_compress_an_image_alone():
    model = tiny_model(seed=7, num_voco_tokens=2)
    images = tiny_images(2)
    cache = model.compress(**images)
    assert cache.get_seq_length() == 2
    ids = torch.tensor([[60, 60, 5, 6], [60, 60, 9, 4]])
    behind = model(ids[:, 2:], past_key_values=cache.select(torch.arange(2))).logits
    torch.testing.assert_close(behind, model(ids, **images).logits[:, 2:], atol=TOLERANCE, rtol=0)


def test_images_may_follow_a_cache():
    """A conversation goes on with another image behind what is cached."""
    for mask, image_sees in itertools.product(("star", "full", "none"), ("own", "prefix")):
        model = tiny_model(seed=8, mask=mask, image_sees=image_sees, num_voco_tokens=2)
        images = tiny_images(2)
        whole = tiny_batch(model.config, [[1, "image", 5, "image", 7]])["input_ids"]
        split = tiny_batch(model.config, [[1, "image", 5]])["input_ids"].shape[1]
        first, second = ({key: value[i : i + 1] for key, value in images.items()} for i in (0, 1))
        cache = model(whole[:, :split], use_cache=True, **first).past_key_values
        behind = model(whole[:, split:], past_key_values=cache, **second).logits
        torch.testing.assert_close(behind, model(whole, **images).logits[:, split:], atol=TOLERANCE, rtol=0)


def test_beams_and_sampling():
    model = tiny_model(seed=9)
    batch, images = tiny_batch(model.config, ROWS), tiny_images(4)
    beams = dict(max_new_tokens=5, num_beams=3, do_sample=False)
    cached, whole = (model.generate(**batch, **images, **beams, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, whole)
    repeated = [i for i in range(len(ROWS)) for _ in range(2)]
    ids, rest = model._expand_inputs_for_generation(2, **batch, **images)
    torch.testing.assert_close(model(ids, **rest).logits, model(**batch, **images).logits[repeated], atol=TOLERANCE, rtol=0)
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        drawn.append(
            model.generate(**batch, **images, max_new_tokens=5, do_sample=True, num_return_sequences=2, top_k=8, use_cache=use_cache)
        )
    assert torch.equal(*drawn)
    assert len(drawn[0]) == 2 * len(ROWS)
    assert not (drawn[0][:, batch["input_ids"].shape[1] :] == model.config.image_token_id).any()


def test_loss_is_the_shifted_cross_entropy():
    model = tiny_model(seed=10)
    batch, images = tiny_batch(model.config, ROWS), tiny_images(4)
    labels = batch["input_ids"].masked_fill((batch["attention_mask"] == 0) | (batch["input_ids"] == 60), -100)
    output = model(**batch, **images, labels=labels)
    wanted = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(output.loss, wanted)
    output.loss.backward()
    assert model.model.projector.fc1.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in model.model.mgvq.parameters())


def test_eager_equals_sdpa():
    model = tiny_model(seed=11, mask="full")
    batch, images = tiny_batch(model.config, ROWS), tiny_images(4)
    fused = model(**batch, **images).logits
    model.set_attn_implementation("eager")
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(model(**batch, **images).logits[real], fused[real], atol=TOLERANCE, rtol=0)
    with pytest.raises(ValueError, match="does not support Flash Attention|flash"):
        model.set_attn_implementation("flash_attention_2")


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda b, i: i.update(tiny_images(3)), "input_ids have places for 4 images, but 3 were given"),
        (lambda b, i: i.clear(), "pixel_values is missing"),
        (lambda b, i: i.pop("mgvq_pixel_values"), "mgvq_pixel_values is missing"),
        (lambda b, i: i.update(mgvq_pixel_values=i["mgvq_pixel_values"][:2]), "pixel_values hold 4 images and mgvq_pixel_values 2"),
        (lambda b, i: i.update(pixel_values=i["pixel_values"][:, :, :8]), r"pixel_values has shape \(4, 3, 8, 16\); wanted"),
        (lambda b, i: b.update(attention_mask=b["attention_mask"][:, 1:]), "attention_mask has shape"),
        (lambda b, i: b.update(position_ids=b["input_ids"]), "position_ids cannot be given"),
        (lambda b, i: b.update(input_ids=None), "input_ids are missing"),
    ],
)
def test_bad_input_is_refused(change, sentence):
    model = tiny_model()
    batch, images = tiny_batch(model.config, ROWS), tiny_images(4)
    change(batch, images)
    with pytest.raises(ValueError, match=sentence):
        model(**batch, **images)


@pytest.mark.parametrize("name, seen", [("static", "StaticCache"), ("offloaded", "DynamicCache that offloads")])
def test_caches_that_would_keep_v_hy_are_refused(name, seen):
    model = tiny_model()
    batch = tiny_batch(model.config, [[1, 5, 6]])
    with pytest.raises(ValueError, match=f"past_key_values is a {seen}; wanted a VocoCache"):
        model.generate(**batch, max_new_tokens=2, cache_implementation=name)


def test_continuous_batching_is_refused():
    model = tiny_model()
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="cannot be run by continuous batching"):
        model.generate_batch([[1, 5, 6]], generation_config=GenerationConfig(max_new_tokens=2, eos_token_id=2))
    assert model.config._attn_implementation == before
