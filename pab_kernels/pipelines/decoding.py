"""Decodes latents by the piece: in half precision on a GPU on planes, else by the host.

Pieces are the originals' unless something else is asked for. While one is decoded, the frames of the one before are on
their way to the host's memory, so that a video file can be written beside.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pab_kernels.distributed.spread import spread
from pab_kernels.models.hosts.open_sora_plan_vae import CausalVAE
from pab_kernels.models.hosts.open_sora_vae import SPATIAL_SCALE, OpenSoraVAE
from pab_kernels.models.hosts.tiles import Tiling
from pab_kernels.ops.checks import check_shape
from pab_kernels.ops.planes import from_planes
from pab_kernels.pipelines.sizes import VideoSize
from pab_kernels.pipelines.vae import decode
from pab_kernels.quality import Frames
from pab_kernels.runtime.decoders import PlaneDecoder, plan_decoder, spatial_decoder, temporal_decoder
from pab_kernels.runtime.graphs import StepGraphs
from pab_kernels.runtime.lane import Lane

MEMORY = 4 * 2**30
"""Bytes for pieces where no bound is given and their size changes nothing in the numbers."""
MOST_FRAMES = 17
"""Of Open-Sora at a time: more of them would not keep a GPU busier, and the first ones would come later."""
MOST_GRAPHS = 8
"""Shapes of pieces that keep a graph."""
UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_bytes(text: str) -> int:
    """ "4GiB", "500 MB" or a number of bytes.

    Raises
    ------
    ValueError
        Something else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): size for unit, size in UNITS.items()}
    size = float(match[1]) * units.get(match[2].lower(), 0) if match is not None else 0.0
    if not 0 < size < math.inf:
        raise ValueError(f"decode_memory: got {text!r}, must be a size such as 4GiB, 800MiB or 4GB")
    return int(size)


@dataclass(frozen=True)
class Decoded:
    """A video, uint8 [F, H, W, 3], and whether all numbers of it were finite before they became bytes."""

    frames: Frames
    finite: bool


Sink = Callable[[Frames], None]


def decode_video(
    vae: Any,
    latents: Tensor,
    size: VideoSize,
    scale: Sequence[float],
    shift: Sequence[float],
    sink: Sink | None = None,
) -> Decoded:
    """The video of latents [C, T, H, W], from a `VideoDecoder` or any video autoencoder of diffusers.

    `scale` and `shift` are those that the latter's latents need, and `size` what it is cut to; the former knows them.
    `sink` gets frames as they are done.
    """
    if isinstance(vae, VideoDecoder):
        return vae.decode(latents, size.frames, sink)
    factors, offsets = (torch.tensor(values, device=latents.device).view(-1, 1, 1, 1) for values in (scale, shift))
    video = decode(vae, (latents * factors + offsets)[None], size)[0]
    frames = (video.nan_to_num(0.0) * 255).round().to(torch.uint8).numpy()
    if sink is not None:
        sink(frames)
    return Decoded(frames, bool(video.isfinite().all()))


class VideoDecoder:
    """A video autoencoder with how it is to decode.

    Parameters
    ----------
    vae : OpenSoraVAE, CausalVAE, or diffusers' AutoencoderKL, which decodes Latte's frames one by one
        Its weights are packed once: where they change, make another decoder.
    memory : int, optional
        Bytes that a piece may take beside the weights. It picks how many frames of Open-Sora and Latte are decoded at
        a time, which changes nothing else, 4 GiB by default; and the tiles of Open-Sora-Plan, which are the original
        script's by default and blend where they meet.
    seamless : bool
        Not the original's pieces: Open-Sora's chunks of 17 frames see the chunk before and fade over from it;
        Open-Sora-Plan's frames are decoded whole, so that norms span them, in chunks of time as `memory` allows.
    ranks : int
        Of torch's default process group, over which pieces are spread: every rank decodes the same latents, and has the
        whole video in the end.

    Raises
    ------
    ValueError
        `memory` is not positive.
    """

    def __init__(self, vae: Any, *, memory: int | None = None, seamless: bool = False, ranks: int = 1) -> None:
        if memory is not None and memory < 1:
            raise ValueError(f"decode_memory: got {memory}, must be at least 1 byte")
        self.vae = vae
        self.memory = memory
        self.seamless = seamless
        self.ranks = ranks
        self._each: Callable[..., Iterable[Tensor]] = spread if ranks > 1 else map
        self.is_open_sora = isinstance(vae, OpenSoraVAE)
        self.is_plan = isinstance(vae, CausalVAE)
        self._packed: dict[str, PlaneDecoder] = {}
        self._graphs: dict[tuple[str | int, ...], StepGraphs] = {}
        self._lanes: dict[torch.device, Lane] = {}

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        own = self.vae if self.is_open_sora or self.is_plan else self.vae.config
        return own.latent_channels

    @property
    def parameter(self) -> nn.Parameter:
        """One of the weights: all have its dtype and device."""
        return next(self.vae.parameters())

    def to(self, *args: Any, **kwargs: Any) -> VideoDecoder:
        """Move or cast the weights as `torch.nn.Module.to` does; returns the decoder."""
        nn.Module.to(self.vae, *args, **kwargs)
        self._packed, self._graphs = {}, {}
        return self

    @property
    def on_planes(self) -> bool:
        """Whether this decoder's kernels serve: on a GPU in half precision."""
        return self.parameter.is_cuda and self.parameter.dtype in (torch.float16, torch.bfloat16)

    def check(self, latents: Tensor, frames: int) -> None:
        """Raise ValueError unless `latents` [C, T, H, W] can be those of a video of `frames`."""
        check_shape("latents", latents, (self.latent_channels, "T", "H", "W"))
        made = self._frames_of(latents.shape[1], frames)
        if made != frames or latents.numel() == 0:
            raise ValueError(f"latents: shape is {list(latents.shape)}, which gives {made} frames, must give {frames}")

    def _frames_of(self, latents: int, frames: int) -> int:
        if not self.is_open_sora:
            return 4 * (latents - 1) + 1 if self.is_plan else latents
        return latents * self.vae.temporal_vae.factor - sum(self.vae.dropped(latents, frames))

    @property
    def packed_bytes(self) -> int:
        """Of the weights that have been packed so far."""
        return sum(decoder.weight_bytes for decoder in self._packed.values())

    def piece_bytes(self, latents: tuple[int, int, int]) -> int:
        """Most memory that a piece of latents (T, H, W) takes on planes, weights not counted.

        Raises
        ------
        ValueError
            No piece fits the memory bound.
        """
        frames, height, width = latents
        if not self.is_plan:
            each = self._decoder("spatial").nbytes(1, height, width)
            most = self._frames_within(each, height, width) * each
            if self.is_open_sora:
                chunk = self.vae.latents_of(self.vae.micro_frame_size) if self.vae.micro_frame_size else frames
                chunk = min(chunk * (2 if self.seamless else 1), frames)
                most = max(most, self._decoder("temporal").nbytes(chunk, height, width))
            return most
        tiling = self.tiling(latents)
        if tiling is None:
            return self._piece_bytes(frames, height, width)
        side = tiling.tile_latent_min_size
        return self._piece_bytes(min(tiling.tile_latent_min_size_t, frames), min(side, height), min(side, width))

    @torch.no_grad()
    def decode(self, latents: Tensor, frames: int, sink: Sink | None = None) -> Decoded:
        """Decode a video.

        Parameters
        ----------
        latents : Tensor
            [C, T, H, W], as the transformer gives them.
        frames : int
            Of the video.
        sink : callable, optional
            Gets uint8 frames [n, H, W, 3] in order, as they are done, while the next ones are decoded.

        Raises
        ------
        ValueError
            Latents of another shape or length, or a memory bound that no piece fits.
        """
        self.check(latents, frames)
        parameter = self.parameter
        z = latents[None].to(parameter.device, parameter.dtype)
        host: Tensor | None = None
        on_the_way: list[tuple[int, int, torch.cuda.Event | None]] = []
        finite = []

        def hand_over() -> None:
            start, end, done = on_the_way.pop(0)
            if done is not None:
                done.synchronize()
            if sink is not None and host is not None:
                sink(host[start:end].numpy())

        start = 0
        for video in self._videos(z, frames):
            if host is None:  # tiles that overlap by a part of a latent give another width
                host = torch.empty((frames, *video.shape[1:]), dtype=torch.uint8, pin_memory=video.is_cuda)
            finite.append(video.isfinite().all())
            end = start + len(video)
            host[start:end].copy_(self._bytes(video), non_blocking=True)
            done = torch.cuda.current_stream(video.device).record_event() if video.is_cuda else None
            on_the_way.append((start, end, done))
            start = end
            if len(on_the_way) > 1:
                hand_over()
        hand_over()
        assert host is not None
        return Decoded(host.numpy(), bool(torch.stack(finite).all()))

    def _bytes(self, video: Tensor) -> Tensor:
        """Frames about [-1, 1] as uint8; what is not finite is black."""
        pixels = video.float().nan_to_num(-1.0).clamp_(-1, 1).add_(1).mul_(127.5)
        # The others round, Open-Sora-Plan cuts off.
        return (pixels if self.is_plan else pixels.add_(0.5)).to(torch.uint8)

    def _videos(self, z: Tensor, frames: int) -> Iterator[Tensor]:
        """Pieces [n, H, W, 3] of the video of latents [1, C, T, H, W]."""
        if not self.is_plan:
            spatial = self._temporal(z, frames) if self.is_open_sora else z / SPATIAL_SCALE
            count = -(-spatial.shape[2] // self.frames_at_once(z.shape[3], z.shape[4]))
            count = min(-(-count // self.ranks) * self.ranks, spatial.shape[2])  # a piece or more for each
            yield from self._each(self._spatial, spatial.tensor_split(count, dim=2))
            return
        for chunk in self.vae.decode_chunks(z, self.tiling(z.shape[2:]), self._plan_piece, self._each):
            yield chunk[0].permute(1, 2, 3, 0)

    # Open-Sora, Latte

    @property
    def _images(self) -> Any:
        """The image autoencoder."""
        return self.vae.spatial_vae.module if self.is_open_sora else self.vae

    def _temporal(self, z: Tensor, frames: int) -> Tensor:
        """Spatial latents [1, C, F, H, W], over their scale."""
        run = None
        if self.on_planes:
            run = lambda piece: from_planes(self._run("temporal", piece[0]))[None]  # noqa: E731
        return self.vae.decode_temporal(z, frames, run=run, each=self._each, seamless=self.seamless) / SPATIAL_SCALE

    def frames_at_once(self, height: int, width: int) -> int:
        """Frames of latents of this size that the memory bound allows.

        Raises
        ------
        ValueError
            Not even one.
        """
        if not self.on_planes and self.memory is None:
            return 4
        return self._frames_within(self._decoder("spatial").nbytes(1, height, width), height, width)

    def _frames_within(self, each: int, height: int, width: int) -> int:
        memory = MEMORY if self.memory is None else self.memory
        if each > memory:
            raise ValueError(
                f"decode_memory: got {memory / 2**20:.0f} MiB, must be at least {-(-each // 2**20)} MiB: a frame of "
                f"{8 * height}x{8 * width} takes that"
            )
        return min(memory // each, MOST_FRAMES)

    def _spatial(self, z: Tensor) -> Tensor:
        if not self.on_planes:
            return self._images.decode(z[0].transpose(0, 1)).sample.permute(0, 2, 3, 1)
        return self._run("spatial", z[0])[:, :-1, :-1]

    # Open-Sora-Plan

    def tiling(self, latents: tuple[int, ...]) -> Tiling | None:
        """The pieces for latents (T, H, W).

        Raises
        ------
        ValueError
            The smallest ones do not fit the memory bound.
        """
        own: Tiling | None = self.vae.tiling
        if self.memory is None and not self.seamless:
            return own
        base = own or Tiling()
        frames, height, width = latents
        # Chunks share a latent, and the fewer of it are computed twice the better: so many chunks of nearly one length.
        chunks = sorted({max(-(-(frames - 1) // count), 1) + 1 for count in range(1, max(frames, 2))}, reverse=True)
        whole = [(max(height, width), n) for n in chunks]
        smaller = [(side, n) for side in (64, 32, 16) if side < max(height, width) for n in chunks if n <= 17]
        needed = 0
        for side, n in whole if self.seamless else whole + smaller:
            needed = self._piece_bytes(min(n, frames), min(side, height), min(side, width))
            if needed <= (MEMORY if self.memory is None else self.memory):
                return dataclasses.replace(
                    base,
                    tile_sample_min_size=8 * side,
                    tile_latent_min_size=side,
                    tile_sample_min_size_t=4 * (n - 1) + 1,
                    tile_latent_min_size_t=n,
                    tile_overlap_factor=base.tile_overlap_factor if side < max(height, width) else 0.0,
                )
        bound = MEMORY if self.memory is None else self.memory
        raise ValueError(
            f"decode_memory: got {bound / 2**20:.0f} MiB, must be at least {-(-needed // 2**20)} MiB: the smallest "
            f"piece takes that"
        )

    def _piece_bytes(self, frames: int, height: int, width: int) -> int:
        return self._decoder("plan").nbytes(frames, height, width)

    def _plan_piece(self, z: Tensor) -> Tensor:
        if not self.on_planes:
            return self.vae.decode_piece(z)
        return from_planes(self._run("plan", z[0]))[None]

    # Kernels

    def _decoder(self, name: str) -> PlaneDecoder:
        """A part on planes, its weights packed when it is first asked for."""
        if name not in self._packed:
            if name == "plan":
                self._packed[name] = plan_decoder(self.vae)
            elif name == "spatial":
                self._packed[name] = spatial_decoder(self._images)
            else:
                self._packed[name] = temporal_decoder(self.vae.temporal_vae)
        return self._packed[name]

    def _run(self, name: str, z: Tensor) -> Tensor:
        """Planes of a piece [C, T, H, W]; small ones, which would wait for their launches, from a CUDA graph."""
        decoder = self._decoder(name)
        decoder.compile()
        memory = MEMORY if self.memory is None else self.memory
        if 2 * decoder.nbytes(*z.shape[1:]) > memory:  # a graph keeps memory of its own
            return decoder(z)
        lane = self._lanes.get(z.device) or self._lanes.setdefault(z.device, Lane(z.device))
        key = (name, str(z.device), *z.shape)
        if key not in self._graphs:
            self._graphs = {} if len(self._graphs) >= MOST_GRAPHS else self._graphs
            self._graphs[key] = StepGraphs({"z": z}, lane)
        with lane:
            planes = self._graphs[key].run("piece", lambda inputs: decoder(inputs["z"]), {"z": z})
        return lane.hand_out(planes)
