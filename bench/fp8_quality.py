"""What fp8 costs in quality, on a GPU with fp8 tensor cores: `python -m bench.fp8_quality [demo] [errors]`.

`demo` generates videos with the demo model in each form and compares them, frame by frame, with bfloat16 without PAB
and with PAB; and it checks whether they show what their prompts say. All linears are in fp8 here: the demo model is too
small for any to be chosen by its time. Its 216 channels are no multiple of 16, so the reference does its fp8 GEMMs, and
also its attention in e4m3, which no kernel serves at head_dim 72: what rounding costs is the same.

`errors` compares one step at full size and random weights with float32: the relative error of the latents after one
step of guidance and sampler, and of the bare prediction.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from pab_kernels import PABConfig, accelerate, quality
from pab_kernels import workloads as named
from pab_kernels.demo.evaluate import accuracy, generate
from pab_kernels.measure.benchmark import advance, predict, relative_error
from pab_kernels.measure.contenders import Problem
from pab_kernels.ops.backends import BACKENDS
from pab_kernels.pipelines.demo import DemoPipeline
from pab_kernels.pipelines.demo_captions import evaluation_prompts

PROMPTS = 16
PAB = PABConfig.preset("latte")
FP8: dict[str, Any] = {"linear_precision": "fp8-all"}
FORMS = {
    "bf16": PABConfig(),
    "bf16, PAB": PAB,
    "fp8 linears": PABConfig(**FP8),
    "fp8 linears, PAB": dataclasses.replace(PAB, **FP8),
    "fp8 linears and attention, PAB": dataclasses.replace(PAB, attention_precision="fp8", **FP8),
    "fp8 slots, PAB": dataclasses.replace(PAB, cache_dtype="fp8"),
    "int8 slots, PAB": dataclasses.replace(PAB, cache_dtype="int8"),
    "fp8 linears and slots, PAB": dataclasses.replace(PAB, cache_dtype="fp8", **FP8),
}
WORKLOADS = ("open_sora-144p-2s", "open_sora_plan_v120-29x480p")
"""Head dimensions 72 and 96."""

console = Console(width=150)


def demo() -> Table:
    """Mean PSNR and SSIM of all videos in each form."""
    items = evaluation_prompts(PROMPTS, seed=1)
    pipe = DemoPipeline.from_pretrained(None, dtype=torch.bfloat16, device="cuda")
    videos: dict[str, np.ndarray] = {}
    for name, config in FORMS.items():
        start = time.perf_counter()
        with accelerate(pipe, config):
            videos[name] = generate(pipe, items)
        console.print(f"{name}: made in {time.perf_counter() - start:.0f} s", highlight=False)
    columns = ("form", "PSNR against bf16", "least", "SSIM", "PSNR against bf16, PAB", "least", "SSIM", "as prompted")
    table = Table(*columns, title=f"demo model, {PROMPTS} prompts and seeds")
    for name, made in videos.items():
        cells: list[str] = []
        for baseline in ("bf16", "bf16, PAB"):
            if name in ("bf16", baseline):
                cells += ["", "", ""]
                continue
            scores = [quality.compare(*pair) for pair in zip(made, videos[baseline], strict=True)]
            psnr = [score.psnr for score in scores]
            cells += [f"{np.mean(psnr):.1f} dB", f"{min(psnr):.1f}", f"{np.mean([s.ssim for s in scores]):.4f}"]
        table.add_row(name, *cells, ", ".join(f"{key} {value:.2f}" for key, value in accuracy(made, items).items()))
    return table


def errors() -> Iterator[str]:
    """For each workload the errors of one step against the host in float32."""
    for name in WORKLOADS:
        exact = Problem.make(named.workload(name), PABConfig(), torch.device("cuda"), torch.float32)
        wanted, after = _step(exact, None)
        problem = dataclasses.replace(
            exact,
            host=exact.host.to(torch.bfloat16),
            inputs=exact.workload.inputs("cuda", torch.bfloat16),
            dtype=torch.bfloat16,
        )
        for form, config in {"bf16, eager": None, "bf16": PABConfig(), "fp8 linears": PABConfig(**FP8)}.items():
            prediction, latents = _step(problem, config)
            yield (
                f"{name}, {form}: latents {relative_error(latents, after):.1e}, "
                f"prediction {relative_error(prediction, wanted):.1e}"
            )


@torch.no_grad()
def _step(problem: Problem, config: PABConfig | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Prediction and latents of the first step; with `config` None by the host itself."""
    latents = problem.inputs.latents
    if config is None:
        prediction = predict(problem.host, problem, latents, 0)
    else:
        with accelerate(problem.host, config, cuda_graphs=False) as handle:
            handle.begin(problem.timesteps)
            prediction = predict(problem.host, problem, latents, 0)
    return prediction, advance(problem, latents, prediction, 0)


def main(parts: list[str]) -> None:
    start = time.perf_counter()
    BACKENDS["fp8_attention"] = BACKENDS["fp8_attention"][-1:]  # the reference
    if "demo" in parts:
        console.print(demo())
    if "errors" in parts:
        for line in errors():
            console.print(line, highlight=False)
    console.print(f"{torch.cuda.get_device_name()}, {time.perf_counter() - start:.0f} s", highlight=False)


if __name__ == "__main__":
    main(sys.argv[1:] or ["demo", "errors"])
