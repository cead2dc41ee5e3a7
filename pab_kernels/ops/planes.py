"""Ops on the planes of a video: what its autoencoder's decoder is made of, channels last.

Planes are [T, H + 1, W + 1, C], contiguous, whose last row and last column are zeros. A convolution then finds zeros on
every side of a frame without a padded copy: left of a row lies the end of the one above.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pab_kernels.ops import planes_reference as reference
from pab_kernels.ops.backends import resolve
from pab_kernels.ops.checks import check_float, check_like, check_shape, check_tensor
from pab_kernels.ops.registration import register, writes_only


def to_planes(x: Tensor, channels: int | None = None) -> Tensor:
    """Planes of a video [C, T, H, W]; with `channels` there are so many, the rest zeros."""
    own, frames, height, width = x.shape
    planes = x.new_zeros(frames, height + 1, width + 1, own if channels is None else channels)
    planes[:, :height, :width, :own] = x.permute(1, 2, 3, 0)
    return planes


def from_planes(x: Tensor) -> Tensor:
    """The video [C, T, H, W] of planes, a view."""
    return x[:, :-1, :-1].permute(3, 0, 1, 2)


def pack_weight(weight: Tensor, channels: int | None = None) -> Tensor:
    """A convolution's weight [N, C, KT, K, K] or [N, C, K, K] as `conv_planes` takes it, one phase [1, N, KT, K, K, C].

    With `channels` there are so many, the rest zeros.
    """
    weight = weight if weight.ndim == 5 else weight[:, :, None]
    packed = weight.permute(0, 2, 3, 4, 1)
    if channels is not None:
        packed = torch.nn.functional.pad(packed, (0, channels - weight.shape[1]))
    return packed.unsqueeze(0).contiguous()


def pack_upsampled(weight: Tensor) -> Tensor:
    """The weight [N, C, KT, 3, 3] of a convolution after nearest upsampling: a kernel of 2 x 2 taps for each phase.

    Four of the nine taps meet each pixel twice or more, so their weights are added: 4 / 9 of the products.

    Returns
    -------
    Tensor
        [4, N, KT, 2, 2, C], phases being (row, column) of the 2 x 2 that a pixel becomes; float32 sums, rounded once.
    """
    wide = reference.wide(weight if weight.ndim == 5 else weight[:, :, None])
    before, at, after = wide.unbind(3)
    phases = []
    for rows in (torch.stack((before, at + after), 3), torch.stack((before + at, after), 3)):
        before_w, at_w, after_w = rows.unbind(4)
        phases.append(torch.stack((before_w, at_w + after_w), 4))
        phases.append(torch.stack((before_w + at_w, after_w), 4))
    return torch.stack(phases).permute(0, 1, 3, 4, 5, 2).to(weight.dtype).contiguous()


def conv_planes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    front: str = "zeros",
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
    times: int = 1,
    space: int = 1,
    with_sums: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Convolve planes, causally in time; add bias and ``residual_scale * residual``; sum up channels.

    Parameters
    ----------
    x : Tensor
        [T, H + 1, W + 1, C].
    weight : Tensor
        [P, N, KT, K, K, C]. K is 1 or 3 around a pixel; or, with ``space=2``, 2: P = 4 kernels, one for each pixel of
        the 2 x 2 that one becomes, from `pack_upsampled`. With ``times=2`` frame t becomes frames 2 t and 2 t + 1, each
        with P / 2 of the kernels.
    bias : Tensor, optional
        [times * N], the even frames' before the odd ones'.
    front : {"zeros", "first"}
        What stands before the first frame.
    residual : Tensor, optional
        Of the result's shape.
    with_sums : bool
        Also give what `group_norm_silu` needs of the result.
    backend : {"triton", "cudnn", "reference"}, optional
        Forces a backend.

    Returns
    -------
    planes : Tensor
        [T * times, space * H + 1, space * W + 1, N], zeros included.
    sums : Tensor or None
        float32 [T * times, N, 2], of the values before they are rounded where the convolution itself makes them.

    Raises
    ------
    TypeError, ValueError
        A wrong type, dtype, shape, stride, or backend, naming the argument.
    """
    _check_planes("x", x)
    check_tensor("weight", weight)
    side = 2 if space == 2 else weight.shape[3] if weight.ndim == 6 else 1
    check_shape("weight", weight, (times * space * space, "N", "KT", side, side, x.shape[3]))
    check_like("weight", weight, x, "x")
    if times not in (1, 2) or space not in (1, 2) or side > 3:
        raise ValueError(f"times, space: got {times} and {space} with kernels of {side}, must be 1 or 2 and at most 3")
    if front not in ("zeros", "first"):
        raise ValueError(f"front: got {front!r}, must be zeros or first")
    if not weight.is_contiguous():
        raise ValueError(f"weight: strides are {weight.stride()}, must be contiguous")
    frames, height, width, _ = x.shape
    features = weight.shape[1]
    shape = (frames * times, space * (height - 1) + 1, space * (width - 1) + 1, features)
    if bias is not None:
        check_shape("bias", check_tensor("bias", bias), (times * features,))
    if residual is not None:
        _check_planes("residual", residual)
        check_shape("residual", residual, shape)
        check_like("residual", residual, x, "x")
    name = resolve("conv_planes", backend, x, weight)
    out = x.new_empty(shape)
    parts = None
    if with_sums and name == "triton":
        from pab_kernels.triton_ops.conv_planes import default_config, row_tiles

        tiles = row_tiles(height * width, default_config(weight)) * space * space
        parts = x.new_empty((shape[0], tiles, features, 2), dtype=torch.float32)
    arguments = (x, weight, bias, residual, residual_scale, front == "first", times, space, out, parts)
    torch.ops.pab.conv_planes(*arguments, name)
    if not with_sums:
        return out, None
    return out, channel_sums(out) if parts is None else parts.sum(1)


def _conv_planes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_scale: float,
    first: bool,
    times: int,
    space: int,
    out: Tensor,
    sums: Tensor | None,
    backend: str,
) -> None:
    if backend == "triton":
        from pab_kernels.triton_ops.conv_planes import conv_planes_triton

        conv_planes_triton(x, weight, bias, residual, residual_scale, first, times, space, out, sums)
    else:
        reference.conv_planes_ref(
            x, weight, bias, residual, residual_scale, first, times, space, out, in_dtype=backend == "cudnn"
        )


def channel_sums(x: Tensor, *, backend: str | None = None) -> Tensor:
    """Sum and sum of squares of every channel and frame, for `group_norm_silu`.

    Parameters
    ----------
    x : Tensor
        Planes [T, H + 1, W + 1, C].
    backend : {"triton", "reference"}, optional
        Forces a backend.

    Returns
    -------
    Tensor
        float32 [T, C, 2] (float64 of float64).
    """
    _check_planes("x", x)
    if resolve("channel_sums", backend, x) == "triton":
        return torch.ops.pab.channel_sums(x).sum(1)
    return reference.channel_sums_ref(x)


def _channel_sums(x: Tensor) -> Tensor:
    from pab_kernels.triton_ops.group_norm_silu import channel_sums_triton

    return channel_sums_triton(x)


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    *,
    eps: float,
    sums: Tensor | None = None,
    per_frame: bool = False,
    silu: bool = True,
    backend: str | None = None,
) -> Tensor:
    """GroupNorm, and SiLU if asked for, of planes; their zeros stay.

    Parameters
    ----------
    x : Tensor
        [T, H + 1, W + 1, C].
    weight, bias : Tensor
        [C].
    groups : int
        Divides C.
    eps : float
    sums : Tensor, optional
        float32 [T, C, 2], what `channel_sums` would give.
    per_frame : bool
        Each frame has statistics of its own; otherwise they span all.
    backend : {"triton", "reference"}, optional
        Forces a backend.

    Raises
    ------
    TypeError, ValueError
        A wrong type, dtype, shape, stride, or backend, naming the argument.
    """
    _check_planes("x", x)
    frames, channels = x.shape[0], x.shape[3]
    for name, value in (("weight", weight), ("bias", bias)):
        check_shape(name, check_tensor(name, value), (channels,))
    if groups < 1 or channels % groups:
        raise ValueError(f"groups: got {groups}, must divide the {channels} channels")
    if sums is None:
        sums = channel_sums(x, backend=backend)
    check_shape("sums", check_tensor("sums", sums), (frames, channels, 2))
    if not per_frame:
        sums = sums.sum(0, keepdim=True)
    out = torch.empty_like(x)
    name = resolve("group_norm_silu", backend, x)
    torch.ops.pab.group_norm_silu(x, sums, weight, bias, groups, eps, silu, out, name)
    return out


def _group_norm_silu(
    x: Tensor,
    sums: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    out: Tensor,
    backend: str,
) -> None:
    if backend == "triton":
        from pab_kernels.triton_ops.group_norm_silu import group_norm_silu_triton

        group_norm_silu_triton(x, sums, weight, bias, groups, eps, silu, out)
    else:
        reference.group_norm_silu_ref(x, sums, weight, bias, groups, eps, silu, out)


def grow_planes(x: Tensor, times: int, space: int, *, backend: str | None = None) -> Tensor:
    """Linear upsampling between pixel centres, edges repeated: of all frames but the first in time, of all in space.

    Parameters
    ----------
    x : Tensor
        [T, H + 1, W + 1, C].
    times, space : {1, 2}
    backend : {"triton", "reference"}, optional
        Forces a backend.

    Returns
    -------
    Tensor
        [times * (T - 1) + 1, space * H + 1, space * W + 1, C], zeros included.
    """
    _check_planes("x", x)
    if times not in (1, 2) or space not in (1, 2):
        raise ValueError(f"times, space: got {times} and {space}, must be 1 or 2")
    frames, height, width, channels = x.shape
    out = x.new_empty(times * (frames - 1) + 1, space * (height - 1) + 1, space * (width - 1) + 1, channels)
    torch.ops.pab.grow_planes(x, times, space, out, resolve("grow_planes", backend, x))
    return out


def _grow_planes(x: Tensor, times: int, space: int, out: Tensor, backend: str) -> None:
    if backend == "triton":
        from pab_kernels.triton_ops.grow_planes import grow_planes_triton

        grow_planes_triton(x, times, space, out)
    else:
        reference.grow_planes_ref(x, times, space, out)


def softmax_rows(scores: Tensor, scale: float, dtype: torch.dtype, *, backend: str | None = None) -> Tensor:
    """``softmax(scale * scores)`` over the last dimension, rounded once.

    Parameters
    ----------
    scores : Tensor
        [..., N], contiguous.
    scale : float
    dtype : torch.dtype
        Of the result.
    backend : {"triton", "reference"}, optional
        Forces a backend.

    Raises
    ------
    TypeError, ValueError
        A wrong type, dtype, stride, or backend, naming the argument.
    """
    check_float("scores", check_tensor("scores", scores))
    if scores.ndim == 0 or not scores.is_contiguous():
        raise ValueError(f"scores: shape is {list(scores.shape)}, must have a dimension and be contiguous")
    out = torch.empty_like(scores, dtype=dtype)
    if out.numel() > 0:
        torch.ops.pab.softmax_rows(scores, scale, out, resolve("softmax_rows", backend, scores))
    return out


def _softmax_rows(scores: Tensor, scale: float, out: Tensor, backend: str) -> None:
    if backend == "triton":
        from pab_kernels.triton_ops.softmax_rows import softmax_rows_triton

        softmax_rows_triton(scores, scale, out)
    else:
        out.copy_(torch.softmax(reference.wide(scores) * scale, -1))


def _check_planes(name: str, value: Tensor) -> None:
    check_float(name, check_tensor(name, value))
    check_shape(name, value, ("T", "H + 1", "W + 1", "C"))
    if not value.is_contiguous():
        raise ValueError(f"{name}: strides are {value.stride()}, must be contiguous")
    if min(value.shape[1:3]) < 2 or value.numel() == 0:
        raise ValueError(f"{name}: shape is {list(value.shape)}, must have a pixel beside the row and column of zeros")


register(
    "conv_planes(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, float residual_scale, bool first, int times, "
    "int space, Tensor(a!) out, Tensor(b!)? sums, str backend) -> ()",
    ("out", "sums"),
    _conv_planes,
    writes_only,
)
register(
    "channel_sums(Tensor x) -> Tensor",
    (),
    _channel_sums,
    lambda x: x.new_empty((x.shape[0], 1, x.shape[3], 2), dtype=torch.float32),
)
register(
    "group_norm_silu(Tensor x, Tensor sums, Tensor weight, Tensor bias, int groups, float eps, bool silu, "
    "Tensor(a!) out, str backend) -> ()",
    ("out",),
    _group_norm_silu,
    writes_only,
)
register(
    "softmax_rows(Tensor scores, float scale, Tensor(a!) out, str backend) -> ()", ("out",), _softmax_rows, writes_only
)
register(
    "grow_planes(Tensor x, int times, int space, Tensor(a!) out, str backend) -> ()",
    ("out",),
    _grow_planes,
    writes_only,
)
