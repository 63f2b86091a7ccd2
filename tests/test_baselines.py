"""The paper's baselines and ablations: their parts against references of other making, their files, and runs of them.

Layouts are compared in test_parity.py, every weight's gradient with the exported model's in test_gradients.py and its logits in
test_hf_parity.py; what these share with the training side is checked here.
"""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from htc_megatron.checkpoint import CheckpointReader
from htc_megatron.config import RunConfig
from htc_megatron.config_io import check, load_config
from htc_megatron.data.tokenizer import load_tokenizer
from htc_megatron.evaluation.compare import compare_logits, open_model
from htc_megatron.hf.anchors_htc_vlm import anchor_features, anchor_weights, attention_in_clip, random_positions
from htc_megatron.hf.resampler_htc_vlm import QFormer, average_tokens
from htc_megatron.inference import ask, load
from htc_megatron.model.initialisation import initial_value
from htc_megatron.weights import weights
from htc_megatron.weights.export import export
from htc_megatron.weights.importing import plan_import
from tests import data_tiny
from tests.hf_tiny import made, tiny_images, tiny_model
from tests.quick import quick
from tests.train_worker import train
from tests.training_tiny import make_run

ROOT = Path(__file__).resolve().parent.parent
ROWS = sorted((ROOT / "examples" / "paper" / "models").glob("*.yaml"))


def features(images: int = 3, patches: int = 16, width: int = 8, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, patches, width, generator=generator, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------ resamplers


@pytest.mark.parametrize("count", [1, 4, 16])
def test_square_counts_average_cells_of_the_grid(count):
    x, side = features(), int(count**0.5)
    pooled = F.adaptive_avg_pool2d(x.transpose(1, 2).unflatten(2, (4, 4)), side).flatten(2).transpose(1, 2)
    torch.testing.assert_close(average_tokens(x, count), pooled)


def test_other_counts_average_runs_row_by_row():
    x = features()
    runs = [x[:, start:stop].mean(1) for start, stop in ((0, 5), (5, 10), (10, 16))]
    torch.testing.assert_close(average_tokens(x, 3), torch.stack(runs, 1))
    torch.testing.assert_close(average_tokens(x, 8), F.adaptive_avg_pool1d(x.transpose(1, 2), 8).transpose(1, 2))


def qformer_reference(model: QFormer, heads: int, eps: float, x: torch.Tensor) -> torch.Tensor:
    """The same by torch's own MultiheadAttention, reading the weights by their names in the export."""
    weight = dict(model.named_parameters())

    def norm(name, y):
        return F.layer_norm(y, y.shape[-1:], weight[f"{name}.weight"], weight[f"{name}.bias"], eps)

    def attend(name, y, context):
        parts = [f"{name}.{p}_proj" for p in "qkv"]
        out = F.multi_head_attention_forward(
            y.transpose(0, 1), context.transpose(0, 1), context.transpose(0, 1), y.shape[-1], heads,
            torch.cat([weight[f"{p}.weight"] for p in parts]), torch.cat([weight[f"{p}.bias"] for p in parts]), None, None, False, 0.0,
            weight[f"{name}.out_proj.weight"], weight[f"{name}.out_proj.bias"], need_weights=False,
        )[0]  # fmt: skip
        return out.transpose(0, 1)

    seen = norm("input_layernorm", x)
    y = weight["queries"][None].repeat(len(x), 1, 1)
    for i in range(len(model.layers)):
        normed = norm(f"layers.{i}.self_attention.layernorm", y)
        y = y + attend(f"layers.{i}.self_attention", normed, normed)
        y = y + attend(f"layers.{i}.cross_attention", norm(f"layers.{i}.cross_attention.layernorm", y), seen)
        hidden = norm(f"layers.{i}.mlp.layernorm", y) @ weight[f"layers.{i}.mlp.fc1.weight"].T + weight[f"layers.{i}.mlp.fc1.bias"]
        y = y + F.gelu(hidden) @ weight[f"layers.{i}.mlp.fc2.weight"].T + weight[f"layers.{i}.mlp.fc2.bias"]
    return norm("final_layernorm", y)


@pytest.mark.parametrize("queries", [1, 5])
def test_qformer_and_its_gradients(queries):
    torch.manual_seed(0)
    model, x = QFormer(queries, 2, 8, 12, 2, 1e-5).double(), features().requires_grad_()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.5) if "layernorm" not in name else nn.init.uniform_(parameter, 0.5, 1.5)
    probe = torch.randn(3, queries, 8, dtype=torch.float64)
    inputs = [x, *model.parameters()]
    ours, theirs = model(x), qformer_reference(model, 2, 1e-5, x)
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad((out * probe).sum(), inputs) for out in (ours, theirs)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


# --------------------------------------------------------------------------------------------------------------- anchors


def test_random_positions_are_those_of_the_documented_generator():
    assert random_positions(16, 4, 0) == [3, 7, 12, 15]  # pinned: an export must find what training used, on any version
    assert random_positions(576, 4, 1) != random_positions(576, 4, 2)
    assert set(random_positions(576, 4, 1)) < set(random_positions(576, 8, 1))
    assert random_positions(5, 5, 3) == [0, 1, 2, 3, 4]


def test_chosen_patches_are_whole_and_in_order():
    x = features().float()
    chosen = anchor_features("random", x, 4, seed=0)
    assert torch.equal(chosen, x[:, [3, 7, 12, 15]].flatten(1))
    attention = torch.zeros(3, 16)
    attention[0, [7, 3, 12]] = torch.tensor([0.1, 0.5, 0.3])
    attention[1, [15, 1]] = 0.2  # and equals behind them: the first is taken
    expected = [[3, 7, 12], [0, 1, 15], [0, 1, 2]]
    chosen = anchor_features("topk_attention", x, 3, attention=attention)
    assert torch.equal(chosen, torch.stack([x[i, places].flatten() for i, places in enumerate(expected)]))


def test_attention_of_cls_is_clips_own():
    """Against the weights that transformers' eager attention gives out, last layer, mean over heads."""
    tower = tiny_model(anchor_source="topk_attention").model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        seen = tower(tiny_images(3)["pixel_values"], output_attentions=True, output_hidden_states=True)
        ours = attention_in_clip(tower.encoder.layers[-1], seen.hidden_states[-2])
    torch.testing.assert_close(ours / 2, seen.attentions[-1].mean(1)[:, 0, 1:])


def kmeans_reference(points: torch.Tensor, count: int) -> torch.Tensor:
    """Lloyd's algorithm of one image, point by point. [count, h]"""
    distance = lambda a, b: float((a - b).square().sum())  # noqa: E731
    starts = [max(range(len(points)), key=lambda i: distance(points[i], points.mean(0)))]
    while len(starts) < count:
        starts.append(max(range(len(points)), key=lambda i: min(distance(points[i], points[s]) for s in starts)))
    centres = [points[s] for s in starts]
    for _ in range(10):
        nearest = [min(range(count), key=lambda c: distance(p, centres[c])) for p in points]
        members = [[p for p, c in zip(points, nearest, strict=True) if c == centre] for centre in range(count)]
        centres = [torch.stack(found).mean(0) if found else old for found, old in zip(members, centres, strict=True)]
    return torch.stack(centres)


@pytest.mark.parametrize("count", [1, 4, 16])
def test_kmeans(count):
    x = features(patches=64, width=2, seed=count)  # many points that lie close: the centres move for several rounds
    wanted = torch.stack([kmeans_reference(points, count) for points in x]).flatten(1)
    torch.testing.assert_close(anchor_features("kmeans", x.float(), count), wanted.float(), atol=1e-5, rtol=0)


def test_kmeans_of_equal_patches_is_that_patch():
    """Centres without members stay where they began: nothing is divided by zero."""
    x = torch.ones(2, 16, 8)
    assert torch.equal(anchor_features("kmeans", x, 3), torch.ones(2, 24))


@pytest.mark.parametrize("source", ["random", "topk_attention", "kmeans"])
def test_gradients_pass_through_the_values_alone(source):
    """A frozen tower's features keep no graph; a trained one's get the gradient of a sum with fixed weights."""
    x, attention = features().float(), torch.rand(3, 16)
    assert not anchor_features(source, x, 4, 0, attention).requires_grad
    chosen = anchor_features(source, x.requires_grad_(), 4, 0, attention)
    probe = torch.randn(3, 4, 8)
    chosen.backward(probe.flatten(1))
    fixed = anchor_weights(source, x.detach(), 4, 0, attention)
    torch.testing.assert_close(x.grad, fixed.transpose(1, 2) @ probe)


# ----------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("path", ROWS, ids=lambda path: path.stem)
def test_every_row_of_the_paper_is_a_run_that_can_be(path):
    recipes = ROOT / "pretrain" / "recipes"
    check(load_config([recipes / "instruct.yaml", path]))
    page = (path.parent / "README.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith("| ") and f"`{path.stem}`" in line.split("|")[2]]
    if "its own" in row:
        aligned = load_config([path, recipes / "align.yaml"])
        check(aligned)
        assert aligned.model.method.mask == "none"


def test_the_page_names_no_other_files():
    page = (ROOT / "examples" / "paper" / "models" / "README.md").read_text()
    named = {name for line in page.splitlines() if line.startswith("| ") for name in re.findall(r"`(\w+)`", line.split("|")[2])}
    assert named == {path.stem for path in ROWS}


# ------------------------------------------------------------------------------------------------------------------ runs

UNCOMPRESSED = ["model.method.channels=continuous", "model.method.mask=none", "model.method.num_voco_tokens=0"]
WITHOUT_MGVQ = {
    "upper": UNCOMPRESSED,
    "qformer": [*UNCOMPRESSED, "model.method.resampler=qformer"],
    "kmeans": ["model.method.anchor_source=kmeans"],
    "topk_attention": ["model.method.anchor_source=topk_attention"],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, list[str]]:
    """A run's YAML, and the settings under which it has neither MGVQ nor codes."""
    folder = tmp_path_factory.mktemp("run")
    path = make_run(folder, count=24)
    (folder / "plain").mkdir()
    data = data_tiny.prepared(folder / "plain", load_tokenizer(folder / "tokenizer.model"), codes=False)
    return path, [f"data.train={data}", "data.validation=", "mgvq_checkpoint=", "training.train_iters=2"]


def answered(checkpoints: Path, out: Path) -> str:
    export(CheckpointReader(checkpoints), out, system="Look.")
    model, processor = load(out)
    return ask(model, processor, [data_tiny.noise(20, 13)], "what?", 3)


@pytest.mark.parametrize("method", [dict(resampler="qformer", num_resampled_tokens=3), dict(anchor_source="kmeans")], ids=str)
def test_an_export_comes_back(tmp_path, method):
    """Every choice and every tensor, from the exported folder alone."""
    reader, _ = made(tmp_path, **method)
    export(reader, tmp_path / "hf")
    plan = plan_import([tmp_path / "hf"], RunConfig(mgvq_checkpoint=reader.config.mgvq_checkpoint))
    assert plan.config.model.method == reader.config.model.method
    found = dict(plan.tensors())
    assert found.keys() == reader.tensors.keys()
    others = found.keys() - {"backbone.embedding.word_embeddings.weight"}  # whose voco row was its own
    assert all(torch.equal(found[name], reader.tensors[name]) for name in others)


def test_an_export_from_before_there_were_choices_had_the_defaults(tmp_path):
    reader, _ = made(tmp_path)
    export(reader, tmp_path / "hf")
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    for name in ("resampler", "num_resampled_tokens", "resampler_layers", "anchor_source", "anchor_seed"):
        del settings[name]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(settings))
    base = load_config(None, ["model.method.resampler=average", f"mgvq_checkpoint={reader.config.mgvq_checkpoint}"])
    assert plan_import([tmp_path / "hf"], base).config.model.method == reader.config.model.method


@pytest.mark.parametrize("row", quick(WITHOUT_MGVQ, ["qformer", "topk_attention"]))
def test_from_data_without_codes_to_an_answer(ranks, run, tmp_path, row):
    """TP 2 x PP 2 under ZeRO-3, checkpoint, resumption, export."""
    path, plain = run
    layout = ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2", "zero=zero3.json"]
    settings = [*plain, *layout, *WITHOUT_MGVQ[row], f"output_dir={tmp_path}/run"]
    assert [step for step, *_ in ranks(4).run(train, str(path), settings)[0]] == [1, 2]
    assert [step for step, *_ in ranks(4).run(train, str(path), [*settings, "training.train_iters=3"])[0]] == [3]
    assert isinstance(answered(tmp_path / "run" / "checkpoints", tmp_path / "hf"), str)
    picture = data_tiny.noise(300, 200).convert("RGB")
    models = (open_model(tmp_path / "run" / "checkpoints"), open_model(tmp_path / "hf"))
    greatest, _, seen = compare_logits(*models, picture)
    assert greatest < 1e-4 and seen


def test_the_lower_bound_is_the_upper_one_under_another_mask(ranks, run, tmp_path):
    """No step is made: the weights are saved as they were, beside a new voco row; saved once, exported, and good to train on."""
    path, plain = run
    ranks(1).run(train, str(path), [*plain, *UNCOMPRESSED, f"output_dir={tmp_path}/upper"])
    masked = ["model.method.channels=continuous", "model.method.mask=full", "model.method.num_voco_tokens=2"]
    start = [f"init_from={tmp_path}/upper/checkpoints", "training.train_iters=0", f"output_dir={tmp_path}/lower"]
    lower = [*plain, *masked, *start, "parallel.pipeline_model_parallel_size=2"]
    assert ranks(2).run(train, str(path), lower)[0] == []
    assert f"init_from: {tmp_path}/upper/checkpoints has no voco, which begins as drawn from training.seed" in ranks(2).output[0]
    assert ranks(2).run(train, str(path), lower)[0] == []
    (folder,) = [f for f in (tmp_path / "lower" / "checkpoints").iterdir() if f.is_dir()]
    assert folder.name == "step_00000000"
    found, before = CheckpointReader(folder), CheckpointReader(tmp_path / "upper" / "checkpoints")
    assert set(found.names) == {*before.names, "frontend.voco.weight"}
    assert all(torch.equal(found.tensor(name), before.tensor(name)) for name in before.names)
    voco = next(weight for weight in weights(found.config.model) if weight.name == "frontend.voco.weight")
    assert torch.equal(found.tensor(voco.name), initial_value(voco, found.config.training.seed, 0, 1))
    assert isinstance(answered(folder, tmp_path / "hf"), str)
    assert [step for step, *_ in ranks(2).run(train, str(path), [*lower, "training.train_iters=1"])[0]] == [1]
