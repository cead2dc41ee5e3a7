"""What stands on a transformer while it is accelerated: wrappers, copies, compilation, modes, and how it goes away."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pab_kernels import PABConfig, accelerate
from pab_kernels.plain import PlainPAB
from pab_kernels.runtime.handle import handle_of
from tests.family_tools import FAMILIES, PAB, STEPS, Host, host, relative_error


@pytest.fixture(params=FAMILIES)
def made(request: pytest.FixtureRequest) -> Host:
    return host(request.param)


def run(made: Host, handle: Any) -> Tensor:
    handle.begin(STEPS)
    return made.run()


def plain(made: Host) -> Tensor:
    with PlainPAB(made.model, PAB) as handle:
        handle.begin(STEPS)
        return made.run()


def storages(model: nn.Module) -> int:
    return len({parameter.untyped_storage().data_ptr() for parameter in model.parameters()})


# Wrappers around the runtime's forward


def wrap(model: Any) -> tuple[Any, list[int]]:
    """As an offloading hook or a cache does it: the forward that was there, and what counts the calls."""
    inner, calls = model.forward, []

    def outer(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(*args, **kwargs)

    model.forward = outer
    return inner, calls


def test_a_wrapper_stays_when_the_runtime_goes_and_the_host_runs_inside_it(made: Host) -> None:
    want, fast = made.run(), plain(made)
    handle: Any = accelerate(made.model, PAB)
    inner, calls = wrap(made.model)
    assert handle_of(made.model) is None
    assert relative_error(run(made, handle), fast) < 1e-5
    handle.close()
    assert torch.equal(made.run(), want)
    assert len(calls) == 2 * len(STEPS)
    with pytest.raises(TypeError, match="forward is replaced already"):
        accelerate(made.model, PAB)
    made.model.forward = inner  # what a hook's removal does
    assert torch.equal(made.run(), want)
    assert "forward" not in vars(made.model), "the runtime's last trace has gone with the first call"
    made.model.forward = inner
    with accelerate(made.model, PAB) as again:
        assert relative_error(run(made, again), fast) < 1e-5
    assert "forward" not in vars(made.model)


def test_a_wrapper_that_goes_before_the_runtime(made: Host) -> None:
    fast = plain(made)
    handle = accelerate(made.model, PAB)
    inner, _ = wrap(made.model)
    wrap(made.model)
    made.model.forward = inner
    assert handle_of(made.model) == handle
    assert relative_error(run(made, handle), fast) < 1e-5
    handle.close()
    assert "forward" not in vars(made.model)


def test_a_forward_that_was_taken_away_does_not_stop_the_closing(made: Host) -> None:
    want = made.run()
    handle = accelerate(made.model, PAB)
    del made.model.forward
    handle.close()
    assert torch.equal(made.run(), want)
    assert storages(made.model) == len(list(made.model.parameters()))


def test_the_signature_is_the_transformers(made: Host) -> None:
    before = inspect.signature(made.model.forward)
    with accelerate(made.model, PAB):
        assert inspect.signature(made.model.forward) == before


# Closing


def test_a_closed_handle_refuses_all_and_reports_what_was(made: Host) -> None:
    with accelerate(made.model, PAB) as handle:
        run(made, handle)
        before = handle.report()
    assert handle.report() == before
    assert before.calls == len(STEPS)
    assert before.slots > 0
    with pytest.raises(ValueError, match="the handle is closed"):
        handle.begin(STEPS)


def test_weights_are_freed_though_the_closed_handle_lives(made: Host) -> None:
    handle = accelerate(made.model, PAB)
    run(made, handle)
    fused = [weakref.ref(parameter.untyped_storage()) for parameter in made.model.parameters()]
    slots = weakref.ref(handle.caches[0].slots)
    stack = weakref.ref(handle._adapter.stack)
    handle.close()
    gc.collect()
    assert slots() is None
    assert stack() is None
    assert fused


def test_a_handle_that_nobody_keeps_gives_the_host_back(made: Host, caplog: pytest.LogCaptureFixture) -> None:
    want = made.run()
    handle = accelerate(made.model, PAB)
    run(made, handle)
    del handle
    gc.collect()
    assert "forward" not in vars(made.model)
    assert "without close()" in caplog.text
    assert torch.equal(made.run(), want)
    assert storages(made.model) == len(list(made.model.parameters()))
    accelerate(made.model, PAB).close()


def test_a_context_keeps_its_handle_without_a_name(made: Host) -> None:
    with accelerate(made.model, PAB):
        gc.collect()
        found = handle_of(made.model)
        assert found is not None
        run(made, found)


# Copies


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: Any) -> Any:
    memory = io.BytesIO()
    torch.save(model, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=False)


@pytest.mark.parametrize("how", [copy.deepcopy, pickled, saved])
def test_a_copy_of_an_accelerated_transformer_runs_its_own_code(made: Host, how: Callable[[Any], Any]) -> None:
    want = made.run()
    with accelerate(made.model, PAB) as handle:
        twin = Host(how(made.model), made.given, made.shape)
        fast = run(made, handle)
        assert relative_error(twin.run(), want) < 1e-6, "while the first is accelerated"
        assert torch.equal(run(made, handle), fast)
    assert relative_error(twin.run(), want) < 1e-6, "and after"
    assert "forward" not in vars(twin.model)
    with accelerate(twin.model, PAB) as handle:
        assert relative_error(run(twin, handle), fast) < 1e-6
    with torch.no_grad():
        for parameter in twin.model.parameters():
            parameter.zero_()
    assert torch.equal(made.run(), want), "a copy has weights of its own"


def test_handles_are_not_copied(made: Host) -> None:
    with accelerate(made.model, PAB) as handle:
        for how in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot be copied or pickled"):
                how(handle)


# Modes


def test_inference_mode_anywhere(made: Host) -> None:
    want, before = plain(made), made.run()
    for opening in (False, True):
        for closing in (False, True):
            with torch.inference_mode(opening):
                handle = accelerate(made.model, PAB)
            for inside in (False, True, False, True):
                with torch.inference_mode(inside):
                    assert relative_error(run(made, handle), want) < 1e-5
            with torch.inference_mode(closing):
                handle.close()
            assert not any(parameter.is_inference() for parameter in made.model.parameters())
            assert torch.equal(made.run(), before)
            with torch.no_grad():
                next(made.model.parameters()).mul_(1.0)


def test_a_host_made_in_inference_mode() -> None:
    for family in FAMILIES:
        with torch.inference_mode():
            inner = host(family)
            want = plain(inner)
        for mode in (True, False):
            with torch.inference_mode(mode), accelerate(inner.model, PAB) as handle:
                assert relative_error(run(inner, handle), want) < 1e-5
                with torch.inference_mode():
                    for parameter in inner.model.parameters():
                        parameter.mul_(1.01)
                    changed = run(inner, handle)
                    for parameter in inner.model.parameters():
                        parameter.div_(1.01)
                assert relative_error(changed, want) > 1e-4
                assert relative_error(run(inner, handle), want) < 1e-4


def test_arguments_changed_in_place_in_inference_mode_are_seen(made: Host) -> None:
    key = next(key for key in ("encoder_hidden_states", "y") if key in made.given)
    x = torch.randn(made.shape)
    with torch.inference_mode():
        text = made.given[key].clone()
        first = made.call(x, STEPS[0], **{key: text})
        text.mul_(2)
        second = made.call(x, STEPS[0], **{key: text})
        text.div_(2)
        with accelerate(made.model, PABConfig()) as handle:
            handle.begin([STEPS[0]] * 3)
            assert relative_error(made.call(x, STEPS[0], **{key: text}), first) < 1e-5
            text.mul_(2)
            assert relative_error(made.call(x, STEPS[0], **{key: text}), second) < 1e-5
            text.div_(2)
            assert relative_error(made.call(x, STEPS[0], **{key: text}), first) < 1e-5


def test_autocast_is_refused_by_name_or_without_effect(made: Host) -> None:
    want = plain(made)
    with accelerate(made.model, PAB) as handle:
        for dtype in (torch.bfloat16, torch.float16):
            with (
                torch.autocast("cpu", dtype),
                pytest.raises(ValueError, match=rf"autocast: to {dtype} over weights of"),
            ):
                handle.begin(STEPS)
        handle.begin(STEPS)
        x = torch.randn(made.shape)
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast"):
            made.call(x, STEPS[0])
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            assert relative_error(made.run(), want) < 1e-5, "the refused call leaves the run as it was"


def test_weights_of_the_dtype_of_autocast() -> None:
    made = host("latte")
    nn.Module.to(made.model, torch.bfloat16)
    given = {key: value.bfloat16() if isinstance(value, Tensor) else value for key, value in made.given.items()}
    x, t = torch.randn(made.shape).bfloat16(), torch.full((2,), STEPS[0])
    with accelerate(made.model, PABConfig()) as handle:
        handle.begin(STEPS[:1])
        want = made.model(x, timestep=t, **given)[0]
        with torch.autocast("cpu", torch.bfloat16):
            handle.begin(STEPS[:1])
            assert torch.equal(made.model(x, timestep=t, **given)[0], want)


# torch.compile


class Counted:
    """A backend of torch.compile, and how many graphs it was given."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return graph.forward


@pytest.mark.parametrize("part", ["whole", "blocks", "wrapper", "wrapper, full graph"])
def test_a_compiled_transformer_runs_its_own_modules_meanwhile(part: str, caplog: pytest.LogCaptureFixture) -> None:
    made, backend = host("latte"), Counted()
    want = plain(made)
    outer: Any = made.model
    if part == "whole":
        made.model.compile(backend=backend)
    elif part == "blocks":
        for block in made.model.transformer_blocks:
            block.compile(backend=backend)
    else:
        outer = torch.compile(made.model, backend=backend, fullgraph="full" in part)
    compiled = Host(outer, made.given, made.shape)
    before = {name: vars(module).get("_compiled_call_impl") for name, module in made.model.named_modules()}
    with accelerate(outer, PAB) as handle:
        assert handle.transformer is made.model
        assert "compiled" in caplog.text
        assert relative_error(run(compiled, handle), want) < 1e-5
        assert handle.report().calls == len(STEPS)
        assert backend.count == 0, "nothing of the runtime is traced"
    assert before == {name: vars(module).get("_compiled_call_impl") for name, module in made.model.named_modules()}
    assert "forward" not in vars(made.model)
    if part != "wrapper, full graph":  # the hosts themselves have breaks
        compiled.run(STEPS[:1])
        assert backend.count > 0, "it is compiled again"


def test_a_compiled_forward_is_named() -> None:
    made = host("latte")
    made.model.forward = torch.compile(made.model.forward, backend="eager")
    with pytest.raises(TypeError, match=r"forward is replaced already.*torch\.compile"):
        accelerate(made.model, PAB)
