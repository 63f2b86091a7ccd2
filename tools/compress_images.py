"""Compress images once: `python tools/compress_images.py runs/quickstart/hf pictures/ --store runs/store`.

The store keeps the keys and values of each image's voco tokens; `python tools/ask.py runs/quickstart/hf --store runs/store --image
pictures/1.png "What is it?"` answers from them. Images that are there already are skipped, so the command may be run again.
"""

import argparse
import sys
from pathlib import Path

from htc_megatron.config import ConfigError
from htc_megatron.inference import ImageStore, compress_into, image_files, load


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="exported folder")
    parser.add_argument("images", nargs="+", help="image files, and folders of them")
    parser.add_argument("--store", required=True, type=Path, help="folder, made where there is none; several programs may fill it together")
    parser.add_argument("--batch-size", type=int, default=16, help="images compressed together (default %(default)s)")
    parser.add_argument("--shard-mib", type=int, default=256, help="size at which a file is closed (default %(default)s)")
    parser.add_argument("--dtype", default="auto", help="that the model is loaded in; it belongs to the store (default: as exported)")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    def say(sentence: str) -> None:
        print(f"compress_images: {sentence}", file=sys.stderr)

    try:
        if min(options.batch_size, options.shard_mib) < 1:
            raise ConfigError(f"--batch-size is {options.batch_size} and --shard-mib {options.shard_mib}; wanted at least 1 each")
        files = image_files(options.images)
        model, processor = load(options.model, options.dtype, options.device)
        store = ImageStore(options.store, model, processor.image_processor, create=True)
        counts = compress_into(store, model, processor.image_processor, files, options.batch_size, options.shard_mib << 20, say=say)
    except ConfigError as error:
        say(str(error))
        return 2
    size = sum(path.stat().st_size for path in options.store.iterdir()) / 2**20
    print(
        f"{options.store}: {counts.compressed} images compressed, {counts.there} were there, {counts.bad} left out; "
        f"{len(store)} in all, {size:.1f} MiB"
    )
    return 1 if counts.bad else 0


if __name__ == "__main__":
    sys.exit(main())
