"""What `pab generate` does once its options are checked: one process, or each rank of a mesh."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from pab_kernels.cli import options

if TYPE_CHECKING:
    import torch

    from pab_kernels.config import PABConfig
    from pab_kernels.distributed.mesh import Mesh
    from pab_kernels.pipelines.generate import Generated, Request, Step
    from pab_kernels.pipelines.loading import Pipeline, Source
    from pab_kernels.pipelines.sizes import VideoSize
    from pab_kernels.quality import Frames


@dataclass(frozen=True)
class Job:
    """The videos to make, as `pab generate` was asked for them; what the options mean, not what they say."""

    source: Source
    weights_size: VideoSize | None
    """What the weights are for; `request.size` may be one frame of it."""
    request: Request
    config: PABConfig | None
    compare: bool
    frames: Frames | None
    """What Open-Sora goes on from."""
    output: Path
    preview: int | None
    quiet: bool
    as_json: bool
    device: torch.device
    dtype: torch.dtype
    cache_device: str | None
    decode_memory: int | None
    seamless: bool
    offload_text: bool
    mesh: Mesh
    """Of more than one rank: each of them runs the job."""

    @property
    def of_one_frame(self) -> bool:
        """Whether it makes images."""
        return self.request.size is not None and self.request.size.frames == 1

    @property
    def runs(self) -> dict[str, PABConfig | None]:
        """The settings of each run by its name; None is the model's own code, on each rank by itself."""
        return {"without PAB": None, "with PAB": self.config} if self.compare else {"denoising": self.config}


def preview_path(output: Path, run: str, step: int) -> Path:
    """Where a run's preview of a step goes."""
    return output.with_name(f"{output.stem}-{run.replace(' ', '-')}-step-{step:03}.png")


def check_memory(job: Job, device: torch.device) -> None:
    """Refuse a job that will not fit on `device`, which each rank has one of; see `generate.check_memory`."""
    from pab_kernels.pipelines import generate as generation

    more = (job.decode_memory, job.seamless, job.offload_text, job.mesh)
    generation.check_memory(job.source, job.request, job.config, device, job.dtype, job.cache_device, *more)


def run(job: Job) -> int:
    """Make the videos; the exit code. Of several ranks the first one alone writes files and prints."""
    import torch.distributed as dist

    from pab_kernels.pipelines import generate as generation
    from pab_kernels.pipelines import outputs
    from pab_kernels.pipelines.given import encode
    from pab_kernels.pipelines.loading import load_pipeline
    from pab_kernels.pipelines.text_to_video import TextToVideoPipeline

    ranks, request, output = job.mesh.size, job.request, job.output
    rank = dist.get_rank() if ranks > 1 else 0
    place = options.rank_device(job.device, rank) if ranks > 1 else job.device
    check_memory(job, place)
    pipe = load_pipeline(
        job.source,
        job.weights_size,
        dtype=job.dtype,
        device=place,
        decode_memory=job.decode_memory,
        seamless=job.seamless,
        ranks=ranks,
    )
    given = None
    if job.frames is not None and request.size is not None and isinstance(pipe, TextToVideoPipeline):
        given = encode(pipe.vae, job.frames, request.size, request.all_seeds[0])
    talks = rank == 0
    results, previews = {}, []
    with _progress(job.quiet or not talks) as bar, ExitStack() as stack:
        for name, settings in job.runs.items():
            task = bar.add_task(name, total=request.steps, variant="")
            watch = _Watch(bar, task, pipe, partial(preview_path, output, name), job.preview)
            on_step = watch if talks and (not job.quiet or job.preview is not None) else None
            sinks = None
            if talks and job.source.decodes and not job.of_one_frame and name == list(job.runs)[-1]:
                sinks = stack.enter_context(outputs.video_writers(pipe, output, len(request.prompts)))
            results[name] = generation.generate(
                pipe, request, settings, on_step, job.cache_device, sinks, given, job.offload_text, mesh=job.mesh
            )
            previews += watch.written
        start = time.perf_counter()
        stack.close()  # what is still being encoded
        writing = time.perf_counter() - start
    finite = all(result.finite for result in results.values())
    if not talks:
        return 0 if finite else 1
    written = [*previews, *outputs.save(results, request, pipe, job.config, output)]
    summary = generation.summary(results, request) | {
        "writing": writing,
        "model": job.source.family,
        "pab": None if job.config is None else job.config.to_dict(),
        "device": str(place),
        "gpus": ranks,
        "mesh": str(job.mesh),
        "dtype": str(job.dtype).removeprefix("torch."),
        "files": [str(path) for path in written],
    }
    if job.as_json:
        typer.echo(json.dumps(_plain(summary), indent=1, allow_nan=False))
    elif not job.quiet:
        _print(results, summary, request)
    if not finite:
        options.print_error("the result is not finite: what was written is of no use")
    return 0 if finite else 1


class _Watch:
    """Moves the progress bar, and writes a preview every `every` steps to the `path` of the step."""

    def __init__(
        self, bar: Progress, task: TaskID, pipe: Pipeline, path: Callable[[int], Path], every: int | None
    ) -> None:
        self.bar, self.task, self.pipe, self.path, self.every = bar, task, pipe, path, every
        self.written: list[Path] = []

    def __call__(self, step: Step) -> None:
        from pab_kernels import figures
        from pab_kernels.pipelines.generate import preview

        shown = "" if step.variant is None else str(step.variant)
        self.bar.update(self.task, completed=step.done, total=step.total, variant=shown)
        if self.every is not None and step.done % self.every == 0:
            path = self.path(step.done)
            figures.save_frame(preview(self.pipe, step), path)
            self.written.append(path)


def _progress(quiet: bool) -> Progress:
    """On stderr: run, bar, step, what the step did, time left (in the end: taken)."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[variant]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=options.console(stderr=True),
        disable=quiet,
    )


def _print(results: Mapping[str, Generated], summary: Mapping[str, Any], request: Request) -> None:
    """For people: the files, the runtime's report, and a table with a column a run."""
    from pab_kernels.pipelines.memory import gib

    console = options.console()
    for path in summary["files"]:
        console.print(f"wrote {path}", soft_wrap=True)
    runs = list(results.values())
    table = Table("", *results)
    if runs[-1].frames is not None and request.size is not None:
        options.say_size(console, request.size, runs[-1].frames[0].shape[1:3])
    table.add_row("seconds", *(f"{run.seconds:.2f}" for run in runs))
    for part in runs[-1].parts:
        table.add_row(f"  {part}", *(f"{run.parts[part]:.2f}" for run in runs))
    if runs[-1].frames is not None:
        count = sum(len(video) for video in runs[-1].frames)
        table.add_row("  writing, beyond decoding", *[""] * (len(runs) - 1), f"{summary['writing']:.2f}")
        table.add_row("frames a second, of all but writing", *(f"{count / run.seconds:.1f}" for run in runs))
    if (report := runs[-1].report) is not None:
        console.print(str(report))
        blank = [""] * (len(runs) - 1)
        for kind, computed in report.computed.items():
            table.add_row(f"{kind}: computed + broadcast", *blank, f"{computed} + {report.broadcast[kind]}")
        table.add_row("cache, MiB", *blank, f"{report.cache_bytes / 2**20:.1f}")
        if report.host_bytes:
            table.add_row("cache in host memory, MiB", *blank, f"{report.host_bytes / 2**20:.1f}")
    if runs[-1].peak_bytes is not None:
        table.add_row("peak GPU memory, GiB", *(f"{gib(run.peak_bytes or 0):.2f}" for run in runs))
    table.add_row("finite", *("yes" if run.finite else "NO" for run in runs))
    if (comparison := summary["comparison"]) is not None:
        table.add_row("speed-up", "", f"{comparison['speed_up']:.2f}x")
        for i, score in enumerate(comparison.get("videos", ())):
            which = f", video {i}" if len(comparison["videos"]) > 1 else ""
            table.add_row(f"PSNR against no PAB{which}", "", f"{score['psnr']:.2f} dB")
            table.add_row(f"SSIM against no PAB{which}", "", f"{score['ssim']:.4f}")
            if score["lpips"] is not None:
                table.add_row(f"LPIPS against no PAB{which}", "", f"{score['lpips']:.4f}")
        if "latents_difference" in comparison:
            table.add_row("latents' difference to no PAB", "", f"{comparison['latents_difference']:.2e}")
    console.print(table)


def _plain(value: Any) -> Any:
    """`value` with null for what JSON has no number for: the PSNR of equal frames is infinite."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
