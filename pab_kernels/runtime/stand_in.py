"""What stands on a transformer while a handle is open, in the place of its forward, and how it goes away again."""

from __future__ import annotations

import functools
import inspect
import logging
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

log = logging.getLogger(__name__)

_COMPILED = "_compiled_call_impl"


class Handle(Protocol):
    """What it knows of a `PABHandle`, whose file imports this one."""

    @property
    def is_open(self) -> bool: ...

    def forward(self, name: str | None, *args: Any, **kwargs: Any) -> Any: ...


class StandIn:
    """A transformer's forward while a handle is open, and its ``cache_context``, which names the forwards of a step.

    It knows its handle only weakly: a handle that nobody keeps gives the transformer back. Once the handle is closed or
    gone, it is the transformer's own forward, for wrappers that still hold it; and where it is the forward itself, it
    takes itself away. Copies and pickles of a transformer get one without a handle.

    Parameters
    ----------
    host : nn.Module
    handle : PABHandle, optional
    """

    def __init__(self, host: nn.Module, handle: Handle | None = None) -> None:
        self._host = weakref.ref(host) if handle is not None else (lambda: host)
        self._handle = weakref.ref(handle) if handle is not None else (lambda: None)
        self._context = threading.local()  # whose `name` is that of the forward that comes, inside ``cache_context``
        self._taken: list[tuple[nn.Module, Any]] = []
        self._outer: list[tuple[nn.Module, Any]] = []
        functools.update_wrapper(self, type(host).forward, updated=())
        self.__signature__ = inspect.signature(type(host).forward.__get__(host))

    @property
    def handle(self) -> Handle | None:
        """The open handle, if there is one."""
        handle = self._handle()
        return handle if handle is not None and handle.is_open else None

    @torch.compiler.disable  # the runtime is no code to trace
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        handle = self.handle
        if handle is not None:
            return handle.forward(getattr(self._context, "name", None), *args, **kwargs)
        host = self._host()
        if host is None:
            raise ValueError("the transformer of this forward is gone")
        if vars(host).get("forward") is self:
            del host.forward
        return type(host).forward(host, *args, **kwargs)

    @contextmanager
    def cache_context(self, name: str, **arguments: Any) -> Iterator[None]:
        """diffusers' own, and the name for the runtime."""
        host: Any = self._host()
        outside, self._context.name = getattr(self._context, "name", None), name
        try:
            with type(host).cache_context(host, name, **arguments):
                yield
        finally:
            self._context.name = outside

    def put(self, outer: nn.Module | None) -> None:
        """Take the forward's place, also in a wrapper that torch.compile(transformer) made, and what compiled it."""
        host = self._host()
        assert host is not None
        host.forward = self
        if hasattr(type(host), "cache_context"):
            vars(host)["cache_context"] = self.cache_context
        if outer is not None:
            self._outer.append((outer, vars(outer)["forward"]))
            outer.forward = self
        for module in host.modules():
            if vars(module).get(_COMPILED) is not None:
                self._taken.append((module, vars(module).pop(_COMPILED)))
        if self._taken or outer is not None:
            log.warning("the transformer is compiled: while it is accelerated, its own modules run, not compiled ones")

    def remove(self) -> None:
        """Give back what was there, where it is still this that took its place; a wrapper around it stays."""
        host = self._host()
        if host is not None:
            if vars(host).get("forward") is self:
                del host.forward
            if getattr(vars(host).get("cache_context"), "__self__", None) is self:
                del vars(host)["cache_context"]
        for module, compiled in self._taken:
            vars(module).setdefault(_COMPILED, compiled)
        for outer, forward in self._outer:
            if vars(outer).get("forward") is self:
                outer.forward = forward
        self._taken.clear()
        self._outer.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> StandIn:
        return StandIn(memo[id(self._host())])

    def __reduce__(self) -> tuple[Any, ...]:
        return StandIn, (self._host(),)


def clear(host: nn.Module) -> None:
    """Take a stand-in without an open handle from a transformer."""
    forward = vars(host).get("forward")
    if isinstance(forward, StandIn) and forward.handle is None:
        del host.forward
        forward.remove()


def unwrap(transformer: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """The transformer, and the wrapper around it if it comes from torch.compile."""
    original = vars(transformer).get("_modules", {}).get("_orig_mod")
    return (transformer, None) if original is None else (original, transformer)
