"""The handle: a Pyramid Attention Broadcast runtime behind a transformer's forward, until it is closed."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from pab_kernels import clock
from pab_kernels.config import PABConfig
from pab_kernels.distributed.mesh import Ranks
from pab_kernels.models import adapter_for
from pab_kernels.models.adapter import Adapter, Call
from pab_kernels.runtime.apart import Apart
from pab_kernels.runtime.cache import BroadcastCache, SlotPool, where
from pab_kernels.runtime.doubt import Doubts
from pab_kernels.runtime.guidance import Conditional, Halves, Pairs
from pab_kernels.runtime.identity import Identity
from pab_kernels.runtime.lane import CAPTURES, Lane
from pab_kernels.runtime.precision import Fp8Linears, with_fp8_attention
from pab_kernels.runtime.rectified_flow import FlowInputs
from pab_kernels.runtime.report import Report
from pab_kernels.runtime.run import Forward, Run
from pab_kernels.runtime.runs import Runs
from pab_kernels.runtime.shapes import Shapes
from pab_kernels.runtime.share import Share
from pab_kernels.runtime.stand_in import StandIn, clear, unwrap
from pab_kernels.runtime.timesteps import as_list
from pab_kernels.runtime.workspace import Workspace
from pab_kernels.schedule import Schedule

log = logging.getLogger(__name__)


class PABHandle:
    """The runtime behind one transformer; made by `accelerate`.

    It serves one run at a time, which belongs to the thread that makes its first call. Calls of several threads wait
    for each other, and one that is of no run of its thread is refused: threads that are to run at the same time need a
    transformer and a handle each. A handle that nobody keeps any more is closed.

    Attributes
    ----------
    config : PABConfig
    transformer : nn.Module
    """

    def __init__(
        self,
        transformer: nn.Module,
        config: PABConfig,
        pipeline: Any = None,
        *,
        cuda_graphs: bool = True,
        forwards_per_step: int = 1,
        cache_device: torch.device | str | None = None,
        keep_shapes: int = 4,
        conditional: Conditional | None = None,
        pool: SlotPool | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        if not isinstance(config, PABConfig):
            raise TypeError(f"config: got {type(config).__name__}, must be a PABConfig")
        for name, value in (("forwards_per_step", forwards_per_step), ("keep_shapes", keep_shapes)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: got {value!r}, must be an integer of at least 1")
        transformer, compiled = unwrap(transformer)
        clear(transformer)
        if "forward" in vars(transformer):
            raise TypeError(
                f"{type(transformer).__name__}: its forward is replaced already "
                "(another handle, an offloading hook, or torch.compile of the forward)"
            )
        self.config = config
        self.transformer = transformer
        self._cuda_graphs = cuda_graphs
        self._forwards = forwards_per_step
        self._pool = pool
        self._ranks = ranks
        self._apart = None if ranks is None or ranks.mesh.guidance == 1 else Apart(ranks)
        self._lock = threading.RLock()
        self._identity = Identity(transformer)
        device = next(transformer.parameters()).device
        self._lane = Lane(device)
        self._cache_device = where(cache_device, device)
        self._doubts = Doubts(device)
        self._shapes = Shapes(keep_shapes)
        self._halves = Halves(config.guidance_broadcast, pipeline, conditional)
        self._pairs = Pairs(config.guidance_order)
        self._runs = Runs(config, forwards_per_step, pipeline, self._prepare)
        self._fp8: Fp8Linears | None = None
        self._report: Report | None = None
        with self._mode():
            self._adapter: Adapter = adapter_for(transformer)
            stand_in = StandIn(transformer, self)
            self._finalizer = weakref.finalize(self, _collected, stand_in, self._adapter, self._lane)
            self._finalizer.atexit = False
            try:
                if config.attention_precision is not None:
                    with_fp8_attention(self._adapter.stack)  # or it says why not
                if config.linear_precision is not None:
                    measure = config.linear_precision == "fp8"
                    self._fp8 = Fp8Linears(self._adapter.stack, config.linear_exclude, measure=measure, ranks=ranks)
                stand_in.put(compiled)
                self._identity.record()  # fused weights lie elsewhere now
            except BaseException:
                self.close()
                raise

    @property
    def is_open(self) -> bool:
        """Whether `close` is still to come."""
        return self._finalizer.alive

    @property
    def schedule(self) -> Schedule | None:
        """Plan of the current run."""
        return None if self._runs.current is None else self._runs.current.schedule

    @property
    def caches(self) -> tuple[BroadcastCache, ...]:
        """The slots for the shape that came last, a cache for each forward of a step."""
        return tuple(workspace.cache for workspace in self._shapes.latest)

    def __enter__(self) -> PABHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise TypeError("a PABHandle belongs to one transformer on one device: it cannot be copied or pickled")

    def close(self) -> None:
        """Restore the transformer bit for bit and free the slots. Closing twice does nothing.

        What others have put around the runtime's forward stays there, and calls the transformer's own forward.
        """
        with self._lock:
            if not self.is_open:
                return
            try:
                self._report = self.report()
            finally:
                resources = self._finalizer.detach()
                assert resources is not None
                # Before the weights, which for a moment are there twice.
                self._fp8 = None
                self._shapes.clear()
                del self._adapter
                _give_back(*resources[2])

    def begin(self, timesteps: Iterable[float] | Tensor, first_call: int = 0, *, guided: bool = True) -> Schedule:
        """Begin a run: plan it over `timesteps`, one for each step that will happen, and forget every slot.

        For a pipeline this happens by itself, with the timesteps of its scheduler. Another pipeline that has the same
        transformer and a scheduler of its own announces its runs here, after ``scheduler.set_timesteps``. The first
        step that comes is that of index `first_call`, where the caller knows the predictions of those before. Where the
        settings broadcast guidance, and the calls of this run are not two halves, `guided` must be False. Returns the
        plan.

        Raises
        ------
        TypeError
            `timesteps` are no numbers.
        ValueError
            No timesteps, no step `first_call`, the handle is closed, or the transformer's modules and weights are not
            those of `accelerate`. (Weights that were changed in place are seen.)
        """
        values = as_list(timesteps)
        with self._at_work():
            run = self._runs.begin(values, first_call)
            run.guided = guided
            return run.schedule

    def report(self) -> Report:
        """What the latest run did so far; waits for the GPU if there is one. After `close`, as it was then."""
        with self._lock:
            return self._report or self._reported()

    def _reported(self) -> Report:
        run, more, workspaces = self._runs.current, ("stack", "guidance"), self._shapes.latest
        kinds = (workspaces[0].stack if workspaces else self._adapter.stack).kinds
        kinds += tuple(kind for kind in more if getattr(self.config, f"{kind}_broadcast"))
        return Report.of([] if run is None else run.clock, kinds, self._shapes)

    def rectified_flow(self, latents: Tensor, guidance_scale: float, **arguments: Any) -> Callable[[Tensor], Tensor]:
        """The steps of a loop of rectified flow over the run that `begin` announced.

        Each is one graph from latents to latents: guidance and the Euler update are inside, see `euler_step`. The
        modulation of all steps is computed here.

        Parameters
        ----------
        latents : Tensor
            float32 [B, C, T, H, W], of which only the shape counts.
        guidance_scale : float
            1 or less goes without guidance.
        arguments
            Of the transformer, besides latents and timestep, the same at every step: for 2B rows, the conditional half
            first, or for B without guidance.

        Returns
        -------
        callable
            Takes the latents before a step and returns those after it, a tensor of the caller's own. It raises
            ValueError for latents of another shape or device, and where the run is over or is not the current one.

        Raises
        ------
        ValueError
            No run has begun, the handle has several forwards a step, or the transformer would refuse the arguments.
        """
        if self._forwards != 1:
            raise ValueError(f"forwards_per_step: is {self._forwards}, must be 1 for both halves in one call")
        with self._at_work():
            run = self._checked_run()
            timesteps = run.schedule.timesteps
            inputs = FlowInputs.make(self._adapter, latents, timesteps, guidance_scale, arguments)

        def step(latents: Tensor) -> Tensor:
            with self._at_work():
                if self._checked_run() is not run:
                    raise ValueError("another run has begun: call rectified_flow again for its steps")
                step, forward = run.place(None, None)
                flow = inputs.at(step, latents)
                result = self._step(run, step, forward, inputs.call, flow, inputs.seen.doubts())
            return self._lane.hand_out(result)

        return step

    def forward(self, name: str | None, *args: Any, **kwargs: Any) -> Any:
        """What stands in for the transformer's forward, of the forward of a step that is called `name`."""
        with self._at_work():
            call = self._adapter.bind(*args, **kwargs)
            self._adapter.check_like_weights(call.tensors["latents"])
            timestep = call.tensors["timestep"]
            if call.layout.indexed:  # those that occur; given frames have 0
                timestep = timestep.amax()
            run, step, forward, unchecked = self._runs.place(name, timestep)
            self._doubts.check()
            doubts = [self._doubts.of_timestep(timestep, run.roundings[step])] if unchecked else []
            result = self._step(run, step, forward, call, None, (*doubts, *call.doubts))
            adapter, apart = self._adapter, self._apart
        handed = self._lane.hand_out(result)
        if apart is not None:
            apart.handed(handed)
        return adapter.wrap(handed, call)

    def _step(
        self,
        run: Run,
        step: int,
        forward: Forward,
        call: Call,
        flow: dict[str, Tensor] | None,
        doubts: Iterable[Tensor],
    ) -> Tensor:
        """A call of the run; see `Workspace.step`."""
        self._identity.check_addresses()  # what kernels read must be there; the rest can wait
        latents = call.tensors["latents"]
        run.expect(forward, step, latents.shape)
        run.thread = threading.current_thread()
        run.broken = True  # until this call is complete
        start = clock.mark(self._lane.device)
        variant = planned = run.schedule[step]
        halves = self._halves.of(run, forward, call.layout.batch, None if flow is None else len(flow["latents"]))
        apart = None if self._apart is None or flow is not None else self._halves.apart(run, forward)
        left_out = planned.guidance and halves == (1,)
        if self._ranks is not None and step < run.first_call + 2:
            self._ranks.check_alike("latents, timestep, text", latents if flow is None else flow["latents"], call.text)

        def compute() -> Tensor:
            nonlocal variant
            workspace = self._workspace(run, forward, call, halves, split=apart is None)
            if run.skipped(forward, step):
                workspace.cache.invalidate()
            variant = workspace.variant(planned)
            found, more = workspace.step(call, run.schedule, step, flow)
            return self._doubts.apply([*doubts, *more], found)

        def work() -> Tensor:
            pairs = self._pairs if self._halves.kept(run, forward) else None
            if self._apart is not None and apart is not None:
                nothing = partial(self._adapter.nothing, call)
                if apart == 0:
                    return self._apart.first(step, compute, nothing)
                return self._apart.second(step, None if left_out else compute, nothing, pairs, run.schedule)
            if left_out:
                return self._doubts.apply([*doubts], self._pairs.second(step, run.schedule))
            found = compute()
            if pairs is not None:
                pairs.take(halves[0], step, found)
            return found

        # Of several ranks one that tries again would be alone.
        result = self._shapes.with_memory(work) if self._ranks is None else work()
        run.clock.append((variant, start, clock.mark(self._lane.device)))
        # While a GPU is at work. Nobody has the result yet.
        self._identity.check()
        self._identity.check_versions()
        run.done(forward, step, latents.shape)
        run.broken = False
        return result

    def _workspace(self, run: Run, forward: Forward, call: Call, halves: tuple[int, ...], split: bool) -> Workspace:
        """The workspace of a call, with the slots of this run; `split` is whether ranks may share its batch."""
        key = Workspace.key(call, halves), split
        found = self._shapes.use(key, forward, lambda old: old.run is run or old.serves(run.schedule))
        if found is None:
            stack = self._adapter.stack
            share = Share.of(call, stack, halves, self._ranks, split)
            if self._fp8 is not None:
                with CAPTURES:  # it may measure with graphs
                    stack = self._fp8.at(share.rows)
            if run.schedule.config.attention_precision is not None:
                stack = with_fp8_attention(stack)
            options = (self._lane, self._cuda_graphs, self._cache_device, self._pool, forward)
            found = Workspace(self._adapter, stack, run.schedule, call, share, *options, halves)
            self._shapes.add(key, forward, found)
        if found.run is not run:
            found.begin_run(run)
        return found

    def _prepare(self) -> None:
        """A run begins: the weights must be where they were, and copies of them are made anew."""
        self._identity.check()
        self._identity.note_versions()
        self._pairs = Pairs(self.config.guidance_order)
        if self._apart is not None:
            self._apart.begin()
        self._adapter.refresh()
        if self._fp8 is not None and self._fp8.refresh():
            self._shapes.clear()  # graphs know the scales
        self._doubts.begin()

    @contextmanager
    def _mode(self) -> Iterator[None]:
        """One thread at a time, on the handle's own device and stream, in a mode in which tensors can be kept."""
        plain = torch.autocast(self._lane.device.type, enabled=False)
        with self._lock, torch.inference_mode(False), torch.no_grad(), plain, self._lane:
            yield

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """`_mode`, of an open handle."""
        kind = self._lane.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        with self._mode():
            if not self.is_open:
                raise ValueError("the handle is closed: accelerate the transformer again")
            dtype = self._adapter.stack.dtype
            if autocast not in (None, dtype):
                raise ValueError(
                    f"autocast: to {autocast} over weights of {dtype}, must be off, or the transformer in that dtype: "
                    "the runtime computes in the dtype of the weights"
                )
            yield

    def _checked_run(self) -> Run:
        """The current run, if it can go on."""
        run = self._runs.checked()
        self._doubts.check()
        return run


def handle_of(transformer: nn.Module) -> PABHandle | None:
    """The open handle whose runtime is the transformer's forward; None where there is none.

    Nor is there one where a hook or another forward stands in between, which must see every call.
    """
    forward = vars(transformer).get("forward")
    hooked = transformer._forward_hooks or transformer._forward_pre_hooks
    handle = forward.handle if isinstance(forward, StandIn) and not hooked else None
    return handle if isinstance(handle, PABHandle) else None


def _give_back(stand_in: StandIn, adapter: Adapter, lane: Lane) -> None:
    """Restore a transformer: its memory is the caller's again."""
    stand_in.remove()
    with lane:
        pass  # what the caller does from here on is after all that was done here
    with torch.inference_mode(False):
        adapter.restore()
    lane.close()


def _collected(stand_in: StandIn, adapter: Adapter, lane: Lane) -> None:
    log.warning("a PABHandle was collected without close(): its transformer runs its own forward again")
    _give_back(stand_in, adapter, lane)
