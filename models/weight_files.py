"""Reads weights from files of anyone: names, shapes and dtypes first, and no tensor before these are known to fit.

Every error is a ValueError (FileNotFoundError where something is not there) that names the file and the key.
"""

from __future__ import annotations

import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

logger = logging.getLogger(__name__)

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")  # in order of preference
LISTED = 10  # keys of each kind that an error names before it only counts
MOST_JSON = 2**26
"""Bytes of a JSON file; the index of the largest checkpoint has a few hundred thousand."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What weights may be, by safetensors' names."""
WRAPPED = ("ema", "ema_state_dict", "gen_model", "state_dict", "model_state_dict", "model", "module")
"""Where training scripts put the weights beside other things; the average over training is what they sample with."""
PREFIXES = ("module.", "model.", "ema_model.", "transformer.")
"""What wrappers put before every name."""
WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, FSDP and checkpointing put before names, anywhere."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: `read` maps or copies it, on the CPU."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    read: Callable[[], Tensor]


def read_json(path: Path) -> Any:
    """A JSON file; ValueError naming it where it is none."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_JSON + 1)
        if len(data) > MOST_JSON:
            raise ValueError(f"more than {MOST_JSON} bytes")
        return json.loads(data)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error


def weight_files(path: Path) -> tuple[list[Path], Path | None]:
    """The weights file at `path`, or in the folder, or in its only folder that has one; shards with their index.

    Raises
    ------
    FileNotFoundError
        There is none, or a shard is not there.
    ValueError
        There are several and no index, or the index is none or names files outside its folder.
    """
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path} must end in one of {', '.join(SUFFIXES)}")
        return [path], None
    if (found := _files_in(path)) is not None:
        return found
    below = {folder: files for folder in sorted(path.glob("*/")) if (files := _files_in(folder)) is not None}
    if len(below) > 1:
        raise ValueError(f"{path} holds several folders of weights: {_names(below)}; pass one of them")
    if not below:
        raise FileNotFoundError(f"{path} holds no weights file ({', '.join(SUFFIXES)})")
    return next(iter(below.values()))


def open_files(files: Iterable[Path], index: Path | None = None) -> dict[str, Entry]:
    """The tensors of `files` by name, wrappers' prefixes taken off; nothing is read yet.

    Raises
    ------
    ValueError
        A file is damaged, or holds other than plain floating tensors; a name is there twice, or not where `index` says.
    """
    entries: dict[str, Entry] = {}
    for file in files:
        found = _open_safetensors(file) if file.suffix == ".safetensors" else _open_torch(file)
        for key, entry in found.items():
            if key in entries:
                raise ValueError(f"{file}: {key} is in {entries[key].file.name} too")
            entries[key] = entry
    if index is not None:
        for key, name in _weight_map(index).items():
            if key not in entries or entries[key].file.name != PurePath(name).name:
                raise ValueError(f"{index}: {key} is not in {name}, where it should be")
    return _unwrapped(entries)


def read_all(
    entries: Mapping[str, Entry], dtypes: Mapping[str, torch.dtype], device: torch.device | str
) -> dict[str, Tensor]:
    """Copies of the tensors that `dtypes` names, on `device`, one at a time; values not finite are warned of.

    Raises
    ------
    ValueError
        A tensor cannot be read.
    """
    state, strange = {}, []
    for name, dtype in dtypes.items():
        entry = entries[name]
        try:
            value = entry.read()
        except (SafetensorError, RuntimeError, OSError, ValueError) as error:
            raise ValueError(f"{entry.file}: {name} cannot be read: {error}") from error
        state[name] = value.detach().to(device=device, dtype=dtype, copy=True)
        if not bool(state[name].isfinite().all()):
            strange.append(name)
    if strange:
        file = entries[strange[0]].file
        kind = state[strange[0]].dtype
        warnings.warn(f"{file}: not all numbers are finite in {kind}: {listed(strange)}", stacklevel=3)
    return state


def difference(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Entry | Tensor]) -> str:
    """One line for each kind of difference between names and shapes; empty where there is none."""
    shapes = (
        f"{key} is {list(found[key].shape)}, must be {list(shape)}"
        for key, shape in expected.items()
        if key in found and found[key].shape != shape
    )
    kinds = {
        "missing": [key for key in expected if key not in found],
        "unexpected": [key for key in found if key not in expected],
        "wrong shape": list(shapes),
    }
    return "\n".join(f"{kind} ({len(keys)}): {listed(keys)}" for kind, keys in kinds.items() if keys)


def listed(names: Iterable[str]) -> str:
    """At most `LISTED` of the names, and how many there are more."""
    names = list(names)
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _names(paths: Iterable[Path]) -> str:
    return listed(path.name for path in paths)


def _files_in(folder: Path) -> tuple[list[Path], Path | None] | None:
    """The folder's own weights file, or shards and index; None where it has none."""
    for suffix in SUFFIXES:
        indexes = sorted(folder.glob(f"*{suffix}.index.json"))
        if len(indexes) > 1:
            raise ValueError(f"{folder} holds several indexes: {_names(indexes)}; pass a folder with one")
        if indexes:
            return _shards(indexes[0]), indexes[0]
        files = sorted(folder.glob(f"*{suffix}"))
        if len(files) > 1:
            raise ValueError(f"{folder} holds several weights files and no index: {_names(files)}; pass one of them")
        if files:
            return files, None
    return None


def _weight_map(index: Path) -> dict[str, str]:
    document = read_json(index)
    found = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{index}: weight_map must be a mapping of tensors to files, and not empty")
    for key, name in found.items():
        if not isinstance(name, str) or PurePath(name).suffix not in SUFFIXES or "\0" in name:
            raise ValueError(f"{index}: {key} is said to be in {name!r}, must be the name of a weights file")
    return found


def _shards(index: Path) -> list[Path]:
    """The files that an index names, in its order; none may lie outside its folder."""
    folder = index.parent
    inside = [folder.resolve()]
    # The hub's cache has links to a folder of its own in the place of files.
    inside += [parent.parent / "blobs" for parent in inside[0].parents if parent.name == "snapshots"]
    shards, lost = [], []
    for name in dict.fromkeys(_weight_map(index).values()):
        shard = folder / name
        parts = PurePath(name).parts
        real = Path(os.path.realpath(shard))
        if PurePath(name).is_absolute() or ".." in parts or not any(place in real.parents for place in inside):
            raise ValueError(f"{index} names {name!r}, which is not in its folder: it is not read")
        shards.append(shard)
        if not shard.is_file():
            lost.append(shard.name)
    if lost:
        raise FileNotFoundError(f"{index} names shards that are not there: {listed(lost)}")
    return shards


def _open_safetensors(file: Path) -> dict[str, Entry]:
    try:
        handle = safe_open(file, framework="pt", device="cpu")
        entries = {}
        for key in handle.keys():  # noqa: SIM118  # not a dict
            part = handle.get_slice(key)
            dtype = part.get_dtype()
            if dtype not in DTYPES:
                raise ValueError(f"{file}: {key} is of dtype {dtype}, must be one of {', '.join(DTYPES)}")
            entries[key] = Entry(tuple(part.get_shape()), DTYPES[dtype], file, partial(handle.get_tensor, key))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(f"{file} is damaged, or not a .safetensors file: {error}") from error
    return entries


def _open_torch(file: Path) -> dict[str, Entry]:
    try:
        with file.open("rb") as opened:
            start = opened.read(2)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if start[:1] == b"\x80":  # a bare pickle: its sizes cannot be checked against the file
        raise ValueError(
            f"{file} is in the format of torch before 1.6, must be in the newer one: "
            f"`torch.save(torch.load(path, weights_only=True), path)` brings it there"
        )
    if start != b"PK":
        raise ValueError(f"{file} is damaged, or not a {file.suffix} file of torch.save")
    try:
        document = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise ValueError(f"{file} is damaged, or not a {file.suffix} file: {error}") from error
    except Exception as error:  # pickle's errors have no common base
        raise ValueError(f"{file} holds more than tensors, or is damaged; it is not loaded") from error
    tensors = _tensors(document, file)
    for key, value in tensors.items():
        if (why := _why_not(value)) is not None:
            raise ValueError(f"{file}: {key} is {why}, must be a plain tensor of a floating dtype")
    return {key: Entry(tuple(value.shape), value.dtype, file, partial(_same, value)) for key, value in tensors.items()}


def _same(value: Tensor) -> Tensor:
    return value


def _tensors(document: Any, file: Path) -> dict[str, Tensor]:
    """The state dictionary in what a file holds: the whole of it, or the one that training scripts put into it."""
    if not isinstance(document, Mapping):
        raise ValueError(f"{file} must hold a dictionary of tensors, but holds a {type(document).__name__}")
    if _is_state(document):
        return dict(document)
    trained = document.get("state_dict")
    if isinstance(trained, Mapping) and "gen_model" in trained:  # beside the discriminator that it was trained against
        document = {**document, "gen_model": trained["gen_model"]}
    inside = [key for key in WRAPPED if _is_state(document.get(key))]
    if not inside:
        names = listed(key if isinstance(key, str) else repr(key)[:80] for key in document)
        raise ValueError(
            f"{file} must hold a dictionary of names and tensors, or one as {', '.join(WRAPPED)}, but holds {names}"
        )
    if len(document) > 1:
        logger.info("%s: the weights are those of %r, out of %s", file, inside[0], listed(map(str, document)))
    return dict(document[inside[0]])


def _is_state(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items())
    )


def _why_not(value: Tensor) -> str | None:
    """What is wrong with a tensor of a torch file, None if it may be a weight."""
    if value.is_meta:
        return "a tensor without values (meta)"
    if value.is_quantized or value.layout != torch.strided or value.is_nested:
        return f"a {'quantized' if value.is_quantized else value.layout} tensor"
    if value.dtype not in DTYPES.values():
        return f"of dtype {value.dtype}"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"of shape {list(value.shape)}, of which the file holds {value.untyped_storage().nbytes()} bytes"
    return None


def _unwrapped(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The entries by the names that the model itself gives them."""
    names = {key: WRAPPERS.sub("", key) for key in entries}
    while prefix := next((each for each in PREFIXES if names and all(n.startswith(each) for n in names.values())), ""):
        names = {key: name.removeprefix(prefix) for key, name in names.items()}
    found: dict[str, str] = {}
    for key, name in names.items():
        if name in found:
            raise ValueError(f"{entries[key].file}: {key} and {found[name]} are both {name} without their wrappers")
        found[name] = key
    return {name: entries[key] for name, key in found.items()}
