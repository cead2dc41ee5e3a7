"""Tiny benchmark problems, for the tests of `pab bench` and of whole steps."""

import functools

import torch
from torch import nn

from pab_kernels import PABConfig
from pab_kernels.measure.contenders import Problem
from pab_kernels.workloads import WORKLOADS

WORKLOADS_OF_FAMILIES = (
    "open_sora-144p-2s",
    "latte-16x512",
    "open_sora_plan_v110-65x512",
    "open_sora_plan_v120-29x480p",
)
"""One of each family."""


@functools.cache
def problem(name: str) -> Problem:
    """A tiny problem with weights large enough that broadcasting changes the result."""
    tiny = WORKLOADS[name].tiny()
    made = Problem.make(tiny, PABConfig.preset(tiny.family), torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(1)
    for parameter in made.host.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return made
