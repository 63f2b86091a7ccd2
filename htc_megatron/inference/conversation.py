"""A conversation about images: each is compressed once, and every turn goes on from the cache of those before it."""

from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from htc_megatron.config import ConfigError
from htc_megatron.hf.cache_htc_vlm import VocoCache
from htc_megatron.hf.mask_htc_vlm import visual_offsets
from htc_megatron.hf.modeling_htc_vlm import HTCVLMForConditionalGeneration
from htc_megatron.hf.processing_htc_vlm import HTCVLMProcessor
from htc_megatron.inference.answer import image_inputs, message
from htc_megatron.inference.store import ImageStore


class Conversation:
    """Turns of one conversation with an exported model; equal to a single pass over all of it.

    messages: as the chat template takes them. ids: the tokens of all turns, answers as they were generated.
    """

    def __init__(self, model: HTCVLMForConditionalGeneration, processor: HTCVLMProcessor, store: ImageStore | None = None):
        self.model, self.processor, self.store = model, processor, store
        self.new()

    def new(self) -> None:
        """Forget all turns, and the images that wait for one."""
        self.messages: list[dict[str, Any]] = []
        self.ids: list[int] = []
        self._cache = VocoCache()
        self._images: list[dict[str, Tensor]] = []  # of the next turn, as the model takes them

    def add(self, image: Any) -> None:
        """Put an image in front of the next question, or where that says by "<image>".

        image: what the processor takes, or with a store a file that is in it; ConfigError where it is not.
        """
        self._images.append(image_inputs(self.model, self.processor, [image], self.store))

    def say(self, question: str, max_new_tokens: int = 128, streamer: BaseStreamer | None = None, **options: Any) -> str:
        """The answer to a question, which becomes part of the conversation.

        max_new_tokens: at most so many, or as many as the model has positions for. options: generate's; greedy unless they say otherwise.

        Raises ConfigError, and the conversation stays as it was, where "<image>" stands in the question another number of times than
        images were added, or where there is no room for the answer. An error within generate() leaves an empty conversation.
        """
        messages = [*self.messages, message(question, len(self._images))]
        ids = [*self.ids, *self._following(messages)]
        max_new_tokens = min(max_new_tokens, self._room(ids))
        images = {name: torch.cat([image[name] for image in self._images]) for image in self._images[:1] for name in image}
        row = torch.tensor([ids], device=self.model.device)
        try:
            made = self.model.generate(
                row,
                attention_mask=torch.ones_like(row),
                past_key_values=self._cache,
                max_new_tokens=max_new_tokens,
                streamer=streamer,
                return_dict_in_generate=True,
                **{"do_sample": False} | images | options,
            )
        except BaseException:  # an interruption too: layers of the cache may be at different tokens
            self.new()
            raise
        self.ids, self._cache, self._images = made.sequences[0].tolist(), made.past_key_values, []
        answer = self.processor.decode(self.ids[len(ids) :], skip_special_tokens=True).strip()
        if self.ids[-1] != self.processor.tokenizer.eos_token_id:  # cut at max_new_tokens
            self.ids.append(self.processor.tokenizer.eos_token_id)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer

    def _following(self, messages: list[dict[str, Any]]) -> list[int]:
        """Ids of the last message and the answer's beginning, behind those of the others."""
        before = self.processor.apply_chat_template(messages[:-1]) if self.messages else ""
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        if not text.startswith(before) or (before and not before.endswith(self.processor.tokenizer.eos_token)):
            raise ConfigError("the chat template changes earlier turns or does not end an answer by </s>, so no turn can follow another")
        return self.processor.encode(text.removeprefix(before), add_special_tokens=not before)

    def _room(self, ids: list[int]) -> int:
        """Tokens that can follow. Raises ConfigError where none can."""
        config = self.model.config
        hidden = visual_offsets(config)[1] - config.image_seq_length  # positions of an image that have no placeholder
        taken = len(ids) + ids.count(config.image_token_id) // config.image_seq_length * hidden
        there = config.text_config.max_position_embeddings
        if taken >= there:
            raise ConfigError(f"the conversation takes {taken} positions with this question, but the model has {there}; begin a new one")
        return there - taken
