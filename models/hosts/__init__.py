"""Eager hosts: Open-Sora's and Open-Sora-Plan's transformers, which no package index carries."""

from pab_kernels.models.hosts.open_sora_plan import OpenSoraPlanV110, OpenSoraPlanV120
from pab_kernels.models.hosts.stdit3 import STDiT3

__all__ = ["OpenSoraPlanV110", "OpenSoraPlanV120", "STDiT3"]
