"""The least time that a denoising run can take: what the schedule still requires, at the device's own ceilings.

The floor counts the blocks' work alone, in floating-point operations that a GEMM library would do at its best rate, and
in the fewest bytes that the passes between the GEMMs must move. Text keys and values, embeddings and the final layer
are left out. Attention is charged at the rate of the GEMMs. With linears in fp8 all GEMMs of the blocks are charged at
the fp8 rate; bytes and attention stay those of the model's dtype.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from pab_kernels.blocks.block import Block, BlockStack, Branch
from pab_kernels.blocks.linears import Fp8Linear, Linear, linear
from pab_kernels.blocks.self_attention import SelfAttention
from pab_kernels.ops.fp8_linear import E4M3
from pab_kernels.ops.quantized import Quantized
from pab_kernels.ops.reference import quantize_ref
from pab_kernels.runtime.plan import stack_span
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
    """What one call must do; parameters as in `run_work`. Guidance that is broadcast leaves half of B."""
    if variant.guidance:
        shape = (-(-shape[0] // 2), *shape[1:])
    span = stack_span(stack, schedule.config)
    total = Work()
    if span and variant.stack:
        total += Work(nbytes=(1 + variant.forecasts("stack")) * math.prod(shape) * stack.dtype.itemsize)
    for position, block in enumerate(stack.blocks):
        if not (variant.stack and position in span):
            for branch in block.branches:
                total += _branch_work(block, branch, schedule, variant, shape, text)
    return total


def computed_branches(stack: BlockStack, schedule: Schedule, variant: StepVariant) -> Iterator[Branch]:
    """The branches that a call computes: neither read from a slot, nor left out with their stack."""
    span = stack_span(stack, schedule.config)
    for position, block in enumerate(stack.blocks):
        if not (variant.stack and position in span):
            for branch in block.branches:
                has_slot = block.index in schedule.config.blocks(branch.kind)
                if not (has_slot and variant.reads(branch.kind, block.index)):
                    yield branch


def _branch_work(
    block: Block,
    branch: Branch,
    schedule: Schedule,
    variant: StepVariant,
    shape: tuple[int, int, int, int],
    text: int,
) -> Work:
    """Of one branch. Its output, new or kept, is read once, with its change where that is forecast.

    Where it is computed, a pass before it reads and writes the stream and, unless the branch reads the stream itself,
    writes what it does read; where its change is kept, what was kept is read, and both are written.
    """
    rows, channels = math.prod(shape[:3]), shape[3]
    weights = branch.weights
    gemms = products = 0.0
    tensors = 1  # of the stream's size, read or written
    has_slot = block.index in schedule.config.blocks(branch.kind)
    if has_slot and variant.reads(branch.kind, block.index):
        tensors += variant.forecasts(branch.kind)
    else:
        tensors += 3 * schedule.config.order(branch.kind) if has_slot else 0
        gemms = float(sum(2 * rows * part.weight.shape.numel() for part in weights.linears))
        products = 4.0 * rows * weights.keys(shape, text) * channels
        tensors += 2 if branch.norm is None else 3
        if isinstance(weights, SelfAttention) and weights.sequence == "temporal":
            tensors += 4  # so short that it is bound by memory: read query, key and value, write the result
    return Work(gemms, products, tensors * rows * channels * weights.linears[-1].bias.dtype.itemsize)


def measure_gemms(stack: BlockStack, rows: int, seconds: float = 0.1, *, fp8: bool = False) -> float:
    """FLOP/s of the first block's GEMMs, each shape once, on `rows` rows of random data.

    All operations over all time, as a block does them one after the other. `seconds` go to each GEMM. With `fp8` inputs
    and weights are in e4m3 already.
    """
    parts = [part for branch in stack.blocks[0].branches for part in branch.weights.linears]
    flops = time_taken = 0.0
    for weights in {part.weight.shape: part for part in reversed(parts)}.values():
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
