"""What a step's exchanges between ranks take by themselves: of the sizes that a run has, with nothing to wait for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pab_kernels import clock
from pab_kernels.blocks.self_attention import SelfAttention
from pab_kernels.blocks.sharded import Piece, Shards, near_even
from pab_kernels.distributed.exchange import Exchange
from pab_kernels.measure.benchmark import Timing, over_ranks
from pab_kernels.measure.contenders import Problem
from pab_kernels.models import adapter_for
from pab_kernels.ops.fp8_linear import E4M3

TIMES = 8
"""So many attentions that do nothing are timed together, with the exchanges around them."""


def measure(problem: Problem, timing: Timing) -> dict[str, float]:
    """Seconds a step, for each variant that the run had; nothing where frames are not split. All ranks call it.

    The median of a few, of the rank that took longest. On a GPU the exchanges are in a graph, as in a run.
    """
    if timing.report is None or problem.mesh.frames == 1 or not any(timing.report.exchanges.values()):
        return {}
    around, exchange = _around(problem, fp8=timing.report.fp8.get(SelfAttention.layer, 0) > 0)
    around()
    sent = exchange.sent  # an attention's, of which all of a step are alike
    seconds = max(over_ranks(problem, _seconds(around, problem.device)))
    return {name: nbytes / sent * seconds for name, (_, nbytes) in timing.report.exchanges.items()}


def _around(problem: Problem, fp8: bool) -> tuple[Callable[[], None], Exchange]:
    """The exchanges around attention of one block, of a step that computes both halves of guidance.

    With `fp8` temporal attention gives e4m3, and scales are exchanged too.
    """
    ranks = problem.mesh.join(problem.device)
    assert ranks is not None
    adapter = adapter_for(problem.host)
    try:
        branches = [branch.weights for block in adapter.stack.blocks for branch in block.branches]
        weights = next(each for each in branches if isinstance(each, SelfAttention) and each.sequence != "spatial")
        heads, channels = weights.heads, adapter.stack.channels
        temporal = weights.sequence == "temporal"
    finally:
        adapter.restore()
    frames, tokens = problem.workload.grid
    exchange = ranks.exchange("frames")
    shards = Shards(near_even(frames, problem.mesh.frames), ranks.frames, exchange)
    batch = 2 // problem.mesh.guidance // problem.workload.forwards_per_step or 1
    own = shards.sizes[shards.rank]
    shape = (batch, own, tokens) if temporal else (batch, own * tokens)
    split, width = (2, channels) if temporal else (3, channels // heads)
    made = torch.zeros(*shape, 3, heads, channels // heads, dtype=problem.dtype, device=problem.device)
    small = fp8 and temporal
    given, scales = E4M3 if small else problem.dtype, made.new_zeros(batch, 1, tokens, dtype=torch.float32)

    def project(piece: Piece, place: Tensor | None) -> Tensor:
        return made[piece] if place is None else place

    def attend(piece: Piece, x: Tensor, place: Tensor | None) -> Tensor:
        return x.new_empty(*x.shape[:2], x.shape[split], width, dtype=given) if place is None else place

    def finish(piece: Piece, y: Tensor) -> None:
        pass

    def around() -> None:
        come = shards.largest(scales) if small else None
        shards.around(made.shape, split, width, made, given, project, attend, finish)
        if come is not None:
            come()

    return around, exchange


def _seconds(around: Callable[[], None], device: torch.device) -> float:
    """Of one attention, the median."""
    around()  # what is set up at the first time is no part of it

    def many() -> None:
        for _ in range(TIMES):
            around()

    run: Callable[[], object] = many
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"):
            many()
        run = graph.replay
    times = []
    for _ in range(5):
        start = clock.mark(device)
        run()
        times.append(clock.seconds(start, clock.mark(device)) / TIMES)
    return sorted(times)[len(times) // 2]
