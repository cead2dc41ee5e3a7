"""Video decoders on planes against the original's arithmetic in plain torch, and a decoder beside a transformer.

From latents to frames in host memory. `python -m bench.bench_decoding open_sora_plan_v110-65x512 --parts` also prints
where the time goes, and `--scale tiny --device cpu` tries it out.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from pab_kernels import workloads
from pab_kernels.config import PABConfig
from pab_kernels.measure import end_to_end
from pab_kernels.models import autoencoders
from pab_kernels.pipelines import generate
from pab_kernels.pipelines.decoding import VideoDecoder
from pab_kernels.runtime.accelerate import accelerate

from .common import median_ms, record

CASES = ("open_sora-360p-2s", "open_sora-480p-2s", "open_sora_plan_v110-65x512", "open_sora_plan_v120-93x480p")
WHOLE_FRAMES = 14 * 2**30
"""Bytes for pieces of Open-Sora-Plan's frames decoded whole: with weights and their packed copies below 16 GiB."""
GEMM = 8192


class Original(VideoDecoder):
    """The hosts' own code, eager and channels first, in the originals' pieces."""

    @property
    def on_planes(self) -> bool:
        """Never."""
        return False


class OriginalWhole(Original):
    """All at once, as the originals do until a script switches tiles on."""

    def tiling(self, latents: tuple[int, ...]) -> None:
        """None."""


def contenders(family: str) -> dict[str, Callable[[Any], VideoDecoder]]:
    """What makes a decoder of an autoencoder, by name. The first is the original, then comes what gives its numbers."""
    found: dict[str, Callable[[Any], VideoDecoder]] = {"original": Original, "planes": VideoDecoder}
    if family != "open_sora":
        found["original, whole"] = OriginalWhole
        found["planes, whole frames"] = partial(VideoDecoder, memory=WHOLE_FRAMES, seamless=True)
    return found


def compare(name: str, device: torch.device, tiny: bool, repeats: int, parts: bool) -> dict[str, float]:
    """Time every decoder of a workload; returns milliseconds."""
    workload = workloads.workload(name)
    workload = workload.tiny() if tiny else workload
    size = end_to_end.video_size(workload, tiny)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = end_to_end.TINY[workload.family] if tiny else {}
    vae = autoencoders.random_weights(workload.family, dtype=dtype, device=device, **config)
    latents = torch.randn(4, *size.latent, generator=torch.Generator().manual_seed(0)).to(device)
    found: dict[str, float] = {}
    frames: Any = None
    for contender, make in contenders(workload.family).items():
        decoder = make(vae)
        run = partial(decoder.decode, latents, size.frames)
        original = isinstance(decoder, Original)
        # On planes the first run compiles and the second captures graphs.
        seen = [run().frames for _ in range(1 if original else 3)][-1]
        if contender == "planes":
            difference = np.abs(seen.astype(np.int16) - frames).mean()
            assert difference < 2, f"planes differ from the original by {difference} of 255 in the mean"
            print(f"{name}: planes differ from the original by {difference:.3f} of 255 in the mean", flush=True)
        frames = seen
        seconds, peak = timed(run, device, repeats)
        found[contender] = seconds * 1e3
        report("decoding", f"{name} {size.frames}x{size.height}x{size.width}", contender, seconds, peak / 2**30, "GiB")
        if parts and not original:
            print(where(run, decoder), flush=True)
        del decoder, run  # graphs keep memory
        if device.type == "cuda":
            print(f"reserved {torch.cuda.max_memory_reserved(device) / 2**30:.1f} GiB", flush=True)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
    for a, b in (("original", "planes"), ("original, whole", "planes, whole frames"), ("original", "original, whole")):
        if a in found and b in found:
            print(f"{name}: {b} {found[a] / found[b]:.2f}x as fast as {a}", flush=True)
    return found


def timed(run: Callable[[], object], device: torch.device, repeats: int) -> tuple[float, int]:
    """Median seconds, and bytes in use at the peak (0 on a CPU). A run ends with its frames in host memory."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), torch.cuda.max_memory_allocated(device) if on_gpu else 0


def report(op: str, shape: str, backend: str, seconds: float, figure: float, unit: str) -> None:
    """A row of the results; on a CPU it is only printed."""
    if torch.cuda.is_available():
        record(op, shape, backend, seconds * 1e3, figure, unit)
    else:
        print(f"{op} {shape} {backend}: {seconds * 1e3:.1f} ms")


def where(run: Callable[[], object], decoder: VideoDecoder) -> str:
    """The longest ops of a run, graphs left out, with TFLOP/s of convolutions."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if decoder.on_planes:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    graphs, decoder._run = decoder._run, lambda name, z: decoder._decoder(name)(z)  # type: ignore[method-assign]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        run()
    decoder._run = graphs  # type: ignore[method-assign]
    rows = profile.key_averages(group_by_input_shape=True)
    attribute = "self_device_time_total" if decoder.on_planes else "self_cpu_time_total"
    total = sum(getattr(row, attribute) for row in rows if "::" in row.key)
    kinds: dict[str, float] = {}
    lines: list[str] = []
    for row in sorted(rows, key=lambda row: -getattr(row, attribute)):
        taken = getattr(row, attribute)
        if "::" not in row.key or not taken:
            continue
        kinds[row.key] = kinds.get(row.key, 0.0) + taken
        rate = ""
        if row.key == "pab::conv_planes":
            x, weight = row.input_shapes[:2]
            flop = 2.0 * row.count * x[0] * (x[1] - 1) * (x[2] - 1) * math.prod(weight)
            rate = f"{flop / taken / 1e6:.0f} TFLOP/s"
        if len(lines) < 16:
            lines.append(f"  {taken / 1e3:8.2f} ms {row.count:4} {row.key} {row.input_shapes[:2]} {rate}")
    shares = ", ".join(
        f"{key} {taken / 1e3:.1f}" for key, taken in sorted(kinds.items(), key=lambda kind: -kind[1])[:8]
    )
    return "\n".join([f"  {total / 1e3:.1f} ms in all: {shares}", *lines])


def beside(name: str, device: torch.device, tiny: bool, repeats: int) -> dict[str, float]:
    """Milliseconds of denoising a video and decoding another: one after the other, and at once on two streams.

    With the preset `fast`, where decoding is the largest share.
    """
    workload = workloads.workload(name)
    workload = workload.tiny() if tiny else workload
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = end_to_end.load(workload, dtype=dtype, device=device, tiny=tiny, with_text=False)
    size = end_to_end.video_size(workload, tiny)
    request = generate.Request([end_to_end.PROMPT], "", 4 if tiny else workload.steps, workload.guidance, (0,), size)
    config = PABConfig.preset(workload.family, "fast")
    if device.type == "cuda":
        config = dataclasses.replace(config, linear_precision="fp8")
    latents = torch.randn(4, *size.latent, generator=torch.Generator().manual_seed(0)).to(device)
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def decode() -> None:
        if stream is None:
            pipe.decode_one(latents, size)
            return
        with torch.cuda.stream(stream):
            pipe.decode_one(latents, size)

    def denoise() -> None:
        generate.denoise(pipe, request)

    def in_turn() -> None:
        denoise()
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(device))
        decode()

    def at_once() -> None:
        thread = threading.Thread(target=decode)
        thread.start()
        denoise()
        thread.join()

    found = {}
    with accelerate(pipe, config):
        for _ in range(3):
            in_turn()
        for key, run in (("in turn", in_turn), ("at once", at_once), ("in turn, again", in_turn)):
            seconds, _ = timed(run, device, repeats)
            found[key] = seconds * 1e3
            report("denoising and decoding of two videos", name, key, seconds, size.frames / seconds, "frames/s")
    print(f"at once: {found['in turn'] / found['at once']:.3f}x", flush=True)
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_decoding(benchmark, name):
    device = torch.device("cuda")
    found = compare(name, device, tiny=False, repeats=3, parts=False)
    benchmark.extra_info.update(found)
    benchmark.pedantic(lambda: None)


@pytest.mark.gpu
def test_decoding_beside_denoising(benchmark):
    benchmark.extra_info.update(beside("open_sora-360p-2s", torch.device("cuda"), tiny=False, repeats=3))
    benchmark.pedantic(lambda: None)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=CASES, help="workloads")
    parser.add_argument("--scale", choices=("full", "tiny"), default="full")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", action="store_true", help="print where the time on planes goes")
    parser.add_argument("--beside", action="store_true", help="decode beside denoising instead")
    arguments = parser.parse_args()
    device, tiny = torch.device(arguments.device), arguments.scale == "tiny"
    if device.type == "cuda" and not arguments.beside:
        a, b = (torch.randn(GEMM, GEMM, dtype=torch.bfloat16, device=device) for _ in range(2))
        ms = median_ms(lambda pair: pair[0] @ pair[1], [(a, b)])
        record("gemm", f"{GEMM}x{GEMM}x{GEMM}", "cublas", ms, 2 * GEMM**3 / ms / 1e9, "TFLOP/s")
    for name in arguments.names:
        if arguments.beside:
            beside(name, device, tiny, arguments.repeats)
        else:
            compare(name, device, tiny, arguments.repeats, arguments.parts)


if __name__ == "__main__":
    main()
