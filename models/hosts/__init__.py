"""Eager hosts: Open-Sora's and Open-Sora-Plan's transformers, which no package index carries.

Plain PyTorch with the official parameter names: what an adapter is tested against. A file here may import `ops.checks`
and diffusers, no adapter."""

from pab_kernels.models.hosts.open_sora_plan import OpenSoraPlanV110, OpenSoraPlanV120
from pab_kernels.models.hosts.stdit3 import STDiT3

__all__ = ["OpenSoraPlanV110", "OpenSoraPlanV120", "STDiT3"]
