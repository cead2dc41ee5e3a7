"""Kernel-accelerated Pyramid Attention Broadcast for video diffusion transformers."""

from pab_kernels.branches import CrossAttention, Linear, Mlp, SelfAttention, Slot, TextKV, fused_pab_attention, text_kv
from pab_kernels.config import PABConfig
from pab_kernels.runtime import PABHandle, accelerate
from pab_kernels.schedule import Schedule, StepVariant

__all__ = [
    "CrossAttention",
    "Linear",
    "Mlp",
    "PABConfig",
    "PABHandle",
    "Schedule",
    "SelfAttention",
    "Slot",
    "StepVariant",
    "TextKV",
    "accelerate",
    "fused_pab_attention",
    "text_kv",
]
