"""A batch that becomes smaller in the middle of a run, as where guidance ends."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pab_kernels import PABConfig, accelerate
from pab_kernels.plain import PlainPAB
from tests.latte_tools import call, inputs, tiny_latte
from tests.pipeline_tools import close

TIMESTEPS = [700.0 - 50 * i for i in range(9)]
CONFIG = PABConfig.preset("latte")


def run(model: Any, rows: list[int], first: int = 0) -> list[Tensor]:
    """The predictions of a run with so many rows at each step."""
    latents, text = inputs(batch=4)
    return [
        call(model, latents[:count] + step, text[:count], TIMESTEPS[step]) for step, count in enumerate(rows, first)
    ]


@pytest.mark.parametrize("ends", [[4], [1, 3], [8]], ids=str)
def test_the_plan_goes_on_with_everything_computed_anew(ends):
    model = tiny_latte()
    rows = [4 - sum(step >= end for end in ends) for step in range(len(TIMESTEPS))]
    expected: list[Tensor] = []
    with PlainPAB(model, CONFIG) as plain:
        for first, last in zip([0, *ends], [*ends, len(TIMESTEPS)], strict=True):
            plain.begin(TIMESTEPS[first:])
            expected += run(model, rows[first:last], first)
    with accelerate(model, CONFIG) as pab:
        for _ in range(2):
            plan = pab.begin(TIMESTEPS)
            got = run(model, rows)
            assert all(close(a, b) for a, b in zip(got, expected, strict=True))
        assert pab.report().calls == len(TIMESTEPS)
        assert pab.schedule is not None
        assert pab.schedule[: ends[0]] == plan[: ends[0]]
        assert str(pab.schedule[ends[0]]) == "compute"
        pab.begin(TIMESTEPS)
        whole = run(model, [4] * len(TIMESTEPS))
    with PlainPAB(model, CONFIG) as plain:
        plain.begin(TIMESTEPS)
        assert all(close(a, b) for a, b in zip(whole, run(model, [4] * len(TIMESTEPS)), strict=True))


def test_a_larger_batch_or_another_size_is_an_error_as_before():
    model = tiny_latte()
    with accelerate(model, CONFIG) as pab:
        pab.begin(TIMESTEPS)
        run(model, [2])
        with pytest.raises(ValueError, match="but this run began with"):
            run(model, [3], 1)
        latents, text = inputs(batch=1, size=16)
        with pytest.raises(ValueError, match="but this run began with"):
            call(model, latents, text, TIMESTEPS[1])
        run(model, [2], 1)  # a refused call leaves the run as it was


def test_forwards_of_one_step_have_one_batch():
    model = tiny_latte()
    with accelerate(model, CONFIG, forwards_per_step=2) as pab:
        pab.begin(TIMESTEPS)
        run(model, [4])
        run(model, [4])
        run(model, [3], 1)
        run(model, [3], 1)
        run(model, [3], 2)
        with pytest.raises(ValueError, match="step 2: its forwards differ in their batches"):
            run(model, [2], 2)
        run(model, [3], 2)
        assert torch.isfinite(run(model, [3], 3)[0]).all()


def test_what_is_left_of_a_batch_is_not_two_halves_of_guidance():
    """Two prompts without guidance: neither row may be made of the other."""
    model = tiny_latte()
    config = PABConfig(guidance_broadcast=True, guidance_range=3, guidance_threshold=(0, 1000))
    with accelerate(model, config) as pab:
        pab.begin(TIMESTEPS)
        guided = run(model, [4, 4])
        got = run(model, [2] * 7, 2)
    wanted = run(model, [2] * 7, 2)
    assert not close(guided[1], run(model, [4], 1)[0], 1e-4)  # guidance was broadcast before
    assert all(close(a, b) for a, b in zip(got, wanted, strict=True))
