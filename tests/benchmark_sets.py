"""Small benchmarks in their official form: GQA, VQAv2, POPE and MME, each with pictures of noise; benchmark_sets_mcq.py has others.

Every writer takes a folder and gives it back; a test may change a file afterwards.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from htc_megatron.evaluation.tasks.mme import GROUPS
from tests.benchmark_sets_mcq import write_mmbench, write_seed, write_sqa


def picture(path: Path, seed: int = 0) -> Path:
    """No two seeds give the same picture, and no seed two."""
    path.parent.mkdir(parents=True, exist_ok=True)
    side = 12 + seed % 7
    Image.frombytes("RGB", (side, 14), bytes((seed * 37 + i * (seed + 3)) % 256 for i in range(3 * side * 14))).save(path)
    return path


def write(path: Path, tree: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


def gqa(folder: Path) -> Path:
    """Four questions to two images."""
    rows = {
        "201": ("Is it red?", "n1", "yes", "verify", "attr"),
        "202": ("Is it left of the dog?", "n1", "no", "verify", "rel"),
        "203": ("What color is it?", "n2", "light blue", "query", "attr"),
        "204": ("Is it red or blue?", "n2", "blue", "choose", "attr"),
    }
    questions = {
        key: {
            "question": text,
            "imageId": image,
            "answer": answer,
            "types": {"structural": structural, "semantic": semantic, "detailed": "x"},
            "isBalanced": True,
            "groups": {"global": None, "local": "x"},
        }
        for key, (text, image, answer, structural, semantic) in rows.items()
    }
    write(folder / "testdev_balanced_questions.json", questions)
    for seed, image in enumerate(("n1", "n2")):
        picture(folder / "images" / f"{image}.jpg", seed)
    return folder


def vqav2(folder: Path, splits: Iterable[str] = ("val2014",)) -> Path:
    """Three questions to two images of each split; test-dev2015 has the first two of test2015."""
    questions = [(421, 42, "How many dogs?"), (422, 42, "Is it a dog?"), (73001, 73, "What is on the table?")]
    for split in splits:
        images = "val2014" if split == "val2014" else "test2015"
        asked = questions[:2] if split == "test-dev2015" else questions
        rows = [{"question_id": q, "image_id": image, "question": text} for q, image, text in asked]
        described = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {}, "data_subtype": split}
        write(folder / f"v2_OpenEnded_mscoco_{split}_questions.json", described | {"questions": rows})
        for seed, image in enumerate((42, 73)):
            picture(folder / images / f"COCO_{images}_{image:012}.jpg", seed)
    given = {421: ["2"] * 8 + ["two", "3"], 422: ["yes"] * 10, 73001: ["a cup"] * 5 + ["cups", "mug", "mug", "tea.", "plate"]}
    types = {421: "number", 422: "yes/no", 73001: "other"}
    annotations = [
        {
            "question_id": question,
            "image_id": image,
            "question_type": "how many",
            "answer_type": types[question],
            "multiple_choice_answer": given[question][0],
            "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(given[question], 1)],
        }
        for question, image, _ in questions
    ]
    if "val2014" in splits:
        write(folder / "v2_mscoco_val2014_annotations.json", {"info": {}, "annotations": annotations})
    return folder


def pope(folder: Path) -> Path:
    """Four questions to two images in each category; the images are the same."""
    for category in ("random", "popular", "adversarial"):
        rows = [
            {
                "question_id": number,
                "image": f"COCO_val2014_{number % 2:012}.jpg",
                "text": f"Is there a {'dog' if number < 3 else category} in the image?",
                "label": "yes" if number < 3 else "no",
            }
            for number in range(1, 5)
        ]
        path = folder / "coco" / f"coco_pope_{category}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for number in range(2):
        picture(folder / "val2014" / f"COCO_val2014_{number:012}.jpg", number)
    return folder


def mme(folder: Path, deep: bool = False) -> Path:
    """Two images a task; tasks take turns at the two layouts. deep: in the folder that newer releases have in between."""
    release = folder / "MME_Benchmark_release_version" / ("MME_Benchmark" if deep else "")
    for place, task in enumerate(task for tasks in GROUPS.values() for task in tasks):
        images, texts = (release / task / part for part in ("images", "questions_answers_YN")) if place % 2 else [release / task] * 2
        texts.mkdir(parents=True, exist_ok=True)
        for number in range(2):
            picture(images / f"{number:04}.{'png' if number else 'jpg'}", 2 * place + number)
            lines = f"Is it {task}? Please answer yes or no.\tYes\nIs it a cat?  Please answer yes or no.\tNo\n\n"
            (texts / f"{number:04}.txt").write_text(lines, encoding="utf-8")
    return folder


SETS = {
    "gqa": gqa,
    "vqav2": vqav2,
    "mmbench": write_mmbench,
    "mme": mme,
    "pope": pope,
    "seed": write_seed,
    "sqa": write_sqa,
}
