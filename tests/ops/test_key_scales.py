"""1 / rms of keys: reference and Triton against a float64 formulation of their own."""

from __future__ import annotations

import pytest
import torch

from pab_kernels import ops
from pab_kernels.triton_ops import key_scales as kernels

needs_interpreter = pytest.mark.skipif(not kernels.INTERPRETED, reason="Triton's interpreter is off")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
WHERE = [
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("triton", "cpu", id="triton-interpreted", marks=needs_interpreter),
    pytest.param("triton", "cuda", id="triton-compiled", marks=[pytest.mark.gpu, needs_gpu]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "size", [(2, 9, 16, 72), (1, 3, 24, 96), (2, 193, 3, 64), (1, 1, 1, 2), (3, 8, 5, 10)], ids=str
)
@pytest.mark.parametrize(("backend", "device"), WHERE)
def test_sizes(backend, device, size, dtype):
    """Keys as they lie in the output of a QKV GEMM; some are zero, some large."""
    batch, length, heads, head_dim = size
    torch.manual_seed(length)
    qkv = torch.randn(batch, length, 3, heads, head_dim).to(dtype).to(device)
    qkv[:, 0, 1] = 0
    qkv[:, -1, 1, 0] *= 100
    before = qkv.clone()
    scales = ops.key_scales(qkv[:, :, 1], eps=1e-5, backend=backend)
    wanted = 1 / (torch.linalg.vector_norm(before[:, :, 1].double(), dim=-1) ** 2 / head_dim + 1e-5).sqrt()
    assert scales.shape == (batch, heads, -(-length // 4) * 4)
    assert scales.dtype == torch.float32
    torch.testing.assert_close(scales[..., :length].double(), wanted.transpose(1, 2), atol=0, rtol=1e-5)
    assert torch.equal(qkv, before)


@pytest.mark.parametrize(("backend", "device"), WHERE)
def test_odd_strides(backend, device):
    k = torch.randn(2, 11, 4, 75, device=device)[:, :, :3, 1:73]
    wanted = (k.double().square().mean(-1) + 1e-6).rsqrt().transpose(1, 2)
    scales = ops.key_scales(k, backend=backend)[..., :11]
    torch.testing.assert_close(scales.double(), wanted, atol=0, rtol=1e-5)


def test_no_keys():
    assert ops.key_scales(torch.ones(2, 0, 3, 72)).shape == (2, 3, 0)


@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (torch.ones(2, 3, 72), ValueError, r"k: shape is \[2, 3, 72\]"),
        (torch.ones(2, 3, 4, 72, dtype=torch.int32), TypeError, "k: "),
        (torch.ones(2, 3, 72, 4).mT, ValueError, "k: "),
        ("k", TypeError, "k: got str"),
    ],
    ids=["shape", "dtype", "stride", "type"],
)
def test_errors(k, error, message):
    with pytest.raises(error, match=message):
        ops.key_scales(k)


def test_opcheck():
    torch.library.opcheck(torch.ops.pab.key_scales.default, (torch.randn(1, 4, 2, 8), 1e-6, "reference"))
