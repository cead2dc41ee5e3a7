"""Starts ranks on this machine, a process each, for one call or many, and ends all of them as soon as one has failed.

Not by torch's elastic launcher: it dates failures by the second, so that it may name a rank that only lost its peer,
waits 30 s for a rank that hangs in an exchange, and writes its own account of it.
"""

from __future__ import annotations

import datetime
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

GRACE = 5.0
"""Seconds that ranks have to end by themselves."""
TIMEOUT = 600.0
"""Seconds that a rank waits for the others in an exchange."""


class RankError(RuntimeError):
    """A rank has failed, and all of them have been ended. The message names the rank and what it raised.

    Attributes
    ----------
    rank : int
    trace : str or None
        The rank's traceback; None where it was killed, or where the error is about arguments, files or memory, which a
        message tells all of.
    died : bool
        Whether it raised nothing: it was killed, or ended its process.
    about : Exception or None
        An error about arguments, files or memory, of the plain class that it has, without its message.
    """

    def __init__(
        self, rank: int, message: str, trace: str | None = None, died: bool = False, about: Exception | None = None
    ) -> None:
        super().__init__(f"rank {rank}: {message}")
        self.rank = rank
        self.trace = trace
        self.died = died
        self.about = about
        self._given = (rank, message, trace, died, about)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._given


@dataclass(frozen=True)
class _Said:
    """What a rank says after a call: its result, or its error with the time of it."""

    value: Any = None
    error: str | None = None
    trace: str | None = None
    about: Exception | None = None
    seconds: float = 0.0


class Group:
    """Ranks that stay until `close`: each makes an object, whose methods are then called on all of them at once.

    The ranks are new processes, which share torch's default process group. Rank r has GPU r, or all of them share the
    CPU. The environment has RANK, LOCAL_RANK and WORLD_SIZE as under torchrun. Only rank 0 shows warnings and log
    lines. When a rank raises, is killed or ends the process, the others are ended within a few seconds, wherever they
    hang; so are all of them where a call is left by an exception (Ctrl-C), or this process dies.

    Parameters
    ----------
    make : callable
        A class or function at the top of a module that a new process can import. Arguments and results are pickled.
    args
        Of `make`.
    ranks : int
    device : {"cuda", "cpu"}
        Exchanges of tensors on a GPU go through NCCL, all others through gloo.
    timeout : float
        Seconds that a rank waits for the others in an exchange before it fails.

    Raises
    ------
    ValueError
        Fewer than one rank, another device, or more ranks than there are GPUs.
    RankError
        A rank failed: the one that did so first.
    """

    def __init__(
        self, make: Callable[..., Any], *args: Any, ranks: int, device: str = "cuda", timeout: float = TIMEOUT
    ) -> None:
        check_ranks(ranks, device)
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("spawn")
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        try:
            with _sigint_blocked():  # for the new processes: Ctrl-C is this one's to handle
                for rank in range(ranks):
                    pipe, theirs = context.Pipe()
                    place = (rank, ranks, device, self._store.port, timeout)
                    process = context.Process(target=_rank, args=(place, theirs, make, args), name=f"rank {rank}")
                    process.start()
                    theirs.close()
                    self._processes.append(process)
                    self._pipes.append(pipe)
            _results(self._processes, self._pipes)
        except BaseException:
            self._end()
            raise

    def call(self, name: str, *args: Any) -> Any:
        """Call the method of this name of every rank's object; what that of rank 0 returned.

        Raises
        ------
        RankError
            A rank failed: the one that did so first. All of them have been ended.
        ValueError
            They were ended before.
        """
        if not self._pipes:
            raise ValueError("ranks: have been ended, must be started anew")
        try:
            for pipe in self._pipes:
                with suppress(OSError):  # a rank that is gone is found below
                    pipe.send((name, args))
            return _results(self._processes, self._pipes)[0]
        except BaseException:
            self._end()
            raise

    def close(self) -> None:
        """Let the ranks end. May be called twice."""
        try:
            for pipe in self._pipes:
                with suppress(OSError):
                    pipe.send(None)
            _join(self._processes)
        finally:
            self._end()

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _end(self) -> None:
        _end(self._processes)
        for pipe in self._pipes:
            pipe.close()
        self._pipes.clear()


def launch(function: Callable[..., Any], *args: Any, ranks: int, device: str = "cuda", timeout: float = TIMEOUT) -> Any:
    """Run ``function(*args)`` once in each of `ranks` new processes; what that of rank 0 returned.

    Arguments, rules and errors are those of `Group`.
    """
    with Group(partial, function, *args, ranks=ranks, device=device, timeout=timeout) as group:
        return group.call("__call__")


def check_ranks(ranks: int, device: str) -> None:
    """Raise ValueError unless this machine can have so many ranks."""
    if not isinstance(ranks, int) or ranks < 1:
        raise ValueError(f"gpus: got {ranks!r}, must be an integer of at least 1")
    if device not in ("cuda", "cpu"):
        raise ValueError(f"device: got {device!r}, must be cuda or cpu: each rank has a GPU of its own, or none")
    if device == "cuda" and ranks > (seen := torch.cuda.device_count()):
        raise ValueError(f"gpus: got {ranks}, must be at most {seen}, the CUDA GPUs that torch sees")


def _results(processes: list[BaseProcess], pipes: list[Connection]) -> list[Any]:
    """What each rank returned, once all have; RankError as soon as one fails."""
    values: dict[int, Any] = {}
    while len(values) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in values}
        ended = _read(wait(list(waiting)), waiting)
        if any(each is None or each.error is not None for each in ended.values()):
            # A rank that loses its peer fails after the peer has said why: look again.
            left = [pipe for pipe, rank in waiting.items() if rank not in ended]
            raise _first_error(processes, ended | _read(wait(left, timeout=0) if left else [], waiting))
        values |= {rank: each.value for rank, each in ended.items() if each is not None}
    return [values[rank] for rank in range(len(pipes))]


def _read(ready: list[Any], ranks: dict[Connection, int]) -> dict[int, _Said | None]:
    """By rank what the pipes say; None where it died without a word."""
    found: dict[int, _Said | None] = {}
    for pipe in ready:
        try:
            found[ranks[pipe]] = pipe.recv()
        except (EOFError, OSError):
            found[ranks[pipe]] = None
    return found


def _first_error(processes: list[BaseProcess], ended: dict[int, _Said | None]) -> RankError:
    """A rank that died without a word came first: others that failed lost it. Else the earliest error."""
    for rank, each in ended.items():
        if each is None:
            processes[rank].join(GRACE)
            return RankError(rank, _how_it_ended(processes[rank].exitcode), died=True)
    errors = {rank: each for rank, each in ended.items() if each is not None and each.error is not None}
    rank, first = min(errors.items(), key=lambda item: item[1].seconds)
    return RankError(rank, str(first.error), first.trace, about=first.about)


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended the process with exit code {code}"


def _join(processes: list[BaseProcess]) -> None:
    """Wait for all of them, together as long as GRACE."""
    end = time.monotonic() + GRACE
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))


def _end(processes: list[BaseProcess]) -> None:
    """End the processes that are still there: one that hangs in an exchange dies of SIGTERM too, or of SIGKILL."""
    for process in processes:
        process.terminate()
    _join(processes)
    for process in processes:
        process.kill()
        process.join()


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """A block in which SIGINT waits, and in whose new processes it stays blocked."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# In the new processes


def _rank(
    place: tuple[int, int, str, int, float], pipe: Connection, make: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """A rank's process."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    rank = place[0]
    try:
        if rank > 0:
            logging.disable(logging.WARNING)
            warnings.simplefilter("ignore")
        _join_group(*place)
        made = make(*args)
        pipe.send(_Said())
        while (said := _next_call(made, pipe)) is not None:
            pipe.send(said if rank == 0 else _Said())
            del said  # results may be large
    except BaseException as error:
        about = _about(error)
        trace = "".join(traceback.format_exception(error)) if about is None else None
        pipe.send(_Said(error=_message(error), trace=trace, about=about, seconds=time.monotonic()))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # at once: a process group whose peers are lost may hang where it is taken down
    dist.destroy_process_group()


def _next_call(made: Any, pipe: Connection) -> _Said | None:
    """What the next call returned, None where there is none."""
    try:
        call = pipe.recv()
    except EOFError:  # the launching process is gone
        os._exit(1)
    return None if call is None else _Said(getattr(made, call[0])(*call[1]))


def _join_group(rank: int, ranks: int, device: str, port: int, timeout: float) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    own = None
    if device == "cuda":
        own = torch.device("cuda", rank)
        torch.cuda.set_device(own)
        # Multicast is not needed, and a fault in it takes the GPUs of a host down.
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    torch.set_num_threads(max(1, torch.get_num_threads() // ranks))  # all share the host's cores
    dist.init_process_group(
        "gloo" if own is None else "cpu:gloo,cuda:nccl",
        store=dist.TCPStore("127.0.0.1", port, ranks, is_master=False),
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=timeout),
        device_id=own,
    )


def _message(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _about(error: BaseException) -> Exception | None:
    """An error about arguments, files or memory, of the plain class and without what may not be pickled."""
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, "")
    kinds = (ValueError, TypeError, FileNotFoundError, OSError, torch.OutOfMemoryError, MemoryError)
    kind = next((kind for kind in kinds if isinstance(error, kind)), None)
    return None if kind is None else kind()


def _die_with_parent() -> None:
    """The launching process may be killed without having ended its ranks, which then would wait for each other."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
