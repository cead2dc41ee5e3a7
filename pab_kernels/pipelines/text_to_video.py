"""What the latent pipelines share: text, the size of the noise, decoding."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pab_kernels.pipelines.decoding import Decoded, Sink, VideoDecoder, decode_video
from pab_kernels.pipelines.denoising import DenoisingPipeline
from pab_kernels.pipelines.sizes import VideoSize
from pab_kernels.pipelines.text import TextEncoder, cast_encoder
from pab_kernels.pipelines.vae import check_vae


class TextToVideoPipeline(DenoisingPipeline):
    """Base of the pipelines whose transformer denoises latents; subclasses say what the transformer is called with.

    Parameters
    ----------
    transformer : nn.Module
    text : TextEncoder
        `T5Text`, or `RandomText` to time a model without its text encoder.
    scheduler
        See `DenoisingPipeline`.
    vae : VideoDecoder, or diffusers AutoencoderKL of videos, optional
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
        channels = transformer.config.in_channels
        if isinstance(vae, VideoDecoder):
            if vae.latent_channels != channels:
                raise ValueError(f"vae: has {vae.latent_channels} latent channels, must have {channels}")
        elif vae is not None:
            check_vae(vae, channels)
        super().__init__(transformer, scheduler)
        self.text = text
        self.vae = vae
        self.offload_text = False
        """Whether the text encoder waits in host memory while the transformer runs."""
        self.text_seconds = 0.0
        """What encoding texts has taken since this was last set to 0."""

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
            if isinstance(module, VideoDecoder):
                module.to(*args, **kwargs)
            elif module is not None:
                # Not ModelMixin.to: it warns of every change of dtype.
                nn.Module.to(module, *args, **kwargs)
        if self.text_encoder is not None:
            cast_encoder(self.text_encoder, *args, **kwargs)
        return self

    def decode(self, latents: Tensor, size: VideoSize) -> Tensor:
        """Videos of latents from `__call__`: uint8 [B, frames, height, width, 3] on the CPU.

        Height and width are those that the latents stand for, multiples of 8: not always those of `size`.

        Raises
        ------
        ValueError
            The pipeline has no VAE, or the latents are not those of a video of `size`.
        """
        return torch.stack([torch.from_numpy(self.decode_one(video, size).frames) for video in latents])

    def decode_one(self, latents: Tensor, size: VideoSize, sink: Sink | None = None) -> Decoded:
        """The video of latents [C, T, H, W]; `sink` gets its frames as they are done. Errors as for `decode`."""
        if self.vae is None:
            raise ValueError("vae: got None, must be given to decode")
        return decode_video(self.vae, latents, size, self.latent_scale, self.latent_shift, sink)

    def _encode(self, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Embeddings [B, 1, L, C] and mask [B, L] for the transformer; a text that comes twice is encoded once."""
        start = time.perf_counter()
        distinct = list(dict.fromkeys(texts))
        if self.offload_text and self.text_encoder is not None:
            cast_encoder(self.text_encoder, self.device)
        embeddings, mask = self.text.encode(distinct, length)
        if self.offload_text and self.text_encoder is not None:
            cast_encoder(self.text_encoder, "cpu")
        rows = [distinct.index(text) for text in texts]
        embeddings, mask = embeddings.to(self.device, self.dtype)[rows][:, None], mask.to(self.device)[rows]
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # once a text: else its time would be counted as denoising
        self.text_seconds += time.perf_counter() - start
        return embeddings, mask

    def _shape(self, batch: int, size: VideoSize) -> tuple[int, ...]:
        """Of the latents, [B, C, T, H, W]."""
        return (batch, self.transformer.config.in_channels, *size.latent)
