"""Latte without its text encoder and VAE, to time it on random weights. With them, diffusers' LattePipeline serves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from pab_kernels.pipelines.sizes import VideoSize
from pab_kernels.pipelines.text import RandomText
from pab_kernels.pipelines.text_to_video import Progress, Prompts, StepCallback, TextToVideoPipeline, check_steps

TEXT_LENGTH = 120


class LatteLatents(TextToVideoPipeline):
    """Random text to latents with Latte: what a run costs, not what it shows.

    Parameters
    ----------
    transformer : LatteTransformer3DModel
    """

    family = "latte"
    latent_scale = (1 / 0.18215,)

    def __init__(self, transformer: Any) -> None:
        text = RandomText(transformer.config.caption_channels)
        super().__init__(transformer, text, DDIMScheduler(beta_schedule="linear", clip_sample=False))

    def size(self) -> VideoSize:
        """The one size of the transformer."""
        frames, side = self.transformer.config.video_length, self.transformer.config.sample_size
        return VideoSize(frames, side * 8, side * 8, (frames, side, side))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        seed: int | Sequence[int] = 0,
        callback_on_step_end: StepCallback | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Latents [B, C, T, H, W], float32. Arguments and errors are those of `OpenSoraPlanPipeline`."""
        prompts = Prompts.of(prompt, negative_prompt, seed)
        check_steps(num_inference_steps)
        guided = guidance_scale > 1.0
        texts = (*prompts.negatives, *prompts.texts) if guided else prompts.texts
        text = self._encode(texts, TEXT_LENGTH)[0].squeeze(1)  # Latte attends to all tokens
        self.scheduler.set_timesteps(num_inference_steps)
        generators = self._generators(prompts)
        arguments = {"encoder_hidden_states": text, "return_dict": False}
        noise = self._noise(generators, self.size())
        return self._denoise(noise, arguments, guidance_scale, generators, callback_on_step_end, progress)
