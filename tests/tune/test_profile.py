"""The profile against differences computed by hand, its file, and what is read out of it."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pab_kernels.tune.profile import Profile, Profiler, findings, flat_middle
from tests.latte_tools import call, inputs, tiny_latte

TIMESTEPS = [900.0, 700.0, 650.0, 300.0]


def by_hand(model: Any) -> dict[tuple[str, int], list[tuple[Tensor, Tensor]]]:
    """Gated output and stream with it added, of every attention at every call, from hooks on the host's modules."""
    found: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = {}
    seen: dict[str, Tensor] = {}
    hooks = []
    for kind, blocks in (("spatial", model.transformer_blocks), ("temporal", model.temporal_transformer_blocks)):
        for index, block in enumerate(blocks):

            def enter(module, args, kwargs):
                timestep = kwargs.get("timestep", args[4] if len(args) > 4 else None)
                rows = module.scale_shift_table + timestep.reshape(len(args[0]), 6, -1)
                seen["stream"], seen["gate"] = args[0], rows[:, 2:3]

            def attention(module, args, output, key=(kind, index)):
                value = seen["gate"] * output
                seen["stream"] = seen["stream"] + value
                found.setdefault(key, []).append((value, seen["stream"]))

            def cross(module, args, output, key=("cross", index)):
                found.setdefault(key, []).append((output, seen["stream"] + output))

            hooks.append(block.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.append(block.attn1.register_forward_hook(attention))
            if block.attn2 is not None:
                hooks.append(block.attn2.register_forward_hook(cross))
    run(model)
    for hook in hooks:
        hook.remove()
    return found


def run(model: Any) -> Tensor:
    latents, text = inputs()
    for t in TIMESTEPS:
        latents = latents - 0.1 * call(model, latents, text, t)[:, :4]
    return latents


def test_differences_are_those_of_the_recorded_outputs():
    model = tiny_latte()
    expected = by_hand(model)
    before = run(model)
    with Profiler(model) as profiler:
        assert torch.equal(run(model), before)
        profile = profiler.profile(TIMESTEPS)
    assert torch.equal(run(model), before)
    assert profile.kinds == ("spatial", "temporal", "cross")
    for (kind, block), outputs in expected.items():
        for step in range(1, len(TIMESTEPS)):
            (old, _), (new, stream) = outputs[step - 1 : step + 1]
            difference = new - old
            assert profile.relative_l2[kind][block, step] == pytest.approx(float(difference.norm() / new.norm()), 1e-5)
            assert profile.mse[kind][block, step] == pytest.approx(float(difference.square().mean()), 1e-5)
            assert profile.impact[kind][block, step] == pytest.approx(float(difference.norm() / stream.norm()), 1e-5)
        assert np.isnan(profile.mse[kind][block, 0])


def test_two_outputs_of_each_branch_are_kept():
    model = tiny_latte()
    with Profiler(model) as profiler:
        run(model)
        # Attention of two blocks each, four MLPs, the stack, and the latents.
        assert len(profiler._before) == 2 + 2 + 2 + 4 + 1 + 1
        assert {len(kept) for kept in profiler._before.values()} == {2}
    assert not profiler._before


def test_stack_and_guidance_are_measured_by_hand():
    """The stack by hooks on the host, guidance by its predictions, and what a forecast leaves of both."""
    model, streams, predictions = tiny_latte(layers=4), [], []
    hooks = [
        model.transformer_blocks[0].register_forward_pre_hook(lambda _, args: streams.append([args[0]])),
        *(
            model.transformer_blocks[i].register_forward_pre_hook(lambda _, args: streams[-1].append(args[0]))
            for i in (1, 3)
        ),
        model.norm_out.register_forward_pre_hook(lambda _, args: streams[-1].append(args[0])),
        model.register_forward_hook(lambda *found: predictions.append(found[-1][0])),
    ]
    run(model)
    for hook in hooks:
        hook.remove()
    with Profiler(model, guidance=3.0) as profiler:
        run(model)
        profile = profiler.profile(TIMESTEPS)
    assert profile.parts == ("spatial", "temporal", "cross", "mlp", "stack", "guidance")
    assert {kind: len(rows) for kind, rows in profile.impact.items() if kind in ("stack", "guidance")} == {
        "stack": 2,
        "guidance": 1,
    }
    halves = [prediction.chunk(2) for prediction in predictions]
    for kind, row, values, wholes in (
        ("stack", 0, [after - before for before, _, _, after in streams], [after for *_, after in streams]),
        ("stack", 1, [end - start for _, start, end, _ in streams], [end for _, _, end, _ in streams]),
        ("guidance", 0, [2 * (a - b) for a, b in halves], [b for _, b in halves]),
    ):
        for step in range(1, 4):
            change = values[step] - values[step - 1]
            assert profile.impact[kind][row, step] == pytest.approx(float(change.norm() / wholes[step].norm()), 1e-4)
        left = values[3] - 2 * values[2] + values[1]
        assert profile.remainder[kind][row, 3] == pytest.approx(float(left.norm() / wholes[3].norm()), 1e-4)
        assert np.isnan(profile.remainder[kind][row, 1])


def test_moves_are_those_of_the_latents():
    model, latents = tiny_latte(), []
    hook = model.register_forward_pre_hook(lambda _, args: latents.append(args[0]))
    with Profiler(model) as profiler:
        run(model)
        profile = profiler.profile(TIMESTEPS)
    hook.remove()
    moves = [float((new - old).norm() / new.norm()) for old, new in pairwise(latents)]
    expected = np.array([*moves, moves[-1]])
    assert profile.moves == pytest.approx(expected / expected.mean(), rel=1e-4)


def test_another_number_of_calls_is_refused():
    with Profiler(tiny_latte()) as profiler, pytest.raises(ValueError, match="timesteps: got 4, must be 0"):
        profiler.profile(TIMESTEPS)


def made_up(**curves: Any) -> Profile:
    """A profile of one block a kind, all measures alike; the first value counts for nothing."""
    arrays = {kind: np.array([[np.nan, *curve[1:]]]) for kind, curve in curves.items()}
    steps = len(next(iter(curves.values())))
    return Profile(tuple(1000.0 - 20 * i for i in range(steps)), arrays, arrays, arrays, arrays)


def test_the_file_reads_back(tmp_path):
    rng = np.random.default_rng(0)
    profile = made_up(spatial=rng.random(12), cross=rng.random(12))
    profile.to_csv(tmp_path / "p.csv")
    again = Profile.from_csv(tmp_path / "p.csv", profile.timesteps)
    assert again.kinds == ("spatial", "cross")
    np.testing.assert_allclose(again.impact["cross"], profile.impact["cross"], rtol=1e-5)
    with pytest.raises(ValueError, match="other timesteps than the 12"):
        Profile.from_csv(tmp_path / "p.csv", [t + 1 for t in profile.timesteps])
    good = (tmp_path / "p.csv").read_text().splitlines()
    for bad, words in (
        ("", "line 0: the columns are"),
        ("a,b\n1,2\n", "line 1: the columns are"),
        (f"{good[0]}\n{good[1]}\nspatial,x\n", "line 3: "),
        (f"{good[0]}\nspatial,1000000000,{good[1].split(',', 2)[2]}\n", "line 2: got 'spatial', block 1000000000"),
        (f"{good[0]}\nnone,{good[1].split(',', 1)[1]}\n", "line 2: got 'none'"),
    ):
        (tmp_path / "p.csv").write_text(bad)
        with pytest.raises(ValueError, match=rf"p\.csv is no profile, {words}"):
            Profile.from_csv(tmp_path / "p.csv", profile.timesteps)


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ([np.nan, 5, 3, 1.9, 1, 1.5, 3, 9], (3, 6)),
        ([np.nan, 1, 5, 5, 1, 2, 5, 1], (4, 6)),
        ([np.nan, 1, 1, 1], (1, 4)),
    ],
)
def test_flat_middle(curve, expected):
    assert flat_middle(np.array(curve)) == expected


def test_findings_tell_a_u_and_the_order():
    u = np.array([9, 9, 8, 4, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 4, 7, 8, 9.0])
    lines = findings(made_up(spatial=3 * u, temporal=2 * u, cross=u))
    assert "a U. Flat (within 2 times the smallest) at steps 3 to 16, timesteps 940 to 680: 100%" in lines[0]
    assert lines[3].endswith("spatial 6.86 > temporal 4.57 > cross 2.29; as the PAB document says.")


def test_findings_say_what_does_not_agree():
    falling = np.linspace(9, 1, 20)
    lines = findings(made_up(spatial=falling, temporal=2 * falling, cross=np.full(20, 0.1)))
    assert "no U" in lines[0]
    assert "temporal 10 > spatial 5 > cross 0.1; the PAB document says spatial > temporal > cross." in lines[3]
