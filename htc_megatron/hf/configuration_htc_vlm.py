"""Configuration of an exported HTC-VLM: which tokens an image becomes, who may attend to whom, and the sizes of all parts."""

from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedConfig, Qwen2Config
from transformers.models.auto import modeling_auto

TEXT_CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config}
CHOICES = {
    "channels": ("hybrid", "continuous", "discrete"),
    "projector": ("linear", "mlp2x_gelu"),
    "resampler": ("none", "average", "qformer"),
    "anchor_source": ("mgvq", "random", "topk_attention", "kmeans"),
    "fusion": ("pre", "post", "parallel"),
    "mask": ("star", "full", "none"),
    "image_sees": ("own", "prefix"),
    "text_sees": ("all", "voco_on"),
}


class HTCVLMConfig(PreTrainedConfig):
    """HTC-VLM (arXiv 2512.08240).

    text_config: Llama or Qwen2 backbone. vision_config: CLIP tower, its `num_hidden_layers` all run and no post-norm.
    mgvq_config: fields of MGVQConfig as a dict. The method's own choices are named as in training:

    channels: hybrid (anchors and patches) | continuous (patches) | discrete (anchors).
    num_anchors, anchor_hidden_size: discrete tokens an image, width between the two linears that make them.
    anchor_source: mgvq | random | topk_attention | kmeans: what these are made from, MGVQ's latents or some of the tower's features
        (anchors_htc_vlm.py); anchor_seed draws the positions of `random`.
    resampler: none | average | qformer: what makes num_resampled_tokens of the patches (resampler_htc_vlm.py). resampler_layers:
        of qformer.
    projector: linear | mlp2x_gelu. fusion: pre [anchors; patches] | post [patches; anchors] | parallel (pre's order, but
        both channels start at the same RoPE position).
    num_voco_tokens: K tokens an image is compressed into; 0 only with mask none.
    mask: star (V_hy rows see themselves only) | full (causal inside V_hy) | none (no compression).
    image_sees: own | prefix. text_sees: all | voco_on. See HTCVLMModel's module for the rule.
    image_token_id: the placeholder in input_ids, which is the <voco> row of the embedding.
    """

    model_type = "htc_vlm"
    sub_configs = {"text_config": PreTrainedConfig, "vision_config": CLIPVisionConfig}

    def __init__(
        self,
        text_config: dict | PreTrainedConfig | None = None,
        vision_config: dict | PreTrainedConfig | None = None,
        mgvq_config: dict[str, Any] | None = None,
        channels: str = "hybrid",
        num_anchors: int = 4,
        anchor_hidden_size: int = 4096,
        projector: str = "mlp2x_gelu",
        fusion: str = "pre",
        num_voco_tokens: int = 1,
        mask: str = "star",
        image_sees: str = "own",
        text_sees: str = "all",
        resampler: str = "none",
        num_resampled_tokens: int = 1,
        resampler_layers: int = 2,
        anchor_source: str = "mgvq",
        anchor_seed: int = 0,
        image_token_id: int = 32000,
        **kwargs,
    ):
        if text_config is None or isinstance(text_config, dict):
            values = dict(text_config or {})
            kind = values.pop("model_type", "llama")
            if kind not in TEXT_CONFIGS:
                raise ValueError(f"text_config.model_type is {kind!r}; HTC-VLM has a backbone of {' or '.join(TEXT_CONFIGS)}")
            text_config = TEXT_CONFIGS[kind](**values)
        if vision_config is None or isinstance(vision_config, dict):
            vision_config = CLIPVisionConfig(**(vision_config or {}))
        self.text_config, self.vision_config = text_config, vision_config
        self.mgvq_config = dict(mgvq_config or {})
        chosen = dict(channels=channels, projector=projector, fusion=fusion, mask=mask, image_sees=image_sees, text_sees=text_sees)
        chosen |= dict(resampler=resampler, anchor_source=anchor_source)
        for name, value in chosen.items():
            if value not in CHOICES[name]:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(CHOICES[name])}")
            setattr(self, name, value)
        self.num_anchors, self.anchor_hidden_size = num_anchors, anchor_hidden_size
        self.num_voco_tokens, self.image_token_id = num_voco_tokens, image_token_id
        self.num_resampled_tokens, self.resampler_layers, self.anchor_seed = num_resampled_tokens, resampler_layers, anchor_seed
        if mask == "none" and text_sees == "voco_on":
            raise ValueError("mask none shows text everything, so text_sees must be all, not voco_on")
        if channels != "hybrid" and anchor_source != "mgvq":
            raise ValueError(f"anchor_source is {anchor_source} with channels {channels}; it must be mgvq unless channels is hybrid")
        if num_voco_tokens < 1 and (mask != "none" or num_voco_tokens < 0):
            raise ValueError(f"num_voco_tokens is {num_voco_tokens}; it must be at least 1, or 0 with mask none")
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

    @property
    def has_mgvq(self) -> bool:
        """Whether the anchors are made from MGVQ's codes."""
        return self.channels != "continuous" and self.anchor_source == "mgvq"

    @property
    def patches_per_image(self) -> int:
        """Continuous tokens an image: patches, or what a resampler makes of them."""
        if self.channels == "discrete":
            return 0
        if self.resampler != "none":
            return self.num_resampled_tokens
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2

    @property
    def anchors_per_image(self) -> int:
        """Discrete tokens an image."""
        return 0 if self.channels == "continuous" else self.num_anchors

    @property
    def visual_per_image(self) -> int:
        """N: length of V_hy."""
        return self.anchors_per_image + self.patches_per_image

    @property
    def image_seq_length(self) -> int:
        """Placeholders an image takes in input_ids: K, or N + K where nothing is compressed (mask none)."""
        return self.num_voco_tokens + (self.visual_per_image if self.mask == "none" else 0)


# `transformers serve` asks this table, not the automatic classes' registers, whether a model is one that it can serve.
_served = getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {})  # transformers 5 has it
_served[HTCVLMConfig.model_type] = "HTCVLMForConditionalGeneration"
