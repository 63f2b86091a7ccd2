"""HybridFrontEnd: both visual channels, their projectors and the fusion into V_hy; a tensor-parallel module of the first stage."""

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from htc_megatron.config import ModelConfig
from htc_megatron.hf.anchors_htc_vlm import anchor_features
from htc_megatron.hf.modeling_mgvq import codebook_lookup
from htc_megatron.hf.resampler_htc_vlm import Kinds, QFormer, average_tokens
from htc_megatron.model.layers import LayerNorm
from htc_megatron.model.layout import ImageShape, VisionFeatures
from htc_megatron.model.vision import ClipVisionTower


def _linear(kind: type, config: TransformerConfig, inputs: int, outputs: int, **options) -> nn.Module:
    return kind(inputs, outputs, config=config, init_method=config.init_method, bias=True, skip_bias_add=False, **options)


class _Column(ColumnParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class _Row(RowParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


def parallel_qformer(model: ModelConfig, config: TransformerConfig) -> QFormer:
    """The Q-Former with its heads and its MLPs cut over TP."""
    vision, method = model.vision, model.method
    kinds = Kinds(
        column=partial(_linear, _Column, config, gather_output=False),
        row=partial(_linear, _Row, config, input_is_parallel=True),
        norm=partial(LayerNorm, config),
    )
    sizes = (vision.hidden_size, vision.ffn_hidden_size, vision.num_attention_heads, vision.norm_epsilon)
    return QFormer(method.num_resampled_tokens, method.resampler_layers, *sizes, kinds, config.params_dtype)


class PatchProjector(nn.Module):
    """P_v: `linear`, or LLaVA's `mlp2x_gelu`."""

    def __init__(self, kind: str, inputs: int, outputs: int, config: TransformerConfig):
        super().__init__()
        self.fc1 = _linear(ColumnParallelLinear, config, inputs, outputs, gather_output=kind == "linear")
        self.fc2 = None if kind == "linear" else _linear(RowParallelLinear, config, outputs, outputs, input_is_parallel=True)

    def forward(self, features: Tensor) -> Tensor:
        """[..., h] -> [..., H]."""
        hidden = self.fc1(features)[0]
        return hidden if self.fc2 is None else self.fc2(F.gelu(hidden))[0]


class AnchorProjector(nn.Module):
    """P_d: v_d = GELU(W2 GELU(W1 q)), reshaped to the anchors (paper, discrete channel); q: flat latents or chosen features."""

    def __init__(self, inputs: int, width: int, num_anchors: int, outputs: int, config: TransformerConfig):
        super().__init__()
        self.num_anchors = num_anchors
        self.fc1 = _linear(ColumnParallelLinear, config, inputs, width, gather_output=False)
        self.fc2 = _linear(RowParallelLinear, config, width, num_anchors * outputs, input_is_parallel=True)

    def forward(self, q: Tensor) -> Tensor:
        """[images, inputs] -> [images, anchors, H]."""
        v_d = F.gelu(self.fc2(F.gelu(self.fc1(q[None])[0]))[0])[0]
        return v_d.view(len(q), self.num_anchors, -1)


class Codebook(nn.Module):
    """MGVQ's frozen codebook: all groups' rows in one table."""

    def __init__(self, rows: int, columns: int, groups: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=dtype), requires_grad=False)
        self.groups = groups

    def forward(self, codes: Tensor) -> Tensor:
        """[images, positions, groups] codes -> q [images, flat_size], channel-major."""
        return codebook_lookup(codes, self.weight, self.groups)


class VocoEmbedding(nn.Module):
    """The one new row `<voco>`, repeated K times an image."""

    def __init__(self, hidden_size: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, hidden_size, dtype=dtype))

    def forward(self, count: int) -> Tensor:
        """[count, H]."""
        return self.weight.expand(count, -1)


class HybridFrontEnd(nn.Module):
    """pixels and codes -> V_hy and voco embeddings."""

    def __init__(self, model: ModelConfig, config: TransformerConfig):
        super().__init__()
        method, hidden = model.method, model.backbone.hidden_size
        self.shape, self.method = ImageShape.from_config(model), method
        self.has_tower, self.has_mgvq = model.has_tower, model.has_mgvq
        if model.has_tower:
            self.vision = ClipVisionTower(model.vision, config, watch=method.anchor_source == "topk_attention")
            self.resampler = parallel_qformer(model, config) if model.has_qformer else None
            self.projector = PatchProjector(method.projector, model.vision.hidden_size, hidden, config)
        if model.has_mgvq:
            self.codebook = Codebook(model.mgvq.codebook_size, model.mgvq.group_channels, model.mgvq.groups, config.params_dtype)
        if model.num_anchors:
            self.anchors = AnchorProjector(model.anchor_inputs, method.anchor_hidden_size, method.num_anchors, hidden, config)
        if method.num_voco_tokens:
            self.voco = VocoEmbedding(hidden, config.params_dtype)

    def forward(self, pixel_values: Tensor | None, codes: Tensor | None, features: VisionFeatures | None = None) -> Tensor:
        """Embeddings of whole images, V_hy and voco tokens: [images, N + K, H].

        pixel_values: [images, 3, side, side]; codes: [images, positions, groups]; each needed by its channel only.
        features: what is known of the images already. Then pixel_values holds the missing ones, or a blank one where none is.
        """
        parts = {}
        if self.has_tower:
            found = self.vision_features(pixel_values, features)
            parts["patches"] = self.continuous(found)
        if self.shape.num_anchors:
            parts["anchors"] = self.anchors(self.codebook(codes) if self.has_mgvq else self.chosen_features(found))
        order = ("patches", "anchors") if self.shape.fusion == "post" else ("anchors", "patches")
        pieces = [parts[name] for name in order if name in parts]
        if self.shape.num_voco:
            images = len(pieces[0])
            pieces.append(self.voco(images * self.shape.num_voco).view(images, self.shape.num_voco, -1))
        return torch.cat(pieces, 1)

    def continuous(self, features: Tensor) -> Tensor:
        """The continuous channel's tokens: [patches, images, h] -> [images, num_patches, H]."""
        if self.resampler is not None:
            return self.projector(self.resampler(features.transpose(0, 1)))
        tokens = self.projector(features).transpose(0, 1)
        return average_tokens(tokens, self.shape.num_patches) if self.method.resampler == "average" else tokens

    def chosen_features(self, features: Tensor) -> Tensor:
        """What stands in for q where anchors are not MGVQ's: [patches, images, h] -> [images, anchors * h]."""
        method = self.method
        return anchor_features(
            method.anchor_source, features.transpose(0, 1), self.shape.num_anchors, method.anchor_seed, self.vision.cls_attention
        )

    def vision_features(self, pixel_values: Tensor | None, features: VisionFeatures | None) -> Tensor:
        """The tower's output, computed or, where it is known, taken from `features`. [patches, images, h]"""
        if features is None:
            return self._run_tower(pixel_values)
        if features.run_tower:
            computed = self._run_tower(pixel_values)
            if features.missing:  # else it was the blank image: only ranks beside this one had something to compute
                features.computed = computed.transpose(0, 1)
        return features.whole(self.vision.class_embedding.device)

    def _run_tower(self, pixel_values: Tensor) -> Tensor:
        trained = any(p.requires_grad for p in self.vision.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):  # a frozen tower keeps no graph
            return self.vision(pixel_values)
