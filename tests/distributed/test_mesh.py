"""What a mesh refuses, and how rows are shared: in one process."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pab_kernels import Mesh, PABConfig, accelerate
from pab_kernels.blocks import sharded
from pab_kernels.blocks.branches import CrossAttention, Mlp, Weights
from pab_kernels.blocks.sharded import Along, Shards, near_even
from pab_kernels.distributed.exchange import Symmetric, choose
from tests.latte_tools import tiny_latte


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"guidance": 3}, ValueError, "guidance: got 3, must be 1 or 2"),
        ({"frames": 0}, ValueError, "frames: got 0, must be at least 1"),
        ({"frames": 2.0}, TypeError, "frames: got 2.0, must be an integer"),
        ({"backend": "mpi"}, ValueError, "backend: got 'mpi', must be one of"),
    ],
)
def test_a_mesh_says_what_is_allowed(given, error, words):
    with pytest.raises(error, match=words):
        Mesh(**given)


def test_a_mesh_needs_its_process_group():
    model = tiny_latte()
    with pytest.raises(ValueError, match=r"guidance=2,frames=2 takes 4 ranks.*torchrun --nproc-per-node 4"):
        accelerate(model, PABConfig(), mesh=Mesh(2, 2))
    with pytest.raises(TypeError, match="mesh: got tuple, must be a Mesh"):
        accelerate(model, PABConfig(), mesh=(2, 2))  # type: ignore[arg-type]


def test_one_rank_is_no_mesh():
    with accelerate(tiny_latte(), PABConfig(), mesh=Mesh()) as handle:
        assert handle.is_open


def test_a_model_that_diffusers_splits_is_refused():
    model = tiny_latte()
    model._parallel_config = object()  # as enable_parallelism leaves it
    with pytest.raises(TypeError, match="enable_parallelism was called on it"):
        accelerate(model, PABConfig())


def test_a_backend_that_cannot_serve_says_why():
    assert choose(None, torch.device("cpu")) == "gloo"
    with pytest.raises(ValueError, match=r"backend: got 'nccl': .* not on a GPU, which is cpu"):
        choose("nccl", torch.device("cpu"))


class Alone:
    """Other ranks that send nothing: this one's rows come back as if they were all."""

    apart = True

    def buffer(self, *_):
        return None

    def begin(self, name, x, *_, **__):
        return lambda: x


def test_rows_are_shared_near_evenly():
    assert near_even(15, 2) == (8, 7)
    assert near_even(5, 4) == (2, 1, 1, 1)
    shards = Shards((8, 7), 1, Alone())
    assert shards.rows(70) == (80, 70)
    assert shards.span(70) == slice(80, 150)
    # 7 frames of 10 tokens, 5 of which are this rank's: queries, keys and values of the rest, and 8 frames' outputs.
    assert shards.sent(1, 7, 10, 3, 2, 1) == (2 * 3 * 7 * 5 * 3, 8 * 5 * 3)


def test_large_rows_move_in_pieces(monkeypatch):
    shards = Shards((8, 7), 1, Alone())
    monkeypatch.setattr(sharded, "PIECE", 100)
    assert shards.sent(2, 7, 10, 3, 1, 1) == (3 * 7 * 5 * 3,) * 2 + (8 * 5 * 3,) * 2
    # 4 and 3 frames of one sequence.
    assert shards.sent(1, 7, 10, 3, 1, 1) == (3 * 4 * 5 * 3, 3 * 3 * 5 * 3, 4 * 5 * 3, 4 * 5 * 3)
    assert Along.of(1, (8, 7)).divided(2) == [Along(1, (4, 4), (0, 8)), Along(1, (4, 3), (4, 12))]


def test_what_cannot_be_split_is_named():
    nothing: list[Any] = [lambda *_: torch.zeros(1)] * 3
    with pytest.raises(ValueError, match="frames: 2 heads cannot be split over 3 ranks, must be at most 2"):
        Shards((1, 1, 1), 0, Alone()).around((1, 4, 3, 2, 8), 3, 8, torch.zeros(1), torch.float32, *nothing)

    class Joint(Mlp):
        sent = Weights.sent  # as of a family's own branch that says nothing of ranks

    with pytest.raises(ValueError, match="mesh: frames=2 cannot split Joint, must be 1"):
        object.__new__(Joint).sent((1, 4, 2, 8), Shards((2, 2), 0, Alone()), 2)
    for kind in (CrossAttention, Mlp):
        assert object.__new__(kind).sent((1, 4, 2, 8), Shards((2, 2), 0, Alone()), 2) == ()


class Handle:
    """Reads the memory of ranks that are all in this process."""

    def __init__(self, memory, number):
        self.memory, self.number = memory, number

    def barrier(self, channel):
        pass

    def get_buffer(self, rank, shape, dtype):
        return self.memory[rank, self.number].view(dtype)[: math.prod(shape)].view(shape)


def symmetric(rank: int, size: int, memory: dict) -> Symmetric:
    """One of several ranks, whose memory is poisoned until it is written."""

    def allocate(nbytes, device):
        number = sum(owner == rank for owner, _ in memory)
        memory[rank, number] = torch.full((nbytes,), 255, dtype=torch.uint8)
        return memory[rank, number], Handle(memory, number)

    exchange: Any = SimpleNamespace(group=None, rank=rank, size=size)
    made: Any = Symmetric(exchange)
    made._allocate = allocate
    return made


def test_symmetric_memory_is_read_into_place():
    memory: dict = {}
    ranks = [symmetric(rank, 3, memory) for rank in range(3)]
    frames, tokens = (3, 2, 2), (4, 4, 3)
    whole = torch.randn(2, 7, 11, 3, 8)
    mine = whole.split(frames, 1)
    rows, parts = Along.of(1, frames), Along.of(2, tokens)
    written = []
    for rank, own in zip(ranks, mine, strict=True):  # all write before the barrier
        written.append(rank.buffer("qkv", own.shape, rows, own).copy_(own))
    found = [rank("qkv", own, parts, rows, None)() for rank, own in zip(ranks, written, strict=True)]
    for part, expected in zip(found, whole.split(tokens, 2), strict=True):
        assert torch.equal(part, expected)
        assert part.is_contiguous()
    # What lies elsewhere is copied first.
    for rank, part in zip(ranks, found, strict=True):
        rank.buffer("attended", part.shape, parts, part).copy_(part)
    back = [rank("attended", part, rows, parts, None)() for rank, part in zip(ranks, found, strict=True)]
    for own, expected in zip(back, mine, strict=True):
        assert torch.equal(own, expected)
