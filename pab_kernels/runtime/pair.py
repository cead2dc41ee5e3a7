"""The runtimes behind a pipeline that has two transformers, of which one runs at a time: Wan 2.2."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType

from pab_kernels.runtime.cache import BroadcastCache
from pab_kernels.runtime.handle import PABHandle
from pab_kernels.runtime.report import Report


class PABHandles:
    """A handle for each transformer, in the order in which they run; made by `accelerate`.

    Each has a plan of its own, over the steps that are its own, and counts calls from its first. Where their slots are
    alike they lie in the same memory: what the other one wrote is never read.

    Attributes
    ----------
    handles : tuple of PABHandle
        For a loop of your own: announce each one's run, ``handles[0].begin(timesteps)``, before its first step.
    """

    def __init__(self, handles: Sequence[PABHandle]) -> None:
        self.handles = tuple(handles)
        self._report: Report | None = None

    @property
    def is_open(self) -> bool:
        """Whether `close` is still to come."""
        return any(handle.is_open for handle in self.handles)

    @property
    def caches(self) -> tuple[BroadcastCache, ...]:
        """The slots of all, a cache for each forward of a step of each transformer."""
        return tuple(cache for handle in self.handles for cache in handle.caches)

    def __enter__(self) -> PABHandles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Restore the transformers bit for bit and free the slots. Closing twice does nothing."""
        if self.is_open:
            self._report = self.report()
        with ExitStack() as stack:
            for handle in self.handles:
                stack.callback(handle.close)

    def report(self) -> Report:
        """What the latest run did so far, all transformers together; after `close`, as it was then."""
        if self._report is not None:
            return self._report
        reports = [handle.report() for handle in self.handles]
        stores = {id(cache.slots): cache.slots for cache in self.caches}.values()
        fp8: Counter[str] = Counter()
        seconds: dict[str, tuple[int, float]] = {}
        for report in reports:
            fp8.update(report.fp8)
            for variant, (count, total) in report.seconds.items():
                earlier = seconds.get(variant, (0, 0.0))
                seconds[variant] = (earlier[0] + count, earlier[1] + total)
        kinds = list(dict.fromkeys(kind for report in reports for kind in report.computed))
        return Report(
            calls=sum(report.calls for report in reports),
            computed={kind: sum(report.computed.get(kind, 0) for report in reports) for kind in kinds},
            broadcast={kind: sum(report.broadcast.get(kind, 0) for report in reports) for kind in kinds},
            slots=sum(report.slots for report in reports),
            cache_bytes=sum(store.nbytes for store in stores) + sum(cache.gates.nbytes for cache in self.caches),
            host_bytes=sum(store.host_bytes for store in stores),
            fp8=dict(fp8),
            graphs=sum(report.graphs for report in reports),
            captured=sum(report.captured for report in reports),
            shapes=sum(report.shapes for report in reports),
            eager=next((report.eager for report in reports if report.eager), None),
            seconds=seconds,
            exchanges={name: found for report in reports for name, found in report.exchanges.items()},
        )
