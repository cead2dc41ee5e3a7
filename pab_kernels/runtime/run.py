"""One denoising run: a plan, and which of its steps and forwards a call is."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pab_kernels.schedule import Schedule, StepVariant

Forward = str | int
"""A forward of a step: its name, as diffusers' ``cache_context`` says it, or its index where it has none."""


class Mismatch(ValueError):
    """A call does not fit the run."""


@dataclass
class Run:
    """One denoising run: a plan, and how far each forward of a step has come. It is never resumed after an error.

    Attributes
    ----------
    schedule : Schedule
    first_call : int
        The step that comes first; those before it are left out.
    forwards : int
        How many forwards without a name a step has.
    thread : threading.Thread or None
        Whose run it is: the thread of its first call.
    broken : bool
        A call failed half-way.
    guided : bool
        Whether its calls hold both halves of guidance, as far as the caller says.
    """

    schedule: Schedule
    first_call: int = 0
    forwards: int = 1
    thread: threading.Thread | None = None
    broken: bool = False
    guided: bool = True
    shapes: dict[Forward, torch.Size] = field(default_factory=dict)
    """Of each forward's latents."""
    clock: list[tuple[StepVariant, Any, Any]] = field(default_factory=list)
    roundings: list[list[float]] = field(init=False, repr=False)
    """For each step what its timestep may be."""
    _calls: int = 0
    """Calls without a name that are done."""
    _steps: dict[str, int] = field(default_factory=dict)
    """The step that each forward with a name did last."""

    def __post_init__(self) -> None:
        self.roundings = roundings(self.schedule.timesteps).tolist()

    @property
    def _last(self) -> int:
        """The last step that has begun."""
        unnamed = self.first_call - 1 - -self._calls // self.forwards
        return max([unnamed, *self._steps.values()])

    @property
    def begun(self) -> bool:
        """Whether there was a call."""
        return bool(self._calls or self._steps)

    @property
    def over(self) -> bool:
        """Whether the last step has begun; some of its forwards may still be to come."""
        return self._last == len(self.schedule) - 1

    def place(self, name: str | None, timestep: float | None) -> tuple[int, Forward]:
        """The step and the forward of a call.

        Parameters
        ----------
        name : str or None
            Of the forward.
        timestep : float or None
            As far as the host knows it. None takes the next step for granted.

        Raises
        ------
        Mismatch
            The timestep is not that of this forward's next step, or the run is over.
        """
        if name is None:
            step, forward = divmod(self._calls, self.forwards)
            return self._expect(step + self.first_call, timestep), forward
        last, newest = (
            self._steps.get(name, self.first_call - 1),
            max(self._steps.values(), default=self.first_call - 1),
        )
        # A forward that others have overtaken joins the step they are at; or it is the first at the next one.
        steps = [newest + 1] if last == newest else [newest, newest + 1]
        for step in steps[:-1]:
            if timestep is None or self.fits(step, timestep):
                return step, name
        return self._expect(steps[-1], timestep), name

    def number(self, forward: Forward) -> int:
        """Which of a step's forwards this is, by their names in the order in which they first came."""
        if isinstance(forward, int):
            return forward
        names = [name for name in self._steps if name != forward]
        return list(self._steps).index(forward) if forward in self._steps else len(names)

    def skipped(self, name: Forward, step: int) -> bool:
        """Whether the forward missed the step before this one, so that its slots are older than the plan thinks."""
        return isinstance(name, str) and self._steps.get(name, self.first_call - 1) != step - 1

    def done(self, forward: Forward, step: int, shape: torch.Size) -> None:
        """A call is complete, whose latents had this shape."""
        self.shapes[forward] = shape
        if isinstance(forward, str):
            self._steps[forward] = step
        else:
            self._calls += 1

    def expect(self, forward: Forward, step: int, shape: torch.Size) -> None:
        """A call comes whose latents have this shape: that of the forward's others, or with guidance ended.

        Raises
        ------
        ValueError
            Another shape.
        """
        before = self.shapes.get(forward, shape)
        if shape[1:] == before[1:] and shape[0] < before[0]:
            self.resume(step)
        elif shape != before:
            raise ValueError(
                f"hidden_states: shape is {list(shape)}, but this run began with {list(before)}: call "
                "begin(timesteps) for a new one"
            )

    def resume(self, step: int) -> None:
        """From `step` on another batch comes, as where guidance ends: nothing that was kept may be read by it.

        What is left of a batch is not known to be two halves, so its guidance is not broadcast.

        Raises
        ------
        Mismatch
            Another forward of this step is done already.
        """
        if self._last >= step:
            raise Mismatch(f"step {step}: its forwards differ in their batches: call begin(timesteps) for a new run")
        self.schedule = self.schedule.resumed(step)
        self.guided = False
        self.shapes.clear()

    def goes_back(self, timestep: float) -> bool:
        """Whether a step before the last one has this timestep: the loop has started over."""
        return any(self.fits(step, timestep) for step in range(self.first_call, self._last)) and not self.fits(
            self._last, timestep
        )

    def fits(self, step: int, timestep: float) -> bool:
        """Whether `timestep` is that of a step, or what is left of it after rounding to a dtype."""
        return step < len(self.roundings) and timestep in self.roundings[step]

    def _expect(self, step: int, timestep: float | None) -> int:
        if step >= len(self.schedule):
            raise Mismatch(f"the run's {len(self.schedule)} steps are over: call begin(timesteps) for a new one")
        if timestep is None or self.fits(step, timestep):
            return step
        planned, inside = self.schedule.timesteps[step], self._calls % self.forwards
        text = f"timestep: got {timestep:g}, but step {step} of this run has {planned:g}"
        if inside:
            raise Mismatch(
                f"{text}, and {self.forwards} forwards: give accelerate() the forwards_per_step that there are, "
                f"{inside} so far, or call begin(timesteps) for a new run"
            )
        if step > self.first_call and self.fits(step - 1, timestep):
            raise Mismatch(
                f"{text}. A second call with the timestep of step {step - 1}: where guidance calls the transformer "
                f"twice a step, give accelerate() forwards_per_step={self.forwards + 1}; for a new run call "
                "begin(timesteps)"
            )
        raise Mismatch(f"{text}: call begin(timesteps) for a new run, with the timesteps that come")


def roundings(timesteps: Sequence[float]) -> Tensor:
    """For each timestep what callers make of it when they cast it: float64 [N, 6], the first as it is."""
    exact = torch.tensor(timesteps, dtype=torch.float64)
    single = exact.float()
    halves = [single.to(dtype) for dtype in (torch.bfloat16, torch.float16)]
    return torch.stack([each.double() for each in (exact, single, *halves, exact.trunc(), exact.round())], dim=1)
