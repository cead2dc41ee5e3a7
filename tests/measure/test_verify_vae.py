"""pab verify: recorded calls of the originals' autoencoders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from pab_kernels.cli.main import app
from pab_kernels.measure.verify_vae import VaeRecording, difference, host, replay

FOLDER = Path(__file__).parents[1] / "data" / "vae"
ALL = sorted(FOLDER.glob("*.safetensors"))
assert len(ALL) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_recordings_pass_on_the_command_line(path, dtype):
    result = CliRunner().invoke(app, ["verify", str(path), "--dtype", dtype])
    assert result.exit_code == 0, result.output
    assert "decode to" in result.output
    assert "encode to" in result.output


def test_a_host_that_strays_fails():
    path = FOLDER / "open_sora_plan_v110.safetensors"
    assert CliRunner().invoke(app, ["verify", str(path), "--tolerance", "1e-9"]).exit_code == 1


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_weight_counts(path):
    """A host that forgot a parameter would still replay: changing any of them must change a result."""
    recording = VaeRecording.load(path)
    vae = host(recording, "cpu", torch.float64)
    calls = {case.kind: case for case in recording.cases if case.tiling is None and case.want.shape[2] > 1}

    for parameter in vae.parameters():
        parameter.requires_grad_(True)
    with torch.enable_grad():
        decode, encode = calls["decode"], calls["encode"]
        frames = () if decode.num_frames is None else (decode.num_frames,)
        if recording.family != "open_sora":
            vae.tiling = None
        decoded, encoded = vae.decode(decode.given.double(), *frames), vae.encode(encode.given.double())
        (decoded.square().sum() + encoded.square().sum()).backward()
    idle = [name for name, parameter in vae.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert idle == []


def test_nan_and_another_shape_are_infinite_errors():
    good = torch.ones(2, 3)
    assert difference(good, good) == 0
    assert difference(good, good[:1]) == float("inf")
    assert difference(good * float("nan"), good) == float("inf")


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda tensors, metadata: metadata.pop("config"), "no config"),
        (lambda tensors, metadata: metadata.update(family="latte"), "recording is of 'latte'"),
        (lambda tensors, metadata: tensors.pop("video.1"), "has no video.1"),
        (lambda tensors, metadata: tensors.pop("weights.post_quant_conv.conv.bias"), "post_quant_conv.conv.bias"),
        (lambda tensors, metadata: metadata.update(config="[1, 2]"), "config is a list, must be a dict"),
        (lambda tensors, metadata: metadata.update(config='{"hidden_size": "x"}'), "make no autoencoder"),
        (lambda tensors, metadata: metadata.update(cases='[{"kind": "melt"}]'), "got kind 'melt'"),
        (lambda tensors, metadata: metadata.update(cases="[3]"), "got kind None"),
    ],
    ids=["settings", "family", "video", "weight", "list", "word", "kind", "number"],
)
def test_bad_recordings(tmp_path, spoil, match):
    source, path = FOLDER / "open_sora_plan_v120.safetensors", tmp_path / "vae.safetensors"
    tensors = load_file(source)
    with safe_open(source, framework="pt") as file:
        metadata = dict(file.metadata())
    spoil(tensors, metadata)
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=match):
        list(replay(VaeRecording.load(path)))
    assert CliRunner().invoke(app, ["verify", str(path)]).exit_code == 2
    with pytest.raises(FileNotFoundError, match="there is no file"):
        VaeRecording.load(tmp_path / "nowhere")
