"""CLIP vision tower on mcore's TransformerBlock, cut over TP like the backbone."""

import torch
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from htc_megatron.config import VisionConfig
from htc_megatron.model.layers import LayerNorm, vision_spec


class ClipVisionTower(nn.Module):
    """Pixels -> patch features: CLIP's embeddings, pre-norm and layers, without a post-norm and without CLS.

    With 23 of ViT-L/14's 24 layers the output is LLaVA's `hidden_states[-2][:, 1:]`. watch: note CLS's attention in the last layer.
    """

    def __init__(self, vision: VisionConfig, config: TransformerConfig, watch: bool = False):
        super().__init__()
        dtype = config.params_dtype
        self.patch_embedding = nn.Conv2d(3, vision.hidden_size, vision.patch_size, vision.patch_size, bias=False, dtype=dtype)
        self.class_embedding = nn.Parameter(torch.empty(vision.hidden_size, dtype=dtype))
        self.position_embedding = nn.Embedding(vision.num_patches + 1, vision.hidden_size, dtype=dtype)
        self.pre_layernorm = LayerNorm(config, vision.hidden_size, vision.norm_epsilon)
        self.encoder = TransformerBlock(config, vision_spec(vision.num_layers), post_layer_norm=False)
        self.encoder.layers[-1].self_attention.core_attention.watch = watch

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[images, 3, side, side] -> [patches, images, hidden_size]."""
        patches = self.patch_embedding(pixel_values.to(self.class_embedding.dtype)).flatten(2)  # [images, h, patches]
        cls = self.class_embedding.expand(len(patches), 1, -1)
        positions = torch.arange(patches.shape[2] + 1, device=patches.device)
        tokens = torch.cat([cls, patches.transpose(1, 2)], 1) + self.position_embedding(positions)
        hidden = self.pre_layernorm(tokens).transpose(0, 1).contiguous()  # [patches + 1, images, h]
        return self.encoder(hidden_states=hidden, attention_mask=None)[1:]

    @property
    def cls_attention(self) -> Tensor | None:
        """CLS's attention to the patches of the images seen last, summed over heads, the same on every TP rank: [images, patches]."""
        return self.encoder.layers[-1].self_attention.core_attention.of_cls
