"""The public ops: checks, choice of backend, and a fake for each, so that torch.compile can trace them.

The first backend of `backends.BACKENDS` that supports a call serves it. `backend=` forces one.
"""

from pab_kernels.ops.dense_attention import attention, self_attention
from pab_kernels.ops.query_key import key_scales, qk_norm_rope
from pab_kernels.ops.residual import MAX_BRANCHES, residual_norm_modulate
from pab_kernels.ops.temporal import temporal_attention

__all__ = [
    "MAX_BRANCHES",
    "attention",
    "key_scales",
    "qk_norm_rope",
    "residual_norm_modulate",
    "self_attention",
    "temporal_attention",
]
