"""Self-attention of a block: weights, and what runs them on one GPU, or on ranks that share a sequence."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pab_kernels import ops
from pab_kernels.blocks.branches import Inputs, Rope, Weights
from pab_kernels.blocks.linears import Fp8Linear, Linear, Rows, linear
from pab_kernels.blocks.sharded import Piece, Shards
from pab_kernels.ops import fp8_linear as fp8_linear
from pab_kernels.ops.quantized import LIMITS, Quantized
from pab_kernels.ops.query_key import across_heads


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

    def sent(
        self, shape: tuple[int, int, int, int], shards: Shards, itemsize: int, fp8: bool = False
    ) -> tuple[int, ...]:
        """Bytes of queries, keys and values, and of what attention gives: frames for tokens, or tokens for heads.

        Before a projection in fp8 temporal attention gives e4m3, and the rows' largest scales are exchanged first.
        """
        batch, frames, tokens, channels = shape
        if self.sequence == "spatial":
            return ()
        if self.sequence == "full":
            return shards.sent(batch, frames * tokens, self.heads, channels // self.heads, itemsize, itemsize)
        if not (fp8 or isinstance(self.proj, Fp8Linear)):
            return shards.sent(batch, frames, tokens, channels, itemsize, itemsize)
        scales = torch.float32.itemsize * batch * tokens * (len(shards.sizes) - 1)
        return scales, *shards.sent(batch, frames, tokens, channels, itemsize, fp8_linear.E4M3.itemsize)

    def run(self, h: Rows, out: Tensor, inputs: Inputs) -> Tensor:
        """The branch of the rows h [B, T, S, C], into `out`."""
        return self_attention(h, self, out, inputs.rope, inputs.shards)


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
    """`self_attention` along more than a frame, of rows of which other ranks have some.

    Temporal attention before a projection in fp8 gives e4m3, as on one GPU. Full attention does not: a rank has some
    heads of a row, and not every backend keeps to a scale that all heads share.
    """
    batch, frames, tokens, channels = h.shape
    heads, head_dim = weights.heads, channels // weights.heads
    options = _options(weights, rope)
    temporal = weights.sequence == "temporal"
    small = temporal and isinstance(weights.proj, Fp8Linear)
    rows = frames if temporal else frames * tokens
    # A sequence's rows, of frames or of tokens.
    lead = (batch, rows, tokens) if temporal else (batch, rows)
    seen, filled, shape = h.view(*lead, channels), out.view(*lead, channels), (*lead, 3, heads, head_dim)
    early: dict[str, Any] | None = None
    if not temporal:
        options |= {"pair_stride": weights.pair_stride}
        if across_heads(torch.empty(heads, head_dim, device="meta"), weights.q_norm, weights.k_norm, options["rope"]):
            early, options = options, {}  # before heads part, and so on this rank's rows
    coming = shards.largest(_largest_scale(h, weights)) if small else None

    @functools.cache
    def every_scale() -> Tensor:
        """Of what temporal attention gives, alike for all frames: [B, 1, S]."""
        assert coming is not None
        return _value_scale(coming(), weights)

    def scales(sequences: slice, own: slice, shape: torch.Size) -> Tensor | None:
        """Of some sequences and their tokens `own`, for rows of `shape`; None where attention gives no e4m3."""
        if coming is None:
            return None
        return every_scale()[sequences, :, own].expand(shape).clone(memory_format=torch.contiguous_format)

    def project(piece: Piece, place: Tensor | None) -> Tensor:
        place = None if place is None else place.flatten(-3)
        qkv = linear(_some(seen, piece), weights.qkv, place).unflatten(-1, shape[-3:])
        if early is not None:
            first = shards.span(rows).start
            own = slice(first + piece[1].start, first + piece[1].stop)
            tables = early["rope"]
            ops.qk_norm_rope(qkv, **early | {"rope": tables and (tables[0][own], tables[1][own])})
        return qkv

    def attend(piece: Piece, qkv: Tensor, place: Tensor | None) -> Tensor:
        if temporal:
            return ops.temporal_attention(qkv, out=place, out_scale=scales(*piece, qkv.shape[:-3]), **options)
        return ops.self_attention(qkv, precision=weights.precision, **options).unflatten(-1, (-1, head_dim))

    def finish(piece: Piece, y: Tensor) -> None:
        y = y if temporal else y.flatten(-2)
        _project(y, scales(piece[0], slice(None), y.shape[:-1]), weights.proj, filled[piece])

    split = (2, channels) if temporal else (3, head_dim)
    shards.around(shape, *split, out, fp8_linear.E4M3 if small else out.dtype, project, attend, finish)
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
        e4m3 = Quantized.empty(tuple(rows.shape), fp8_linear.E4M3, y.device)
        return linear(ops.residual_norm_modulate(rows, out=e4m3), weights, out)
    return linear(y, weights, out)


def value_scales(h: Rows, weights: SelfAttention) -> Tensor:
    """For each row of what attention gives, a scale with which it fits in e4m3: float32 [B, T, S].

    An output is a mean of values, and a value at most ``max|h| * weight_sum + bias_max`` with the largest row of h in
    its sequence. All is known before attention but for a maximum over the row scales.
    """
    largest, shape = _largest_scale(h, weights), h.shape[:-1]
    return _value_scale(largest.expand(shape), weights, largest.new_empty(shape))


def _largest_scale(h: Rows, weights: SelfAttention) -> Tensor:
    """Of the rows of h in each sequence: float32 [B, T, S], 1 along the sequences."""
    if not isinstance(h, Quantized):
        raise TypeError(f"h: got {type(h).__name__}, must be Quantized for a projection in fp8")
    along = {"spatial": (2,), "temporal": (1,), "full": (1, 2)}[weights.sequence]
    return h.row_scale.amax(along, keepdim=True)


def _value_scale(scale: Tensor, weights: SelfAttention, out: Tensor | None = None) -> Tensor:
    """Of the values that come from rows that have at most `scale`; into `out`, if given."""
    assert isinstance(weights.qkv, Fp8Linear)  # as the projection is
    bias = torch.tensor(weights.qkv.bias_max / LIMITS[fp8_linear.E4M3])
    return torch.add(bias, scale, alpha=weights.qkv.weight_sum, out=out)
