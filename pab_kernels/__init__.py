"""Kernel-accelerated Pyramid Attention Broadcast for video diffusion transformers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pab_kernels.blocks.branches import CrossAttention, Mlp, TextKV, text_kv
    from pab_kernels.blocks.fused import Slot, fused_pab_attention
    from pab_kernels.blocks.linears import Fp8Linear, Linear
    from pab_kernels.blocks.self_attention import SelfAttention
    from pab_kernels.config import PABConfig
    from pab_kernels.distributed.mesh import Mesh
    from pab_kernels.runtime.accelerate import accelerate
    from pab_kernels.runtime.handle import PABHandle
    from pab_kernels.runtime.pair import PABHandles
    from pab_kernels.runtime.report import Report
    from pab_kernels.schedule import Schedule, StepVariant

_HOMES = {
    "blocks.branches": ("CrossAttention", "Mlp", "TextKV", "text_kv"),
    "blocks.fused": ("Slot", "fused_pab_attention"),
    "blocks.linears": ("Fp8Linear", "Linear"),
    "blocks.self_attention": ("SelfAttention",),
    "config": ("PABConfig",),
    "distributed.mesh": ("Mesh",),
    "runtime.report": ("Report",),
    "runtime.accelerate": ("accelerate",),
    "runtime.handle": ("PABHandle",),
    "runtime.pair": ("PABHandles",),
    "schedule": ("Schedule", "StepVariant"),
}

__all__ = [
    "CrossAttention",
    "Fp8Linear",
    "Linear",
    "Mesh",
    "Mlp",
    "PABConfig",
    "PABHandle",
    "PABHandles",
    "Report",
    "Schedule",
    "SelfAttention",
    "Slot",
    "StepVariant",
    "TextKV",
    "accelerate",
    "fused_pab_attention",
    "text_kv",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that settings and schedules load without torch."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"pab_kernels.{module}"), name)
    raise AttributeError(f"module 'pab_kernels' has no attribute {name!r}")
