"""Attention in Triton against float64: small cases under the interpreter, the models' shapes on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pab_kernels.triton_ops import attention as kernels
from pab_kernels.triton_ops.attention import Config, attention_triton

TOLERANCES = [
    pytest.param(torch.float32, 1e-5, 1e-5, id="float32"),
    pytest.param(torch.float16, 2e-3, 2e-3, id="float16"),
    pytest.param(torch.bfloat16, 1.6e-2, 1.6e-2, id="bfloat16"),
]
needs_interpreter = pytest.mark.skipif(not kernels.INTERPRETED, reason="Triton's interpreter is off")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
WHERE = [
    pytest.param("cpu", id="interpreted", marks=needs_interpreter),
    pytest.param("cuda", id="compiled", marks=[pytest.mark.gpu, needs_gpu]),
]
NAN = float("nan")


def expected(q: Tensor, k: Tensor, v: Tensor, lengths: list[int] | None = None, scale: float | None = None) -> Tensor:
    """Float64, one row of the batch after the other, keys beyond its length cut off."""
    rows = []
    for b, (queries, keys, values) in enumerate(zip(q.double(), k.double(), v.double(), strict=True)):
        length = keys.shape[0] if lengths is None else lengths[b]
        scores = torch.einsum("qhd,khd->hqk", queries, keys[:length])
        weights = torch.softmax(scores * (q.shape[-1] ** -0.5 if scale is None else scale), dim=-1)
        rows.append(torch.einsum("hqk,khd->qhd", weights, values[:length]).flatten(1))
    return torch.stack(rows)


def draw(batch, queries, keys, heads, head_dim, device="cpu", dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, the same numbers for every device. Cut out of one tensor where lengths agree."""
    torch.manual_seed(batch + queries + keys + head_dim)
    if queries == keys:
        q, k, v = torch.randn(batch, queries, 3, heads, head_dim).to(dtype).to(device).unbind(2)
        return q, k, v
    k, v = torch.randn(batch, keys, 2, heads, head_dim).to(dtype).to(device).unbind(2)
    return torch.randn(batch, queries, heads, head_dim).to(dtype).to(device), k, v


def run(q: Tensor, k: Tensor, v: Tensor, lengths: list[int] | None = None, scale: float | None = None, **kwargs):
    """One call into a poisoned output."""
    kv_len = None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device=q.device)
    out = torch.full((q.shape[0], q.shape[1], q.shape[2] * q.shape[3]), NAN, dtype=q.dtype, device=q.device)
    y = attention_triton(q, k, v, kv_len, q.shape[-1] ** -0.5 if scale is None else scale, out, **kwargs)
    assert y is out
    return y


def agree(actual: Tensor, wanted: Tensor, atol: float = 1e-5, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(actual.double(), wanted, atol=atol, rtol=rtol)


@pytest.mark.parametrize(("dtype", "atol", "rtol"), TOLERANCES)
@pytest.mark.parametrize("head_dim", [8, 64, 72, 96, 128])
@pytest.mark.parametrize("device", WHERE)
def test_head_dims(device, head_dim, dtype, atol, rtol):
    q, k, v = draw(1, 65, 65, 2, head_dim, device, dtype)
    agree(run(q, k, v), expected(q, k, v), atol, rtol)


@pytest.mark.parametrize("head_dim", [2, 10, 18, 40, 80, 126])
@pytest.mark.parametrize("device", WHERE)
def test_odd_head_dims(device, head_dim):
    q, k, v = draw(1, 5, 5, 3, head_dim, device)
    agree(run(q, k, v), expected(q, k, v))


@pytest.mark.parametrize("length", [1, 15, 63, 64, 127, 129])
@pytest.mark.parametrize("device", WHERE)
def test_lengths(device, length):
    q, k, v = draw(2, length, length, 1, 72, device, torch.bfloat16)
    agree(run(q, k, v), expected(q, k, v), 1.6e-2, 1.6e-2)


@pytest.mark.parametrize(("queries", "keys"), [(1, 65), (130, 1), (15, 300)])
@pytest.mark.parametrize("device", WHERE)
def test_cross_lengths(device, queries, keys):
    q, k, v = draw(2, queries, keys, 2, 72, device, torch.bfloat16)
    agree(run(q, k, v), expected(q, k, v), 1.6e-2, 1.6e-2)


@pytest.mark.parametrize(
    "lengths", [[0, 0, 0], [1, 1, 1], [70, 70, 70], [0, 1, 33], [64, 70, 32], [99, 5, 70]], ids=str
)
@pytest.mark.parametrize("device", WHERE)
def test_key_lengths(device, lengths):
    """Keys beyond a row's length are never read: NaN there does not show. A length above Lk is Lk."""
    q, k, v = draw(3, 9, 70, 2, 72, device, torch.bfloat16)
    wanted = expected(q, k, v, lengths)
    for b, length in enumerate(lengths):
        k[b, length:] = NAN
        v[b, length:] = NAN
        if length == 0:
            wanted[b] = 0
    agree(run(q, k, v, lengths), wanted, 1.6e-2, 1.6e-2)


@pytest.mark.parametrize("pad", [8, 1], ids=["aligned", "odd"])
@pytest.mark.parametrize("device", WHERE)
def test_strides(device, pad):
    """q, k and v cut out of wider tensors, with NaN between their rows, and one k that all rows share."""
    q, k, v = draw(2, 33, 40, 2, 72, device, torch.float16)
    k = k[:1].expand(2, -1, -1, -1)
    wide = [torch.full((t.shape[1], 2, 3, 72 + pad), NAN, dtype=t.dtype, device=device) for t in (q, k, v)]
    cut = [t.transpose(0, 1)[:, :, :2, :72] for t in wide]
    for view, value in zip(cut, (q, k, v), strict=True):
        view.copy_(value)
    cut[1] = cut[1][:1].expand(2, -1, -1, -1)
    agree(run(cut[0], cut[1], cut[2]), expected(q, k, v), 2e-3, 2e-3)


@pytest.mark.parametrize("device", WHERE)
def test_output_stays_inside(device):
    """Rows of a partial tile do not reach into the next row of the batch or beyond the tensor."""
    q, k, v = draw(2, 5, 7, 3, 72, device)
    whole = torch.full((4, 5, 3 * 72), 7.0, device=device)
    attention_triton(q, k, v, None, 0.1, whole[1:3])
    agree(whole[1:3], expected(q, k, v, scale=0.1))
    assert (whole[[0, 3]] == 7).all()


@pytest.mark.parametrize("scale", [1.0, -0.5, 0.0], ids=str)
@pytest.mark.parametrize("device", WHERE)
def test_scales(device, scale):
    q, k, v = draw(2, 9, 40, 2, 72, device)
    agree(run(q, k, v, [40, 3], scale), expected(q, k, v, [40, 3], scale))


@pytest.mark.parametrize("device", WHERE)
def test_large_scores(device):
    """Scores of several thousand, all negative in one head, neither overflow nor lose a row."""
    q, k, v = draw(1, 33, 70, 2, 72, device)
    q, k = q * 30, k * 30
    q[:, :, 1], k[:, :, 1] = q[:, :, 1].abs(), -k[:, :, 1].abs()
    agree(run(q, k, v), expected(q, k, v), 2e-3, 1e-3)


@needs_interpreter
@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (64, 32), (32, 64), (128, 128)])
def test_configs(rows, columns):
    q, k, v = draw(1, 65, 129, 1, 72, "cpu", torch.bfloat16)
    agree(run(q, k, v, config=Config(rows, columns, 4, 2, None)), expected(q, k, v), 1.6e-2, 1.6e-2)


def test_every_case_has_a_config():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for head_dim in range(2, kernels.MAX_HEAD_DIM + 1, 2):
            for keys in (1, 300, 512, 513, 28800):
                assert isinstance(kernels.default_config(dtype, head_dim, keys), Config)


def test_makes_its_output():
    if not kernels.INTERPRETED:
        pytest.skip("Triton's interpreter is off")
    q, k, v = draw(1, 3, 5, 2, 8)
    y = attention_triton(q, k, v, None, 0.5)
    assert y.is_contiguous()
    agree(y, expected(q, k, v, scale=0.5))


ERRORS = {
    "float64": (draw(1, 3, 5, 1, 8, dtype=torch.float64), r"backend: triton got torch\.float64, must be float32"),
    "head_dim": (draw(1, 3, 5, 1, 130), r"backend: triton got a head_dim of 130, must be at most 128"),
    "stride": (
        (torch.empty(1, device="meta").as_strided((1, 3, 1, 8), (0, 2**30, 8, 1)),) * 3,
        r"backend: triton got a (tensor on meta|stride of 1073741824 for q)",
    ),
}


@pytest.mark.parametrize(("inputs", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(inputs, message):
    with pytest.raises(ValueError, match=message):
        attention_triton(inputs[0], inputs[1], inputs[2], None, 1.0)


def test_refuses_cpu_tensors_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    q, k, v = draw(1, 3, 5, 1, 8)
    with pytest.raises(ValueError, match=r"backend: triton got a tensor on cpu, must be on a CUDA device"):
        attention_triton(q, k, v, None, 1.0)


# The models' shapes: B, Lq, Lk, H, D.
LARGE = [
    (2, 1590, 1590, 16, 72),
    (2, 144, 144, 16, 72),
    (1, 3600, 3600, 4, 72),
    (2, 5000, 300, 16, 72),
    (1, 2000, 2000, 8, 96),
]
on_gpu = [pytest.mark.gpu, needs_gpu]


def gpu(test):
    for mark in on_gpu:
        test = mark(test)
    return test


@gpu
@pytest.mark.parametrize("loud", [1, 30], ids=["plain", "loud-head"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("size", LARGE, ids=str)
def test_as_accurate_as_flash(size, dtype, loud):
    """The error against float64 is at most 1.2 times that of SDPA's flash backend, also with one head scaled."""
    batch, queries, keys, heads, head_dim = size
    q, k, v = (t.clone() for t in draw(batch, queries, keys, heads, head_dim, "cuda", dtype))
    q[:, :, 0] *= loud
    wanted = expected(q, k, v)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        flash = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    results = (run(q, k, v), flash.transpose(1, 2).flatten(2))
    errors = [(y.double() - wanted).norm() / wanted.norm() for y in results]
    assert errors[0] <= 1.2 * errors[1]


@gpu
@pytest.mark.parametrize("lengths", [None, [300, 17]], ids=["full", "ragged"])
def test_repeats_bit_for_bit(lengths):
    q, k, v = draw(2, 5000, 300, 16, 72, "cuda", torch.bfloat16)
    first = run(q, k, v, lengths)
    assert all(torch.equal(run(q, k, v, lengths), first) for _ in range(5))


@gpu
def test_cuda_graph():
    """Captured once, replayed on new contents and new lengths of the same buffers."""
    q, k, v = draw(2, 500, 300, 16, 72, "cuda", torch.bfloat16)
    kv_len = torch.tensor([300, 17], dtype=torch.int32, device="cuda")
    out = torch.empty(2, 500, 16 * 72, dtype=torch.bfloat16, device="cuda")
    attention_triton(q, k, v, kv_len, 0.1, out)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention_triton(q, k, v, kv_len, 0.1, out)
    for lengths in ([300, 17], [1, 64]):
        for t in (q, k, v):
            t.normal_()
        kv_len.copy_(torch.tensor(lengths))
        out.fill_(NAN)
        graph.replay()
        agree(out, expected(q, k, v, lengths, 0.1), 1.6e-2, 1.6e-2)
