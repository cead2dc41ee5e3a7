"""What all benchmarks share: times without launch gaps, the ceiling of this GPU, and rows in results.csv."""

from __future__ import annotations

import csv
import datetime
import functools
import os
import statistics
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

RESULTS = Path(__file__).parent / "results.csv"
COLUMNS = ("date", "gpu", "commit", "op", "shape", "dtype", "backend", "ms", "figure", "unit")

Inputs = TypeVar("Inputs")


def rotations(nbytes: int) -> int:
    """How many input sets of `nbytes` to rotate among, so that together they are four times the L2 cache."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(1, min(16, -(-4 * cache // max(nbytes, 1))))


def median_ms(run: Callable[[Inputs], object], inputs: Sequence[Inputs], replays: int = 30) -> float:
    """Median time of one call in milliseconds.

    Parameters
    ----------
    run : callable
        Takes one of `inputs`. Must be capturable in a CUDA graph.
    inputs : sequence
        Sets of inputs, called in turn. Give as many as `rotations` says, and none is found in the L2 cache.
    replays : int
        How many replays to take the median of. A replay makes every call at least once, and 8 calls at least, so
        that launch gaps and the resolution of events do not count.

    Returns
    -------
    float
        Milliseconds.
    """
    rounds = -(-8 // len(inputs))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles and allocates outside the capture
        for each in inputs:
            run(each)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for each in inputs:
                run(each)
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / (rounds * len(inputs)))
    return statistics.median(times)


@functools.cache
def copy_bandwidth() -> float:
    """GB/s of a copy of 1 GiB by a kernel, bytes read plus bytes written: the ceiling for whatever is memory bound.

    `Tensor.copy_` is a memory copy node in a graph: at this size it ran at two thirds of the speed on an H200.
    """
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(lambda x: torch.mul(x, 1.0, out=target), [source]) / 1e6


@functools.cache
def _commit() -> str:
    named = os.environ.get("PAB_COMMIT")  # for a copy of the tree without its history
    if named:
        return named
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def record(op: str, shape: object, backend: str, ms: float, figure: float, unit: str, dtype: str = "bfloat16") -> None:
    """Append a row to results.csv, and print it.

    Parameters
    ----------
    op, backend : str
        What ran, and on which backend.
    shape : object
        Printed as it is.
    ms : float
        Median time of one call.
    figure, unit : float, str
        The rate that counts for this op, in GB/s or TFLOP/s.
    dtype : str
        Of the inputs.
    """
    today = datetime.date.today().isoformat()
    row = (
        today,
        torch.cuda.get_device_name(),
        _commit(),
        op,
        shape,
        dtype,
        backend,
        f"{ms:.4f}",
        f"{figure:.1f}",
        unit,
    )
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(COLUMNS)
        writer.writerow(row)
    print(f"{op} {shape} {dtype} {backend}: {ms:.4f} ms, {figure:.0f} {unit}")
