"""MGVQ: the discrete image tokenizer (arXiv 2507.07997), encoder, group quantiser and decoder, sizes free.

An image [3, s, s] in [-1, 1] becomes a grid of latents; each latent's channels are split into groups and every group is
replaced by the nearest row, in angle, of its own part of one codebook. The convolutional blocks are those of the deep
compression autoencoder (arXiv 2410.10733). Attribute names give exactly the tensor names of the public checkpoints
(`mgvq_f16c32_g8.pt` and its kin), so a state dict needs no renaming. This file needs torch alone: it travels with exports.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

USAGE_WINDOW = 65536  # assignments a group remembers while it trains; the width of the public `quantize.codebook_used`
USAGE_DECAY = 0.01  # share of a new batch in the running usage `quantize.embed_prob`, as published
BICUBIC = 3  # PIL.Image.Resampling.BICUBIC, by value so that PIL is not imported here
MAX_ROWS = 2**15  # codes are stored as int16


def mgvq_crop(image, size: int) -> Tensor:
    """A PIL image as the square that MGVQ sees: [3, size, size] uint8.

    RGB, short side resized to `size` (bicubic), centre crop: the preparation of the public evaluation code.
    """
    width, height = image.size
    if width < height:
        shape = (size, round(height / width * size))
    else:
        shape = (round(width / height * size), size)
    image = image.convert("RGB").resize(shape, resample=BICUBIC)
    left, top = (shape[0] - size) // 2, (shape[1] - size) // 2
    image = image.crop((left, top, left + size, top + size))
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1).contiguous()


def mgvq_scale(crop: Tensor) -> Tensor:
    """uint8 of any shape -> float32 in [-1, 1]."""
    return (crop.float() / 255 - 0.5) * 2


def mgvq_pixels(image, size: int) -> Tensor:
    """A PIL image as MGVQ's encoder wants it: [3, size, size] float32 in [-1, 1]."""
    return mgvq_scale(mgvq_crop(image, size))


def codebook_lookup(codes: Tensor, codebook: Tensor, groups: int) -> Tensor:
    """Codes [..., positions, groups] of any integer type -> q [..., channels * positions], channel-major.

    `codebook` is the raw table [codebook_size, group_channels]; group i owns rows [i * rows, (i + 1) * rows) with
    rows = codebook_size / groups. q[c * positions + p] with c = group_channels * g + j is the L2-normalised row
    `codes[p, g]` of group g at j. Normalised in fp32, returned in the codebook's dtype. Differentiable in the codebook.
    A code outside its group's rows raises IndexError (on CUDA a device assertion).
    """
    table = codebook.view(groups, -1, codebook.shape[-1])
    rows = table[torch.arange(groups, device=codes.device), codes.long()]  # [..., positions, groups, group_channels]
    rows = F.normalize(rows.float(), dim=-1).to(codebook.dtype)
    return rows.flatten(-2).transpose(-1, -2).flatten(-2)


def channel_mean(x: Tensor, channels: int, factor: int) -> Tensor:
    """Shortcut past a downsampling: pixels folded into channels, neighbours averaged until `channels` are left."""
    x = F.pixel_unshuffle(x, factor)
    return x.unflatten(1, (channels, -1)).mean(2)


def channel_repeat(x: Tensor, channels: int, factor: int) -> Tensor:
    """Shortcut past an upsampling: every channel repeated, then unfolded into pixels."""
    return F.pixel_shuffle(x.repeat_interleave(channels * factor**2 // x.shape[1], dim=1), factor)


def identity(x: Tensor) -> Tensor:
    return x


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Where products must stay in fp32 although the caller runs under autocast."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


class RMSNorm2d(nn.Module):
    """RMS over the channels of each pixel, with weight and bias; in fp32."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + self.eps)
        return (wide * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)).to(x.dtype)


class Conv(nn.Module):
    """Convolution that keeps the side, then norm and activation where given."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        groups: int = 1,
        bias: bool = True,
        norm: Callable[[int], nn.Module] | None = None,
        activation: Callable[[Tensor], Tensor] = identity,
    ):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=bias)
        self.norm = nn.Identity() if norm is None else norm(outputs)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.conv(x)))


class Chain(nn.Module):
    """Modules one after the other."""

    def __init__(self, modules: Sequence[nn.Module]):
        super().__init__()
        self.op_list = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.op_list:
            x = module(x)
        return x


class Residual(nn.Module):
    """main(x) + shortcut(x); the shortcut has no weights."""

    def __init__(self, main: nn.Module, shortcut: Callable[[Tensor], Tensor] = identity):
        super().__init__()
        self.main = main
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + self.shortcut(x)


class Downsample(nn.Module):
    """Half the side: convolution to a quarter of the channels, pixels folded into channels."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = Conv(inputs, outputs // 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(self.conv(x), 2)


class Upsample(nn.Module):
    """Twice the side: convolution to four times the channels, channels unfolded into pixels."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = Conv(inputs, outputs * 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(x), 2)


class LinearAttention(nn.Module):
    """ReLU linear attention over all pixels (arXiv 2205.14756); each head's q, k, v lie side by side in qkv's channels."""

    def __init__(self, channels: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.qkv = Conv(channels, 3 * channels, kernel=1, bias=False)
        self.proj = Conv(channels, channels, kernel=1, bias=False, norm=RMSNorm2d)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        heads = self.qkv(x).float().flatten(2).unflatten(1, (-1, 3 * self.head_dim))
        q, k, v = heads.split(self.head_dim, dim=2)  # [b, heads, head_dim, pixels]
        v = F.pad(v, (0, 0, 0, 1), value=1.0)  # a row of ones sums the weights
        with no_autocast(x):  # sums over all pixels, and a quotient of them: fp32
            mixed = (v @ k.relu().transpose(-1, -2)) @ q.relu()
        out = mixed[:, :, :-1] / (mixed[:, :, -1:] + 1e-15)
        return self.proj(out.flatten(1, 2).unflatten(-1, (height, width)).to(x.dtype))


class GatedConv(nn.Module):
    """Expand eightfold, mix neighbours depthwise, gate one half by the other, contract."""

    def __init__(self, channels: int):
        super().__init__()
        self.inverted_conv = Conv(channels, 8 * channels, kernel=1, activation=F.silu)
        self.depth_conv = Conv(8 * channels, 8 * channels, groups=8 * channels)
        self.point_conv = Conv(4 * channels, channels, kernel=1, bias=False, norm=RMSNorm2d)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.depth_conv(self.inverted_conv(x)).chunk(2, dim=1)
        return self.point_conv(value * F.silu(gate))


class EViTBlock(nn.Module):
    """Linear attention, then a gated convolution, each with its residual."""

    def __init__(self, channels: int, head_dim: int):
        super().__init__()
        self.context_module = Residual(LinearAttention(channels, head_dim))
        self.local_module = Residual(GatedConv(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.local_module(self.context_module(x))


def res_block(channels: int, norm: Callable[[int], nn.Module], activation: Callable[[Tensor], Tensor]) -> nn.Module:
    first = Conv(channels, channels, activation=activation)
    return Residual(nn.Sequential(OrderedDict(conv1=first, conv2=Conv(channels, channels, bias=False, norm=norm))))


class Encoder(nn.Module):
    """Pixels [b, 3, s, s] -> latents [b, latent_channels, s / f, s / f], f = 2 ** stages."""

    def __init__(self, widths: Sequence[int], depths: Sequence[int], blocks: Sequence[str], head_dim: int, latent_channels: int):
        super().__init__()
        self.project_in = Downsample(3, widths[0])
        # Stage 0, at full resolution, is empty in every public model; it keeps the numbering of the tensor names.
        stages = [Chain([])]
        for i, (width, depth, block) in enumerate(zip(widths, depths, blocks, strict=True)):
            modules = [res_block(width, RMSNorm2d, F.silu) if block == "res" else EViTBlock(width, head_dim) for _ in range(depth)]
            if i + 1 < len(widths):
                modules.append(Residual(Downsample(width, widths[i + 1]), partial(channel_mean, channels=widths[i + 1], factor=2)))
            stages.append(Chain(modules))
        self.stages = nn.ModuleList(stages)
        shortcut = partial(channel_mean, channels=latent_channels, factor=1)
        self.project_out = Residual(Chain([Conv(widths[-1], latent_channels)]), shortcut)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project_in(x)
        for stage in self.stages:
            x = stage(x)
        return self.project_out(x)


class Decoder(nn.Module):
    """Latents [b, latent_channels, h, w] -> pixels [b, 3, f h, f w]; stages are numbered as the encoder's and run from the last."""

    def __init__(self, widths: Sequence[int], depths: Sequence[int], blocks: Sequence[str], head_dim: int, latent_channels: int):
        super().__init__()
        shortcut = partial(channel_repeat, channels=widths[-1], factor=1)
        self.project_in = Residual(Conv(latent_channels, widths[-1]), shortcut)
        stages = [Chain([])]
        for i, (width, depth, block) in enumerate(zip(widths, depths, blocks, strict=True)):
            modules: list[nn.Module] = []
            if i + 1 < len(widths):
                modules.append(Residual(Upsample(widths[i + 1], width), partial(channel_repeat, channels=width, factor=2)))
            # Unlike the encoder's, the decoder's residual blocks use batch norm and ReLU.
            modules += [res_block(width, nn.BatchNorm2d, F.relu) if block == "res" else EViTBlock(width, head_dim) for _ in range(depth)]
            stages.append(Chain(modules))
        self.stages = nn.ModuleList(stages)
        self.project_out = Chain([RMSNorm2d(widths[0]), nn.ReLU(), Upsample(widths[0], 3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.project_in(x)
        for stage in reversed(self.stages):
            x = stage(x)
        return self.project_out(x)


class GroupQuantiser(nn.Module):
    """One table [codebook_size, group_channels]; group i owns rows [i * rows, (i + 1) * rows) and its slice of the channels.

    Latents and rows are L2-normalised over a group's channels; the code is the row with the largest cosine.
    `codebook_used` [groups, USAGE_WINDOW] holds the latest codes of training, oldest first, -1 where there is none yet;
    `embed_prob` [groups, rows] is the running share of each code. Both move in training mode only, the table never by itself.
    """

    def __init__(self, codebook_size: int, group_channels: int, groups: int, usage: bool):
        super().__init__()
        self.groups = groups
        self.embedding = nn.Embedding(codebook_size, group_channels)
        nn.init.normal_(self.embedding.weight)
        with torch.no_grad():
            self.embedding.weight.copy_(F.normalize(self.embedding.weight, dim=-1))
        if usage:
            self.register_buffer("codebook_used", torch.full((groups, USAGE_WINDOW), -1.0))
            self.register_buffer("embed_prob", torch.zeros(groups, codebook_size // groups))

    def directions(self, latents: Tensor) -> Tensor:
        """Latents [b, channels, h, w] -> unit vectors [b, h * w, groups, group_channels], fp32."""
        return F.normalize(latents.float().flatten(2).transpose(1, 2).unflatten(-1, (self.groups, -1)), dim=-1)

    @torch.no_grad()
    def codes(self, directions: Tensor) -> Tensor:
        """Unit vectors [b, positions, groups, group_channels] -> codes [b, positions, groups] int16."""
        table = F.normalize(self.embedding.weight.float(), dim=-1).view(self.groups, -1, directions.shape[-1])
        # Group by group: all at once would hold `groups` times the similarities.
        with no_autocast(directions):
            nearest = [(directions[:, :, g] @ table[g].T).argmax(-1) for g in range(self.groups)]
        return torch.stack(nearest, dim=-1).to(torch.int16)

    @torch.no_grad()
    def record(self, codes: Tensor) -> None:
        """Codes [b, positions, groups] enter the window and the running usage."""
        flat = codes.flatten(0, 1).T.long()
        recent = flat[:, -USAGE_WINDOW:]
        kept = self.codebook_used[:, recent.shape[1] :].clone()
        self.codebook_used[:, : kept.shape[1]] = kept
        self.codebook_used[:, kept.shape[1] :] = recent.to(self.codebook_used.dtype)
        share = torch.zeros_like(self.embed_prob).scatter_add_(1, flat, torch.ones_like(flat, dtype=self.embed_prob.dtype))
        self.embed_prob.lerp_(share / flat.shape[1], USAGE_DECAY)


class MGVQOutput(NamedTuple):
    """What training needs of one forward pass."""

    pixels: Tensor  # reconstruction [b, 3, s, s]
    codes: Tensor  # [b, positions, groups] int16
    directions: Tensor  # normalised latents [b, positions, groups, group_channels]: where new rows are seeded from
    codebook_loss: Tensor  # mean squared distance, pulls rows to latents
    commitment_loss: Tensor  # the same distance, pulls latents to rows


class MGVQ(nn.Module):
    """Encoder, group quantiser and decoder. Defaults: the public f16c32 g8 model at 336 px.

    widths, depths, decoder_depths, blocks ("res" | "evit"): one entry a stage, finest first; every stage halves the side.
    encoder_only: no decoder and no usage statistics, which is all that encoding and `lookup` need.
    Sizes that do not fit together raise ValueError.
    """

    def __init__(
        self,
        image_size: int = 336,
        widths: Sequence[int] = (256, 512, 512, 1024),
        depths: Sequence[int] = (4, 8, 2, 2),
        decoder_depths: Sequence[int] = (5, 10, 2, 2),
        blocks: Sequence[str] = ("res", "res", "evit", "evit"),
        head_dim: int = 32,
        latent_channels: int = 32,
        groups: int = 8,
        codebook_size: int = 16384,
        encoder_only: bool = False,
    ):
        super().__init__()
        check_sizes(image_size, widths, depths, decoder_depths, blocks, head_dim, latent_channels, groups, codebook_size)
        self.image_size = image_size
        self.groups = groups
        self.encoder = Encoder(widths, depths, blocks, head_dim, latent_channels)
        self.quant_conv = nn.Conv2d(latent_channels, latent_channels, 1, groups=groups)
        self.quantize = GroupQuantiser(codebook_size, latent_channels // groups, groups, usage=not encoder_only)
        if not encoder_only:
            self.decoder = Decoder(widths, decoder_depths, blocks, head_dim, latent_channels)
            self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1, groups=groups)

    def directions(self, pixels: Tensor) -> Tensor:
        """Pixels [b, 3, h, w] in [-1, 1] -> normalised latents [b, positions, groups, group_channels], fp32."""
        return self.quantize.directions(self.quant_conv(self.encoder(pixels.to(self.quant_conv.weight.dtype))))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [b, 3, s, s] in [-1, 1] -> codes [b, positions, groups] int16, positions row by row. Changes no state."""
        return self.quantize.codes(self.directions(pixels))

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes [b, positions, groups] -> q [b, latent_channels * positions], channel-major (`codebook_lookup`)."""
        return codebook_lookup(codes, self.quantize.embedding.weight, self.groups)

    def decode(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Codes [b, positions, groups] -> pixels [b, 3, s, s], about [-1, 1]. `grid` (rows, columns) if not square."""
        side = round(codes.shape[1] ** 0.5)
        return self.decode_latents(self.lookup(codes).view(len(codes), -1, *(grid or (side, side))))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Quantised latents [b, latent_channels, h, w] (q, unflattened) -> pixels [b, 3, f h, f w]."""
        return self.decoder(self.post_quant_conv(latents))

    def forward(self, pixels: Tensor) -> MGVQOutput:
        """Reconstruct, with gradients passed straight through the quantiser. In training mode, records the usage of codes."""
        latents = self.quant_conv(self.encoder(pixels))
        directions = self.quantize.directions(latents)
        codes = self.quantize.codes(directions)
        if self.training:
            self.quantize.record(codes)
        shape = latents.shape
        quantised = self.lookup(codes).float().view(shape)
        flat = directions.flatten(2).transpose(1, 2).reshape(shape)
        straight = flat + (quantised - flat).detach()
        return MGVQOutput(
            pixels=self.decode_latents(straight.to(latents.dtype)),
            codes=codes,
            directions=directions.detach(),
            codebook_loss=F.mse_loss(quantised, flat.detach()),
            commitment_loss=F.mse_loss(flat, quantised.detach()),
        )


def check_sizes(
    image_size: int,
    widths: Sequence[int],
    depths: Sequence[int],
    decoder_depths: Sequence[int],
    blocks: Sequence[str],
    head_dim: int,
    latent_channels: int,
    groups: int,
    codebook_size: int,
) -> None:
    """ValueError with a sentence if MGVQ cannot have these sizes."""
    stages = len(widths)
    for name, value in (("depths", depths), ("decoder_depths", decoder_depths), ("blocks", blocks)):
        if len(value) != stages or not stages:
            raise ValueError(f"mgvq.{name} has {len(value)} entries; widths has {stages}, and there is one entry a stage, at least one.")
    factor = 2**stages
    if image_size <= 0 or image_size % factor:
        raise ValueError(f"mgvq.image_size is {image_size}; with {stages} stages it must be a positive multiple of {factor}.")
    if min(groups, latent_channels, codebook_size) < 1 or latent_channels % groups or codebook_size % groups:
        raise ValueError(f"mgvq.latent_channels {latent_channels} and codebook_size {codebook_size} must be multiples of groups, {groups}.")
    if codebook_size // groups > MAX_ROWS:
        raise ValueError(f"mgvq.codebook_size {codebook_size} gives each of {groups} groups over {MAX_ROWS} rows; codes are int16.")
    for i, (width, block) in enumerate(zip(widths, blocks, strict=True)):
        if block not in ("res", "evit"):
            raise ValueError(f'mgvq.blocks[{i}] is {block!r}; "res" and "evit" are known.')
        if width < 1 or width % 4 or (block == "evit" and width % head_dim):
            wanted = f"4 and of head_dim {head_dim}" if block == "evit" else "4"
            raise ValueError(f"mgvq.widths[{i}] is {width}; a width of a stage of {block} blocks is a multiple of {wanted}.")
        # The shortcuts average 4 * width channels into the next stage's, and repeat them on the way back.
        if i and (4 * widths[i - 1]) % width:
            raise ValueError(f"mgvq.widths[{i}] is {width}; it must divide 4 times the width before it, {4 * widths[i - 1]}.")
    if widths[-1] % latent_channels:
        raise ValueError(f"mgvq.latent_channels is {latent_channels}; it must divide the last width, {widths[-1]}.")
