"""A training step of one process, forward, backward, clipping and AdamW: ours beside transformers' LLaMA and mcore's GPTModel.

All three have the same weights, the same projectors and the same (small, frozen) vision tower, so that what differs is the backbone:
(a) transformers' LLaMA with the mask as a [batch, 1, S, S] tensor through SDPA and logits at every place, as VoCo-LLaMA trains;
(b) megatron-core's GPTModel with its own layers, the same mask and logits at every place.
Ours runs through the engine that training uses (DeepSpeed ZeRO-1 on one process).

Samples are laid out as in a conversation about an image: the image, a question, and the answer, which alone is supervised. Where the
answer follows the image at once (`--question 0`, captions), its first word is predicted from `<voco>`, so that the last but one layer
is needed whole.

Each is measured in a process of its own, as its users run it: what our runtime does to its process on CPU (memory that is freed stays
with it, parallel/host_memory.py) must not speed up or slow down a peer. transformers is measured a second time with that setting, and
both ratios are told; megatron-core runs on CPU only inside our runtime, and has it. Each peer takes turns with ours.
"""

import argparse
import gc
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from htc_megatron.benchmarks.memory import allocated, peak_allocated
from htc_megatron.benchmarks.result import Result, Say, alternated, median_ratio, timed
from htc_megatron.benchmarks.workload import TEXT_BEFORE, num_parameters, random_batch
from htc_megatron.config import (
    BackboneConfig,
    ConfigError,
    MethodConfig,
    MGVQConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
    VisionConfig,
)
from htc_megatron.config_io import check, load_zero
from htc_megatron.model.layout import MicroBatch
from htc_megatron.model.mask import MaskRule, dense_mask
from htc_megatron.parallel import groups as process_groups
from htc_megatron.parallel.host_memory import keep_freed_memory

PEERS = {
    "transformers": "transformers' LLaMA, 4-D mask, SDPA",
    "transformers_kept": "the same, with freed memory kept as ours",
    "mcore": "mcore GPTModel, dense mask",
}
NOTHING_TO_REDUCE = {"reduce_bucket_size": 5_000_000, "contiguous_gradients": False}  # in one process buckets are but copies
IMPORTED = ["deepspeed", "megatron.core.models.gpt", "transformers.models.llama.modeling_llama", "htc_megatron.training.build"]
VOCO_ROW = "model.language_model.embed_tokens.weight"


def step_config(args: argparse.Namespace) -> RunConfig:
    """The run that is measured: `--batch` rows of one image and `--text` tokens. Raises ConfigError."""
    if args.text <= TEXT_BEFORE + args.question:
        raise ConfigError(f"--text is {args.text}, wanted more than the {TEXT_BEFORE + args.question} tokens before the answer")
    heads, side = args.hidden // args.head_dim, args.patch_side
    small = dict(depths=(1, 1, 1, 1), decoder_depths=(1, 1, 1, 1), blocks=("res",) * 4)  # only its codebook is used here
    model = ModelConfig(
        backbone=BackboneConfig(args.layers, args.hidden, args.hidden * 11 // 4, heads, heads, args.vocabulary),
        vision=VisionConfig(image_size=14 * side, hidden_size=64, ffn_hidden_size=64, num_layers=1, num_attention_heads=1),
        mgvq=MGVQConfig(image_size=112, widths=(32, 32, 32, 32), **small),
        method=MethodConfig(anchor_hidden_size=args.hidden, voco_token_id=args.vocabulary - 1),
    )
    length = model.tokens_per_image + args.text
    config = RunConfig(
        model=model,
        parallel=ParallelConfig(recompute=args.recompute),
        optimizer=OptimizerConfig(lr=1e-5),
        training=TrainingConfig(micro_batch_size=args.batch, global_batch_size=args.batch, seq_length=length, precision="fp32"),
    )
    check(config, 1)
    return config


class Transformers:
    """Peer (a). model: an export in memory, of which everything is used but its way of masking."""

    def __init__(self, model: nn.Module, config: RunConfig, batch: MicroBatch, device: torch.device):
        self.model = model.to(device).train()
        self.batch, self.vocab_size = batch, config.model.backbone.vocab_size
        self.mask = dense_mask(batch.layout, MaskRule.from_config(config.model.method))[:, None].to(device)
        self.places, self.positions = batch.layout.visual_places.reshape(-1).to(device), batch.layout.position_ids.to(device)
        self.ids, self.labels = batch.input_ids.to(device), batch.labels.to(device)
        self.pixels, self.codes = batch.pixel_values.to(device), batch.codes.to(device)

    def loss(self) -> Tensor:
        """Mean over the supervised tokens. []"""
        from transformers.loss.loss_utils import ForCausalLMLoss

        whole = self.model.model
        with torch.no_grad():
            features = whole.vision_tower(self.pixels.to(whole.dtype)).last_hidden_state[:, 1:]
            q = whole.mgvq.lookup(self.codes)
        visual = torch.cat([whole.anchors(q), whole.projector(features)], 1).flatten(0, 1)
        embeds = whole.language_model.embed_tokens(self.ids)
        embeds = embeds.flatten(0, 1).index_copy(0, self.places, visual).view_as(embeds)
        out = whole.language_model(inputs_embeds=embeds, attention_mask=self.mask, position_ids=self.positions, use_cache=False)
        logits = self.model.lm_head(out.last_hidden_state)
        return ForCausalLMLoss(logits, self.labels, self.vocab_size)  # which casts them to fp32

    def trained(self) -> list[nn.Parameter]:
        """Everything but the tower and MGVQ."""
        fixed = ("model.vision_tower.", "model.mgvq.")
        return [p.requires_grad_(not n.startswith(fixed)) for n, p in self.model.named_parameters() if not n.startswith(fixed)]


class Mcore:
    """Peer (b). stage: our module, whose front-end and weights it uses."""

    def __init__(self, stage: nn.Module, config: RunConfig, batch: MicroBatch, device: torch.device):
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

        from htc_megatron.model.layers import backbone_config

        backbone = config.model.backbone
        self.frontend, self.visual_inputs, self.device, self.batch = stage.frontend, stage.visual_inputs, device, batch
        self.model = GPTModel(
            backbone_config(config, device.type == "cpu"),
            get_gpt_layer_local_spec(normalization="RMSNorm"),
            vocab_size=stage.padded_vocab,
            max_sequence_length=backbone.max_position_embeddings,
            position_embedding_type="rope",
            rotary_base=backbone.rotary_base,
            share_embeddings_and_output_weights=False,
        ).to(device)
        self.model.load_state_dict(stage.backbone.state_dict(), strict=False)  # names of mcore's own layers are ours too
        self.mask = ~dense_mask(batch.layout, MaskRule.from_config(config.model.method))[:, None].to(device)
        self.places = batch.layout.image_places.reshape(-1).to(device)
        following = torch.full_like(batch.labels, -100)
        following[:, :-1] = batch.labels[:, 1:]
        self.ids, self.following = batch.input_ids.to(device), following.to(device)

    def loss(self) -> Tensor:
        """Mean over the supervised tokens. []"""
        embeds = self.model.embedding(input_ids=self.ids, position_ids=None).transpose(0, 1)
        images = self.frontend(*self.visual_inputs(self.batch)).flatten(0, 1)
        embeds = embeds.flatten(0, 1).index_copy(0, self.places, images).view_as(embeds).transpose(0, 1).contiguous()
        losses = self.model(None, None, self.mask, decoder_input=embeds, labels=self.following.clamp_min(0))
        wanted = self.following != -100
        return (losses * wanted).sum() / wanted.sum()

    def trained(self) -> list[nn.Parameter]:
        """Everything but the tower and the codebook."""
        return [p for p in (*self.model.parameters(), *self.frontend.parameters()) if p.requires_grad]


def peer_step(peer: Transformers | Mcore, config: RunConfig) -> Callable[[], float]:
    """One optimiser step, as a trainer without our engine makes it. Returns the loss."""
    parameters, options = peer.trained(), config.optimizer
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, betas=(options.beta1, options.beta2), weight_decay=0.0, fused=True)

    def step() -> float:
        loss = peer.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, options.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def our_gradients(
    config: RunConfig, batch: MicroBatch, device: torch.device
) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor], float]:
    """Our module with drawn weights; its weights by global name; its gradients by the export's names; its mean loss."""
    from htc_megatron.model.htc_vlm import HTCVLM
    from htc_megatron.model.initialisation import initial_value
    from htc_megatron.model.naming import stage_entries
    from htc_megatron.weights.convert import to_hf

    stage = HTCVLM(config, True, True, 0, device).to(device)
    entries = stage_entries(stage, config.model, 0)
    with torch.no_grad():
        for entry in entries:
            entry.param.copy_(initial_value(entry.weight, config.training.seed, 0, 1).view(entry.param.shape))
    loss = stage.train()(batch) / batch.num_supervised
    loss.backward()
    found: dict[str, Tensor] = {}
    for entry in entries:
        if entry.param.grad is not None and entry.name != "frontend.voco.weight":
            found |= to_hf(entry.weight, entry.param.grad.view(entry.weight.shape))
    stage.zero_grad(set_to_none=True)
    return stage, {entry.name: entry.param.detach().view(entry.weight.shape) for entry in entries}, found, float(loss.detach())


def random_export(config: RunConfig, device: torch.device) -> nn.Module:
    """transformers' model of this configuration with weights of its own, in the run's precision."""
    from htc_megatron.hf.modeling_htc_vlm import HTCVLMForConditionalGeneration
    from htc_megatron.model.layers import PRECISIONS
    from htc_megatron.weights.export import hf_config

    dtype = PRECISIONS[config.training.precision]
    with device:
        return HTCVLMForConditionalGeneration(hf_config(config.model, dtype)).to(dtype)


def largest_error(ours: dict[str, Tensor], model: nn.Module, voco: int) -> float:
    """Largest error of a weight's gradient in its own norm; the voco row apart, which is a parameter of its own here."""
    worst = 0.0
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        mine, theirs = ours[name], parameter.grad
        if name == VOCO_ROW:
            mine, theirs = (torch.cat([x[:voco], x[voco + 1 :]]) for x in (mine, theirs))
        worst = max(worst, float((mine - theirs).norm() / theirs.norm()))
    return worst


@contextmanager
def products(into: dict[str, float], name: str) -> Iterator[None]:
    """Count the operations of the linear layers' matrix products, attention's own not among them."""
    aten = torch.ops.aten

    def in_place(of_sum, left, right, out_shape=None, **_) -> int:  # the counter itself knows addmm alone
        return 2 * left[0] * left[1] * right[1]

    with FlopCounterMode(display=False, custom_mapping={aten.addmm_: in_place}) as counter:
        yield
    counts = counter.get_flop_counts()["Global"]
    into[name] = float(sum(counts.get(op, 0) for op in (aten.mm, aten.addmm, aten.addmm_)))


def peers_of(config: RunConfig, batch: MicroBatch, device: torch.device) -> tuple[dict[str, Any], dict[str, float], dict[str, float]]:
    """Both peers with the weights of ours, how far loss and gradients of ours are from transformers', and the products of both."""
    from htc_megatron.model.mgvq import build_mgvq
    from htc_megatron.weights.export import hf_from_tensors

    flops: dict[str, float] = {}
    with products(flops, "ours"):
        stage, tensors, ours, loss = our_gradients(config, batch, device)
    mgvq = build_mgvq(config.model.mgvq, encoder_only=True).state_dict()
    mgvq["quantize.embedding.weight"] = tensors["frontend.codebook.weight"]
    one = Transformers(hf_from_tensors(config.model, tensors, mgvq), config, batch, device)
    one.trained()
    with products(flops, "transformers"):
        theirs = one.loss()
        theirs.backward()
    difference = {
        "loss": abs(loss - float(theirs.detach())) / abs(float(theirs.detach())),
        "gradients": largest_error(ours, one.model, config.model.method.voco_token_id),
    }
    one.model.zero_grad(set_to_none=True)
    other = Mcore(stage, config, batch, device)
    with torch.no_grad():
        difference["mcore_loss"] = abs(float(other.loss()) - loss) / abs(loss)
    return {"transformers": one, "mcore": other}, difference, flops


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--hidden", type=int, default=1024)
    command.add_argument("--layers", type=int, default=8)
    command.add_argument("--head-dim", type=int, default=64)
    command.add_argument("--vocabulary", type=int, default=32001)
    command.add_argument("--batch", type=int, default=4, help="rows, one image each (default: %(default)s)")
    command.add_argument("--text", type=int, default=128, help="tokens a row beside the image (default: %(default)s)")
    command.add_argument("--question", type=int, default=24, help="of those the question behind the image (default: %(default)s)")
    command.add_argument("--patch-side", type=int, default=24, help="patches a side (default: %(default)s, 576 of them)")
    command.add_argument("--recompute", choices=("none", "selective", "full"), default="selective", help="of ours (default: %(default)s)")
    command.add_argument("--rounds", type=int, default=5, help="seconds are medians over them (default: %(default)s)")


def _compare(connection: Connection, args: argparse.Namespace) -> None:
    """A process that says how far loss and gradients of ours are from the peers', with the same weights, and what both multiply."""
    config = step_config(args)
    groups = process_groups.initialise(config.parallel, config.training.seed)
    connection.send(peers_of(config, random_batch(config, 1, True, args.question), groups.device)[1:])


def _made(name: str, config: RunConfig, batch: MicroBatch) -> Callable[[], object]:
    """One contender's step, with weights of its own: they do not change how long it takes."""
    from htc_megatron.training.build import build_engine
    from htc_megatron.training.step import train_step

    if name.startswith("transformers"):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if name == "transformers_kept" and device.type == "cpu":
            keep_freed_memory()
        return peer_step(Transformers(random_export(config, device), config, batch, device), config)
    groups = process_groups.initialise(config.parallel, config.training.seed)
    if name == "mcore":
        return peer_step(Mcore(our_gradients(config, batch, groups.device)[0], config, batch, groups.device), config)
    zero = load_zero("zero1.json")
    zero["zero_optimization"] |= NOTHING_TO_REDUCE
    engine = build_engine(config, zero, groups)
    return lambda: train_step(engine, [batch], config.optimizer.lr)


def _contend(connection: Connection, args: argparse.Namespace, name: str) -> None:
    """A contender's process: says what its step takes in MiB, and then the seconds of a step each time it is asked."""
    config = step_config(args)
    step = _made(name, config, random_batch(config, 1, True, args.question))
    before = allocated()
    step()  # AdamW's moments are made
    gc.collect()
    states = allocated() - before
    with peak_allocated() as peak:
        between = peak.mib
        step()
    connection.send({"step": peak.mib - between, "states": states})
    seconds = timed(step)
    while True:
        connection.recv()  # asked for another
        connection.send(seconds())


@contextmanager
def apart(target: Callable[..., None], *arguments: Any) -> Iterator[Connection]:
    """A process that runs `target(pipe, *arguments)`, by the other end of the pipe; killed with the block. It is forked from a server that
    has imported what is large. The pipe raises EOFError where it dies; its traceback is on stderr."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        process.kill()
        process.join()


def run(args: argparse.Namespace, say: Say) -> Result:
    """Raises ConfigError where the sizes do not fit."""
    config = step_config(args)
    with apart(_compare, args) as pipe:
        difference, flops = pipe.recv()
    memory: dict[str, dict[str, float]] = {}
    pairs: dict[str, dict[str, list[float]]] = {}  # seconds of a peer and of ours beside it

    def told(name: str, pipe: Connection) -> Callable[[], float]:
        """A contender that is ready, as what makes a step of it and returns its seconds."""
        memory[name] = pipe.recv()
        say(f"{name}: the step takes {memory[name]['step']:.0f} MiB beside weights and AdamW's states")

        def seconds() -> float:
            pipe.send(True)
            return pipe.recv()

        return seconds

    with apart(_contend, args, "ours") as pipe:  # and of the peers one at a time: all together they would fill 24 GiB
        ours = told("ours", pipe)
        for name in PEERS:
            with apart(_contend, args, name) as other:
                pairs[name] = alternated({"ours": ours, name: told(name, other)}, args.rounds, say)
    found = {name: pair[name] for name, pair in pairs.items()}
    found["ours"] = [seconds for pair in pairs.values() for seconds in pair["ours"]]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [
        ("backbone", f"{args.layers} layers, hidden {args.hidden}, vocabulary {args.vocabulary}, fp32, {device}"),
        ("parameters with projectors", f"{num_parameters(config.model):,}"),
        ("batch", f"{args.batch} rows of {config.model.num_visual_tokens} + 1 + {args.text} tokens"),
        ("supervised tokens of a row", f"{args.text - TEXT_BEFORE - args.question}"),
        ("ours, recompute", args.recompute),
    ]
    for name, label in ({"ours": "ours, ZeRO-1 engine"} | PEERS).items():
        rows.append((label, f"{median(found[name]):.2f} s, {memory[name]['step']:.0f} MiB"))
    for name in flops:
        rows.append((f"matrix products of {name}", f"{flops[name] / 1e12:.3g} TFLOP"))
    rows.append(("loss, relative difference from transformers", f"{difference['loss']:.1e}"))
    rows.append(("gradients, largest relative difference of a weight", f"{difference['gradients']:.1e}"))
    ratios = {
        "peer_over_ours": median_ratio(found["transformers"], pairs["transformers"]["ours"]),
        "peer_kept_over_ours": median_ratio(found["transformers_kept"], pairs["transformers_kept"]["ours"]),
        "peer_memory_over_ours": memory["transformers"]["step"] / memory["ours"]["step"],
        "peer_products_over_ours": flops["transformers"] / flops["ours"],
        "mcore_over_ours": median_ratio(found["mcore"], pairs["mcore"]["ours"]),
        "mcore_memory_over_ours": memory["mcore"]["step"] / memory["ours"]["step"],
    }
    return Result(rows, ratios, {"seconds": pairs, "memory_mib": memory, "difference": difference, "products_flop": flops})
