"""Images by themselves: an image's voco tokens computed apart from any text, and put to use in any prompt.

With mask star or full and image_sees own, what an image's tokens compute depends on the image and on nothing around it but its
place, which RoPE alone knows: a key at position p is R(p) k, and R(p + d) = R(d) R(p). Keys are kept as if the image began at
position 0 and are turned by the position where it begins. Kept tensors are [images, layers, 2, heads, K, head_dim], keys and values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .mask_htc_vlm import visual_offsets

PLAIN_ROPE = ("default", "linear", "llama3", "yarn")  # frequencies that do not depend on a sequence's length


def why_not_alone(config: PreTrainedConfig) -> str:
    """Why an image's keys and values cannot be computed without what stands around it: a sentence, empty where they can."""
    kind = config.text_config.rope_parameters.get("rope_type", "default")
    if config.mask == "none":
        return "mask is none: the image is not compressed, and all its tokens' keys and values stay in the prompt; wanted star or full"
    if config.image_sees != "own":
        return f"image_sees is {config.image_sees}: an image's keys and values depend on what stands in front of it; wanted own"
    if kind not in PLAIN_ROPE:
        return f"rope_type is {kind}: its frequencies change with the sequence's length; wanted {', '.join(PLAIN_ROPE)}"
    return ""


def kept_shape(config: PreTrainedConfig) -> tuple[int, ...]:
    """Of one image: (layers, 2, heads, K, head_dim)."""
    text = config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return (text.num_hidden_layers, 2, text.num_key_value_heads, config.num_voco_tokens, head_dim)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of x [..., head_dim] by the angles' cosines and sines, which broadcast to it."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def turn(keys: Tensor, rotary: nn.Module, start: Tensor) -> Tensor:
    """Keys [images, layers, heads, K, head_dim] of images that begin at 0, moved to begin at `start` [images]. Angles in fp32."""
    wide = keys.float()
    cos, sin = (part / rotary.attention_scaling for part in rotary(wide, position_ids=start[:, None]))
    return rotate(wide, cos[:, None, None], sin[:, None, None]).to(keys.dtype)


def compress_images(backbone: nn.Module, config: PreTrainedConfig, features: Tensor, voco: Tensor) -> Tensor:
    """Keys and values of images' voco tokens, [images, layers, 2, heads, K, head_dim], as if each image began at position 0.

    backbone: LlamaModel or Qwen2Model. features: V_hy [images, N, hidden]. voco: embedding row of the placeholder, [hidden].
    Nothing is computed that no voco token reads: in the last layer V_hy is gone, in the one before only its keys and values are left,
    and a V_hy row that sees itself alone (mask star) is its own value.
    """
    images, visual, width = features.shape
    run, count = config.num_voco_tokens, len(backbone.layers)
    hidden = torch.cat([features, voco.expand(images, run, width)], 1)
    offsets, _ = visual_offsets(config)
    cos, sin = (part[:, None] for part in backbone.rotary_emb(hidden, position_ids=offsets[None].to(hidden.device)))
    kept = []
    for index, layer in enumerate(backbone.layers):
        attention, goes_on = layer.self_attn, index < count - 2  # whether a later layer reads V_hy's rows
        if index == count - 1:
            hidden, cos, sin = (part[..., -run:, :] for part in (hidden, cos, sin))
        normed = layer.input_layernorm(hidden)
        keys, values = (_heads(linear(normed), attention.head_dim) for linear in (attention.k_proj, attention.v_proj))
        keys = rotate(keys, cos, sin)
        kept.append(torch.stack([keys[:, :, -run:], values[:, :, -run:]], 1))
        if index == count - 1:
            break
        asking = slice(None) if goes_on and config.mask == "full" else slice(visual, None)
        queries = rotate(_heads(attention.q_proj(normed[:, asking]), attention.head_dim), cos[:, :, asking], sin[:, :, asking])
        all_keys, all_values = (part.repeat_interleave(attention.num_key_value_groups, 1) for part in (keys, values))
        rows, columns = queries.shape[2], all_keys.shape[2]
        whole = rows == columns  # else the last rows, each up to itself; a single one needs no mask
        up_to_itself = None if whole or rows == 1 else torch.ones(rows, columns, dtype=torch.bool, device=keys.device).tril(columns - rows)
        seen = F.scaled_dot_product_attention(queries, all_keys, all_values, up_to_itself, is_causal=whole, scale=attention.scaling)
        if goes_on and config.mask == "star":
            seen = torch.cat([all_values[:, :, :visual], seen], 2)
        if not goes_on:
            hidden = hidden[:, visual:]
        hidden = hidden + attention.o_proj(seen.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return torch.stack(kept, 1)


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """[images, n, heads * head_dim] -> [images, heads, n, head_dim]."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)
