"""Finding a pipeline's parts, and decoders."""

import io
import json
from typing import Any

import pytest
import sentencepiece
import torch
from diffusers import AutoencoderKL, AutoencoderKLCogVideoX, LattePipeline
from safetensors.torch import save_file

from pab_kernels.pipelines.demo import DemoPipeline, demo_scheduler, demo_transformer
from pab_kernels.pipelines.demo_text import TextEmbedding
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
    source = Source(family, weights, str(tmp_path / "t5"), latents_only=True)
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
    source = Source("open_sora_plan_v120", str(tmp_path / "all"), str(tmp_path), latents_only=True)
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
    assert video.dtype == torch.uint8
    raw = vae.decode(hidden[1:] / 0.18215).sample  # type: ignore[operator]
    expected = (raw[0].permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1)
    assert (video[1].float() - expected[:17] * 255).abs().max() < 0.51


def test_decoders_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="AutoencoderKLCogVideoX has 5 latent channels, must have 4"):
        tiny_pipeline("open_sora", vae=video_vae(5))
    image_vae: Any = AutoencoderKL(block_out_channels=(8,), norm_num_groups=2)
    image_vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="AutoencoderKL decodes images"):
        load_vae(tmp_path / "vae", 4, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="vae: got None"):
        tiny_pipeline("open_sora").decode(torch.zeros(1, 4, 5, 24, 24), open_sora_size("144p", "1:1", 17))


# What is given where something else is wanted


def _pipeline_of(name: str, folder) -> str:
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
    return str(folder)


def _demo(folder) -> str:
    DemoPipeline(demo_transformer(1, 1, 16, 5), demo_scheduler(), TextEmbedding()).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_weights_given_as_the_model_is_named(family, tmp_path):
    weights = _checkpoint(family, tmp_path / "weights")
    for given in (weights, f"{weights}/model.safetensors", str(tmp_path)):
        with pytest.raises(ValueError, match=f"is a checkpoint of {family}: pass `--model {family} --weights {given}`"):
            Source(given)


def test_other_folders_given_as_the_model_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="is a diffusers 'WanPipeline', must be a LattePipeline"):
        Source(_pipeline_of("WanPipeline", tmp_path / "wan"))
    with pytest.raises(ValueError, match="empty holds no Latte pipeline of diffusers, demo model, or weights"):
        Source(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"notes\.txt must end in one of"):
        Source(str(tmp_path / "notes.txt"))
    (tmp_path / "wan" / "model_index.json").write_text("[")
    with pytest.raises(ValueError, match=r"model_index\.json cannot be read as JSON"):
        Source(str(tmp_path / "wan"))


def test_weights_that_the_model_does_not_take_are_refused(tmp_path):
    weights, demo = _checkpoint("open_sora", tmp_path / "weights"), _demo(tmp_path / "demo")
    for model in ("demo", demo):
        with pytest.raises(ValueError, match=r"weights: got .* for a demo model, whose folder must be given"):
            Source(model, weights=demo)
    for given in (weights, f"{weights}/model.safetensors"):
        with pytest.raises(ValueError, match="is a checkpoint of family 'open_sora', not 'latte'"):
            load_pipeline(Source("latte", given), None, dtype=torch.float32, device="cpu")


def test_latte_takes_a_transformer_from_elsewhere(tmp_path, monkeypatch):
    seen: dict[str, Any] = {}

    def from_pretrained(place, torch_dtype, transformer):
        seen.update(place=place, transformer=transformer)
        raise OSError("not here")

    monkeypatch.setattr(LattePipeline, "from_pretrained", from_pretrained)
    weights = _checkpoint("latte", tmp_path / "weights")
    with pytest.raises(FileNotFoundError, match="model: 'maxin-cn/Latte-1' is not in the local cache"):
        load_pipeline(Source("latte", weights), None, dtype=torch.float32, device="cpu")
    expected = tiny_transformer("latte").state_dict()
    found = seen["transformer"].state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    pipeline = _pipeline_of("LattePipeline", tmp_path / "pipeline")
    with pytest.raises(ValueError, match="cannot be loaded by diffusers: OSError: not here"):
        load_pipeline(Source(pipeline, weights), None, dtype=torch.float32, device="cpu")
    assert seen["place"] == pipeline


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", bytes(100), b'{"transformer": {}, "text": {}}'])
def test_a_damaged_demo_model_is_refused_with_the_file(file, content, tmp_path):
    folder = _demo(tmp_path / "demo")
    (tmp_path / "demo" / file).write_bytes(content)
    with pytest.raises(ValueError, match=file.replace(".", r"\.") + "|demo holds no Latte pipeline"):
        load_pipeline(Source(folder), None, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("transformer", {"num_layers": 10**9}),
        ("transformer", {"num_attention_heads": 1.5}),
        ("transformer", {"unknown": 1}),
        ("transformer", {"sample_size": 20}),
        ("text", {"length": 10**9}),
        ("text", {"channels": "64"}),
        ("text", {"vocabulary": "abc"}),
        ("text", {"unknown": 1}),
        ("scheduler", {"num_train_timesteps": "x"}),
        ("scheduler", {"beta_schedule": "none"}),
    ],
)
def test_a_demo_models_settings_are_checked(part, changes, tmp_path):
    folder = tmp_path / "demo"
    _demo(folder)
    config = json.loads((folder / "config.json").read_text())
    config[part] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    if changes == {"sample_size": 20}:  # a table of positions, which is in no file
        load_pipeline(Source(str(folder)), None, dtype=torch.float32, device="cpu")
        return
    with pytest.raises(ValueError, match=r"config\.json"):
        load_pipeline(Source(str(folder)), None, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"model_type": 3}'])
def test_damaged_parts_are_named_and_not_called_missing(content, tmp_path):
    weights = _checkpoint("open_sora", tmp_path / "weights")
    part = tmp_path / "part"
    part.mkdir()
    (part / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"text_encoder: {part} cannot be loaded: "):
        load_pipeline(
            Source("open_sora", weights, str(part), latents_only=True), None, dtype=torch.float32, device="cpu"
        )
    assert text_encoder_bytes(Source("open_sora", weights, str(part)), torch.float32) == 0
    with pytest.raises(ValueError, match=f"vae: {part}"):
        load_vae(part, 4, dtype=torch.float32, device="cpu")
    (part / "model_index.json").write_text(json.dumps({"_class_name": "LattePipeline", "vae": 3}))
    with pytest.raises(ValueError, match=f"model: {part} cannot be loaded by diffusers: "):
        load_pipeline(Source(str(part)), None, dtype=torch.float32, device="cpu")
