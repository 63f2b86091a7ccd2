"""Image bytes to pixels the way LLaVA-1.5 prepares them, and the blank image of batches without one."""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from htc_megatron.config import ModelConfig

PAD_COLOUR = (122, 116, 104)  # CLIP's mean in 0..255, LLaVA-1.5's padding
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
# [3, 256] float32: what each of a channel's bytes becomes. Looked up, a picture takes less time, to the same bits.
NORMALISED = ((np.arange(256, dtype=np.float32)[:, None] / np.float32(255) - CLIP_MEAN) / CLIP_STD).T.copy()


class BadImage(ValueError):
    """A sentence that says why an image cannot be used."""


def open_image(data: bytes) -> Image.Image:
    """Fully decoded RGB image. Raises BadImage where the bytes are no image, or a broken one."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except UnidentifiedImageError:
        raise BadImage(f"the file's {len(data)} bytes are not an image of a known format") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise BadImage(f"the image cannot be decoded: {error}") from None


def pad_to_square(image: Image.Image) -> Image.Image:
    """The image centred on a square of PAD_COLOUR, as wide as its longer side."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), PAD_COLOUR)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def clip_pixels(image: Image.Image, size: int) -> np.ndarray:
    """Padded to a square, resized bicubic, normalised with CLIP's mean and deviation. [3, size, size] float32."""
    square = pad_to_square(image)
    if square.size != (size, size):
        square = square.resize((size, size), Image.Resampling.BICUBIC)
    values, pixels = np.asarray(square), np.empty((3, size, size), dtype=np.float32)
    for channel in range(3):
        np.take(NORMALISED[channel], values[..., channel], out=pixels[channel], mode="clip")  # mode: without it, take buffers its output
    return pixels


def blank_pixels(model: ModelConfig) -> np.ndarray:
    """The blank image the front-end runs on, at weight zero, where a micro-batch has none. [1, 3, s, s] float32 zeros."""
    return np.zeros((1, 3, model.vision.image_size, model.vision.image_size), dtype=np.float32)


def blank_codes(model: ModelConfig) -> np.ndarray:
    """The blank image's codes: row 0 of every group. [1, positions, groups] int16 zeros."""
    return np.zeros((1, model.mgvq.grid**2, model.mgvq.groups), dtype=np.int16)
