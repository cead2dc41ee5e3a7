"""The pass between two GEMMs: Triton against eager and compiled torch, in GB/s.

`pytest -m gpu bench/bench_residual_norm_modulate.py` times the default configs, and
`python -m bench.bench_residual_norm_modulate [SHAPE ...]` sweeps them: what it finds best belongs into the tables
`CHANNELS_PER_WARP` and `ROWS_PER_PROGRAM` of `triton_ops/residual_norm_modulate.py`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pab_kernels import ops
from pab_kernels.ops import reference
from pab_kernels.triton_ops.residual_norm_modulate import Config, default_config, residual_norm_modulate_triton

from .common import copy_bandwidth, median_ms, record, rotations

EPS = 1e-6
GROUPS = 2  # conditional and unconditional
SHAPES = {
    "480p": (47700, 1152),
    "360p": (27600, 1152),
    "144p": (4320, 1152),
    "latte": (32768, 1152),
    "plan-3d": (19200, 2304),
}
BRANCHES = {"norm": (), "one-gated": (True,), "two": (True, False)}
SWEEP = [Config(rows, warps) for rows, warps in itertools.product((1, 2, 4, 8), (1, 2, 4))]


@dataclass
class Inputs:
    """Arguments of one call; `size` bytes are the least that it moves."""

    x: Tensor
    branches: list[Tensor]
    gates: list[Tensor | None]
    shift: Tensor
    scale: Tensor
    out: Tensor

    @property
    def size(self) -> int:
        written = 2 if self.branches else 1
        return (1 + len(self.branches) + written) * self.x.numel() * self.x.element_size()


def make(rows: int, channels: int, gated: tuple[bool, ...]) -> Inputs:
    """Random bfloat16 inputs; gates, shift and scale are slices of one table, as in the models."""
    kwargs: Any = {"dtype": torch.bfloat16, "device": "cuda"}
    shape = (GROUPS, rows // GROUPS, channels)
    table = torch.randn(GROUPS, 6, channels, **kwargs)
    return Inputs(
        x=torch.randn(shape, **kwargs),
        branches=[torch.randn(shape, **kwargs) for _ in gated],
        gates=[table[:, 2 + i] if gate else None for i, gate in enumerate(gated)],
        shift=table[:, 0],
        scale=table[:, 1],
        out=torch.empty(shape, **kwargs),
    )


def rotated(rows: int, channels: int, gated: tuple[bool, ...]) -> list[Inputs]:
    """As many sets of inputs as keep L2 from serving one from the call before."""
    first = make(rows, channels, gated)
    return [first, *(make(rows, channels, gated) for _ in range(rotations(first.size) - 1))]


def run_triton(i: Inputs) -> None:
    ops.residual_norm_modulate(i.x, i.branches, i.gates, i.shift, i.scale, eps=EPS, out=i.out, backend="triton")


def run_eager(i: Inputs) -> None:
    """What a model without kernels does."""
    for branch, gate in zip(i.branches, i.gates, strict=True):
        i.x.add_(branch if gate is None else gate.unsqueeze(1) * branch)
    normed = F.layer_norm(i.x, i.x.shape[-1:], eps=EPS)
    i.out.copy_(normed * (1 + i.scale.unsqueeze(1)) + i.shift.unsqueeze(1))


def _functional(x, branches, gates, shift, scale, out) -> None:
    run_eager(Inputs(x, branches, gates, shift, scale, out))


_compiled = torch.compile(_functional, dynamic=False)


def run_compiled(i: Inputs) -> None:
    _compiled(i.x, i.branches, i.gates, i.shift, i.scale, i.out)


BACKENDS: dict[str, Callable[[Inputs], None]] = {
    "triton": run_triton,
    "compiled": run_compiled,
    "eager": run_eager,
}


def check(run: Callable[[Inputs], None], i: Inputs) -> None:
    """Compare one call with the reference, and leave x as it was."""
    before, wanted_x = i.x.clone(), i.x.clone()
    wanted = torch.full_like(i.out, float("nan"))
    reference.residual_norm_modulate_ref(
        wanted_x, i.branches, i.gates, i.shift, i.scale, norm="layer", eps=EPS, out=wanted
    )
    i.out.fill_(float("nan"))
    run(i)
    # Eager rounds between its kernels: this is to catch wrong results, tests/ judge the digits.
    torch.testing.assert_close(i.x, wanted_x, atol=6e-2, rtol=3e-2)
    torch.testing.assert_close(i.out, wanted, atol=1e-1, rtol=6e-2)
    i.x.copy_(before)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("branches", BRANCHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_pass(benchmark, shape, branches, backend):
    torch.compiler.reset()
    inputs, run = rotated(*SHAPES[shape], BRANCHES[branches]), BACKENDS[backend]
    check(run, inputs[0])
    ms = median_ms(run, inputs)
    rate = inputs[0].size / ms / 1e6
    record("residual_norm_modulate", f"{SHAPES[shape]} {branches}", backend, ms, rate, "GB/s")
    benchmark.extra_info.update(ms=ms, gb_per_s=rate, of_copy=rate / copy_bandwidth())

    def once() -> None:
        run(inputs[0])
        torch.cuda.synchronize()

    benchmark.pedantic(once, rounds=20, warmup_rounds=3)


def sweep(shapes: list[str]) -> None:
    """Print GB/s of every config, with rotated inputs and with one set, which L2 may hold as it does after a GEMM."""
    print(f"copy: {copy_bandwidth():.0f} GB/s; * marks the default config")
    for shape, branches in itertools.product(shapes, ("norm", "two")):
        size, inputs = SHAPES[shape], rotated(*SHAPES[shape], BRANCHES[branches])
        default = default_config(*size)
        for config in sorted({*SWEEP, default}):

            def run(i: Inputs, config: Config = config) -> None:
                args = (i.x, i.branches, i.gates, i.shift, i.scale, None, "layer", None, EPS, i.out)
                residual_norm_modulate_triton(*args, config=config)

            check(run, inputs[0])
            rates = [inputs[0].size / median_ms(run, sets) / 1e6 for sets in (inputs, inputs[:1])]
            print(
                f"{shape:8} {branches:5} rows {config.rows} warps {config.warps} {'*' if config == default else ' '} "
                f"rotated {rates[0]:5.0f} GB/s, one set {rates[1]:5.0f} GB/s",
                flush=True,
            )


if __name__ == "__main__":
    sweep(sys.argv[1:] or list(SHAPES))
