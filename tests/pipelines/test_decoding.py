"""Decoding by the piece, on planes and by the host; frames that are given."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from pab_kernels import figures
from pab_kernels.models import autoencoders
from pab_kernels.models.hosts.tiles import chunks
from pab_kernels.pipelines import given
from pab_kernels.pipelines.decoding import VideoDecoder, parse_bytes
from pab_kernels.pipelines.sizes import VideoSize, open_sora_size
from pab_kernels.runtime import planes as planes_of_decoders
from pab_kernels.runtime.decoders import plan_decoder, spatial_decoder, temporal_decoder
from tests.pipeline_tools import SMALLEST, tiny_pipeline
from tests.vae_tools import TINY_VAE, tiny_vae

PLANS = ["open_sora_plan_v110", "open_sora_plan_v120"]
LATENTS = {"open_sora": (7, 24), "open_sora_plan_v110": (3, 9), "open_sora_plan_v120": (3, 9)}
"""Latent frames, and the frames of their video."""


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def planes(decoder: VideoDecoder, monkeypatch: Any) -> VideoDecoder:
    """The decoder with its kernels' reference in the place of the host, which on a CPU nothing else would run."""
    monkeypatch.setattr(VideoDecoder, "on_planes", property(lambda self: True))
    monkeypatch.setattr(VideoDecoder, "_run", lambda self, name, z: self._decoder(name)(z))
    return decoder


def as_bytes(video: torch.Tensor, rounded: bool) -> np.ndarray:
    """The originals' conversion of [C, T, H, W]."""
    scaled = (video.clamp(-1, 1) + 1) / 2 * 255
    return (scaled.round() if rounded else scaled.floor()).to(torch.uint8).permute(1, 2, 3, 0).numpy()


@pytest.mark.parametrize("on_planes", [False, True], ids=["host", "planes"])
@pytest.mark.parametrize("family", list(TINY_VAE))
def test_frames_are_the_hosts(family, on_planes, monkeypatch):
    count, frames = LATENTS[family]
    vae, latents = tiny_vae(family), torch.randn(4, count, 3, 5)
    arguments = (frames,) if family == "open_sora" else ()
    wanted = as_bytes(vae.decode(latents[None], *arguments)[0], family == "open_sora")
    decoder = VideoDecoder(vae)
    if on_planes:
        planes(decoder, monkeypatch)
    seen: list[np.ndarray] = []
    video = decoder.decode(latents, frames, seen.append)
    assert video.finite
    assert video.frames.shape == (frames, 24, 40, 3)
    difference = np.abs(video.frames.astype(int) - wanted)
    assert difference.max() <= 1  # a sum in another order may tip a rounding
    assert (difference > 0).mean() < 1e-3
    assert (np.concatenate(seen) == video.frames).all()


def test_latte_decodes_frame_by_frame(monkeypatch):
    torch.manual_seed(0)
    vae: Any = AutoencoderKL(**{**TINY_VAE["open_sora"]["spatial"], **BLOCKS})
    vae.eval().requires_grad_(False)
    latents = torch.randn(4, 3, 2, 3)
    wanted = as_bytes(vae.decode((latents / 0.18215).transpose(0, 1)).sample.transpose(0, 1), True)
    for decoder in (VideoDecoder(vae), planes(VideoDecoder(vae), monkeypatch)):
        assert np.abs(decoder.decode(latents, 3).frames.astype(int) - wanted).max() <= 1


BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}


def test_memory_bounds_pick_pieces_that_change_nothing(monkeypatch):
    vae, latents = tiny_vae("open_sora"), torch.randn(4, 5, 4, 6)
    decoder = planes(VideoDecoder(vae), monkeypatch)
    whole = decoder.decode(latents, 17)
    each = decoder._decoder("spatial").nbytes(1, 4, 6)
    small = VideoDecoder(vae, memory=3 * each)
    assert small.frames_at_once(4, 6) == 3
    pieces: list[np.ndarray] = []
    assert np.abs(small.decode(latents, 17, pieces.append).frames.astype(int) - whole.frames).max() <= 1
    assert max(map(len, pieces)) <= 3
    with pytest.raises(ValueError, match=r"decode_memory: got 0 MiB, must be at least 1 MiB: a frame of 32x48"):
        VideoDecoder(vae, memory=each - 1).decode(latents, 17)


@pytest.mark.parametrize("family", PLANS)
def test_memory_bounds_pick_tiles(family, monkeypatch):
    decoder = planes(VideoDecoder(tiny_vae(family)), monkeypatch)
    assert decoder.tiling((9, 40, 50)) == decoder.vae.tiling
    whole, large, small = (decoder._piece_bytes(2, *sides) for sides in ((40, 50), (32, 32), (16, 16)))
    for memory, side in ((whole, 50), (whole - 1, 32), (large, 32), (large - 1, 16), (small, 16)):
        tiling = VideoDecoder(decoder.vae, memory=memory).tiling((9, 40, 50))
        assert tiling is not None
        assert tiling.tile_latent_min_size == side
        assert tiling.tile_sample_min_size == 8 * side
        assert decoder._piece_bytes(tiling.tile_latent_min_size_t, min(side, 40), side) <= memory
    with pytest.raises(
        ValueError, match=r"decode_memory: got 0 MiB, must be at least .* the smallest piece takes that"
    ):
        VideoDecoder(decoder.vae, memory=1000).tiling((9, 40, 50))


@pytest.mark.parametrize(("latents", "wanted"), [(17, [9, 9]), (24, [9, 9, 8]), (8, [8])])
def test_chunks_have_nearly_one_length(latents, wanted):
    """The released models' frames whole in 14 GiB: 13 latents and a short rest would not fit, 8 share one more."""
    with torch.device("meta"):
        vae = autoencoders.build("open_sora_plan_v120").to(torch.bfloat16)
    tiling = VideoDecoder(vae, memory=14 * 2**30, seamless=True).tiling((latents, 60, 80))
    assert tiling is not None
    assert [end - start for start, end in chunks(latents, tiling.tile_latent_min_size_t)] == wanted


@pytest.mark.parametrize("family", PLANS)
def test_seamless_frames_are_decoded_whole(family):
    vae, latents = tiny_vae(family), torch.randn(4, 2, 40, 3)
    tiled = VideoDecoder(vae).decode(latents, 5).frames
    vae.tiling = None
    whole = as_bytes(vae.decode(latents[None])[0], False)
    assert np.abs(VideoDecoder(vae, seamless=True).decode(latents, 5).frames.astype(int) - whole).max() <= 1
    if family == "open_sora_plan_v110":  # tiles of 32 latents
        assert np.abs(tiled.astype(int) - whole).max() > 1


def test_seamless_chunks_begin_where_the_one_before_ends():
    """A still latent, decoded with what came before, moves less across the seam than without."""
    vae = tiny_vae("open_sora")
    latents = torch.randn(1, 4, 1, 3, 3).expand(1, 4, 10, 3, 3)
    plain, seamless = (vae.decode_temporal(latents, 34, seamless=flag) for flag in (False, True))
    assert torch.equal(plain[:, :, :17], seamless[:, :, :17])
    assert torch.allclose(plain[:, :, -1], seamless[:, :, -1], atol=1e-6)  # faded over to what it is alone

    def jump(video: torch.Tensor) -> float:
        return float((video[:, :, 17] - video[:, :, 16]).norm())

    assert jump(seamless) < 0.8 * jump(plain)


def test_the_decoded_memory_is_what_was_told(monkeypatch):
    """The largest sum of planes alive at once, counted as they come and go, is what `nbytes` says but for the norms."""
    vae = tiny_vae("open_sora_plan_v110")
    for build, part in ((plan_decoder, vae),):
        decoder = build(part)
        small, large = decoder.nbytes(2, 4, 4), decoder.nbytes(4, 8, 8)
        assert 0 < small < large
    images = tiny_vae("open_sora")
    one = spatial_decoder(images.spatial_vae.module).nbytes(1, 8, 8)
    assert spatial_decoder(images.spatial_vae.module).nbytes(3, 8, 8) == pytest.approx(3 * one, rel=1e-6)
    # The widest moment: a block of 8 channels at full size, read, normed and written.
    assert one >= 3 * 8 * 65 * 65 * 4
    assert temporal_decoder(images.temporal_vae).nbytes(5, 2, 2) > 0


@pytest.mark.parametrize("family", list(TINY_VAE))
def test_kernels_are_compiled_by_every_kind_of_layer_once(family, monkeypatch):
    """Every kind of convolution and norm that decoding runs has run before, whatever the size."""
    seen: list[set[Hashable]] = [set(), set()]
    compiled = False

    def kind(weight: torch.Tensor, *others: object) -> None:
        seen[compiled].add((*weight.shape, *others))

    conv, norm = planes_of_decoders.conv_planes, planes_of_decoders.group_norm_silu

    def seen_conv(x: torch.Tensor, weight: torch.Tensor, bias: Any, **more: Any) -> Any:
        kind(weight, bias is None, more["front"], more["residual"] is None, more["times"], more["space"])
        return conv(x, weight, bias, **more)

    def seen_norm(x: torch.Tensor, weight: torch.Tensor, *rest: Any, **more: Any) -> Any:
        if more["silu"]:  # attention's is left out
            kind(weight, more["per_frame"])
        return norm(x, weight, *rest, **more)

    monkeypatch.setattr(planes_of_decoders, "conv_planes", seen_conv)
    monkeypatch.setattr(planes_of_decoders, "group_norm_silu", seen_norm)
    decoder = planes(VideoDecoder(tiny_vae(family)), monkeypatch)
    parts = ("temporal", "spatial") if family == "open_sora" else ("plan",)
    for part in parts:
        decoder._decoder(part).compile()
        decoder._decoder(part).compile()
    compiled = True
    count, frames = LATENTS[family]
    decoder.decode(torch.randn(4, count, 3, 5), frames)
    assert seen[1]
    assert seen[1] <= seen[0]


def test_kernels_that_no_thread_compiles_are_compiled_in_use(monkeypatch, caplog):
    def fail(*_: object) -> None:
        raise RuntimeError("invalid device context")

    decoder = planes(VideoDecoder(tiny_vae("open_sora_plan_v110")), monkeypatch)
    part = decoder._decoder("plan")
    monkeypatch.setattr(part, "_run_once", fail)
    part.compile()
    part.compile()
    assert len(caplog.records) == 1
    assert "one after the other, as they are used: invalid device context" in caplog.text
    assert decoder.decode(torch.randn(4, 3, 2, 2), 9).finite


@pytest.mark.parametrize("family", list(TINY_VAE))
def test_latents_that_do_not_fit_are_refused(family):
    decoder = VideoDecoder(tiny_vae(family))
    count, frames = LATENTS[family]
    with pytest.raises(ValueError, match=rf"latents: shape is \[5, {count}, 2, 2\], must be \[4, T, H, W\]"):
        decoder.decode(torch.zeros(5, count, 2, 2), frames)
    with pytest.raises(ValueError, match=f"gives .* frames, must give {frames}"):
        decoder.decode(torch.zeros(4, count + 1, 2, 2), frames)
    with pytest.raises(ValueError, match="must give"):
        decoder.decode(torch.zeros(4, count, 0, 2), frames)


def test_what_is_not_finite_is_black_and_said():
    latents = torch.randn(4, 3, 2, 2)
    latents[0, 0, 0, 0] = float("nan")
    video = VideoDecoder(tiny_vae("open_sora_plan_v120")).decode(latents, 9)
    assert not video.finite
    assert (video.frames == 0).any()


@pytest.mark.parametrize(("text", "size"), [("4GiB", 2**32), ("500 MB", 5 * 10**8), ("1.5gib", 3 * 2**29), ("7", 7)])
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "0", "-3GiB", "4 GiB 3", "4TBs", "nan", "9" * 400 + "GB"])
def test_sizes_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="decode_memory: got"):
        parse_bytes(text)


# Frames that are given

SIZE = open_sora_size(**SMALLEST)


def test_pictures_fill_the_video_and_are_never_stretched():
    circle = np.zeros((1, 100, 300, 3), np.uint8)
    rows, columns = np.mgrid[:100, :300]
    circle[0, (rows - 50) ** 2 + (columns - 150) ** 2 < 30**2] = 255
    for how in ("crop", "pad"):
        fitted = given.fit(circle, SIZE, how)
        assert fitted.shape == (1, SIZE.height, SIZE.width, 3)
        bright = fitted[0, ..., 0] > 127
        height, width = np.ptp(np.flatnonzero(bright.any(1))) + 1, np.ptp(np.flatnonzero(bright.any(0))) + 1
        assert abs(height - width) <= 1
        assert height == pytest.approx(59 * (1.92 if how == "crop" else 0.64), abs=2)
        middle = [np.flatnonzero(bright.any(axis)).mean() for axis in (1, 0)]
        assert middle == pytest.approx([95.5, 95.5], abs=1)
    with pytest.raises(
        ValueError, match="300x100, which is not of the aspect of the video's 192x192: say `--fit crop`"
    ):
        given.fit(circle, SIZE, None)
    with pytest.raises(ValueError, match="fit: got 'stretch', must be crop or pad"):
        given.fit(circle, SIZE, "stretch")
    assert given.fit(circle[:, :, 100:200], SIZE, None).shape == (1, 192, 192, 3)


@pytest.mark.parametrize(("count", "latents"), [(1, 1), (5, 2), (17, 5)])
def test_given_frames_are_the_first_latents(count, latents):
    decoder = VideoDecoder(tiny_vae("open_sora"))
    frames = np.random.default_rng(0).integers(0, 255, (count, 16, 24, 3), dtype=np.uint8)
    size = VideoSize(34, 16, 24, (10, 2, 3))
    first, mask = given.encode(decoder, frames, size)
    assert mask.tolist() == [[True] * latents + [False] * (10 - latents)]
    assert first.shape == (1, 4, 10, 2, 3)
    assert (first[:, :, latents:] == 0).all()
    assert not torch.equal(first, given.encode(decoder, frames, size, seed=1)[0])
    with pytest.raises(ValueError, match="none is left"):
        given.encode(decoder, frames, VideoSize(17, 16, 24, (latents, 2, 3)))
    with pytest.raises(ValueError, match="need Open-Sora's own autoencoder"):
        given.encode(None, frames, size)


def test_a_video_goes_on_from_its_last_frames(tmp_path):
    frames = np.repeat(np.arange(0, 240, 10, dtype=np.uint8), 16 * 16 * 3).reshape(24, 16, 16, 3)
    figures.save_video(frames, tmp_path / "v.gif", least_size=1)
    (tmp_path / "no.mp4").write_text("nothing")

    def shades(first: int | None) -> list[int]:
        return given.load_frames(tmp_path / "v.gif", first)[:, 0, 0, 0].tolist()

    assert shades(None) == frames[7:, 0, 0, 0].tolist()
    assert shades(0) == frames[:17, 0, 0, 0].tolist()
    assert shades(-3) == frames[-3:, 0, 0, 0].tolist()
    with pytest.raises(ValueError, match=r"from_frame: got 24, must be a frame of .*, which has 24"):
        given.load_frames(tmp_path / "v.gif", 24)
    with pytest.raises(ValueError, match="cannot be read"):
        given.load_frames(tmp_path / "no.mp4", None)
    with pytest.raises(FileNotFoundError, match="image: there is no file"):
        given.load_image(tmp_path / "no.png")
    with pytest.raises(ValueError, match=r"image: got .*, a folder, must be a file"):
        given.load_image(tmp_path)
    (tmp_path / "no.png").write_text("nothing")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        given.load_image(tmp_path / "no.png")
    Image.new("L", (5, 4), 7).save(tmp_path / "grey.png")
    assert (given.load_image(tmp_path / "grey.png") == np.full((1, 4, 5, 3), 7)).all()


def test_a_pipeline_goes_on_from_given_frames():
    decoder = VideoDecoder(tiny_vae("open_sora"))
    pipe = tiny_pipeline("open_sora", vae=decoder)
    size = open_sora_size("144p", "1:1", 34)
    first, mask = given.encode(decoder, np.full((1, size.height, size.width, 3), 90, np.uint8), size)
    hidden = pipe("a cat", size=size, num_inference_steps=2, given_latents=first, given_mask=mask)
    assert torch.equal(hidden[:, :, 0], first[:, :, 0])
    assert not torch.equal(hidden[:, :, 1], first[:, :, 1])
