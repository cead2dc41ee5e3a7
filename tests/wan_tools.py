"""Tiny Wan and LTX-Video pipelines of diffusers' own classes, with random weights."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, T5EncoderModel, UMT5Config
from transformers.models.umt5 import UMT5EncoderModel

from pab_kernels import PABConfig
from pab_kernels.plain import PlainPAB
from tests.pipeline_tools import tiny_text

TEXT = 16
"""Channels of the text."""
IMAGE = 8
"""Channels of the image's embedding."""


def randomize(model: Any, seed: int = 0, std: float = 0.15) -> Any:
    """Weights large enough that every branch shows; norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, std, generator=generator)
    return model.eval().requires_grad_(False)


def tiny_wan(seed: int = 0, **overrides: Any) -> Any:
    """A Wan of two blocks and two heads of 12."""
    config: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": TEXT,
        "freq_dim": 32,
        "ffn_dim": 40,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    return randomize(WanTransformer3DModel(**{**config, **overrides}), seed)


def tiny_ltx(seed: int = 0, **overrides: Any) -> Any:
    """An LTX-Video of two blocks and two heads of 10: 20 channels, no multiple of 6, as the released one's 2,048."""
    config: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 10,
        "cross_attention_dim": 20,
        "in_channels": 8,
        "out_channels": 8,
        "caption_channels": TEXT,
        "num_layers": 2,
    }
    return randomize(LTXVideoTransformer3DModel(**{**config, **overrides}), seed)


def unipc(shift: float = 3.0) -> Any:
    """Wan's own sampler."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=shift
    )


def _wan_parts(vae: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=32, d_model=TEXT, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    autoencoder: Any = AutoencoderKLWan(
        base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True], **vae
    )
    return {
        "tokenizer": tiny_text(TEXT).tokenizer,
        "text_encoder": UMT5EncoderModel(config).eval(),
        "vae": autoencoder.eval(),
        "scheduler": unipc(),
    }


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _clip() -> dict[str, Any]:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=IMAGE, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    return {
        "image_encoder": CLIPVisionModel(vision).eval(),
        "image_processor": CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
    }


def wan_t2v() -> Any:
    """Wan 2.1, text to video."""
    return _quiet(WanPipeline(**_wan_parts({"z_dim": 16}), transformer=tiny_wan()))


def wan_t2v_two() -> Any:
    """Wan 2.2, text to video: one transformer for much noise, one for little."""
    parts = _wan_parts({"z_dim": 16})
    return _quiet(WanPipeline(**parts, transformer=tiny_wan(), transformer_2=tiny_wan(1), boundary_ratio=0.875))


def wan_i2v() -> Any:
    """Wan 2.1, image to video: keys and values of the image beside those of the text."""
    model = tiny_wan(in_channels=36, image_dim=IMAGE, added_kv_proj_dim=24)
    return _quiet(WanImageToVideoPipeline(**_wan_parts({"z_dim": 16}), **_clip(), transformer=model))


def wan_i2v_two() -> Any:
    """Wan 2.2, image to video: no keys and values of the image, two transformers."""
    return _quiet(
        WanImageToVideoPipeline(
            **_wan_parts({"z_dim": 16}),
            transformer=tiny_wan(in_channels=36),
            transformer_2=tiny_wan(1, in_channels=36),
            boundary_ratio=0.9,
        )
    )


_TI2V: dict[str, Any] = {
    "z_dim": 48,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "is_residual": True,
    "decoder_base_dim": 4,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}


def wan_ti2v(image: bool = False) -> Any:
    """Wan 2.2 5B: a timestep for each token."""
    parts = {**_wan_parts(_TI2V), "transformer": tiny_wan(in_channels=48, out_channels=48), "expand_timesteps": True}
    return _quiet(WanImageToVideoPipeline(**parts) if image else WanPipeline(**parts))


def ltx(image: bool = False) -> Any:
    """LTX-Video 0.9, text or image to video."""
    torch.manual_seed(0)
    text = tiny_text(TEXT)
    vae: Any = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        encoder_causal=True,
        decoder_causal=False,
    )
    encoder: T5EncoderModel = text.encoder
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=1.0, use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=4,
        max_image_seq_len=64, shift_terminal=0.1,
    )  # fmt: skip
    cls = LTXImageToVideoPipeline if image else LTXPipeline
    return _quiet(cls(scheduler, vae.eval(), encoder, text.tokenizer, tiny_ltx()))


PIPELINES: dict[str, Any] = {
    "wan t2v": wan_t2v,
    "wan t2v, two transformers": wan_t2v_two,
    "wan i2v": wan_i2v,
    "wan i2v, two transformers": wan_i2v_two,
    "wan ti2v, text": wan_ti2v,
    "wan ti2v, image": lambda: wan_ti2v(image=True),
    "ltx": ltx,
    "ltx, image": lambda: ltx(image=True),
}
"""Every pipeline that the families of this file have, made anew at each call."""


def generate(pipe: Any, steps: int = 8, seed: int = 0, prompt: str = "a red cat runs", **changes: Any) -> Tensor:
    """The latents, or what `output_type` asks for, of one run."""
    arguments: dict[str, Any] = {
        "prompt": prompt,
        "negative_prompt": "a dog",
        "height": 32,
        "width": 64,
        "num_frames": 9,
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
        "max_sequence_length": 512,
        "guidance_scale": 4.0,
    }
    if type(pipe).__name__.startswith("LTX"):
        arguments |= {"height": 64, "width": 96, "max_sequence_length": 16}
    if "ImageToVideo" in type(pipe).__name__:
        arguments["image"] = image(arguments["height"], arguments["width"])
    return pipe(**{**arguments, **changes}).frames


def image(height: int, width: int) -> Any:
    """A random picture."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def transformers_of(pipe: Any) -> list[Any]:
    """The pipeline's transformers."""
    both = (pipe.transformer, getattr(pipe, "transformer_2", None))
    return [each for each in both if each is not None]


def forwards_per_step(pipe: Any) -> int:
    """How often a step with guidance calls a transformer."""
    return 1 if type(pipe).__name__.startswith("LTX") else 2


def timesteps_of(pipe: Any, steps: int) -> list[list[float]]:
    """For each transformer the timesteps at which a run of `generate` calls it."""
    seen: list[list[float]] = [[] for _ in transformers_of(pipe)]
    hooks = [
        model.register_forward_pre_hook(
            lambda _module, _args, given, own=own: own.append(float(given["timestep"].max())), with_kwargs=True
        )
        for model, own in zip(transformers_of(pipe), seen, strict=True)
    ]
    generate(pipe, steps)
    for hook in hooks:
        hook.remove()
    return [own[:: forwards_per_step(pipe)] for own in seen]


@contextmanager
def plain_runs(pipe: Any, config: PABConfig, steps: int) -> Iterator[None]:
    """PAB the plain way on every transformer of a pipeline, for one run of `generate`."""
    with ExitStack() as stack:
        for model, timesteps in zip(transformers_of(pipe), timesteps_of(pipe, steps), strict=True):
            stack.enter_context(PlainPAB(model, config, forwards_per_step(pipe))).begin(timesteps)
        yield


def relative_error(got: Tensor, want: Tensor) -> float:
    """``||got - want|| / ||want||``."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def floats(values: Iterable[Any]) -> list[float]:
    """Numbers from tensors."""
    return [float(value) for value in values]
