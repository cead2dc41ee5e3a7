"""Finding a pipeline's parts, and decoders."""

import io
import json
from typing import Any

import pytest
import sentencepiece
import torch
from diffusers import AutoencoderKL, AutoencoderKLCogVideoX
from safetensors.torch import save_file

from pab_kernels.pipelines.loading import Source, load_pipeline, load_text, resolve_model, text_encoder_bytes
from pab_kernels.pipelines.sizes import VideoSize, open_sora_size
from pab_kernels.pipelines.vae import load_vae
from tests.pipeline_tools import FAMILIES, TINY, run, save_text, tiny_pipeline, tiny_text, tiny_transformer


def _checkpoint(family: str, folder) -> str:
    """A tiny checkpoint with its config.json; returns its path."""
    folder.mkdir()
    model = tiny_transformer(family)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(TINY[family]))
    return str(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pipeline_loads_from_folders(family, tmp_path):
    weights = _checkpoint(family, tmp_path / "weights")
    save_text(tiny_text(), tmp_path / "t5")
    source = Source(family, weights, str(tmp_path / "t5"))
    pipe: Any = load_pipeline(source, None, dtype=torch.float32, device="cpu")
    assert torch.equal(run(pipe, "a cat"), run(tiny_pipeline(family), "a cat"))
    assert text_encoder_bytes(source, torch.bfloat16) == 2 * sum(p.numel() for p in pipe.text_encoder.parameters())
    assert pipe.tokenizer is not None
    assert next(pipe.to(torch.bfloat16).text_encoder.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["open_sora", "open_sora_plan_v120"])
def test_a_text_encoder_loads_from_the_sentencepiece_file_of_its_release(family, tmp_path):
    """The released T5 and mT5 have no tokenizer.json, so that transformers needs sentencepiece and protobuf."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat runs over the hill", "a dog runs at night"] * 50),
        model_writer=model,
        vocab_size=21,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    tiny_text().encoder.save_pretrained(tmp_path)
    text = load_text(family, tmp_path, dtype=torch.float32, device="cpu")
    ids = text.tokenizer("a cat")["input_ids"]
    assert text.tokenizer.convert_ids_to_tokens(ids)[-1] == "</s>"
    assert text.tokenizer.decode(ids, skip_special_tokens=True) == "a cat"


def test_plan_weights_lie_in_a_folder_for_each_size(tmp_path):
    (tmp_path / "all").mkdir()
    _checkpoint("open_sora_plan_v120", tmp_path / "all" / "29x480p")
    save_text(tiny_text(), tmp_path / "text_encoder")
    save_text(tiny_text(), tmp_path / "tokenizer")
    size = VideoSize(29, 480, 640, (8, 60, 80))
    source = Source("open_sora_plan_v120", str(tmp_path / "all"), str(tmp_path))
    assert load_pipeline(source, size, dtype=torch.float32, device="cpu") is not None


def test_a_checkpoint_of_another_family_is_refused(tmp_path):
    weights = _checkpoint("open_sora", tmp_path / "weights")
    with pytest.raises(ValueError, match="is a checkpoint of family 'open_sora', not 'open_sora_plan_v110'"):
        load_pipeline(Source("open_sora_plan_v110", weights), None, dtype=torch.float32, device="cpu")


def test_missing_parts_say_what_to_download(tmp_path):
    absent = str(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"hf download google/mt5-xxl --local-dir mt5-xxl` .* `--text-encoder"):
        load_text("open_sora_plan_v120", absent, dtype=torch.float32, device="cpu")
    with pytest.raises(FileNotFoundError, match="absent"):
        load_pipeline(Source("open_sora", absent), None, dtype=torch.float32, device="cpu")
    with pytest.raises(FileNotFoundError, match=r"vae: .*absent.* `hf download"):
        load_vae(absent, 4, dtype=torch.float32, device="cpu")
    with pytest.raises(FileNotFoundError, match="hf download maxin-cn/Latte-1"):
        load_pipeline(Source("latte", absent), None, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "open_sora", "weights": "x", "random_weights": True}, "random_weights: .* must be given alone"),
        ({"model": "demo", "random_weights": True}, "random_weights: got it for 'demo'"),
        ({"model": "latte", "vae": "x"}, "vae, text_encoder: got one for 'latte'"),
        ({"model": "opensora"}, "model: got 'opensora', must be demo, open_sora"),
    ],
)
def test_sources_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Source(**settings)


def test_plan_versions_are_told_by_the_size():
    assert resolve_model("open_sora_plan", "65x512x512") == "open_sora_plan_v110"
    assert resolve_model("open_sora_plan", "93x720p") == "open_sora_plan_v120"
    assert resolve_model("open_sora_plan", None) == "open_sora_plan_v120"


# Decoding


def video_vae(latent_channels: int = 4) -> Any:
    torch.manual_seed(0)
    return AutoencoderKLCogVideoX(
        latent_channels=latent_channels, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
    )


def test_a_given_decoder_makes_a_video(tmp_path):
    video_vae().save_pretrained(tmp_path / "vae")
    vae = load_vae(tmp_path, 4, dtype=torch.float32, device="cpu")
    pipe = tiny_pipeline("open_sora_plan_v120", vae=vae)
    size = pipe.size()
    hidden = torch.randn(2, 4, *size.latent)
    video = pipe.decode(hidden, size)
    assert video.shape == (2, 17, 64, 64, 3)
    assert 0 <= video.min() < video.max() <= 1
    raw = vae.decode(hidden[1:] / 0.18215).sample  # type: ignore[operator]
    expected = (raw[0].permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(video[1], expected[:17], atol=1e-5)


def test_decoders_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="AutoencoderKLCogVideoX has 5 latent channels, must have 4"):
        tiny_pipeline("open_sora", vae=video_vae(5))
    image_vae: Any = AutoencoderKL(block_out_channels=(8,), norm_num_groups=2)
    image_vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="AutoencoderKL decodes images"):
        load_vae(tmp_path / "vae", 4, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="vae: got None"):
        tiny_pipeline("open_sora").decode(torch.zeros(1, 4, 5, 24, 24), open_sora_size("144p", "1:1", 17))
