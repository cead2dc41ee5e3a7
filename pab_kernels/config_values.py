"""What the values of settings may be: each function takes a key and its value, and gives it as plain Python or raises.

Errors are TypeError and ValueError; they name the key, the value and what is allowed.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

LARGEST = 2**31 - 1
"""Of every integer in settings."""


@dataclass(frozen=True)
class MlpWindow:
    """At integer timestep `timestep` the MLP outputs of `block` are kept; the next `skip_count` calls reuse them.

    Raises
    ------
    TypeError, ValueError
        Naming the field, its value and what is allowed.
    """

    timestep: int
    block: tuple[int, ...]
    skip_count: int

    def __post_init__(self) -> None:
        timestep = _integer("timestep", self.timestep, "an integer timestep", least=-LARGEST)
        blocks = _items(self.block)
        if not blocks:
            raise ValueError(f"block: got {short(self.block)}, must be a list of block indices")
        block = tuple(_integer("block", index, "a list of block indices", least=0) for index in blocks)
        skip = _integer("skip_count", self.skip_count, "an integer of at least 1", least=1)
        for name, value in (("timestep", timestep), ("block", block), ("skip_count", skip)):
            object.__setattr__(self, name, value)


def short(value: object) -> str:
    """`value` in an error, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = f"a {type(value).__name__} of very many digits"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _is_int(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _integer(key: str, value: object, allowed: str, least: int) -> int:
    """A Python int of any kind of integer, as NumPy has them."""
    if not _is_int(value):
        raise TypeError(f"{key}: got {short(value)}, must be {allowed}")
    assert isinstance(value, numbers.Integral)
    if not least <= int(value) <= LARGEST:
        limit = f"at least {least}" if int(value) < least else f"at most {LARGEST}"
        raise ValueError(f"{key}: got {short(value)}, must be {allowed}: {limit}")
    return int(value)


def _number(key: str, value: object) -> float:
    """A Python int or float of any kind of real number."""
    if _is_int(value):
        return _integer(key, value, "two numbers [lo, hi]", least=-LARGEST)
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{key}: got {short(value)}, must be two numbers [lo, hi]")
    return float(value)


def _items(value: object) -> list[Any]:
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping) else []


def check_switch(key: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{key}: got {short(value)}, must be true or false")


def check_choice(key: str, value: object, allowed: tuple[str, ...]) -> None:
    if value is not None and not (isinstance(value, str) and value in allowed):
        raise ValueError(f"{key}: got {short(value)}, must be null or one of {', '.join(allowed)}")


def patterns(key: str, value: object) -> tuple[str, ...]:
    if value is None or (isinstance(value, list | tuple) and not value):
        return ()
    items = _items(value)
    if not items or not all(isinstance(item, str) for item in items):
        raise TypeError(f"{key}: got {short(value)}, must be a list of names or patterns of layers")
    return tuple(items)


def threshold(key: str, value: object) -> tuple[float, float] | None:
    if value is None:
        return None
    items = _items(value)
    if len(items) != 2:
        raise TypeError(f"{key}: got {short(value)}, must be two numbers [lo, hi]")
    lo, hi = (_number(key, item) for item in items)
    if not lo < hi:
        raise ValueError(f"{key}: got {short(value)}, must have lo < hi")
    return lo, hi


def broadcast_range(key: str, value: object) -> int | None:
    return None if value is None else _integer(key, value, "an integer of at least 1", least=1)


def forecast_order(key: str, value: object) -> int:
    order = _integer(key, value, "0 or 1", least=0)
    if order > 1:
        raise ValueError(f"{key}: got {short(value)}, must be 0 or 1")
    return order


def block_interval(key: str, value: object) -> tuple[int, int] | None:
    if value is None:
        return None
    items = _items(value)
    if len(items) != 2 or not all(map(_is_int, items)):
        raise TypeError(f"{key}: got {short(value)}, must be two integers [first, end)")
    first, end = (_integer(key, item, "two integers with 0 <= first < end", least=0) for item in items)
    if not first < end:
        raise ValueError(f"{key}: got {short(value)}, must have 0 <= first < end")
    return first, end


def mlp_windows(key: str, value: object) -> tuple[MlpWindow, ...]:
    if value is None:
        return ()
    if isinstance(value, Mapping):
        windows = [_mlp_window(key, timestep, window) for timestep, window in value.items()]
    elif isinstance(value, list | tuple) and all(isinstance(window, MlpWindow) for window in value):
        windows = list(value)
    else:
        raise TypeError(f"{key}: got {short(value)}, must map timesteps to {{block: [indices], skip_count: n}}")
    timesteps = [window.timestep for window in windows]
    if twice := [timestep for timestep in timesteps if timesteps.count(timestep) > 1]:
        raise ValueError(f"{key}: the timestep {twice[0]} is there twice")
    return tuple(windows)


def _mlp_window(key: str, timestep: object, window: object) -> MlpWindow:
    # JSON has no integer keys: accept their decimal form.
    if isinstance(timestep, str) and timestep.isdecimal() and len(timestep) <= len(str(LARGEST)):
        timestep = int(timestep)
    timestep = _integer(f"{key}: key {short(timestep)}", timestep, "an integer timestep", least=-LARGEST)
    if not isinstance(window, Mapping) or set(window) != {"block", "skip_count"}:
        raise TypeError(f"{key}[{timestep}]: got {short(window)}, must be {{block: [indices], skip_count: n}}")
    try:
        return MlpWindow(timestep, window["block"], window["skip_count"])
    except TypeError as error:
        raise TypeError(f"{key}[{timestep}].{error}") from error
    except ValueError as error:
        raise ValueError(f"{key}[{timestep}].{error}") from error
