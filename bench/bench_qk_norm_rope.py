"""Norm and rotary embedding of queries and keys, in GB/s of the bytes that must move; `--sweep` prints every config."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pab_kernels import ops
from pab_kernels.ops import reference
from pab_kernels.triton_ops.qk_norm_rope import Config, default_config, qk_norm_rope_triton

from .common import copy_bandwidth, median_ms, record, rotations

EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """Sizes of one call, and what it does."""

    batch: int
    positions: int
    heads: int
    head_dim: int
    norm: bool
    pair_stride: int | None  # None: no rotation
    across: bool = False  # a norm across the heads


SHAPES = {
    "spatial-144p": Shape(30, 144, 16, 72, True, None),
    "spatial-480p": Shape(30, 1590, 16, 72, True, None),
    "norm-rope": Shape(30, 1590, 16, 72, True, 1),
    "full": Shape(2, 9600, 24, 96, False, 16),
    "wan-1.3b": Shape(1, 32760, 12, 128, True, 1, across=True),
    "wan-14b": Shape(1, 32760, 40, 128, True, 1, across=True),
}


@dataclass(frozen=True)
class Inputs:
    qkv: Tensor
    q_weight: Tensor | None
    k_weight: Tensor | None
    rope: tuple[Tensor, Tensor] | None
    pair_stride: int

    @property
    def nbytes(self) -> int:
        """Bytes that must move: q and k read and written, the tables read."""
        tables = sum(table.nbytes for table in self.rope or ())
        return 2 * self.qkv.nbytes * 2 // 3 + tables


def make(shape: Shape) -> Inputs:
    kwargs: Any = {"dtype": torch.bfloat16, "device": "cuda"}
    qkv = torch.randn(shape.batch, shape.positions, 3, shape.heads, shape.head_dim, **kwargs)
    width = shape.head_dim * (shape.heads if shape.across else 1)
    q_weight, k_weight = (torch.randn(width, **kwargs) if shape.norm else None for _ in range(2))
    rope = None
    if shape.pair_stride is not None:
        angles = torch.randn(shape.positions, shape.head_dim // 2, device="cuda")
        rope = (angles.cos(), angles.sin())
    return Inputs(qkv, q_weight, k_weight, rope, shape.pair_stride or 1)


def rotated(shape: Shape) -> list[Inputs]:
    """As many sets of inputs as keep L2 from serving one from the call before."""
    first = make(shape)
    return [first, *(make(shape) for _ in range(rotations(first.nbytes) - 1))]


def run_triton(i: Inputs) -> None:
    ops.qk_norm_rope(
        i.qkv,
        q_weight=i.q_weight,
        k_weight=i.k_weight,
        rope=i.rope,
        pair_stride=i.pair_stride,
        eps=EPS,
        backend="triton",
    )


def run_eager(i: Inputs) -> None:
    """What a model without kernels does."""
    for part, weight in ((i.qkv[:, :, 0], i.q_weight), (i.qkv[:, :, 1], i.k_weight)):
        y = part
        if weight is not None:
            rows = part if len(weight) == part.shape[-1] else part.flatten(2)
            y = F.rms_norm(rows, weight.shape, weight, EPS).view(part.shape)
        if i.rope is not None:
            cos, sin = (table[:, None].to(y.dtype) for table in i.rope)
            y = reference.rotate_pairs_ref(y, cos, sin, i.pair_stride)
        part.copy_(y)


BACKENDS: dict[str, Callable[[Inputs], None]] = {"triton": run_triton, "eager": run_eager}


def check(run: Callable[[Inputs], None], i: Inputs) -> None:
    """Compare one call with the reference, and leave qkv as it was."""
    before, wanted = i.qkv.clone(), i.qkv.clone()
    ops.qk_norm_rope(
        wanted,
        q_weight=i.q_weight,
        k_weight=i.k_weight,
        rope=i.rope,
        pair_stride=i.pair_stride,
        eps=EPS,
        backend="reference",
    )
    run(i)
    # Eager rounds between its kernels: this is to catch wrong results, tests/ judge the digits.
    torch.testing.assert_close(i.qkv, wanted, atol=1e-1, rtol=6e-2)
    i.qkv.copy_(before)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_qk_norm_rope(benchmark, shape, backend):
    inputs, run = rotated(SHAPES[shape]), BACKENDS[backend]
    check(run, inputs[0])
    ms = median_ms(run, inputs)
    rate = inputs[0].nbytes / ms / 1e6
    record("qk_norm_rope", f"{shape} {SHAPES[shape]}", backend, ms, rate, "GB/s")
    benchmark.extra_info.update(ms=ms, gb_per_s=rate, of_copy=rate / copy_bandwidth())

    def once() -> None:
        run(inputs[0])
        torch.cuda.synchronize()

    benchmark.pedantic(once, rounds=20, warmup_rounds=3)


def sweep(names: list[str]) -> None:
    """Print GB/s of every config."""
    print(f"{torch.cuda.get_device_name()}; copy: {copy_bandwidth():.0f} GB/s; * marks the default config")
    for name in names:
        shape = SHAPES[name]
        inputs = rotated(shape)
        default = default_config(1, shape.heads * shape.head_dim) if shape.across else default_config(shape.heads)
        tiles = sorted({4, 8, 16, default.rows})
        configs = {Config(*each) for each in itertools.product(tiles, (1, 2, 4), (1,))}
        configs |= {Config(rows, tokens, 2) for rows in (8, 16) for tokens in (1, 2)}
        if shape.across:
            configs = {Config(1, tokens, warps) for tokens in (1, 2) for warps in (2, 4, 8, 16)}
        for config in sorted({*configs, default}):

            def run(i: Inputs, config: Config = config, across: bool = shape.across) -> None:
                cos, sin = i.rope or (None, None)
                qkv = i.qkv.flatten(3).unsqueeze(3) if across else i.qkv
                args = (qkv, i.q_weight, i.k_weight, cos, sin, i.pair_stride, EPS)
                qk_norm_rope_triton(*args, config=config)

            check(run, inputs[0])
            rate = inputs[0].nbytes / median_ms(run, inputs, replays=10) / 1e6
            print(
                f"{name:13} rows {config.rows:2} tokens {config.tokens} warps {config.warps} "
                f"{'*' if config == default else ' '} {rate:5.0f} GB/s, {rate / copy_bandwidth():.0%} of copy",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true", help="time every config (the default and only thing to do)")
    parser.add_argument("shapes", nargs="*", help=f"of {', '.join(SHAPES)}; all if none is given")
    sweep(parser.parse_args().shapes or list(SHAPES))
