"""The plain form and the executor check each other: they share the schedule and nothing else."""

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pab_kernels import PABConfig, accelerate
from pab_kernels.config import MlpWindow
from pab_kernels.plain import PlainPAB
from pab_kernels.schedule import Schedule
from pab_kernels.workloads import WORKLOADS, Inputs, Workload

FAMILIES = {
    "open_sora": "open_sora-144p-2s",
    "latte": "latte-16x512",
    "open_sora_plan_v110": "open_sora_plan_v110-65x512",
    "open_sora_plan_v120": "open_sora_plan_v120-29x480p",
}
TIMESTEPS = [940.0, 820.5, 700.0, 640.0, 580.0, 460.0, 340.0, 120.0]
FREE_MLP = PABConfig(
    spatial_broadcast=True, spatial_threshold=(100, 900), spatial_range=2,
    temporal_broadcast=True, temporal_threshold=(100, 900), temporal_range=3,
    cross_broadcast=True, cross_threshold=(100, 900), cross_range=5,
    mlp_broadcast=True, mlp_threshold=(100, 800), mlp_range=2, mlp_block=(1, 2),
)  # fmt: skip
KEYED_MLP = PABConfig(
    spatial_broadcast=True, spatial_threshold=(100, 900), spatial_range=3, spatial_block=(1, 2),
    temporal_broadcast=True, temporal_threshold=(300, 700), temporal_range=2, temporal_block=(0, 1),
    cross_broadcast=True, cross_threshold=(100, 900), cross_range=4, cross_block=(1, 9),
    mlp_broadcast=True,
    mlp_spatial_broadcast_config=(MlpWindow(820, (0, 1), 2), MlpWindow(460, (1,), 1)),
    mlp_temporal_broadcast_config=(MlpWindow(700, (0,), 3), MlpWindow(580, (0, 1), 2)),
)  # fmt: skip
CONFIGS = {"none": PABConfig(), "free mlp": FREE_MLP, "keyed mlp": KEYED_MLP}


@cache
def tiny(family: str) -> tuple[Workload, nn.Module, Inputs]:
    """A tiny host in float64 with weights large enough that every branch shows, and its inputs."""
    workload = WORKLOADS[FAMILIES[family]].tiny()
    host = workload.host("cpu", torch.float64)
    generator = torch.Generator().manual_seed(1)
    for parameter in host.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return workload, host, workload.inputs("cpu", torch.float64)


def run(host: Any, inputs: Inputs, timesteps=TIMESTEPS, **changes) -> Tensor:
    """A denoising-like loop; the latents after every step."""
    dtype = next(host.parameters()).dtype
    latents = inputs.latents.to(dtype)
    steps = []
    with torch.no_grad():
        for t in timesteps:
            both = torch.cat([latents, latents])
            out = host(both, timestep=torch.full((2,), t), **{**inputs.given, **changes})
            cond, uncond = (out if isinstance(out, Tensor) else out[0])[:, :4].chunk(2)
            latents = (latents - 0.1 * (2 * cond - uncond)).to(dtype)
            steps.append(latents)
    return torch.stack(steps)


def plain_and_executor(host: nn.Module, config: PABConfig, inputs: Inputs, **changes) -> tuple[Tensor, Tensor]:
    with PlainPAB(host, config) as plain:
        plain.begin(TIMESTEPS)
        expected = run(host, inputs, **changes)
    with accelerate(host, config) as handle:
        handle.begin(TIMESTEPS)
        return run(host, inputs, **changes), expected


def close(actual: Tensor, expected: Tensor) -> None:
    """Float64 but for the rotary tables, which the executor keeps in float32."""
    error = (actual - expected).norm() / expected.norm()
    assert error < 1e-5, f"relative error {error:.1e}"


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_executor_is_the_plain_form(family: str, config: str) -> None:
    _, host, inputs = tiny(family)
    actual, expected = plain_and_executor(host, CONFIGS[config], inputs)
    close(actual, expected)
    without = run(host, inputs)
    if config == "none":
        close(expected, without)
    else:
        assert (expected - without).norm() > 1e-3 * without.norm(), "the config must really broadcast"


@pytest.mark.parametrize("family", FAMILIES)
def test_leaving_restores_the_host(family: str) -> None:
    _, host, inputs = tiny(family)
    before = run(host, inputs)

    def cancelled() -> None:
        with PlainPAB(host, FREE_MLP) as plain:
            plain.begin(TIMESTEPS)
            run(host, inputs, TIMESTEPS[:3])
            raise RuntimeError("cancelled")

    with pytest.raises(RuntimeError, match="cancelled"):
        cancelled()
    assert torch.equal(run(host, inputs), before)
    accelerate(host, PABConfig()).close()  # refuses a replaced forward or a hook


def test_every_run_starts_clean() -> None:
    _, host, inputs = tiny("latte")
    with PlainPAB(host, FREE_MLP) as plain:
        plain.begin(TIMESTEPS)
        expected = run(host, inputs)
        plain.begin(TIMESTEPS)
        run(host, inputs, TIMESTEPS[:4])
        plain.begin(TIMESTEPS)
        assert torch.equal(run(host, inputs), expected)
        with pytest.raises(ValueError, match="begin"):
            run(host, inputs, [500.0])


def test_a_host_without_known_blocks_is_refused() -> None:
    with pytest.raises(TypeError, match="Linear"):
        PlainPAB(nn.Linear(2, 2), PABConfig())


@pytest.mark.parametrize("family", ["open_sora", "open_sora_plan_v110", "open_sora_plan_v120"])
def test_text_masks_differ_by_row_and_may_have_holes(family: str) -> None:
    _, host, inputs = tiny(family)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 1, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0, 0]])
    changes = {"mask": mask} if family == "open_sora" else {"encoder_attention_mask": mask}
    close(*plain_and_executor(host, FREE_MLP, inputs, **changes))


@pytest.mark.parametrize("config", ["free mlp", "keyed mlp"])
def test_given_frames_are_modulated_apart(config: str) -> None:
    _, host, inputs = tiny("open_sora")
    x_mask = torch.tensor([[False, True, True, False, True], [True, True, False, True, True]])
    actual, expected = plain_and_executor(host, CONFIGS[config], inputs, x_mask=x_mask)
    close(actual, expected)
    assert not torch.allclose(expected, run(host, inputs))


@pytest.mark.parametrize(
    ("family", "size"),
    [
        ("open_sora", (1, 3)),
        ("open_sora", (11, 5)),
        ("latte", (6, 10)),
        ("open_sora_plan_v110", (4, 14)),
        ("open_sora_plan_v120", (2, 6)),
    ],
)
def test_other_latent_sizes(family: str, size: tuple[int, int]) -> None:
    _, host, inputs = tiny(family)
    latents = torch.randn(1, 4, 5, *size, generator=torch.Generator().manual_seed(2))
    close(*plain_and_executor(host, FREE_MLP, Inputs(latents, inputs.timesteps, inputs.given)))


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_stays_near(family: str) -> None:
    workload = WORKLOADS[FAMILIES[family]].tiny()
    host, inputs = workload.host("cpu", torch.bfloat16), workload.inputs("cpu", torch.bfloat16)
    actual, expected = plain_and_executor(host, FREE_MLP, inputs)
    assert (actual - expected).float().norm() < 2e-2 * expected.float().norm()


def windows() -> st.SearchStrategy[dict[int, Any]]:
    window = st.fixed_dictionaries(
        {
            "block": st.lists(st.integers(0, 1), min_size=1, max_size=2, unique=True),
            "skip_count": st.integers(1, 4),
        }
    )
    return st.dictionaries(st.sampled_from([int(t) for t in TIMESTEPS]), window, max_size=3)


def interval(limits: tuple[int, int]) -> st.SearchStrategy[tuple[int, int]]:
    numbers = st.lists(st.integers(*limits), min_size=2, max_size=2, unique=True)
    return numbers.map(lambda pair: (min(pair), max(pair)))


@st.composite
def configs(draw: st.DrawFn) -> PABConfig:
    """Any settings, with either form of MLP broadcast or none."""
    found: dict[str, Any] = {}
    keyed = draw(st.booleans())
    for kind in ("spatial", "temporal", "cross", "mlp"):
        if not draw(st.booleans()):
            continue
        found[f"{kind}_broadcast"] = True
        if kind == "mlp" and keyed:
            found["mlp_spatial_broadcast_config"] = draw(windows().filter(bool))
            found["mlp_temporal_broadcast_config"] = draw(windows())
            continue
        found[f"{kind}_threshold"] = draw(interval((0, 1000)))
        found[f"{kind}_range"] = draw(st.integers(1, 6))
        found[f"{kind}_block"] = draw(st.none() | interval((0, 3)))
    return PABConfig(**found)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(config=configs())
def test_any_config(family: str, config: PABConfig) -> None:
    _, host, inputs = tiny(family)
    close(*plain_and_executor(host, config, inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_that_overlap(family: str) -> None:
    _, host, inputs = tiny(family)
    keys = [int(t) for t in TIMESTEPS]
    windows = {keys[0]: {"block": [0, 1], "skip_count": 2}, keys[1]: {"block": [0], "skip_count": 2}}
    config = PABConfig.from_dict({"mlp_broadcast": True, "mlp_spatial_broadcast_config": windows})
    assert Schedule(config, TIMESTEPS).lanes("mlp_spatial", 0) == 2
    close(*plain_and_executor(host, config, inputs))
