"""Write generated scenes as LLaVA JSON and image folders, and train a tokenizer on the training questions.

python examples/paper/make_scenes.py runs/paper/data

writes train/ and test/ (pictures), captions.json and train.json (LLaVA records of the training pictures:
their captions; captions and questions), train.jsonl and
test.jsonl (the questions with their type), and tokenizer.model.
"""

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm

from htc_megatron.config import ConfigError
from htc_megatron.evaluation import scenes
from htc_megatron.evaluation.easy_vqa import conversations, train_tokenizer

VOCABULARY = 445


def make(folder: Path, train: int, test: int, seed: int) -> None:
    """Everything in `folder`; the same seed gives the same bytes."""
    seen: set[bytes] = set()
    captioned, records = [], []
    for split, count in (("train", train), ("test", test)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        questions = []
        made = scenes.pictures(split, count, seed, frozenset(seen))
        for number, picture in enumerate(tqdm(made, desc=f"{split} scenes", total=count, mininterval=0.5)):
            (folder / split / f"{number}.png").write_bytes(picture.png)
            questions += picture.questions
            if split == "train":
                seen.add(scenes.digest(picture.png))
                captioned.append(picture.scene)
        scenes.write_questions(questions, folder / f"{split}.jsonl")
        if split == "train":
            records = conversations(questions, questions_per_sample=10, seed=seed)
    captions = scenes.caption_records(captioned)
    for name, content in (("captions", captions), ("train", [*captions, *records])):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    train_tokenizer([*captions[:2000], *records[:2000]], folder / "tokenizer.model", VOCABULARY)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to write to")
    parser.add_argument("--train", type=int, default=10000, help="pictures to train on (default %(default)s)")
    parser.add_argument("--test", type=int, default=600, help="pictures to test on (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes and questions (default %(default)s)")
    options = parser.parse_args()
    try:
        make(options.folder, options.train, options.test, options.seed)
    except ConfigError as error:
        print(f"make_scenes: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
