"""Pictures of a profile, and of trials on the plane of time saved and quality."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from pab_kernels.figures import plain, put
from pab_kernels.tune.choose import Estimate, Target
from pab_kernels.tune.profile import Profile, flat_middle
from pab_kernels.tune.trials import Trial

COLOURS = {"spatial": "#1f6f8b", "temporal": "#d1495b", "cross": "#e0a100"}
TITLES = {"relative_l2": "relative L2 difference", "mse": "mean squared difference"}
LABELS = {"psnr": "PSNR against no PAB, dB", "ssim": "SSIM against no PAB"}


def profile_curves(profile: Profile, title: str) -> Figure:
    """Difference to the step before over the steps: mean over blocks, band from the 10th to the 90th percentile."""
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    lo, hi = profile.edges
    for axes, (measure, label) in zip(figure.subplots(1, 2), TITLES.items(), strict=True):
        for kind in profile.kinds:
            values = getattr(profile, measure)[kind][:, 1:]
            steps = np.arange(1, len(profile.timesteps))
            band = np.percentile(values, (10, 90), axis=0)
            axes.fill_between(steps, *band, color=COLOURS[kind], alpha=0.15, linewidth=0)
            axes.plot(steps, values.mean(axis=0), color=COLOURS[kind], label=kind, linewidth=1.8)
        for edge in (lo, hi):
            axes.axvline(edge - 0.5, color="grey", linestyle="--", linewidth=1)
        middle = (lo + hi - 1) / 2
        for x, text in (((lo - 1) / 2, "15 %"), (middle, "70 %"), ((hi + len(profile.timesteps) - 1) / 2, "15 %")):
            axes.text(x, 0.98, text, transform=axes.get_xaxis_transform(), ha="center", va="top", color="grey")
        axes.set_yscale("log")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        _label_steps(axes, profile.timesteps)
    figure.axes[0].legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0.92))
    put(figure.suptitle, title)
    return figure


def profile_heat_map(profile: Profile, title: str) -> Figure:
    """Relative difference of every block at every step, a map a kind; the flat middle of each is framed."""
    kinds = profile.kinds
    blocks = [len(profile.relative_l2[kind]) for kind in kinds]
    height = sum(min(0.3 * count, 4.0) for count in blocks)
    figure = Figure(figsize=(9, height + 2.2), layout="constrained")
    every = np.concatenate([profile.relative_l2[kind][:, 1:].ravel() for kind in kinds])
    norm = LogNorm(np.nanmin(every[every > 0]), np.nanmax(every))
    rows = figure.subplots(len(kinds), 1, sharex=True, squeeze=False, height_ratios=blocks)[:, 0]
    for axes, kind in zip(rows, kinds, strict=True):
        values = profile.relative_l2[kind]
        image = axes.imshow(values, aspect="auto", origin="lower", norm=norm, cmap="viridis", interpolation="nearest")
        first, end = flat_middle(values.mean(axis=0))
        axes.axvline(first - 0.5, color="white", linewidth=1.5, linestyle=":")
        axes.axvline(end - 0.5, color="white", linewidth=1.5, linestyle=":")
        axes.set_ylabel(f"{kind}\nblock")
        axes.yaxis.get_major_locator().set_params(integer=True)
    _label_steps(rows[-1], profile.timesteps)
    figure.colorbar(image, ax=list(rows), label=TITLES["relative_l2"], shrink=0.9)
    put(figure.suptitle, f"{title} (flat middle between the dotted lines)")
    return figure


def _label_steps(axes: Axes, timesteps: Sequence[float]) -> None:
    """Ticks of steps, with their timesteps below."""
    ticks = range(0, len(timesteps), max(1, len(timesteps) // 8))
    axes.set_xlim(-0.5, len(timesteps) - 0.5)
    axes.set_xticks(ticks, [f"{i}\n{timesteps[i]:.0f}" for i in ticks])
    axes.set_xlabel("step (above) and timestep (below)")


def frontier_plot(trials: Sequence[Trial], chosen: Trial, target: Target, title: str) -> Figure:
    """Each trial's predicted saving and quality, with the interval that its mean over all videos should lie in."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    points = {}
    for trial in trials:
        found = Estimate.of(trial.values(target.quality))
        points[trial.name] = x, y = 100 * trial.predicted, found.mean
        colour = COLOURS["temporal" if trial.name.startswith("tuned") else "spatial"]
        marker, size = ("*", 14) if trial is chosen else ("o", 7)
        margin = found.margin if np.isfinite(found.margin) else 0.0
        axes.errorbar(x, y, yerr=margin, color=colour, alpha=0.35, capsize=3, linewidth=1.2)
        axes.plot(x, y, marker=marker, color=colour, markersize=size, zorder=3)
    best = sorted(point for point in points.values() if not any(_beats(other, point) for other in points.values()))
    axes.plot(*zip(*best, strict=True), color="grey", linewidth=1, alpha=0.6, zorder=1, label="best of the trials")
    if target.measure == "speedup":
        axes.axvline(100 * target.saving, color="grey", linestyle="--", label=f"target {target}")
    else:
        axes.axhline(target.value, color="grey", linestyle="--", label=f"target {target}")
    axes.margins(x=0.15, y=0.1)
    width, height = np.ptp(axes.get_xlim()), np.ptp(axes.get_ylim())
    labels: dict[tuple[float, float], list[str]] = {}
    for name, (x, y) in points.items():
        near = [at for at in labels if abs(at[0] - x) < 0.05 * width and abs(at[1] - y) < 0.03 * height]
        labels.setdefault(near[0] if near else (x, y), []).append(f"{name}, chosen" if name == chosen.name else name)
    for at, names in labels.items():
        axes.annotate("\n".join(map(plain, names)), at, xytext=(8, 5), textcoords="offset points")
    axes.set_xlabel("denoising time saved, %, predicted")
    axes.set_ylabel(LABELS[target.quality])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    put(axes.set_title, title)
    return figure


def _beats(other: tuple[float, float], point: tuple[float, float]) -> bool:
    """Whether a trial saves as much at more quality, or more at as much."""
    return other != point and other[0] >= point[0] and other[1] >= point[1]
