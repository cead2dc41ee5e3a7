"""The optimiser of the demo's training: Muon for the blocks' matrices, Adam for the rest, on flat buffers.

All parameters are views of one buffer, and so are their gradients and the float32 masters. A step is then a
few dozen large kernels instead of thousands of small ones, which a small model would spend its time on.
"""

from __future__ import annotations

import math

import torch
from torch import nn


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Bring all singular values of each matrix near 1, by Newton-Schulz steps (quintic, after Keller Jordan).

    Parameters
    ----------
    matrices : torch.Tensor
        [K, M, N], any floating dtype.
    steps : int
        Iterations; 5 leave the singular values between about 0.7 and 1.2.

    Returns
    -------
    torch.Tensor
        [K, M, N], bfloat16 on a GPU and the input's dtype elsewhere.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-12)
    if x.is_cuda:
        x = x.bfloat16()
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class FlatOptimizer:
    """Owns the parameters of a module as one flat buffer, and updates them.

    After construction the module's parameters and gradients are views; the module stays usable as before.

    Parameters
    ----------
    module : torch.nn.Module
        All its parameters are float32, on one device, and all are trained.
    dtype : torch.dtype
        What the module becomes; the masters and all of the optimiser's state stay float32.
    muon_lr, adam_lr : float
        Peak learning rates. Muon's update is scaled to the size of Adam's (0.2 a weight, after Moonlight), so
        the two are comparable.
    weight_decay : float
        Decoupled, for the matrices only.
    clip : float
        Largest gradient norm; beyond it the gradient is scaled down. A gradient that is not finite counts as
        zero.
    ema : float
        Decay of the averaged weights; at step k the lesser of it and (1 + k) / (10 + k).
    """

    def __init__(
        self,
        module: nn.Module,
        dtype: torch.dtype,
        muon_lr: float,
        adam_lr: float,
        weight_decay: float = 0.01,
        clip: float = 1.0,
        ema: float = 0.998,
    ) -> None:
        self.muon_lr, self.adam_lr = muon_lr, adam_lr
        self.weight_decay, self.clip, self.decay = weight_decay, clip, ema
        named = dict(module.named_parameters())
        matrices: dict[tuple[int, ...], list[str]] = {}
        for name, parameter in named.items():
            if "transformer_blocks" in name and parameter.ndim == 2 and name.endswith(".weight"):
                matrices.setdefault(tuple(parameter.shape), []).append(name)
        # Matrices of one shape lie side by side, so that each shape is one [K, M, N] view.
        order = [name for names in matrices.values() for name in names]
        order += [name for name in named if name not in set(order)]
        self.master = torch.cat([named[name].detach().flatten() for name in order])
        self.average = self.master.clone()
        module.to(dtype)  # buffers too
        named = dict(module.named_parameters())
        self.weights = self.master.to(dtype, copy=True)
        self.grads = torch.zeros_like(self.weights)
        self.momentum, self.square = torch.zeros_like(self.master), torch.zeros_like(self.master)
        self.stacks: list[tuple[int, int, tuple[int, ...]]] = []
        self.places: dict[str, tuple[int, torch.Size]] = {}
        offset = 0
        for shape, names in matrices.items():
            end = offset + math.prod(shape) * len(names)
            self.stacks.append((offset, end, (len(names), *shape)))
            offset = end
        self.rest = offset
        offset = 0
        for name in order:
            parameter = named[name]
            end = offset + parameter.numel()
            self.places[name] = (offset, parameter.shape)
            parameter.data = self.weights[offset:end].view(parameter.shape)
            parameter.grad = self.grads[offset:end].view(parameter.shape)
            offset = end
        self.count = 0
        self.skipped = torch.zeros((), device=self.master.device)

    def zero_grad(self) -> None:
        """Clear the gradients in place; they stay views of the flat buffer."""
        self.grads.zero_()

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Update the weights and their average; `scale` multiplies both learning rates."""
        grads = self.grads.float()
        norm = grads.norm()
        finite = torch.isfinite(norm)
        self.skipped += ~finite
        # No branch on the host: a gradient that is not finite becomes zero where it is.
        factor = torch.where(finite, self.clip / norm.clamp(min=self.clip), 0.0)
        grads = torch.nan_to_num(grads, 0.0, 0.0, 0.0) * factor
        self.count += 1

        muon = slice(0, self.rest)
        self.momentum[muon].lerp_(grads[muon], 0.05)
        nesterov = grads[muon].lerp(self.momentum[muon], 0.95)
        self.master[muon].mul_(1 - scale * self.muon_lr * self.weight_decay)
        for start, end, shape in self.stacks:
            update = orthogonalize(nesterov[start:end].view(shape))
            rate = scale * self.muon_lr * 0.2 * math.sqrt(max(shape[1:]))
            self.master[start:end].view(shape).add_(update, alpha=-rate)

        adam = slice(self.rest, None)
        beta1, beta2 = 0.9, 0.99
        self.momentum[adam].lerp_(grads[adam], 1 - beta1)
        self.square[adam].lerp_(grads[adam].square(), 1 - beta2)
        scale_square = math.sqrt(1 - beta2**self.count)
        rate = scale * self.adam_lr * scale_square / (1 - beta1**self.count)
        self.master[adam].addcdiv_(self.momentum[adam], self.square[adam].sqrt().add_(1e-8), value=-rate)

        self.weights.copy_(self.master)
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        self.average.lerp_(self.master, 1 - decay)

    @torch.no_grad()
    def copy_average_to(self, module: nn.Module) -> None:
        """Copy the averaged weights to another module of the same structure."""
        for name, parameter in module.named_parameters():
            offset, shape = self.places[name]
            parameter.copy_(self.average[offset : offset + shape.numel()].view(shape))
