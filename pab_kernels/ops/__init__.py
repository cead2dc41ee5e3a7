"""What a GPU does: the public ops with their checks, reference, fakes, and the one table of backends.

The first backend of `backends.BACKENDS` that supports a call serves it. `backend=` forces one. The kernels are in
`triton_ops/` and `csrc/`, which belong to this room. A file here may import nothing above it: it knows no block."""

from pab_kernels.ops.dense_attention import attention, self_attention
from pab_kernels.ops.fp8_attention import fp8_attention
from pab_kernels.ops.query_key import key_scales, qk_norm_rope
from pab_kernels.ops.residual import MAX_BRANCHES, residual_norm_modulate
from pab_kernels.ops.temporal import temporal_attention

__all__ = [
    "MAX_BRANCHES",
    "attention",
    "fp8_attention",
    "key_scales",
    "qk_norm_rope",
    "residual_norm_modulate",
    "self_attention",
    "temporal_attention",
]
