"""LLaVA JSON and an image folder to the shards that training reads.

python tools/prepare_data.py --data llava.json --images images/ --tokenizer tokenizer.model --mgvq mgvq.safetensors --output data/train
"""

import argparse
import sys
from pathlib import Path

import torch

from htc_megatron.config import ConfigError, DataConfig
from htc_megatron.data.conversation import VICUNA_SYSTEM_PROMPT, Template
from htc_megatron.data.prepare import QUARANTINE, CodeEncoder, Preparation, Work, prepare
from htc_megatron.data.tokenizer import load_tokenizer
from htc_megatron.model.mgvq import load_mgvq, mgvq_fingerprint


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="LLaVA conversations: a .json list or a .jsonl file")
    add("--images", type=Path, required=True, help="folder that the records' image names are relative to")
    add("--output", type=Path, required=True, help="folder to write; must not exist")
    add("--tokenizer", required=True, help="sentencepiece .model file or transformers tokenizer folder")
    add("--mgvq", type=Path, help="MGVQ weights, .safetensors or the public .pt; left out: no codes, for models whose anchors are not its")
    add(
        "--codes-from", type=Path, nargs="+", default=[], metavar="DIR", help="earlier outputs: images that they hold are not encoded again"
    )
    add("--system-prompt", default=VICUNA_SYSTEM_PROMPT, help="text before the first USER:; may be empty")
    add("--seq-length", type=int, default=0, help="leave out samples longer than this, images expanded; 0: no limit")
    add("--tokens-per-image", type=int, default=0, help="places an image takes in --seq-length: anchors + patches + voco tokens")
    add("--max-bad-share", type=float, default=DataConfig.max_bad_share, help="records that may be left out (default %(default)s)")
    add("--batch-size", type=int, default=16, help="images that MGVQ encodes together")
    add("--shard-mib", type=int, default=512, help="size at which a shard is closed")
    add("--part", default="0/1", metavar="I/N", help="prepare the I-th of N stretches into OUTPUT/part-I-of-N, for N machines")
    add("--overwrite", action="store_true", help="replace OUTPUT")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where MGVQ runs (default %(default)s)")
    return parser.parse_args(arguments)


def parse_part(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit()):
        raise ConfigError(f"--part is {text!r}, wanted I/N such as 0/4")
    return int(number), int(count)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        encoder, work = None, Work()
        if options.mgvq:
            model = load_mgvq(options.mgvq, encoder_only=True)
            encoder = CodeEncoder(model.to(options.device), mgvq_fingerprint(model), options.batch_size, options.device)
        index = prepare(
            Preparation(
                data=options.data,
                images=options.images,
                output=options.output,
                tokenizer=load_tokenizer(options.tokenizer),
                template=Template(options.system_prompt),
                encoder=encoder,
                seq_length=options.seq_length,
                tokens_per_image=options.tokens_per_image,
                max_bad_share=options.max_bad_share,
                shard_bytes=options.shard_mib << 20,
                part=parse_part(options.part),
                overwrite=options.overwrite,
                codes_from=tuple(options.codes_from),
            ),
            work,
        )
    except ConfigError as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 2
    counts = index.counts
    print(
        f"{options.output}: {counts['samples']} samples, {counts['images']} images in {len(index.shards)} shards, "
        f"{counts['text_tokens']} text tokens, {counts['supervised_tokens']} of them supervised; "
        f"{counts['bad']} records left out" + (f", named in {QUARANTINE}" if counts["bad"] else "")
    )
    if encoder is not None:
        print(f"{work.encoded} images encoded, {work.images_per_second:.1f} a second; {work.known} had their codes already")
    return 0


if __name__ == "__main__":
    sys.exit(main())
