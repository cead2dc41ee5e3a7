"""What an adapter is, and the tools they share: plain-class checks and weights fused in place."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pab_kernels.blocks.block import BlockStack, Modulation
from pab_kernels.blocks.branches import Rope
from pab_kernels.blocks.layout import Layout
from pab_kernels.blocks.linears import Linear

MODULATION_INDEX = "modulation_index"
"""Among a call's tensors, where its layout is indexed: int32 [B, T * S], the modulation row of each of its rows."""


@dataclass(frozen=True)
class Call:
    """One call of a host's forward, in the executor's terms.

    `tensors` are what changes from step to step, among them the host's "latents" and "timestep"; `text` [B, L, C_text]
    is what the text projection reads, `text_mask` [B, L] (None: all) which of it counts, `image` [B, L_image, C_image]
    a picture that cross-attention attends to as well, `text_sources` the caller's own tensors that these come from: as
    long as they are the same, so is the text. `layout` is that of the residual stream, `latent_size` (H, W) that of
    the latents. `options` are the adapter's own.
    """

    tensors: dict[str, Tensor]
    text: Tensor
    text_sources: tuple[Tensor, ...]
    layout: Layout
    latent_size: tuple[int, int]
    text_mask: Tensor | None = None
    image: Tensor | None = None
    options: tuple[Any, ...] = ()


class Adapter(Protocol):
    """Maps one DiT family onto the executor. It calls the host's own modules and has no maths of its own.

    Tables keep their address while the shape stays the same: captured graphs read them.
    """

    host: nn.Module
    stack: BlockStack

    def bind(self, *args: Any, **kwargs: Any) -> Call:
        """Read the host's forward arguments; ValueError for what is not supported."""

    def prepare(self, call: Call) -> None:
        """Make tables that depend on the shape alone, so that the methods below need no host work."""

    def embed(self, call: Call) -> Tensor:
        """The residual stream [B, T, S, C] in the blocks' dtype, contiguous and the caller's to overwrite."""

    def frame_embed(self, call: Call) -> Tensor | None:
        """Temporal position embedding [T, C], or None."""
        return None

    def rope(self, call: Call) -> Rope | None:
        """Rotary tables, or None."""
        return None

    def modulate(self, call: Call) -> Modulation:
        """Modulation from the timestep, which no other method reads; each row of the batch for itself."""

    def project_text(self, text: Tensor) -> Tensor:
        """Text [B, L, C] for the cross-attention's keys and values."""

    def project_image(self, image: Tensor) -> Tensor:
        """A picture [B, L_image, C] for the second keys and values of cross-attention."""
        raise ValueError("image: got one, must be None: these blocks attend to none")

    def project_out(self, h: Tensor, call: Call) -> Tensor:
        """The prediction [B, C_out, T, H, W], from the normalised and modulated stream [B, T, S, C]."""

    def wrap(self, sample: Tensor, call: Call) -> Any:
        """What the host's forward returns."""

    def check_weights(self) -> None:
        """Raise ValueError if the host's parameters were moved or replaced since the adapter was made."""

    def restore(self) -> None:
        """Give the host its own separate parameters back, bit for bit."""


def plain(root: nn.Module, path: str, *classes: type | str) -> Any:
    """The submodule at `path`, if it is exactly one of `classes` and has no hooks.

    A wrapped linear (LoRA, quantisation), an offloading hook or another class would be skipped over silently. A class
    given as a string is the one of that name in the module that defines `root`'s class.

    Raises
    ------
    TypeError
        Naming the path, what is there and what must be.
    """
    module: Any = root
    walked = []
    for name in path.split("."):
        walked.append(name)
        if not hasattr(module, name):
            raise TypeError(f"{type(root).__name__}.{'.'.join(walked)}: missing, so the host's structure is unknown")
        module = getattr(module, name)
    found = type(module)
    beside = found.__name__ if found.__module__ == type(root).__module__ else None
    if classes and found not in classes and beside not in classes:
        wanted = " or ".join(dict.fromkeys(cls if isinstance(cls, str) else cls.__name__ for cls in classes))
        raise TypeError(f"{type(root).__name__}.{path}: is a {found.__name__}, must be a plain {wanted}")
    check_no_hooks(module, f"{type(root).__name__}.{path}")
    return module


def check_no_hooks(module: Any, path: str) -> None:
    """Raise TypeError if `module` has forward hooks or a replaced forward: the executor would skip them over."""
    if isinstance(module, nn.Module):
        hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
        if hooked:
            raise TypeError(f"{path}: has a forward hook or a replaced forward, must have none")


def check_value(path: str, value: object, allowed: object) -> None:
    """Raise TypeError unless the attribute at `path` has the value that the executor assumes."""
    if value != allowed:
        raise TypeError(f"{path}: is {value!r}, must be {allowed!r}")


def check_forward(host: nn.Module, *names: str) -> None:
    """Raise TypeError for the first of `names` that the host's forward does not take as an argument."""
    parameters = inspect.signature(type(host).forward).parameters
    for name in names:
        if name not in parameters:
            raise TypeError(f"{type(host).__name__}.forward: has no argument {name}, so its meaning is unknown")


def check_one_device(host: Any) -> None:
    """Raise TypeError if an official class splits its work over several devices, which the executor would not do."""
    name = type(host).__name__
    for size in ("cp_size", "sp_size"):
        manager = getattr(host, "parallel_manager", None)
        check_value(f"{name}.parallel_manager.{size}", getattr(manager, size, 1), 1)
    switch = "enable_sequence_parallelism"
    check_value(f"{name}.{switch}", bool(getattr(host, switch, False)), False)


def linear_of(root: nn.Module, path: str) -> Linear:
    """Weight and bias of the plain nn.Linear at `path`."""
    module = plain(root, path, nn.Linear)
    if module.bias is None:
        raise TypeError(f"{type(root).__name__}.{path}: has no bias, must have one")
    return Linear(module.weight.detach(), module.bias.detach())


class WeightFuser:
    """Fuses linears into one weight and makes the host's parameters views of it, so that memory is not doubled."""

    def __init__(self) -> None:
        self._views: list[tuple[nn.Parameter, Tensor, int]] = []

    def fuse(self, root: nn.Module, paths: Sequence[str]) -> Linear:
        """One Linear whose outputs are those of the linears at `paths`, one after the other."""
        modules = [plain(root, path, nn.Linear) for path in paths]
        for module, path in zip(modules, paths, strict=True):
            if module.bias is None:
                raise TypeError(f"{type(root).__name__}.{path}: has no bias, must have one")
        return Linear(
            self._fuse([module.weight for module in modules]), self._fuse([module.bias for module in modules])
        )

    def _fuse(self, parameters: list[nn.Parameter]) -> Tensor:
        fused = torch.cat([parameter.detach() for parameter in parameters])
        start = 0
        for parameter in parameters:
            end = start + parameter.shape[0]
            parameter.data = fused[start:end]
            self._views.append((parameter, fused, fused[start:end].data_ptr()))
            start = end
        return fused

    def check(self) -> None:
        """Raise ValueError if a parameter no longer lies in its fused weight."""
        for parameter, fused, pointer in self._views:
            if parameter.data_ptr() != pointer or parameter.dtype != fused.dtype:
                raise ValueError(
                    "the host's weights were moved, cast or replaced after accelerate(): leave the handle, "
                    "change the model, then accelerate it again"
                )

    def restore(self) -> None:
        """Give every parameter its own storage again."""
        for parameter, _, pointer in self._views:
            if parameter.data_ptr() == pointer:
                parameter.data = parameter.data.clone()
        self._views.clear()


def embed_patches(latents: Tensor, proj: nn.Conv2d | nn.Conv3d) -> Tensor:
    """Tokens [B, T', H' * W', C] of latents [B, C_in, T, H, W], zeros filling up to a whole number of patches.

    One GEMM writes them in the order of the residual stream: a convolution's result would have to be rearranged.
    """
    pt, ph, pw = (1, *proj.kernel_size)[-3:]
    t, h, w = latents.shape[2:]
    latents = F.pad(latents, (0, -w % pw, 0, -h % ph, 0, -t % pt))
    patches = rearrange(latents, "b c (t pt) (h ph) (w pw) -> b t (h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)
    return F.linear(patches, proj.weight.flatten(1), proj.bias)
