"""Compile every Triton kernel as its launcher would launch it, for other GPUs than this machine has, or none.

``python -m tests.triton_targets 80 120`` prints a line for each kernel and compute capability: "ok", or what the
compiler said. In a process of its own, without Triton's interpreter: `tests/ops/test_triton_targets.py` starts it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from pab_kernels.ops.quantized import Quantized
from pab_kernels.triton_ops.attention import attention_triton
from pab_kernels.triton_ops.conv_planes import conv_planes_triton
from pab_kernels.triton_ops.gelu_quantize import gelu_quantize_triton
from pab_kernels.triton_ops.group_norm_silu import channel_sums_triton, group_norm_silu_triton
from pab_kernels.triton_ops.grow_planes import grow_planes_triton
from pab_kernels.triton_ops.key_scales import key_scales_triton
from pab_kernels.triton_ops.qk_norm_rope import qk_norm_rope_triton
from pab_kernels.triton_ops.quantize_qkv import quantize_qkv_triton
from pab_kernels.triton_ops.residual_norm_modulate import residual_norm_modulate_triton
from pab_kernels.triton_ops.scaled_linear_gelu import scaled_linear_gelu_triton
from pab_kernels.triton_ops.temporal_attention import temporal_attention_triton


class OnGpu(Tensor):
    """A tensor in host memory that says it is on a GPU: a launcher only takes its address."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")


class Driver:
    """What Triton asks of a driver before it compiles. A capability counts as a device, so that none shares code."""

    capability = 0

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Zeros on the GPU that there is not."""
    return torch.zeros(*shape, dtype=dtype).as_subclass(OnGpu)


def rows(*shape: int, dtype: torch.dtype) -> Quantized:
    return Quantized(make(*shape, dtype=dtype), make(*shape[:-1], dtype=torch.float32))


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call of each kernel, in the dtypes and with the arguments that change its code."""
    e4m3, f32 = torch.float8_e4m3fn, torch.float32
    for head_dim in (72, 96, 128):
        q, k = make(1, 300, 2, head_dim), make(1, 128, 2, head_dim)
        kv_len = make(1, dtype=torch.int32)
        yield f"attention {head_dim}", lambda q=q, k=k, n=kv_len: attention_triton(q, k, k, n, 0.1)  # type: ignore[misc]
    yield "attention float32", lambda: attention_triton(*(make(1, 64, 2, 72, dtype=f32),) * 3, None, 0.1)
    qkv, weight, table = make(1, 16, 20, 3, 2, 72), make(72), make(16, 36, dtype=f32)
    out = make(1, 16, 20, 144)
    yield (
        "temporal_attention",
        lambda: temporal_attention_triton(qkv, weight, weight, table, table, 1e-6, 0.1, None, out),
    )
    small, row_scale = make(1, 16, 20, 144, dtype=e4m3), make(1, 16, 20, dtype=f32)
    yield (
        "temporal_attention e4m3",
        lambda: temporal_attention_triton(qkv, None, None, None, None, 1e-6, 0.1, row_scale, small),
    )
    spatial = make(1, 20, 2, 72)
    yield (
        "attention e4m3",
        lambda: attention_triton(spatial, spatial, spatial, None, 0.1, out_scale=make(1, 20, dtype=f32)),
    )
    flat, turns = make(1, 16, 3, 2, 72), make(16, 36, dtype=f32)
    for stride in (1, 36):
        yield (
            f"qk_norm_rope {stride}",
            lambda s=stride: qk_norm_rope_triton(flat, weight, weight, turns, turns, s, 1e-6),  # type: ignore[misc]
        )
    yield "key_scales", lambda: key_scales_triton(make(1, 16, 2, 72), 1e-6, make(1, 2, 16, dtype=f32))
    x, vector = make(2, 8, 1152), make(2, 1152)
    yield (
        "residual_norm_modulate",
        lambda: residual_norm_modulate_triton(
            x, [make(2, 8, 1152)], [vector], vector, vector, None, "layer", None, 1e-6, make(2, 8, 1152)
        ),
    )
    for name, dtype in (("fp8", e4m3), ("int8", torch.int8)):
        small = rows(2, 8, 1152, dtype=dtype)
        yield (
            f"residual_norm_modulate {name}",
            lambda s=small: residual_norm_modulate_triton(  # type: ignore[misc]
                x, [make(2, 8, 1152), s], [vector, vector], vector, vector, None, "layer", None, 1e-6, s, s
            ),
        )
    q8, k8, v8 = (make(1, 200, 2, 80, dtype=e4m3), make(1, 200, 2, 80, dtype=e4m3), make(1, 2, 72, 256, dtype=e4m3))
    q_scale, k_scale, v_scale = (make(1, 2, count, dtype=f32) for count in (200, 2, 1))
    q, k, v = make(1, 200, 3, 2, 72).unbind(2)
    center = make(1, 2, 72, dtype=f32)
    results = (center, center, q8, k8, v8, q_scale, k_scale, v_scale)
    yield "quantize_qkv", lambda: quantize_qkv_triton(q, k, v, 1, results)
    hidden = make(8, 4608)
    small_hidden, hidden_scale, factors = make(8, 4608, dtype=e4m3), make(8, dtype=f32), make(4608, dtype=f32)
    yield "gelu_quantize", lambda: gelu_quantize_triton(hidden, factors, small_hidden, hidden_scale)
    planes, kernel = make(2, 9, 9, 64), make(1, 64, 3, 3, 3, 64)
    yield (
        "conv_planes",
        lambda: conv_planes_triton(planes, kernel, make(64), None, 1.0, True, 1, 1, make(2, 9, 9, 64), None),
    )
    yield "channel_sums", lambda: channel_sums_triton(planes)
    sums = make(1, 1, 64, 2, dtype=f32)
    yield (
        "group_norm_silu",
        lambda: group_norm_silu_triton(planes, sums, make(64), make(64), 32, 1e-6, True, make(2, 9, 9, 64)),
    )
    yield "grow_planes", lambda: grow_planes_triton(planes, 2, 2, make(3, 17, 17, 64))
    rows8, scales, out8 = make(256, 128, dtype=e4m3), make(256, dtype=f32), make(256, 256, dtype=e4m3)
    yield (
        "scaled_linear_gelu",
        lambda: scaled_linear_gelu_triton(rows8, scales, rows8, scales, make(256), scales, 1.0, 1.0, out8, scales),
    )


def main(capabilities: list[int]) -> int:
    """Compile all; the number of failures."""
    driver: Any = Driver()
    triton.runtime.driver.set_active(driver)
    patched: Any = torch
    empty, run = torch.empty, triton.JITFunction.run
    patched.empty = lambda *args, device, **kwargs: empty(*args, **kwargs).as_subclass(OnGpu)
    patched.cuda.get_device_properties = lambda _: SimpleNamespace(multi_processor_count=2)
    jit: Any = triton.JITFunction
    jit.run = lambda self, *args, **kwargs: run(self, *args, **{**kwargs, "warmup": True})
    failures = 0
    for driver.capability in capabilities:
        for name, call in calls():
            try:
                call()
                said = "ok"
            except Exception as error:  # whatever the compiler throws is the result
                failures += 1
                said = f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"
            print(f"sm_{driver.capability} {name}: {said}", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main([int(argument) for argument in sys.argv[1:]]) > 0)
