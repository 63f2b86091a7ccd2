"""Images and text to what HTC-VLM takes: pixels for both channels, and ids in which every image is its run of placeholders.

Text is tokenised in the pieces that training used: cut at images, in front of an answer and behind it, so that no token spans a
boundary. "<image>" and the tokenizer's begin and end of sequence act in a text; everything else in it is only spelled out.
"""

import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import load_image

from .modeling_mgvq import mgvq_pixels

IMAGE_TOKEN = "<image>"
ANSWER_MARK = " ASSISTANT:"
PAD_COLOUR = (122, 116, 104)  # CLIP's mean in 0..255, LLaVA-1.5's padding
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CHAT_TEMPLATE = """\
{%- set ns = namespace(system=SYSTEM_PROMPT, first=true) -%}
{%- macro text(content) -%}
{%- if content is string -%}{{ content | trim }}
{%- else -%}
{%- for part in content -%}
{%- if not loop.first -%}{{ '\\n' }}{%- endif -%}
{%- if part.type == 'image' -%}<image>{%- elif part.type == 'text' -%}{{ part.text | trim }}
{%- else -%}{{ raise_exception('content of type ' ~ part.type ~ ' is not known; wanted image or text') }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{%- set ns.system = text(message.content) -%}
{%- elif message.role == 'user' -%}
{%- if ns.first and ns.system -%}{{ ns.system ~ ' ' }}{%- endif -%}
{%- set ns.first = false -%}
{{ 'USER: ' ~ text(message.content) }}
{%- elif message.role == 'assistant' -%}
{%- set answer = text(message.content) -%}
{{ ' ASSISTANT:' ~ (' ' if answer else '') ~ answer ~ eos_token }}
{%- else -%}{{ raise_exception('role ' ~ message.role ~ ' is not known; wanted system, user or assistant') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ ' ASSISTANT:' }}{%- endif -%}
"""


def vicuna_template(system: str = SYSTEM_PROMPT) -> str:
    """Chat template of Vicuna v1. An image is "<image>" and a line of its own; a system message replaces `system`."""
    quoted = "'" + system.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
    return CHAT_TEMPLATE.replace("SYSTEM_PROMPT", quoted, 1)


def clip_pixels(image: Image.Image, size: int) -> Tensor:
    """LLaVA-1.5's preparation: centred on a square, resized bicubic, normalised by CLIP's mean. [3, size, size] float32."""
    image = image.convert("RGB")
    width, height = image.size
    if width != height:
        side = max(width, height)
        square = Image.new("RGB", (side, side), PAD_COLOUR)
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image = square
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.float32) / np.float32(255)
    return torch.from_numpy(np.ascontiguousarray(((pixels - CLIP_MEAN) / CLIP_STD).transpose(2, 0, 1)))


class HTCVLMFeatures(BatchFeature):
    """A batch whose `to(dtype)` leaves MGVQ's pixels in fp32, since rounded pixels can give other codes."""

    def to(self, *args, **kwargs) -> "HTCVLMFeatures":
        exact = self.data.get("mgvq_pixel_values")
        super().to(*args, **kwargs)
        if isinstance(exact, Tensor):
            self.data["mgvq_pixel_values"] = exact.to(self.data["mgvq_pixel_values"].device)
        return self


class HTCVLMImageProcessor(BaseImageProcessor):
    """Pixels for the channels a model has: `pixel_values` for the tower, `mgvq_pixel_values` for the discrete tokenizer.

    image_size, mgvq_image_size: pixels a side. channels: hybrid | continuous | discrete.
    """

    model_input_names = ["pixel_values", "mgvq_pixel_values"]

    def __init__(self, image_size: int = 336, mgvq_image_size: int = 336, channels: str = "hybrid", **kwargs):
        super().__init__(**kwargs)
        self.image_size, self.mgvq_image_size, self.channels = image_size, mgvq_image_size, channels

    def preprocess(self, images, return_tensors: str | None = None, **kwargs) -> HTCVLMFeatures:
        """One image or any nesting of them, in order: PIL images, paths, URLs or uint8 arrays [height, width, 3]."""
        opened = [open_image(image) for image in flatten(images)]
        data = {}
        if self.channels != "discrete":
            data["pixel_values"] = torch.stack([clip_pixels(image, self.image_size) for image in opened])
        if self.channels != "continuous":
            data["mgvq_pixel_values"] = torch.stack([mgvq_pixels(image, self.mgvq_image_size) for image in opened])
        return HTCVLMFeatures(data, tensor_type=return_tensors)


def flatten(images) -> list:
    if isinstance(images, (list, tuple)):
        return [image for part in images for image in flatten(part)]
    return [images]


def open_image(image) -> Image.Image:
    """A PIL image in RGB from a path, a URL, a PIL image or an array; anything else raises ValueError.

    As in training, a camera's note on how to turn the picture (EXIF) is not followed.
    """
    if isinstance(image, (np.ndarray, Tensor)):
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim not in (2, 3):
            raise ValueError(f"an image array is {array.dtype} of shape {array.shape}; wanted uint8, [height, width, 3]")
        image = Image.fromarray(array)
    if isinstance(image, (str, os.PathLike)):
        if not os.path.isfile(image):
            return load_image(os.fspath(image))  # a URL or base64; it refuses what is neither
        with Image.open(image) as opened:
            return opened.convert("RGB")
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    raise ValueError(f"an image is a {type(image).__name__}; wanted a PIL image, a path, a URL or a uint8 array")


class HTCVLMProcessor(ProcessorMixin):
    """Image processor and tokenizer together. num_image_tokens: placeholders an image takes in input_ids."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template: str | None = None, num_image_tokens: int = 1, **kwargs):
        self.num_image_tokens = num_image_tokens
        self.image_token = IMAGE_TOKEN
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token_id = tokenizer.convert_tokens_to_ids("<voco>")
        first = tokenizer.convert_ids_to_tokens(self._spell("a"))[0]
        self._writes_space = first.startswith("\u2581")  # such a tokenizer puts a space in front by itself

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        """Both parts by their own classes: no code beside this file is run, so no further trust is asked for."""
        kinds = (HTCVLMImageProcessor, PreTrainedTokenizerFast)
        return [kind.from_pretrained(pretrained_model_name_or_path, **kwargs) for kind in kinds]

    def _spell(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of one text, images expanded to their placeholders, as training tokenised it."""
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token
        ids = []
        if bos is not None and (add_special_tokens or text.startswith(bos)):
            ids.append(self.tokenizer.bos_token_id)
            text = text.removeprefix(bos)
        turns = text.split(eos)
        for number, turn in enumerate(turns):
            answered = number + 1 < len(turns)
            cut = turn.find(ANSWER_MARK) if answered else -1  # what stands before an answer, and the answer
            parts = [turn] if cut < 0 else [turn[: cut + len(ANSWER_MARK)], turn[cut + len(ANSWER_MARK) :]]
            for part in parts:
                for index, piece in enumerate(part.split(IMAGE_TOKEN)):
                    ids += [self.image_token_id] * self.num_image_tokens * (index > 0)
                    ids += self._spell(piece[1:] if self._writes_space and piece.startswith(" ") else piece)
            ids += [self.tokenizer.eos_token_id] * answered
        return ids

    def __call__(
        self,
        images=None,
        text: str | Sequence[str] | None = None,
        padding: bool | str = True,
        max_length: int | None = None,
        padding_side: str | None = None,
        add_special_tokens: bool = True,
        return_tensors: str | None = None,
        **kwargs,
    ) -> HTCVLMFeatures:
        """input_ids and attention_mask of the texts, pixels of the images.

        images: one, a list, or a list a text; as many as there are "<image>" in the texts, in their order.
        padding: rows to one length, on the left unless told otherwise. Truncation is refused: it would cut images in two.
        """
        if kwargs.get("truncation"):
            raise ValueError("truncation cannot be on: it would cut an image's placeholders; shorten the text instead")
        texts = [text] if isinstance(text, str) else list(text or [])
        if images is None and not texts:
            raise ValueError("the processor needs text, images or both")
        if images is not None and texts:
            self._check_counts(images, texts)
        elif images is None and any(IMAGE_TOKEN in t for t in texts):
            raise ValueError(f"the text has {sum(t.count(IMAGE_TOKEN) for t in texts)} {IMAGE_TOKEN}, but no images were given")
        data = {}
        if texts:
            rows = [self.encode(t, add_special_tokens) for t in texts]
            side = padding_side or "left"
            data |= self.tokenizer.pad({"input_ids": rows}, padding=padding, max_length=max_length, padding_side=side)
        if images is not None and flatten(images):
            data |= self.image_processor.preprocess(images)
        return HTCVLMFeatures(data, tensor_type=return_tensors)

    def _check_counts(self, images, texts: list[str]) -> None:
        wanted = [t.count(IMAGE_TOKEN) for t in texts]
        if isinstance(images, (list, tuple)) and images and all(isinstance(i, (list, tuple)) for i in images):
            given = [len(flatten(row)) for row in images]
            if given != wanted:
                raise ValueError(f"the texts have {wanted} {IMAGE_TOKEN}, but {given} images were given; wanted as many in each")
        elif len(flatten(images)) != sum(wanted):
            raise ValueError(f"the texts have {sum(wanted)} {IMAGE_TOKEN}, but {len(flatten(images))} images were given; wanted as many")

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", *self.image_processor.model_input_names]

    def batch_decode(self, *args, **kwargs) -> list[str]:
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args, **kwargs) -> str:
        return self.tokenizer.decode(*args, **kwargs)
