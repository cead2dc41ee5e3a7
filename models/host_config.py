"""What a host's configuration may be, checked before anything of its size is made: config.json is from anyone."""

from __future__ import annotations

import inspect
import logging
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from pab_kernels.models.weight_files import read_json

logger = logging.getLogger(__name__)

LARGEST = {"depth": 256, "num_layers": 256, "sample_size": 2048, "video_length": 4096, "sample_size_t": 4096}
LARGEST |= dict.fromkeys(("num_heads", "num_attention_heads", "patch_size", "patch_size_t", "compress_kv_factor"), 256)
OTHERS = 2**16
"""Of whole numbers; and of all others. The released models are at most a tenth as large."""
MOST_POSITIONS = 2**26
"""Elements of a table of positions, tokens times channels: 256 MiB in float32, fifty times the largest released."""


def read(path: Path, cls: type[nn.Module]) -> dict[str, Any]:
    """What the config.json at `path` says to the constructor of `cls`; nothing where there is no such file.

    Raises
    ------
    ValueError
        It is no mapping, or a value is not what `check` allows. The message begins with the path.
    """
    try:
        config = read_json(path)
    except FileNotFoundError:
        return {}
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a mapping of settings, but holds {type(config).__name__}")
    known = parameters(cls)
    # Configs carry settings of training too. One that changed the weights shows as a difference in keys.
    if rest := [key for key in config if key not in known and not key.startswith("_")]:
        logger.info("%s: these settings have no effect here: %s", path, ", ".join(rest))
    config = {key: value for key, value in config.items() if key in known}
    try:
        return check(cls, config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def parameters(cls: type[nn.Module]) -> dict[str, inspect.Parameter]:
    """The constructor's parameters."""
    known = dict(inspect.signature(cls.__init__).parameters)
    known.pop("self")
    return known


def check(cls: type[nn.Module], config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with lists as tuples, each value of its parameter's type and in a range that a model can have.

    Raises
    ------
    TypeError
        A key that `cls` does not have.
    ValueError
        Naming the key, its value and what is allowed.
    """
    known = parameters(cls)
    for key in config:
        if key not in known:
            raise TypeError(f"{key}: {cls.__name__} has no such setting, must be one of {', '.join(known)}")
    hints = typing.get_type_hints(cls.__init__)
    config = {key: _value(key, value, hints.get(key, Any), known[key].default) for key, value in config.items()}
    full = {key: each.default for key, each in known.items()} | config
    size = full.get("sample_size") or 1
    height, width = size if isinstance(size, tuple) else (size, size)
    patch = full.get("patch_size")
    channels = full.get("hidden_size") or (full.get("num_attention_heads") or 1) * (full.get("attention_head_dim") or 1)
    tokens = (height // patch) * (width // patch) if isinstance(patch, int) else 1
    if max(tokens, full.get("video_length") or 1) * channels > MOST_POSITIONS:
        raise ValueError(f"sample_size: got {size}, whose {tokens} positions of {channels} channels are too many")
    if "num_heads" in full and full["hidden_size"] % full["num_heads"]:
        raise ValueError(f"num_heads: got {full['num_heads']}, must divide hidden_size {full['hidden_size']}")
    return config


def _value(key: str, value: Any, hint: Any, default: Any) -> Any:
    """`value` as the parameter's type `hint` has it."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    options = typing.get_args(hint) if union else (hint,)
    if value is None and (default is None or type(None) in options):
        return None
    kind = next(option for option in options if option is not type(None))
    items = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        if items[1:] == (...,) and isinstance(default, tuple):  # of any length, says the class: that of the default
            items = (items[0],) * len(default)
        if not isinstance(value, list | tuple) or len(value) != len(items):
            raise ValueError(f"{key}: got {value!r:.200}, must be {len(items)} whole numbers")
        return tuple(_value(key, item, each, default) for item, each in zip(value, items, strict=True))
    if kind is int:
        most = LARGEST.get(key, OTHERS)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise ValueError(f"{key}: got {value!r:.200}, must be a whole number from 1 to {most}")
    elif kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= OTHERS:
            raise ValueError(f"{key}: got {value!r:.200}, must be a number from 0 to {OTHERS}")
    elif kind in (bool, str) and not isinstance(value, kind):
        raise ValueError(f"{key}: got {value!r:.200}, must be {'true or false' if kind is bool else 'a word'}")
    return value
