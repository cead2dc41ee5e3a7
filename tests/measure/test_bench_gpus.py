"""`pab bench --gpus 2` at tiny scale, where two ranks share a CPU."""

import csv
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pab_kernels.blocks.sharded import Shards, near_even
from pab_kernels.distributed.launch import launch
from pab_kernels.measure import report, result_files
from pab_kernels.models import adapter_for
from pab_kernels.workloads import WORKLOADS
from tests.cli_tools import pab, refused
from tests.distributed.rank_functions import exchange_times_in_fp8

JOB = ("bench", "--workload", "open_sora-144p-2s", "--scale", "tiny", "--device", "cpu", "--repeats", 1)
MESHES = ("guidance=2,frames=1", "guidance=1,frames=2")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a benchmark on two ranks, of both meshes."""
    folder = tmp_path_factory.mktemp("bench")
    files = ("--json", folder / "two.json", "--csv", folder / "two.csv", "--report", folder / "report")
    meshes = [word for mesh in ("guidance=2", "frames=2") for word in ("--mesh", mesh)]
    pab(*JOB, "--gpus", 2, *meshes, "--shares", "--repeats", 2, "--runs", "runtime,runtime+pab", *files)
    return folder


def test_each_mesh_is_against_one_gpu_and_gives_what_that_gives(made):
    result = result_files.load(made / "two.json")
    assert result["gpus"] == 2
    assert "--gpus 2 --mesh guidance=2 --mesh frames=2 --shares" in result["command"]
    rows = {row["name"]: row for row in result["contenders"]}
    kinds = ("runtime", "runtime+pab")
    shares = [f"{kind} of 3 frames" for kind in kinds]
    assert list(rows) == [*kinds, *shares, *(f"{kind} {mesh}" for mesh in MESHES for kind in kinds)]
    for name, row in rows.items():
        assert row["runs_differ"] == 0
        kind, _, mesh = name.partition(" ")
        if name in shares:
            assert (row["gpus"], row["against_one"], row["difference"]) == (1, None, None)
            continue
        assert row["gpus"] == (2 if mesh else 1)
        assert (row["against_one"] is None) == (not mesh)
        if mesh:
            assert row["against_one"] == pytest.approx(rows[kind]["seconds"] / row["seconds"])
            assert (row["difference_from"], row["jitter_seconds"] > 0) == (kind, True)
            assert row["difference"] < 1e-5


def test_exchanges_are_where_temporal_attention_is_computed(made):
    rows = {row["name"]: row for row in json.loads((made / "two.json").read_text())["contenders"]}
    split = rows["runtime+pab guidance=1,frames=2"]
    assert set(split["exchanges"]) == set(split["variants"])
    for variant, (calls, sent) in split["exchanges"].items():
        broadcast = "temporal" in variant
        assert (calls, sent > 0) == ((0, False) if broadcast else (4, True))  # two blocks, there and back
        assert (split["exchange_seconds"][variant] == 0) == broadcast
    assert all(not rows[name]["exchange_seconds"] for name in rows if "frames=2" not in name)


def test_exchanges_before_a_projection_in_fp8_are_timed_as_they_are():
    workload = WORKLOADS["open_sora-144p-2s"].tiny()
    adapter = adapter_for(workload.host(torch.device("cpu"), torch.bfloat16))
    weights = next(branch.weights for branch in adapter.stack.blocks[1].branches if branch.kind == "temporal")
    frames, tokens = workload.grid
    rows = near_even(frames, 2)
    together: Any = SimpleNamespace(apart=False)
    shards = Shards(rows, 0, together)
    sent = weights.sent((2, rows[0], tokens, adapter.stack.channels), shards, 2, fp8=True)
    calls, nbytes, seconds = launch(exchange_times_in_fp8, sum(sent), ranks=2, device="cpu")
    assert (calls, nbytes) == (3, sum(sent))
    assert seconds["compute"] > 0
    assert seconds["broadcast temporal"] == 0


def test_the_tables_have_columns_for_it(made):
    rows = json.loads((made / "two.json").read_text())["contenders"]
    header, cells = report.runs_grid(rows)
    assert {"x one GPU", "jitter ms", "in exchanges"} <= set(header)
    assert [bool(row[header.index("x one GPU")]) for row in cells] == [False] * 4 + [True] * 4
    header, cells = report.variants_grid(rows)
    assert header[4:] == ["exchanges", "MB sent", "ms in exchanges", "share"]
    assert all(len(row) == len(header) for row in cells)
    with (made / "two.csv").open(newline="") as file:
        assert [row["backend"] for row in csv.DictReader(file)][4:6] == [
            f"{kind} guidance=2,frames=1" for kind in ("runtime", "runtime+pab")
        ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", 2, "--runs", "eager,runtime"], "runs: got eager with --gpus, must be this runtime's"),
        (["--gpus", 2, "--mesh", "frames=3"], "mesh: got 'frames=3', which are 3 ranks, must be 2"),
        (["--shares"], "shares: got it without --gpus"),
        (["--gpus", 2, "--workload", "latte-16x512", "--shares"], "shares: got it for latte"),
        (["--gpus", 2, "--workload", "latte-16x512", "--json", "two.json"], "json, end-to-end: got one with 2 work"),
        (["--gpus", 2, "--end-to-end"], "end-to-end: got it with --report or --gpus"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    assert message in refused(*JOB, *arguments)
