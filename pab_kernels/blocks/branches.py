"""What a branch of a DiT block runs: weights, and the functions that write straight into the tensor that keeps it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pab_kernels import ops
from pab_kernels.blocks.linears import Fp8Linear, Linear, Rows, linear
from pab_kernels.blocks.sharded import Shards
from pab_kernels.ops import fp8_linear as fp8_linear
from pab_kernels.ops.quantized import Quantized

Rope = tuple[Tensor, Tensor]
"""Rotary tables (cos, sin), each [positions, D / 2] float32, or [positions, H * D / 2] where each head has its own.
Positions are frames, or all tokens of a video."""


@dataclass(frozen=True)
class TextKV:
    """Keys and values of the text for one branch, side by side in `kv` [B, L, 2, H, D].

    `kv_len` (int32 [B], None: all) is how many of each row count. `image` [B, L_image, 2, H, D] are those of a picture
    where the branch attends to one as well, all of which count.
    """

    kv: Tensor
    kv_len: Tensor | None = None
    image: Tensor | None = None

    def sequences(self, batch: slice | None) -> TextKV:
        """Those of the sequences `batch`, None for all."""
        if batch is None:
            return self
        kv_len, image = (None if each is None else each[batch] for each in (self.kv_len, self.image))
        return TextKV(self.kv[batch], kv_len, image)


@dataclass(frozen=True)
class Inputs:
    """What a call hands to a branch beside the rows it reads. With `shards` those are some of a sequence's rows.

    `rope` has all positions in any case.
    """

    text: TextKV | None = None
    rope: Rope | None = None
    shards: Shards | None = None


class Weights(Protocol):
    """What a branch runs: `SelfAttention`, `CrossAttention`, `Mlp`, or a frozen dataclass of a family's own.

    `layer` is what settings call the part that may run in fp8, and `fp8` names the linears of that part, those whose
    input is written by a pass that knows a scale for its rows; () where none may.
    """

    layer: ClassVar[str]
    fp8: ClassVar[tuple[str, ...]]

    @property
    def linears(self) -> tuple[Linear | Fp8Linear, ...]:
        """The GEMMs on every row of the stream, in order: the first reads the pass, the last writes the branch."""

    def keys(self, shape: tuple[int, int, int, int], text: int) -> int:
        """How many keys each row of a stream of `shape` attends to; `text` tokens count. 0 without attention."""

    def sent(
        self, shape: tuple[int, int, int, int], shards: Shards, itemsize: int, fp8: bool = False
    ) -> tuple[int, ...]:
        """Bytes that a rank with a stream of `shape` sends to others, of each exchange that computing this makes.

        `itemsize` is that of the stream; `fp8` counts linears that can be in fp8 as if they were.

        Raises
        ------
        ValueError
            It must see all rows, and knows of no other ranks.
        """
        raise ValueError(f"mesh: frames={len(shards.sizes)} cannot split {type(self).__name__}, must be 1")

    def run(self, h: Rows, out: Tensor, inputs: Inputs) -> Tensor:
        """The branch of the rows h [B, T, S, C], into `out`, which is returned."""


@dataclass(frozen=True)
class ImageKV:
    """Weights of a second pair of keys and values, those of a picture: [2C, C] and the keys' RMSNorm, as the text's."""

    kv: Linear
    k_norm: Tensor | None = None


@dataclass(frozen=True)
class CrossAttention(Weights):
    """Weights of attention on the text.

    `q_norm` and `k_norm` are RMSNorm weights, [D] or [H * D] as of `SelfAttention`. With `image` the same queries
    attend to a picture too, and both outputs are added before the projection.
    """

    q: Linear | Fp8Linear  # [C, C]
    kv: Linear  # [2C, C], rows ordered k, v, then heads
    proj: Linear  # [C, C]
    heads: int
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    norm_eps: float = 1e-6
    image: ImageKV | None = None

    layer: ClassVar[str] = "cross.q"
    fp8: ClassVar[tuple[str, ...]] = ("q",)

    @property
    def linears(self) -> tuple[Linear | Fp8Linear, ...]:
        """The GEMMs on every row of the stream, in order."""
        return self.q, self.proj

    def keys(self, shape: tuple[int, int, int, int], text: int) -> int:
        """How many keys each row of a stream of `shape` attends to; `text` tokens count."""
        return text

    def sent(
        self, shape: tuple[int, int, int, int], shards: Shards, itemsize: int, fp8: bool = False
    ) -> tuple[int, ...]:
        """None: each row attends to the text by itself."""
        return ()

    def run(self, h: Rows, out: Tensor, inputs: Inputs) -> Tensor:
        """The branch of the rows h [B, T, S, C], into `out`."""
        if inputs.text is None:
            raise ValueError("text: got None, must be a TextKV to compute cross-attention")
        return cross_attention(h, self, inputs.text, out)


@dataclass(frozen=True)
class Mlp(Weights):
    """Weights of ``down(gelu_tanh(up(x)))``: both in fp8 or neither."""

    up: Linear | Fp8Linear  # [4C, C]
    down: Linear | Fp8Linear  # [C, 4C]

    layer: ClassVar[str] = "mlp"
    fp8: ClassVar[tuple[str, ...]] = ("up", "down")

    def __post_init__(self) -> None:
        if isinstance(self.up, Fp8Linear) != isinstance(self.down, Fp8Linear):
            raise TypeError(f"up, down: are {type(self.up).__name__} and {type(self.down).__name__}, must be alike")

    @property
    def linears(self) -> tuple[Linear | Fp8Linear, ...]:
        """The GEMMs on every row of the stream, in order."""
        return self.up, self.down

    def keys(self, shape: tuple[int, int, int, int], text: int) -> int:
        """It attends to nothing."""
        return 0

    def sent(
        self, shape: tuple[int, int, int, int], shards: Shards, itemsize: int, fp8: bool = False
    ) -> tuple[int, ...]:
        """None: each row is by itself."""
        return ()

    def run(self, h: Rows, out: Tensor, inputs: Inputs) -> Tensor:
        """The branch of the rows h [B, T, S, C], into `out`."""
        return mlp(h, self, out)


def text_kv(
    text: Tensor,
    weights: CrossAttention,
    kv_len: Tensor | None = None,
    out: TextKV | None = None,
    *,
    image: Tensor | None = None,
) -> TextKV:
    """Keys and values of the projected text [B, L, C], and of the projected picture [B, L_image, C], for one branch.

    They overwrite those of `out` where it is given: an earlier result for the same sizes.
    """
    if (image is None) != (weights.image is None):
        raise ValueError("image: must be given where the weights attend to a picture, and only there")
    kv = _keys_values(text, weights.kv, weights.k_norm, weights, None if out is None else out.kv)
    image_kv = None
    if image is not None and weights.image is not None:
        earlier = None if out is None else out.image
        image_kv = _keys_values(image, weights.image.kv, weights.image.k_norm, weights, earlier)
    return TextKV(kv, kv_len, image_kv)


def _keys_values(
    text: Tensor, weights: Linear, norm: Tensor | None, attention: CrossAttention, out: Tensor | None
) -> Tensor:
    """[B, L, 2, H, D] of text [B, L, C], its keys normed."""
    kv = linear(text, weights, None if out is None else out.flatten(2)).unflatten(-1, (2, attention.heads, -1))
    ops.qk_norm_rope(kv[:, :, :1], q_weight=norm, eps=attention.norm_eps)
    return kv


def cross_attention(x: Rows, weights: CrossAttention, text: TextKV, out: Tensor) -> Tensor:
    """Query GEMM, attention on the text and out-projection of x [B, T, S, C], into `out` [B, T, S, C]."""
    batch, channels = x.shape[0], x.shape[-1]
    q = linear(x, weights.q).view(batch, -1, weights.heads, channels // weights.heads)
    ops.qk_norm_rope(q.unsqueeze(2), q_weight=weights.q_norm, eps=weights.norm_eps)
    y = ops.attention(q, *text.kv.unbind(2), kv_len=text.kv_len)
    if text.image is not None:
        y = y + ops.attention(q, *text.image.unbind(2))
    return linear(y, weights.proj, out)


def mlp(h: Rows, weights: Mlp, out: Tensor) -> Tensor:
    """``down(gelu_tanh(up(h)))`` of h [..., C], into `out` [..., C]."""
    if isinstance(weights.up, Fp8Linear):
        if not isinstance(h, Quantized):
            raise TypeError(f"h: got {type(h).__name__}, must be Quantized because the weights are")
        up = weights.up
        hidden = fp8_linear.scaled_linear_gelu(
            h.flatten(), up.weight, up.bias, factors=up.factors, weight_sum=up.weight_sum, bias_max=up.bias_max
        )
        return linear(hidden, weights.down, out)
    if isinstance(h, Tensor) and h.device.type == "cuda":
        # cuBLASLt applies the bias and tanh-GELU in the GEMM's epilogue.
        rows = h.reshape(-1, h.shape[-1])
        wide = torch._addmm_activation(weights.up.bias, rows, weights.up.weight.t(), use_gelu=True)
    else:
        wide = F.gelu(linear(h, weights.up), approximate="tanh")
    return linear(wide, weights.down, out)
