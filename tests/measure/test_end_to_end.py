"""pab bench --end-to-end on a CPU."""

from __future__ import annotations

import csv
import json

import pytest

from tests.cli_tools import pab, refused


@pytest.mark.parametrize("workload", ["open_sora-144p-2s", "open_sora_plan_v110-65x512", "open_sora_plan_v120-29x480p"])
def test_the_parts_of_a_whole_run(workload, tmp_path):
    output = pab(
        *("bench", "--workload", workload, "--scale", "tiny", "--end-to-end", "--steps", 4, "--repeats", 1),
        *("--runs", "runtime,runtime+pab", "--device", "cpu", "--json", tmp_path / "e.json"),
    )
    assert "this runtime, PAB" in output
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["end_to_end"].keys() == {"runtime", "runtime+pab"}
    for run in result["end_to_end"].values():
        assert run["frames"] == 17
        assert len(run["runs"]) == 1
        assert all(seconds >= 0 for seconds in run["runs"][0].values())
        assert run["runs"][0].keys() == {"text", "denoising", "decoding", "writing"}


def test_what_has_no_whole_run_is_refused():
    common = ("--scale", "tiny", "--end-to-end", "--device", "cpu")
    assert "must be of open_sora" in refused("bench", "--workload", "latte-16x512", *common)
    assert "must name one of runtime" in refused("bench", "--workload", "open_sora-144p-2s", *common, "--runs", "eager")


def test_parts_are_rows_of_the_results(tmp_path):
    common = ("bench", "--workload", "open_sora-144p-2s", "--scale", "tiny", "--end-to-end", "--device", "cpu")
    for more in ((), ("--pab", "open_sora:fast")):
        pab(*common, "--steps", 2, "--repeats", 1, "--runs", "runtime+pab", "--csv", tmp_path / "e.csv", *more)
    with (tmp_path / "e.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    parts = ("text", "denoising", "decoding", "writing")
    assert [row["op"] for row in rows[:5]] == ["prompt to frames", *(f"prompt to frames: {part}" for part in parts)]
    tiny = "open_sora-144p-2s (tiny)"
    assert [row["shape"] for row in rows] == [tiny] * 5 + [f"{tiny} open_sora:fast"] * 5
    whole, text, denoising, decoding, _ = (float(row["ms"]) for row in rows[:5])
    assert whole == pytest.approx(text + denoising + decoding, abs=0.03)
    assert float(rows[0]["figure"]) == pytest.approx(17e3 / whole, rel=1e-2)
    assert {row["backend"] for row in rows} == {"runtime+pab"}
    assert "must be with --json or --csv alone" in refused(*common, "--report", tmp_path / "r")
