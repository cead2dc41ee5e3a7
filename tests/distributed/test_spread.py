"""What ranks share beside the transformer: text encoded once, and pieces decoded by all of them."""

import numpy as np
import pytest
import torch

from pab_kernels.distributed.launch import launch
from pab_kernels.models.hosts.tiles import Tiling
from pab_kernels.pipelines.decoding import VideoDecoder
from pab_kernels.pipelines.text import RandomText
from tests.distributed import rank_functions
from tests.vae_tools import tiny_vae

CASES = [  # latents, frames; with tiles of 4 x 4 latents and chunks of 3 for Open-Sora-Plan
    ("open_sora", (4, 11, 3, 5), 36, False),
    ("open_sora", (4, 11, 3, 5), 36, True),
    ("open_sora_plan_v110", (4, 5, 7, 5), 17, False),
    ("open_sora_plan_v120", (4, 5, 7, 5), 17, False),
]


def alone(family, latents, frames, seamless):
    decoder = VideoDecoder(tiny_vae(family), seamless=seamless)
    if family != "open_sora":
        decoder.vae.tiling = Tiling(32, 4, 9, 3)
    return decoder.decode(latents, frames)


def test_ranks_decode_the_video_of_one_process_and_share_the_work():
    cases = [(family, torch.randn(*shape), frames, seamless) for family, shape, frames, seamless in CASES]
    for case, (video, own, came) in zip(
        cases, launch(rank_functions.decode_all, cases, ranks=2, device="cpu"), strict=True
    ):
        wanted = alone(*case)
        assert np.abs(video.astype(int) - wanted.frames).max() <= 1  # other pieces: a sum in another order
        assert sum(came) == case[2]
        pieces = len(came) if case[0] == "open_sora" else 2 * 3 * 2  # chunks of 3 frames, tiles of 4 x 4
        assert own == -(-pieces // 2)


def test_text_is_encoded_once():
    embeddings, mask, once = launch(rank_functions.encode, ["a cat", "a dog runs"], ranks=2, device="cpu")
    wanted, wanted_mask = RandomText(6).encode(["a cat", "a dog runs"], 5)
    assert torch.equal(embeddings, wanted)
    assert torch.equal(mask, wanted_mask)
    assert once


@pytest.mark.parametrize("count", [0, 1, 5])
def test_one_rank_is_map(count, monkeypatch):
    from pab_kernels.distributed import spread as module

    monkeypatch.setattr(module.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(module.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(module.dist, "broadcast", lambda tensor, source: None)
    pieces = [torch.full((2, i + 1), float(i)) for i in range(count)]
    found = list(module.spread(lambda piece: piece.t() * 2, pieces))
    assert [piece.tolist() for piece in found] == [(2 * piece.t()).tolist() for piece in pieces]
