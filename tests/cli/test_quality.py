"""`pab quality` on a tiny model."""

import csv
import re

import pytest

from pab_kernels.config import PABConfig
from tests.cli_tools import SHORT, pab, refused


def test_quality_of_settings(demo, tmp_path):
    PABConfig.preset("latte", "469").to_yaml(tmp_path / "mine.yaml")
    arguments = ("--model", demo, *SHORT, "--videos", 2, "--pab", "latte:347", "--pab", tmp_path / "mine.yaml")
    output = pab("quality", *arguments, "--csv", tmp_path / "q.csv")
    assert re.search(r"\| latte:347 +\| +\d+\.\d\d", output)
    assert {"latte:347: 3/4/7 in 100 to 800", "mine.yaml: 4/6/9 in 100 to 800"} <= set(output.splitlines())
    rows = list(csv.DictReader((tmp_path / "q.csv").open()))
    assert [(row["settings"], row["video"]) for row in rows] == [
        ("latte:347", "0"), ("latte:347", "1"), ("mine.yaml", "0"), ("mine.yaml", "1"),
    ]  # fmt: skip
    assert "pab: got 'off'" in refused("quality", "--model", demo, "--pab", "off")


def test_two_settings_files_of_one_name_are_two(demo, tmp_path):
    files = [tmp_path / folder / "pab.yaml" for folder in ("a", "b")]
    for file, variant in zip(files, ("347", "469"), strict=True):
        PABConfig.preset("latte", variant).to_yaml(file)
    arguments = ("--model", demo, *SHORT, "--videos", 1, "--csv", tmp_path / "q.csv")
    pab("quality", *arguments, "--pab", files[0], "--pab", files[1], "--pab", "latte")
    rows = [(row["settings"], row["ranges"]) for row in csv.DictReader((tmp_path / "q.csv").open())]
    windows = ["3/4/7 in 100 to 800", "4/6/9 in 100 to 800", "2/3/6 in 100 to 800"]
    assert rows == list(zip([str(files[0]), str(files[1]), "latte"], windows, strict=True))


def test_quality_refuses_outputs_before_the_work(demo, tmp_path):
    settings = tmp_path / "pab.yaml"
    PABConfig.preset("latte").to_yaml(settings)
    before = settings.read_text()
    for csv_file in (settings, tmp_path, settings / "q.csv"):
        assert "csv: got" in refused("quality", "--model", demo, "--pab", settings, "--csv", csv_file)
    assert settings.read_text() == before


def test_quality_takes_what_generate_takes(demo, tmp_path):
    """A keyed MLP that is computed again before what was kept of it is read."""
    steps = [999, 899, 799, 699, 599]
    windows = {steps[1]: {"block": [0], "skip_count": 3}, steps[2]: {"block": [0], "skip_count": 1}}
    settings = PABConfig.from_dict({"mlp_broadcast": True, "mlp_spatial_broadcast_config": windows})
    settings.to_yaml(tmp_path / "pab.yaml")
    pab("generate", "--model", demo, *SHORT, "--pab", tmp_path / "pab.yaml", "--output", tmp_path / "v.gif")
    output = pab("quality", "--model", demo, *SHORT, "--videos", 1, "--pab", tmp_path / "pab.yaml")
    assert re.search(r"\| pab.yaml +\| +\d+\.\d\d \|", output)


def test_peers_run_beside_the_settings_and_leave_the_model_alone(demo, tmp_path):
    arguments = ("--model", demo, *SHORT, "--videos", 2, "--pab", "latte:fast", "--csv", tmp_path / "q.csv")
    peers = ("pab-hook", "taylorseer", "fastercache", "first-block-cache", "magcache", "cache-dit")
    against = [word for name in peers for word in ("--against", name)]
    output = pab("quality", *arguments, *against, "--plot", tmp_path / "p.png")
    rows = {row["settings"]: row for row in csv.DictReader((tmp_path / "q.csv").open())}
    assert float(rows["this runtime, no PAB"]["psnr"]) > 60
    for name in ("latte:fast", "PAB hook 4/6/9", "TaylorSeer lite, every 3"):
        assert 0 < float(rows[name]["worst_frame"]) <= float(rows[name]["psnr"]) < 60
        assert float(rows[name]["seconds"]) > 0
        assert name in output
    assert "Error" in rows["FirstBlockCache 0.05"]["note"], "it does not know Latte's blocks"
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_peers_that_are_not_known(demo, tmp_path):
    assert "against: got 'teacache', must be one of" in refused("quality", "--model", demo, "--against", "teacache")
    job = ("quality", "--model", demo, "--against", "pab-hook")
    assert "plot: got 'x.foo', must end in one of" in refused(*job, "--plot", "x.foo")
    assert "plot: needs --against" in refused("quality", "--model", demo, "--plot", tmp_path / "p.png")
    assert "batch: got 4, must be 1 without --against" in refused("quality", "--model", demo, "--batch", 4)


def test_videos_beside_peers_may_be_made_at_once(demo, tmp_path):
    arguments = ("--model", demo, *SHORT, "--videos", 3, "--pab", "latte:fast", "--against", "taylorseer")
    for batch in (1, 2):
        output = pab("quality", *arguments, "--batch", batch, "--csv", tmp_path / f"{batch}.csv")
        assert ("2 at once" in output) == (batch == 2)
    alone, together = (list(csv.DictReader((tmp_path / f"{batch}.csv").open())) for batch in (1, 2))
    for one, two in zip(alone[2:], together[2:], strict=True):
        assert one["settings"] == two["settings"]
        assert float(one["psnr"]) == pytest.approx(float(two["psnr"]), abs=0.05), "quality is of each video"
