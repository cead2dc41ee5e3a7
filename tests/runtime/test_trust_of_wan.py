"""Wan and LTX-Video in diffusers' own pipelines: what was put on them, weights changed in place, modes, forwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pab_kernels import PABConfig, accelerate
from tests.wan_tools import PIPELINES, generate, plain_runs, relative_error, tiny_wan, transformers_of

PAB = PABConfig(
    spatial_broadcast=True, spatial_threshold=(1, 990), spatial_range=2,
    cross_broadcast=True, cross_threshold=(1, 990), cross_range=3,
)  # fmt: skip
NAMES = ("wan t2v", "wan t2v, two transformers", "wan i2v", "ltx")


@pytest.mark.parametrize("name", NAMES)
def test_a_hook_on_any_module_is_refused_before_and_after(name: str) -> None:
    pipe = PIPELINES[name]()
    for model in transformers_of(pipe):
        modules = [(path, module) for path, module in model.named_modules() if path]
        with accelerate(model, PABConfig()) as handle:
            for path, module in modules:
                hook = module.register_forward_hook(lambda *_: None)
                with pytest.raises(ValueError, match=rf"\.{path}: has a forward hook"):
                    handle.begin([500.0])
                hook.remove()
            handle.begin([500.0])
        for path, module in modules:
            hook = module.register_forward_hook(lambda *_: None)
            with pytest.raises(TypeError, match=rf"\.{path}: has a forward hook"):
                accelerate(pipe, PABConfig())
            hook.remove()
    accelerate(pipe, PABConfig()).close()


@torch.no_grad()
def scaled(pipe: Any) -> None:
    for model in transformers_of(pipe):
        for name, parameter in model.named_parameters():
            parameter.data.mul_(1.5 if name.endswith("scale_shift_table") else 1.1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("inference", [False, True])
def test_weights_changed_in_place_are_seen_by_the_next_run(name: str, inference: bool) -> None:
    pipe, twin = PIPELINES[name](), PIPELINES[name]()
    scaled(twin)
    with plain_runs(twin, PAB, 6):
        want = generate(twin, 6)
    with torch.inference_mode(inference), accelerate(pipe, PAB):
        before = generate(pipe, 6)
        scaled(pipe)
        got = generate(pipe, 6)
    assert relative_error(got, want) < 1e-4
    assert relative_error(before, want) > 1e-3
    assert not any(parameter.is_inference() for parameter in pipe.transformer.parameters())


def test_tables_that_were_cast_with_the_model_are_read_anew() -> None:
    """The runtime keeps a copy of them in float32."""
    model = nn.Module.to(tiny_wan(), torch.bfloat16)
    latents, text = torch.randn(1, 16, 2, 4, 4).bfloat16(), torch.randn(1, 5, 16).bfloat16()

    def call() -> Tensor:
        return model(latents, timestep=torch.tensor([500.0]), encoder_hidden_states=text, return_dict=False)[0].float()

    with accelerate(model, PABConfig()) as handle:
        handle.begin([500.0])
        before = call()
        for block in model.blocks:
            block.scale_shift_table.data.add_(1.0)
        handle.begin([500.0])
        after = call()
    want = call()
    assert relative_error(after, want) < 5e-2
    assert relative_error(before, want) > 2e-1


def test_forwards_without_names_must_be_counted() -> None:
    model = tiny_wan()
    latents, text = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 5, 16)

    def loop(steps: list[float]) -> None:
        for t in steps:
            for half in (text, -text):
                model(latents, timestep=torch.tensor([t]), encoder_hidden_states=half)

    with accelerate(model, PAB) as handle:
        handle.begin([900.0, 800.0])
        with pytest.raises(ValueError, match="forwards_per_step=2"):
            loop([900.0, 800.0])
    with accelerate(model, PAB, forwards_per_step=2) as handle:
        handle.begin([900.0, 800.0])
        loop([900.0, 800.0])
        assert len(handle.caches) == 2


CHANGES: dict[str, Callable[[Any], Any]] = {
    "assigned": lambda model: model.load_state_dict(
        {name: value.clone() for name, value in model.state_dict().items()}, assign=True
    ),
    "data": lambda model: setattr(model.blocks[1].ffn.net[2].weight, "data", model.blocks[1].ffn.net[2].weight * 2),
    "norm": lambda model: setattr(model.blocks[0].norm2, "eps", 1e-2),
    "float": lambda model: model.blocks[0].attn1.to_q.to(torch.float64),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_lies_elsewhere_is_refused(change: Callable[[Any], Any]) -> None:
    model = tiny_wan()
    with accelerate(model, PABConfig()) as handle:
        change(model)
        with pytest.raises(ValueError, match=r"since accelerate|after accelerate"):
            handle.begin([500.0])
