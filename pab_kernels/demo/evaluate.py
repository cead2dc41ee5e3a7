"""Does the demo model follow its prompts? `python -m pab_kernels.demo.evaluate` answers in numbers.

Each prompt of the fixed list is generated, and `score.check` compares colour and direction of motion.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from pab_kernels.demo.score import check, measure
from pab_kernels.pipelines.demo import DemoPipeline
from pab_kernels.pipelines.demo_captions import EvaluationPrompt, evaluation_prompts


def generate(
    pipe: DemoPipeline,
    prompts: Sequence[EvaluationPrompt],
    *,
    steps: int = 30,
    guidance: float = 2.0,
    batch: int = 50,
    seed: int = 1000,
) -> np.ndarray:
    """Generate a video for each prompt; the i-th uses seed + i.

    Returns
    -------
    numpy.ndarray
        uint8 [N, T, H, W, 3].
    """
    videos = []
    for first in range(0, len(prompts), batch):
        part = prompts[first : first + batch]
        frames = pipe(
            [item.prompt for item in part],
            num_inference_steps=steps,
            guidance_scale=guidance,
            seed=seed + first,
        )
        videos.append((frames * 255).round().to(torch.uint8).cpu().numpy())
    return np.concatenate(videos)


def accuracy(videos: np.ndarray, prompts: Sequence[EvaluationPrompt]) -> dict[str, float]:
    """Share of the videos [N, T, H, W, 3] with the right "colour", "direction", and "both"."""
    verdicts = [check(v, p.colour, p.direction) for v, p in zip(videos, prompts, strict=True)]
    return {
        name: sum(getattr(verdict, name) for verdict in verdicts) / len(verdicts)
        for name in ("colour", "direction", "both")
    }


def contact_sheet(
    videos: np.ndarray, prompts: Sequence[EvaluationPrompt], path: Path, zoom: int = 1, columns: int = 16
) -> None:
    """Write a PNG with one row a prompt, frames side by side; a red caption marks a failed check."""
    count, frames, height, width, _ = videos.shape
    shown = np.unique(np.linspace(0, frames - 1, min(columns, frames)).round().astype(int))
    label = 14
    row = height * zoom + label
    sheet = Image.new("RGB", (len(shown) * (width * zoom + 2), count * row), "black")
    draw = ImageDraw.Draw(sheet)
    for i, (video, item) in enumerate(zip(videos, prompts, strict=True)):
        right = check(video, item.colour, item.direction).both
        draw.text((2, i * row + 1), item.prompt, fill="white" if right else (255, 80, 80))
        for j, frame in enumerate(shown):
            image = Image.fromarray(video[frame]).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
            sheet.paste(image, (j * (width * zoom + 2), i * row + label))
    sheet.save(path)


def evaluate(
    pipe: DemoPipeline,
    *,
    steps: int = 30,
    guidances: Sequence[float] = (2.0,),
    batch: int = 50,
    count: int = 50,
    sheet: Path | None = None,
) -> dict[str, Any]:
    """Run the fixed evaluation and return its numbers.

    Parameters
    ----------
    pipe : DemoPipeline
        What to evaluate.
    steps : int
        Denoising steps.
    guidances : sequence of float
        Guidance scales; the first one is the one that counts, and that the contact sheet shows.
    batch : int
        Prompts generated together.
    count : int
        Prompts, from the fixed list.
    sheet : Path, optional
        Where to write the contact sheet.

    Returns
    -------
    dict
        "guidance" maps each scale to its accuracies; "wrong_expectation" holds those of the first scale's
        videos against the next prompt's colour and direction, which a working check must score near chance;
        "failures" lists what was seen where the check failed.
    """
    prompts = evaluation_prompts(count, seed=0)
    result: dict[str, Any] = {"steps": steps, "prompts": count, "guidance": {}}
    for guidance in guidances:
        videos = generate(pipe, prompts, steps=steps, guidance=guidance, batch=batch)
        result["guidance"][str(guidance)] = accuracy(videos, prompts)
        if guidance != guidances[0]:
            continue
        result["wrong_expectation"] = accuracy(videos, [*prompts[1:], prompts[0]])
        result["failures"] = []
        for item, video in zip(prompts, videos, strict=True):
            seen = measure(video)
            if (seen.colour, seen.motion) != (item.colour, item.direction):
                result["failures"].append({"prompt": item.prompt, "colour": seen.colour, "motion": seen.motion})
        if sheet is not None:
            contact_sheet(videos, prompts, sheet)
    return result


def main() -> None:
    """Command line: evaluate a folder of weights, by default the shipped ones."""
    parser = argparse.ArgumentParser(description="Check that the demo model follows its prompts.")
    parser.add_argument("--path", type=Path, help="folder with the weights (default: the shipped ones)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.0])
    parser.add_argument("--count", type=int, default=50, help="prompts")
    parser.add_argument("--batch", type=int, default=1, help="prompts generated together")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet (PNG) here")
    options = parser.parse_args()
    dtype = torch.bfloat16 if options.device.startswith("cuda") else torch.float32
    pipe = DemoPipeline.from_pretrained(options.path, dtype=dtype, device=options.device)
    result = evaluate(
        pipe,
        steps=options.steps,
        guidances=options.guidance,
        batch=options.batch,
        count=options.count,
        sheet=options.sheet,
    )
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
