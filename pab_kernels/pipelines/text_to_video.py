"""What the latent pipelines share: arguments, noise, the denoising loop with guidance, decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pab_kernels.ops.checks import check_shape
from pab_kernels.pipelines import vae as decoders
from pab_kernels.pipelines.sizes import VideoSize
from pab_kernels.pipelines.text import TextEncoder

StepCallback = Callable[[Any, int, Tensor, dict[str, Tensor]], "dict[str, Any] | None"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Prompts:
    """What is asked for: B prompts, as many negative prompts, as many seeds."""

    texts: tuple[str, ...]
    negatives: tuple[str, ...]
    seeds: tuple[int, ...]

    @classmethod
    def of(
        cls, prompt: str | Sequence[str], negative_prompt: str | Sequence[str], seed: int | Sequence[int]
    ) -> Prompts:
        """Bring single values to one for each prompt; an int seed s gives the i-th prompt s + i.

        Raises
        ------
        ValueError
            No prompts, or another number of negative prompts or seeds.
        """
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        count = len(texts)
        if count == 0:
            raise ValueError("prompt must be a string or a non-empty list of strings, got an empty list")
        negatives = [negative_prompt] * count if isinstance(negative_prompt, str) else list(negative_prompt)
        seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
        for name, values in (("negative_prompt", negatives), ("seed", seeds)):
            if len(values) != count:
                raise ValueError(f"{name} must be a single value or one for each of {count} prompts, got {len(values)}")
        return cls(tuple(texts), tuple(negatives), tuple(seeds))


@dataclass(frozen=True)
class GivenFrames:
    """Frames that are not denoised: `latents` [B, C, T, H, W] where `mask` (bool [B, T]) is True."""

    latents: Tensor
    mask: Tensor

    def put_into(self, latents: Tensor) -> Tensor:
        """`latents` with the given frames in their places."""
        return torch.where(self.mask[:, None, :, None, None], self.latents, latents)


class TextToVideoPipeline:
    """Base of the pipelines whose transformer denoises latents [B, C, T, H, W].

    Subclasses say what the transformer is called with. The latents stay in float32, the transformer gets them in the
    dtype of its weights. Both halves of guidance go through it in one call, with the same text tensors at every step.

    Parameters
    ----------
    transformer : nn.Module
    text : TextEncoder
        `T5Text`, or `RandomText` to time a model without its text encoder.
    scheduler
        Its `timesteps` are on the CPU, so that its arithmetic on single numbers never waits for a GPU.
    vae : diffusers AutoencoderKL of videos, optional
        For `decode`.

    Raises
    ------
    ValueError
        The text encoder's or the VAE's channels are not those of the transformer.
    """

    family: str
    latent_scale: tuple[float, ...] = (1.0,)
    latent_shift: tuple[float, ...] = (0.0,)
    """The decoder takes ``latents * latent_scale + latent_shift``; one number, or one for each channel."""
    cond_first = False
    """Order of the two halves of guidance."""

    def __init__(self, transformer: Any, text: TextEncoder, scheduler: Any, vae: Any = None) -> None:
        expected = transformer.config.caption_channels
        if text.channels != expected:
            raise ValueError(f"text: the encoder has {text.channels} channels, must have the transformer's {expected}")
        if vae is not None:
            decoders.check_vae(vae, transformer.config.in_channels)
        self.transformer = transformer
        self.text = text
        self.scheduler = scheduler
        self.vae = vae

    @property
    def device(self) -> torch.device:
        """Device of the transformer."""
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the transformer."""
        return next(self.transformer.parameters()).dtype

    @property
    def tokenizer(self) -> Any:
        """The text encoder's tokenizer, None for random text."""
        return getattr(self.text, "tokenizer", None)

    @property
    def text_encoder(self) -> Any:
        """The T5 or mT5 encoder, None for random text."""
        return getattr(self.text, "encoder", None)

    def to(self, *args: Any, **kwargs: Any) -> TextToVideoPipeline:
        """Move or cast all modules as `torch.nn.Module.to` does; returns the pipeline."""
        for module in (self.transformer, self.text_encoder, self.vae):
            if module is not None:
                # Not ModelMixin.to: it warns of every change of dtype.
                nn.Module.to(module, *args, **kwargs)
        return self

    def decode(self, latents: Tensor, size: VideoSize) -> Tensor:
        """Videos of latents from `__call__`: float32 [B, frames, height, width, 3] in [0, 1] on the CPU.

        Raises
        ------
        ValueError
            The pipeline has no VAE.
        """
        if self.vae is None:
            raise ValueError("vae: got None, must be given to decode")
        scale, shift = (
            torch.tensor(values, device=latents.device).view(-1, 1, 1, 1)
            for values in (self.latent_scale, self.latent_shift)
        )
        return decoders.decode(self.vae, latents * scale + shift, size)

    def _encode(self, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Embeddings [B, 1, L, C] and mask [B, L] for the transformer."""
        embeddings, mask = self.text.encode(texts, length)
        return embeddings.to(self.device, self.dtype)[:, None], mask.to(self.device)

    def _generators(self, prompts: Prompts) -> list[torch.Generator]:
        """One for each video, on the CPU: a seed means the same on every device and in every batch."""
        return [torch.Generator().manual_seed(seed) for seed in prompts.seeds]

    def _noise(self, generators: Sequence[torch.Generator], size: VideoSize) -> Tensor:
        """float32 [B, C, T, H, W]; after the scheduler's `set_timesteps`, which sets the noise's size."""
        shape = (self.transformer.config.in_channels, *size.latent)
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        return (noise * self.scheduler.init_noise_sigma).to(self.device)

    def _step(self, prediction: Tensor, t: Tensor, latents: Tensor, generators: list[torch.Generator]) -> Tensor:
        """The scheduler's step."""
        return self.scheduler.step(prediction, t, latents, return_dict=False)[0]

    def _steps(
        self, latents: Tensor, arguments: dict[str, Any], guidance_scale: float, generators: list[torch.Generator]
    ) -> Callable[[Tensor, int], Tensor]:
        """A function that takes latents through the i-th step of the run: transformer, guidance, scheduler."""
        timesteps = self.scheduler.timesteps
        on_device = timesteps.to(self.device)
        guided = guidance_scale > 1.0

        def take_step(latents: Tensor, step: int) -> Tensor:
            t = timesteps[step]
            model_input = torch.cat([latents] * 2) if guided else latents
            model_input = self.scheduler.scale_model_input(model_input, t).to(self.dtype)
            prediction = self.transformer(model_input, on_device[step].expand(len(model_input)), **arguments)
            prediction = prediction if isinstance(prediction, Tensor) else prediction[0]
            prediction = prediction[:, : latents.shape[1]].float()  # the rest would be a learned variance
            if guided:
                cond, uncond = prediction.chunk(2) if self.cond_first else prediction.chunk(2)[::-1]
                prediction = uncond + guidance_scale * (cond - uncond)
            return self._step(prediction, t, latents, generators)

        return take_step

    def _denoise(
        self,
        latents: Tensor,
        arguments: dict[str, Any],
        guidance_scale: float,
        generators: list[torch.Generator],
        callback_on_step_end: StepCallback | None,
        progress: Progress | None,
        given: GivenFrames | None = None,
    ) -> Tensor:
        """Run the loop over the scheduler's timesteps; `arguments` go to the transformer at every step, as they are."""
        timesteps = self.scheduler.timesteps
        if given is not None:
            latents = given.put_into(latents)
        take_step = self._steps(latents, arguments, guidance_scale, generators)
        for step, t in enumerate(timesteps):
            latents = take_step(latents, step)
            if given is not None:
                latents = given.put_into(latents)
            if callback_on_step_end is not None:
                changed = (callback_on_step_end(self, step, t, {"latents": latents}) or {}).get("latents", latents)
                check_shape("latents", changed, tuple(latents.shape))
                latents = changed
            if progress is not None:
                progress(step + 1, len(timesteps))
        return latents


def check_steps(num_inference_steps: int) -> None:
    """Raise ValueError unless there is a step, and no more than the 1000 of training."""
    if not 1 <= num_inference_steps <= 1000:
        raise ValueError(f"num_inference_steps must be in [1, 1000], got {num_inference_steps}")
