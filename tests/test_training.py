"""Runs from prepared data to checkpoint, resumption and export."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from htc_megatron.checkpoint import CheckpointError, CheckpointReader, checkpoints, latest
from htc_megatron.checkpoint.manifest import Manifest
from htc_megatron.config_io import load_config
from htc_megatron.data.dataset import PreparedData
from htc_megatron.data.loader import ValidationLoader
from htc_megatron.inference.answer import load as load_export
from htc_megatron.model.mask import VISUAL, token_kinds
from htc_megatron.weights.export import export
from tests import data_tiny
from tests.distributed import RankFailure
from tests.quick import quick
from tests.train_worker import ENTRY, entry_point, logits_of, train, train_on_a_full_disk, train_until, train_while_saving
from tests.training_tiny import make_run, prepare_data

TP2_PP2 = ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"]
PP2 = ["parallel.pipeline_model_parallel_size=2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


RESUMED = {
    "PP 2 x DP 2, ZeRO-3": (4, [*PP2, "zero=zero3.json"]),
    "PP 2 x DP 2, ZeRO-2, bf16": (4, [*PP2, "zero=zero2.json", "training.precision=bf16"]),
    "DP 2, ZeRO-1": (2, ["zero=zero1.json"]),
}


@pytest.mark.parametrize("case", quick(RESUMED, ["PP 2 x DP 2, ZeRO-3", "DP 2, ZeRO-1"]))
def test_resumes_bit_for_bit(ranks, run, tmp_path, case):
    """20 steps, and 10 + resume + 10 in new processes: the same losses and norms, all bits of them."""
    world_size, layout = RESUMED[case]
    whole = [*layout, "training.train_iters=20", f"output_dir={tmp_path}/whole"]
    parts = [*layout, "training.train_iters=20", "training.save_interval=10", f"output_dir={tmp_path}/parts"]
    expected = ranks(world_size).run(train, str(run), whole)[0]
    assert ranks(world_size).run(train, str(run), parts)[0] == expected
    newest = tmp_path / "parts" / "checkpoints" / "step_00000020"
    older = newest.with_name("step_00000010")
    for file in newest.iterdir():  # as if the run had been stopped after step 10
        file.unlink()
    newest.rmdir()
    (older.parent / "latest").write_text(older.name)
    ranks(world_size).restart()
    assert ranks(world_size).run(train, str(run), parts)[0] == expected[10:]


def test_goes_on_on_another_layout(ranks, run, tmp_path):
    """10 steps on PP 2 x DP 2 with ZeRO-3, 10 on TP 2 with ZeRO-2: the losses of one process, to 1e-5."""
    common = ["training.train_iters=20", "training.save_interval=10"]
    reference = ranks(1).run(train, str(run), [*common, f"output_dir={tmp_path}/one"])[0]
    first = [*common, *PP2, "zero=zero3.json", f"output_dir={tmp_path}/two"]
    ranks(4).run(train, str(run), first)
    root = tmp_path / "two" / "checkpoints"
    for file in (root / "step_00000020").iterdir():
        file.unlink()
    (root / "step_00000020").rmdir()
    (root / "latest").write_text("step_00000010")
    second = [*common, "parallel.tensor_model_parallel_size=2", "zero=zero2.json", f"output_dir={tmp_path}/two"]
    for ours, theirs in zip(ranks(2).run(train, str(run), second)[0], reference[10:], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_exported_model_computes_what_was_trained(ranks, run, tmp_path):
    """Trained at TP 2 x PP 2; the export, from the pictures themselves, gives the trained model's text logits to 1e-4 in fp32."""
    overrides = [*TP2_PP2, "zero=zero3.json", f"output_dir={tmp_path}/run", "training.train_iters=6"]
    ranks(4).run(train, str(run), overrides)
    answers = [answer for answer in ranks(4).run(logits_of, str(run), overrides) if answer is not None]
    assert all(torch.equal(answer[1], answers[0][1]) for answer in answers)  # TP ranks of the last stage
    ids, logits = answers[0]

    export(CheckpointReader(tmp_path / "run" / "checkpoints"), tmp_path / "hf", system="Look.")
    model, processor = load_export(tmp_path / "hf")
    config = load_config(run, overrides)
    batch = next(iter(ValidationLoader(config, config.data.validation, 0, 1, True, 1)))[0]
    assert torch.equal(batch.input_ids, ids)
    pictures = [Image.open(path) for path in sorted((run.parent / "source" / "images").iterdir())]
    prepared = processor.image_processor(pictures, return_tensors="pt")
    kinds = token_kinds(batch.layout)[0]
    compared, image = 0, 0
    for index, (row, start, stop) in enumerate(batch.layout.samples.tolist()):
        count = int((batch.layout.images[:, 0] == index).sum())
        which = [_picture(prepared["pixel_values"], pixels) for pixels in batch.pixel_values[image : image + count]]
        image += count
        text = kinds[row, start:stop] != VISUAL  # the export's ids hold voco and text tokens alone
        inputs = {"input_ids": batch.input_ids[row, start:stop][text][None]}
        if count:
            inputs |= {name: prepared[name][which] for name in ("pixel_values", "mgvq_pixel_values")}
        with torch.no_grad():
            ours = model(**inputs).logits[0]
        voco = (inputs["input_ids"][0] == config.model.method.voco_token_id)[:, None]
        theirs = logits[row, start:stop][text]
        torch.testing.assert_close(ours.masked_fill(voco, 0), theirs.masked_fill(voco, 0), atol=1e-4, rtol=0)
        compared += 1
    assert compared > 3 and image > 3


def _picture(prepared: torch.Tensor, pixels: torch.Tensor) -> int:
    """Number of the picture that these pixels were made from."""
    (found,) = [i for i, other in enumerate(prepared) if torch.equal(other, pixels)]
    return found


BAD_RUNS = {
    "heads over TP": (["parallel.tensor_model_parallel_size=8"], 8, "num_attention_heads"),
    "layers over PP": (["parallel.pipeline_model_parallel_size=3"], 3, "num_layers: got 2"),
    "world size": (["parallel.pipeline_model_parallel_size=2"], 1, "world size|processes|WORLD_SIZE"),
    "fp16": (["training.precision=fp16"], 1, "fp16"),
    "unknown key": (["training.learning_rate=1"], 1, "learning_rate"),
    "wrong type": (["training.train_iters=many"], 1, "train_iters"),
    "ZeRO-0": (["zero=nowhere.json"], 1, "nowhere.json"),
    "no data": (["data.train=nowhere"], 1, "nowhere"),
    "no MGVQ": (["mgvq_checkpoint="], 1, "mgvq_checkpoint"),
    "another codebook": (["model.mgvq.codebook_size=64"], 1, "codebook|mgvq"),
    "no tokenizer match": (["model.backbone.vocab_size=99", "model.method.voco_token_id=98"], 1, "vocab|token"),
    "no checkpoint": (["init_from=nowhere"], 1, "nowhere"),
    "evaluation without data": (["training.eval_interval=2", "data.validation="], 1, "data.validation"),
    "reduce once in bf16": (["parallel.reduce_once=true", "training.precision=bf16"], 1, "reduce_once"),
}


def bad_run(run: Path, tmp_path: Path, case: str) -> list[str]:
    """Arguments of the entry point."""
    return ["--config", str(run), f"output_dir={tmp_path}/out", *BAD_RUNS[case][0]]


def assert_sentence(case: str, status: int, errors: str, tmp_path: Path) -> None:
    assert status == 2, errors
    (sentence,) = [line for line in errors.splitlines() if line.startswith("pretrain_htc:")]
    assert re.search(BAD_RUNS[case][2], sentence), sentence
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", BAD_RUNS)
def test_bad_runs_end_with_a_sentence(ranks, run, tmp_path, case):
    """Status 2 and one sentence, before any process group is made and with nothing written."""
    ((status, errors, has_group),) = ranks(1).run(entry_point, bad_run(run, tmp_path, case), BAD_RUNS[case][1], init=False)
    assert_sentence(case, status, errors, tmp_path)
    assert not has_group


def test_a_bad_run_from_the_command_line(run, tmp_path):
    """The same from a process of its own."""
    launch = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    command = [sys.executable, str(ENTRY), *bad_run(run, tmp_path, "no data")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | launch, timeout=120)
    assert_sentence("no data", done.returncode, done.stderr, tmp_path)


def test_another_model_is_not_resumed(ranks, run, tmp_path):
    overrides = [f"output_dir={tmp_path}/run", "training.train_iters=2"]
    ranks(1).run(train, str(run), overrides)
    with pytest.raises(Exception, match="another model"):
        ranks(1).run(train, str(run), [*overrides, "model.backbone.rotary_base=500"])


@pytest.mark.parametrize("change", ["training.global_batch_size=8", "training.seq_length=400", "data.seed=4", "data.shuffle=false"])
def test_a_run_in_another_order_is_not_resumed(ranks, run, tmp_path_factory, change):
    """The data's position is the step number, so whatever decides the order must stay as it was."""
    folder = tmp_path_factory.getbasetemp() / "one_order"
    overrides = [f"output_dir={folder}", "training.train_iters=1"]
    if not folder.exists():
        ranks(1).run(train, str(run), overrides)
    with pytest.raises(Exception, match=f"{change.split('=')[0]}: got .* wanted .*step_00000001"):
        ranks(1).run(train, str(run), [*overrides, "training.train_iters=2", change])


def test_other_data_are_not_resumed(ranks, run, tmp_path):
    """The data's position is a step number, so it belongs to these samples in this order. Where they lie does not matter."""
    overrides = [f"output_dir={tmp_path}/run", "training.train_iters=1"]
    ranks(1).run(train, str(run), overrides)
    again = [overrides[0], "training.train_iters=2"]
    data = yaml.safe_load(run.read_text())["data"]["train"]
    other = tmp_path / "other" / "data"
    prepare_data(run.parent, other, data_tiny.records(96, 12)[::-1])  # the same ones in another order
    with pytest.raises(RankFailure, match=r"data.train: the samples in .*other/data have fingerprint \w{12}, wanted \w{12} as in .*step_0"):
        ranks(1).run(train, str(run), [*again, f"data.train={other}"])
    prepare_data(run.parent, tmp_path / "again", data_tiny.records(96, 12))
    assert PreparedData(tmp_path / "again").fingerprint == PreparedData(data).fingerprint
    moved = shutil.copytree(data, tmp_path / "moved")
    assert [step for step, *_ in ranks(1).run(train, str(run), [*again, f"data.train={moved}"])[0]] == [2]
    folder = latest(tmp_path / "run" / "checkpoints")  # as older versions wrote it
    manifest = Manifest.read(folder)
    assert set(manifest.extra) == {"data_fingerprint", "packer"}
    del manifest.extra["packer"]
    (folder / "checkpoint.json").unlink()
    manifest.write(folder)
    with pytest.raises(RankFailure, match=r"packs samples by 'best fit decreasing, 4096', wanted 'first fit, 64' as in .*step_0"):
        ranks(1).run(train, str(run), [overrides[0], "training.train_iters=3"])


def stored(folder: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder)
    reader.verify()
    return {key: reader.read(key) for key in reader.manifest.tensors}


SAVED = {
    "one process": (1, []),
    "PP 2 x DP 2, ZeRO-3": (4, [*PP2, "zero=zero3.json"]),
    "DP 2, ZeRO-2, bf16": (2, ["zero=zero2.json", "training.precision=bf16"]),
}


@pytest.mark.parametrize("case", quick(SAVED, ["one process", "PP 2 x DP 2, ZeRO-3"]))
def test_saves_in_a_thread_are_those_of_their_step(ranks, run, tmp_path, case):
    """Training goes on before a byte of them is written, and not a bit of losses or checkpoints differs from a run that waits."""
    world_size, layout = SAVED[case]
    common = [*layout, "training.train_iters=8", "training.save_interval=2"]
    waits = [*common, "training.async_save=false", f"output_dir={tmp_path}/waits"]
    goes_on = [*common, f"output_dir={tmp_path}/goes_on"]
    expected = ranks(world_size).run(train, str(run), waits)[0]
    found, beside = ranks(world_size).run(train_while_saving, str(run), goes_on)[0]
    assert found == expected
    assert beside == [3, 4, 5, 6, 7, 8]
    for theirs in checkpoints(tmp_path / "waits" / "checkpoints"):
        ours, theirs = stored(tmp_path / "goes_on" / "checkpoints" / theirs.name), stored(theirs)
        assert ours.keys() == theirs.keys()
        different = [key for key in theirs if not torch.equal(ours[key], theirs[key])]
        assert not different, different[:5]
    output = ranks(world_size).output[0]
    for step in (2, 4, 6, 8):
        pattern = rf"step {step}: saved \S+goes_on/checkpoints/step_0000000{step} \(stalled \d+\.\d\d s, written in \d+\.\d\d s\)"
        assert len(re.findall(pattern, output)) == 1, output
    events = EventAccumulator(str(tmp_path / "goes_on" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("checkpoint/stall_s")] == [2, 4, 6, 8]
    assert all(event.value > 0 for event in events.Scalars("checkpoint/write_s"))
    assert ("pipeline: layers 1 | 1, computed cost " in output) == ("pipeline/idle_share" in events.Tags()["scalars"]) == (PP2[0] in layout)
    if PP2[0] in layout:
        mean, *stages = ([event.value for event in events.Scalars(f"pipeline/idle_share{name}")] for name in ("", "_stage_0", "_stage_1"))
        assert len(mean) == 8 and all(0 < share < 1 for shares in stages for share in shares)
        assert mean == pytest.approx([(a + b) / 2 for a, b in zip(*stages, strict=True)])
        assert re.search(r"idle=\d+% \(stage [01], the slowest: \d+%\)", output)


def test_how_many_checkpoints_stay(ranks, run, tmp_path):
    overrides = ["training.train_iters=5", "training.save_interval=1", "training.keep_checkpoints=2", f"output_dir={tmp_path}"]
    ranks(2).run(train, str(run), overrides)
    assert [folder.name for folder in checkpoints(tmp_path / "checkpoints")] == ["step_00000004", "step_00000005"]


def test_a_failed_save_costs_no_step_and_two_end_the_run(ranks, run, tmp_path):
    """One rank's disk is full: once, and the next save is good; or also when that one is waited for, and all ranks raise a sentence."""
    overrides = ["zero=zero3.json", "training.train_iters=6", "training.save_interval=2", "faults.storage_patience_s=0"]
    steps = ranks(2).run(train_on_a_full_disk, str(run), [*overrides, f"output_dir={tmp_path}/once"], 1)[0]
    assert [step for step, *_ in steps] == [1, 2, 3, 4, 5, 6]
    assert [folder.name for folder in checkpoints(tmp_path / "once" / "checkpoints")] == ["step_00000004", "step_00000006"]
    assert len(re.findall("the checkpoint of step 2 was not written: OSError: .* No space left", ranks(2).output[0])) == 1
    with pytest.raises(RankFailure) as failure:
        ranks(2).run(train_on_a_full_disk, str(run), [*overrides, f"output_dir={tmp_path}/longer"], 2)
    assert sorted(failure.value.exceptions) == [0, 1]
    for error in failure.value.exceptions.values():
        assert isinstance(error, CheckpointError) and "\n" not in str(error) and "No space left on device" in str(error)
    assert latest(tmp_path / "longer" / "checkpoints") is None


@pytest.mark.parametrize("how", ["error", "killed"])
def test_a_run_that_ends_while_it_saves(ranks, run, tmp_path, how):
    """An error lets the save come to its end; a killed rank leaves the checkpoint before. Going on from either loses nothing."""
    overrides = ["zero=zero2.json", "training.train_iters=6", "training.save_interval=2"]
    expected = ranks(2).run(train, str(run), [*overrides, f"output_dir={tmp_path}/whole"])[0]
    ended = [*overrides, f"output_dir={tmp_path}/ended"]
    with pytest.raises(RankFailure, match="the end of the run" if how == "error" else "killed by SIGKILL"):
        ranks(2).run(train_until, str(run), ended, 5, how, timeout=120)
    newest = {"error": 4, "killed": 2}[how]
    assert latest(tmp_path / "ended" / "checkpoints").name == f"step_{newest:08d}"
    assert ranks(2).run(train, str(run), ended)[0] == expected[newest:]
