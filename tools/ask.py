"""Ask an exported model: `python tools/ask.py runs/quickstart/hf --image picture.png "What shape is in the image?"`."""

import argparse
import sys
from pathlib import Path

from htc_megatron.config import ConfigError
from htc_megatron.data.images import BadImage, open_image
from htc_megatron.inference import ask, load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="exported folder")
    parser.add_argument("question", help='text; "<image>" in it says where the pictures stand, by default in front')
    parser.add_argument("--image", action="append", default=[], help="picture; give it again for several")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    a = parser.parse_args()
    try:
        images = []
        for path in map(Path, a.image):
            try:
                images.append(open_image(path.read_bytes()))
            except (OSError, BadImage) as error:
                raise ConfigError(f"picture {path}: {error}") from None
        print(ask(*load(a.model, device=a.device), images, a.question, a.max_new_tokens))
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
