"""What `pab generate` leaves: videos, images, latents, contact sheets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pab_kernels import figures
from pab_kernels.config import PABConfig
from pab_kernels.pipelines import latents
from pab_kernels.pipelines.demo import DemoPipeline
from pab_kernels.pipelines.generate import Generated, Request
from pab_kernels.pipelines.latte import LatteLatents
from pab_kernels.pipelines.loading import Pipeline, Source
from pab_kernels.pipelines.sizes import FPS
from pab_kernels.quality import Frames


def check_output(output: Path, source: Source, of_one_frame: bool = False) -> None:
    """Raise ValueError for a kind of file that cannot be written."""
    if of_one_frame:
        if output.suffix != ".png":
            raise ValueError(f"output: got {output.name!r}, must end in .png: it is a single image")
        return
    if output.suffix not in figures.VIDEO_SUFFIXES:
        raise ValueError(f"output: got {output.name!r}, must end in .mp4 or .gif")
    if output.suffix == ".mp4" and source.decodes and (lacks := figures.why_no_mp4()) is not None:
        raise ValueError(f"output: got {output.name!r}, must end in .gif: .mp4 needs {lacks}")


def output_files(output: Path, count: int, decodes: bool, pictures: bool) -> list[tuple[Path, Path | None]]:
    """The video or image, or else latents, of each of `count` prompts, and its contact sheet; what `save` writes."""
    videos = [output] if count == 1 else [output.with_stem(f"{output.stem}-{i}") for i in range(count)]
    sheet = "-sheet" if decodes and output.suffix == ".png" else ""
    return [
        (
            path if decodes else path.with_suffix(".safetensors"),
            path.with_name(f"{path.stem}{sheet}.png") if pictures else None,
        )
        for path in videos
    ]


@contextmanager
def video_writers(pipe: Pipeline, output: Path, count: int) -> Iterator[list[Callable[[Frames], None]]]:
    """For each of `count` prompts a function that takes frames of its video; the files are there when the block ends.

    The demo's small videos are enlarged by whole factors; all others have the size that was decoded.
    """
    family = getattr(pipe, "family", "latte")
    least = 256 if isinstance(pipe, DemoPipeline) else 1
    with ExitStack() as stack:
        files = output_files(output, count, True, False)
        yield [
            stack.enter_context(figures.video_writer(path, FPS.get(family, 8), least_size=least)) for path, _ in files
        ]


def save(
    results: Mapping[str, Generated], request: Request, pipe: Pipeline, config: PABConfig | None, output: Path
) -> list[Path]:
    """Write the latents of the last of `results` where there is no decoder; `video_writers` has written videos.

    Several results (with and without PAB), and latents, get a contact sheet as a PNG beside the file.

    Parameters
    ----------
    results : mapping of str to Generated
        Names and runs of the same request.
    request : Request
    pipe : Pipeline
    config : PABConfig or None
        For the latents' metadata.
    output : Path
        .mp4 or .gif, of an image .png; the i-th of several prompts gets "-i" before the suffix, latents get
        .safetensors instead.

    Returns
    -------
    list of Path
        The files written.
    """
    last = list(results.values())[-1]
    files = output_files(output, len(request.prompts), last.frames is not None, last.frames is None or len(results) > 1)
    for i, (path, _) in enumerate(files):
        if last.frames is None or path.suffix == ".png":
            save_one(last, request, pipe, config, path, i)
    for i, (_, sheet) in enumerate(files):  # only now: a picture that fails costs no video
        if sheet is not None:
            figures.contact_sheet(_rows(results, i), sheet, request.prompts[i])
    return [path for both in files for path in both if path is not None]


def save_one(
    result: Generated, request: Request, pipe: Pipeline, config: PABConfig | None, path: Path, index: int = 0
) -> None:
    """Write the image of the prompt `index`, or where there is no decoder its latents. Parameters are as for `save`."""
    if result.frames is not None:
        figures.save_frame(result.frames[index], path, least_size=1)
    else:
        assert result.latents is not None
        latents.save(result.latents[index], path, _metadata(request, pipe, config, index))


def _rows(results: Mapping[str, Generated], index: int) -> dict[str, Frames]:
    """Of each run the video of one prompt, or a look at its latents."""
    if rows := {name: run.frames[index] for name, run in results.items() if run.frames is not None}:
        return rows
    hidden = {name: run.latents[index] for name, run in results.items() if run.latents is not None}
    first = next(iter(hidden.values()))
    return {name: latents.first_look(value, like=first) for name, value in hidden.items()}


def _metadata(request: Request, pipe: Any, config: PABConfig | None, index: int) -> dict[str, Any]:
    """What it takes to decode the latents later, and to make them again."""
    size = request.size
    if isinstance(pipe, LatteLatents) or size is None:
        size = pipe.size(1 if size is not None and size.frames == 1 else None)
    return {
        "family": pipe.family,
        **{name: value for name, value in dataclasses.asdict(size).items() if name != "latent"},
        "fps": FPS[pipe.family],
        "latent_scale": pipe.latent_scale,
        "latent_shift": pipe.latent_shift,
        "prompt": request.prompts[index],
        "negative_prompt": request.negative_prompt,
        "seed": request.all_seeds[index],
        "steps": request.steps,
        "guidance": request.guidance,
        "pab": None if config is None else config.to_dict(),
    }
