"""Predicted errors by hand, and the frontier against brute force."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from pab_kernels import PABConfig
from pab_kernels.schedule import Schedule
from pab_kernels.tune.frontier import Candidate, Frontier, _options
from pab_kernels.tune.profile import Profile
from tests.tune.made_up import made_up, savings


def by_blocks(profile: Profile) -> Callable[[Schedule], float]:
    """As `savings`, by the number of blocks."""
    depth = profile.depth

    def saving(schedule: Schedule) -> float:
        parts = {
            kind: [index in schedule.config.blocks(kind) for index in range(depth)] for kind in ("spatial", "stack")
        }
        saved = 0.0
        for step in schedule:
            for own, stack in zip(parts["spatial"], parts["stack"], strict=True):
                saved += 1.0 if step.stack and stack else 0.2 * (step.spatial and own)
        return saved / depth / len(schedule)

    return saving


def predicted_error(profile: Profile, config: PABConfig) -> float:
    """Of all kinds, each by a factor of 1."""
    return sum(Frontier(profile, lambda schedule: 0.0).errors(config))


def frontier(profile: Profile, saving: Callable[[Schedule], float], allowed: float = 1.0) -> list[Candidate]:
    """The settings that no other beats, from the least saving to the most."""
    weighed = Frontier(profile, saving)
    weighed.search(np.ones(len(profile.parts)), allowed)
    found: list[Candidate] = []
    for each in sorted(weighed.candidates, key=lambda each: (-each.saving, sum(each.errors))):
        if not found or sum(each.errors) < sum(found[-1].errors):
            found.append(each)
    return found[::-1]


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


def test_an_error_counts_as_much_as_the_sampler_moves():
    profile = made_up(5)
    moved = np.array([[np.nan, 0.1, 0.3, 0.2, 0.4]])
    profile = replace(profile, relative_l2=profile.relative_l2 | {"latents": moved})
    assert profile.moves == pytest.approx(np.array([0.1, 0.3, 0.2, 0.4, 0.4]) / 0.28)
    config = PABConfig(spatial_broadcast=True, spatial_threshold=(0, 999), spatial_range=2)
    change = profile.impact["spatial"]
    expected = ((change[:, 1] * 0.3 + change[:, 3] * 0.4) / 0.28) ** 2
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


@pytest.mark.parametrize("kind", ["spatial", "stack", "guidance"])
def test_no_settings_of_one_kind_beat_the_frontier(kind):
    profile = made_up(12, kinds=("spatial",) if kind == "spatial" else ("spatial", kind), blocks=1)
    saving = savings(profile)
    found = frontier(profile, saving)
    for settings in _options(profile, kind, 1):
        config = PABConfig(**settings)
        error, saved = predicted_error(profile, config), saving(Schedule(config, profile.timesteps))
        better = (c for c in found if sum(c.errors) <= error * (1 + 1e-9) and c.saving >= saved - 1e-12)
        assert saved == 0 or any(better), config


def test_kinds_are_mixed():
    profile = made_up(12, kinds=("spatial", "cross", "stack", "guidance"))
    found = frontier(profile, savings(profile))
    assert len(found) > 5
    assert any(c.config.stack_broadcast and c.config.guidance_broadcast for c in found), "kinds are mixed"
    for candidate in found:
        assert sum(candidate.errors) == pytest.approx(predicted_error(profile, candidate.config))
    assert found == frontier(profile, savings(profile)), "it is deterministic"


def test_thresholds_keep_to_calls_that_differ():
    profile = made_up(8)
    repeated = replace(profile, timesteps=(999.0, 800.0, 800.0, 600.0, 600.0, 400.0, 200.0, 1.0))
    for candidate in frontier(repeated, savings(repeated)):
        assert sum(candidate.errors) == pytest.approx(predicted_error(repeated, candidate.config))


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


def test_blocks_are_weighed():
    """Where one block changes much more than the others, it is left out."""
    profile = made_up(12, kinds=("spatial", "stack"), blocks=4)
    profile.impact["spatial"][2:] *= 100
    profile.impact["stack"][0] *= 100
    found = frontier(profile, by_blocks(profile))
    assert any(c.config.spatial_block == (0, 2) for c in found)
    assert any(c.config.stack_block == (1, 3) for c in found)
