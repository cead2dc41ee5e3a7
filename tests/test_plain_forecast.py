"""Stack, guidance and forecasts: the runtime is the plain form of each, alone and mixed, in float32."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pab_kernels import PABConfig, accelerate
from pab_kernels.config import SWITCHES
from pab_kernels.plain import PlainPAB
from pab_kernels.runtime import cache as caches
from pab_kernels.runtime.slots import HostSlots
from pab_kernels.workloads import WORKLOADS, Inputs

FAMILIES = {
    "open_sora": "open_sora-144p-2s",
    "latte": "latte-16x512",
    "open_sora_plan_v110": "open_sora_plan_v110-65x512",
    "open_sora_plan_v120": "open_sora_plan_v120-29x480p",
}
TIMESTEPS = [940.0, 880.0, 820.5, 700.0, 640.0, 580.0, 460.0, 340.0, 220.0, 120.0]


def broadcast(**kinds: tuple[int, int]) -> dict[str, Any]:
    """Settings of range and order for each kind."""
    found: dict[str, Any] = {}
    for kind, (every, order) in kinds.items():
        found |= {f"{kind}_broadcast": True, f"{kind}_threshold": (100, 930), f"{kind}_range": every}
        found[f"{kind}_order"] = order
    return found


PART = {"stack_block": (1, 2)}
CONFIGS = {
    "stack": broadcast(stack=(3, 0)),
    "stack forecast": broadcast(stack=(3, 1)),
    "a part of the stack": broadcast(stack=(2, 1)) | PART,
    "guidance": broadcast(guidance=(2, 0)),
    "guidance forecast": broadcast(guidance=(3, 1)),
    "branches forecast": broadcast(spatial=(2, 1), temporal=(3, 1), cross=(2, 1), mlp=(3, 1)),
    "stack and guidance": broadcast(stack=(2, 1), guidance=(4, 0)),
    "all, forecast": broadcast(
        stack=(2, 1), guidance=(4, 1), spatial=(4, 1), temporal=(6, 1), cross=(4, 1), mlp=(6, 1)
    ),
    "all around a part of the stack": PART
    | broadcast(stack=(2, 1), guidance=(3, 1), spatial=(2, 1), temporal=(3, 0), cross=(4, 1), mlp=(3, 1)),
}


@cache
def tiny(family: str) -> tuple[nn.Module, Inputs]:
    """A tiny host in float32 with weights large enough that every branch shows, and its inputs."""
    workload = WORKLOADS[FAMILIES[family]].tiny()
    host = workload.host("cpu", torch.float32)
    generator = torch.Generator().manual_seed(1)
    for parameter in host.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return host, workload.inputs("cpu", torch.float32)


def sample(found: Any) -> Tensor:
    return (found if isinstance(found, Tensor) else found[0])[:, :4]


def run(
    host: Any,
    inputs: Inputs,
    forwards: int = 1,
    first: bool = False,
    timesteps: list[float] = TIMESTEPS,
    latents: Tensor | None = None,
) -> Tensor:
    """A loop with guidance, the conditional half in front if it is `first`; the latents after every step."""
    latents = inputs.latents if latents is None else latents
    steps = []
    with torch.no_grad():
        for t in timesteps:
            if forwards == 1:
                both = torch.cat([latents, latents])
                halves = sample(host(both, timestep=torch.full((2,), t), **inputs.given)).chunk(2)
                cond, other = halves if first else halves[::-1]
            else:
                rows = [{name: own(value, i) for name, value in inputs.given.items()} for i in range(2)]
                cond, other = (sample(host(latents, timestep=torch.full((1,), t), **given)) for given in rows)
            latents = latents - 0.1 * (2 * cond - other)
            steps.append(latents)
    return torch.stack(steps)


def own(value: Any, half: int) -> Any:
    """One half's argument."""
    return value.chunk(2)[half] if isinstance(value, Tensor) and len(value) == 2 else value


def expected(family: str, config: PABConfig, **options: Any) -> Tensor:
    host, inputs = tiny(family)
    forwards, first = options.get("forwards", 1), options.get("first", False)
    with PlainPAB(host, config, forwards, "first" if first else "second") as plain:
        plain.begin(TIMESTEPS)
        return run(host, inputs, **options)


def close(actual: Tensor, wanted: Tensor) -> None:
    error = (actual - wanted).norm() / wanted.norm()
    assert error < 1e-5, f"relative error {error:.1e}"


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_runtime_is_the_plain_form(family: str, name: str) -> None:
    config = PABConfig.from_dict(CONFIGS[name])
    host, inputs = tiny(family)
    wanted = expected(family, config)
    with accelerate(host, config) as handle:
        for _ in range(2):
            handle.begin(TIMESTEPS)
            close(run(host, inputs), wanted)
    without = run(host, inputs)
    assert (wanted - without).norm() > 1e-4 * without.norm(), "the settings must really broadcast"


@pytest.mark.parametrize("options", [{"first": True}, {"forwards": 2}], ids=["conditional first", "two forwards"])
@pytest.mark.parametrize("name", ["guidance forecast", "stack and guidance", "all around a part of the stack"])
def test_other_ways_of_guidance(name: str, options: dict[str, Any]) -> None:
    config = PABConfig.from_dict(CONFIGS[name])
    host, inputs = tiny("latte")
    half: Literal["first"] | None = "first" if options.get("first") else None
    wanted = expected("latte", config, **options)
    with accelerate(host, config, forwards_per_step=options.get("forwards", 1), conditional=half) as handle:
        handle.begin(TIMESTEPS)
        close(run(host, inputs, **options), wanted)


def test_what_stands_for_the_other_half_is_the_conditional_one_without_the_difference() -> None:
    """By hand: at a step that broadcasts guidance, and at none before."""
    host, inputs = tiny("latte")
    both, given = torch.cat([inputs.latents] * 2), inputs.given
    config = PABConfig.from_dict(broadcast(guidance=(2, 0)))
    with torch.no_grad():
        plain = [sample(host(both, timestep=torch.full((2,), t), **given)) for t in TIMESTEPS[:2]]
        with accelerate(host, config) as handle:
            handle.begin(TIMESTEPS)
            for t, wanted in zip(TIMESTEPS[:2], plain, strict=True):
                found = sample(host(both, timestep=torch.full((2,), t), **given))
                torch.testing.assert_close(found[1], wanted[1], atol=1e-4, rtol=1e-4)
                other = wanted[0] if t == TIMESTEPS[0] else wanted[1] - (plain[0][1] - plain[0][0])
                torch.testing.assert_close(found[0], other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["stack forecast", "all, forecast", "all around a part of the stack"])
def test_a_run_that_stopped_leaves_nothing_behind(name: str) -> None:
    config = PABConfig.from_dict(CONFIGS[name])
    host, inputs = tiny("latte")
    wanted = expected("latte", config)
    with accelerate(host, config) as handle:
        handle.begin(TIMESTEPS)
        run(host, inputs, timesteps=TIMESTEPS[:5])
        other = torch.randn(1, 4, 5, 6, 10, generator=torch.Generator().manual_seed(2))
        handle.begin(TIMESTEPS)
        run(host, inputs, timesteps=TIMESTEPS[:4], latents=other)
        handle.begin(TIMESTEPS)
        close(run(host, inputs), wanted)
    with PlainPAB(host, config) as plain:
        plain.begin(TIMESTEPS)
        there = run(host, inputs, latents=other)
    with accelerate(host, config) as handle:
        handle.begin(TIMESTEPS)
        close(run(host, inputs, latents=other), there)


@pytest.mark.parametrize("name", ["stack forecast", "branches forecast", "all around a part of the stack"])
def test_slots_in_host_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PABConfig.from_dict(CONFIGS[name])
    host, inputs = tiny("open_sora")
    wanted = expected("open_sora", config)
    monkeypatch.setattr(caches, "DeviceSlots", HostSlots)
    with accelerate(host, config) as handle:
        handle.begin(TIMESTEPS)
        close(run(host, inputs), wanted)


@pytest.mark.parametrize("dtype", ["fp8", "int8"])
@pytest.mark.parametrize("name", ["stack forecast", "branches forecast", "all around a part of the stack"])
def test_slots_of_one_byte_stay_near(name: str, dtype: str) -> None:
    config = PABConfig.from_dict(CONFIGS[name])
    host, inputs = tiny("latte")
    wanted = expected("latte", config)
    with accelerate(host, config, cache_dtype=dtype) as handle:
        handle.begin(TIMESTEPS)
        found = run(host, inputs)
    assert not torch.equal(found, wanted)
    assert (found - wanted).norm() < 5e-2 * wanted.norm()


def test_without_guidance_the_batch_runs_whole() -> None:
    config = PABConfig.from_dict(broadcast(guidance=(2, 0)))
    host, inputs = tiny("latte")
    wanted = run(host, inputs)
    with accelerate(host, config) as handle:
        handle.begin(TIMESTEPS, guided=False)
        close(run(host, inputs), wanted)


@st.composite
def configs(draw: st.DrawFn) -> PABConfig:
    """Any settings of the new kinds, with others."""
    found: dict[str, Any] = {}
    for kind in SWITCHES:
        if not draw(st.booleans()):
            continue
        found |= broadcast(**{kind: (draw(st.integers(1, 4)), draw(st.integers(0, 1)))})
        found[f"{kind}_threshold"] = (draw(st.sampled_from([100, 300])), draw(st.sampled_from([700, 890, 990])))
        if kind != "guidance" and draw(st.booleans()):
            found[f"{kind}_block"] = draw(st.sampled_from([(0, 1), (1, 2), (0, 2), (2, 5)]))
    return PABConfig(**found)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(config=configs(), family=st.sampled_from(["latte", "open_sora_plan_v120"]))
def test_any_config(config: PABConfig, family: str) -> None:
    host, inputs = tiny(family)
    wanted = expected(family, config)
    with accelerate(host, config) as handle:
        handle.begin(TIMESTEPS)
        close(run(host, inputs), wanted)
