"""Images compressed by themselves, and the cache that text is decoded from, equal the single masked pass."""

import copy

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

import htc_megatron.hf.cache_htc_vlm as caching
from htc_megatron.hf.cache_htc_vlm import RoomyLayer, VocoCache
from tests.hf_tiny import tiny_batch, tiny_images, tiny_model
from tests.test_hf_generate import ROWS, TOLERANCE, reference

DEEP = dict(num_hidden_layers=4)  # in the first two layers V_hy goes on to the next, in the last two it does not


def rope(**parameters):
    return DEEP | dict(rope_parameters=dict(rope_theta=10000.0) | parameters)


YARN = rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
LLAMA3 = rope(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
VARIANTS = [
    dict(mask="star"),
    dict(mask="full"),
    dict(mask="star", num_voco_tokens=3, text_sees="voco_on"),
    dict(mask="full", num_voco_tokens=2, fusion="parallel"),
    dict(fusion="post", channels="continuous"),
    dict(channels="discrete", mask="full"),
    dict(backbone="qwen2", num_voco_tokens=2),
    dict(text=DEEP | dict(num_key_value_heads=1)),
    dict(text=DEEP | dict(num_hidden_layers=1)),
    dict(text=rope(rope_type="linear", factor=2.0)),
    dict(text=YARN),
    dict(text=LLAMA3),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_keys_and_values_stand_in_for_the_image(variant):
    """Several images a row, other text in front of each, rows of other lengths together: logits and greedy tokens of the masked pass."""
    model = tiny_model(seed=20, **dict(text=DEEP) | variant)
    batch, images = tiny_batch(model.config, ROWS), tiny_images(4)
    kept = model.compress_images(**images)
    with torch.no_grad():
        whole = model(**batch, **images).logits
        by_kept = model(**batch, image_keys_values=kept).logits
    placeholder = (batch["input_ids"] == model.config.image_token_id) & batch["attention_mask"].bool()
    text = batch["attention_mask"].bool() & ~placeholder
    torch.testing.assert_close(by_kept[text], whole[text], atol=TOLERANCE, rtol=0)
    assert by_kept[placeholder].isnan().all()
    made = model.generate(
        **batch, image_keys_values=kept, max_new_tokens=5, eos_token_id=None, output_logits=True, return_dict_in_generate=True
    )
    tokens, logits = reference(model, batch, images, 5)
    assert torch.equal(made.sequences, tokens)
    got = torch.stack(made.logits, 1)
    got[:, :, model.config.image_token_id] = -torch.inf
    torch.testing.assert_close(got, logits, atol=TOLERANCE, rtol=0)


def test_codes_in_place_of_pixels():
    model, images = tiny_model(seed=21), tiny_images(2)
    codes = model.model.mgvq.encode(images["mgvq_pixel_values"])
    by_codes = model.compress_images(pixel_values=images["pixel_values"], mgvq_codes=codes)
    assert torch.equal(by_codes, model.compress_images(**images))
    with pytest.raises(ValueError, match="pixel_values hold 2 images and mgvq_codes 1; wanted the same"):
        model.compress_images(pixel_values=images["pixel_values"], mgvq_codes=codes[:1])


def test_far_places_and_low_precision():
    """An image 200 places behind the beginning: turned keys are as near to fp32's logits as bf16's own pass, within a factor of two."""
    model = tiny_model(seed=22, text=DEEP | dict(max_position_embeddings=512))
    batch, images = tiny_batch(model.config, [[*range(3, 59)] * 4 + ["image", 7, 8]]), tiny_images(1)
    with torch.no_grad():
        exact = model(**batch, **images).logits[0, -2:]
        kept = model(**batch, image_keys_values=model.compress_images(**images)).logits[0, -2:]
        torch.testing.assert_close(kept, exact, atol=TOLERANCE, rtol=0)
        model.bfloat16()
        rounded = model(**batch, **images).logits[0, -2:].float()
        kept = model.compress_images(**images)
        assert kept.dtype == torch.bfloat16
        by_kept = model(**batch, image_keys_values=kept).logits[0, -2:].float()
    assert (by_kept - exact).abs().max() < 2 * (rounded - exact).abs().max()


@pytest.mark.parametrize(
    "method, sentence",
    [
        (dict(image_sees="prefix"), "image_sees is prefix"),
        (dict(mask="none"), "mask is none: the image is not compressed"),
        (dict(text=rope(rope_type="dynamic", factor=2.0)), "rope_type is dynamic"),
    ],
)
def test_models_whose_images_are_not_by_themselves(method, sentence):
    model = tiny_model(**method)
    with pytest.raises(ValueError, match=sentence):
        model.compress_images(**tiny_images(1))
    ids = tiny_batch(model.config, [[1, "image", 5]])
    with pytest.raises(ValueError, match=f"image_keys_values cannot be used: {sentence}"):
        model(**ids, image_keys_values=torch.zeros(1))
    assert model.generate(**ids, **tiny_images(1), max_new_tokens=2).shape[1] > 2  # they answer all the same


def test_bad_keys_and_values_are_refused():
    model = tiny_model()
    batch, images = tiny_batch(model.config, ROWS), tiny_images(4)
    kept = model.compress_images(**images)
    for wrong, sentence in (
        (kept[:3], "places for 4 images, but 3"),
        (kept[:, :1], r"have shape \(4, 1, 2, 2, 1, 8\); wanted \[images, 2, 2"),
    ):
        with pytest.raises(ValueError, match=sentence):
            model(**batch, image_keys_values=wrong)
    with pytest.raises(ValueError, match="image_keys_values and pixels are both given"):
        model(**batch, **images, image_keys_values=kept)
    with pytest.raises(ValueError, match="a prompt ends in an image"):
        model.generate(**tiny_batch(model.config, [[1, 5, "image"]]), image_keys_values=kept[:1], max_new_tokens=2)
    batch = tiny_batch(model.config, [[1, 5, "image"]])
    images = {name: values[:1] for name, values in images.items()}
    assert torch.equal(
        model.generate(**batch, **images, max_new_tokens=3, eos_token_id=None), reference(model, batch, images, 3)[0]
    )  # by its pixels


class Told(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_generation_goes_on_as_ever():
    """Beams, sampling, several answers, streaming and prompt lookup, from keys and values as from pixels without any cache."""
    model = tiny_model(seed=23, text=DEEP, num_voco_tokens=2)
    batch, images = tiny_batch(model.config, ROWS), tiny_images(4)
    kept = {"image_keys_values": model.compress_images(**images)}
    for options in (dict(num_beams=3, num_return_sequences=2), dict(do_sample=True, num_return_sequences=2, top_k=8)):
        found = []
        for inputs, use_cache in ((kept, True), (kept, False), (images, True), (images, False)):
            torch.manual_seed(0)
            found.append(model.generate(**batch, **inputs, max_new_tokens=5, use_cache=use_cache, **options))
        assert all(torch.equal(found[-1], other) for other in found), options
    one, first = tiny_batch(model.config, [ROWS[0]]), {"image_keys_values": kept["image_keys_values"][:1]}
    told = Told()
    made = model.generate(**one, **first, max_new_tokens=6, eos_token_id=None, streamer=told)
    assert told.tokens == made[0].tolist() and told.ended
    assert torch.equal(made, model.generate(**one, **first, max_new_tokens=6, eos_token_id=None, prompt_lookup_num_tokens=3))


@pytest.mark.parametrize("method", [dict(), dict(text_sees="voco_on"), dict(mask="none"), dict(image_sees="prefix")], ids=str)
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS], ids=["alone", "padded"])
def test_a_step_makes_neither_room_nor_mask(method, rows, monkeypatch):
    """Keys and values of the whole answer lie in tensors made once, and the rule is asked for the prompt and the first step only."""
    model = tiny_model(seed=24, **method)
    batch, images = tiny_batch(model.config, rows), tiny_images(sum(row.count("image") for row in rows))
    wanted, _ = reference(model, batch, images, 9)
    asked, rooms = [], []
    rule, room = caching.allowed, RoomyLayer._room
    monkeypatch.setattr(caching, "allowed", lambda *given: asked.append(given) or rule(*given))
    monkeypatch.setattr(RoomyLayer, "_room", staticmethod(lambda *given: rooms.append(given) or room(*given)))
    made = model.generate(**batch, **images, max_new_tokens=9, eos_token_id=None, return_dict_in_generate=True)
    assert torch.equal(made.sequences, wanted)
    assert len(asked) == 2
    assert len(rooms) == 2 * model.config.text_config.num_hidden_layers
    layer = made.past_key_values.layers[0]
    assert layer.keys.shape[2] == made.sequences.shape[1] - 1 and layer.keys.data_ptr() == layer._rooms[0].data_ptr()


def test_a_cache_without_known_length_grows_seldom(monkeypatch):
    model = tiny_model(seed=25)
    batch, images = tiny_batch(model.config, ROWS), tiny_images(4)
    wanted, _ = reference(model, batch, images, 40)
    rooms, room = [], RoomyLayer._room
    monkeypatch.setattr(RoomyLayer, "_room", staticmethod(lambda *given: rooms.append(given) or room(*given)))
    begun = batch["input_ids"].shape[1]
    with torch.inference_mode():
        cache = model(**batch, **images, use_cache=True).past_key_values
    other = copy.deepcopy(cache)
    for step in range(begun, wanted.shape[1] - 1):
        mode = torch.inference_mode() if step < begun + 5 else torch.no_grad()  # rooms of the one cannot be written in the other
        with mode:
            logits = model(wanted[:, step : step + 1], past_key_values=cache).logits[:, -1]
        logits = logits.index_fill(1, torch.tensor([model.config.image_token_id]), -torch.inf)
        assert torch.equal(logits.argmax(-1), wanted[:, step + 1])
    assert len(rooms) <= 2 * 2 * 6  # of 39 steps, for keys and values of two layers
    assert other.get_seq_length() == begun
    model(wanted[:, begun : begun + 1], past_key_values=other).logits.sum().backward()  # with a graph too


def test_rows_and_ends_of_a_cache_can_be_taken():
    """What generate() does to a cache between steps leaves the rest as it was."""
    model = tiny_model(seed=26, text_sees="voco_on")
    batch, images = tiny_batch(model.config, ROWS), tiny_images(4)
    ids = torch.tensor([[5], [6], [7]])
    with torch.no_grad():
        cache = model(**batch, **images, past_key_values=VocoCache(40)).past_key_values
        first = model(ids, past_key_values=cache).logits
        again = model(ids + 1, past_key_values=cache).logits
        cache.crop(-2)
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, first, atol=TOLERANCE, rtol=0)
        order = torch.tensor([2, 0, 1])
        cache.reorder_cache(order)
        torch.testing.assert_close(model(ids[order] + 1, past_key_values=cache).logits, again[order], atol=TOLERANCE, rtol=0)
