"""HTC-VLM for transformers: an image's anchors and patches are compressed into its voco tokens by the language model's own layers.

One forward pass expands every image in place and masks by the rule of mask_htc_vlm.py. generate() does the same once for the
prompt, keeps the keys and values of voco and text alone, and decodes from those.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel, DynamicCache, GenerationMixin, LlamaModel, LogitsProcessorList, PreTrainedModel, Qwen2Model
from transformers.generation.logits_process import SuppressTokensLogitsProcessor
from transformers.modeling_outputs import ModelOutput

from .configuration_htc_vlm import HTCVLMConfig
from .mask_htc_vlm import Expansion, VocoCache, allowed, expand
from .modeling_mgvq import MGVQ

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
    """P_d, flattened discrete latents q [images, channels * positions] -> anchors [images, A, H]."""

    def __init__(self, config: HTCVLMConfig, flat_size: int):
        super().__init__()
        self.num_anchors = config.num_anchors
        self.fc1 = nn.Linear(flat_size, config.anchor_hidden_size)
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
        if config.channels != "continuous":
            self.mgvq = FrozenMGVQ(**config.mgvq_config, encoder_only=True).requires_grad_(False)
            side = self.mgvq.image_size // 2 ** (len(self.mgvq.encoder.stages) - 1)  # stage 0 is empty
            self.anchors = AnchorProjector(config, self.mgvq.quant_conv.out_channels * side**2)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.embed_tokens = value

    def get_image_features(self, pixel_values: Tensor | None = None, mgvq_pixel_values: Tensor | None = None) -> Tensor:
        """V_hy of each image, [images, N, hidden_size].

        pixel_values: [images, 3, s, s] as CLIP wants them; mgvq_pixel_values: [images, 3, s2, s2] in [-1, 1]. A channel that the
        model lacks ignores its input; a missing input, or another number of images, raises ValueError.
        """
        config, parts = self.config, {}
        if config.channels != "discrete":
            side = config.vision_config.image_size
            self._check_pixels("pixel_values", pixel_values, side)
            parts["patches"] = self.projector(self.vision_tower(pixel_values).last_hidden_state[:, 1:])
        if config.channels != "continuous":
            self._check_pixels("mgvq_pixel_values", mgvq_pixel_values, self.mgvq.image_size)
            q = self.mgvq.lookup(self.mgvq.encode(mgvq_pixel_values))
            parts["anchors"] = self.anchors(q)
        if len(parts) == 2 and len(parts["patches"]) != len(parts["anchors"]):
            counts = [len(part) for part in parts.values()]
            raise ValueError(f"pixel_values hold {counts[0]} images and mgvq_pixel_values {counts[1]}; wanted the same ones in both")
        order = ("patches", "anchors") if config.fusion == "post" else ("anchors", "patches")
        return torch.cat([parts[name] for name in order if name in parts], 1)

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
        **kwargs,
    ) -> HTCVLMOutput:
        """input_ids [batch, length] of what follows the cache, attention_mask [batch, (cached +) length] of 0 and 1.

        Images are those of the rows in order. last_hidden_state is [batch, length, hidden_size].
        """
        for name in ("inputs_embeds", "position_ids"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"{name} cannot be given: HTC-VLM makes it from input_ids and attention_mask")
        cache = self._cache(past_key_values, use_cache)
        real = self._real(input_ids, attention_mask, cache)
        expansion = expand(self.config, input_ids, real, cache)

        embeds = self._expanded_embeddings(input_ids, expansion)
        features = None
        given = pixel_values is not None or mgvq_pixel_values is not None
        if expansion.num_images or given:
            features = self.get_image_features(pixel_values, mgvq_pixel_values)
            if len(features) != expansion.num_images:
                raise ValueError(f"input_ids have places for {expansion.num_images} images, but {len(features)} were given; wanted as many")
            rows, columns = expansion.visual
            embeds = embeds.index_put((rows[:, None], columns), features.to(embeds.dtype))

        keys = expansion.tokens if cache is None else cache.extend(expansion)
        mask = allowed(self.config, expansion.tokens, keys)[:, None]
        if self.config.text_config._attn_implementation != "sdpa":  # eager adds its mask to the scores
            mask = torch.zeros_like(mask, dtype=embeds.dtype).masked_fill(~mask, torch.finfo(embeds.dtype).min)
        outputs = self.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=expansion.tokens.position,
            past_key_values=cache,
            use_cache=cache is not None,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if hidden.shape[1] != input_ids.shape[1]:
            hidden = hidden.gather(1, expansion.column[:, :, None].expand(-1, -1, hidden.shape[2]))
        return HTCVLMOutput(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=features,
            expansion=expansion,
        )

    def _cache(self, given: VocoCache | None, use_cache: bool | None) -> VocoCache | None:
        if isinstance(given, VocoCache):
            return given
        # An empty DynamicCache is what generate() makes by itself.
        if given is not None and (type(given) is not DynamicCache or given.offloading or given.get_seq_length()):
            seen = type(given).__name__ + (" that offloads" if given.offloading else "")
            wanted = "a VocoCache, which forward and compress return, or none and no cache_implementation"
            raise ValueError(f"past_key_values is a {seen}; wanted {wanted}")
        return VocoCache(self.config.text_config) if use_cache or given is not None else None

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


class HTCVLMForConditionalGeneration(HTCVLMPreTrainedModel, GenerationMixin):
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

    def get_image_features(self, pixel_values: Tensor | None = None, mgvq_pixel_values: Tensor | None = None) -> Tensor:
        """V_hy of each image, [images, N, hidden_size]; see HTCVLMModel."""
        return self.model.get_image_features(pixel_values, mgvq_pixel_values)

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
        **kwargs,
    ) -> HTCVLMOutput | tuple:
        """One pass over input_ids [batch, length] behind the cache, if any.

        labels: [batch, length], -100 where there is no loss; not shifted. logits_to_keep: the last so many columns (0: all),
        or their numbers. Bad input raises ValueError.
        """
        if input_ids is None:
            raise ValueError("input_ids are missing; HTC-VLM takes no inputs_embeds, since it must see where images stand")
        loss_arguments = {k: kwargs.pop(k) for k in ("num_items_in_batch",) if k in kwargs}
        outputs = self.model(
            input_ids, pixel_values, mgvq_pixel_values, attention_mask, past_key_values=past_key_values, use_cache=use_cache, **kwargs
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        outputs.logits = self.lm_head(outputs.last_hidden_state[:, kept])
        if labels is not None:
            vocab = self.config.text_config.vocab_size
            outputs.loss = self.loss_function(logits=outputs.logits, labels=labels, vocab_size=vocab, **loss_arguments)
        outputs.last_hidden_state = None
        return outputs if return_dict is None or return_dict else outputs.to_tuple()

    @torch.no_grad()
    def compress(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        mgvq_pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> VocoCache:
        """What prompts that begin alike share: the cache of input_ids [batch, length], voco and text alone.

        Without input_ids every image is a row of its own with nothing in front of it. `cache.select(rows)` makes the
        past_key_values of a batch: generate(input_ids of the whole prompts, past_key_values=...) goes on behind it.
        """
        if input_ids is None:
            pixels = pixel_values if pixel_values is not None else mgvq_pixel_values
            if pixels is None:
                raise ValueError("compress needs input_ids or images")
            input_ids = torch.full((len(pixels), self.config.image_seq_length), self.config.image_token_id, device=pixels.device)
        return self.model(input_ids, pixel_values, mgvq_pixel_values, attention_mask, use_cache=True).past_key_values

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, generation_config=None, logits_processor: LogitsProcessorList | None = None, **kwargs):
        """As GenerationMixin's, from a cache that holds no V_hy. The placeholder itself is never generated."""
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError("generate takes input_ids, not inputs_embeds: HTC-VLM must see where images stand")
        if kwargs.get("tokenizer") is not None:  # `transformers serve` gives the processor, which stop strings cannot use
            kwargs["tokenizer"] = getattr(kwargs["tokenizer"], "tokenizer", kwargs["tokenizer"])
        device = (inputs if inputs is not None else kwargs.get("input_ids", self.lm_head.weight)).device
        processors = LogitsProcessorList(logits_processor or [])
        processors.append(SuppressTokensLogitsProcessor([self.config.image_token_id], device=device))
        return super().generate(inputs, generation_config, logits_processor=processors, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        """Refused with ValueError, and generate_batch with it: a paged cache would keep V_hy and know nothing of the rule."""
        raise ValueError("HTC-VLM cannot be run by continuous batching, whose cache would keep every image's V_hy; use generate")

    def prepare_inputs_for_generation(self, input_ids: Tensor, is_first_iteration: bool | None = False, **kwargs) -> dict:
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        inputs.pop("position_ids", None)
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in ("pixel_values", "mgvq_pixel_values"):
                inputs.pop(name, None)
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs
    ) -> tuple[Tensor, dict]:
        """Beams and several answers: a row's images are repeated together, not one by one."""
        images = {name: kwargs.pop(name, None) for name in ("pixel_values", "mgvq_pixel_values")}
        count = None
        if expand_size > 1 and any(x is not None for x in images.values()):
            mask = kwargs.get("attention_mask")
            hit = input_ids == self.config.image_token_id
            count = ((hit & mask.bool()) if mask is not None else hit).sum(1) // self.config.image_seq_length
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        for name, pixels in images.items():
            if pixels is not None and count is not None and int(count.sum()) == len(pixels):
                pixels = torch.cat([part for rows in pixels.split(count.tolist()) for part in [rows] * expand_size])
            kwargs[name] = pixels
        return input_ids, kwargs
