"""What is allocated for one shape of call: the executor with its slots, the text's keys and values, the graphs."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from pab_kernels.blocks.block import BlockStack, Modulation
from pab_kernels.blocks.branches import TextKV
from pab_kernels.models.adapter import MODULATION_INDEX, Adapter, Call
from pab_kernels.runtime.cache import BroadcastCache
from pab_kernels.runtime.executor import Executor
from pab_kernels.runtime.graphs import StepGraphs
from pab_kernels.runtime.plan import storage
from pab_kernels.runtime.rectified_flow import euler_step
from pab_kernels.schedule import Schedule, StepVariant

TEXT_PADDING = 64
"""For graphs, text is padded to a multiple of this many tokens."""


class Workspace:
    """Runs the calls of one stream of denoising calls, all of one shape.

    Parameters
    ----------
    adapter : Adapter
    stack : BlockStack
        The adapter's, or the same with linears in fp8.
    schedule : Schedule
        Of the first run.
    call : Call
        The first call; its shape is that of all.
    cuda_graphs : bool
        Replay steps from graphs where the device allows it.
    cache_device : torch.device
        Where the slots lie; see `BroadcastCache`.
    """

    def __init__(
        self,
        adapter: Adapter,
        stack: BlockStack,
        schedule: Schedule,
        call: Call,
        cuda_graphs: bool,
        cache_device: torch.device,
    ) -> None:
        self._adapter = adapter
        self._executor = Executor(stack, schedule, call.layout, cache_device)
        self._latents_shape = call.tensors["latents"].shape
        self._text: list[TextKV | None] = []
        self._text_shapes: tuple[torch.Size, torch.Size | None] | None = None
        self._kv_len: Tensor | None = None
        self._sources: tuple[tuple[Tensor, int], ...] = ()
        self._graphs: StepGraphs | None = None
        self.eager: str | None = None
        """Why steps run without CUDA graphs, None where they have them."""
        if not cuda_graphs:
            self.eager = "switched off"
        elif call.tensors["latents"].device.type != "cuda":
            self.eager = "not on a CUDA device"

    @property
    def cache(self) -> BroadcastCache:
        """The slots."""
        return self._executor.cache

    @property
    def stack(self) -> BlockStack:
        """The blocks as they run."""
        return self._executor.stack

    @property
    def graphs(self) -> int:
        """How many graphs are captured."""
        return 0 if self._graphs is None else len(self._graphs)

    def fits(self, call: Call) -> bool:
        """Whether `call` has the shape that this workspace is for."""
        return self._executor.layout == call.layout and self._latents_shape == call.tensors["latents"].shape

    def serves(self, schedule: Schedule) -> bool:
        """Whether a run of this plan needs the slots that there are."""
        return storage(self.stack, schedule) == self.cache.storage

    def begin_run(self) -> None:
        """Forget every slot's content, and which text was last seen."""
        self.cache.invalidate()
        self._sources = ()

    def step(self, call: Call, variant: StepVariant, flow: dict[str, Tensor] | None = None) -> Tensor:
        """One denoising call, in a tensor of the caller's own.

        Parameters
        ----------
        call : Call
        variant : StepVariant
        flow : dict of Tensor, optional
            From `FlowInputs.at`: take a whole step of rectified flow on these latents, not `call`'s.

        Returns
        -------
        Tensor
            The host's prediction [B, C_out, T, H, W], or with `flow` the latents after the step.

        Raises
        ------
        ValueError
            The variant broadcasts from a slot that this run has not written.
        """
        traffic = self._executor.traffic(variant)
        self.cache.require(traffic.reads)
        self._adapter.prepare(call)
        self._update_text(call)

        def predict(tensors: dict[str, Tensor], modulation: Modulation | None = None) -> Tensor:
            now = dataclasses.replace(call, tensors=tensors)
            modulation = modulation or self._adapter.modulate(now)
            h = self._executor.step(
                self._adapter.embed(now),
                modulation,
                self._text,
                variant,
                embed=self._adapter.frame_embed(now),
                rope=self._adapter.rope(now),
                index=tensors.get(MODULATION_INDEX),
            )
            return self._adapter.project_out(h, now)

        def flow_step(tensors: dict[str, Tensor]) -> Tensor:
            latents, packed = tensors["latents"], tensors["modulation"]
            both = latents.repeat(call.layout.batch // len(latents), 1, 1, 1, 1).to(call.tensors["latents"].dtype)
            modulation = Modulation(packed[:, :-2], packed[:, -2], packed[:, -1])
            return euler_step(latents, predict({**tensors, "latents": both}, modulation), *tensors["scales"])

        run, inputs = (predict, call.tensors) if flow is None else (flow_step, flow)
        if self.eager is None:
            if self._graphs is None or not self._graphs.fit(inputs):
                self._graphs = StepGraphs(inputs)
            result = self._graphs.run(variant, run, inputs)
            self.eager = self._graphs.failure
        else:
            result = run(inputs)
        self.cache.mark_written(traffic.writes)
        return result

    def _update_text(self, call: Call) -> None:
        """Make keys and values of the text, if the caller handed over another one than at the last call.

        For graphs the text is padded to a multiple of `TEXT_PADDING` with its length on the device, so that a prompt
        of another length replays the graphs there are.
        """
        sources = tuple((tensor, tensor._version) for tensor in call.text_sources)
        if len(sources) == len(self._sources) and all(
            new is old and version == old_version
            for (new, version), (old, old_version) in zip(sources, self._sources, strict=True)
        ):
            return
        text, kv_len = _pack(call.text, call.text_mask)
        if self.eager is None:
            if kv_len is None:
                kv_len = torch.full((len(text),), text.shape[1], dtype=torch.int32, device=text.device)
            text = F.pad(text, (0, 0, 0, -text.shape[1] % TEXT_PADDING))
        shapes = (text.shape, None if call.image is None else call.image.shape)
        same = self._text_shapes == shapes and (self._kv_len is None) == (kv_len is None)
        if same and self._kv_len is not None and kv_len is not None:
            kv_len = self._kv_len.copy_(kv_len)
        elif not same:
            self._graphs = None  # they read the keys and values where they lay
        projected = self._adapter.project_text(text)
        image = None if call.image is None else self._adapter.project_image(call.image)
        self._text = self._executor.text_kv(projected, kv_len, out=self._text if same else None, image=image)
        self._kv_len, self._text_shapes, self._sources = kv_len, shapes, sources


def _pack(text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Text [B, L, C] with the tokens that count in front, and how many they are (int32 [B]).

    Attention does not depend on the order of its keys, so a mask with holes becomes a length.
    """
    if mask is None:
        return text, None
    order = mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return text.gather(1, order[..., None].expand_as(text)), mask.sum(1, dtype=torch.int32)
