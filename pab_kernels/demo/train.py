"""Train the demo model from nothing, on generated scenes, in a given time.

    python -m pab_kernels.demo.train --minutes 8.5 --output runs/demo

Writes config.json, model.safetensors (averaged weights), evaluation.json and contact_sheet.png. The learning
rate follows the clock, not a step count, so that a run on any GPU ends with the rate decayed to zero.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.latte_transformer_3d import LatteTransformer3DModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pab_kernels.demo.curriculum import Curriculum, direction_gap, scene_stream
from pab_kernels.demo.evaluate import evaluate
from pab_kernels.demo.optimizer import FlatOptimizer
from pab_kernels.demo.scenes import SceneBatch, render
from pab_kernels.pipelines.demo import DemoPipeline, demo_scheduler, demo_transformer
from pab_kernels.pipelines.demo_text import TextEmbedding


class Denoiser(nn.Module):
    """The transformer with its text embedding: what is trained."""

    def __init__(self, transformer: LatteTransformer3DModel, text: TextEmbedding) -> None:
        super().__init__()
        self.transformer = transformer
        self.text = text

    def forward(self, pixels: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Predict v, [B, 3, T, H, W], from noisy pixels of that shape, timesteps [B] and tokens [B, L]."""
        text = self.text(tokens)
        return self.transformer(
            hidden_states=pixels, encoder_hidden_states=text, timestep=timesteps, return_dict=False
        )[0]

    def blocks(self) -> Iterator[Any]:
        """All spatial and temporal blocks."""
        yield from self.transformer.transformer_blocks
        yield from self.transformer.temporal_transformer_blocks


@torch.no_grad()
def initialize(model: Denoiser) -> None:
    """Let the output start at zero and the text loud.

    Left alone, the caption projection makes the text about a tenth as large as what it is added to, and the
    model finds its words half as fast. The blocks keep their random start: branches that start at zero took
    longer to learn directions.
    """
    transformer: Any = model.transformer
    transformer.proj_out.weight.zero_()
    transformer.proj_out.bias.zero_()
    transformer.caption_projection.linear_2.weight.mul_(4)


def learning_rate_scale(step: int, fraction: float, warmup: int) -> float:
    """Linear warm-up over the first steps, then half a cosine over the fraction of the time that is used."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(max(fraction, 0.0), 1.0)))
    return min(1.0, (step + 1) / warmup) * cosine


def training_loss(
    model: Denoiser,
    scenes: SceneBatch,
    alphas_cumprod: torch.Tensor,
    generator: torch.Generator,
    lowest: int = 0,
    dropout: float = 0.1,
) -> torch.Tensor:
    """Render scenes, draw timesteps from `lowest` up and noise; return the mean squared error of v (float32).

    With the betas of `demo_scheduler` half of the timesteps lie below a signal-to-noise ratio of 0.08. That is
    where flat shapes on flat ground are decided: their many equal pixels shine through a lot of noise.
    """
    config: Any = model.transformer.config
    batch, device = len(scenes), alphas_cumprod.device
    with torch.no_grad():
        video = render(scenes, config.video_length, config.sample_size)
        drop = torch.rand(batch, 1, generator=generator, device=device) < dropout
        tokens = scenes.tokens.masked_fill(drop, 0)
        # One timestep from each of `batch` equal bins: less variance than independent draws.
        bins = torch.arange(batch, device=device) + torch.rand(batch, generator=generator, device=device)
        levels = len(alphas_cumprod) - lowest
        timesteps = lowest + (bins * (levels / batch)).long().clamp(max=levels - 1)
        noise = torch.randn(video.shape, generator=generator, device=device)
        signal = alphas_cumprod[timesteps].sqrt().view(-1, 1, 1, 1, 1)
        sigma = (1 - alphas_cumprod[timesteps]).sqrt().view(-1, 1, 1, 1, 1)
        noisy = (signal * video + sigma * noise).to(model.text.position.dtype)
        target = signal * noise - sigma * video
    return F.mse_loss(model(noisy, timesteps, tokens).float(), target)


def compile_blocks(model: Denoiser) -> None:
    """Compile each block by itself: two graphs in all, so it takes seconds and not minutes."""
    transformer: Any = model.transformer
    # The patch embedding hands on a transposed view; the first block would need a third graph for it.
    transformer.pos_embed.register_forward_hook(lambda module, inputs, output: output.contiguous())
    for block in model.blocks():
        block.compile(dynamic=False)


def undo_compile(model: Denoiser) -> None:
    """Return to eager blocks."""
    for block in model.blocks():
        block._compiled_call_impl = None


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train, save and evaluate. Returns what evaluation.json holds."""
    begin = time.monotonic()
    deadline = begin + options.minutes * 60
    device = torch.device(options.device)
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(options.seed)
    generator = torch.Generator(device=device).manual_seed(options.seed)
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)

    if options.resume is None:
        transformer = demo_transformer(options.pairs, options.heads, options.size, options.frames)
        model = Denoiser(transformer, TextEmbedding())
        initialize(model)
    else:
        earlier = DemoPipeline.from_pretrained(options.resume)
        model = Denoiser(earlier.transformer, earlier.text).train().requires_grad_(True)
    model.to(device)
    scheduler = demo_scheduler()
    alphas_cumprod = scheduler.alphas_cumprod.to(device)
    averaged = copy.deepcopy(model).to(dtype).eval().requires_grad_(False)
    pipe = DemoPipeline(averaged.transformer, scheduler, averaged.text)
    # The masters start from the float32 weights, before the module itself goes to dtype.
    optimizer = FlatOptimizer(model, dtype, options.muon_lr, options.adam_lr, ema=options.ema)
    parameters = optimizer.master.numel()
    config: Any = averaged.transformer.config
    print(f"{parameters / 1e6:.2f} M parameters, {dtype}, {device}", flush=True)

    curriculum = Curriculum(released=None if options.curriculum and options.resume is None else -1.0)
    easy = curriculum.easy(0.0)
    stream = scene_stream(generator, options.batch, lambda: easy)

    def loss_and_backward() -> torch.Tensor:
        optimizer.zero_grad()
        loss = training_loss(model, next(stream), alphas_cumprod, generator, lowest=int(500 * easy))
        loss.backward()
        return loss.detach()

    if options.compile:
        try:
            compile_blocks(model)
            loss_and_backward()
        except Exception as error:
            undo_compile(model)
            print(f"torch.compile failed, going on without it: {type(error).__name__}: {error}", flush=True)
    loss_and_backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.monotonic()
    print(f"first step after {started - begin:.1f} s", flush=True)

    def checkpoint() -> None:
        optimizer.copy_average_to(averaged)
        pipe.save_pretrained(output)

    history: list[dict[str, float]] = []
    progress: list[dict[str, Any]] = []
    total = torch.zeros((), device=device)
    next_checkpoint = started + options.checkpoint_minutes * 60
    step, logged_step, logged_time = 0, 0, started
    while (now := time.monotonic()) < deadline and (options.max_steps is None or step < options.max_steps):
        fraction = (now - started) / max(deadline - started, 1e-6)
        if options.max_steps is not None:
            fraction = max(fraction, step / options.max_steps)
        easy = curriculum.easy(fraction)
        total += loss_and_backward()
        optimizer.step(learning_rate_scale(step, fraction, options.warmup))
        step += 1
        if step % options.log_every == 0:
            mean, skipped = (total / (step - logged_step)).item(), int(optimizer.skipped.item())
            now = time.monotonic()
            rate = (step - logged_step) / (now - logged_time)
            optimizer.copy_average_to(averaged)
            gap = direction_gap(averaged, alphas_cumprod, config.video_length, config.sample_size, dtype)
            entry = {
                "step": step,
                "seconds": round(now - begin, 1),
                "loss": round(mean, 5),
                "direction_gap": round(gap, 4),
                "easy": round(easy, 2),
            }
            history.append(entry)
            print(
                f"step {step}  {now - begin:.0f} s  loss {mean:.5f}  direction gap {gap:+.3f}  easy {easy:.2f}  "
                f"{rate:.2f} steps/s  skipped {skipped}",
                flush=True,
            )
            if curriculum.update(fraction, gap):
                print(f"step {step}  harder scenes begin", flush=True)
            if skipped > max(20, step // 10):
                raise RuntimeError(f"{skipped} of {step} gradients were not finite; lower --muon-lr and --adam-lr")
            total.zero_()
            logged_step, logged_time = step, now
        if time.monotonic() > next_checkpoint and deadline - time.monotonic() > 30:
            next_checkpoint += options.checkpoint_minutes * 60
            checkpoint()
            result = evaluate(pipe, steps=options.steps, count=options.evaluate, sheet=output / "contact_sheet.png")
            progress.append({"step": step, **result["guidance"]})
            print(f"step {step}  checkpoint, guidance {result['guidance']}", flush=True)

    checkpoint()
    print(f"saved after {step} steps, {time.monotonic() - begin:.0f} s", flush=True)
    final = evaluate(
        pipe,
        steps=options.steps,
        guidances=(2.0, 1.0, 1.5, 3.0),
        count=options.evaluate,
        sheet=output / "contact_sheet.png",
    )
    final |= {
        "training": {
            "steps": step,
            "batch": options.batch,
            "minutes": options.minutes,
            "parameters": parameters,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        },
        "progress": progress,
        "history": history[:: max(1, len(history) // 100)],
    }
    (output / "evaluation.json").write_text(json.dumps(final, indent=2) + "\n")
    for name, numbers in final["guidance"].items():
        print(f"guidance {name}: {numbers}")
    print(f"against the next prompt's expectation: {final['wrong_expectation']}")
    for failure in final["failures"]:
        print(f"failed: {failure}")
    return final


def parser() -> argparse.ArgumentParser:
    """Build the command line."""
    out = argparse.ArgumentParser(description="Train the demo model on generated scenes.")
    out.add_argument("--minutes", type=float, default=8.5, help="from the start to the end of training")
    out.add_argument("--output", type=Path, required=True)
    out.add_argument("--resume", type=Path, help="start from the weights in this folder, without the curriculum")
    out.add_argument("--batch", type=int, default=64, help="at most 128: flash attention's launch grid")
    out.add_argument("--muon-lr", type=float, default=5e-3)
    out.add_argument("--adam-lr", type=float, default=3e-3)
    out.add_argument("--warmup", type=int, default=200, help="steps of rising learning rate")
    out.add_argument("--ema", type=float, default=0.998)
    out.add_argument("--pairs", type=int, default=5, help="spatial blocks, and as many temporal ones")
    out.add_argument("--heads", type=int, default=3)
    out.add_argument("--size", type=int, default=48, help="pixels")
    out.add_argument("--frames", type=int, default=16)
    out.add_argument("--steps", type=int, default=30, help="denoising steps of the evaluation")
    out.add_argument("--evaluate", type=int, default=50, help="prompts of the evaluation")
    out.add_argument("--checkpoint-minutes", type=float, default=2.0)
    out.add_argument("--log-every", type=int, default=100, help="steps")
    out.add_argument("--max-steps", type=int, help="stop earlier, after this many steps")
    out.add_argument("--seed", type=int, default=0)
    out.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    out.add_argument("--curriculum", action=argparse.BooleanOptionalAction, default=True)
    out.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    out.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return out


def main() -> None:
    """Command line."""
    # cuDNN's attention plans anew for each shape; flash is the safe choice for short sequences.
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends):
        train(parser().parse_args())


if __name__ == "__main__":
    main()
