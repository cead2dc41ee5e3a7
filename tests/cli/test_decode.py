"""Videos of the latent families on the command line: `pab generate` with a decoder, and `pab decode`."""

from __future__ import annotations

import json
import subprocess
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from pab_kernels import figures
from pab_kernels.pipelines import latents
from pab_kernels.quality import load_video
from tests import mp4_tools
from tests.cli.test_generate import FAMILY_SIZES
from tests.cli_tools import invoke, pab, refused
from tests.models.test_autoencoders import save_vae
from tests.pipeline_tools import save_text, tiny_text, tiny_transformer

VIDEOS = {
    "open_sora": (17, 192, 192, 24),
    "latte": (5, 64, 64, 8),
    "open_sora_plan_v110": (17, 64, 64, 24),
    "open_sora_plan_v120": (17, 64, 64, 24),
}
"""Frames, height, width and rate of each family's smallest video."""


writes_mp4 = pytest.mark.skipif(figures.why_no_mp4() is not None, reason=f"needs {figures.why_no_mp4()}")


def generate(family: str, output: Path, *more: object) -> str:
    return pab(
        *("generate", "--model", family, *FAMILY_SIZES[family], "--random-weights", "--steps", 4, "--prompt", "a cat"),
        *("--output", output, "--device", "cpu", *more),
    )


@writes_mp4
@pytest.mark.parametrize("family", VIDEOS)
def test_every_family_ends_in_a_video(tiny, family, tmp_path):
    output = generate(family, tmp_path / "v.mp4")
    assert mp4_tools.read(tmp_path / "v.mp4") == VIDEOS[family]
    assert [path.name for path in tmp_path.iterdir()] == ["v.mp4"]
    for part in ("text", "denoising", "decoding", "writing", "frames a second"):
        assert part in output


@writes_mp4
@pytest.mark.parametrize("family", VIDEOS)
def test_latents_decode_later_to_the_same_video(tiny, family, tmp_path):
    generate(family, tmp_path / "v.gif")
    generate(family, tmp_path / "w.gif", "--latents-only")
    output = pab(
        "decode", tmp_path / "w.safetensors", "--random-weights", "--output", tmp_path / "w.gif", "--device", "cpu"
    )
    assert "decoding" in output
    assert (load_video(tmp_path / "v.gif") == load_video(tmp_path / "w.gif")).all()
    result = invoke("decode", tmp_path / "w.safetensors", "--random-weights", "--json", "--device", "cpu")
    summary = json.loads(result.stdout)
    assert summary["video"] == list(VIDEOS[family][:3])
    assert summary["finite"]
    assert summary["parts"].keys() == {"decoding", "writing"}
    assert mp4_tools.read(tmp_path / "w.mp4") == VIDEOS[family]


@writes_mp4
def test_a_size_that_is_not_eighths_is_said_once(tiny, tmp_path):
    arguments = ("generate", "--model", "open_sora", "--resolution", "144p", "--aspect", "2:3", "--duration", 17)
    output = pab(
        *arguments, "--random-weights", "--steps", 1, "--output", tmp_path / "v.mp4", "--device", "cpu", "--prompt", "a"
    )
    assert output.count("The video is 232x152, not 234x156: latents are eighths, rounded down.") == 1
    assert mp4_tools.read(tmp_path / "v.mp4")[:3] == (17, 152, 232)


@writes_mp4
def test_the_summary_has_the_seconds_of_every_part(tiny, tmp_path):
    arguments = (
        "--model",
        "open_sora",
        *FAMILY_SIZES["open_sora"],
        "--random-weights",
        "--steps",
        2,
        "--device",
        "cpu",
    )
    result = invoke("generate", *arguments, "--prompt", "a", "--output", tmp_path / "v.mp4", "--json", "--quiet")
    summary = json.loads(result.stdout)
    run = summary["runs"]["denoising"]
    assert run["parts"].keys() == {"text", "denoising", "decoding"}
    assert sum(run["parts"].values()) == pytest.approx(run["seconds"], abs=0.01)
    assert summary["writing"] >= 0


@pytest.mark.parametrize("family", ["open_sora", "open_sora_plan_v120"])
def test_official_folders_are_found_and_wrong_ones_refused(tiny, family, tmp_path):
    state = tiny_transformer(family).state_dict()
    (tmp_path / "weights").mkdir()
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "weights" / "model.safetensors")
    save_text(tiny_text(), tmp_path / "t5")
    save_vae(family, tmp_path / "vae")
    other = "open_sora_plan_v110"
    save_vae(other, tmp_path / "other")
    arguments = (
        *(
            "generate",
            "--model",
            family,
            *FAMILY_SIZES[family],
            "--prompt",
            "a red cat",
            "--text-encoder",
            tmp_path / "t5",
        ),
        *("--weights", tmp_path / "weights" / "model.safetensors", "--steps", 4, "--device", "cpu"),
    )
    pab(*arguments, "--output", tmp_path / "v.gif", "--vae", tmp_path / "vae", "--offload-text")
    message = refused(*arguments, "--output", tmp_path / "w.gif", "--vae", tmp_path / "other")
    assert f"holds {other}, must hold the one of {family}" in message
    assert not (tmp_path / "w.gif").exists()
    # Beside the folder of weights it is found without being named.
    pab(
        *arguments[:-6],
        "--weights",
        tmp_path / "weights",
        "--steps",
        4,
        "--device",
        "cpu",
        "--output",
        tmp_path / "w.gif",
    )
    assert (load_video(tmp_path / "v.gif") == load_video(tmp_path / "w.gif")).all()


@writes_mp4
def test_files_that_are_no_latents_are_refused(tiny, tmp_path):
    generate("open_sora", tmp_path / "v.mp4", "--latents-only")
    file = tmp_path / "v.safetensors"
    hidden, metadata = latents.load(file)
    save_vae("open_sora_plan_v120", tmp_path / "vae")
    message = refused("decode", file, "--vae", tmp_path / "vae", "--device", "cpu")
    assert "holds open_sora_plan_v120, must hold the one of open_sora" in message
    data = file.read_bytes()
    (tmp_path / "short.safetensors").write_bytes(data[: len(data) // 2])
    assert "not a file of latents" in refused("decode", tmp_path / "short.safetensors", "--random-weights")
    for change, message in (
        ({"family": "sora"}, "is of 'sora', must be one of"),
        ({"frames": 34}, "must give 34"),
        ({"frames": "17"}, "says neither family nor size"),
    ):
        latents.save(hidden, tmp_path / "other.safetensors", {**metadata, **change})
        arguments = ("decode", tmp_path / "other.safetensors", "--random-weights", "--device", "cpu")
        assert message in refused(*arguments)
    latents.save(hidden[:, :1], tmp_path / "other.safetensors", metadata)
    assert "must give 17" in refused(*arguments)
    assert not (tmp_path / "other.mp4").exists()
    assert "latents: there is no file" in refused("decode", tmp_path / "nowhere.safetensors")
    assert "a folder, must be a file" in refused("decode", tmp_path)
    assert "decode_memory: got 'much'" in refused("decode", file, "--random-weights", "--decode-memory", "much")
    small = ("--random-weights", "--decode-memory", "1KiB", "--device", "cpu")
    assert "decode_memory: got 0 MiB, must be at least" in refused("decode", file, *small)
    assert "output: got" in refused("decode", file, "--random-weights", "--output", "v.txt")


def test_videos_begin_with_an_image_and_go_on_from_a_video(tiny, tmp_path):
    size = ("--resolution", "144p", "--aspect", "1:1", "--duration", "34")
    arguments = (
        "generate",
        "--model",
        "open_sora",
        *size,
        "--random-weights",
        "--steps",
        1,
        "--prompt",
        "a",
        "--device",
        "cpu",
    )
    Image.fromarray(np.full((40, 60, 3), 200, np.uint8)).save(tmp_path / "first.png")
    message = refused(*arguments, "--image", tmp_path / "first.png", "--output", tmp_path / "v.gif")
    assert "60x40, which is not of the aspect of the video's 192x192" in message
    pab(*arguments, "--image", tmp_path / "first.png", "--fit", "crop", "--output", tmp_path / "v.gif")
    pab(*arguments, "--output", tmp_path / "w.gif")
    first, other = load_video(tmp_path / "v.gif"), load_video(tmp_path / "w.gif")
    assert (first != other).any()
    pab(*arguments, "--video", tmp_path / "v.gif", "--from-frame", 17, "--output", tmp_path / "x.gif")
    assert load_video(tmp_path / "x.gif").shape == first.shape
    for more, message in (
        (("--video", tmp_path / "v.gif", "--image", tmp_path / "first.png"), "image: got it with --video"),
        (("--from-frame", 3), "from_frame, fit: got one without --image or --video"),
        (("--image", tmp_path / "first.png", "--fit", "crop", "--latents-only"), "got one with --latents-only"),
        (("--video", tmp_path / "v.gif", "--from-frame", 99), "from_frame: got 99, must be a frame of"),
    ):
        assert message in refused(*arguments, *more, "--output", tmp_path / "y.gif")
    wrong = (
        "generate",
        "--model",
        "open_sora_plan",
        "--size",
        "17x64",
        "--random-weights",
        "--image",
        tmp_path / "first.png",
    )
    assert "only open_sora goes on from frames" in refused(*wrong)


def test_memory_bounds_are_read_before_the_work(tiny, tmp_path):
    arguments = ("generate", "--model", "open_sora", *FAMILY_SIZES["open_sora"], "--random-weights", "--device", "cpu")
    assert "decode_memory: got '4 apples'" in refused(*arguments, "--decode-memory", "4 apples")
    assert "decode_memory: got 0 MiB, must be at least" in refused(*arguments, "--decode-memory", "1KiB")
    pab(
        *arguments,
        "--steps",
        1,
        "--decode-memory",
        "1GiB",
        "--seamless",
        "--output",
        tmp_path / "v.gif",
        "--prompt",
        "a",
    )


@writes_mp4
def test_a_writer_that_is_left_by_an_error_leaves_no_file(tmp_path):
    for suffix in (".mp4", ".gif"):
        writer = figures.video_writer(tmp_path / f"v{suffix}", 8)
        writer.__enter__()(np.zeros((2, 16, 16, 3), np.uint8))
        error = KeyboardInterrupt()
        with suppress(KeyboardInterrupt):
            assert not writer.__exit__(KeyboardInterrupt, error, None)
        with pytest.raises(ValueError, match="frames: got none"), figures.video_writer(tmp_path / f"v{suffix}", 8):
            pass
    assert list(tmp_path.iterdir()) == []


@writes_mp4
def test_frames_are_encoded_while_others_are_made(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (9, 18, 35, 3), dtype=np.uint8)
    figures.save_video(frames, tmp_path / "a.mp4", 24, least_size=1)
    with figures.video_writer(tmp_path / "b.mp4", 24) as add:
        for start, end in ((0, 1), (1, 5), (5, 9)):
            add(frames[start:end])
    assert mp4_tools.read(tmp_path / "b.mp4") == (9, 18, 36, 24)
    import imageio_ffmpeg

    streams = [
        subprocess.run(
            [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(tmp_path / name), "-f", "rawvideo", "-"],
            capture_output=True,
            check=True,
        ).stdout
        for name in ("a.mp4", "b.mp4")
    ]
    assert streams[0] == streams[1]
