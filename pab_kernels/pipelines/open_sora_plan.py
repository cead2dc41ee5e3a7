"""Open-Sora-Plan 1.1 and 1.2: text to video with diffusers' samplers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import EulerAncestralDiscreteScheduler, PNDMScheduler
from torch import Tensor

from pab_kernels.models.hosts import OpenSoraPlanV110
from pab_kernels.pipelines.sizes import VideoSize, plan_size
from pab_kernels.pipelines.text import TextEncoder, clean_prompt
from pab_kernels.pipelines.text_to_video import Progress, Prompts, StepCallback, TextToVideoPipeline, check_steps

TEXT_LENGTH = {"open_sora_plan_v110": 300, "open_sora_plan_v120": 512}
"""Tokens of a prompt."""


class OpenSoraPlanPipeline(TextToVideoPipeline):
    """Text to latents with Open-Sora-Plan, and on to video where a VAE is given. The transformer tells the version.

    Version 1.1 samples with PNDM, which calls the transformer 9 times more than it has steps; 1.2 with Euler-Ancestral.

    Parameters
    ----------
    transformer : OpenSoraPlanV110 or OpenSoraPlanV120
    text : TextEncoder
        For the released weights T5 v1.1 XXL (1.1) or mT5 XXL (1.2).
    vae : diffusers AutoencoderKL of videos, optional
    """

    latent_scale = (1 / 0.18215,)

    def __init__(self, transformer: Any, text: TextEncoder, vae: Any = None) -> None:
        v110 = isinstance(transformer, OpenSoraPlanV110)
        self.family = "open_sora_plan_v110" if v110 else "open_sora_plan_v120"
        scheduler = PNDMScheduler() if v110 else EulerAncestralDiscreteScheduler()
        super().__init__(transformer, text, scheduler, vae)

    def size(self, frames: int | None = None, height: int | None = None, width: int | None = None) -> VideoSize:
        """The size of a video; None stands for the size that the transformer was trained for.

        Raises
        ------
        ValueError
            A size that the transformer does not take.
        """
        config = self.transformer.config
        trained = config.video_length if self.family == "open_sora_plan_v110" else config.sample_size_t
        full = (trained - 1) * 4 + 1
        own_height, own_width = (side * 8 for side in config.sample_size)
        size = plan_size(
            full if frames is None else frames,
            own_height if height is None else height,
            own_width if width is None else width,
            config.patch_size,
        )
        if self.family == "open_sora_plan_v110" and size.frames != full:
            raise ValueError(f"frames: got {size.frames}, must be {full}: this checkpoint has one length")
        return size

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 7.5,
        seed: int | Sequence[int] = 0,
        callback_on_step_end: StepCallback | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Generate the latents of one video a prompt.

        Parameters
        ----------
        prompt : str or sequence of str
            B prompts, of any lengths up to 300 tokens (1.1) or 512 (1.2).
        negative_prompt : str or sequence of str
            What guidance leads away from: one for all, or B.
        frames, height, width : int, optional
            In pixels; by default what the transformer was trained for. Version 1.1 takes one number of frames.
        num_inference_steps : int, optional
            Denoising steps, 1 to 1000 (1.1: at least 4, for PNDM); by default 150 (1.1) or 100 (1.2).
        guidance_scale : float
            1 or less runs without guidance, at half the cost a step.
        seed : int or sequence of int
            Seed of each video's noise, also of what Euler-Ancestral adds at each step. An int s gives the i-th prompt
            s + i. A video does not depend on its neighbours in the batch nor on the device that draws.
        callback_on_step_end : callable, optional
            Called as `callback(pipeline, call, timestep, {"latents": latents})` after each call of the transformer;
            may return a dict with other "latents".
        progress : callable, optional
            Called as `progress(done, total)` after each call.

        Returns
        -------
        Tensor
            float32 latents [B, C, T, H, W] on the pipeline's device.

        Raises
        ------
        ValueError
            No prompt, one with too many tokens, or an argument out of range or of the wrong length.
        """
        prompts = Prompts.of(prompt, negative_prompt, seed)
        v110 = self.family == "open_sora_plan_v110"
        default = 150 if v110 else 100
        steps = default if num_inference_steps is None else num_inference_steps
        check_steps(steps)
        if v110 and steps < 4:
            raise ValueError(f"num_inference_steps must be at least 4 for PNDM, got {steps}")
        size = self.size(frames, height, width)
        arguments = self._arguments(prompts, guidance_scale > 1.0)
        self.scheduler.set_timesteps(steps)
        generators = self._generators(prompts)
        noise = self._noise(generators, size)
        return self._denoise(noise, arguments, guidance_scale, generators, callback_on_step_end, progress)

    def _arguments(self, prompts: Prompts, guided: bool) -> dict[str, Any]:
        """What the transformer takes besides latents and timestep; the text's rows are the negatives, then the rest."""
        length = TEXT_LENGTH[self.family]
        text, mask = self._encode([clean_prompt(prompt) for prompt in prompts.texts], length)
        if guided:
            negative, negative_mask = self._encode([clean_prompt(prompt) for prompt in prompts.negatives], length)
            if self.family == "open_sora_plan_v110":
                # The original gives the negative prompt as many tokens as the prompt has, padding included. Here it
                # keeps those it has beyond that.
                negative_mask = negative_mask | mask
            text, mask = torch.cat([negative, text]), torch.cat([negative_mask, mask])
        return {"encoder_hidden_states": text, "encoder_attention_mask": mask, "return_dict": False}

    def _step(self, prediction: Tensor, t: Tensor, latents: Tensor, generators: list[torch.Generator]) -> Tensor:
        """PNDM draws nothing; Euler-Ancestral draws each video's noise from its own generator."""
        if self.family == "open_sora_plan_v110":
            return super()._step(prediction, t, latents, generators)
        return self.scheduler.step(prediction, t, latents, generator=generators, return_dict=False)[0]
