"""The Hopper attention kernel: refusals on a CPU, and on an H100 its results against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pab_kernels import ops
from pab_kernels.ops import backends
from tests.hopper_tools import HALVES, HEAD_DIMS, draw, expected, flash, int32, normed, run

compiled = pytest.mark.skipif(backends._C is None, reason="the CUDA kernels were left out of this build")
LENGTHS = [1, 15, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129, 191, 192, 193, 1590]


# On a CPU

NORM = {"q_weight": 16, "k_weight": 16, "key_scales": 16, "key_scales_pitch": 300}
CALL = {
    **{"q": 16, "q_strides": (216 * 300, 216, 72), "k": 16, "k_strides": (216 * 300, 216, 72)},
    **{"v": 16, "v_strides": (216 * 300, 216, 72), "shape": (2, 300, 300, 3, 72), "dtype": "bfloat16"},
    **{"kv_len": 0, "softmax_scale": 0.1, "q_weight": 0, "k_weight": 0, "key_scales": 0, "key_scales_pitch": 0},
    **{"eps": 1e-6, "cos": 0, "sin": 0, "pair_stride": 16, "out": 16, "device": 0, "stream": 0},
}


@compiled
@pytest.mark.parametrize(
    ("change", "argument"),
    [
        pytest.param({"dtype": "float32"}, "dtype: got float32", id="dtype"),
        pytest.param({"shape": (2, 300, 300, 3, 80)}, "head_dim is 80, must be 72, 96 or 128", id="head_dim"),
        pytest.param({"shape": (2, 300, 0, 3, 72)}, "shape: all sizes", id="no-keys"),
        pytest.param({"shape": (2, 2**31, 300, 3, 72)}, "shape: got 2147483648", id="queries"),
        pytest.param({"shape": (2**16, 2**20, 300, 3, 72)}, r"shape: B \* H \* Lq", id="tiles"),
        pytest.param({"q": 0}, "q: got a null pointer", id="null-q"),
        pytest.param({"k": 24}, "k: address", id="unaligned-k"),
        pytest.param({"v_strides": (216 * 300, 217, 72)}, "v: stride 1 is 217", id="odd-stride"),
        pytest.param({"k_strides": (0, 216, 72)}, "k: stride 0 is 0", id="shared-rows"),
        pytest.param({"softmax_scale": float("nan")}, "softmax_scale", id="scale"),
        pytest.param({"cos": 16}, "cos, sin: got one", id="one-table"),
        pytest.param({"cos": 16, "sin": 16}, "pair_stride: is 16 at head_dim 72", id="rope-72"),
        pytest.param(
            {"cos": 16, "sin": 16, "shape": (2, 300, 300, 3, 96), "pair_stride": 1},
            "pair_stride: is 1 at head_dim 96",
            id="pair-stride",
        ),
        pytest.param({"q_weight": 16}, "q_weight, k_weight, key_scales: got some", id="one-weight"),
        pytest.param({**NORM, "k_weight": 2}, "k_weight: address", id="unaligned-weight"),
        pytest.param({**NORM, "key_scales_pitch": 298}, "key_scales: has 298 a head", id="short-scales"),
        pytest.param(
            {**NORM, "shape": (2, 300, 300, 3, 96), "cos": 16, "sin": 16},
            "cos: got tables and norm",
            id="norm-and-rope",
        ),
        pytest.param({"out": 0}, "out: got a null pointer", id="null-out"),
        pytest.param({"out": 8}, "out: address", id="unaligned-out"),
        pytest.param({"out_scale": 16, "dtype": "float16"}, "out_scale: given for float16", id="e4m3"),
    ],
)
def test_compiled_module_names_the_argument(change, argument):
    with pytest.raises(ValueError, match=argument):
        backends._C.attention(**{**CALL, **change})


def test_forced_on_a_cpu_it_says_why_not():
    q = torch.zeros(1, 300, 2, 72, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="backend: cuda"):
        ops.attention(q, q, q, backend="cuda")


def test_table_refuses_a_cpu():
    q = torch.zeros(1, 300, 2, 72, dtype=torch.bfloat16)
    choice = backends.choose("attention", q, q, q, None)
    assert choice.backend != "cuda"
    assert "cuda" in choice.reason.lower()


# On the GPU


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "atol", "rtol"), HALVES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(length, head_dim, dtype, atol, rtol, hopper, poison):
    for batch, heads in [(1, 1), (2, 3)]:
        q, k, v = draw(batch, length, length, heads, head_dim, dtype, hopper)
        out = poison((batch, length, heads * head_dim), dtype, hopper)
        torch.testing.assert_close(run(q, k, v, out).double(), expected(q, k, v), atol=atol, rtol=rtol)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("queries", "keys"), [(1, 300), (300, 1), (1000, 300), (65, 513), (192, 2000)])
def test_cross(queries, keys, head_dim, hopper, poison):
    q, k, v = draw(2, queries, keys, 16, head_dim, torch.bfloat16, hopper)
    out = poison((2, queries, 16 * head_dim), torch.bfloat16, hopper)
    torch.testing.assert_close(run(q, k, v, out).double(), expected(q, k, v), atol=1.6e-2, rtol=1.6e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(
    "lengths", [[0, 0, 0], [1, 1, 1], [300, 300, 300], [0, 1, 128], [129, 64, 65], [999, 96, 97], [48, 0, 49]], ids=str
)
def test_key_lengths(lengths, head_dim, hopper, poison):
    """A length of 0 gives zeros, one above Lk is Lk, and what lies beyond a length does not matter."""
    q, k, v = draw(3, 400, 300, 4, head_dim, torch.bfloat16, hopper)
    wanted = expected(q, k, v, lengths)
    for b, length in enumerate(lengths):
        k[b, length:], v[b, length:] = 50, -50
        if length == 0:
            wanted[b] = 0
    out = poison((3, 400, 4 * head_dim), torch.bfloat16, hopper)
    run(q, k, v, out, int32(lengths, hopper))
    torch.testing.assert_close(out.double(), wanted, atol=1.6e-2, rtol=1.6e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("layout", ["fused", "heads first", "wide"])
def test_strides(layout, head_dim, hopper, poison):
    """Nothing between the rows of a view is read, and nothing outside the output is written."""
    dtype = torch.float16
    q, k, v = draw(2, 333, 333, 5, head_dim, dtype, hopper)
    wanted = expected(q, k, v)
    if layout == "heads first":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif layout == "wide":
        wide = [poison((2, 340, 6, head_dim + 8), dtype, hopper) for _ in range(3)]
        cut = [x[:, 3:336, :5, :head_dim] for x in wide]
        for view, value in zip(cut, (q, k, v), strict=True):
            view.copy_(value)
        q, k, v = cut
    whole = torch.full((4, 333, 5 * head_dim), 7.0, dtype=dtype, device=hopper)
    run(q, k, v, whole[1:3])
    torch.testing.assert_close(whole[1:3].double(), wanted, atol=2e-3, rtol=2e-3)
    assert (whole[[0, 3]] == 7).all()


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [1.0, -0.5, 0.0], ids=str)
def test_scales(scale, hopper, poison):
    q, k, v = draw(1, 200, 333, 2, 72, torch.float16, hopper)
    out = poison((1, 200, 144), torch.float16, hopper)
    torch.testing.assert_close(
        run(q, k, v, out, scale=scale).double(), expected(q, k, v, scale=scale), atol=4e-3, rtol=4e-3
    )


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "atol", "rtol"), HALVES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (65, 333), (193, 96), (700, 1025)])
def test_norm(queries, keys, head_dim, dtype, atol, rtol, hopper, poison):
    """Of queries and keys of any length, one of them all zeros."""
    q, k, v = (x.clone() for x in draw(2, queries, keys, 3, head_dim, dtype, hopper))
    for x in (q, k):
        x[:, :, 1] *= 100
        x[:, -1, 2] = 0
    weights = [(torch.rand(head_dim, device=hopper) + 0.5).to(dtype) for _ in "qk"]
    out = run(q, k, v, poison((2, queries, 3 * head_dim), dtype, hopper), weights=(weights[0], weights[1]))
    wanted = expected(normed(q, weights[0]), normed(k, weights[1]), v)
    torch.testing.assert_close(out.double(), wanted, atol=atol, rtol=rtol)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [0.1, 1.0, 4.0, 30.0], ids=str)
@pytest.mark.parametrize("scale", [None, -0.2], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_norm_with_small_and_large_weights(dtype, scale, size, hopper, poison):
    """Scores from near zero to far beyond what exp2 can take without an offset; some keys masked."""
    q, k, v = draw(2, 400, 300, 2, 72, dtype, hopper)
    weights = [(size * (torch.rand(72, device=hopper) + 0.5)).to(dtype) for _ in "qk"]
    lengths = [300, 77]
    out = poison((2, 400, 144), dtype, hopper)
    run(q, k, v, out, int32(lengths, hopper), scale, (weights[0], weights[1]))
    exact = expected(normed(q, weights[0]), normed(k, weights[1]), v, lengths, scale)
    # What rounding normed queries and keys costs, as where that is a pass of its own.
    rounded = expected(normed(q, weights[0]).to(dtype), normed(k, weights[1]).to(dtype), v, lengths, scale)
    assert (out.double() - exact).norm() <= 1.2 * (rounded - exact).norm() + 4e-3 * exact.norm()


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "atol", "rtol"), HALVES)
@pytest.mark.parametrize("queries", [1, 65, 193, 700])
def test_rotation_of_queries(queries, dtype, atol, rtol, hopper, poison):
    q, k, v = draw(2, queries, 333, 3, 96, dtype, hopper)
    angles = 100 * torch.rand(queries, 48, device=hopper)
    rope = (angles.cos(), angles.sin())
    out = run(q, k, v, poison((2, queries, 288), dtype, hopper), rope=rope)
    cos, sin = (table.double()[:, None] for table in rope)
    x, y = (part.flatten(-2) for part in q.double().unflatten(-1, (-1, 2, 16)).unbind(-2))
    turned = (part.unflatten(-1, (-1, 16)) for part in (x * cos - y * sin, y * cos + x * sin))
    wanted = expected(torch.stack(tuple(turned), -2).flatten(-3), k, v)
    torch.testing.assert_close(out.double(), wanted, atol=atol, rtol=rtol)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("head_dim", "norm", "pair_stride"),
    [
        (72, "qk", 0),
        (96, "qk", 0),
        (96, "", 16),
        (96, "k", 16),
        (96, "qk", 16),
        (96, "", 1),
        (128, "qk", 0),
        (128, "qk", 1),
        (72, "q", 0),
        (72, "k", 0),
    ],
)
def test_self_attention(head_dim, norm, pair_stride, hopper):
    """What the kernel does on load and what takes a pass of its own: the same."""
    q, k, v = draw(2, 500, 500, 4, head_dim, torch.bfloat16, hopper)
    qkv = torch.stack((q, k, v), 2)
    weights = {name: (torch.rand(head_dim, device=hopper) + 0.5).bfloat16() for name in norm}
    angles = 6 * torch.rand(500, head_dim // 2, device=hopper)

    def call(x: Tensor, backend: str) -> Tensor:
        q_weight, k_weight = (weights[name].to(x.dtype) if name in weights else None for name in "qk")
        return ops.self_attention(
            x,
            q_weight=q_weight,
            k_weight=k_weight,
            rope=(angles.cos(), angles.sin()) if pair_stride else None,
            pair_stride=pair_stride or 1,
            backend=backend,
        )

    y = call(qkv.clone(), "cuda")
    torch.testing.assert_close(y.float(), call(qkv.float(), "reference"), atol=1.6e-2, rtol=1.6e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("outliers", [False, True], ids=["plain", "outliers"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_no_worse_than_flash(head_dim, dtype, outliers, hopper, poison):
    """Against float64, one head scaled by 30: at most 1.2 times the error of flash."""
    for seed in range(3):
        q, k, v = (x.clone() for x in draw(2, 1590, 1590, 4, head_dim, dtype, hopper, seed))
        if outliers:
            for x in (q, k, v):
                x[:, :, 1] *= 30
        wanted = expected(q, k, v)
        out = run(q, k, v, poison((2, 1590, 4 * head_dim), dtype, hopper))
        for head in range(4):
            part = slice(head * head_dim, (head + 1) * head_dim)
            ours = (out.double() - wanted)[..., part].norm()
            theirs = (flash(q, k, v).double() - wanted)[..., part].norm()
            assert ours <= 1.2 * theirs, f"head {head}: error {ours:.3e}, flash {theirs:.3e}"


@pytest.mark.gpu
def test_graph_replays_on_new_inputs_and_lengths(hopper):
    q, k, v = draw(2, 400, 300, 16, 72, torch.bfloat16, hopper)
    kv_len = int32([300, 300], hopper)
    ops.attention(q, k, v, kv_len=kv_len, backend="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.attention(q, k, v, kv_len=kv_len, backend="cuda")
    for lengths in ([300, 300], [7, 0], [129, 256]):
        kv_len.copy_(int32(lengths, hopper))
        q.normal_()
        y.fill_(float("nan"))
        graph.replay()
        wanted = expected(q, k, v, lengths).nan_to_num(0)
        torch.testing.assert_close(y.double(), wanted, atol=1.6e-2, rtol=1.6e-2)


@pytest.mark.gpu
def test_runs_on_the_current_stream(hopper):
    q, k, v = draw(2, 1590, 1590, 16, 72, torch.bfloat16, hopper)
    ops.attention(q, k, v, backend="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        q.mul_(0.5)
        y = ops.attention(q, k, v, backend="cuda")
    stream.synchronize()
    torch.testing.assert_close(y.double(), expected(q, k, v), atol=1.6e-2, rtol=1.6e-2)


@pytest.mark.gpu
def test_is_the_choice_where_it_was_measured_faster(hopper):
    def chosen(queries: int, keys: int, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> str:
        q, k, v = draw(1, queries, keys, 2, head_dim, dtype, hopper)
        return backends.choose("attention", q, k, v, None).backend

    assert chosen(1590, 1590, 72) == "cuda"
    assert chosen(400, 300, 72) == "cuda"
    assert chosen(4096, 4096, 96) == "cuda"
    assert chosen(144, 144, 72) == "cuda"
    assert chosen(143, 1590, 72) != "cuda"
    assert chosen(1590, 143, 72) != "cuda"
    assert chosen(4096, 4096, 64) != "cuda"
    assert chosen(32760, 512, 128) == "cuda"
    assert chosen(32760, 257, 128) == "cuda"
    assert chosen(32760, 256, 128) != "cuda"
    assert chosen(1590, 1590, 72, torch.float32) != "cuda"
    q, k, v = draw(2, 1590, 1590, 2, 72, torch.bfloat16, hopper)
    assert backends.choose("attention", q, k[:1].expand(2, -1, -1, -1), v, None).backend != "cuda"
