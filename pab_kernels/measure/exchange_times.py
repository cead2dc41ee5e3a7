"""What a step's exchanges between ranks take by themselves: of the sizes that a run has, with nothing to wait for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pab_kernels import clock
from pab_kernels.blocks.branches import SelfAttention
from pab_kernels.blocks.sharded import Shards, near_even
from pab_kernels.measure.benchmark import Timing, over_ranks
from pab_kernels.measure.contenders import Problem
from pab_kernels.models import adapter_for

PAIRS = 8
"""Of exchanges that are timed together, around attention that does nothing."""


def measure(problem: Problem, timing: Timing) -> dict[str, float]:
    """Seconds a step, for each variant that the run had; nothing where frames are not split. All ranks call it.

    The median of a few, of the rank that took longest. On a GPU the exchanges are in a graph, as in a run.
    """
    if timing.report is None or problem.mesh.frames == 1 or not any(timing.report.exchanges.values()):
        return {}
    pair = _pair(problem)
    seconds = max(over_ranks(problem, _seconds(pair, problem.device)))
    return {name: calls / 2 * seconds for name, (calls, _) in timing.report.exchanges.items()}


def _pair(problem: Problem) -> Callable[[], Tensor]:
    """The two exchanges around attention of one block, of a step that computes both halves of guidance."""
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
    shards = Shards(near_even(frames, problem.mesh.frames), ranks.frames, ranks.exchange("frames"))
    batch = 2 // problem.mesh.guidance // problem.workload.forwards_per_step or 1
    own = shards.sizes[shards.rank]
    rows = (own, tokens) if temporal else (own * tokens,)
    qkv = torch.zeros(batch, own, tokens, 3 * channels, dtype=problem.dtype, device=problem.device)
    buffer = shards.buffer("qkv", qkv.shape, qkv)
    qkv = (qkv if buffer is None else buffer).view(batch, *rows, 3, heads, channels // heads)

    split, width = (2, channels) if temporal else (3, channels // heads)

    def attend(x: Tensor, place: Tensor | None) -> Tensor:
        return x.new_empty(*x.shape[:2], x.shape[split], width) if place is None else place

    return lambda: shards.around(qkv, split, width, attend)


def _seconds(pair: Callable[[], Tensor], device: torch.device) -> float:
    """Of one pair, the median."""
    pair()  # what is set up at the first time is no part of it

    def many() -> None:
        for _ in range(PAIRS):
            pair()

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
        times.append(clock.seconds(start, clock.mark(device)) / PAIRS)
    return sorted(times)[len(times) // 2]
