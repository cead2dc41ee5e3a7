"""`pab generate`: the command, and what its options mean."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pab_kernels.cli import generating, options
from pab_kernels.config import PABConfig
from pab_kernels.files import check_outputs, clear_left_over

if TYPE_CHECKING:
    from pab_kernels.pipelines.loading import Source
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
    gpus: options.Gpus = 1,
    mesh: options.MeshAxes = None,
) -> None:
    """Generate videos from text, with Pyramid Attention Broadcast.

    Examples:

    pab generate --prompt "a blue star moves up" --compare

    pab generate --prompt "a red circle moves right" --seed 3 --preview 5 --output star.gif

    pab generate --model maxin-cn/Latte-1 --prompt "a dog on a beach" --pab latte:347

    pab generate --model open_sora --resolution 480p --duration 2s --random-weights --json > run.json

    pab generate --model open_sora --resolution 360p --image first.png --fit crop --prompt "the waves roll in"

    pab generate --model open_sora --resolution 720p --still --random-weights --steps 2

    pab generate --model open_sora --resolution 480p --duration 8s --gpus 4 --mesh guidance=2,frames=2
    """
    import torch

    from pab_kernels.distributed.launch import check_ranks, launch
    from pab_kernels.measure.mesh_costs import chosen_mesh
    from pab_kernels.pipelines import generate as generation
    from pab_kernels.pipelines import outputs
    from pab_kernels.pipelines.decoding import parse_bytes
    from pab_kernels.pipelines.loading import Source, resolve_model
    from pab_kernels.pipelines.sizes import family_size

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
        if gpus > 1 and config is None:
            config = PABConfig()  # the model's own code knows no ranks
        place = options.device_named(device)
        options.on_host(cache_device)
        if gpus > 1:
            check_ranks(gpus, str(place))
        job = generating.Job(
            source=source,
            weights_size=sizes(),
            request=request,
            config=config,
            compare=compare,
            frames=_given_frames(family, source, shape, image, video, from_frame, fit),
            output=output,
            preview=preview,
            quiet=quiet,
            as_json=as_json,
            device=place,
            dtype=options.dtype_named(dtype or options.default_dtype(place)),
            cache_device=cache_device,
            decode_memory=memory,
            seamless=seamless,
            offload_text=offload_text,
            mesh=chosen_mesh(source, request, config, gpus, mesh),
        )
        files = outputs.output_files(output, len(request.prompts), source.decodes, compare or not source.decodes)
        longest = [generating.preview_path(output, name, request.steps) for name in job.runs if preview is not None]
        check_outputs(
            {"output": [path for both in files for path in both], "preview": longest},
            inputs=(model, weights, text_encoder, vae, pab, image, video),
        )
        if gpus == 1:
            code = generating.run(job)
        else:
            generating.check_memory(
                job, torch.device("cpu")
            )  # what only arguments tell; the rest is each rank's to see
            if not quiet:
                options.console(stderr=True).print(f"{gpus} ranks, mesh {job.mesh}")
            try:
                code = launch(generating.run, job, ranks=gpus, device=place.type)
            except BaseException:
                clear_left_over(output.parent)
                raise
    if code:
        raise typer.Exit(code)


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
