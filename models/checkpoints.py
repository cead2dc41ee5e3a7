"""Builds the families' transformers and loads their official checkpoints, strictly.

Weights go straight to the target device, one tensor at a time: no whole second copy is ever in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from diffusers.models.transformers.latte_transformer_3d import LatteTransformer3DModel
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, nn

from pab_kernels.models import host_config, weight_files
from pab_kernels.models.hosts import OpenSoraPlanV110, OpenSoraPlanV120, STDiT3

CLASSES: dict[str, type[nn.Module]] = {
    "open_sora": STDiT3,
    "latte": LatteTransformer3DModel,
    "open_sora_plan_v110": OpenSoraPlanV110,
    "open_sora_plan_v120": OpenSoraPlanV120,
    "wan_2_1": WanTransformer3DModel,
    "wan_2_2": WanTransformer3DModel,
    "ltx": LTXVideoTransformer3DModel,
}

_LATTE: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "cross_attention_dim": 1152,
    "num_layers": 28,
    "in_channels": 4,
    "out_channels": 8,
    "attention_bias": True,
    "patch_size": 2,
    "sample_size": 64,
    "video_length": 16,
    "caption_channels": 4096,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
}
_PLAN_V120: dict[str, Any] = {
    "num_attention_heads": 24,
    "attention_head_dim": 96,
    "cross_attention_dim": 2304,
    "num_layers": 32,
    "out_channels": 4,
    "sample_size": (60, 80),
    "sample_size_t": 24,
    "interpolation_scale_t": 1.0,
    "interpolation_scale_h": 1.0,
    "interpolation_scale_w": 1.0,
}

_WAN_1_3B: dict[str, Any] = {
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "num_layers": 30,
    "ffn_dim": 8960,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
}
_WAN_14B: dict[str, Any] = {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}
_WAN_FROM_IMAGE: dict[str, Any] = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}

# The released models. Open-Sora-Plan's are 65x512x512 and 93x480p, Wan's the smallest of `SIZES`; a config.json beside
# the weights tells how the other sizes differ.
FULL_SIZE: dict[str, dict[str, Any]] = {
    "open_sora": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
    "latte": _LATTE,
    "open_sora_plan_v110": {**_LATTE, "sample_size": (64, 64), "video_length": 17},
    "open_sora_plan_v120": _PLAN_V120,
    "wan_2_1": _WAN_1_3B,
    "wan_2_2": {
        **_WAN_1_3B,
        "num_attention_heads": 24,
        "ffn_dim": 14336,
        "in_channels": 48,
        "out_channels": 48,
    },
    "ltx": {"num_attention_heads": 32, "attention_head_dim": 64, "num_layers": 28, "caption_channels": 4096},
}

SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "wan_2_1": {"1.3b": {}, "14b": _WAN_14B, "i2v-14b": {**_WAN_14B, **_WAN_FROM_IMAGE}},
    "wan_2_2": {
        "5b": {},
        "14b": {**_WAN_14B, "in_channels": 16, "out_channels": 16},
        "i2v-14b": {**_WAN_14B, "in_channels": 36, "out_channels": 16},
    },
}
"""For families that come in several sizes, how each differs from `FULL_SIZE`. Wan 2.2's 14b is either of its two."""

HUB_IDS: dict[str, str] = {
    "open_sora": "hpcai-tech/OpenSora-STDiT-v3",
    "latte": "maxin-cn/Latte-1/transformer",
    "open_sora_plan_v110": "LanguageBind/Open-Sora-Plan-v1.1.0/65x512x512",
    "open_sora_plan_v120": "LanguageBind/Open-Sora-Plan-v1.2.0/93x480p",
    "wan_2_1": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers/transformer",
    "wan_2_2": "Wan-AI/Wan2.2-TI2V-5B-Diffusers/transformer",
    "ltx": "Lightricks/LTX-Video/transformer",
}


def build(family: str, **overrides: Any) -> nn.Module:
    """Build a family's transformer with its parameters on the meta device.

    Parameters
    ----------
    family
        One of ``CLASSES``.
    overrides
        Config values that differ from the released model in ``FULL_SIZE``.

    Returns
    -------
    The module, in eval mode and without gradients. Its buffers (position tables, RoPE frequencies) are real,
    on the CPU in float32.

    Raises
    ------
    ValueError
        For an unknown family or a config value that the host does not support, naming it.
    TypeError
        For a config key that the host does not have.
    """
    config = _config(family, overrides)
    return _with_tables(_on_meta(family, config), config)


def random_weights(
    family: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    seed: int = 0,
    **overrides: Any,
) -> nn.Module:
    """Build a family's transformer with random weights, to time it where no checkpoint is at hand.

    Weights are normal with standard deviation 0.02, those of norms 1, so that gates are not zero and outputs are
    finite. Parameters, errors and the module returned are as in `load`.
    """
    _check_dtype(dtype)
    model = build(family, **overrides)
    generator = torch.Generator(device).manual_seed(seed)
    state = {}
    for name, parameter in model.named_parameters():
        value = torch.empty(parameter.shape, dtype=_dtype_of(model, name, dtype), device=device)
        is_norm = name.endswith(".weight") and "norm" in name.split(".")[-2]
        state[name] = value.fill_(1) if is_norm else value.normal_(0, 0.02, generator=generator)
    return _fill(model, state, device, dtype)


def load(
    family: str,
    source: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    **overrides: Any,
) -> nn.Module:
    """Load a transformer from an official checkpoint.

    Parameters
    ----------
    family
        One of ``CLASSES``.
    source
        A weights file (.safetensors, or .bin, .pt, .pth holding nothing but tensors and plain values); or a folder
        with one such file, or with shards and their ``*.index.json``, or with such a folder, ``transformer`` before
        others; or a Hugging Face hub id, ``owner/name`` or ``owner/name/folder`` (``HUB_IDS`` has the official ones).
        A config.json beside the weights is obeyed. Prefixes of wrappers (``module.``, ``_orig_mod.``) are taken off,
        and of what a training script saved the average of the weights (``ema``) is taken, else ``state_dict``.
    dtype, device
        Of all parameters and buffers of the returned module, but for what Wan keeps in float32.
    overrides
        Config values that differ from config.json, or without one from the released model in ``FULL_SIZE``.

    Returns
    -------
    The module, in eval mode and without gradients.

    Raises
    ------
    FileNotFoundError
        Where there is no such source, or nothing to load in it.
    ValueError
        For a checkpoint of another family; for missing, unexpected or wrong-shaped tensors (all are listed); for
        an unreadable file, or one of other tensors than plain floating ones; for an unknown family.
    TypeError
        For a dtype that is not floating.

    Warns
    -----
    UserWarning
        For weights that are not finite.
    """
    cls = _class_of(family)
    _check_dtype(dtype)
    files, index = weight_files.weight_files(resolve(source, "transformer", family, HUB_IDS[family]))
    entries = weight_files.open_files(files, index)
    found = families_of(entries)
    if found and family not in found:
        raise ValueError(f"{source} is a checkpoint of family {' or '.join(map(repr, found))}, not {family!r}")
    config = _config(family, {**host_config.read(files[0].with_name("config.json"), cls), **overrides})
    model = _on_meta(family, config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if difference := weight_files.difference(expected, entries):
        raise ValueError(f"{source} does not fit {type(model).__name__}:\n{difference}")
    # Only now is anything made that has the sizes of config.json.
    dtypes = {name: _dtype_of(model, name, dtype) for name in expected}
    state = weight_files.read_all(entries, dtypes, device)
    return _fill(_with_tables(model, config), state, device, dtype)


def _config(family: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a host; raises as `build`."""
    return host_config.check(_class_of(family), {**FULL_SIZE[family], **overrides})


def _on_meta(family: str, config: Mapping[str, Any]) -> nn.Module:
    """The host with parameters and buffers on the meta device."""
    with torch.device("meta"):
        return CLASSES[family](**config).eval().requires_grad_(False)


def _with_tables(model: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """`model` with real buffers, on the CPU in float32."""
    if any(True for _ in model.buffers()):
        # All buffers lie outside the blocks, so a model without blocks computes them at little cost.
        depth = "depth" if "depth" in config else "num_layers"
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            shallow = type(model)(**{**config, depth: 0})
        for name, buffer in shallow.named_buffers():
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, buffer)
    return model


def _fill(model: nn.Module, state: dict[str, Tensor], device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """Put tensors that are on the device already into a model from `build`, and move its tables there."""
    model.load_state_dict(state, strict=False, assign=True)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(_dtype_of(model, name, dtype))
    # nn.Module's own `to`: that of diffusers' models warns of every change of dtype.
    return nn.Module.to(model, device=device)


def _dtype_of(model: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """That of a parameter or table: some of diffusers' classes keep parts in float32 in a model of half precision."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    return torch.float32 if dtype.itemsize < 4 and any(part in kept for part in name.split(".")) else dtype


def _class_of(family: str) -> type[nn.Module]:
    if family not in CLASSES:
        raise ValueError(f"family is {family!r}, must be one of {', '.join(CLASSES)}")
    return CLASSES[family]


def _check_dtype(dtype: torch.dtype) -> None:
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype is {dtype!r}, must be a floating torch.dtype")


def resolve(source: str | Path, part: str, name: str, official: str) -> Path:
    """The local file or folder that `source` means, downloaded where it is a hub id.

    Parameters
    ----------
    part : str
        A folder within `source` that is taken where it is there.
    name, official : str
        What is looked for, and its official hub id, for the error.

    Raises
    ------
    FileNotFoundError
        There is no such thing here, and the hub did not deliver it.
    """
    path = Path(source)
    if path.exists():
        inner = path / part
        return inner if inner.is_dir() else path
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([\w./-]+))?", str(source))
    if match is None or path.suffix in weight_files.SUFFIXES:
        raise FileNotFoundError(f"there is no file or folder {source}")
    repo, folder = match.groups()
    wanted = [f"*{suffix}*" for suffix in (*weight_files.SUFFIXES, ".json")]
    try:
        root = huggingface_hub.snapshot_download(
            repo,
            allow_patterns=[f"{folder}/{pattern}" for pattern in wanted] if folder else wanted,
            ignore_patterns=None if folder else ["*/*"],
        )
    except Exception as error:  # no network, no such repository, no access: the way out is the same
        include = f" --include '{folder}/*'" if folder else ""
        raise FileNotFoundError(
            f"{source} is not a file or folder here, and the Hugging Face hub did not deliver it ({error}). "
            f"With network access, run `hf download {repo}{include} --local-dir DIR` and pass "
            f"{'DIR/' + folder if folder else 'DIR'} as source. The official id of {name} is {official}."
        ) from error
    return Path(root, folder or "")


def families_of(keys: Iterable[str]) -> tuple[str, ...]:
    """The families that the names of a checkpoint's tensors leave; none where they tell nothing."""
    keys = set(keys)
    tops = {key.partition(".")[0] for key in keys}
    if "spatial_blocks" in tops:
        return ("open_sora",)
    if "temporal_transformer_blocks" in tops:
        return ("open_sora_plan_v110",) if "caption_projection.y_embedding" in keys else ("latte",)
    if {"blocks", "condition_embedder"} <= tops:
        return ("wan_2_1", "wan_2_2")
    if {"transformer_blocks", "time_embed"} <= tops:
        return ("ltx",)
    return ("open_sora_plan_v120",) if {"transformer_blocks", "adaln_single"} <= tops else ()
