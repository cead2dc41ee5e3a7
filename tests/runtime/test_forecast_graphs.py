"""Stack, guidance and forecasts on a GPU: a graph a variant, numbers of eager steps, no allocation in the loop."""

from typing import Any

import pytest
import torch

from pab_kernels import PABConfig, accelerate
from pab_kernels.config import SWITCHES
from pab_kernels.models.checkpoints import random_weights
from pab_kernels.plain import PlainPAB

pytestmark = pytest.mark.gpu

TIMESTEPS = [999.0, 950.0, 900.0, 850.0, 700.0, 600.0, 500.0, 400.0, 300.0, 200.0, 100.0, 50.0]


def broadcast(**kinds: tuple[int, int]) -> dict[str, Any]:
    """Settings of range and order for each kind."""
    found: dict[str, Any] = {}
    for kind, (every, order) in kinds.items():
        found |= {f"{kind}_broadcast": True, f"{kind}_threshold": (60, 960), f"{kind}_range": every}
        found[f"{kind}_order"] = order
    return found


CONFIGS = {
    "fast": PABConfig.preset("latte", "fast"),
    "part": PABConfig.from_dict(broadcast(**dict.fromkeys(SWITCHES, (2, 1))) | {"stack_block": (1, 2)}),
    "branches": PABConfig.from_dict(broadcast(spatial=(2, 1), temporal=(3, 1), cross=(2, 1), mlp=(3, 1))),
}


def latte(dtype: torch.dtype = torch.bfloat16) -> Any:
    model: Any = random_weights("latte", dtype=dtype, device="cuda", seed=0, num_layers=3)
    return model.eval().requires_grad_(False)


def inputs(dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(1, 4, 16, 32, 32, generator=generator, device="cuda", dtype=dtype)
    return x, torch.randn(2, 64, 4096, generator=generator, device="cuda", dtype=dtype)


@torch.no_grad()
def run(model: Any, x: torch.Tensor, y: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    steps = []
    for t in timesteps:
        both = torch.cat([x, x])
        out = model(both, timestep=t.expand(2), encoder_hidden_states=y, return_dict=False)[0][:, :4]
        other, cond = out.chunk(2)
        x = (x - 0.1 * (2 * cond - other)).to(x.dtype)
        steps.append(x)
    return torch.stack(steps)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


@pytest.mark.parametrize("name", CONFIGS)
def test_graphs_give_the_plain_form(device, name):
    """In float32, so that nothing but another order of sums may differ."""
    model, config = latte(torch.float32), CONFIGS[name]
    x, y = inputs(torch.float32)
    timesteps = torch.tensor(TIMESTEPS, device="cuda")
    with PlainPAB(model, config) as plain:
        plain.begin(TIMESTEPS)
        want = run(model, x, y, timesteps)
    with accelerate(model, config) as handle:
        for _ in range(3):
            handle.begin(TIMESTEPS)
            assert error(run(model, x, y, timesteps), want) < 2e-3
        report = handle.report()
        assert report.eager is None
        assert report.graphs == len(set(handle.schedule or ()))


@pytest.mark.parametrize("slots", [None, "fp8", "int8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_and_small_slots_stay_near(device, name, slots):
    model, config = latte(), CONFIGS[name]
    x, y = inputs()
    timesteps = torch.tensor(TIMESTEPS, device="cuda")
    with PlainPAB(model, config) as plain:
        plain.begin(TIMESTEPS)
        want = run(model, x, y, timesteps)
    with accelerate(model, config, cache_dtype=slots) as handle:
        for _ in range(2):
            handle.begin(TIMESTEPS)
            got = run(model, x, y, timesteps)
    assert error(got, want) < 5e-2


def test_slots_in_host_memory(device):
    model, config = latte(), CONFIGS["part"]
    x, y = inputs()
    timesteps = torch.tensor(TIMESTEPS, device="cuda")
    found = []
    for where in (None, "cpu"):
        with accelerate(model, config, cache_device=where) as handle:
            for _ in range(3):
                handle.begin(TIMESTEPS)
                got = run(model, x, y, timesteps)
            found.append(got)
    assert torch.equal(*found)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_synchronisation_and_no_allocation_in_the_loop(device, name):
    model = latte()
    x, y = inputs()
    timesteps = torch.tensor(TIMESTEPS, device="cuda")
    with accelerate(model, CONFIGS[name]) as handle:
        for _ in range(3):
            handle.begin(TIMESTEPS)
            run(model, x, y, timesteps)
        assert handle.report().graphs == len(set(handle.schedule or ()))
        handle.begin(TIMESTEPS)
        run(model, x, y, timesteps[:1])
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(model, x, y, timesteps[1:])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        after = torch.cuda.memory_stats()
    assert after["num_device_alloc"] == before["num_device_alloc"]
    assert after["reserved_bytes.all.current"] == before["reserved_bytes.all.current"]
