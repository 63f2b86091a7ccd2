"""LLaVA-1.5's image preparation against the definition, and what is refused."""

import io

import numpy as np
import pytest
from PIL import Image

from htc_megatron.data.images import BadImage, blank_codes, blank_pixels, clip_pixels, open_image, pad_to_square
from tests.data_tiny import png

MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])


@pytest.mark.parametrize(("width", "height", "left", "top"), [(10, 4, 0, 3), (4, 9, 2, 0), (5, 8, 1, 0)])
def test_pads_centred(width, height, left, top):
    source = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    square = np.asarray(pad_to_square(Image.fromarray(source)))
    side = max(width, height)
    wanted = np.broadcast_to(np.array([122, 116, 104], dtype=np.uint8), (side, side, 3)).copy()
    wanted[top : top + height, left : left + width] = source
    assert np.array_equal(square, wanted)


def test_normalises_without_resizing():
    """At the size wanted, pixels are the definition's: (x / 255 - mean) / std, channels first; 1e-6 for float32."""
    source = np.random.default_rng(1).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    pixels = clip_pixels(Image.fromarray(source), 6)
    assert (pixels.shape, pixels.dtype) == ((3, 6, 6), np.float32) and pixels.flags["C_CONTIGUOUS"]
    np.testing.assert_allclose(pixels, ((source / 255 - MEAN) / STD).transpose(2, 0, 1), atol=1e-6)


def test_agrees_with_transformers():
    """CLIPImageProcessor on the padded image: LLaVA's own way. One grey level is 0.015; bicubic is the same PIL call."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 14}, crop_size={"height": 14, "width": 14})
    image = Image.open(io.BytesIO(png(3, 40, 23)))
    wanted = processor(pad_to_square(image), return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(clip_pixels(image, 14), wanted, atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "1"])
def test_every_mode_becomes_rgb(mode):
    buffer = io.BytesIO()
    Image.new(mode, (5, 4)).save(buffer, "TIFF")
    assert open_image(buffer.getvalue()).mode == "RGB"


@pytest.mark.parametrize(
    ("data", "sentence"), [(b"", "0 bytes are not an image"), (b"GIF89a", "image"), (png(0)[:200], "decoded"), (png(0)[:-300], "decoded")]
)
def test_broken_images(data, sentence):
    with pytest.raises(BadImage, match=sentence):
        open_image(data)


def test_blank_image():
    from htc_megatron.config import ModelConfig

    assert blank_pixels(ModelConfig()).shape == (1, 3, 336, 336) and blank_codes(ModelConfig()).shape == (1, 441, 8)
    assert not blank_pixels(ModelConfig()).any() and not blank_codes(ModelConfig()).any()
