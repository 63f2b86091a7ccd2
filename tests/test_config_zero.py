"""DeepSpeed JSON files: every key acts or is refused."""

import json
from pathlib import Path

import pytest

from htc_megatron.config import ConfigError
from htc_megatron.config_io import load_zero
from htc_megatron.zero_json import ACTING, DS_CONFIGS, OWNED, REFUSED, zero_stage

BAD = [
    ({}, 'wanted an object with the key "zero_optimization"'),
    ([1], 'wanted an object with the key "zero_optimization"'),
    ({"zero_optimization": True}, 'wanted an object with the key "zero_optimization"'),
    ({"zero_optimization": {"stage": 0}}, "got 0, which cannot run a torch-style backward in DeepSpeed; use zero1.json"),
    ({"zero_optimization": {}}, "zero_optimization.stage: got 0, which cannot run a torch-style backward"),
    ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: got 4, wanted 1, 2 or 3"),
    ({"zero_optimization": {"stage": 3.0}}, "zero_optimization.stage: got 3.0, wanted 1, 2 or 3"),
    ({"zero_optimization": {"stage": "3"}}, "zero_optimization.stage: got '3', wanted 1, 2 or 3"),
    ({"zero_optimization": {"stage": 3, "overlap_com": True}}, "zero_optimization.overlap_com: unknown key; did you mean overlap_comm?"),
    ({"zero_optimization": {"stage": 3, "qwertz": True}}, "zero_optimization.qwertz: unknown key; known are stage, contiguous_gradients"),
    ({"zero_optimization": {"stage": 1, "overlap_comm": "yes"}}, 'zero_optimization.overlap_comm: got "yes", wanted true or false'),
    ({"zero_optimization": {"stage": 1, "overlap_comm": "auto"}}, "got 'auto', which only the Hugging Face Trainer fills in"),
    ({"zero_optimization": {"stage": 1, "reduce_bucket_size": 0}}, "reduce_bucket_size: got 0, wanted a whole number, at least 1"),
    ({"zero_optimization": {"stage": 1, "reduce_bucket_size": 1.5}}, "reduce_bucket_size: got 1.5, wanted a whole number"),
    ({"zero_optimization": {"stage": 1, "reduce_bucket_size": 1e400}}, "reduce_bucket_size: got Infinity, wanted a whole number"),
    ({"zero_optimization": {"stage": 1, "allgather_bucket_size": 7}}, "got 7, wanted a whole number, at least 2 and a multiple of 2"),
    ({"zero_optimization": {"stage": 3, "allgather_bucket_size": 8}}, "allgather_bucket_size: acts only in stage 1 and 2, got stage 3"),
    ({"zero_optimization": {"stage": 2, "stage3_max_live_parameters": 8}}, "stage3_max_live_parameters: acts only in stage 3, got stage 2"),
    ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer: is refused: offloading"),
    ({"zero_optimization": {"stage": 3, "stage3_max_reuse_distance": 0}}, "which parameters stay whole is decided here, within"),
    ({"zero_optimization": {"stage": 1, "round_robin_gradients": True}}, "round_robin_gradients: is refused: it changes the order"),
    ({"zero_optimization": {"stage": 1}, "fp16": {"enabled": True}}, "fp16: is refused because it raises on pipeline stages"),
    ({"zero_optimization": {"stage": 1}, "gradient_clipping": 1.0}, "got 1.0, but this belongs in the run's YAML: set optimizer.clip_grad"),
    ({"zero_optimization": {"stage": 1}, "train_batch_size": 8}, "train_batch_size: got 8, but this belongs in the run's YAML"),
    ({"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}, "set training.precision: bf16"),
    ({"zero_optimization": {"stage": 1}, "wall_clock_breakdown": True}, "wall_clock_breakdown: this key is not supported"),
]


@pytest.mark.parametrize("tree, wanted", BAD, ids=[json.dumps(tree)[:60] for tree, _ in BAD])
def test_what_would_not_act_is_refused(tmp_path, tree, wanted):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(tree))
    with pytest.raises(ConfigError) as caught:
        load_zero(path)
    assert wanted in str(caught.value) and str(path) in str(caught.value)


def test_bad_files(tmp_path):
    with pytest.raises(ConfigError, match=r"zero: got 'zero9.json', wanted .* \(zero1.json, zero2.json, zero3.json\)"):
        load_zero("zero9.json")
    path = tmp_path / "zero.json"
    path.write_text('{"zero_optimization": ')
    with pytest.raises(ConfigError, match="zero.json: cannot be read as JSON: Expecting value: line 1"):
        load_zero(path)
    path.write_text('{"zero_optimization": {"stage": 1, "stage": 2}}')
    with pytest.raises(ConfigError, match="zero.json: key 'stage' stands twice"):
        load_zero(path)


def test_the_files_of_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # found by name from anywhere
    for path in DS_CONFIGS.glob("*.json"):
        zero = load_zero(path.name)
        assert zero == load_zero(path) == json.loads(path.read_text())
        assert f"zero{zero_stage(zero)}" == path.stem


def test_the_tables_name_every_key_of_deepspeed():
    """A DeepSpeed with another key, name, least value or type fails here before a run ignores it."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = {field.alias or name: (name, field) for name, field in DeepSpeedZeroConfig.model_fields.items()}
    names = set(fields) | {name for name, _ in fields.values() if not name.startswith("stage3_")}
    known = set(ACTING) | set(REFUSED)
    aliased = {name for alias, (name, _) in fields.items() if alias != name}  # DeepSpeed takes these too; here they are unknown keys
    assert names - known <= aliased
    assert known - names == set()
    assert not set(ACTING) & set(REFUSED)
    for key, rule in ACTING.items():
        if key != "stage":
            for stage in rule.stages:
                value = True if rule.kind is bool else float(max(rule.least, rule.multiple_of))
                config = DeepSpeedZeroConfig(**{"stage": stage, key: value})
                assert getattr(config, fields[key][0]) == value


def three_steps(zero: dict) -> list[float]:
    """Losses of a small model under ZeRO on this rank's own data; every rank's, so that they can be compared."""
    import deepspeed
    import torch
    import torch.distributed as dist

    deepspeed.init_distributed("gloo", verbose=False)
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(4)))
    config = {"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0.1, "zero_allow_untested_optimizer": True, **zero}
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2), config=config)
    data = torch.randn(4, 16, generator=torch.Generator().manual_seed(dist.get_rank()))
    losses = []
    for _ in range(3):
        loss = engine(data).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_keys_that_act_do_not_change_the_result(ranks, tmp_path, stage):
    """Every accepted key at a value that is not the default: DeepSpeed takes it, and the losses are those without it."""
    values: dict = {"overlap_comm": False, "contiguous_gradients": False, "reduce_scatter": False, "use_multi_rank_bucket_allreduce": False}
    values |= {"reduce_bucket_size": 100, "allgather_bucket_size": 64, "sub_group_size": 300, "stage3_prefetch_bucket_size": 32}
    values |= {"stage3_param_persistence_threshold": 20, "stage3_model_persistence_threshold": 40, "stage3_max_live_parameters": 300}
    values |= {"stage3_use_all_reduce_for_fetch_params": True, "stage3_allgather_sequential": True}
    assert set(values) | {"stage"} == set(ACTING)
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage, **{k: v for k, v in values.items() if stage in ACTING[k].stages}}}))
    got = ranks(2).run(three_steps, load_zero(path), init=False)
    wanted = ranks(2).run(three_steps, {"zero_optimization": {"stage": 1}}, init=False)
    assert got[0][0] != got[1][0] and got[0][2] < got[0][0]
    for rank in range(2):
        assert got[rank] == pytest.approx(wanted[rank], rel=1e-6)  # fp32 sums in another order


def test_owned_keys_are_keys_of_deepspeed():
    """Every key that is sent to the YAML is one that DeepSpeed would read from the file."""
    import deepspeed

    folder = Path(deepspeed.__file__).parent
    source = "".join((folder / name).read_text() for name in ("runtime/constants.py", "runtime/config.py", "monitor/config.py"))
    source += "".join((folder / f"runtime/{name}/config.py").read_text() for name in ("activation_checkpointing", "tensor_parallel"))
    assert [key for key in OWNED if f'"{key}"' not in source and f"'{key}'" not in source] == []
