"""Types of the compiled module; see csrc/bindings.cpp."""

from collections.abc import Sequence
from typing import Any

def temporal_attention(
    *,
    qkv: int,
    qkv_strides: Sequence[int],
    shape: Sequence[int],
    dtype: str,
    q_weight: int,
    k_weight: int,
    cos: int,
    sin: int,
    eps: float,
    softmax_scale: float,
    out: int,
    device: int,
    stream: int,
) -> None: ...
def attention(
    *,
    q: int,
    q_strides: Sequence[int],
    k: int,
    k_strides: Sequence[int],
    v: int,
    v_strides: Sequence[int],
    shape: Sequence[int],
    dtype: str,
    kv_len: int,
    softmax_scale: float,
    q_weight: int,
    k_weight: int,
    key_scales: int,
    key_scales_pitch: int,
    eps: float,
    cos: int,
    sin: int,
    pair_stride: int,
    out: int,
    device: int,
    stream: int,
) -> None: ...
def fp8_attention(
    *,
    q: int,
    k: int,
    v: int,
    q_scale: int,
    k_scale: int,
    v_scale: int,
    shape: Sequence[int],
    columns: int,
    pitch: int,
    dtype: str,
    softmax_scale: float,
    out: int,
    device: int,
    stream: int,
) -> None: ...
def build_info() -> dict[str, Any]: ...
