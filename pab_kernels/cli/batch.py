"""`pab batch`: the command, its progress, status and JSON."""

from __future__ import annotations

import json
import os
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pab_kernels.cli import options
from pab_kernels.files import check_outputs

if TYPE_CHECKING:
    from pab_kernels.batch.rows import Row
    from pab_kernels.batch.work import Job
    from pab_kernels.distributed.mesh import Mesh

SHOWN, ROWS_SHOWN = 5, 20
"""Of errors, the most frequent first, and of failed rows, how many are printed."""


def batch(
    prompts: Annotated[Path | None, typer.Argument(help="Rows to do, .jsonl, .csv or .parquet.")] = None,
    output: Annotated[
        str, typer.Option(help="A folder, or a URL that fsspec opens: videos and manifest.jsonl go there.")
    ] = "outputs/batch",
    status: Annotated[
        str | None, typer.Option("--status", help="Say how far the batch in this folder or at this URL is.")
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Work through Ray: the cluster of RAY_ADDRESS, else this machine.")
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Ray: so many actors at most; default one a GPU.")] = None,
    retries: Annotated[int, typer.Option(min=0, help="Ray: how often a row is done again whose worker died.")] = 3,
    timeout: Annotated[
        float | None, typer.Option(min=1, help="Ray: seconds after which a worker that is at a row counts as hung.")
    ] = None,
    max_failures: Annotated[int | None, typer.Option(min=0, help="Stop when more rows than this have failed.")] = None,
    video_format: Annotated[str, typer.Option("--format", help="mp4 or gif.")] = "mp4",
    model: options.Model = "demo",
    weights: options.Weights = None,
    text_encoder: options.TextEncoder = None,
    vae: options.Vae = None,
    random_weights: Annotated[bool, typer.Option(help="No checkpoint, text encoder or decoder's weights.")] = False,
    latents_only: Annotated[bool, typer.Option("--latents-only", help="Write latents, for `pab decode`.")] = False,
    decode_memory: options.DecodeMemory = None,
    seamless: options.Seamless = False,
    offload_text: Annotated[
        bool, typer.Option("--offload-text", help="Keep the text encoder in host memory while the transformer runs.")
    ] = False,
    negative_prompt: Annotated[str, typer.Option(help="Of rows that have none; so are the options below.")] = "",
    resolution: options.Resolution = None,
    duration: options.Duration = None,
    aspect: options.Aspect = None,
    size: options.Size = None,
    pab: options.Pab = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; by default the model's own.")] = None,
    guidance: options.Guidance = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
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
    gpus: options.Gpus = 1,
    mesh: options.MeshAxes = None,
) -> None:
    """Make a video of every row of a file, here or on many machines; run it again to do what is missing.

    Examples:

    pab batch prompts.jsonl --output outputs/batch --format gif

    pab batch prompts.csv --model open_sora --resolution 480p --ray --max-failures 20

    pab batch prompts.csv --model open_sora --resolution 720p --gpus 4 --ray

    pab batch --status outputs/batch --json
    """
    from pab_kernels.batch.store import Store

    with options.clean_errors(), ExitStack() as stack:
        if (prompts is None) == (status is None):
            raise ValueError("prompts, status: got both or neither, must be one of them")
        if status is not None:
            found = _status(Store(status), status)
            _print(found, as_json, quiet)
            return
        from pab_kernels.batch import manifest, on_ray, rows, run, work
        from pab_kernels.distributed.launch import check_ranks
        from pab_kernels.measure.mesh_costs import chosen_mesh, parse_mesh
        from pab_kernels.pipelines import generate as generation
        from pab_kernels.pipelines import outputs
        from pab_kernels.pipelines.decoding import parse_bytes
        from pab_kernels.pipelines.loading import Source, resolve_model
        from pab_kernels.pipelines.sizes import family_size

        assert prompts is not None
        given = rows.read_rows(prompts)
        source = Source(resolve_model(model, size), weights, text_encoder, vae, random_weights, latents_only)
        if video_format not in ("mp4", "gif"):
            raise ValueError(f"format: got {video_format!r}, must be mp4 or gif")
        outputs.check_output(Path(f"video.{video_format}"), source)
        family = source.family
        if offload_text:
            generation.check_offload(family)
        changes = {
            "cache_dtype": cache_dtype,
            "linear_precision": linear_precision,
            "attention_precision": attention_precision,
        }
        defaults = rows.defaults(
            family,
            changes,
            negative_prompt=negative_prompt,
            seed=seed,
            resolution=resolution,
            duration=duration,
            aspect=aspect,
            size=size,
            steps=steps,
            guidance=guidance,
            settings=pab,
        )
        loaded = family_size(family, resolution=resolution, duration=duration, aspect=aspect, size=size)
        generation.pab_settings(defaults["settings"], **changes)
        options.on_host(cache_device)
        parse_mesh(mesh, gpus)
        store = Store(output)
        if store.folder is not None:
            check_outputs({"output": [store.folder / manifest.NAME]}, inputs=(prompts, model, weights, pab))
        ray = ray or bool(os.environ.get("RAY_ADDRESS"))
        for name, value in (("workers", workers), ("timeout", timeout)):
            if value is not None and not ray:
                raise ValueError(f"{name}: got {value:g}, must be left out without --ray or RAY_ADDRESS")
        if ray:
            stack.enter_context(on_ray.cluster())
            place = device or ("cuda" if on_ray.gpus() else "cpu")
            if place not in ("cpu", "cuda"):
                raise ValueError(f"device: got {place!r} with --ray, must be cpu or cuda: Ray chooses which")
            kind = place
        else:
            chosen = options.device_named(device)
            place, kind = str(chosen), chosen.type
            if gpus > 1:
                check_ranks(gpus, place)
        dtype = dtype or ("bfloat16" if kind == "cuda" else "float32")
        options.dtype_named(dtype)
        job = work.job(
            source,
            output if store.folder is None else str(store.folder),
            size=loaded,
            dtype=dtype,
            device=place,
            suffix=f".{video_format}",
            decode_memory=None if decode_memory is None else parse_bytes(decode_memory),
            seamless=seamless,
            offload_text=offload_text,
            cache_device=cache_device,
            gpus=gpus,
        )

        def mesh_of(row: Row) -> Mesh:
            return chosen_mesh(source, row.request, row.config, gpus, mesh)

        planned = rows.plan(given, family, defaults, job.identity(), mesh_of if gpus > 1 else None)
        if all(row.error is not None for row in planned):
            raise ValueError(f"prompts: none of {len(given)} rows can be made; row 1: {planned[0].error}")
        stack.enter_context(store.alone())
        kept = manifest.Manifest(store, planned)
        how = (
            partial(on_ray.on_ray, job, workers=workers, retries=retries, timeout=timeout)
            if ray
            else partial(run.here, job)
        )
        summary = _run(kept, how, max_failures, quiet)
        summary |= {"output": output, "rows": len(given), "repeated": len(given) - len(planned), "job": _plain(job)}
        summary |= _failures([kept.records[row.id] for row in planned])
    _print(summary, as_json, quiet)
    if summary["stopped"]:
        options.print_error(f"stopped: {summary['failed']} rows have failed, more than --max-failures {max_failures}")
    if summary["errors"]:
        raise typer.Exit(1)


def _run(kept: Any, how: Callable[..., Any], max_failures: int | None, quiet: bool) -> dict[str, Any]:
    """Run with a bar on stderr, if there is anything to do: videos done, failed, videos an hour, time left."""
    import time

    from pab_kernels.batch import run

    start = time.monotonic()
    with Progress(
        TextColumn("videos"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[said]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=options.console(stderr=True),
        disable=quiet or not kept.todo,
    ) as bar:
        task = bar.add_task("", total=len(kept.todo), said="")
        tally: Counter[str] = Counter()

        def on_record(each: Mapping[str, Any]) -> None:
            tally[each["status"]] += 1
            rate = 3600 * tally["done"] / (time.monotonic() - start)
            failed = f", {tally['failed']} failed" if tally["failed"] else ""
            bar.update(task, advance=1, said=f"{rate:.0f} an hour{failed}")

        return run.run(kept, how, max_failures, on_record)


def _status(store: Any, place: str) -> dict[str, Any]:
    """How far a batch is, by its manifest: the driver may be at work on another machine."""
    from pab_kernels.batch import manifest

    if store.folder is not None and store.folder.exists() and not store.folder.is_dir():
        raise ValueError(f"status: got {place}, must be a folder")
    records = manifest.read(store)
    if not records:
        raise FileNotFoundError(f"status: {place} has no {manifest.NAME}")
    seconds = [each["seconds"] for each in records if each["seconds"] is not None]
    return {
        "output": place,
        "counts": manifest.counts(records),
        "median_seconds": statistics.median(seconds) if seconds else None,
        **_failures(records),
    }


def _failures(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many rows failed with each message, the most frequent first, and their numbers in the file."""
    failed = [each for each in records if each["status"] == "failed"]
    return {
        "errors": dict(Counter(str(each["error"]) for each in failed).most_common()),
        "failed_rows": sorted(each["row"] for each in failed),
    }


def _print(summary: Mapping[str, Any], as_json: bool, quiet: bool) -> None:
    if as_json:
        typer.echo(json.dumps(summary, indent=1, allow_nan=False))
        return
    if quiet:
        return
    console = options.console()
    counts = ", ".join(f"{count} {status}" for status, count in summary["counts"].items())
    console.print(f"{summary['output']}: {counts}", soft_wrap=True)
    if "made" in summary:
        said = f"this run: {summary['made']} made in {summary['seconds']:.1f} s"
        console.print(f"{said}, {summary['videos_per_hour']:.0f} videos an hour, {summary['failed']} failed")
        if summary["repeated"]:
            console.print(f"{summary['repeated']} rows ask for the same video as another row")
    elif summary["median_seconds"] is not None:
        console.print(f"{summary['median_seconds']:.2f} s a video (median)")
    for message, count in list(summary["errors"].items())[:SHOWN]:
        console.print(f"{count} failed: {message}", soft_wrap=True)
    if len(summary["errors"]) > SHOWN:
        console.print(f"and {len(summary['errors']) - SHOWN} other errors, see the manifest")
    if rows := summary["failed_rows"]:
        more = ", ..." if len(rows) > ROWS_SHOWN else ""
        console.print(f"rows of the file that failed: {', '.join(map(str, rows[:ROWS_SHOWN]))}{more}", soft_wrap=True)


def _plain(job: Job) -> dict[str, Any]:
    """What a summary says of a job."""
    return {"model": job.source.family, "device": job.device, "dtype": job.dtype, "gpus": job.gpus}
