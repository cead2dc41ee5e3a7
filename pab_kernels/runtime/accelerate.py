"""`accelerate`: puts a Pyramid Attention Broadcast runtime behind a pipeline's transformer, or a bare one."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from pab_kernels.config import PABConfig
from pab_kernels.distributed.mesh import Mesh
from pab_kernels.runtime.cache import SlotPool
from pab_kernels.runtime.guidance import Conditional
from pab_kernels.runtime.handle import PABHandle
from pab_kernels.runtime.pair import PABHandles


def accelerate(
    target: Any,
    config: PABConfig,
    *,
    linear_precision: str | None = None,
    attention_precision: str | None = None,
    cache_dtype: str | None = None,
    cache_device: torch.device | str | None = None,
    cuda_graphs: bool = True,
    forwards_per_step: int = 1,
    keep_shapes: int = 4,
    conditional: Conditional | None = None,
    mesh: Mesh | None = None,
) -> Any:
    """Put a Pyramid Attention Broadcast runtime behind a pipeline or a bare transformer.

    Parameters
    ----------
    target : diffusers pipeline or nn.Module
        A pipeline with `.transformer` and `.scheduler`: its runs are noticed by themselves. Or a transformer: announce
        each run with ``handle.begin(timesteps)``. Of a pipeline with a `transformer_2` both are accelerated.
    config : PABConfig
    linear_precision : {"fp8", "fp8-all"}, optional
        Instead of the config's.
    attention_precision : {"fp8"}, optional
        Instead of the config's.
    cache_dtype : {"fp8", "int8"}, optional
        Instead of the config's.
    cuda_graphs : bool
        On a GPU, replay each `StepVariant` from a captured graph.
    forwards_per_step : int
        How often the transformer is called in a denoising step: 1 where guidance doubles the batch, 2 where the
        conditional and the unconditional half are called one after the other. Each has a cache of its own. Forwards
        that have names, from diffusers' ``cache_context("cond")``, need not be counted.
    cache_device : torch.device or str, optional
        "cpu" keeps the slots in pinned host memory, with a few staging tensors on the GPU, from which they are copied
        to and fro beside the computation. Broadcasting then saves time only where computing attention takes longer
        than moving its output over PCIe, as full attention over many tokens does. By default slots lie with the
        transformer.
    conditional : {"first", "second"}, optional
        Which half of the batch is the conditional one, where `config` broadcasts guidance and both halves are one call:
        by default as our pipelines have it, and "second" for diffusers' pipelines and bare transformers. Of two
        forwards a step the one that comes second is left out.
    mesh : Mesh, optional
        The ranks of the process group that run this together; each makes the same calls. See `Mesh`.
    keep_shapes : int
        Of so many shapes of call (resolution, length, batch) slots and graphs are kept, so that they can alternate; the
        one that was not used for longest goes, and all others where memory does not suffice.

    Returns
    -------
    PABHandle or PABHandles
        A context manager; leaving it (or ``close()``) restores the transformer bit for bit. For a pipeline with two
        transformers one that holds both handles.

    Raises
    ------
    TypeError, ValueError
        The transformer is of no known family, is accelerated already, or has modules or options (LoRA, quantised
        linears, hooks, unknown attention processors) that the executor would skip over; the message names them.
        diffusers' own parallelism is enabled; or the process group does not fit the mesh.
        Or an argument is out of range, or `linear_precision` is fp8 on a device without fp8 tensor cores, or
        `attention_precision` on one that is not a Hopper GPU.
    """
    given = {
        "linear_precision": linear_precision,
        "attention_precision": attention_precision,
        "cache_dtype": cache_dtype,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if changes and isinstance(config, PABConfig):
        config = dataclasses.replace(config, **changes)
    transformers: list[Any] = [target]
    if not isinstance(target, nn.Module):
        transformers = [getattr(target, name, None) for name in ("transformer", "transformer_2")]
        transformers = [each for each in transformers if isinstance(each, nn.Module)]
        if not transformers or not hasattr(target, "scheduler"):
            raise TypeError(
                f"target: got {type(target).__name__}, must be a transformer or a pipeline with one and a scheduler"
            )
    for each in transformers:
        if getattr(each, "_parallel_config", None) is not None:
            raise TypeError(
                f"{type(each).__name__}: enable_parallelism was called on it, must not be: its hooks and the runtime "
                "would both split the work. Load it anew, and use accelerate(..., mesh=Mesh(...))"
            )
    if not isinstance(mesh, Mesh | None):
        raise TypeError(f"mesh: got {type(mesh).__name__}, must be a Mesh")
    weight = next(transformers[0].parameters(), None)
    device = torch.device("cpu") if weight is None else weight.device
    options: dict[str, Any] = {
        "ranks": None if mesh is None else mesh.join(device),
        "pipeline": None if isinstance(target, nn.Module) else target,
        "cuda_graphs": cuda_graphs,
        "forwards_per_step": forwards_per_step,
        "cache_device": cache_device,
        "keep_shapes": keep_shapes,
        "conditional": conditional,
    }
    if len(transformers) == 1:
        return PABHandle(transformers[0], config, **options)
    pool = SlotPool()
    handles: list[PABHandle] = []
    try:
        for transformer in transformers:
            handles.append(PABHandle(transformer, config, pool=pool, **options))
    except BaseException:
        for handle in handles:
            handle.close()
        raise
    return PABHandles(handles)
