"""pab verify: recorded runs of the original."""

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from pab_kernels.cli import app
from pab_kernels.config import PABConfig
from pab_kernels.measure.verify import Recording, replay, worst_error

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"
LATTE = GOLDENS / "latte.safetensors"
ALL = sorted(GOLDENS.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_recordings_pass_on_the_command_line(path, dtype):
    result = CliRunner().invoke(app, ["verify", str(path), "--dtype", dtype])
    assert result.exit_code == 0, result.output
    assert "without PAB" in result.output
    assert "with PAB" in result.output


def test_a_run_that_strays_fails():
    assert CliRunner().invoke(app, ["verify", str(LATTE), "--tolerance", "1e-9"]).exit_code == 1
    recording = Recording.load(LATTE)
    assert worst_error(replay(recording, PABConfig()), recording.pab) > 1e-2


def test_nan_is_an_infinite_error():
    good = torch.ones(2, 1, 3)
    bad = good.clone()
    bad[1, 0, 2] = float("nan")
    assert worst_error(good, good) == 0
    assert worst_error(bad, good) == float("inf")


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda path: path.unlink(), "there is no file"),
        (lambda path: path.write_bytes(b"nonsense"), "not a safetensors file"),
        (lambda path: save_file(load_file(path), path), "has no model"),
    ],
    ids=["missing", "nonsense", "metadata"],
)
def test_bad_files(tmp_path, spoil, match):
    path = tmp_path / "run.safetensors"
    path.write_bytes(LATTE.read_bytes())
    spoil(path)
    with pytest.raises((FileNotFoundError, ValueError), match=match):
        Recording.load(path)
    assert CliRunner().invoke(app, ["verify", str(path)]).exit_code == 2


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_config": "{"}, "model_config is not JSON"),
        ({"model_config": "[" * 100_000}, "model_config is not JSON"),
        ({"model_config": "[1]"}, "model_config is a list, must be a dict"),
        ({"model_config": '{"num_layers": 65536}'}, "num_layers: got 65536"),
        ({"model_config": '{"num_attention_heads": 200, "attention_head_dim": 60000}'}, "too many|do not fit"),
        ({"model": "none"}, "the recording is of 'none'"),
        ({"pab": '{"spatial": 1}'}, "pab: "),
        ({"dt": "nan"}, "dt is 'nan', must be a finite number"),
        ({"cfg_scale": "four"}, "cfg_scale is 'four'"),
        ({"loop": "other"}, "loop is 'other'"),
        ({"out.pab": torch.zeros(3, 1)}, r"out.pab is torch.float32 \[3, 1\], must be floating, of"),
        ({"in.x": torch.zeros(1, 4, 5, 8, 8, dtype=torch.int32)}, "in.x is torch.int32"),
        ({"in.timesteps": torch.zeros(0)}, "in.timesteps is"),
        ({"state.proj_out.bias": torch.zeros(3)}, "proj_out.bias"),
        ({"state.other": torch.zeros(3)}, "other"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_recording_is_trusted_with_nothing(tmp_path, changes, match):
    """One error that names file or key, and nothing of a false size is made."""
    with safe_open(LATTE, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(LATTE)
    for key, value in changes.items():
        (metadata if isinstance(value, str) else tensors)[key] = value
    path = tmp_path / "run.safetensors"
    save_file(tensors, path, metadata)
    result = CliRunner().invoke(app, ["verify", str(path)])
    assert result.exit_code == 2
    assert re.search(match, " ".join(result.output.split())), result.output


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_recordings_on_a_gpu(path, dtype):
    loose = ["--tolerance", "1e-3"] if dtype == "float32" else []  # the GPU's float32 sums differ
    result = CliRunner().invoke(app, ["verify", str(path), "--device", "cuda", "--dtype", dtype, *loose])
    assert result.exit_code == 0, result.output
