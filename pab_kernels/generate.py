"""Text to video with and without Pyramid Attention Broadcast: what `pab generate` does."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import LattePipeline

from pab_kernels.config import PRESETS, PABConfig
from pab_kernels.pipelines.demo import DemoPipeline
from pab_kernels.quality import Frames
from pab_kernels.runtime import Report, accelerate

LATTE_ID = "maxin-cn/Latte-1"


@dataclass(frozen=True)
class Generated:
    """A video [T, H, W, 3] uint8, the seconds it took, and the runtime's report (None without PAB)."""

    frames: Frames
    seconds: float
    report: Report | None


def pab_settings(text: str) -> PABConfig | None:
    """What `--pab` means: "off", the name of a preset ("latte", "latte:347"), or a YAML file.

    Raises
    ------
    ValueError
        None of these, or a bad file; the message says what is allowed.
    """
    if text == "off":
        return None
    family, _, variant = text.partition(":")
    if family in PRESETS:
        return PABConfig.preset(family, variant or None)
    if Path(text).is_file():
        return PABConfig.from_yaml(text)
    raise ValueError(f"pab: got {text!r}, must be off, a YAML file, or a preset: {', '.join(PRESETS)}")


def load_pipeline(model: str, device: torch.device, dtype: torch.dtype) -> DemoPipeline | LattePipeline:
    """The pipeline of `--model`: "demo", "latte", or a folder or hub id of a Latte pipeline.

    Raises
    ------
    FileNotFoundError
        The model is neither here nor can it be fetched; the message says what to download and where to put it.
    """
    if model == "demo":
        return DemoPipeline.from_pretrained(dtype=dtype, device=device)
    source = LATTE_ID if model == "latte" else model
    folder = Path(source)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        if (folder / "model.safetensors").is_file():
            return DemoPipeline.from_pretrained(folder, dtype=dtype, device=device)
        raise FileNotFoundError(f"model: {folder} holds neither a diffusers pipeline nor a demo model")
    try:
        pipe = LattePipeline.from_pretrained(source, torch_dtype=dtype)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"model: {source!r} is not in the local cache and could not be fetched. On a machine with a network run "
            f"`hf download {LATTE_ID} --local-dir Latte-1` (about 25 GB), copy the folder here, and pass "
            "`--model Latte-1`. `--model demo` needs no download."
        ) from error
    return pipe.to(device)


def generate(
    pipe: DemoPipeline | LattePipeline,
    prompt: str,
    *,
    negative_prompt: str = "",
    steps: int,
    guidance: float,
    seed: int,
    config: PABConfig | None,
    on_step: Callable[[], None] | None = None,
) -> Generated:
    """Generate one video; with `config` None the pipeline runs as its authors wrote it.

    Parameters
    ----------
    pipe : DemoPipeline or LattePipeline
    prompt, negative_prompt : str
    steps : int
        Denoising steps.
    guidance : float
        Classifier-free guidance scale.
    seed : int
        Of the initial noise, drawn on the CPU so that every device starts alike.
    config : PABConfig or None
    on_step : callable, optional
        Called after every step.
    """

    def callback(_pipe: Any, _index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step()
        return tensors

    common: dict[str, Any] = {
        "negative_prompt": negative_prompt,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "callback_on_step_end": callback,
    }
    start = time.perf_counter()
    with nullcontext() if config is None else accelerate(pipe, config) as handle:
        if isinstance(pipe, DemoPipeline):
            frames = pipe(prompt, seed=seed, **common)[0].cpu().numpy()
        else:
            pipe.set_progress_bar_config(disable=True)
            generator = torch.Generator("cpu").manual_seed(seed)
            frames = np.asarray(pipe(prompt, generator=generator, output_type="np", **common).frames[0])
        seconds = time.perf_counter() - start
        report = None if handle is None else handle.report()
    return Generated((frames * 255).round().clip(0, 255).astype(np.uint8), seconds, report)
