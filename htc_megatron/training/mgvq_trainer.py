"""Train MGVQ on a folder of images: reconstruction, codebook and commitment losses, dead codes re-seeded.

One process, CPU or one GPU. A run is exact to resume: images come in an order that depends on the seed alone, and weights,
optimiser and usage statistics are all in the saved state. The losses are those of the public quantiser (arXiv 2507.07997);
its perceptual and adversarial terms need networks of their own and are left out.
"""

import json
import math
import os
import time
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from pydantic.dataclasses import dataclass
from safetensors import safe_open
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from htc_megatron.config import STRICT, ConfigError, MGVQConfig
from htc_megatron.hf.modeling_mgvq import MGVQ, mgvq_scale
from htc_megatron.model.mgvq import build_mgvq, load_mgvq, save_mgvq, write_safetensors
from htc_megatron.training.mgvq_codes import damp_residuals, reset_dead_codes, spread_latents, used_codes
from htc_megatron.training.mgvq_images import Batches, ImageStore, find_images

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
STATE = "training_state.safetensors"
WEIGHTS = "mgvq.safetensors"
REPORT = "report.json"
# A resumed run may change these; everything else decides what the run computes.
FREE_ON_RESUME = {"output_dir", "num_workers", "eval_interval", "save_interval", "log_interval", "resume", "max_bad_share"}


@dataclass(config=STRICT)
class MGVQTrainingConfig:
    """A run of the MGVQ trainer."""

    model: MGVQConfig = field(default_factory=MGVQConfig)
    images: str = ""  # folder, searched with its subfolders, or a text file with one image path a line
    output_dir: str = "runs/mgvq"  # mgvq.safetensors, reconstructions.png, report.json, tensorboard/, training_state.safetensors
    init_from: str = ""  # MGVQ file to start from: the public .pt or a .safetensors of ours; empty: random weights
    steps: Positive = 20000
    batch_size: Positive = 32
    lr: Annotated[float, Field(gt=0)] = 1e-3
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    warmup_ratio: Share = 0.03  # share of steps
    weight_decay: Annotated[float, Field(ge=0)] = 0.0  # convolution kernels only
    beta1: Share = 0.9
    beta2: Share = 0.95
    clip_grad: Annotated[float, Field(ge=0)] = 1.0  # global norm; 0: no clipping
    reconstruction: Literal["l1", "l2"] = "l2"
    codebook_weight: Annotated[float, Field(ge=0)] = 1.0
    commitment_weight: Annotated[float, Field(ge=0)] = 0.25
    reset_interval: Count = 20  # steps between resets of the codes unused since the last one; 0: never
    reset_until: Share = 0.7  # share of steps after which codes are left alone, so that the decoder settles on them
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast; weights, attention sums and quantiser stay fp32
    validation_images: Count = 64  # held out of training; 0: none
    eval_interval: Count = 0  # steps; 0: at the end only
    save_interval: Count = 0  # steps; 0: at the end only
    log_interval: Positive = 10
    seed: Count = 0
    num_workers: Positive = 1  # decoding threads
    max_bad_share: Share = 0.001  # broken images tolerated, as a share of all
    resume: Literal["auto", "never"] = "auto"  # auto: go on from output_dir's saved state if there is one


def train_mgvq(config: MGVQTrainingConfig, stop_after: int | None = None, progress: bool = True) -> dict:
    """Train; returns what output_dir/report.json then holds: steps, seconds, PSNR in dB, use of the codes.

    stop_after: save and leave once this many steps are done in all, as a job with a time limit does; a later call goes on.
    ConfigError for anything the configuration or the images do not allow.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}; the MGVQ trainer runs in one process.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    output = Path(config.output_dir)
    paths = find_images(config.images)
    shuffled = torch.randperm(len(paths), generator=torch.Generator().manual_seed(config.seed))
    held_out, indices = shuffled[: config.validation_images].tolist(), shuffled[config.validation_images :]
    store = ImageStore(paths, config.model.image_size, output / "broken_images.txt", config.max_bad_share)
    batches = Batches(store, indices, config.batch_size, config.seed, config.num_workers)

    torch.manual_seed(config.seed)
    model = load_mgvq(config.init_from, config.model) if config.init_from else build_mgvq(config.model)
    model.requires_grad_(True).train().to(device, memory_format=torch.channels_last)
    optimizer = build_optimizer(model, config)
    start = 0
    if config.resume == "auto" and (output / STATE).is_file():
        start = load_state(output / STATE, model, optimizer, config)
    elif not config.init_from:
        damp_residuals(model)
        spread_latents(model, mgvq_scale(batches[0].to(device)), config.seed)
    last = min(config.steps, stop_after or config.steps)
    if start >= last and (output / REPORT).is_file():
        return json.loads((output / REPORT).read_text())
    validation = [store[index] for index in held_out]

    writer = SummaryWriter(str(output / "tensorboard"), purge_step=start + 1)
    bar = tqdm(range(start, last), initial=start, total=config.steps, desc="MGVQ", unit="step", disable=not progress, smoothing=0.05)
    began, figures = time.monotonic(), {}
    try:
        for step in bar:
            pixels = mgvq_scale(batches[step].to(device)).contiguous(memory_format=torch.channels_last)
            measured = train_step(model, optimizer, pixels, config, step)
            done = step + 1
            if done % config.log_interval == 0 or done == last:
                figures = log_step(writer, model, measured, config, done)
                figures["images_per_second"] = (done - start) * config.batch_size / (time.monotonic() - began)
                writer.add_scalar("speed/images_per_second", figures["images_per_second"], done)
                bar.set_postfix(loss=f"{figures['loss']:.4f}", psnr=f"{figures['psnr']:.1f}", used=f"{figures['used_codes_share']:.0%}")
            if validation and config.eval_interval and done % config.eval_interval == 0 and done < last:
                writer.add_scalar("validation/psnr", evaluate(model, validation, device, config.batch_size)[0], done)
            if config.save_interval and done % config.save_interval == 0 and done < last:
                save_state(output / STATE, model, optimizer, config, done)
    finally:
        bar.close()
        batches.close()
        writer.flush()

    save_state(output / STATE, model, optimizer, config, last)
    save_mgvq(model, config.model, output / WEIGHTS)
    report = {"steps": last, "seconds": round(time.monotonic() - began, 2), "images": len(paths), "broken_images": len(store.bad)}
    report |= {"training": figures, "parameters": sum(p.numel() for p in model.parameters())}
    if validation:
        psnr, used, pairs = evaluate(model, validation, device, config.batch_size)
        report["validation"] = {"images": len(validation), "psnr": psnr, "used_codes_per_group": used}
        writer.add_scalar("validation/psnr", psnr, last)
        save_pairs(pairs, output / "reconstructions.png")
    (output / REPORT).write_text(json.dumps({**report, "config": asdict(config)}, indent=2) + "\n")
    writer.close()
    return report


def train_step(model: MGVQ, optimizer: torch.optim.AdamW, pixels: Tensor, config: MGVQTrainingConfig, step: int) -> dict[str, Tensor]:
    """One update on `pixels` [b, 3, s, s] in [-1, 1]; `step` counts from 0. Returns scalars, still on the device."""
    rate = learning_rate(config, step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        out = model(pixels)
    distance = F.l1_loss if config.reconstruction == "l1" else F.mse_loss
    reconstruction = distance(out.pixels.float(), pixels)
    loss = reconstruction + config.codebook_weight * out.codebook_loss + config.commitment_weight * out.commitment_loss
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad or math.inf)
    optimizer.step()
    if config.reset_interval and (step + 1) % config.reset_interval == 0 and step < config.reset_until * config.steps:
        window = config.reset_interval * out.codes.shape[0] * out.codes.shape[1]
        reset_dead_codes(model.quantize, optimizer, out.directions, window, config.seed * 1_000_003 + step)
    error = F.mse_loss(out.pixels.detach().float().clamp(-1, 1), pixels)
    return {
        "loss": loss.detach(),
        "reconstruction": reconstruction.detach(),
        "codebook": out.codebook_loss.detach(),
        "commitment": out.commitment_loss.detach(),
        "gradient_norm": norm.detach(),
        "mse": error,
    }


def learning_rate(config: MGVQTrainingConfig, step: int) -> float:
    """Linear warm-up, then cosine from lr to min_lr."""
    warmup = round(config.warmup_ratio * config.steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    share = (step - warmup) / max(1, config.steps - warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * share))


def build_optimizer(model: MGVQ, config: MGVQTrainingConfig) -> torch.optim.AdamW:
    """AdamW; only convolution kernels decay: norms and biases should not, and the codebook's rows have no length that counts."""
    kernels = [p for p in model.parameters() if p.ndim == 4]
    others = [p for p in model.parameters() if p.ndim != 4]
    groups = [{"params": kernels, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2))


def psnr_of(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error of pixels in [-1, 1]."""
    return 10 * math.log10(4 / max(mse, 1e-12))


def log_step(writer: SummaryWriter, model: MGVQ, measured: dict[str, Tensor], config: MGVQTrainingConfig, done: int) -> dict:
    """Write the figures of a step to TensorBoard and return them. ConfigError if the loss is not finite."""
    values = {name: value.item() for name, value in measured.items()}
    if not math.isfinite(values["loss"] + values["gradient_norm"]):
        raise ConfigError(f"the loss is {values['loss']} after {done} steps; lr {config.lr} is too high, or clip_grad {config.clip_grad}.")
    window = max(1, config.reset_interval or config.log_interval) * config.batch_size * config.model.grid**2
    used = used_codes(model.quantize, window).sum(1).tolist()
    share = model.quantize.embed_prob / model.quantize.embed_prob.sum(1, keepdim=True)
    perplexity = torch.exp(torch.special.entr(share).sum(1)).tolist()
    values["psnr"] = psnr_of(values.pop("mse"))
    for name, value in values.items():
        writer.add_scalar(f"train/{name}", value, done)
    writer.add_scalar("train/lr", learning_rate(config, done - 1), done)
    for g, (count, spread) in enumerate(zip(used, perplexity, strict=True)):
        writer.add_scalar(f"codes_used/group_{g}", count, done)
        writer.add_scalar(f"perplexity/group_{g}", spread, done)
    total = config.model.codebook_size
    return {**values, "used_codes_per_group": used, "used_codes_share": sum(used) / total, "perplexity_per_group": perplexity}


@torch.no_grad()
def evaluate(
    model: MGVQ, crops: list[Tensor], device: torch.device, batch_size: int
) -> tuple[float, list[int], list[tuple[Tensor, Tensor]]]:
    """PSNR (dB, of the mean squared error over all crops), distinct codes a group, and up to 8 (original, reconstruction)."""
    training = model.training
    model.eval()
    errors, codes, pairs = [], [], []
    for at in range(0, len(crops), batch_size):
        pixels = mgvq_scale(torch.stack(crops[at : at + batch_size]).to(device))
        codes.append(model.encode(pixels))
        out = model.decode(codes[-1]).clamp(-1, 1)
        errors += (out - pixels).square().flatten(1).mean(1).tolist()
        pairs += list(zip(pixels.cpu(), out.cpu(), strict=True))[: 8 - len(pairs)]
    model.train(training)
    flat = torch.cat(codes).flatten(0, 1)
    return psnr_of(sum(errors) / len(errors)), [len(flat[:, g].unique()) for g in range(flat.shape[1])], pairs


def save_pairs(pairs: list[tuple[Tensor, Tensor]], path: Path) -> None:
    """A PNG: originals above, reconstructions below."""
    rows = [torch.cat([pair[row] for pair in pairs], dim=2) for row in (0, 1)]
    picture = ((torch.cat(rows, dim=1) / 2 + 0.5) * 255).round().to(torch.uint8)
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)


def save_state(path: Path, model: MGVQ, optimizer: torch.optim.AdamW, config: MGVQTrainingConfig, step: int) -> None:
    """Everything a resumed run needs, in one safetensors file."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_safetensors(contiguous, path, {"step": str(step), "config": json.dumps(asdict(config))})


def load_state(path: Path, model: MGVQ, optimizer: torch.optim.AdamW, config: MGVQTrainingConfig) -> int:
    """Restore what save_state wrote; returns the steps done. ConfigError if it belongs to another run."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    saved, wanted = json.loads(metadata["config"]), json.loads(json.dumps(asdict(config)))
    differing = [name for name in wanted if name not in FREE_ON_RESUME and saved.get(name) != wanted[name]]
    if differing:
        seen = ", ".join(f"{name} {saved.get(name)} (now {wanted[name]})" for name in differing)
        raise ConfigError(f"{path} belongs to a run with other settings: {seen}. Choose another output_dir, or resume=never.")
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")})
    for name, parameter in model.named_parameters():
        state = {key: tensors[f"optimizer.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        device = parameter.device
        optimizer.state[parameter] = {key: value.to(device if value.ndim else "cpu") for key, value in state.items()}
    return int(metadata["step"])
