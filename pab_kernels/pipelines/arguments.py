"""What all pipelines are asked with: prompts, negative prompts, seeds or generators, several videos a prompt."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch

MAX_STEPS = 1000
"""Timesteps of training, of which a run takes some."""

Prompt = str | Sequence[str]
NegativePrompt = str | Sequence[str | None] | None
Seed = SupportsIndex | Sequence[SupportsIndex] | None
Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True)
class Prompts:
    """What is asked for: B videos, each with its prompt and negative prompt, and what draws their noise.

    `generators` is one generator for each video, or a single one for all, which then draws the batch at once.
    """

    texts: tuple[str, ...]
    negatives: tuple[str, ...]
    generators: torch.Generator | list[torch.Generator]

    @classmethod
    def of(
        cls,
        prompt: Prompt,
        negative_prompt: NegativePrompt = None,
        seed: Seed = None,
        generator: Generators = None,
        num_videos_per_prompt: int = 1,
    ) -> Prompts:
        """Bring single values to one for each video; the videos of a prompt follow each other.

        Parameters
        ----------
        prompt : str or sequence of str
        negative_prompt : str or sequence of str, optional
            One for all, or one for each prompt; None is the empty one.
        seed : int or sequence of int, optional
            See `seeds_of`; generators on the CPU, so that a seed means the same on every device and in every batch.
        generator : torch.Generator or sequence of torch.Generator, optional
            Instead of seeds, as in diffusers: one for all, or one for each video.
        num_videos_per_prompt : int

        Raises
        ------
        TypeError
            Not text, not a whole number, or not a generator.
        ValueError
            No prompts, another number of negative prompts, seeds or generators, or both seeds and generators.
        """
        texts = [prompt] if isinstance(prompt, str) else _listed("prompt", prompt, "a string or a list of strings")
        if not texts:
            raise ValueError("prompt must be a string or a non-empty list of strings, got an empty list")
        each = whole("num_videos_per_prompt", num_videos_per_prompt)
        if each < 1:
            raise ValueError(f"num_videos_per_prompt must be at least 1, got {each}")
        if negative_prompt is None or isinstance(negative_prompt, str):
            negatives: list[Any] = [negative_prompt] * len(texts)
        else:
            negatives = _listed("negative_prompt", negative_prompt, "None, a string or a list of strings")
        check_count("negative_prompt", len(negatives), len(texts))
        negatives = ["" if negative is None else negative for negative in negatives]
        for name, values in (("prompt", texts), ("negative_prompt", negatives)):
            for value in values:
                if not isinstance(value, str):
                    raise TypeError(f"{name}: got {value!r}, must be a string")
        count = len(texts) * each
        if generator is None:
            seeds = seeds_of(seed, count, "prompts" if each == 1 else "videos")
            generators: Any = [torch.Generator().manual_seed(one) for one in seeds]
        elif seed is not None:
            raise ValueError(f"seed, generator: got both, must be one of them: seed is {seed!r}")
        else:
            generators = generator if isinstance(generator, torch.Generator) else list(generator)
            if isinstance(generators, list):
                check_count("generator", len(generators), count, "prompts" if each == 1 else "videos")
                for one in generators:
                    if not isinstance(one, torch.Generator):
                        raise TypeError(f"generator: got {type(one).__name__}, must be a torch.Generator")
        return cls(_repeat(texts, each), _repeat(negatives, each), generators)


def seeds_of(seed: Seed, count: int, things: str = "prompts") -> list[int]:
    """Seeds of `count` videos: an integer s, of Python or NumPy, stands for s, s + 1, ..., None for 0.

    Raises
    ------
    TypeError
        Not a whole number.
    ValueError
        Another number of seeds, or one that does not fit 64 bits.
    """
    if seed is None or not _is_sequence(seed):
        first = 0 if seed is None else whole("seed", seed)
        seeds = [first + i for i in range(count)]
    else:
        assert isinstance(seed, Sequence) or hasattr(seed, "__iter__")
        seeds = [whole("seed", one) for one in seed]  # an array too
        check_count("seed", len(seeds), count, things)
    for one in seeds:
        if not -(2**63) <= one < 2**64:
            raise ValueError(f"seed: got {one}, must fit 64 bits: at least {-(2**63)} and less than {2**64}")
    return seeds


def whole(name: str, value: Any) -> int:
    """`value` as an int: of Python or NumPy, or a tensor of one. Raises TypeError for anything else, and for bools."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name}: got {value!r}, must be an integer")


def check_count(name: str, found: int, count: int, things: str = "prompts") -> None:
    """Raise ValueError unless there is one of `things` for each."""
    if found != count:
        raise ValueError(f"{name} must be a single value or one for each of {count} {things}, got {found}")


def check_steps(num_inference_steps: int) -> int:
    """The number of steps. Raises ValueError unless it is at least 1 and at most the 1000 of training."""
    steps = whole("num_inference_steps", num_inference_steps)
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"num_inference_steps must be in [1, {MAX_STEPS}], got {steps}")
    return steps


def check_guidance(guidance_scale: float) -> float:
    """The guidance scale. Raises TypeError or ValueError unless it is a finite number."""
    try:
        scale = float(guidance_scale)
    except (TypeError, ValueError):
        raise TypeError(f"guidance_scale: got {guidance_scale!r}, must be a number") from None
    if not math.isfinite(scale):
        raise ValueError(f"guidance_scale: got {scale}, must be finite")
    return scale


def _is_sequence(value: Any) -> bool:
    return getattr(value, "ndim", 1) > 0 and hasattr(value, "__len__") and not isinstance(value, str)


def _listed(name: str, values: Any, wanted: str) -> list[Any]:
    if not _is_sequence(values):
        raise TypeError(f"{name}: got {values!r}, must be {wanted}")
    return list(values)


def _repeat(values: Sequence[str], each: int) -> tuple[str, ...]:
    return tuple(value for value in values for _ in range(each))
