"""`pab profile` on tiny models."""

import csv
import re
from collections import Counter

import pytest
import torch

from pab_kernels.models import checkpoints
from pab_kernels.pipelines import sizes
from pab_kernels.tune.diffusers_profile import load, pipeline_class
from tests.cli_tools import SHORT, pab, refused
from tests.pipeline_tools import TINY
from tests.wan_tools import PIPELINES


def test_profile_writes_a_table_and_two_pictures(demo, tmp_path):
    output = pab("profile", "--model", demo, *SHORT, "--videos", 2, "--output", tmp_path)
    assert re.search(r"spatial: differs by .* Flat .* at steps \d+ to \d+", output.replace("\n", " "))
    assert "the PAB document says" in output.replace("\n", " ")
    rows = list(csv.DictReader((tmp_path / "profile.csv").open()))
    # One block a kind, the MLPs of both kinds of block, the stack, guidance and latents, all steps but the first.
    assert Counter(row["kind"] for row in rows) == {
        **dict.fromkeys(("spatial", "temporal", "cross", "stack", "guidance", "latents"), 9),
        "mlp": 18,
    }
    assert all(float(row["relative_l2"]) > 0 and float(row["mse"]) > 0 for row in rows)
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("profile.png", "heatmap.png"))


@pytest.mark.parametrize("family", TINY)
def test_profile_of_every_family(family, monkeypatch, tmp_path):
    monkeypatch.setitem(checkpoints.FULL_SIZE, family, {**checkpoints.FULL_SIZE[family], **TINY[family]})
    size: tuple[object, ...] = {"open_sora": ("--resolution", "144p", "--aspect", "1:1", "--duration", 17)}.get(
        family, ()
    )
    if family.startswith("open_sora_plan"):
        monkeypatch.setattr("pab_kernels.pipelines.sizes.PLAN_SIZES", {family: {"17x64": (17, 64, 64)}})
        size = ("--size", "17x64")
    pab("profile", "--model", family, "--random-weights", *size, *SHORT, "--output", tmp_path)
    kinds = {row["kind"] for row in csv.DictReader((tmp_path / "profile.csv").open())}
    wanted = {"spatial", "cross", "mlp", "stack", "guidance", "latents"}
    assert kinds == wanted | (set() if family == "open_sora_plan_v120" else {"temporal"})


@pytest.mark.parametrize(
    ("name", "family", "size", "tables"),
    [
        ("wan t2v, two transformers", "wan_2_1", (9, 32, 64), {"profile.csv": 3, "profile-2.csv": 5}),
        ("ltx", "ltx", (9, 64, 96), {"profile.csv": 9}),
    ],
)
def test_profile_of_a_pipeline_of_diffusers(name, family, size, tables, monkeypatch, tmp_path):
    """Of two transformers each has a table of the steps that are its own; the first step of each compares nothing."""
    monkeypatch.setitem(sizes.DIFFUSERS_SIZES, family, {"480p": size})
    PIPELINES[name]().save_pretrained(tmp_path / "model")
    arguments = ("profile", "--model", tmp_path / "model", "--device", "cpu", "--output", tmp_path)
    output = pab(*arguments, "--steps", 10, "--prompt", "a red cat", "--prompt", "a dog")
    assert output.count("spatial: differs by") == len(tables)
    found = {path.name: list(csv.DictReader(path.open())) for path in tmp_path.glob("*.csv")}
    assert {file: len({row["step"] for row in rows}) for file, rows in found.items()} == tables
    wanted = {"spatial", "cross", "mlp", "stack", "latents"}
    assert all({row["kind"] for row in rows} == wanted for rows in found.values())
    assert "vae: got 'x' for a pipeline of diffusers" in refused(*arguments, "--vae", "x")


def test_other_folders_are_no_pipelines_of_diffusers(tmp_path):
    assert pipeline_class(str(tmp_path)) is None
    for text in ("not json", "[]", '{"_class_name": "LattePipeline"}'):
        (tmp_path / "model_index.json").write_text(text)
        assert pipeline_class(str(tmp_path)) is None
    (tmp_path / "model_index.json").write_text('{"_class_name": "LTXPipeline"}')
    assert pipeline_class(str(tmp_path)) == "LTXPipeline"
    with pytest.raises(ValueError, match="could not be loaded"):
        load(str(tmp_path), dtype=torch.float32, device=torch.device("cpu"))
