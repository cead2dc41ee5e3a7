"""`pab compare`, and the measures."""

import csv
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pab_kernels import figures, quality
from tests.cli_tools import pab, refused


def grey(levels: list[int], size: int = 16) -> np.ndarray:
    """Frames [T, H, W, 3], each of one grey."""
    return np.stack([np.full((size, size, 3), level, np.uint8) for level in levels])


def test_compare_finds_a_known_difference(tmp_path):
    figures.save_video(grey([50, 90, 200]), tmp_path / "a.gif")
    figures.save_video(grey([60, 110, 190]), tmp_path / "b.gif")
    output = pab("compare", tmp_path / "a.gif", tmp_path / "b.gif", "--frames", "--csv", tmp_path / "c.csv")
    values = [float(row["psnr"]) for row in csv.DictReader((tmp_path / "c.csv").open())]
    expected = [20 * np.log10(255 / difference) for difference in (10, 20, 10)]
    assert values == pytest.approx(expected)
    assert re.search(rf"mean of 3 +\| {np.mean(expected):.4g} ", output)
    assert re.search(rf"worst +\| {min(expected):.4g} ", output)


def test_compare_reads_videos(tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    video = np.random.default_rng(0).integers(0, 255, (6, 1, 1, 3), dtype=np.uint8).repeat(32, 1).repeat(32, 2)
    figures.save_video(video, tmp_path / "a.mp4")
    assert "| inf" in pab("compare", tmp_path / "a.mp4", tmp_path / "a.mp4")
    assert quality.load_video(tmp_path / "a.mp4").shape == (6, 256, 256, 3)


def test_compare_refuses(tmp_path):
    figures.save_video(grey([50, 90]), tmp_path / "a.gif")
    figures.save_video(grey([50, 90, 70]), tmp_path / "b.gif")
    (tmp_path / "c.mp4").write_text("no video")
    assert "there is no file" in refused("compare", tmp_path / "a.gif", tmp_path / "x.gif")
    assert f"got '{tmp_path}', a folder, must be a file" in refused("compare", tmp_path / "a.gif", tmp_path)
    assert "must be (3, 256, 256, 3)" in refused("compare", tmp_path / "a.gif", tmp_path / "b.gif")
    assert "cannot be read as a video" in refused("compare", tmp_path / "a.gif", tmp_path / "c.mp4")


def test_frames_too_small_for_ssim_are_refused():
    with pytest.raises(ValueError, match="H and W at least 7"):
        quality.per_frame(grey([1], 6), grey([2], 6))


def test_lpips_is_measured_where_it_is_there_and_never_fetched(monkeypatch, tmp_path):
    a, b = grey([0, 255]), grey([51, 255])
    find = lambda name: None if name == "lpips" else object()  # noqa: E731
    monkeypatch.setattr("importlib.util.find_spec", find)
    assert quality.why_no_lpips() == "no LPIPS: `pip install lpips`"
    assert quality.compare(a, b).lpips is None

    class Distance:
        """Stands in for the network: mean absolute difference of images in [-1, 1]."""

        def __init__(self, **options):
            assert options["net"] == "alex"

        def eval(self):
            return self

        def __call__(self, x, y):
            assert x.shape == (1, 3, 16, 16)
            return (x - y).abs().mean().view(1, 1, 1, 1)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Distance))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert "is missing" in str(quality.why_no_lpips())
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / quality.BACKBONE).touch()
    quality._lpips_network.cache_clear()
    assert quality.per_frame(a, b)["lpips"] == pytest.approx([0.4, 0.0])
    assert quality.compare(a, b).lpips == pytest.approx(0.2)
    quality._lpips_network.cache_clear()
