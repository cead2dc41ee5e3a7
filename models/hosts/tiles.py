"""Pieces of a video as Open-Sora-Plan cuts them: chunks in time that share a frame, tiles in space that blend."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tiling:
    """Largest pieces, in pixels and latents. The names are the original's.

    A tile blends over ``int(tile_sample_min_size * tile_overlap_factor)`` pixels with its neighbours. Where
    ``tile_latent_min_size * (1 - tile_overlap_factor)`` is not whole, the original's arithmetic gives a video of
    another width than 8 times the latent's; so does this, and says so.
    """

    tile_sample_min_size: int = 256
    tile_latent_min_size: int = 32
    tile_sample_min_size_t: int = 65
    tile_latent_min_size_t: int = 17
    tile_overlap_factor: float = 0.25

    def __post_init__(self) -> None:
        for name in ("tile_sample_min_size", "tile_latent_min_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, must be at least 1")
        for name in ("tile_sample_min_size_t", "tile_latent_min_size_t"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name}: got {getattr(self, name)}, must be at least 2: chunks share one")
        if not (0 <= self.tile_overlap_factor < 1 and int(self.tile_latent_min_size * (1 - self.tile_overlap_factor))):
            raise ValueError(
                f"tile_overlap_factor: got {self.tile_overlap_factor} for tiles of {self.tile_latent_min_size}, "
                "must be in [0, 1) and leave at least one latent"
            )
        if self.tile_latent_min_size * (1 - self.tile_overlap_factor) % 1 > 1e-9:
            log.warning("tiles of %s latents overlap by a part of one: the video will have another width", self)

    def exceeded(self, x: Tensor, *, latent: bool) -> bool:
        """Whether [B, C, T, H, W], latents or pixels, is larger than one piece."""
        side = self.tile_latent_min_size if latent else self.tile_sample_min_size
        frames = self.tile_latent_min_size_t if latent else self.tile_sample_min_size_t
        return x.shape[2] > frames or max(x.shape[3:]) > side


def chunks(length: int, most: int) -> list[tuple[int, int]]:
    """Start and end of each chunk of at most `most`; one begins with the last of the one before."""
    starts = range(0, length, most - 1)
    ends = [min(start + most, length) for start in starts]
    # The original makes a last chunk of one frame only where that is all there is.
    return [(a, b) for a, b in zip(starts, ends, strict=True) if b - a > 1 or a == 0]


def over_time(run: Callable[[Tensor], Tensor], x: Tensor, most: int) -> Tensor:
    """`run` on each chunk of x [B, C, T, H, W]; what stands for the shared frame counts once."""
    pieces = [run(x[:, :, a:b]) for a, b in chunks(x.shape[2], most)]
    return torch.cat([pieces[0], *(piece[:, :, 1:] for piece in pieces[1:])], dim=2)


def tiles(x: Tensor, side: int, stride: int) -> list[list[Tensor]]:
    """Rows of tiles of x [B, C, T, H, W], of `side` pixels or what is left, every `stride`."""
    return [
        [x[..., i : i + side, j : j + side] for j in range(0, x.shape[4], stride)] for i in range(0, x.shape[3], stride)
    ]


def over_space(run: Callable[[Tensor], Tensor], x: Tensor, side: int, stride: int, blend: int, keep: int) -> Tensor:
    """`run` on tiles of x [B, C, T, H, W], row by row.

    Parameters
    ----------
    side, stride
        Of tiles, in pixels of x.
    blend, keep
        Pixels of the result that a tile shares with the one above and the one to its left, and that it contributes.
    """
    rows = [list(map(run, row)) for row in tiles(x, side, stride)]
    result = []
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            # In place, as the original: the neighbours have been blended already.
            if i > 0:
                _blend(rows[i - 1][j], tile, blend, 3)
            if j > 0:
                _blend(row[j - 1], tile, blend, 4)
        result.append(torch.cat([tile[..., :keep, :keep] for tile in row], dim=4))
    return torch.cat(result, dim=3)


def _blend(before: Tensor, tile: Tensor, extent: int, dim: int) -> None:
    """Fade the start of `tile` in over the end of `before`, in place."""
    extent = min(before.shape[dim], tile.shape[dim], extent)
    if extent == 0:
        return
    weight = torch.arange(extent, device=tile.device, dtype=torch.float32) / extent
    weight = weight.to(tile.dtype).view(-1, *(1,) * (4 - dim))
    start, end = tile.narrow(dim, 0, extent), before.narrow(dim, before.shape[dim] - extent, extent)
    start.copy_(end * (1 - weight) + start * weight)
