"""What two ranks do besides the steps of a bare transformer: diffusers' pipelines, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from pab_kernels import Mesh, PABConfig, accelerate
from tests.distributed.rank_tools import CONFIGS, STEPS, model
from tests.latte_tools import call, inputs, tiny_latte
from tests.wan_tools import PIPELINES, generate

NAMES = ("wan t2v, two transformers", "wan i2v", "wan ti2v, image", "ltx")
MESHES = (Mesh(2, 1), Mesh(1, 2))


def pipeline_run(name: str, mesh: Mesh | None, guidance_scale: float = 4.0) -> Tensor:
    """Latents of a run with PAB."""
    pipe = PIPELINES[name]()
    with accelerate(pipe, CONFIGS["pab"], mesh=mesh):
        return generate(pipe, 6, guidance_scale=guidance_scale)


@torch.no_grad()
def guidance_ends(mesh: Mesh | None) -> Tensor:
    """A run whose batch of both halves is one of the conditional half from the fifth step on."""
    host, (latents, text) = tiny_latte(), inputs()
    found = []
    with accelerate(host, CONFIGS["pab"], mesh=mesh) as handle:
        handle.begin(STEPS)
        for step, t in enumerate(STEPS):
            rows = slice(0, 2 if step < 4 else 1)
            found.append(call(host, latents[rows], text[rows], t)[:1])
    return torch.stack(found)


@torch.no_grad()
def refused(mesh: Mesh, family: str, frames: slice = slice(None), differ: bool = False) -> str:
    """The message of the error that two steps raise."""
    made = model(family)
    latents = made.latents[:, :, frames] + (dist.get_rank() if differ else 0)
    with accelerate(made.transformer, PABConfig(), mesh=mesh, forwards_per_step=len(made.calls)) as handle:
        handle.begin(STEPS)
        try:
            for t in STEPS[:2]:
                latents = made.step(latents, t)
        except ValueError as error:
            return str(error)
    return "nothing"


REFUSED: dict[str, tuple[Callable[[], str], str]] = {
    "other latents": (lambda: refused(Mesh(1, 2), "latte", differ=True), "latents.*differ between the ranks"),
    "one frame": (
        lambda: refused(Mesh(1, 2), "open_sora", frames=slice(1)),
        "mesh: frames=2 for 1 latent frames, must be at most as many",
    ),
}


def unfollowed() -> str:
    """A step without its second forward, and the one after it."""
    made = model("wan")
    with accelerate(made.transformer, PABConfig(), mesh=Mesh(2, 1)) as handle, torch.no_grad():
        handle.begin(STEPS)
        try:
            for t in STEPS[:2]:
                with made.transformer.cache_context("cond"):
                    made.transformer(made.latents, timestep=made.stamp(made.latents, t), **made.calls[0])
        except ValueError as error:
            return str(error)
    return "nothing"


def everything() -> dict[str, object]:
    """All of it, on one of two ranks."""
    found: dict[str, object] = {f"{name}, {mesh}": pipeline_run(name, mesh) for name in NAMES for mesh in MESHES}
    found["no guidance"] = pipeline_run("wan t2v, two transformers", Mesh(2, 1), 1.0)
    found |= {f"ends, {mesh}": guidance_ends(mesh) for mesh in MESHES}
    found |= {name: ask() for name, (ask, _) in REFUSED.items()}
    found["unfollowed"] = unfollowed()
    return found
