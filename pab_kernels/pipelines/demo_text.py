"""The demo model's text embedding: words of a fixed vocabulary to vectors."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from torch import nn

from pab_kernels.pipelines.demo_captions import PAD, TEXT_LENGTH, VOCABULARY

MOST = 2**14
"""Words of a prompt, and channels."""


class TextEmbedding(nn.Module):
    """Words of a fixed vocabulary to embeddings of a fixed length, so that attention needs no text mask.

    Parameters
    ----------
    vocabulary : sequence of str
        The words; the first one is padding and cannot be written in a prompt.
    length : int
        Words a prompt may have, L.
    channels : int
        Size of an embedding, C.

    Raises
    ------
    ValueError
        Naming the parameter, its value and what is allowed.
    """

    def __init__(self, vocabulary: Sequence[str] = VOCABULARY, length: int = TEXT_LENGTH, channels: int = 64) -> None:
        super().__init__()
        if isinstance(vocabulary, str) or not vocabulary or not all(isinstance(word, str) for word in vocabulary):
            raise ValueError(f"vocabulary: got {vocabulary!r:.80}, must be words")
        for name, size in (("length", length), ("channels", channels)):
            if not isinstance(size, int) or not 1 <= size <= MOST:
                raise ValueError(f"{name}: got {size!r:.80}, must be a whole number from 1 to {MOST}")
        self.vocabulary = tuple(vocabulary)
        self.length = length
        self.channels = channels
        self.words = nn.Embedding(len(self.vocabulary), channels)
        self.position = nn.Parameter(torch.randn(length, channels) * 0.5)
        self._ids = {word: index for index, word in enumerate(self.vocabulary) if word != PAD}

    def tokenize(self, prompt: str) -> list[int]:
        """Return the L word indices of a prompt. Case and punctuation do not matter; "" is all padding.

        Raises
        ------
        ValueError
            If a word is not in the vocabulary, or there are more than L words.
        """
        words = [word for word in (raw.strip(".,;:!?\"'").lower() for raw in prompt.split()) if word]
        for word in words:
            if word not in self._ids:
                near = difflib.get_close_matches(word, list(self._ids), n=3, cutoff=0.5)
                hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
                raise ValueError(
                    f"prompt {prompt!r} has a word that the model does not know: {word!r}.{hint} "
                    f"Known words: {', '.join(self._ids)}."
                )
        if len(words) > self.length:
            raise ValueError(f"prompt must have at most {self.length} words, got {len(words)}: {prompt!r}")
        return [self._ids[word] for word in words] + [0] * (self.length - len(words))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embed tokens, int64 [B, L], to [B, L, C] in the parameters' dtype."""
        return self.words(tokens) + self.position

    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        """Embed B prompts to [B, L, C], on the device and in the dtype of the parameters."""
        tokens = torch.tensor([self.tokenize(prompt) for prompt in prompts], device=self.position.device)
        return self(tokens)
