"""Schedule: the original's decisions, and its laws."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pab_kernels.config import BRANCHES, KINDS, SWITCHES, PABConfig
from pab_kernels.pipelines.samplers import family_timesteps
from pab_kernels.schedule import Schedule, StepVariant

RECORDED = json.loads((Path(__file__).parent / "data" / "goldens" / "schedules.json").read_text())


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: case["name"])
def test_recorded_decisions(case):
    schedule = Schedule(PABConfig.from_dict(case["config"]), case["timesteps"])
    for kind in KINDS:
        assert [int(getattr(step, kind)) for step in schedule] == case["broadcast"][kind]
        assert schedule.broadcast_count(kind) == sum(case["broadcast"][kind])


def test_recorded_timesteps_of_open_sora():
    case = next(case for case in RECORDED if case["name"].startswith("open-sora 1.2 246"))
    assert family_timesteps("open_sora", 30) == pytest.approx(case["timesteps"], abs=1e-9)


def test_pndm_is_planned_over_its_159_calls():
    assert len(Schedule(PABConfig(), family_timesteps("open_sora_plan_v110", 150))) == 159


@given(
    st.lists(st.floats(0, 1000), min_size=1, max_size=60),
    st.integers(1, 9),
    st.tuples(st.integers(0, 500), st.integers(501, 1000)),
)
def test_laws_of_one_kind(timesteps, every, threshold):
    config = PABConfig(spatial_broadcast=True, spatial_threshold=threshold, spatial_range=every)
    flags = [step.spatial for step in Schedule(config, timesteps)]
    assert not flags[0], "a broadcast needs a compute step before it"
    longest = run = 0
    for flag, t in zip(flags, timesteps, strict=True):
        run = run + 1 if flag else 0
        longest = max(longest, run)
        assert not flag or threshold[0] < int(t) < threshold[1]
    assert longest <= every - 1
    assert not any(step.temporal or step.cross for step in Schedule(config, timesteps))


def test_entering_the_window_off_phase_broadcasts_at_once():
    config = PABConfig(spatial_broadcast=True, spatial_threshold=(100, 800), spatial_range=3)
    assert [step.spatial for step in Schedule(config, [900, 790, 700, 600])] == [False, True, True, False]


@pytest.mark.parametrize("bad", [[], [float("nan")], [1.0, float("inf")]])
def test_bad_timesteps(bad):
    with pytest.raises(ValueError, match="timesteps"):
        Schedule(PABConfig(), bad)


def keyed(windows):
    return PABConfig(mlp_broadcast=True, mlp_spatial_broadcast_config=windows, mlp_temporal_broadcast_config=windows)


def test_mlp_windows_keep_at_the_key_and_broadcast_after():
    schedule = Schedule(keyed({680: {"block": [0], "skip_count": 2}}), range(720, 600, -20))
    assert [sorted(step.mlp_spatial.keep) for step in schedule] == [[], [], [0], [], [], []]
    assert [sorted(step.mlp_spatial.broadcast) for step in schedule] == [[], [], [], [0], [0], []]


def test_mlp_window_at_the_end_of_the_run_is_cut_off():
    schedule = Schedule(keyed({620: {"block": [1], "skip_count": 5}}), [640, 620, 600])
    assert [sorted(step.mlp_temporal.broadcast) for step in schedule] == [[], [], [1]]


def test_mlp_key_inside_another_window_computes_again_but_does_not_overwrite_it():
    windows = {680: {"block": [0, 1], "skip_count": 3}, 660: {"block": [1], "skip_count": 1}}
    schedule = Schedule(keyed(windows), [680, 660, 640, 620])
    assert [sorted(step.mlp_spatial.broadcast) for step in schedule] == [[], [0], [0, 1], [0, 1]]
    assert [sorted(step.mlp_spatial.keep) for step in schedule] == [[0, 1], [], [], []]


def test_missing_mlp_keys_warn_with_the_nearest_timesteps():
    with pytest.warns(UserWarning, match=r"681 \(nearest 680\)"):
        Schedule(keyed({681: {"block": [0], "skip_count": 2}}), range(720, 600, -20))


def test_mlp_free_of_exact_timesteps():
    config = PABConfig(mlp_broadcast=True, mlp_threshold=(100, 700), mlp_range=2, mlp_block=(1, 3))
    schedule = Schedule(config, [720, 700, 680, 660, 640, 620])
    assert [1 in step.mlp_spatial.broadcast for step in schedule] == [False, False, False, True, False, True]
    assert all(0 not in step.mlp_spatial.broadcast and 3 not in step.mlp_temporal.broadcast for step in schedule)
    assert all((1 in step.mlp_temporal.keep) != (1 in step.mlp_temporal.broadcast) for step in schedule)


def test_variants_are_few_and_hashable():
    schedule = Schedule(PABConfig.preset("latte"), family_timesteps("latte", 50))
    assert len(set(schedule)) <= 8
    assert StepVariant() in set(schedule)
    assert str(StepVariant(spatial=True, cross=True)) == "broadcast spatial+cross"


def test_saved_share():
    schedule = Schedule(PABConfig.preset("latte"), family_timesteps("latte", 50))
    assert schedule.saved_share() == pytest.approx(68 / 150)


def settings(**kinds: tuple[int, int]) -> dict[str, object]:
    """Range and order of each kind, in a window that holds all but the first call of `CALLS`."""
    found: dict[str, object] = {}
    for kind, (every, order) in kinds.items():
        found |= {f"{kind}_broadcast": True, f"{kind}_threshold": (100, 900), f"{kind}_range": every}
        found[f"{kind}_order"] = order
    return found


CALLS = [950.0, 800, 750, 700, 650, 600, 550, 500, 450, 400, 350, 300]


def test_a_whole_stack_that_is_broadcast_leaves_one_variant() -> None:
    schedule = Schedule(PABConfig.from_dict(settings(stack=(3, 0), spatial=(2, 0), mlp=(2, 0))), CALLS)
    assert [str(step) for step in schedule][:7] == [
        "compute", "broadcast stack", "broadcast stack", "broadcast spatial+mlp_spatial+mlp_temporal",
        "broadcast stack", "broadcast stack", "compute",
    ]  # fmt: skip
    assert len(set(schedule)) == 3
    assert schedule.broadcast_count("spatial") == 8 + 2, "where no block runs, no attention does"
    assert all(step.broadcasts(kind) for kind in BRANCHES for step in schedule if step.stack)


def test_a_part_of_the_stack_leaves_the_other_blocks_their_own() -> None:
    schedule = Schedule(PABConfig.from_dict(settings(stack=(3, 0), spatial=(2, 0)) | {"stack_block": (1, 3)}), CALLS)
    assert [str(step) for step in schedule][:5] == [
        "compute", "broadcast spatial+stack", "broadcast stack", "broadcast spatial", "broadcast stack"
    ]  # fmt: skip


def test_a_forecast_reaches_as_many_changes_as_calls_have_passed() -> None:
    schedule = Schedule(PABConfig.from_dict(settings(stack=(3, 1))), CALLS)
    assert [str(step) for step in schedule][:5] == ["compute", *["broadcast stack"] * 2, "compute", "forecast stack"]
    assert [schedule.ahead(call, "stack") for call in range(9)] == [0, 0, 0, 0, 1 / 3, 2 / 3, 0, 1 / 3, 2 / 3]


def test_calls_before_the_window_are_distances_of_their_own() -> None:
    config = PABConfig.from_dict(settings(cross=(3, 1)) | {"cross_threshold": (100, 720)})
    schedule = Schedule(config, CALLS)  # computes calls 0 to 3 and every third
    assert [schedule.ahead(call, "cross") for call in range(8)] == [0, 0, 0, 0, 1, 2, 0, 1 / 3]


@given(
    kinds=st.dictionaries(st.sampled_from(SWITCHES), st.tuples(st.integers(1, 5), st.integers(0, 1)), min_size=1),
    block=st.none() | st.just((1, 3)),
    low=st.integers(100, 500),
)
def test_what_is_forecast_was_computed_twice(kinds, block, low) -> None:
    found = settings(**kinds) | ({"stack_block": block} if block else {})
    found |= {f"{kind}_threshold": (low, 900) for kind in kinds}
    schedule = Schedule(PABConfig.from_dict(found), CALLS)
    for kind, (_, order) in kinds.items():
        for inside in (False, True):
            for half in (0, 1):
                computed = []
                for call, step in enumerate(schedule):
                    runs = not (kind not in ("stack", "guidance") and step.stack and (inside or block is None))
                    runs = runs and not (kind != "guidance" and step.guidance and half)
                    ahead = schedule.ahead(call, kind, inside=inside, half=half)
                    if not runs:
                        continue
                    if not step.broadcasts(kind):
                        computed.append(call)
                        assert ahead == 0
                    elif ahead:
                        assert order == 1
                        assert kind in step.forecast
                        assert ahead == (call - computed[-1]) / (computed[-1] - computed[-2])
                    else:
                        assert computed, "a broadcast needs a call before it"


def test_a_resumed_plan_uses_nothing_from_before():
    """Another batch from call 5 on: the rest is planned for itself, and what came before stays as it was."""
    config = dataclasses.replace(
        PABConfig.preset("open_sora"), mlp_broadcast=True, mlp_threshold=(100, 900), mlp_range=3, mlp_block=(0, 2)
    )
    whole = Schedule(config, family_timesteps("open_sora", 30))
    for call in (0, 1, 5, 14, 29):
        again = whole.resumed(call)
        assert again.timesteps == whole.timesteps
        assert again[:call] == whole[:call]
        assert again[call:] == Schedule(config, whole.timesteps[call:])[:]
        assert str(again[call]) == "compute"
    assert whole.resumed(0)[:] == whole[:]


def test_a_resumed_plan_drops_the_windows_that_had_begun(recwarn):
    schedule = Schedule(
        keyed({800: {"block": [0], "skip_count": 3}, 500: {"block": [1], "skip_count": 1}}),
        [900, 800, 700, 600, 500, 400],
    ).resumed(3)
    assert [sorted(step.mlp_spatial.broadcast) for step in schedule] == [[], [], [0], [], [], [1]]
    assert not recwarn


OVERLAPPING = {700: {"block": [0, 1], "skip_count": 3}, 680: {"block": [1, 2], "skip_count": 4}}


def test_windows_that_overlap_keep_a_block_twice():
    schedule = Schedule(keyed(OVERLAPPING), range(720, 560, -20))
    keep, broadcast = ([sorted(getattr(step.mlp_spatial, name)) for step in schedule] for name in ("keep", "broadcast"))
    assert keep == [[], [0, 1], [1, 2], [], [], [], [], []]
    assert broadcast == [[], [], [0], [0, 1], [0, 1], [1, 2], [1, 2], []]
    assert [step.lane("mlp_spatial", 1) for step in schedule] == [0, 0, 1, 0, 0, 1, 1, 0]
    assert [schedule.lanes("mlp_spatial", index) for index in range(4)] == [1, 2, 1, 1]
    assert sorted(schedule.alive("mlp_spatial", 1)) == [1, 2, 3, 4]
    assert sorted(schedule.alive("mlp_spatial", 1, 1)) == [2, 3, 4, 5, 6]
    assert len(set(schedule)) == len({(str(step), step) for step in schedule})


def sources_of_the_original(windows, timesteps, blocks):
    """The call that computed what each call and block uses, after VideoSys's PABManager, which keys by (t, block)."""
    outputs, found = {}, []
    for call, t in enumerate(timesteps):
        window = next(
            (
                key
                for key in windows
                if key in timesteps
                and t in timesteps[timesteps.index(key) : timesteps.index(key) + 1 + windows[key]["skip_count"]]
            ),
            None,
        )
        row = []
        for block in range(blocks):
            if t in windows and block in windows[t]["block"]:
                outputs[t, block] = call
                row.append(call)
            elif window is not None and block in windows[window]["block"]:
                row.append(outputs[window, block])
            else:
                row.append(call)
        found.append(row)
    return found


def sources_of_the_schedule(schedule, kind, blocks):
    slots, found = {}, []
    for call, step in enumerate(schedule):
        row = []
        for block in range(blocks):
            slot = block, step.lane(kind, block)
            if step.writes(kind, block):
                slots[slot] = call
            row.append(slots[slot] if step.reads(kind, block) else call)
            assert not (step.reads(kind, block) and step.writes(kind, block))
            assert slot[1] < schedule.lanes(kind, block)
            if step.reads(kind, block):
                assert {slots[slot], call} <= set(schedule.alive(kind, block, slot[1]))
        found.append(row)
    return found


def test_two_thousand_keyed_settings_use_what_the_original_uses():
    draw = random.Random(0)
    overlapping = 0
    for _ in range(2000):
        timesteps = sorted(draw.sample(range(0, 1000, 20), draw.randint(2, 14)), reverse=True)
        keys = draw.sample(timesteps, draw.randint(1, min(6, len(timesteps))))
        windows = {
            key: {"block": draw.sample(range(5), draw.randint(1, 4)), "skip_count": draw.randint(1, 6)} for key in keys
        }
        schedule = Schedule(keyed(windows), timesteps)
        expected = sources_of_the_original(windows, timesteps, 5)
        for kind in ("mlp_spatial", "mlp_temporal"):
            assert sources_of_the_schedule(schedule, kind, 5) == expected, (windows, timesteps)
        overlapping += any(schedule.lanes("mlp_spatial", block) > 1 for block in range(5))
    assert overlapping > 50
