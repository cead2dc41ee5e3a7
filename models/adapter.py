"""What an adapter is, and the tools they share: plain-class checks and weights fused in place."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pab_kernels.blocks.block import BlockStack, Modulation, Norm
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
    the latents. Without `temporal` the blocks along time are left out. `options` are the adapter's own. `table_key` is
    all that `Adapter.tables` depends on besides weights. `doubts` are bools on the GPU: what was taken for granted
    about the arguments, without waiting, is wrong where one is True. `split` names the tensors that have a part for
    each latent frame, and the dimension along which those lie: ranks of a mesh take some frames each. Where
    `split_frames` is False the parts are tokens of a T of 1, all of which see each other. Nothing in it: ranks cannot
    share the call.
    """

    tensors: dict[str, Tensor]
    text: Tensor
    text_sources: tuple[Tensor, ...]
    layout: Layout
    latent_size: tuple[int, int]
    text_mask: Tensor | None = None
    image: Tensor | None = None
    temporal: bool = True
    options: tuple[Any, ...] = ()
    table_key: tuple[Any, ...] = ()
    doubts: tuple[Tensor, ...] = ()
    split: Mapping[str, int] = field(default_factory=dict)
    split_frames: bool = True


class Adapter(Protocol):
    """Maps one DiT family onto the executor. It calls the host's own modules and has no maths of its own."""

    host: nn.Module
    stack: BlockStack
    full_text: bool = False
    """Whether all texts are of one length, and all of it counts: then attention needs no lengths."""
    whole_steps: bool = True
    """Whether the prediction is a velocity from noise to data, on latents [B, C, T, H, W]: what `euler_step` adds."""

    def bind(self, *args: Any, **kwargs: Any) -> Call:
        """Read the host's forward arguments; ValueError for what is not supported."""

    def tables(self, call: Call) -> dict[str, Tensor]:
        """What depends on `call.table_key` and weights alone, made anew; methods below find it in `call.tensors`."""

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

    def nothing(self, call: Call) -> Tensor:
        """NaN in the shape of the prediction."""
        stream = torch.full(call.layout.shape, torch.nan, dtype=self.stack.dtype, device=self.stack.device)
        return self.project_out(stream, call)

    def check_like_weights(self, latents: Tensor) -> None:
        """Raise ValueError for another dtype or device than the blocks have."""
        if latents.dtype != self.stack.dtype or latents.device != self.stack.device:
            raise ValueError(
                f"hidden_states: is {latents.dtype} on {latents.device}, "
                f"must be {self.stack.dtype} on {self.stack.device} as the transformer's blocks"
            )

    def wrap(self, sample: Tensor, call: Call) -> Any:
        """What the host's forward returns."""

    def refresh(self) -> None:
        """Copy anew what the adapter has copied of the host's weights, in place."""
        return None

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
        raise TypeError(f"{type(root).__name__}.{path}: is a {found_words(module)}, must be a plain {wanted}")
    check_no_hooks(module, f"{type(root).__name__}.{path}")
    return module


def found_words(module: Any) -> str:
    """What `module` is, so that a class of the same name as the plain one can be told, and how to be rid of LoRA's."""
    cls = type(module)
    words = cls.__name__ if getattr(nn, cls.__name__, cls) is cls else f"{cls.__name__} of {cls.__module__}"
    if hasattr(module, "base_layer"):
        # Fused weights are in the layer below, but the wrapper stays.
        return f"{words} (a LoRA layer: after fuse_lora() call unload_lora_weights(), in peft merge_and_unload())"
    return words


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


def layer_norm_of(root: nn.Module, path: str, *others: str) -> Norm:
    """The LayerNorm at `path`; those at `others`, where there are any, must be alike.

    Raises
    ------
    TypeError
        One is no plain LayerNorm, has weights, or another eps than the first.
    """
    eps = plain(root, path, nn.LayerNorm).eps
    for each in (path, *others):
        owner, _, name = each.rpartition(".")
        if getattr(root.get_submodule(owner), name, None) is None:
            continue
        norm = plain(root, each, nn.LayerNorm)
        check_value(f"{type(root).__name__}.{each}.eps", norm.eps, eps)
        for part in ("weight", "bias"):
            check_value(f"{type(root).__name__}.{each}.{part}", getattr(norm, part), None)
    return Norm(eps=eps)


def rms_norms_of(paths: Sequence[str], norms: Sequence[nn.Module]) -> tuple[list[Tensor | None], float]:
    """Weights and the one eps of RMSNorms on queries and keys; no weight for an Identity.

    Without an eps of its own, torch's takes the machine epsilon of the dtype that it computes in.

    Raises
    ------
    TypeError
        They differ in eps.
    """
    weights: list[Tensor | None] = []
    found: dict[str, float] = {}
    for path, norm in zip(paths, norms, strict=True):
        if isinstance(norm, nn.Identity):
            weights.append(None)
            continue
        weight = getattr(norm, "weight", None)
        if weight is None:
            raise TypeError(f"{path}.weight: is None, must be a weight for each channel of a head")
        weights.append(weight.detach())
        # Every class here has one of them: torch's and apex' RMSNorm, LlamaRMSNorm.
        eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        wide = torch.promote_types(weight.dtype, torch.float32)
        found[path] = torch.finfo(wide).eps if eps is None else float(eps)  # type: ignore[arg-type]
    if len(set(found.values())) > 1:
        raise TypeError(f"{' and '.join(f'{path}.eps is {eps}' for path, eps in found.items())}: must be alike")
    return weights, next(iter(found.values()), 1e-6)


class WeightFuser:
    """Fuses linears into one weight and makes the host's parameters views of it, so that memory is not doubled."""

    def __init__(self) -> None:
        self._views: list[tuple[nn.Parameter, int]] = []

    def fuse(self, root: nn.Module, paths: Sequence[str]) -> Linear:
        """One Linear whose outputs are those of the linears at `paths`, one after the other.

        Raises
        ------
        TypeError
            One is no plain linear with a bias, or differs from the first in dtype or device, or is fused already by a
            handle on another model that shares it.
        """
        modules = [plain(root, path, nn.Linear) for path in paths]
        for module, path in zip(modules, paths, strict=True):
            if module.bias is None:
                raise TypeError(f"{type(root).__name__}.{path}: has no bias, must have one")
            for name in ("weight", "bias"):
                parameter, first = getattr(module, name), modules[0].weight
                if (parameter.dtype, parameter.device) != (first.dtype, first.device):
                    raise TypeError(
                        f"{type(root).__name__}.{path}.{name}: is {parameter.dtype} on {parameter.device}, "
                        f"must be {first.dtype} on {first.device} as {paths[0]}.weight"
                    )
                if getattr(parameter, _FUSED, None) == parameter.data_ptr():
                    raise TypeError(
                        f"{type(root).__name__}.{path}.{name}: belongs to another accelerated model, too: close its "
                        "handle first"
                    )
        return Linear(
            self._fuse([module.weight for module in modules]), self._fuse([module.bias for module in modules])
        )

    def _fuse(self, parameters: list[nn.Parameter]) -> Tensor:
        fused = torch.cat([parameter.detach() for parameter in parameters])
        start = 0
        for parameter in parameters:
            end = start + parameter.shape[0]
            # Noted first: whatever goes wrong from here on, `restore` knows it.
            self._views.append((parameter, fused[start:end].data_ptr()))
            parameter.data = fused[start:end]
            setattr(parameter, _FUSED, parameter.data_ptr())
            start = end
        return fused

    def restore(self) -> None:
        """Give every parameter its own storage again, unless somebody else has given it one."""
        for parameter, pointer in self._views:
            if parameter.data_ptr() == pointer:
                parameter.data = parameter.data.clone()
            vars(parameter).pop(_FUSED, None)
        self._views.clear()


_FUSED = "_pab_fused"
"""The address of a parameter that is a view of a fused weight; of a copy elsewhere it is not."""


def embed_patches(latents: Tensor, proj: nn.Conv2d | nn.Conv3d) -> Tensor:
    """Tokens [B, T', H' * W', C] of latents [B, C_in, T, H, W], zeros filling up to a whole number of patches.

    One GEMM writes them in the order of the residual stream: a convolution's result would have to be rearranged.
    """
    pt, ph, pw = (1, *proj.kernel_size)[-3:]
    t, h, w = latents.shape[2:]
    latents = F.pad(latents, (0, -w % pw, 0, -h % ph, 0, -t % pt))
    patches = rearrange(latents, "b c (t pt) (h ph) (w pw) -> b t (h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)
    return F.linear(patches, proj.weight.flatten(1), proj.bias)
