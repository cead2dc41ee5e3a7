"""Pieces that the hosts share and that diffusers does not have in this form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import get_timestep_embedding
from einops import rearrange
from torch import nn

from pab_kernels.ops.checks import check_shape


def check_fixed(**settings: tuple[object, object]) -> None:
    """Refuse config values that no released checkpoint has: ``name=(value, the only value allowed)``.

    Raises
    ------
    ValueError
        For the first setting that differs.
    """
    for name, (value, allowed) in settings.items():
        if value != allowed:
            raise ValueError(f"{name} is {value!r}, but this host only supports {allowed!r}")


def repeat_rows(name: str, value: torch.Tensor, batch: int) -> torch.Tensor:
    """`value` with its rows repeated to `batch`: one prompt's row may serve both halves of guidance.

    Raises
    ------
    ValueError
        The rows do not divide the batch.
    """
    rows = value.shape[0]
    if rows == 0 or batch % rows:
        raise ValueError(f"{name}: has {rows} rows, must divide the batch of {batch}")
    return value.repeat(batch // rows, *(1 for _ in value.shape[1:]))


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """adaLN: ``x * (1 + scale) + shift``."""
    return x * (1 + scale) + shift


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Softmax attention, scale ``head_dim ** -0.5``, any leading dimensions.

    Parameters
    ----------
    q : [..., N, heads, head_dim]
    k, v : [..., L, heads, head_dim]
    key_mask : [B, L] bool (True: attend) or float (added to the scores), with one leading dimension B.

    Returns
    -------
    [..., N, heads * head_dim]
    """
    lead = q.shape[:-3]
    q, k, v = (x.flatten(0, -4).transpose(1, 2) for x in (q, k, v))
    bias = None if key_mask is None else key_mask[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return out.transpose(1, 2).flatten(2).unflatten(0, lead)


def rotate(x: torch.Tensor, angles: torch.Tensor, layout: tuple[int, ...], pair_dim: int) -> torch.Tensor:
    """RoPE: rotate pairs of channels, in float32 at least.

    Parameters
    ----------
    x : [..., N, heads, head_dim]
    angles : [N, *layout without its pair dimension], radians.
    layout
        How head_dim splits; exactly one entry is the pair (2). ``(-1, 2)`` pairs neighbouring channels,
        ``(2, -1)`` pairs channel i with channel i + half.
    pair_dim
        Which entry of ``layout`` is the pair, counted from the end.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    angles = angles.to(dtype).unsqueeze(1)  # the same for all heads
    cos, sin = angles.cos(), angles.sin()
    a, b = x.to(dtype).unflatten(-1, layout).unbind(pair_dim)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=pair_dim)
    return turned.flatten(-len(layout)).to(x.dtype)


def unpatchify(x: torch.Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> torch.Tensor:
    """Tokens [B, T * H * W, pt * ph * pw * C] back to a latent [B, C, T * pt, H * ph, W * pw]."""
    (t, h, w), (pt, ph, pw) = grid, patch
    return rearrange(
        x,
        "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)",
        t=t, h=h, w=w, pt=pt, ph=ph, pw=pw,
    )  # fmt: skip


def check_text_mask(mask: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """The mask [B, L] or [B, 1, L] of text [B, 1, L, C] as [B, L], or ValueError."""
    batch, _, tokens, _ = text.shape
    mask = mask.squeeze(1) if mask.ndim == 3 else mask
    check_shape("encoder_attention_mask", mask, (batch, tokens))
    return mask


def text_bias(mask: torch.Tensor | None, text: torch.Tensor) -> torch.Tensor | None:
    """What to add to the scores of cross-attention: 0 for a real token, -10000 for padding.

    Parameters
    ----------
    mask : [B, L] or [B, 1, L], or None
        One for real tokens, zero for padding.
    text : [B, 1, L, C]

    Returns
    -------
    [B, L] in the dtype of ``text``, or None.
    """
    return None if mask is None else (1 - check_text_mask(mask, text).to(text.dtype)) * -10000.0


class Mlp(nn.Module):
    """Linear, tanh-GELU, linear."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.fc2 = nn.Linear(hidden_features, out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class ScalarEmbedder(nn.Module):
    """Embeds one number a row, [B] -> [B, C]; serves the timestep and the frame rate."""

    def __init__(self, hidden_size: int, frequencies: int = 256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        waves = get_timestep_embedding(value, self.frequencies, flip_sin_to_cos=True, downscale_freq_shift=0)
        return self.mlp(waves.to(next(self.parameters()).dtype))


class CaptionEmbedder(nn.Module):
    """Projects the text; ``y_embedding`` is the learned empty prompt that guidance uses."""

    def __init__(self, caption_channels: int, hidden_size: int, num_tokens: int):
        super().__init__()
        self.y_proj = Mlp(caption_channels, hidden_size, hidden_size)
        self.y_embedding: torch.Tensor
        self.register_buffer("y_embedding", torch.zeros(num_tokens, caption_channels))

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return self.y_proj(y)


class PatchEmbedding(nn.Module):
    """[B, C_in, T, H, W] -> [B, T', H' * W', C]; zeros fill a latent up to a whole number of patches."""

    def __init__(self, patch_size: tuple[int, int, int], in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv3d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pt, ph, pw = self.proj.kernel_size
        t, h, w = x.shape[2:]
        x = F.pad(x, (0, -w % pw, 0, -h % ph, 0, -t % pt))
        return self.proj(x).flatten(3).permute(0, 2, 3, 1)


def position_table(inv_freq: torch.Tensor, h: int, w: int, scale: float, base_size: int) -> torch.Tensor:
    """Sine and cosine of a patch's column, then of its row, a quarter of the channels each: [h * w, C].

    `inv_freq` [C / 4] in the dtype of the weights, as the official model rounds it. Positions are divided by `scale`
    and stretched to `base_size` patches a side.
    """
    rows, columns = (
        torch.outer(torch.arange(n, device=inv_freq.device) / scale * (base_size / n), inv_freq) for n in (h, w)
    )
    rows, columns = (torch.cat((x.sin(), x.cos()), dim=-1) for x in (rows, columns))
    table = torch.cat((columns.expand(h, -1, -1), rows[:, None].expand(-1, w, -1)), dim=-1)
    return table.flatten(0, 1).to(inv_freq.dtype)


class PositionEmbedding(nn.Module):
    """Holds the frequencies of `position_table`."""

    def __init__(self, hidden_size: int):
        super().__init__()
        half = hidden_size // 2
        self.inv_freq: torch.Tensor
        self.register_buffer("inv_freq", 10000 ** -(torch.arange(0, half, 2) / half), persistent=False)


def frame_angles(freqs: torch.Tensor, frames: int) -> torch.Tensor:
    """Rotary angles [frames, head_dim / 2] of frequencies [head_dim / 2], radians, in float32 at least."""
    freqs = freqs.to(torch.promote_types(freqs.dtype, torch.float32))
    return torch.outer(torch.arange(frames, device=freqs.device), freqs)


class RotaryEmbedding(nn.Module):
    """RoPE along time on neighbouring pairs of channels. Official checkpoints carry its frequencies."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.freqs: torch.Tensor
        self.register_buffer("freqs", 10000 ** -(torch.arange(0, head_dim, 2) / head_dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate x [..., T, heads, head_dim]."""
        return rotate(x, frame_angles(self.freqs, x.shape[-3]), layout=(-1, 2), pair_dim=-1)


class PlanAttnProcessor:
    """Attention of Open-Sora-Plan 1.2: 3D RoPE in self-attention, a text mask in cross-attention.

    A third of a head's channels turns with time, a third with the row, a third with the column; within a
    third, channel i pairs with channel i + half.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rope: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states [B, N, C], text [B, L, C] or None, bias [B, L] or None, rope [N, 3, head_dim / 6]."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))
        k = attn.to_k(source).unflatten(-1, (attn.heads, -1))
        v = attn.to_v(source).unflatten(-1, (attn.heads, -1))
        if encoder_hidden_states is None and rope is not None:
            q, k = (rotate(x, rope, layout=(3, 2, -1), pair_dim=-2) for x in (q, k))
        return attn.to_out[0](attention(q, k, v, attention_mask))
