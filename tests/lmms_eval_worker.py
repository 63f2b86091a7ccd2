"""Run by tests/test_lmms_eval.py in a process of its own, since importing lmms-eval changes warnings, Pillow and torch.distributed.

Arguments: an exported model, a folder of task files, the JSON file to write.
"""

import json
import sys
from pathlib import Path

from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from PIL import Image

from htc_megatron.config import ConfigError

QUESTION = "what shape is in the image ?"


def main(folder: str, tasks: str, out: str) -> None:
    manager = TaskManager(include_path=tasks, include_defaults=False)
    found = simple_evaluate(
        model="htc_vlm",  # which the entry point has registered
        model_args=f"pretrained={folder}",
        tasks=["pope_local", "choice_local"],
        task_manager=manager,
        batch_size=4,  # two stretches of requests
        device="cpu",
        bootstrap_iters=0,
    )
    made = {"results": found["results"], "samples": {}, "direct": {}}
    for task, samples in found["samples"].items():
        made["samples"][task] = [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
    made["direct"] = directly(get_model("htc_vlm").create_from_arg_string(f"pretrained={folder}", {"device": "cpu", "batch_size": "8"}))
    Path(out).write_text(json.dumps(made))


def directly(model) -> dict[str, list[str] | str]:
    """What requests get that the tasks do not make; the sentence where they are refused."""
    picture = Image.linear_gradient("L").convert("RGB")
    model.task_dict = {"task": {"test": [{"seen": [picture]}, {"seen": []}, {"seen": None}, {"seen": ["film.mp4"]}]}}

    def ask(doc_id: int, **settings) -> Instance:
        metadata = {"task": "task", "doc_id": doc_id, "repeats": 1}
        arguments = (QUESTION, settings, lambda doc: doc["seen"], doc_id, "task", "test")
        return Instance(request_type="generate_until", arguments=arguments, idx=0, metadata=metadata)

    def tried(call, requests: list[Instance]) -> list[str] | str:
        try:
            return call(requests)
        except ConfigError as error:
            return str(error)

    plain = model.generate_until([ask(0, max_new_tokens=8)])[0]
    generate = {
        "together": [ask(1, max_new_tokens=8), ask(0, max_new_tokens=8), ask(2, max_new_tokens=8), ask(0, max_new_tokens=3)],
        "until": [ask(0, max_new_tokens=8, until=["never said", plain[4]]), ask(0, max_new_tokens=8, until=plain[2])],
        "sampled": [ask(0, max_new_tokens=8, temperature=1.0, top_k=1, do_sample=True)],
        "unsampled": [ask(0, max_new_tokens=8, temperature=0, top_p=0, do_sample=False, num_beams=1, image_aspect_ratio="pad")],
        "beams": [ask(0, num_beams=2)],
        "blind": [ask(1, temperature=0.5)],
        "film": [ask(3)],
    }
    found = {name: tried(model.generate_until, requests) for name, requests in generate.items()}
    return found | {"plain": [plain], "rounds": tried(model.generate_until_multi_round, [ask(0)])}


if __name__ == "__main__":
    main(*sys.argv[1:])
