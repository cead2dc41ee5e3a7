"""Official classes are known by their structure; `official_classes.py` has stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from pab_kernels import PABConfig, accelerate
from pab_kernels.models.hosts import OpenSoraPlanV110, OpenSoraPlanV120, STDiT3
from pab_kernels.plain import PlainPAB
from tests.models.official_classes import (
    DIM,
    FRAMES,
    HEAD_DIM,
    HEADS,
    LAYERS,
    SIZE,
    TEXT,
    AttnProcessor2_0,
    LatteT2V,
    OfficialSTDiT3,
    OpenSoraAttention,
    OpenSoraT2V,
    Part,
    PatchEmbed,
    PatchEmbed2D,
)

TIMESTEPS = [900.0, 700.0, 600.0, 500.0, 400.0, 50.0]
PAB = PABConfig(
    spatial_broadcast=True, spatial_threshold=(100, 800), spatial_range=2,
    temporal_broadcast=True, temporal_threshold=(100, 800), temporal_range=3,
    cross_broadcast=True, cross_threshold=(100, 800), cross_range=4,
)  # fmt: skip


HOSTS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "STDiT3": (
        OfficialSTDiT3,
        STDiT3,
        {"depth": LAYERS, "hidden_size": DIM, "num_heads": HEADS, "model_max_length": 7},
    ),
    "LatteT2V": (LatteT2V, OpenSoraPlanV110, {"sample_size": (8, 8), "video_length": FRAMES}),
    "OpenSoraT2V": (OpenSoraT2V, OpenSoraPlanV120, {"sample_size": SIZE, "sample_size_t": FRAMES}),
}


def pair(family: str) -> tuple[Any, Any]:
    """The stand-in and our host with the same random weights."""
    official_class, host_class, config = HOSTS[family]
    if host_class is not STDiT3:
        config = {
            **config, "num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM, "cross_attention_dim": DIM,
            "num_layers": LAYERS,
        }  # fmt: skip
    torch.manual_seed(0)
    host = host_class(caption_channels=TEXT, **config)
    for parameter in host.parameters():
        nn.init.normal_(parameter, std=0.3)
    official = official_class()
    official.load_state_dict(host.state_dict())
    buffers = dict(official.named_buffers())
    for name, value in host.named_buffers():
        if name in buffers:
            buffers[name].copy_(value)
    return official.eval().requires_grad_(False), host.eval().requires_grad_(False)


def inputs(family: str) -> tuple[Tensor, dict[str, Any], dict[str, Any]]:
    """Latents, and the other arguments of the stand-in and of our host."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, FRAMES, *SIZE, generator=generator)
    text = torch.randn(2, 1, 7, TEXT, generator=generator)
    mask = torch.tensor([[1] * 7, [1] * 3 + [0] * 4])
    if family == "STDiT3":
        size = {"fps": torch.tensor([24.0]), "height": torch.tensor([64.0]), "width": torch.tensor([96.0])}
        given: dict[str, Any] = {"y": text, "mask": mask, **size}
        return latents, {**given, "all_timesteps": TIMESTEPS}, given
    given = {"encoder_hidden_states": text, "encoder_attention_mask": mask, "return_dict": False}
    extra: dict[str, Any] = {"attention_mask": torch.ones(2, FRAMES, *SIZE)}
    if family == "LatteT2V":
        extra["all_timesteps"] = torch.tensor(TIMESTEPS)
    return latents, {**given, **extra}, given


def run(model: Any, latents: Tensor, given: dict[str, Any]) -> Tensor:
    steps = []
    for t in TIMESTEPS:
        out = model(latents, timestep=torch.full((2,), t), **given)
        latents = latents - 0.1 * (out if isinstance(out, Tensor) else out[0])[:, :4]
        steps.append(latents)
    return torch.stack(steps)


def close(actual: Tensor, expected: Tensor) -> None:
    error = (actual - expected).norm() / expected.norm()
    assert error < 1e-5, f"relative error {error:.1e}"


@pytest.mark.parametrize("family", HOSTS)
def test_official_structure_gives_our_hosts_numbers(family: str) -> None:
    official, host = pair(family)
    latents, theirs, ours = inputs(family)
    with accelerate(official, PABConfig()) as handle:
        handle.begin(TIMESTEPS)
        close(run(official, latents, theirs), run(host, latents, ours))
    with PlainPAB(host, PAB) as plain:
        plain.begin(TIMESTEPS)
        expected = run(host, latents, ours)
    before = {name: value.clone() for name, value in official.state_dict().items()}
    with accelerate(official, PAB) as handle:
        handle.begin(TIMESTEPS)
        close(run(official, latents, theirs), expected)
    assert all(torch.equal(value, before[name]) for name, value in official.state_dict().items())
    assert (expected - run(host, latents, ours)).norm() > 1e-3 * expected.norm(), "the config must really broadcast"


def test_text_may_lack_the_dimension_of_prompts_as_in_latte() -> None:
    official, host = pair("LatteT2V")
    latents, _, given = inputs("LatteT2V")
    expected = run(host, latents, {**given, "encoder_attention_mask": None})
    text = given["encoder_hidden_states"][:, 0]
    with accelerate(official, PABConfig()) as handle:
        handle.begin(TIMESTEPS)
        close(run(official, latents, {"encoder_hidden_states": text, "return_dict": False}), expected)


def test_the_official_rotation_is_left_as_it_was() -> None:
    official, _ = pair("OpenSoraT2V")
    latents, given, _ = inputs("OpenSoraT2V")
    with accelerate(official, PABConfig()) as handle:
        handle.begin(TIMESTEPS)
        run(official, latents, given)
    assert official.transformer_blocks[0].attn1.processor.rope.asked == 0


def at(model: Any, path: str) -> Any:
    for name in path.split("."):
        model = getattr(model, name)
    return model


MISSING = [
    ("STDiT3", "x_embedder.proj"),
    ("STDiT3", "input_sq_size"),
    ("STDiT3", "rope.freqs"),
    ("STDiT3", "spatial_blocks.1.attn.q_norm"),
    ("STDiT3", "temporal_blocks.0.cross_attn.kv_linear"),
    ("LatteT2V", "adaln_single"),
    ("LatteT2V", "pos_embed.base_size"),
    ("LatteT2V", "transformer_blocks.1.norm1"),
    ("LatteT2V", "transformer_blocks.1.attn1.heads"),
    ("STDiT3", "spatial_blocks.0.attn.num_heads"),
    ("LatteT2V", "temp_pos_embed"),
    ("LatteT2V", "caption_projection"),
    ("LatteT2V", "temporal_transformer_blocks.1.attn1.to_v"),
    ("LatteT2V", "transformer_blocks.0.attn2.processor"),
    ("OpenSoraT2V", "pos_embed.use_abs_pos"),
    ("OpenSoraT2V", "transformer_blocks.0.attn1.processor.rope"),
    ("OpenSoraT2V", "transformer_blocks.0.attn1.processor.rope.interpolation_scale_h"),
    ("OpenSoraT2V", "transformer_blocks.1.ff"),
]


def storages(model: nn.Module) -> int:
    return len({parameter.untyped_storage().data_ptr() for parameter in model.parameters()})


@pytest.mark.parametrize(("family", "path"), MISSING)
def test_the_first_missing_attribute_is_named(family: str, path: str) -> None:
    official, _ = pair(family)
    parent, _, name = path.rpartition(".")
    delattr(at(official, parent) if parent else official, name)
    with pytest.raises(TypeError, match=rf"\.{path}: missing"):
        accelerate(official, PABConfig())
    assert storages(official) == len(list(official.parameters()))


class Renamed(AttnProcessor2_0):
    """A processor that is not the official one."""


class KVCompressAttention(OpenSoraAttention):
    """An attention that is not the official one."""


def other_processor(model: Any) -> None:
    model.transformer_blocks[1].attn1.processor = Renamed()


SPOILED: list[tuple[str, str, Callable[[Any], Any]]] = [
    ("LatteT2V", "transformer_blocks.1.attn1.processor: is a Renamed", other_processor),
    ("OpenSoraT2V", "transformer_blocks.1.attn1.processor: is a Renamed", other_processor),
    ("LatteT2V", "use_rope: is True", lambda m: setattr(m.transformer_blocks[0].attn1.processor, "use_rope", True)),
    ("OpenSoraT2V", "use_rope: is 0", lambda m: setattr(m.transformer_blocks[1].attn1.processor, "use_rope", 0)),
    (
        "LatteT2V",
        "compress_kv_factor",
        lambda m: setattr(m.temporal_transformer_blocks[1].attn1.processor, "compress_kv_factor", (2,)),
    ),
    ("LatteT2V", "blocks.1: has a forward hook", lambda m: m.transformer_blocks[1].register_forward_hook(print)),
    ("LatteT2V", "residual_connection", lambda m: setattr(m.transformer_blocks[0].attn2, "residual_connection", True)),
    ("OpenSoraT2V", "downsampler: is set", lambda m: setattr(m.transformer_blocks[1].attn1, "downsampler", Part())),
    ("OpenSoraT2V", "must be a plain PatchEmbed2D", lambda m: setattr(m, "pos_embed", PatchEmbed())),
    ("LatteT2V", "pos_embed: is a PatchEmbed2D", lambda m: setattr(m, "pos_embed", PatchEmbed2D())),
    ("LatteT2V", "manager.sp_size: is 2", lambda m: setattr(m, "parallel_manager", Part(cp_size=1, sp_size=2))),
    ("STDiT3", "parallel_manager.cp_size: is 2", lambda m: setattr(m, "parallel_manager", Part(cp_size=2, sp_size=1))),
    ("STDiT3", "enable_sequence_parallelism", lambda m: setattr(m, "enable_sequence_parallelism", True)),
    ("STDiT3", "skip_y_embedder", lambda m: setattr(m.config, "skip_y_embedder", True)),
    ("STDiT3", "is a KVCompressAttention", lambda m: setattr(m.spatial_blocks[0], "attn", KVCompressAttention(None))),
    ("STDiT3", "q_norm: is a LayerNorm", lambda m: setattr(m.spatial_blocks[0].attn, "q_norm", nn.LayerNorm(HEAD_DIM))),
    ("STDiT3", "attn.rope: is True", lambda m: setattr(m.spatial_blocks[1].attn, "rope", True)),
    ("STDiT3", "approximate: is 'none'", lambda m: setattr(m.spatial_blocks[0].mlp, "act", nn.GELU())),
    ("STDiT3", "rope.use_xpos", lambda m: setattr(m.rope, "use_xpos", True)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "words", "spoil"), SPOILED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_would_be_skipped_over_is_refused(family: str, words: str, spoil: Callable[[Any], Any]) -> None:
    official, _ = pair(family)
    spoil(official)
    with pytest.raises(TypeError, match=words.replace(".", r"\.")):
        accelerate(official, PABConfig())
    assert storages(official) == len(list(official.parameters()))


@pytest.mark.parametrize(
    ("family", "arguments", "match"),
    [
        ("STDiT3", {"valid_depth": 1}, "valid_depth"),
        ("LatteT2V", {"use_image_num": 1}, "use_image_num"),
        ("LatteT2V", {"enable_temporal_attentions": False}, "enable_temporal_attentions"),
        ("LatteT2V", {"cross_attention_kwargs": {"gligen": {}}}, "cross_attention_kwargs"),
        ("LatteT2V", {"attention_mask": torch.zeros(2, FRAMES, *SIZE)}, "attention_mask"),
        ("LatteT2V", {"encoder_hidden_states": None}, "encoder_hidden_states"),
        ("OpenSoraT2V", {"return_dict": True}, "return_dict"),
    ],
)
def test_unsupported_calls_are_named(family: str, arguments: dict[str, Any], match: str) -> None:
    official, _ = pair(family)
    latents, given, _ = inputs(family)
    with accelerate(official, PABConfig()) as handle:
        handle.begin(TIMESTEPS)
        with pytest.raises(ValueError, match=match):
            run(official, latents, {**given, **arguments})


def test_another_transformer_is_refused() -> None:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "sample_size": 8}
    model = PixArtTransformer2DModel(num_layers=1, cross_attention_dim=16, caption_channels=8, **sizes)
    with pytest.raises(TypeError, match=r"forward: has no argument use_image_num"):
        accelerate(model, PABConfig())
