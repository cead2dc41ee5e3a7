"""Results of `pab bench` as a page: Markdown with its pictures beside it, and the same as one HTML file."""

from __future__ import annotations

import base64
import io
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from pab_kernels.config import PABConfig
from pab_kernels.figures import kinds_shown, schedule_figure
from pab_kernels.files import replaced
from pab_kernels.measure import figures as bench_figures
from pab_kernels.schedule import Schedule

RATIOS = ("eager", "compile", "plain", "hook")
"""Contenders that the others are compared with."""
EXPLAINED = """\
The floor is the least time at this device's own ceilings, measured in the same process: the operations that the
schedule still requires at the rate of its GEMMs, plus the least bytes between them at the rate of a copy. A share of 1
would leave nothing to gain without changing the schedule or the number format. "difference" is the relative error of
the final latents against the contender in brackets. On a mesh the floor is that of so many GPUs, "x one GPU" is against
the same contender on one of them, and "jitter" is the mean over the steps of how much longer the slowest rank took than
the fastest. "ms in exchanges" is what a step's exchanges of attention take by themselves, in a graph, with nothing to
wait for; "share" is that of the step's time. "repeats" says whether the timed runs gave the same bit for bit, else by
how much a latent differs at most."""
STYLE = """\
body { font: 16px/1.5 system-ui, sans-serif; color: #1b2a30; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1, h2, h3 { line-height: 1.2 } h2 { margin-top: 3rem; border-bottom: 2px solid #1f6f8b }
table { display: block; overflow-x: auto; border-collapse: collapse; font-size: .9rem; margin: 1rem 0 }
th, td { padding: .25rem .5rem; border-bottom: 1px solid #d5dde0; white-space: nowrap; text-align: left }
td { font-variant-numeric: tabular-nums } td:last-child { white-space: normal }
img { max-width: 100%; height: auto } p:has(> img) { overflow-x: auto }
p > img:only-child { min-width: min(40rem, 200%) } pre { overflow-x: auto; background: #f0f4f5; padding: .7rem }
code { overflow-wrap: anywhere }"""

FILES = ("report.html", "report.md")
"""What is written beside the pictures."""
MARKUP = re.compile(r"[\\`*_{}\[\]<>!|~#&$@]")
"""Characters with a meaning within a line of Markdown."""
Grid = tuple[list[str], list[list[str]]]
"""A header and rows, all as wide; the first column names the row."""


def write(results: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Write report.html, and report.md with its pictures; each file is replaced only once the new one is complete.

    Parameters
    ----------
    results : sequence of mappings
        One for each workload, as `pab bench --json` writes them.
    folder : Path
        Made if need be.

    Returns
    -------
    list of Path
        The page, the Markdown file, and its pictures.

    Raises
    ------
    ValueError, OSError
        As `replaced`.
    """
    pictures: dict[str, bytes] = {}
    named = zip(results, _slugs([result["workload"] for result in results]), strict=True)
    sections = [_section(result, pictures, slug) for result, slug in named]
    markdown = "\n\n".join(["# PAB benchmark", *sections, EXPLAINED, ""])
    files = {"report.html": page(markdown, pictures).encode(), "report.md": markdown.encode(), **pictures}
    for name, content in files.items():
        with replaced(folder / name) as partial:
            partial.write_bytes(content)
    return [folder / name for name in files]


def page(markdown: str, pictures: Mapping[str, bytes]) -> str:
    """The Markdown as HTML with its pictures, SVG, inside."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    for name, svg in pictures.items():
        inline = f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
        body = body.replace(f'src="{name}"', f'src="{inline}"')
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>PAB benchmark</title>\n<style>\n{STYLE}\n</style>\n{body}</html>\n"
    )


def _section(result: Mapping[str, Any], pictures: dict[str, bytes], slug: str) -> str:
    """One result; its pictures go to `pictures` by file name, which begins with `slug`."""
    contenders = result["contenders"]
    config = PABConfig.from_dict(result["pab"])
    plans = {pab: Schedule(config if pab else PABConfig(), result["timesteps"]) for pab in (False, True)}

    def picture(name: str, text: str, figure: Figure | None) -> str:
        if figure is None:
            return ""
        file = f"{slug}-{name}.svg"
        pictures[file] = _svg(figure, name)
        return f"![{text}]({file})"

    ran = bench_figures.ran(contenders)
    parts = [f"## {_escape(result['workload'])}", _headline(result), "### Runs", table(*runs_grid(contenders))]
    parts += [f"{_escape(row['label'])} failed: {_escape(row['error'])}" for row in contenders if row["error"]]
    if "check" in result:
        parts.append(check_line(result["check"]))
    if ran:
        bars = (
            picture("speed", "speed-up", bench_figures.speed_bars(contenders)),
            picture("floor", "share of the floor", bench_figures.floor_bars(contenders)),
            picture("memory", "peak memory", bench_figures.memory_bars(contenders)),
        )
        parts += [
            "\n".join(filter(None, bars)),
            "### Steps",
            "One run of each, step by step, timed on the device.",
            picture(
                "steps",
                "seconds of every step",
                bench_figures.timeline(contenders, plans),
            ),
            table(*variants_grid(contenders)),
        ]
    plan = plans[True]
    counts = ", ".join(f"{kind} {plan.broadcast_count(kind)}" for kind in kinds_shown(plan))
    parts += [
        "### Schedule",
        picture("schedule", "which steps compute and which broadcast", schedule_figure(plan, "with PAB")),
        f"Broadcast in {len(plan)} steps: {counts}.",
        _code("yaml", yaml.safe_dump(result["pab"], sort_keys=False, default_flow_style=None)),
        "### Machine",
        table(["", ""], [[name, str(value)] for name, value in (result["machine"] | result["versions"]).items()]),
        table(*ceilings_grid(result)),
        "### To repeat it",
        _code("sh", result["command"]),
    ]
    return "\n\n".join(filter(None, parts))


def _headline(result: Mapping[str, Any]) -> str:
    frames, height, width = result["video"]
    dtype, device, commit = (_escape(result[key]) for key in ("dtype", "device", "commit"))
    date = _escape(result["date"][:10])
    batch, latent_frames, tokens, channels = result["shape"]
    text = (
        f"{frames} frames of {height} x {width}, {len(result['timesteps'])} calls of a batch of {batch} (guidance), "
        f"{latent_frames} x {tokens} tokens of {channels} channels, {dtype}, random weights, on "
        f"{device}; {date}, commit {commit}."
    )
    ours = next((row for row in bench_figures.ran(result["contenders"]) if row["name"] == "runtime+pab"), None)
    if ours is not None:
        base = next((name for name in RATIOS if ours[f"against_{name}"] is not None), None)
        faster = "" if base is None else f", {ours[f'against_{base}']:.2f} times faster than {base}"
        text += f" **This runtime with PAB: {ours['seconds']:.3f} s{faster}, {ours['floor_share']:.3f} of the floor.**"
    return text


def check_line(check: Mapping[str, Any]) -> str:
    """How near the runtime's first step came to the eager host's."""
    tolerance = check["tolerance"]
    return (
        f"first step against the eager host: latents {check['latents']:.1e} (at most {tolerance:.0e}), "
        f"prediction {check['prediction']:.1e} (at most {2 * tolerance:.0e}){'' if check['within'] else ': TOO LARGE'}"
    )


def runs_grid(contenders: Sequence[Mapping[str, Any]]) -> Grid:
    """The table of a benchmark. A column "x NAME" says how many times faster than that contender.

    A column that is empty in every row is left out.
    """

    def cell(value: float | None, form: str, unit: float = 1.0) -> str:
        return "" if value is None else format(value / unit, form)

    others = [name for name in RATIOS if any(row["name"] == name for row in contenders)]
    header = ["", "seconds", "runs", "ms/step", *(f"x {name}" for name in others), "x one GPU", "of floor", "frames/s"]
    header += ["in exchanges", "jitter ms", "peak GiB", "cache GiB", "on host GiB", "difference", "repeats"]
    header += ["warm-up s"]
    rows = []
    for row in contenders:
        difference = cell(row["difference"], ".1e")
        rows.append(
            [
                row["label"],
                "failed" if row["error"] else cell(row["seconds"], ".3f"),
                str(len(row["runs"])),
                cell(row["ms_per_step"], ".2f"),
                *(cell(row[f"against_{name}"], ".2f") for name in others),
                cell(row.get("against_one"), ".2f"),
                cell(row["floor_share"], ".3f"),
                cell(row["frames_per_second"], ".2f"),
                cell(_share_of_exchanges(row), ".3f"),
                cell(row.get("jitter_seconds"), ".3f", 1e-3),
                cell(row["peak_bytes"], ".2f", 2**30),
                cell(row["cache_bytes"], ".2f", 2**30),
                cell(row["host_bytes"] or None, ".2f", 2**30),
                f"{difference} ({row['difference_from']})" if difference else "",
                _repeats(row.get("runs_differ")),
                cell(row["warm_up_seconds"], ".1f"),
            ]
        )
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _repeats(differ: float | None) -> str:
    """Whether runs gave the same; by how much a number differs at most where they did not."""
    return "" if differ is None else f"{differ:.1e}" if differ else "yes"


def _share_of_exchanges(row: Mapping[str, Any]) -> float | None:
    """Of a run's steps, the time that their exchanges of attention take by themselves; None where that is not known."""
    each = row.get("exchange_seconds")
    if not each or not row["variants"]:
        return None
    counts = row["variants"]
    return sum(counts[name][0] * seconds for name, seconds in each.items()) / sum(time for _, time in counts.values())


def variants_grid(contenders: Sequence[Mapping[str, Any]]) -> Grid:
    """Time of each step variant where this runtime ran, and on a mesh that splits frames its exchanges of attention."""
    header, rows = ["", "variant", "steps", "ms/step"], []
    on_mesh = any(row.get("exchanges") for row in contenders)
    for row in contenders:
        for variant, (count, seconds) in row["variants"].items():
            calls, sent = row.get("exchanges", {}).get(variant, (None, 0))
            alone = row.get("exchange_seconds", {}).get(variant)
            moved = ["", ""] if calls is None else [str(calls), f"{sent / 1e6:.2f}"]
            moved += ["", ""] if alone is None else [f"{alone * 1e3:.3f}", f"{alone * count / seconds:.3f}"]
            rows.append([row["label"], variant, str(count), f"{seconds / count * 1e3:.2f}", *moved * on_mesh])
        if row["variants"]:
            graphs, why_not = f"CUDA graphs: {row['graphs']}", row["eager_because"]
            said = graphs if why_not is None else f"no CUDA graphs: {why_not}"
            rows.append([row["label"], said, "", "", *[""] * 4 * on_mesh])
    header += ["exchanges", "MB sent", "ms in exchanges", "share"] * on_mesh
    return header, rows


def ceilings_grid(result: Mapping[str, Any]) -> Grid:
    """The device's ceilings, and the floors that follow from them."""
    ceilings = result["ceilings"]
    rows = [
        ["GEMMs on the run's tokens", f"{ceilings['gemm_flops_own_tokens'] / 1e12:.3g} TFLOP/s"],
        ["the ceiling of GEMMs", f"{ceilings['gemm_flops'] / 1e12:.3g} TFLOP/s"],
        ["copy", f"{ceilings['copy_bytes'] / 1e12:.3g} TB/s"],
    ]
    if (fp8 := ceilings.get("fp8_gemm_flops")) is not None:
        rows.append(["the ceiling of GEMMs in fp8", f"{fp8 / 1e12:.3g} TFLOP/s"])
    for name, part in result["floor"].items():
        in_fp8 = "" if part.get("seconds_fp8") is None else f", in fp8 {part['seconds_fp8']:.3f} s"
        work = f"{part['seconds']:.3f} s{in_fp8}: {part['flops'] / 1e12:.4g} TFLOP, {part['bytes'] / 1e9:.4g} GB"
        rows.append([f"floor {name}", work])
    return ["ceilings and floor", ""], rows


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right; nothing where there are no rows."""
    lines = ["| " + " | ".join(map(_escape, row)) + " |" for row in rows]
    if not lines:
        return ""
    marks = ["---"] + ["---" if name in ("", "variant") else "---:" for name in header[1:]]
    return "\n".join(["| " + " | ".join(header) + " |", "| " + " | ".join(marks) + " |", *lines])


def _escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line: no markup, no picture, no link, also none of a bare address."""
    line = MARKUP.sub(r"\\\g<0>", " ".join(text.split()))
    return line.replace("://", ":\\//").replace("www.", "www\\.")


def _code(language: str, text: str) -> str:
    """A block of code, between more backticks than it has itself."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def _slugs(names: Iterable[str]) -> list[str]:
    """A part of a file's name for each, no two the same."""
    found: list[str] = []
    for name in names:
        plain = "".join(c for c in name.replace(" ", "-") if c.isascii() and (c.isalnum() or c in "-_"))[:80]
        number = next(n for n in itertools.count(1) if (plain if n == 1 else f"{plain}-{n}") not in found)
        found.append(plain if number == 1 else f"{plain}-{number}")
    return found


def _svg(figure: Figure, salt: str) -> bytes:
    """The same bytes for the same figure."""
    target = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(target, format="svg", metadata={"Date": None})
    return target.getvalue()
