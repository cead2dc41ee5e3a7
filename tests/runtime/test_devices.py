"""A handle owns its device and its stream: nothing is taken from what happens to be current."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from pab_kernels import accelerate
from pab_kernels.runtime.graphs import StepGraphs
from pab_kernels.runtime.lane import Lane
from tests.runtime.requests_tools import PAB, request, transformer

pytestmark = pytest.mark.gpu


@pytest.fixture
def devices(device: str) -> list[torch.device]:
    """Two GPUs; one twice where there is only one."""
    return [torch.device("cuda", i % torch.cuda.device_count()) for i in (0, 1)]


def serve(model: Any, handle: Any, device: torch.device, count: int = 12) -> list[Tensor]:
    return [request(model, handle, number, device)[1] for number in range(count)]


@pytest.fixture
def expected(devices: list[torch.device]) -> list[list[Tensor]]:
    """Each handle alone, with its device the current one."""
    found = []
    for device in devices:
        with torch.cuda.device(device), accelerate(model := transformer(device), PAB) as handle:
            found.append(serve(model, handle, device))
    return found


def close(got: list[Tensor], want: list[Tensor]) -> bool:
    """Eager steps and replayed ones differ by rounding where kernels choose by size."""
    return all(float((a - b).float().norm() / b.float().norm()) < 1e-2 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("current", [0, 1])
def test_two_handles_in_turn_whatever_device_is_current(
    devices: list[torch.device], expected: list[list[Tensor]], current: int
) -> None:
    models = [transformer(device) for device in devices]
    with torch.cuda.device(devices[current]):
        handles = [accelerate(model, PAB) for model in models]
        found: list[list[Tensor]] = [[], []]
        for number in range(12):
            for i, device in enumerate(devices):
                found[i].append(request(models[i], handles[i], number, device)[1])
        reports = [handle.report() for handle in handles]
        for handle in handles:
            handle.close()
        assert torch.cuda.current_device() == devices[current].index
    for i in (0, 1):
        assert reports[i].graphs > 0
        assert reports[i].eager is None
        assert close(found[i], expected[i])


def test_two_handles_in_two_threads(devices: list[torch.device], expected: list[list[Tensor]]) -> None:
    """Both capture and replay at the same time; the current device is the first in both threads."""
    models = [transformer(device) for device in devices]
    handles = [accelerate(model, PAB) for model in models]
    found: list[list[Tensor]] = [[], []]
    raised: list[BaseException] = []

    def work(i: int) -> None:
        try:
            found[i] = serve(models[i], handles[i], devices[i])
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]
    for i in (0, 1):
        report = handles[i].report()
        assert report.graphs > 0
        assert report.eager is None
        handles[i].close()
        assert close(found[i], expected[i])


def test_a_callers_own_stream_is_waited_for_and_waits(device: str) -> None:
    """Inputs that are still being made, on a stream that is not the default one."""
    model = transformer(torch.device(device))
    with accelerate(model, PAB) as handle:
        want = serve(model, handle, torch.device(device), 6)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            got = serve(model, handle, torch.device(device), 6)
        assert close(got, want)


def test_a_capture_that_recorded_nothing_is_an_error(device: str, caplog: pytest.LogCaptureFixture) -> None:
    """A step that launches elsewhere: its work is done, but it is not in the graph."""
    lane, elsewhere = Lane(torch.device("cuda", 0)), torch.cuda.Stream()
    memory = torch.zeros(8, device=device)
    graphs = StepGraphs({"x": torch.ones(8, device=device)}, lane)

    def step(inputs: dict[str, Tensor]) -> Tensor:
        with torch.cuda.stream(elsewhere):
            memory.add_(1)
        return memory

    with lane:
        for _ in range(4):
            graphs.run("variant", step, {"x": memory})
    assert "recorded nothing" in caplog.text
    assert len(graphs) == 0
    assert "recorded nothing" in (graphs.failure or "")
