"""`pab verify`."""

import torch
from safetensors.torch import save_file

from tests.cli_tools import refused


def test_verify_refuses_what_is_no_recording(tmp_path):
    assert "recording: there is no file" in refused("verify", tmp_path / "absent.safetensors")
    assert "a folder, must be a file" in refused("verify", tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert "not a recording" in refused("verify", tmp_path / "x.safetensors")
    assert "tolerance: got 0.0" in refused("verify", tmp_path / "x.safetensors", "--tolerance", "0")
    assert "dtype: got 'int8'" in refused("verify", tmp_path / "x.safetensors", "--dtype", "int8")
