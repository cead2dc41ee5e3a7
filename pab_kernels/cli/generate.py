"""`pab generate`: the command, its progress bar, table and JSON."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from pab_kernels.cli import options
from pab_kernels.files import check_outputs

if TYPE_CHECKING:
    from pab_kernels.pipelines.generate import Generated, Request, Step
    from pab_kernels.pipelines.loading import Pipeline, Source
    from pab_kernels.pipelines.sizes import VideoSize
    from pab_kernels.quality import Frames

DEMO_PROMPT = "a red circle moves right over a striped background"


def generate(
    prompt: Annotated[list[str] | None, typer.Option(help="What to show; repeat it for several videos.")] = None,
    videos: Annotated[int, typer.Option(min=1, help="Videos of each prompt, which differ in their noise.")] = 1,
    negative_prompt: Annotated[str, typer.Option(help="What to avoid.")] = "",
    model: options.Model = "demo",
    weights: options.Weights = None,
    text_encoder: options.TextEncoder = None,
    vae: options.Vae = None,
    random_weights: Annotated[
        bool, typer.Option(help="No checkpoint, text encoder or decoder's weights: for timing.")
    ] = False,
    latents_only: Annotated[bool, typer.Option("--latents-only", help="Write latents, for `pab decode`.")] = False,
    decode_memory: options.DecodeMemory = None,
    seamless: options.Seamless = False,
    offload_text: Annotated[
        bool, typer.Option("--offload-text", help="Keep the text encoder in host memory while the transformer runs.")
    ] = False,
    image: Annotated[Path | None, typer.Option(help="Open-Sora: the first frame of the video.")] = None,
    video: Annotated[Path | None, typer.Option(help="Open-Sora: a video to go on from.")] = None,
    from_frame: Annotated[
        int | None, typer.Option(help="The first of the 17 frames of --video; by default its last 17.")
    ] = None,
    fit: Annotated[str | None, typer.Option(help="crop or pad an --image or --video of another aspect.")] = None,
    resolution: options.Resolution = None,
    duration: options.Duration = None,
    aspect: options.Aspect = None,
    size: options.Size = None,
    still: Annotated[bool, typer.Option("--still", help="One frame; Latte leaves temporal attention out.")] = False,
    pab: options.Pab = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; by default the model's own.")] = None,
    guidance: options.Guidance = None,
    seed: Annotated[list[int] | None, typer.Option(help="Of the noise; once, or once for each video.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where the video goes, .mp4 or .gif; an image is a .png.")] = None,
    compare: Annotated[bool, typer.Option(help="Generate with and without PAB, and compare.")] = False,
    preview: Annotated[
        int | None, typer.Option(min=1, help="Every so many steps, write a frame as a PNG beside the video.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a summary as JSON, and nothing else on stdout.")
    ] = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    cache_device: options.CacheDevice = None,
    cache_dtype: options.CacheDtype = None,
    linear_precision: options.LinearPrecision = None,
    attention_precision: options.AttentionPrecision = None,
) -> None:
    """Generate videos from text, with Pyramid Attention Broadcast.

    Examples:

    pab generate --prompt "a blue star moves up" --compare

    pab generate --prompt "a red circle moves right" --seed 3 --preview 5 --output star.gif

    pab generate --model maxin-cn/Latte-1 --prompt "a dog on a beach" --pab latte:347

    pab generate --model open_sora --resolution 480p --duration 2s --random-weights --json > run.json

    pab generate --model open_sora --resolution 360p --image first.png --fit crop --prompt "the waves roll in"

    pab generate --model open_sora --resolution 720p --still --random-weights --steps 2
    """
    from pab_kernels.pipelines import generate as generation
    from pab_kernels.pipelines import outputs
    from pab_kernels.pipelines.decoding import parse_bytes
    from pab_kernels.pipelines.given import encode
    from pab_kernels.pipelines.loading import Source, load_pipeline, resolve_model
    from pab_kernels.pipelines.sizes import family_size
    from pab_kernels.pipelines.text_to_video import TextToVideoPipeline

    with options.clean_errors():
        source = Source(resolve_model(model, size), weights, text_encoder, vae, random_weights, latents_only)
        memory = None if decode_memory is None else parse_bytes(decode_memory)
        family = source.family
        defaults = generation.DEFAULTS[family]
        sizes = partial(family_size, family, resolution=resolution, duration=duration, aspect=aspect, size=size)
        shape = sizes(image=still)
        of_one_frame = shape is not None and shape.frames == 1
        if output is None:
            output = Path("outputs/image.png" if of_one_frame else "outputs/video.mp4")
        outputs.check_output(output, source, of_one_frame)
        frames = _given_frames(family, source, shape, image, video, from_frame, fit)
        request = generation.Request(
            [text for text in prompt or [DEMO_PROMPT] for _ in range(videos)],
            negative_prompt,
            defaults.steps if steps is None else steps,
            defaults.guidance if guidance is None else guidance,
            seed or [0],
            shape,
        )
        pab = defaults.preset if pab is None else pab
        small = {"linear_precision": linear_precision, "attention_precision": attention_precision}
        config = generation.pab_settings(pab, cache_dtype=cache_dtype, **small)
        if compare and config is None:
            raise ValueError("pab: got 'off' with --compare, must be a preset or a file: there is nothing to compare")
        place = options.device_named(device)
        number = options.dtype_named(dtype or options.default_dtype(place))
        options.on_host(cache_device)
        generation.check_memory(source, request, config, place, number, cache_device, memory, seamless, offload_text)
        runs = {"without PAB": None, "with PAB": config} if compare else {"denoising": config}
        files = outputs.output_files(output, len(request.prompts), source.decodes, compare or not source.decodes)
        longest = [_preview_path(output, name, request.steps) for name in runs if preview is not None]
        check_outputs(
            {"output": [path for both in files for path in both], "preview": longest},
            inputs=(model, weights, text_encoder, vae, pab, image, video),
        )
        pipe = load_pipeline(  # the weights are those of a video
            source, sizes(), dtype=number, device=place, decode_memory=memory, seamless=seamless
        )
        given = None
        if frames is not None and shape is not None and isinstance(pipe, TextToVideoPipeline):
            given = encode(pipe.vae, frames, shape, request.all_seeds[0])
        results, previews = {}, []
        with _progress(quiet) as bar, ExitStack() as stack:
            for name, settings in runs.items():
                task = bar.add_task(name, total=request.steps, variant="")
                watch = _Watch(bar, task, pipe, partial(_preview_path, output, name), preview)
                on_step = watch if not quiet or preview is not None else None
                sinks = None
                if source.decodes and not of_one_frame and name == list(runs)[-1]:
                    sinks = stack.enter_context(outputs.video_writers(pipe, output, len(request.prompts)))
                results[name] = generation.generate(
                    pipe, request, settings, on_step, cache_device, sinks, given, offload_text
                )
                previews += watch.written
            start = time.perf_counter()
            stack.close()  # what is still being encoded
            writing = time.perf_counter() - start
        written = [*previews, *outputs.save(results, request, pipe, config, output)]
        summary = generation.summary(results, request) | {
            "writing": writing,
            "model": family,
            "pab": None if config is None else config.to_dict(),
            "device": str(place),
            "dtype": str(number).removeprefix("torch."),
            "files": [str(path) for path in written],
        }
    if as_json:
        typer.echo(json.dumps(_plain(summary), indent=1, allow_nan=False))
    elif not quiet:
        _print(results, summary, request)
    if not all(result.finite for result in results.values()):
        options.print_error("the result is not finite: what was written is of no use")
        raise typer.Exit(1)


def _given_frames(
    family: str,
    source: Source,
    size: VideoSize | None,
    image: Path | None,
    video: Path | None,
    from_frame: int | None,
    fit: str | None,
) -> Frames | None:
    """The frames that an image or a video gives, in the size of the new video."""
    from pab_kernels.pipelines import given

    if image is None and video is None:
        if from_frame is not None or fit is not None:
            raise ValueError("from_frame, fit: got one without --image or --video")
        return None
    if image is not None and (video is not None or from_frame is not None):
        raise ValueError("image: got it with --video or --from-frame, must be given alone")
    if family != "open_sora" or size is None:
        raise ValueError(f"image, video: got one for {family}, but only open_sora goes on from frames")
    if not source.decodes:
        raise ValueError("image, video: got one with --latents-only, but they need the autoencoder")
    frames = given.load_image(image) if image is not None else given.load_frames(str(video), from_frame)
    return given.fit(frames, size, fit)


def _preview_path(output: Path, run: str, step: int) -> Path:
    return output.with_name(f"{output.stem}-{run.replace(' ', '-')}-step-{step:03}.png")


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
