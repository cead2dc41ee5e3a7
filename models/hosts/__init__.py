"""Eager hosts: Open-Sora's and Open-Sora-Plan's transformers, which no package index carries."""

from .open_sora_plan import OpenSoraPlanV110, OpenSoraPlanV120
from .stdit3 import STDiT3

__all__ = ["OpenSoraPlanV110", "OpenSoraPlanV120", "STDiT3"]
