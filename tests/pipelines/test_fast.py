"""Stack, guidance and forecasts in pipelines: two forwards a step, two transformers, guidance that ends or is off."""

import dataclasses
from typing import Any

import pytest
import torch

from pab_kernels import PABConfig, accelerate
from pab_kernels.pipelines.demo import DemoPipeline, demo_scheduler, demo_transformer
from pab_kernels.pipelines.demo_text import TextEmbedding
from tests.wan_tools import PIPELINES, generate, plain_runs, relative_error

STEPS = 8
MIXED = PABConfig(
    stack_broadcast=True, stack_threshold=(50, 990), stack_range=2, stack_order=1,
    guidance_broadcast=True, guidance_threshold=(0, 1000), guidance_range=3, guidance_order=1,
    cross_broadcast=True, cross_threshold=(50, 990), cross_range=4,
)  # fmt: skip
PROMPTS = ["a red circle moves right", "a blue star moves up"]


@pytest.mark.parametrize("name", ["wan t2v", "wan t2v, two transformers", "wan ti2v, image", "ltx"])
def test_pipelines_of_diffusers_give_the_plain_form(name: str) -> None:
    pipe = PIPELINES[name]()
    with plain_runs(pipe, MIXED, STEPS):
        want = generate(pipe, STEPS)
    without = generate(pipe, STEPS)
    with accelerate(pipe, MIXED):
        for _ in range(2):
            assert relative_error(generate(pipe, STEPS), want) < 2e-4
    assert relative_error(without, want) > 1e-3, "the settings must really broadcast"


def test_halves_that_share_timesteps_a_token_cannot_be_forecast_apart() -> None:
    """LTX-Video from an image, where both halves are one call; the message says what cannot go together."""
    pipe = PIPELINES["ltx, image"]()
    with accelerate(pipe, MIXED), pytest.raises(ValueError, match="guidance_broadcast: cannot go with a forecast"):
        generate(pipe, STEPS)
    repeated = dataclasses.replace(MIXED, stack_order=0, guidance_order=1)
    with plain_runs(pipe, repeated, STEPS):
        want = generate(pipe, STEPS)
    with accelerate(pipe, repeated):
        assert relative_error(generate(pipe, STEPS), want) < 2e-4


@pytest.fixture(scope="module")
def pipe() -> DemoPipeline:
    torch.manual_seed(0)
    transformer: Any = demo_transformer(pairs=2, heads=1, size=16, frames=5)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    return DemoPipeline(transformer.eval().requires_grad_(False), demo_scheduler(), TextEmbedding())


def test_without_guidance_two_videos_are_no_two_halves(pipe: DemoPipeline) -> None:
    fast = PABConfig.preset("latte", "fast")
    found = []
    for config in (fast, dataclasses.replace(fast, guidance_broadcast=False)):
        with accelerate(pipe, config):
            found.append(pipe(PROMPTS, num_inference_steps=10, guidance_scale=1.0, seed=[1, 2]))
    assert torch.equal(*found)


def test_guidance_may_end_within_a_run(pipe: DemoPipeline) -> None:
    def end(_pipe: Any, step: int, _timestep: Any, _tensors: Any) -> dict[str, float]:
        return {"guidance_scale": 1.0} if step == 4 else {}

    with accelerate(pipe, PABConfig.preset("latte", "fast")) as handle:
        arguments: dict[str, Any] = {"num_inference_steps": 10, "seed": [1, 2]}
        whole = pipe(PROMPTS, **arguments)
        ended = pipe(PROMPTS, callback_on_step_end=end, **arguments)
        assert ended.isfinite().all()
        assert not torch.equal(ended, whole)
        assert torch.equal(pipe(PROMPTS, **arguments), whole), "nothing is left of the batch that was smaller"
        assert handle.report().broadcast["guidance"] > 0
