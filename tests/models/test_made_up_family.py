"""The family of docs/adding-a-family.md: its code is run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pab_kernels import PABConfig, Schedule, accelerate, models
from pab_kernels.blocks.block import Block, BlockStack, Branch, Modulation, Norm
from pab_kernels.blocks.layout import Segment
from pab_kernels.runtime.executor import Executor
from tests.runtime.block_tools import Draw

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-family.md"
TIMESTEPS = [900.0, 700.0, 600.0, 500.0, 400.0, 50.0]
PAB = PABConfig(
    spatial_broadcast=True, spatial_threshold=(100, 800), spatial_range=2,
    cross_broadcast=True, cross_threshold=(100, 800), cross_range=3,
    mlp_broadcast=True, mlp_threshold=(100, 800), mlp_range=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the page's Python defines."""
    names: dict[str, Any] = {"__name__": "made_up"}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
        exec(compile(block, str(PAGE), "exec", dont_inherit=True), names)  # the project's own page
    return names


@pytest.fixture
def host(page, monkeypatch) -> Any:
    monkeypatch.setitem(models._BY_CLASS, page["Tide"], page["TideAdapter"])
    torch.manual_seed(0)
    tide = page["Tide"]().eval().requires_grad_(False)
    for parameter in tide.parameters():
        nn.init.normal_(parameter, std=0.3)
    return tide


def run(host: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 3, 4, 5, generator=generator)
    text = torch.randn(2, 6, 10, generator=generator)
    steps = []
    for t in TIMESTEPS:
        latents = latents - 0.1 * host(latents, timestep=torch.full((2,), t), text=text)
        steps.append(latents)
    return torch.stack(steps)


def test_it_gives_its_hosts_numbers_and_is_restored(host):
    before = {name: value.clone() for name, value in host.state_dict().items()}
    expected = run(host)
    with accelerate(host, PABConfig()) as handle:
        handle.begin(TIMESTEPS)
        torch.testing.assert_close(run(host), expected, atol=2e-5, rtol=2e-5)
    assert torch.equal(run(host), expected)
    assert all(torch.equal(value, before[name]) for name, value in host.state_dict().items())


def test_it_broadcasts(host):
    """As the plain way does: what each module gave at the last call that computed it."""
    schedule, call = Schedule(PAB, TIMESTEPS), 0
    kept: dict[object, Tensor] = {}

    def keep(kind: str, key: object, compute: Any) -> Tensor:
        if schedule[call].reads(kind, 0):
            return kept[key]
        kept[key] = compute()
        return kept[key]

    def forward(block: Any, x: Tensor, embedding: Tensor, text: Tensor) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = block.modulation(embedding)[:, None].chunk(6, dim=-1)

        def attend() -> Tensor:
            h = block.norm1(x) * (1 + scale) + shift
            return gate * block.attention(h, h)

        x = x + keep("spatial", (block, 0), attend)
        x = x + keep("cross", (block, 1), lambda: block.text_attention(block.norm2(x), text))

        def feed() -> Tensor:
            h = block.norm3(x) * (1 + mlp_scale) + mlp_shift
            return mlp_gate * block.down(F.gelu(block.up(h), approximate="tanh"))

        return x + keep("mlp_spatial", (block, 2), feed)

    with accelerate(host, PAB) as handle:
        handle.begin(TIMESTEPS)
        actual = run(host)
        assert handle.report().broadcast == {"spatial": 2, "cross": 3}
    plain = run(host)
    for block in host.blocks:
        block.forward = forward.__get__(block)
    original = host.forward

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal call
        result = original(*args, **kwargs)
        call += 1
        return result

    host.forward = counted
    expected = run(host)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)
    assert (actual - plain).abs().max() > 1e-3, "the config must really broadcast"


def test_a_module_that_is_not_plain_is_named_and_nothing_is_left(host):
    before = {name: value.data_ptr() for name, value in host.named_parameters()}
    host.blocks[1].norm2 = nn.Identity()
    with pytest.raises(TypeError, match=r"Tide\.blocks\.1\.norm2: is a Identity, must be a plain RMSNorm or LayerNorm"):
        accelerate(host, PABConfig())
    assert len({value.untyped_storage().data_ptr() for value in host.parameters()}) == len(list(host.parameters()))
    assert before.keys() >= dict(host.named_parameters()).keys()


def test_a_joint_block_against_a_formula(page):
    """Two segments in one sequence: modulation by the index, projections by segment, one attention over both."""
    d, batch, c = Draw(), 2, 16
    segments = (Segment("video", 3, 5), Segment("text", 1, 4))
    layout, index = page["joint_layout"](batch, *segments, c)
    qkv, proj = (tuple(d.linear(features) for _ in segments) for features in (3 * c, c))
    joint = page["JointAttention"](qkv, proj, 2, segments)
    table = d.tensor(3, c)
    blocks = tuple(
        Block("spatial", i, (Branch("spatial", joint, Norm(), 0, 1, 2, regate=True),), table) for i in range(2)
    )
    config = PABConfig(spatial_broadcast=True, spatial_threshold=(100, 800), spatial_range=2)
    schedule = Schedule(config, [900.0, 700.0, 600.0])
    executor = Executor(BlockStack(blocks), schedule, layout, torch.device("cpu"))
    kept: dict[int, Tensor] = {}
    for variant in schedule:
        x, vectors = d.tensor(batch, 19, c, by=1.0), d.tensor(2 * batch, 3, c)
        final = d.tensor(2 * batch, 2, c)
        modulation = Modulation(vectors, final[:, 0], final[:, 1])
        actual = executor.step(x.view(layout.shape).clone(), modulation, [None] * 2, variant, index=index)
        rows = (table + vectors).unflatten(0, (2, batch))  # [segment, B, 3, C]

        def of_rows(values: Tensor) -> Tensor:
            """[B, N, C] of [segment, B, C]."""
            parts = (v[:, None].expand(-1, s.rows, -1) for v, s in zip(values, segments, strict=True))
            return torch.cat(list(parts), dim=1)

        def project(weights: Any, y: Tensor) -> Tensor:
            parts = y.split([segment.rows for segment in segments], dim=1)
            return torch.cat([F.linear(p, w.weight, w.bias) for p, w in zip(parts, weights, strict=True)], dim=1)

        for position in range(2):
            if not variant.spatial:
                h = F.layer_norm(x, (c,), eps=1e-6) * (1 + of_rows(rows[:, :, 1])) + of_rows(rows[:, :, 0])
                q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in project(qkv, h).chunk(3, dim=-1))
                kept[position] = project(proj, F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            x = x + of_rows(rows[:, :, 2]) * kept[position]
        shift, scale = (of_rows(final[:, i].unflatten(0, (2, batch))) for i in (0, 1))
        expected = F.layer_norm(x, (c,), eps=1e-6) * (1 + scale) + shift
        torch.testing.assert_close(actual.flatten(1, 2), expected, atol=2e-5, rtol=2e-5)
    assert [variant.spatial for variant in schedule] == [False, True, False]
