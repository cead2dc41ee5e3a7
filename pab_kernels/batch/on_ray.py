"""Many workers through Ray: an actor a GPU, or a group of GPUs.

Ray places, starts and watches them; the driver alone keeps the manifest.

Rows of one shape follow each other, so an actor that asks for the next row seldom changes its shape. An actor has one
row at a time: when it dies, that row goes back to the head of the queue, and another actor is asked for in its place.
Nothing waits for that one, so a node that never comes back costs its share of the work and no more.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

import torch

from pab_kernels.batch.group import GroupWorker
from pab_kernels.batch.manifest import FAILED, record
from pab_kernels.batch.rows import Row
from pab_kernels.batch.run import Records
from pab_kernels.batch.work import Job, Worker
from pab_kernels.distributed.launch import RankError
from pab_kernels.measure.info import version

PATIENCE = 60.0
"""Seconds without any worker after which it is said that Ray has none."""
STORE_BYTES = 100 * 2**20
"""Ray's shared memory on this machine: rows are small, videos never pass through it."""


@contextmanager
def cluster() -> Iterator[None]:
    """Ray, connected: the cluster of RAY_ADDRESS, one that this process has joined already, or a new one here.

    A new one listens on the loopback alone and ends with the block; there is no dashboard, and no usage is reported.

    Raises
    ------
    ValueError
        Ray is not installed.
    ConnectionError
        There is no cluster at RAY_ADDRESS.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with redirect_stdout(sys.stderr), _ray():  # Ray prints what it hears of dying workers
        yield


@contextmanager
def _ray() -> Iterator[None]:
    with _own_sigterm():
        try:
            import ray
        except ImportError as error:
            raise ValueError(f"ray: needs `pip install pab-kernels[ray]`: {error}") from error
        joined = ray.is_initialized()
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if not joined and (address := os.environ.get("RAY_ADDRESS")):
            ray.init(address=address, **quiet)
        elif not joined:
            ray.init(
                address="local",
                _node_ip_address="127.0.0.1",
                include_dashboard=False,
                object_store_memory=STORE_BYTES,
                **quiet,
            )
    try:
        yield
    finally:
        if not joined:
            ray.shutdown()


def gpus() -> int:
    """How many GPUs the cluster has now."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def on_ray(
    job: Job, rows: Sequence[Row], workers: int | None = None, retries: int = 3, timeout: float | None = None
) -> Records:
    """The records of `rows`, in the order in which they are done.

    Parameters
    ----------
    job : Job
        Its paths must mean the same on every node.
    rows : sequence of Row
    workers : int, optional
        Actors to ask for, at most: an autoscaler adds nodes for them. By default as many as the cluster has GPUs for,
        or one.
    retries : int
        How often a row is done again whose actor died; then it is failed.
    timeout : float, optional
        Seconds after which an actor that is at a row counts as hung, and is killed. By default none is.

    Raises
    ------
    ValueError, TypeError, FileNotFoundError, RankError
        An actor cannot load the model.
    ChildProcessError
        Actors die while they load it, `retries` times in a row, and none is left.
    """
    pool = _Pool(job, min(len(rows), workers or max(1, gpus() // job.gpus)), retries, timeout)
    try:
        yield from pool.work(rows)
    finally:
        pool.end()


class _Pool:
    """Actors, and what each is at: loading the model (None), or a row."""

    def __init__(self, job: Job, workers: int, retries: int, timeout: float | None) -> None:
        import ray

        self.ray, self.job, self.workers, self.retries = ray, job, workers, retries
        self.timeout = math.inf if timeout is None else timeout
        self.identity = job.identity()
        on_gpu = torch.device(job.device).type == "cuda"
        cpus = job.gpus if on_gpu else max(job.threads, job.gpus)
        needs: dict[str, Any] = {"num_cpus": cpus} | ({"num_gpus": job.gpus} if on_gpu else {})
        self.wanted = f"{cpus} {'GPU' if on_gpu else 'CPU'}{'s' * (cpus > 1)} of a node"
        cls: Any = Worker if job.gpus == 1 else GroupWorker
        self.actor: Any = ray.remote(cls).options(max_restarts=0, **needs)
        self.busy: dict[Any, tuple[Any, Row | None]] = {}
        self.since: dict[Any, float] = {}
        """When each row was given to its actor."""
        self.idle: list[Any] = []
        self.broken = 0
        """Actors that died while loading, since the last that did not."""
        self.last = ""
        """Why the last one died."""

    def work(self, rows: Sequence[Row]) -> Iterator[Mapping[str, Any]]:
        waiting, deaths = deque(rows), Counter[str]()
        while True:
            while waiting and self.idle:
                self._give(self.idle.pop(), waiting.popleft())
            for _ in range(self._missing(len(waiting))):
                actor = self.actor.remote(self.job)
                self.busy[actor.load.remote(self.identity)] = (actor, None)
            if not waiting and all(row is None for _, row in self.busy.values()):
                return
            if not self.busy:
                raise ChildProcessError(f"ray: {self.broken} workers died while they loaded the model: {self.last}")
            actor, row, result, error = self._next()
            if error is None:
                self.broken = 0
                self.idle.append(actor)
                if row is not None:
                    yield result
                continue
            self.last = _first_line(error)
            with suppress(Exception):  # it may be dead already
                self.ray.kill(actor)
            if row is None:
                self.broken += 1
                continue
            deaths[row.id] += 1
            if deaths[row.id] <= self.retries:
                waiting.appendleft(row)
            else:
                message = f"its worker died {deaths[row.id]} times: {self.last}"
                yield record(row, FAILED, version=version("pab-kernels"), error=message)

    def end(self) -> None:
        """End all actors, whatever they are at."""
        for actor in [*self.idle, *(actor for actor, _ in self.busy.values())]:
            with suppress(Exception):
                self.ray.kill(actor)

    def _missing(self, waiting: int) -> int:
        """How many actors to start for rows that wait: those that are starting will take one each."""
        starting = sum(row is None for _, row in self.busy.values())
        return min(self.workers - len(self.busy), waiting - starting) if self.broken <= self.retries else 0

    def _give(self, actor: Any, row: Row) -> None:
        result = actor.make.remote(row)
        self.busy[result], self.since[result] = (actor, row), time.monotonic()

    def _next(self) -> tuple[Any, Row | None, Any, Exception | None]:
        """The actor that is ready first, what it was at, and its result or why it has none."""
        while True:
            left = min(self.since.values(), default=math.inf) + self.timeout - time.monotonic()
            ready, _ = self.ray.wait(list(self.busy), num_returns=1, timeout=max(0.0, min(PATIENCE, left)))
            if ready:
                break
            if left <= 0:
                hung = min(self.since, key=self.since.__getitem__)
                del self.since[hung]
                return *self.busy.pop(hung), None, TimeoutError(f"it was not done after {self.timeout:g} s")
            if all(row is None for _, row in self.busy.values()):
                warnings.warn(f"ray: no worker yet; each waits for {self.wanted}, or loads the model", stacklevel=2)
        actor, row = self.busy.pop(ready[0])
        self.since.pop(ready[0], None)
        try:
            return actor, row, self.ray.get(ready[0]), None
        except self.ray.exceptions.RayTaskError as error:
            cause = error.cause
            if row is None and _is_of_all(cause):
                raise cause from None
            return actor, row, None, error
        except self.ray.exceptions.RayError as error:
            return actor, row, None, error


def _is_of_all(error: Exception) -> bool:
    """Whether a worker that cannot load the model says what every other would say too."""
    if isinstance(error, RankError):
        return not error.died and error.trace is None
    return isinstance(error, ValueError | TypeError | FileNotFoundError)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray puts a handler of its own for SIGTERM: the one that is there comes back."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if main else None
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
