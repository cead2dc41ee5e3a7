"""Latte without its text encoder, to time it on random weights. With one, diffusers' LattePipeline serves."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from pab_kernels.pipelines.arguments import Generators, NegativePrompt, Prompt, Prompts, Seed, check_guidance
from pab_kernels.pipelines.denoising import Progress, Run, StepCallback
from pab_kernels.pipelines.sizes import VideoSize
from pab_kernels.pipelines.text import RandomText
from pab_kernels.pipelines.text_to_video import TextToVideoPipeline

TEXT_LENGTH = 120


class LatteLatents(TextToVideoPipeline):
    """Random text to latents with Latte: what a run costs, not what it shows.

    Parameters
    ----------
    transformer : LatteTransformer3DModel
    vae : VideoDecoder, optional
        Of an image autoencoder.
    """

    family = "latte"
    latent_scale = (1 / 0.18215,)

    def __init__(self, transformer: Any, vae: Any = None) -> None:
        text = RandomText(transformer.config.caption_channels)
        super().__init__(transformer, text, DDIMScheduler(beta_schedule="linear", clip_sample=False), vae)

    def size(self, frames: int | None = None) -> VideoSize:
        """The one size of the transformer, or of a single image of it.

        Raises
        ------
        ValueError
            Another number of frames.
        """
        config = self.transformer.config
        if frames not in (None, 1, config.video_length):
            raise ValueError(f"frames: got {frames}, must be {config.video_length}, or 1 for an image")
        frames, side = frames or config.video_length, config.sample_size
        return VideoSize(frames, side * 8, side * 8, (frames, side, side))

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompt,
        *,
        negative_prompt: NegativePrompt = None,
        frames: int | None = None,
        enable_temporal_attentions: bool = True,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        num_videos_per_prompt: int = 1,
        seed: Seed = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        callback_on_step_end: StepCallback | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Latents [B, C, T, H, W], float32. Arguments and errors are those of `OpenSoraPlanPipeline`.

        Without `enable_temporal_attentions` the temporal blocks are left out, as in diffusers' LattePipeline: each
        frame is an image of its own.
        """
        prompts = Prompts.of(prompt, negative_prompt, seed, generator, num_videos_per_prompt)
        guided = check_guidance(guidance_scale) > 1.0
        shape = self._shape(len(prompts.texts), self.size(frames))
        self._set_timesteps(num_inference_steps)
        texts = (*prompts.negatives, *prompts.texts) if guided else prompts.texts
        text = self._encode(texts, TEXT_LENGTH)[0].squeeze(1)  # Latte attends to all tokens
        arguments = {
            "encoder_hidden_states": text,
            "enable_temporal_attentions": enable_temporal_attentions,
            "return_dict": False,
        }
        run = Run(arguments, prompts.generators, callback_on_step_end, progress)
        return self._denoise(self._noise(run, shape, latents), run, guidance_scale)
