"""What a run needs of a GPU's memory, told before anything is allocated, and what would make it need less."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL

from pab_kernels.blocks.block import BlockStack
from pab_kernels.blocks.branches import CrossAttention, Weights
from pab_kernels.blocks.self_attention import SelfAttention
from pab_kernels.config import KINDS, PABConfig
from pab_kernels.distributed.mesh import Mesh
from pab_kernels.models import adapter_for, autoencoders, checkpoints
from pab_kernels.ops.backends import FP8_TOKENS, no_hopper
from pab_kernels.ops.quantized import DTYPES
from pab_kernels.pipelines.decoding import VideoDecoder
from pab_kernels.pipelines.sizes import DURATIONS, RESOLUTIONS, VideoSize, open_sora_size
from pab_kernels.runtime.plan import slot_keys, slot_places, storage
from pab_kernels.runtime.precision import Shape, Trial, layer_bytes, measure_shapes
from pab_kernels.runtime.slots import STAGES, SlotLayout, available_host_memory
from pab_kernels.runtime.workspace import TEXT_PADDING
from pab_kernels.schedule import Schedule

TEXT_LENGTHS = {
    "open_sora": 300,
    "latte": 120,
    "open_sora_plan_v110": 300,
    "open_sora_plan_v120": 512,
    "wan_2_1": 512,
    "wan_2_2": 512,
    "ltx": 128,
}
IMAGE_LENGTH = 257
"""Tokens of a picture, for Wan 2.1 from an image."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a run's parts."""

    weights: int
    slots: int
    """On the GPU: all of them, or what stands in for those in host memory."""
    text: int
    """Keys and values of the text, of every block with cross-attention."""
    activations: int
    """The largest set of tensors that is alive at once during a step."""
    slot_count: int
    host: int = 0
    """Slots in pinned host memory."""

    @property
    def total(self) -> int:
        """Bytes of all parts on the GPU."""
        return self.weights + self.slots + self.text + self.activations


@dataclass(frozen=True)
class PlannedRun:
    """A run, as far as its memory goes.

    `rows` is the batch that the transformer sees, 2 a prompt with guidance, and `forwards` how often a step calls it.
    `model` are config values that differ from the released model, and `transformers` how many there are, of which one
    runs at a time. With `cache_on_host` slots lie in pinned host memory. `timesteps` are the run's, as far as they are
    known. Of a `mesh` it is the rank that has most.
    """

    family: str
    size: VideoSize
    config: PABConfig
    rows: int = 2
    dtype: torch.dtype = torch.bfloat16
    cache_on_host: bool = False
    forwards: int = 1
    transformers: int = 1
    model: dict[str, Any] = field(default_factory=dict)
    timesteps: tuple[float, ...] = ()
    mesh: Mesh = field(default_factory=Mesh)

    @classmethod
    def of(
        cls, family: str, size: VideoSize, config: PABConfig, prompts: int = 1, model: str | None = None, **more: Any
    ) -> PlannedRun:
        """A run with guidance of `prompts` videos; `model` is the name of the model's size, `more` are other fields."""
        if family.startswith("wan"):  # each half of guidance is a call of its own; 2.2 has a transformer for much noise
            changes, pair = checkpoints.SIZES[family][model or "1.3b"], family == "wan_2_2" and model != "5b"
            return cls(family, size, config, prompts, forwards=2, transformers=2 if pair else 1, model=changes, **more)
        return cls(family, size, config, 2 * prompts, **more)

    @property
    def own(self) -> PlannedRun:
        """What a rank has of it: of guidance a half, be that of the batch or of the calls of a step."""
        if self.mesh.guidance == 1:
            return self
        if self.forwards > 1:
            return dataclasses.replace(self, forwards=1)
        return dataclasses.replace(self, rows=-(-self.rows // 2))


@dataclass(frozen=True)
class ModelShape:
    """What the memory depends on of a transformer, without its weights."""

    stack: BlockStack
    elements: int
    """Of all weights and tables."""
    patch: tuple[int, int]
    """Latent rows and columns of a token."""

    @classmethod
    def of(cls, family: str, **overrides: Any) -> ModelShape:
        """Build the transformer on the meta device; `overrides` differ from the released model.

        Raises
        ------
        ValueError
            Unknown family.
        """
        return cls.of_host(checkpoints.build(family, **overrides))

    @classmethod
    def of_host(cls, host: Any) -> ModelShape:
        """Of a transformer on the meta device, as if it were in bfloat16."""
        torch.nn.Module.to(host, torch.bfloat16)
        patch = host.config.patch_size
        return cls(
            stack=adapter_for(host).stack,
            elements=sum(tensor.numel() for tensor in (*host.parameters(), *host.buffers())),
            patch=(patch, patch) if isinstance(patch, int) else tuple(patch[1:]),
        )

    @property
    def channels(self) -> int:
        """Channels of the residual stream."""
        return self.stack.channels

    def shape(self, run: PlannedRun) -> tuple[int, int, int, int]:
        """(B, T, S, C) of the residual stream, of the latent frames those of a rank."""
        frames, height, width = run.size.latent
        tokens = -(-height // self.patch[0]) * -(-width // self.patch[1])
        return run.rows, -(-frames // run.mesh.frames), tokens, self.channels

    def stream(self, run: PlannedRun) -> int:
        """Bytes of the residual stream."""
        return math.prod(self.shape(run)) * run.dtype.itemsize

    def slot(self, run: PlannedRun) -> int:
        """Bytes of a slot."""
        small = run.config.cache_dtype
        return SlotLayout(self.shape(run), run.dtype if small is None else DTYPES[small]).nbytes

    @property
    def fp8_bytes(self) -> int:
        """Of the weights that all of the linears have beside the host's own when they run in fp8."""
        return sum(layer_bytes(branch.weights) for block in self.stack.blocks for branch in block.branches)


def estimate(run: PlannedRun, model: ModelShape | None = None) -> Memory:
    """Memory of the executor's path, from shapes alone.

    Text encoder and VAE are not counted, nor what the allocator keeps or CUDA itself takes (about 1 GiB). Which MLP
    slots share memory, and which have a second one, depends on the timesteps: without them each counts once.

    Parameters
    ----------
    run : PlannedRun
    model : ModelShape, optional
        By default that of the released model.

    Raises
    ------
    ValueError
        Unknown family.
    """
    model = ModelShape.of(run.family, **run.model) if model is None else model
    run = run.own
    item = run.dtype.itemsize
    slots = _slots(run, model)
    branches = [place.branch for place in slot_places(model.stack, run.config)]
    gated = sum(isinstance(branch.gate, int) and not branch.regate for branch in branches)
    gates = gated * run.rows * model.channels * item
    on_device = min(STAGES, slots) if run.cache_on_host else slots
    weights = model.elements * item + (0 if run.config.linear_precision is None else model.fp8_bytes)
    return Memory(
        weights=run.transformers * weights,
        slots=run.forwards * (on_device * model.slot(run) + gates),
        text=run.forwards * _text(run, model),
        activations=run.forwards * _activations(run, model),
        slot_count=run.forwards * slots,
        host=run.forwards * slots * model.slot(run) if run.cache_on_host else 0,
    )


def _slots(run: PlannedRun, model: ModelShape) -> int:
    """How many there are for a forward."""
    if not run.timesteps:
        return len(slot_keys(model.stack, run.config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a window that no timestep opens: said when the run begins
        return len(set(storage(model.stack, Schedule(run.config, run.timesteps)).values()))


def decoder_memory(
    family: str, latent: tuple[int, int, int], dtype: torch.dtype, bound: int | None = None, seamless: bool = False
) -> tuple[int, int] | None:
    """Bytes of a family's released decoder and of its largest piece on planes; None where it is not this package's.

    Weights are counted with their packed copies.

    Raises
    ------
    ValueError
        No piece fits `bound`.
    """
    if family not in (*autoencoders.CLASSES, "latte"):
        return None
    with torch.device("meta"):
        vae: Any = AutoencoderKL(**autoencoders.IMAGES) if family == "latte" else autoencoders.build(family)
    decoder = VideoDecoder(torch.nn.Module.to(vae, dtype), memory=bound, seamless=seamless)
    piece = decoder.piece_bytes(latent)
    return sum(parameter.nbytes for parameter in vae.parameters()) + decoder.packed_bytes, piece


def fp8_trials(run: PlannedRun) -> dict[Shape, Trial] | str:
    """What each shape of linear takes in the run's dtype and in fp8, measured here; or why none can run in fp8."""
    model = ModelShape.of(run.family, **run.model)
    batch, frames, tokens, _ = model.shape(run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return measure_shapes(model.stack, batch * frames * tokens, device, run.dtype)
    except ValueError as error:
        return str(error)


def fp8_attention(run: PlannedRun, model: ModelShape) -> dict[str, str] | str:
    """Of each self-attention that could run in fp8 on this machine whether it does; or why none can."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if why_not := no_hopper(device):
        return why_not
    found = {}
    shape = model.shape(dataclasses.replace(run, mesh=Mesh()))
    for block in model.stack.blocks:
        for branch in block.branches:
            weights = branch.weights
            if isinstance(weights, SelfAttention) and weights.sequence != "temporal":
                head_dim, tokens = model.channels // weights.heads, weights.keys(shape, 0)
                least = FP8_TOKENS.get(head_dim)
                runs = "yes" if least is not None and tokens >= least else "no"
                why = "no such head_dim" if least is None else f"from {least:,} tokens on"
                found[branch.kind] = f"{runs}: {tokens:,} tokens, head_dim {head_dim} ({why})"
    return found


def _text(run: PlannedRun, model: ModelShape) -> int:
    """K and V are each as wide as the stream; the length is padded as for graphs."""
    length = -(-TEXT_LENGTHS[run.family] // TEXT_PADDING) * TEXT_PADDING
    weights = [branch.weights for block in model.stack.blocks for branch in block.branches]
    crossing = [each for each in weights if isinstance(each, CrossAttention)]
    tokens = sum(length + (0 if each.image is None else IMAGE_LENGTH) for each in crossing)
    return tokens * run.rows * 2 * model.channels * run.dtype.itemsize


def _activations(run: PlannedRun, model: ModelShape) -> int:
    """Stream, scratch and modulated stream, and on top a branch's widest moment; twice the stream for the stack."""
    shape, blocks = model.shape(run), model.stack.blocks
    widest = max(_widest(branch.weights, shape) for block in blocks for branch in block.branches)
    tables = 2 * sum(block.vectors for block in blocks) * model.channels * (run.rows + 1) * run.dtype.itemsize
    frames, height, width = run.size.latent
    latents = run.rows * 4 * frames * height * width * 4 * 4  # latents, input, prediction of 8 channels; float32
    tensors = 3 + widest + (2 if run.config.stack_broadcast else 0)
    tensors += 5 if run.mesh.frames > 1 else 0  # queries, keys and values packed and received, and outputs that go back
    return int(model.stream(run) * tensors) + tables + latents


def _widest(weights: Weights, shape: tuple[int, int, int, int]) -> float:
    """The first GEMM's output, and attention's own, in tensors of the stream's size."""
    return weights.linears[0].weight.shape[0] / shape[3] + (weights.keys(shape, 1) > 0)


def check_fits(run: PlannedRun, free: int, extra: int = 0, host_free: int | None = None) -> Memory:
    """Refuse a run that will not fit.

    Parameters
    ----------
    run : PlannedRun
    free : int
        Bytes that the GPU has free.
    extra : int
        Bytes of what else will lie there, such as the text encoder.
    host_free : int, optional
        Bytes that the host has free; by default what it says now.

    Returns
    -------
    Memory

    Raises
    ------
    ValueError
        The run needs more than there is; the message names its parts, and other runs that would fit.
    """
    model = ModelShape.of(run.family, **run.model)
    host_free = available_host_memory() if host_free is None else host_free

    def fits(memory: Memory) -> bool:
        return memory.total + extra <= free and memory.host <= host_free

    need = estimate(run, model)
    if fits(need):
        return need
    fitting = []
    for name, smaller in smaller_runs(run):
        memory = estimate(smaller, model)
        if fits(memory):
            host = f" and {gib(memory.host):.1f} in host memory" if memory.host else ""
            fitting.append(f"{name} ({gib(memory.total + extra):.1f} GiB{host})")
    others = f", {gib(extra):.1f} others" if extra else ""
    host = f" and {gib(need.host):.1f} GiB of host memory, of which {gib(host_free):.1f} are free" if need.host else ""
    raise ValueError(
        f"{run.family} at {run.size} with a batch of {run.rows} needs {gib(need.total + extra):.1f} GiB "
        f"({gib(need.weights):.1f} weights, {gib(need.slots):.1f} in {need.slot_count} slots, {gib(need.text):.1f} "
        f"text, {gib(need.activations):.1f} activations{others}), but {gib(free):.1f} GiB are free{host}. "
        + (f"These would fit: {'; '.join(fitting)}." if fitting else "No smaller run of this family would fit.")
    )


def smaller_runs(run: PlannedRun) -> Iterator[tuple[str, PlannedRun]]:
    """What could be changed to need less memory of the GPU, one change at a time."""
    on = [kind for kind in KINDS if getattr(run.config, f"{kind}_broadcast")]
    if on and not run.cache_on_host:
        yield "--cache-device cpu", dataclasses.replace(run, cache_on_host=True)
    if len(on) > 1:
        for kind in on:
            yield f"no {kind}_broadcast", _with(run, **{f"{kind}_broadcast": False})
    for count in (21, 14, 7):
        if on:
            blocks = {f"{kind}_block": (0, count) for kind in on}
            yield f"{', '.join(blocks)} of [0, {count}]", _with(run, **blocks)
    if on and run.config.cache_dtype is None:
        yield "--cache-dtype fp8", _with(run, cache_dtype="fp8")
    if on:
        yield "--pab off", dataclasses.replace(run, config=PABConfig())
    if run.rows * run.forwards > 2:
        yield "one prompt at a time", dataclasses.replace(run, rows=2 // run.forwards)
    if run.family == "open_sora":
        yield from _smaller_sizes(run)


def _with(run: PlannedRun, **settings: Any) -> PlannedRun:
    return dataclasses.replace(run, config=dataclasses.replace(run.config, **settings))


def _smaller_sizes(run: PlannedRun) -> Iterator[tuple[str, PlannedRun]]:
    size = run.size
    for name, frames in reversed(DURATIONS.items()):
        if frames < size.frames:
            latent = (frames // 17 * 5, *size.latent[1:])
            yield (
                f"--duration {name}",
                dataclasses.replace(run, size=VideoSize(frames, size.height, size.width, latent)),
            )
    for resolution in reversed(RESOLUTIONS):
        smaller = open_sora_size(resolution, "9:16", size.frames)
        if smaller.height * smaller.width < 0.9 * size.height * size.width:
            yield f"--resolution {resolution}", dataclasses.replace(run, size=smaller)


def gib(size: int) -> float:
    """Bytes in GiB."""
    return size / 2**30
