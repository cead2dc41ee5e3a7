"""Synthetic scenes for the demo model, from random draws to pixels.

A scene is one coloured shape that moves, bounces or rotates over a muted background, with a caption such as
"a red circle moves left over a striped background". Everything is tensors from the draw to the pixels, so
that a GPU can render training batches on the fly.

Coordinates are fractions of the frame: x grows to the right, y grows downwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch

from pab_kernels.pipelines.demo_captions import (
    COLOURS,
    DIRECTIONS,
    MOTIONS,
    SHAPES,
    SIZES,
    TEXT_LENGTH,
    TEXTURES,
    TONES,
    VOCABULARY,
    WORD_ID,
)

_BOUNCES, _ROTATES = MOTIONS.index("bounces"), MOTIONS.index("rotates in place")
_DRAWS = 40  # random numbers a scene


@dataclass(frozen=True)
class SceneBatch:
    """N scenes as tensors on one device. The first axis of every field is N.

    Attributes
    ----------
    tokens : torch.Tensor
        int64 [N, TEXT_LENGTH], the caption as indices into `VOCABULARY`, padded at the end with 0.
    colour, shape, motion, tone, texture : torch.Tensor
        int64 [N], indices into the tuples of this module.
    rgb, background_a, background_b : torch.Tensor
        float32 [N, 3] in [0, 1]: the shape's colour and the background's two colours.
    radius : torch.Tensor
        float32 [N], nominal radius as a fraction of the frame.
    start, travel : torch.Tensor
        float32 [N, 2], centre (x, y) in the first frame and its displacement up to the last one.
    bounce : torch.Tensor
        float32 [N, 3]: height, bounces a clip, phase. Height 0 for a shape that does not bounce.
    turn : torch.Tensor
        float32 [N, 2]: angle in the first frame and the change up to the last one, in radians.
    pattern : torch.Tensor
        float32 [N, 3]: angle in radians, period as a fraction of the frame, phase of the background.
    """

    tokens: torch.Tensor
    colour: torch.Tensor
    shape: torch.Tensor
    motion: torch.Tensor
    tone: torch.Tensor
    texture: torch.Tensor
    rgb: torch.Tensor
    background_a: torch.Tensor
    background_b: torch.Tensor
    radius: torch.Tensor
    start: torch.Tensor
    travel: torch.Tensor
    bounce: torch.Tensor
    turn: torch.Tensor
    pattern: torch.Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, index: slice) -> SceneBatch:
        return SceneBatch(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    @property
    def captions(self) -> list[str]:
        """The captions as text."""
        return [" ".join(VOCABULARY[i] for i in row if i) for row in self.tokens.tolist()]

    @property
    def colour_names(self) -> list[str]:
        """The colour's name for each scene."""
        names = list(COLOURS)
        return [names[i] for i in self.colour.tolist()]

    @property
    def directions(self) -> list[str | None]:
        """The direction's name for each scene, None for one that bounces or rotates in place."""
        return [DIRECTIONS[i] if i < len(DIRECTIONS) else None for i in self.motion.tolist()]


def _tokens(index: dict[str, torch.Tensor], show: dict[str, torch.Tensor]) -> torch.Tensor:
    """Build [N, TEXT_LENGTH] token ids: one column a word that may be absent, then push the gaps to the end."""
    colour = index["colour"]
    device = colour.device

    def pick(words: tuple[str, ...], chosen: torch.Tensor) -> torch.Tensor:
        return torch.tensor([WORD_ID[w] for w in words], device=device)[chosen]

    def motion_word(position: int) -> tuple[int, ...]:
        return tuple(WORD_ID[m.split()[position]] if len(m.split()) > position else 0 for m in MOTIONS)

    bare_vowel = (colour == list(COLOURS).index("orange")) & ~show["size"]
    background = show["tone"] | show["texture"]
    columns = [
        torch.where(bare_vowel, WORD_ID["an"], WORD_ID["a"]),
        pick(SIZES, index["size"]) * show["size"],
        pick(tuple(COLOURS), colour),
        pick(SHAPES, index["shape"]),
        *(torch.tensor(motion_word(position), device=device)[index["motion"]] for position in range(3)),
        background * WORD_ID["over"],
        background * WORD_ID["a"],
        pick(TONES, index["tone"]) * show["tone"],
        pick(TEXTURES, index["texture"]) * show["texture"],
        background * WORD_ID["background"],
    ]
    columns += [torch.zeros_like(colour)] * (TEXT_LENGTH - len(columns))
    ids = torch.stack(columns, dim=1)
    return ids.gather(1, (ids == 0).to(torch.uint8).argsort(dim=1, stable=True))


def _hsv(hue: torch.Tensor, saturation: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Convert [N] hue, saturation, value in [0, 1] to [N, 3] RGB in [0, 1]."""
    ramp = (hue[:, None] * 6 + torch.tensor([0.0, 4.0, 2.0], device=hue.device)) % 6
    return value[:, None] * (1 - saturation[:, None] * (1 - ((ramp - 3).abs() - 1).clamp(0, 1)))


def sample_scenes(
    n: int, generator: torch.Generator, device: torch.device | str | None = None, easy: float = 0.0
) -> SceneBatch:
    """Draw n random scenes.

    Parameters
    ----------
    n : int
        Number of scenes, at least 1.
    generator : torch.Generator
        Source of randomness; its device draws the numbers.
    device : torch.device or str, optional
        Where the batch lives. Default: the generator's device.
    easy : float
        Share of scenes, 0 to 1, that are held to a shape moving in one direction over a plain dark background.

    Returns
    -------
    SceneBatch
        The same for the same generator state, on whatever device the batch lives.

    Raises
    ------
    ValueError
        If n is below 1 or easy is not in [0, 1].
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if not 0 <= easy <= 1:
        raise ValueError(f"easy must be in [0, 1], got {easy}")
    u = iter(torch.rand(_DRAWS, n, generator=generator, device=generator.device).to(device or generator.device))

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * next(u)

    def choose(words: int) -> torch.Tensor:
        return (next(u) * words).long().clamp(max=words - 1)

    hard = next(u) >= easy
    directed, other = choose(len(DIRECTIONS)), choose(len(MOTIONS) - len(DIRECTIONS)) + len(DIRECTIONS)
    background, light = next(u) < 0.8, next(u) < 0.5
    index = {
        "colour": choose(len(COLOURS)),
        "shape": choose(len(SHAPES)),
        "motion": torch.where(hard & (next(u) < 0.25), other, directed),
        "size": choose(len(SIZES)),
        # Only a caption that says so makes the ground light: left open, its brightness would be most of what
        # the model cannot know, and drown what it is to learn.
        "tone": (hard & background & light).long(),
        "texture": choose(len(TEXTURES)) * hard,
    }
    motion = index["motion"]
    # A circle that rotates would not show it.
    angular = 1 + choose(len(SHAPES) - 1)
    index["shape"] = torch.where((motion == _ROTATES) & (index["shape"] == 0), angular, index["shape"])
    show_tone = (next(u) < 0.5) | (index["tone"] == 1)
    show = {
        "size": next(u) < 0.5,
        "tone": background & show_tone,
        "texture": background & ((next(u) < 0.6) | ~show_tone),
    }

    radius = torch.where(index["size"] == 0, uniform(0.13, 0.165), uniform(0.175, 0.215))
    margin = 1.2 * radius  # the star's points reach this far
    span = 1 - 2 * margin
    # Most of the way that there is, so that where a shape starts already tells where it goes.
    distance = (span * uniform(0.75, 1.0)).clamp(max=0.6)
    heading = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1], [0, 0], [0, 0]], device=motion.device)[motion]
    travel = heading * distance[:, None]
    # The centre stays in [margin, 1 - margin] all the way: shrink the range of starts by the way to go.
    place = torch.stack([next(u), next(u)], dim=1)
    start = margin[:, None] + place * (span[:, None] - travel.abs()) + (-travel).clamp(min=0)
    bounces = motion == _BOUNCES
    height = torch.minimum(uniform(0.28, 0.48), span) * bounces
    floor = 1 - margin - 0.5 * next(u) * (span - height)
    start = torch.stack([start[:, 0], torch.where(bounces, floor, start[:, 1])], dim=1)
    spin = uniform(0.5 * math.pi, 1.2 * math.pi) * torch.where(next(u) < 0.5, -1.0, 1.0) * (motion == _ROTATES)

    rgb = torch.tensor(list(COLOURS.values()), device=motion.device)[index["colour"]]
    jitter = torch.stack([uniform(-0.04, 0.02) for _ in range(3)], dim=1)
    lift = 0.33 * index["tone"]
    low, high = uniform(0.05, 0.14) + lift, uniform(0.24, 0.32) + lift
    hue, saturation = next(u), uniform(0.0, 0.22)
    return SceneBatch(
        tokens=_tokens(index, show),
        colour=index["colour"],
        shape=index["shape"],
        motion=motion,
        tone=index["tone"],
        texture=index["texture"],
        rgb=(rgb + jitter).clamp(0, 1),
        background_a=_hsv(hue, saturation, low),
        background_b=_hsv((hue + uniform(-0.1, 0.1)) % 1, saturation, high),
        radius=radius,
        start=start,
        travel=travel,
        bounce=torch.stack([height, uniform(1.5, 2.5), next(u)], dim=1),
        turn=torch.stack([uniform(-0.25, 0.25), spin], dim=1),
        pattern=torch.stack(
            [(next(u) * 4).floor() * (math.pi / 4), uniform(0.25, 0.42), next(u)],
            dim=1,
        ),
    )


def _distances(x: torch.Tensor, y: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
    """Signed distance to the shape of radius about 1, negative inside. All tensors broadcast together."""
    reach = torch.sqrt(x * x + y * y)
    circle = reach - 1
    square = torch.maximum(x.abs(), y.abs()) - 0.85
    # Three half planes; the corner that points up lies at 1.2.
    triangle = torch.maximum(y, x.abs() * (math.sqrt(3) / 2) - y / 2) - 0.6
    # Fold the plane into one tenth of the star: a half point, from its tip at angle 0 to a notch at pi/5.
    tenth = math.pi / 5
    folded = (torch.remainder(torch.atan2(x, -y) + tenth, 2 * tenth) - tenth).abs()
    tip, notch = (1.2, 0.0), (0.55 * math.cos(tenth), 0.55 * math.sin(tenth))
    edge = (notch[0] - tip[0], notch[1] - tip[1])
    length = math.hypot(*edge)
    normal = (edge[1] / length, -edge[0] / length)
    star = (reach * torch.cos(folded) - tip[0]) * normal[0] + reach * torch.sin(folded) * normal[1]
    lower = torch.where(shape == 0, circle, square)
    upper = torch.where(shape == 2, triangle, star)
    return torch.where(shape < 2, lower, upper)


def _background(batch: SceneBatch, x: torch.Tensor, y: torch.Tensor, size: int) -> torch.Tensor:
    """Mix of the two background colours, [N, H, W] in [0, 1], for pixel centres x [1, 1, W] and y [1, H, 1]."""
    angle, period, phase = (column[:, None, None] for column in batch.pattern.unbind(1))
    along = x * torch.cos(angle) + y * torch.sin(angle)
    across = y * torch.cos(angle) - x * torch.sin(angle)

    def wave(distance: torch.Tensor) -> torch.Tensor:
        # A triangle wave, clipped to soft steps one pixel wide: +1 on one stripe and -1 on the next.
        triangle = (torch.remainder(distance / period + phase, 1) - 0.5).abs() - 0.25
        return (triangle * period * size * 2).clamp(-1, 1)

    stripes = wave(along)
    texture = batch.texture[:, None, None]
    mix = torch.where(texture == 1, 0.5 + 0.5 * stripes, 0.5 + 0.5 * stripes * wave(across))
    gradient = 0.5 + (x - 0.5) * torch.cos(angle) + (y - 0.5) * torch.sin(angle)
    # A gradient has a direction: half of the phases turn it round.
    gradient = torch.where(phase < 0.5, gradient, 1 - gradient).clamp(0, 1)
    return torch.where(texture == 0, phase, torch.where(texture == 3, gradient, mix))


def render(batch: SceneBatch, frames: int = 16, size: int = 48) -> torch.Tensor:
    """Render scenes to video, anti-aliased, on the batch's device.

    Parameters
    ----------
    batch : SceneBatch
        N scenes.
    frames : int
        Number of frames T, at least 2.
    size : int
        Height and width in pixels, at least 8.

    Returns
    -------
    torch.Tensor
        float32 [N, 3, T, size, size] in [-1, 1].

    Raises
    ------
    ValueError
        If frames or size is too small.
    """
    if frames < 2:
        raise ValueError(f"frames must be at least 2, got {frames}")
    if size < 8:
        raise ValueError(f"size must be at least 8 pixels, got {size}")
    device = batch.tokens.device
    time = torch.linspace(0, 1, frames, device=device)
    centres = (torch.arange(size, device=device) + 0.5) / size

    height, bounces, phase = (column[:, None] for column in batch.bounce.unbind(1))
    x0 = batch.start[:, 0, None] + batch.travel[:, 0, None] * time
    y0 = batch.start[:, 1, None] + batch.travel[:, 1, None] * time
    y0 = y0 - height * torch.sin(math.pi * (bounces * time + phase)).abs()
    angle = batch.turn[:, 0, None] + batch.turn[:, 1, None] * time

    radius = batch.radius[:, None, None, None]
    x = (centres[None, None, None, :] - x0[:, :, None, None]) / radius
    y = (centres[None, None, :, None] - y0[:, :, None, None]) / radius
    cos, sin = torch.cos(angle)[:, :, None, None], torch.sin(angle)[:, :, None, None]
    distance = _distances(x * cos + y * sin, y * cos - x * sin, batch.shape[:, None, None, None])
    cover = (0.5 - distance * radius * size).clamp(0, 1)[:, None]

    mix = _background(batch, centres[None, None, :], centres[None, :, None], size)[:, None]
    a, b = batch.background_a[:, :, None, None], batch.background_b[:, :, None, None]
    ground = (a + mix * (b - a))[:, :, None]
    rgb = batch.rgb[:, :, None, None, None]
    return (ground + cover * (rgb - ground)) * 2 - 1
