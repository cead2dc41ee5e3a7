"""One whole accelerated run of each family at its smallest, eager and from graphs, to be watched by a memory checker.

    compute-sanitizer --tool memcheck --error-exitcode 1 python -m bench.memcheck [WORKLOAD ...]

Heads have the head_dim of the real models (72, 96), so that the kernels are those of real runs; prints a line a run.
"""

from __future__ import annotations

import dataclasses
import sys
import time
import traceback
from typing import Any

import torch
from torch import Tensor

from pab_kernels import PABConfig, accelerate
from pab_kernels.workloads import WORKLOADS

STEPS = (900.0, 700.0, 600.0, 500.0)
"""Variants: all computed, all broadcast; each twice, so that the second comes from a graph in the second run."""
PAB = PABConfig(
    spatial_broadcast=True, spatial_threshold=(100, 950), spatial_range=2,
    temporal_broadcast=True, temporal_threshold=(100, 950), temporal_range=2,
    cross_broadcast=True, cross_threshold=(100, 950), cross_range=2,
)  # fmt: skip
NAMES = ("open_sora-144p-2s", "latte-16x512", "open_sora_plan_v110-65x512", "open_sora_plan_v120-29x480p")


def small(name: str) -> Any:
    """The tiny workload with two heads of the real head_dim and one layer."""
    tiny = WORKLOADS[name].tiny()
    width = 96 if "v120" in name else 72
    model = dict(tiny.model)
    if tiny.family == "open_sora":
        model |= {"depth": 1, "hidden_size": 2 * width}
    else:
        model |= {"num_layers": 1, "attention_head_dim": width, "cross_attention_dim": 2 * width}
    return dataclasses.replace(tiny, model=model)


@torch.no_grad()
def run(name: str, graphs: bool) -> Tensor:
    """Two runs through the runtime; predictions of the second."""
    workload = small(name)
    host, inputs = workload.host("cuda", torch.bfloat16), workload.inputs("cuda", torch.bfloat16)
    latents = torch.cat([inputs.latents] * 2).bfloat16()
    outputs: list[Tensor] = []
    with accelerate(host, PAB, cuda_graphs=graphs) as handle:
        for _ in range(2):
            handle.begin(STEPS)
            outputs.clear()
            for t in torch.tensor(STEPS, device="cuda"):
                out = host(latents, timestep=t.expand(2), **inputs.given)
                outputs.append(out if isinstance(out, Tensor) else out[0])
        report = handle.report()
    assert report.broadcast["spatial"] == 2
    assert not graphs or report.graphs == 2, report.eager
    return torch.stack(outputs).float()


def main() -> int:
    """Exit code 1 where a run failed or is not finite."""
    failed = 0
    for name in sys.argv[1:] or NAMES:
        for graphs in (False, True):
            start = time.perf_counter()
            try:
                out = run(name, graphs)
                torch.cuda.synchronize()
                fine = bool(out.isfinite().all())
                words = f"finite {fine}, mean magnitude {float(out.abs().mean()):.3f}"
            except Exception:
                traceback.print_exc()
                fine, words = False, "failed"
            failed += not fine
            how = "graphs" if graphs else "eager"
            print(f"{name}, {how}: {words}, {time.perf_counter() - start:.1f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
