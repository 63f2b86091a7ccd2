"""Images' keys and values on disk: found again, exact, and refused where they are another model's or damaged."""

from contextlib import contextmanager

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import htc_megatron.inference.compress as compressing
from htc_megatron.config import ConfigError
from htc_megatron.inference import ImageStore, answer, ask, compress_into, image_files, load
from htc_megatron.inference.store import file_key, model_fingerprint
from htc_megatron.weights.export import export
from tests.data_tiny import noise
from tests.hf_tiny import made
from tests.test_hf_export import tool

TEXTS = ["what shape is in the image ?", "is it red ?", "green", "what is the color of the circle ?"]


@contextmanager
def blind(model):
    """No image is encoded inside."""

    def seen(*given, **named):
        raise AssertionError("an image was encoded")

    handles = [part.register_forward_pre_hook(seen) for part in (model.model.vision_tower, model.model.projector, model.model.anchors)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An exported model, and six pictures of other shapes."""
    folder = tmp_path_factory.mktemp("store")
    reader, _ = made(folder, seed=3, num_voco_tokens=2)
    export(reader, folder / "hf")
    (folder / "pictures" / "deep").mkdir(parents=True)
    for i in range(6):
        noise(20, 13 + i).convert("RGB").save(folder / "pictures" / ("deep" if i % 2 else "") / f"{i}.png")
    return folder / "hf", folder / "pictures"


@pytest.fixture(scope="module")
def filled(exported, tmp_path_factory):
    """A store of all pictures, made by the tool."""
    folder, pictures = exported
    store = tmp_path_factory.mktemp("filled") / "store"
    done = tool("compress_images.py", folder, pictures, "--store", store, "--batch-size", 4)
    assert done.status == 0, done.error
    assert done.out.startswith(f"{store}: 6 images compressed, 0 were there, 0 left out; 6 in all")
    return store


def test_answers_from_the_store_are_those_from_pixels(exported, filled):
    """One image and several a prompt, text before, between and behind, all in one batch; greedy and sampled."""
    model, processor = load(exported[0])
    store, files = ImageStore(filled, model, processor.image_processor), image_files([exported[1]])
    assert len(store) == 6
    questions = [(i % 6, TEXTS[i % 3]) for i in range(8)] + [((4, 1), TEXTS[3]), ((0, 5, 0), "red <image> or <image> blue <image> ?")]
    asked = [
        ask(model, processor, [files[i] for i in ((named,) if isinstance(named, int) else named)], text, 4) for named, text in questions
    ]
    assert len(set(asked)) > 1
    with blind(model):
        assert answer(model, processor, files, questions, max_new_tokens=4, batch_size=4, images_at_once=3, store=store) == asked
        assert ask(model, processor, [files[i] for i in (4, 1)], TEXTS[3], 4, store) == asked[8]
    drawn = []
    for given in (store, None):
        torch.manual_seed(0)
        drawn.append(answer(model, processor, files, questions, max_new_tokens=4, store=given, do_sample=True, top_k=5))
    assert drawn[0] == drawn[1]


def test_the_store_holds_what_the_model_computes(exported, filled):
    model, processor = load(exported[0])
    store, files = ImageStore(filled, model, processor.image_processor), image_files([exported[1]])
    order = [files[i] for i in (3, 0, 3)]
    found = store.load(order)
    # other images beside it change the order of sums
    wanted = model.compress_images(**processor.image_processor.preprocess(order))
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    assert torch.equal(found[0], found[2]) and torch.equal(store.load([order[0].read_bytes()]), found[:1])


def test_running_again_compresses_what_is_new(exported, filled, tmp_path):
    """Skipped by content, wherever the file lies; a broken picture is named and left out; another program's file is found."""
    folder, pictures = exported
    before = {path.name: path.stat().st_mtime_ns for path in filled.iterdir()}
    again = tool("compress_images.py", folder, pictures, "--store", filled)
    assert again.status == 0 and "0 images compressed, 6 were there" in again.out
    assert {path.name: path.stat().st_mtime_ns for path in filled.iterdir()} == before
    more = tmp_path / "more"
    more.mkdir()
    (more / "same.png").write_bytes((pictures / "0.png").read_bytes())
    (more / "broken.png").write_bytes((pictures / "2.png").read_bytes()[:40])
    noise(9, 9).save(more / "new.png")
    grown = tool("compress_images.py", folder, more, "--store", filled)
    assert grown.status == 1 and "1 images compressed, 1 were there, 1 left out; 7 in all" in grown.out
    assert "broken.png is left out: " in grown.error
    asked = tool("ask.py", folder, "is it red ?", "--store", filled, "--image", more / "new.png", "--max-new-tokens", 3)
    assert asked.status == 0, asked.error
    assert asked.out == tool("ask.py", folder, "is it red ?", "--image", more / "new.png", "--max-new-tokens", 3).out


def test_what_was_compressed_stays_when_it_is_interrupted(exported, tmp_path, monkeypatch):
    model, processor = load(exported[0])
    store, files = ImageStore(tmp_path / "store", model, processor.image_processor, create=True), image_files([exported[1]])
    plain, calls = model.compress_images, []

    def interrupted(**pixels):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(**pixels)

    monkeypatch.setattr(model, "compress_images", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress_into(store, model, processor.image_processor, files, batch_size=2)
    assert len(ImageStore(tmp_path / "store", model, processor.image_processor)) == 4
    assert compress_into(store, model, processor.image_processor, files, batch_size=2, shard_bytes=1) == compressing.Counts(2, 4, 0)
    assert len(list((tmp_path / "store").iterdir())) == 2 and all(file_key(path) in store for path in files)

    def full(*given, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("htc_megatron.inference.store.fsync", full)
    with pytest.raises(ConfigError, match="cannot be written: .*No space left"):
        store.write([b"0" * 32], torch.zeros(1, *store.shape))
    assert len(list((tmp_path / "store").iterdir())) == 2  # nothing half-written


def test_a_fingerprint_is_of_what_decides(exported, tmp_path):
    model, processor = load(exported[0])
    first = model_fingerprint(model, processor.image_processor)
    model.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    model.generation_config.do_sample = True
    saved, its_processor = load(tmp_path / "again")
    assert model_fingerprint(saved, its_processor.image_processor) == first
    changes = [
        lambda: model.model.language_model.layers[1].self_attn.k_proj.weight.data[0, 0].add_(1e-3),
        lambda: setattr(model.config.text_config, "rms_norm_eps", 1e-3),
        lambda: setattr(model.config, "text_sees", "voco_on"),
        lambda: setattr(processor.image_processor, "mgvq_image_size", 8),
        lambda: model.bfloat16(),
    ]
    seen = {first}
    for change in changes:
        change()
        seen.add(model_fingerprint(model, processor.image_processor))
    assert len(seen) == 1 + len(changes)


def rewritten(path, **changed):
    tensors = load_file(path)
    tensors |= {name: change(tensors[name].clone()) for name, change in changed.items()}
    return tensors


def flip(tensor):
    tensor.view(torch.uint8).view(-1)[5] ^= 1
    return tensor


def narrow(tensor):
    return tensor[:, :1].contiguous()


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (lambda p, meta: save_file(load_file(p), p, metadata=meta | {"model": "0" * 64}), "by another model: its fingerprint is 000000"),
        (lambda p, meta: save_file(load_file(p), p, metadata=meta | {"format": "0"}), "is of format '0', wanted '1'"),
        (lambda p, meta: p.write_bytes(p.read_bytes()[:-7]), "cannot be read: .*remove the file and compress its images again"),
        (lambda p, meta: p.write_bytes(b""), "cannot be read: "),
        (lambda p, meta: save_file({"images": load_file(p)["images"]}, p, metadata=meta), "cannot be read: .*keys_values"),
        (lambda p, meta: save_file(rewritten(p, keys_values=narrow), p, metadata=meta), r"of shape \(6, 1, .*, wanted \(6, 2"),
        (lambda p, meta: save_file(rewritten(p, keys_values=flip), p, metadata=meta), "of image [0-9a-f]{64} are damaged"),
        (lambda p, meta: save_file(rewritten(p, checks=flip), p, metadata=meta), "are damaged"),
        (lambda p, meta: save_file(rewritten(p, images=flip), p, metadata=meta), "is not in the store"),
        (lambda p, meta: p.unlink(), "0.png is not in the store .*compress_images.py puts it there"),
    ],
)  # fmt: skip
def test_a_store_that_cannot_be_trusted_is_refused(exported, tmp_path, damage, sentence):
    model, processor = load(exported[0])
    files = image_files([exported[1]])
    store = ImageStore(tmp_path, model, processor.image_processor)
    path = store.write([file_key(file) for file in files], model.compress_images(**processor.image_processor.preprocess(files)))
    damage(path, {"format": "1", "model": store.fingerprint})
    with pytest.raises(ConfigError, match=sentence):
        ImageStore(tmp_path, model, processor.image_processor).load(files)


def test_bad_requests_are_refused(exported, filled, tmp_path):
    folder, pictures = exported
    model, processor = load(folder)
    store = ImageStore(filled, model, processor.image_processor)
    with pytest.raises(ConfigError, match="found by its file: got a Image"):
        store.load([Image.new("RGB", (3, 3))])
    with pytest.raises(ConfigError, match="absent.png cannot be read: No such file"):
        store.load([tmp_path / "absent.png"])
    with pytest.raises(ConfigError, match="question 1 is about image .0, 9., but there are 1 images"):
        answer(model, processor, [pictures / "0.png"], [(0, "?"), ((0, 9), "?")], store=store)
    for given, sentence in (
        ([pictures, "--store", tmp_path / "new", "--batch-size", 0], "--batch-size is 0 and --shard-mib 256; wanted at least 1"),
        ([tmp_path / "absent", "--store", tmp_path / "new"], "absent does not exist"),
        ([tmp_path, "--store", tmp_path / "new"], "no image was found"),
    ):
        done = tool("compress_images.py", folder, *given)
        assert done.status == 2 and sentence in done.error
    assert not (tmp_path / "new").exists()
    done = tool("ask.py", folder, "?", "--store", tmp_path / "new", "--image", pictures / "0.png")
    assert done.status == 2 and "there is no store" in done.error
    model.config.image_sees = "prefix"
    with pytest.raises(ConfigError, match="images of this model cannot be stored: image_sees is prefix: .* depend on what stands in front"):
        ImageStore(filled, model, processor.image_processor)
