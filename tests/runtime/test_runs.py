"""Which run is this: nothing goes on with a plan that is not its own, and what is not known is an error."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LattePipeline,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from pab_kernels import PABConfig, accelerate
from pab_kernels.plain import PlainPAB
from pab_kernels.runtime.run import Mismatch, Run
from pab_kernels.schedule import Schedule
from tests.family_tools import FAMILIES, PAB, STEPS, Host, host, relative_error


class Pipeline:
    """A pipeline's transformer and scheduler, and loops over them."""

    def __init__(self, made: Host, scheduler: Any = None) -> None:
        self.made = made
        self.transformer = made.model
        self.scheduler: Any = scheduler or DDIMScheduler()

    def __call__(self, steps: int = 6, seed: int = 5, scheduler: Any = None) -> Tensor:
        scheduler = scheduler or self.scheduler
        scheduler.set_timesteps(steps)
        return self.made.run(scheduler.timesteps.tolist(), seed=seed)


@pytest.fixture(params=FAMILIES)
def pipe(request: pytest.FixtureRequest) -> Pipeline:
    return Pipeline(host(request.param))


def plain(made: Host, steps: list[float], seed: int = 5) -> Tensor:
    with PlainPAB(made.model, PAB) as handle:
        handle.begin(steps)
        return made.run(steps, seed=seed)


# Schedulers


def test_a_request_with_a_scheduler_of_its_own_is_right_or_told_to_begin(pipe: Pipeline) -> None:
    want = plain(pipe.made, [t for t in _timesteps(DDIMScheduler(), 10)])
    with accelerate(pipe, PAB) as handle:
        with pytest.raises(ValueError, match=r"handle\.begin\(scheduler\.timesteps\)"):
            pipe(10, scheduler=DDIMScheduler())  # the pipeline's own has not run: it has all 1000
        for _ in range(12):
            own: Any = DDIMScheduler()
            own.set_timesteps(10)
            handle.begin(own.timesteps)
            assert relative_error(pipe(10, scheduler=own), want) < 1e-5
        pipe(7)
        with pytest.raises(ValueError, match="scheduler"):
            pipe(10, scheduler=DDIMScheduler())
        pipe(10)
        for _ in range(3):  # the same timesteps as the pipeline's own: the same plan
            assert relative_error(pipe(10, scheduler=DDIMScheduler()), want) < 1e-5


def _timesteps(scheduler: Any, steps: int) -> list[float]:
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.tolist()


SCHEDULERS = [
    DDIMScheduler, PNDMScheduler, HeunDiscreteScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler,
    DPMSolverMultistepScheduler,
]  # fmt: skip


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_a_scheduler_swapped_on_the_pipeline_is_followed(cls: Any) -> None:
    """PNDM and Heun repeat timesteps."""
    pipe = Pipeline(host("latte"))
    with accelerate(pipe, PAB):
        pipe()
        pipe.scheduler = cls()
        got = pipe(8)
    assert relative_error(got, plain(pipe.made, pipe.scheduler.timesteps.tolist())) < 1e-5


# Forwards of a step


def twice(made: Host, steps: list[float], names: tuple[str | None, str | None] = (None, None)) -> Tensor:
    """Two forwards a step, of other latents and text."""
    generator, found = torch.Generator().manual_seed(3), []
    key = next(key for key in ("encoder_hidden_states", "y") if key in made.given)
    texts = {None: made.given[key], 1: made.given[key].flip(0)}
    for t in steps:
        for half, name in zip((None, 1), names, strict=True):
            context = nullcontext() if name is None else made.model.cache_context(name)
            with context:
                found.append(made.call(torch.randn(made.shape, generator=generator), t, **{key: texts[half]}))
    return torch.stack(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_guidance_in_two_calls_is_told_to_say_so(family: str) -> None:
    pipe = Pipeline(host(family))
    with accelerate(pipe, PAB, forwards_per_step=2):
        want = twice(pipe.made, _timesteps(pipe.scheduler, 6))
    with accelerate(pipe, PAB), pytest.raises(ValueError, match="forwards_per_step=2"):
        twice(pipe.made, _timesteps(pipe.scheduler, 6))
    with accelerate(pipe.made.model, PAB) as handle:
        handle.begin(pipe.scheduler.timesteps)
        with pytest.raises(ValueError, match="forwards_per_step=2"):
            twice(pipe.made, pipe.scheduler.timesteps.tolist())
    with accelerate(pipe, PAB, forwards_per_step=3), pytest.raises(ValueError, match=r"and 3 forwards.*2 so far"):
        twice(pipe.made, _timesteps(pipe.scheduler, 6))
    with accelerate(pipe, PAB, forwards_per_step=2), pytest.raises(ValueError, match=r"and 2 forwards.*1 so far"):
        pipe()
    assert want.isfinite().all()


def test_names_of_forwards_need_no_count() -> None:
    pipe = Pipeline(host("latte"))
    with accelerate(pipe, PAB, forwards_per_step=2):
        want = twice(pipe.made, _timesteps(pipe.scheduler, 6))
    with accelerate(pipe, PAB) as handle:
        for _ in range(2):
            got = twice(pipe.made, _timesteps(pipe.scheduler, 6), ("cond", "uncond"))
            assert torch.equal(got, want)
        assert len(handle.caches) == 2
    assert "cache_context" not in vars(pipe.transformer)


def test_a_forward_that_stops_and_comes_back_never_reads_old_slots() -> None:
    """Guidance in an interval: what it would broadcast was computed before the gap."""
    made = host("latte")
    x = torch.randn(made.shape)

    def call(name: str, t: float) -> Tensor:
        with made.model.cache_context(name):
            return made.call(x, t)

    with accelerate(made.model, PAB) as handle:
        handle.begin(STEPS)
        for t in STEPS[:2]:
            call("cond", t)
            call("uncond", t)
        for t in STEPS[2:4]:
            call("cond", t)
        with pytest.raises(ValueError, match="read before this run has written it"):
            call("uncond", STEPS[3])  # spatial attention would be broadcast
        handle.begin(STEPS)
        for t in STEPS:
            call("cond", t)
        with pytest.raises(ValueError, match=r"steps are over|timestep: got"):
            call("cond", STEPS[-1])


# Loops that stop and start over


def test_a_loop_that_starts_over_is_a_new_run_or_an_error(pipe: Pipeline) -> None:
    steps = _timesteps(pipe.scheduler, 6)
    with accelerate(pipe, PAB) as handle:
        want = pipe.made.run(steps)
        for stop in range(2, 6):
            pipe.made.run(steps[:stop], seed=9)
            assert torch.equal(pipe.made.run(steps), want), f"after {stop} steps"
        pipe.made.run(steps[:1], seed=9)
        with pytest.raises(ValueError, match=r"second call.*begin\(timesteps\)"):
            pipe.made.run(steps)  # looks like guidance in two calls
        pipe.scheduler.set_timesteps(6)
        assert torch.equal(pipe.made.run(steps), want)
        assert handle.report().calls == 6
    with accelerate(pipe.made.model, PAB) as handle:
        for stop in (1, 3, 5):
            handle.begin(steps)
            pipe.made.run(steps[:stop], seed=9)
            with pytest.raises(ValueError, match=r"begin\(timesteps\)"):
                pipe.made.run(steps)
        handle.begin(steps)
        assert torch.equal(pipe.made.run(steps), want)


@pytest.mark.parametrize("wrong", [STEPS[2], 123.0, 941.0])
def test_a_timestep_that_is_skipped_or_of_no_step_is_an_error(pipe: Pipeline, wrong: float) -> None:
    x = torch.randn(pipe.made.shape)
    with accelerate(pipe.made.model, PAB) as handle:
        handle.begin(STEPS)
        pipe.made.call(x, STEPS[0])
        with pytest.raises(ValueError, match=rf"timestep: got {wrong:g}, but step 1 of this run has 820"):
            pipe.made.call(x, wrong)
        pipe.made.call(x, STEPS[1])


def test_rows_of_several_timesteps_are_an_error() -> None:
    made = host("latte")
    with accelerate(made.model, PAB) as handle:
        handle.begin(STEPS)
        with pytest.raises(ValueError, match=r"timestep: rows are \[940.0, 820.0\], must be alike"):
            made.model(torch.randn(made.shape), timestep=torch.tensor([940.0, 820.0]), **made.given)


CASTS: list[Callable[[Tensor], Tensor]] = [
    Tensor.long, Tensor.int, Tensor.bfloat16, Tensor.half, Tensor.double, lambda t: t.bfloat16().float(), Tensor.round,
]  # fmt: skip


@pytest.mark.parametrize("cast", CASTS)
def test_timesteps_may_come_rounded(cast: Callable[[Tensor], Tensor]) -> None:
    made, steps = host("latte"), [901.3636, 717.55, 500.25, 3.5]
    x = torch.randn(made.shape)
    with accelerate(made.model, PAB) as handle:
        handle.begin(steps)
        for t in steps:
            made.model(x, timestep=cast(torch.full((2,), t)), **made.given)


def test_a_refused_call_leaves_the_run_as_it_was(pipe: Pipeline) -> None:
    with accelerate(pipe.made.model, PAB) as handle:
        handle.begin(STEPS)
        want = pipe.made.run()
        handle.begin(STEPS)
        wide = torch.randn(2, 3, *pipe.made.shape[2:])
        with pytest.raises(ValueError, match="shape"):
            pipe.made.call(wide, STEPS[0])
        assert torch.equal(pipe.made.run(), want)


def test_pixel_sizes_are_those_of_each_call() -> None:
    """Another height, width or frame rate of latents of one shape; also changed in place."""
    made = host("open_sora")
    given = made.given
    others = [{"height": given["height"] * 2}, {"width": given["width"] * 3}, {"fps": given["fps"] / 3}]
    x = torch.randn(made.shape)
    with accelerate(made.model, PABConfig()) as handle:
        for other in [{}, *others, {}]:
            want = host("open_sora").call(x, 500.0, **other)
            handle.begin([500.0])
            assert relative_error(made.call(x, 500.0, **other), want) < 1e-5
        handle.begin([500.0, 400.0])
        made.call(x, 500.0)
        for key in ("height", "fps"):
            given[key].mul_(2)
        want = host("open_sora").call(x, 400.0, **{key: given[key] for key in ("height", "fps")})
        assert relative_error(made.call(x, 400.0), want) < 1e-5


# Threads


def together(*works: Callable[[], object]) -> list[BaseException | None]:
    """Run each in a thread of its own, one after the other; what each raised."""
    raised: list[BaseException | None] = []

    def run(work: Callable[[], object]) -> None:
        try:
            work()
            raised.append(None)
        except ValueError as error:
            raised.append(error)

    for work in works:
        thread = threading.Thread(target=run, args=(work,))
        thread.start()
        thread.join()
    return raised


def test_a_run_that_another_thread_has_ended_is_refused(pipe: Pipeline) -> None:
    steps = _timesteps(pipe.scheduler, 6)
    x = torch.randn(pipe.made.shape)
    with accelerate(pipe, PAB) as handle:
        want = pipe()
        pipe.scheduler.set_timesteps(6)
        pipe.made.call(x, steps[0])
        (refused,) = together(lambda: pipe.made.call(x, steps[1]))
        assert "thread" in str(refused), "a call of a run that is another thread's"
        assert together(pipe) == [None], "a run of its own ends the other"
        for t in steps[1:]:
            with pytest.raises(ValueError, match="ended by another thread's"):
                pipe.made.call(x, t)
        assert torch.equal(pipe(), want)
        handle.begin(steps)
        (fine,) = together(lambda: pipe.made.call(x, steps[0]))
        assert fine is None, "an announced run may be made by another thread"


def test_threads_with_a_handle_each_do_not_disturb_each_other() -> None:
    made = [host("latte", seed=seed) for seed in (1, 2)]
    want = [plain(each, list(STEPS)) for each in made]
    handles = [accelerate(each.model, PAB) for each in made]
    found: dict[int, list[Tensor]] = {0: [], 1: []}

    def work(i: int) -> None:
        for _ in range(5):
            handles[i].begin(STEPS)
            found[i].append(made[i].run())

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in handles:
        handle.close()
    for i in (0, 1):
        assert len(found[i]) == 5
        assert all(relative_error(each, want[i]) < 1e-5 for each in found[i])


# The plan


def test_a_run_places_forwards_by_name() -> None:
    run = Run(Schedule(PABConfig(), [5.0, 4.0, 3.0]))
    shape = torch.Size([1])
    for step, name in [(0, "cond"), (0, "uncond"), (1, "uncond"), (1, "cond"), (2, "cond"), (2, "uncond")]:
        assert run.place(name, 5.0 - step) == (step, name)
        assert not run.skipped(name, step)
        run.done(name, step, shape)
    assert run.over
    with pytest.raises(Mismatch, match="steps are over"):
        run.place("cond", 3.0)
    run = Run(Schedule(PABConfig(), [5.0, 4.0, 3.0]))
    for step in (0, 1):
        run.done("cond", step, shape)
    assert run.place("uncond", 4.0) == (1, "uncond")
    assert run.skipped("uncond", 1)
    assert run.place("uncond", 3.0) == (2, "uncond")
    with pytest.raises(Mismatch, match="timestep: got 5"):
        run.place("uncond", 5.0)


def test_lattes_own_pipeline_with_a_scheduler_for_each_request() -> None:
    made = host("latte")
    shared: Any = LattePipeline(None, None, None, made.model, DDIMScheduler())
    shared.set_progress_bar_config(disable=True)

    def video(pipe: Any, seed: int) -> Tensor:
        text = torch.randn(2, 1, 7, 16, generator=torch.Generator().manual_seed(seed))
        return pipe(
            prompt_embeds=text[0], negative_prompt_embeds=text[1], negative_prompt=None, num_inference_steps=10,
            video_length=5, height=64, width=64, generator=torch.Generator().manual_seed(seed), output_type="latent",
            mask_feature=False, clean_caption=False,
        ).frames  # fmt: skip

    with accelerate(shared, PAB):
        want = video(shared, 0)
    with accelerate(shared, PAB) as handle:
        for request in range(12):
            scheduler: Any = DDIMScheduler()
            single: Any = LattePipeline(None, None, None, made.model, scheduler)
            single.set_progress_bar_config(disable=True)
            scheduler.set_timesteps(10)
            handle.begin(scheduler.timesteps)
            got = video(single, request % 2)
            if request % 2 == 0:
                assert torch.equal(got, want)
            assert handle.schedule is not None
            assert len(handle.schedule) == 10
