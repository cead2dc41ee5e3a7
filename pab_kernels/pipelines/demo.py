"""The demo pipeline: a small Latte that paints moving shapes, in pixel space, on any machine.

Its sampling is that of diffusers' LattePipeline, without the T5 encoder and the VAE.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.latte_transformer_3d import LatteTransformer3DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from safetensors.torch import save as serialized
from torch import nn

from pab_kernels.files import replaced
from pab_kernels.models import host_config, weight_files
from pab_kernels.pipelines.arguments import Generators, NegativePrompt, Prompt, Prompts, Seed, check_guidance
from pab_kernels.pipelines.demo_text import TextEmbedding
from pab_kernels.pipelines.denoising import DenoisingPipeline, Progress, Run, StepCallback

WEIGHTS = Path(__file__).resolve().parent.parent / "demo" / "weights"
CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"


def demo_scheduler() -> DDIMScheduler:
    """Return the sampler that the demo model is trained for.

    The betas end at a signal of exactly zero, so that sampling starts from what training has seen; the last
    timestep needs the v-prediction for that. Pixels are clipped to [-1, 1], which keeps guidance from
    saturating.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=True,
    )


def demo_transformer(
    pairs: int = 5, heads: int = 3, size: int = 48, frames: int = 16, caption_channels: int = 64
) -> LatteTransformer3DModel:
    """Build an untrained Latte for pixels: head_dim 72, patches of 4 x 4.

    Parameters
    ----------
    pairs : int
        Spatial blocks, and as many temporal ones.
    heads : int
        Attention heads of 72 channels.
    size : int
        Height and width in pixels, a multiple of 4.
    frames : int
        Frames of a video.
    caption_channels : int
        Size of a text embedding.
    """
    if size < 4 or size % 4:
        raise ValueError(f"size must be a positive multiple of 4, got {size}")
    return LatteTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=72,
        in_channels=3,
        out_channels=3,
        num_layers=pairs,
        cross_attention_dim=heads * 72,
        attention_bias=True,
        sample_size=size,
        patch_size=4,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=caption_channels,
        video_length=frames,
    )


def parts(path: Path) -> tuple[LatteTransformer3DModel, TextEmbedding, DDIMScheduler]:
    """The modules and the sampler that a config.json describes; ValueError naming it where it does not."""
    config = weight_files.read_json(path)
    try:
        settings, text, scheduler = (dict(config[name]) for name in ("transformer", "text", "scheduler"))
        settings = {key: value for key, value in settings.items() if not key.startswith("_")}
        transformer = LatteTransformer3DModel(**host_config.check(LatteTransformer3DModel, settings))
        return transformer, TextEmbedding(**text), DDIMScheduler.from_config(scheduler)
    except Exception as error:  # the sampler's settings are whatever diffusers takes
        raise ValueError(f"{path} does not describe a demo model: {type(error).__name__}: {error}") from error


def _state(transformer: nn.Module, text: nn.Module) -> dict[str, torch.Tensor]:
    """All tensors by their names in the file."""
    modules = {"transformer": transformer, "text": text}
    return {f"{part}.{key}": value for part, module in modules.items() for key, value in module.state_dict().items()}


class DemoPipeline(DenoisingPipeline):
    """Text to video with the demo model. `.transformer` and `.scheduler` are diffusers' own classes.

    Parameters
    ----------
    transformer : LatteTransformer3DModel
        Predicts v from pixels [B, 3, T, H, W] in [-1, 1] with noise.
    scheduler
        Of diffusers, for the v-prediction (see `demo_scheduler`).
    text : TextEmbedding
        Its channels must equal the transformer's caption_channels.
    """

    predictions = ("v_prediction",)

    def __init__(self, transformer: LatteTransformer3DModel, scheduler: Any, text: TextEmbedding) -> None:
        config: Any = transformer.config
        expected = config.caption_channels
        if text.channels != expected:
            raise ValueError(
                f"text.channels must equal the transformer's caption_channels {expected}, got {text.channels}"
            )
        super().__init__(transformer, scheduler)
        self.text = text
        self._rescale = 0.0

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.text.position.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights; the sampler itself works in float32."""
        return self.text.position.dtype

    def to(self, *args: Any, **kwargs: Any) -> DemoPipeline:
        """Move or cast the weights as `torch.nn.Module.to` does; returns the pipeline."""
        # Not ModelMixin.to: it warns of modules that must stay float32, of which Latte has none.
        nn.Module.to(self.transformer, *args, **kwargs)
        self.text.to(*args, **kwargs)
        return self

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> DemoPipeline:
        """Load a pipeline.

        Parameters
        ----------
        path : str or Path, optional
            Folder with `config.json` and `model.safetensors`. Default: the weights that ship with the package.
        dtype : torch.dtype
            float32, bfloat16 or float16. The file holds bfloat16.
        device : str or torch.device
            Where the weights go.

        Raises
        ------
        FileNotFoundError
            If the folder lacks one of the two files.
        ValueError
            If dtype is another one, or the weights do not fit the configuration.
        """
        allowed = (torch.float32, torch.bfloat16, torch.float16)
        if dtype not in allowed:
            raise ValueError(f"dtype must be one of {', '.join(map(str, allowed))}, got {dtype}")
        folder = WEIGHTS if path is None else Path(path)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"path must be a folder with {name}, got {folder}")
        entries = weight_files.open_files([folder / WEIGHTS_NAME])
        with torch.device("meta"):
            expected = {key: tuple(value.shape) for key, value in _state(*parts(folder / CONFIG_NAME)[:2]).items()}
        if difference := weight_files.difference(expected, entries):
            raise ValueError(f"{folder / WEIGHTS_NAME} does not fit {CONFIG_NAME}:\n{difference}")
        transformer, text, scheduler = parts(folder / CONFIG_NAME)  # nothing real is made before the two files fit
        state = _state(transformer, text)
        for key, value in weight_files.read_all(entries, dict.fromkeys(expected, torch.float32), "cpu").items():
            state[key].copy_(value)
        for module in (transformer, text):
            module.eval().requires_grad_(False)
        return cls(transformer, scheduler, text).to(device=device, dtype=dtype)

    def save_pretrained(self, path: str | Path) -> None:
        """Write `config.json` and `model.safetensors` (bfloat16) to a folder, which is made if need be.

        Each file gets its name only once it is complete, so that a reader never sees half of one.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "transformer": _plain(self.transformer.config),
            "scheduler": _plain(self.scheduler.config),
            "text": {
                "vocabulary": list(self.text.vocabulary),
                "length": self.text.length,
                "channels": self.text.channels,
            },
        }
        tensors = {
            key: value.to("cpu", torch.bfloat16).contiguous().clone()
            for key, value in _state(self.transformer, self.text).items()
        }
        with replaced(folder / WEIGHTS_NAME) as partial:
            partial.write_bytes(serialized(tensors))
        with replaced(folder / CONFIG_NAME) as partial:
            partial.write_text(json.dumps(config, indent=2) + "\n")

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompt,
        *,
        negative_prompt: NegativePrompt = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 2.0,
        guidance_rescale: float = 0.7,
        num_videos_per_prompt: int = 1,
        seed: Seed = None,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        callback_on_step_end: StepCallback | None = None,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """Generate B videos: of one prompt or several, one or several of each.

        Parameters
        ----------
        prompt : str or sequence of str
            In the words of `text.vocabulary`.
        negative_prompt : str or sequence of str, optional
            What guidance leads away from: one for all, or one for each prompt. None is the empty one.
        num_inference_steps : int
            Denoising steps, 1 to 1000.
        guidance_scale : float
            1 or less runs without guidance, at half the cost a step.
        guidance_rescale : float
            0 to 1: how far the guided prediction is brought back to the deviation of the conditional one, which keeps
            colours from saturating (arXiv:2305.08891, section 3.4).
        num_videos_per_prompt, seed, generator, latents, callback_on_step_end, progress
            See `OpenSoraPlanPipeline`; here "latents" and "denoised" are pixels in [-1, 1], float32 [B, 3, T, H, W].

        Returns
        -------
        torch.Tensor
            float32 [B, T, H, W, 3] in [0, 1], on the pipeline's device.

        Raises
        ------
        ValueError, TypeError
            If a prompt has an unknown word or too many words, the scheduler does not fit, or an argument is of the
            wrong kind, out of range or of the wrong length.
        """
        prompts = Prompts.of(prompt, negative_prompt, seed, generator, num_videos_per_prompt)
        guided = check_guidance(guidance_scale) > 1.0
        if not 0 <= guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale must be in [0, 1], got {guidance_rescale}")
        self._rescale = guidance_rescale
        self._set_timesteps(num_inference_steps)
        # One tensor for the whole run: whoever keeps its keys and values can see that the text is the same.
        texts = [*prompts.negatives, *prompts.texts] if guided else list(prompts.texts)
        arguments = {"encoder_hidden_states": self.text.encode(texts), "return_dict": False}
        run = Run(arguments, prompts.generators, callback_on_step_end, progress)
        config: Any = self.transformer.config
        shape = (len(prompts.texts), config.in_channels, config.video_length, config.sample_size, config.sample_size)
        pixels = self._denoise(self._noise(run, shape, latents), run, guidance_scale)
        return (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1).contiguous()

    def _guide(self, cond: torch.Tensor, uncond: torch.Tensor, scale: float) -> torch.Tensor:
        """With the deviation brought back."""
        guided = super()._guide(cond, uncond, scale)
        ratio = cond.std(dim=(1, 2, 3, 4), keepdim=True) / guided.std(dim=(1, 2, 3, 4), keepdim=True)
        return guided * (1 + self._rescale * (ratio - 1))


def _plain(config: Any) -> dict[str, Any]:
    """A diffusers configuration without its private entries."""
    return {key: value for key, value in dict(config).items() if not key.startswith("_")}
