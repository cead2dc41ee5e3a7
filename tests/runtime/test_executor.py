"""The executor against the plain form, on blocks that no family has: no adapter, no host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pab_kernels import PABConfig, Schedule
from pab_kernels.blocks.block import Block, BlockStack, Branch, Modulation, Norm
from pab_kernels.blocks.branches import CrossAttention, Inputs, text_kv
from pab_kernels.blocks.layout import Layout, Segment
from pab_kernels.runtime.executor import Executor
from pab_kernels.runtime.slots import SlotKey
from tests.runtime.block_tools import BLOCKS, HEADS, Draw, affine, constants, few_rows, no_norm, regated, six_branches
from tests.runtime.plain_blocks import PlainBlocks

B, T, S, L = 2, 3, 5, 7
TIMESTEPS = [900.0, 700.0, 600.0, 500.0, 400.0, 50.0]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def broadcast_all() -> PABConfig:
    """Every kind broadcasts, at different calls."""
    settings: dict[str, Any] = {"mlp_broadcast": True, "mlp_threshold": (100, 800), "mlp_range": 2}
    for kind, every in (("spatial", 2), ("temporal", 3), ("cross", 4)):
        settings |= {f"{kind}_broadcast": True, f"{kind}_threshold": (100, 800), f"{kind}_range": every}
    return PABConfig(**settings)


def check(
    blocks: list[Block],
    d: Draw,
    *,
    rows: int = B,
    index: Tensor | None = None,
    wide: bool = False,
    embed_before: int = -1,
    tolerance: float = 2e-5,
) -> Executor:
    """Run the schedule's calls, each on a stream of its own, both ways."""
    if d.device != "cpu" and d.dtype == torch.float32:
        tolerance *= 10  # attention of float32 is made of three products of less there
    layout = Layout.video((B, T, S, d.c), rows, indexed=index is not None)
    stack = BlockStack(tuple(blocks), embed_before, Norm("rms", 1e-5))
    config = broadcast_all()
    schedule = Schedule(config, TIMESTEPS)
    text, image = d.tensor(B, L, d.c, by=1.0), d.tensor(B, 4, d.c, by=1.0)
    angles = torch.randn(T * S, d.c // HEADS // 2).to(d.device)
    rope = (angles.cos(), angles.sin())
    executor = Executor(stack, schedule, layout, torch.device(d.device))
    branches = [branch for block in blocks for branch in block.branches]
    pictured = any(isinstance(branch.weights, CrossAttention) and branch.weights.image for branch in branches)
    kv = executor.text_kv(text, image=image if pictured else None)
    plain = PlainBlocks(stack, layout, config, text, image, rope)
    count = max([len(block.modulation) for block in blocks if isinstance(block.modulation, Tensor)], default=0)
    kept: set[SlotKey] = set()
    for variant in schedule:
        x, embed = d.tensor(B, T, S, d.c, by=1.0), d.tensor(T, d.c)
        modulation = Modulation(
            blocks=d.tensor(rows, count, d.c, wide=wide) if count else None,
            shift=d.tensor(rows, d.c, wide=wide),
            scale=d.tensor(rows, d.c, wide=wide),
            embedding=d.tensor(rows, 8, by=1.0),
        )
        traffic = executor.traffic(variant)
        assert traffic.reads <= kept, "a slot is read before it is written"
        kept |= traffic.writes
        expected = plain.step(x, modulation, variant, embed, index)
        actual = executor.step(x, modulation, kv, variant, embed=embed, rope=rope, index=index)
        torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)
    return executor


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name, device):
    d = Draw(device=device)
    check(BLOCKS[name](d), d)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_in_bfloat16_under_float32_tables(name, device):
    """Stream and slots have the dtype of the linears, whatever that of tables, vectors and gates."""
    d = Draw(32, torch.bfloat16, device)
    blocks = [
        Block(b.kind, b.index, b.branches, b.modulation.float() if isinstance(b.modulation, Tensor) else b.modulation)
        for b in BLOCKS[name](d)
    ]
    executor = check(blocks, d, wide=True, tolerance=6e-2)
    assert executor.stack.dtype == torch.bfloat16
    key = next(iter(executor.cache))
    value = executor.cache.slots.read(key)
    assert isinstance(value, Tensor)
    assert value.dtype == torch.bfloat16
    if any(isinstance(block.modulation, Tensor) for block in blocks) and executor.cache.gated:
        assert executor.cache.gates.dtype == torch.float32


def test_float32_tables_are_not_rounded_to_the_streams_dtype():
    """Gates of 1 + 2**-12 would be 1 in bfloat16; over a stream of 256 the sum tells."""
    d = Draw(16, torch.bfloat16)
    table = torch.full((1, 16), 2.0**-12)
    gates = Executor(
        BlockStack((Block("spatial", 0, (Branch("mlp_spatial", d.mlp(), gate=0),), table),)),
        Schedule(PABConfig(), [1.0]),
        Layout.video((1, 1, 1, 16)),
        torch.device("cpu"),
    )._vectors.compute(Modulation(torch.ones(1, 1, 16), table, table))
    assert torch.equal(gates, torch.full((1, 1, 16), 1 + 2.0**-12))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels", [5120, 5376])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_streams(channels, dtype, device):
    d = Draw(channels, dtype, device)
    check(few_rows(d), d, tolerance=1e-4 if dtype == torch.float32 else 8e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_modulation_row_a_frame(name, device):
    d = Draw(device=device)
    check(BLOCKS[name](d), d, rows=B * T)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_modulation_row_a_token(name, device):
    """Each token takes one of four timesteps, in no order: more rows than sequences, fewer than tokens."""
    d = Draw(device=device)
    index = torch.randint(0, 4, (B, T * S), dtype=torch.int32).to(device)
    check(BLOCKS[name](d), d, rows=4, index=index, embed_before=1)


@pytest.mark.parametrize("device", DEVICES)
def test_the_position_embedding_comes_before_its_block(device):
    d = Draw(device=device)
    check(six_branches(d), d, embed_before=1)


def test_an_index_costs_an_integer_a_row():
    """A timestep a token, each its own: no tensor of [blocks, rows, vectors, C] but the vectors of the timesteps."""
    d = Draw()
    layout = Layout.video((B, T, S, d.c), 2, indexed=True)
    executor = Executor(
        BlockStack(tuple(regated(d))), Schedule(broadcast_all(), TIMESTEPS), layout, torch.device("cpu")
    )
    assert executor._vectors.compute(Modulation(*(d.tensor(2, *n, d.c) for n in ([6], [], [])))).shape == (12, 2, d.c)
    assert executor.cache.gates.shape == (2, 2, d.c)  # of the MLPs; attention is gated anew


def test_slots_of_two_branches_of_one_kind_are_two():
    d = Draw()
    executor = check(six_branches(d), d)
    keys = [key for key in executor.cache if key.position == 0]
    assert keys == [
        SlotKey("spatial", 0), SlotKey("temporal", 0), SlotKey("cross", 0), SlotKey("cross", 0, 1),
        SlotKey("mlp_spatial", 0), SlotKey("mlp_temporal", 0),
    ]  # fmt: skip
    assert str(keys[3]) == "slot cross of block 0 (1)"


def test_refresh_reads_tables_constants_and_norms_again():
    """Into the memory that captured graphs know: the same executor then agrees with the changed weights."""
    d = Draw()
    blocks = [*affine(d), *constants(d)[:1]]
    blocks = [Block(b.kind, i, b.branches, d.tensor(6, d.c)) for i, b in enumerate(blocks)]
    stack, layout = BlockStack(tuple(blocks)), Layout.video((B, T, S, d.c))
    executor = Executor(stack, Schedule(PABConfig(), [1.0]), layout, torch.device("cpu"))
    modulation = Modulation(d.tensor(B, 6, d.c), d.tensor(B, d.c), d.tensor(B, d.c))
    before = executor._vectors.compute(modulation)
    for block in blocks:
        assert isinstance(block.modulation, Tensor)
        block.modulation.normal_()
        for branch in block.branches:
            vectors = (branch.shift, branch.scale, branch.gate, *([branch.norm.weight] if branch.norm else []))
            for vector in vectors:
                if isinstance(vector, Tensor):
                    vector.normal_()
    assert torch.equal(executor._vectors.compute(modulation), before)
    executor.refresh()
    fresh = Executor(stack, Schedule(PABConfig(), [1.0]), layout, torch.device("cpu"))
    after = executor._vectors.compute(modulation)
    assert torch.equal(after, fresh._vectors.compute(modulation))
    assert not torch.equal(after, before)


D = Draw()
ERRORS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "kind": (
        lambda: Branch("mlp", D.mlp()),
        ValueError,
        r"kind: got 'mlp', must be one of spatial, temporal, cross, mlp_spatial, mlp_temporal",
    ),
    "shift without a norm": (
        lambda: Branch("cross", D.cross(), shift=0),
        ValueError,
        r"shift, scale: given without a norm, must be None where the stream itself is read",
    ),
    "vector": (
        lambda: Block("spatial", 3, (Branch("mlp_spatial", D.mlp(), gate=6),), D.tensor(6, 16)),
        ValueError,
        r"spatial\.3: a branch takes vector 6, must be one of 6",
    ),
    "vector of no modulation": (
        lambda: Block("spatial", 3, (Branch("mlp_spatial", D.mlp(), gate=0),)),
        ValueError,
        r"spatial\.3: a branch takes vector 0, must be one of 0",
    ),
    "final": (
        lambda: BlockStack((), final=D.norm(weight=True)),
        ValueError,
        r"final: is affine, must have neither weight nor bias",
    ),
    "tables": (
        lambda: check([*no_norm(D), *regated(D)], D),
        ValueError,
        r"modulation: the blocks' tables have the shapes \[\(1, 16\), \(6, 16\)\], must be all alike",
    ),
    "rows": (
        lambda: Layout.video((2, 3, 5, 16), 4),
        ValueError,
        r"modulations: got 4, must divide the 30 rows of the stream",
    ),
    "no text": (
        lambda: D.cross().run(D.tensor(1, 1, 1, 16), D.tensor(1, 1, 1, 16), Inputs()),
        ValueError,
        r"text: got None, must be a TextKV to compute cross-attention",
    ),
    "picture": (
        lambda: text_kv(D.tensor(1, 2, 16), D.cross(), image=D.tensor(1, 2, 16)),
        ValueError,
        r"image: must be given where the weights attend to a picture, and only there",
    ),
    "stream's dtype": (
        lambda: call(D.tensor(B, T, S, 16).bfloat16()),
        ValueError,
        r"x: is \[2, 3, 5, 16\] torch\.bfloat16, must be \[2, 3, 5, 16\] torch\.float32, the dtype of the blocks'",
    ),
    "index": (
        lambda: call(D.tensor(B, T, S, 16), index=torch.zeros(B, T * S, dtype=torch.int32)),
        ValueError,
        r"index: got one, must be given where the layout is indexed, and only there",
    ),
    "modulation": (
        lambda: call(D.tensor(B, T, S, 16), rows=3),
        ValueError,
        r"modulation\.blocks: shape is \[3, 6, 16\], must be \[2, 6, 16\]",
    ),
    "no modulation": (
        lambda: call(D.tensor(B, T, S, 16), rows=None),
        TypeError,
        r"modulation\.blocks: got NoneType, must be a torch\.Tensor",
    ),
}


def call(x: Tensor, rows: int | None = B, index: Tensor | None = None) -> None:
    stack = BlockStack(tuple(regated(D)))
    executor = Executor(stack, Schedule(PABConfig(), [1.0]), Layout.video((B, T, S, 16)), torch.device("cpu"))
    blocks = None if rows is None else D.tensor(rows, 6, 16)
    modulation = Modulation(blocks, D.tensor(B, 16), D.tensor(B, 16))
    executor.step(x, modulation, [None] * 4, Schedule(PABConfig(), [1.0])[0], index=index)


@pytest.mark.parametrize(("make", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_layout_of_two_segments():
    """Text beside the video: one stream, one index that gives each segment its modulation row."""
    layout = Layout(2, (Segment("video", 3, 5), Segment("text", 1, 4)), 16, modulations=4, indexed=True)
    assert layout.shape == (2, 1, 19, 16)
    assert (layout.rows, layout.groups) == (38, 2)
