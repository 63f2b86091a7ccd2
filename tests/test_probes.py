"""Linear probes read what is linear in a representation, and nothing where there is nothing to read."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from htc_megatron.config import ConfigError
from htc_megatron.evaluation.easy_vqa import labelled_images
from htc_megatron.evaluation.labels import LabelledImage, LabelSet, read_labels
from htc_megatron.evaluation.probes import extract, fit, probe
from htc_megatron.inference import load
from htc_megatron.weights.export import export
from tests import data_tiny
from tests.hf_tiny import made
from tests.test_hf_export import tool

COUNT = 150


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """An exported model of two voco tokens, pictures, and what it makes of them."""
    folder = tmp_path_factory.mktemp("probes")
    reader, _ = made(folder, seed=3, num_voco_tokens=2)
    export(reader, folder / "hf")
    (folder / "pictures").mkdir()
    chance = np.random.default_rng(0)
    files = [folder / "pictures" / f"{i}.png" for i in range(COUNT)]
    for file in files:  # four flat squares
        small = chance.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(small).resize((16, 16), Image.Resampling.NEAREST).save(file)
    return folder / "hf", files, extract(*load(folder / "hf"), [str(file) for file in files], (0, 1, -1))


def sign(rows):
    """A label that is linear in the rows: which end of their main direction each is at, None in the middle."""
    spread = rows - rows.mean(0)
    along = spread @ np.linalg.svd(spread, full_matrices=False)[2][0]
    low, high = np.quantile(along, (0.4, 0.6))
    return ["under" if value < low else "over" if value > high else None for value in along]


def labelled(files, **labels):
    """labels: (kind, values) each; None is no label."""
    images = []
    for i, file in enumerate(files):
        there = {name: values[i] for name, (_, values) in labels.items() if values[i] is not None}
        images.append(LabelledImage(str(file), there, "test" if i % 3 == 0 else "train"))
    return LabelSet({name: kind for name, (kind, _) in labels.items()}, images)


def test_representations_are_what_the_model_computes(probed):
    folder, files, found = probed
    model, processor = load(folder)
    assert {name: rows.shape for name, rows in found.items()} == {
        "v_d": (COUNT, 2 * 32), "patches": (COUNT, 32), "z_voco": (COUNT, 64), "z_voco_0": (COUNT, 64), "z_voco_1": (COUNT, 64)
    }  # fmt: skip
    inputs = processor(text="<image>", images=Image.open(files[17]), return_tensors="pt")  # nothing in front changes nothing
    with torch.no_grad():
        visual = model.get_image_features(inputs["pixel_values"], inputs["mgvq_pixel_values"])[0]
        hidden = model(**inputs, output_hidden_states=True).hidden_states
    wanted = {"v_d": visual[:2].flatten(), "patches": visual[2:].mean(0)}
    wanted |= {name: hidden[layer][0, -2:].flatten() for name, layer in (("z_voco_0", 0), ("z_voco_1", 1), ("z_voco", 2))}
    for name, row in wanted.items():
        torch.testing.assert_close(torch.from_numpy(found[name][17]), row, atol=1e-5, rtol=1e-4)
    assert (found["z_voco_0"] == found["z_voco_0"][0]).all() and found["z_voco"].std(0).min() > 0
    pooled = extract(model, processor, [str(file) for file in files[:5]], pooling="mean", batch_size=2)
    for name in ("v_d", "z_voco"):
        np.testing.assert_allclose(pooled[name], found[name][:5].reshape(5, 2, 32).mean(1), atol=1e-5)


@pytest.mark.parametrize(
    "variant, names",
    [
        (dict(channels="continuous"), {"patches", "z_voco"}),
        (dict(channels="discrete"), {"v_d", "z_voco"}),
        (dict(mask="none", num_voco_tokens=0, fusion="post"), {"v_d", "patches"}),
    ],
    ids=data_tiny.in_order,
)
def test_what_a_model_lacks_is_left_out(probed, tmp_path, variant, names):
    reader, _ = made(tmp_path, seed=3, **variant)
    export(reader, tmp_path / "hf")
    assert extract(*load(tmp_path / "hf"), [str(file) for file in probed[1][:3]]).keys() == names


def test_linear_labels_are_read_and_shuffled_ones_are_not(probed):
    """Each label is linear in one representation; shuffled, it is in none."""
    _, files, found = probed
    chance = np.random.default_rng(1)
    clear = sign(found["z_voco"])
    labels = labelled(files, real=("semantic", clear), random=("detail", list(chance.permutation(clear))))
    probes = probe({"z_voco": found["z_voco"], "z_voco_0": found["z_voco_0"]}, labels, folds=3)
    real, random = probes["z_voco"]["real"], probes["z_voco"]["random"]
    assert real.train + real.test == 120 and real.test == sum(value is not None for value in clear[::3]) and real.classes == 2
    assert real.accuracy >= 0.97 and 0.3 < real.majority < 0.7
    assert abs(random.accuracy - random.majority) < 0.2 and random.low < random.accuracy < random.high
    blind = probes["z_voco_0"]["real"]  # the same of every image: the most frequent value is all there is to say
    assert blind.accuracy == blind.majority


def test_strength_is_chosen_and_intervals_are_wilsons():
    chance = np.random.default_rng(0)
    rows = chance.normal(size=(400, 30)) * 1000 + 5  # of which one says it, at any scale
    values = ["a" if row[3] > 5 else "b" for row in rows]
    found = fit(rows[:300], values[:300], rows[300:], values[300:], folds=3)
    assert found.accuracy > 0.95
    n, share, z = 100, found.accuracy, 1.959964
    middle, half = share + z * z / (2 * n), z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    assert (found.low, found.high) == pytest.approx(((middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)), abs=1e-6)
    noise = fit(rows[:300], [*chance.permutation(values[:300])], rows[300:], values[300:], folds=3)
    assert noise.strength < found.strength
    with pytest.raises(ConfigError, match="1 values in training, the rarest, 'a', at 9 images, and 2 test images; wanted at least 2"):
        fit(rows[:9], ["a"] * 9, rows[:2], ["a"] * 2)


def test_label_files(tmp_path):
    labels = LabelSet(
        {"shape": "semantic", "colour": "detail"},
        [LabelledImage("a.png", {"shape": "circle", "colour": "red"}, "train"), LabelledImage("b/c.png", {"colour": "blue"}, "test")],
    )
    labels.write(tmp_path / "labels.json")
    (tmp_path / "labels.csv").write_text("image,split,semantic:shape,detail:colour\na.png,train,circle,red\nb/c.png,test,,blue\n")
    wanted = [LabelledImage(str(tmp_path / image.image), image.labels, image.split) for image in labels.images]
    for name in ("labels.json", "labels.csv"):
        assert read_labels(tmp_path / name) == LabelSet(labels.labels, wanted)
    assert labels.divided(0.5, 0) is labels
    drawn = [LabelSet({}, [LabelledImage(f"{i}", {}) for i in range(10)]).divided(0.3, seed).images for seed in (0, 0, 1)]
    assert [image.split for image in drawn[0]].count("test") == 3 and drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(ConfigError, match="1 of 2 images are of a split; wanted all or none"):
        LabelSet({}, [LabelledImage("a", {}), LabelledImage("b", {}, "test")]).divided(0.5, 0)


@pytest.mark.parametrize(
    "name, text, sentence",
    [
        ("a.json", '{"labels": {"x": "rough"}, "images": []}', "labels: x: input should be 'semantic' or 'detail', got 'rough'"),
        ("a.json", '{"labels": {}, "images": [{"image": "a", "labels": {"x": "1"}}]}', "label 'x' has no kind"),
        ("a.csv", "image,shape\na,b\n", "the header is .*; wanted image, perhaps split, and columns like semantic:shape"),
        ("a.csv", "image,split,detail:x\na,tset,b\n", "line 2: split: .* got 'tset'"),
        ("b.csv", "", "b.csv: the header is"),
        ("absent.json", None, "absent.json cannot be read"),
    ],
)
def test_bad_label_files_are_refused(tmp_path, name, text, sentence):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        read_labels(tmp_path / name)


def test_labels_of_easy_vqa():
    labels = labelled_images()
    counts = [sum(label in image.labels for image in labels.images) for label in ("shape", "colour")]
    assert counts == [4737, 4630] and labels.labels == {"shape": "semantic", "colour": "detail"}
    assert {image.labels.get("shape") for image in labels.images} == {"circle", "rectangle", "triangle", None}
    seen = 0
    for image in labels.images[:200]:  # the colour in the picture's middle is the one that is said
        red, green, blue = Image.open(image.image).convert("RGB").getpixel((32, 32))
        if image.labels.get("colour") in ("red", "green", "blue") and max(red, green, blue) - min(red, green, blue) > 60:
            seen += 1
            assert image.labels["colour"] == max((red, "red"), (green, "green"), (blue, "blue"))[1]
    assert seen > 10


def test_the_tool(probed, tmp_path):
    folder, files, found = probed
    values = {name: sign(found[name]) for name in ("v_d", "patches", "z_voco")}
    labels = labelled(files, x=("semantic", values["v_d"]), y=("detail", values["patches"]), z=("detail", values["z_voco"]))
    labels.write(tmp_path / "labels.json")
    done = tool("probe.py", folder, tmp_path / "labels.json", "--out", tmp_path / "deep" / "probes.json", "--folds", 3)
    assert done.status == 0, done.error
    record = json.loads((tmp_path / "deep" / "probes.json").read_text())["representations"]
    accuracy = {name: {label: one["accuracy"] for label, one in part["labels"].items()} for name, part in record.items()}
    assert min(accuracy["v_d"]["x"], accuracy["patches"]["y"], accuracy["z_voco"]["z"]) > 0.9
    assert record["z_voco"]["detail"] == (accuracy["z_voco"]["y"] + accuracy["z_voco"]["z"]) / 2
    assert "| x (semantic) | y (detail) | z (detail) | semantic | detail |" in done.out and "| majority | " in done.out
    for options, sentence in (
        (["--layers", 3], "layer 3 is not one of the model's; wanted -3 to 2"),
        (["--folds", 1], "--folds is 1 and --batch-size 16; wanted at least 2 and 1"),
        (["--folds", 90], "label 'x': 2 values in training, the rarest, "),
    ):
        done = tool("probe.py", folder, tmp_path / "labels.json", *options)
        assert done.status == 2 and sentence in done.error.splitlines()[-1]
