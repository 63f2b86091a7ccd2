"""One tree of dataclasses for a run: read from YAML, overridden on the command line, checked before anything starts.

Every field says what it does where it stands; unknown keys, wrong types (config_io.py) and impossible combinations
(config_checks.py) are refused with one sentence that names the key, the value seen and the value wanted. `ConfigError`
carries that sentence.
"""

from dataclasses import field
from typing import Literal, get_args

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", strict=False, validate_assignment=False)


class ConfigError(ValueError):
    """A sentence for the user: the key, the value seen and the value wanted."""


@dataclass(config=STRICT)
class BackboneConfig:
    """LLaMA-style decoder: RoPE, RMSNorm, SwiGLU, grouped-query attention. Defaults: Vicuna-7B."""

    num_layers: int = 32
    hidden_size: int = 4096
    ffn_hidden_size: int = 11008
    num_attention_heads: int = 32
    num_query_groups: int = 32  # key/value heads; equal to num_attention_heads without GQA
    vocab_size: int = 32001  # rows of the embedding, the <voco> row included; padding for TP is added on top and never stored
    rotary_base: float = 10000.0
    norm_epsilon: float = 1e-5
    qkv_bias: bool = False  # Qwen2 has it; decides whether the export is a Llama or a Qwen2 backbone
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False  # the output layer is the embedding's matrix (Qwen2.5 up to 3B); its export is untied all the same


@dataclass(config=STRICT)
class VisionConfig:
    """CLIP vision tower without its last layer and post-norm: the features are LLaVA's `hidden_states[-2]` less CLS."""

    image_size: int = 336  # pixels a side
    patch_size: int = 14
    hidden_size: int = 1024
    ffn_hidden_size: int = 4096
    num_layers: int = 23  # layers that are run: 23 of CLIP ViT-L's 24
    num_attention_heads: int = 16
    norm_epsilon: float = 1e-5

    @property
    def num_patches(self) -> int:
        """Features that the tower gives of an image."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(config=STRICT)
class MGVQConfig:
    """MGVQ encoder, group quantiser and decoder (sizes free). Defaults: the public f16c32 g8 checkpoint."""

    image_size: int = 336  # pixels a side; a multiple of the downsampling factor 2 ** len(widths)
    widths: tuple[int, ...] = (256, 512, 512, 1024)  # channels of each stage; every stage halves the side before it
    depths: tuple[int, ...] = (4, 8, 2, 2)  # encoder blocks of each stage
    decoder_depths: tuple[int, ...] = (5, 10, 2, 2)  # decoder blocks of each stage, same order as widths
    blocks: tuple[Literal["res", "evit"], ...] = ("res", "res", "evit", "evit")
    head_dim: int = 32  # of the EViT blocks' linear attention
    latent_channels: int = 32
    groups: int = 8
    codebook_size: int = 16384  # rows over all groups; each group owns codebook_size / groups of them

    @property
    def downsample(self) -> int:
        return 2 ** len(self.widths)

    @property
    def grid(self) -> int:
        return self.image_size // self.downsample

    @property
    def group_channels(self) -> int:
        return self.latent_channels // self.groups

    @property
    def flat_size(self) -> int:
        """Length of q: the quantised latents, flattened channel-major."""
        return self.latent_channels * self.grid**2


@dataclass(config=STRICT)
class MethodConfig:
    """What makes a model this model and not another: saved with every checkpoint and export."""

    channels: Literal["hybrid", "continuous", "discrete"] = "hybrid"
    num_anchors: int = 4  # discrete tokens an image
    anchor_hidden_size: int = 4096  # width between the two linears of P_d
    projector: Literal["linear", "mlp2x_gelu"] = "mlp2x_gelu"  # P_v
    resampler: Literal["none", "average", "qformer"] = "none"  # of the patches: each a token | means of runs | learned queries
    num_resampled_tokens: int = 1  # continuous tokens an image with a resampler
    resampler_layers: int = 2  # of qformer
    anchor_source: Literal["mgvq", "random", "topk_attention", "kmeans"] = "mgvq"  # P_d's input: q | some of the tower's features
    anchor_seed: int = 0  # of anchor_source random
    fusion: Literal["pre", "post", "parallel"] = "pre"  # [anchors; patches] | [patches; anchors] | both over the same positions
    num_voco_tokens: int = 1  # K; 0 only with mask none
    voco_token_id: int = 32000
    mask: Literal["star", "full", "none"] = "star"
    image_sees: Literal["own", "prefix"] = "own"
    text_sees: Literal["all", "voco_on"] = "all"


LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(config=STRICT)
class LoraConfig:
    """LoRA on the backbone's linears, as peft defines it: y = W x + alpha / rank * B A x, without dropout.

    Adapters are trained instead of the backbone, which training.freeze must name; front-end and voco row train as ever.
    """

    rank: int = 0  # 0: no adapters
    alpha: float = 16.0
    targets: tuple[LoraTarget, ...] = get_args(LoraTarget)  # Hugging Face's linears, each with an A and a B of its own

    @property
    def scale(self) -> float:
        """What B A is multiplied by (1 without adapters)."""
        return self.alpha / self.rank if self.rank else 1.0


@dataclass(config=STRICT)
class ModelConfig:
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    mgvq: MGVQConfig = field(default_factory=MGVQConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    @property
    def has_tower(self) -> bool:
        """Whether there is a vision tower: in every model but those of the discrete channel alone."""
        return self.method.channels != "discrete"

    @property
    def has_mgvq(self) -> bool:
        """Whether the anchors are made from MGVQ's codes."""
        return self.method.channels != "continuous" and self.method.anchor_source == "mgvq"

    @property
    def has_qformer(self) -> bool:
        """Whether learned queries resample the patches."""
        return self.has_tower and self.method.resampler == "qformer"

    @property
    def num_patches(self) -> int:
        """Continuous tokens an image: patches (576 at full size), or what a resampler makes of them; 0 with channels: discrete."""
        if not self.has_tower:
            return 0
        return self.vision.num_patches if self.method.resampler == "none" else self.method.num_resampled_tokens

    @property
    def anchor_inputs(self) -> int:
        """Length of the vector that P_d makes an image's anchors from."""
        return self.mgvq.flat_size if self.has_mgvq else self.method.num_anchors * self.vision.hidden_size

    @property
    def num_anchors(self) -> int:
        """Discrete tokens an image (4; 0 with channels: continuous)."""
        return 0 if self.method.channels == "continuous" else self.method.num_anchors

    @property
    def num_visual_tokens(self) -> int:
        """V_hy's length N: anchors and continuous tokens (580 at full size)."""
        return self.num_anchors + self.num_patches

    @property
    def tokens_per_image(self) -> int:
        """Sequence positions one image takes: V_hy and its voco tokens."""
        return self.num_visual_tokens + self.method.num_voco_tokens


@dataclass(config=STRICT)
class ParallelConfig:
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    # layers of each pipeline stage: such that the slowest is as fast as it can be (model/stages.py) | the same number | a list
    layers_per_stage: Literal["balanced", "even"] | tuple[int, ...] = "balanced"
    virtual_pipeline_model_parallel_size: int = 1  # model chunks of a stage; more than one is refused
    sequence_parallel: bool = False  # norms and residuals of the backbone split over TP along the sequence
    reduce_once: bool = False  # one gradient reduction a step instead of one a micro-batch; holds one full stage gradient
    recompute: Literal["none", "selective", "full"] = "none"  # activations kept | norms and SwiGLU | whole layers
    attention: Literal["split", "dense"] = "split"  # exact structured attention | the reference with an [S, S] mask
    timeout_s: float = 1800.0  # a collective that waits longer than this ends the run


@dataclass(config=STRICT)
class DataConfig:
    train: str = ""  # folder written by tools/prepare_data.py
    validation: str = ""  # same; empty: no evaluation during training
    seed: int = 0
    shuffle: bool = True
    num_workers: int = 1  # decoding threads on the ranks that need pixels
    feature_cache: str = ""  # folder, shared by all nodes: a frozen tower's features are computed once and kept there; empty: each time
    max_bad_share: float = 0.001  # broken records tolerated in preparation, as a share of all


@dataclass(config=STRICT)
class OptimizerConfig:
    lr: float = 2e-5
    min_lr: float = 0.0
    warmup_ratio: float = 0.03  # share of train_iters
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = 0.0  # matrices only, adapters among them; norms, biases and embeddings are never decayed
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_grad: float = 1.0  # global norm; 0: no clipping


@dataclass(config=STRICT)
class TrainingConfig:
    train_iters: int = 1000  # 0: what init_from's weights become under this model section is saved as it is, untrained
    micro_batch_size: int = 1  # packed rows
    global_batch_size: int = 8  # packed rows of one optimiser step
    seq_length: int = 2048  # tokens of a packed row
    precision: Literal["fp32", "bf16"] = "bf16"
    seed: int = 0
    # adapters are no part of backbone
    freeze: tuple[Literal["vision", "resampler", "projector", "anchors", "backbone", "voco"], ...] = ("vision",)
    eval_interval: int = 0  # steps; 0: never
    eval_iters: int = 10
    save_interval: int = 0  # steps; 0: at the end only
    log_interval: int = 1
    async_save: bool = True  # training waits for a copy in host memory, a thread writes it; false: training waits for the disk
    keep_checkpoints: int = 0  # how many stay, the newest; 0: all


@dataclass(config=STRICT)
class LifeConfig:
    """When a job stops, and when it is given up. Nothing of it changes what is computed."""

    time_limit_s: float = 0.0  # seconds after its start at which a run saves and stops, to be started again; 0: none
    end_margin_s: float = 300.0  # the same before the end of the SLURM job, or a quarter of its length if that is less; 0: not looked at
    max_restarts_without_progress: int = 5  # starts at one and the same step after the first; the next one is refused
    heartbeat_limit_s: float = 60.0  # a rank without a sign of life for longer is dead or stopped, and the run ends; 0: not watched
    hang_limit_s: float = 900.0  # a run of which no rank comes forward for longer has hung, and ends; 0: not watched
    slow_factor: float = 2.0  # a rank that computes longer than the median of its pipeline stage by this is named; 0: none is


@dataclass(config=STRICT)
class FaultsConfig:
    """What a run puts up with."""

    # a loss or gradient norm that is not finite or jumps: the run ends | the step is left out | after max_skipped of them in a row
    # the last checkpoint is taken up again, behind the data that led there
    on_bad_loss: Literal["stop", "skip", "roll_back"] = "stop"
    max_loss_jump: float = 0.0  # a loss above the mean of the last steps by this factor is bad; 0: any finite one is good
    max_norm_jump: float = 0.0  # the same for the gradient norm before clipping
    jump_window: int = 50  # steps of that mean; none is bad before there are as many
    max_skipped: int = 3  # steps left out in a row; one more ends the run (skip) or goes back (roll_back)
    max_rollbacks: int = 3  # of one start of the run; one more ends it
    storage_patience_s: float = 600.0  # how long a save that fails, or data that cannot be read, is tried again; 0: as soon as it can be


@dataclass(config=STRICT)
class RunConfig:
    """A whole run. `zero` names a DeepSpeed JSON, by path or by its name in ds_configs/."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    life: LifeConfig = field(default_factory=LifeConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    zero: str = "zero1.json"
    tokenizer: str = ""  # sentencepiece .model file or a folder that transformers.AutoTokenizer loads
    mgvq_checkpoint: str = ""  # safetensors written by tools/train_mgvq.py, or the public mgvq_*.pt: codebook, and codes on the fly
    init_from: str = ""  # checkpoint folder whose weights start this run (optimizer and step are not taken)
    output_dir: str = "runs/default"  # checkpoints/, tensorboard/
    resume: Literal["auto", "never"] = "auto"  # auto: go on from output_dir's latest checkpoint if there is one
