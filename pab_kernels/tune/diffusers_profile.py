"""Profiles of Wan and LTX-Video, which run in diffusers' own pipelines."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import torch

from pab_kernels.pipelines.sizes import VideoSize
from pab_kernels.tune.profile import Profile, Profiler

FAMILIES = {"WanPipeline": "wan_2_1", "LTXPipeline": "ltx"}
"""diffusers' pipelines from text, and the family whose sizes are theirs."""


def pipeline_class(model: str) -> str | None:
    """Which of `FAMILIES` the model_index.json of a folder or hub id names, or None."""
    path = Path(model, "model_index.json")
    if not path.is_file():
        if Path(model).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
            return None
        try:
            path = Path(huggingface_hub.hf_hub_download(model, "model_index.json"))
        except Exception:  # no network, no such repository: whoever loads the model will say so
            return None
    try:
        name = json.loads(path.read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError):
        return None
    return name if name in FAMILIES else None


def load(model: str, *, dtype: torch.dtype, device: torch.device) -> Any:
    """The pipeline of a folder or hub id for which `pipeline_class` has a name.

    Raises
    ------
    ValueError
        diffusers cannot load it; the message is its own.
    """
    try:
        pipe = getattr(diffusers, str(pipeline_class(model))).from_pretrained(model, torch_dtype=dtype)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"model: {model} could not be loaded: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def measure(
    pipe: Any,
    prompts: Sequence[str],
    size: VideoSize,
    *,
    steps: int,
    guidance: float,
    seed: int,
    on_step: Callable[[int], object] = lambda step: None,
) -> list[Profile]:
    """Profile a run without PAB, on diffusers' own code: one for each transformer, in the order in which they run.

    Parameters
    ----------
    pipe : WanPipeline or LTXPipeline
    prompts : sequence of str
        All of their videos go into the profiles.
    size : VideoSize
    steps, guidance, seed
        Of the run. With guidance above 1 Wan calls its transformer twice a step.
    on_step : callable, optional
        Is told how many steps are done.
    """
    both = (pipe.transformer, getattr(pipe, "transformer_2", None))
    forwards = 2 if type(pipe).__name__ == "WanPipeline" and guidance > 1 else 1

    def after(_pipe: Any, step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        on_step(step + 1)
        return {}

    with ExitStack() as stack:
        profilers = [stack.enter_context(Profiler(each, forwards)) for each in both if each is not None]
        pipe(
            list(prompts),
            num_frames=size.frames,
            height=size.height,
            width=size.width,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=after,
            output_type="latent",
        )
        timesteps = [float(t) for t in pipe.scheduler.timesteps]
        profiles = []
        for profiler in profilers:
            own = (profiler.call + 1) // forwards
            profiles.append(profiler.profile(timesteps[:own]))
            timesteps = timesteps[own:]
    return profiles
