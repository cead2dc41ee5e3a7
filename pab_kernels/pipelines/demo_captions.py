"""The captions of the demo model: a small grammar, its vocabulary, and the prompts of the fixed evaluation."""

from __future__ import annotations

import random
from typing import NamedTuple

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.92, 0.08, 0.08),
    "orange": (1.00, 0.50, 0.02),
    "yellow": (0.98, 0.92, 0.08),
    "green": (0.10, 0.78, 0.18),
    "cyan": (0.05, 0.86, 0.92),
    "blue": (0.10, 0.22, 0.96),
    "purple": (0.70, 0.10, 0.86),
    "white": (0.98, 0.98, 0.98),
}
SHAPES = ("circle", "square", "triangle", "star")
SIZES = ("small", "large")
MOTIONS = ("moves left", "moves right", "moves up", "moves down", "bounces", "rotates in place")
DIRECTIONS = ("left", "right", "up", "down")  # the first four motions, in the same order
TONES = ("dark", "light")
TEXTURES = ("plain", "striped", "checkered", "gradient")

PAD = "<pad>"
VOCABULARY: tuple[str, ...] = (
    PAD,
    *("a", "an", "over", "background", "moves", "bounces", "rotates", "in", "place"),
    *DIRECTIONS,
    *SIZES,
    *COLOURS,
    *SHAPES,
    *TONES,
    *TEXTURES,
)
TEXT_LENGTH = 16

WORD_ID = {word: index for index, word in enumerate(VOCABULARY)}


def caption(
    colour: str,
    shape: str,
    motion: str,
    size: str | None = None,
    tone: str | None = None,
    texture: str | None = None,
) -> str:
    """Write one caption.

    Parameters
    ----------
    colour, shape, motion : str
        A key of `COLOURS`, a member of `SHAPES`, a member of `MOTIONS`.
    size, tone, texture : str, optional
        Members of `SIZES`, `TONES`, `TEXTURES`. Without tone and texture there is no background clause.

    Returns
    -------
    str
        For example "a small red circle moves left over a dark striped background".

    Raises
    ------
    ValueError
        If an argument is not one of the words above.
    """
    allowed: dict[str, tuple[str | None, tuple[str, ...]]] = {
        "colour": (colour, tuple(COLOURS)),
        "shape": (shape, SHAPES),
        "motion": (motion, MOTIONS),
        "size": (size, SIZES),
        "tone": (tone, TONES),
        "texture": (texture, TEXTURES),
    }
    optional = ("size", "tone", "texture")
    for name, (value, words) in allowed.items():
        if value not in words and not (value is None and name in optional):
            raise ValueError(f"{name} must be one of {', '.join(words)}, got {value!r}")
    article = "an" if (size or colour)[0] in "aeiou" else "a"
    words_out = [article, size, colour, shape, motion]
    if tone or texture:
        words_out += ["over a", tone, texture, "background"]
    return " ".join(word for word in words_out if word)


class EvaluationPrompt(NamedTuple):
    """A prompt with the colour and the direction of motion that the video must show."""

    prompt: str
    colour: str
    direction: str


def evaluation_prompts(n: int = 50, seed: int = 0) -> list[EvaluationPrompt]:
    """Return a fixed list of prompts, balanced over colours and directions.

    Parameters
    ----------
    n : int
        Number of prompts, at least 1.
    seed : int
        Another seed gives other prompts.

    Raises
    ------
    ValueError
        If n is below 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    rng = random.Random(seed)
    pairs: list[tuple[str, str]] = []
    while len(pairs) < n:
        block = [(colour, direction) for colour in COLOURS for direction in DIRECTIONS]
        rng.shuffle(block)
        pairs += block
    prompts = []
    for colour, direction in pairs[:n]:
        text = caption(
            colour,
            rng.choice(SHAPES),
            f"moves {direction}",
            rng.choice((None, *SIZES)),
            rng.choice((None, *TONES)),
            rng.choice((None, *TEXTURES)),
        )
        prompts.append(EvaluationPrompt(text, colour, direction))
    return prompts
