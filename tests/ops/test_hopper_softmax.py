"""The Hopper attention kernel where the offset of a tile's first step does not do: the tile is computed again."""

from __future__ import annotations

import pytest
import torch

from tests.hopper_tools import HEAD_DIMS, draw, expected, normed, run


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("keys", [100, 700])
def test_scores_far_above_those_of_the_first_step(keys, head_dim, dtype, norm, hopper, poison):
    """Steps go from the last keys to the first. Some queries meet keys whose weights, by the offset of the first step,
    are infinite or nearly: those tiles are computed again, and the others are not touched."""
    q, k, v = (x.clone() for x in draw(2, 1000, keys, 3, head_dim, dtype, hopper))
    weights, exact, rounded = None, (q, k), (q, k)
    if norm:
        k[:, -128:] = torch.randn_like(k[0, 0, 0])
        q[0, 400:420] = k[0, 5]
        weights = (torch.full((head_dim,), 3.0, dtype=dtype, device=hopper),) * 2
        exact = (normed(q, weights[0]), normed(k, weights[1]))
        rounded = (exact[0].to(dtype), exact[1].to(dtype))  # as where the norm is a pass of its own
    else:
        k[:, 3] *= 12
        q[0, 70, 1] = 12 * k[0, 3, 1]
        q[1, 300:700, 2] = 2 * k[1, 3, 2]
    out = run(q, k, v, poison((2, 1000, 3 * head_dim), dtype, hopper), weights=weights)
    wanted = expected(*exact, v)
    allowed = 1.2 * (expected(*rounded, v) - wanted).norm() + 4e-3 * wanted.norm()
    assert (out.double() - wanted).norm() <= allowed


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_values_near_the_largest_number(head_dim, hopper, poison):
    """Finite results, though sums of values times weights without the largest score taken off would overflow."""
    q, k, v = (x.clone() for x in draw(1, 300, 500, 2, head_dim, torch.bfloat16, hopper))
    q[0, 7] *= 20
    v *= 2.0**100
    out = run(q, k, v, poison((1, 300, 2 * head_dim), torch.bfloat16, hopper))
    torch.testing.assert_close(out.double() / 2.0**100, expected(q, k, v) / 2.0**100, atol=1.6e-2, rtol=1.6e-2)


@pytest.mark.gpu
def test_more_tiles_than_bits(hopper, poison):
    """Tiles share the bits that say which ones are computed again."""
    batch, keys, heads, head_dim = 3600, 130, 40, 72  # 144,000 tiles; the keys of batch rows overlap
    q = torch.randn(batch, 1, heads, head_dim, device=hopper).bfloat16()
    flat = torch.randn(2, 8 * batch + keys * heads * head_dim, device=hopper).bfloat16()
    k, v = (x.as_strided((batch, keys, heads, head_dim), (8, heads * head_dim, head_dim, 1)) for x in flat)
    q[::100] *= 100
    out = run(q, k, v, poison((batch, 1, heads * head_dim), torch.bfloat16, hopper))
    some = torch.arange(0, batch, 50, device=hopper)
    torch.testing.assert_close(out[some].double(), expected(q[some], k[some], v[some]), atol=1.6e-2, rtol=1.6e-2)
    assert torch.isfinite(out).all()


@pytest.mark.gpu
def test_a_long_sequence(hopper, poison):
    """32,760 tokens, a Wan video of 480p, of which some rows are compared."""
    q, k, v = draw(1, 32760, 32760, 2, 128, torch.bfloat16, hopper)
    out = run(q, k, v, poison((1, 32760, 256), torch.bfloat16, hopper))
    some = torch.cat((torch.arange(130), torch.arange(32760 - 130, 32760))).to(hopper)
    torch.testing.assert_close(out[:, some].double(), expected(q[:, some], k, v), atol=2e-3, rtol=1.6e-2)
    assert torch.isfinite(out).all()
