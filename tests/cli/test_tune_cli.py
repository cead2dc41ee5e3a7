"""`pab profile`, `pab tune`, `pab quality` and `pab compare` on tiny models."""

import csv
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pab_kernels import figures, quality
from pab_kernels.config import PABConfig
from pab_kernels.demo.text import TextEmbedding
from pab_kernels.models import checkpoints
from pab_kernels.pipelines.demo import DemoPipeline, demo_scheduler, demo_transformer
from pab_kernels.tune.trials import Yardstick
from tests.cli.test_cli import pab, refused
from tests.pipeline_tools import TINY

SHORT = ("--steps", 10, "--device", "cpu")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder with an untrained demo model: 5 frames of 16 x 16 pixels."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformer = demo_transformer(pairs=1, heads=1, size=16, frames=5)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    folder = tmp_path_factory.mktemp("demo")
    DemoPipeline(transformer, demo_scheduler(), TextEmbedding()).save_pretrained(folder)
    return folder


# profile


def test_profile_writes_a_table_and_two_pictures(demo, tmp_path):
    output = pab("profile", "--model", demo, *SHORT, "--videos", 2, "--output", tmp_path)
    assert re.search(r"spatial: differs by .* Flat .* at steps \d+ to \d+", output.replace("\n", " "))
    assert "the PAB document says" in output.replace("\n", " ")
    rows = list(csv.DictReader((tmp_path / "profile.csv").open()))
    assert len(rows) == 3 * 9  # one block a kind, all steps but the first
    assert all(float(row["relative_l2"]) > 0 and float(row["mse"]) > 0 for row in rows)
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("profile.png", "heatmap.png"))


@pytest.mark.parametrize("family", TINY)
def test_profile_of_every_family(family, monkeypatch, tmp_path):
    monkeypatch.setitem(checkpoints.FULL_SIZE, family, {**checkpoints.FULL_SIZE[family], **TINY[family]})
    sizes: tuple[object, ...] = {"open_sora": ("--resolution", "144p", "--aspect", "1:1", "--duration", 17)}.get(
        family, ()
    )
    monkeypatch.setattr("pab_kernels.pipelines.sizes.PLAN_SIZES", {family: {"17x64": (17, 64, 64)}})
    if family.startswith("open_sora_plan"):
        sizes = ("--size", "17x64")
    pab("profile", "--model", family, "--random-weights", *sizes, *SHORT, "--output", tmp_path)
    kinds = {row["kind"] for row in csv.DictReader((tmp_path / "profile.csv").open())}
    assert kinds == {"spatial", "cross"} | (set() if family == "open_sora_plan_v120" else {"temporal"})


# tune


def test_tune_writes_settings_that_load(demo, tmp_path):
    pab("profile", "--model", demo, *SHORT, "--output", tmp_path)
    arguments = ("--model", demo, *SHORT, "--videos", 2, "--trials", 2, "--profile", tmp_path / "profile.csv")
    output = pab("tune", "--target", "speedup=1.1", *arguments, "--output", tmp_path / "a.yaml")
    assert "reached: " in output
    text = (tmp_path / "a.yaml").read_text()
    assert "# pab tune --target speedup=1.1: reached" in text
    assert re.search(
        r"PSNR, dB \d+\.\d\d \(at least .* at 80% confidence\); SSIM .* as predicted, .* as measured", text
    )
    assert isinstance(PABConfig.from_yaml(tmp_path / "a.yaml"), PABConfig)
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert {row["settings"] for row in rows} == {"latte", "latte:235", "latte:347", "latte:469", "tuned 1"}
    assert (tmp_path / "a.png").stat().st_size > 10_000
    again = pab("tune", "--target", "speedup=1.1", *arguments, "--output", tmp_path / "b.yaml")
    assert "reached: " in again
    assert PABConfig.from_yaml(tmp_path / "b.yaml") == PABConfig.from_yaml(tmp_path / "a.yaml")


def test_tune_says_what_it_does_not_reach(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "compare", lambda video, baseline: quality.Quality(20.0, 0.5))
    arguments = ("--model", demo, *SHORT, "--videos", 2, "--trials", 1, "--output", tmp_path / "t.yaml")
    output = pab("tune", "--target", "psnr=30", *arguments, code=1)
    assert "NOT reached: " in output
    assert "NOT reached" in (tmp_path / "t.yaml").read_text().splitlines()[0]


def test_tune_keeps_the_best_when_interrupted(demo, tmp_path, monkeypatch):
    real = Yardstick.try_out
    done: list[PABConfig] = []

    def two_only(self, name, config):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(config)
        return real(self, name, config)

    monkeypatch.setattr(Yardstick, "try_out", two_only)
    arguments = ("--model", demo, *SHORT, "--videos", 2, "--output", tmp_path / "t.yaml")
    output = pab("tune", "--target", "psnr=5", *arguments, code=130)
    assert "interrupted after 2 trials" in output
    assert PABConfig.from_yaml(tmp_path / "t.yaml") in done
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.csv", "t.png", "t.yaml"]


def test_tune_interrupted_before_the_first_trial_writes_nothing(demo, tmp_path, monkeypatch):
    def at_once(self, name, config):
        raise KeyboardInterrupt

    monkeypatch.setattr(Yardstick, "try_out", at_once)
    arguments = ("--model", demo, *SHORT, "--videos", 2, "--output", tmp_path / "t.yaml")
    assert "interrupted after 0 trials" in pab("tune", "--target", "psnr=5", *arguments, code=130)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "psnr"], "target: got 'psnr', must be psnr=DB"),
        (["--target", "psnr=30", "--videos", "1"], "videos: got 1, must be at least 2"),
        (["--target", "psnr=30", "--profile", "nowhere.csv"], "nowhere.csv"),
        (["--target", "psnr=30", "--model", "open_sora"], "model: got 'open_sora', which gives latents"),
        (["--target", "psnr=30", "--device", "tpu"], "device: got 'tpu'"),
        (["--target", "psnr=30", "--prompt", "a red elephant", "--prompt", "a red star"], "elephant"),
    ],
    ids=lambda value: "" if isinstance(value, list) else value[:20],
)
def test_tune_refuses(demo, arguments, message, tmp_path):
    model = () if "--model" in arguments else ("--model", demo)
    assert message in refused("tune", *model, *SHORT, "--output", tmp_path / "t.yaml", *arguments)
    assert not list(tmp_path.iterdir())


# quality


def test_quality_of_settings(demo, tmp_path):
    PABConfig.preset("latte", "469").to_yaml(tmp_path / "mine.yaml")
    arguments = ("--model", demo, *SHORT, "--videos", 2, "--pab", "latte:347", "--pab", tmp_path / "mine.yaml")
    output = pab("quality", *arguments, "--csv", tmp_path / "q.csv")
    assert re.search(r"\| latte:347 \| 3/4/7 in 100 to 800 +\| +\d+\.\d\d", output)
    assert re.search(r"\| mine.yaml \| 4/6/9 in 100 to 800 +\|", output)
    rows = list(csv.DictReader((tmp_path / "q.csv").open()))
    assert [(row["settings"], row["video"]) for row in rows] == [
        ("latte:347", "0"), ("latte:347", "1"), ("mine.yaml", "0"), ("mine.yaml", "1"),
    ]  # fmt: skip
    assert "pab: got 'off'" in refused("quality", "--model", demo, "--pab", "off")


# compare


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
