"""The plain form of Wan and LTX-Video, against attention modules that remember their own last output."""

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest
import torch

from pab_kernels import PABConfig
from pab_kernels.plain import PlainPAB
from pab_kernels.schedule import Schedule
from pab_kernels.tune.profile import Profiler
from tests.wan_tools import PIPELINES, floats, forwards_per_step, generate, plain_runs, timesteps_of, transformers_of

STEPS = 8
PAB = PABConfig(
    spatial_broadcast=True, spatial_threshold=(50, 990), spatial_range=2,
    cross_broadcast=True, cross_threshold=(50, 990), cross_range=3,
)  # fmt: skip


@contextmanager
def remembering(pipe: Any, config: PABConfig) -> Iterator[None]:
    """Attention modules hand out their own last output of the same forward where the schedule broadcasts."""
    forwards = forwards_per_step(pipe)
    with ExitStack() as hooks:
        for model, timesteps in zip(transformers_of(pipe), timesteps_of(pipe, STEPS), strict=True):
            calls = itertools.count()
            state = Current(Schedule(config, timesteps), forwards)
            hook = model.register_forward_pre_hook(
                lambda _module, _args, state=state, calls=calls: state.at(next(calls))
            )
            hooks.callback(hook.remove)
            for name, module in model.named_modules():
                kind = {"attn1": "spatial", "attn2": "cross"}.get(name.rpartition(".")[2])
                if kind is not None:
                    module.forward = partial(state.attend, module.forward, name, kind)
                    hooks.callback(module.__dict__.pop, "forward")
        yield


class Current:
    """Where a transformer's run is, and what its attention modules gave last, for each forward of a step."""

    def __init__(self, schedule: Schedule, forwards: int) -> None:
        self.schedule, self.forwards = schedule, forwards
        self.step = self.forward = 0
        self.kept: dict[tuple[str, int], Any] = {}

    def at(self, call: int) -> None:
        self.step, self.forward = divmod(call, self.forwards)

    def attend(self, compute: Any, name: str, kind: str, *args: Any, **kwargs: Any) -> Any:
        if not getattr(self.schedule[self.step], kind):
            self.kept[name, self.forward] = compute(*args, **kwargs)
        return self.kept[name, self.forward]


@pytest.mark.parametrize("name", PIPELINES)
def test_it_keeps_what_attention_gave(name: str) -> None:
    pipe = PIPELINES[name]()
    without = generate(pipe, STEPS)
    with remembering(pipe, PAB):
        expected = generate(pipe, STEPS)
    with plain_runs(pipe, PAB, STEPS):
        actual = generate(pipe, STEPS)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)
    assert (actual - without).norm() > 1e-3 * without.norm(), "the config must really broadcast"
    with plain_runs(pipe, PABConfig(), STEPS):
        torch.testing.assert_close(generate(pipe, STEPS), without, atol=2e-5, rtol=2e-5)
    assert torch.equal(generate(pipe, STEPS), without), "leaving restores the host"


def test_two_transformers_share_the_timesteps() -> None:
    pipe = PIPELINES["wan t2v, two transformers"]()
    first, second = timesteps_of(pipe, STEPS)
    pipe.scheduler.set_timesteps(STEPS)
    assert [*first, *second] == floats(pipe.scheduler.timesteps)
    assert min(first) >= 875 > max(second)


def test_one_state_for_both_forwards_is_another_result() -> None:
    """What diffusers 0.42's own hook does: the unconditional forward takes the conditional one's output."""
    pipe = PIPELINES["wan t2v"]()
    with plain_runs(pipe, PAB, STEPS):
        apart = generate(pipe, STEPS)
    (timesteps,) = timesteps_of(pipe, STEPS)
    with PlainPAB(pipe.transformer, PAB) as plain:
        plain.begin([t for t in timesteps for _ in range(2)])
        together = generate(pipe, STEPS)
    assert (apart - together).norm() > 1e-3 * apart.norm()


@pytest.mark.parametrize("name", ["wan t2v", "ltx"])
def test_profiles_compare_each_forward_with_its_like(name: str) -> None:
    """A mean over the forwards; where both are one, as with the same prompt twice, that of either."""
    pipe = PIPELINES[name]()
    forwards = forwards_per_step(pipe)
    (timesteps,) = timesteps_of(pipe, STEPS)
    with Profiler(pipe.transformer, forwards) as profiler:
        generate(pipe, STEPS, negative_prompt="a red cat runs", guidance_scale=1.5)
        found = profiler.profile(timesteps)
        with pytest.raises(ValueError, match=rf"timesteps: got 3, must be {STEPS}, one a step"):
            profiler.profile(timesteps[:3])
    assert found.kinds == ("spatial", "cross")
    assert found.relative_l2["spatial"].shape == (2, STEPS)
    if forwards == 2:
        with Profiler(pipe.transformer) as profiler:
            generate(pipe, STEPS, guidance_scale=1.0)
            alone = profiler.profile(timesteps)
        for kind in found.kinds:
            assert found.relative_l2[kind][:, 1:] == pytest.approx(alone.relative_l2[kind][:, 1:], rel=1e-3)
