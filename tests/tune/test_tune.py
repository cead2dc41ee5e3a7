"""The search on made-up trials, and trials against whole runs."""

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch

from pab_kernels import PABConfig, accelerate, quality
from pab_kernels.config import MlpWindow, named_settings
from pab_kernels.pipelines.demo import DemoPipeline, demo_scheduler, demo_transformer
from pab_kernels.pipelines.demo_text import TextEmbedding
from pab_kernels.pipelines.generate import Request, generate
from pab_kernels.quality import Quality
from pab_kernels.schedule import Schedule
from pab_kernels.tune.choose import Estimate, Target, best, estimate, reaches
from pab_kernels.tune.frontier import Frontier
from pab_kernels.tune.journal import Journal
from pab_kernels.tune.results import Tuned
from pab_kernels.tune.search import Predictor, Search
from pab_kernels.tune.trials import Trial, Yardstick, first_call, split
from tests.latte_tools import call, inputs, tiny_latte
from tests.tune.made_up import made_up, savings

# The search


def trial(name: str, config: PABConfig, psnr: float, saving: float, videos: int | None = None) -> Trial:
    """Eight videos that differ by decibels, the first four of which are harder."""
    found = tuple(Quality(psnr + 2 * i - 7, 1 - 10 ** (-(psnr + 2 * i - 7) / 30), psnr + 2 * i - 9) for i in range(8))
    return Trial(name, config, found[:videos], saving, saving)


class Model:
    """Stands in for trials: what errors do to a video hangs on their kind, and saving is what is foreseen."""

    FACTORS = np.array([3.0, 1.0, 0.3, 0.2, 0.02]) / 2000

    def __init__(self, calls: int = 12) -> None:
        self.profile = made_up(calls, kinds=("spatial", "temporal", "cross", "stack", "guidance"))
        self.frontier = Frontier(self.profile, savings(self.profile))
        self.tried: list[tuple[str, int | None]] = []

    def psnr(self, config: PABConfig) -> float:
        return -10 * math.log10(self.FACTORS @ np.array(self.frontier.weigh(config).errors) + 1e-9)

    def try_out(self, name: str, config: PABConfig, videos: int | None = None) -> Trial:
        self.tried.append((name, videos))
        saving = savings(self.profile)(Schedule(config, self.profile.timesteps))
        return trial(name, config, self.psnr(config), saving, videos)

    def search(self, target: str, count: int = 6) -> list[Trial]:
        named = {name: named_settings("latte")[name] for name in ("latte:fast", "latte")}
        return list(Search(self.frontier, Target.parse(target)).run(self.try_out, named, count, 4))


@pytest.mark.parametrize("target", ["psnr=24", "psnr=30", "psnr=38", "ssim=0.8"])
def test_few_trials_find_what_saves_most_at_the_target(target):
    model, wanted = Model(), Target.parse(target)
    trials = model.search(target)
    chosen = best(trials, wanted)
    assert reaches(chosen, wanted)
    assert chosen.anchor is None, "it is known on all videos"
    every = [model.try_out("", each.config) for each in model.frontier._weighed.values()]
    most = max(each.predicted for each in every if reaches(each, wanted))
    assert most - 0.12 < chosen.predicted <= most


def test_few_trials_come_near():
    wanted = Target.parse("psnr=30")
    chosen = best(Model().search("psnr=30", count=16), wanted)
    assert 30 <= statistics.fmean(chosen.values("psnr")) < 32, "met, and not by far"


def test_candidates_are_tried_on_a_few_videos_and_the_best_on_all():
    model = Model()
    trials = model.search("psnr=30")
    assert model.tried[:2] == [("latte:fast", None), ("latte", None)]
    assert {videos for name, videos in model.tried[2:]} == {4, None}
    for each in trials:
        found = estimate(each, Target.parse("psnr=30"))
        assert found.mean == pytest.approx(model.psnr(each.config)), (
            "pairs tell the mean over all, though the first four are harder"
        )
        assert found.margin == pytest.approx(0, abs=1e-9)


def test_trials_tell_of_runs_that_are_like_them():
    model, target = Model(), Target.parse("psnr=30")
    fast = named_settings("latte")["latte:fast"]
    known = model.frontier.weigh(fast)
    wrong = trial("", fast, model.psnr(fast) - 4, known.saving)  # 4 dB below what errors tell of all others
    others = [model.try_out("", each.config) for each in model.frontier.near(PABConfig())[::20]]
    means, deviations = Predictor(model.frontier, target, [*others, wrong])(
        [known, model.frontier.weigh(replace(fast, stack_threshold=(300, 950))), *model.frontier.near(PABConfig())[1:2]]
    )
    assert -10 / math.log(10) * means[0] == pytest.approx(model.psnr(fast) - 4, abs=0.3)
    assert deviations[0] < deviations[1] < deviations[2]


def test_a_speed_is_chosen_for_its_quality():
    model, wanted = Model(), Target.parse("speedup=1.6")
    chosen = best(model.search("speedup=1.6"), wanted)
    assert chosen.predicted >= 1 - 1 / 1.6
    fast = [each.config for each in model.frontier._weighed.values() if each.saving >= 1 - 1 / 1.6]
    assert model.psnr(chosen.config) > max(map(model.psnr, fast)) - 1


def test_a_speed_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"target: got speedup=99, must be at most speedup=\d+\.\d\d: no more"):
        Model().search("speedup=99")


def test_the_search_is_deterministic():
    first, second = Model().search("psnr=31"), Model().search("psnr=31")
    assert [(t.name, t.config) for t in first] == [(t.name, t.config) for t in second]


def test_where_none_reaches_the_target_the_nearest_is_best():
    wanted = Target.parse("psnr=90")
    trials = Model().search("psnr=90", count=2)
    chosen = best(trials, wanted)
    assert not reaches(chosen, wanted)
    full = [t for t in trials if t.anchor is None]
    assert chosen.values("psnr") == max((t.values("psnr") for t in full), key=statistics.fmean)


def test_estimates():
    found = Estimate.of([20.0, 30.0, 25.0, 25.0])
    assert found.mean == 25
    assert found.margin == pytest.approx(0.978472 * math.sqrt(50 / 3) / 2, rel=1e-4)  # t(0.8) of 3 degrees of freedom
    assert Estimate.of([25.0]).margin == math.inf
    assert Estimate.of([math.inf, math.inf]) == Estimate(100.0, 0.0)
    paired = Estimate.paired([22.0, 33.0], [20.0, 30.0, 40.0])
    assert paired.mean == pytest.approx(30 + 2.5)
    assert paired.margin == pytest.approx(1.376382 * 0.5, rel=1e-4)  # t(0.8) of 1, times the standard error


@pytest.mark.parametrize("text", ["psnr", "psnr=", "psnr=-3", "psnr=0", "ssim=1", "ssim=2", "speedup=1", "lpips=0.1"])
def test_targets_that_are_refused(text):
    with pytest.raises(ValueError, match="target: got"):
        Target.parse(text)


# Trials


@pytest.fixture(scope="module")
def pipe() -> DemoPipeline:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformer = demo_transformer(pairs=2, heads=1, size=16, frames=5)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    return DemoPipeline(transformer.eval().requires_grad_(False), demo_scheduler(), TextEmbedding())


REQUEST = Request(("a red circle moves right", "a blue star moves up"), steps=10, seeds=(4, 9))


@pytest.mark.parametrize("name", ["latte", "latte:469"])
def test_a_trial_is_the_whole_run(pipe, name):
    calls = []
    yardstick = Yardstick(pipe, REQUEST, lambda: calls.append(0))
    assert len(calls) == 2 * 10
    config = named_settings("latte")[name]
    found = yardstick.try_out(name, config)
    assert len(calls) == 2 * 10 + yardstick.calls(config) < 2 * 10 * 2, "the beginning is shared"
    for single, video in zip(split(REQUEST), found.videos, strict=True):
        (expected,), (without,) = (generate(pipe, single, settings).frames or () for settings in (config, PABConfig()))
        assert video == quality.compare(expected, without)
        assert video.psnr < 60, "the settings must really broadcast"
    assert 0 < found.predicted < 1
    assert found.measured < 1
    accelerate(pipe.transformer, PABConfig()).close()  # refuses a replaced forward


def test_predicted_savings_add_up(pipe):
    yardstick = Yardstick(pipe, split(REQUEST)[0])
    config = PABConfig.preset("latte")
    plan = Schedule(config, yardstick.timesteps)
    expected = sum(plan.broadcast_count(kind) * unit for kind, unit in yardstick.unit_savings.items()) / len(plan)
    assert yardstick.try_out("x", config).predicted == pytest.approx(expected)
    assert yardstick.try_out("off", PABConfig()).videos[0].psnr == math.inf


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (PABConfig(), 4),
        (PABConfig(cross_broadcast=True, cross_threshold=(100, 650), cross_range=3), 1),
        (PABConfig(mlp_broadcast=True, mlp_spatial_broadcast_config=(MlpWindow(600, (0,), 1),)), 2),
    ],
)
def test_first_call(config, expected):
    assert first_call(Schedule(config, [900, 700, 600, 300])) == expected


def test_a_run_may_begin_late():
    model, timesteps = tiny_latte(), [900.0, 700.0, 600.0, 300.0]
    latents, text = inputs()
    config = PABConfig(spatial_broadcast=True, spatial_threshold=(100, 650), spatial_range=2)
    with accelerate(model, config) as handle:
        handle.begin(timesteps)
        outputs = [call(model, latents, text, t) for t in timesteps]
        plan = handle.begin(timesteps, first_call=1)
        assert torch.equal(call(model, latents, text, timesteps[1]), outputs[1])
        assert [step.spatial for step in plan] == [False, False, False, True]
        call(model, latents, text, timesteps[2])
        assert torch.equal(call(model, latents, text, timesteps[3]), outputs[3])
        handle.begin(timesteps, first_call=3)
        with pytest.raises(ValueError, match="before this run has written it"):
            call(model, latents, text, timesteps[3])
        for wrong in (-1, 4):
            with pytest.raises(ValueError, match=f"first_call: got {wrong}"):
                handle.begin(timesteps, first_call=wrong)


# What is kept


def test_the_best_so_far_is_always_on_disk(tmp_path):
    wanted = Target.parse("psnr=28")
    settings = named_settings("latte")
    tuned = Tuned(tmp_path / "t.yaml", wanted, "made up")
    for name, psnr, saving in (("latte", 20.0, 0.2), ("latte:235", 32.0, 0.1), ("latte:347", 25.0, 0.3)):
        tuned.add(trial(name, settings[name], psnr, saving))
        kept = PABConfig.from_yaml(tmp_path / "t.yaml")
        assert kept == settings["latte" if name == "latte" else "latte:235"]
    text = (tmp_path / "t.yaml").read_text()
    assert text.startswith(
        "# pab tune --target psnr=28: reached, after 3 trials\n# made up\n# latte:235: PSNR, dB 32.00 (of"
    )
    assert "10.0% as predicted, 10.0% as measured" in text
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 1 + 3 * 8


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({"spatial_broadcast": True, "spatial_threshold": [0, 650], "spatial_range": 2}, 2),
        ({"mlp_broadcast": True, "mlp_threshold": [0, 650], "mlp_range": 2}, 2),
        ({"mlp_spatial_broadcast_config": {800: {"block": [0], "skip_count": 1}}}, 1),
        # At 700 the block is computed, and at 600 it uses what was kept at 800.
        (
            {
                "mlp_spatial_broadcast_config": {
                    800: {"block": [0], "skip_count": 3},
                    700: {"block": [0], "skip_count": 1},
                }
            },
            1,
        ),
        ({"spatial_broadcast": True, "spatial_threshold": [0, 10], "spatial_range": 2}, 5),
    ],
)
def test_a_trial_begins_where_all_that_is_read_is_still_to_be_written(settings, start):
    if "mlp_spatial_broadcast_config" in settings:
        settings = settings | {"mlp_broadcast": True}
    schedule = Schedule(PABConfig.from_dict(settings), [900.0, 800.0, 700.0, 600.0, 500.0])
    assert first_call(schedule) == start


def test_a_journal_gives_back_what_is_done(tmp_path):
    made: list[str] = []
    config = named_settings("latte")["latte"]

    def try_out(name: str, config: PABConfig, videos: int | None) -> Trial:
        made.append(name)
        return trial(name, config, 30.0, 0.2, videos)

    path = tmp_path / "t.trials.json"
    first = Journal(path, "made up").around(try_out)("a", config, 4)
    again = Journal(path, "made up").around(try_out)("a", config, 4)
    assert again == first
    assert made == ["a"]
    Journal(path, "made up").around(try_out)("b", config, None)  # on all videos: another trial
    Journal(path, "of another model").around(try_out)("c", config, 4)
    path.write_text("{}")
    journal = Journal(path, "made up")
    journal.around(try_out)("d", config, 4)
    assert made == ["a", "b", "c", "d"]
    journal.close()
    assert not path.exists()
