"""Score an exported model on easy-VQA's official test split: `python tools/evaluate.py runs/quickstart/hf --out evaluation.json`."""

import argparse
import json
import sys
import time
from pathlib import Path

from tqdm import tqdm

from htc_megatron.config import ConfigError
from htc_megatron.evaluation.easy_vqa import baselines, image_paths, load_questions, score, table
from htc_megatron.inference import answer, load


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="exported folder")
    parser.add_argument("--out", type=Path, help="JSON to write: scores, baselines and every answer")
    parser.add_argument("--max-new-tokens", type=int, default=4, help="of an answer (default %(default)s)")
    parser.add_argument("--images-at-once", type=int, default=32, help="images compressed together (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=320, help="questions answered together (default %(default)s)")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    try:
        model, processor = load(options.model, device=options.device)
        questions = load_questions("test")
        began = time.monotonic()
        answers = answer(
            model,
            processor,
            image_paths("test"),
            [(question.image, question.text) for question in questions],
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
            images_at_once=options.images_at_once,
            progress=lambda groups: tqdm(groups, desc="test split", unit=f" x {options.images_at_once} images"),
        )
        seconds = time.monotonic() - began
        blind = baselines(load_questions("train"), questions)
    except ConfigError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    scores = score(questions, answers)
    print(table(scores, blind))
    print(f"{len(questions)} questions in {seconds:.0f} s")
    if options.out:
        given = [
            {"image": q.image, "question": q.text, "answer": q.answer, "given": text} for q, text in zip(questions, answers, strict=True)
        ]
        report = {"data": "easy-vqa 1.0, official test split", **scores, "baselines": blind, "seconds": round(seconds, 1)}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({**report, "answers": given}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
