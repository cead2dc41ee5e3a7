"""accelerate: the same numbers as the host, no stale slots, and a host that is restored bit for bit."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from pab_kernels import PABConfig, accelerate
from pab_kernels.plain import PlainPAB
from pab_kernels.runtime.executor import Executor
from tests.latte_tools import FRAMES, call, inputs, tiny_latte

TIMESTEPS = [900.0, 700.0, 600.0, 500.0, 400.0, 50.0]
EVERYTHING = PABConfig(
    spatial_broadcast=True, spatial_threshold=(100, 800), spatial_range=2,
    temporal_broadcast=True, temporal_threshold=(100, 800), temporal_range=3,
    cross_broadcast=True, cross_threshold=(100, 800), cross_range=4,
    mlp_broadcast=True, mlp_threshold=(100, 800), mlp_range=2,
)  # fmt: skip


def run(model: nn.Module, timesteps=TIMESTEPS, seed: int = 0, **shape) -> Tensor:
    """A denoising-like loop; the latents after every step."""
    latents, text = inputs(seed=seed, **shape)
    steps = []
    for t in timesteps:
        latents = latents - 0.1 * call(model, latents, text, t)[:, :4]
        steps.append(latents)
    return torch.stack(steps)


class Pipeline:
    """The part of a diffusers pipeline that accelerate looks at."""

    def __init__(self, model: nn.Module) -> None:
        self.transformer = model
        self.scheduler: Any = DDIMScheduler()

    def __call__(self, steps: int = 6, fail_at: int = -1, seed: int = 0, skip: int = 0, **shape) -> Tensor:
        self.scheduler.set_timesteps(steps)
        latents, text = inputs(seed=seed, **shape)
        for i, t in enumerate(self.scheduler.timesteps[skip:]):
            if i == fail_at:
                raise RuntimeError("cancelled")
            latents = latents - 0.1 * call(self.transformer, latents, text, float(t))[:, :4]
        return latents


def plain_run(model: nn.Module, config: PABConfig) -> Tensor:
    with PlainPAB(model, config) as plain:
        plain.begin(TIMESTEPS)
        return run(model)


def test_without_pab_it_is_the_host():
    model = tiny_latte()
    expected = run(model)
    with accelerate(model, PABConfig()) as handle:
        handle.begin(TIMESTEPS)
        torch.testing.assert_close(run(model), expected, atol=2e-5, rtol=2e-5)
        assert len(handle.caches[0]) == 0, "a branch that never broadcasts has no slot"


def test_with_pab_it_is_the_plain_form():
    model = tiny_latte()
    expected = plain_run(model, EVERYTHING)
    with accelerate(model, EVERYTHING) as handle:
        handle.begin(TIMESTEPS)
        torch.testing.assert_close(run(model), expected, atol=2e-5, rtol=2e-5)
    assert (expected - run(model)).abs().max() > 1e-3, "the config must really broadcast"


def test_slots_start_as_nan_and_no_nan_gets_out(monkeypatch):
    model = tiny_latte()
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(make):
        def wrapper(*args, **kwargs):
            result = make(*args, **kwargs)
            return result.fill_(float("nan")) if result.is_floating_point() else result

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(empty_like))
    with accelerate(model, EVERYTHING) as handle:
        handle.begin(TIMESTEPS)
        assert run(model).isfinite().all()


def test_block_ranges_limit_slots_and_broadcasts():
    limited = PABConfig(spatial_broadcast=True, spatial_threshold=(100, 800), spatial_range=2, spatial_block=(1, 2))
    model = tiny_latte()
    with accelerate(model, limited) as handle:
        handle.begin(TIMESTEPS)
        some = run(model)
        assert [(key.kind, key.position) for key in handle.caches[0]] == [("spatial", 2)]
    none = run(model)
    with accelerate(model, PABConfig(spatial_broadcast=True, spatial_threshold=(100, 800), spatial_range=2)) as handle:
        handle.begin(TIMESTEPS)
        everything = run(model)
    assert not torch.allclose(some, none)
    assert not torch.allclose(some, everything)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("fail", [False, True])
def test_leaving_restores_the_host_bit_for_bit(fail):
    model = tiny_latte()
    before, output = state(model), run(model)
    pointers = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert len(pointers) == len(list(model.parameters()))
    try:
        with accelerate(model, EVERYTHING) as handle:
            handle.begin(TIMESTEPS)
            run(model)
            if fail:
                raise RuntimeError("cancelled")
    except RuntimeError:
        assert fail
    assert "forward" not in model.__dict__
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(pointers)
    assert torch.equal(run(model), output)


def test_weights_are_not_doubled():
    model = tiny_latte()
    with accelerate(model, PABConfig()):
        block = model.transformer_blocks[0]
        storages = {getattr(block.attn1, f"to_{n}").weight.untyped_storage().data_ptr() for n in "qkv"}
        assert len(storages) == 1


def test_pipeline_runs_are_noticed_and_start_clean():
    model = tiny_latte()
    fresh = Pipeline(model)
    with accelerate(fresh, EVERYTHING):
        expected = fresh()
    pipe = Pipeline(model)
    with accelerate(pipe, EVERYTHING) as handle:
        with pytest.raises(RuntimeError, match="cancelled"):
            pipe(fail_at=3, seed=5)
        assert torch.equal(pipe(), expected), "after an exception mid-run"
        pipe(steps=9, seed=6)
        assert torch.equal(pipe(), expected), "after another step count"
        pipe(batch=1, seed=7)
        assert torch.equal(pipe(), expected), "after another batch"
        pipe(size=12, seed=8)
        assert torch.equal(pipe(), expected), "after another resolution"
        pipe(frames=1, seed=9)
        assert torch.equal(pipe(), expected), "after another frame count"
        report = handle.report()
        assert (report.calls, report.computed["spatial"] + report.broadcast["spatial"]) == (6, 6)
        assert report.cache_bytes == handle.caches[0].nbytes > 0


def test_failure_inside_a_step_does_not_leak_into_the_next_run(monkeypatch):
    model = tiny_latte()
    with accelerate(model, EVERYTHING) as handle:
        handle.begin(TIMESTEPS)
        expected = run(model)
        handle.begin(TIMESTEPS)
        latents, text = inputs(seed=3)
        call(model, latents, text, TIMESTEPS[0])
        with monkeypatch.context() as patch:
            patch.setattr(Executor, "step", lambda *args, **kwargs: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                call(model, latents, text, TIMESTEPS[1])
        with pytest.raises(ValueError, match="begin"):
            call(model, latents, text, TIMESTEPS[1])
        handle.begin(TIMESTEPS)
        assert torch.equal(run(model), expected)


def test_two_handles_do_not_touch_each_other():
    one, two = tiny_latte(0), tiny_latte(1)
    expected = []
    for model in (one, two):
        with accelerate(model, EVERYTHING) as handle:
            handle.begin(TIMESTEPS)
            expected.append(run(model))
    with accelerate(one, EVERYTHING) as first, accelerate(two, EVERYTHING) as second:
        first.begin(TIMESTEPS)
        second.begin(TIMESTEPS)
        states = [inputs(), inputs()]
        results: list[list[Tensor]] = [[], []]
        for t in TIMESTEPS:
            for i, model in enumerate((one, two)):
                latents, text = states[i]
                latents = latents - 0.1 * call(model, latents, text, t)[:, :4]
                states[i] = (latents, text)
                results[i].append(latents)
    for got, want in zip(results, expected, strict=True):
        assert torch.equal(torch.stack(got), want)


def test_conditional_and_unconditional_forwards_have_a_cache_each():
    model = tiny_latte()
    expected = []
    for seed in (0, 1):
        with accelerate(model, EVERYTHING) as handle:
            handle.begin(TIMESTEPS)
            expected.append(run(model, seed=seed))
    with accelerate(model, EVERYTHING, forwards_per_step=2) as handle:
        for _ in range(2):
            handle.begin(TIMESTEPS)
            states = [inputs(seed=0), inputs(seed=1)]
            results: list[list[Tensor]] = [[], []]
            for t in TIMESTEPS:
                for i in range(2):
                    latents, text = states[i]
                    latents = latents - 0.1 * call(model, latents, text, t)[:, :4]
                    states[i] = (latents, text)
                    results[i].append(latents)
            for got, want in zip(results, expected, strict=True):
                assert torch.equal(torch.stack(got), want)
            with pytest.raises(ValueError, match="steps are over"):
                call(model, *inputs(), 50.0)
        assert len(handle.caches) == 2
    with pytest.raises(ValueError, match="forwards_per_step"):
        accelerate(model, EVERYTHING, forwards_per_step=0)


def test_pipeline_that_skips_the_first_timesteps_is_planned_from_where_it_begins():
    pipe = Pipeline(tiny_latte())
    with accelerate(pipe, EVERYTHING) as handle:
        pipe(skip=2)
        assert handle.schedule is not None
        assert handle.schedule.timesteps == tuple(float(t) for t in pipe.scheduler.timesteps[2:])


def test_new_text_is_seen_also_when_changed_in_place():
    model = tiny_latte()
    latents, text = inputs()
    with accelerate(model, PABConfig()) as handle:
        handle.begin([500, 500, 500])
        first = call(model, latents, text, 500)
        text.add_(1.0)
        second = call(model, latents, text, 500)
        third = call(model, latents, text.clone() - 1.0, 500)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(first, third, atol=1e-5, rtol=1e-5)


def test_shape_may_not_change_within_a_run():
    model = tiny_latte()
    with accelerate(model, EVERYTHING) as handle:
        handle.begin(TIMESTEPS)
        call(model, *inputs(), 900)
        for other in (inputs(batch=3), inputs(size=16), inputs(frames=1)):  # fewer rows may be: see test_smaller_batch
            with pytest.raises(ValueError, match="began with"):
                call(model, *other, 700)


def test_calls_outside_a_run_are_errors():
    model = tiny_latte()
    with accelerate(model, EVERYTHING) as handle:
        with pytest.raises(ValueError, match="begin"):
            call(model, *inputs(), 900)
        handle.begin([900])
        call(model, *inputs(), 900)
        with pytest.raises(ValueError, match="steps are over"):
            call(model, *inputs(), 800)


def test_weights_moved_inside_a_handle_are_noticed():
    model = tiny_latte()
    with accelerate(model, PABConfig()) as handle:
        nn.Module.to(model, torch.float64)
        with pytest.raises(ValueError, match="moved, cast or replaced"):
            handle.begin(TIMESTEPS)


class WrappedLinear(nn.Linear):
    """Stands in for LoRA or a quantised linear."""


def wrapped(model):
    old = model.transformer_blocks[1].attn1.to_q
    model.transformer_blocks[1].attn1.to_q = WrappedLinear(old.in_features, old.out_features)


def hooked(model):
    model.temporal_transformer_blocks[0].ff.net[2].register_forward_hook(lambda *args: None)


def processor(model):
    model.transformer_blocks[0].attn2.processor = object()


def replaced(model):
    model.forward = lambda *args: None


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (wrapped, ["transformer_blocks.1.attn1.to_q", "WrappedLinear", "Linear"]),
        (hooked, ["temporal_transformer_blocks.0.ff.net.2", "hook"]),
        (processor, ["transformer_blocks.0.attn2.processor", "object", "AttnProcessor2_0"]),
        (replaced, ["forward is replaced"]),
    ],
)
def test_what_the_executor_would_skip_over_is_refused(spoil, words):
    model = tiny_latte()
    spoil(model)
    before = state(model)
    with pytest.raises(TypeError) as caught:
        accelerate(model, PABConfig())
    for word in words:
        assert word in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"latents": torch.randn(2, 3, FRAMES, 8, 8)}, r"hidden_states.*\[B, 4, T, H, W\]"),
        ({"latents": torch.randn(2, 4, FRAMES, 7, 8)}, "patch size 2"),
        ({"latents": torch.randn(2, 4, 2, 8, 8)}, "2 frames, must be 3"),
        ({"latents": torch.randn(2, 4, FRAMES, 8, 8).double()}, "torch.float64"),
        (
            {"encoder_hidden_states": torch.randn(5, 6)},
            r"encoder_hidden_states: shape is \[5, 6\], must be \[2, L, 6\]",
        ),
        ({"encoder_hidden_states": torch.randn(1, 5, 6)}, "encoder_hidden_states: shape"),
        ({"encoder_hidden_states": torch.randn(2, 5, 7)}, "encoder_hidden_states: shape"),
        ({"timestep": torch.ones(3)}, r"timestep: shape is \[3\], must be \[2\]"),
        ({"encoder_attention_mask": torch.ones(2, 5)}, "encoder_attention_mask"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_unsupported_calls_are_named(arguments, match):
    model = tiny_latte()
    latents, text = inputs()
    latents = arguments.pop("latents", latents)
    with accelerate(model, PABConfig()) as handle:
        handle.begin(TIMESTEPS)
        with pytest.raises(ValueError, match=match):
            model(latents, **{"timestep": torch.tensor([5.0, 5.0]), "encoder_hidden_states": text, **arguments})


@pytest.mark.parametrize("target", [object(), nn.Linear(2, 2), None])
def test_accelerate_names_what_it_takes(target):
    with pytest.raises(TypeError, match="must be a"):
        accelerate(target, PABConfig())
    with pytest.raises(TypeError, match="PABConfig"):
        accelerate(tiny_latte(), {})  # type: ignore[arg-type]


def test_closing_twice_is_fine_and_a_second_handle_is_refused_while_one_is_open():
    model = tiny_latte()
    handle = accelerate(model, PABConfig())
    with pytest.raises(TypeError, match="replaced already"):
        accelerate(model, PABConfig())
    handle.close()
    handle.close()
    accelerate(model, PABConfig()).close()
