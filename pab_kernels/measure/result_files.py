"""Reads what `pab bench --json` wrote, or is said to have written: each value has its type and range, or is refused.

A form is a function that takes where a value lies and the value, and raises ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pab_kernels.config import PABConfig
from pab_kernels.models.weight_files import read_json

LONGEST = 10_000
"""Letters of a text; also numbers of a list and entries of a mapping."""
MOST_ROWS = 100
"""Contenders of a result: each has a row in every picture."""

Form = Callable[[str, Any], None]


def load(path: Path) -> dict[str, Any]:
    """A result of `pab bench --json`.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        It is something else, or of another version; the message names file, key and value.
    """
    result = read_json(path)
    if not isinstance(result, dict) or not {"command", "machine", "contenders"} <= result.keys():
        raise ValueError(f"{path}: not a result that this version of `pab bench --json` wrote")
    try:
        RESULT("", result)
        PABConfig.from_dict(result["pab"])
        for i, row in enumerate(result["contenders"]):
            _check_row(f"contenders[{i}]", row, len(result["timesteps"]))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return result


def _check_row(where: str, row: Mapping[str, Any], steps: int) -> None:
    """One that ran has all that the pictures show."""
    if row["seconds"] is None:
        return
    if row["floor_share"] is None:
        raise ValueError(f"{where}.floor_share: got null, must be a number where there are seconds")
    if len(row["step_seconds"]) != steps:
        raise ValueError(f"{where}.step_seconds: got {len(row['step_seconds'])} numbers, must be one for each timestep")


def _refuse(where: str, value: Any, wanted: str) -> ValueError:
    return ValueError(f"{where}: got {value!r:.80}, must be {wanted}")


def _text(where: str, value: Any) -> None:
    if not isinstance(value, str) or len(value) > LONGEST:
        raise _refuse(where, value, f"text of at most {LONGEST} letters")


def _switch(where: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise _refuse(where, value, "true or false")


def _between(low: float, high: float, whole: bool = False) -> Form:
    def check(where: str, value: Any) -> None:
        right = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not right or not low <= value <= high or (isinstance(value, float) and not math.isfinite(value)):
            raise _refuse(where, value, f"a {'whole ' if whole else ''}number from {low:g} to {high:g}")

    return check


def _optional(form: Form) -> Form:
    return lambda where, value: None if value is None else form(where, value)


def _list(form: Form, least: int = 0, most: int = LONGEST) -> Form:
    def check(where: str, value: Any) -> None:
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise _refuse(where, value, f"a list of {least} to {most}")
        for i, item in enumerate(value):
            form(f"{where}[{i}]", item)

    return check


def _mapping(form: Form) -> Form:
    def check(where: str, value: Any) -> None:
        if not isinstance(value, dict) or len(value) > LONGEST:
            raise _refuse(where, value, "a mapping")
        for key, item in value.items():
            _text(where, key)
            form(f"{where}.{key[:80]}", item)

    return check


def _fields(needed: Mapping[str, Form], given: Mapping[str, Form] | None = None) -> Form:
    """A mapping that has the `needed` keys, and maybe the `given` ones; others are not looked at."""

    def check(where: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise _refuse(where, value, "a mapping")
        for key, form in {**needed, **(given or {})}.items():
            place = f"{where}.{key}".removeprefix(".")
            if key in value:
                form(place, value[key])
            elif key in needed:
                raise ValueError(f"{place}: missing, must be given")

    return check


def _variant(where: str, value: Any) -> None:
    _list(_number, 2, 2)(where, value)
    _between(1, 1e9, whole=True)(where, value[0])


_number = _between(0, 1e30)
_seconds = _between(1e-12, 1e9)
_size = _between(1, 2**40, whole=True)
_bytes = _optional(_between(0, 2**60, whole=True))

ROW = _fields(
    {
        "name": _text,
        "label": _text,
        "pab": _switch,
        "seconds": _optional(_seconds),
        "runs": _list(_seconds),
        "step_seconds": _list(_between(0, 1e9)),
        **{key: _optional(_number) for key in ("ms_per_step", "frames_per_second", "difference", "warm_up_seconds")},
        **{f"against_{name}": _optional(_number) for name in ("eager", "compile", "plain", "hook")},
        "floor_share": _optional(_between(0, 1e9)),
        **dict.fromkeys(("peak_bytes", "cache_bytes", "host_bytes"), _bytes),
        "graphs": _optional(_between(0, 1e9, whole=True)),
        **dict.fromkeys(("eager_because", "difference_from", "error"), _optional(_text)),
        "variants": _mapping(_variant),
    },
    {
        "gpus": _between(1, 1e6, whole=True),
        **dict.fromkeys(("against_one", "jitter_seconds", "runs_differ"), _optional(_number)),
        "exchanges": _mapping(_list(_between(0, 2**60, whole=True), 2, 2)),
        "exchange_seconds": _mapping(_number),
    },
)
CEILINGS = _fields(
    dict.fromkeys(("gemm_flops_own_tokens", "gemm_flops", "copy_bytes"), _number),
    {"fp8_gemm_flops": _optional(_number)},
)
FLOOR = _fields(dict.fromkeys(("seconds", "flops", "bytes"), _number), {"seconds_fp8": _optional(_number)})
CHECK = _fields({**dict.fromkeys(("latents", "prediction", "tolerance"), _number), "within": _switch})
RESULT = _fields(
    {
        **dict.fromkeys(("date", "workload", "dtype", "device", "command", "commit"), _text),
        "video": _list(_size, 3, 3),
        "shape": _list(_size, 4, 4),
        "timesteps": _list(_between(-1e9, 1e9), 1),
        "pab": _mapping(lambda where, value: None),
        "machine": _mapping(_text),
        "versions": _mapping(_text),
        "ceilings": CEILINGS,
        "floor": _mapping(FLOOR),
        "contenders": _list(ROW, 1, MOST_ROWS),
    },
    {"check": CHECK},
)
"""What `measure.report` shows."""
