"""Text encoders."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import MT5Config, MT5EncoderModel

from pab_kernels.pipelines import text_to_video
from pab_kernels.pipelines.loading import Source, load_text, text_encoder_bytes
from pab_kernels.pipelines.sizes import open_sora_size
from pab_kernels.pipelines.text import RandomText, T5Text, cast_encoder
from tests.pipeline_tools import CAPTION, FAMILIES, SMALLEST, save_text, tiny_pipeline, tiny_text

PROMPT = ["a red cat"]


def test_random_text_depends_on_the_prompt_alone():
    text = RandomText(8)
    embeddings, mask = text.encode(["a cat", "a red dog"], 10)
    assert torch.equal(text.encode(["a red dog"], 10)[0][0], embeddings[1])
    assert mask.sum(1).tolist() == [3, 4]
    with pytest.raises(ValueError, match="has 3 tokens, must have at most 2"):
        text.encode(["a cat"], 2)


# Half precision: T5's feed-forward output leaves the range of float16.


def wide(kind: str) -> T5Text:
    """A T5 whose feed-forward output passes 65504, as that of the large ones does."""
    text = tiny_text()
    if kind == "mt5":
        torch.manual_seed(0)
        config = MT5Config(vocab_size=len(text.tokenizer), d_model=CAPTION, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
        text = T5Text(text.tokenizer, MT5EncoderModel(config).eval().requires_grad_(False))
    factors = {"wi": 300.0, "wi_0": 10.0, "wi_1": 10.0, "wo": 300.0 if kind == "t5" else 3000.0}
    for name, parameter in text.encoder.named_parameters():
        parameter.mul_(factors.get(name.split(".")[-2], 1.0))
    return text


def error(text: T5Text, want: torch.Tensor) -> float:
    return float((text.encode(PROMPT, 8)[0].float() - want).norm() / want.norm())


def loaded(text: T5Text, folder: Any, kind: str, dtype: torch.dtype) -> T5Text:
    save_text(text, folder)
    return load_text("open_sora_plan_v120" if kind == "mt5" else "open_sora", folder, dtype=dtype, device="cpu")


def through(*dtypes: torch.dtype) -> Callable[[Any], None]:
    def cast(encoder: Any) -> None:
        for dtype in dtypes:
            cast_encoder(encoder, dtype)

    return cast


CASTS: dict[str, Callable[[Any], Any]] = {
    "to": through(torch.float16),
    "the module's to": lambda encoder: nn.Module.to(encoder, dtype=torch.float16, device="cpu"),
    "half": lambda encoder: encoder.half(),
    "bfloat16 first": through(torch.bfloat16, torch.float16),
    "there and back": through(torch.float16, torch.float32, torch.float16),
}


@pytest.mark.parametrize("kind", ["t5", "mt5"])
@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_to_float16_is_as_good_as_loading_in_float16(cast, kind, tmp_path):
    text = wide(kind)
    want = text.encode(PROMPT, 8)[0].float()
    as_loaded = error(loaded(text, tmp_path, kind, torch.float16), want)
    assert as_loaded < 5e-3
    CASTS[cast](text.encoder)
    limit = 2e-2 if cast == "bfloat16 first" else 10 * as_loaded  # what bfloat16 has rounded stays so
    assert error(text, want) < limit
    dtypes = {name.split(".")[-2]: parameter.dtype for name, parameter in text.encoder.named_parameters()}
    assert dtypes["wo"] == torch.float32
    assert dtypes["q"] == torch.float16


@pytest.mark.parametrize("kind", ["t5", "mt5"])
def test_a_bfloat16_encoder_is_as_it_is_loaded(kind, tmp_path):
    """bfloat16 has the range; transformers keeps nothing back."""
    text = wide(kind)
    want = loaded(text, tmp_path, kind, torch.bfloat16)
    cast_encoder(text.encoder, torch.float16)
    cast_encoder(text.encoder, torch.float32)
    cast_encoder(text.encoder, torch.bfloat16)
    assert {p.dtype for p in text.encoder.parameters()} == {p.dtype for p in want.encoder.parameters()}
    assert error(text, text.encode(PROMPT, 8)[0].float()) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pipeline_in_float16_keeps_the_weights_of_its_text_encoder_exactly(family):
    pipe = tiny_pipeline(family)
    before = {name: p.clone() for name, p in pipe.text_encoder.named_parameters() if ".wo." in name}
    assert pipe.to(torch.float16) is pipe
    after = dict(pipe.text_encoder.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert pipe.dtype == torch.float16
    assert pipe.to(torch.float32).text.encode(PROMPT, 8)[0].dtype == torch.float32


def test_memory_of_a_text_encoder_in_float16_counts_what_stays_in_float32(tmp_path):
    save_text(tiny_text(), tmp_path)
    source = Source("open_sora", None, str(tmp_path))
    held = sum(
        p.nbytes for p in load_text("open_sora", tmp_path, dtype=torch.float16, device="cpu").encoder.parameters()
    )
    assert text_encoder_bytes(source, torch.float16) == held


def test_encoding_in_inference_mode_leaves_ordinary_tensors():
    text = wide("t5")
    text.encoder.half()
    with torch.inference_mode():
        text.encode(PROMPT, 8)
    assert not any(parameter.is_inference() for parameter in text.encoder.parameters())


@pytest.mark.parametrize("offload", [False, True])
def test_an_offloaded_encoder_is_on_the_host_before_the_transformer_runs(offload, monkeypatch):
    pipe, seen = tiny_pipeline("open_sora"), []

    def cast(encoder: Any, to: Any) -> None:
        assert encoder is pipe.text_encoder
        seen.append("text to the host" if to == "cpu" else f"text to {to}")

    monkeypatch.setattr(text_to_video, "cast_encoder", cast)
    pipe.transformer.register_forward_pre_hook(lambda *_: seen.append("step"))
    pipe.offload_text = offload
    pipe("a red cat", size=open_sora_size(**SMALLEST), num_inference_steps=2)
    moves = ["text to cpu", "text to the host"]
    assert seen == [*(moves if offload else []), "step", "step"]
