"""Text to video with and without Pyramid Attention Broadcast: what `pab generate` does."""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.latte.pipeline_latte import LattePipeline
from torch import Tensor

from pab_kernels import figures, latents, memory
from pab_kernels.config import PRESETS, PABConfig
from pab_kernels.pipelines.demo import DemoPipeline
from pab_kernels.pipelines.latte import LatteLatents
from pab_kernels.pipelines.loading import Pipeline, Source, text_encoder_bytes
from pab_kernels.pipelines.open_sora import OpenSoraPipeline
from pab_kernels.pipelines.sizes import FPS, VideoSize
from pab_kernels.quality import Frames
from pab_kernels.runtime import Report, accelerate


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
    """What to generate: a video for each prompt. One seed s stands for s, s + 1, ...; size None is the pipeline's."""

    prompts: Sequence[str]
    negative_prompt: str = ""
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

    @property
    def all_seeds(self) -> list[int]:
        """One for each prompt."""
        if len(self.seeds) == len(self.prompts):
            return list(self.seeds)
        return [self.seeds[0] + i for i in range(len(self.prompts))]


@dataclass(frozen=True)
class Generated:
    """What a run gave.

    `frames` are videos [T, H, W, 3] uint8, None where there is no decoder; `latents` float32 [B, C, T, H, W] on the
    CPU, None where the pipeline keeps them to itself; `report` is the runtime's, None without PAB.
    """

    frames: tuple[Frames, ...] | None
    latents: Tensor | None
    seconds: float
    """Of everything: text, denoising, decoding."""
    report: Report | None
    peak_bytes: int | None
    """Most GPU memory in use at once, None on a CPU."""

    @property
    def finite(self) -> bool:
        """Whether all latents are."""
        return self.latents is not None and bool(self.latents.isfinite().all())


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
        return dataclasses.replace(PABConfig.preset(family, variant or None), **changes)
    if Path(text).is_file():
        return dataclasses.replace(PABConfig.from_yaml(text), **changes)
    raise ValueError(f"pab: got {text!r}, must be off, a YAML file, or a preset: {', '.join(PRESETS)}")


def check_output(output: Path, source: Source) -> None:
    """Raise ValueError for a file that cannot be written, before anything is generated."""
    if output.suffix not in (".mp4", ".gif"):
        raise ValueError(f"output: got {output.name!r}, must end in .mp4 or .gif")
    if output.suffix == ".mp4" and source.decodes and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise ValueError(f"output: got {output.name!r}, must end in .gif: .mp4 needs `pip install imageio[ffmpeg]`")


def check_memory(
    source: Source,
    request: Request,
    config: PABConfig | None,
    device: torch.device,
    dtype: torch.dtype,
    cache_device: str | None = None,
) -> None:
    """Refuse a run that will not fit in the GPU's free memory; nothing is checked on a CPU.

    Raises
    ------
    ValueError
        As `memory.check_fits`.
    """
    if device.type == "cuda" and request.size is not None:
        rows = len(request.prompts) * (2 if request.guidance > 1 else 1)
        run = memory.PlannedRun(source.family, request.size, config or PABConfig(), rows, dtype, cache_device == "cpu")
        memory.check_fits(run, torch.cuda.mem_get_info(device)[0], extra=text_encoder_bytes(source, dtype))


def generate(
    pipe: Pipeline,
    request: Request,
    config: PABConfig | None,
    on_step: Callable[[int, int], None] | None = None,
    cache_device: str | None = None,
) -> Generated:
    """Generate the videos of `request`; with `config` None the pipeline runs as its authors wrote it.

    Parameters
    ----------
    pipe : Pipeline
    request : Request
    config : PABConfig or None
    on_step : callable, optional
        Called as ``on_step(done, total)`` after every call of the transformer.
    cache_device : str, optional
        As for `accelerate`.
    """
    on_gpu = pipe.transformer.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with nullcontext() if config is None else accelerate(pipe, config, cache_device=cache_device) as handle:
        frames, hidden = _run(pipe, request, on_step)
        report = None if handle is None else handle.report()
    if hidden is not None:
        hidden = hidden.cpu()  # waits for the GPU
    return Generated(
        frames=None if frames is None else tuple((frames * 255).round().clip(0, 255).astype(np.uint8)),
        latents=hidden,
        seconds=time.perf_counter() - start,
        report=report,
        peak_bytes=torch.cuda.max_memory_allocated() if on_gpu else None,
    )


def _run(
    pipe: Pipeline, request: Request, on_step: Callable[[int, int], None] | None
) -> tuple[np.ndarray | None, Tensor | None]:
    """Frames [B, T, H, W, 3] in [0, 1], and latents."""
    arguments: dict[str, Any] = {
        "negative_prompt": request.negative_prompt,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance,
    }
    prompts = list(request.prompts)
    if isinstance(pipe, LattePipeline):

        def callback(_pipe: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if on_step is not None:
                on_step(index + 1, request.steps)
            return tensors

        pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in request.all_seeds]
        result = pipe(prompts, generator=generators, output_type="np", callback_on_step_end=callback, **arguments)
        return np.asarray(result.frames), None

    arguments |= {"seed": request.all_seeds, "progress": on_step}
    if isinstance(pipe, DemoPipeline):
        return pipe(prompts, **arguments).cpu().numpy(), None
    size = request.size
    if isinstance(pipe, LatteLatents) or size is None:
        return None, pipe(prompts, **arguments)
    if isinstance(pipe, OpenSoraPipeline):
        hidden = pipe(prompts, size=size, **arguments)
    else:
        hidden = pipe(prompts, frames=size.frames, height=size.height, width=size.width, **arguments)
    return None if pipe.vae is None else pipe.decode(hidden, size).numpy(), hidden


def save(
    results: Mapping[str, Generated], request: Request, pipe: Pipeline, config: PABConfig | None, output: Path
) -> list[Path]:
    """Write the last of `results`: a video for each prompt, or its latents where there is no decoder.

    Several results (with and without PAB), and latents, get a contact sheet as a PNG beside the file.

    Parameters
    ----------
    results : mapping of str to Generated
        Names and runs of the same request.
    request : Request
    pipe : Pipeline
    config : PABConfig or None
        For the latents' metadata.
    output : Path
        .mp4 or .gif; the i-th of several prompts gets "-i" before the suffix, latents get .safetensors instead.

    Returns
    -------
    list of Path
        The files written.
    """
    last = list(results.values())[-1]
    written = []
    for i, prompt in enumerate(request.prompts):
        path = output if len(request.prompts) == 1 else output.with_stem(f"{output.stem}-{i}")
        if last.frames is not None:
            rows = {name: result.frames[i] for name, result in results.items() if result.frames is not None}
            figures.save_video(last.frames[i], path, FPS.get(getattr(pipe, "family", "latte"), 8))
        else:
            assert last.latents is not None
            hidden = {name: result.latents[i] for name, result in results.items() if result.latents is not None}
            first = next(iter(hidden.values()))
            rows = {name: latents.first_look(value, like=first) for name, value in hidden.items()}
            path = path.with_suffix(".safetensors")
            latents.save(last.latents[i], path, _metadata(request, pipe, config, i))
        written.append(path)
        if last.frames is None or len(results) > 1:
            sheet = path.with_suffix(".png")
            figures.contact_sheet(rows, sheet, prompt)
            written.append(sheet)
    return written


def _metadata(request: Request, pipe: Any, config: PABConfig | None, index: int) -> dict[str, Any]:
    """What it takes to decode the latents later, and to make them again."""
    size = pipe.size() if isinstance(pipe, LatteLatents) or request.size is None else request.size
    return {
        "family": pipe.family,
        **{name: value for name, value in dataclasses.asdict(size).items() if name != "latent"},
        "fps": FPS[pipe.family],
        "latent_scale": pipe.latent_scale,
        "latent_shift": pipe.latent_shift,
        "prompt": request.prompts[index],
        "negative_prompt": request.negative_prompt,
        "seed": request.all_seeds[index],
        "steps": request.steps,
        "guidance": request.guidance,
        "pab": None if config is None else config.to_dict(),
    }


def difference(result: Generated, baseline: Generated) -> float:
    """||result - baseline|| / ||baseline|| of the latents."""
    assert result.latents is not None
    assert baseline.latents is not None
    return float((result.latents - baseline.latents).norm() / baseline.latents.norm())
