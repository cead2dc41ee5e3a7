"""Attention of all queries on all keys: the SDPA backend and the reference against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pab_kernels import ops

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
on_gpu = [pytest.mark.gpu, needs_gpu]
TOLERANCES = [
    pytest.param("cpu", torch.float32, 1e-5, 1e-5, id="cpu-float32"),
    pytest.param("cpu", torch.bfloat16, 2e-2, 1.6e-2, id="cpu-bfloat16"),
    pytest.param("cuda", torch.float32, 1e-4, 1e-4, id="cuda-float32", marks=on_gpu),
    pytest.param("cuda", torch.float16, 2e-3, 2e-3, id="cuda-float16", marks=on_gpu),
    pytest.param("cuda", torch.bfloat16, 2e-2, 1.6e-2, id="cuda-bfloat16", marks=on_gpu),
]
BACKENDS = ["sdpa", "reference"]
EPS = 1e-6
EVERY = [
    pytest.mark.parametrize("backend", BACKENDS),
    pytest.mark.parametrize(("device", "dtype", "atol", "rtol"), TOLERANCES),
]


def every(test):
    """All backends on all devices and dtypes."""
    for mark in EVERY:
        test = mark(test)
    return test


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
    """Queries, keys and values, the same numbers for every device."""
    torch.manual_seed(batch + queries + keys + head_dim)
    shapes = [(batch, length, heads, head_dim) for length in (queries, keys, keys)]
    q, k, v = (torch.randn(shape).to(dtype).to(device) for shape in shapes)
    return q, k, v


def agree(actual: Tensor, reference: Tensor, atol: float, rtol: float) -> None:
    torch.testing.assert_close(actual.double(), reference, atol=atol, rtol=rtol)


@every
@pytest.mark.parametrize("length", [1, 15, 63, 64, 65, 127])
def test_lengths(length, device, dtype, atol, rtol, backend):
    q, k, v = draw(2, length, length, 2, 72, device, dtype)
    y = ops.attention(q, k, v, backend=backend)
    assert y.shape == (2, length, 144)
    assert y.dtype == dtype
    agree(y, expected(q, k, v), atol, rtol)


@every
@pytest.mark.parametrize("head_dim", [8, 64, 72, 96, 128])
def test_head_dims(head_dim, device, dtype, atol, rtol, backend):
    q, k, v = draw(1, 33, 33, 2, head_dim, device, dtype)
    agree(ops.attention(q, k, v, backend=backend), expected(q, k, v), atol, rtol)


@every
@pytest.mark.parametrize(
    "lengths",
    [None, [20, 20, 20], [1, 1, 1], [0, 0, 0], [0, 7, 20]],
    ids=["all", "full", "one", "none", "mixed"],
)
def test_cross(lengths, device, dtype, atol, rtol, backend):
    """Many queries on few keys, each row of the batch with a length of its own."""
    q, k, v = draw(3, 65, 20, 2, 72, device, dtype)
    kv_len = None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device=device)
    y = ops.attention(q, k, v, kv_len=kv_len, backend=backend)
    agree(y, expected(q, k, v, lengths), atol, rtol)
    for b, length in enumerate(lengths or []):
        assert length > 0 or not y[b].any(), "a row without keys must be zero"


@every
def test_keys_beyond_the_length_do_not_matter(device, dtype, atol, rtol, backend):
    q, k, v = draw(2, 15, 20, 2, 72, device, dtype)
    kv_len = torch.tensor([3, 0], dtype=torch.int32, device=device)
    before = ops.attention(q, k, v, kv_len=kv_len, backend=backend)
    k[:, 3:], v[:, 3:] = 50, -50
    torch.testing.assert_close(ops.attention(q, k, v, kv_len=kv_len, backend=backend), before)


@every
def test_strides(device, dtype, atol, rtol, backend):
    """Queries, keys and values as they lie in the QKV GEMM's output [B, S, 3, H, D], nothing copied."""
    torch.manual_seed(0)
    qkv = torch.randn(2, 63, 3, 4, 72).to(dtype).to(device)
    q, k, v = qkv.unbind(2)
    before = qkv.clone()
    agree(ops.attention(q, k, v, backend=backend), expected(q, k, v), atol, rtol)
    assert torch.equal(qkv, before)


@every
def test_softmax_scale(device, dtype, atol, rtol, backend):
    q, k, v = draw(2, 15, 17, 2, 72, device, dtype)
    agree(ops.attention(q, k, v, softmax_scale=0.3, backend=backend), expected(q, k, v, scale=0.3), atol, rtol)


@every
def test_large_scores(device, dtype, atol, rtol, backend):
    """Scores of several hundred: an exponential without its maximum taken off would overflow."""
    q, k, v = draw(1, 15, 33, 2, 72, device, dtype)
    q = q * 30
    y = ops.attention(q, k, v, backend=backend)
    assert torch.isfinite(y).all()
    # A score of 300 has lost 8 of its bits behind the point, and so has its weight.
    agree(y, expected(q, k, v), max(atol, 1e-3), max(rtol, 1e-3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64(backend):
    q, k, v = draw(2, 33, 20, 2, 72, dtype=torch.float64)
    kv_len = torch.tensor([20, 5], dtype=torch.int32)
    agree(ops.attention(q, k, v, kv_len=kv_len, backend=backend), expected(q, k, v, [20, 5]), 1e-12, 1e-12)


def test_no_queries_or_no_keys():
    q, k, v = draw(2, 3, 0, 2, 8)
    assert torch.equal(ops.attention(q, k, v), torch.zeros(2, 3, 16))
    q, k, v = draw(2, 0, 3, 2, 8)
    assert ops.attention(q, k, v).shape == (2, 0, 16)


Q, K = torch.zeros(2, 5, 2, 8), torch.zeros(2, 3, 2, 8)
ERRORS = {
    "q is no tensor": ((None, K, K), {}, TypeError, r"q: got NoneType, must be a torch\.Tensor"),
    "integer q": ((Q.int(), K, K), {}, TypeError, r"q: dtype is torch\.int32, must be one of .*torch\.float32"),
    "q of three dimensions": ((Q[0], K, K), {}, ValueError, r"q: shape is \[5, 2, 8\], must be \[B, Lq, H, D\]"),
    "k of another batch": ((Q, K[:1], K), {}, ValueError, r"k: shape is \[1, 3, 2, 8\], must be \[2, Lk, 2, 8\]"),
    "v of another length": ((Q, K, K[:, :1]), {}, ValueError, r"v: shape is \[2, 1, 2, 8\], must be \[2, 3, 2, 8\]"),
    "dtype of k": ((Q, K.half(), K), {}, TypeError, r"k: dtype is torch\.float16, must be torch\.float32"),
    "device of v": ((Q, K, K.to("meta")), {}, ValueError, r"v: device is meta, must be cpu, where q is"),
    "strided q": ((Q.repeat(1, 1, 1, 2)[..., ::2], K, K), {}, ValueError, r"q: stride of the last dimension is 2"),
    "kv_len of int64": (
        (Q, K, K),
        {"kv_len": torch.tensor([1, 2])},
        ValueError,
        r"kv_len: is torch\.int64 on cpu, must be torch\.int32 on cpu",
    ),
    "kv_len too short": (
        (Q, K, K),
        {"kv_len": torch.ones(1, dtype=torch.int32)},
        ValueError,
        r"kv_len: shape is \[1\], must be \[2\]",
    ),
    "backend": ((Q, K, K), {"backend": "flash"}, ValueError, r"backend: got 'flash', must be one of .*sdpa.*reference"),
}


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        ops.attention(*args, **kwargs)


@every
@pytest.mark.parametrize("rope", [True, False], ids=["rope", "no-rope"])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no-norm"])
def test_self_attention(norm, rope, device, dtype, atol, rtol, backend):
    """Norm and rotation of queries and keys, then attention; against float64 all through."""
    q, k, v = draw(2, 37, 37, 3, 96, device, dtype)
    qkv = torch.stack((q, k, v), 2)
    weights = [torch.rand(96, dtype=dtype, device=device) + 0.5 if norm else None for _ in "qk"]
    angles = 6 * torch.rand(37, 48, device=device)
    tables = (angles.cos(), angles.sin()) if rope else None
    wide = ops.qk_norm_rope(
        qkv.double(),
        q_weight=None if weights[0] is None else weights[0].double(),
        k_weight=None if weights[1] is None else weights[1].double(),
        rope=tables,
        pair_stride=16,
        backend="reference",
    )
    y = ops.self_attention(
        qkv, q_weight=weights[0], k_weight=weights[1], rope=tables, pair_stride=16, softmax_scale=0.2, backend=backend
    )
    wide_q, wide_k, wide_v = wide.unbind(2)
    agree(y, expected(wide_q, wide_k, wide_v, scale=0.2), 2 * atol, 2 * rtol)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.ones(2, 5, 2, 3, 72)}, r"qkv: shape is \[2, 5, 2, 3, 72\]"),
        ({"q_weight": torch.ones(71)}, r"q_weight: shape"),
        ({"rope": (torch.ones(4, 36), torch.ones(5, 36))}, r"rope\[0\]: shape"),
        ({"pair_stride": 5}, "pair_stride: got 5"),
        ({"backend": "flash"}, "backend: got 'flash'"),
    ],
)
def test_self_attention_errors(change, message):
    qkv = torch.ones(2, 5, 3, 3, 72)
    with pytest.raises(ValueError, match=message):
        ops.self_attention(**{"qkv": qkv, **change})
    assert (qkv == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_cuda_norms_on_load(backend):
    q, k, v = draw(1, 5, 5, 2, 72)
    with pytest.raises(ValueError, match="backend: got"):
        torch.ops.pab.attention(q, k, v, None, 0.1, torch.ones(72), None, None, EPS, None, None, 1, None, backend)


@pytest.mark.parametrize("with_length", [True, False], ids=["kv_len", "no kv_len"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, with_length):
    q, k, v = draw(2, 5, 3, 2, 8)
    kv_len = torch.tensor([3, 1], dtype=torch.int32) if with_length else None
    torch.library.opcheck(
        torch.ops.pab.attention.default, (q, k, v, kv_len, 0.3, None, None, None, EPS, None, None, 1, None, backend)
    )


def test_compiles_into_one_graph():
    def step(q, k, v, kv_len):
        return ops.attention(q * 2, k, v, kv_len=kv_len, backend="sdpa") + 1

    args = (*draw(2, 5, 3, 2, 8), torch.tensor([3, 1], dtype=torch.int32))
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(*args), step(*args))


@pytest.mark.gpu
@needs_gpu
def test_cuda_graph_with_new_lengths():
    """A new prompt replays the same graph: its length lies on the device."""
    q, k, v = draw(2, 63, 20, 2, 72, "cuda", torch.bfloat16)
    kv_len = torch.tensor([20, 20], dtype=torch.int32, device="cuda")
    ops.attention(q, k, v, kv_len=kv_len)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.attention(q, k, v, kv_len=kv_len)
    for lengths in ([20, 20], [7, 0], [1, 15]):
        kv_len.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        agree(y, expected(q, k, v, lengths), 2e-2, 1.6e-2)
