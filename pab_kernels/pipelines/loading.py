"""Finds a pipeline's parts: official checkpoints, text encoders, decoders; or random weights in their place."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.pipelines.latte.pipeline_latte import LattePipeline
from torch import nn

from pab_kernels.models import autoencoders, checkpoints, weight_files
from pab_kernels.pipelines.decoding import VideoDecoder
from pab_kernels.pipelines.demo import DemoPipeline
from pab_kernels.pipelines.latte import LatteLatents
from pab_kernels.pipelines.open_sora import OpenSoraPipeline
from pab_kernels.pipelines.open_sora_plan import OpenSoraPlanPipeline
from pab_kernels.pipelines.sizes import PLAN_SIZES, VideoSize, plan_config, plan_size_name
from pab_kernels.pipelines.text import MT5_ID, T5_ID, RandomText, SharedText, T5Text, TextEncoder, cast_encoder
from pab_kernels.pipelines.vae import is_of_diffusers, load_vae

LATTE_ID = "maxin-cn/Latte-1"
LATENT_CHANNELS = 4
"""Of all families."""
PLAN_IDS = {
    "open_sora_plan_v110": "LanguageBind/Open-Sora-Plan-v1.1.0",
    "open_sora_plan_v120": "LanguageBind/Open-Sora-Plan-v1.2.0",
}
FAMILIES = ("open_sora", "latte", "open_sora_plan_v110", "open_sora_plan_v120")
"""Those that this package has pipelines for. Wan and LTX-Video run in diffusers' own."""

Pipeline = DemoPipeline | LattePipeline | OpenSoraPipeline | OpenSoraPlanPipeline | LatteLatents


@dataclass(frozen=True)
class Source:
    """Where a pipeline comes from.

    `model` is "demo", a family, a folder or hub id of a Latte pipeline, or a folder of a demo model; `weights`,
    `text_encoder` and `vae` are files, folders or hub ids, None for the official ones. With `latents_only` there is no
    decoder, and the result is latents.
    Latte's weights are those of its transformer, or a whole pipeline. With `random_weights` there is neither checkpoint
    nor text encoder.

    Raises
    ------
    ValueError
        Parts that do not go together, or a folder of something else; the message says which option takes it.
    """

    model: str
    weights: str | None = None
    text_encoder: str | None = None
    vae: str | None = None
    random_weights: bool = False
    latents_only: bool = False

    def __post_init__(self) -> None:
        if self.random_weights and (self.weights or self.text_encoder):
            raise ValueError("random_weights: got it with weights or a text encoder, must be given alone")
        if self.model in checkpoints.CLASSES and self.model not in FAMILIES:
            raise ValueError(f"model: got {self.model!r}, which runs in diffusers' own pipeline: accelerate that")
        if self.random_weights and self.model not in FAMILIES:
            raise ValueError(f"random_weights: got it for {self.model!r}, must be one of {', '.join(FAMILIES)}")
        if self.model not in (*FAMILIES, "demo") and Path(self.model).exists():
            _check_folder(Path(self.model))
        if self.family == "demo" and self.weights is not None:
            raise ValueError(f"weights: got {self.weights!r} for a demo model, whose folder must be given as the model")
        if self.family not in (*FAMILIES, "demo"):
            known = ", ".join(("demo", *FAMILIES))
            raise ValueError(f"model: got {self.model!r}, must be {known}, or a folder or hub id of a Latte pipeline")
        if self.latents_only and (self.vae is not None or (self._has_own_decoder and not self.random_weights)):
            raise ValueError(f"latents_only: got it for {self.model!r} with a decoder, must be given without one")
        own_vae = self.model not in FAMILIES or self.model == "latte"
        if own_vae and (self.vae or self.text_encoder):
            raise ValueError(f"vae, text_encoder: got one for {self.model!r}, which has its own")

    @property
    def decodes(self) -> bool:
        """Whether the pipeline makes videos; otherwise latents."""
        return not self.latents_only

    @property
    def _has_own_decoder(self) -> bool:
        return self.family in ("demo", "latte")

    @property
    def family(self) -> str:
        """ "demo" or a family; a path is Latte's, unless it is a folder of the demo's kind."""
        if self.model in (*FAMILIES, "demo") or not (Path(self.model).is_dir() or "/" in self.model):
            return self.model
        return "demo" if _is_demo(Path(self.model)) else "latte"


def resolve_model(model: str, size: str | None) -> str:
    """`model`, with "open_sora_plan" completed by the version that has the size."""
    if model != "open_sora_plan":
        return model
    return next((family for family, sizes in PLAN_SIZES.items() if size in sizes), "open_sora_plan_v120")


def load_pipeline(
    source: Source,
    size: VideoSize | None,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    overrides: Mapping[str, Any] | None = None,
    decode_memory: int | None = None,
    seamless: bool = False,
    ranks: int = 1,
) -> Pipeline:
    """Load what `source` names.

    Parameters
    ----------
    source : Source
    size : VideoSize or None
        Open-Sora-Plan has a checkpoint for each size; the others load the same for all.
    dtype, device
        Of all modules.
    overrides : mapping, optional
        Config values of random weights that differ from the released model.
    decode_memory, seamless
        Of the decoder: see `VideoDecoder`.
    ranks : int
        Of torch's default process group, which all load the same: rank 0 alone has the text encoder, and pieces are
        decoded by all. The demo, and Latte in diffusers' pipeline, encode and decode on every rank.

    Raises
    ------
    FileNotFoundError
        A part is neither here nor can it be fetched; the message says what to download and where to put it.
    ValueError
        A part does not fit.
    """
    family = source.family
    if family == "demo":
        path = None if source.model == "demo" else source.model
        return DemoPipeline.from_pretrained(path, dtype=dtype, device=device)
    if family == "latte" and not source.random_weights:
        return _load_latte(source, dtype, device)
    if source.random_weights:
        settings = {**plan_config(family, size), **(overrides or {})}
        transformer: Any = checkpoints.random_weights(family, dtype=dtype, device=device, **settings)
    else:
        transformer = checkpoints.load(family, _weights(source, size), dtype=dtype, device=device)
    vae = None
    if source.decodes:
        own = partial(load_decoder, source, dtype=dtype, device=device, ranks=ranks)
        vae = own(memory=decode_memory, seamless=seamless)
    if family == "latte":
        return LatteLatents(transformer, vae)
    channels = transformer.config.caption_channels
    if source.random_weights:
        text: TextEncoder = RandomText(channels)
    else:  # the largest part comes last: what is wrong with the others is said before
        load = partial(load_text, family, source.text_encoder, dtype=dtype, device=device)
        text = load() if ranks == 1 else SharedText(load, channels, device)
    cls = OpenSoraPipeline if family == "open_sora" else OpenSoraPlanPipeline
    return cls(transformer, text, vae)


def load_decoder(
    source: Source,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    memory: int | None = None,
    seamless: bool = False,
    ranks: int = 1,
) -> Any:
    """The decoder of Open-Sora, Open-Sora-Plan or Latte: the one that `source` names, or the official one.

    Open-Sora-Plan's lies in a folder `vae` beside its transformers.

    Returns
    -------
    VideoDecoder
        Or a video autoencoder of diffusers, where `source.vae` is one.

    Raises
    ------
    FileNotFoundError, ValueError
        It is neither here nor can it be fetched, or it is one of another family.
    """
    family = source.family
    if source.vae is not None and family != "latte" and is_of_diffusers(source.vae):
        return load_vae(source.vae, LATENT_CHANNELS, dtype=dtype, device=device)
    if source.vae is None and source.random_weights:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            vae: Any = _random_decoder(family, dtype, device)
    elif family == "latte":
        vae = _load_images(source.vae or LATTE_ID, dtype, device)
    else:
        place = source.vae or _vae_beside(source.weights) or autoencoders.HUB_IDS[family]
        try:
            vae = autoencoders.load(family, place, dtype=dtype, device=device)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"vae: {error} `--latents-only` needs none.") from error
    return VideoDecoder(vae, memory=memory, seamless=seamless, ranks=ranks)


def _vae_beside(weights: str | None) -> str | None:
    """A folder `vae` in the folder of weights, or beside it."""
    if weights is None:
        return None
    places = (folder / "vae" for folder in (Path(weights), Path(weights).parent))
    return next((str(place) for place in places if place.is_dir()), None)


def _random_decoder(family: str, dtype: torch.dtype, device: torch.device | str) -> Any:
    if family != "latte":
        return autoencoders.random_weights(family, dtype=dtype, device=device)
    with torch.device(device):
        vae: Any = AutoencoderKL(**autoencoders.IMAGES)
    return nn.Module.to(vae, dtype=dtype).eval().requires_grad_(False)


def _load_images(source: str, dtype: torch.dtype, device: torch.device | str) -> Any:
    """Latte's image autoencoder."""
    place: dict[str, Any] = {"pretrained_model_name_or_path": _part(source, "vae")}
    if not Path(source).exists():
        place["subfolder"] = "vae"
    try:
        vae: Any = AutoencoderKL.from_pretrained(**place)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"vae: {source} is no image autoencoder of diffusers here, and could not be fetched ({error}). On a "
            f"machine with a network run `hf download {LATTE_ID} --include 'vae/*' --local-dir Latte-1`, and pass "
            "`--vae Latte-1`."
        ) from error
    return nn.Module.to(vae, device=device, dtype=dtype).eval().requires_grad_(False)


def load_text(
    family: str, source: str | Path | None = None, *, dtype: torch.dtype, device: torch.device | str
) -> T5Text:
    """Load a family's text encoder and its tokenizer from a folder or hub id.

    A folder of a diffusers pipeline, with `tokenizer` and `text_encoder` in it, serves too.

    Raises
    ------
    FileNotFoundError
        It is neither here nor can it be fetched.
    ValueError
        The tokenizer needs a package that is not installed.
    """
    from transformers import AutoTokenizer, PretrainedConfig

    official, cls = _t5(family)
    source = str(source or official)
    try:
        tokenizer = AutoTokenizer.from_pretrained(_part(source, "tokenizer"))
        # Newer transformers say dtype, older ones torch_dtype.
        key = "dtype" if hasattr(PretrainedConfig(), "dtype") else "torch_dtype"
        encoder = cls.from_pretrained(_part(source, "text_encoder"), **{key: dtype})
    except ImportError as error:
        raise ValueError(f"text_encoder: the tokenizer of {source} needs another package: {error}") from error
    except Exception as error:  # transformers lets through what its parsers raise
        _check_memory(error)
        if Path(source).exists():
            raise ValueError(f"text_encoder: {source} cannot be loaded: {_first_line(error)}") from error
        folder = official.split("/")[1]
        raise FileNotFoundError(
            f"text_encoder: {source} is not in the local cache and could not be fetched. On a machine with a network "
            f"run `hf download {official} --local-dir {folder}` (20 GB or more), copy the folder here, and pass "
            f"`--text-encoder {folder}`. `--random-weights` needs none."
        ) from error
    return T5Text(tokenizer, nn.Module.to(encoder, device=device).eval().requires_grad_(False))


def text_encoder_bytes(source: Source, dtype: torch.dtype) -> int:
    """Memory of the text encoder, from its configuration alone; 0 where there is none, or none is found."""
    from transformers import AutoConfig

    if source.random_weights or source.family == "demo":
        return 0
    official, cls = _t5(source.family)
    if source.family == "latte":
        place, folder = _latte_pipeline(source), {"subfolder": "text_encoder"}
    else:
        place, folder = _part(source.text_encoder or official, "text_encoder"), {}
    try:
        config = AutoConfig.from_pretrained(place, **folder)
    except Exception:
        return 0  # loading it will say what is missing or wrong
    with torch.device("meta"):
        encoder = cls(config)
    cast_encoder(encoder, dtype)
    return sum(parameter.nbytes for parameter in encoder.parameters())


def _t5(family: str) -> tuple[str, Any]:
    """The official hub id of a family's text encoder, and its class."""
    from transformers import MT5EncoderModel, T5EncoderModel

    return (MT5_ID, MT5EncoderModel) if family == "open_sora_plan_v120" else (T5_ID, T5EncoderModel)


def _part(source: str, name: str) -> str:
    """The folder `name` of a diffusers pipeline, or the source itself."""
    inner = Path(source) / name
    return str(inner) if inner.is_dir() else source


def _weights(source: Source, size: VideoSize | None) -> str:
    """The checkpoint's folder or hub id; Open-Sora-Plan's has a folder for each size."""
    family = source.family
    name = plan_size_name(family, size)
    if name is None:
        return source.weights or checkpoints.HUB_IDS[family]
    if source.weights is None:
        return f"{PLAN_IDS[family]}/{name}"
    return _part(source.weights, name)


def _check_folder(path: Path) -> None:
    """Raise ValueError unless `path` is a folder of a Latte pipeline or of a demo model, saying what it is."""
    index = path / "model_index.json"
    if index.is_file():
        found = weight_files.read_json(index)
        name = found.get("_class_name") if isinstance(found, dict) else None
        if name != LattePipeline.__name__:
            raise ValueError(f"model: {path} is a diffusers {name!r}, must be a {LattePipeline.__name__}")
    elif not _is_demo(path):
        try:
            families = checkpoints.families_of(weight_files.open_files(*weight_files.weight_files(path)))
        except FileNotFoundError:
            families = ()
        if not families:
            raise ValueError(f"model: {path} holds no Latte pipeline of diffusers, demo model, or weights of a family")
        ours = f"pass `--model {families[0]} --weights {path}`" if families[0] in FAMILIES else "which has no command"
        raise ValueError(f"model: {path} is a checkpoint of {' or '.join(families)}: {ours}")


def _is_demo(folder: Path) -> bool:
    """Whether it holds a demo model: a config.json of transformer, text and scheduler."""
    if not (folder / "config.json").is_file() or (folder / "model_index.json").is_file():
        return False
    config = weight_files.read_json(folder / "config.json")
    return isinstance(config, dict) and "transformer" in config and "text" in config


def _latte_pipeline(source: Source) -> str:
    """The folder or hub id of the whole pipeline."""
    if source.weights is not None and not _is_transformer(source.weights):
        return source.weights
    return LATTE_ID if source.model == "latte" else source.model


def _is_transformer(weights: str) -> bool:
    """Whether Latte's weights are those of the transformer alone."""
    path = Path(weights)
    return path.exists() and not (path / "model_index.json").is_file()


def _load_latte(source: Source, dtype: torch.dtype, device: torch.device | str) -> LattePipeline:
    place, parts = _latte_pipeline(source), {}
    if source.weights is not None and _is_transformer(source.weights):
        parts["transformer"] = checkpoints.load("latte", source.weights, dtype=dtype, device=device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer diffusers say dtype, older ones only know this
            pipe = LattePipeline.from_pretrained(place, torch_dtype=dtype, **parts)
    except Exception as error:  # diffusers lets through what its parts and parsers raise
        _check_memory(error)
        if Path(place).exists():
            raise ValueError(f"model: {place} cannot be loaded by diffusers: {_first_line(error)}") from error
        raise FileNotFoundError(
            f"model: {place!r} is not in the local cache and could not be fetched. On a machine with a network run "
            f"`hf download {LATTE_ID} --local-dir Latte-1`, copy the folder here, and pass "
            "`--model Latte-1`. `--model demo` needs no download."
        ) from error
    return pipe.to(device)


def _check_memory(error: Exception) -> None:
    """Raise the error itself where it is one of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        raise error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
