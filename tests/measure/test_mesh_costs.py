"""What a mesh costs, against counts by hand."""

import pytest
import torch

from pab_kernels import Mesh, PABConfig, Schedule, StepVariant
from pab_kernels.measure.floor import Ceilings
from pab_kernels.measure.mesh_costs import Link, meshes, most_parts, parse_mesh, run_cost, sent_bytes
from pab_kernels.pipelines.memory import ModelShape

COMPUTE = StepVariant()


@pytest.fixture(scope="module")
def latte():
    return ModelShape.of("latte").stack


def test_bytes_of_temporal_attention_are_those_counted_by_hand(latte):
    """28 temporal blocks: of 8 of 15 frames the tokens that are the other rank's, thrice, and 7 frames back."""
    schedule = Schedule(PABConfig.preset("latte"), [500.0])
    shape = (2, 15, 10, 1152)
    there, back = 2 * 8 * 3 * 5 * 1152 * 2, 2 * 7 * 5 * 1152 * 2
    assert sent_bytes(Mesh(1, 2), latte, schedule, COMPUTE, shape) == [there, back] * 28
    assert sent_bytes(Mesh(2, 2), latte, schedule, COMPUTE, shape) == [there // 2, back // 2] * 28
    assert sent_bytes(Mesh(1, 2), latte, schedule, StepVariant(temporal=True), shape) == []
    assert sent_bytes(Mesh(2, 1), latte, schedule, COMPUTE, shape) == []
    # In fp8 a float for each token of both sequences goes first, and a byte a number comes back.
    small = Schedule(PABConfig(linear_precision="fp8"), [500.0])
    assert sent_bytes(Mesh(1, 2), latte, small, COMPUTE, shape) == [4 * 2 * 10, there, back // 2] * 28


def test_full_attention_exchanges_heads():
    model = ModelShape.of("wan_2_1", num_attention_heads=2, attention_head_dim=12, num_layers=3, ffn_dim=40)
    schedule = Schedule(PABConfig(), [500.0])
    # Of 3 frames of 5 tokens this rank has 2, and two heads: one goes, thrice, and of the other one 5 tokens go back.
    there, back = 3 * 10 * 12 * 2, 5 * 12 * 2
    assert sent_bytes(Mesh(1, 2), model.stack, schedule, COMPUTE, (1, 3, 5, 24)) == [there, back] * 3


def test_a_run_is_the_share_that_is_largest_and_its_exchanges(latte):
    schedule = Schedule(PABConfig(), [900.0, 500.0, 100.0])
    ceilings, link, shape = Ceilings(1e12, 1e12), Link(1.0, 1e6), (2, 15, 10, 1152)
    alone, guided, split = (
        run_cost(mesh, latte, schedule, shape, 60, ceilings, link) for mesh in (Mesh(), Mesh(2, 1), Mesh(1, 2))
    )
    assert (alone.exchanges, alone.nbytes) == (0, 0)
    assert guided.compute == pytest.approx(alone.compute / 2)
    assert guided.exchanges == 3  # a gathered prediction a step
    assert split.compute == pytest.approx(alone.compute * 8 / 15)
    sent = sum(sent_bytes(Mesh(1, 2), latte, schedule, COMPUTE, shape))
    assert split.exchanges == pytest.approx(3 * (56 + 1 + sent / 1e6))
    assert (split.nbytes, split.steps) == (3 * sent, 3)


def test_broadcast_guidance_leaves_a_half_idle(latte):
    config = PABConfig(guidance_broadcast=True, guidance_threshold=(0, 1000), guidance_range=2)
    schedule = Schedule(config, [900.0, 500.0])
    assert [variant.guidance for variant in schedule] == [False, True]
    alone, two = (run_cost(mesh, latte, schedule, (2, 4, 10, 1152), 60) for mesh in (Mesh(), Mesh(2, 1)))
    whole, half = 2 / 3, 1 / 3  # of the time alone
    assert two.compute == pytest.approx(alone.compute * (whole / 2 + half), rel=1e-6)


def test_meshes_of_a_number_of_gpus():
    assert meshes(4, 15, True) == [Mesh(2, 2), Mesh(1, 4)]
    assert meshes(3, 15, True) == [Mesh(1, 3)]
    assert meshes(4, 3, True) == [Mesh(2, 2)]
    assert all(meshes(gpus, 7, True) for gpus in (*range(1, 8), 8, 10, 12, 14))
    for gpus in (9, 11, 13, 15, 16):
        with pytest.raises(ValueError, match=rf"got {gpus}, over which .* at most 7, or even and at most 14$"):
            meshes(gpus, 7, True)
    with pytest.raises(ValueError, match=r"must be at most 7$"):
        meshes(8, 7, False)


def test_how_many_ranks_can_share_the_frames(latte):
    """Latte's temporal attention splits tokens, Wan's over everything splits heads."""
    wan = ModelShape.of("wan_2_1", num_attention_heads=2, attention_head_dim=12, num_layers=3, ffn_dim=40).stack
    assert most_parts(latte, (2, 15, 10, 1152)) == 10
    assert most_parts(latte, (2, 15, 64, 1152)) == 15
    assert most_parts(wan, (1, 5, 10, 24)) == 2


def test_what_mesh_says():
    assert parse_mesh("guidance=2, frames=4", 8) == Mesh(2, 4)
    assert parse_mesh("frames=2,backend=gloo", 2) == Mesh(1, 2, "gloo")
    assert parse_mesh(None, 8) is None
    for text in ("guidance=2,guidance=1", "frames=2,frames=2", "backend=gloo,backend=nccl"):
        with pytest.raises(ValueError, match=r"mesh: got .*, must be such as guidance=2,frames=1"):
            parse_mesh(text, 2)


def test_costs_are_of_the_runs_dtype(latte):
    assert latte.dtype == torch.bfloat16
