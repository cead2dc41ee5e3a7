"""What the latent pipelines share: text, the size of the noise, decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pab_kernels.pipelines import vae as decoders
from pab_kernels.pipelines.denoising import DenoisingPipeline
from pab_kernels.pipelines.sizes import VideoSize
from pab_kernels.pipelines.text import TextEncoder, cast_encoder


class TextToVideoPipeline(DenoisingPipeline):
    """Base of the pipelines whose transformer denoises latents; subclasses say what the transformer is called with.

    Parameters
    ----------
    transformer : nn.Module
    text : TextEncoder
        `T5Text`, or `RandomText` to time a model without its text encoder.
    scheduler
        See `DenoisingPipeline`.
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

    def __init__(self, transformer: Any, text: TextEncoder, scheduler: Any, vae: Any = None) -> None:
        expected = transformer.config.caption_channels
        if text.channels != expected:
            raise ValueError(f"text: the encoder has {text.channels} channels, must have the transformer's {expected}")
        if vae is not None:
            decoders.check_vae(vae, transformer.config.in_channels)
        super().__init__(transformer, scheduler)
        self.text = text
        self.vae = vae

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
        for module in (self.transformer, self.vae):
            if module is not None:
                # Not ModelMixin.to: it warns of every change of dtype.
                nn.Module.to(module, *args, **kwargs)
        if self.text_encoder is not None:
            cast_encoder(self.text_encoder, *args, **kwargs)
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
        """Embeddings [B, 1, L, C] and mask [B, L] for the transformer; a text that comes twice is encoded once."""
        distinct = list(dict.fromkeys(texts))
        embeddings, mask = self.text.encode(distinct, length)
        rows = [distinct.index(text) for text in texts]
        return embeddings.to(self.device, self.dtype)[rows][:, None], mask.to(self.device)[rows]

    def _shape(self, batch: int, size: VideoSize) -> tuple[int, ...]:
        """Of the latents, [B, C, T, H, W]."""
        return (batch, self.transformer.config.in_channels, *size.latent)
