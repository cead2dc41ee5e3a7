"""`pab profile` on tiny models."""

import csv
import re

import pytest

from pab_kernels.models import checkpoints
from tests.cli_tools import SHORT, pab
from tests.pipeline_tools import TINY


def test_profile_writes_a_table_and_two_pictures(demo, tmp_path):
    output = pab("profile", "--model", demo, *SHORT, "--videos", 2, "--output", tmp_path)
    assert re.search(r"spatial: differs by .* Flat .* at steps \d+ to \d+", output.replace("\n", " "))
    assert "the PAB document says" in output.replace("\n", " ")
    rows = list(csv.DictReader((tmp_path / "profile.csv").open()))
    assert len(rows) == 3 * 9  # one block a kind, all steps but the first
    assert all(float(row["relative_l2"]) > 0 and float(row["mse"]) > 0 for row in rows)
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("profile.png", "heatmap.png"))


@pytest.mark.parametrize("family", TINY)
def test_profile_of_every_family(family, monkeypatch, tmp_path):
    monkeypatch.setitem(checkpoints.FULL_SIZE, family, {**checkpoints.FULL_SIZE[family], **TINY[family]})
    sizes: tuple[object, ...] = {"open_sora": ("--resolution", "144p", "--aspect", "1:1", "--duration", 17)}.get(
        family, ()
    )
    monkeypatch.setattr("pab_kernels.pipelines.sizes.PLAN_SIZES", {family: {"17x64": (17, 64, 64)}})
    if family.startswith("open_sora_plan"):
        sizes = ("--size", "17x64")
    pab("profile", "--model", family, "--random-weights", *sizes, *SHORT, "--output", tmp_path)
    kinds = {row["kind"] for row in csv.DictReader((tmp_path / "profile.csv").open())}
    assert kinds == {"spatial", "cross"} | (set() if family == "open_sora_plan_v120" else {"temporal"})
