"""Small multiple-choice benchmarks as their authors hand them out: MMBench, SEED-Bench, ScienceQA."""

import base64
import csv
import io
import json
from pathlib import Path

from PIL import Image

QUESTIONS = [
    # (question, hint, options, answer, category, l2-category)
    ("what shape is it ?", "", ["circle", "square", "star", "line"], "B", "object_shape", "perception"),
    ("is it red ?", "look at the image .", ["yes", "no"], "A", "colour", "perception"),
    ("where is it ?", "", ["left", "right", "none of them"], "C", "place", "reasoning"),
]
MMBENCH_COLUMNS = "index question hint A B C D answer category image source l2-category comment split".split()
STEP = 1_000_000
SEED_TYPES = {"Scene Understanding": 1, "Text Recognition": 9, "Action Recognition": 10}
SEED_QUESTIONS = [
    # (question_id, type, data_type, data_id, question, answer)
    ("101669", 1, "image", "1454426_2591111986", "How many towels?", "A"),
    ("7", 1, "image", "1454426_2591111986", "is it red ?", "B"),
    ("8", 9, "image", "20_1", "what is the color of the shape ?", "C"),
    ("v9", 10, "video", "9.webm", "yes ?", "D"),
]
SQA = {
    # pid: (grade, subject, hint, choices, answer, image); the split follows
    "3": ("grade2", "social science", "", ["Maine", "Ohio"], 1, "image.png", "test"),
    "11": (
        "grade7",
        "natural science",
        "The  is camouflaged.",
        ["a weasel", "a hawk", "a fox", "an owl", "a hare"],
        4,
        "image.png",
        "test",
    ),
    "12": ("grade12", "natural science", "", ["yes", "no"], 0, None, "test"),
    "13": ("grade8", "natural science", "", ["yes", "no"], 0, "image.png", "train"),
    "20": ("grade6", "natural science", "", ["B", "A"], 0, "image.png", "test"),
}


def picture(seed: int) -> Image.Image:
    return Image.linear_gradient("L").resize((24 + seed, 16)).rotate(40 * seed).convert("RGB")


def encoded(seed: int) -> str:
    data = io.BytesIO()
    picture(seed).save(data, "png")
    return base64.b64encode(data.getvalue()).decode()


def mmbench_rows(copies: str = "whole") -> list[dict]:
    """copies: "whole", with their image; "index", with that of their question; "none". The last option of question 2 stays the last."""
    rows = []
    for number, (question, hint, options, answer, category, l2) in enumerate(QUESTIONS):
        moving = options[:-1] if options[-1].startswith("none") else options
        for by in range(len(moving) if copies != "none" else 1):
            turned = moving[len(moving) - by :] + moving[: len(moving) - by] + options[len(moving) :]
            right = "ABCD"[turned.index(options["ABCD".index(answer)])]
            image = encoded(number) if copies != "index" or not by else str(number)
            values = [number + by * STEP, question, hint, *(turned + ["", ""])[:4], right, category, image, "", l2, "", "dev"]
            rows.append(dict(zip(MMBENCH_COLUMNS, values, strict=True)))
    return sorted(rows, key=lambda row: row["index"])


def write_mmbench(root: Path, rows: list[dict] | None = None) -> Path:
    rows = mmbench_rows() if rows is None else rows
    root.mkdir(parents=True, exist_ok=True)
    with (root / "mmbench_dev_20230712.tsv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), dialect="excel-tab", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return root


def seed_annotations() -> dict:
    names = ("question_id", "question_type_id", "data_type", "data_id", "question", "answer")
    choices = dict(choice_a="One", choice_b="Two", choice_c="Three", choice_d="Four")
    asked = [dict(zip(names, values, strict=True)) | choices | {"segment": [0, 9]} for values in SEED_QUESTIONS]
    return {"question_type": SEED_TYPES, "questions": asked}


def write_seed(root: Path, annotations: object = None, frames: bool = True) -> Path:
    annotations = seed_annotations() if annotations is None else annotations
    for folder in ("SEED-Bench-image", "SEED-Bench-video-image"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "SEED-Bench.json").write_text(json.dumps(annotations))
    for number, name in enumerate({values[3]: 0 for values in SEED_QUESTIONS if values[2] == "image"}):
        picture(number).save(root / "SEED-Bench-image" / name, "jpeg")  # these files have no suffix
    if frames:
        picture(5).save(root / "SEED-Bench-video-image" / "10_v9.png")
    return root


def sqa_problems() -> dict[str, dict]:
    names = ("grade", "subject", "hint", "choices", "answer", "image", "split")
    return {pid: dict(zip(names, values, strict=True)) | {"question": f"Which is number {pid}?"} for pid, values in SQA.items()}


def write_sqa(root: Path, problems: dict[str, dict] | None = None, splits: dict | None = None) -> Path:
    problems = sqa_problems() if problems is None else problems
    root.mkdir(parents=True, exist_ok=True)
    made: dict[str, list[str]] = {}
    for number, (pid, problem) in enumerate(problems.items()):
        made.setdefault(problem["split"], []).append(pid)
        if problem["image"]:
            folder = root / "images" / problem["split"] / pid
            folder.mkdir(parents=True)
            picture(number).save(folder / problem["image"])
    (root / "problems.json").write_text(json.dumps(problems))
    (root / "pid_splits.json").write_text(json.dumps(made if splits is None else splits))
    return root
