"""Settings of Pyramid Attention Broadcast: flat, validated, frozen. No torch here."""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pab_kernels import config_values as values
from pab_kernels import strict_yaml
from pab_kernels.config_values import MlpWindow
from pab_kernels.files import replaced

KINDS = ("spatial", "temporal", "cross")
"""The kinds of attention that can be broadcast."""

MLP_KINDS = ("mlp_spatial", "mlp_temporal")
"""The kinds of MLP: those of blocks whose attention is spatial, and temporal."""

BRANCHES = (*KINDS, *MLP_KINDS)
"""All kinds of branches."""

SWITCHES = (*KINDS, "mlp", "stack", "guidance")
"""All that can be broadcast, by the first word of its keys: branches, the block stack, the unconditional half."""

LINEAR_PRECISIONS = ("fp8", "fp8-all")
CACHE_DTYPES = ("fp8", "int8")
ATTENTION_PRECISIONS = ("fp8",)
"""What `linear_precision`, `cache_dtype` and `attention_precision` may be, besides None: see `PABConfig`."""

ALL_BLOCKS = range(sys.maxsize)
NO_BLOCKS = range(0)
Blocks = range | frozenset[int]
"""A set of block indices: anything that is hashable and answers ``index in blocks``."""


@dataclass(frozen=True)
class PABConfig:
    """Settings of Pyramid Attention Broadcast (arXiv:2408.12588).

    For each kind k of `spatial`, `temporal`, `cross`, `stack` and `guidance`, call i of a run, at timestep t, is
    broadcast iff ``k_broadcast and lo < int(t) < hi and i % k_range != 0``. The first three are kinds of attention.
    `stack` is what the blocks add to the residual stream together: on a broadcast call none of them runs. `guidance` is
    the difference between the conditional and the unconditional prediction: on a broadcast call only the conditional
    one is computed.

    Parameters
    ----------
    {kind}_broadcast : bool
        Switches the kind on; then `{kind}_threshold` and `{kind}_range` must be given.
    {kind}_threshold : (lo, hi)
        Timesteps strictly between the two may broadcast.
    {kind}_range : int
        1 computed call, then up to range - 1 broadcast ones. 1 never broadcasts.
    {kind}_block : (first, end), optional
        Only blocks first <= index < end broadcast. All by default. Of `stack`: the blocks that it stands for, the
        others run. `guidance` has no blocks.
    {kind}_order : {0, 1}
        1 forecasts instead of repeating: a broadcast call takes ``output + n * change``, where `change` is that of the
        output between the last two calls that computed it, and n how many of their distances this call lies after the
        last, counted in calls. It needs a second slot. 0 by default.
    mlp_broadcast : bool
        Switches MLP broadcast on, in one of two forms:
    mlp_spatial_broadcast_config, mlp_temporal_broadcast_config : mapping, optional
        The original's form, ``{timestep: {"block": [indices], "skip_count": n}}``: keyed by exact timesteps.
    mlp_threshold, mlp_range, mlp_block, mlp_order : optional
        The same rule as for attention, for the MLPs of spatial and temporal blocks, whatever the exact timesteps.
    linear_precision : {"fp8", "fp8-all"}, optional
        Run GEMMs of the blocks in e4m3 where that is faster at their shape, as measured when the first call comes, or
        all of them: then the result does not hang on a measurement. By default all stay in the model's dtype.
    linear_exclude : sequence of str
        Patterns of layers that stay in the model's dtype all the same, such as "spatial.0.*" or "*.mlp".
    attention_precision : {"fp8"}, optional
        Compute spatial and full self-attention in e4m3 at the sizes that `ops.backends` names, on Hopper GPUs only.
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
    stack_broadcast: bool = False
    stack_threshold: tuple[float, float] | None = None
    stack_range: int | None = None
    stack_block: tuple[int, int] | None = None
    guidance_broadcast: bool = False
    guidance_threshold: tuple[float, float] | None = None
    guidance_range: int | None = None
    spatial_order: int = 0
    temporal_order: int = 0
    cross_order: int = 0
    mlp_order: int = 0
    stack_order: int = 0
    guidance_order: int = 0
    linear_precision: str | None = None
    linear_exclude: tuple[str, ...] = ()
    attention_precision: str | None = None
    cache_dtype: str | None = None

    def __post_init__(self) -> None:
        for kind in SWITCHES:
            values.check_switch(f"{kind}_broadcast", getattr(self, f"{kind}_broadcast"))
            self._set(f"{kind}_threshold", values.threshold)
            self._set(f"{kind}_range", values.broadcast_range)
            self._set(f"{kind}_order", values.forecast_order)
            if kind != "guidance":
                self._set(f"{kind}_block", values.block_interval)
        self._set("mlp_spatial_broadcast_config", values.mlp_windows)
        self._set("mlp_temporal_broadcast_config", values.mlp_windows)
        values.check_choice("linear_precision", self.linear_precision, LINEAR_PRECISIONS)
        self._set("linear_exclude", values.patterns)
        values.check_choice("attention_precision", self.attention_precision, ATTENTION_PRECISIONS)
        values.check_choice("cache_dtype", self.cache_dtype, CACHE_DTYPES)
        for kind in SWITCHES:
            if kind != "mlp" and getattr(self, f"{kind}_broadcast"):
                self._require(f"{kind}_broadcast", f"{kind}_threshold", f"{kind}_range")
        if self.mlp_broadcast:
            keyed = bool(self.mlp_spatial_broadcast_config or self.mlp_temporal_broadcast_config)
            free = self.mlp_threshold is not None or self.mlp_range is not None
            if keyed and free:
                raise ValueError(
                    "mlp_broadcast: both mlp_*_broadcast_config and mlp_threshold/mlp_range are given, must be one form"
                )
            if keyed:
                self._check_keyed_mlp()
            else:
                self._require("mlp_broadcast", "mlp_threshold", "mlp_range")

    def _check_keyed_mlp(self) -> None:
        for key in ("stack_broadcast", "guidance_broadcast", "mlp_order"):
            if getattr(self, key):
                raise ValueError(
                    f"{key}: got {getattr(self, key)!r}, must not be set beside mlp_*_broadcast_config, whose "
                    "timesteps must all be computed and are only repeated; mlp_threshold and mlp_range go with it"
                )

    def _set(self, key: str, parse: Any) -> None:
        object.__setattr__(self, key, parse(key, getattr(self, key)))

    def _require(self, switch: str, *keys: str) -> None:
        for key in keys:
            if getattr(self, key) is None:
                raise ValueError(f"{key}: missing, must be given because {switch} is on")

    def blocks(self, kind: str) -> Blocks:
        """Indices of the blocks whose branch of `kind`, one of `BRANCHES`, may be broadcast; those of the "stack"."""
        if kind in MLP_KINDS and self.mlp_range is None:
            windows = self.mlp_windows(kind) if self.mlp_broadcast else ()
            return frozenset(index for window in windows for index in window.block)
        kind = "mlp" if kind in MLP_KINDS else kind
        if not getattr(self, f"{kind}_broadcast"):
            return NO_BLOCKS
        interval = getattr(self, f"{kind}_block")
        return ALL_BLOCKS if interval is None else range(*interval)

    def order(self, kind: str) -> int:
        """0 where a broadcast of `kind`, one of `BRANCHES` and `SWITCHES`, repeats, 1 where it forecasts."""
        order: int = getattr(self, f"{'mlp' if kind in MLP_KINDS else kind}_order")
        return order

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
                near = difflib.get_close_matches(values.short(key), known, n=1, cutoff=0.4)
                hint = f"did you mean {near[0]}?" if near else f"must be one of {', '.join(known)}"
                raise ValueError(f"{key if isinstance(key, str) else values.short(key)}: unknown key, {hint}")
        return cls(**settings)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> PABConfig:
        """Read a YAML file of the keys above, in UTF-8 (or UTF-16 with its mark), without aliases and double keys.

        Raises
        ------
        FileNotFoundError
            There is no such file.
        TypeError, ValueError
            As `from_dict`; also for a file that is not such YAML or not a mapping. The message begins with the path.
        """
        path = Path(path)
        try:
            settings = strict_yaml.load(path)
            if not isinstance(settings, Mapping):
                raise TypeError(f"the document is a {type(settings).__name__}, must be a mapping of PAB keys")
            return cls.from_dict(settings)
        except TypeError as error:
            raise TypeError(f"{path}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

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
        with replaced(Path(path)) as partial:
            partial.write_text(strict_yaml.comment(comment) + strict_yaml.dump(self.to_dict()), encoding="utf-8")

    @classmethod
    def preset(cls, family: str, variant: str | None = None) -> PABConfig:
        """Settings of the original and of the paper, attention only; or this project's fast ones.

        Parameters
        ----------
        family : {"open_sora", "open_sora_plan_v110", "open_sora_plan_v120", "latte", "wan_2_1", "wan_2_2", "ltx"}
        variant : str, optional
            Three digits, the ranges of spatial, temporal and cross: "246", "357" or "579" for Open-Sora and
            Open-Sora-Plan 1.1, "235", "347" or "469" for Latte. By default the original's own settings: 2/4/6, for
            Latte 2/3/6, for Open-Sora-Plan 1.2 2/-/6. Wan's and LTX-Video's, 2/-/6, are this project's.
            "fast" for any family: the block stack every second call, forecast in between, and guidance every fourth.
            Chosen on the demo model; with other weights ``pab tune`` tells what they do.

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
        if variant == "fast":
            return cls(**_fast(*_FAST[family]))
        if variant is not None and variant not in variants:
            allowed = ", ".join((*variants, "fast"))
            raise ValueError(f"variant: got {variant!r}, must be one of {allowed}")
        settings: dict[str, Any] = {}
        for kind, digit in zip(KINDS, variant or default, strict=True):
            if digit != "-":
                settings |= {f"{kind}_broadcast": True, f"{kind}_threshold": threshold, f"{kind}_range": int(digit)}
        return cls(**settings)


def named_settings(family: str) -> dict[str, PABConfig]:
    """The preset of `family`, the paper's variants and the fast one, by the names that `--pab` takes; each once.

    Raises
    ------
    ValueError
        Unknown family.
    """
    named = {family: PABConfig.preset(family)}
    for variant in (*_PRESETS[family][2], "fast"):
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
_FAST: dict[str, tuple[tuple[int, int], int]] = {
    # Of the stack: all but the first two or three steps and the last one, and the order. Noise that a sampler adds
    # between steps is no change that could be forecast.
    "open_sora": ((150, 970), 1),
    "open_sora_plan_v110": ((50, 950), 1),
    "open_sora_plan_v120": ((50, 950), 0),
    "latte": ((50, 950), 1),
    "wan_2_1": ((150, 985), 1),
    "wan_2_2": ((150, 985), 1),
    "ltx": ((500, 997), 1),
}


def _fast(threshold: tuple[int, int], order: int) -> dict[str, Any]:
    stack = {"stack_threshold": threshold, "stack_range": 2, "stack_order": order}
    guidance = {"guidance_threshold": (0, 1000), "guidance_range": 4}
    return {"stack_broadcast": True, **stack, "guidance_broadcast": True, **guidance}


PRESETS = tuple(_PRESETS)
"""Families that `PABConfig.preset` knows."""
