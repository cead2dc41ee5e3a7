"""`--gpus`: `pab generate` and `pab info` over several ranks, which here share a CPU."""

import json
import re

import imageio.v3 as iio
import numpy as np
import pytest

from pab_kernels.cli import app
from pab_kernels.files import LEFT_OVER
from tests.cli_tools import RUNNER, pab, refused


def test_two_ranks_make_the_video_of_one_process(demo, tmp_path, capfd):
    """Rank 0 alone prints and writes; halves of guidance in batches of their own round differently."""
    job = ("generate", "--model", demo, "--steps", 10, "--seed", 3, "--json")
    alone = json.loads(pab(*job, "--device", "cpu", "--quiet", "--output", tmp_path / "one.gif"))
    said = pab(*job, "--device", "cpu", "--gpus", 2, "--output", tmp_path / "two.gif", "--preview", 5)
    assert "2 ranks, mesh guidance=2,frames=1" in said
    summary = json.loads(capfd.readouterr().out)  # not this process said it
    assert (summary["gpus"], summary["mesh"]) == (2, "guidance=2,frames=1")
    assert len(summary["files"]) == 3
    assert summary["runs"]["denoising"]["finite"]
    run, single = (each["runs"]["denoising"]["report"] for each in (summary, alone))
    assert (run["computed"], run["broadcast"]) == (single["computed"], single["broadcast"])
    assert run["cache_bytes"] * 2 == single["cache_bytes"]
    one, two = (iio.imread(tmp_path / f"{name}.gif").astype(int) for name in ("one", "two"))
    assert one.shape == two.shape
    assert (one != two).mean() < 1e-2
    assert np.abs(one - two).mean() < 0.1


def test_a_rank_that_fails_ends_the_command_as_one_process_does(demo, tmp_path, capfd):
    job = ("generate", "--model", demo, "--steps", 10, "--gpus", 2, "--prompt", "a zebra", "--quiet")
    said = pab(*job, "--device", "cpu", "--output", tmp_path / "two.gif", code=2)  # as in one process
    assert re.match(r"error: rank [01]: ValueError: .*zebra", said), said
    assert "".join(capfd.readouterr()) == ""
    assert not [*tmp_path.glob("*.gif"), *tmp_path.glob(LEFT_OVER)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", 2, "--mesh", "guidance=2,frames=2"], "mesh: got 'guidance=2,frames=2', which are 4 ranks, must be"),
        (["--gpus", 2, "--mesh", "heads=2"], "mesh: got 'heads=2', must be such as guidance=2,frames=1"),
        (["--gpus", 6, "--mesh", "guidance=3,frames=2"], "guidance: got 3, must be 1 or 2"),
        (["--mesh", "frames=2"], "mesh: got 'frames=2', which are 2 ranks, must be 1, as --gpus says"),
        (["--gpus", 64], "gpus: got 64, over which frames and two halves of guidance cannot be split"),
        (["--gpus", 6, "--mesh", "frames=6"], "mesh: got frames=6, must be at most 5"),
        (["--gpus", 12], "must be at most 5, or even and at most 10"),
        (["--gpus", 7, "--guidance", 1], "frames and no guidance cannot be split, must be at most 5"),
        (["--gpus", 2, "--offload-text"], "offload_text: got it for demo"),
    ],
)
def test_what_cannot_be_is_refused_before_ranks_are_started(arguments, message, demo, tmp_path):
    assert message in refused(
        "generate", "--model", demo, *arguments, "--device", "cpu", "--output", tmp_path / "v.gif"
    )


def test_info_tells_a_ranks_memory_and_the_predicted_time():
    job = ("info", "--model", "open_sora", "--resolution", "480p", "--duration", "8s")
    alone, eight = pab(*job), pab(*job, "--gpus", 8)
    slots = [float(found) for text in (alone, eight) for found in re.findall(r"112 slots .* (\d+\.\d)", text)]
    assert slots == [45.9, 5.7]
    assert "mesh guidance=2,frames=4; memory is that of the rank that has most" in eight
    rows = dict(re.findall(r"│ (guidance=\d,frames=\d) *│ *(\d+\.\d+)", eight))
    assert list(rows) == ["guidance=2,frames=4", "guidance=1,frames=8", "guidance=1,frames=1"]
    assert float(rows["guidance=2,frames=4"]) < float(rows["guidance=1,frames=8"]) < float(rows["guidance=1,frames=1"])
    assert "not measured" in " ".join(eight.split())
    assert "guidance=1,frames=2" in pab(*job, "--gpus", 2, "--mesh", "frames=2")
    assert "gpus: got 2 without --model" in refused("info", "--gpus", 2)
    assert "which are 2 ranks, must be 1" in refused(*job, "--mesh", "frames=2")
    narrow = RUNNER.invoke(app, [*job, "--gpus", "8"], env={"COLUMNS": "40"}).output
    assert all(f" {mesh} " in narrow for mesh in rows), "names are not cut"


def test_info_tells_where_attention_would_run_in_fp8():
    output = pab("info", "--model", "wan_2_1", "--attention-precision", "fp8")
    assert re.search(r"No attention in fp8: .*|spatial attention in fp8: yes: 32,760 tokens, head_dim 128", output)
