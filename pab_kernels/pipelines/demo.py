"""The demo pipeline: a small Latte that paints moving shapes, in pixel space, on any machine.

The denoising loop is the one of diffusers' LattePipeline, without the T5 encoder and the VAE.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.latte_transformer_3d import LatteTransformer3DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from safetensors.torch import load_file, save_file
from torch import nn

from pab_kernels.demo.text import TextEmbedding

WEIGHTS = Path(__file__).resolve().parent.parent / "demo" / "weights"
CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"

StepCallback = Callable[["DemoPipeline", int, torch.Tensor, dict[str, torch.Tensor]], "dict[str, Any] | None"]


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


class DemoPipeline:
    """Text to video with the demo model. `.transformer` and `.scheduler` are diffusers' own classes.

    Parameters
    ----------
    transformer : LatteTransformer3DModel
        Predicts v from pixels [B, 3, T, H, W] in [-1, 1] with noise.
    scheduler : DDIMScheduler
        Must use the v-prediction (see `demo_scheduler`).
    text : TextEmbedding
        Its channels must equal the transformer's caption_channels.
    """

    def __init__(self, transformer: LatteTransformer3DModel, scheduler: DDIMScheduler, text: TextEmbedding) -> None:
        config: Any = transformer.config
        expected = config.caption_channels
        if text.channels != expected:
            raise ValueError(
                f"text.channels must equal the transformer's caption_channels {expected}, got {text.channels}"
            )
        self.transformer = transformer
        self.scheduler = scheduler
        self.text = text

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
        config = json.loads((folder / CONFIG_NAME).read_text())
        transformer = LatteTransformer3DModel.from_config(config["transformer"])
        text = TextEmbedding(**config["text"])
        tensors = load_file(folder / WEIGHTS_NAME)
        modules: dict[str, nn.Module] = {"transformer": transformer, "text": text}
        expected = {f"{part}.{key}" for part, module in modules.items() for key in module.state_dict()}
        if wrong := sorted(expected ^ tensors.keys()):
            raise ValueError(f"{folder / WEIGHTS_NAME} does not fit {CONFIG_NAME}, first difference: {wrong[0]}")
        for part, module in modules.items():
            module.load_state_dict({key: tensors[f"{part}.{key}"] for key in module.state_dict()})
            module.eval().requires_grad_(False)
        return cls(transformer, DDIMScheduler.from_config(config["scheduler"]), text).to(device=device, dtype=dtype)

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
        modules: dict[str, nn.Module] = {"transformer": self.transformer, "text": self.text}
        tensors = {
            f"{part}.{key}": value.detach().to("cpu", torch.bfloat16).contiguous().clone()
            for part, module in modules.items()
            for key, value in module.state_dict().items()
        }
        temporary = folder / f"{WEIGHTS_NAME}.tmp"
        save_file(tensors, temporary)
        temporary.replace(folder / WEIGHTS_NAME)
        temporary = folder / f"{CONFIG_NAME}.tmp"
        temporary.write_text(json.dumps(config, indent=2) + "\n")
        temporary.replace(folder / CONFIG_NAME)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        num_inference_steps: int = 30,
        guidance_scale: float = 2.0,
        guidance_rescale: float = 0.7,
        seed: int | Sequence[int] = 0,
        callback_on_step_end: StepCallback | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> torch.Tensor:
        """Generate one video a prompt.

        Parameters
        ----------
        prompt : str or sequence of str
            B prompts in the words of `text.vocabulary`.
        negative_prompt : str or sequence of str
            What guidance leads away from: one for all, or B. Default: the empty prompt.
        num_inference_steps : int
            Denoising steps, 1 to 1000.
        guidance_scale : float
            1 or less runs without guidance, at half the cost a step.
        guidance_rescale : float
            0 to 1: how far the guided prediction is brought back to the deviation of the conditional one, which keeps
            colours from saturating (arXiv:2305.08891, section 3.4).
        seed : int or sequence of int
            Seed of each video's noise. An int s gives the i-th prompt s + i. A video depends on its prompt
            and its seed, not on its neighbours in the batch nor on the device that draws.
        callback_on_step_end : callable, optional
            Called as `callback(pipeline, step, timestep, {"latents": latents, "denoised": denoised})` after each step,
            as in diffusers, with what the model now takes the video to be; may return a dict with other "latents",
            float32 [B, 3, T, H, W].
        progress : callable, optional
            Called as `progress(done, total)` after each step.

        Returns
        -------
        torch.Tensor
            float32 [B, T, H, W, 3] in [0, 1], on the pipeline's device.

        Raises
        ------
        ValueError
            If a prompt has an unknown word or too many words, or an argument is out of range or of the wrong
            length.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        count = len(prompts)
        if count == 0:
            raise ValueError("prompt must be a string or a non-empty list of strings, got an empty list")
        if not 1 <= num_inference_steps <= 1000:
            raise ValueError(f"num_inference_steps must be in [1, 1000], got {num_inference_steps}")
        if not 0 <= guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale must be in [0, 1], got {guidance_rescale}")
        negatives = [negative_prompt] * count if isinstance(negative_prompt, str) else list(negative_prompt)
        seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
        for name, values in (("negative_prompt", negatives), ("seed", seeds)):
            if len(values) != count:
                raise ValueError(f"{name} must be a single value or one for each of {count} prompts, got {len(values)}")

        guided = guidance_scale > 1.0
        # One tensor for the whole run: whoever keeps its keys and values can see that the text is the same.
        prompt_embeds = self.text.encode(negatives + prompts if guided else prompts)
        latents = self._noise(seeds)
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        for step, t in enumerate(self.scheduler.timesteps):
            model_input = torch.cat([latents] * 2) if guided else latents
            model_input = self.scheduler.scale_model_input(model_input, t).to(self.dtype)
            prediction = self.transformer(
                hidden_states=model_input,
                encoder_hidden_states=prompt_embeds,
                timestep=t[None].expand(model_input.shape[0]),
                return_dict=False,
            )[0].float()
            if guided:
                uncond, cond = prediction.chunk(2)
                prediction = uncond + guidance_scale * (cond - uncond)
                ratio = cond.std(dim=(1, 2, 3, 4), keepdim=True) / prediction.std(dim=(1, 2, 3, 4), keepdim=True)
                prediction = prediction * (1 + guidance_rescale * (ratio - 1))
            latents, denoised = self.scheduler.step(prediction, t, latents, return_dict=False)
            if callback_on_step_end is not None:
                changed = callback_on_step_end(self, step, t, {"latents": latents, "denoised": denoised})
                latents = (changed or {}).get("latents", latents)
            if progress is not None:
                progress(step + 1, num_inference_steps)
        return (latents / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1).contiguous()

    def _noise(self, seeds: Sequence[int]) -> torch.Tensor:
        """Draw float32 [B, 3, T, H, W]: on the CPU, so that a seed means the same video on every device."""
        config: Any = self.transformer.config
        shape = (config.in_channels, config.video_length, config.sample_size, config.sample_size)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(noise).to(self.device) * self.scheduler.init_noise_sigma


def _plain(config: Any) -> dict[str, Any]:
    """A diffusers configuration without its private entries."""
    return {key: value for key, value in dict(config).items() if not key.startswith("_")}
