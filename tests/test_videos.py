"""Videos and pictures as files: every frame, the right colours, words as they are, and errors that are noticed."""

import logging
import os
import re
import subprocess
import sys
import warnings
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from PIL import Image

from pab_kernels import figures, quality

WORDS = (
    "a shop sells $x_^$ only",
    "it costs $\\frac{1}$ dollar",
    "from \\$5 to $10",
    "一只猫在草地上奔跑",
    "a cat\tand a dog 🐶, 👩‍👩‍👧\r\n",
    "\x1b[31m % { } _ ^ & # \ud800",
    "a long prompt " * 80,
    "x" * 2000,
    "",
)


def video(levels, size=(64, 64)):
    return np.stack([np.full((*size, 3), level, np.uint8) for level in levels])


@pytest.fixture
def ffmpeg():
    return pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()


def test_a_gif_keeps_equal_frames(tmp_path):
    frames = video([5, 5, 90, 90, 90, 200, 5])
    figures.save_video(frames, tmp_path / "a.gif", least_size=1)
    with Image.open(tmp_path / "a.gif") as image:
        assert (image.n_frames, image.info["loop"]) == (7, 0)
        assert image.info["duration"] == 120  # hundredths of a second
    assert np.array_equal(quality.load_video(tmp_path / "a.gif"), frames)


def test_a_gif_of_one_frame_and_of_many_colours(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)
    for frames in (noise, noise[:1]):
        figures.save_video(frames, tmp_path / "a.gif", least_size=1)
        read = quality.load_video(tmp_path / "a.gif")
        assert read.shape == frames.shape
        assert np.abs(read.astype(int) - frames).mean() < 16  # 256 colours of 1024


def test_frames_that_others_merged_are_counted(tmp_path):
    frames = video([5, 5, 90, 90, 90, 200])
    iio.imwrite(tmp_path / "a.gif", frames, duration=125, loop=0)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 3
    assert np.array_equal(quality.load_video(tmp_path / "a.gif"), frames)
    other = video([5, 90, 90, 90, 90, 200])
    figures.save_video(other, tmp_path / "b.gif", least_size=1)
    values = quality.per_frame(*(quality.load_video(tmp_path / name) for name in ("a.gif", "b.gif")))
    assert [np.isinf(value) for value in values["psnr"]] == [True, False, True, True, True, True]


def test_a_gif_that_lasts_for_ever_is_refused(tmp_path):
    iio.imwrite(tmp_path / "a.gif", video(range(8), (8, 8)), duration=[10] + [600_000] * 7)
    with pytest.raises(ValueError, match="as long as 420001 of its shortest frame"):
        quality.load_video(tmp_path / "a.gif")


@pytest.mark.parametrize(
    ("size", "matrix"),
    [((256, 320), "smpte170m"), ((718, 64), "smpte170m"), ((720, 64), "bt709"), ((1080, 64), "bt709")],
)
def test_mp4_has_the_matrix_that_its_tags_name(size, matrix, tmp_path, ffmpeg):
    colours = [(220, 30, 30), (30, 200, 60), (20, 40, 210), (128, 128, 128)]
    frames = np.stack([np.full((*size, 3), colour, np.uint8) for colour in colours])
    figures.save_video(frames, tmp_path / "a.mp4", least_size=1)
    shown = subprocess.run([ffmpeg, "-i", tmp_path / "a.mp4"], capture_output=True, text=True, check=False).stderr
    assert f"yuv420p(tv, {matrix}, progressive)" in shown
    raw = subprocess.run(
        [ffmpeg, "-loglevel", "error", "-i", tmp_path / "a.mp4", "-f", "rawvideo", "-pix_fmt", "yuv420p", "-"],
        capture_output=True,
        check=True,
    ).stdout
    pixels = size[0] * size[1]
    planes = np.frombuffer(raw, np.uint8).reshape(len(colours), pixels * 3 // 2)
    found = np.stack([planes[:, pixels // 2], planes[:, pixels * 9 // 8], planes[:, pixels * 11 // 8]], 1).astype(float)
    # ITU-R BT.601 and BT.709: luma's weights of red and blue.
    red, blue = (0.299, 0.114) if matrix == "smpte170m" else (0.2126, 0.0722)
    r, g, b = np.array(colours, float).T / 255
    luma = red * r + (1 - red - blue) * g + blue * b
    expected = [16 + 219 * luma, 128 + 112 * (b - luma) / (1 - blue), 128 + 112 * (r - luma) / (1 - red)]
    assert np.abs(found - np.stack(expected, 1)).max() < 2
    assert np.abs(quality.load_video(tmp_path / "a.mp4").astype(int) - frames).max() < 6


def test_mp4_of_odd_size_keeps_its_pixels(tmp_path, ffmpeg):
    frames = video([40, 40, 160], (65, 33))
    figures.save_video(frames, tmp_path / "a.mp4", least_size=1)
    read = quality.load_video(tmp_path / "a.mp4")
    assert read.shape == (3, 66, 34, 3)
    assert np.abs(read[:, :65, :33].astype(int) - frames).max() < 3


@pytest.mark.parametrize(
    "frames", [np.zeros((2, 8, 8, 3)), np.zeros((2, 8, 8), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)]
)
def test_what_is_no_video_is_refused(frames, tmp_path):
    with pytest.raises(ValueError, match=r"frames: got .*, must be \[T, H, W, 3\] uint8"):
        figures.save_video(frames, tmp_path / "a.gif")
    with pytest.raises(ValueError, match=r"must end in \.mp4 or \.gif"):
        figures.save_video(video([1]), tmp_path / "a.webm")
    assert not list(tmp_path.iterdir())


FULL = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from pab_kernels import figures
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
frames = np.random.default_rng(0).integers(0, 255, (16, 64, 64, 3), dtype=np.uint8)
save = {".png": lambda f, p: figures.contact_sheet({"a": f}, p, "a")}.get(Path(sys.argv[1]).suffix, figures.save_video)
try:
    save(frames, Path(sys.argv[1]))
except OSError as error:
    print("noticed:", error)
"""


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
def test_a_full_disk_is_noticed_and_costs_no_file(suffix, tmp_path):
    if suffix == ".mp4":
        pytest.importorskip("imageio_ffmpeg")
    path = tmp_path / f"a{suffix}"
    path.write_text("good")
    done = subprocess.run([sys.executable, "-c", FULL, path], capture_output=True, text=True, check=True)
    assert re.match("noticed: .*(File size limit exceeded|File too large)", done.stdout)
    assert path.read_text() == "good"
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_ffmpegs_own_words_are_told(tmp_path, monkeypatch):
    script = tmp_path / "ffmpeg"
    script.write_text("#!/bin/sh\ncat > /dev/null; echo 'first' >&2; echo 'No space left on device' >&2; exit 228\n")
    script.chmod(0o755)
    module = pytest.importorskip("imageio_ffmpeg")
    monkeypatch.setattr(module, "get_ffmpeg_exe", lambda: str(script))
    with pytest.raises(OSError, match="ffmpeg did not write the video: No space left on device"):
        figures.save_video(video([1]), tmp_path / "a.mp4")


@pytest.mark.parametrize("words", WORDS, ids=range(len(WORDS)))
def test_words_from_outside_are_shown_without_a_warning(words, tmp_path, caplog):
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        figures.contact_sheet({words: video([1, 2]), "b": video([1])}, tmp_path / "a.png", words)
    assert not caplog.records
    with Image.open(tmp_path / "a.png") as image:
        assert image.info.get("Title", "") == words.encode("utf-8", "backslashreplace").decode()


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("$a_1$ costs $5 or \\$6", "$a_1$ costs $5 or \\$6"),
        ("a\tcat\nsits", "a cat sits"),
        ("猫 \x1b", "\\u732b \\x1b"),
        ("собака", "собака"),
    ],
)
def test_words_are_drawn_as_they_are(words, shown, monkeypatch):
    monkeypatch.setattr(fontManager, "ttflist", [])
    figure = Figure()
    figures.put(figure.suptitle, words)
    title: Any = figure.texts[0]
    drawn, mathematics = title._preprocess_math(title.get_text())  # what matplotlib makes of it
    assert (drawn, bool(mathematics)) == (shown, False)


def test_a_font_that_has_the_letters_is_used(tmp_path, monkeypatch):
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0)), pen.lineTo((500, 0)), pen.lineTo((500, 500)), pen.closePath()
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "cat"])
    builder.setupCharacterMap({ord("猫"): "cat"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "cat": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (500, 0), "cat": (600, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Cats", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "cats.ttf")
    (tmp_path / "broken.ttf").write_text("no font")
    monkeypatch.setattr(fontManager, "ttflist", list(fontManager.ttflist))
    fontManager.addfont(tmp_path / "cats.ttf")
    fontManager.ttflist.insert(0, type(fontManager.ttflist[-1])(fname=str(tmp_path / "broken.ttf"), name="Broken"))
    figure = Figure()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures.put(figure.suptitle, "a 猫")
        figures.save_figure(figure, tmp_path / "a.png")
    (title,) = figure.texts
    assert (title.get_text(), title.get_fontfamily()) == ("a 猫", ["DejaVu Sans", "Cats"])


def test_names_of_settings_are_words_in_every_picture(tmp_path):
    from pab_kernels.config import PABConfig
    from pab_kernels.measure.figures import speed_bars
    from pab_kernels.schedule import Schedule

    plan = Schedule(PABConfig.preset("latte"), [900.0, 700.0, 500.0])
    figures.save_figure(figures.schedule_figure(plan, "$x_^$ 猫.yaml"), tmp_path / "a.png")
    rows = [{"name": "runtime", "label": label, "seconds": 1.0} for label in ("$x_^$", "猫")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures.save_figure(speed_bars(rows), tmp_path / "b.png")
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b.png"]  # noqa: PTH208


def test_why_no_mp4(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert figures.why_no_mp4() == "`pip install imageio[ffmpeg]`"
