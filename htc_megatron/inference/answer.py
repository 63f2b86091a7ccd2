"""Answer questions about images with an exported model: every image is compressed once, however many questions it gets."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from htc_megatron.config import ConfigError
from htc_megatron.hf.cache_htc_vlm import VocoCache
from htc_megatron.hf.modeling_htc_vlm import HTCVLMForConditionalGeneration
from htc_megatron.hf.processing_htc_vlm import IMAGE_TOKEN, HTCVLMProcessor


def load(folder: str | Path, dtype: str = "auto", device: str = "cpu") -> tuple[HTCVLMForConditionalGeneration, HTCVLMProcessor]:
    """Model, in eval mode, and processor of an exported folder, by this package's code and not by the folder's copy.

    Raises ConfigError where there is no such export.
    """
    folder = Path(folder)
    described = folder / "config.json"
    if not described.is_file():
        raise ConfigError(f"{folder} is no exported model: it has no config.json; tools/convert.py export writes one")
    kind = json.loads(described.read_text(encoding="utf-8")).get("model_type")
    if kind != "htc_vlm":
        raise ConfigError(f"{described} describes a model of type {kind!r}, wanted 'htc_vlm'")
    model = HTCVLMForConditionalGeneration.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.eval().to(device), HTCVLMProcessor.from_pretrained(folder, local_files_only=True)


def prompt(processor: HTCVLMProcessor, question: str, num_images: int = 1) -> str:
    """The chat template's prompt for a question behind so many images."""
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def answer(
    model: HTCVLMForConditionalGeneration,
    processor: HTCVLMProcessor,
    images: Sequence[Any],
    questions: Sequence[tuple[int, str]],
    max_new_tokens: int = 16,
    batch_size: int = 256,
    images_at_once: int = 64,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[str]:
    """Greedy answers to `questions`, each (number of its image in `images`, text), in their order.

    images: what the processor takes: PIL images, paths, arrays. Up to `images_at_once` of them are compressed together, each once
    for every beginning its prompts share; batches of `batch_size` questions then start from the compressed caches. Works for every
    kind of mask; with mask none the cache holds the whole image. progress: wraps the iteration over groups of images.
    Raises ConfigError where a question names no image.
    """
    by_image: dict[int, list[int]] = {}
    for index, (image, _) in enumerate(questions):
        if not 0 <= image < len(images):
            raise ConfigError(f"question {index} is about image {image}, but there are {len(images)} images")
        by_image.setdefault(image, []).append(index)
    texts = dict.fromkeys(text for _, text in questions)
    spelled = {text: processor.encode(prompt(processor, text)) for text in texts}
    answers = [""] * len(questions)
    wanted = sorted(by_image)
    for start in progress(range(0, len(wanted), images_at_once)):
        chunk = wanted[start : start + images_at_once]
        indices = [index for image in chunk for index in by_image[image]]
        ids = [spelled[questions[index][1]] for index in indices]
        cut = [len(row) - row[::-1].index(processor.image_token_id) for row in ids]
        begun: dict[tuple, int] = {}  # (image, ids up to its last placeholder) -> row of the cache
        rows = [begun.setdefault((questions[i][0], *row[:c]), len(begun)) for i, row, c in zip(indices, ids, cut, strict=True)]
        cache, prefix, mask = _compress(model, processor, images, list(begun))
        rest = [row[c:] for row, c in zip(ids, cut, strict=True)]
        order = sorted(range(len(rest)), key=lambda j: len(rest[j]))  # rows of like length together
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            at = torch.tensor([rows[j] for j in batch], device=model.device)
            tail, tail_mask = _pad([rest[j] for j in batch], processor, model.device)
            made = model.generate(
                torch.cat([prefix[at], tail], 1),
                attention_mask=torch.cat([mask[at], tail_mask], 1),
                past_key_values=cache.select(at),
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
            decoded = processor.batch_decode(made[:, prefix.shape[1] + tail.shape[1] :], skip_special_tokens=True)
            for j, text in zip(batch, decoded, strict=True):
                answers[indices[j]] = text.strip()
    return answers


def _compress(
    model: HTCVLMForConditionalGeneration, processor: HTCVLMProcessor, images: Sequence[Any], begun: list[tuple]
) -> tuple[VocoCache, Tensor, Tensor]:
    """Cache, ids and attention mask of the beginnings (image, *ids)."""
    ids, mask = _pad([list(key[1:]) for key in begun], processor, model.device)
    numbers = {image: place for place, image in enumerate(dict.fromkeys(key[0] for key in begun))}
    pixels = processor.image_processor.preprocess([images[image] for image in numbers])
    places = torch.tensor([numbers[key[0]] for key in begun])
    inputs = {name: values[places].to(model.device) for name, values in pixels.items()}
    return model.compress(ids, attention_mask=mask, **inputs), ids, mask


def _pad(rows: list[list[int]], processor: HTCVLMProcessor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows padded on the left, and their attention mask; [rows, longest] int64 each."""
    width = max(map(len, rows))
    pad = processor.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def ask(
    model: HTCVLMForConditionalGeneration, processor: HTCVLMProcessor, images: Sequence[Any], question: str, max_new_tokens: int = 128
) -> str:
    """Greedy answer to one question about all of `images` together; none is allowed.

    The images stand in front of the question, unless it says where by "<image>".
    """
    count = 0 if IMAGE_TOKEN in question else len(images)
    text = prompt(processor, question, count)
    if text.count(IMAGE_TOKEN) != len(images):
        raise ConfigError(f"the question has {text.count(IMAGE_TOKEN)} {IMAGE_TOKEN}, but {len(images)} images were given; wanted as many")
    inputs = processor(text=text, images=list(images) or None, return_tensors="pt").to(model.device)
    made = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
