"""A tiny MGVQ and a second implementation of its networks, straight from the tensor names, to compare with."""

import torch
import torch.nn.functional as F
from torch import Tensor

from htc_megatron.config import MGVQConfig
from htc_megatron.hf.modeling_mgvq import MGVQ
from htc_megatron.model.mgvq import build_mgvq

TINY = MGVQConfig(
    image_size=32,
    widths=(8, 16, 16),
    depths=(1, 2, 1),
    decoder_depths=(2, 1, 1),
    blocks=("res", "evit", "evit"),
    head_dim=8,
    latent_channels=8,
    groups=4,
    codebook_size=64,
)


def tiny_mgvq(seed: int = 0, encoder_only: bool = False) -> MGVQ:
    """TINY in eval mode with every weight and statistic away from its trivial start."""
    torch.manual_seed(seed)
    model = build_mgvq(TINY, encoder_only).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model


def tiny_pixels(count: int = 2, seed: int = 0, side: int = TINY.image_size) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def rms(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    scaled = x / (x.pow(2).mean(dim=1, keepdim=True) + 1e-5).sqrt()
    return scaled * state[f"{name}.weight"][None, :, None, None] + state[f"{name}.bias"][None, :, None, None]


def batch_norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    mean, var, weight, bias = (state[f"{name}.{key}"][None, :, None, None] for key in ("running_mean", "running_var", "weight", "bias"))
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def conv(x: Tensor, state: dict[str, Tensor], name: str, groups: int = 1) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state.get(f"{name}.bias"), padding=weight.shape[-1] // 2, groups=groups)


def fold(x: Tensor) -> Tensor:
    """Pixels of a 2 x 2 square to channels: channel 4c + 2i + j is pixel (i, j) of channel c."""
    parts = [x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    return torch.stack(parts, dim=2).flatten(1, 2)


def unfold(x: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], x.shape[1] // 4, 2 * x.shape[2], 2 * x.shape[3])
    for i in (0, 1):
        for j in (0, 1):
            out[:, :, i::2, j::2] = x[:, 2 * i + j :: 4]
    return out


def mean_to(x: Tensor, channels: int) -> Tensor:
    size = x.shape[1] // channels
    return torch.stack([x[:, c * size : (c + 1) * size].mean(1) for c in range(channels)], dim=1)


def attention(x: Tensor, state: dict[str, Tensor], name: str, head_dim: int) -> Tensor:
    """The linear attention in its quadratic form: weights relu(q) . relu(k), normalised over the keys."""
    b, c, h, w = x.shape
    qkv = conv(x, state, f"{name}.qkv.conv").view(b, 3 * c, h * w)
    out = []
    for head in range(c // head_dim):
        start = head * 3 * head_dim
        q, k, v = (qkv[:, start + n * head_dim : start + (n + 1) * head_dim].transpose(1, 2) for n in range(3))
        weights = F.relu(q) @ F.relu(k).transpose(1, 2)
        out.append((weights / weights.sum(-1, keepdim=True).clamp_min(1e-15) @ v).transpose(1, 2))
    return rms(conv(torch.cat(out, 1).view(b, c, h, w), state, f"{name}.proj.conv"), state, f"{name}.proj.norm")


def block(x: Tensor, state: dict[str, Tensor], name: str, head_dim: int, decoder: bool) -> Tensor:
    if f"{name}.context_module.main.qkv.conv.weight" in state:
        x = x + attention(x, state, f"{name}.context_module.main", head_dim)
        name = f"{name}.local_module.main"
        wide = F.silu(conv(x, state, f"{name}.inverted_conv.conv"))
        wide = conv(wide, state, f"{name}.depth_conv.conv", groups=wide.shape[1])
        half = wide.shape[1] // 2
        out = conv(wide[:, :half] * F.silu(wide[:, half:]), state, f"{name}.point_conv.conv")
        return x + rms(out, state, f"{name}.point_conv.norm")
    inner = conv(x, state, f"{name}.main.conv1.conv")
    inner = conv(F.relu(inner) if decoder else F.silu(inner), state, f"{name}.main.conv2.conv")
    return x + (batch_norm if decoder else rms)(inner, state, f"{name}.main.conv2.norm")


def reference_latents(state: dict[str, Tensor], pixels: Tensor, config: MGVQConfig) -> Tensor:
    """Encoder and quant_conv: [b, latent_channels, h, w]."""
    x = fold(conv(pixels, state, "encoder.project_in.conv.conv"))
    for i, depth in enumerate(config.depths):
        for j in range(depth):
            x = block(x, state, f"encoder.stages.{i + 1}.op_list.{j}", config.head_dim, decoder=False)
        if i + 1 < len(config.widths):
            down = fold(conv(x, state, f"encoder.stages.{i + 1}.op_list.{depth}.main.conv.conv"))
            x = down + mean_to(fold(x), config.widths[i + 1])
    x = conv(x, state, "encoder.project_out.main.op_list.0.conv") + mean_to(x, config.latent_channels)
    return conv(x, state, "quant_conv", groups=config.groups)


def reference_pixels(state: dict[str, Tensor], latents: Tensor, config: MGVQConfig) -> Tensor:
    """post_quant_conv and decoder: [b, 3, s, s]."""
    x = conv(latents, state, "post_quant_conv", groups=config.groups)
    repeated = torch.stack([x[:, c * x.shape[1] // config.widths[-1]] for c in range(config.widths[-1])], dim=1)
    x = conv(x, state, "decoder.project_in.main.conv") + repeated
    for i in reversed(range(len(config.widths))):
        name, first = f"decoder.stages.{i + 1}.op_list", 0
        if i + 1 < len(config.widths):
            wide = 4 * config.widths[i]
            repeated = torch.stack([x[:, c * x.shape[1] // wide] for c in range(wide)], dim=1)
            x, first = unfold(conv(x, state, f"{name}.0.main.conv.conv")) + unfold(repeated), 1
        for j in range(config.decoder_depths[i]):
            x = block(x, state, f"{name}.{first + j}", config.head_dim, decoder=True)
    x = F.relu(rms(x, state, "decoder.project_out.op_list.0"))
    return unfold(conv(x, state, "decoder.project_out.op_list.2.conv.conv"))
