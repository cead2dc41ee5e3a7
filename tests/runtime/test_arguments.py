"""What a caller hands over with each call: changed in ways that torch does not count, of odd values, or of no use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pab_kernels import accelerate
from pab_kernels.plain import PlainPAB
from tests.family_tools import FAMILIES, PAB, STEPS, Host, host, relative_error
from tests.wan_tools import tiny_ltx

PLANS = ["open_sora_plan_v110", "open_sora_plan_v120"]


def through_data(tensor: Tensor) -> None:
    tensor.data.copy_(1 - tensor)


def through_numpy(tensor: Tensor) -> None:
    values = tensor.numpy()
    np.subtract(1, values, out=values)


def other_memory(tensor: Tensor) -> None:
    tensor.data = 1 - tensor


def first_tensor(made: Host, *names: str) -> Tensor | None:
    return next((made.given[name] for name in names if made.given.get(name) is not None), None)


def changed_on_the_way(made: Host, change: Callable[[Tensor], None], *names: str) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    results = []
    for number, step in enumerate(STEPS):
        tensor = first_tensor(made, *names)
        if number == 3 and tensor is not None:
            change(tensor)
        results.append(made.call(torch.randn(made.shape, generator=generator), step))
    return torch.stack(results)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("names", [("y", "encoder_hidden_states"), ("mask", "encoder_attention_mask")])
@pytest.mark.parametrize("change", [through_data, through_numpy, other_memory])
def test_text_and_mask_changed_without_a_version(family: str, names: Any, change: Callable[[Tensor], None]) -> None:
    made, twin = host(family), host(family)
    if first_tensor(made, *names) is None:
        pytest.skip("Latte has no mask")
    with PlainPAB(twin.model, PAB) as plain:
        plain.begin(STEPS)
        expected = changed_on_the_way(twin, change, *names)
    with accelerate(made.model, PAB) as handle:
        handle.begin(STEPS)
        assert relative_error(changed_on_the_way(made, change, *names), expected) < 1e-5


@pytest.mark.parametrize("family", PLANS)
@pytest.mark.parametrize("cast", [Tensor.bool, Tensor.float, Tensor.int])
def test_a_mask_of_any_dtype(family: str, cast: Callable[[Tensor], Tensor]) -> None:
    made = host(family)
    mask = made.given["encoder_attention_mask"]
    expected = made.run()
    with accelerate(made.model, type(PAB)()) as handle:
        handle.begin(STEPS)
        assert relative_error(made.run(encoder_attention_mask=cast(mask)), expected) < 1e-4


@pytest.mark.parametrize("family", PLANS)
@pytest.mark.parametrize("odd", [lambda mask: (1 - mask) * -10000.0, lambda mask: -mask, lambda mask: mask * 255])
def test_a_mask_that_is_a_bias_is_refused_each_time(family: str, odd: Callable[[Tensor], Tensor]) -> None:
    """The hosts compute with it; taken for a mask, a bias hides just the tokens that count."""
    made = host(family)
    wrong = odd(made.given["encoder_attention_mask"])
    with accelerate(made.model, PAB) as handle:
        handle.begin(STEPS)
        for _ in range(2):
            with pytest.raises(ValueError, match="encoder_attention_mask: has other values than 0 and 1"):
                made.run(encoder_attention_mask=wrong)
        made.run()


def test_ltx_refuses_a_bias_too() -> None:
    model = tiny_ltx()
    given = {
        "encoder_hidden_states": torch.randn(2, 6, 16), "timestep": torch.full((2,), 900.0),
        "num_frames": 2, "height": 2, "width": 2, "return_dict": False,
    }  # fmt: skip
    mask = (torch.arange(6) < 4).long().expand(2, 6)
    with accelerate(model, PAB) as handle:
        handle.begin([900.0])
        with pytest.raises(ValueError, match="encoder_attention_mask: has other values"):
            model(torch.randn(2, 8, 8), encoder_attention_mask=(1 - mask) * -10000.0, **given)
        model(torch.randn(2, 8, 8), encoder_attention_mask=mask, **given)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_no_tensor_is_named(family: str) -> None:
    made = host(family)
    with accelerate(made.model, PAB) as handle:
        handle.begin(STEPS)
        latents, timestep = torch.randn(made.shape), torch.full((2,), STEPS[0])
        for name, value in made.given.items():
            if isinstance(value, Tensor):
                with pytest.raises(TypeError, match=f"{name}: got str, must be a torch.Tensor"):
                    made.model(latents, timestep=timestep, **made.given | {name: "x"})
        with pytest.raises(TypeError, match="timestep: got float, must be a torch.Tensor"):
            made.model(latents, timestep=STEPS[0], **made.given)
        made.run()


def test_a_size_without_an_element() -> None:
    made = host("open_sora")
    with accelerate(made.model, PAB) as handle:
        handle.begin(STEPS)
        with pytest.raises(ValueError, match=r"height: shape is \[0\], must have an element"):
            made.run(height=torch.empty(0))


@pytest.mark.parametrize(
    ("timesteps", "error"),
    [
        (torch.tensor(5.0), r"timesteps: shape is \[\], must be"),
        (torch.tensor([STEPS, STEPS]), r"timesteps: shape is \[2, 6\], must be"),
        (torch.empty(6, device="meta"), r"timesteps: shape is \[6\] on the meta device"),
        (["a"], r"timesteps: got \['a'\], must be numbers"),
        (5.0, "timesteps: got 5.0, must be numbers"),
        (None, "timesteps: got None, must be numbers"),
        ([1j], "timesteps: got .*, must be numbers"),
        ([], "timesteps: got none"),
    ],
)
def test_timesteps_that_are_no_list_of_numbers(timesteps: Any, error: str) -> None:
    made = host("latte")
    with accelerate(made.model, PAB) as handle:
        handle.begin(STEPS)
        expected = made.run()
        with pytest.raises((TypeError, ValueError), match=error):
            handle.begin(timesteps)
        for same in (np.array(STEPS), torch.tensor(STEPS).double(), (each for each in STEPS), map(torch.tensor, STEPS)):
            handle.begin(same)
            assert torch.equal(made.run(), expected)
