"""Blocks made of branches the plain way: a formula a branch, in float64; of the executor there is nothing in it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pab_kernels.blocks.block import Block, BlockStack, Branch, Modulation, Norm
from pab_kernels.blocks.branches import CrossAttention, Mlp
from pab_kernels.blocks.layout import Layout
from pab_kernels.blocks.linears import Linear
from pab_kernels.blocks.self_attention import SelfAttention
from pab_kernels.config import PABConfig
from pab_kernels.schedule import StepVariant


class PlainBlocks:
    """Runs a stack for one call after the other, and keeps what `config` broadcasts.

    `text` [B, L, C] is what cross-attention attends to, `image` its picture, `rope` the rotary tables.
    """

    def __init__(
        self, stack: BlockStack, layout: Layout, config: PABConfig, text: Tensor, image: Tensor | None, rope: Any
    ) -> None:
        self.stack, self.layout, self.config = stack, layout, config
        self.text, self.image, self.rope = text, image, rope
        self._kept: dict[tuple[int, int, int], tuple[Tensor, Tensor | float]] = {}

    def step(self, x: Tensor, modulation: Modulation, variant: StepVariant, embed: Tensor | None, index: Any) -> Tensor:
        """The normed and modulated stream [B, T, S, C] after the last block."""
        x = x.double()
        for position, block in enumerate(self.stack.blocks):
            if position == self.stack.embed_before and embed is not None:
                x = x + embed.double()[:, None]
            vectors = self._vectors(block, modulation)
            for i, branch in enumerate(block.branches):
                gate = 1.0 if branch.gate is None else self._vector(branch.gate, vectors, index)
                key = position, i, variant.lane(branch.kind, block.index)
                has_slot = block.index in self.config.blocks(branch.kind)
                if has_slot and variant.reads(branch.kind, block.index):
                    value, earlier = self._kept[key]
                    gate = gate if branch.regate else earlier
                else:
                    value = self._branch(x, branch, vectors, index)
                    if has_slot and variant.writes(branch.kind, block.index):
                        self._kept[key] = (value, gate)
                x = x + gate * value
        shift, scale = (self._rows(v.double(), index) for v in (modulation.shift, modulation.scale))
        return normed(x, self.stack.final) * (1 + scale) + shift

    def _vectors(self, block: Block, modulation: Modulation) -> Tensor | None:
        """[G, K, C]."""
        if block.modulation is None:
            return None
        if isinstance(block.modulation, Linear):
            assert modulation.embedding is not None
            return _linear(modulation.embedding.double(), block.modulation).unflatten(-1, (-1, self.layout.channels))
        assert modulation.blocks is not None
        return block.modulation.double() + modulation.blocks.double()

    def _vector(self, vector: Any, vectors: Tensor | None, index: Any) -> Tensor:
        """For each row of the stream."""
        if isinstance(vector, Tensor):
            return vector.double()
        assert vectors is not None
        return self._rows(vectors[:, vector], index)

    def _rows(self, vectors: Tensor, index: Any) -> Tensor:
        """[B, T, S, C] of [G, C]."""
        if index is None:
            index = torch.arange(len(vectors)).repeat_interleave(self.layout.rows // len(vectors))
        return vectors[index.flatten().long().to(vectors.device)].view(self.layout.shape)

    def _branch(self, x: Tensor, branch: Branch, vectors: Tensor | None, index: Any) -> Tensor:
        h = x
        if branch.norm is not None:
            h = normed(x, branch.norm)
            if branch.scale is not None:
                h = h * (1 + self._vector(branch.scale, vectors, index))
            if branch.shift is not None:
                h = h + self._vector(branch.shift, vectors, index)
        weights = branch.weights
        if isinstance(weights, Mlp):
            assert isinstance(weights.up, Linear)
            assert isinstance(weights.down, Linear)
            return _linear(F.gelu(_linear(h, weights.up), approximate="tanh"), weights.down)
        if isinstance(weights, CrossAttention):
            return self._cross(h, weights)
        assert isinstance(weights, SelfAttention)
        return self._self(h, weights)

    def _cross(self, h: Tensor, weights: CrossAttention) -> Tensor:
        q = _heads(_rms(_linear(h.flatten(1, 2), weights.q), weights.q_norm, weights), weights.heads)
        total = torch.zeros(())
        pairs = [(self.text, weights.kv, weights.k_norm)]
        if weights.image is not None:
            assert self.image is not None
            pairs.append((self.image, weights.image.kv, weights.image.k_norm))
        for tokens, linear, norm in pairs:
            k, v = _linear(tokens.double(), linear).chunk(2, dim=-1)
            k = _rms(k, norm, weights)
            total = total + _attend(q, _heads(k, weights.heads), _heads(v, weights.heads))
        return _linear(total, weights.proj).view(h.shape)

    def _self(self, h: Tensor, weights: SelfAttention) -> Tensor:
        batch, frames, tokens, channels = h.shape
        rows = {"spatial": h.flatten(0, 1), "temporal": h.transpose(1, 2).flatten(0, 1), "full": h.flatten(1, 2)}
        q, k, v = _linear(rows[weights.sequence], weights.qkv).chunk(3, dim=-1)
        q, k = _rms(q, weights.q_norm, weights), _rms(k, weights.k_norm, weights)
        q, k, v = (_heads(each, weights.heads) for each in (q, k, v))
        if weights.rotary:
            cos, sin = (table.double() for table in self.rope)
            q, k = (_rotate(each, cos, sin) for each in (q, k))
        y = _linear(_attend(q, k, v), weights.proj)
        if weights.sequence == "temporal":
            return y.view(batch, tokens, frames, channels).transpose(1, 2)
        return y.view(h.shape)


def normed(x: Tensor, norm: Norm) -> Tensor:
    """LayerNorm or RMSNorm, affine where it has weights, in float64."""
    if norm.kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    if norm.weight is not None:
        x = x * norm.weight.double()
    return x if norm.bias is None else x + norm.bias.double()


def _linear(x: Tensor, weights: Any) -> Tensor:
    return x @ weights.weight.double().T + weights.bias.double()


def _rms(x: Tensor, weight: Tensor | None, weights: Any) -> Tensor:
    """RMSNorm of all heads together, or of each, by the weight's size."""
    if weight is None:
        return x
    parts = x.unflatten(-1, (-1, weight.shape[0]))
    return normed(parts, Norm("rms", weights.norm_eps, weight)).flatten(-2)


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H * D] as [B, H, N, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved pairs, as complex numbers."""
    turned = torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2))) * torch.complex(cos, sin)
    return torch.view_as_real(turned).flatten(-2)
