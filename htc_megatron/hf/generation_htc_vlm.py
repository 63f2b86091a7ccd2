"""Answers from an HTC-VLM: images are compressed by themselves where that is the same, and text is decoded from the voco cache."""

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList
from transformers.generation.logits_process import LogitsProcessor

from .cache_htc_vlm import VocoCache
from .image_htc_vlm import why_not_alone

PIXELS = ("pixel_values", "mgvq_pixel_values", "mgvq_codes")
IMAGE_INPUTS = (*PIXELS, "image_keys_values")  # each has an image a row
WHOLE_PASS = ("use_cache", "output_hidden_states", "output_attentions", "assistant_model")  # generate's, that want every token


class NeverPlaceholder(LogitsProcessor):
    """Scores [batch, vocab] under which the placeholder `token` is not generated."""

    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self.token] = -torch.inf
        return scores


class VocoGeneration:
    """In front of GenerationMixin: what a model with images does in its places, and `compress`, which begins what many prompts share."""

    @torch.no_grad()
    def compress(self, input_ids: Tensor | None = None, *, attention_mask: Tensor | None = None, **images: Tensor) -> VocoCache:
        """What prompts that begin alike share: the cache of input_ids [batch, length], voco and text alone. images: as in forward.

        Without input_ids every image is a row of its own with nothing in front of it. `cache.select(rows)` makes the
        past_key_values of a batch: generate(input_ids of the whole prompts, past_key_values=...) goes on behind it.
        """
        if input_ids is None:
            given = next((x for x in images.values() if x is not None), None)
            if given is None:
                raise ValueError("compress needs input_ids or images")
            input_ids = torch.full((len(given), self.config.image_seq_length), self.config.image_token_id, device=given.device)
        return self.model(input_ids, attention_mask=attention_mask, use_cache=True, **self._by_themselves(images)).past_key_values

    def _by_themselves(self, images: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        """Inputs of images by keys and values instead of pixels, where that is the same."""
        pixels = {name: images[name].to(self.device) for name in PIXELS if images.get(name) is not None}
        spread = len(set((getattr(self, "hf_device_map", None) or {}).values())) > 1  # layers are moved to by their own hooks
        if not pixels or images.get("image_keys_values") is not None or why_not_alone(self.config) or spread:
            return images
        rest = {name: value for name, value in images.items() if name not in PIXELS}
        return rest | {"image_keys_values": self.compress_images(**pixels)}

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, generation_config=None, logits_processor: LogitsProcessorList | None = None, **kwargs):
        """As GenerationMixin's, from a cache that holds no V_hy. Images as in forward. The placeholder itself is never generated."""
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError("generate takes input_ids, not inputs_embeds: HTC-VLM must see where images stand")
        if kwargs.get("tokenizer") is not None:  # `transformers serve` gives the processor, which stop strings cannot use
            kwargs["tokenizer"] = getattr(kwargs["tokenizer"], "tokenizer", kwargs["tokenizer"])
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        ends_in_image = ids is not None and bool((ids[:, -1:] == self.config.image_token_id).any())
        if kwargs.get("image_keys_values") is not None and ends_in_image:
            raise ValueError("a prompt ends in an image that is given by its keys and values; wanted text behind it, or its pixels")
        config = generation_config or self.generation_config
        settings = {name: kwargs.get(name, getattr(config, name, None)) for name in WHOLE_PASS}
        if not ends_in_image and settings.pop("use_cache") is not False and not any(settings.values()):
            kwargs = self._by_themselves(kwargs)
        processors = LogitsProcessorList(logits_processor or [])
        processors.append(NeverPlaceholder(self.config.image_token_id))
        return super().generate(inputs, generation_config, logits_processor=processors, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict, generation_mode, batch_size: int, max_cache_length: int):
        """The cache gets room for the whole answer at once."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
        cache = model_kwargs.get("past_key_values")
        if type(cache) is DynamicCache and not cache.offloading and not cache.get_seq_length():
            model_kwargs["past_key_values"] = VocoCache(max_cache_length)
        elif isinstance(cache, VocoCache):
            cache.reserve(max_cache_length)

    def init_continuous_batching(self, *args, **kwargs):
        """Refused with ValueError, and generate_batch with it: a paged cache would keep V_hy and know nothing of the rule."""
        raise ValueError("HTC-VLM cannot be run by continuous batching, whose cache would keep every image's V_hy; use generate")

    def prepare_inputs_for_generation(self, input_ids: Tensor, is_first_iteration: bool | None = False, **kwargs) -> dict:
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        inputs.pop("position_ids", None)
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in IMAGE_INPUTS:
                inputs.pop(name, None)
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs
    ) -> tuple[Tensor, dict]:
        """Beams and several answers: a row's images are repeated together, not one by one."""
        images = {name: kwargs.pop(name) for name in IMAGE_INPUTS if name in kwargs}
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
