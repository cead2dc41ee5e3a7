"""cache-dit on Latte. It knows lists of blocks that run one after the other; Latte's two run in turn."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

from torch import Tensor, nn


class _Pair(nn.Module):
    """A spatial block and the temporal one after it: a block that cache-dit can leave out.

    Parameters
    ----------
    spatial, temporal : nn.Module
        diffusers' blocks of Latte.
    positions : Tensor, optional
        [1, T, C], added before the first temporal block.
    frames : int
        T.
    """

    def __init__(self, spatial: nn.Module, temporal: nn.Module, positions: Tensor | None, frames: int) -> None:
        super().__init__()
        self.spatial, self.temporal, self._positions, self._frames = spatial, temporal, positions, frames

    def forward(
        self, hidden_states: Tensor, mask: Any, text: Tensor, text_mask: Any, timestep: Tensor, *rest: Any
    ) -> Tensor:
        """The stream [B * T, S, C] after both; arguments are those of the spatial block."""
        x = self.spatial(hidden_states, mask, text, text_mask, timestep, *rest)
        x = x.unflatten(0, (-1, self._frames)).transpose(1, 2)  # [B, S, T, C]
        batch, tokens = x.shape[:2]
        x = x.flatten(0, 1)
        if self._positions is not None:
            x = x + self._positions.to(x.dtype)
        vectors = timestep.unflatten(0, (-1, self._frames))[:, 0].repeat_interleave(tokens, dim=0)
        x = self.temporal(x, None, None, None, vectors, None, None)
        return x.unflatten(0, (batch, tokens)).transpose(1, 2).flatten(0, 1)


def paired(host: Any) -> Any:
    """A Latte of the same weights whose spatial blocks are pairs: called with ``enable_temporal_attentions=False``."""
    twin = copy.copy(host)
    twin.__dict__ = {key: value for key, value in host.__dict__.items() if key not in ("forward", "_diffusers_hook")}
    twin.__dict__["_modules"] = dict(host._modules)
    frames = host.config.video_length
    pairs = zip(host.transformer_blocks, host.temporal_transformer_blocks, strict=True)
    twin.transformer_blocks = nn.ModuleList(
        _Pair(spatial, temporal, host.temp_pos_embed if index == 0 and frames > 1 else None, frames)
        for index, (spatial, temporal) in enumerate(pairs)
    )
    return twin


def apply(host: Any, steps: int, threshold: float, order: int = 0) -> None:
    """Let `host` run through cache-dit: its first pair of blocks decides by `threshold` whether the others run.

    The host gets a forward of its own, and nothing else of it changes: taking that away is taking cache-dit off.

    Parameters
    ----------
    host : LatteTransformer3DModel
    steps : int
        Calls of a run.
    threshold : float
        Of the relative difference of what the first pair adds.
    order : {0, 1}
        1 forecasts what the others add, by cache-dit's TaylorSeer.

    Raises
    ------
    ImportError
        It is not installed.
    """
    if importlib.util.find_spec("cache_dit") is None:
        raise ImportError("not installed: `pip install cache-dit`")
    import cache_dit

    twin = paired(host)
    adapter = cache_dit.BlockAdapter(
        transformer=twin,
        blocks=twin.transformer_blocks,
        forward_pattern=cache_dit.ForwardPattern.Pattern_3,
        check_forward_pattern=False,
        has_separate_cfg=False,
    )
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        residual_diff_threshold=threshold,
        max_warmup_steps=3,
        enable_separate_cfg=False,
        num_inference_steps=steps,
    )
    forecast = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
    cache_dit.enable_cache(adapter, cache_config=config, calibrator_config=forecast)
    call = 0

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal call
        if call % steps == 0:
            cache_dit.refresh_context(twin, num_inference_steps=steps, verbose=False)
        call += 1
        return twin(*args, enable_temporal_attentions=False, **kwargs)

    host.forward = forward
