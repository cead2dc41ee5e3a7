"""`pab schedule`."""

import pytest

from pab_kernels.config import PABConfig
from tests.cli_tools import pab, refused


def test_schedule_draws_a_preset():
    output = pab("schedule", "--preset", "open_sora_plan_v110:357", "--steps", 150)
    assert "159 calls for 150 steps of open_sora_plan_v110" in output
    assert all(kind in output for kind in ("spatial", "temporal", "cross"))


def test_schedule_reads_a_file_and_plots(tmp_path):
    PABConfig.preset("latte").to_yaml(tmp_path / "pab.yaml")
    picture = tmp_path / "plot.png"
    output = pab(
        "schedule", "--config", tmp_path / "pab.yaml", "--family", "open_sora", "--steps", 8, "--plot", picture
    )
    assert "8 calls for 8 steps of open_sora" in output
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --preset"),
        (["--preset", "sora"], "preset: got 'sora'"),
        (["--preset", "latte:999"], "variant: got '999'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--preset", "latte", "--family", "wan_2_1"], "family: got 'wan_2_1' beside --preset"),
        (["--preset", "latte", "--plot", "x.foo"], "plot: got 'x.foo', must end in one of "),
    ],
)
def test_schedule_refuses(arguments, message):
    assert message in refused("schedule", *arguments)
