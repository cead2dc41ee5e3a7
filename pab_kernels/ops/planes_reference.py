"""Plain PyTorch versions of the ops on planes: eager, obvious, and what the kernels are tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """Float64 stays float64, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def conv_planes_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_scale: float,
    first: bool,
    times: int,
    space: int,
    out: Tensor,
    *,
    in_dtype: bool = False,
) -> Tensor:
    """Convolutions of PyTorch. See `pab_kernels.ops.planes.conv_planes`.

    With `in_dtype` in the dtype of x, which on a GPU is cuDNN on channels that lie last; otherwise in float32 or wider.
    """
    if not in_dtype:
        x, weight = wide(x), wide(weight)
    frames, height, width = x.shape[0], x.shape[1] - 1, x.shape[2] - 1
    taps, side = weight.shape[2:4]
    video = x[:, :height, :width].permute(3, 0, 1, 2)[None]  # [1, C, T, H, W], channels last in memory
    if first:
        video = torch.cat((video[:, :, :1].expand(-1, -1, taps - 1, -1, -1), video), dim=2)
    elif taps > 1:
        video = F.pad(video, (0, 0, 0, 0, taps - 1, 0))
    out.zero_()
    for phase, kernel in enumerate(weight.permute(0, 1, 5, 2, 3, 4)):
        later, down, right = phase // space**2, phase // space % space, phase % space
        if space == 2:
            padding = (1 - right, right, 1 - down, down)
        else:
            padding = (side // 2,) * 4
        # A kernel of one frame is one of images, for which cuDNN has more to offer.
        images = F.pad(video, padding)
        if taps == 1:
            y = F.conv2d(images[0].transpose(0, 1), kernel[:, :, 0]).permute(0, 2, 3, 1)
        else:
            y = F.conv3d(images, kernel)[0].permute(1, 2, 3, 0)
        if bias is not None:
            y = y + bias.unflatten(0, (times, -1))[later].to(y.dtype)
        target = out[later::times, down : space * height : space, right : space * width : space]
        if residual is not None:
            kept = residual[later::times, down : space * height : space, right : space * width : space]
            y = y + residual_scale * kept.to(y.dtype)
        target.copy_(y)
    assert frames * times == out.shape[0]
    return out


def channel_sums_ref(x: Tensor) -> Tensor:
    """See `pab_kernels.ops.planes.channel_sums`."""
    values = wide(x).flatten(1, 2)
    return torch.stack((values.sum(1), values.square().sum(1)), dim=-1)


def group_norm_silu_ref(
    x: Tensor, sums: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, out: Tensor
) -> Tensor:
    """The norm from sums [T or 1, C, 2] of channels. See `pab_kernels.ops.planes.group_norm_silu`."""
    frames, height, width, channels = x.shape
    count = (height - 1) * (width - 1) * (channels // groups) * (frames if sums.shape[0] == 1 else 1)
    mean, square = (sums.double().unflatten(1, (groups, -1)).sum(2) / count).unbind(-1)  # [T or 1, groups]
    rstd = torch.rsqrt((square - mean.square()).clamp(min=0) + eps)
    mean, rstd = (value.repeat_interleave(channels // groups, 1)[:, None, None] for value in (mean, rstd))
    values = wide(x)
    y = (values - mean.to(values.dtype)) * rstd.to(values.dtype) * wide(weight) + wide(bias)
    y = F.silu(y) if silu else y
    out.zero_()
    out[:, :-1, :-1] = y[:, :-1, :-1]
    return out


def grow_planes_ref(x: Tensor, times: int, space: int, out: Tensor) -> Tensor:
    """See `pab_kernels.ops.planes.grow_planes`."""
    video = wide(x)[:, :-1, :-1].permute(3, 0, 1, 2)[None]
    parts = [F.interpolate(video[:, :, :1], scale_factor=(1, space, space), mode="trilinear")]
    if x.shape[0] > 1:
        parts.append(F.interpolate(video[:, :, 1:], scale_factor=(times, space, space), mode="trilinear"))
    out.zero_()
    out[:, :-1, :-1] = torch.cat(parts, dim=2)[0].permute(1, 2, 3, 0)
    return out
