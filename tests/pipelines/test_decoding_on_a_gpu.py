"""Decoding on planes in bfloat16 on a GPU: as near to float32 as the original, and the same from a graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pab_kernels.models import autoencoders
from pab_kernels.pipelines.decoding import VideoDecoder


def error(video: torch.Tensor, exact: torch.Tensor) -> float:
    return float((video.float() - exact).norm() / exact.norm())


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """But for roundings that another order of sums tips."""
    return bool(np.abs(a.astype(int) - b).max() <= 2)


@pytest.mark.gpu
@torch.no_grad()
def test_bfloat16_is_no_further_from_float32_than_the_original(device):
    small: dict[str, Any] = {"hidden_size": 64, "hidden_size_mult": (1, 1, 1, 1), "num_res_blocks": 1}
    vae = autoencoders.random_weights("open_sora_plan_v120", dtype=torch.float32, device=device, **small)
    latents = torch.randn(1, 4, 3, 7, 9, device=device)
    exact = vae.decode(latents)
    torch.nn.Module.to(vae, torch.bfloat16)
    original = vae.decode(latents.bfloat16())
    decoder = VideoDecoder(vae)
    assert decoder.on_planes
    ours = torch.cat(list(decoder._videos(latents.bfloat16(), 9))).permute(3, 0, 1, 2)[None]
    assert error(ours, exact) <= 1.2 * error(original, exact)
    # The first call is eager, the second captures a graph, the third replays it, then with other latents.
    calls = [decoder.decode(latents[0], 9).frames for _ in range(3)]
    assert same(calls[0], calls[1])
    assert same(calls[0], calls[2])
    other = torch.randn(4, 3, 7, 9, device=device)
    from_graph, eager = decoder.decode(other, 9).frames, VideoDecoder(vae).decode(other, 9).frames
    assert same(from_graph, eager)
    assert not same(eager, calls[0])
    pieces: list[int] = []
    decoder.decode(other, 9, lambda frames: pieces.append(len(frames)))
    assert sum(pieces) == 9
