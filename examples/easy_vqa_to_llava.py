"""Write easy-VQA as LLaVA JSON and image folders, and train a tokenizer on the training questions.

python examples/easy_vqa_to_llava.py runs/quickstart/data

writes train.json and train/ (images), align.json (the training split's questions about shapes: what the first stage learns
from), test.json, test/ and tokenizer.model. Every conversation has one question, as in the evaluation.
"""

import argparse
import json
import sys
from pathlib import Path

from htc_megatron.config import ConfigError
from htc_megatron.evaluation.easy_vqa import conversations, load_questions, train_tokenizer, write_llava


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to write to")
    parser.add_argument("--questions-per-sample", type=int, default=1, help="turns of a training conversation (default %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=400, help="pieces of the tokenizer, <voco> not counted (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the questions' order within an image (default %(default)s)")
    options = parser.parse_args()
    try:
        write_llava(options.folder, "train", options.questions_per_sample, options.seed)
        shapes = [question for question in load_questions("train") if question.type == "shape"]
        (options.folder / "align.json").write_text(json.dumps(conversations(shapes)), encoding="utf-8")
        write_llava(options.folder, "test", 1, options.seed)
        records = json.loads((options.folder / "train.json").read_text(encoding="utf-8"))
        pieces = train_tokenizer(records, options.folder / "tokenizer.model", options.vocab_size)
    except ConfigError as error:
        print(f"easy_vqa_to_llava: {error}", file=sys.stderr)
        return 2
    print(f"{options.folder}: {len(records)} training conversations, tokenizer of {pieces} pieces")
    return 0


if __name__ == "__main__":
    sys.exit(main())
