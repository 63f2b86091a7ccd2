"""Write easy-VQA as LLaVA JSON and image folders, and train a tokenizer on the training questions.

python examples/easy_vqa_to_llava.py runs/quickstart/data

writes test.json, test/ (images), train/ (images), tokenizer.model, and what the three stages of training learn from, each all of
its kind in the training split:

align.json     what shape is it? A question a conversation.
shapes.json    every question about shapes, yes and no included.
train.json     every question.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from htc_megatron.config import ConfigError
from htc_megatron.evaluation.easy_vqa import Question, conversations, load_questions, train_tokenizer, write_images


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to write to")
    parser.add_argument("--questions-per-sample", type=int, default=5, help="turns of a conversation in train.json (default %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=400, help="pieces of the tokenizer, <voco> not counted (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the questions' order within an image (default %(default)s)")
    options = parser.parse_args()

    def write(name: str, questions: Iterable[Question], per_sample: int) -> list[dict]:
        records = conversations(questions, per_sample, options.seed)
        (options.folder / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
        return records

    try:
        for split in ("train", "test"):
            write_images(options.folder, split)
        questions = load_questions("train")
        write("test", load_questions("test"), 1)
        write("align", [question for question in questions if question.type == "shape"], 1)
        write("shapes", [question for question in questions if question.about_shape], 3)
        records = write("train", questions, options.questions_per_sample)
        pieces = train_tokenizer(records, options.folder / "tokenizer.model", options.vocab_size)
    except ConfigError as error:
        print(f"easy_vqa_to_llava: {error}", file=sys.stderr)
        return 2
    print(f"{options.folder}: {len(records)} training conversations, tokenizer of {pieces} pieces")
    return 0


if __name__ == "__main__":
    sys.exit(main())
