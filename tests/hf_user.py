"""What a new user does with an exported folder, run as a script in a process of its own: FOLDER, picture PICTURE, new folder SAVED.

Nothing can be imported but the standard library and what torch, transformers and Pillow require. Prints one line of JSON.
"""

import importlib.util
import json
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
from importlib.metadata import packages_distributions, requires
from threading import Thread

FOLDER, PICTURE, SAVED = sys.argv[1:]
SEEDS = ("torch", "transformers", "pillow")


def plain(name: str) -> str:
    return name.lower().replace("_", "-")


def required(seeds: tuple[str, ...]) -> set[str]:
    """Names of distributions that the seeds require where no extra is asked for."""
    from packaging.requirements import Requirement  # itself a requirement of transformers

    found, waiting = set(), list(seeds)
    while waiting:
        name = plain(waiting.pop())
        if name in found:
            continue
        found.add(name)
        try:
            wanted = [Requirement(line) for line in requires(name) or []]
        except importlib.metadata.PackageNotFoundError:  # a requirement of another platform's wheel
            continue
        waiting += [want.name for want in wanted if want.marker is None or want.marker.evaluate({"extra": ""})]
    return found


DISTRIBUTIONS = required(SEEDS)
OWNERS = packages_distributions()
ALLOWED = {top for top, owners in OWNERS.items() if set(map(plain, owners)) & DISTRIBUTIONS}


class Installed:
    """Finds what is allowed; the rest looks as if it were not installed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        top = name.partition(".")[0]
        standard = top in sys.stdlib_module_names or top.startswith("_sysconfigdata")  # the latter's name varies by platform
        if path is None and not standard and top not in ALLOWED | {"transformers_modules"}:
            return None
        return PathFinder.find_spec(name, path, target)

    @staticmethod
    def find_distributions(*arguments):
        return (one for one in PathFinder.find_distributions(*arguments) if plain(one.name) in DISTRIBUTIONS)


sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Installed]
absent = [name for name in ("htc_megatron", "megatron", "deepspeed", "sentencepiece", "accelerate") if not importlib.util.find_spec(name)]

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    TextIteratorStreamer,
    pipeline,
)

TRUST = dict(trust_remote_code=True)
SHORT = dict(max_new_tokens=8)


def chat(question: str, images: int = 1) -> list[dict]:
    pictures = [{"type": "image", "image": Image.open(PICTURE)}] * images
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": question}]}]


def new_text(records) -> list[str]:
    records = [record for row in records for record in (row if isinstance(row, list) else [row])]
    return [record["generated_text"] for record in records]


model = AutoModelForImageTextToText.from_pretrained(FOLDER, **TRUST)
processor = AutoProcessor.from_pretrained(FOLDER, **TRUST)
prepare = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
inputs = processor.apply_chat_template(chat("what shape is in the image ?"), **prepare)
size = inputs["input_ids"].shape[1]
others = [
    AutoConfig.from_pretrained(FOLDER, **TRUST),
    AutoImageProcessor.from_pretrained(FOLDER, **TRUST),
    AutoModel.from_pretrained(FOLDER, **TRUST),
    AutoModelForMultimodalLM.from_pretrained(FOLDER, **TRUST),
]
tokenizer = AutoTokenizer.from_pretrained(FOLDER, **TRUST)
found = dict(
    absent=absent,
    modules=[type(part).__module__.split(".")[0] for part in (model, processor, *others)],
    classes=[type(part).__name__ for part in (model, processor, *others)],
    spelled=tokenizer.tokenize("what shape is it <voco>"),
    training=model.training,
    logits=model(**inputs).logits[0, -1].tolist(),
    hidden=(model.lm_head(others[2](**inputs).last_hidden_state[0, -1])).tolist(),
    default=model.generate(**inputs)[0, size:].tolist(),
    greedy=model.generate(**inputs, do_sample=False, **SHORT)[0, size:].tolist(),
)

streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
thread = Thread(target=model.generate, kwargs=dict(**inputs, **SHORT, streamer=streamer))
thread.start()
found["streamed"] = "".join(streamer)
thread.join()

pipe = pipeline("image-text-to-text", model=FOLDER, **TRUST)
questions = ["what shape is in the image ?", "is it red ?", "does it contain a blue circle ?"]
chats = [chat(question) for question in questions]
text = "USER: <image>\nwhat ? ASSISTANT:"
found |= dict(
    full=pipe(text=chats[0], **SHORT)[0]["generated_text"][-1],
    by_one=[new_text(pipe(text=one, return_full_text=False, **SHORT))[0] for one in chats],
    by_three=new_text(pipe(text=chats, return_full_text=False, batch_size=3, **SHORT)),
    of_path=new_text(
        pipe(
            text=[{"role": "user", "content": [{"type": "image", "url": PICTURE}, {"type": "text", "text": questions[0]}]}],
            return_full_text=False,
            **SHORT,
        )
    ),
    two_images=new_text(pipe(text=chat("is it red ?", images=2), return_full_text=False, **SHORT)),
    begun=pipe(text=[*chats[0], {"role": "assistant", "content": [{"type": "text", "text": "it is a"}]}], **SHORT)[0]["generated_text"][-1],
    plain=new_text(pipe(PICTURE, text=text, return_full_text=False, **SHORT)),
    plain_full=new_text(pipe([PICTURE] * 2, text=[text, "<image> yes"], **SHORT)),
    no_image=new_text(pipe(text="USER: what ? ASSISTANT:", return_full_text=False, **SHORT)),
)

low = pipeline("image-text-to-text", model=FOLDER, dtype=torch.bfloat16, **TRUST)
found["low"] = [str(low.model.dtype), str(next(low.model.model.mgvq.parameters()).dtype), len(new_text(low(text=chats[0], **SHORT)))]

model.save_pretrained(SAVED)
processor.save_pretrained(SAVED)
again = AutoModelForImageTextToText.from_pretrained(SAVED, **TRUST)
found["again"] = again(**AutoProcessor.from_pretrained(SAVED, **TRUST).apply_chat_template(chats[0], **prepare)).logits[0, -1].tolist()

# The package may come later, and twice; it needs nothing more.
ALLOWED.add("htc_megatron")
importlib.invalidate_caches()
package = importlib.import_module("htc_megatron.hf")
importlib.reload(package)
later = AutoModelForImageTextToText.from_pretrained(FOLDER)
found["later"] = [type(part).__module__ for part in (later, AutoProcessor.from_pretrained(FOLDER))]
found["later_logits"] = later(**inputs).logits[0, -1].tolist()
print(json.dumps(found))
