"""Copies of strided rows, and the layouts that copy engines take."""

import pytest
import torch

from pab_kernels.ops import backends, copies
from pab_kernels.ops.copies import copy_beside, copy_rows


def poisoned(*shape: int, device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.full(shape, float("nan"), device=device).bfloat16()


def views(whole: torch.Tensor) -> dict[str, torch.Tensor]:
    """Parts of [2, 7, 10, 3, 4, 16]."""
    return {
        "tokens": whole[:, :, 3:8],
        "frames": whole[:, 2:5],
        "heads": whole.flatten(1, 2)[:, :, :, 1:3],
        "a sequence's heads": whole.flatten(1, 2)[1:, 5:40, :, 1:3],
        "all": whole,
        "channels": whole[:, 1:, 2:, :, :, 8:],
    }


@pytest.mark.parametrize(
    ("name", "shape", "strides"),
    [
        ("tokens", [1, 14, 5 * 192], [5 * 192, 10 * 192]),
        ("frames", [1, 2, 30 * 192], [30 * 192, 70 * 192]),
        ("heads", [1, 420, 32], [32, 64]),
        ("a sequence's heads", [1, 105, 32], [32, 64]),
        ("all", [1, 1, 140 * 192], [140 * 192, 140 * 192]),
    ],
)
def test_rows_are_as_long_as_both_are_dense(name, shape, strides):
    whole = torch.empty(2, 7, 10, 3, 4, 16).bfloat16()
    source = views(whole)[name]
    found = copies._rows(torch.empty(source.shape).bfloat16(), source)
    assert found is not None
    assert found[0] == [*shape[:2], 2 * shape[2]]
    assert found[2][1] == 2 * strides[1]


def test_what_is_nested_deeper_is_left_to_a_kernel():
    whole = torch.empty(2, 7, 10, 3, 4, 16).bfloat16()
    assert copies._rows(torch.empty(2, 6, 8, 3, 4, 8).bfloat16(), views(whole)["channels"]) is None


@pytest.mark.parametrize("name", views(torch.empty(2, 7, 10, 3, 4, 16)))
@pytest.mark.parametrize("copy", [copy_rows, copy_beside])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_copy_writes_what_it_is_to_and_nothing_else(copy, name, device, monkeypatch):
    monkeypatch.setattr(copies, "ROW", 1)
    source = views(torch.randn(2, 7, 10, 3, 4, 16, device=device).bfloat16())[name]
    room = poisoned(2, 7, 12 if name == "all" else 10, 3, 4, 16, device=device)
    to = views(room)[name] if name != "all" else room[:, :, 1:11]
    copy(to, source)
    assert torch.equal(to, source)
    to.fill_(float("nan"))
    assert room.isnan().all()


@pytest.mark.gpu
def test_copy_engines_can_be_captured(device):
    if backends._C is None:
        pytest.skip("the CUDA kernels were left out of this build")
    source = torch.randn(2, 8, 64, 1024, device=device).bfloat16()
    to = poisoned(2, 8, 32, 1024, device=device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        copy_beside(to, source[:, :, 32:])
    source.copy_(torch.randn_like(source))
    graph.replay()
    assert torch.equal(to, source[:, :, 32:])
