"""What this installation has: versions, GPU, and which backend serves each op."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from pab_kernels.ops import backends as table


def versions() -> dict[str, str]:
    """Versions of the packages that matter, and the compiled part's own account."""
    found = {"python": platform.python_version()}
    found |= {name: version(name) for name in ("pab-kernels", "torch", "triton", "diffusers", "transformers")}
    found["cuda kernels"] = "left out of this build" if table._C is None else _built(table._C.build_info())
    return found


def version(package: str) -> str:
    """Of a package; "not installed" also for this one where it runs from a folder of sources."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _built(info: dict[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in info.items())


def gpu() -> str:
    """The GPU that torch sees, or why there is none."""
    if not torch.cuda.is_available():
        return "none: torch was built for the CPU" if torch.version.cuda is None else "none: torch sees no CUDA GPU"
    properties = torch.cuda.get_device_properties(0)
    return (
        f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB, "
        f"CUDA {torch.version.cuda}"
    )


def commit() -> str:
    """The commit that this package is at, or "unknown"; PAB_COMMIT names that of a copy without its history."""
    if named := os.environ.get("PAB_COMMIT"):
        return named
    command = ["git", "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def device_name(device: torch.device) -> str:
    """The GPU's own name, or "CPU"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def cpu() -> str:
    """Model of the processor, and how many cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = platform.processor() or platform.machine()
    known = Path("/proc/cpuinfo")
    if known.is_file():
        lines = known.read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {cores} cores"


def backends() -> dict[str, table.Choice]:
    """The backend of each op for the shapes of the families, in the dtype that suits the device."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    fp8 = torch.empty(16, 16, dtype=torch.float8_e4m3fn, device=device)
    fp8_linear = fp8, fp8, torch.empty(16, dtype=torch.bfloat16, device=device)
    spatial, full, text = empty(1, 1590, 16, 72), empty(1, 2048, 24, 96), empty(1, 300, 16, 72)
    wan, ltx = empty(1, 8192, 12, 128), empty(1, 2048, 32, 64)
    length = torch.empty(1, dtype=torch.int32, device=device)
    return {
        "residual_norm_modulate": table.choose("residual_norm_modulate", empty(1, 1, 1152)),
        "temporal_attention": table.choose("temporal_attention", empty(1, 16, 1, 3, 16, 72)),
        "qk_norm_rope": table.choose("qk_norm_rope", empty(1, 1, 3, 16, 72)),
        "key_scales": table.choose("key_scales", empty(1, 1, 16, 72)),
        "scaled_linear": table.choose("scaled_linear", *fp8_linear),
        "scaled_linear_gelu": table.choose("scaled_linear_gelu", *fp8_linear),
        "attention, spatial": table.choose("attention", spatial, spatial, spatial),
        "attention, full 3D": table.choose("attention", full, full, full),
        "attention, Wan": table.choose("attention", wan, wan, wan),
        "attention, LTX-Video": table.choose("attention", ltx, ltx, ltx),
        "attention, in e4m3": table.choose("fp8_attention", wan, wan, wan),
        "attention, text lengths": table.choose("attention", spatial, text, text, length),
    }
