"""Text to video with and without Pyramid Attention Broadcast: what `pab generate` does."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.latte.pipeline_latte import LattePipeline
from torch import Tensor

from pab_kernels import quality
from pab_kernels.config import PRESETS, PABConfig
from pab_kernels.distributed.mesh import Mesh
from pab_kernels.pipelines import latents, memory, samplers
from pab_kernels.pipelines.arguments import check_steps, seeds_of
from pab_kernels.pipelines.demo import DemoPipeline
from pab_kernels.pipelines.latte import LatteLatents
from pab_kernels.pipelines.loading import Pipeline, Source, text_encoder_bytes
from pab_kernels.pipelines.open_sora import OpenSoraPipeline
from pab_kernels.pipelines.sizes import VideoSize
from pab_kernels.pipelines.text_to_video import TextToVideoPipeline
from pab_kernels.quality import Frames
from pab_kernels.runtime.accelerate import accelerate
from pab_kernels.runtime.handle import PABHandle
from pab_kernels.runtime.report import Report
from pab_kernels.schedule import StepVariant


@dataclass(frozen=True)
class Defaults:
    """A family's own steps, guidance scale, and PAB preset."""

    steps: int
    guidance: float
    preset: str


DEFAULTS = {
    "demo": Defaults(30, 2.0, "latte"),
    "latte": Defaults(50, 7.5, "latte"),
    "open_sora": Defaults(30, 7.0, "open_sora"),
    "open_sora_plan_v110": Defaults(150, 7.5, "open_sora_plan_v110"),
    "open_sora_plan_v120": Defaults(100, 7.5, "open_sora_plan_v120"),
}


@dataclass(frozen=True)
class Request:
    """What to generate: a video for each prompt. One seed s stands for s, s + 1, ...; size None is the pipeline's.

    Seeds may be NumPy's, of up to 64 bits.
    """

    prompts: Sequence[str]
    negative_prompt: str | None = None
    steps: int = 30
    guidance: float = 2.0
    seeds: Sequence[int] = (0,)
    size: VideoSize | None = None

    def __post_init__(self) -> None:
        count = len(self.prompts)
        if count == 0:
            raise ValueError("prompt must be given at least once")
        if len(self.seeds) not in (1, count):
            raise ValueError(f"seed must be given once or for each of {count} prompts, got {len(self.seeds)}")
        check_steps(self.steps)  # here, so that what is wrong is known before anything is loaded
        _ = self.all_seeds

    @property
    def all_seeds(self) -> list[int]:
        """One for each prompt."""
        count = len(self.prompts)
        return seeds_of(self.seeds if len(self.seeds) == count else self.seeds[0], count)


@dataclass(frozen=True)
class Generated:
    """What a run gave.

    `frames` are videos [T, H, W, 3] uint8, None where there is no decoder; `latents` float32 [B, C, T, H, W] on the
    CPU, None where the pipeline keeps them to itself; `report` is the runtime's, None without PAB.
    """

    frames: tuple[Frames, ...] | None
    latents: Tensor | None
    finite: bool
    """Whether all frames and latents are."""
    seconds: float
    """Of everything: text, denoising, decoding."""
    parts: Mapping[str, float]
    """Seconds of "text", "denoising" and "decoding", as far as the pipeline takes them apart."""
    report: Report | None
    peak_bytes: int | None
    """Most GPU memory in use at once, None on a CPU."""


@dataclass(frozen=True)
class Step:
    """A step that was taken, the `done`-th of `total`; on a GPU the one before it is complete.

    `variant` is what it did, None without PAB. `sample` [B, C, T, H, W] are latents, or of the demo the pixels in
    [-1, 1] that it now takes the video to have.
    """

    done: int
    total: int
    variant: StepVariant | None
    sample: Tensor


OnStep = Callable[[Step], None]


def pab_settings(text: str, **given: str | None) -> PABConfig | None:
    """What `--pab` means: "off", the name of a preset ("latte", "latte:347"), or a YAML file.

    Parameters
    ----------
    text : str
    given : str or None
        Settings that an option of the command line gives instead, None for those that it does not.

    Returns
    -------
    PABConfig or None
        None for "off", unless another setting needs this runtime all the same.

    Raises
    ------
    ValueError
        None of these, or a bad file or setting; the message says what is allowed.
    """
    changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if text == "off":
        return PABConfig(**changes) if changes else None
    family, _, variant = text.partition(":")
    if family in PRESETS:
        try:
            preset = PABConfig.preset(family, variant or None)
        except ValueError as error:
            raise ValueError(f"pab: got {text!r}: {error}") from error
        return dataclasses.replace(preset, **changes)
    if Path(text).is_file():
        return dataclasses.replace(PABConfig.from_yaml(text), **changes)
    raise ValueError(f"pab: got {text!r}, must be off, a YAML file, or a preset: {', '.join(PRESETS)}")


def check_offload(family: str) -> None:
    """Raise ValueError for a family whose text encoder stays where it is."""
    if family in ("demo", "latte"):
        raise ValueError(f"offload_text: got it for {family}, must be of Open-Sora or Open-Sora-Plan")


def check_memory(
    source: Source,
    request: Request,
    config: PABConfig | None,
    device: torch.device,
    dtype: torch.dtype,
    cache_device: str | None = None,
    decode_memory: int | None = None,
    seamless: bool = False,
    offload_text: bool = False,
    mesh: Mesh | None = None,
) -> None:
    """Refuse a run that will not fit in the GPU's free memory; on a CPU only a bound that no piece of a video fits.

    The decoder's weights lie there all the time, its pieces once the latents are made. With `offload_text` the text
    encoder is there before the run is, and not beside it. Of a `mesh` it is about the rank that has most.

    Raises
    ------
    ValueError
        As `memory.check_fits`, `memory.decoder_memory` and `check_offload`.
    """
    if offload_text:
        check_offload(source.family)
    if request.size is None:
        return
    on_gpu, decoder = device.type == "cuda", None
    if source.decodes and source.family != "demo" and (on_gpu or decode_memory is not None):
        decoder = memory.decoder_memory(source.family, request.size.latent, dtype, decode_memory, seamless)
    if on_gpu:
        rows = len(request.prompts) * (2 if request.guidance > 1 else 1)
        size, family, on_host = request.size, source.family, cache_device == "cpu"
        if family == "open_sora":
            timesteps = samplers.rflow_timesteps(request.steps, size.height, size.width, size.latent[0])
        else:
            timesteps = samplers.family_timesteps(family, request.steps)
        more: dict[str, Any] = {"timesteps": tuple(timesteps), "mesh": mesh or Mesh()}
        run = memory.PlannedRun(family, size, config or PABConfig(), rows, dtype, on_host, **more)
        need, text = memory.estimate(run), text_encoder_bytes(source, dtype)
        weights, piece = decoder or (0, 0)
        beside = weights + max(0, piece - need.activations)
        extra = max(beside, need.weights + weights + text - need.total) if offload_text else beside + text
        memory.check_fits(run, torch.cuda.mem_get_info(device)[0], extra=extra)


def generate(
    pipe: Pipeline,
    request: Request,
    config: PABConfig | None,
    on_step: OnStep | None = None,
    cache_device: str | None = None,
    sinks: Sequence[Callable[[Frames], None]] | None = None,
    given: tuple[Tensor, Tensor] | None = None,
    offload_text: bool = False,
    handle: PABHandle | None = None,
    mesh: Mesh | None = None,
) -> Generated:
    """Generate the videos of `request`; with `config` None the pipeline runs as its authors wrote it.

    Parameters
    ----------
    pipe : Pipeline
    request : Request
    config : PABConfig or None
    on_step : callable, optional
        Called with a `Step` after every call of the transformer.
    cache_device : str, optional
        As for `accelerate`.
    sinks : sequence of callable, optional
        For each prompt one that takes frames of its video as they are decoded.
    given : (latents [1, C, T, H, W], mask [1, T]), optional
        Frames that Open-Sora goes on from, for every prompt.
    offload_text : bool
        The text encoder waits in host memory while the transformer runs.
    handle : PABHandle, optional
        The runtime of `config` and `cache_device` that is on the pipeline already; it stays, with its slots and graphs.
    mesh : Mesh, optional
        As for `accelerate`: every rank makes this call.
    """
    device = pipe.transformer.device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    if isinstance(pipe, TextToVideoPipeline):
        pipe.text_seconds, pipe.offload_text = 0.0, offload_text
    with ExitStack() as stack:
        if handle is None and config is not None:
            handle = stack.enter_context(accelerate(pipe, config, cache_device=cache_device, mesh=mesh))
        frames, hidden = denoise(pipe, request, None if on_step is None else _Steps(on_step, handle), given)
        report = None if handle is None else handle.report()
    if hidden is not None:
        hidden = hidden.cpu()  # waits for the GPU
    denoised = time.perf_counter()
    finite = (frames is None or bool(np.isfinite(frames).all())) and (hidden is None or bool(hidden.isfinite().all()))
    videos = None if frames is None else tuple(_bytes(frames))
    if isinstance(pipe, TextToVideoPipeline) and pipe.vae is not None and hidden is not None:
        videos, whole = _decode(pipe, hidden, request, sinks)
        finite &= whole
    elif videos is not None and sinks is not None:
        for sink, video in zip(sinks, videos, strict=True):
            sink(video)
    end = time.perf_counter()
    parts = {"denoising": denoised - start}
    if isinstance(pipe, TextToVideoPipeline):
        parts = {"text": pipe.text_seconds, "denoising": denoised - start - pipe.text_seconds}
        if videos is not None:
            parts["decoding"] = end - denoised
    return Generated(
        frames=videos,
        latents=hidden,
        finite=finite,
        seconds=end - start,
        parts=parts,
        report=report,
        peak_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else None,
    )


def _decode(
    pipe: TextToVideoPipeline, hidden: Tensor, request: Request, sinks: Sequence[Callable[[Frames], None]] | None
) -> tuple[tuple[Frames, ...], bool]:
    """Videos of latents, whose frames go to their sinks as they are done; and whether all numbers were finite."""
    size = request.size
    if isinstance(pipe, LatteLatents):
        size = pipe.size(1 if size is not None and size.frames == 1 else None)
    assert size is not None
    done = [pipe.decode_one(row, size, None if sinks is None else sinks[i]) for i, row in enumerate(hidden)]
    return tuple(video.frames for video in done), all(video.finite for video in done)


class _Steps:
    """A pipeline's callback after each step. On a GPU it waits for the step before, else the loop would run ahead."""

    def __init__(self, on_step: OnStep, handle: PABHandle | None) -> None:
        self.on_step, self.handle = on_step, handle
        self.last: torch.cuda.Event | None = None

    def __call__(self, pipe: Any, index: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
        if tensors["latents"].is_cuda:
            if self.last is not None:
                self.last.synchronize()
            self.last = torch.cuda.current_stream(tensors["latents"].device).record_event()
        schedule = None if self.handle is None else self.handle.schedule
        variant = None if schedule is None else schedule[index]
        sample = tensors.get("denoised", tensors["latents"])
        self.on_step(Step(index + 1, len(pipe.scheduler.timesteps), variant, sample))
        return {}


def preview(pipe: Pipeline, step: Step) -> Frames:
    """The middle frame of every video, side by side [1, H, B * W, 3]: pixels of the demo, else a look at latents."""
    middle = step.sample.shape[2] // 2
    if isinstance(pipe, DemoPipeline):
        pixels = (step.sample[:, :, middle].float().cpu().numpy() / 2 + 0.5).clip(0, 1)
        return np.concatenate(list(_bytes(pixels.transpose(0, 2, 3, 1))), axis=1)[None]
    return np.concatenate([latents.first_look(video)[middle] for video in step.sample], axis=1)[None]


def _bytes(frames: np.ndarray) -> np.ndarray:
    """Frames in [0, 1] as uint8; what is not finite becomes black."""
    return (np.nan_to_num(frames, nan=0.0) * 255).round().clip(0, 255).astype(np.uint8)


def denoise(
    pipe: Pipeline,
    request: Request,
    after_step: _Steps | None = None,
    given: tuple[Tensor, Tensor] | None = None,
) -> tuple[np.ndarray | None, Tensor | None]:
    """Frames [B, T, H, W, 3] in [0, 1] of pipelines that decode themselves, or latents."""
    arguments: dict[str, Any] = {
        "negative_prompt": request.negative_prompt,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance,
        "callback_on_step_end": after_step,
    }
    prompts, size = list(request.prompts), request.size
    if isinstance(pipe, LattePipeline):
        pipe.set_progress_bar_config(disable=True)
        arguments["negative_prompt"] = request.negative_prompt or ""  # diffusers' takes no None
        if size is not None and size.frames == 1:
            arguments |= {"video_length": 1, "enable_temporal_attentions": False}
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in request.all_seeds]
        return np.asarray(pipe(prompts, generator=generators, output_type="np", **arguments).frames), None
    arguments["seed"] = request.all_seeds
    if isinstance(pipe, DemoPipeline):
        return pipe(prompts, **arguments).cpu().numpy(), None
    if isinstance(pipe, LatteLatents) or size is None:
        if size is not None and size.frames == 1:
            arguments |= {"frames": 1, "enable_temporal_attentions": False}
        return None, pipe(prompts, **arguments)
    if isinstance(pipe, OpenSoraPipeline):
        if given is not None:
            first, mask = (part.expand(len(prompts), *part.shape[1:]) for part in given)
            arguments |= {"given_latents": first, "given_mask": mask}
        return None, pipe(prompts, size=size, **arguments)
    return None, pipe(prompts, frames=size.frames, height=size.height, width=size.width, **arguments)


def comparison(result: Generated, baseline: Generated) -> dict[str, Any]:
    """How `result` differs from `baseline`, as plain values: speed-up, and quality of each video or latents' distance.

    `latents_difference` is ||result - baseline|| / ||baseline||.
    """
    found: dict[str, Any] = {"speed_up": baseline.seconds / result.seconds}
    if result.frames is not None and baseline.frames is not None:
        pairs = zip(result.frames, baseline.frames, strict=True)
        return found | {"videos": [dataclasses.asdict(quality.compare(*pair)) for pair in pairs]}
    assert result.latents is not None
    assert baseline.latents is not None
    distance = (result.latents - baseline.latents).norm() / baseline.latents.norm()
    return found | {"latents_difference": float(distance)}


def summary(results: Mapping[str, Generated], request: Request) -> dict[str, Any]:
    """The request and its runs as plain values, as `pab generate --json` prints them."""
    runs = list(results.values())
    return {
        "prompts": list(request.prompts),
        "negative_prompt": request.negative_prompt,
        "seeds": request.all_seeds,
        "steps": request.steps,
        "guidance": request.guidance,
        "runs": {
            name: {
                "seconds": run.seconds,
                "parts": dict(run.parts),
                "finite": run.finite,
                "peak_bytes": run.peak_bytes,
                "report": None if run.report is None else dataclasses.asdict(run.report),
            }
            for name, run in results.items()
        },
        "comparison": comparison(runs[-1], runs[0]) if len(runs) > 1 else None,
    }
