"""`pab verify`: a recorded run of the original, replayed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pab_kernels.cli import options
from pab_kernels.config import PABConfig

if TYPE_CHECKING:
    import torch


def verify(
    file: Annotated[Path, typer.Argument(help="A recorded run, or recorded calls of an autoencoder, .safetensors.")],
    tolerance: Annotated[float | None, typer.Option(min=0, help="Largest error; by default fit to the dtype.")] = None,
    device: options.Device = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Replay a recording of the original; exit code 1 if a step or a pixel strays beyond the tolerance.

    Examples:

    pab verify tests/data/goldens/latte.safetensors

    pab verify tests/data/vae/open_sora.safetensors
    """
    from pab_kernels.measure import verify as recorded
    from pab_kernels.measure import verify_vae

    console = options.console()
    with options.clean_errors():
        number, place = options.dtype_named(dtype), options.device_named(device)
        if tolerance is not None and not tolerance > 0:
            raise ValueError(f"tolerance: got {tolerance}, must be above 0")
        if verify_vae.is_vae(file):
            raise typer.Exit(0 if _verify_vae(file, place, number, tolerance) else 1)
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


def _verify_vae(file: Path, device: torch.device, dtype: torch.dtype, tolerance: float | None) -> bool:
    """A line for each recorded call; whether all are within the tolerance."""
    from pab_kernels.measure import verify_vae

    console = options.console()
    recording = verify_vae.VaeRecording.load(file)
    tolerance = verify_vae.TOLERANCE[dtype] if tolerance is None else tolerance
    within = True
    for case, error in verify_vae.replay(recording, device, dtype):
        within &= error <= tolerance
        shape = "x".join(map(str, case.want.shape))
        console.print(
            f"{recording.family} {case.kind} to {shape}: largest difference {error:.2e} (tolerance {tolerance:.0e})",
            soft_wrap=True,
        )
    return within
