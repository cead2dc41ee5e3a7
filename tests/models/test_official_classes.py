"""Official classes are known by their structure: stand-ins with the official attributes and arguments, and no maths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import PixArtAlphaTextProjection, get_2d_sincos_pos_embed
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormSingle
from torch import Tensor, nn

from pab_kernels import PABConfig, accelerate
from pab_kernels.models.hosts import OpenSoraPlanV110, OpenSoraPlanV120, STDiT3
from pab_kernels.plain import PlainPAB

HEADS, HEAD_DIM, LAYERS, TEXT, FRAMES, SIZE = 2, 12, 2, 10, 5, (8, 12)
DIM = HEADS * HEAD_DIM
TIMESTEPS = [900.0, 700.0, 600.0, 500.0, 400.0, 50.0]
PAB = PABConfig(
    spatial_broadcast=True, spatial_threshold=(100, 800), spatial_range=2,
    temporal_broadcast=True, temporal_threshold=(100, 800), temporal_range=3,
    cross_broadcast=True, cross_threshold=(100, 800), cross_range=4,
)  # fmt: skip


class Official(nn.Module):
    """Only its parts are read: a forward that runs is not the runtime's."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the official forward must not run")


# Open-Sora


class LlamaRMSNorm(Official):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = 1e-6


class OpenSoraAttention(Official):
    def __init__(self, rotary_emb: Callable[..., Tensor] | None) -> None:
        super().__init__()
        self.num_heads, self.qk_norm_legacy = HEADS, False
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.q_norm, self.k_norm = LlamaRMSNorm(HEAD_DIM), LlamaRMSNorm(HEAD_DIM)
        self.rope = rotary_emb is not None
        self.rotary_emb = rotary_emb


class OpenSoraMultiHeadCrossAttention(Official):
    def __init__(self) -> None:
        super().__init__()
        self.q_linear, self.kv_linear, self.proj = nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM), nn.Linear(DIM, DIM)


class Mlp(nn.Module):
    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(inputs, hidden), nn.GELU("tanh"), nn.Linear(hidden, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class STDiT3Block(Official):
    def __init__(self, rotary_emb: Callable[..., Tensor] | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(DIM, eps=1e-6, elementwise_affine=False)
        self.attn, self.cross_attn = OpenSoraAttention(rotary_emb), OpenSoraMultiHeadCrossAttention()
        self.mlp = Mlp(DIM, 4 * DIM)
        self.scale_shift_table = nn.Parameter(torch.zeros(6, DIM))


class Rotary(Official):
    def __init__(self) -> None:
        super().__init__()
        self.freqs = nn.Parameter(torch.zeros(HEAD_DIM // 2), requires_grad=False)


class PatchEmbed3D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv3d(4, DIM, kernel_size=(1, 2, 2), stride=(1, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).mT


class Part(Official):
    """Holds what it is given."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, value in parts.items():
            setattr(self, name, value)


def embedder() -> Part:
    return Part(mlp=nn.Sequential(nn.Linear(256, DIM), nn.SiLU(), nn.Linear(DIM, DIM)))


class OfficialSTDiT3(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = Part(skip_y_embedder=False)
        self.input_sq_size = 512
        self.pos_embed = Part()
        self.pos_embed.register_buffer("inv_freq", torch.zeros(DIM // 4), persistent=False)
        self.rope = Rotary()
        self.x_embedder, self.t_embedder, self.fps_embedder = PatchEmbed3D(), embedder(), embedder()
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(DIM, 6 * DIM))
        self.y_embedder = Part(y_proj=Mlp(TEXT, DIM))
        self.y_embedder.register_buffer("y_embedding", torch.zeros(7, TEXT))
        self.spatial_blocks = nn.ModuleList(STDiT3Block(None) for _ in range(LAYERS))
        self.temporal_blocks = nn.ModuleList(STDiT3Block(torch.abs) for _ in range(LAYERS))
        self.final_layer = Part(
            norm_final=nn.LayerNorm(DIM, eps=1e-6, elementwise_affine=False),
            linear=nn.Linear(DIM, 4 * 8),
            scale_shift_table=nn.Parameter(torch.zeros(2, DIM)),
        )
        self.parallel_manager: Any = None

    def forward(
        self, x, timestep, y, all_timesteps=None, mask=None, x_mask=None, fps=None, height=None, width=None, **kwargs
    ):
        raise AssertionError


# Latte and Open-Sora-Plan


class AttnProcessor2_0:
    def __init__(self, use_rope: bool = False, rope: Any = None) -> None:
        self.use_rope, self.compress_kv_factor = use_rope, None
        if rope is not None:
            self.rope = rope


class Attention(Official):
    def __init__(self, processor: AttnProcessor2_0) -> None:
        super().__init__()
        self.heads, self.residual_connection, self.rescale_output_factor = HEADS, False, 1.0
        self.group_norm = self.spatial_norm = self.norm_cross = self.downsampler = None
        self.to_q, self.to_k, self.to_v = (nn.Linear(DIM, DIM) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(DIM, DIM), nn.Dropout(0.0)])
        self.processor = processor


class BlockOfOfficial(Official):
    def __init__(self, processor: AttnProcessor2_0, cross: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(DIM, eps=1e-6, elementwise_affine=False)
        self.attn1 = Attention(processor)
        self.attn2 = Attention(AttnProcessor2_0()) if cross else None
        setattr(self, "norm2" if cross else "norm3", nn.LayerNorm(DIM, eps=1e-6, elementwise_affine=False))
        self.ff = FeedForward(DIM, activation_fn="gelu-approximate")
        self.scale_shift_table = nn.Parameter(torch.zeros(6, DIM))


class PatchEmbed(Official):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.norm, self.patch_size = nn.Conv2d(4, DIM, 2, stride=2), None, 2
        self.height = self.width = self.base_size = 4
        self.interpolation_scale = 1
        table = get_2d_sincos_pos_embed(DIM, 4, base_size=4, interpolation_scale=1, output_type="pt")
        self.register_buffer("pos_embed", table.float()[None], persistent=False)


class PatchEmbed2D(Official):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.norm, self.use_abs_pos = nn.Conv2d(4, DIM, 2, stride=2), None, False


class RoPE3D(Official):
    """Each axis has its scale; the second half of a table repeats the first."""

    def __init__(self, scales: tuple[float, float, float]) -> None:
        super().__init__()
        self.interpolation_scale_t, self.interpolation_scale_h, self.interpolation_scale_w = scales
        self.asked = 0

    def get_cos_sin(self, D, seq_len, device, dtype, interpolation_scale=1):
        self.asked += 1
        frequencies = 10000.0 ** -(torch.arange(0, D, 2) / D)
        angles = torch.outer(torch.arange(seq_len) / interpolation_scale, frequencies).repeat(1, 2).to(dtype)
        return angles.cos(), angles.sin()


class AdaLNSingleOfficial(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' own pair
    def finish(self, out_channels: int) -> None:
        self.norm_out = nn.LayerNorm(DIM, eps=1e-6, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, DIM))
        self.proj_out = nn.Linear(DIM, 4 * out_channels)
        self.adaln_single = AdaLayerNormSingle(DIM)
        self.caption_projection = PixArtAlphaTextProjection(TEXT, DIM)
        self.parallel_manager: Any = None


class LatteT2V(AdaLNSingleOfficial):
    @register_to_config
    def __init__(
        self, num_layers=LAYERS, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=4, patch_size=2,
        caption_channels=TEXT, video_length=FRAMES, norm_type="ada_norm_single", activation_fn="gelu-approximate",
        attention_bias=True, norm_elementwise_affine=False, only_cross_attention=False, double_self_attention=False,
    ):  # fmt: skip
        super().__init__()
        self.video_length = video_length
        self.pos_embed = PatchEmbed()
        self.register_buffer("temp_pos_embed", torch.zeros(1, FRAMES, DIM), persistent=False)
        self.transformer_blocks = nn.ModuleList(BlockOfOfficial(AttnProcessor2_0(), True) for _ in range(LAYERS))
        self.temporal_transformer_blocks = nn.ModuleList(
            BlockOfOfficial(AttnProcessor2_0(), False) for _ in range(LAYERS)
        )
        self.finish(8)
        self.caption_projection.register_buffer("y_embedding", torch.zeros(120, TEXT))

    def forward(
        self, hidden_states, timestep=None, all_timesteps=None, encoder_hidden_states=None, added_cond_kwargs=None,
        class_labels=None, cross_attention_kwargs=None, attention_mask=None, encoder_attention_mask=None,
        use_image_num=0, enable_temporal_attentions=True, return_dict=True,
    ):  # fmt: skip
        raise AssertionError


class OpenSoraT2V(AdaLNSingleOfficial):
    @register_to_config
    def __init__(
        self, num_layers=LAYERS, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=4, patch_size=2,
        patch_size_t=1, caption_channels=TEXT, norm_type="ada_norm_single", activation_fn="gelu-approximate",
        attention_bias=True, norm_elementwise_affine=False, only_cross_attention=False, double_self_attention=False,
    ):  # fmt: skip
        super().__init__()
        self.pos_embed = PatchEmbed2D()
        self.transformer_blocks = nn.ModuleList(
            BlockOfOfficial(AttnProcessor2_0(True, RoPE3D((1.0, 8 / 30, 12 / 40))), True) for _ in range(LAYERS)
        )
        self.finish(4)

    def forward(
        self, hidden_states, timestep=None, encoder_hidden_states=None, added_cond_kwargs=None, class_labels=None,
        cross_attention_kwargs=None, attention_mask=None, encoder_attention_mask=None, use_image_num=0,
        return_dict=True, **kwargs,
    ):  # fmt: skip
        raise AssertionError


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
