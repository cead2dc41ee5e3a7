"""The denoising loop of all our pipelines: noise, guidance, scheduler, callbacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from pab_kernels.ops.checks import check_shape, check_tensor
from pab_kernels.pipelines import samplers
from pab_kernels.pipelines.arguments import check_guidance

StepCallback = Callable[[Any, int, Tensor, dict[str, Tensor]], "dict[str, Any] | None"]
Progress = Callable[[int, int], None]
TakeStep = Callable[[Tensor, int], "tuple[Tensor, Tensor | None]"]
"""Latents and the index of a step to the latents after it, and where the sampler tells, what they are to become."""


@dataclass(frozen=True)
class GivenFrames:
    """Frames that are not denoised: `latents` [B, C, T, H, W] where `mask` (bool [B, T]) is True."""

    latents: Tensor
    mask: Tensor

    def put_into(self, latents: Tensor) -> Tensor:
        """`latents` with the given frames in their places."""
        return torch.where(self.mask[:, None, :, None, None], self.latents, latents)


@dataclass(frozen=True)
class Run:
    """What stays the same in a run.

    `arguments` go to the transformer at every step beside latents and timestep, as they are; with guidance for 2B
    rows. `generators` draw what the sampler adds.
    """

    arguments: dict[str, Any]
    generators: torch.Generator | list[torch.Generator]
    callback: StepCallback | None = None
    progress: Progress | None = None
    given: GivenFrames | None = None


class DenoisingPipeline:
    """Base of the pipelines whose transformer denoises [B, C, T, H, W].

    The latents stay in float32, the transformer gets them in the dtype of its weights. Both halves of guidance go
    through it in one call, with the same text tensors at every step.

    Parameters
    ----------
    transformer : nn.Module
    scheduler
        Of diffusers, or `RFlowScheduler`. Its `timesteps` are on the CPU, so that its arithmetic on single numbers
        never waits for a GPU.
    """

    predictions: tuple[str, ...] = ("epsilon", "v_prediction", "sample")
    """What the transformer may have been trained to predict, in the words of `samplers.prediction_of`."""
    cond_first = False
    """Order of the two halves of guidance."""

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        self.transformer = transformer
        self.scheduler = scheduler
        self._guidance_scale = 1.0

    @property
    def device(self) -> torch.device:
        """Device of the transformer."""
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the transformer."""
        return next(self.transformer.parameters()).dtype

    @property
    def guidance_scale(self) -> float:
        """Of the current run's next step. A callback changes it by what it returns, or by `_guidance_scale`."""
        return self._guidance_scale

    def _set_timesteps(self, steps: int) -> None:
        """Begin a run of the scheduler; see `samplers.set_timesteps`."""
        samplers.set_timesteps(self.scheduler, steps, self.predictions)

    def _noise(self, run: Run, shape: tuple[int, ...], latents: Tensor | None) -> Tensor:
        """float32 [B, C, T, H, W] of `shape`, drawn or given; after `_set_timesteps`, which sets the noise's size."""
        if latents is None:
            latents = randn_tensor(shape, generator=run.generators, device=self.device, dtype=torch.float32)
        check_shape("latents", check_tensor("latents", latents), shape)
        if not latents.is_floating_point():
            raise TypeError(f"latents: dtype is {latents.dtype}, must be floating")
        scale = getattr(self.scheduler, "init_noise_sigma", 1.0)  # flow matching of diffusers has none
        return latents.to(self.device, torch.float32) * scale

    def _guide(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """The prediction with guidance."""
        return uncond + scale * (cond - uncond)

    def _step(self, prediction: Tensor, t: Tensor, latents: Tensor, run: Run) -> tuple[Tensor, Tensor | None]:
        """The scheduler's step; what it draws comes from the run's generators."""
        return samplers.take_step(self.scheduler, prediction, t, latents, run.generators)

    def _steps(self, latents: Tensor, run: Run, guidance_scale: float, first: int) -> TakeStep:
        """A function that takes latents through the i-th step: transformer, guidance, scheduler.

        It is asked for at the beginning, and again before the step `first` where the guidance has changed.
        """
        timesteps = self.scheduler.timesteps
        on_device = timesteps.to(self.device)
        guided = guidance_scale > 1.0
        scaled = getattr(self.scheduler, "scale_model_input", lambda latents, _: latents)

        def take_step(latents: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
            t = timesteps[step]
            model_input = torch.cat([latents] * 2) if guided else latents
            model_input = scaled(model_input, t).to(self.dtype)
            timestep = on_device[step].expand(len(model_input))
            prediction = self.transformer(model_input, timestep=timestep, **run.arguments)
            prediction = prediction if isinstance(prediction, Tensor) else prediction[0]
            prediction = prediction[:, : latents.shape[1]].float()  # the rest would be a learned variance
            if guided:
                cond, uncond = prediction.chunk(2) if self.cond_first else prediction.chunk(2)[::-1]
                prediction = self._guide(cond, uncond, guidance_scale)
            return self._step(prediction, t, latents, run)

        return take_step

    def _denoise(self, latents: Tensor, run: Run, guidance_scale: float) -> Tensor:
        """Run the loop over the scheduler's timesteps."""
        timesteps = self.scheduler.timesteps
        if run.given is not None:
            latents = run.given.put_into(latents)
        self._guidance_scale = scale = guidance_scale
        runs = {guidance_scale > 1.0: run}  # with and without guidance
        take_step = self._steps(latents, run, scale, 0)
        for step, t in enumerate(timesteps):
            if self._guidance_scale != scale:
                scale = check_guidance(self._guidance_scale)
                take_step = self._steps(latents, self._run_with(runs, scale > 1.0), scale, step)
            latents, denoised = take_step(latents, step)
            if run.given is not None:
                latents = run.given.put_into(latents)
            if run.callback is not None:
                latents = self._call_back(run.callback, step, t, latents, denoised)
            if run.progress is not None:
                run.progress(step + 1, len(timesteps))
        return latents

    def _call_back(
        self, callback: StepCallback, step: int, t: Tensor, latents: Tensor, denoised: Tensor | None
    ) -> Tensor:
        """The latents after the caller has seen them, who may have changed them and the guidance."""
        tensors = {"latents": latents} if denoised is None else {"latents": latents, "denoised": denoised}
        changed = callback(self, step, t, tensors) or {}
        result = changed.get("latents", latents)
        check_shape("latents", check_tensor("latents", result), tuple(latents.shape))
        self._guidance_scale = changed.get("guidance_scale", self._guidance_scale)
        return result

    def _run_with(self, runs: dict[bool, Run], guided: bool) -> Run:
        """The run with or without guidance. Without, it has the rows of the prompts alone, the same at every step."""
        if guided in runs:
            return runs[guided]
        if guided:
            raise ValueError(
                f"guidance_scale: got {self._guidance_scale} in the middle of a run that began without guidance: begin "
                "with more than 1, so that there is a negative prompt"
            )
        both = runs[True]
        rows = {name: self._cond_rows(value) for name, value in both.arguments.items()}
        runs[False] = Run(rows, both.generators)
        return runs[False]

    def _cond_rows(self, value: Any) -> Any:
        """The half of a transformer's argument that belongs to the prompts."""
        return value.chunk(2)[0 if self.cond_first else 1] if isinstance(value, Tensor) else value
