"""Open-Sora-Plan 1.1 and 1.2: text to video with diffusers' samplers."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from diffusers import EulerAncestralDiscreteScheduler, PNDMScheduler
from torch import Tensor

from pab_kernels.models.hosts import OpenSoraPlanV110
from pab_kernels.pipelines.arguments import Generators, NegativePrompt, Prompt, Prompts, Seed, check_guidance
from pab_kernels.pipelines.denoising import Progress, Run, StepCallback
from pab_kernels.pipelines.prompts import clean_prompt
from pab_kernels.pipelines.sizes import VideoSize, plan_size
from pab_kernels.pipelines.text import TextEncoder
from pab_kernels.pipelines.text_to_video import TextToVideoPipeline

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
        if frames not in (None, 1, full) and self.family == "open_sora_plan_v120":
            warnings.warn(
                f"frames: got {frames}, but these weights were trained for {full}, and 1 for an image: others work "
                f"less well. Load the weights of the folder for {frames} frames, or ask for {full}.",
                stacklevel=3,
            )
        size = plan_size(
            full if frames is None else frames,
            own_height if height is None else height,
            own_width if width is None else width,
            config.patch_size,
        )
        if self.family == "open_sora_plan_v110" and size.frames not in (1, full):
            raise ValueError(
                f"frames: got {size.frames}, must be {full}, or 1 for an image: this checkpoint has one length"
            )
        return size

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompt,
        *,
        negative_prompt: NegativePrompt = None,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 7.5,
        num_videos_per_prompt: int = 1,
        seed: Seed = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        callback_on_step_end: StepCallback | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Generate the latents of B videos: of one prompt or several, one or several of each.

        Parameters
        ----------
        prompt : str or sequence of str
            Of any lengths up to 300 tokens (1.1) or 512 (1.2).
        negative_prompt : str or sequence of str, optional
            What guidance leads away from: one for all, or one for each prompt. None is the empty one.
        frames, height, width : int, optional
            In pixels; by default what the transformer was trained for. 1 frame is an image. Version 1.1 takes no other
            length, 1.2 warns of one.
        num_inference_steps : int, optional
            Denoising steps, 1 to 1000 (PNDM: at least 4); by default 150 (1.1) or 100 (1.2).
        guidance_scale : float
            1 or less runs without guidance, at half the cost a step.
        num_videos_per_prompt : int
            The videos of a prompt follow each other.
        seed : int or sequence of int, optional
            Seed of each video's noise, also of what a sampler adds at each step. An int s gives the i-th video s + i,
            None is 0. A video does not depend on its neighbours in the batch nor on the device that draws.
        generator : torch.Generator or sequence of torch.Generator, optional
            Instead of seeds, as in diffusers: one for each video, or one that draws the batch.
        latents : Tensor, optional
            Instead of the noise that is drawn first: [B, C, T, H, W] of variance 1, as in diffusers.
        callback_on_step_end : callable, optional
            Called as `callback(pipeline, call, timestep, tensors)` after each call of the transformer, with "latents"
            and, where the sampler tells, "denoised", what they are now taken to become. It may return a dict with
            other "latents", and with another "guidance_scale" for the steps that follow: from 1 or less on, the
            transformer sees the prompts alone.
        progress : callable, optional
            Called as `progress(done, total)` after each call.

        Returns
        -------
        Tensor
            float32 latents [B, C, T, H, W] on the pipeline's device.

        Raises
        ------
        ValueError, TypeError
            No prompt, one with too many tokens, a scheduler that does not fit, or an argument of the wrong kind, out
            of range or of the wrong length or shape.
        """
        prompts = Prompts.of(prompt, negative_prompt, seed, generator, num_videos_per_prompt)
        guided = check_guidance(guidance_scale) > 1.0
        shape = self._shape(len(prompts.texts), self.size(frames, height, width))
        default = 150 if self.family == "open_sora_plan_v110" else 100
        self._set_timesteps(default if num_inference_steps is None else num_inference_steps)
        arguments = self._arguments(prompts, guided)
        if self.family == "open_sora_plan_v110" and shape[2] == 1:
            arguments["enable_temporal_attentions"] = False  # as the original makes images
        run = Run(arguments, prompts.generators, callback_on_step_end, progress)
        return self._denoise(self._noise(run, shape, latents), run, guidance_scale)

    def _arguments(self, prompts: Prompts, guided: bool) -> dict[str, Any]:
        """What the transformer takes besides latents and timestep; the text's rows are the negatives, then the rest."""
        length = TEXT_LENGTH[self.family]
        text, mask = self._encode([clean_prompt(prompt, self.family) for prompt in prompts.texts], length)
        if guided:
            negative, negative_mask = self._encode(
                [clean_prompt(prompt, self.family) for prompt in prompts.negatives], length
            )
            if self.family == "open_sora_plan_v110":
                # The original gives the negative prompt as many tokens as the prompt has, padding included. Here it
                # keeps those it has beyond that.
                negative_mask = negative_mask | mask
            text, mask = torch.cat([negative, text]), torch.cat([negative_mask, mask])
        return {"encoder_hidden_states": text, "encoder_attention_mask": mask, "return_dict": False}
