"""Open-Sora 1.2: text to video, or from given frames, with rectified flow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pab_kernels.ops.checks import check_shape, check_tensor
from pab_kernels.pipelines.arguments import (
    Generators,
    NegativePrompt,
    Prompt,
    Prompts,
    Seed,
    check_guidance,
    check_steps,
)
from pab_kernels.pipelines.denoising import GivenFrames, Progress, Run, StepCallback, TakeStep
from pab_kernels.pipelines.prompts import clean_prompt
from pab_kernels.pipelines.samplers import RFlowScheduler
from pab_kernels.pipelines.sizes import VideoSize, open_sora_size
from pab_kernels.pipelines.text import TextEncoder
from pab_kernels.pipelines.text_to_video import TextToVideoPipeline
from pab_kernels.runtime.handle import handle_of

FPS, IMAGE_FPS = 24.0, 120.0
"""The frame rate that the model is told, as the original tells it for every video, and for an image."""


class OpenSoraPipeline(TextToVideoPipeline):
    """Text to latents with STDiT3, and on to video where a VAE is given.

    Parameters
    ----------
    transformer : STDiT3
    text : TextEncoder
        T5 v1.1 XXL for the released weights.
    vae : diffusers AutoencoderKL of videos, optional
    """

    family = "open_sora"
    # Of the official OpenSora-VAE-v1.2.
    latent_scale = (3.85, 2.32, 2.33, 3.06)
    latent_shift = (-0.10, 0.34, 0.27, 0.98)
    cond_first = True
    predictions = ("flow",)

    def __init__(self, transformer: Any, text: TextEncoder, vae: Any = None) -> None:
        super().__init__(transformer, text, RFlowScheduler(), vae)

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompt,
        *,
        negative_prompt: NegativePrompt = None,
        resolution: str = "480p",
        aspect: str = "9:16",
        duration: str | int = "2s",
        size: VideoSize | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 7.0,
        num_videos_per_prompt: int = 1,
        seed: Seed = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        aesthetic_score: float | None = 6.5,
        given_latents: Tensor | None = None,
        given_mask: Tensor | None = None,
        callback_on_step_end: StepCallback | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Generate the latents of B videos: of one prompt or several, one or several of each.

        Parameters
        ----------
        prompt : str or sequence of str
            Of any lengths up to the model's 300 tokens.
        negative_prompt : str or sequence of str, optional
            What guidance leads away from: one for all, or one for each prompt. None or the empty one is the model's
            learned null embedding, with as many tokens as the prompt has.
        resolution, aspect, duration
            See `open_sora_size`. Aspects are height to width: "9:16" is a wide video.
        size : VideoSize, optional
            Instead of the three.
        num_inference_steps : int
            Denoising steps, 1 to 1000.
        guidance_scale : float
            1 or less runs without guidance, at half the cost a step.
        num_videos_per_prompt, seed, generator, latents
            See `OpenSoraPlanPipeline`.
        aesthetic_score : float, optional
            Appended to each prompt in the words the model was trained with; None leaves them out.
        given_latents, given_mask : Tensor, optional
            Frames to go on from: latents [B, C, T, H, W], and bool [B, T] that is True where a frame is given. Those
            frames come out unchanged, and the model is told that they have no noise.
        callback_on_step_end : callable, optional
            See `OpenSoraPlanPipeline`.
        progress : callable, optional
            Called as `progress(done, total)` after each step.

        Returns
        -------
        Tensor
            float32 latents [B, C, T, H, W] on the pipeline's device.

        Raises
        ------
        ValueError, TypeError
            As `OpenSoraPlanPipeline`.
        """
        prompts = Prompts.of(prompt, negative_prompt, seed, generator, num_videos_per_prompt)
        guided = check_guidance(guidance_scale) > 1.0
        size = size or open_sora_size(resolution, aspect, duration)
        shape = self._shape(len(prompts.texts), size)
        given = self._given(given_latents, given_mask, shape)
        if isinstance(self.scheduler, RFlowScheduler):
            self.scheduler.set_timesteps(check_steps(num_inference_steps), size.height, size.width, size.latent[0])
        else:
            self._set_timesteps(num_inference_steps)
        arguments = self._arguments(prompts, size, guided, aesthetic_score)
        if given is not None:
            arguments["x_mask"] = ~given.mask.repeat(2 if guided else 1, 1)
        run = Run(arguments, prompts.generators, callback_on_step_end, progress, given)
        return self._denoise(self._noise(run, shape, latents), run, guidance_scale)

    def _arguments(self, prompts: Prompts, size: VideoSize, guided: bool, score: float | None) -> dict[str, Any]:
        """What STDiT3 takes besides latents and timestep; the text's rows are those of the prompts, then the null."""
        null = self.transformer.y_embedder.y_embedding
        suffix = "" if score is None else f" aesthetic score: {score:.1f}."
        texts = [text if "aesthetic score:" in text else text + suffix for text in prompts.texts]
        texts = [clean_prompt(text) for text in texts]
        y, mask = self._encode(texts, len(null))
        if guided:
            uncond, uncond_mask = null.to(y.dtype).expand_as(y).clone(), mask.clone()
            asked = [i for i, negative in enumerate(prompts.negatives) if negative]
            if asked:
                negatives = [clean_prompt(prompts.negatives[i]) for i in asked]
                uncond[asked], uncond_mask[asked] = self._encode(negatives, len(null))
            y, mask = torch.cat([y, uncond]), torch.cat([mask, uncond_mask])
        # Height and width stay on the CPU: the host reads their values, and would wait for a GPU's at every step.
        return {
            "y": y,
            "mask": mask,
            "fps": torch.full((len(y),), IMAGE_FPS if size.frames == 1 else FPS, device=self.device),
            "height": torch.full((len(y),), float(size.height)),
            "width": torch.full((len(y),), float(size.width)),
        }

    def _steps(self, latents: Tensor, run: Run, guidance_scale: float, first: int) -> TakeStep:
        """Where this runtime is behind the transformer, it takes whole steps of rectified flow."""
        handle = handle_of(self.transformer)
        if handle is None or type(self.scheduler) is not RFlowScheduler:
            return super()._steps(latents, run, guidance_scale, first)
        if first == 0:
            handle.begin(self.scheduler.timesteps)
        take_step = handle.rectified_flow(latents, guidance_scale, **run.arguments)
        return lambda latents, _: (take_step(latents), None)

    def _step(self, prediction: Tensor, t: Tensor, latents: Tensor, run: Run) -> tuple[Tensor, Tensor | None]:
        """The model predicts data minus noise, diffusers' samplers take noise minus data."""
        if isinstance(self.scheduler, RFlowScheduler):
            return self.scheduler.step(prediction, t, latents), None
        return super()._step(-prediction, t, latents, run)

    def _given(self, latents: Tensor | None, mask: Tensor | None, shape: tuple[int, ...]) -> GivenFrames | None:
        if latents is None and mask is None:
            return None
        if latents is None or mask is None:
            raise ValueError("given_latents, given_mask: got only one of them, must be both or none")
        check_shape("given_latents", check_tensor("given_latents", latents), shape)
        check_shape("given_mask", check_tensor("given_mask", mask), (shape[0], shape[2]))
        return GivenFrames(latents.to(self.device, torch.float32), mask.to(self.device).bool())
