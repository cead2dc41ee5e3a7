"""`pab decode`: latents that an earlier run left, as a video."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from pab_kernels.cli import options
from pab_kernels.files import check_outputs


def decode(
    file: Annotated[Path, typer.Argument(help="Latents that `pab generate` wrote, .safetensors.")],
    vae: options.Vae = None,
    output: Annotated[
        Path | None, typer.Option(help="Where the video goes, .mp4 or .gif; by default beside the latents.")
    ] = None,
    random_weights: Annotated[bool, typer.Option(help="No decoder's weights: for timing.")] = False,
    decode_memory: options.DecodeMemory = None,
    seamless: options.Seamless = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON, and nothing else.")] = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Decode latents to a video.

    Examples:

    pab decode outputs/video.safetensors --vae OpenSora-VAE-v1.2

    pab decode outputs/video.safetensors --vae Open-Sora-Plan-v1.2.0/vae --decode-memory 8GiB --output plan.mp4
    """
    from pab_kernels import figures
    from pab_kernels.pipelines import latents as files
    from pab_kernels.pipelines import outputs
    from pab_kernels.pipelines.decoding import decode_video, parse_bytes
    from pab_kernels.pipelines.loading import FAMILIES, Source, load_decoder

    with options.clean_errors():
        memory = None if decode_memory is None else parse_bytes(decode_memory)
        hidden, metadata = files.load(file)
        size = files.size_of(metadata, file, hidden.shape)
        if metadata["family"] not in FAMILIES:
            raise ValueError(f"{file}: is of {metadata['family']!r}, must be one of {', '.join(FAMILIES)}")
        source = Source(metadata["family"], vae=vae, random_weights=random_weights)
        target = file.with_suffix(".mp4") if output is None else output
        outputs.check_output(target, source)
        check_outputs({"output": [target]}, inputs=(file, vae))
        place = options.device_named(device)
        number = options.dtype_named(dtype or options.default_dtype(place))
        decoder = load_decoder(source, dtype=number, device=place, memory=memory, seamless=seamless)
        start = time.perf_counter()
        scale, shift = metadata.get("latent_scale", (1.0,)), metadata.get("latent_shift", (0.0,))
        with figures.video_writer(target, metadata.get("fps", 24)) as add:
            video = decode_video(decoder, hidden, size, scale, shift, add)
            decoded = time.perf_counter()
        written = time.perf_counter()
    parts = {"decoding": decoded - start, "writing": written - decoded}
    count, height, width = video.frames.shape[:3]
    if as_json:
        typer.echo(
            json.dumps(
                {"files": [str(target)], "video": [count, height, width], "parts": parts, "finite": video.finite}
            )
        )
    else:
        console = options.console()
        options.say_size(console, size, (height, width))
        console.print(f"wrote {target}: {count} frames of {width}x{height}", soft_wrap=True)
        console.print(f"decoding {parts['decoding']:.2f} s, writing {parts['writing']:.2f} s beyond it")
    if not video.finite:
        options.print_error("the result is not finite: what was written is of no use")
        raise typer.Exit(1)
