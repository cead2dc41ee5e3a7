"""What the demo's training shows when: easy scenes until the model follows the direction, then everything.

Which way a shape moves is the product of three things: the word, the place and the frame. No two of them tell
anything, so a gradient finds it late and all at once, and the sooner the less else there is to explain. Easy
scenes at high noise bring that moment forward several times; the rest is quickly learned after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from pab_kernels.demo.scenes import SceneBatch, render, sample_scenes
from pab_kernels.pipelines.demo_captions import VOCABULARY, WORD_ID

Predict = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Curriculum:
    """Decides the share of easy scenes from the used fraction of the time and from the direction gap.

    Parameters
    ----------
    threshold : float
        Direction gap (see `direction_gap`) at which the model counts as following.
    patience : float
        Fraction of the time after which harder scenes come in any case.
    ramp : float
        Fraction of the time over which the easy share then falls from 1 to 0.
    released : float, optional
        When harder scenes began, if they have; -1 for no easy scenes at all.
    """

    def __init__(
        self,
        threshold: float = 0.25,
        patience: float = 0.4,
        ramp: float = 0.15,
        released: float | None = None,
    ) -> None:
        self.threshold, self.patience, self.ramp, self.released = threshold, patience, ramp, released

    def update(self, fraction: float, gap: float) -> bool:
        """Note a measured gap; returns True when this is the moment at which harder scenes begin."""
        if self.released is None and (gap > self.threshold or fraction > self.patience):
            self.released = fraction
            return True
        return False

    def easy(self, fraction: float) -> float:
        """Share of easy scenes, 1 to 0."""
        if self.released is None:
            return 1.0
        return min(1.0, max(0.0, 1 - (fraction - self.released) / self.ramp))


def scene_stream(
    generator: torch.Generator, batch: int, easy: Callable[[], float], ahead: int = 64
) -> Iterator[SceneBatch]:
    """Yield batches for ever. Many are drawn at once: a draw makes the host wait for the GPU."""
    while True:
        drawn = sample_scenes(batch * ahead, generator, easy=easy())
        for first in range(0, batch * ahead, batch):
            yield drawn[first : first + batch]


@torch.no_grad()
def direction_gap(
    predict: Predict,
    alphas_cumprod: torch.Tensor,
    frames: int,
    size: int,
    dtype: torch.dtype,
    batch: int = 64,
    timestep: int = 900,
) -> float:
    """Measure how much worse v is predicted when left and right, up and down are exchanged in the text.

    Parameters
    ----------
    predict : callable
        Maps pixels [B, 3, T, H, W], timesteps [B] and tokens [B, L] to v.
    alphas_cumprod : torch.Tensor
        float32 [1000], on the device of the model.
    frames, size : int
        Shape of the videos.
    dtype : torch.dtype
        Of the pixels that the model takes.
    batch, timestep : int
        Scenes, the same each time, and the noise level.

    Returns
    -------
    float
        Relative increase of the error: about 0 for a model that ignores the direction.
    """
    device = alphas_cumprod.device
    generator = torch.Generator().manual_seed(12345)
    scenes = sample_scenes(batch, generator, device, easy=1.0)
    video = render(scenes, frames, size)
    noise = torch.randn(video.shape, generator=generator).to(device)
    signal, sigma = alphas_cumprod[timestep].sqrt(), (1 - alphas_cumprod[timestep]).sqrt()
    noisy, target = (signal * video + sigma * noise).to(dtype), signal * noise - sigma * video
    exchange = torch.arange(len(VOCABULARY), device=device)
    for one, other in (("left", "right"), ("up", "down")):
        exchange[WORD_ID[one]], exchange[WORD_ID[other]] = WORD_ID[other], WORD_ID[one]
    timesteps = torch.full((batch,), timestep, device=device)
    right, wrong = (
        (predict(noisy, timesteps, tokens).float() - target).square().mean()
        for tokens in (scenes.tokens, exchange[scenes.tokens])
    )
    return float(wrong / right - 1)
