"""What a branch of a DiT block runs: weights, and the functions that write straight into the tensor that keeps it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pab_kernels import ops
from pab_kernels.blocks.linears import Fp8Linear, Linear, Rows, linear
from pab_kernels.blocks.sharded import Piece, Shards
from pab_kernels.ops import fp8_linear as fp8_linear
from pab_kernels.ops.quantized import LIMITS, Quantized
from pab_kernels.ops.query_key import across_heads

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

    def sent(self, shape: tuple[int, int, int, int], shards: Shards) -> tuple[int, ...]:
        """Elements that a rank with a stream of `shape` sends to others, of each exchange that computing this makes.

        Raises
        ------
        ValueError
            It must see all rows, and knows of no other ranks.
        """
        raise ValueError(f"mesh: frames={len(shards.sizes)} cannot split {type(self).__name__}, must be 1")

    def run(self, h: Rows, out: Tensor, inputs: Inputs) -> Tensor:
        """The branch of the rows h [B, T, S, C], into `out`, which is returned."""


@dataclass(frozen=True)
class SelfAttention(Weights):
    """Weights of self-attention along one kind of sequence.

    `sequence` says which tokens see each other: those of a frame, those of a position, or all of them.
    `q_norm` and `k_norm` are RMSNorm weights: [D] norms each head, [H * D] all heads together. With `rotary` queries
    and keys are rotated by the step's tables; `pair_stride` is that of `ops.qk_norm_rope`, `precision` that of
    `ops.self_attention`.
    """

    qkv: Linear | Fp8Linear  # [3C, C], rows ordered q, k, v, then heads
    proj: Linear | Fp8Linear  # [C, C]; in fp8 only where qkv is, whose bounds then are of the values alone
    heads: int
    sequence: Literal["spatial", "temporal", "full"]
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    norm_eps: float = 1e-6
    rotary: bool = False
    pair_stride: int = 1
    precision: str | None = None

    layer: ClassVar[str] = "qkv"
    fp8: ClassVar[tuple[str, ...]] = ("qkv", "proj")

    def __post_init__(self) -> None:
        if isinstance(self.proj, Fp8Linear) and not isinstance(self.qkv, Fp8Linear):
            raise TypeError(f"proj: is Fp8Linear, must be Linear where qkv is {type(self.qkv).__name__}")

    @property
    def linears(self) -> tuple[Linear | Fp8Linear, ...]:
        """The GEMMs on every row of the stream, in order."""
        return self.qkv, self.proj

    def keys(self, shape: tuple[int, int, int, int], text: int) -> int:
        """How many keys each row of a stream of `shape` attends to; `text` tokens count."""
        _, frames, tokens, _ = shape
        return {"spatial": tokens, "temporal": frames, "full": frames * tokens}[self.sequence]

    def sent(self, shape: tuple[int, int, int, int], shards: Shards) -> tuple[int, ...]:
        """Elements of queries, keys and values, and of what attention gives: frames for tokens, or tokens for heads."""
        batch, frames, tokens, channels = shape
        if self.sequence == "spatial":
            return ()
        if self.sequence == "temporal":
            return shards.sent(batch, frames, tokens, channels)
        return shards.sent(batch, frames * tokens, self.heads, channels // self.heads)

    def run(self, h: Rows, out: Tensor, inputs: Inputs) -> Tensor:
        """The branch of the rows h [B, T, S, C], into `out`."""
        return self_attention(h, self, out, inputs.rope, inputs.shards)


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

    def sent(self, shape: tuple[int, int, int, int], shards: Shards) -> tuple[int, ...]:
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

    def sent(self, shape: tuple[int, int, int, int], shards: Shards) -> tuple[int, ...]:
        """None: each row is by itself."""
        return ()

    def run(self, h: Rows, out: Tensor, inputs: Inputs) -> Tensor:
        """The branch of the rows h [B, T, S, C], into `out`."""
        return mlp(h, self, out)


def self_attention(
    h: Rows, weights: SelfAttention, out: Tensor, rope: Rope | None = None, shards: Shards | None = None
) -> Tensor:
    """QKV, attention and out-projection of h [B, T, S, C], into `out` [B, T, S, C].

    With `shards` those are some rows of the sequences: attention along more than a frame exchanges them.
    """
    if shards is not None and weights.sequence != "spatial":
        return _shared_attention(h, weights, out, rope, shards)
    batch, frames, tokens, channels = h.shape
    scale = value_scales(h, weights) if isinstance(weights.proj, Fp8Linear) else None
    qkv = linear(h, weights.qkv).view(batch, frames, tokens, 3, weights.heads, channels // weights.heads)
    options = _options(weights, rope)
    if weights.sequence == "temporal":
        return _project(ops.temporal_attention(qkv, out_scale=scale, **options), scale, weights.proj, out)
    qkv = qkv.flatten(0, 1) if weights.sequence == "spatial" else qkv.flatten(1, 2)
    scale = None if scale is None else scale.view(qkv.shape[:2])
    options |= {"pair_stride": weights.pair_stride}
    y = ops.self_attention(qkv, precision=weights.precision, out_scale=scale, **options)
    return _project(y, scale, weights.proj, out)


def _options(weights: SelfAttention, rope: Rope | None) -> dict[str, Any]:
    """What is done to queries and keys before attention."""
    if weights.rotary and rope is None:
        raise ValueError("rope: got None, must be (cos, sin) because the weights are rotary")
    return {
        "q_weight": weights.q_norm,
        "k_weight": weights.k_norm,
        "rope": rope if weights.rotary else None,
        "eps": weights.norm_eps,
    }


def _shared_attention(h: Rows, weights: SelfAttention, out: Tensor, rope: Rope | None, shards: Shards) -> Tensor:
    """`self_attention` along more than a frame, of rows of which other ranks have some. A scale for the projection's
    input would need theirs: of them nothing is known before attention."""
    batch, frames, tokens, channels = h.shape
    heads, head_dim = weights.heads, channels // weights.heads
    options = _options(weights, rope)
    temporal = weights.sequence == "temporal"
    rows = frames if temporal else frames * tokens
    # A sequence's rows, of frames or of tokens.
    lead = (batch, rows, tokens) if temporal else (batch, rows)
    seen, filled, shape = h.view(*lead, channels), out.view(*lead, channels), (*lead, 3, heads, head_dim)
    early: dict[str, Any] | None = None
    if not temporal:
        options |= {"pair_stride": weights.pair_stride}
        if across_heads(torch.empty(heads, head_dim, device="meta"), weights.q_norm, weights.k_norm, options["rope"]):
            early, options = options, {}  # before heads part, and so on this rank's rows

    def project(piece: Piece, place: Tensor | None) -> Tensor:
        place = None if place is None else place.flatten(-3)
        qkv = linear(_some(seen, piece), weights.qkv, place).unflatten(-1, shape[-3:])
        if early is not None:
            first = shards.span(rows).start
            own = slice(first + piece[1].start, first + piece[1].stop)
            tables = early["rope"]
            ops.qk_norm_rope(qkv, **early | {"rope": tables and (tables[0][own], tables[1][own])})
        return qkv

    def attend(qkv: Tensor, place: Tensor | None) -> Tensor:
        if temporal:
            return ops.temporal_attention(qkv, out=place, **options)
        return ops.self_attention(qkv, precision=weights.precision, **options).unflatten(-1, (-1, head_dim))

    def finish(piece: Piece, y: Tensor) -> None:
        y = y if temporal else y.flatten(-2)
        _project(y, None, weights.proj, filled[piece])

    shards.around(shape, 2 if temporal else 3, channels if temporal else head_dim, out, project, attend, finish)
    return out


def _some(h: Rows, piece: Piece) -> Rows:
    """Some rows. Of scales in the middle of others cuBLASLt takes no address that is not a multiple of 16 bytes."""
    if isinstance(h, Tensor):
        return h[piece]
    scale = h.row_scale[piece]
    return Quantized(h.values[piece], scale.clone() if scale.data_ptr() % 16 else scale)


def _project(y: Tensor, scale: Tensor | None, weights: Linear | Fp8Linear, out: Tensor) -> Tensor:
    """The projection of what attention gave, y [..., C]: in e4m3 where it has a `scale`."""
    if scale is not None:
        return linear(Quantized(y, scale), weights, out)
    if isinstance(weights, Fp8Linear):
        rows = y.flatten(0, -2)[None]
        return linear(ops.residual_norm_modulate(rows, out=_e4m3(rows)), weights, out)
    return linear(y, weights, out)


def _e4m3(x: Tensor) -> Quantized:
    """Room for rows like x."""
    return Quantized.empty(tuple(x.shape), fp8_linear.E4M3, x.device)


def value_scales(h: Rows, weights: SelfAttention) -> Tensor:
    """For each row of what attention gives, a scale with which it fits in e4m3: float32 [B, T, S].

    An output is a mean of values, and a value at most ``max|h| * weight_sum + bias_max`` with the largest row of h in
    its sequence. All is known before attention but for a maximum over the row scales.
    """
    qkv = weights.qkv
    if not isinstance(h, Quantized) or not isinstance(qkv, Fp8Linear):
        raise TypeError(f"h: got {type(h).__name__}, must be Quantized for a projection in fp8")
    along = {"spatial": (2,), "temporal": (1,), "full": (1, 2)}[weights.sequence]
    largest = h.row_scale.amax(along, keepdim=True).expand_as(h.row_scale)
    bias = torch.tensor(qkv.bias_max / LIMITS[fp8_linear.E4M3])
    return torch.add(bias, largest, alpha=qkv.weight_sum, out=torch.empty_like(h.row_scale))


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
