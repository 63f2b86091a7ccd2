"""Configurations: what is read, and the sentence for everything that is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field
from pydantic.dataclasses import dataclass

from htc_megatron.config import STRICT, ConfigError, OptimizerConfig, RunConfig, TrainingConfig
from htc_megatron.config_checks import MAY_BE_ZERO, check, check_model
from htc_megatron.config_io import files_and_overrides, from_dict, load_config, to_dict, to_yaml


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def sentence(call, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------- reading


def test_defaults_are_a_run_that_passes_its_checks():
    check(RunConfig(), world_size=8)


def test_yaml_and_overrides(tmp_path):
    path = write(tmp_path, "training:\n  seq_length: 512\n  freeze: [vision, backbone]\noptimizer: {lr: 1e-3}\nparallel:\n")
    config = load_config(
        path, ["training.seq_length=256", "optimizer.min_lr=1e-5", "model.mgvq.widths=[8, 8]", "data.train=", "zero=zero3.json"]
    )
    assert config.training.seq_length == 256
    assert config.training.freeze == ("vision", "backbone")
    assert config.optimizer.lr == 1e-3 and config.optimizer.min_lr == 1e-5  # text to YAML 1.1, which wants 1.0e-3
    assert config.model.mgvq.widths == (8, 8)
    assert config.data.train == "" and config.zero == "zero3.json"
    assert config.parallel == RunConfig().parallel  # an empty section is all defaults
    assert isinstance(load_config(path, ["optimizer.weight_decay=1"]).optimizer.weight_decay, float)
    assert load_config(write(tmp_path, "", "empty.yaml")) == RunConfig()


def test_base(tmp_path):
    write(tmp_path, "training: {seq_length: 512, train_iters: 7}\noptimizer: {lr: 0.5}\n", "bottom.yaml")
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", "base: ../bottom.yaml\ntraining: {train_iters: 9}\n", "middle.yaml")
    path = write(tmp_path, "base: sub/middle.yaml\ntraining:\noptimizer: {beta1: 0.8}\n")
    config = load_config(path, ["optimizer.lr=0.25"])
    assert (config.training.seq_length, config.training.train_iters) == (512, 9)
    assert (config.optimizer.lr, config.optimizer.beta1) == (0.25, 0.8)


def test_files_are_laid_over_each_other(tmp_path):
    """Each with its own base; lists are replaced, not joined; the command line comes last."""
    write(tmp_path, "training: {seq_length: 512, train_iters: 7, freeze: [vision, voco]}\noptimizer: {lr: 0.5}\n", "bottom.yaml")
    first = write(tmp_path, "base: bottom.yaml\nmodel: {method: {mask: full}}\n", "first.yaml")
    second = write(tmp_path, "model: {method: {num_voco_tokens: 2}}\ntraining: {train_iters: 9, freeze: [voco]}\n", "second.yml")
    config = load_config([first, second], ["optimizer.lr=0.25"])
    assert (config.model.method.mask, config.model.method.num_voco_tokens) == ("full", 2)
    assert (config.training.seq_length, config.training.train_iters, config.training.freeze) == (512, 9, ("voco",))
    assert config.optimizer.lr == 0.25
    assert "first.yaml, " in sentence(load_config, [first, write(tmp_path, "trainin: 1", "third.yaml")])
    words = ["a.txt", "lr=1/b.yaml", "seed=1", "x/y=2/c.yml", "zero=d.yaml", "seq_length"]
    assert files_and_overrides(words) == (["a.txt", "x/y=2/c.yml"], ["lr=1/b.yaml", "seed=1", "zero=d.yaml", "seq_length"])


def test_a_configuration_from_before_there_were_adapters_has_none():
    tree = to_dict(RunConfig())
    del tree["model"]["lora"]
    assert from_dict(tree) == RunConfig() and RunConfig().model.lora.rank == 0


def test_another_kind_can_be_read(tmp_path):
    assert load_config(write(tmp_path, "lr: 3e-4"), ["beta2=0.95"], OptimizerConfig) == OptimizerConfig(lr=3e-4, beta2=0.95)


@dataclass(config=STRICT)
class Bounded:
    needed: int
    share: Annotated[float, Field(ge=0, le=1)] = 0.5

    def __post_init__(self):
        if self.needed == 13:
            raise ValueError("thirteen brings bad luck")


def test_constraints_of_another_kind(tmp_path):
    path = write(tmp_path, "needed: 1")
    assert load_config(path, ["share=1e-2"], Bounded).share == 0.01
    assert sentence(load_config, path, ["share=2"], Bounded) == f"{path}: share: got 2, wanted at most 1.0"
    assert sentence(load_config, path, ["share=-1"], Bounded) == f"{path}: share: got -1, wanted at least 0.0"
    assert sentence(load_config, path, ["share=x"], Bounded) == f"{path}: share: got 'x', wanted a number"
    assert sentence(load_config, path, ["needed=13"], Bounded) == f"{path}: thirteen brings bad luck"
    assert sentence(from_dict, {}, Bounded) == "needed: missing, wanted a whole number"


def test_round_trip():
    config = RunConfig(training=TrainingConfig(freeze=(), seq_length=77), optimizer=OptimizerConfig(lr=1.0000000000000002e-05))
    assert from_dict(to_dict(config)) == config
    assert from_dict(yaml.safe_load(to_yaml(config))) == config
    assert json.loads(json.dumps(to_dict(config))) == to_dict(config)


@given(
    st.floats(min_value=0, allow_nan=False, allow_infinity=False),
    st.integers(min_value=-(2**62), max_value=2**62),
    st.text(st.characters(exclude_categories=("Cs",))),
    st.lists(st.sampled_from(["vision", "projector", "anchors", "backbone", "voco"]), max_size=5),
)
def test_any_value_comes_back_from_yaml(lr, seed, folder, freeze):
    config = RunConfig(training=TrainingConfig(seed=seed, freeze=tuple(freeze)), optimizer=OptimizerConfig(lr=lr), output_dir=folder)
    assert from_dict(yaml.safe_load(to_yaml(config))) == config


# ------------------------------------------------------------------------------------------------- files, keys and types

BAD_TEXT = [
    ("training: {seq_len: 512}", "run.yaml: training.seq_len: unknown key; did you mean training.seq_length?"),
    ("training: {lr: 1.0}", "training.lr: unknown key; did you mean optimizer.lr?"),
    ("trainnig: {}", "trainnig: unknown key; did you mean training?"),
    ("qwertz: 1", "qwertz: unknown key; known at the top are model, parallel,"),
    ("model: {vision: {qwertz: 1}}", "model.vision.qwertz: unknown key; known here are image_size, patch_size,"),
    ("training: {seq_length: many}", "training.seq_length: got 'many', wanted a whole number"),
    ("training: {seq_length: 1.5}", "training.seq_length: got 1.5, wanted a whole number"),
    ("training: {seq_length: true}", "training.seq_length: got true, wanted a whole number"),
    ("training: {seq_length: '12'}", "training.seq_length: got '12', wanted a whole number"),
    ("training: {seq_length: null}", "training.seq_length: got null, wanted a whole number"),
    ("training: {train_iters: 1e3}", "training.train_iters: got '1e3', wanted a whole number"),
    ("optimizer: {lr: fast}", "optimizer.lr: got 'fast', wanted a number"),
    ("optimizer: {lr: yes}", "optimizer.lr: got true, wanted a number"),
    ("parallel: {reduce_once: 1}", "parallel.reduce_once: got 1, wanted true or false"),
    ("parallel: {sequence_parallel: 'yes'}", "parallel.sequence_parallel: got 'yes', wanted true or false"),
    ("parallel: {recompute: some}", "parallel.recompute: got 'some', wanted none, selective or full"),
    ("parallel: {layers_per_stage: some}", "parallel.layers_per_stage: got 'some', wanted balanced or even or a list, each entry a whole"),
    (
        "parallel: {layers_per_stage: [3, x]}",
        'parallel.layers_per_stage: got [3, "x"], wanted balanced or even or a list, each',
    ),
    ("tokenizer: 32000", "tokenizer: got 32000, wanted text"),
    ("training: {precision: fp16}", "training.precision: got 'fp16', wanted bf16 or fp32: DeepSpeed's fp16 raises on pipeline stages"),
    ("training: {precision: int8}", "training.precision: got 'int8', wanted fp32 or bf16"),
    (
        "training: {freeze: vision}",
        "training.freeze: got 'vision', wanted a list, each entry vision, resampler, projector, anchors, backbone or",
    ),
    ("training: {freeze: [vison]}", "training.freeze.0: got 'vison', wanted vision, resampler"),
    ("model: {mgvq: {widths: [8, x]}}", "model.mgvq.widths.1: got 'x', wanted a whole number"),
    ("model: 7", "model: got 7, wanted keys and values (backbone, vision, mgvq, method, lora)"),
    ("model: {lora: {rank: 4, targets: [lm_head]}}", "model.lora.targets.0: got 'lm_head', wanted q_proj, k_proj, v_proj, o_proj, gate"),
    ("model: {lora: {dropout: 0.1}}", "model.lora.dropout: unknown key; known here are rank, alpha, targets"),
    ("model: {backbone: [1]}", "model.backbone: got [1], wanted keys and values (num_layers,"),
    ("- a\n- b", 'run.yaml: got ["a", "b"], wanted keys and values such as'),
    ("zero: a\nzero: b", "run.yaml: line 2: key 'zero' stands twice, first on line 1"),
    ("training:\n  seed: 1\n  log_interval: 2\n  seed: 3", "line 4: key 'seed' stands twice, first on line 2"),
    ("training: {1: 2}", "line 1: key 1 is not text"),
    ("training: {seed: 1", "run.yaml: line 1: not valid YAML: expected ',' or '}'"),
    ("zero: 2024-13-45", "run.yaml: not valid YAML: month must be in 1..12"),
    ("zero: !!python/object:os.system x", "not valid YAML: could not determine a constructor"),
    ("base: [a]", 'base: got ["a"], wanted the path of a YAML file'),
    ("base: missing.yaml", "missing.yaml: cannot be read (No such file or directory); wanted a YAML file (base of"),
    ("base: run.yaml", "base leads back to the file itself: run.yaml -> run.yaml"),
]


@pytest.mark.parametrize("text, wanted", BAD_TEXT, ids=[text.replace("\n", " ")[:30] for text, _ in BAD_TEXT])
def test_bad_yaml_gets_its_sentence(tmp_path, text, wanted):
    assert wanted in sentence(load_config, write(tmp_path, text))


BAD_OVERRIDES = [
    ("seq_length", "command line: got 'seq_length', wanted key=value such as"),
    ("=3", "command line: got '=3', wanted key=value"),
    ("training.=3", "command line: got 'training.=3', wanted key=value"),
    ("training.seq_length=many", "training.seq_length: got 'many', wanted a whole number"),
    ("training.seqlength=1", "training.seqlength: unknown key; did you mean training.seq_length?"),
    ("zero.stage=3", 'zero: got {"stage": 3}, wanted text'),
    ("model.mgvq.widths=[1,", "command line, model.mgvq.widths: line 1: not valid YAML"),
    ("training.seq_length=", "training.seq_length: got '', wanted a whole number"),
]


@pytest.mark.parametrize("override, wanted", BAD_OVERRIDES, ids=[text for text, _ in BAD_OVERRIDES])
def test_bad_overrides_get_their_sentence(tmp_path, override, wanted):
    assert wanted in sentence(load_config, write(tmp_path, "training: {seed: 1}"), [override])


def test_bad_files_get_their_sentence(tmp_path):
    assert "nowhere.yaml: cannot be read (No such file" in sentence(load_config, tmp_path / "nowhere.yaml")
    assert "cannot be read (Is a directory)" in sentence(load_config, tmp_path)
    (tmp_path / "picture.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    assert "picture.yaml: is not UTF-8 text" in sentence(load_config, tmp_path / "picture.yaml")


def test_every_fault_is_named_at_once(tmp_path):
    text = sentence(load_config, write(tmp_path, "training: {seed: x, seq_length: y}\noptimizer: {lr: z}"))
    assert text.count("\n") == 2 and all(key in text for key in ("training.seed", "training.seq_length", "optimizer.lr"))


# ------------------------------------------------------------------------------------------------- what does not fit

TP, PP, SP = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size", "parallel.sequence_parallel"
LAYERS = "parallel.layers_per_stage"
MASK, CHANNELS, SEES = "model.method.mask", "model.method.channels", "model.method.text_sees"
SOURCE = "model.method.anchor_source"
# (overrides, number of processes, the sentence)
BAD_COMBINATIONS = [
    ({TP: 3}, 3, "model.backbone.num_attention_heads: got 32, wanted a multiple of tensor_model_parallel_size, 3"),
    (
        {TP: 8, "model.backbone.num_query_groups": 4},
        8,
        "model.backbone.num_query_groups: got 4, wanted a multiple of tensor_model_parallel_size, 8",
    ),
    ({TP: 4, "model.backbone.ffn_hidden_size": 11010}, 4, "model.backbone.ffn_hidden_size: got 11010"),
    ({TP: 32}, 32, "model.vision.num_attention_heads: got 16, wanted a multiple of tensor_model"),
    ({TP: 2, "model.vision.ffn_hidden_size": 4097}, 2, "model.vision.ffn_hidden_size: got 4097"),
    ({TP: 2, "model.method.anchor_hidden_size": 333}, 2, "model.method.anchor_hidden_size: got 333"),
    (
        {PP: 5, LAYERS: "even"},
        5,
        "model.backbone.num_layers: got 32, wanted a multiple of pipeline_model_parallel_size (layers_per_stage even), 5",
    ),
    ({PP: 33}, 33, "model.backbone.num_layers: got 32, wanted a layer for each stage of pipeline_model_parallel_size, 33"),
    ({PP: 2, LAYERS: [16, 8, 8]}, 2, f"{LAYERS}: got 3 stages, wanted one for each of pipeline_model_parallel_size, 2"),
    ({PP: 2, LAYERS: [16, 15]}, 2, f"{LAYERS}: got 31 layers together, wanted model.backbone.num_layers, 32"),
    ({PP: 2, LAYERS: [0, 32]}, 2, f"{LAYERS}: got 0, wanted a positive number"),
    (
        {PP: 2, "parallel.virtual_pipeline_model_parallel_size": 2},
        2,
        "parallel.virtual_pipeline_model_parallel_size: got 2, wanted 1: a DeepSpeed engine for each model chunk would clip by",
    ),
    (
        {TP: 2, SP: True, "training.seq_length": 1023},
        2,
        "training.seq_length: got 1023, wanted a multiple of tensor_model_parallel_size (sequence_parallel), 2",
    ),
    ({SP: True}, 1, "parallel.sequence_parallel: got true, wanted false with tensor_model_parallel_size 1"),
    (
        {TP: 2, PP: 2},
        6,
        "parallel: got 6 processes for tensor_model_parallel_size 2 x pipeline_model_parallel_size 2, wanted a multiple of 4",
    ),
    ({}, 3, "training.global_batch_size: got 8, wanted a multiple of micro_batch_size 1 x data-parallel size 3, 3"),
    ({"training.micro_batch_size": 3}, None, "training.global_batch_size: got 8, wanted a multiple of micro_batch_size, 3"),
    ({"model.vision.image_size": 335}, 1, "model.vision.image_size: got 335, wanted a multiple of patch_size, 14"),
    ({"model.vision.hidden_size": 1000}, 1, "model.vision.hidden_size: got 1000, wanted a multiple of num_attention_heads, 16"),
    ({"model.mgvq.image_size": 330}, 1, "model.mgvq.image_size: got 330, wanted a multiple of the downsampling of 4 stages, 16"),
    ({"model.mgvq.codebook_size": 1001}, 1, "model.mgvq.codebook_size: got 1001, wanted a multiple of groups, 8"),
    ({"model.mgvq.codebook_size": 2**19}, 1, "model.mgvq.codebook_size: got 524288, wanted at most 32768 rows a group, not 65536"),
    ({"model.mgvq.latent_channels": 30}, 1, "model.mgvq.latent_channels: got 30, wanted a multiple of groups, 8"),
    ({"model.mgvq.depths": [1]}, 1, "model.mgvq.depths: got 1 entries, wanted one for each of the 4 stages in widths"),
    ({"model.mgvq.decoder_depths": [1, 1]}, 1, "model.mgvq.decoder_depths: got 2 entries"),
    ({"model.mgvq.blocks": []}, 1, "model.mgvq.blocks: got 0 entries"),
    ({"model.mgvq.widths": []}, 1, "model.mgvq.widths: got an empty list"),
    ({"model.method.num_voco_tokens": 0}, 1, "model.method.num_voco_tokens: got 0, wanted at least 1 with mask star"),
    ({MASK: "none", SEES: "voco_on"}, 1, "model.method.text_sees: got voco_on, wanted all with mask none"),
    ({CHANNELS: "continuous", "model.method.fusion": "post"}, 1, "model.method.fusion: got post, wanted pre with channels continuous"),
    ({"model.method.num_anchors": 0}, 1, "model.method.num_anchors: got 0, wanted at least 1 with channels hybrid"),
    ({"model.method.voco_token_id": 32001}, 1, "model.method.voco_token_id: got 32001, wanted less than model.backbone.vocab_size, 32001"),
    ({"training.seq_length": 581}, 1, "training.seq_length: got 581, wanted more than the 581 tokens of one image"),
    ({"training.seq_length": 8192}, 1, "training.seq_length: got 8192, wanted at most model.backbone.max_position_embeddings, 4096"),
    ({"model.backbone.hidden_size": 4100}, 1, "model.backbone.hidden_size: got 4100, wanted a multiple of num_attention_heads, 32"),
    ({"model.backbone.hidden_size": 96}, 1, "model.backbone.hidden_size: got 96, wanted an even size of each of the 32 heads, not 3"),
    ({"model.backbone.num_query_groups": 5}, 1, "model.backbone.num_attention_heads: got 32, wanted a multiple of num_query_groups, 5"),
    (
        {"training.freeze": ["vision", "projector", "anchors", "backbone", "voco"]},
        1,
        "training.freeze: got vision, projector, anchors, backbone, voco, wanted one or more of anchors, backbone, projector, vision, voco",
    ),
    ({"training.freeze": ["backbone", "voco", "anchors"], CHANNELS: "discrete"}, 1, "wanted one or more of anchors, backbone, voco"),
    ({"optimizer.beta2": 1.0}, 1, "optimizer.beta2: got 1.0, wanted less than 1"),
    ({"optimizer.warmup_ratio": 1.5}, 1, "optimizer.warmup_ratio: got 1.5, wanted a share of train_iters from 0 to 1"),
    ({"optimizer.min_lr": 1.0}, 1, "optimizer.min_lr: got 1.0, wanted at most lr, 2e-05"),
    ({"optimizer.lr": -1.0}, 1, "optimizer.lr: got -1.0, wanted a positive number"),
    ({"optimizer.lr": float("nan")}, 1, "optimizer.lr: got nan, wanted a positive number"),
    ({"optimizer.weight_decay": -0.1}, 1, "optimizer.weight_decay: got -0.1, wanted zero or a positive number"),
    ({"data.max_bad_share": 2.0}, 1, "data.max_bad_share: got 2.0, wanted a share from 0 to 1"),
    ({"training.train_iters": 0}, 1, "training.train_iters: got 0, wanted a positive number, or a checkpoint in init_from: there would"),
    ({CHANNELS: "discrete", "model.method.resampler": "average"}, 1, "model.method.resampler: got average, wanted none with channels disc"),
    ({CHANNELS: "continuous", SOURCE: "random"}, 1, f"{SOURCE}: got random, wanted mgvq with channels continuous: anchors from the tower"),
    ({CHANNELS: "discrete", SOURCE: "kmeans"}, 1, f"{SOURCE}: got kmeans, wanted mgvq with channels discrete"),
    (
        {SOURCE: "kmeans", "model.method.num_anchors": 600},
        1,
        "num_anchors: got 600, wanted at most the 576 patches that kmeans chooses from",
    ),
    (
        {"model.method.resampler": "average", "model.method.num_resampled_tokens": 600},
        1,
        "model.method.num_resampled_tokens: got 600, wanted at most the 576 patches that are averaged",
    ),
    ({SOURCE: "topk_attention", "data.feature_cache": "/c"}, 1, "data.feature_cache: got /c, wanted nothing with anchor_source topk_att"),
    ({"model.vision.patch_size": 0}, 1, "model.vision.patch_size: got 0, wanted a positive number"),
    ({"model.mgvq.widths": [8, 0, 8, 8]}, 1, "model.mgvq.widths: got 0, wanted a positive number"),
    ({"training.eval_interval": 5}, 1, "data.validation: got nothing, wanted a prepared folder with training.eval_interval 5"),
    ({"output_dir": ""}, 1, "output_dir: got nothing, wanted a folder for checkpoints and logs"),
    ({"model.lora.rank": 8}, 1, "training.freeze: got vision, wanted backbone among them with model.lora.rank 8"),
    ({"model.lora.rank": 8, "training.freeze": []}, 1, "training.freeze: got nothing, wanted backbone among them"),
    ({"model.lora.rank": 8, "model.lora.targets": []}, 1, "model.lora.targets: got an empty list, wanted at least one"),
    ({"model.lora.targets": ["q_proj", "q_proj"]}, 1, "model.lora.targets: got q_proj, q_proj, wanted each linear once"),
    ({"model.lora.alpha": 0.0}, 1, "model.lora.alpha: got 0.0, wanted a positive number"),
]


def changed(changes: dict) -> RunConfig:
    tree = to_dict(RunConfig())
    for key, value in changes.items():
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place[section]
        place[name] = value
    return from_dict(tree)


@pytest.mark.parametrize("changes, world_size, wanted", BAD_COMBINATIONS, ids=[" ".join(case[0]) or "none" for case in BAD_COMBINATIONS])
def test_what_does_not_fit_gets_its_sentence(changes, world_size, wanted):
    assert wanted in sentence(check, changed(changes), world_size)


def test_what_fits_is_accepted():
    check(changed({TP: 2, SP: True, PP: 4}), 16)
    check(changed({PP: 5}), 5)
    check(changed({PP: 2, LAYERS: "even"}), 2)
    check(changed({PP: 2, LAYERS: [31, 1]}), 2)
    check(changed({MASK: "none", "model.method.num_voco_tokens": 0, "model.method.voco_token_id": 10**6}), 2)
    # the sizes of a channel that is not there do not matter
    check(changed({CHANNELS: "continuous", "model.mgvq.image_size": 5, "model.method.num_anchors": 0}), 1)
    check(changed({CHANNELS: "discrete", "model.vision.image_size": 5, "training.freeze": ["vision", "projector"]}), 1)
    # neither MGVQ nor its sizes matter where the anchors are the tower's
    check(changed({SOURCE: "kmeans", "model.mgvq.image_size": 5, "data.feature_cache": "/cache"}), 1)
    check(changed({"model.method.resampler": "qformer", "model.method.num_resampled_tokens": 600, "training.freeze": ["resampler"]}), 1)
    check(changed({"training.train_iters": 0, "init_from": "runs/upper"}), 1)
    everything = ["vision", "projector", "anchors", "voco", "backbone"]
    check(changed({"model.lora.rank": 8, "model.lora.targets": ["q_proj", "v_proj"], "training.freeze": everything}), 1)
    check(changed({"optimizer.clip_grad": 0.0, "optimizer.warmup_ratio": 0.0, "model.method.image_sees": "prefix"}), 1)


def test_a_model_alone_can_be_checked():
    check_model(RunConfig().model)
    assert "model.mgvq.groups: got 0" in sentence(check_model, changed({"model.mgvq.groups": 0}).model)


def test_numbers_that_may_be_zero_exist():
    for key in MAY_BE_ZERO:
        value = RunConfig()
        for part in key.split("."):
            value = getattr(value, part)
        assert isinstance(value, int | float)


def test_every_number_is_checked_for_its_sign():
    """Each number of the tree, made negative, is refused by name: a new field cannot be forgotten."""

    def numbers(section, prefix=""):
        for item in dataclasses.fields(section):
            value = getattr(section, item.name)
            if dataclasses.is_dataclass(value):
                yield from numbers(value, f"{prefix}{item.name}.")
            elif isinstance(value, int | float) and not isinstance(value, bool):
                yield prefix + item.name

    keys = list(numbers(RunConfig()))
    assert len(keys) > 40
    for key in keys:
        assert f"{key}: got -1" in sentence(check, changed({key: -1}), 1)


RECIPES = sorted(path for path in (Path(__file__).parent.parent / "pretrain" / "recipes").glob("*.yaml") if "mgvq" not in path.stem)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_a_run_that_can_be(path):
    check(load_config(path))
