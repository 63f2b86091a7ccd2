"""Ask an exported model: `python tools/ask.py runs/quickstart/hf --image picture.png "What shape is in the image?"`."""

import argparse
import sys
from pathlib import Path

from htc_megatron.config import ConfigError
from htc_megatron.inference import ImageStore, ask, load, read_image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="exported folder")
    parser.add_argument("question", help='text; "<image>" in it says where the pictures stand, by default in front')
    parser.add_argument("--image", action="append", default=[], help="picture; give it again for several")
    parser.add_argument("--store", type=Path, help="folder of tools/compress_images.py, which has the pictures: they are not encoded again")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    a = parser.parse_args()
    try:
        images = list(map(Path if a.store else read_image, a.image))
        model, processor = load(a.model, device=a.device)
        store = ImageStore(a.store, model, processor.image_processor) if a.store else None
        print(ask(model, processor, images, a.question, a.max_new_tokens, store))
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
