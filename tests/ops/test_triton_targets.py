"""Every Triton kernel compiles for every GPU that the table lets it serve, without one of them here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pab_kernels.ops import backends

WITHOUT_E4M3 = (
    "residual_norm_modulate fp8",
    "gelu_quantize",
    "quantize_qkv",
    "scaled_linear_gelu",
    "attention e4m3",
    "temporal_attention e4m3",
)
"""Kernels that the table keeps from GPUs below compute capability 8.9."""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_kernels_compile(capability, tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.triton_targets", str(capability)]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    lines = [line for line in run.stdout.splitlines() if line.startswith(f"sm_{capability} ")]
    assert len(lines) >= 17, run.stderr
    failed = {line.removeprefix(f"sm_{capability} ").split(":")[0] for line in lines if not line.endswith(": ok")}
    assert failed == (set(WITHOUT_E4M3) if capability < 89 else set()), run.stdout


@pytest.mark.parametrize(("capability", "refused"), [((8, 0), True), ((8, 6), True), ((8, 9), False), ((9, 0), False)])
def test_the_table_keeps_e4m3_from_gpus_without_it(capability, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    x: Any = SimpleNamespace(shape=(2, 8, 1152), device=torch.device("cuda"), dtype=torch.bfloat16)
    small: Any = SimpleNamespace(dtype=torch.float8_e4m3fn)
    int8: Any = SimpleNamespace(dtype=torch.int8)
    for op in ("residual_norm_modulate", "gelu_quantize"):
        choice = backends.choose(op, x, small)
        assert choice.backend == ("reference" if refused else "triton"), choice
        assert backends.choose(op, x, int8).backend == "triton"
