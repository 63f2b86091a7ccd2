"""Tiny exported models for the tests: hidden 32, two layers, images of 16 px with 4 patches and 2 anchors."""

import random
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor

from htc_megatron.config import BackboneConfig, LoraConfig, MethodConfig, MGVQConfig, ModelConfig, RunConfig, TrainingConfig, VisionConfig
from htc_megatron.data.tokenizer import load_tokenizer
from htc_megatron.hf.configuration_htc_vlm import HTCVLMConfig
from htc_megatron.hf.modeling_htc_vlm import HTCVLMForConditionalGeneration
from htc_megatron.model.mgvq import build_mgvq, save_mgvq
from htc_megatron.weights import weights

VOCO = 60
BACKBONE = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
MGVQ = dict(
    image_size=16,
    widths=[16, 16],
    depths=[1, 1],
    decoder_depths=[1, 1],
    blocks=["res", "evit"],
    head_dim=8,
    latent_channels=8,
    groups=2,
    codebook_size=32,
)


def tiny_config(backbone: str = "llama", text: dict | None = None, **method) -> HTCVLMConfig:
    """text: of the backbone's configuration, over what is set here."""
    vision = dict(image_size=16, patch_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    chosen = dict(num_anchors=2, anchor_hidden_size=24, image_token_id=VOCO) | method
    ours = dict(model_type=backbone, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0) | BACKBONE
    return HTCVLMConfig(text_config=ours | (text or {}), vision_config=vision, mgvq_config=MGVQ, **chosen)


def tiny_model(seed: int = 0, backbone: str = "llama", **method) -> HTCVLMForConditionalGeneration:
    """A model with weights large enough for every part to show in the logits."""
    torch.manual_seed(seed)
    model = HTCVLMForConditionalGeneration(tiny_config(backbone, **method)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "mgvq" not in name:
                weight.normal_(std=0.8 / weight.shape[-1] ** 0.5 if "embed_tokens" not in name else 1.0)
    return model


def tiny_images(count: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3, 16, 16)
    return dict(pixel_values=torch.randn(shape, generator=generator), mgvq_pixel_values=torch.rand(shape, generator=generator) * 2 - 1)


def tiny_batch(config: HTCVLMConfig, rows: list[list[int | str]], side: str = "left") -> dict[str, Tensor]:
    """input_ids and attention_mask of rows that list token ids and "image", padded on one side."""
    run = [config.image_token_id] * config.image_seq_length
    expanded = [sum((run if token == "image" else [token] for token in row), []) for row in rows]
    width = max(map(len, expanded))
    ids, mask = [], []
    for row in expanded:
        gap = width - len(row)
        ids.append([0] * gap + row if side == "left" else row + [0] * gap)
        mask.append([0] * gap + [1] * len(row) if side == "left" else [1] * len(row) + [0] * gap)
    return dict(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))


def tiny_training_config(
    vocab_size: int = 64, voco: int = VOCO, qkv_bias: bool = False, tied: bool = False, lora: LoraConfig | None = None, **method
) -> ModelConfig:
    """The training side of `tiny_config`."""
    text = dict(num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, max_position_embeddings=512)
    mgvq = {name: tuple(value) if isinstance(value, list) else value for name, value in MGVQ.items()}
    chosen = dict(num_anchors=2, anchor_hidden_size=24, voco_token_id=voco) | method
    return ModelConfig(
        backbone=BackboneConfig(
            vocab_size=vocab_size, qkv_bias=qkv_bias, rotary_base=5000.0, norm_epsilon=1e-4, tie_word_embeddings=tied, **text
        ),
        vision=VisionConfig(image_size=16, patch_size=8, hidden_size=16, ffn_hidden_size=32, num_layers=2, num_attention_heads=2),
        mgvq=MGVQConfig(**mgvq),
        method=MethodConfig(**chosen),
        lora=lora or LoraConfig(),
    )


def tiny_weights(model: ModelConfig, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Random weights in their stored global form, and the MGVQ they go with (None where anchors are not its)."""
    torch.manual_seed(seed)
    tensors = {weight.name: torch.randn(weight.shape) * 0.2 for weight in weights(model)}
    if not model.has_mgvq:
        return tensors, None
    mgvq = build_mgvq(model.mgvq, encoder_only=True).state_dict()
    tensors["frontend.codebook.weight"] = mgvq["quantize.embedding.weight"].clone()
    return tensors, mgvq


def tiny_tokenizer(folder: Path, model_type: str = "bpe", **options) -> Path:
    """A sentencepiece model trained on the spot."""
    words = "what shape is in the image ? red green blue circle triangle rectangle yes no USER ASSISTANT color does it contain a there"
    rng = random.Random(0)
    lines = [" ".join(rng.choices(words.split(), k=8)) for _ in range(400)]
    prefix = folder / f"{model_type}{len(list(folder.iterdir()))}"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(prefix),
        model_type=model_type,
        vocab_size=options.pop("vocab_size", 400),
        byte_fallback=options.pop("byte_fallback", True),
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return prefix.with_suffix(".model")


class Memory:
    """A checkpoint's reader over tensors in memory."""

    def __init__(self, config: RunConfig, tensors: dict[str, Tensor]):
        self.config, self.tensors = config, tensors
        self.names = list(tensors)

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype


def made(folder: Path, precision: str = "fp32", seed: int = 0, words: dict | None = None, **method):
    """A run's configuration and weights, with its tokenizer (of options `words`) and MGVQ on disk."""
    tokenizer = tiny_tokenizer(folder, **(words or {}))
    ours = load_tokenizer(tokenizer)
    model = tiny_training_config(vocab_size=ours.vocab_size, voco=ours.voco_token_id, **method)
    tensors, _ = tiny_weights(model, seed)
    mgvq = build_mgvq(model.mgvq)
    save_mgvq(mgvq, model.mgvq, folder / "mgvq.safetensors")
    if model.has_mgvq:
        tensors["frontend.codebook.weight"] = mgvq.quantize.embedding.weight.detach().clone()
    training = TrainingConfig(precision=precision)
    config = RunConfig(model=model, training=training, tokenizer=str(tokenizer), mgvq_checkpoint=str(folder / "mgvq.safetensors"))
    frozen = mgvq.state_dict().items()
    return Memory(config, tensors), {k: v for k, v in frozen if k.startswith(("encoder.", "quant_conv.", "quantize.embedding."))}
