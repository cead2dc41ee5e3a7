"""Text in, embeddings out: T5 or mT5 from transformers, or random numbers where there is no text encoder."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pab_kernels.distributed.spread import shared

T5_ID = "DeepFloyd/t5-v1_1-xxl"
MT5_ID = "google/mt5-xxl"


class TextEncoder(Protocol):
    """What a pipeline needs of its text encoder."""

    @property
    def channels(self) -> int:
        """Size of a token's embedding."""

    def encode(self, prompts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Embeddings [B, length, channels] and mask bool [B, length], True where a token is real."""


def _check_length(prompts: Sequence[str], lengths: Sequence[int], limit: int) -> None:
    for prompt, length in zip(prompts, lengths, strict=True):
        if length > limit:
            start = prompt if len(prompt) <= 40 else f"{prompt[:40]}..."
            raise ValueError(f"prompt: {start!r} has {length} tokens, must have at most {limit}: shorten it")


def kept_in_float32(encoder: nn.Module) -> list[nn.Parameter]:
    """The parameters that a float16 copy of `encoder` keeps in float32: those of the modules its class names.

    T5's feed-forward output `wo` leaves the range of float16. transformers keeps it in float32 where it loads a model
    in float16, but `Module.to` and `half` cast it with the rest.
    """
    names = set(getattr(encoder, "_keep_in_fp32_modules", None) or ())
    return [parameter for name, parameter in encoder.named_parameters() if names.intersection(name.split(".")[:-1])]


def cast_encoder(encoder: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Move or cast `encoder` as `torch.nn.Module.to` does; in float16 it then is as if it had been loaded so."""
    kept = [(parameter, parameter.data) for parameter in kept_in_float32(encoder)]
    nn.Module.to(encoder, *args, **kwargs)
    for parameter, before in kept:
        if parameter.dtype == torch.float16:
            parameter.data = before.to(parameter.device, torch.float32)


class T5Text:
    """A T5 or mT5 encoder with its tokenizer, both from transformers.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        With a padding token.
    encoder : T5EncoderModel or MT5EncoderModel
        In float16 too: what leaves its range is computed in float32, whoever cast the encoder.
    """

    def __init__(self, tokenizer: Any, encoder: Any) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder

    @property
    def channels(self) -> int:
        """Size of a token's embedding."""
        return self.encoder.config.d_model

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Encode each prompt padded to `length` tokens.

        Parameters
        ----------
        prompts : sequence of str
        length : int
            Tokens that the model takes, the end-of-text token included.

        Returns
        -------
        embeddings : Tensor
            [B, length, channels] in the encoder's dtype, on its device.
        mask : Tensor
            bool [B, length], True for real tokens.

        Raises
        ------
        ValueError
            A prompt has more tokens than `length`. It is not cut: the end of a prompt may be what matters.
        """
        with torch.inference_mode(False):
            for parameter in kept_in_float32(self.encoder):
                if parameter.dtype == torch.float16:  # by the encoder's own `to` or `half`
                    parameter.data = parameter.data.float()
        texts = list(prompts)
        _check_length(texts, [len(ids) for ids in self.tokenizer(texts)["input_ids"]], length)
        tokens = self.tokenizer(texts, padding="max_length", max_length=length, return_tensors="pt")
        device = next(self.encoder.parameters()).device
        mask = tokens["attention_mask"].to(device)
        embeddings = self.encoder(input_ids=tokens["input_ids"].to(device), attention_mask=mask).last_hidden_state
        return embeddings, _with_a_token(mask.bool())


class RandomText:
    """Normal numbers seeded by the prompt, to time a model without its text encoder. A token a word, and one more.

    Parameters
    ----------
    channels : int
        Size of a token's embedding.
    """

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def encode(self, prompts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """As `T5Text.encode`; float32 on the CPU."""
        lengths = [len(prompt.split()) + 1 for prompt in prompts]
        _check_length(prompts, lengths, length)
        generators = [torch.Generator().manual_seed(zlib.crc32(prompt.encode())) for prompt in prompts]
        rows = [torch.randn(length, self.channels, generator=generator) for generator in generators]
        return torch.stack(rows), torch.arange(length) < torch.tensor(lengths)[:, None]


class SharedText:
    """One encoder for all ranks of torch's default process group, which encode the same prompts at the same time.

    Parameters
    ----------
    load : callable
        Loads it, on rank 0 alone; the others get what it gives.
    channels : int
        Size of a token's embedding.
    device : torch.device
        Of the ranks' exchanges.
    """

    def __init__(self, load: Callable[[], TextEncoder], channels: int, device: torch.device | str) -> None:
        self.text = load() if dist.get_rank() == 0 else None
        self.channels = channels
        self.device = torch.device(device)

    @property
    def encoder(self) -> Any:
        """The module that encodes, where this rank has it."""
        return getattr(self.text, "encoder", None)

    def encode(self, prompts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """As `T5Text.encode`, on the CPU."""
        return shared(lambda: self._encode(prompts, length), self.device)

    def _encode(self, prompts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        assert self.text is not None
        embeddings, mask = self.text.encode(prompts, length)
        return embeddings.cpu(), mask.cpu()


def _with_a_token(mask: Tensor) -> Tensor:
    """An empty prompt of a tokenizer without an end-of-text token still needs something to attend to."""
    mask[:, 0] |= ~mask.any(dim=1)
    return mask
