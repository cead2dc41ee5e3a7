"""Which weights are these: what stands under a host is recorded once, and compared at every call."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from pab_kernels.models.adapter import found_words
from pab_kernels.models.seen import version_of

_CONTAINERS = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
_OF_TORCH = frozenset(vars(nn.Module()))
"""What every module has in its `__dict__`."""
_PACKAGES = ("torch.nn.modules.", "diffusers.models.", "pab_kernels.models.")
"""Where the classes of known hosts come from."""
_OF_OFFICIAL = ("timm", "transformers", "apex", "rotary_embedding_torch")
"""Packages that official hosts take modules from."""
_RANDOM = ("p", "drop_prob", "uncond_prob", "class_dropout_prob")
"""Attributes that are the probability of a module that drops something in training."""
_STALE = "leave the handle, change the model, then accelerate it again"
_version = attrgetter("_version")
_CALLED = ("forward", "__call__", "_call_impl")
"""What a class of modules runs; the host's own class is called through, and only its forward stood in for."""


class Identity:
    """All modules under a host, their classes, attributes and hooks, their parameters and buffers.

    Of classes, of modules and of what they call (attention processors), what they run counts too.

    An executor that stands in for a host must not skip over anything that somebody has put there. So each module must
    be of a class of the host's own, without hooks or a forward of its own, and each parameter a plain dense tensor; and
    all must stay so, since graphs know the weights by their addresses.

    Parameters
    ----------
    host : nn.Module
        Hooks and forwards of the host itself do not count: whoever put them there sees every call.

    Raises
    ------
    TypeError
        Naming the path, what is there and what must be.
    """

    def __init__(self, host: nn.Module) -> None:
        self._host = host
        self._check_plain()
        self.record()

    def record(self) -> None:
        """Take what is there now as what must be there."""
        named = list(self._host.named_modules())
        self._paths = [path for path, _ in named]
        self._modules = [module for _, module in named]
        self._classes = list(map(type, self._modules))
        dicts = [vars(module) for module in self._modules]
        # Besides the host's own attributes, which come and go: forward, cache_context, hooks of diffusers.
        self._dicts = dicts[1:]
        self._own = [_own(dict_) for dict_ in self._dicts]
        self._get = [itemgetter(*keys) if keys else _nothing for keys in self._own]
        self._contents: list[dict[str, Any]] = [vars(self._host)[name] for name in _CONTAINERS[:3]]
        self._contents += [dict_[name] for dict_ in self._dicts for name in _CONTAINERS]
        self._attributes = self._read_attributes()
        self._called = [(cls, name, getattr(cls, name)) for cls, name in self._find_called()]
        self._filled = [dict_ for dict_ in self._contents if dict_]
        self._values = list(chain.from_iterable(map(dict.values, self._filled)))
        self._size = self._read_size()
        named_tensors = dict(chain(self._host.named_parameters(), self._host.named_buffers()))
        self._names, self._tensors = list(named_tensors), list(named_tensors.values())
        self._addresses = list(map(Tensor.data_ptr, self._tensors))
        self._forms = self._read_forms()
        self._tracked = [tensor for tensor in self._tensors if version_of(tensor) is not None]
        self.note_versions()

    def note_versions(self) -> None:
        """A run begins: its copies are made of the weights as they are now."""
        self._versions = list(map(_version, self._tracked))

    def check(self) -> None:
        """Raise ValueError, naming what, if anything is not as it was recorded; weights may be changed in place."""
        self.check_addresses()
        if self._read_forms() != self._forms:
            raise self._moved()
        same = (
            self._read_size() == self._size
            and list(map(type, self._modules)) == self._classes
            and all(map(is_, chain.from_iterable(map(dict.values, self._filled)), self._values))
            and all(getattr(cls, name) is found for cls, name, found in self._called)
            and not (torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
        )
        try:
            same = same and self._read_attributes() == self._attributes
        except (KeyError, RuntimeError):  # one was deleted, or is another tensor
            same = False
        if not same:
            raise ValueError(f"{self._difference()} since accelerate(), which the runtime would skip over: {_STALE}")

    def check_addresses(self) -> None:
        """Raise ValueError if a parameter or buffer does not lie where it lay: its memory may be gone."""
        if list(map(Tensor.data_ptr, self._tensors)) != self._addresses:
            raise self._moved()

    def _moved(self) -> ValueError:
        now = zip(map(Tensor.data_ptr, self._tensors), *self._read_forms(), strict=True)
        before = zip(self._addresses, *self._forms, strict=True)
        name = next(name for name, new, old in zip(self._names, now, before, strict=True) if new != old)
        return ValueError(f"the host's weights were moved, cast or replaced after accelerate(), first {name}: {_STALE}")

    def check_versions(self) -> None:
        """Raise ValueError if a weight was changed in place since the run began: some of them were copied then."""
        if list(map(_version, self._tracked)) != self._versions:
            raise ValueError(
                "the host's weights were changed in the middle of a run: call begin(timesteps) for a new one"
            )

    def _read_forms(self) -> list[Any]:
        return [list(map(read, self._tensors)) for read in (Tensor.stride, attrgetter("dtype"))]

    def _read_size(self) -> int:
        # Whatever is taken away is missed by itself, so a sum shows what was added.
        return sum(map(len, self._contents)) + sum(map(len, self._dicts))

    def _read_attributes(self) -> list[Any]:
        return [get(dict_) for get, dict_ in zip(self._get, self._dicts, strict=True)]

    def _find_called(self) -> list[tuple[type, str]]:
        """Of each class what it runs, by name."""
        host, *modules = self._classes
        found = [(host, "forward"), *((cls, name) for cls in dict.fromkeys(modules) for name in _CALLED)]
        values = (dict_[key] for dict_, keys in zip(self._dicts, self._own, strict=True) for key in keys)
        return [*found, *((cls, "__call__") for cls in dict.fromkeys(type(each) for each in values if callable(each)))]

    def _difference(self) -> str:
        """Which module is not as it was, and in what, for a message."""
        hosts = type(self._host).__name__
        now = dict(self._host.named_modules())
        for path, module in zip(self._paths, self._modules, strict=True):
            if now.get(path) is not module:
                found = "gone" if path not in now else f"another {type(now[path]).__name__}"
                return f"{hosts}.{path}: is {found}"
        added = next((path for path in now if path not in self._paths), None)
        if added is not None:
            return f"{hosts}.{added}: a {type(now[added]).__name__} was added"
        for path, module in zip(self._paths[1:], self._modules[1:], strict=True):
            if problem := _hooked(module):
                return f"{hosts}.{path}: has {problem}"
        for path, module, cls in zip(self._paths, self._modules, self._classes, strict=True):
            if type(module) is not cls:
                return f"{hosts}.{path}: was made a {type(module).__name__}"
        tensors = dict(chain(self._host.named_parameters(), self._host.named_buffers()))
        for name, tensor in zip(self._names, self._tensors, strict=True):
            if tensors.get(name) is not tensor:
                return f"{hosts}.{name}: was replaced"
        for cls, name, found in self._called:
            if getattr(cls, name) is not found:
                return f"{cls.__name__}.{name}: was replaced"
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return "torch.nn: a forward hook of all modules was registered"
        return self._changed_attribute(hosts)

    def _changed_attribute(self, host: str) -> str:
        for path, dict_, keys, old in zip(self._paths[1:], self._dicts, self._own, self._attributes, strict=True):
            olds = [old] if len(keys) == 1 else old or []
            for key, value in zip(keys, olds, strict=True):
                if key not in dict_:
                    return f"{host}.{path}.{key}: was deleted"
                if not _equal(dict_[key], value):
                    return f"{host}.{path}.{key}: was changed"
        return f"{host}: an attribute was added to a module"

    def _check_plain(self) -> None:
        host = self._host
        packages = (*_PACKAGES, *_official(type(host)))
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            raise TypeError("torch.nn: a forward hook of all modules is registered, must be none")
        for path, module in host.named_modules():
            name = f"{type(host).__name__}.{path}" if path else type(host).__name__
            if path and (problem := _hooked(module)):
                raise TypeError(f"{name}: has {problem}, must have none")
            if path and not f"{type(module).__module__}.".startswith(packages):
                own = (cls.__name__ for cls in type(module).__mro__ if f"{cls.__module__}.".startswith(packages))
                plain = next((f"plain {cls}" for cls in own if cls != "Module"), "module of the host's own")
                raise TypeError(f"{name}: is a {found_words(module)}, must be a {plain}")
            if module.training and (key := _drops(vars(module))):
                raise TypeError(f"{name}.{key}: is {vars(module)[key]} in training mode, must be 0: call eval()")
            for key, tensor in chain(module._parameters.items(), module._buffers.items()):
                if tensor is not None:
                    _check_tensor(f"{name}.{key}", tensor)


def _check_tensor(name: str, tensor: Tensor) -> None:
    """Raise TypeError for what is no plain dense tensor with memory of its own."""
    if type(tensor) not in (nn.Parameter, Tensor):
        raise TypeError(f"{name}: is a {type(tensor).__name__}, must be a plain tensor (not quantised or distributed)")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        raise TypeError(f"{name}: is {tensor.dtype} and {tensor.layout}, must be a dense tensor of real numbers")
    if tensor.device.type == "meta":
        raise TypeError(f"{name}: is on the meta device (offloaded?), must be in memory")


def _hooked(module: nn.Module) -> str:
    """What a module has that replaces or watches its forward, in words; empty where there is nothing."""
    if module._forward_hooks or module._forward_pre_hooks:
        return "a forward hook"
    return "a forward hook or a replaced forward" if "forward" in vars(module) else ""


def _official(cls: type) -> Iterable[str]:
    """Packages of the modules of a host that is known by its structure, each with a dot."""
    if cls.__module__.startswith(_PACKAGES):
        return ()
    return (f"{cls.__module__}.", f"{cls.__module__.partition('.')[0]}.", *(f"{name}." for name in _OF_OFFICIAL))


def _own(dict_: dict[str, Any]) -> list[str]:
    """The attributes of a module's own; `training` counts where it makes a difference."""
    keys = [key for key in dict_ if key not in _OF_TORCH]
    return [*keys, "training"] if _drops(dict_) else keys


def _drops(dict_: dict[str, Any]) -> str:
    """The attribute that makes a module drop something in training; empty where there is none."""
    for key in _RANDOM:
        value = dict_.get(key)
        if isinstance(value, float | int) and value > 0:
            return key
    return ""


def _equal(one: object, two: object) -> bool:
    try:
        return one is two or bool(one == two)
    except (RuntimeError, ValueError):  # tensors
        return False


def _nothing(_: dict[str, Any]) -> None:
    return None
