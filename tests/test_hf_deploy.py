"""Exported folders in the hands of a new user: alone beside torch and transformers, after our import, behind transformers' server."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    pipeline,
)

import htc_megatron.hf as ours
from htc_megatron.inference import ask
from htc_megatron.weights.export import AUTO_CONFIG, CODE_FILES, export, hf_from_tensors
from tests.data_tiny import noise
from tests.hf_tiny import made

ROOT = Path(__file__).resolve().parent.parent
QUESTION = "what shape is in the image ?"
LIMIT = 240  # seconds for another process, of which a free machine needs about fifteen
# Without byte pieces every answer is readable text; transformers' stop strings need a tokenizer that can spell "abcdef".
WORDS = dict(byte_fallback=False, vocab_size=120, required_chars="abcdef")
ROUNDING = 1e-5  # logits of about 10; mapped files are aligned otherwise than tensors in memory, which changes the order of sums


class Deployed(NamedTuple):
    """folder: the export. model, processor: the same model from memory, its processor from the folder. pictures: files of two."""

    folder: Path
    model: torch.nn.Module
    processor: ours.HTCVLMProcessor
    pictures: list[Path]

    def answer(self, picture: int | None, question: str, tokens: int = 8) -> str:
        return ask(self.model, self.processor, [] if picture is None else [Image.open(self.pictures[picture])], question, tokens)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    """An export whose answers depend on the question and on the image, in words alone."""
    root = tmp_path_factory.mktemp("deploy")
    reader, mgvq = made(root, seed=8, words=WORDS, num_voco_tokens=2)
    for name, tensor in reader.tensors.items():
        if "norm" in name and name.endswith("weight"):
            tensor.fill_(1)
        elif name.endswith("bias"):
            tensor.zero_()
        elif tensor.ndim > 1 and "codebook" not in name:
            tensor.mul_(3)
    export(reader, root / "hf")
    pictures = [root / "first.png", root / "second.png"]
    for seed, path in enumerate(pictures):
        quarters = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(quarters).resize((40, 26), Image.Resampling.NEAREST).save(path)
    model = hf_from_tensors(reader.config.model, reader.tensors, mgvq)
    ready = Deployed(root / "hf", model, AutoProcessor.from_pretrained(root / "hf"), pictures)
    assert len({ready.answer(picture, QUESTION) for picture in (0, 1, None)} | {ready.answer(0, "is it red ?")}) == 4
    return ready


def environment(home: Path) -> dict[str, str]:
    """Offline, with a cache of its own for the code that travels with folders."""
    return os.environ | dict(HF_HUB_OFFLINE="1", HF_HOME=str(home), PYTHONPATH=str(ROOT), HF_HUB_DISABLE_PROGRESS_BARS="1")


def test_a_new_user_needs_torch_and_transformers_alone(deployed, tmp_path):
    command = [sys.executable, str(ROOT / "tests" / "hf_user.py"), str(deployed.folder), str(deployed.pictures[0]), str(tmp_path / "saved")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path), timeout=LIMIT, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["absent"] == ["htc_megatron", "megatron", "deepspeed", "sentencepiece", "accelerate"]
    assert set(found["modules"]) == {"transformers_modules"}
    generating, processor = "HTCVLMForConditionalGeneration", "HTCVLMProcessor"
    assert found["classes"] == [generating, processor, "HTCVLMConfig", "HTCVLMImageProcessor", "HTCVLMModel", generating]
    assert not found["training"]
    assert found["spelled"] == deployed.processor.tokenizer.tokenize("what shape is it <voco>")
    inputs = deployed.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "image": Image.open(deployed.pictures[0])}, {"type": "text", "text": QUESTION}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    logits = deployed.model(**inputs).logits[0, -1]
    for name in ("logits", "hidden", "again", "later_logits"):
        torch.testing.assert_close(torch.tensor(found[name]), logits, atol=ROUNDING, rtol=0)
    greedy = deployed.model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=2)[0, inputs["input_ids"].shape[1] :]
    assert found["greedy"] == greedy.tolist()
    assert found["default"][:8] == greedy.tolist()

    questions = [QUESTION, "is it red ?", "does it contain a blue circle ?"]
    answers = [deployed.answer(0, question) for question in questions]
    assert found["streamed"].strip() == answers[0]
    assert found["full"]["role"] == "assistant" and found["full"]["content"].strip() == answers[0]
    assert [text.strip() for text in found["by_one"]] == answers
    assert found["by_three"] == found["by_one"]
    assert found["of_path"] == found["by_one"][:1]
    assert found["begun"]["content"][0]["text"].startswith("it is a")
    assert [len(found[name]) for name in ("two_images", "plain", "no_image")] == [1, 1, 1]
    assert found["plain_full"][0] == "USER: <image>\nwhat ? ASSISTANT:" + found["plain"][0]
    assert found["plain_full"][1].startswith("<image> yes")
    assert found["low"] == ["torch.bfloat16", "torch.float32", 1]
    assert found["later"] == ["htc_megatron.hf.modeling_htc_vlm", "htc_megatron.hf.processing_htc_vlm"]

    saved, first = (sorted(path.name for path in folder.iterdir()) for folder in (tmp_path / "saved", deployed.folder))
    assert saved == first
    advice = "not formatted as a chat"  # pipeline's own, on prompts that are plain texts
    noise = [line for line in done.stderr.splitlines() if line.strip() and "it/s]" not in line and advice not in line]
    assert noise == []


def test_files_are_where_transformers_looks(deployed):
    folder = deployed.folder
    settings = [f"{name}.json" for name in ("config", "generation_config", "processor_config", "tokenizer_config", "tokenizer")]
    wanted = {*settings, "chat_template.jinja", "model.safetensors", *(f"{name}.py" for name in CODE_FILES)}
    assert {path.name for path in folder.iterdir()} == wanted
    generation = GenerationConfig.from_pretrained(folder)
    tokenizer = deployed.processor.tokenizer
    assert (generation.eos_token_id, generation.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert generation.max_new_tokens == 256
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_CONFIG
    processor = json.loads((folder / "processor_config.json").read_text())
    references = dict(AutoProcessor=AUTO_CONFIG["AutoProcessor"], AutoImageProcessor="processing_htc_vlm.HTCVLMImageProcessor")
    assert processor["auto_map"].items() | processor["image_processor"]["auto_map"].items() == references.items()
    for reference in {*AUTO_CONFIG.values(), *references.values()}:
        file, name = reference.split(".")
        assert f"class {name}(" in (folder / f"{file}.py").read_text()


@pytest.mark.parametrize("trust", [dict(), dict(trust_remote_code=True)], ids=["", "trusted"])
def test_our_import_makes_trust_unnecessary(deployed, tmp_path, trust):
    """Nobody is asked, and the installed code is taken even where the folder's would be trusted."""
    folder, loaded = deployed.folder, {}
    for kind in (AutoConfig, AutoProcessor, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        loaded[kind] = kind.from_pretrained(folder, **trust)
        assert type(loaded[kind]) is getattr(ours, type(loaded[kind]).__name__)
    assert AutoTokenizer.from_pretrained(folder, **trust).get_vocab() == deployed.processor.tokenizer.get_vocab()
    pipe = pipeline("image-text-to-text", model=str(folder), **trust)
    assert type(pipe.model) is ours.HTCVLMForConditionalGeneration
    content = [{"type": "image", "image": Image.open(deployed.pictures[1])}, {"type": "text", "text": QUESTION}]
    made = pipe(text=[{"role": "user", "content": content}], return_full_text=False, max_new_tokens=8)
    assert made[0]["generated_text"].strip() == deployed.answer(1, QUESTION)

    model, processor = loaded[AutoModelForImageTextToText], loaded[AutoProcessor]
    model.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == sorted(path.name for path in folder.iterdir())
    for path in folder.iterdir():
        if path.suffix == ".py":
            assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    assert json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"] == AUTO_CONFIG


def test_low_precision_leaves_the_codes_alone(deployed):
    """.to(dtype) of model and inputs, as every model card has it, must not move an argmax."""
    model = AutoModelForImageTextToText.from_pretrained(deployed.folder)
    images = [noise(40, 30, i) for i in range(8)]
    exact = deployed.processor.image_processor(images, return_tensors="pt")["mgvq_pixel_values"]
    wanted = model.model.mgvq.encode(exact)
    inputs = deployed.processor(text="<image>" * 8, images=images, return_tensors="pt")
    for dtype in (torch.bfloat16, torch.float16):
        inputs = inputs.to("cpu", dtype)
        model = model.to(dtype)
        assert inputs["pixel_values"].dtype == model.dtype == dtype
        assert torch.equal(inputs["mgvq_pixel_values"], exact)
        assert torch.equal(model.model.mgvq.encode(inputs["mgvq_pixel_values"]), wanted)
        assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[0] == 1
    assert torch.equal(model.half().float().model.mgvq.encode(exact), wanted)
    assert model.double().model.mgvq.quant_conv.weight.dtype == torch.float64  # wider is the user's right


class Server(NamedTuple):
    address: str
    log: Path

    def post(self, path: str, **body) -> str:
        content = json.dumps(body).encode()
        try:
            with urlopen(Request(self.address + path, content, {"Content-Type": "application/json"}), timeout=60) as reply:
                return reply.read().decode()
        except HTTPError as error:
            pytest.fail(f"{path}: {error.code} {error.read().decode()}\n{self.log.read_text()[-5000:]}")


@pytest.fixture(scope="module")
def server(deployed, tmp_path_factory):
    """`transformers serve` on the folder, from the folder's own code."""
    home = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(deployed.folder), "--trust-remote-code"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with open(home / "log", "w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment(home), start_new_session=True
        )
    started = Server(f"http://127.0.0.1:{port}", home / "log")
    try:
        end = time.monotonic() + LIMIT
        while True:
            try:
                urlopen(started.address + "/health", timeout=5).close()
                break
            except (URLError, ConnectionError, TimeoutError):
                if process.poll() is not None or time.monotonic() > end:
                    pytest.fail(f"the server did not start:\n{started.log.read_text()[-5000:]}")
                time.sleep(0.2)
        yield started
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def message(question: str, *pictures: Path) -> dict:
    """A user's turn in the form of OpenAI's API, images as data URLs."""
    urls = [f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}" for picture in pictures]
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*images, {"type": "text", "text": question}]}


def test_the_server_answers_as_generate_does(deployed, server):
    """Requests one after another, of different images: none sees what another left."""
    asked = dict(model=str(deployed.folder), max_tokens=8)
    for picture, question in [(0, QUESTION), (1, QUESTION), (None, QUESTION), (0, "is it red ?"), (0, QUESTION)]:
        messages = [message(question, *([] if picture is None else [deployed.pictures[picture]]))]
        reply = json.loads(server.post("/v1/chat/completions", messages=messages, **asked))
        wanted = deployed.answer(picture, question)
        assert reply["choices"][0]["message"]["content"].strip() == wanted
        assert reply["usage"]["completion_tokens"] <= 8
        stream = server.post("/v1/chat/completions", messages=messages, stream=True, **asked)
        chunks = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data: {")]
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks).strip() == wanted


def test_the_server_takes_conversations_and_stop_strings(deployed, server):
    asked = dict(model=str(deployed.folder), max_tokens=8)
    turns = [message("is it red ?", deployed.pictures[0]), {"role": "assistant", "content": "no"}, {"role": "user", "content": QUESTION}]
    reply = json.loads(server.post("/v1/chat/completions", messages=turns, **asked))
    picture = Image.open(deployed.pictures[0])
    inputs = deployed.processor(
        text=deployed.processor.apply_chat_template(
            [{"role": "user", "content": "<image>\nis it red ?"}, *turns[1:]], add_generation_prompt=True
        ),
        images=picture,
        return_tensors="pt",
    )
    ids = deployed.model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=2)[0, inputs["input_ids"].shape[1] :]
    assert reply["choices"][0]["message"]["content"] == deployed.processor.decode(ids, skip_special_tokens=True)

    whole = deployed.answer(0, QUESTION)
    stop = whole[1:3]
    reply = json.loads(server.post("/v1/chat/completions", messages=[message(QUESTION, deployed.pictures[0])], stop=[stop], **asked))
    assert 0 < reply["usage"]["completion_tokens"] < 8 and stop in reply["choices"][0]["message"]["content"]
