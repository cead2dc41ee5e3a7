"""The scaling plot of docs/performance.md from rows of results.csv: `python -m bench.scaling docs/images/scaling.svg`

A line for each workload in fp8 with PAB: for each number of GPUs how many times as fast as one GPU at the same commit,
on the mesh and at the commit where that is most.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results.csv"
RUN = "runtime-fp8+pab"


def gpus(backend: str) -> int | None:
    """Of a row's run; None where it is another one."""
    name, _, mesh = backend.partition(" ")
    if name != RUN or mesh.startswith("of "):
        return None
    axes = dict(axis.split("=") for axis in mesh.split(",")) if mesh else {}
    return int(axes.get("guidance", 1)) * int(axes.get("frames", 1))


def speed_ups(rows: list[dict[str, str]]) -> dict[str, dict[int, float]]:
    """For each workload, by number of GPUs: times as fast as one at the same commit, where that is most."""
    fastest: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        number = gpus(row["backend"]) if row["op"] == "denoising run" else None
        if number is not None:
            times = fastest.setdefault((row["shape"], row["commit"]), {})
            times[number] = min(times.get(number, float("inf")), float(row["ms"]))
    found: dict[str, dict[int, float]] = {}
    for (shape, _), times in fastest.items():
        if 1 in times and len(times) > 1:
            line = found.setdefault(shape, {})
            line |= {number: max(line.get(number, 0.0), times[1] / ms) for number, ms in times.items()}
    return {shape: dict(sorted(each.items())) for shape, each in sorted(found.items())}


def plot(lines: Mapping[str, Mapping[int, float]]) -> Figure:
    """Times as fast over GPUs, with the diagonal."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    most = max(number for line in lines.values() for number in line)
    axes.plot([1, most], [1, most], color="#999999", linestyle=":", label="as many times as GPUs")
    for shape, line in lines.items():
        axes.plot(list(line), list(line.values()), marker="o", label=shape)
    axes.set(xlabel="NVIDIA H200s", ylabel="times as fast as one", xticks=range(1, most + 1))
    axes.legend(fontsize=8)
    return figure


def main() -> None:
    with RESULTS.open(newline="", encoding="utf-8") as file:
        lines = speed_ups(list(csv.DictReader(file)))
    for shape, line in lines.items():
        print(shape, {number: round(value, 2) for number, value in line.items()})
    with matplotlib.rc_context({"svg.hashsalt": "scaling"}):
        plot(lines).savefig(sys.argv[1], format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
