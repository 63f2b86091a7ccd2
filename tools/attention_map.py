"""Draw where the voco token looks: `python tools/attention_map.py runs/quickstart/hf --image picture.png --out attention.png`."""

import argparse
import json
import sys
from pathlib import Path

from htc_megatron.config import ConfigError
from htc_megatron.data.images import BadImage, open_image
from htc_megatron.evaluation.attention import draw, voco_attention
from htc_megatron.inference import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="exported folder")
    parser.add_argument("--image", action="append", required=True, help="picture; numbers are the mean over several, the first is drawn")
    parser.add_argument("--out", required=True, help="PNG to write; the numbers go to a .json beside it")
    parser.add_argument("--device", default="cpu")
    a = parser.parse_args()
    try:
        out = Path(a.out)
        if out.suffix != ".png":
            raise ConfigError(f"--out is {a.out}; wanted a file that ends in .png")
        images = []
        for path in map(Path, a.image):
            try:
                images.append(open_image(path.read_bytes()))
            except (OSError, BadImage) as error:
                raise ConfigError(f"picture {path}: {error}") from None
        found = voco_attention(*load(a.model, device=a.device), images)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".json").write_text(json.dumps(found.to_dict()) + "\n", encoding="utf-8")
        draw(found, images[0], out)
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    shares = " ".join(f"{share:.2f}" for share in found.anchor_share)
    print(f"share of the voco's attention to the image that falls on the anchors, by layer: {shares} (uniform: {found.uniform_share:.3f})")


if __name__ == "__main__":
    main()
