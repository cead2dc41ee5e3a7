"""Which run is this: a call goes on with the current one, begins a new one of a pipeline, or is an error."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from pab_kernels.config import PABConfig
from pab_kernels.runtime.run import Forward, Run
from pab_kernels.runtime.timesteps import Timesteps
from pab_kernels.schedule import Schedule


class Runs:
    """The current run of a handle, and whose it is.

    A run of a bare transformer is announced. One of a pipeline begins where its scheduler has new timesteps, where the
    last one is over, and where a timestep goes back; it is planned over the scheduler's timesteps from the one that
    comes on. All else that does not fit the plan is an error.

    Parameters
    ----------
    config : PABConfig
    forwards : int
        Forwards of a step that have no name.
    pipeline : diffusers pipeline or None
    prepare : callable
        Called before a run begins; it may refuse it.
    """

    def __init__(self, config: PABConfig, forwards: int, pipeline: Any, prepare: Callable[[], None]) -> None:
        self.current: Run | None = None
        self._config = config
        self._forwards = forwards
        self._pipeline = pipeline
        self._prepare = prepare
        self._timesteps = Timesteps()
        self._scheduled: Any = None
        """The scheduler's timesteps that were seen last; kept, so that others are another tensor."""
        self._ended: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
        """Threads whose run was ended by another one's."""

    def begin(self, values: list[float], first_call: int = 0) -> Run:
        """Begin a run; see `PABHandle.begin`."""
        if not 0 <= first_call < max(len(values), 1):
            raise ValueError(f"first_call: got {first_call}, must be at least 0 and less than {len(values)}, the steps")
        run, old = Run(Schedule(self._config, values), first_call, self._forwards), self.current
        if old is not None and not old.over and old.thread is not None:
            self._ended.add(old.thread)
        self._ended.discard(threading.current_thread())
        self.current = None
        self._prepare()
        self._timesteps.begin()
        if self._pipeline is not None:
            self._scheduled = _scheduled(self._pipeline)
        self.current = run
        return run

    def checked(self) -> Run:
        """The current run, if this thread can go on with it."""
        run, me = self.current, threading.current_thread()
        if me in self._ended or (run is not None and run.thread not in (None, me)):
            raise ValueError(
                "this thread's run was ended by another thread's, or it has begun none: a handle serves one run at a "
                "time. Call begin(timesteps) for a new one, or give each thread a transformer and a handle of its own"
            )
        if run is None:
            raise ValueError("no run has begun: call begin(timesteps) before the transformer")
        if run.broken:
            raise ValueError("this run stopped in the middle of a step: call begin(timesteps) for a new one")
        return run

    def place(self, name: str | None, timestep: Tensor) -> tuple[Run, int, Forward, bool]:
        """Run, step and forward of a call, and whether the GPU has still to compare its timestep with the plan.

        Raises
        ------
        ValueError
            The call fits no run; the message says what to do.
        """
        if self._pipeline is not None and _scheduled(self._pipeline) is not self._scheduled:
            self._begin_scheduled(timestep)
        value, unchecked = self._timesteps.of(timestep)
        try:
            run = self.checked()
            return run, *run.place(name, value), unchecked
        except ValueError as error:
            if self._pipeline is None or not self._starts_over(value):
                raise self._explained(error) from None
        run = self._begin_scheduled(timestep)
        return run, *run.place(name, self._timesteps.of(timestep)[0]), False

    def _starts_over(self, value: float | None) -> bool:
        """Whether a call that does not fit the current run may be the first of another one of the pipeline."""
        run, me = self.current, threading.current_thread()
        if run is None:
            return False
        if me in self._ended or run.thread not in (None, me):
            # Only a whole run may follow another thread's: the rest of one that was ended looks like a late beginning.
            return run.over and (value is None or run.fits(0, value))
        return run.over or (value is not None and run.goes_back(value))

    def _begin_scheduled(self, timestep: Tensor) -> Run:
        """Begin a run over the pipeline's timesteps, from the one it really begins with: some pipelines skip a few."""
        self._timesteps.begin()
        first, _ = self._timesteps.of(timestep)
        scheduler, timesteps = self._pipeline.scheduler, _scheduled(self._pipeline)
        values = timesteps.tolist() if isinstance(timesteps, Tensor) else [float(t) for t in timesteps or ()]
        plan = Run(Schedule(self._config, values or [0.0]))
        start = next((step for step in range(len(values)) if first is not None and plan.fits(step, first)), None)
        if start is None:
            raise ValueError(
                f"timestep: the run begins at {first}, which is not among the timesteps of the pipeline's scheduler, "
                f"a {type(scheduler).__name__} with {_shortened(values)}. Where another pipeline or loop with a "
                "scheduler of its own calls this transformer, call handle.begin(scheduler.timesteps) before each run"
            )
        run = self.begin(values[start:])
        self._timesteps.of(timestep)
        return run

    def _explained(self, error: ValueError) -> ValueError:
        if self._pipeline is None:
            return error
        return ValueError(
            f"{error}. (The run is planned over the timesteps of the pipeline's scheduler; one with another scheduler, "
            "or a loop of your own, calls handle.begin(scheduler.timesteps) first.)"
        )


def _scheduled(pipeline: Any) -> Any:
    return getattr(pipeline.scheduler, "timesteps", None)


def _shortened(values: list[float]) -> str:
    return f"{values[:4]}".replace("]", ", ...]") if len(values) > 5 else f"{values}"
