"""The one table of backends: for each op who can serve it, best first, and why not."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def _compiled() -> Any:
    """The compiled module, None where the package was built without nvcc."""
    try:
        return importlib.import_module("pab_kernels._C")
    except ImportError:
        return None


_C = _compiled()
log = logging.getLogger(__name__)

MAX_FRAMES = 128
"""Longest sequence along T that the temporal kernels take."""
MAX_CHANNELS = 32768
"""Widest row that Triton holds: that of the pass between two GEMMs, and of GELU and quantisation."""
MAX_SCORES = 16384
"""Longest row of scores that Triton's softmax takes."""
MAX_PLANE_CHANNELS = 4608
"""Most channels of a plane that Triton's group norm and growing take."""
TRITON_HEAD_DIMS = (72,)
"""Head dimensions at which Triton attention was measured faster than the best of SDPA (H100, 144 to 1590 keys)."""
CUDA_HEAD_DIMS = (64, 72, 96, 128)
"""Head dimensions compiled into the CUDA temporal kernel."""
HOPPER_KEYS = {72: 144, 96: 257, 128: 257}
"""Head dimensions compiled into the Hopper attention kernel, and from how many keys on it serves. It was faster than
the best of SDPA from 144 keys on at 72 (H100), and on an H200 at 257, 512, 9,600 and more keys at 96 and 128."""
HOPPER_QUERIES = 144
"""Fewest queries for it: it takes 128 or 192 at a time, and fewer were not timed."""
FP8_TOKENS = {96: 4800, 128: 9600}
"""Head dimensions at which attention in e4m3 is worth while, and from how many tokens on it serves: there it was 1.05
times as fast as 16 bits on an H200, its quantisation counted, and more with more tokens (1.4 times at 28,800 of 96). At
2,400 of 96 it was slower."""
HOPPER_ROPE = (96, 16)
"""Head dimension and pair stride at which it rotates queries itself: then both channels of a pair are in one lane."""


Refusal = Callable[..., str | None]
"""Why a backend does not serve a call with these tensors, None if it does."""


@dataclass(frozen=True)
class Preparation:
    """What is to be done to queries and keys before attention, with heads of `head_dim` channels.

    `across_heads` says whether a norm or the rotation goes across all heads; `pair_stride` is the rotation's, None
    where there is none.
    """

    head_dim: int
    across_heads: bool
    q_norm: bool
    k_norm: bool
    pair_stride: int | None


@dataclass(frozen=True)
class Choice:
    """The backend that serves an op, and why those before it in the table do not."""

    backend: str
    reason: str


def _no_triton(x: Tensor) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if x.device.type != "cuda":
        return f"triton needs a CUDA tensor, got one on {x.device.type}"
    if x.dtype == torch.float64:
        return "triton kernels do not take float64"
    return None


def _no_triton_rows(most: int) -> Refusal:
    """Refusal of a kernel that holds a whole row, of at most so many channels; `others` are rows of other dtypes."""

    def refusal(x: Tensor, *others: Tensor | None) -> str | None:
        if x.shape[-1] > most:
            return f"triton takes at most {most} channels, got {x.shape[-1]}"
        e4m3 = any(other is not None and other.dtype == torch.float8_e4m3fn for other in others)
        return _no_triton_e4m3(x.device, e4m3) or _no_triton(x)

    return refusal


def _no_triton_e4m3(device: torch.device, e4m3: bool) -> str | None:
    if e4m3 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return "triton has no e4m3 below compute capability 8.9"
    return None


def _no_scaled_mm(values: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    if values.dtype != torch.float8_e4m3fn or weight.dtype != torch.float8_e4m3fn:
        return f"scaled_mm takes float8_e4m3fn, got {values.dtype} and {weight.dtype}"
    if bias.dtype != torch.bfloat16:
        return f"scaled_mm gives bfloat16, asked for {bias.dtype}"
    if any(size % 16 for size in weight.shape):
        return f"scaled_mm needs channels and features that are multiples of 16, got {list(weight.shape)}"
    return no_fp8(values.device)


def _no_triton_scaled(values: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("triton.tools.tensor_descriptor") is None:
        return "triton with tensor descriptors is not installed"
    if any(size % 16 for size in weight.shape):
        return f"triton needs channels and features that are multiples of 16, got {list(weight.shape)}"
    if why_not := no_fp8(values.device):
        return why_not
    if torch.cuda.get_device_capability(values.device)[0] != 9:
        return "triton's fp8 GEMM was written for, and measured on, compute capability 9.0"
    return None


def no_fp8(device: torch.device) -> str | None:
    """Why `device` has no fp8 GEMMs, None if it has."""
    if device.type != "cuda":
        return f"fp8 GEMMs need a CUDA GPU, got {device.type}"
    if torch.version.hip is not None:
        return "fp8 GEMMs were written for NVIDIA's e4m3"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        return f"fp8 tensor cores need compute capability 8.9 or newer, this GPU has {major}.{minor}"
    return None


def _no_triton_temporal(qkv: Tensor, out: Tensor | None = None) -> str | None:
    if qkv.shape[1] > MAX_FRAMES:
        return f"triton takes at most {MAX_FRAMES} frames, got {qkv.shape[1]}"
    return _no_triton_e4m3(qkv.device, out is not None and out.dtype == torch.float8_e4m3fn) or _no_triton(qkv)


def _no_cuda_temporal(qkv: Tensor, out: Tensor | None = None) -> str | None:
    frames, head_dim = qkv.shape[1], qkv.shape[-1]
    if _C is None:
        return "the CUDA kernels were left out of this build"
    if qkv.device.type != "cuda":
        return f"cuda needs a CUDA tensor, got one on {qkv.device.type}"
    if torch.cuda.get_device_capability(qkv.device) < (8, 0):
        return "cuda needs compute capability 8.0 or newer"
    if out is not None and out.dtype != qkv.dtype and torch.cuda.get_device_capability(qkv.device) < (9, 0):
        return "cuda writes e4m3 from compute capability 9.0 on"
    if qkv.dtype not in (torch.float16, torch.bfloat16):
        return f"cuda takes float16 and bfloat16, got {qkv.dtype}"
    if head_dim not in CUDA_HEAD_DIMS:
        return f"cuda takes head_dim {CUDA_HEAD_DIMS}, got {head_dim}"
    if frames > MAX_FRAMES:
        return f"cuda takes at most {MAX_FRAMES} frames, got {frames}"
    strides = zip(qkv.shape[:5], qkv.stride()[:5], strict=True)
    if qkv.storage_offset() % 8 or any(size > 1 and stride % 8 for size, stride in strides):
        return "cuda needs rows on 16-byte boundaries"
    return None


@functools.cache
def _built_for_hopper() -> bool:
    return any(name.startswith("90a") for name in _C.build_info()["architectures"])


def no_hopper(device: torch.device) -> str | None:
    """Why `device` has no attention of csrc/, in e4m3 or 16 bits; None if it has."""
    if _C is None:
        return "the CUDA kernels were left out of this build"
    if device.type != "cuda":
        return f"cuda needs a CUDA tensor, got one on {device.type}"
    if torch.cuda.get_device_capability(device) != (9, 0):
        return "cuda needs compute capability 9.0"
    if not _built_for_hopper():
        return "the CUDA kernels were not built for sm_90a"
    return None


def _no_cuda_attention(
    q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None = None, out_scale: Tensor | None = None
) -> str | None:
    head_dim = q.shape[-1]
    if why_not := no_hopper(q.device):
        return why_not
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"cuda takes float16 and bfloat16, got {q.dtype}"
    if out_scale is not None and q.dtype != torch.bfloat16:
        return f"cuda writes e4m3 where it reads bfloat16, got {q.dtype}"
    if head_dim not in HOPPER_KEYS:
        return f"cuda takes head_dim {tuple(HOPPER_KEYS)}, got {head_dim}"
    if q.shape[1] < HOPPER_QUERIES or k.shape[1] < HOPPER_KEYS[head_dim]:
        return f"cuda is for {HOPPER_QUERIES} queries and {HOPPER_KEYS[head_dim]} keys or more at head_dim {head_dim}"
    for x in (q, k, v):
        strides = zip(x.shape[:3], x.stride()[:3], strict=True)
        if x.storage_offset() % 8 or any(size > 1 and (stride % 8 or stride == 0) for size, stride in strides):
            return "cuda needs rows on 16-byte boundaries, none of them shared"
    return None


def _no_fp8_attention(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if why_not := _no_cuda_attention(q, k, v) or _no_triton(q):
        return why_not
    least = FP8_TOKENS.get(q.shape[-1])
    if least is None or q.shape[1] < least:
        return f"fp8 attention is for head_dim and tokens of at least {FP8_TOKENS}, elsewhere 16 bits serve"
    return None


def _no_triton_attention(
    q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None = None, out_scale: Tensor | None = None
) -> str | None:
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"triton takes float16 and bfloat16, got {q.dtype}"
    if q.shape[-1] > 128:
        return f"triton takes head_dim up to 128, got {q.shape[-1]}"
    if kv_len is None and q.shape[-1] not in TRITON_HEAD_DIMS:
        return f"sdpa is no slower where all keys count, but for head_dim {TRITON_HEAD_DIMS}"
    return _no_triton_e4m3(q.device, out_scale is not None) or _no_triton(q)


def _no_triton_planes(x: Tensor) -> str | None:
    channels = x.shape[-1]
    if channels & (channels - 1):
        return f"triton takes channels that are a power of two, got {channels}"
    return _no_triton_rows(MAX_PLANE_CHANNELS)(x)


def _no_triton_conv(x: Tensor, weight: Tensor) -> str | None:
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("triton.tools.tensor_descriptor") is None:
        return "triton with tensor descriptors is not installed"
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"triton takes float16 and bfloat16, got {x.dtype}"
    if x.shape[-1] % 16:
        return f"triton takes multiples of 16 channels, got {x.shape[-1]}"
    if x.numel() // x.shape[-1] >= 2**31:
        return f"triton takes fewer than 2**31 pixels, got {x.numel() // x.shape[-1]}"
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device)[0] != 9:
        return "triton's convolution was written for, and measured on, compute capability 9.0"
    return _no_triton(x)


def _no_cudnn(x: Tensor, weight: Tensor) -> str | None:
    return None if x.device.type == "cuda" else f"cudnn needs a CUDA tensor, got one on {x.device.type}"


def _serves_all(*_: object) -> str | None:
    return None


BACKENDS: dict[str, tuple[tuple[str, Refusal], ...]] = {
    "residual_norm_modulate": (("triton", _no_triton_rows(MAX_CHANNELS)), ("reference", _serves_all)),
    "gelu_quantize": (("triton", _no_triton_rows(MAX_CHANNELS)), ("reference", _serves_all)),
    "scaled_linear_gelu": (
        ("triton", _no_triton_scaled),
        ("scaled_mm", _no_scaled_mm),
        ("reference", _serves_all),
    ),
    "scaled_linear": (("scaled_mm", _no_scaled_mm), ("reference", _serves_all)),
    "temporal_attention": (
        ("cuda", _no_cuda_temporal),
        ("triton", _no_triton_temporal),
        ("reference", _serves_all),
    ),
    "qk_norm_rope": (("triton", _no_triton), ("reference", _serves_all)),
    "key_scales": (("triton", _no_triton), ("reference", _serves_all)),
    "conv_planes": (("triton", _no_triton_conv), ("cudnn", _no_cudnn), ("reference", _serves_all)),
    "channel_sums": (("triton", _no_triton_planes), ("reference", _serves_all)),
    "group_norm_silu": (("triton", _no_triton_planes), ("reference", _serves_all)),
    "softmax_rows": (("triton", _no_triton_rows(MAX_SCORES)), ("reference", _serves_all)),
    "grow_planes": (("triton", _no_triton_planes), ("reference", _serves_all)),
    "attention": (
        ("cuda", _no_cuda_attention),
        ("triton", _no_triton_attention),
        ("sdpa", _serves_all),
        ("reference", _serves_all),
    ),
    "fp8_attention": (
        ("cuda", _no_fp8_attention),
        ("attention", _serves_all),
        ("reference", _serves_all),
    ),
}


def _no_norm_on_load(backend: str, work: Preparation) -> str | None:
    if backend != "cuda" or work.across_heads:
        return "only cuda norms queries as it loads them, each head by itself"
    if work.pair_stride is not None or not (work.q_norm and work.k_norm):
        return "cuda norms queries as it loads them where queries and keys are normed, and not rotated"
    return None


def _no_rotation_on_load(backend: str, work: Preparation) -> str | None:
    if backend != "cuda" or work.across_heads:
        return "only cuda rotates queries as it loads them, each head by itself"
    if work.q_norm or (work.head_dim, work.pair_stride) != HOPPER_ROPE:
        return f"cuda rotates queries as it loads them at head_dim and pair stride {HOPPER_ROPE}, if not normed"
    return None


PREPARATIONS: tuple[tuple[str, Refusal], ...] = (
    ("norm on load", _no_norm_on_load),
    ("rotate on load", _no_rotation_on_load),
    ("pass", _serves_all),
)
"""How `self_attention` norms and rotates, best first: in the attention kernel, or in `qk_norm_rope` before it."""


def choose(op: str, *tensors: Tensor | None) -> Choice:
    """The backend that serves `op` for tensors like these.

    The first argument; for residual_norm_modulate and gelu_quantize also rows of one byte an element, read or
    written; for attention q, k, v, kv_len and out_scale; for temporal_attention qkv and out; for scaled_linear and
    scaled_linear_gelu values, weight, bias.
    """
    return _first(BACKENDS[op], *tensors)


def choose_preparation(backend: str, work: Preparation) -> str:
    """The name in `PREPARATIONS` for attention by `backend`."""
    return _first(PREPARATIONS, backend, work).backend


def _first(table: tuple[tuple[str, Refusal], ...], *arguments: Any) -> Choice:
    """The first of a table that does not refuse."""
    refusals: list[str] = []
    for name, refusal in table:
        why_not = refusal(*arguments)
        if why_not is None:
            return Choice(name, "; ".join(refusals) or "first choice")
        refusals.append(why_not)
    raise AssertionError("the last of a table serves everything")


@functools.cache
def _announce(op: str, choice: Choice) -> None:
    """Say a fallback once: the cache keeps each message from repeating."""
    log.info("%s runs on the %s backend: %s", op, choice.backend, choice.reason)


def resolve(op: str, backend: str | None, *tensors: Tensor | None) -> str:
    """The backend for a call: the forced one, or the choice, announced once where it is not the first."""
    if backend is None:
        choice = choose(op, *tensors)
        if choice.backend != BACKENDS[op][0][0]:
            _announce(op, choice)
        return choice.backend
    names = [name for name, _ in BACKENDS[op]]
    if backend not in names:
        raise ValueError(f"backend: got {backend!r}, must be one of {', '.join(names)}")
    # No refusal is asked: Triton's interpreter runs on the CPU. What a forced backend cannot do, its launcher refuses.
    return backend
