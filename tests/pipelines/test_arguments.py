"""What every pipeline is asked with: seeds, generators, given noise, several videos a prompt, guidance that changes."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from pab_kernels import PABConfig, accelerate
from pab_kernels.pipelines.arguments import Prompts, seeds_of
from pab_kernels.pipelines.demo import DemoPipeline
from pab_kernels.plain import PlainPAB
from tests.pipeline_tools import TINY, close, run, tiny_demo, tiny_pipeline

PIPELINES = [*TINY, "demo"]


def tiny(family: str) -> Any:
    return tiny_demo() if family == "demo" else tiny_pipeline(family)


def sample(pipe: Any, prompt: Any = "", **settings: Any) -> torch.Tensor:
    """Four steps."""
    settings = {"num_inference_steps": 4, "guidance_scale": 2.0, **settings}
    return pipe(prompt, **settings) if isinstance(pipe, DemoPipeline) else run(pipe, prompt, **settings)


# Reading


def test_seeds_are_whole_numbers_of_64_bits():
    assert seeds_of(None, 2) == [0, 1]
    assert seeds_of(np.int64(7), 2) == [7, 8]
    assert seeds_of(np.array([3, 2**63], dtype=np.uint64), 2) == [3, 2**63]
    assert seeds_of(torch.tensor(5), 1) == [5]
    assert seeds_of((2**64 - 1,), 1) == [2**64 - 1]
    assert all(type(seed) is int for seed in seeds_of(np.arange(3), 3))


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"seed": 2**64}, ValueError, "seed: got 18446744073709551616, must fit 64 bits"),
        ({"seed": np.uint64(2**64 - 1), "prompt": ["", ""]}, ValueError, "seed: got 18446744073709551616"),
        ({"seed": 1.5}, TypeError, "seed: got 1.5, must be an integer"),
        ({"seed": True}, TypeError, "seed: got True"),
        ({"seed": "3"}, TypeError, "seed: got '3'"),
        ({"seed": [1, None]}, TypeError, "seed: got None, must be an integer"),
        ({"seed": [1, 2, 3]}, ValueError, "seed must be a single value or one for each of 1 prompts, got 3"),
        (
            {"seed": [1], "num_videos_per_prompt": 2},
            ValueError,
            "seed must be a single value or one for each of 2 videos, got 1",
        ),
        ({"seed": 0, "generator": torch.Generator()}, ValueError, "seed, generator: got both"),
        ({"generator": [torch.Generator()] * 2}, ValueError, "generator must be a single .* got 2"),
        ({"generator": [7]}, TypeError, "generator: got int, must be a torch.Generator"),
        ({"negative_prompt": 3}, TypeError, "negative_prompt: got 3, must be None, a string"),
        ({"negative_prompt": [3]}, TypeError, "negative_prompt: got 3, must be a string"),
        ({"prompt": None}, TypeError, "prompt: got None, must be a string"),
        ({"prompt": ["", None]}, TypeError, "prompt: got None, must be a string"),
        ({"num_videos_per_prompt": 0}, ValueError, "num_videos_per_prompt must be at least 1, got 0"),
        ({"num_videos_per_prompt": None}, TypeError, "num_videos_per_prompt: got None, must be an integer"),
        ({"num_inference_steps": 4.5}, TypeError, "num_inference_steps: got 4.5, must be an integer"),
        ({"guidance_scale": None}, TypeError, "guidance_scale: got None, must be a number"),
        ({"guidance_scale": float("nan")}, ValueError, "guidance_scale: got nan, must be finite"),
        ({"latents": torch.zeros(2, 1)}, ValueError, r"latents: shape is \[2, 1\], must be"),
        ({"latents": None, "callback_on_step_end": lambda *_: {"latents": 3}}, TypeError, "latents"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("family", PIPELINES)
def test_every_pipeline_names_a_bad_argument(family, arguments, kind, message):
    with pytest.raises(kind, match=message):
        sample(tiny(family), **{"prompt": "", **arguments})


# What they mean


@pytest.mark.parametrize("family", PIPELINES)
def test_none_is_the_empty_negative_prompt_and_the_seed_0(family):
    pipe = tiny(family)
    want = sample(pipe, ["", ""], negative_prompt="", seed=0)
    assert torch.equal(sample(pipe, ["", ""], negative_prompt=None, seed=None), want)
    assert torch.equal(sample(pipe, ["", ""], negative_prompt=[None, ""], seed=np.arange(2)), want)


@pytest.mark.parametrize("family", PIPELINES)
def test_several_videos_of_a_prompt_follow_each_other(family):
    pipe = tiny(family)
    prompts = ["a red circle", "a blue star"] if family == "demo" else ["a red cat", "a blue dog"]
    several = sample(pipe, prompts, num_videos_per_prompt=2, seed=4)
    want = sample(pipe, [prompt for prompt in prompts for _ in range(2)], seed=[4, 5, 6, 7])
    assert torch.equal(several, want)
    assert not close(several[:1], several[1:2], 1e-3)


@pytest.mark.parametrize("family", PIPELINES)
def test_generators_serve_as_in_diffusers(family):
    pipe = tiny(family)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 8)]
    assert torch.equal(sample(pipe, ["", ""], generator=generators), sample(pipe, ["", ""], seed=[3, 8]))
    # One draws the batch, and what the sampler adds after.
    one = sample(pipe, ["", ""], generator=torch.Generator().manual_seed(3))
    assert torch.equal(one, sample(pipe, ["", ""], generator=torch.Generator().manual_seed(3)))
    assert close(one[:1], sample(pipe, "", seed=3), 1e-4) == (family != "open_sora_plan_v120")  # it draws at each step
    generator = torch.Generator().manual_seed(3)
    first, second = (sample(pipe, "", generator=generator) for _ in range(2))
    assert not close(first, second, 1e-3)


@pytest.mark.parametrize("family", PIPELINES)
def test_given_latents_are_the_noise(family):
    pipe = tiny(family)
    seen: list[torch.Tensor] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    sample(pipe, seed=3, guidance_scale=1.0)
    hook.remove()
    noise = torch.randn(seen[0].shape, generator=torch.Generator().manual_seed(3))
    kept = noise.clone()
    want, got = (
        sample(pipe, generator=torch.Generator().manual_seed(s), **given)
        for s, given in ((3, {}), (3, {"latents": noise}))
    )
    if family != "open_sora_plan_v120":  # whose sampler draws on
        assert torch.equal(got, want)
    assert torch.equal(noise, kept)
    assert not close(sample(pipe, latents=noise + 1, seed=3), got, 1e-3)
    assert torch.equal(sample(pipe, latents=noise.double(), seed=1), sample(pipe, latents=noise, seed=1))


# Guidance that changes


def rows_seen(pipe: Any) -> list[int]:
    rows: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda _module, args: rows.append(len(args[0])))
    return rows


@pytest.mark.parametrize("family", PIPELINES)
def test_guidance_that_ends_leaves_the_prompts_alone(family):
    pipe = tiny(family)
    prompts = ["a red circle", ""] if family == "demo" else ["a red cat", ""]

    def by_return(_pipe: Any, step: int, _t: Any, _tensors: Any) -> dict[str, Any]:
        return {"guidance_scale": 1.0} if step == 1 else {}

    def as_in_diffusers(pipe: Any, step: int, _t: Any, tensors: Any) -> Any:
        if step == 1:
            pipe._guidance_scale = 0.0
        return tensors

    rows = rows_seen(pipe)
    first, second = (sample(pipe, prompts, callback_on_step_end=callback) for callback in (by_return, as_in_diffusers))
    calls = len(rows) // 2
    assert rows == ([4, 4] + [2] * (calls - 2)) * 2
    assert torch.equal(first, second)
    assert not torch.equal(first, sample(pipe, prompts))
    assert not torch.equal(first, sample(pipe, prompts, guidance_scale=1.0))


@pytest.mark.parametrize("family", ["open_sora_plan_v110", "open_sora_plan_v120"])
def test_guidance_that_ends_is_the_loop_written_out(family):
    pipe = tiny(family)
    pipe.scheduler = DDIMScheduler()
    scales = [3.0, 3.0, 5.0, 1.0]
    got = sample(
        pipe,
        "a red cat",
        guidance_scale=3.0,
        callback_on_step_end=lambda _pipe, step, _t, _tensors: {"guidance_scale": [*scales[1:], 1.0][step]},
    )
    arguments = pipe._arguments(Prompts.of("a red cat"), True)
    scheduler: Any = DDIMScheduler()
    scheduler.set_timesteps(4)
    z = torch.randn(got.shape, generator=torch.Generator().manual_seed(0))
    for t, scale in zip(scheduler.timesteps, scales, strict=True):
        both = pipe.transformer(torch.cat([z, z]), timestep=t.expand(2), **arguments)[0][:, :4]
        uncond, cond = both.chunk(2)
        z = scheduler.step(uncond + scale * (cond - uncond) if scale > 1 else cond, t, z).prev_sample
    assert close(got, z)


@pytest.mark.parametrize("family", PIPELINES)
def test_guidance_cannot_begin_in_mid_run(family):
    with pytest.raises(ValueError, match=r"guidance_scale: got 3.0 in the middle of a run that began without"):
        sample(tiny(family), guidance_scale=1.0, callback_on_step_end=lambda *_: {"guidance_scale": 3.0})
    with pytest.raises(ValueError, match="guidance_scale: got inf, must be finite"):
        sample(tiny(family), callback_on_step_end=lambda *_: {"guidance_scale": float("inf")})


def check_guidance_that_ends(family: str, after: int, device: str, tolerance: float) -> None:
    """From there on another batch runs: nothing that the guided steps kept is read."""
    pipe, config = tiny(family), PABConfig.preset("latte" if family == "demo" else family)
    prompts = ["a red circle", ""] if family == "demo" else ["a red cat", ""]

    def end(_pipe: Any, step: int, _t: Any, _tensors: Any) -> dict[str, Any]:
        return {"guidance_scale": 1.0} if step == after else {}

    def end_plainly(pipe: Any, step: int, t: Any, tensors: Any) -> dict[str, Any]:
        if step == after:
            plain.begin(pipe.scheduler.timesteps[step + 1 :])
        return end(pipe, step, t, tensors)

    def run_it(callback: Any) -> torch.Tensor:
        return sample(pipe, prompts, num_inference_steps=7, callback_on_step_end=callback).cpu()

    run_it(end)
    with PlainPAB(pipe.transformer, config) as plain:
        plain.begin(pipe.scheduler.timesteps)
        expected = run_it(end_plainly)
    pipe.to(device)
    with accelerate(pipe, config) as pab:
        for _ in range(3):
            assert close(run_it(end), expected, tolerance)
        report = pab.report()
        assert report.calls == len(pipe.scheduler.timesteps) == len(pab.schedule or ())
        assert report.broadcast["spatial"] > 0
        whole = sample(pipe, prompts, num_inference_steps=7).cpu()
    assert not torch.equal(whole, expected)


@pytest.mark.parametrize("family", PIPELINES)
@pytest.mark.parametrize("after", [0, 2, 4])
def test_guidance_that_ends_with_pab_is_the_plain_form_begun_anew(family, after):
    check_guidance_that_ends(family, after, "cpu", 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("family", PIPELINES)
def test_guidance_ends_within_graphs(family, device):
    check_guidance_that_ends(family, 2, device, 1e-2)


@pytest.mark.parametrize("family", PIPELINES)
def test_guidance_of_another_scale_goes_on_with_pab(family):
    pipe = tiny(family)

    def ramp(_pipe: Any, step: int, _t: Any, _tensors: Any) -> dict[str, Any]:
        return {"guidance_scale": 2.0 + step}

    plain = sample(pipe, "a red", callback_on_step_end=ramp)
    with accelerate(pipe, PABConfig()):
        assert close(sample(pipe, "a red", callback_on_step_end=ramp), plain, 1e-4)
    assert not torch.equal(plain, sample(pipe, "a red"))
