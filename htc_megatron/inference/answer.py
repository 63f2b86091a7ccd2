"""Answer questions about images with an exported model: every image is compressed once, however many questions it gets."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from htc_megatron.config import ConfigError
from htc_megatron.hf.cache_htc_vlm import VocoCache
from htc_megatron.hf.image_htc_vlm import why_not_alone
from htc_megatron.hf.modeling_htc_vlm import HTCVLMForConditionalGeneration
from htc_megatron.hf.processing_htc_vlm import IMAGE_TOKEN, HTCVLMProcessor
from htc_megatron.inference.onednn import use_onednn
from htc_megatron.inference.store import ImageStore
from htc_megatron.parallel.host_memory import keep_freed_memory


def require_export(folder: str | Path) -> None:
    """Raises ConfigError where the folder is no exported model."""
    folder = Path(folder)
    described = folder / "config.json"
    if not described.is_file():
        raise ConfigError(f"{folder} is no exported model: it has no config.json; tools/convert.py export writes one")
    kind = json.loads(described.read_text(encoding="utf-8")).get("model_type")
    if kind != "htc_vlm":
        raise ConfigError(f"{described} describes a model of type {kind!r}, wanted 'htc_vlm'")


def load(folder: str | Path, dtype: str = "auto", device: str = "cpu") -> tuple[HTCVLMForConditionalGeneration, HTCVLMProcessor]:
    """Model, in eval mode, and processor of an exported folder, by this package's code and not by the folder's copy.

    On CPU fp32 products are oneDNN's where torch has it (onednn.py), which round otherwise than torch's own.
    Raises ConfigError where there is no such export.
    """
    require_export(folder)
    model = HTCVLMForConditionalGeneration.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return made_ready(model.eval().to(device)), HTCVLMProcessor.from_pretrained(folder, local_files_only=True)


def made_ready(model: PreTrainedModel) -> PreTrainedModel:
    """What makes a model answer faster on CPU: oneDNN's products, and freed memory that stays with the process."""
    if model.device.type == "cpu":
        keep_freed_memory()
    return use_onednn(model)


def message(question: str, num_images: int = 1) -> dict[str, Any]:
    """A user's message to the chat template: a question behind so many images, or with them where "<image>" in it says.

    Raises ConfigError where it says it another number of times.
    """
    said = question.count(IMAGE_TOKEN)
    if said and said != num_images:
        raise ConfigError(f"the question has {said} {IMAGE_TOKEN}, but {num_images} images were given; wanted as many")
    content = [{"type": "image"}] * (0 if said else num_images) + [{"type": "text", "text": question}]
    return {"role": "user", "content": content}


def prompt(processor: HTCVLMProcessor, question: str, num_images: int = 1) -> str:
    """The chat template's prompt for a question. Raises ConfigError as `message`."""
    return processor.apply_chat_template([message(question, num_images)], add_generation_prompt=True)


def beginning(processor: HTCVLMProcessor) -> list[int]:
    """Ids of what the chat template says up to a first question's image, which they end in."""
    ids = processor.encode(prompt(processor, "?"))
    return ids[: len(ids) - ids[::-1].index(processor.image_token_id)]


def answer(
    model: HTCVLMForConditionalGeneration,
    processor: HTCVLMProcessor,
    images: Sequence[Any],
    questions: Sequence[tuple[int | Sequence[int], str]],
    max_new_tokens: int = 16,
    batch_size: int = 256,
    images_at_once: int = 64,
    progress: Callable[[Iterable], Iterable] = iter,
    store: ImageStore | None = None,
    **options: Any,
) -> list[str]:
    """Answers to `questions`, each (number of its image in `images`, or numbers of several, text), in their order.

    images: what the processor takes: PIL images, paths, arrays; with a store, files that are in it, which are then not encoded.
    Images are taken up to about `images_at_once` together; what prompts begin with, up to their last image, is run once for each
    beginning, and batches of `batch_size` questions start from there. Works for every kind of mask; with mask none the cache holds
    the whole image. progress: wraps the iteration over groups of images. options: generate's; greedy unless they say otherwise.
    Raises ConfigError where a question names no image, or one that is not there.
    """
    by_images: dict[tuple[int, ...], list[int]] = {}
    spelled = []
    for index, (named, text) in enumerate(questions):
        numbers = (named,) if isinstance(named, int) else tuple(named)
        if not numbers or not all(0 <= number < len(images) for number in numbers):
            raise ConfigError(f"question {index} is about image {named}, but there are {len(images)} images")
        by_images.setdefault(numbers, []).append(index)
        spelled.append((len(numbers), text))
    ids_of = {key: processor.encode(prompt(processor, key[1], key[0])) for key in dict.fromkeys(spelled)}
    options = {"do_sample": False} | options
    answers = [""] * len(questions)
    for chunk in progress(_chunks(sorted(by_images), images_at_once)):
        about = [(numbers, index) for numbers in chunk for index in by_images[numbers]]
        ids = [ids_of[spelled[index]] for _, index in about]
        cut = [len(row) - row[::-1].index(processor.image_token_id) for row in ids]
        begun: dict[tuple, int] = {}  # (images, ids up to the last placeholder) -> row of the cache
        rows = [begun.setdefault((numbers, tuple(row[:c])), len(begun)) for (numbers, _), row, c in zip(about, ids, cut, strict=True)]
        cache, prefix, mask = _begin(model, processor, images, list(begun), store)
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
                **options,
            )
            decoded = processor.batch_decode(made[:, prefix.shape[1] + tail.shape[1] :], skip_special_tokens=True)
            for j, text in zip(batch, decoded, strict=True):
                answers[about[j][1]] = text.strip()
    return answers


def _chunks(groups: Sequence[tuple[int, ...]], size: int) -> list[list[tuple[int, ...]]]:
    """Groups of images in stretches of about `size` images."""
    chunks: list[list[tuple[int, ...]]] = []
    room = 0
    for group in groups:
        if room <= 0:
            chunks.append([])
            room = size
        chunks[-1].append(group)
        room -= len(group)
    return chunks


def _begin(
    model: HTCVLMForConditionalGeneration,
    processor: HTCVLMProcessor,
    images: Sequence[Any],
    begun: list[tuple[tuple[int, ...], tuple[int, ...]]],
    store: ImageStore | None,
) -> tuple[VocoCache, Tensor, Tensor]:
    """Cache, ids and attention mask of beginnings (images, ids)."""
    ids, mask = _pad([list(row) for _, row in begun], processor, model.device)
    inputs = inputs_of_rows(model, processor, images, [image for named, _ in begun for image in named], store)
    return model.compress(ids, attention_mask=mask, **inputs), ids, mask


def inputs_of_rows(
    model: HTCVLMForConditionalGeneration,
    processor: HTCVLMProcessor,
    images: Sequence[Any],
    numbers: Sequence[int],
    store: ImageStore | None = None,
) -> dict[str, Tensor]:
    """What the model takes of images[number] for each number, repeats allowed: each image is compressed once where it can be alone."""
    if not numbers:
        return {}
    place = {number: place for place, number in enumerate(dict.fromkeys(numbers))}
    inputs = image_inputs(model, processor, [images[number] for number in place], store)
    if store is None and not why_not_alone(model.config):
        inputs = {"image_keys_values": model.compress_images(**inputs)}
    places = torch.tensor([place[number] for number in numbers])
    return {name: values[places.to(values.device)] for name, values in inputs.items()}


def image_inputs(
    model: HTCVLMForConditionalGeneration, processor: HTCVLMProcessor, images: Sequence[Any], store: ImageStore | None
) -> dict[str, Tensor]:
    """What the model takes of images, one a row: pixels, or keys and values where they are files in a store."""
    if store is not None:
        return {"image_keys_values": store.load(images)}
    return {name: values.to(model.device) for name, values in processor.image_processor.preprocess(images).items()}


def _pad(rows: list[list[int]], processor: HTCVLMProcessor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows padded on the left, and their attention mask; [rows, longest] int64 each."""
    width = max(map(len, rows))
    pad = processor.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def ask(
    model: HTCVLMForConditionalGeneration,
    processor: HTCVLMProcessor,
    images: Sequence[Any],
    question: str,
    max_new_tokens: int = 128,
    store: ImageStore | None = None,
) -> str:
    """Greedy answer to one question about all of `images` together; none is allowed.

    The images stand in front of the question, unless it says where by "<image>". With a store they are files that are in it.
    """
    ids, mask = _pad([processor.encode(prompt(processor, question, len(images)))], processor, model.device)
    inputs = image_inputs(model, processor, images, store) if images else {}
    made = model.generate(ids, attention_mask=mask, **inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()
