"""Draw where the voco token looks: `python tools/attention_map.py runs/quickstart/hf --image picture.png --out attention.png`.

--image takes folders of pictures too: numbers and map are the mean over all of them.
"""

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm

from htc_megatron.config import ConfigError
from htc_megatron.evaluation.attention import draw, voco_attention
from htc_megatron.inference import image_files, load, read_image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="exported folder")
    parser.add_argument("--image", action="append", required=True, help="picture, or folder of some; again for more. The first is shown")
    parser.add_argument("--out", required=True, help="PNG to write; the numbers go to a .json beside it")
    parser.add_argument("--device", default="cpu")
    a = parser.parse_args()
    try:
        out = Path(a.out)
        if out.suffix != ".png":
            raise ConfigError(f"--out is {a.out}; wanted a file that ends in .png")
        files = image_files(a.image)
        shown = read_image(files[0])
        pictures = map(read_image, tqdm(files, desc="attention", unit=" images", disable=len(files) == 1))
        found = voco_attention(*load(a.model, device=a.device), pictures)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".json").write_text(json.dumps(found.to_dict()) + "\n", encoding="utf-8")
        draw(found, shown, out)
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    shares = " ".join(f"{share:.2f}" for share in found.anchor_share)
    print(f"share of the voco's attention to the image that falls on the anchors, by layer: {shares} (uniform: {found.uniform_share:.3f})")


if __name__ == "__main__":
    main()
