"""`pab tune` on a tiny model."""

import csv
import re

import pytest
from rich.console import Console

from pab_kernels import quality
from pab_kernels.config import PABConfig, named_settings
from pab_kernels.tune import results
from pab_kernels.tune.trials import Trial, Yardstick
from tests.cli_tools import SHORT, pab, refused


def test_tune_writes_settings_that_load(demo, tmp_path):
    pab("profile", "--model", demo, *SHORT, "--output", tmp_path)
    arguments = ("--model", demo, *SHORT, "--videos", 2, "--trials", 2, "--profile", tmp_path / "profile.csv")
    output = pab("tune", "--target", "speedup=1.1", *arguments, "--output", tmp_path / "a.yaml")
    assert "reached: " in output
    text = (tmp_path / "a.yaml").read_text()
    assert "# pab tune --target speedup=1.1: reached" in text
    assert re.search(
        r"PSNR, dB \d+\.\d\d \(of other videos at least .* at 80% confidence\); SSIM .* as predicted, .* as measured",
        text,
    )
    assert isinstance(PABConfig.from_yaml(tmp_path / "a.yaml"), PABConfig)
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert {row["settings"] for row in rows} == {"latte", "latte:fast", "tuned 1", "tuned 2"}
    assert (tmp_path / "a.png").stat().st_size > 10_000
    again = pab("tune", "--target", "speedup=1.1", *arguments, "--output", tmp_path / "b.yaml")
    assert "reached: " in again
    assert PABConfig.from_yaml(tmp_path / "b.yaml") == PABConfig.from_yaml(tmp_path / "a.yaml")


def test_a_trial_is_one_row_in_80_columns():
    """And nothing is cut."""
    found = (quality.Quality(31.23, 0.912, 28.5, 0.051),) * 2
    trials = [Trial(name, config, found, 0.387, 0.412) for name, config in named_settings("latte").items()]
    console = Console(width=80)
    with console.capture() as capture:
        console.print(results.table(trials))
    table, below = capture.get().strip().split("\n" + " " * 80 + "\n")
    figures = r" +31\.23 \| 0\.912 \| 0\.051 \| +31\.23 \| +28\.50 \| +41\.2% \| +38\.7% \|"
    for line, trial in zip(table.splitlines()[-len(trials) :], trials, strict=True):
        assert re.fullmatch(rf"\| {trial.name} +\|{figures}", line)
    assert below.splitlines() == [f"{trial.name}: {results.ranges(trial.config)}" for trial in trials]


def test_tune_says_what_it_does_not_reach(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "compare", lambda video, baseline: quality.Quality(20.0, 0.5, 15.0))
    arguments = ("--model", demo, *SHORT, "--videos", 2, "--trials", 1, "--output", tmp_path / "t.yaml")
    output = pab("tune", "--target", "psnr=30", *arguments, code=1)
    assert "NOT reached: " in output
    assert "NOT reached" in (tmp_path / "t.yaml").read_text().splitlines()[0]


def test_tune_keeps_the_best_when_interrupted(demo, tmp_path, monkeypatch):
    real = Yardstick.try_out
    done: list[PABConfig] = []

    def two_only(self, name, config, videos=None):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(config)
        return real(self, name, config, videos)

    monkeypatch.setattr(Yardstick, "try_out", two_only)
    arguments = ("--model", demo, *SHORT, "--videos", 2, "--output", tmp_path / "t.yaml")
    output = pab("tune", "--target", "psnr=5", *arguments, code=130)
    assert "interrupted after 2 trials" in output
    assert PABConfig.from_yaml(tmp_path / "t.yaml") in done
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.csv", "t.png", "t.trials.json", "t.yaml"]

    def all_but_two(self, name, config, videos=None):
        assert config not in done, "the two are not made again"
        return real(self, name, config, videos)

    monkeypatch.setattr(Yardstick, "try_out", all_but_two)
    pab("tune", "--target", "psnr=5", "--trials", 1, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.csv", "t.png", "t.yaml"]


def test_tune_interrupted_before_the_first_trial_writes_nothing(demo, tmp_path, monkeypatch):
    def at_once(self, name, config, videos=None):
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
        (["--target", "psnr=30", "--profile", "nowhere.csv"], "profile: there is no file nowhere.csv"),
        (["--target", "psnr=30", "--profile", "."], "profile: got '.', a folder, must be a file"),
        (["--target", "psnr=30", "--model", "open_sora"], "hpcai-tech/OpenSora-STDiT-v3 is not a file"),
        (["--target", "psnr=30", "--output", "t.csv"], "output: got 't.csv', must end in .yaml"),
        (["--target", "psnr=30", "--output", "/proc/self/t.yaml"], "output: got '/proc/self/t.yaml', must be in a"),
        (["--target", "psnr=30", "--output", "x.yaml", "--profile", "x.csv"], "output: got 'x.csv', which is read"),
        (["--target", "psnr=30", "--profile", __file__], "is no profile, line 1: the columns are"),
        (["--target", "psnr=30", "--device", "tpu"], "device: got 'tpu'"),
        (["--target", "psnr=30", "--prompt", "a red elephant", "--prompt", "a red star"], "elephant"),
    ],
    ids=lambda value: "" if isinstance(value, list) else value[:20],
)
def test_tune_refuses(demo, arguments, message, tmp_path):
    model = () if "--model" in arguments else ("--model", demo)
    assert message in refused("tune", *model, *SHORT, "--output", tmp_path / "t.yaml", *arguments)
    assert not list(tmp_path.iterdir())
