"""Samplers: Open-Sora's own, and every scheduler of diffusers on every pipeline."""

import importlib
import inspect
import pkgutil
from typing import Any

import diffusers.schedulers
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler

from pab_kernels import PABConfig, accelerate
from pab_kernels.pipelines.demo import DemoPipeline
from pab_kernels.pipelines.samplers import RFlowScheduler, family_timesteps, rflow_timesteps, take_step
from tests.pipeline_tools import TINY, close, run, tiny_demo, tiny_pipeline

PIPELINES = [*TINY, "demo"]
NEEDED = {"mask_token_id": 1, "num_vec_classes": 5}
FLOW_SIGMAS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
NOISE = [
    "CogVideoXDDIM",
    "DDIM",
    "DDIMParallel",
    "DDPM",
    "DDPMParallel",
    "DEISMultistep",
    "DPMSolverMultistep",
    "DPMSolverSinglestep",
    "EulerAncestralDiscrete",
    "EulerDiscrete",
    "HeunDiscrete",
    "KDPM2AncestralDiscrete",
    "KDPM2Discrete",
    "LCM",
    "LMSDiscrete",
    "PNDM",
    "SASolver",
    "TCD",
    "UniPCMultistep",
]
"""Those that fit a model of noise over discrete timesteps."""
FLOW = ["FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM", "LTXEulerAncestralRF"]
SOLVERS = ["DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "SASolver", "UniPCMultistep"]
"""Those that can be told to follow a rectified flow."""


def _classes() -> dict[str, Any]:
    """All schedulers of diffusers by name, without what needs a package that is not there."""
    found: dict[str, Any] = {}
    for module in pkgutil.iter_modules(diffusers.schedulers.__path__):
        if not module.name.startswith("scheduling_") or "flax" in module.name:
            continue
        try:
            classes = vars(importlib.import_module(f"diffusers.schedulers.{module.name}"))
        except ImportError:
            continue  # torchsde
        found |= {name.removesuffix("Scheduler"): cls for name, cls in classes.items() if name.endswith("Scheduler")}
    return {name: cls for name, cls in found.items() if hasattr(cls, "from_config") and not inspect.isabstract(cls)}


CLASSES = _classes()


def tiny(family: str) -> Any:
    return tiny_demo() if family == "demo" else tiny_pipeline(family)


def sample(pipe: Any, seed: Any, count: int = 1, steps: int = 5) -> torch.Tensor:
    """Unguided, from a global state of its own: no sampler may draw from it."""
    torch.seed()
    settings: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 1.0, "seed": seed}
    prompts = [""] * count
    return pipe(prompts, **settings) if isinstance(pipe, DemoPipeline) else run(pipe, prompts, **settings)


def check_it_works_and_honours_the_seed(pipe: Any) -> None:
    both = sample(pipe, [5, 9], 2)
    assert both.isfinite().all()
    assert not close(both[:1], both[1:], 1e-3)
    assert close(sample(pipe, 5), both[:1], 1e-4)


@pytest.mark.parametrize("family", PIPELINES)
@pytest.mark.parametrize("name", CLASSES)
def test_every_scheduler_works_and_honours_the_seed_or_is_refused_by_name(name, family):
    pipe = tiny(family)
    cls = CLASSES[name]
    try:
        # As users of diffusers swap schedulers. Open-Sora's own has no configuration.
        config = {} if family == "open_sora" else pipe.scheduler.config
        pipe.scheduler = cls.from_config(config, **{k: NEEDED[k] for k in NEEDED if k in _parameters(cls)})
    except (TypeError, ValueError):
        pytest.skip("needs arguments of its own model")
    if name in (FLOW if family == "open_sora" else NOISE):
        check_it_works_and_honours_the_seed(pipe)
        return
    pipe.text = None  # nothing is encoded for what is refused
    with pytest.raises(ValueError, match=cls.__name__):
        sample(pipe, 0)


def _parameters(cls: Any) -> Any:
    return inspect.signature(cls.__init__).parameters


@pytest.mark.parametrize("family", PIPELINES)
@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_of_rectified_flow_fit_open_sora_alone(name, family):
    pipe = tiny(family)
    pipe.scheduler = CLASSES[name](**FLOW_SIGMAS)
    if family == "open_sora":
        check_it_works_and_honours_the_seed(pipe)
        return
    with pytest.raises(ValueError, match=f"{name}Scheduler, which takes the model to predict flow"):
        sample(pipe, 0)


def test_the_lists_above_are_of_diffusers():
    assert {*NOISE, *SOLVERS, "FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete"} <= set(CLASSES)


@pytest.mark.parametrize("name", NOISE)
def test_what_a_callback_is_told_the_latents_become_is_what_the_sampler_says(name):
    scheduler: Any = CLASSES[name]()
    scheduler.set_timesteps(5)
    generators = [torch.Generator().manual_seed(0)]
    latents = torch.rand(1, 4, 2, 3, 3)
    arguments = (torch.zeros_like(latents), scheduler.timesteps[0], latents)
    _, denoised = take_step(scheduler, *arguments, generators)
    scheduler = CLASSES[name]()
    scheduler.set_timesteps(5)
    draws = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    want = getattr(scheduler.step(*arguments, **draws), "pred_original_sample", None)
    if name == "LCM":  # in other words
        assert denoised is not None
    elif want is None or denoised is None:
        assert want is denoised
    else:
        assert torch.equal(denoised, want)


@pytest.mark.parametrize("family", ["open_sora_plan_v110", "open_sora_plan_v120"])
@pytest.mark.parametrize(
    "make",
    [
        lambda cls: cls(algorithm_type="sde-dpmsolver++"),
        lambda cls: cls(use_karras_sigmas=True),
        lambda cls: cls(prediction_type="v_prediction", timestep_spacing="trailing"),
    ],
    ids=["sde", "karras", "v"],
)
def test_settings_of_a_scheduler_are_its_users(make, family):
    pipe = tiny(family)
    pipe.scheduler = make(DPMSolverMultistepScheduler)
    check_it_works_and_honours_the_seed(pipe)


@pytest.mark.parametrize(
    ("family", "scheduler", "message"),
    [
        ("demo", DDIMScheduler(), "DDIMScheduler, which takes the model to predict epsilon; .* predicts v_prediction"),
        ("open_sora", DDIMScheduler(), "DDIMScheduler, which takes the model to predict epsilon; .* predicts flow"),
        ("latte", RFlowScheduler(), "RFlowScheduler, which takes the model to predict flow"),
        ("latte", object(), "object, must have set_timesteps and step"),
        (
            "open_sora_plan_v120",
            EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
            "EulerDiscreteScheduler, which plans",
        ),
        (
            "open_sora_plan_v120",
            DPMSolverMultistepScheduler(use_flow_sigmas=True),
            "DPMSolverMultistepScheduler, which is for another kind of model",
        ),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused(family, scheduler, message):
    pipe = tiny(family)
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=message):
        sample(pipe, 0)


@pytest.mark.parametrize(
    ("name", "steps", "message"),
    [
        ("PNDM", 3, "must be at least 4 for PNDM, got 3"),
        ("LCM", 51, "got 51, which LCMScheduler cannot plan: .* smaller than 50"),
        ("UniPCMultistep", 1000, "got 1000, of which UniPCMultistepScheduler makes some twice"),
        ("DDIM", 1001, r"must be in \[1, 1000\], got 1001"),
    ],
)
def test_numbers_of_steps_that_a_scheduler_cannot_make(name, steps, message):
    pipe = tiny("open_sora_plan_v120")
    pipe.scheduler = CLASSES[name]()
    with pytest.raises(ValueError, match=f"num_inference_steps.* {message}"):
        sample(pipe, 0, steps=steps)


def test_pndm_with_fewer_than_4_steps_where_it_can():
    pipe = tiny("open_sora_plan_v110")
    pipe.scheduler = PNDMScheduler(skip_prk_steps=True)
    assert sample(pipe, 0, steps=2).isfinite().all()


EACH = [("open_sora_plan_v120", name) for name in NOISE] + [("open_sora", name) for name in FLOW]


@pytest.mark.parametrize(("family", "name"), EACH)
def test_pab_is_planned_over_another_schedulers_calls(family, name):
    pipe = tiny(family)
    pipe.scheduler = CLASSES[name]()
    plain = sample(pipe, 0)
    with accelerate(pipe, PABConfig()) as handle:
        assert close(sample(pipe, 0), plain, 1e-4)
        assert handle.report().calls == len(pipe.scheduler.timesteps)


@pytest.mark.parametrize(
    ("name", "settings"),
    [(name, {}) for name in NOISE + FLOW] + [(name, FLOW_SIGMAS) for name in SOLVERS],
    ids=lambda value: value if isinstance(value, str) else "flow" if value else "",
)
def test_a_step_takes_latents_on_another_device_than_the_timesteps(name, settings):
    """The device "meta" stands for the GPU: torch refuses to mix it with the CPU in the same places."""
    scheduler: Any = CLASSES[name](**settings)
    scheduler.set_timesteps(6)
    latents = torch.empty(2, 4, 2, 3, 3, device="meta")
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 9)]
    for t in scheduler.timesteps:
        if name == "LTXEulerAncestralRF":  # its sigmas go with the latents, and it reads one of them, as "meta" cannot
            with pytest.raises(RuntimeError, match=r"item\(\) cannot be called on meta tensors"):
                take_step(scheduler, torch.empty_like(latents), t, latents, generators)
            assert scheduler.sigmas.device == latents.device
            return
        latents, _ = take_step(scheduler, torch.empty_like(latents), t, latents, generators)
    assert latents.device.type == "meta"
    assert latents.shape == (2, 4, 2, 3, 3)


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "name"), EACH)
def test_schedulers_give_on_a_gpu_what_they_give_on_a_cpu(family, name, device):
    pipe = tiny(family)
    pipe.scheduler = CLASSES[name]()
    wanted = sample(pipe, [5, 9], 2)
    pipe.to(device)
    assert close(sample(pipe, [5, 9], 2).cpu(), wanted, 1e-2)
    with accelerate(pipe, PABConfig()):
        for _ in range(2):
            assert close(sample(pipe, [5, 9], 2).cpu(), wanted, 1e-2)


def test_diffusers_flow_is_open_sora_in_the_other_direction():
    """At shift 1 and from noise to data in one step both go along the same line."""
    pipe = tiny("open_sora")
    own = sample(pipe, 3, steps=1)
    pipe.scheduler = CLASSES["FlowMatchEulerDiscrete"]()
    assert close(sample(pipe, 3, steps=1), own)


# Open-Sora's own


def test_rflow_follows_a_straight_line_from_noise_to_data():
    scheduler = RFlowScheduler()
    scheduler.set_timesteps(7, 480, 854, 15)
    noise, data = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    state = noise
    for t in scheduler.timesteps:
        state = scheduler.step(data - noise, t, state)
        assert torch.allclose(scheduler.scale_model_input(state, t), state)
    assert torch.allclose(state, data)


def test_rflow_makes_new_timesteps_for_each_run():
    scheduler = RFlowScheduler()
    scheduler.set_timesteps(5, 144, 256, 15)
    first = scheduler.timesteps
    scheduler.set_timesteps(5, 144, 256, 15)
    assert scheduler.timesteps is not first
    assert scheduler.timesteps.tolist() == pytest.approx(rflow_timesteps(5, 144, 256, 15))
    with pytest.raises(ValueError, match="must be one of the run's 5 timesteps"):
        scheduler.step(torch.zeros(1), 3.0, torch.zeros(1))


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("steps", [0, 3000])
def test_planned_steps_are_those_of_a_run(family, steps):
    with pytest.raises(ValueError, match=rf"steps: got {steps}, must be in \[1, 1000\]"):
        family_timesteps(family, steps)
    if family == "open_sora_plan_v110":
        with pytest.raises(ValueError, match="steps must be at least 4 for PNDM, got 2"):
            family_timesteps(family, 2)
