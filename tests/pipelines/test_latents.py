"""Latents as files, and a first look at them."""

import pytest
import torch

from pab_kernels.pipelines import latents


def test_latents_come_back_with_their_metadata(tmp_path):
    hidden = torch.randn(4, 3, 6, 5)
    latents.save(hidden, tmp_path / "a" / "x.safetensors", {"prompt": "a cat", "scale": (1.0, 2.0), "pab": None})
    loaded, metadata = latents.load(tmp_path / "a" / "x.safetensors")
    assert torch.equal(loaded, hidden)
    assert metadata == {"prompt": "a cat", "scale": [1.0, 2.0], "pab": None}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x.safetensors"]
    with pytest.raises(FileNotFoundError, match="there is no file"):
        latents.load(tmp_path / "y.safetensors")
    (tmp_path / "z.safetensors").write_text("nothing")
    with pytest.raises(ValueError, match="not a file of latents"):
        latents.load(tmp_path / "z.safetensors")


def test_the_first_look_shows_what_varies_and_compares_like_with_like():
    hidden = torch.randn(4, 3, 8, 8) * 0.01
    hidden[2, :, :, 4:] += 5  # the right half differs in one channel
    picture = latents.first_look(hidden)
    assert picture.shape == (3, 8, 8, 3)
    halves = picture[:, :, :4, 0].astype(float).mean(), picture[:, :, 4:, 0].astype(float).mean()
    assert abs(halves[0] - halves[1]) > 150
    assert (latents.first_look(hidden, like=hidden) == picture).all()
    assert (latents.first_look(hidden + 1, like=hidden) != picture).any()
    assert latents.first_look(torch.full((4, 1, 2, 2), float("nan"))).shape == (1, 2, 2, 3)
