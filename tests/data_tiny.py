"""A tiny data set for the tests of htc_megatron/data: tokenizers, images, records, a tiny MGVQ and run configurations."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from PIL import Image

from htc_megatron.config import (
    BackboneConfig,
    DataConfig,
    MethodConfig,
    MGVQConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
    VisionConfig,
)
from htc_megatron.data.conversation import Template
from htc_megatron.data.prepare import CodeEncoder, Preparation, prepare
from htc_megatron.data.tokenizer import Tokenizer
from htc_megatron.model.mgvq import build_mgvq, mgvq_fingerprint

LINES = [
    "Look. USER: What colour is the circle? ASSISTANT: red",
    "USER: Is there a triangle in the image? ASSISTANT: yes",
    "USER: What shape is it? ASSISTANT: a blue rectangle",
]
MGVQ = MGVQConfig(
    image_size=16, widths=(8, 16), depths=(1, 1), decoder_depths=(1, 1), blocks=("res", "evit"), head_dim=8,
    latent_channels=8, groups=2, codebook_size=32,
)  # fmt: skip
TEMPLATE = Template("Look.")


def sentencepiece_model(folder: Path) -> Path:
    """A LLaMA-like model: BPE, byte fallback, no normalisation."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 10), model_prefix=str(folder / "tokenizer"), vocab_size=330, hard_vocab_limit=False,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return folder / "tokenizer.model"


def byte_level_folder(folder: Path, voco: bool = False) -> Path:
    """A GPT-2-like byte-level transformers tokenizer with <s> and </s>."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(LINES * 10, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    if voco:
        tokenizer.add_tokens(["<voco>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


def png(seed: int, width: int = 20, height: int = 20) -> bytes:
    """A noisy picture: it does not compress, so a cut in it is always seen."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A grey picture of noise, the same every time: what a model of random weights says of it may hang by a thread."""
    return Image.fromarray(np.random.default_rng((seed, width, height)).integers(0, 256, (height, width), np.uint8))


def turns(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def records(count: int = 24, images: int = 6) -> list[dict]:
    """One image, two images, no image, several turns, in turn; images are shared."""
    made = []
    for i in range(count):
        record = {"id": f"r{i}", "image": f"{i % images}.png", "conversations": turns(f"<image>\nWhat colour is it in r{i}?", "red")}
        if i % 4 == 1:
            record["image"] = [f"{i % images}.png", f"{(i + 1) % images}.png"]
            record["conversations"] = turns(f"<image> or <image> in r{i}?", "the circle" * (i % 5 + 1))
        elif i % 4 == 2:
            del record["image"]
            record["conversations"] = turns(f"Is there a triangle in r{i}?", "no " * i)
        elif i % 4 == 3:
            record["conversations"] = turns(f"What is <image> in r{i}?", "a shape", "Which?", "a rectangle")
        made.append(record)
    return made


def write_source(folder: Path, made: list[dict] | None = None, images: int = 6) -> tuple[Path, Path]:
    """(LLaVA JSON, image folder)."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = folder / "images"
    pictures.mkdir(exist_ok=True)
    for i in range(images):
        (pictures / f"{i}.png").write_bytes(png(i, 20 + i, 20))
    (folder / "data.json").write_text(json.dumps(records(images=images) if made is None else made))
    return folder / "data.json", pictures


def encoder(seed: int = 0, batch_size: int = 4) -> CodeEncoder:
    torch.manual_seed(seed)
    model = build_mgvq(MGVQ, encoder_only=True).eval()
    return CodeEncoder(model, mgvq_fingerprint(model), batch_size)


def prepared(folder: Path, tokenizer: Tokenizer, made: list[dict] | None = None, codes: bool = True, **options) -> Path:
    """A prepared folder of `records`."""
    data, images = write_source(folder / "source", made)
    options = {"template": TEMPLATE, "encoder": encoder() if codes else None, "progress": False, **options}
    prepare(Preparation(data=data, images=images, output=folder / "out", tokenizer=tokenizer, **options))
    return folder / "out"


def run_config(tokenizer: Tokenizer, **training) -> RunConfig:
    """Tiny model with 2 anchors, 4 patches and 1 voco token an image."""
    training = {"seq_length": 160, "micro_batch_size": 1, "global_batch_size": 4, **training}
    return RunConfig(
        model=ModelConfig(
            backbone=BackboneConfig(num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=4,
                                    vocab_size=tokenizer.vocab_size),
            vision=VisionConfig(image_size=16, patch_size=8, hidden_size=32, ffn_hidden_size=64, num_layers=1, num_attention_heads=4),
            mgvq=replace(MGVQ),
            method=MethodConfig(num_anchors=2, anchor_hidden_size=16, voco_token_id=tokenizer.voco_token_id),
        ),
        training=TrainingConfig(**training),
        data=DataConfig(seed=3, num_workers=2),
    )  # fmt: skip


def in_order(value: object) -> str:
    """A test's name for a value, the same in every run: sets in order."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {in_order(of_key)}" for key, of_key in value.items()) + "}"
    return "{" + ", ".join(sorted(map(repr, value))) + "}" if isinstance(value, set) else repr(value)
