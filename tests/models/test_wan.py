"""The adapters of Wan and LTX-Video: what they refuse, that they put the host back, and what a GPU gives."""

from typing import Any

import pytest
import torch
from diffusers import WanAnimateTransformer3DModel, WanVACETransformer3DModel
from torch import Tensor, nn

from pab_kernels import PABConfig, accelerate
from pab_kernels.models import adapter_for
from pab_kernels.models.across_heads import distinct_timesteps
from pab_kernels.plain import PlainPAB
from tests.wan_tools import randomize, relative_error, tiny_ltx, tiny_wan

PAB = PABConfig(
    spatial_broadcast=True, spatial_threshold=(50, 950), spatial_range=2,
    cross_broadcast=True, cross_threshold=(50, 950), cross_range=3,
    mlp_broadcast=True, mlp_threshold=(50, 950), mlp_range=2, mlp_block=(1, 2),
)  # fmt: skip
TIMESTEPS = [990.0, 900.0, 800.0, 700.0, 600.0, 500.0, 300.0, 20.0]
FROM_IMAGE: dict[str, Any] = {"image_dim": 8, "added_kv_proj_dim": 24}


def wan_arguments(model: Any, tokens: int = 9, seed: int = 0) -> dict[str, Any]:
    """Everything but the timestep, at [1, C, 3, 4, 6]."""
    generator = torch.Generator().manual_seed(seed)
    where = {"device": model.device, "dtype": model.dtype}
    return {
        "hidden_states": torch.randn(1, model.config.in_channels, 3, 4, 6, generator=generator).to(**where),
        "encoder_hidden_states": torch.randn(1, tokens, model.config.text_dim, generator=generator).to(**where),
        "return_dict": False,
    }


def ltx_arguments(model: Any) -> dict[str, Any]:
    """Everything but the timestep, for a batch of 2 of 3 x 4 x 6 tokens, of whose text one token is padding."""
    generator = torch.Generator().manual_seed(0)
    where = {"device": model.device, "dtype": model.dtype}
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 1, 1]], device=model.device)
    return {
        "hidden_states": torch.randn(2, 72, model.config.in_channels, generator=generator).to(**where),
        "encoder_hidden_states": torch.randn(2, 5, model.config.caption_channels, generator=generator).to(**where),
        "encoder_attention_mask": mask,
        **dict(zip(("num_frames", "height", "width"), (3, 4, 6), strict=True)),
        "rope_interpolation_scale": (8 / 25, 32, 32),
        "return_dict": False,
    }


def loop(model: Any, given: dict[str, Any], timesteps: list[float] = TIMESTEPS) -> Tensor:
    """A denoising-like loop; the latents after every step."""
    given, steps = dict(given), []
    with torch.no_grad():
        for t in timesteps:
            timestep = torch.full((len(given["hidden_states"]),), t, device=model.device)
            out = model(**given, timestep=timestep)[0]
            given["hidden_states"] = given["hidden_states"] - 0.1 * out
            steps.append(given["hidden_states"])
    return torch.stack(steps)


def model_and_arguments(family: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
    if family == "ltx":
        model = tiny_ltx(**changes)
        return model, ltx_arguments(model)
    model = tiny_wan(**changes)
    return model, wan_arguments(model)


@pytest.mark.parametrize("config", [PABConfig(), PAB], ids=["no PAB", "PAB"])
@pytest.mark.parametrize("family", ["wan", "ltx"])
def test_a_bare_transformer(family: str, config: PABConfig) -> None:
    """MLP broadcast included, which no pipeline's test has."""
    model, given = model_and_arguments(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with PlainPAB(model, config) as plain:
        plain.begin(TIMESTEPS)
        expected = loop(model, given)
    with accelerate(model, config) as handle:
        for _ in range(2):
            handle.begin(TIMESTEPS)
            assert relative_error(loop(model, given), expected) < 1e-5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (relative_error(loop(model, given), expected) > 1e-3) == (config == PAB)


@pytest.mark.parametrize("options", [{"cross_attn_norm": False}, {"patch_size": (1, 1, 2)}, {"num_layers": 3}], ids=str)
def test_other_options_of_wan(options: dict[str, Any]) -> None:
    model, given = model_and_arguments("wan", **options)
    expected = loop(model, given)
    with accelerate(model, PABConfig()) as handle:
        handle.begin(TIMESTEPS)
        assert relative_error(loop(model, given), expected) < 1e-5


@pytest.mark.parametrize(
    "options", [{"norm_elementwise_affine": True}, {"attention_head_dim": 12, "cross_attention_dim": 24}]
)
def test_other_options_of_ltx(options: dict[str, Any]) -> None:
    model, given = model_and_arguments("ltx", **options)
    expected = loop(model, given)
    with accelerate(model, PABConfig()) as handle:
        handle.begin(TIMESTEPS)
        assert relative_error(loop(model, given), expected) < 1e-5


@pytest.mark.parametrize("family", ["wan", "ltx"])
def test_a_timestep_a_token(family: str) -> None:
    """Three of them in one sequence, which no pipeline has; the modulation is that of each token."""
    model, given = model_and_arguments(family)
    batch, tokens = len(given["hidden_states"]), 18 if family == "wan" else 72
    timestep = torch.tensor([0.0, 300.0, 900.0]).repeat(batch, tokens // 3)
    with torch.no_grad():
        expected = model(**given, timestep=timestep)[0]
        with accelerate(model, PABConfig()) as handle:
            handle.begin([900.0])
            assert relative_error(model(**given, timestep=timestep)[0], expected) < 1e-5
        assert relative_error(model(**given, timestep=torch.full((batch,), 900.0))[0], expected) > 1e-3


def test_distinct_timesteps() -> None:
    values, index = distinct_timesteps(torch.tensor([[5.0, 0.0, 5.0], [7.5, 7.5, 0.0]]))
    assert values.tolist() == [0.0, 5.0, 7.5, 7.5, 7.5, 7.5, 7.5, 7.5]
    assert index.tolist() == [[1, 0, 1], [2, 2, 0]]
    assert index.dtype == torch.int32
    assert len(distinct_timesteps(torch.arange(9.0)[None])[0]) == 16


@pytest.mark.parametrize("cls", [WanVACETransformer3DModel, WanAnimateTransformer3DModel])
def test_vace_and_animate_are_refused_by_name(cls: type[nn.Module]) -> None:
    with torch.device("meta"):
        host = cls.__new__(cls)
        nn.Module.__init__(host)
    with pytest.raises(TypeError, match=rf"{cls.__name__}: .*blocks"):
        adapter_for(host)


def changed(model: Any, path: str, value: Any) -> Any:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, value)
    return model


class Wrapped(nn.Linear):
    """As LoRA, GGUF and bitsandbytes put it in a linear's place."""


REFUSED: dict[str, Any] = {
    "another qk_norm": (
        lambda: tiny_wan(qk_norm="rms_norm"),
        ValueError,
        r"host\.config\.qk_norm: got 'rms_norm', must be 'rms_norm_across_heads'",
    ),
    "an image nobody embeds": (
        lambda: tiny_wan(added_kv_proj_dim=24),
        ValueError,
        r"added_kv_proj_dim, image_dim: got 24 and None",
    ),
    "a wrapped linear of the last block": (
        lambda: changed(tiny_wan(), "blocks.1.ffn.net.2", Wrapped(40, 24)),
        TypeError,
        r"WanTransformer3DModel\.blocks\.1\.ffn\.net\.2: is a Wrapped",
    ),
    "a wrapped linear of LTX": (
        lambda: changed(tiny_ltx(), "transformer_blocks.0.attn2.to_k", Wrapped(20, 20)),
        TypeError,
        r"LTXVideoTransformer3DModel\.transformer_blocks\.0\.attn2\.to_k: is a Wrapped",
    ),
    "another norm": (
        lambda: changed(tiny_wan(), "blocks.0.attn1.norm_k", nn.LayerNorm(24)),
        TypeError,
        r"blocks\.0\.attn1\.norm_k: is a LayerNorm, must be a plain RMSNorm",
    ),
    "another attention backend": (
        lambda: changed(tiny_wan(), "blocks.0.attn1.processor", _processor("flash")),
        TypeError,
        r"blocks\.0\.attn1\.processor\._attention_backend: is 'flash', must be None",
    ),
    "fused projections": (
        lambda: _fused(tiny_wan()),
        TypeError,
        r"blocks\.0\.attn1\.fused_projections: is True, must be False",
    ),
}


def _processor(backend: str) -> Any:
    processor: Any = tiny_wan().blocks[0].attn1.processor
    processor._attention_backend = backend
    return processor


def _fused(model: Any) -> Any:
    for block in model.blocks:
        block.attn1.fuse_projections()
    return model


@pytest.mark.parametrize(("make", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_and_nothing_was_touched(make: Any, error: type[Exception], message: str) -> None:
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        accelerate(model, PABConfig())
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters()), "a weight is still a view"


CALLS: dict[str, Any] = {
    "LoRA scale": ("wan", {}, {"attention_kwargs": {"scale": 0.5}}, r"attention_kwargs: got \{'scale': 0.5\}, must be"),
    "LoRA scale of LTX": ("ltx", {}, {"attention_kwargs": {"scale": 0.5}}, r"attention_kwargs: got"),
    "image for a text model": (
        "wan",
        {},
        {"encoder_hidden_states_image": torch.zeros(1, 5, 8)},
        r"_image: got one, must",
    ),
    "no image": ("wan", FROM_IMAGE, {}, r"encoder_hidden_states_image: got None, must be given"),
    "short text with an image": (
        "wan",
        FROM_IMAGE,
        {"encoder_hidden_states_image": torch.zeros(1, 5, 8)},
        r"encoder_hidden_states: has 9 tokens, must have 512",
    ),
    "odd size": (
        "wan",
        {},
        {"hidden_states": torch.zeros(1, 16, 3, 5, 6)},
        r"hidden_states: size is \[3, 5, 6\], must",
    ),
    "channels": (
        "wan",
        {},
        {"hidden_states": torch.zeros(1, 15, 3, 4, 6)},
        r"hidden_states: shape is .* must be \[B, 16",
    ),
    "tokens": ("ltx", {}, {"width": 7}, r"num_frames, height, width: got \(3, 4, 7\), must be those of the 72 tokens"),
    "coordinates": ("ltx", {}, {"video_coords": torch.zeros(2, 3, 72)}, r"video_coords: got a tensor, must be None"),
    "timesteps": ("wan", {}, {"timestep": torch.zeros(1, 17)}, r"timestep: shape is \[1, 17\], must be \[1, 18\]"),
}


@pytest.mark.parametrize(("family", "options", "changes", "message"), CALLS.values(), ids=CALLS.keys())
def test_calls_that_are_refused(family: str, options: Any, changes: Any, message: str) -> None:
    model, given = model_and_arguments(family, **options)
    with accelerate(model, PABConfig()) as handle:
        handle.begin([500.0])
        with pytest.raises(ValueError, match=message):
            model(**{**given, "timestep": torch.full((len(given["hidden_states"]),), 500.0), **changes})


def test_only_texts_that_are_always_full_go_without_lengths() -> None:
    """As graphs need it: a prompt of another length must find the keys, values and graphs of the first."""
    kept = {}
    for family in ("wan", "ltx"):
        model, given = model_and_arguments(family)
        given |= {"encoder_attention_mask": None} if family == "ltx" else {}
        with accelerate(model, PABConfig()) as handle:
            handle.begin(TIMESTEPS)
            loop(model, given, TIMESTEPS[:1])
            (workspace,) = handle._shapes.latest
            workspace._eager = None  # texts as on a GPU
            texts = []
            for length in (60, 64):
                text = torch.zeros(len(given["hidden_states"]), length, given["encoder_hidden_states"].shape[-1])
                arguments = {**given, "encoder_hidden_states": text, "timestep": torch.zeros(len(text))}
                call = handle._adapter.bind(**arguments)
                texts.append(workspace._update_text(call))
            workspace._eager = "not on a CUDA device"
        kept[family] = [None if text.kv_len is None else text.kv_len.tolist() for text in texts]
        assert (texts[0] is texts[1]) == (family == "ltx")
    assert kept == {"wan": [[60], None], "ltx": [[64, 64], [64, 64]]}


@pytest.mark.parametrize("family", ["wan", "ltx"])
def test_whole_steps_of_rectified_flow_are_refused(family: str) -> None:
    """Their velocity points the other way: the latents would walk off to more noise."""
    model, given = model_and_arguments(family)
    latents = given.pop("hidden_states")
    with accelerate(model, PABConfig()) as handle:
        handle.begin(TIMESTEPS)
        with pytest.raises(ValueError, match=rf"rectified_flow: a {type(model).__name__} does not predict"):
            handle.rectified_flow(latents, 1.0, **given)


def test_an_image_of_first_and_last_frame() -> None:
    """Two pictures a video, joined to one sequence by the embedder."""
    model = tiny_wan(**FROM_IMAGE, pos_embed_seq_len=10)
    generator = torch.Generator().manual_seed(1)
    given = wan_arguments(model, tokens=512) | {
        "encoder_hidden_states_image": torch.randn(2, 5, 8, generator=generator)
    }
    expected = loop(model, given)
    with accelerate(model, PABConfig()) as handle:
        handle.begin(TIMESTEPS)
        assert relative_error(loop(model, given), expected) < 1e-5


@pytest.mark.parametrize("family", ["wan", "ltx"])
def test_bfloat16_stays_near(family: str) -> None:
    """With the parts that diffusers keeps in float32, as `from_pretrained` gives it."""
    model = _half(model_and_arguments(family)[0])
    assert model.dtype == torch.bfloat16
    given = ltx_arguments(model) if family == "ltx" else wan_arguments(model)
    expected = loop(model, given)
    with accelerate(model, PABConfig()) as handle:
        handle.begin(TIMESTEPS)
        assert relative_error(loop(model, given), expected) < 2e-2


GPU: dict[str, Any] = {
    "wan": {"num_attention_heads": 3, "attention_head_dim": 128, "ffn_dim": 1024, "freq_dim": 256},
    "ltx": {"num_attention_heads": 4, "attention_head_dim": 64, "cross_attention_dim": 256},
}


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [None, "fp8"])
@pytest.mark.parametrize("config", [PABConfig(), PAB], ids=["no PAB", "PAB"])
@pytest.mark.parametrize("family", GPU)
def test_graphs_on_a_gpu(family: str, config: PABConfig, cache_dtype: str | None) -> None:
    """Heads as wide as the released models'; the last of three runs is all graphs; the plain form is in float32."""
    model, _ = model_and_arguments(family, **GPU[family])
    model = randomize(model, std=0.05).cuda()
    given = ltx_arguments(model) if family == "ltx" else wan_arguments(model)
    with PlainPAB(model, config) as plain:
        plain.begin(TIMESTEPS)
        expected = loop(model, given)
    model, given = (
        _half(model),
        {
            name: value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in given.items()
        },
    )
    with accelerate(model, config, cache_dtype=cache_dtype) as handle:
        for _ in range(3):
            handle.begin(TIMESTEPS)
            result = loop(model, given)
        assert relative_error(result.float(), expected) < 3e-2
        assert handle.report().eager is None
        assert handle.report().graphs == len(set(handle.schedule or ()))


def _half(model: Any) -> Any:
    kept = model._keep_in_fp32_modules or []
    for name, parameter in model.named_parameters():
        if not any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.bfloat16()
    return model


@pytest.mark.gpu
@pytest.mark.parametrize("family", GPU)
def test_fp8_linears_on_a_gpu(family: str) -> None:
    model, _ = model_and_arguments(family, **GPU[family])
    model = _half(randomize(model, std=0.05).cuda())
    given = ltx_arguments(model) if family == "ltx" else wan_arguments(model)
    expected = loop(model, given)
    with accelerate(model, PABConfig(), linear_precision="fp8-all") as handle:
        for _ in range(3):
            handle.begin(TIMESTEPS)
            result = loop(model, given)
        assert relative_error(result.float(), expected.float()) < 1e-1
        assert handle.report().fp8 == {"qkv": 2, "cross.q": 2, "mlp": 2}


@pytest.mark.gpu
@pytest.mark.parametrize("family", GPU)
def test_a_timestep_a_token_in_a_graph(family: str) -> None:
    """As image-to-video has it: 0 for the tokens of the first frame, and another timestep for the rest at each step."""
    model, _ = model_and_arguments(family, **GPU[family])
    model = randomize(model, std=0.05).cuda()
    given = ltx_arguments(model) if family == "ltx" else wan_arguments(model)
    batch, tokens = len(given["hidden_states"]), 18 if family == "wan" else 72
    moving = (torch.arange(tokens, device="cuda") >= tokens // 3).float().expand(batch, -1)

    def run(host: Any, arguments: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            return torch.stack([host(**arguments, timestep=moving * t)[0].float() for t in TIMESTEPS])

    expected = run(model, given)
    model = _half(model)
    given = {
        name: value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in given.items()
    }
    with accelerate(model, PABConfig()) as handle:
        for _ in range(2):
            handle.begin(TIMESTEPS)
            result = run(model, given)
        assert relative_error(result, expected) < 3e-2
        assert (handle.report().graphs, handle.report().eager) == (1, None)
