"""What a benchmark found, as plain values: about the run, and a row a contender."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

from pab_kernels.measure import info
from pab_kernels.measure.benchmark import Floor, Timing, relative_error
from pab_kernels.measure.contenders import CONTENDERS, Problem
from pab_kernels.measure.report import RATIOS

TOLERANCE = {"bfloat16": 3e-2, "float16": 1e-2, "float32": 1e-4}
"""Largest relative error of the latents after one step of this runtime, against the eager host.

The bare prediction may differ twice as much: in bfloat16 the eager host's own error is 2e-2 to 4e-2 (computed, against
float32, at full depth and a quarter of the width), while leaving out a kind of attention changes it by 1e-1 or more.
"""


def heading(problem: Problem, floor: Floor) -> str:
    """What runs, and the ceilings."""

    batch, frames, tokens, channels = floor.shape
    filled = "" if floor.gemm_filled is None else f", {floor.gemm_filled / 1e12:.0f} on enough tokens to fill the GPU"
    fp8_rate = fp8_floor = ""
    if floor.ceilings.fp8_flops is not None:
        fp8_rate = f"; fp8 GEMMs {floor.ceilings.fp8_flops / 1e12:.0f} TFLOP/s"
        fp8_floor = f"; in fp8 {floor.seconds(False, fp8=True):.3f} s and {floor.seconds(True, fp8=True):.3f} s"
    return (
        f"{problem.workload.name}: {len(problem.timesteps)} calls of [{batch}, {frames}, {tokens}, {channels}], "
        f"{str(problem.dtype).removeprefix('torch.')}, on {info.device_name(problem.device)}\n"
        f"{', '.join(f'{name} {version}' for name, version in info.versions().items())}\n"
        f"ceilings: GEMMs {floor.gemm_own / 1e12:.3g} TFLOP/s on the run's tokens{filled}; "
        f"copy {floor.ceilings.bandwidth / 1e12:.3g} TB/s{fp8_rate}\n"
        f"floor: {floor.seconds(False):.3f} s without PAB, {floor.seconds(True):.3f} s with PAB{fp8_floor}"
    )


def summary(problem: Problem, floor: Floor, command: str) -> dict[str, Any]:
    """Everything about the run but the contenders, as plain values; `command` repeats it."""

    workload = problem.workload
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "workload": workload.name,
        "family": workload.family,
        "video": list(workload.pixels),
        "shape": list(floor.shape),
        "text": [workload.text, workload.text_used],
        "timesteps": problem.timesteps,
        "pab": problem.config.to_dict(),
        "dtype": str(problem.dtype).removeprefix("torch."),
        "device": info.device_name(problem.device),
        "compile_scope": problem.compile_scope,
        "cache_device": problem.cache_device,
        "command": command,
        "commit": info.commit(),
        "machine": {"gpu": info.gpu(), "cpu": info.cpu()},
        "versions": info.versions(),
        "ceilings": {
            "gemm_flops": floor.ceilings.flops,
            "gemm_flops_own_tokens": floor.gemm_own,
            "gemm_flops_filled": floor.gemm_filled,
            "copy_bytes": floor.ceilings.bandwidth,
            "fp8_gemm_flops": floor.ceilings.fp8_flops,
        },
        "floor": {
            name: {
                "seconds": floor.seconds(pab),
                "seconds_fp8": None if floor.ceilings.fp8_flops is None else floor.seconds(pab, fp8=True),
                "flops": work.flops,
                "bytes": work.nbytes,
            }
            for name, pab, work in (("without PAB", False, floor.without), ("with PAB", True, floor.with_pab))
        },
    }


def rows(timings: Sequence[Timing], problem: Problem, floor: Floor) -> list[dict[str, Any]]:
    """One row a contender; ratios are how many times faster it is than another, on a mesh than itself on one GPU."""
    by_key = {timing.key: timing for timing in timings}

    def ratio(of: Timing, to: str) -> float | None:
        other = by_key[to].seconds if to in by_key else None
        return None if other is None or of.seconds is None else other / of.seconds

    found = []
    for timing in timings:
        contender, seconds, report = CONTENDERS[timing.name], timing.seconds, timing.report
        gpus, frames = timing.mesh.size, problem.workload.grid[0]
        share = 1.0 if timing.share is None else timing.share / frames
        nearest = contender.like if gpus == 1 else timing.name
        like = by_key.get(nearest) if timing.share is None else None
        difference = None
        if like is not None and like is not timing and like.latents is not None and timing.latents is not None:
            difference = relative_error(timing.latents, like.latents)
        least = floor.seconds(contender.pab, fp8=contender.fp8) / gpus * share
        label = contender.label if gpus == 1 else f"{contender.label}, {timing.mesh}"
        found.append(
            {
                "name": timing.key,
                "label": label if timing.share is None else f"{label}, {timing.share} of {frames} frames",
                "pab": contender.pab,
                "gpus": gpus,
                "seconds": seconds,
                "runs": timing.runs,
                "runs_differ": timing.runs_differ if len(timing.runs) > 1 else None,
                "step_seconds": timing.steps,
                "jitter_seconds": timing.jitter,
                "ms_per_step": None if seconds is None else seconds * 1e3 / len(problem.timesteps),
                **{f"against_{to}": ratio(timing, to) for to in RATIOS},
                "against_one": ratio(timing, timing.name) if gpus > 1 else None,
                "floor_share": None if seconds is None else least / seconds,
                "frames_per_second": None if seconds is None else problem.workload.pixels[0] * share / seconds,
                "peak_bytes": timing.peak_bytes,
                "reserved_bytes": timing.reserved_bytes,
                "cache_bytes": None if report is None else report.cache_bytes,
                "host_bytes": None if report is None else report.host_bytes,
                "graphs": None if report is None else report.graphs,
                "eager_because": None if report is None else report.eager,
                "variants": {} if report is None else {key: list(value) for key, value in report.seconds.items()},
                "exchanges": {} if report is None else {key: list(value) for key, value in report.exchanges.items()},
                "exchange_seconds": timing.exchange_seconds,
                "difference": difference,
                "difference_from": nearest,
                "warm_up_seconds": timing.warm_up,
                "error": timing.error,
            }
        )
    return found
