"""Anything in any order, against the plain form: a result of the runtime is right, or there is an error; never stale.

100 sequences; ``PAB_SEQUENCES=2000`` makes a long run.
"""

from __future__ import annotations

import copy
import gc
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

from pab_kernels import PABConfig, accelerate
from pab_kernels.plain import PlainPAB
from pab_kernels.runtime.handle import PABHandle
from tests.family_tools import FAMILIES, Host, host, prediction, relative_error

PLANS = ((940.0, 820.0, 700.0, 580.0, 460.0), (700.0, 650.0, 600.0), (500.0,) * 4, (901.4, 333.3, 2.5))
CONFIGS = (
    PABConfig(),
    PABConfig(
        spatial_broadcast=True, spatial_threshold=(1, 950), spatial_range=2,
        temporal_broadcast=True, temporal_threshold=(100, 900), temporal_range=3,
        cross_broadcast=True, cross_threshold=(1, 950), cross_range=4,
    ),
    PABConfig(
        cross_broadcast=True, cross_threshold=(1, 950), cross_range=3,
        mlp_broadcast=True, mlp_threshold=(100, 900), mlp_range=2,
    ),
)  # fmt: skip
REFUSED = (ValueError, TypeError)


class Side:
    """An accelerated host and its twin, which runs the plain form with the same arguments."""

    def __init__(self, family: str, seed: int) -> None:
        self.made, self.twin = host(family, seed), host(family, seed)
        self.family = family
        self.handle: PABHandle | None = None
        self.plain: PlainPAB | None = None
        self.plan: tuple[float, ...] = ()
        self.step = 0
        self.wrapped: list[Any] = []
        self.stale = False
        """Whether something has happened after which a call may be refused until a run begins."""
        self.dead = False
        """Whether something has happened that refuses every run."""
        self.unknown = False
        """Whether nobody can say what the rest of this run would give."""
        self.owner: threading.Thread | None = None
        self.ended: set[threading.Thread] = set()

    def open(self, config: PABConfig, inference: bool) -> None:
        self.close(False)
        self.twin.model.load_state_dict(self.made.model.state_dict())
        with torch.inference_mode(inference):
            self.handle = accelerate(self.made.model, config)
        self.plain = PlainPAB(self.twin.model, config)
        self.plan, self.dead, self.unknown, self.owner = (), False, False, None
        self.ended.clear()

    def close(self, inference: bool) -> None:
        if self.handle is not None:
            with torch.inference_mode(inference):
                self.handle.close()
            assert self.plain is not None
            self.plain.close()
        self.handle = self.plain = None

    def begin(self, plan: tuple[float, ...]) -> None:
        assert self.handle is not None
        assert self.plain is not None
        try:
            self.handle.begin(plan)
        except REFUSED:
            assert self.dead, "a run that should begin was refused"
            return
        assert not self.dead, "a run began that should be refused"
        with torch.no_grad():
            state = dict(self.twin.model.named_parameters())
            for name, parameter in self.made.model.named_parameters():
                state[name].copy_(parameter)
        self.plain.begin(plan)
        me = threading.current_thread()
        if self.owner is not None and self.step < len(self.plan):
            self.ended.add(self.owner)
        self.ended.discard(me)
        self.plan, self.step, self.stale, self.unknown, self.owner = plan, 0, False, False, None

    def call(self, timestep: float, batch: int, scale: float, inference: bool) -> None:
        """One call of both; the runtime may refuse what the plan does not have."""
        if self.unknown:
            return
        generator = torch.Generator().manual_seed(self.step)
        shape = (batch, *self.made.shape[1:])
        latents = torch.randn(shape, generator=generator)
        given = {key: _rows(key, value, batch, scale) for key, value in self.made.given.items()}
        fits, me = self.step < len(self.plan) and timestep == self.plan[self.step], threading.current_thread()
        fits = fits and self.owner in (None, me) and me not in self.ended
        try:
            with torch.inference_mode(inference):
                got = prediction(self.made.model(latents, timestep=torch.full((batch,), timestep), **given))
        except REFUSED:
            allowed = self.stale or self.dead or not fits or batch > self.batch
            assert allowed, "a call that fits was refused"
            return
        assert fits, "a call that does not fit was accepted"
        assert not self.stale, "a call was accepted though its run had ended"
        with torch.no_grad():
            want = prediction(self.twin.model(latents, timestep=torch.full((batch,), timestep), **given))
        assert relative_error(got, want) < 2e-5, f"{self.family}: off by {relative_error(got, want):.1e}"
        self.step += 1
        self.batch, self.owner = batch, me

    batch = 2


def _rows(key: str, value: Any, batch: int, scale: float) -> Any:
    if not isinstance(value, Tensor) or key in ("height", "width", "fps"):
        return value
    rows = value[:batch] if len(value) > 1 else value
    return rows * scale if rows.is_floating_point() else rows


class Machine(RuleBasedStateMachine):
    """Two sides, which must not know of each other."""

    @initialize(family=st.sampled_from(list(FAMILIES)), other=st.sampled_from(list(FAMILIES)), data=st.data())
    def make(self, family: str, other: str, data: st.DataObject) -> None:
        self.sides = [Side(family, 1), Side(other, 2)]
        for side in self.sides:
            side.open(data.draw(st.sampled_from(CONFIGS)), data.draw(st.booleans()))
            side.begin(data.draw(st.sampled_from(PLANS)))

    def side(self, i: int) -> Side:
        return self.sides[i]

    sides_ = st.integers(0, 1)

    @rule(i=sides_, plan=st.sampled_from(PLANS))
    def begin(self, i: int, plan: tuple[float, ...]) -> None:
        if self.side(i).handle is not None:
            self.side(i).begin(plan)
            self.side(i).batch = 2

    @rule(i=sides_, steps=st.integers(1, 3), scale=st.sampled_from([1.0, 0.5]), inference=st.booleans())
    def steps(self, i: int, steps: int, scale: float, inference: bool) -> None:
        side = self.side(i)
        for _ in range(steps):
            if side.handle is not None and side.step < len(side.plan):
                side.call(side.plan[side.step], side.batch, scale, inference)

    @rule(i=sides_, timestep=st.sampled_from([940.0, 700.0, 650.0, 500.0, 2.5, 77.0]), inference=st.booleans())
    def any_call(self, i: int, timestep: float, inference: bool) -> None:
        if self.side(i).handle is not None:
            self.side(i).call(timestep, self.side(i).batch, 1.0, inference)

    @rule(i=sides_, plan=st.sampled_from(PLANS))
    def other_batch(self, i: int, plan: tuple[float, ...]) -> None:
        side = self.side(i)
        if side.handle is None or side.family == "open_sora":
            return
        if side.step and side.batch == 1:  # a larger one in the middle of a run is refused
            side.call(side.plan[min(side.step, len(side.plan) - 1)], 2, 1.0, False)
        side.begin(plan)
        if not side.dead:
            side.batch = 1
            side.call(plan[0], 1, 1.0, False)

    @rule(i=sides_)
    def abort(self, i: int) -> None:
        """An exception in the middle of a step, and the call that comes after it."""
        side = self.side(i)
        me = threading.current_thread()
        if side.handle is None or side.stale or side.unknown or side.step >= len(side.plan):
            return
        if side.owner not in (None, me) or me in side.ended:
            return
        adapter: Any = side.handle._adapter
        adapter.project_out = lambda *_: 1 / 0
        try:
            side.call(side.plan[side.step], side.batch, 1.0, False)
        except ZeroDivisionError:
            side.stale = True
        del adapter.project_out
        side.call(side.plan[side.step], side.batch, 1.0, False)

    @rule(i=sides_, work=st.sampled_from(["step", "run"]))
    def in_a_thread(self, i: int, work: str) -> None:
        side = self.side(i)
        if side.handle is None or side.dead:
            return
        raised: list[BaseException] = []

        def run() -> None:
            try:
                if work == "run":
                    side.begin(PLANS[1])
                    side.batch = 2
                if side.step < len(side.plan):
                    side.call(side.plan[side.step], side.batch, 1.0, False)
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if raised:
            raise raised[0]

    @rule(i=sides_, how=st.sampled_from(["in place", "data", "inference", "tables"]))
    def weights_change(self, i: int, how: str) -> None:
        """In place: a run that has begun may be refused, the next one sees them."""
        side = self.side(i)
        with torch.inference_mode() if how == "inference" else torch.no_grad():
            for name, parameter in side.made.model.named_parameters():
                if how != "tables" or name.endswith("scale_shift_table"):
                    (parameter.data if how == "data" else parameter).mul_(1.03)
        if side.step < len(side.plan):
            side.unknown = True

    @rule(i=sides_, how=st.sampled_from(["hook", "linear", "moved"]))
    def put_something_on(self, i: int, how: str) -> None:
        side = self.side(i)
        if side.handle is None or side.dead:
            return
        linears = [module for module in side.made.model.modules() if isinstance(module, nn.Linear)]
        undo: Callable[[], object]
        if how == "hook":
            undo = linears[3].register_forward_hook(lambda *_: None).remove
        elif how == "linear":
            old = linears[5].weight
            linears[5].weight = nn.Parameter(old.detach().clone(), requires_grad=False)
            undo = lambda: setattr(linears[5], "weight", old)  # noqa: E731
        else:
            held = linears[-1].weight.data
            linears[-1].weight.data = held.clone()
            undo = lambda: setattr(linears[-1].weight, "data", held)  # noqa: E731
        side.dead = True
        side.begin(PLANS[0])
        side.plan, side.owner = (), None
        undo()
        side.dead = False
        side.begin(PLANS[0])
        side.batch = 2

    @rule(i=sides_)
    def wrap(self, i: int) -> None:
        model = self.side(i).made.model
        inner = model.forward
        self.side(i).wrapped.append(vars(model).get("forward"))
        model.forward = lambda *args, **kwargs: inner(*args, **kwargs)

    @precondition(lambda self: any(side.wrapped for side in self.sides))
    @rule(i=sides_)
    def unwrap(self, i: int) -> None:
        side = self.side(i)
        if side.wrapped:
            inner = side.wrapped.pop()
            if inner is None:
                vars(side.made.model).pop("forward", None)
            else:
                side.made.model.forward = inner

    @rule(i=sides_, inference=st.booleans())
    def close(self, i: int, inference: bool) -> None:
        side = self.side(i)
        side.close(inference)
        assert not any(parameter.is_inference() for parameter in side.made.model.parameters())
        want = self._own(side)
        assert relative_error(self._host(side), want) < 1e-6

    def _own(self, side: Side) -> Tensor:
        side.twin.model.load_state_dict(side.made.model.state_dict())
        return side.twin.call(torch.ones(side.made.shape), 500.0)

    def _host(self, side: Side) -> Tensor:
        return side.made.call(torch.ones(side.made.shape), 500.0)

    @rule(i=sides_, config=st.sampled_from(CONFIGS), inference=st.booleans())
    def open(self, i: int, config: PABConfig, inference: bool) -> None:
        side = self.side(i)
        if side.handle is None and not side.wrapped:
            side.open(config, inference)
            side.batch = 2

    @rule(i=sides_)
    def drop(self, i: int) -> None:
        """Nobody keeps the handle."""
        side = self.side(i)
        if side.handle is not None:
            side.handle = None
            assert side.plain is not None
            side.plain.close()
            side.plain = None
            gc.collect()
            assert relative_error(self._host(side), self._own(side)) < 1e-6

    @rule(i=sides_)
    def copied(self, i: int) -> None:
        side = self.side(i)
        if not side.wrapped:
            twin = Host(copy.deepcopy(side.made.model), side.made.given, side.made.shape)
            fresh = host(side.family)
            fresh.model.load_state_dict(side.made.model.state_dict())
            x = torch.ones(side.made.shape)
            assert relative_error(twin.call(x, 500.0), fresh.call(x, 500.0)) < 1e-6

    @invariant()
    def parameters_are_normal(self) -> None:
        for side in getattr(self, "sides", []):
            assert not any(parameter.is_inference() for parameter in side.made.model.parameters())

    def teardown(self) -> None:
        with ExitStack():
            for side in getattr(self, "sides", []):
                side.close(False)


TestAnyOrder = Machine.TestCase
TestAnyOrder.settings = settings(
    max_examples=int(os.environ.get("PAB_SEQUENCES", "100")),
    stateful_step_count=20,
    deadline=None,
    phases=(Phase.generate,),  # a long run is to find things; whoever mends them may shrink
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
