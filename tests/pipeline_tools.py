"""Tiny transformers, a tiny T5 and a tokenizer of whole words, for the tests of the pipelines and the command line."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from pab_kernels.models import checkpoints
from pab_kernels.pipelines import loading
from pab_kernels.pipelines.demo import DemoPipeline, demo_scheduler, demo_transformer
from pab_kernels.pipelines.demo_text import TextEmbedding
from pab_kernels.pipelines.latte import LatteLatents
from pab_kernels.pipelines.open_sora import OpenSoraPipeline
from pab_kernels.pipelines.open_sora_plan import OpenSoraPlanPipeline
from pab_kernels.pipelines.text import T5Text

CAPTION = 16
WORDS = ("a", "red", "blue", "cat", "dog", "runs", "over", "the", "hill", "at", "night", "aesthetic", "score")
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 12, "cross_attention_dim": 24, "num_layers": 2}
TINY: dict[str, dict[str, Any]] = {
    "open_sora": {"depth": 2, "hidden_size": 24, "num_heads": 2, "caption_channels": CAPTION},
    "latte": {**_HEADS, "sample_size": 8, "video_length": 5, "caption_channels": CAPTION},
    "open_sora_plan_v110": {**_HEADS, "sample_size": (8, 8), "video_length": 5, "caption_channels": CAPTION},
    "open_sora_plan_v120": {**_HEADS, "sample_size": (8, 8), "sample_size_t": 5, "caption_channels": CAPTION},
}
"""Config values of each family's tiny transformer."""

SMALLEST: dict[str, Any] = {"resolution": "144p", "aspect": "1:1", "duration": 17}
"""Open-Sora's smallest video: latents 5 x 24 x 24."""

FAMILIES = ["open_sora", "open_sora_plan_v110", "open_sora_plan_v120"]
"""Those with a pipeline of their own and a text encoder."""

assert tuple(TINY) == loading.FAMILIES


def tiny_transformer(family: str, **overrides: Any) -> Any:
    """Random weights, of which the text's are large enough to matter."""
    model: Any = checkpoints.random_weights(family, dtype=torch.float32, device="cpu", **{**TINY[family], **overrides})
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.normal_(0, 0.15, generator=generator)
    if family == "open_sora":
        model.y_embedder.y_embedding.normal_(0, 1, generator=generator)
    return model


def tiny_text(channels: int = CAPTION) -> T5Text:
    """A T5 of one layer. Each word is a token; an end-of-text token follows."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(vocabulary), d_model=channels, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return T5Text(tokenizer, T5EncoderModel(config).eval().requires_grad_(False))


def save_text(text: T5Text, folder: Path) -> None:
    """As a folder that transformers loads."""
    text.tokenizer.save_pretrained(folder)
    text.encoder.save_pretrained(folder)


def tiny_pipeline(family: str, vae: Any = None, **overrides: Any) -> Any:
    """Open-Sora or Open-Sora-Plan with the tiny T5; Latte with random text."""
    if family == "latte":
        return LatteLatents(tiny_transformer(family, **overrides))
    cls = OpenSoraPipeline if family == "open_sora" else OpenSoraPlanPipeline
    return cls(tiny_transformer(family, **overrides), tiny_text(), vae)


def tiny_demo() -> DemoPipeline:
    """One pair of blocks on two frames of 8 x 8 pixels; random weights."""
    torch.manual_seed(0)
    transformer = demo_transformer(pairs=1, heads=1, size=8, frames=2)
    for parameter in transformer.parameters():
        parameter.data.normal_(0, 0.15)
    return DemoPipeline(
        transformer.eval().requires_grad_(False), demo_scheduler(), TextEmbedding().requires_grad_(False)
    )


def run(pipe: Any, prompt: Any, **settings: Any) -> torch.Tensor:
    """Six steps at the smallest size."""
    size = SMALLEST if pipe.family == "open_sora" else {}
    return pipe(prompt, **{**size, "num_inference_steps": 6, "guidance_scale": 3.0, **settings})


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Whether the relative difference is below the tolerance."""
    return float((a - b).norm() / b.norm()) < tolerance
