"""A server's day in short: memory is flat, a request gives the same bits each time, graphs are captured once."""

from __future__ import annotations

import pytest
import torch

from pab_kernels import Schedule
from pab_kernels.runtime.workspace import TEXT_PADDING
from tests.runtime.requests_tools import PAB, SIZES, STEPS, TEXTS, serve


def test_requests_on_a_cpu_leave_nothing_behind() -> None:
    memory, report, again = serve(200, torch.device("cpu"))
    assert again > 100
    assert report.shapes == len(SIZES)
    # The allocator of the C library keeps a little; what a request leaks would be 150 times as much.
    assert memory[-1].resident - memory[50].resident < 2**23


@pytest.mark.gpu
def test_requests_on_a_gpu_leave_nothing_behind_and_replay_what_was_captured(device: str) -> None:
    memory, report, again = serve(160, torch.device(device))
    assert again > 20
    assert report.shapes == len(SIZES)
    variants = len(set(Schedule(PAB, STEPS)))
    paddings = {-(-tokens // TEXT_PADDING) for tokens in TEXTS}
    assert len(paddings) == 2, "prompts of 20 and of 64 tokens share the graphs of 64"
    assert report.captured == variants * len(SIZES) * len(paddings), "once for each shape, and for each padding of text"
    # What is kept of the last prompt differs from request to request, and comes again after 36.
    for kind in ("allocated", "reserved"):
        late, before = ([getattr(now, kind) for now in part] for part in (memory[-36:], memory[-72:-36]))
        assert max(late) <= max(before), kind
