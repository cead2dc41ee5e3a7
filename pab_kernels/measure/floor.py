"""The least time that a denoising run can take: what the schedule still requires, at the device's own ceilings.

The floor counts the blocks' work alone, in floating-point operations that a GEMM library would do at its best rate, and
in the fewest bytes that the passes between the GEMMs must move. Text keys and values, embeddings and the final layer
are left out. Attention is charged at the rate of the GEMMs. With linears in fp8 all GEMMs of the blocks are charged at
the fp8 rate; bytes and attention stay those of the model's dtype.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from pab_kernels.blocks.branches import Fp8Linear, Linear, linear
from pab_kernels.ops.fp8_linear import E4M3
from pab_kernels.ops.quantized import Quantized
from pab_kernels.ops.reference import quantize_ref
from pab_kernels.runtime.executor import Block, BlockStack
from pab_kernels.schedule import Schedule, StepVariant

CHIP_FILLING_TOKENS = 47700
"""Rows that fill a GPU of this class: those of Open-Sora at 480p, where GEMMs run at their best."""


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches.

    `flops` in FLOP/s by a GEMM in the model's dtype, `fp8_flops` by one in fp8 (None where that was not measured),
    `bandwidth` in bytes/s, read plus written, by a copy.
    """

    flops: float
    bandwidth: float
    fp8_flops: float | None = None


@dataclass(frozen=True)
class Work:
    """Floating-point operations of GEMMs and of attention, and bytes of what lies between."""

    gemms: float = 0.0
    attention: float = 0.0
    nbytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.gemms + other.gemms, self.attention + other.attention, self.nbytes + other.nbytes)

    @property
    def flops(self) -> float:
        """Of GEMMs and attention."""
        return self.gemms + self.attention

    def seconds(self, ceilings: Ceilings, *, fp8: bool = False) -> float:
        """The time this takes at the ceilings, arithmetic and memory one after the other; `fp8` is about the GEMMs.

        Raises
        ------
        ValueError
            The fp8 ceiling is asked for and was not measured.
        """
        rate = ceilings.fp8_flops if fp8 else ceilings.flops
        if rate is None:
            raise ValueError("ceilings.fp8_flops: is None, must be measured for a floor with linears in fp8")
        return self.gemms / rate + self.attention / ceilings.flops + self.nbytes / ceilings.bandwidth


def run_work(stack: BlockStack, schedule: Schedule, shape: tuple[int, int, int, int], text: int) -> Work:
    """What a run must do under its schedule.

    Parameters
    ----------
    stack : BlockStack
        Only the shapes and dtype of its weights are read; they may be on the meta device.
    schedule : Schedule
    shape : (B, T, S, C)
        Of the residual stream.
    text : int
        Text tokens that count.
    """
    known: dict[StepVariant, Work] = {}
    total = Work()
    for variant in schedule:
        if variant not in known:
            known[variant] = step_work(stack, schedule, variant, shape, text)
        total += known[variant]
    return total


def step_work(
    stack: BlockStack, schedule: Schedule, variant: StepVariant, shape: tuple[int, int, int, int], text: int
) -> Work:
    """What one call must do; parameters as in `run_work`."""
    return sum((_block_work(block, schedule, variant, shape, text) for block in stack.blocks), Work())


def _block_work(
    block: Block, schedule: Schedule, variant: StepVariant, shape: tuple[int, int, int, int], text: int
) -> Work:
    batch, frames, tokens, channels = shape
    rows = batch * frames * tokens
    config, attention = schedule.config, block.attention
    gemms = products = 0.0
    passes = 0  # how often a tensor of the stream's size is read or written
    if getattr(variant, block.kind) and block.index in config.blocks(block.kind):
        passes += 1  # the slot is read
    else:
        keys = {"spatial": tokens, "temporal": frames, "full": frames * tokens}[attention.sequence]
        gemms += _gemms(rows, attention.qkv, attention.proj)
        products += 4 * rows * keys * channels
        passes += 3  # read stream and branch, write stream
        if attention.sequence == "temporal":
            passes += 4  # so short that it is bound by memory: read query, key and value, write the result
    if block.cross is not None:
        passes += 1  # read the branch, or the slot
        if not (variant.cross and block.index in config.blocks("cross")):
            gemms += _gemms(rows, block.cross.q, block.cross.proj)
            products += 4 * rows * text * channels
    passes += 1 + 3  # read the MLP's branch or slot; the pass before the next attention
    if block.index not in variant.mlp(block.kind).broadcast:
        gemms += _gemms(rows, block.mlp.up, block.mlp.down)
        passes += 3  # read stream, write stream and the GEMM's input
    return Work(gemms, products, passes * rows * channels * block.table.dtype.itemsize)


def _gemms(rows: int, *linears: Linear | Fp8Linear) -> float:
    return float(sum(2 * rows * part.weight.shape.numel() for part in linears))


def measure_gemms(stack: BlockStack, rows: int, seconds: float = 0.1, *, fp8: bool = False) -> float:
    """FLOP/s of the first block's four large GEMMs (QKV, projection, MLP up and down) on `rows` rows of random data.

    All operations over all time, as a block does them one after the other. `seconds` go to each GEMM. With `fp8` inputs
    and weights are in e4m3 already.
    """
    block = stack.blocks[0]
    flops = time_taken = 0.0
    for weights in (block.attention.qkv, block.attention.proj, block.mlp.up, block.mlp.down):
        assert isinstance(weights, Linear)
        features, channels = weights.weight.shape
        x = torch.randn(rows, channels, dtype=weights.weight.dtype, device=weights.weight.device)
        out = torch.empty(rows, features, dtype=x.dtype, device=x.device)
        if fp8:
            quantized = quantize_ref(x, Quantized.empty((rows, channels), E4M3, x.device))
            gemm = partial(linear, quantized, Fp8Linear.of(weights), out)
        else:
            gemm = partial(linear, x, weights, out)
        time_taken += _seconds(gemm, x.device, seconds)
        flops += 2 * rows * features * channels
    return flops / time_taken


def measure_copy(device: torch.device, nbytes: int = 2**30, seconds: float = 0.1) -> float:
    """Bytes/s, read plus written, of a device copy of `nbytes` of random data."""
    source = torch.randn(nbytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(partial(target.copy_, source), device, seconds)


def _seconds(run: Callable[[], object], device: torch.device, budget: float) -> float:
    """Mean seconds of one call, launched back to back for about `budget` seconds."""

    def once(count: int) -> float:
        _wait(device)
        start = time.perf_counter()
        for _ in range(count):
            run()
        _wait(device)
        return (time.perf_counter() - start) / count

    once(2)
    count = max(3, min(1000, int(budget / max(once(2), 1e-9))))
    once(count)  # an idle GPU needs a while to raise its clocks
    return once(count)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
