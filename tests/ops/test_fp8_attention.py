"""Attention in e4m3: its quantisation in Triton's interpreter, and on a Hopper GPU the kernel against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pab_kernels import ops
from pab_kernels.ops import backends, reference
from pab_kernels.triton_ops.quantize_qkv import quantize_qkv_triton
from tests.hopper_tools import expected
from tests.quantized_tools import interpret_e4m3

E4M3 = torch.float8_e4m3fn
HEAD_DIMS = [96, 128]
KINDS = ["plain", "offsets", "outliers", "peaks"]


def draw(kind: str, batch: int, tokens: int, heads: int, head_dim: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Fresh q, k, v cut out of one tensor: Gaussian, with means, with outlier channels, or with far larger scores."""
    torch.manual_seed(tokens + head_dim)
    qkv = torch.randn(batch, tokens, 3, heads, head_dim, device=device)
    if kind == "offsets":
        qkv[:, :, 1] += 6 * torch.randn(heads, head_dim, device=device).sign()
        qkv[:, :, 2] += 3
    if kind == "outliers":
        qkv[:, :, 1] += 3 * torch.randn(heads, head_dim, device=device)
        qkv[:, :, 1, :, 5] *= 20
        qkv[:, :, 2, :, 7] *= 30
    if kind == "peaks":
        qkv[:, :, 0] *= 3
        qkv[:, 0, 1] *= 8
        qkv[:, tokens // 2, 0] = 3 * qkv[:, 0, 1]
    q, k, v = qkv.bfloat16().unbind(2)
    return q, k, v


def error(y: Tensor, wanted: Tensor) -> float:
    return ((y.double() - wanted).norm() / wanted.norm()).item()


def worst(y: Tensor, wanted: Tensor) -> float:
    """The largest error of 8 columns of a row, against their mean norm."""
    difference, rows = ((x.unflatten(-1, (-1, 8)).norm(dim=-1)) for x in (y.double() - wanted, wanted))
    return (difference.max() / rows.mean()).item()


def one_channel_each(tokens: int, head_dim: int, device: str) -> Tensor:
    """[1, tokens, 1, head_dim], a one in every row: of the channels in turn."""
    return torch.eye(head_dim, device=device).repeat(-(-tokens // head_dim), 1)[None, :tokens, None]


def simulated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What rounding alone leaves."""
    every = max(1, k.shape[1] // 512)
    y = reference.fp8_attention_ref(q.double(), k.double(), v.double(), every, q.shape[-1] ** -0.5)
    return y.to(q.dtype).double()


# On a CPU


@pytest.mark.parametrize("kind", KINDS)
def test_reference(kind):
    """Five per cent for Gaussian rows, and centring keys keeps it there where they have a mean."""
    q, k, v = draw(kind, 1, 700, 2, 72, "cpu")
    v = v - 3 if kind == "offsets" else v  # they would hide the error
    y = ops.fp8_attention(q, k, v, backend="reference")
    assert error(y, expected(q, k, v)) < {"outliers": 0.25, "peaks": 0.1}.get(kind, 0.065)


@pytest.mark.parametrize(("tokens", "head_dim"), [(1, 72), (130, 96), (1300, 72), (513, 128)])
def test_quantized_rows(tokens, head_dim, monkeypatch):
    interpret_e4m3(monkeypatch)
    q, k, v = draw("offsets", 2, tokens, 3, head_dim, "cpu")
    columns, steps, blocks = -(-head_dim // 16) * 16, -(-tokens // 128), -(-tokens // 1024)
    q8, k8 = (torch.full((2, tokens, 3, columns), float("nan")).to(E4M3) for _ in "qk")
    v8 = torch.full((2, 3, head_dim, 128 * steps), float("nan")).to(E4M3)
    scales = [torch.full((2, 3, count), float("nan")) for count in (tokens, steps, blocks)]
    centers = [torch.full((2, 3, head_dim), float("nan")) for _ in "kv"]
    quantize_qkv_triton(q, k, v, 3, (*centers, q8, k8, v8, *scales))
    middle_k, middle_v = (x[:, ::3].float().mean(1) for x in (k, v))
    torch.testing.assert_close(centers[0], middle_k)
    assert (q8[..., head_dim:].float() == 0).all()
    assert (k8[..., head_dim:].float() == 0).all()
    wide_q = q8[..., :head_dim].float() * scales[0].transpose(1, 2)[..., None]
    wide_k = k8[..., :head_dim].float() * scales[1].repeat_interleave(128, 2)[..., :tokens].transpose(1, 2)[..., None]
    # Place 4c + u of 16 has token 2c + u % 2 + u // 2 * 8.
    tokens_at = torch.tensor([i // 4 * 2 + i % 2 + i % 4 // 2 * 8 for i in range(16)])
    wide_v = torch.empty(2, 3, head_dim, 8 * steps, 16)
    wide_v[..., tokens_at] = v8.float().unflatten(-1, (-1, 16))
    wide_v = wide_v.flatten(-2)
    assert (wide_v[..., tokens:] == 0).all()
    wide_v = wide_v[..., :tokens] * scales[2].repeat_interleave(1024, 2)[:, :, None, :tokens]
    wanted_k, wanted_v = k - middle_k[:, None], v - middle_v[:, None]
    # What rounding took from the values on average is given back.
    torch.testing.assert_close(centers[1], v.float().mean(1) - wide_v.mean(-1), rtol=0, atol=1e-4)
    for got, wanted in ((wide_q, q.float()), (wide_k, wanted_k), (wide_v.permute(0, 3, 1, 2), wanted_v)):
        torch.testing.assert_close(got, wanted, rtol=0.0626, atol=wanted.norm(dim=-1).max().item() * 2**-17)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_rows_that_are_not_finite_have_such_scales(bad, monkeypatch):
    """Or are too large for their norm. Rounding to e4m3 would make a number of an infinity."""
    interpret_e4m3(monkeypatch)
    q, k, v = (x.clone() for x in draw("plain", 1, 200, 2, 72, "cpu"))
    q[0, 7, 1, 3] = k[0, 150, 0, 4] = bad
    q8, k8 = (torch.zeros(1, 200, 2, 80).to(E4M3) for _ in "qk")
    scales = [torch.zeros(1, 2, count) for count in (200, 2, 1)]
    centers = [torch.zeros(1, 2, 72) for _ in "kv"]
    with np.errstate(all="ignore"):
        quantize_qkv_triton(q, k, v, 100, (*centers, q8, k8, torch.zeros(1, 2, 72, 256).to(E4M3), *scales))
    assert scales[0].isnan().nonzero().tolist() == [[0, 1, 7]]
    assert scales[1].isnan().nonzero().tolist() == [[0, 0, 1]]
    assert q8[0, 7, 1].float().isnan()[:72].all()
    assert k8[0, 128:, 0].float().isnan()[:, :72].all()


def test_bad_arguments():
    q, k, v = draw("plain", 1, 20, 2, 72, "cpu")
    with pytest.raises(ValueError, match="softmax_scale: got -1"):
        ops.fp8_attention(q, k, v, softmax_scale=-1.0)
    with pytest.raises(ValueError, match="k: "):
        ops.fp8_attention(q, k[:, :10], v)
    with pytest.raises(ValueError, match="precision: got 'fp4'"):
        ops.self_attention(torch.zeros(1, 20, 3, 2, 72), precision="fp4")


def test_where_there_is_no_kernel_it_is_attention():
    q, k, v = draw("plain", 1, 20, 2, 72, "cpu")
    choice = backends.choose("fp8_attention", q, k, v)
    assert choice.backend == "attention"
    assert "cuda" in choice.reason.lower()
    torch.testing.assert_close(ops.fp8_attention(q, k, v), ops.attention(q, k, v))
    qkv = torch.stack((q, k, v), 2)
    torch.testing.assert_close(ops.self_attention(qkv.clone(), precision="fp8"), ops.self_attention(qkv.clone()))


# On the GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("tokens", [1, 15, 63, 64, 65, 127, 128, 129, 512, 513, 1025, 1590])
def test_errs_no_more_than_its_rounding(tokens, head_dim, kind, hopper):
    q, k, v = draw(kind, 2, tokens, 3, head_dim, hopper)
    middle = 3.0 if kind == "offsets" else 0.0  # would hide the error
    wanted = expected(q, k, v) - middle
    y, rounded = ops.fp8_attention(q, k, v, backend="cuda").double() - middle, simulated(q, k, v) - middle
    assert error(y, wanted) <= 1.15 * error(rounded, wanted) + 5e-3
    assert worst(y, wanted) <= 2 * worst(rounded, wanted) + 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_scores_far_above_those_of_the_first_step(head_dim, hopper):
    """Weights infinite by the first offset: such a step is weighed again."""
    q, k, v = (x.clone() for x in draw("plain", 1, 900, 2, head_dim, hopper))
    k[:, 3] *= 30
    q[:, 500:520] = 10 * k[:, 3:4]
    wanted = expected(q, k, v)
    assert error(ops.fp8_attention(q, k, v, backend="cuda"), wanted) <= 1.2 * error(simulated(q, k, v), wanted) + 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("rise", [0.5, 6, 40, -40])
def test_scores_that_rise_from_step_to_step(head_dim, rise, hopper):
    """The kernel goes from the last keys to the first: each step has the largest weights so far, or none that count.

    Along one channel, whose numbers e4m3 holds, and weights that are alike: what is left is the error of values, and of
    a weight, which all keys of a step share: up to 2**-4 of what the result is from the middle.
    """
    tokens = 3300
    q, k, v = (torch.zeros(1, tokens, 2, head_dim, device=hopper, dtype=torch.bfloat16) for _ in "qkv")
    v += torch.randn_like(v) + (torch.arange(tokens, device=hopper) // 1024)[:, None, None]
    q[..., 0] = head_dim**0.5
    steps = (tokens - 1) // 128 - torch.arange(tokens, device=hopper) // 128
    k[..., 0] = (rise * steps)[:, None].to(k.dtype)
    middle = v.double().mean(1, keepdim=True).flatten(2)
    y, wanted = ops.fp8_attention(q, k, v, backend="cuda").double() - middle, expected(q, k, v) - middle
    assert error(y, wanted) <= 0.065
    assert worst(y, wanted) <= 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("place", [100, 1500, 2990])
def test_a_key_that_weighs_as_much_as_all_others(head_dim, place, hopper):
    """What was summed up before it comes, or after, still counts for half: also what was kept of whole blocks."""
    tokens = 3000
    q, k, v = (x.clone() for x in draw("plain", 1, tokens, 2, head_dim, hopper))
    k /= 8
    q[..., 0] = 4
    k[..., 0] = 0
    k[:, place, :, 0] = math.log(tokens) * head_dim**0.5 / 4
    v += (torch.arange(tokens, device=hopper) // 1024 * 2)[:, None, None].to(v.dtype)
    wanted = expected(q, k, v)
    y = ops.fp8_attention(q, k, v, backend="cuda")
    assert error(y, wanted) <= 0.12
    assert worst(y, wanted) <= 2 * worst(simulated(q, k, v), wanted) + 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_sizes_that_differ_from_step_to_step(head_dim, hopper):
    """Scores beyond what float16 could offset are made smaller, all of a row alike: the largest stays the largest."""
    tokens = 1300
    q, k, v = (x.clone() for x in draw("plain", 1, tokens, 2, head_dim, hopper))
    ones = one_channel_each(tokens, head_dim, hopper)
    sizes = 1 - 0.25 * (torch.arange(tokens, device=hopper) // 128 % 3)
    k.copy_(ones * sizes[:, None, None])
    q.copy_(1e12 * ones + 1e10 * q)
    wanted = expected(q, k, v)
    assert error(ops.fp8_attention(q, k, v, backend="cuda"), wanted) <= 0.08


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("size", [100, 10000])
def test_a_value_that_nobody_attends_to(head_dim, size, hopper):
    """However large it is, what rounding takes from it is not shared out."""
    q, k, v = (x.clone() for x in draw("plain", 1, 1301, 2, head_dim, hopper))
    q[..., 0] = 4
    k[..., 0] = 0
    k[:, 1201, :, 0] = -12 * head_dim**0.5 / 4
    large = size * v[:, 1201]
    v[:, 1201] = 0
    plain = error(ops.fp8_attention(q, k, v, backend="cuda"), expected(q, k, v))
    v[:, 1201] = large
    assert error(ops.fp8_attention(q, k, v, backend="cuda"), expected(q, k, v)) <= 1.3 * plain + 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("size", [0.0, 1e-12, 1e-3, 300.0, 1e12])
def test_rows_of_any_size(head_dim, size, hopper):
    """Tiny scores give the mean of the values, huge ones the value of one key."""
    q, k, v = (x.clone() for x in draw("plain", 1, 1300, 2, head_dim, hopper))
    k.copy_(one_channel_each(1300, head_dim, hopper))
    q = size * (k + 0.01 * q)
    wanted = expected(q, k, v)
    assert error(ops.fp8_attention(q, k, v, backend="cuda"), wanted) <= 0.08


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_visible(head_dim, bad, hopper):
    q, k, v = draw("plain", 1, 1500, 2, head_dim, hopper)
    for token in (3, 701, 1499):  # odd ones have no part in the means
        for which in range(3):
            inputs = [x.clone() for x in (q, k, v)]
            inputs[which][0, token, 1, 5] = bad
            y = ops.fp8_attention(*inputs, backend="cuda").unflatten(-1, (2, head_dim))
            assert torch.isfinite(y[:, :, 0]).all()
            touched = [y[0, token, 1], y[0, :, 1], y[0, :, 1, 5]][which]
            assert touched.isnan().all(), f"{'qkv'[which]} of token {token}"


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_sums_of_many_keys(head_dim, hopper):
    """Values of a mean for the keys that a query likes: the tensor cores alone would lose a third of it."""
    q, k, v = (x.clone() for x in draw("plain", 1, 32760, 1, head_dim, hopper))
    likes = torch.randn(head_dim, device=hopper)
    likes *= 4 / likes.norm()
    q += likes
    k[:, ::2] += likes
    k[:, 1::2] -= likes
    v[:, ::2] += 3
    v[:, 1::2] -= 3
    some = torch.cat((torch.arange(100), torch.arange(32660, 32760))).to(hopper)
    y = ops.fp8_attention(q, k, v, backend="cuda")
    assert torch.isfinite(y).all()
    assert error(y[:, some], expected(q[:, some], k, v)) < 2e-2


@pytest.mark.gpu
def test_repeats_bit_for_bit_and_in_a_graph(hopper):
    q, k, v = draw("plain", 2, 1590, 4, 96, hopper)
    first = ops.fp8_attention(q, k, v, backend="cuda")
    for _ in range(3):
        assert torch.equal(ops.fp8_attention(q, k, v, backend="cuda"), first)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.fp8_attention(q, k, v, backend="cuda")
    y.fill_(float("nan"))
    graph.replay()
    assert torch.equal(y, first)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_self_attention(dtype, hopper):
    q, k, v = draw("plain", 1, 700, 4, 128, hopper)
    qkv, weight = torch.stack((q, k, v), 2).to(dtype), (torch.rand(128, device=hopper) + 0.5).to(dtype)
    wanted = ops.self_attention(qkv.clone(), q_weight=weight, k_weight=weight, backend="cuda")
    y = ops.self_attention(qkv.clone(), q_weight=weight, k_weight=weight, precision="fp8", backend="cuda")
    assert 1e-3 < error(y, wanted.double()) < 0.1
