"""Whole steps of rectified flow: the numbers of single calls with guidance and sampler, on a CPU and from graphs."""

import dataclasses
import functools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from pab_kernels import PABConfig, accelerate
from pab_kernels.measure.benchmark import advance, denoise, predict, relative_error
from pab_kernels.measure.contenders import Problem
from pab_kernels.models import adapter_for
from pab_kernels.pipelines.samplers import RFlowScheduler
from pab_kernels.runtime.executor import Executor
from pab_kernels.runtime.handle import PABHandle, handle_of
from pab_kernels.runtime.rectified_flow import FlowInputs, euler_step, step_sizes
from pab_kernels.workloads import WORKLOADS
from tests.latte_tools import inputs, tiny_latte
from tests.pipeline_tools import SMALLEST, tiny_pipeline
from tests.problem_tools import WORKLOADS_OF_FAMILIES, problem

TIMESTEPS = [900.0, 700.0, 500.0, 50.0]


def single_calls(made: Problem, handle: PABHandle) -> Tensor:
    """The loop over the transformer's forward."""
    handle.begin(made.timesteps)
    latents = made.inputs.latents
    with torch.no_grad():
        for call in range(len(made.timesteps)):
            latents = advance(made, latents, predict(made.host, made, latents, call), call)
    return latents


def generate(pipe: Any, **settings: Any) -> Tensor:
    return pipe("a cat", **{**SMALLEST, "num_inference_steps": 6, "guidance_scale": 3.0, **settings})


# Numbers


def test_a_step_is_guidance_and_the_way_to_the_next_timestep():
    assert step_sizes([1000.0, 600.0, 100.0]) == [0.4, 0.5, 0.1]
    latents = torch.tensor([[[[[1.0]]]], [[[[2.0]]]]])
    prediction = torch.tensor([[3.0, 9.0], [4.0, 9.0], [1.0, 9.0], [2.0, 9.0]]).view(4, 2, 1, 1, 1)
    assert euler_step(latents, prediction, 5.0, 0.5).flatten().tolist() == [1 + (1 + 5 * 2) / 2, 2 + (2 + 5 * 2) / 2]
    assert euler_step(latents, prediction[:2], 1.0, 0.5).flatten().tolist() == [1 + 3 / 2, 2 + 4 / 2]


@pytest.mark.parametrize("name", WORKLOADS_OF_FAMILIES)
@pytest.mark.parametrize("pab", [False, True], ids=["no pab", "pab"])
def test_steps_are_single_calls_with_guidance_and_sampler(name, pab):
    made = problem(name)
    with accelerate(made.host, made.settings(pab)) as handle:
        expected = single_calls(made, handle)
        before = handle.report()
        handle.begin(made.timesteps)
        got = denoise(made.host, made)
        after = handle.report()
    assert relative_error(got, expected) < 5e-6
    assert (after.calls, after.computed, after.broadcast) == (before.calls, before.computed, before.broadcast)
    assert {name: count for name, (count, _) in after.seconds.items()} == {
        name: count for name, (count, _) in before.seconds.items()
    }


@pytest.mark.parametrize(
    ("name", "masked"), [*((name, False) for name in WORKLOADS_OF_FAMILIES), (WORKLOADS_OF_FAMILIES[0], True)]
)
def test_modulation_of_all_steps_is_that_of_each(name, masked):
    made = problem(name)
    given = dict(made.inputs.given)
    if name == WORKLOADS_OF_FAMILIES[0]:
        given["fps"] = torch.tensor([24.0, 8.0])
    if masked:
        given["x_mask"] = torch.rand(2, made.workload.latent[0]) < 0.5
    adapter = adapter_for(made.host)
    try:
        with torch.no_grad():
            flow = FlowInputs.make(adapter, made.inputs.latents, TIMESTEPS, 7.0, given)
            assert flow.modulation.shape[:3] == (len(TIMESTEPS), flow.call.layout.modulations, 8)
            for step, t in enumerate(TIMESTEPS):
                call = adapter.bind(made.inputs.latents.repeat(2, 1, 1, 1, 1), timestep=torch.full((2,), t), **given)
                want, packed = adapter.modulate(call), flow.modulation[step]
                assert want.blocks is not None
                assert relative_error(packed[:, :6], want.blocks) < 1e-6
                assert relative_error(packed[:, 6:], torch.stack([want.shift, want.scale], 1)) < 1e-6
    finally:
        adapter.restore()


def test_a_forward_is_modulated_by_its_own_timestep_though_it_was_announced_before_rounding():
    model, (latents, text) = tiny_latte(), inputs()
    given = {"timestep": torch.tensor([321.0, 321.0]), "encoder_hidden_states": text, "return_dict": False}
    expected = model(latents, **given)[0]
    with accelerate(model, PABConfig()) as handle:
        handle.begin([321.4])
        torch.testing.assert_close(model(latents, **given)[0], expected, rtol=2e-5, atol=2e-5)


# The pipeline


@pytest.mark.parametrize(
    "settings",
    [{}, {"guidance_scale": 1.0}, {"given": True}, {"given": True, "guidance_scale": 1.0}, {"callback": True}],
    ids=["guided", "unguided", "given frames", "given frames, unguided", "callback"],
)
def test_the_pipeline_takes_whole_steps_and_gives_the_numbers_of_its_own_loop(settings, monkeypatch):
    pipe, settings = tiny_pipeline("open_sora"), dict(settings)
    if settings.pop("given", False):
        mask = torch.tensor([[True, False, False, True, False]])
        settings |= {"given_latents": torch.randn(1, 4, 5, 24, 24), "given_mask": mask}
    if settings.pop("callback", False):

        def halve(_pipe: Any, _step: int, _t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"latents": tensors["latents"] / 2}

        settings["callback_on_step_end"] = halve
    expected = generate(pipe, **settings)
    progress = []
    with accelerate(pipe, PABConfig()) as handle:
        monkeypatch.setattr(PABHandle, "forward", lambda *_: pytest.fail("the forward was called"))
        got = generate(pipe, **settings, progress=lambda done, total: progress.append((done, total)))
        assert handle.report().calls == 6
    assert relative_error(got, expected) < 1e-5
    assert progress[-1] == (6, 6)


def test_latents_handed_out_stay_as_they_were():
    made, kept = problem("open_sora-144p-2s"), []
    with accelerate(made.host, PABConfig()) as handle:
        handle.begin(made.timesteps)
        latents = made.inputs.latents
        take_step = handle.rectified_flow(latents, 7.0, **made.inputs.given)
        for _ in made.timesteps:
            latents = take_step(latents)
            kept.append((latents, latents.clone()))
    assert all(torch.equal(now, then) for now, then in kept)


def test_whoever_stands_before_the_runtime_sees_every_call():
    pipe, calls = tiny_pipeline("open_sora"), []
    host = pipe.transformer
    assert handle_of(host) is None
    with accelerate(pipe, PABConfig()) as handle:
        assert handle_of(host) is handle
        expected = generate(pipe)
        hook = host.register_forward_pre_hook(lambda *_: calls.append("hook"))
        assert handle_of(host) is None
        assert relative_error(generate(pipe), expected) < 1e-5
        hook.remove()
        own = host.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            calls.append("forward")
            return own(*args, **kwargs)

        host.forward = forward
        assert handle_of(host) is None
        assert relative_error(generate(pipe), expected) < 1e-5
        host.forward = own
        pipe.scheduler = type("Other", (RFlowScheduler,), {})()
        assert relative_error(generate(pipe), expected) < 1e-5
    assert Counter(calls) == {"hook": 6, "forward": 6}
    assert handle_of(host) is None


# Errors


def test_steps_outside_a_run_are_errors(monkeypatch):
    made = problem("open_sora-144p-2s")
    latents, given = made.inputs.latents, made.inputs.given
    with accelerate(made.host, made.config) as handle:
        with pytest.raises(ValueError, match="no run has begun"):
            handle.rectified_flow(latents, 7.0, **given)
        handle.begin(made.timesteps[:2])
        take_step = handle.rectified_flow(latents, 7.0, **given)
        for wrong in (latents[:, :, :3], latents.repeat(2, 1, 1, 1, 1)):
            with pytest.raises(ValueError, match="latents: shape is"):
                take_step(wrong)
        with pytest.raises(ValueError, match="latents: device is meta"):
            take_step(latents.to("meta"))
        take_step(take_step(latents))  # refused latents leave the run as it was
        with pytest.raises(ValueError, match="the run's 2 steps are over"):
            take_step(latents)
        handle.begin(made.timesteps)
        with pytest.raises(ValueError, match="another run has begun"):
            take_step(latents)
        take_step = handle.rectified_flow(latents, 7.0, **given)
        with monkeypatch.context() as patch:
            patch.setattr(Executor, "step", lambda *args, **kwargs: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                take_step(latents)
        with pytest.raises(ValueError, match="stopped in the middle of a step"):
            take_step(latents)
        handle.begin(made.timesteps)
        take_step = handle.rectified_flow(latents, 7.0, **given)
    with pytest.raises(ValueError, match="the handle is closed"):
        take_step(latents)
    with accelerate(made.host, made.config, forwards_per_step=2) as handle:
        handle.begin(made.timesteps)
        with pytest.raises(ValueError, match="forwards_per_step: is 2, must be 1"):
            handle.rectified_flow(latents, 7.0, **given)


def test_arguments_are_those_of_the_transformer():
    made = problem("open_sora-144p-2s")
    with accelerate(made.host, PABConfig()) as handle:
        handle.begin(made.timesteps)
        with pytest.raises(ValueError, match=r"y: shape is .* must be \[1, 1, L, 16\]"):
            handle.rectified_flow(made.inputs.latents, 1.0, **made.inputs.given)  # text of both halves


def test_steps_may_begin_late():
    made = problem("open_sora-144p-2s")
    with accelerate(made.host, PABConfig()) as handle:
        handle.begin(made.timesteps, first_call=3)
        late = handle.rectified_flow(made.inputs.latents, 7.0, **made.inputs.given)(made.inputs.latents)
        handle.begin(made.timesteps, first_call=3)
        with torch.no_grad():
            prediction = predict(made.host, made, made.inputs.latents, 3)
    assert relative_error(late, advance(made, made.inputs.latents, prediction, 3)) < 1e-6


# On a GPU


@functools.cache
def gpu_problem() -> Problem:
    short = dataclasses.replace(WORKLOADS["open_sora-144p-2s"], model={"depth": 2}, steps=8)
    return Problem.make(short, PABConfig.preset("open_sora"), torch.device("cuda"), torch.bfloat16)


def variations(made: Problem) -> list[Problem]:
    """Another seed, a prompt of another length, other timesteps and guidance."""
    workload, mask = made.workload, made.inputs.given["mask"]
    longer = {**made.inputs.given, "mask": (torch.arange(mask.shape[1], device="cuda") < 200).long()[None]}
    timesteps = [t - 3 for t in made.timesteps]
    return [
        made,
        dataclasses.replace(made, inputs=workload.inputs("cuda", torch.bfloat16, seed=1)),
        dataclasses.replace(made, inputs=dataclasses.replace(made.inputs, given=longer)),
        dataclasses.replace(
            made,
            workload=dataclasses.replace(workload, guidance=4.0),
            timesteps=timesteps,
            inputs=dataclasses.replace(made.inputs, timesteps=[torch.full((2,), t, device="cuda") for t in timesteps]),
        ),
    ]


def begin_and_denoise(made: Problem, handle: PABHandle) -> Tensor:
    handle.begin(made.timesteps)
    return denoise(made.host, made)


@pytest.mark.gpu
def test_graphs_of_whole_steps_give_the_numbers_of_single_calls_for_whatever_comes(device):
    runs = variations(gpu_problem())
    with accelerate(runs[0].host, runs[0].config, cuda_graphs=False) as handle:
        want = [begin_and_denoise(made, handle) for made in runs]
        for made, steps in zip(runs, want, strict=True):
            assert relative_error(steps, single_calls(made, handle)) < 3e-2
    with accelerate(runs[0].host, runs[0].config) as handle:
        for _ in range(3):
            begin_and_denoise(runs[0], handle)
        graphs = handle.report().graphs
        assert graphs == len(set(handle.schedule or ()))
        for made, expected in zip(runs, want, strict=True):
            assert relative_error(begin_and_denoise(made, handle), expected) < 1e-2
        assert handle.report().graphs == graphs, "what is new replays the graphs there are"
    assert min(relative_error(other, want[0]) for other in want[1:]) > 2e-2, "the variations must matter"


@pytest.mark.gpu
def test_graphs_of_whole_steps_with_given_frames(device):
    made = gpu_problem()
    mask = torch.ones(2, made.workload.latent[0], dtype=torch.bool, device=device)
    mask[:, ::4] = False
    given = {**made.inputs.given, "x_mask": mask}
    made = dataclasses.replace(made, inputs=dataclasses.replace(made.inputs, given=given))
    with accelerate(made.host, made.config, cuda_graphs=False) as handle:
        want = begin_and_denoise(made, handle)
        assert relative_error(want, single_calls(made, handle)) < 3e-2
    with accelerate(made.host, made.config) as handle:
        for _ in range(3):
            got = begin_and_denoise(made, handle)
        assert handle.report().graphs == len(set(handle.schedule or ()))
    assert relative_error(got, want) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("variant", [None, "fast"])
def test_a_step_is_one_graph_and_a_few_copies_without_synchronisation_or_allocation(device, variant):
    made = dataclasses.replace(gpu_problem(), config=PABConfig.preset("open_sora", variant))
    with accelerate(made.host, made.config) as handle:
        for _ in range(3):
            begin_and_denoise(made, handle)
        handle.begin(made.timesteps)
        take_step = handle.rectified_flow(made.inputs.latents, 7.0, **made.inputs.given)
        latents = take_step(made.inputs.latents)
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in made.timesteps[1:]:
                    latents = take_step(latents)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
        after = torch.cuda.memory_stats()
    assert latents.isfinite().all()
    assert after["num_device_alloc"] == before["num_device_alloc"]
    assert after["reserved_bytes.all.current"] == before["reserved_bytes.all.current"]
    steps = len(made.timesteps) - 1
    calls = Counter(event.name for event in trace.events())
    assert calls["cudaGraphLaunch"] == steps
    # In: latents, modulation, scales, frame rate, and how far a forecast reaches. Out: the caller's own latents.
    launches = sum(count for name, count in calls.items() if name.startswith(("cudaLaunchKernel", "cudaMemcpy")))
    assert launches <= (5 if variant is None else 6) * steps, calls
