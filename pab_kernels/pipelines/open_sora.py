"""Open-Sora 1.2: text to video, or from given frames, with rectified flow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pab_kernels.ops.checks import check_shape, check_tensor
from pab_kernels.pipelines.samplers import RFlowScheduler
from pab_kernels.pipelines.sizes import VideoSize, open_sora_size
from pab_kernels.pipelines.text import TextEncoder, clean_prompt
from pab_kernels.pipelines.text_to_video import (
    GivenFrames,
    Progress,
    Prompts,
    StepCallback,
    TextToVideoPipeline,
    check_steps,
)
from pab_kernels.runtime.handle import handle_of

FPS = 24.0
"""The frame rate that the model is told, as the original tells it for every video."""


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

    def __init__(self, transformer: Any, text: TextEncoder, vae: Any = None) -> None:
        super().__init__(transformer, text, RFlowScheduler(), vae)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        resolution: str = "480p",
        aspect: str = "9:16",
        duration: str | int = "2s",
        size: VideoSize | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 7.0,
        seed: int | Sequence[int] = 0,
        aesthetic_score: float | None = 6.5,
        given_latents: Tensor | None = None,
        given_mask: Tensor | None = None,
        callback_on_step_end: StepCallback | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Generate the latents of one video a prompt.

        Parameters
        ----------
        prompt : str or sequence of str
            B prompts, of any lengths up to the model's 300 tokens.
        negative_prompt : str or sequence of str
            What guidance leads away from: one for all, or B. The empty one is the model's learned null embedding, with
            as many tokens as the prompt has.
        resolution, aspect, duration
            See `open_sora_size`. Aspects are height to width: "9:16" is a wide video.
        size : VideoSize, optional
            Instead of the three.
        num_inference_steps : int
            Denoising steps, 1 to 1000.
        guidance_scale : float
            1 or less runs without guidance, at half the cost a step.
        seed : int or sequence of int
            Seed of each video's noise. An int s gives the i-th prompt s + i. A video does not depend on its
            neighbours in the batch nor on the device that draws.
        aesthetic_score : float, optional
            Appended to each prompt in the words the model was trained with; None leaves them out.
        given_latents, given_mask : Tensor, optional
            Frames to go on from: latents [B, C, T, H, W], and bool [B, T] that is True where a frame is given. Those
            frames come out unchanged, and the model is told that they have no noise.
        callback_on_step_end : callable, optional
            Called as `callback(pipeline, step, timestep, {"latents": latents})` after each step; may return a dict
            with other "latents".
        progress : callable, optional
            Called as `progress(done, total)` after each step.

        Returns
        -------
        Tensor
            float32 latents [B, C, T, H, W] on the pipeline's device.

        Raises
        ------
        ValueError
            No prompt, one with too many tokens, or an argument out of range or of the wrong length or shape.
        """
        prompts = Prompts.of(prompt, negative_prompt, seed)
        check_steps(num_inference_steps)
        size = size or open_sora_size(resolution, aspect, duration)
        given = self._given(given_latents, given_mask, len(prompts.texts), size)
        guided = guidance_scale > 1.0
        arguments = self._arguments(prompts, size, guided, aesthetic_score)
        if given is not None:
            arguments["x_mask"] = ~given.mask.repeat(2 if guided else 1, 1)
        self.scheduler.set_timesteps(num_inference_steps, size.height, size.width, size.latent[0])
        generators = self._generators(prompts)
        noise = self._noise(generators, size)
        return self._denoise(noise, arguments, guidance_scale, generators, callback_on_step_end, progress, given)

    def _arguments(self, prompts: Prompts, size: VideoSize, guided: bool, score: float | None) -> dict[str, Any]:
        """What STDiT3 takes besides latents and timestep; the text's rows are those of the prompts, then the null."""
        null = self.transformer.y_embedder.y_embedding
        suffix = "" if score is None else f" aesthetic score: {score:.1f}."
        texts = [clean_prompt(text) for text in prompts.texts]
        texts = [text if "aesthetic score:" in text else text + suffix for text in texts]
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
            "fps": torch.full((len(y),), FPS, device=self.device),
            "height": torch.full((len(y),), float(size.height)),
            "width": torch.full((len(y),), float(size.width)),
        }

    def _steps(
        self, latents: Tensor, arguments: dict[str, Any], guidance_scale: float, generators: list[torch.Generator]
    ) -> Callable[[Tensor, int], Tensor]:
        """Where this runtime is behind the transformer, it takes whole steps of rectified flow."""
        handle = handle_of(self.transformer)
        if handle is None or type(self.scheduler) is not RFlowScheduler:
            return super()._steps(latents, arguments, guidance_scale, generators)
        handle.begin(self.scheduler.timesteps)
        take_step = handle.rectified_flow(latents, guidance_scale, **arguments)
        return lambda latents, _: take_step(latents)

    def _step(self, prediction: Tensor, t: Tensor, latents: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Rectified flow draws nothing."""
        return self.scheduler.step(prediction, t, latents)

    def _given(self, latents: Tensor | None, mask: Tensor | None, batch: int, size: VideoSize) -> GivenFrames | None:
        if latents is None and mask is None:
            return None
        if latents is None or mask is None:
            raise ValueError("given_latents, given_mask: got only one of them, must be both or none")
        shape = (batch, self.transformer.config.in_channels, *size.latent)
        check_shape("given_latents", check_tensor("given_latents", latents), shape)
        check_shape("given_mask", check_tensor("given_mask", mask), (batch, size.latent[0]))
        return GivenFrames(latents.to(self.device, torch.float32), mask.to(self.device).bool())
