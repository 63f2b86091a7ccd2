"""Layer specs and transformer configurations for mcore: what the backbone and the vision tower are made of."""

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from htc_megatron.config import RunConfig
from htc_megatron.model.attention import FullAttention, LayoutAttention
from htc_megatron.model.decoder import DecoderLayer, LayoutSelfAttention, QKVLinear, RMSNorm
from htc_megatron.model.lora import Fused, LoraColumnParallelLinear, LoraQKVLinear, LoraRowParallelLinear
from htc_megatron.model.stages import layers_of_stages
from htc_megatron.weights.table import LINEARS

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's x * sigmoid(1.702 x), any shape.

    mcore's own is wrapped in torch.compile: compiled again as shapes come along, it rounds by what a process has seen before,
    so a resumed run would leave the uninterrupted one; and on CPU it needs a C++ compiler.
    """
    return x * torch.sigmoid(1.702 * x)


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm with the arguments mcore's specs pass, in the parameters' precision."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)


def _layer_spec(
    norm: type,
    core_attention: type,
    mask_type: AttnMaskType,
    linears: dict[str, ModuleSpec] | None = None,
    layer: type = TransformerLayer,
    attention: type = SelfAttention,
) -> ModuleSpec:
    """linears: by name, those that are not plain tensor-parallel ones."""
    linears = {
        "linear_qkv": ModuleSpec(module=ColumnParallelLinear),
        "linear_proj": ModuleSpec(module=RowParallelLinear),
        "linear_fc1": ModuleSpec(module=ColumnParallelLinear),
        "linear_fc2": ModuleSpec(module=RowParallelLinear),
    } | (linears or {})
    return ModuleSpec(
        module=layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=attention,
                params={"attn_mask_type": mask_type},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linears["linear_qkv"],
                    core_attention=core_attention,
                    linear_proj=linears["linear_proj"],
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=linears["linear_fc1"], linear_fc2=linears["linear_fc2"])),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def backbone_spec(config: RunConfig) -> TransformerBlockSubmodules:
    """Layers of one pipeline stage and the block's final norm (built on the last stage only)."""
    spec = _layer_spec(RMSNorm, LayoutAttention, AttnMaskType.causal, _linears(config), DecoderLayer, LayoutSelfAttention)
    layers = layers_of_stages(config)[parallel_state.get_pipeline_model_parallel_rank()]
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=RMSNorm)


def _linears(config: RunConfig) -> dict[str, ModuleSpec]:
    """The backbone's linears that are not mcore's own: queries, keys and values, and those with LoRA adapters."""
    lora, bb, tp = config.model.lora, config.model.backbone, config.parallel.tensor_model_parallel_size
    head_dim = bb.hidden_size // bb.num_attention_heads
    of_group = {"group_rows": (bb.num_attention_heads // bb.num_query_groups * head_dim, 2 * head_dim)}
    rows = {  # of the linears that mcore fuses: (groups over all TP ranks, rows of each linear in one)
        "linear_qkv": (bb.num_query_groups, (bb.num_attention_heads // bb.num_query_groups * head_dim, head_dim, head_dim)),
        "linear_fc1": (tp, (bb.ffn_hidden_size // tp,) * 2),
    }
    found = {"linear_qkv": ModuleSpec(module=QKVLinear, params=of_group)}
    for name, linears in LINEARS.items():
        adapted, options = tuple(x in lora.targets for x in linears), {"rank": lora.rank, "scale": lora.scale}
        if not lora.rank or not any(adapted):
            continue
        if name in rows:
            options |= {"fused": Fused(*rows[name], adapted)}
        if name == "linear_qkv":
            found[name] = ModuleSpec(module=LoraQKVLinear, params=options | of_group)
        elif name in rows:
            found[name] = ModuleSpec(module=LoraColumnParallelLinear, params=options)
        else:
            found[name] = ModuleSpec(module=LoraRowParallelLinear, params=options)
    return found


def vision_spec(num_layers: int) -> TransformerBlockSubmodules:
    """Layers of the CLIP tower."""
    spec = _layer_spec(LayerNorm, FullAttention, AttnMaskType.no_mask)
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=LayerNorm)


def _common(config: RunConfig, on_cpu: bool) -> dict:
    dtype = PRECISIONS[config.training.precision]
    return dict(
        tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        perform_initialization=False,  # model/initialisation.py fills every weight by name, whatever the layout
        use_cpu_initialization=on_cpu,
        calculate_per_token_loss=True,  # the loss arrives scaled for the global batch; the schedule divides by nothing
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
    )


def backbone_config(config: RunConfig, on_cpu: bool) -> TransformerConfig:
    """mcore's configuration of the LLaMA-style decoder."""
    bb, parallel = config.model.backbone, config.parallel
    recompute: dict = {}
    if parallel.recompute == "full":
        recompute = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    elif parallel.recompute == "selective":
        recompute = dict(recompute_granularity="selective", recompute_modules=["core_attn"])  # what it means is DecoderLayer's to say
    return TransformerConfig(
        num_layers=bb.num_layers,
        hidden_size=bb.hidden_size,
        ffn_hidden_size=bb.ffn_hidden_size,
        num_attention_heads=bb.num_attention_heads,
        num_query_groups=bb.num_query_groups,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        pipeline_model_parallel_layout=_stage_layout(config),
        sequence_parallel=parallel.sequence_parallel,
        pipeline_dtype=PRECISIONS[config.training.precision],
        add_bias_linear=False,
        add_qkv_bias=bb.qkv_bias,
        normalization="RMSNorm",
        layernorm_epsilon=bb.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        **recompute,
        **_common(config, on_cpu),
    )


def _stage_layout(config: RunConfig) -> list[list[str]] | None:
    """The stages in mcore's words, which gives layers their numbers over all stages by them."""
    if config.parallel.pipeline_model_parallel_size == 1:
        return None
    stages = [["decoder"] * layers for layers in layers_of_stages(config)]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


def vision_config(config: RunConfig, on_cpu: bool) -> TransformerConfig:
    """mcore's configuration of the CLIP tower and of the projectors: whole on the first stage, without sequence parallelism."""
    vision = config.model.vision
    recompute: dict = {}
    if config.parallel.recompute == "full" and "vision" not in config.training.freeze:
        recompute = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    return TransformerConfig(
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_attention_heads,
        pipeline_model_parallel_size=1,
        sequence_parallel=False,
        add_bias_linear=True,
        add_qkv_bias=True,
        normalization="LayerNorm",
        layernorm_epsilon=vision.norm_epsilon,
        gated_linear_unit=False,
        activation_func=quick_gelu,
        **recompute,
        **_common(config, on_cpu),
    )
