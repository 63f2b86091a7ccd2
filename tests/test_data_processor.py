"""What an export's processor makes of a conversation is what training saw: ids token for token, pixels bit for bit."""

import io

import pytest
import torch
from PIL import Image

from htc_megatron.data.conversation import IMAGE_TOKEN_INDEX, Template, tokenize_prompt, tokenize_record
from htc_megatron.data.images import clip_pixels, open_image
from htc_megatron.data.tokenizer import load_tokenizer
from htc_megatron.hf.processing_htc_vlm import HTCVLMImageProcessor, HTCVLMProcessor, vicuna_template
from htc_megatron.weights.tokenizer import export_tokenizer
from tests.data_tiny import byte_level_folder, png, records, sentencepiece_model, turns

SYSTEM = "Look at it."


@pytest.fixture(scope="module", params=["sentencepiece", "transformers"])
def pair(request, tmp_path_factory):
    """(training's tokenizer, the processor of an export with it)."""
    folder = tmp_path_factory.mktemp("tokenizer")
    path = sentencepiece_model(folder) if request.param == "sentencepiece" else byte_level_folder(folder)
    tokenizer = load_tokenizer(path)
    exported = export_tokenizer(path, tokenizer.voco_token_id, tokenizer.vocab_size)
    return tokenizer, HTCVLMProcessor(HTCVLMImageProcessor(16, 16), exported, vicuna_template(SYSTEM), num_image_tokens=2)


def expanded(ids, tokenizer):
    return [token for i in ids for token in ([tokenizer.voco_token_id] * 2 if i == IMAGE_TOKEN_INDEX else [i])]


ODD = [turns("  spaced \n out  ", "\tanswer "), turns("naïve 漢字 <voco>?", "🙂"), turns("a", "b", "USER: c", "d  e", "f", "")]


@pytest.mark.parametrize("record", records(8) + [{"conversations": conversation} for conversation in ODD])
def test_same_ids(pair, record):
    tokenizer, processor = pair
    template = Template(SYSTEM)
    sample = tokenize_record(record, tokenizer, template)
    messages = [{"role": {"human": "user", "gpt": "assistant"}[t["from"]], "content": t["value"]} for t in record["conversations"]]
    assert processor.encode(processor.apply_chat_template(messages)) == expanded(sample.ids, tokenizer)
    prompt = tokenize_prompt([message["content"] for message in messages[:-1]], tokenizer, template)
    text = processor.apply_chat_template(messages[:-1], add_generation_prompt=True)
    assert processor.encode(text) == expanded(prompt, tokenizer)


def test_same_pixels(pair):
    image = png(1, 30, 17)
    pixels = pair[1].image_processor(Image.open(io.BytesIO(image)), return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels[0], torch.from_numpy(clip_pixels(open_image(image), 16)))
