"""Settings of Pyramid Attention Broadcast: flat, validated, frozen. No torch here."""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pab_kernels.files import replaced

KINDS = ("spatial", "temporal", "cross")
"""The kinds of attention that can be broadcast."""

MLP_KINDS = ("mlp_spatial", "mlp_temporal")
"""The kinds of MLP: those of blocks whose attention is spatial, and temporal."""

BRANCHES = (*KINDS, *MLP_KINDS)
"""All kinds of branches."""

LINEAR_PRECISIONS = ("fp8", "fp8-all")
CACHE_DTYPES = ("fp8", "int8")
"""What `linear_precision` and `cache_dtype` may be, besides None: see `PABConfig`."""

ALL_BLOCKS = range(sys.maxsize)
NO_BLOCKS = range(0)
Blocks = range | frozenset[int]
"""A set of block indices: anything that is hashable and answers ``index in blocks``."""


@dataclass(frozen=True)
class MlpWindow:
    """At integer timestep `timestep` the MLP outputs of `block` are kept; the next `skip_count` calls reuse them."""

    timestep: int
    block: tuple[int, ...]
    skip_count: int


@dataclass(frozen=True)
class PABConfig:
    """Settings of Pyramid Attention Broadcast (arXiv:2408.12588).

    For each kind k of `spatial`, `temporal` and `cross`, call i of a run, at timestep t, is broadcast iff
    ``k_broadcast and lo < int(t) < hi and i % k_range != 0``.

    Parameters
    ----------
    {kind}_broadcast : bool
        Switches the kind on; then `{kind}_threshold` and `{kind}_range` must be given.
    {kind}_threshold : (lo, hi)
        Timesteps strictly between the two may broadcast.
    {kind}_range : int
        1 computed call, then up to range - 1 broadcast ones. 1 never broadcasts.
    {kind}_block : (first, end), optional
        Only blocks first <= index < end broadcast. All by default.
    mlp_broadcast : bool
        Switches MLP broadcast on, in one of two forms:
    mlp_spatial_broadcast_config, mlp_temporal_broadcast_config : mapping, optional
        The original's form, ``{timestep: {"block": [indices], "skip_count": n}}``: keyed by exact timesteps.
    mlp_threshold, mlp_range, mlp_block : optional
        The same rule as for attention, for the MLPs of spatial and temporal blocks, whatever the exact timesteps.
    linear_precision : {"fp8", "fp8-all"}, optional
        Run GEMMs of the blocks in e4m3 where that is faster at their shape, as measured when the first call comes, or
        all of them: then the result does not hang on a measurement. By default all stay in the model's dtype.
    linear_exclude : sequence of str
        Patterns of layers that stay in the model's dtype all the same, such as "spatial.0.*" or "*.mlp".
    cache_dtype : {"fp8", "int8"}, optional
        Keep slots in one byte an element with a scale a row: half the memory. By default in the model's dtype.

    Raises
    ------
    TypeError, ValueError
        Naming the key, its value and what is allowed.
    """

    spatial_broadcast: bool = False
    spatial_threshold: tuple[float, float] | None = None
    spatial_range: int | None = None
    temporal_broadcast: bool = False
    temporal_threshold: tuple[float, float] | None = None
    temporal_range: int | None = None
    cross_broadcast: bool = False
    cross_threshold: tuple[float, float] | None = None
    cross_range: int | None = None
    spatial_block: tuple[int, int] | None = None
    temporal_block: tuple[int, int] | None = None
    cross_block: tuple[int, int] | None = None
    mlp_broadcast: bool = False
    mlp_spatial_broadcast_config: tuple[MlpWindow, ...] = ()
    mlp_temporal_broadcast_config: tuple[MlpWindow, ...] = ()
    mlp_threshold: tuple[float, float] | None = None
    mlp_range: int | None = None
    mlp_block: tuple[int, int] | None = None
    linear_precision: str | None = None
    linear_exclude: tuple[str, ...] = ()
    cache_dtype: str | None = None

    def __post_init__(self) -> None:
        for kind in (*KINDS, "mlp"):
            _check_switch(f"{kind}_broadcast", getattr(self, f"{kind}_broadcast"))
            self._set(f"{kind}_threshold", _threshold)
            self._set(f"{kind}_range", _range)
            self._set(f"{kind}_block", _block_interval)
        self._set("mlp_spatial_broadcast_config", _mlp_windows)
        self._set("mlp_temporal_broadcast_config", _mlp_windows)
        _check_choice("linear_precision", self.linear_precision, LINEAR_PRECISIONS)
        self._set("linear_exclude", _patterns)
        _check_choice("cache_dtype", self.cache_dtype, CACHE_DTYPES)
        for kind in KINDS:
            if getattr(self, f"{kind}_broadcast"):
                self._require(f"{kind}_broadcast", f"{kind}_threshold", f"{kind}_range")
        if self.mlp_broadcast:
            keyed = bool(self.mlp_spatial_broadcast_config or self.mlp_temporal_broadcast_config)
            free = self.mlp_threshold is not None or self.mlp_range is not None
            if keyed and free:
                raise ValueError(
                    "mlp_broadcast: both mlp_*_broadcast_config and mlp_threshold/mlp_range are given, must be one form"
                )
            if not keyed:
                self._require("mlp_broadcast", "mlp_threshold", "mlp_range")

    def _set(self, key: str, parse: Any) -> None:
        object.__setattr__(self, key, parse(key, getattr(self, key)))

    def _require(self, switch: str, *keys: str) -> None:
        for key in keys:
            if getattr(self, key) is None:
                raise ValueError(f"{key}: missing, must be given because {switch} is on")

    def blocks(self, kind: str) -> Blocks:
        """Indices of the blocks whose branch of `kind`, one of `BRANCHES`, may be broadcast."""
        if kind in MLP_KINDS and self.mlp_range is None:
            windows = self.mlp_windows(kind) if self.mlp_broadcast else ()
            return frozenset(index for window in windows for index in window.block)
        kind = "mlp" if kind in MLP_KINDS else kind
        if not getattr(self, f"{kind}_broadcast"):
            return NO_BLOCKS
        interval = getattr(self, f"{kind}_block")
        return ALL_BLOCKS if interval is None else range(*interval)

    def mlp_windows(self, kind: str) -> tuple[MlpWindow, ...]:
        """The timestep-keyed windows for the MLPs of `kind`, one of `MLP_KINDS`."""
        windows: tuple[MlpWindow, ...] = getattr(self, f"{kind}_broadcast_config")
        return windows

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> PABConfig:
        """Build from a mapping of the keys above.

        Raises
        ------
        TypeError, ValueError
            As the constructor; also for an unknown key, naming the nearest known one.
        """
        if not isinstance(settings, Mapping):
            raise TypeError(f"settings: got {type(settings).__name__}, must be a mapping of PAB keys")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in settings:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
                hint = f"did you mean {near[0]}?" if near else f"must be one of {', '.join(known)}"
                raise ValueError(f"{key}: unknown key, {hint}")
        return cls(**settings)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> PABConfig:
        """Read a YAML file of the keys above.

        Raises
        ------
        FileNotFoundError
            There is no such file.
        TypeError, ValueError
            As `from_dict`; also for a file that is not YAML or not a mapping. The message begins with the path.
        """
        path = Path(path)
        try:
            settings = yaml.safe_load(path.read_text(encoding="utf-8"))
            if not isinstance(settings, Mapping):
                raise TypeError(f"the document is a {type(settings).__name__}, must be a mapping of PAB keys")
            return cls.from_dict(settings)
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not valid YAML: {error}") from error
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The keys that differ from the defaults, as plain Python values; `from_dict` reads them back."""
        settings: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            if field.name.endswith("_broadcast_config"):
                value = {w.timestep: {"block": list(w.block), "skip_count": w.skip_count} for w in value}
            settings[field.name] = list(value) if isinstance(value, tuple) else value
        return settings

    def to_yaml(self, path: str | os.PathLike[str], comment: str = "") -> None:
        """Write the settings as YAML, below the lines of `comment`; a file there is replaced once this is complete."""
        heading = "".join(f"# {line}\n" for line in comment.splitlines())
        with replaced(Path(path)) as partial:
            partial.write_text(heading + yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")

    @classmethod
    def preset(cls, family: str, variant: str | None = None) -> PABConfig:
        """Settings of the original and of the paper, attention only (MLP broadcast off).

        Parameters
        ----------
        family : {"open_sora", "open_sora_plan_v110", "open_sora_plan_v120", "latte", "wan_2_1", "wan_2_2", "ltx"}
        variant : str, optional
            Three digits, the ranges of spatial, temporal and cross: "246", "357" or "579" for Open-Sora and
            Open-Sora-Plan 1.1, "235", "347" or "469" for Latte. By default the original's own settings: 2/4/6, for
            Latte 2/3/6, for Open-Sora-Plan 1.2 2/-/6. Wan's and LTX-Video's, 2/-/6, are this project's.

        Raises
        ------
        ValueError
            Unknown family or variant.
        """
        if family not in _PRESETS:
            near = difflib.get_close_matches(str(family), _PRESETS, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"preset: got {family!r}, must be one of {', '.join(_PRESETS)}{hint}")
        threshold, default, variants = _PRESETS[family]
        if variant is not None and variant not in variants:
            allowed = ", ".join(variants) or "none for this family"
            raise ValueError(f"variant: got {variant!r}, must be one of {allowed}")
        settings: dict[str, Any] = {}
        for kind, digit in zip(KINDS, variant or default, strict=True):
            if digit != "-":
                settings |= {f"{kind}_broadcast": True, f"{kind}_threshold": threshold, f"{kind}_range": int(digit)}
        return cls(**settings)


def named_settings(family: str) -> dict[str, PABConfig]:
    """The preset of `family` and the paper's variants, by the names that `--pab` takes; each settings once.

    Raises
    ------
    ValueError
        Unknown family.
    """
    named = {family: PABConfig.preset(family)}
    for variant in _PRESETS[family][2]:
        settings = PABConfig.preset(family, variant)
        if settings not in named.values():
            named[f"{family}:{variant}"] = settings
    return named


_PRESETS: dict[str, tuple[tuple[int, int], str, tuple[str, ...]]] = {
    "open_sora": ((450, 930), "246", ("246", "357", "579")),
    "open_sora_plan_v110": ((100, 850), "246", ("246", "357", "579")),
    "open_sora_plan_v120": ((100, 850), "2-6", ()),
    "latte": ((100, 800), "236", ("235", "236", "347", "469")),
    # No paper's: the middle 70 % of the steps at the samplers' shift for 480p (Wan 2.2: 720p), attention that is full.
    "wan_2_1": ((350, 945), "2-6", ()),
    "wan_2_2": ((475, 967), "2-6", ()),
    "ltx": ((730, 990), "2-6", ()),
}
PRESETS = tuple(_PRESETS)
"""Families that `PABConfig.preset` knows."""


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_int(value) or isinstance(value, float)


def _items(value: object) -> list[Any]:
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str | Mapping) else []


def _check_switch(key: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{key}: got {value!r}, must be true or false")


def _check_choice(key: str, value: object, allowed: tuple[str, ...]) -> None:
    if value is not None and value not in allowed:
        raise ValueError(f"{key}: got {value!r}, must be null or one of {', '.join(allowed)}")


def _patterns(key: str, value: object) -> tuple[str, ...]:
    items = _items(value)
    if value is None or (not items and value in ((), [])):
        return ()
    if not items or not all(isinstance(item, str) for item in items):
        raise TypeError(f"{key}: got {value!r}, must be a list of names or patterns of layers")
    return tuple(items)


def _threshold(key: str, value: object) -> tuple[float, float] | None:
    if value is None:
        return None
    items = _items(value)
    if len(items) != 2 or not all(map(_is_number, items)):
        raise TypeError(f"{key}: got {value!r}, must be two numbers [lo, hi]")
    if not items[0] < items[1]:
        raise ValueError(f"{key}: got {value!r}, must have lo < hi")
    return (items[0], items[1])


def _range(key: str, value: object) -> int | None:
    if value is None:
        return None
    if not _is_int(value):
        raise TypeError(f"{key}: got {value!r}, must be an integer of at least 1")
    assert isinstance(value, int)
    if value < 1:
        raise ValueError(f"{key}: got {value!r}, must be at least 1")
    return value


def _block_interval(key: str, value: object) -> tuple[int, int] | None:
    if value is None:
        return None
    items = _items(value)
    if len(items) != 2 or not all(map(_is_int, items)):
        raise TypeError(f"{key}: got {value!r}, must be two integers [first, end)")
    if not 0 <= items[0] < items[1]:
        raise ValueError(f"{key}: got {value!r}, must have 0 <= first < end")
    return (items[0], items[1])


def _mlp_windows(key: str, value: object) -> tuple[MlpWindow, ...]:
    if value is None:
        return ()
    if isinstance(value, tuple) and all(isinstance(window, MlpWindow) for window in value):
        return value
    if not isinstance(value, Mapping):
        raise TypeError(f"{key}: got {value!r}, must map timesteps to {{block: [indices], skip_count: n}}")
    return tuple(_mlp_window(key, timestep, window) for timestep, window in value.items())


def _mlp_window(key: str, timestep: object, window: object) -> MlpWindow:
    # JSON has no integer keys: accept their decimal form.
    if isinstance(timestep, str) and timestep.isdecimal():
        timestep = int(timestep)
    if not _is_int(timestep):
        raise TypeError(f"{key}: key {timestep!r} must be an integer timestep")
    assert isinstance(timestep, int)
    if not isinstance(window, Mapping) or set(window) != {"block", "skip_count"}:
        raise TypeError(f"{key}[{timestep}]: got {window!r}, must be {{block: [indices], skip_count: n}}")
    block, skip = _items(window["block"]), window["skip_count"]
    if not block or not all(_is_int(index) and index >= 0 for index in block):
        raise ValueError(f"{key}[{timestep}].block: got {window['block']!r}, must be a list of block indices")
    if not _is_int(skip) or skip < 1:
        raise ValueError(f"{key}[{timestep}].skip_count: got {skip!r}, must be an integer of at least 1")
    return MlpWindow(timestep, tuple(block), skip)
