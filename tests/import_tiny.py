"""Tiny models of every family that is imported, as their files come: random weights, true names and configurations."""

import json
import math
from argparse import Namespace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from htc_megatron.model.mgvq import build_mgvq
from tests import data_tiny

VOCAB = 61  # divided by no TP
TEXT = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
    max_position_embeddings=128, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
)  # fmt: skip
VISION = dict(image_size=16, patch_size=8, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
LLAMA_SIZES = {key: value for key, value in TEXT.items() if key != "rope_parameters"} | {"rope_theta": 5000.0}  # as old files spell it


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights large enough for every one of them to show, norms and biases included; inner sums of ordinary size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan = math.prod(parameter.shape[1:]) if parameter.ndim > 1 else 4
            parameter.copy_(noise / fan**0.5 + (1.0 if parameter.ndim == 1 and "norm" in name and name.endswith("weight") else 0.0))
    return model.eval()


def llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    return randomise(LlamaForCausalLM(LlamaConfig(**TEXT | changes)), seed)


def qwen2(tied: bool = False, seed: int = 1, **changes) -> Qwen2ForCausalLM:
    return randomise(Qwen2ForCausalLM(Qwen2Config(**TEXT | changes, tie_word_embeddings=tied)), seed)


def clip(seed: int = 2, **changes) -> CLIPVisionModel:
    return randomise(CLIPVisionModel(CLIPVisionConfig(**VISION | changes)), seed)


def llava(seed: int = 3, text: dict | None = None, vision: dict | None = None) -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT | (text or {})), vision_config=CLIPVisionConfig(**VISION | (vision or {})), image_token_id=VOCAB - 2
    )
    return randomise(LlavaForConditionalGeneration(config), seed)


def original_llava(model: LlavaForConditionalGeneration, tower: bool = True) -> tuple[dict[str, Tensor], dict]:
    """The names and the flat configuration of LLaVA's own code (LlavaLlamaForCausalLM) for a model."""
    rows = [("model.language_model.", "model."), ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model.")]
    rows += [(f"model.multi_modal_projector.linear_{n}.", f"model.mm_projector.{2 * n - 2}.") for n in (1, 2)]
    tensors = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in rows:
            if name.startswith(ours):
                name = theirs + name.removeprefix(ours)
                break
        if tower or "vision_tower" not in name:
            tensors[name] = tensor.clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # a buffer that old files hold
    config = dict(
        LLAMA_SIZES, model_type="llava", architectures=["LlavaLlamaForCausalLM"], mm_projector_type="mlp2x_gelu",
        mm_vision_tower="openai/clip-vit-large-patch14-336", mm_vision_select_layer=-2, mm_vision_select_feature="patch",
        mm_use_im_start_end=False, mm_hidden_size=32, torch_dtype="float32", hidden_act="silu",
    )  # fmt: skip
    return tensors, config


def write(folder: Path, tensors: dict[str, Tensor], config: dict | None, form: str = "safetensors") -> Path:
    """A folder with a configuration and weights. form: safetensors | bin, with -sharded for three files and an index."""
    folder.mkdir(parents=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    suffix, stem = (".safetensors", "model") if form.startswith("safetensors") else (".bin", "pytorch_model")
    put = (lambda t, p: save_file(t, p, {"format": "pt"})) if suffix == ".safetensors" else torch.save
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if not form.endswith("-sharded"):
        put(tensors, folder / (stem + suffix))
        return folder
    places = {}
    for number in range(3):
        file = f"{stem}-{number + 1:05d}-of-00003{suffix}"
        part = dict(list(tensors.items())[number::3])
        put(part, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def mgvq_file(path: Path, seed: int = 4) -> Path:
    """A file as the authors publish it: a pickle with the weights under "model" and a Namespace beside them."""
    torch.manual_seed(seed)
    weights = build_mgvq(data_tiny.MGVQ).state_dict()
    torch.save({"model": {f"module.{name}": tensor for name, tensor in weights.items()}, "args": Namespace(lr=1e-4)}, path)
    return path


def whole_clip(seed: int = 2) -> CLIPModel:
    """CLIP with its text tower, as openai/clip-vit-large-patch14-336 comes."""
    text = dict(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, bos_token_id=0, eos_token_id=1
    )
    return randomise(CLIPModel(CLIPConfig(vision_config=VISION, text_config=text)), seed)
