"""`pab verify`: a recorded run of the original, replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pab_kernels.cli import options
from pab_kernels.config import PABConfig


def verify(
    file: Annotated[Path, typer.Argument(help="A recorded run, .safetensors.")],
    tolerance: Annotated[float | None, typer.Option(help="Largest error; by default fit to the dtype.")] = None,
    device: options.Device = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Replay a recorded run of the original; exit code 1 if a step strays beyond the tolerance.

    Example:

    pab verify tests/data/goldens/latte.safetensors
    """
    from pab_kernels.measure import verify as recorded

    console = options.console()
    with options.clean_errors():
        number, place = options.dtype_named(dtype), options.device_named(device)
        if tolerance is not None and not tolerance > 0:
            raise ValueError(f"tolerance: got {tolerance}, must be above 0")
        recording = recorded.Recording.load(file)
        if tolerance is None:
            tolerance = recorded.default_tolerance(recording.family, number)
        within = True
        for name, config, steps in (
            ("without PAB", PABConfig(), recording.base),
            ("with PAB", recording.pab_config, recording.pab),
        ):
            error = recorded.worst_error(recorded.replay(recording, config, place, number), steps)
            within &= error <= tolerance
            console.print(f"{recording.family} {name}: worst step {error:.2e} (tolerance {tolerance:.0e})")
    raise typer.Exit(0 if within else 1)
