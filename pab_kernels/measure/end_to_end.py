"""From a prompt to frames: text encoder, denoising, decoder and video file at their real sizes, on random weights."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from pab_kernels import figures
from pab_kernels.config import PABConfig
from pab_kernels.models import autoencoders, checkpoints
from pab_kernels.pipelines import generate as generation
from pab_kernels.pipelines import outputs
from pab_kernels.pipelines.decoding import VideoDecoder
from pab_kernels.pipelines.open_sora import OpenSoraPipeline
from pab_kernels.pipelines.open_sora_plan import OpenSoraPlanPipeline
from pab_kernels.pipelines.sizes import VideoSize
from pab_kernels.pipelines.text import RandomText, T5Text, TextEncoder
from pab_kernels.runtime.accelerate import accelerate
from pab_kernels.workloads import Workload

PROMPT = "a dog runs along a wide beach at sunset while long waves roll in and two people fly a red kite far behind it"
PARTS = ("text", "denoising", "decoding", "writing")


class Words:
    """A tokenizer with a token a word: random weights have no vocabulary of their own."""

    def __call__(
        self, texts: Sequence[str], padding: str | None = None, max_length: int = 0, return_tensors: str | None = None
    ) -> dict[str, Any]:
        """As the tokenizers of transformers, as far as `T5Text` calls them."""
        ids = [[2 + sum(map(ord, word)) % 1000 for word in text.split()] + [1] for text in texts]
        if padding is None:
            return {"input_ids": ids}
        rows = [row + [0] * (max_length - len(row)) for row in ids]
        mask = [[1] * len(row) + [0] * (max_length - len(row)) for row in ids]
        return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


def random_text(channels: int, *, dtype: torch.dtype, device: torch.device) -> T5Text:
    """T5 XXL with random weights where `channels` are its 4096; otherwise one as small as that."""
    from transformers import T5Config, T5EncoderModel

    large: dict[str, Any] = {"d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    small: dict[str, Any] = {"d_kv": 4, "d_ff": 4 * channels, "num_layers": 2, "num_heads": 2}
    shape = large if channels == 4096 else small
    config = T5Config(vocab_size=32128, d_model=channels, feed_forward_proj="gated-gelu", **shape)
    with torch.device("meta"):
        encoder: Any = T5EncoderModel(config)
    encoder = encoder.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in encoder.parameters():
        parameter.normal_(0, 0.02, generator=generator)
    return T5Text(Words(), encoder)


@dataclasses.dataclass(frozen=True)
class EndToEnd:
    """Seconds of each of `PARTS` in every timed run; `frames` of the video; the first run, which compiles, apart."""

    frames: int
    first: dict[str, float]
    runs: tuple[dict[str, float], ...]
    peak_bytes: int | None

    @property
    def median(self) -> dict[str, float]:
        """The run whose whole, writing left out, is in the middle."""
        return sorted(self.runs, key=to_frames)[len(self.runs) // 2]


def to_frames(parts: dict[str, float]) -> float:
    """Seconds from the prompt to frames in host memory."""
    return sum(seconds for part, seconds in parts.items() if part != "writing")


TINY: dict[str, dict[str, Any]] = {
    "open_sora": {
        "vae_temporal": {"filters": 8, "num_res_blocks": 1, "num_groups": 4},
        "spatial": {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4},
    },
    "open_sora_plan_v110": {"hidden_size": 32, "hidden_size_mult": (1, 1, 1, 1), "num_res_blocks": 1},
    "open_sora_plan_v120": {"hidden_size": 32, "hidden_size_mult": (1, 1, 1, 1), "num_res_blocks": 1},
}
"""Decoders to try it out."""


def video_size(workload: Workload, tiny: bool) -> VideoSize:
    """The size of a workload's video; of a tiny one that of its latents."""
    if not tiny:
        return VideoSize(*workload.pixels, workload.latent)
    frames, height, width = workload.latent
    made = frames // 5 * 17 if workload.family == "open_sora" else 4 * (frames - 1) + 1
    return VideoSize(made, 8 * height, 8 * width, workload.latent)


def load(
    workload: Workload, *, dtype: torch.dtype, device: torch.device, tiny: bool = False, with_text: bool = True
) -> Any:
    """The family's pipeline with random weights in all of its parts; `with_text` False leaves the text encoder out.

    Raises
    ------
    ValueError
        For Latte, whose text encoder and decoder diffusers' pipeline has.
    """
    family = workload.family
    if family not in TINY:
        raise ValueError(f"workload: got {workload.name!r}, must be of {', '.join(TINY)} from end to end")
    transformer: Any = checkpoints.random_weights(family, dtype=dtype, device=device, **workload.model)
    config = TINY[family] if tiny else {}
    decoder = VideoDecoder(autoencoders.random_weights(family, dtype=dtype, device=device, **config))
    channels = transformer.config.caption_channels
    text: TextEncoder = RandomText(channels)
    if with_text:
        text = random_text(channels, dtype=dtype, device=device)
    cls = OpenSoraPipeline if family == "open_sora" else OpenSoraPlanPipeline
    return cls(transformer, text, decoder)


def measure(pipe: Any, request: generation.Request, config: PABConfig | None, repeats: int) -> EndToEnd:
    """Time whole runs behind one handle; the first, which compiles, captures and allocates, does not count.

    Where no ffmpeg is installed nothing is written, and "writing" takes no time.
    """
    device, runs, frames = pipe.device, [], 0
    writes = figures.why_no_mp4() is None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with (
        tempfile.TemporaryDirectory() as folder,
        nullcontext() if config is None else accelerate(pipe, config),
    ):
        for i in range(repeats + 1):
            pipe.text_seconds = 0.0
            start = time.perf_counter()
            _, hidden = generation.denoise(pipe, request)
            assert hidden is not None
            assert request.size is not None
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            denoised = time.perf_counter()
            file = Path(folder) / f"{i}.mp4"
            with outputs.video_writers(pipe, file, 1) if writes else nullcontext([None]) as sinks:
                frames = len(pipe.decode_one(hidden[0], request.size, sinks[0]).frames)
                decoded = time.perf_counter()
            runs.append(
                {
                    "text": pipe.text_seconds,
                    "denoising": denoised - start - pipe.text_seconds,
                    "decoding": decoded - denoised,
                    "writing": time.perf_counter() - decoded,
                }
            )
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return EndToEnd(frames, runs[0], tuple(runs[1:]), peak)
