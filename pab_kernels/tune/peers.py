"""Other ways to leave out work, from diffusers and cache-dit, measured beside this runtime on the same videos."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers.hooks as hooks
import torch
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from pab_kernels import clock, quality
from pab_kernels.config import PABConfig
from pab_kernels.figures import plain, put
from pab_kernels.files import replaced
from pab_kernels.pipelines.generate import Request, generate
from pab_kernels.pipelines.loading import Pipeline
from pab_kernels.quality import Frames
from pab_kernels.runtime.accelerate import accelerate
from pab_kernels.tune import cache_dit_peer
from pab_kernels.tune.trials import split

Apply = Callable[[Any, "Calls", int], object]
"""Puts a peer on a host; it gets the calls that are counted, and how many there will be."""


@dataclass
class Calls:
    """The host's calls of a video: the timestep of the last, the time of all, and what each is made within."""

    timestep: int = 0
    seconds: float = 0.0
    context: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass(frozen=True)
class Row:
    """One setting on all videos: mean PSNR, that of the worst frame, seconds of the transformer a video.

    `saved` is the share of the seconds that the same code takes without: this runtime, or the model's own code.
    `note` says why there are no figures, or that the videos are those without the peer.
    """

    name: str
    psnr: float | None = None
    worst: float | None = None
    seconds: float | None = None
    saved: float | None = None
    note: str = ""


def _pab_hook(ranges: tuple[int, int, int]) -> Apply:
    def apply(host: Any, calls: Calls, steps: int) -> None:
        kinds = ("spatial", "temporal", "cross")
        skips: dict[str, Any] = {
            f"{kind}_attention_block_skip_range": every for kind, every in zip(kinds, ranges, strict=True)
        }
        config = hooks.PyramidAttentionBroadcastConfig(
            **skips,
            # Anchored: diffusers looks for spatial names first, and its default "blocks" is part of every name.
            spatial_attention_block_identifiers=(r"^transformer_blocks",),
            temporal_attention_block_identifiers=(r"^temporal_transformer_blocks",),
            cross_attention_block_identifiers=(r"^transformer_blocks",),
            current_timestep_callback=lambda: calls.timestep,
        )
        hooks.apply_pyramid_attention_broadcast(host, config)

    return apply


def _taylorseer(interval: int) -> Apply:
    def apply(host: Any, calls: Calls, steps: int) -> None:
        config = hooks.TaylorSeerCacheConfig(
            cache_interval=interval,
            disable_cache_after_step=steps - 1,
            taylor_factors_dtype=torch.float32,
            use_lite_mode=True,
        )
        hooks.apply_taylorseer_cache(host, config)

    return apply


def _fastercache(every: int) -> Apply:
    def apply(host: Any, calls: Calls, steps: int) -> None:
        config = hooks.FasterCacheConfig(
            spatial_attention_block_skip_range=every,
            temporal_attention_block_skip_range=every,
            attention_weight_callback=lambda _: 0.3,
            tensor_format="BCFHW",
            current_timestep_callback=lambda: calls.timestep,
        )
        hooks.apply_faster_cache(host, config)

    return apply


def _first_block(threshold: float) -> Apply:
    return lambda host, calls, steps: hooks.apply_first_block_cache(host, hooks.FirstBlockCacheConfig(threshold))


def _magcache(threshold: float) -> Apply:
    def apply(host: Any, calls: Calls, steps: int) -> None:
        # Its ratios would have to be calibrated first; ones make it a plain limit on calls left out.
        config = hooks.MagCacheConfig(threshold, num_inference_steps=steps, mag_ratios=[1.0] * steps)
        hooks.apply_mag_cache(host, config)

    return apply


def _cache_dit(threshold: float, order: int = 0) -> Apply:
    return lambda host, calls, steps: cache_dit_peer.apply(host, steps, threshold, order)


PEERS: dict[str, dict[str, Apply]] = {
    "pab-hook": {f"PAB hook {'/'.join(map(str, r))}": _pab_hook(r) for r in ((2, 3, 6), (3, 4, 7), (4, 6, 9))},
    "taylorseer": {f"TaylorSeer lite, every {n}": _taylorseer(n) for n in (2, 3, 4)},
    "fastercache": {f"FasterCache, every {n}": _fastercache(n) for n in (2, 3)},
    "first-block-cache": {f"FirstBlockCache {t:g}": _first_block(t) for t in (0.05, 0.1)},
    "magcache": {f"MagCache {t:g}": _magcache(t) for t in (0.06, 0.2)},
    "cache-dit": {f"cache-dit F1B0, {t:g}": _cache_dit(t) for t in (0.08, 0.15, 0.3)}
    | {f"cache-dit F1B0, {t:g}, TaylorSeer": _cache_dit(t, 1) for t in (0.15, 0.3)},
}
"""Peers by the names that `--against` takes, each at several settings."""


def measure(
    pipe: Pipeline,
    request: Request,
    settings: Mapping[str, PABConfig],
    peers: Sequence[str],
    on_run: Callable[[str], object] = lambda name: None,
    batch: int = 1,
) -> Iterator[Row]:
    """The model's own code, this runtime without PAB and with each of `settings`, and `peers`: each as it is done.

    Quality is against the videos of the model's own code. Peers run on that code too; their time is the transformer's,
    as is that of all.

    Parameters
    ----------
    pipe : Pipeline
    request : Request
    settings : mapping of str to PABConfig
    peers : sequence of str
        Of `PEERS`.
    on_run : callable, optional
        Is told what comes next.
    batch : int
        How many videos are made at once: a small model alone does not fill a GPU. Peers that decide by a threshold
        decide for all of them.

    Raises
    ------
    ValueError
        An unknown peer.
    """
    for name in peers:
        if name not in PEERS:
            raise ValueError(f"against: got {name!r}, must be one of {', '.join(PEERS)}")
    host, parts = pipe.transformer, split(request, batch)
    on_run("the model's own code")
    videos, theirs = _run(pipe, parts, lambda calls: nullcontext())
    yield Row("the model's own code", seconds=theirs)
    ours = None
    for name, config in {"this runtime, no PAB": PABConfig(), **settings}.items():
        on_run(name)
        found, seconds = _run(pipe, parts, partial(_accelerated, pipe, config))
        yield _row(name, found, videos, seconds, ours)
        ours = ours or seconds
    for peer in peers:
        for name, apply in PEERS[peer].items():
            on_run(name)
            try:
                found, seconds = _run(pipe, parts, partial(_hooked, host, apply, request.steps))
                row = _row(name, found, videos, seconds, theirs)
            except Exception as error:  # whatever a peer raises on a model that it does not know
                row = Row(name, note=f"{type(error).__name__}: {error}".splitlines()[0][:100])
            yield row


def _row(name: str, found: Sequence[Frames], videos: Sequence[Frames], seconds: float, without: float | None) -> Row:
    frames = [quality.per_frame(a, b)["psnr"] for a, b in zip(found, videos, strict=True)]
    means = [min(statistics.fmean(values), 100.0) for values in frames]
    note = "changes nothing" if min(map(min, frames)) == float("inf") else ""
    saved = None if without is None else 1 - seconds / without
    return Row(name, statistics.fmean(means), min(map(min, frames)), seconds, saved, note)


def _run(pipe: Pipeline, parts: Sequence[Request], opened: Callable[[Calls], Any]) -> tuple[list[Frames], float]:
    """The videos, and the median over the parts, but the first where there are more, of the transformer's seconds each.

    In that one kernels compile and graphs are captured.
    """
    host, calls = pipe.transformer, Calls()
    videos: list[Frames] = []
    seconds: list[float] = []
    with opened(calls):
        forward = host.forward

        def timed(*args: Any, **kwargs: Any) -> Any:
            timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
            calls.timestep = int(timestep.flatten()[0]) if isinstance(timestep, torch.Tensor) else 0
            start = clock.mark(host.device)
            with calls.context():
                output = forward(*args, **kwargs)
            calls.seconds += clock.seconds(start, clock.mark(host.device))
            return output

        replaced_forward = vars(host).get("forward")
        host.forward = timed
        try:
            for part in parts:
                calls.seconds = 0.0
                frames = generate(pipe, part, None).frames
                if frames is None:
                    raise ValueError("model: gives latents, must give a video to measure quality: see --vae")
                videos.extend(frames)
                seconds.append(calls.seconds / len(frames))
                registry = getattr(host, "_diffusers_hook", None)
                if registry is not None:
                    registry.reset_stateful_hooks()
        finally:
            if replaced_forward is None:
                del host.forward
            else:
                host.forward = replaced_forward
    return videos, statistics.median(seconds[1:] or seconds)


def _accelerated(pipe: Pipeline, config: PABConfig, calls: Calls) -> Any:
    return accelerate(pipe, config)


@contextmanager
def _hooked(host: Any, apply: Apply, steps: int, calls: Calls) -> Iterator[None]:
    try:
        hooks.HookRegistry.check_if_exists_or_initialize(host)
        apply(host, calls, steps)
        calls.context = partial(host.cache_context, "both halves")
        yield
    finally:
        # Removing diffusers' hooks would leave its own forward on every module.
        for module in host.modules():
            if module.__dict__.pop("_diffusers_hook", None) is not None:
                module.__dict__.pop("forward", None)


def table(rows: Sequence[Row]) -> Table:
    """A row a setting, as Markdown, the fastest last."""
    found = Table(box=box.MARKDOWN)
    for column in ("settings", "PSNR, dB", "worst frame, dB", "seconds a video", "saved", "note"):
        found.add_column(column, justify="left" if column in ("settings", "note") else "right", overflow="fold")
    for row in sorted(rows, key=lambda row: -(row.seconds or float("inf"))):
        figures = ("" if value is None else f"{value:.2f}" for value in (row.psnr, row.worst, row.seconds))
        found.add_row(row.name, *figures, "" if row.saved is None else f"{row.saved:.1%}", row.note)
    return found


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write a line a setting; a file there is replaced once this is complete."""
    with replaced(path) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("settings", "psnr", "worst_frame", "seconds", "saved", "note"))
        for row in rows:
            figures = (row.psnr, row.worst, row.seconds, row.saved)
            writer.writerow((row.name, *("" if each is None else f"{each:.6g}" for each in figures), row.note))


def plot(rows: Sequence[Row], ours: Sequence[str], title: str) -> Figure:
    """Mean PSNR and that of the worst frame over seconds: `ours` and the others."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for axes, measure, label in zip(figure.subplots(1, 2), ("psnr", "worst"), ("mean", "worst frame"), strict=True):
        for row in rows:
            value = getattr(row, measure)
            if value is not None and row.seconds is not None and value < 99:
                own = row.name in ours
                axes.plot(row.seconds, value, marker="*" if own else "o", color="#d1495b" if own else "#1f6f8b")
                axes.annotate(
                    plain(row.name), (row.seconds, value), xytext=(5, 4), textcoords="offset points", fontsize=7
                )
        axes.set_xlabel("transformer, seconds a video")
        axes.set_ylabel(f"PSNR against no broadcast, dB, {label}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.2)
    put(figure.suptitle, title)
    return figure
