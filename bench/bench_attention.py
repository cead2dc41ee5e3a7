"""Attention in CUDA C++ and Triton against SDPA's backends and FlashAttention-3; `--sweep`: every Triton config.

Of the backends in e4m3, "cuda-fp8" quantises too; "cuda-fp8-kernel" and "fa3-fp8" get their rows quantised.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pab_kernels import ops
from pab_kernels.ops.fp8_attention import attend_quantized, quantize_qkv
from pab_kernels.triton_ops.attention import Config, attention_triton, default_config

from .common import median_ms, record, rotations


@dataclass(frozen=True)
class Shape:
    """Sizes of one call. `lengths` are the keys that count, where they are fewer than `keys`."""

    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    lengths: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in dataclasses.asdict(self).items())

    @property
    def flop(self) -> float:
        """Operations without padding: two products of the queries with the keys that count."""
        keys = sum(self.lengths) if self.lengths else self.batch * self.keys
        return 4.0 * self.queries * keys * self.heads * self.head_dim


SHAPES = {
    "spatial-144p": Shape(30, 144, 144, 16, 72),
    "spatial-240p": Shape(30, 405, 405, 16, 72),
    "spatial-360p": Shape(30, 920, 920, 16, 72),
    "spatial-480p": Shape(30, 1590, 1590, 16, 72),
    "spatial-720p": Shape(30, 3600, 3600, 16, 72),
    "latte": Shape(32, 1024, 1024, 16, 72),
    "cross": Shape(2, 23850, 300, 16, 72),
    "cross-masked": Shape(2, 23850, 320, 16, 72, (300, 17)),
    "full": Shape(2, 9600, 9600, 24, 96),
    "full-long": Shape(2, 28800, 28800, 24, 96),
    "wan-1.3b": Shape(1, 32760, 32760, 12, 128),
    "wan-14b": Shape(1, 32760, 32760, 40, 128),
    "wan-text": Shape(1, 32760, 512, 12, 128),
    "wan-image": Shape(1, 32760, 257, 40, 128),
}
SWEPT = ("spatial-144p", "spatial-480p", "cross", "cross-masked", "full")

SWEEP = (
    Config(128, 64, 8, 2, 128),
    Config(128, 64, 8, 3, 128),
    Config(128, 64, 8, 4, 128),
    Config(128, 64, 8, 2, None),
    Config(128, 128, 8, 2, None),
    Config(128, 64, 4, 2, None),
    Config(128, 64, 4, 3, None),
    Config(128, 32, 4, 3, 168),
    Config(128, 32, 8, 4, 128),
    Config(64, 64, 4, 2, 128),
    Config(64, 64, 4, 2, 168),
    Config(64, 128, 4, 2, None),
)


@dataclass(frozen=True)
class Inputs:
    """Strided as in the models: cut out of one QKV product, or a key-value product where lengths differ."""

    q: Tensor
    k: Tensor
    v: Tensor
    kv_len: Tensor | None

    @property
    def nbytes(self) -> int:
        return 2 * (2 * self.q.numel() + self.k.numel() + self.v.numel())

    @functools.cached_property
    def quantized(self) -> tuple[Tensor, ...]:
        return quantize_qkv(self.q, self.k, self.v)

    @functools.cached_property
    def scaled(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Rows in e4m3 with one scale a head, as FlashAttention-3 takes them: q, k, v, and scales [B, H]."""
        scales = tuple(x.abs().amax((1, 3)).float() / 448 for x in (self.q, self.k, self.v))
        rows = (x / s[:, None, :, None] for x, s in zip((self.q, self.k, self.v), scales, strict=True))
        return tuple(x.to(torch.float8_e4m3fn) for x in rows), scales


def make(shape: Shape) -> Inputs:
    kwargs: Any = {"dtype": torch.bfloat16, "device": "cuda"}
    head = (shape.heads, shape.head_dim)
    if shape.queries == shape.keys:
        q, k, v = torch.randn(shape.batch, shape.queries, 3, *head, **kwargs).unbind(2)
        return Inputs(q, k, v, None)
    q = torch.randn(shape.batch, shape.queries, *head, **kwargs)
    k, v = torch.randn(shape.batch, shape.keys, 2, *head, **kwargs).unbind(2)
    return Inputs(q, k, v, torch.tensor(shape.lengths, dtype=torch.int32, device="cuda") if shape.lengths else None)


def rotated(shape: Shape) -> list[Inputs]:
    """As many sets of inputs as keep L2 from serving one from the call before."""
    first = make(shape)
    return [first, *(make(shape) for _ in range(rotations(first.nbytes) - 1))]


def run_triton(i: Inputs, config: Config | None = None) -> Tensor:
    return attention_triton(i.q, i.k, i.v, i.kv_len, i.q.shape[-1] ** -0.5, config=config)


def run_cuda(i: Inputs) -> Tensor:
    return ops.attention(i.q, i.k, i.v, kv_len=i.kv_len, backend="cuda")


def run_sdpa(i: Inputs, backend: SDPBackend) -> Tensor:
    """Without a mask, even where some keys do not count: a mask would keep the fast backends out."""
    q, k, v = (t.transpose(1, 2) for t in (i.q, i.k, i.v))
    with sdpa_kernel(backend):
        y = F.scaled_dot_product_attention(q, k, v)
    return y.transpose(1, 2).flatten(2)


def run_fa3(i: Inputs, fp8: bool = False) -> Tensor:
    """FlashAttention-3 as `pip install fa3-fwd` brings it; without a mask, like SDPA."""
    try:
        from fa3_fwd_interface import flash_attn_func
    except ImportError as error:
        raise RuntimeError("fa3-fwd is not installed") from error
    if fp8:
        rows, scales = i.scaled
        y = flash_attn_func(*rows, q_descale=scales[0], k_descale=scales[1], v_descale=scales[2])
    else:
        y = flash_attn_func(i.q, i.k, i.v)
    return (y[0] if isinstance(y, tuple) else y).flatten(2)


def run_cuda_fp8(i: Inputs) -> Tensor:
    return ops.fp8_attention(i.q, i.k, i.v, backend="cuda")


def run_cuda_fp8_kernel(i: Inputs) -> Tensor:
    if i.q.shape != i.k.shape:
        raise ValueError("k: must have the shape of q")
    return attend_quantized(i.quantized, i.q.shape, i.q.dtype, i.q.shape[-1] ** -0.5)


BACKENDS: dict[str, Callable[[Inputs], Tensor]] = {
    "cuda": run_cuda,
    "triton": run_triton,
    "flash": functools.partial(run_sdpa, backend=SDPBackend.FLASH_ATTENTION),
    "cudnn": functools.partial(run_sdpa, backend=SDPBackend.CUDNN_ATTENTION),
    "efficient": functools.partial(run_sdpa, backend=SDPBackend.EFFICIENT_ATTENTION),
    "fa3": run_fa3,
    "cuda-fp8": run_cuda_fp8,
    "cuda-fp8-kernel": run_cuda_fp8_kernel,
    "fa3-fp8": functools.partial(run_fa3, fp8=True),
}


def check(run: Callable[[Inputs], Tensor], i: Inputs, *, masked: bool = True, fp8: bool = False) -> None:
    """Compare the first and last queries of two heads in each batch row with float32: all scores would not fit."""
    head_dim = i.q.shape[-1]
    y = run(i)[:, :, -2 * head_dim :].unflatten(-1, (2, head_dim))
    some = torch.cat((torch.arange(0, min(64, y.shape[1])), torch.arange(max(0, y.shape[1] - 64), y.shape[1])))
    q, k, v = (t[:, :, -2:].float().transpose(1, 2) for t in (i.q[:, some], i.k, i.v))
    scores = q @ k.mT * head_dim**-0.5
    if masked and i.kv_len is not None:
        beyond = torch.arange(k.shape[2], device="cuda") >= i.kv_len[:, None]
        scores = scores.masked_fill(beyond[:, None, None], float("-inf"))
    wanted = (torch.softmax(scores, dim=-1) @ v).transpose(1, 2)
    if fp8:
        assert (y[:, some] - wanted).norm() < 0.07 * wanted.norm()
    else:
        torch.testing.assert_close(y[:, some].float(), wanted, atol=1e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(benchmark, shape, backend):
    inputs, run = rotated(SHAPES[shape]), BACKENDS[backend]
    try:
        check(run, inputs[0], masked=backend in ("cuda", "triton"), fp8="fp8" in backend)
    except (RuntimeError, ValueError) as error:
        pytest.skip(f"{backend} does not take {shape}: {error}")
    ms = median_ms(run, inputs, replays=10)
    rate = SHAPES[shape].flop / ms / 1e9
    record("attention", f"{shape} {SHAPES[shape]}", backend, ms, rate, "TFLOP/s")
    benchmark.extra_info.update(ms=ms, tflop_per_s=rate)

    def once() -> None:
        run(inputs[0])
        torch.cuda.synchronize()

    benchmark.pedantic(once, rounds=10, warmup_rounds=2)


def compile_all(i: Inputs) -> None:
    """Compile every config, several at a time: most of it happens outside Python. Errors show up when timed."""

    def attempt(config: Config) -> None:
        try:
            run_triton(i, config)
        except Exception as error:
            print(f"  {config}: {type(error).__name__}")

    attempt(SWEEP[0])
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(attempt, SWEEP[1:]))
    torch.cuda.synchronize()


def time_line(label: str, run: Callable[[Inputs], Tensor], shape: Shape, inputs: list[Inputs], masked: bool) -> None:
    try:
        check(run, inputs[0], masked=masked)
        ms = median_ms(run, inputs, replays=8)
    except (RuntimeError, AssertionError) as error:  # out of registers, shared memory, or simply wrong
        print(f"  {label:66} {type(error).__name__}: {str(error).strip().splitlines()[0][:120]}", flush=True)
        return
    print(f"  {label:66} {ms:8.4f} ms {shape.flop / ms / 1e9:6.0f} TFLOP/s", flush=True)


def sweep(names: list[str]) -> None:
    """Print time and TFLOP/s of every config and every SDPA backend."""
    print(f"{torch.cuda.get_device_name()}; * marks the default config; SDPA runs without mask")
    for name in names:
        shape = SHAPES[name]
        inputs = rotated(shape)
        print(f"{name} {shape}", flush=True)
        compile_all(inputs[0])
        default = default_config(torch.bfloat16, shape.head_dim, shape.queries)
        for config in dict.fromkeys((*SWEEP, default)):
            label = f"{config}{' *' if config == default else ''}"
            time_line(label, functools.partial(run_triton, config=config), shape, inputs, masked=True)
        for backend in ("flash", "cudnn"):
            time_line(backend, BACKENDS[backend], shape, inputs, masked=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true", help="time every config (the default and only thing to do)")
    parser.add_argument("shapes", nargs="*", help=f"of {', '.join(SHAPES)}; {', '.join(SWEPT)} if none is given")
    sweep(parser.parse_args().shapes or list(SWEPT))
