"""HTC-VLM for transformers: an image's anchors and patches are compressed into its voco tokens by the language model's own layers.

One forward pass expands every image in place and masks by the rule of mask_htc_vlm.py. generate() decodes from the keys and values
of voco and text alone; where an image's do not depend on what stands around it, it compresses the images by themselves first.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel, DynamicCache, GenerationMixin, LlamaModel, PreTrainedModel, Qwen2Model
from transformers.modeling_outputs import ModelOutput

from .anchors_htc_vlm import anchor_features, attention_in_clip
from .cache_htc_vlm import KnownImages, VocoCache
from .configuration_htc_vlm import HTCVLMConfig
from .generation_htc_vlm import VocoGeneration
from .image_htc_vlm import compress_images, kept_shape, turn, why_not_alone
from .mask_htc_vlm import Expansion, allowed, expand, text_token
from .modeling_mgvq import MGVQ
from .resampler_htc_vlm import QFormer, average_tokens

BACKBONES = {"llama": LlamaModel, "qwen2": Qwen2Model}


@dataclass
class HTCVLMOutput(ModelOutput):
    """loss: mean over labels, None without. logits: [batch, length, vocab], aligned with input_ids.

    hidden_states, attentions: of the backbone over the *expanded* rows; `expansion` says what stands where.
    image_hidden_states: V_hy [images, N, hidden_size].
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: VocoCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None
    last_hidden_state: Tensor | None = None
    expansion: Expansion | None = None


class PatchProjector(nn.Module):
    """P_v, patch features [..., h] -> [..., H]: one linear, or LLaVA's two with GELU between."""

    def __init__(self, config: HTCVLMConfig):
        super().__init__()
        width = config.text_config.hidden_size
        self.fc1 = nn.Linear(config.vision_config.hidden_size, width)
        if config.projector == "mlp2x_gelu":
            self.fc2 = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.fc1(features)
        return self.fc2(F.gelu(hidden)) if hasattr(self, "fc2") else hidden


class AnchorProjector(nn.Module):
    """P_d, q [images, inputs] -> anchors [images, A, H]. q: discrete latents [channels * positions], or chosen features [A * h]."""

    def __init__(self, config: HTCVLMConfig, inputs: int):
        super().__init__()
        self.num_anchors = config.num_anchors
        self.fc1 = nn.Linear(inputs, config.anchor_hidden_size)
        self.fc2 = nn.Linear(config.anchor_hidden_size, config.num_anchors * config.text_config.hidden_size)

    def forward(self, q: Tensor) -> Tensor:
        hidden = F.gelu(self.fc1(q.to(self.fc1.weight.dtype)))
        return F.gelu(self.fc2(hidden)).unflatten(-1, (self.num_anchors, -1))


class FrozenMGVQ(MGVQ):
    """Encoder and quantiser that stay in fp32 whatever `.to(dtype)`, `.half()` and their like do to the rest.

    Codes are an argmax over cosines: in low precision they would be other codes than the model was trained on.
    """

    def _apply(self, fn, recurse: bool = True):
        def kept_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrow = moved.is_floating_point() and moved.dtype.itemsize < torch.float32.itemsize
            return tensor.to(moved.device) if narrow else moved

        return super()._apply(kept_wide, recurse)


class HTCVLMPreTrainedModel(PreTrainedModel):
    config_class = HTCVLMConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # The rule needs a dense mask, which FlashAttention would drop in silence.
    _supports_sdpa = True
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False
    _can_compile_fullgraph = False
    _skip_keys_device_placement = ["past_key_values"]
    _no_split_modules = ["LlamaDecoderLayer", "Qwen2DecoderLayer", "CLIPEncoderLayer"]
    _keep_in_fp32_modules_strict = ["mgvq"]  # what FrozenMGVQ does, while weights are loaded


class HTCVLMModel(HTCVLMPreTrainedModel):
    """Both visual channels, fusion and the backbone, without the output layer."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.weight$"]

    def __init__(self, config: HTCVLMConfig):
        super().__init__(config)
        self.language_model = BACKBONES[config.text_config.model_type]._from_config(config.text_config)
        if config.channels != "discrete":
            self.vision_tower = CLIPVisionModel._from_config(config.vision_config)
            self.vision_tower.post_layernorm = nn.Identity()  # acts on the pooled CLS only, which is not used
            self.projector = PatchProjector(config)
            if config.resampler == "qformer":
                vision = config.vision_config
                sizes = (vision.hidden_size, vision.intermediate_size, vision.num_attention_heads, vision.layer_norm_eps)
                self.resampler = QFormer(config.num_resampled_tokens, config.resampler_layers, *sizes)
        if config.has_mgvq:
            self.mgvq = FrozenMGVQ(**config.mgvq_config, encoder_only=True).requires_grad_(False)
            side = self.mgvq.image_size // 2 ** (len(self.mgvq.encoder.stages) - 1)  # stage 0 is empty
            self.anchors = AnchorProjector(config, self.mgvq.quant_conv.out_channels * side**2)
        elif config.anchors_per_image:
            self.anchors = AnchorProjector(config, config.num_anchors * config.vision_config.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.embed_tokens = value

    def get_image_features(
        self, pixel_values: Tensor | None = None, mgvq_pixel_values: Tensor | None = None, mgvq_codes: Tensor | None = None
    ) -> Tensor:
        """V_hy of each image, [images, N, hidden_size].

        pixel_values: [images, 3, s, s] as CLIP wants them; mgvq_pixel_values: [images, 3, s2, s2] in [-1, 1], or in their place
        mgvq_codes: [images, positions, groups], what the encoder made of them. An input that the model has no use for is ignored;
        a missing one, or another number of images, raises ValueError.
        """
        config, parts = self.config, {}
        if config.channels != "discrete":
            side = config.vision_config.image_size
            self._check_pixels("pixel_values", pixel_values, side)
            features, attention = self._vision_features(pixel_values)
            patches = self.projector(self.resampler(features) if config.resampler == "qformer" else features)
            parts["patches"] = average_tokens(patches, config.num_resampled_tokens) if config.resampler == "average" else patches
        if config.has_mgvq:
            if mgvq_codes is None:
                self._check_pixels("mgvq_pixel_values", mgvq_pixel_values, self.mgvq.image_size)
                mgvq_codes = self.mgvq.encode(mgvq_pixel_values)
            parts["anchors"] = self.anchors(self.mgvq.lookup(mgvq_codes))
        elif config.anchors_per_image:
            chosen = anchor_features(config.anchor_source, features, config.num_anchors, config.anchor_seed, attention)
            parts["anchors"] = self.anchors(chosen)
        if len(parts) == 2 and len(parts["patches"]) != len(parts["anchors"]):
            counts = [len(part) for part in parts.values()]
            other = "mgvq_codes" if mgvq_pixel_values is None else "mgvq_pixel_values"
            raise ValueError(f"pixel_values hold {counts[0]} images and {other} {counts[1]}; wanted the same ones in both")
        order = ("patches", "anchors") if config.fusion == "post" else ("anchors", "patches")
        return torch.cat([parts[name] for name in order if name in parts], 1)

    def _vision_features(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tower's features [images, patches, h], and CLS's attention to them [images, patches] where anchors are chosen by it."""
        watch = self.config.anchor_source == "topk_attention"
        seen = self.vision_tower(pixel_values, output_hidden_states=watch)
        with torch.no_grad():
            attention = attention_in_clip(self.vision_tower.encoder.layers[-1], seen.hidden_states[-2]) if watch else None
        return seen.last_hidden_state[:, 1:], attention

    def _check_pixels(self, name: str, pixels: Tensor | None, side: int) -> None:
        if pixels is None:
            raise ValueError(f"{name} is missing: with channels {self.config.channels} an image needs it; the model's processor makes it")
        if pixels.ndim != 4 or pixels.shape[1:] != (3, side, side):
            raise ValueError(f"{name} has shape {tuple(pixels.shape)}; wanted [images, 3, {side}, {side}]")

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        mgvq_pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: VocoCache | None = None,
        use_cache: bool | None = None,
        mgvq_codes: Tensor | None = None,
        image_keys_values: Tensor | None = None,
        **kwargs,
    ) -> HTCVLMOutput:
        """input_ids [batch, length] of what follows the cache, attention_mask [batch, (cached +) length] of 0 and 1.

        Images are those of the rows in order, given by pixels or by image_keys_values [images, layers, 2, heads, K, head_dim], which
        compress_images made of them. last_hidden_state is [batch, length, hidden_size]; it is NaN at placeholders of images given by
        keys and values, where nothing is computed.
        """
        for name in ("inputs_embeds", "position_ids"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"{name} cannot be given: HTC-VLM makes it from input_ids and attention_mask")
        pixels = {"pixel_values": pixel_values, "mgvq_pixel_values": mgvq_pixel_values, "mgvq_codes": mgvq_codes}
        known, given = image_keys_values is not None, any(x is not None for x in pixels.values())
        cache = self._cache(past_key_values, use_cache, known)
        real = self._real(input_ids, attention_mask, cache)
        behind = None if cache is None else cache.behind
        step = behind is not None and input_ids.shape[1] == 1 and not given and not known
        step = step and bool((real & (input_ids != self.config.image_token_id)).all())
        expansion = text_token(behind) if step else expand(self.config, input_ids, real, behind, known)

        embeds = self._expanded_embeddings(input_ids, expansion)
        features = None
        if known:
            images = self._known_images(image_keys_values, expansion, given)
        elif expansion.num_images or given:
            features = self.get_image_features(**pixels)
            self._check_count(len(features), expansion)
            rows, columns = expansion.visual
            embeds = embeds.index_put((rows[:, None], columns), features.to(embeds.dtype))

        if step:
            mask = cache.extend_by_text(self.config, expansion)
        elif cache is not None:
            mask = cache.extend(self.config, expansion, images if known else None)
        else:
            mask = allowed(self.config, expansion.tokens, expansion.tokens)
        outputs = self.language_model(
            inputs_embeds=embeds,
            attention_mask=self._attention_mask(mask, embeds, cache),
            position_ids=expansion.tokens.position,
            past_key_values=cache,
            use_cache=cache is not None,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if hidden.shape[1] != input_ids.shape[1]:
            hidden = hidden.gather(1, expansion.column[:, :, None].expand(-1, -1, hidden.shape[2]))
        if known:
            hidden = hidden.index_put((images.rows[:, None], images.columns), hidden.new_tensor(torch.nan))
        return HTCVLMOutput(
            last_hidden_state=hidden,
            past_key_values=cache if use_cache or past_key_values is not None else None,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=features,
            expansion=expansion,
        )

    @torch.no_grad()
    def compress_images(self, **pixels: Tensor) -> Tensor:
        """Keys and values of the voco tokens of images, given as to get_image_features: [images, layers, 2, heads, K, head_dim].

        They belong in any prompt, wherever the image stands in it, as image_keys_values. Raises ValueError for a model whose images
        cannot be computed by themselves.
        """
        if reason := why_not_alone(self.config):
            raise ValueError(f"images cannot be compressed by themselves: {reason}")
        voco = self.get_input_embeddings().weight[self.config.image_token_id]
        features = self.get_image_features(**pixels)
        return compress_images(self.language_model, self.config, features.to(voco.dtype), voco)

    def _known_images(self, keys_values: Tensor, expansion: Expansion, given: bool) -> KnownImages:
        """The images of a pass from their keys and values."""
        if given:
            raise ValueError("image_keys_values and pixels are both given; wanted one of them")
        if reason := why_not_alone(self.config):
            raise ValueError(f"image_keys_values cannot be used: {reason}")
        wanted = kept_shape(self.config)
        if keys_values.shape[1:] != wanted:
            raise ValueError(f"image_keys_values have shape {tuple(keys_values.shape)}; wanted [images, {', '.join(map(str, wanted))}]")
        self._check_count(len(keys_values), expansion)
        run = torch.arange(self.config.image_seq_length, device=expansion.first.device)
        keys_values = keys_values.to(expansion.start.device)
        keys = turn(keys_values[:, :, 0], self.language_model.rotary_emb, expansion.start)
        return KnownImages(expansion.visual[0], expansion.first[:, None] + run, keys, keys_values[:, :, 1])

    @staticmethod
    def _check_count(count: int, expansion: Expansion) -> None:
        if count != expansion.num_images:
            raise ValueError(f"input_ids have places for {expansion.num_images} images, but {count} were given; wanted as many")

    def _attention_mask(self, mask: Tensor | None, embeds: Tensor, cache: VocoCache | None) -> Tensor | None:
        """The rule's mask [batch, queries, keys], None where everything is seen, as the backbone wants it."""
        text = self.config.text_config
        fused = text._attn_implementation == "sdpa"
        if mask is None:
            if fused and "sliding_attention" not in (getattr(text, "layer_types", None) or ()):
                return None  # a single query, which SDPA lets see every key
            mask = torch.ones(len(embeds), 1, cache.get_seq_length() + 1, dtype=torch.bool, device=embeds.device)
        mask = mask[:, None]
        if fused:
            return mask
        return torch.zeros_like(mask, dtype=embeds.dtype).masked_fill(~mask, torch.finfo(embeds.dtype).min)  # eager adds it to the scores

    def _cache(self, given: VocoCache | None, use_cache: bool | None, known: bool) -> VocoCache | None:
        if isinstance(given, VocoCache):
            return given
        # An empty DynamicCache is what generate() makes by itself.
        if given is not None and (type(given) is not DynamicCache or given.offloading or given.get_seq_length()):
            seen = type(given).__name__ + (" that offloads" if given.offloading else "")
            wanted = "a VocoCache, which forward and compress return, or none and no cache_implementation"
            raise ValueError(f"past_key_values is a {seen}; wanted {wanted}")
        return VocoCache() if use_cache or given is not None or known else None  # what is known enters a pass through the cache

    def _real(self, input_ids: Tensor, attention_mask: Tensor | None, cache: VocoCache | None) -> Tensor:
        batch, length = input_ids.shape
        if attention_mask is None:
            return torch.ones_like(input_ids, dtype=torch.bool)
        past = 0 if cache is None else cache.get_seq_length()
        if attention_mask.shape not in ((batch, length), (batch, past + length)):
            wanted = f"[{batch}, {past + length}]" + (f" or [{batch}, {length}]" if past else "")
            raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}; wanted {wanted}: the rule for images is made inside")
        return attention_mask[:, -length:].bool()

    def _expanded_embeddings(self, input_ids: Tensor, expansion: Expansion) -> Tensor:
        """Embeddings of text and voco in their places, zeros at V_hy. [batch, n, hidden_size]"""
        embeds = self.get_input_embeddings()(input_ids)
        batch, width = expansion.tokens.data.shape[1:]
        if width == embeds.shape[1]:
            return embeds
        empty = embeds.new_zeros(batch, width, embeds.shape[2])
        return empty.scatter(1, expansion.column[:, :, None].expand_as(embeds), embeds)


class HTCVLMForConditionalGeneration(HTCVLMPreTrainedModel, VocoGeneration, GenerationMixin):
    """HTC-VLM with its output layer. Use it as any vision-language model of transformers."""

    def __init__(self, config: HTCVLMConfig):
        super().__init__(config)
        self.model = HTCVLMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def get_image_features(
        self, pixel_values: Tensor | None = None, mgvq_pixel_values: Tensor | None = None, mgvq_codes: Tensor | None = None
    ) -> Tensor:
        """V_hy of each image, [images, N, hidden_size]; see HTCVLMModel."""
        return self.model.get_image_features(pixel_values, mgvq_pixel_values, mgvq_codes)

    def compress_images(self, **pixels: Tensor) -> Tensor:
        """Keys and values of images' voco tokens, [images, layers, 2, heads, K, head_dim]; see HTCVLMModel."""
        return self.model.compress_images(**pixels)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        mgvq_pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: VocoCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        mgvq_codes: Tensor | None = None,
        image_keys_values: Tensor | None = None,
        **kwargs,
    ) -> HTCVLMOutput | tuple:
        """One pass over input_ids [batch, length] behind the cache, if any; images as in HTCVLMModel.

        labels: [batch, length], -100 where there is no loss; not shifted. logits_to_keep: the last so many columns (0: all),
        or their numbers. Bad input raises ValueError.
        """
        if input_ids is None:
            raise ValueError("input_ids are missing; HTC-VLM takes no inputs_embeds, since it must see where images stand")
        loss_arguments = {k: kwargs.pop(k) for k in ("num_items_in_batch",) if k in kwargs}
        images = dict(pixel_values=pixel_values, mgvq_pixel_values=mgvq_pixel_values)
        images |= dict(mgvq_codes=mgvq_codes, image_keys_values=image_keys_values)
        outputs = self.model(
            input_ids, attention_mask=attention_mask, past_key_values=past_key_values, use_cache=use_cache, **images, **kwargs
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        outputs.logits = self.lm_head(outputs.last_hidden_state[:, kept])
        if labels is not None:
            vocab = self.config.text_config.vocab_size
            outputs.loss = self.loss_function(logits=outputs.logits, labels=labels, vocab_size=vocab, **loss_arguments)
        outputs.last_hidden_state = None
        return outputs if return_dict is None or return_dict else outputs.to_tuple()
