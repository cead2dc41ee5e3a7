"""Norm and rotary embedding of queries and keys: reference and Triton against a float64 formulation of their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pab_kernels import ops
from pab_kernels.triton_ops import qk_norm_rope as kernels

EPS = 1e-6
TOLERANCES = [
    pytest.param(torch.float32, 2e-5, 1e-5, id="float32"),
    pytest.param(torch.float16, 2e-3, 2e-3, id="float16"),
    pytest.param(torch.bfloat16, 2e-2, 1.6e-2, id="bfloat16"),
]
needs_interpreter = pytest.mark.skipif(not kernels.INTERPRETED, reason="Triton's interpreter is off")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
WHERE = [
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("triton", "cpu", id="triton-interpreted", marks=needs_interpreter),
    pytest.param("triton", "cuda", id="triton-compiled", marks=[pytest.mark.gpu, needs_gpu]),
]
# B, N, H, D, pair_stride: the models' heads, then odd ones.
SIZES = [
    (2, 3, 16, 72, 1),
    (1, 2, 24, 96, 16),
    (1, 15, 2, 64, 32),
    (2, 3, 3, 72, 36),
    (1, 5, 5, 10, 1),
    (1, 1, 1, 2, 1),
]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, pair_stride: int) -> Tensor:
    """Each pair as a complex number times cos + i sin; the pairs are listed one by one."""
    head_dim = x.shape[-1]
    first = [c for c in range(head_dim) if c // pair_stride % 2 == 0]
    second = [c + pair_stride for c in first]
    turned = torch.complex(x[..., first], x[..., second]) * torch.complex(cos.double(), sin.double()).unsqueeze(1)
    y = torch.empty_like(x)
    y[..., first], y[..., second] = turned.real, turned.imag
    return y


def expected(qkv: Tensor, weights, rope, pair_stride: int) -> Tensor:
    """The new qkv in float64."""
    parts: list[Tensor] = []
    for part, weight in zip(qkv.double().unbind(2), (*weights, None), strict=True):
        if weight is not None:
            length = torch.linalg.vector_norm(part, dim=-1, keepdim=True) / part.shape[-1] ** 0.5
            part = part / torch.sqrt(length**2 + EPS) * weight.double()
        if rope is not None and len(parts) < 2:
            part = rotate(part, rope[0], rope[1], pair_stride)
        parts.append(part)
    return torch.stack(parts, 2)


class Case:
    """Inputs of one call. Made on the CPU, so that all backends see the same numbers."""

    def __init__(self, size, *, norm=(True, True), rope=True, dtype=torch.float32, device="cpu"):
        batch, positions, heads, head_dim, self.pair_stride = size
        torch.manual_seed(positions * heads + head_dim)
        self.qkv = torch.randn(batch, positions, 3, heads, head_dim).to(dtype).to(device)
        self.weights = [torch.randn(head_dim).to(dtype).to(device) if one else None for one in norm]
        angles = 100 * torch.rand(positions, head_dim // 2)
        self.rope = (angles.cos().to(device), angles.sin().to(device)) if rope else None

    def run(self, backend: str, queries: bool = True) -> Tensor:
        q_weight, k_weight = self.weights
        return ops.qk_norm_rope(
            self.qkv,
            q_weight=q_weight,
            k_weight=k_weight,
            rope=self.rope,
            pair_stride=self.pair_stride,
            eps=EPS,
            queries=queries,
            backend=backend,
        )

    def check(self, backend: str, atol: float, rtol: float) -> None:
        before = self.qkv.clone()
        wanted = expected(before, self.weights, self.rope, self.pair_stride)
        assert self.run(backend) is self.qkv
        torch.testing.assert_close(self.qkv.double(), wanted, atol=atol, rtol=rtol)
        assert torch.equal(self.qkv[:, :, 2], before[:, :, 2]), "v was written"


@pytest.mark.parametrize(("dtype", "atol", "rtol"), TOLERANCES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("backend", "device"), WHERE)
def test_sizes(backend, device, size, dtype, atol, rtol):
    Case(size, dtype=dtype, device=device).check(backend, atol, rtol)


@pytest.mark.parametrize("rope", [True, False], ids=["rope", "no-rope"])
@pytest.mark.parametrize("norm", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("pair_stride", [1, 16])
@pytest.mark.parametrize(("backend", "device"), WHERE)
def test_parts(backend, device, pair_stride, norm, rope):
    """Any of the norms and the rotation may be missing."""
    Case((2, 2, 2, 96, pair_stride), norm=norm, rope=rope, device=device).check(backend, 2e-5, 1e-5)


# B, N, H, D, pair_stride: Wan 1.3B and LTX-Video, then sizes with a short second tile.
WIDE = [(1, 3, 12, 128, 1), (2, 2, 32, 64, 1), (2, 3, 3, 10, 1), (1, 2, 5, 12, 3)]


def wide_case(size, rope: str, dtype=torch.float32, device="cpu") -> tuple[Case, Tensor]:
    """Heads normed together, and what comes out: that of one head as wide as all, with tables as wide."""
    _, positions, heads, head_dim, _ = size
    case = Case(size, dtype=dtype, device=device, rope=False)
    case.weights = [torch.randn(heads * head_dim).to(dtype).to(device) for _ in range(2)]
    tables = None
    if rope != "none":
        angles = 100 * torch.rand(positions, head_dim // 2 * (heads if rope == "wide" else 1))
        case.rope = (angles.cos().to(device), angles.sin().to(device))
        tables = [table if rope == "wide" else table.repeat(1, heads) for table in case.rope]
    one = case.qkv.flatten(3)[:, :, :, None]
    return case, expected(one, case.weights, tables, case.pair_stride).view(case.qkv.shape)


@pytest.mark.parametrize(("dtype", "atol", "rtol"), TOLERANCES)
@pytest.mark.parametrize("rope", ["none", "each head", "wide"])
@pytest.mark.parametrize("size", WIDE, ids=str)
@pytest.mark.parametrize(("backend", "device"), WHERE)
def test_across_heads(backend, device, size, rope, dtype, atol, rtol):
    case, wanted = wide_case(size, rope, dtype, device)
    case.run(backend)
    torch.testing.assert_close(case.qkv.double(), wanted, atol=2 * atol, rtol=rtol)


@pytest.mark.parametrize(("backend", "device"), WHERE)
def test_across_heads_it_reads_what_the_gemm_wrote(backend, device):
    """Rows of a wider tensor: what lies between them stays as it is."""
    case, wanted = wide_case((2, 3, 4, 16, 1), "each head", device=device)
    wide = torch.full((2, 3, 3 * 64 + 8), 7.0, device=device)
    case.qkv = wide[..., :192].unflatten(-1, (3, 4, 16)).copy_(case.qkv)
    case.run(backend)
    torch.testing.assert_close(case.qkv.double(), wanted, atol=2e-5, rtol=1e-5)
    assert (wide[..., 192:] == 7).all()


@pytest.mark.parametrize(
    ("backend", "device"), [("reference", "cpu"), pytest.param(None, "cuda", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("rope", ["none", "each head", "wide"])
def test_self_attention_of_heads_normed_together(rope, backend, device):
    """At a head_dim whose kernel norms each head by itself on load: it must not do so here."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    case, wanted = wide_case((1, 300, 3, 72, 1), rope, dtype, device)
    (q_weight, k_weight), tables = case.weights, case.rope
    y = ops.self_attention(case.qkv, q_weight=q_weight, k_weight=k_weight, rope=tables, eps=EPS, backend=backend)
    q, k, v = (part.transpose(1, 2) for part in wanted.unbind(2))
    weights = torch.softmax(q @ k.mT * 72**-0.5, dim=-1)
    atol = 1e-5 if device == "cpu" else 3e-2
    torch.testing.assert_close(y.double(), (weights @ v).transpose(1, 2).flatten(2), atol=atol, rtol=atol)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("backend", "device"), WHERE)
def test_queries_by_themselves(backend, device, parts):
    """As cross-attention has them; or keys and values, of which the keys are normed."""
    case, wanted = wide_case((2, 3, 3, 10, 1), "none", device=device)
    rows, values = case.qkv[:, :, :parts].clone(), case.qkv[:, :, 1:parts].clone()
    ops.qk_norm_rope(rows, q_weight=case.weights[0], eps=EPS, backend=backend)
    torch.testing.assert_close(rows[:, :, 0].double(), wanted[:, :, 0], atol=2e-5, rtol=1e-5)
    assert torch.equal(rows[:, :, 1:], values)


@pytest.mark.parametrize("rope", [True, False], ids=["rope", "no-rope"])
@pytest.mark.parametrize(("backend", "device"), WHERE)
def test_keys_alone(backend, device, rope):
    """Without `queries` these keep every bit, and keys come out as with them."""
    one, both = (Case((2, 3, 3, 96, 16), rope=rope, dtype=torch.bfloat16, device=device) for _ in range(2))
    before = one.qkv.clone()
    one.run(backend, queries=False)
    both.run(backend)
    assert torch.equal(one.qkv[:, :, [0, 2]], before[:, :, [0, 2]])
    assert torch.equal(one.qkv[:, :, 1], both.qkv[:, :, 1])
    assert not torch.equal(one.qkv[:, :, 1], before[:, :, 1])


@pytest.mark.parametrize("size", [(2, 15, 2, 72, 1), (1, 31, 1, 96, 16)], ids=str)
@pytest.mark.parametrize(("backend", "device"), WHERE)
def test_many_positions(backend, device, size):
    Case(size, dtype=torch.bfloat16, device=device).check(backend, 2e-2, 1.6e-2)


@pytest.mark.parametrize("unit", [8, 1], ids=["aligned", "odd"])
@pytest.mark.parametrize("pair_stride", [1, 36])
@pytest.mark.parametrize(("backend", "device"), WHERE)
def test_strides(backend, device, pair_stride, unit):
    """qkv cut out of a wider tensor with batch and positions swapped; what lies between stays as it is."""
    case = Case((2, 3, 4, 72, pair_stride), dtype=torch.bfloat16, device=device)
    wide = torch.full((3, 2, 3, 5, 72 + unit), 7.0, dtype=torch.bfloat16, device=device)
    view = wide.transpose(0, 1)[:, :, :, :4, :72]
    view.copy_(case.qkv)
    case.qkv = view
    case.check(backend, 2e-2, 1.6e-2)
    assert (wide[..., 4, :] == 7).all(), "wrote between the heads"
    assert (wide[..., 72:] == 7).all(), "wrote beyond head_dim"


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4], ids=str)
@pytest.mark.parametrize(("backend", "device"), WHERE)
def test_extremes(backend, device, scale):
    """A head of zeros gives zeros and not NaN, eps counts for small heads, squares of large ones do not overflow."""
    case = Case((1, 2, 4, 72, 1), dtype=torch.float16, device=device)
    case.qkv[:, :, :, 1] *= scale
    case.check(backend, 2e-3, 2e-3)


@needs_interpreter
@pytest.mark.parametrize("config", [(1, 1, 1), (2, 3, 1), (4, 2, 2), (16, 4, 1)], ids=str)
def test_configs(config):
    case = Case((2, 5, 6, 72, 1))
    wanted = expected(case.qkv, case.weights, case.rope, 1)
    (q_weight, k_weight), (cos, sin) = case.weights, case.rope or (None, None)
    kernels.qk_norm_rope_triton(case.qkv, q_weight, k_weight, cos, sin, 1, EPS, config=kernels.Config(*config))
    torch.testing.assert_close(case.qkv.double(), wanted, atol=2e-5, rtol=1e-5)


def test_default_configs():
    assert [kernels.default_config(heads).rows for heads in (1, 3, 12, 16, 24, 64)] == [1, 4, 4, 16, 8, 16]
    assert [kernels.default_config(1, width).warps for width in (128, 1536, 2048, 3072, 5120)] == [2, 2, 2, 4, 8]


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_interpreter)])
def test_nothing_to_do(backend):
    qkv = torch.randn(1, 2, 3, 2, 8)
    before = qkv.clone()
    assert ops.qk_norm_rope(qkv, backend=backend) is qkv
    assert torch.equal(qkv, before)
    empty, weight = torch.empty(1, 0, 3, 2, 8), torch.ones(8)
    assert ops.qk_norm_rope(empty, q_weight=weight, k_weight=weight, backend=backend).shape == (1, 0, 3, 2, 8)


QKV, WEIGHT, TABLE = torch.zeros(1, 4, 3, 2, 8), torch.ones(8), torch.ones(4, 4)
ERRORS = {
    "qkv is no tensor": ((0,), {}, TypeError, r"qkv: got int, must be a torch\.Tensor"),
    "integer qkv": ((QKV.int(),), {}, TypeError, r"qkv: dtype is torch\.int32, must be one of .*torch\.float32"),
    "no keys": ((QKV[:, :, :1],), {"k_weight": WEIGHT}, ValueError, r"k_weight: given, but qkv .* has no keys"),
    "heads apart": ((QKV[..., :4],), {"q_weight": WEIGHT}, ValueError, r"qkv: stride of heads is 8, must be 4 for a"),
    "one norm across heads": (
        (QKV,),
        {"q_weight": torch.ones(16), "k_weight": WEIGHT},
        ValueError,
        r"k_weight: shape is \[8\], must be \[16\]",
    ),
    "strided channels": ((QKV.mT.contiguous().mT,), {}, ValueError, r"qkv: stride of the last dimension is 2, must be"),
    "weight shape": ((QKV,), {"q_weight": WEIGHT[:4]}, ValueError, r"q_weight: shape is \[4\], must be \[8\]"),
    "weight dtype": ((QKV,), {"k_weight": WEIGHT.half()}, TypeError, r"k_weight: dtype is torch\.float16, must be"),
    "weight stride": ((QKV,), {"k_weight": torch.ones(16)[::2]}, ValueError, r"k_weight: stride of the last .* is 2"),
    "table shape": (
        (QKV,),
        {"rope": (TABLE, TABLE[:3])},
        ValueError,
        r"rope\[1\]: shape is \[3, 4\], must be \[4, 4\]",
    ),
    "table dtype": (
        (QKV,),
        {"rope": (TABLE.half(), TABLE)},
        ValueError,
        r"rope\[0\]: is torch\.float16 on cpu, must be",
    ),
    "pair stride": ((QKV,), {"pair_stride": 3}, ValueError, r"pair_stride: got 3, twice of it must divide .* 8"),
    "no pair stride": ((QKV,), {"pair_stride": 0}, ValueError, r"pair_stride: got 0, twice of it must divide .* 8"),
    "backend": ((QKV,), {"q_weight": WEIGHT, "backend": "cuda"}, ValueError, r"backend: got 'cuda', must be one of"),
    "float64 on triton": (
        (QKV.double(),),
        {"q_weight": WEIGHT.double(), "backend": "triton"},
        ValueError,
        r"backend: triton got torch\.float64, must be float32, float16 or bfloat16",
    ),
}


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        ops.qk_norm_rope(*args, **kwargs)


def test_triton_refuses_cpu_tensors_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"backend: triton got a tensor on cpu, must be on a CUDA device"):
        ops.qk_norm_rope(QKV.clone(), q_weight=WEIGHT, backend="triton")


@pytest.mark.parametrize("rope", [True, False], ids=["rope", "no-rope"])
def test_opcheck(rope):
    case = Case((1, 3, 2, 8, 1), rope=rope)
    args = (case.qkv, *case.weights, *(case.rope or (None, None)), 1, EPS, True, "reference")
    torch.library.opcheck(torch.ops.pab.qk_norm_rope.default, args)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("size", [(2, 1590, 16, 72, 1), (1, 1590, 24, 96, 16)], ids=str)
def test_large(size):
    Case(size, dtype=torch.bfloat16, device="cuda").check("triton", 3e-2, 1.6e-2)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("rope", ["none", "each head", "wide"])
@pytest.mark.parametrize("size", [(1, 4680, 12, 128, 1), (1, 1170, 40, 128, 1), (2, 1170, 32, 64, 1)], ids=str)
def test_large_across_heads(size, rope):
    case, wanted = wide_case(size, rope, torch.bfloat16, "cuda")
    case.run("triton")
    torch.testing.assert_close(case.qkv.double(), wanted, atol=4e-2, rtol=1.6e-2)


@pytest.mark.gpu
@needs_gpu
def test_cuda_graph():
    """Captured once, replayed on new contents of the same buffers."""
    case = Case((2, 63, 16, 72, 1), dtype=torch.bfloat16, device="cuda")
    case.run("triton")  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.run("triton")
    for _ in range(2):
        case.qkv.normal_()
        wanted = expected(case.qkv, case.weights, case.rope, 1)
        graph.replay()
        torch.testing.assert_close(case.qkv.double(), wanted, atol=2e-2, rtol=1.6e-2)
