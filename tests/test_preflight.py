"""The preflight on real ranks, each with something else the matter, and the environment report."""

import os
import time
from pathlib import Path

import pytest

from htc_megatron.cluster.preflight import TOKEN, Limits, preflight
from htc_megatron.cluster.report import describe, environment
from htc_megatron.cluster.status import FAULT, FINISHED, REFUSED
from htc_megatron.config_io import load_config
from htc_megatron.parallel.launch import Launch, discover
from tests.training_tiny import make_run

LIMITS = Limits(seconds=8, clock_skew_s=5, min_free_gib=0.01)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


def look(yaml: str, overrides: list[str], limits: Limits = LIMITS, trouble: str = "") -> tuple[int, list[str]]:
    """The preflight on this rank; the last rank has `trouble`."""
    launch, config = discover(), load_config(yaml, overrides)
    last, clock = launch.rank == launch.world_size - 1, time.time
    os.environ["SLURMD_NODENAME"] = f"node{launch.rank}"
    if last and trouble == "clock":
        clock = lambda: time.time() + 60  # noqa: E731
    elif last and trouble == "absent":
        time.sleep(limits.seconds + 2)
        return FAULT, []
    elif last and trouble == "elsewhere":
        os.chdir("/")  # a relative path leads to another place here, as one that is not mounted does
    elif last and trouble == "network":
        import socket

        socket.socket.listen = lambda *_: None  # the port is taken and nobody is let in: as behind a firewall
    return preflight(config, launch, limits, clock)


def told(ranks, run: Path, world_size: int, overrides: list[str], *arguments, cwd: Path | None = None) -> list[tuple[int, list[str]]]:
    return ranks(world_size).run(look, str(run), overrides, *arguments, init=False, timeout=90)


def test_all_is_well(ranks, run, tmp_path):
    found = told(ranks, run, 3, [f"output_dir={tmp_path}/out"])
    assert [status for status, _ in found] == [FINISHED] * 3
    assert "3 nodes (node0, node1, node2), 3 ranks" in found[0][1][1] and len(found[0][1]) == 4
    assert list((tmp_path / "out").iterdir()) == []
    ((status, _),) = told(ranks, run, 1, [f"output_dir={tmp_path}/out"])
    assert status == FINISHED


def test_what_the_user_must_mend(ranks, run, tmp_path):
    """A path that nobody has, no room on the disk, a folder that is a file: one sentence each, and every rank ends alike."""
    (tmp_path / "file").touch()
    wrong = [f"output_dir={tmp_path}/file/out", "data.train=nowhere", "tokenizer=neither"]
    found = told(ranks, run, 2, wrong, Limits(seconds=8, min_free_gib=0.01))
    assert [status for status, _ in found] == [REFUSED] * 2
    sentences = "\n".join(found[0][1][4:])
    assert "data.train: nowhere cannot be read (No such file or directory)" in sentences
    assert "tokenizer: neither cannot be read" in sentences and sentences.count("nowhere") == 1
    assert f"output_dir: {tmp_path}/file/out cannot be written (Not a directory)" in sentences

    found = told(ranks, run, 2, [f"output_dir={tmp_path}/out"], Limits(seconds=8, min_free_gib=1e9))
    assert [status for status, _ in found] == [REFUSED] * 2
    assert "GiB free, wanted 1000000000.0 (as asked for)" in found[0][1][4]


def test_one_node_without_the_file_system(ranks, run, tmp_path, monkeypatch):
    """Relative paths, and one rank elsewhere: it is named, and the fault is its node's."""
    monkeypatch.chdir(run.parent)
    found = told(ranks, run, 2, ["output_dir=shared_out", "data.train=data", "data.validation="], LIMITS, "elsewhere")
    assert [status for status, _ in found] == [FAULT] * 2
    sentences = "\n".join(found[0][1][4:])
    assert "data.train: data cannot be read (No such file or directory): so on rank 1 on node node1, and not on the others" in sentences
    assert "output_dir: shared_out on node node1 lacks what rank 0 wrote there" in sentences
    assert not list((run.parent / "shared_out").glob(f"{TOKEN}*"))


@pytest.mark.parametrize(
    "trouble, sentence",
    [
        ("clock", "node node1: its clock is 60.0 s apart from node node0's, wanted at most 5 s"),
        ("absent", "rank 1 has not come within 3 s"),
        ("network", "rank 0 on node node0 cannot reach rank 1 on node node1 at 127.0.0.1:"),
    ],
)
def test_a_bad_node_is_named(ranks, run, tmp_path, trouble, sentence):
    found = told(ranks, run, 2, [f"output_dir={tmp_path}/out"], Limits(seconds=3) if trouble == "absent" else LIMITS, trouble)
    assert found[0][0] == FAULT and sentence in "\n".join(found[0][1])
    assert trouble == "absent" or found[1][0] == FAULT


def test_a_rank_that_never_meets_rank_0(run, tmp_path):
    """Nobody listens at the meeting point: it says so within the limit."""
    config = load_config(run, [f"output_dir={tmp_path}/out"])
    status, (line,) = preflight(config, Launch("srun", 1, 2, 0, "127.0.0.1", 9), Limits(seconds=2))
    assert status == FAULT and line.startswith("rank 1 on node ") and "cannot reach rank 0 at 127.0.0.1:9" in line


def test_the_report_names_the_node_that_is_unlike_the_others():
    node = environment()
    assert node["torch"] and node["Python"] and "GiB" in node["memory"]
    launch = Launch("srun", 0, 3, 0, "a", 1)
    alike = describe(launch, {"a": node, "b": node, "c": node})
    assert len(alike) == 4 and "3 nodes (a, b, c), 3 ranks started by srun, meeting at a:1" in alike[1]
    unlike = describe(launch, {"a": node, "b": node | {"torch": "0.1", "NCCL": "9"}, "c": node})
    assert unlike[:4] == alike
    assert set(unlike[4:]) == {
        f"unlike the others: node b has torch 0.1, most have {node['torch']}",
        f"unlike the others: node b has NCCL 9, most have {node.get('NCCL', 'none')}",
    }
