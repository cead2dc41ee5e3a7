"""Temporal attention: every backend against a float64 formulation of its own."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pab_kernels import ops
from pab_kernels.ops import backends, reference

DTYPES = [
    pytest.param(torch.float32, 2e-5, 1e-5, id="float32"),
    pytest.param(torch.float16, 4e-3, 2e-3, id="float16"),
    pytest.param(torch.bfloat16, 3e-2, 1.6e-2, id="bfloat16"),
]
HALVES = DTYPES[1:]
PREPARE = [
    pytest.param(False, False, id="plain"),
    pytest.param(True, False, id="norm"),
    pytest.param(False, True, id="rope"),
    pytest.param(True, True, id="norm-rope"),
]
FRAMES = [1, 2, 15, 16, 17, 30, 32, 33, 48, 51, 60, 64, 65, 100, 128]
HEAD_DIMS = [64, 72, 96, 128]

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None,
    reason="needs Triton's interpreter",
)
compiled = pytest.mark.skipif(backends._C is None, reason="the CUDA kernels were left out of this build")
ON_CPU = [pytest.param("reference", id="reference"), pytest.param("triton", id="triton", marks=interpreted)]
ON_GPU = [pytest.param("cuda", id="cuda", marks=compiled), pytest.param("triton", id="triton")]


@dataclass
class Case:
    """Inputs of one call."""

    qkv: Tensor
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    rope: tuple[Tensor, Tensor] | None = None

    @classmethod
    def random(cls, shape, dtype, device="cpu", *, norm=False, rope=False, seed=0) -> Case:
        """Fresh inputs for [B, T, S, H, D]."""
        batch, frames, tokens, heads, head_dim = shape
        torch.manual_seed(seed + 1000 * frames + head_dim)
        case = cls(torch.randn(batch, frames, tokens, 3, heads, head_dim, device=device).to(dtype))
        if norm:
            case.q_weight, case.k_weight = (1 + 0.2 * torch.randn(2, head_dim, device=device)).to(dtype)
        if rope:
            angles = torch.arange(frames)[:, None] * 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
            case.rope = (angles.cos().to(device), angles.sin().to(device))
        return case

    def run(self, backend, **kwargs) -> Tensor:
        return ops.temporal_attention(
            self.qkv, q_weight=self.q_weight, k_weight=self.k_weight, rope=self.rope, backend=backend, **kwargs
        )

    def output_shape(self) -> tuple[int, ...]:
        batch, frames, tokens, _, heads, head_dim = self.qkv.shape
        return (batch, frames, tokens, heads * head_dim)

    def expected(self, eps=1e-6, softmax_scale=None) -> Tensor:
        """Float64 from the definitions: complex rotation, explicit softmax, einsum over named axes."""
        head_dim = self.qkv.shape[-1]
        q, k, v = self.qkv.double().unbind(3)
        if self.q_weight is not None:
            q = F.rms_norm(q, (head_dim,), self.q_weight.double(), eps)
        if self.k_weight is not None:
            k = F.rms_norm(k, (head_dim,), self.k_weight.double(), eps)
        if self.rope is not None:
            turn = torch.complex(self.rope[0].double(), self.rope[1].double())[None, :, None, None, :]
            q, k = (
                torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2) for x in (q, k)
            )
        scores = torch.einsum("btshd,bushd->bshtu", q, k) * (head_dim**-0.5 if softmax_scale is None else softmax_scale)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        y = torch.einsum("bshtu,bushd->btshd", weights / weights.sum(-1, keepdim=True), v)
        return y.reshape(self.output_shape())

    def sdpa(self) -> Tensor:
        """What one would write without this op: norm and RoPE in float32, rounded, then SDPA on copies."""
        q, k, v = self.qkv.permute(3, 0, 2, 4, 1, 5)  # each [B, S, H, T, D]
        if self.q_weight is not None:
            q = reference.rms_norm_ref(q, self.q_weight, 1e-6)
        if self.k_weight is not None:
            k = reference.rms_norm_ref(k, self.k_weight, 1e-6)
        if self.rope is not None:
            q, k = (reference.rotate_pairs_ref(x.float(), *self.rope) for x in (q, k))
        q, k, v = (x.to(v.dtype).flatten(0, 1).contiguous() for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        shape = self.output_shape()
        return y.unflatten(0, (shape[0], shape[2])).permute(0, 3, 1, 2, 4).reshape(shape)


def relative_error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


# On the CPU: the reference, and Triton's interpreter


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize(("dtype", "atol", "rtol"), DTYPES)
@pytest.mark.parametrize(("norm", "rope"), PREPARE)
@pytest.mark.parametrize("frames", [1, 15, 17, 33])
def test_matches_float64(backend, dtype, atol, rtol, norm, rope, frames, poison):
    case = Case.random((1, frames, 3, 2, 72), dtype, norm=norm, rope=rope)
    out = poison(case.output_shape(), dtype)
    assert case.run(backend, out=out) is out
    torch.testing.assert_close(out.double(), case.expected(), atol=atol, rtol=rtol)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("head_dim", [8, *HEAD_DIMS])
@pytest.mark.parametrize("frames", [2, 16, 51])
def test_head_dims(backend, head_dim, frames):
    case = Case.random((2, frames, 1, 1, head_dim), torch.float32, norm=True, rope=True)
    torch.testing.assert_close(case.run(backend).double(), case.expected(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("layout", ["sliced", "permuted"])
def test_strided(backend, layout):
    case = strided(Case.random((2, 15, 3, 3, 72), torch.float32, norm=True, rope=True), layout)
    torch.testing.assert_close(case.run(backend).double(), case.expected(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ON_CPU)
def test_one_norm_other_scale_and_eps(backend):
    case = Case.random((1, 15, 2, 1, 72), torch.float32, norm=True)
    case.k_weight = None
    y = case.run(backend, softmax_scale=0.3, eps=0.5)
    torch.testing.assert_close(y.double(), case.expected(eps=0.5, softmax_scale=0.3), atol=2e-5, rtol=1e-5)


def test_reference_keeps_float64():
    case = Case.random((2, 16, 3, 3, 64), torch.float64, norm=True, rope=True)
    torch.testing.assert_close(case.run("reference"), case.expected(), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("shape", [(0, 15, 3, 1, 72), (1, 15, 0, 1, 72)])
def test_empty(shape):
    case = Case.random(shape, torch.float32)
    assert case.run(None).shape == case.output_shape()


def strided(case: Case, layout: str) -> Case:
    """The same values, sliced out of a larger tensor or with B, T, S in another order in memory."""
    batch, frames, tokens, _, heads, head_dim = case.qkv.shape
    if layout == "sliced":
        larger = case.qkv.new_full((batch, frames + 2, tokens + 1, 3, heads + 1, head_dim + 16), float("nan"))
        view = larger[:, 1:-1, :-1, :, 1:, 8:-8]
    else:
        view = case.qkv.new_empty((tokens, frames, batch, 3, heads, head_dim)).permute(2, 1, 0, 3, 4, 5)
    case.qkv = view.copy_(case.qkv)
    return case


# Errors


def test_errors_name_the_argument():
    qkv = torch.zeros(1, 15, 3, 3, 2, 72)
    table = torch.zeros(15, 36)
    for argument, error, call in [
        ("qkv", TypeError, lambda: ops.temporal_attention([1.0])),  # type: ignore[arg-type]
        ("qkv", TypeError, lambda: ops.temporal_attention(qkv.int())),
        ("qkv", ValueError, lambda: ops.temporal_attention(qkv[0])),
        ("qkv", ValueError, lambda: ops.temporal_attention(qkv[..., :71])),
        ("qkv", ValueError, lambda: ops.temporal_attention(qkv.transpose(-1, -2).contiguous().transpose(-1, -2))),
        ("q_weight", ValueError, lambda: ops.temporal_attention(qkv, q_weight=torch.ones(64))),
        ("k_weight", TypeError, lambda: ops.temporal_attention(qkv, k_weight=torch.ones(72).half())),
        (r"rope\[0\]", ValueError, lambda: ops.temporal_attention(qkv, rope=(table[:14], table))),
        (r"rope\[1\]", ValueError, lambda: ops.temporal_attention(qkv, rope=(table, table.double()))),
        ("out", ValueError, lambda: ops.temporal_attention(qkv, out=torch.zeros(1, 15, 3, 72))),
        ("backend", ValueError, lambda: ops.temporal_attention(qkv, backend="flash")),
    ]:
        with pytest.raises(error, match=argument):
            call()


@compiled
@pytest.mark.parametrize(
    ("change", "argument"),
    [
        pytest.param({"dtype": "float32"}, "dtype", id="dtype"),
        pytest.param({"shape": (1, 15, 3, 3, 2, 80)}, "head_dim", id="head_dim"),
        pytest.param({"shape": (1, 129, 3, 3, 2, 72)}, "T is 129", id="frames"),
        pytest.param({"shape": (65536, 15, 3, 3, 2, 72)}, "B is 65536", id="batch"),
        pytest.param({"shape": (1, 15, 3, 2, 2, 72)}, "dimension 3", id="qkv-dimension"),
        pytest.param({"shape": (1, 15, 3, 3, 2**31, 72)}, "shape", id="heads"),
        pytest.param({"qkv": 0}, "qkv", id="null-qkv"),
        pytest.param({"qkv": 18}, "qkv: address", id="unaligned-qkv"),
        pytest.param({"qkv_strides": (9720, 648, 217, 144, 72)}, "qkv_strides", id="odd-stride"),
        pytest.param({"q_weight": 2}, "q_weight", id="unaligned-weight"),
        pytest.param({"cos": 16}, "cos, sin", id="cos-without-sin"),
        pytest.param({"out": 0}, "out", id="null-out"),
    ],
)
def test_compiled_module_names_the_argument(change, argument):
    call = {
        **{"qkv": 16, "qkv_strides": (9720, 648, 216, 144, 72), "shape": (1, 15, 3, 3, 2, 72), "dtype": "bfloat16"},
        **{"q_weight": 0, "k_weight": 0, "cos": 0, "sin": 0, "eps": 1e-6, "softmax_scale": 0.1, "out": 16},
        **{"device": 0, "stream": 0},
    }
    with pytest.raises(ValueError, match=argument):
        backends._C.temporal_attention(**{**call, **change})


# On the GPU


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ON_GPU)
@pytest.mark.parametrize(("dtype", "atol", "rtol"), HALVES)
@pytest.mark.parametrize(("norm", "rope"), PREPARE)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("frames", FRAMES)
def test_gpu_matches_float64(backend, dtype, atol, rtol, norm, rope, head_dim, frames, device, poison):
    for shape in [(1, frames, 1, 1, head_dim), (2, frames, 3, 3, head_dim), (1, frames, 63, 16, head_dim)]:
        case = Case.random(shape, dtype, device, norm=norm, rope=rope)
        out = poison(case.output_shape(), dtype, device)
        case.run(backend, out=out)
        torch.testing.assert_close(out.double(), case.expected(), atol=atol, rtol=rtol)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ON_GPU)
@pytest.mark.parametrize("frames", [15, 16, 30, 60])
@pytest.mark.parametrize(("norm", "rope"), [PREPARE[0], PREPARE[3]])
@pytest.mark.parametrize(("dtype", "atol", "rtol"), HALVES)
def test_gpu_full_size(backend, dtype, atol, rtol, norm, rope, frames, device, poison):
    case = Case.random((1, frames, 1590, 16, 72), dtype, device, norm=norm, rope=rope)
    out = poison(case.output_shape(), dtype, device)
    case.run(backend, out=out)
    torch.testing.assert_close(out.double(), case.expected(), atol=atol, rtol=rtol)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ON_GPU)
@pytest.mark.parametrize(("dtype", "atol", "rtol"), HALVES)
@pytest.mark.parametrize("layout", ["sliced", "permuted"])
@pytest.mark.parametrize("frames", [15, 30, 33])
def test_gpu_strided(backend, dtype, atol, rtol, layout, frames, device, poison):
    case = strided(Case.random((2, frames, 63, 3, 72), dtype, device, norm=True, rope=True), layout)
    out = poison(case.output_shape(), dtype, device)
    case.run(backend, out=out)
    torch.testing.assert_close(out.double(), case.expected(), atol=atol, rtol=rtol)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ON_GPU)
@pytest.mark.parametrize(("dtype", "atol", "rtol"), HALVES)
@pytest.mark.parametrize(("norm", "rope"), [PREPARE[0], PREPARE[3]])
@pytest.mark.parametrize("frames", [16, 51])
def test_gpu_outlier_head(backend, dtype, atol, rtol, norm, rope, frames, device):
    case = Case.random((1, frames, 63, 3, 72), dtype, device, norm=norm, rope=rope)
    case.qkv[..., 1, :] *= 30
    y, expected = case.run(backend).double(), case.expected()
    # That head's values are 30 times as large, and so are their rounding errors.
    scale = torch.ones(3, 72, dtype=torch.float64, device=device)
    scale[1] = 30
    torch.testing.assert_close(y / scale.flatten(), expected / scale.flatten(), atol=atol, rtol=rtol)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ON_GPU)
@pytest.mark.parametrize(("norm", "rope"), PREPARE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("frames", "head_dim"), [(15, 72), (16, 64), (60, 72), (128, 128)])
def test_gpu_no_worse_than_sdpa(backend, norm, rope, dtype, frames, head_dim, device):
    for seed in range(3):
        case = Case.random((1, frames, 63, 16, head_dim), dtype, device, norm=norm, rope=rope, seed=seed)
        expected = case.expected()
        assert relative_error(case.run(backend), expected) <= 1.5 * relative_error(case.sdpa(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ON_GPU)
@pytest.mark.parametrize("frames", [15, 30, 60])
def test_gpu_repeats_bit_for_bit(backend, frames, device):
    case = Case.random((2, frames, 405, 16, 72), torch.bfloat16, device, norm=True, rope=True)
    first = case.run(backend)
    for _ in range(5):
        assert torch.equal(case.run(backend), first)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ON_GPU)
@pytest.mark.parametrize(("frames", "head_dim"), [(15, 128), (60, 72), (128, 128)])
def test_gpu_graph_replays_on_new_inputs(backend, frames, head_dim, device, poison):
    shape = (1, frames, 63, 16, head_dim)
    case = Case.random(shape, torch.bfloat16, device, norm=True, rope=True)
    out = poison(case.output_shape(), torch.bfloat16, device)
    case.run(backend, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.run(backend, out=out)
    case.qkv.copy_(Case.random(shape, torch.bfloat16, device, seed=7).qkv)
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, case.run(backend))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ON_GPU)
@pytest.mark.parametrize("softmax_scale", [-0.1, 0.0, 0.2])
@pytest.mark.parametrize("frames", [15, 60])
def test_gpu_softmax_scale(backend, softmax_scale, frames, device):
    case = Case.random((1, frames, 63, 3, 72), torch.bfloat16, device, norm=True)
    y = case.run(backend, softmax_scale=softmax_scale)
    torch.testing.assert_close(y.double(), case.expected(softmax_scale=softmax_scale), atol=3e-2, rtol=1.6e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ON_GPU)
@pytest.mark.parametrize("frames", [30, 60])
def test_gpu_shared_rows(backend, frames, device):
    """A batch or tokens that are one in memory: strides of 0."""
    for shape, whole in [
        ((1, frames, 5, 3, 72), (3, -1, -1, -1, -1, -1)),
        ((2, frames, 1, 3, 72), (-1, -1, 5, -1, -1, -1)),
    ]:
        case = Case.random(shape, torch.bfloat16, device, norm=True)
        case.qkv = case.qkv.expand(whole)
        torch.testing.assert_close(case.run(backend).double(), case.expected(), atol=3e-2, rtol=1.6e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ON_GPU)
def test_gpu_runs_on_the_current_stream(backend, device):
    case = Case.random((1, 15, 405, 16, 72), torch.bfloat16, device)
    case.run(backend)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        case.qkv.mul_(0.5)
        y = case.run(backend)
    stream.synchronize()
    torch.testing.assert_close(y.double(), case.expected(), atol=3e-2, rtol=1.6e-2)


@pytest.mark.gpu
@compiled
def test_gpu_cuda_is_the_first_choice(device):
    qkv = torch.zeros(1, 15, 3, 3, 2, 72, dtype=torch.bfloat16, device=device)
    assert backends.choose("temporal_attention", qkv).backend == "cuda"
