"""Predicted errors by hand, and settings a step away."""

from dataclasses import replace

import numpy as np
import pytest

from pab_kernels import PABConfig
from pab_kernels.tune.frontier import Frontier
from pab_kernels.tune.profile import Profile
from tests.tune.made_up import made_up, savings


def predicted_error(profile: Profile, config: PABConfig) -> float:
    """Of all kinds, each by a factor of 1."""
    return sum(Frontier(profile, lambda schedule: 0.0).weigh(config).errors)


def test_predicted_error_adds_what_the_outputs_would_have_changed():
    profile = made_up(6)
    change = profile.impact["temporal"]
    config = PABConfig(temporal_broadcast=True, temporal_threshold=(0, 800), temporal_range=3)
    # Calls 2, 4 and 5 broadcast: 2 what call 1 computed, 4 and 5 what call 3 did. They lag the same way.
    expected = ((change[:, 2] + change[:, 4] + (change[:, 4] + change[:, 5])) ** 2).sum()
    assert predicted_error(profile, config) == pytest.approx(expected)
    assert predicted_error(profile, PABConfig()) == 0


def test_predicted_error_of_a_forecast_is_what_the_line_misses():
    profile = made_up(8)
    left = profile.remainder["cross"]
    config = PABConfig(cross_broadcast=True, cross_threshold=(0, 700), cross_range=3, cross_order=1)
    # Calls 0 to 3 and 6 are computed; 4 and 5 lie 1 and 2 after call 3, 7 one after call 6.
    late = [
        left[:, 3:5].mean(1) * 1 * 2 / 2,
        left[:, 3:6].mean(1) * 2 * 3 / 2,
        left[:, 6:8].mean(1) * 1 * 4 / 2,
    ]
    assert predicted_error(profile, config) == pytest.approx(sum((each**2).sum() for each in late))


def test_an_error_counts_by_the_root_of_what_the_sampler_moves():
    profile = made_up(5)
    moved = np.array([[np.nan, 0.1, 0.3, 0.2, 0.4]])
    profile = replace(profile, relative_l2=profile.relative_l2 | {"latents": moved})
    assert profile.moves == pytest.approx(np.array([0.1, 0.3, 0.2, 0.4, 0.4]) / 0.28)
    config = PABConfig(spatial_broadcast=True, spatial_threshold=(0, 999), spatial_range=2)
    change = profile.impact["spatial"]
    expected = (change[:, 1] * 0.3**0.5 + change[:, 3] * 0.4**0.5) ** 2 / 0.28
    assert predicted_error(profile, config) == pytest.approx(expected.sum())
    assert profile.parts == ("spatial", "temporal", "cross"), "latents are not broadcast"


def test_calls_that_the_stack_leaves_out_cost_its_error_alone():
    profile = made_up(9, kinds=("spatial", "cross", "stack"), blocks=1)
    stack = PABConfig(stack_broadcast=True, stack_threshold=(0, 900), stack_range=2)
    both = replace(stack, cross_broadcast=True, cross_threshold=(0, 900), cross_range=4)
    more = sum(profile.impact["cross"][0, 1 + i : 3 + i].sum() for i in (0, 4)) ** 2  # calls 2 and 6, of 0 and 4
    assert predicted_error(profile, both) - predicted_error(profile, stack) == pytest.approx(more)


def test_blocks_that_do_not_broadcast_are_not_counted():
    profile = made_up(6, blocks=3)
    whole = PABConfig(spatial_broadcast=True, spatial_threshold=(0, 900), spatial_range=2)
    parts = [replace(whole, spatial_block=(i, i + 1)) for i in range(3)]
    assert sum(predicted_error(profile, part) for part in parts) == pytest.approx(predicted_error(profile, whole))


FAST = PABConfig.preset("latte", "fast")


def near(profile: Profile, config: PABConfig) -> list[PABConfig]:
    return [each.config for each in Frontier(profile, savings(profile)).near(config)]


def test_a_step_changes_one_kind():
    profile = made_up(30, kinds=("spatial", "cross", "stack", "guidance"), blocks=4)
    found = near(profile, FAST)
    assert FAST not in found
    assert len(set(found)) == len(found)
    assert found == near(profile, FAST), "it is deterministic"
    for changes in (
        {"stack_broadcast": False, "stack_threshold": None, "stack_range": None, "stack_order": 0},
        {"stack_order": 0},
        {"stack_range": 4, "guidance_range": 8},
        {"stack_range": 3, "guidance_range": 6},
        {"stack_block": (1, 3)},
        {"guidance_order": 1},
        {"guidance_range": 2},
        {"guidance_range": 6},
    ):
        assert replace(FAST, **changes) in found
    ranges = {(c.stack_range, c.guidance_range) for c in found if c.stack_broadcast and c.guidance_broadcast}
    assert ranges == {(2, 4), (2, 2), (2, 6), (2, 8), (3, 6), (4, 8)}, "where no block runs nothing is renewed"
    assert any(c.spatial_broadcast and c.spatial_order and replace_kind(c, "spatial") == FAST for c in found)
    assert any(c.stack_threshold != FAST.stack_threshold for c in found)
    again = near(profile, next(c for c in found if c.spatial_broadcast))
    assert FAST in again, "a kind is switched off again"
    assert any(c.spatial_block == (0, 2) for c in again)


def replace_kind(config: PABConfig, kind: str) -> PABConfig:
    """`config` without a kind."""
    return PABConfig(**{key: value for key, value in config.to_dict().items() if not key.startswith(kind)})


def test_a_window_grows_and_shrinks_by_calls():
    profile = made_up(12, kinds=("spatial",))
    config = PABConfig(spatial_broadcast=True, spatial_threshold=(100, 800), spatial_range=50)
    inside = [call for call, t in enumerate(profile.timesteps) if 100 < t < 800]
    first, last = inside[0], inside[-1]
    found = set()
    for each in near(profile, config):
        lo, hi = each.spatial_threshold or (0, 0)
        calls = [call for call, t in enumerate(profile.timesteps) if lo < t < hi]
        if each.spatial_range == 50 and calls:
            found.add((calls[0] - first, calls[-1] - last))
    most = len(profile.timesteps) - 1 - last
    expected = {(max(shift, 1 - first), 0) for shift in (-4, -2, -1, 1, 2, 4)}
    expected |= {(0, min(shift, most)) for shift in (-4, -2, -1, 1, 2, 4)}
    assert found - {(0, 0)} == expected


def test_settings_that_name_no_window_of_this_run_are_as_if_off():
    profile = made_up(12, kinds=("spatial", "stack"))
    nowhere = PABConfig(spatial_broadcast=True, spatial_threshold=(0, 1), spatial_range=2, linear_precision="fp8-all")
    found = near(profile, nowhere)
    assert all(each.linear_precision == "fp8-all" for each in found)
    assert any(each.spatial_threshold not in (None, (0, 1)) for each in found)


def test_equal_runs_have_equal_steps():
    """Attention that is broadcast only at calls that leave it out anyway changes nothing."""
    profile = made_up(12, kinds=("spatial", "stack"))
    frontier = Frontier(profile, savings(profile))
    stack = PABConfig(stack_broadcast=True, stack_threshold=(0, 900), stack_range=2)
    more = replace(stack, spatial_broadcast=True, spatial_threshold=(0, 900), spatial_range=2)
    other = replace(more, spatial_range=4)
    assert frontier.weigh(stack) != frontier.weigh(more)
    assert frontier.weigh(stack).steps == frontier.weigh(more).steps != frontier.weigh(other).steps


def test_thresholds_keep_to_calls_that_differ():
    profile = made_up(8)
    repeated = replace(profile, timesteps=(999.0, 800.0, 800.0, 600.0, 600.0, 400.0, 200.0, 1.0))
    config = PABConfig(spatial_broadcast=True, spatial_threshold=(0, 900), spatial_range=2)
    for each in near(repeated, config):
        for bound in each.spatial_threshold or ():
            assert bound not in repeated.timesteps or bound == 0


def test_blocks_that_the_stack_leaves_out_cost_their_own_error_less_often():
    """The stack is a part of the model: cross-attention of the other blocks goes on."""
    profile = made_up(9, kinds=("spatial", "cross", "stack"), blocks=4)
    stack = PABConfig(stack_broadcast=True, stack_threshold=(0, 900), stack_range=2, stack_block=(1, 3))
    both = replace(stack, cross_broadcast=True, cross_threshold=(0, 900), cross_range=4)
    cross = profile.impact["cross"]
    inside = sum(cross[1:3, 1 + i : 3 + i].sum(1) for i in (0, 4)) ** 2  # calls 2 and 6, of 0 and 4
    ages = {1: (1, 2), 2: (1, 3), 3: (1, 4), 5: (5, 6), 6: (5, 7), 7: (5, 8)}
    outside = sum(cross[[0, 3], first:end].sum(1) for first, end in ages.values()) ** 2
    assert predicted_error(profile, both) - predicted_error(profile, stack) == pytest.approx(
        inside.sum() + outside.sum()
    )
    whole = replace(stack, stack_block=None)
    assert predicted_error(profile, whole) == pytest.approx(profile.impact["stack"][0, 1::2].sum() ** 2)
    assert predicted_error(profile, stack) == pytest.approx(profile.impact["stack"][1, 1::2].sum() ** 2)
