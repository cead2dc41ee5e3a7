"""Which of the blocks' linears run in fp8: those that are asked for, and, unless all are, those that are faster so."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pab_kernels import ops
from pab_kernels.blocks.branches import CrossAttention, Fp8Linear, Linear, Mlp, Rows, SelfAttention, linear, mlp
from pab_kernels.ops.backends import no_fp8
from pab_kernels.ops.fp8_linear import E4M3
from pab_kernels.ops.quantized import Quantized
from pab_kernels.runtime.executor import Block, BlockStack

log = logging.getLogger(__name__)

LAYERS = ("qkv", "cross.q", "mlp")
"""What can run in fp8: the GEMMs whose input is written by a pass that sees whole rows, and so knows their scales.

The projections after attention stay in the model's dtype. A program of the attention kernels sees one head of a token,
so the scale of its whole row is known to none of them, and a pass of its own would cost more than their GEMM gains.
"""
GAIN = 1.02
"""How many times faster fp8 must be to be chosen: not to follow the noise of a measurement."""


@dataclass(frozen=True)
class Shape:
    """What decides: the layer, the rows M of its input, its channels, and the features of its first GEMM."""

    layer: str
    rows: int
    channels: int
    features: int


@dataclass(frozen=True)
class Trial:
    """Milliseconds of one layer with the pass that feeds it, in the model's dtype and in fp8."""

    plain_ms: float
    fp8_ms: float

    @property
    def pays(self) -> bool:
        """Whether the layer runs in fp8."""
        return self.plain_ms > GAIN * self.fp8_ms


class Fp8Linears:
    """The blocks of a model with linears in fp8, for each number of rows.

    Weights are quantised when they are first needed; the host's own stay as they are. `refresh` does it anew where
    those were changed in place.

    Parameters
    ----------
    stack : BlockStack
    exclude : sequence of str
        Patterns (`fnmatch`) of layers that stay as they are. A layer is called ``{kind}.{index}.{layer}``, such as
        "spatial.0.qkv", "temporal.27.mlp", "spatial.3.cross.q".
    measure : bool
        Only where it is faster, by a measurement of each shape; otherwise everywhere, also at sizes that are no
        multiples of 16, where the reference does what no GEMM can.

    Raises
    ------
    ValueError
        The device has no fp8 tensor cores, the weights are not bfloat16, or a pattern fits no layer.
    """

    def __init__(self, stack: BlockStack, exclude: Sequence[str] = (), *, measure: bool = True) -> None:
        table = stack.blocks[0].table
        if why_not := no_fp8(table.device):
            raise ValueError(f"linear_precision: got fp8, must be None here: {why_not}")
        if table.dtype != torch.bfloat16:
            raise ValueError(f"linear_precision: got fp8 for weights of {table.dtype}, must be None, or torch.bfloat16")
        names = [name for block in stack.blocks for name in layer_names(block)]
        for pattern in exclude:
            if not fnmatch.filter(names, pattern):
                near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
                raise ValueError(f"linear_exclude: {pattern!r} fits no layer; they are called like {near[0]!r}")
        self.stack = stack
        self.trials: dict[Shape, Trial] = {}
        """What was measured."""
        self._exclude = tuple(exclude)
        self._measure = measure
        self._quantized: dict[tuple[int, str], Any] = {}
        self._sums: dict[tuple[int, str], Tensor] = {}
        """Of the weights that were quantised."""

    def at(self, rows: int) -> BlockStack:
        """The blocks as they run with `rows` rows B * T * S."""
        blocks = []
        for position, block in enumerate(self.stack.blocks):
            for name, layer in layer_names(block).items():
                if any(fnmatch.fnmatch(name, pattern) for pattern in self._exclude):
                    continue
                weights = layer_weights(block, layer)
                if not self._measure or (fits_fp8(weights) and self._trial(block, layer, rows).pays):
                    key = (position, layer)
                    if key not in self._quantized:
                        self._quantized[key] = quantize_layer(weights)
                        self._sums[key] = bit_sums(weights)
                    block = replace_layer(block, layer, self._quantized[key])
            blocks.append(block)
        return dataclasses.replace(self.stack, blocks=tuple(blocks))

    def refresh(self) -> bool:
        """Forget what was quantised if weights were changed since, and say whether. Waits for the GPU, once."""
        blocks = self.stack.blocks
        now = [bit_sums(layer_weights(blocks[position], layer)) for position, layer in self._sums]
        if not now or torch.equal(torch.cat(now), torch.cat(list(self._sums.values()))):
            return False
        self._quantized.clear()
        self._sums.clear()
        return True

    def _trial(self, block: Block, layer: str, rows: int) -> Trial:
        first = first_linear(layer_weights(block, layer))
        features, channels = first.weight.shape
        shape = Shape(layer, rows, channels, features)
        if shape not in self.trials:
            trial = self.trials[shape] = measure(block, layer, rows)
            log.info(
                "%s of [%d, %d] to %d: %.3f ms in %s, %.3f ms in fp8, so %s",
                layer,
                rows,
                channels,
                features,
                trial.plain_ms,
                first.bias.dtype,
                trial.fp8_ms,
                "fp8" if trial.pays else "not fp8",
            )
        return self.trials[shape]


Weights = SelfAttention | CrossAttention | Mlp


def layer_names(block: Block) -> dict[str, str]:
    """The full names of a block's layers that can run in fp8, and their names in `LAYERS`."""
    layers = LAYERS if block.cross is not None else [layer for layer in LAYERS if layer != "cross.q"]
    return {f"{block.kind}.{block.index}.{layer}": layer for layer in layers}


def layer_weights(block: Block, layer: str) -> Weights:
    """The branch's weights that a layer is part of."""
    weights = {"qkv": block.attention, "cross.q": block.cross, "mlp": block.mlp}[layer]
    assert weights is not None
    return weights


def first_linear(weights: Weights) -> Linear | Fp8Linear:
    """The linear of a layer that reads what the pass wrote."""
    if isinstance(weights, Mlp):
        return weights.up
    return weights.q if isinstance(weights, CrossAttention) else weights.qkv


def fits_fp8(weights: Weights) -> bool:
    """Whether the sizes of a layer's linears are multiples of 16, as fp8 GEMMs need them."""
    parts = (weights.up, weights.down) if isinstance(weights, Mlp) else (first_linear(weights),)
    return all(size % 16 == 0 for part in parts for size in part.weight.shape)


def quantize_layer(weights: Weights) -> Weights:
    """The weights with a layer's linears in fp8."""

    def of(part: Linear | Fp8Linear) -> Fp8Linear:
        return part if isinstance(part, Fp8Linear) else Fp8Linear.of(part)

    if isinstance(weights, Mlp):
        return Mlp(of(weights.up), of(weights.down))
    if isinstance(weights, CrossAttention):
        return dataclasses.replace(weights, q=of(weights.q))
    return dataclasses.replace(weights, qkv=of(weights.qkv))


def bit_sums(weights: Weights) -> Tensor:
    """For each row of a layer's bfloat16 weights, and for its biases, the sum of their bits as integers: int64 [rows].

    They tell whether weights were changed, also by writes that torch does not count (to ``parameter.data``).
    """
    parts = (weights.up, weights.down) if isinstance(weights, Mlp) else (first_linear(weights),)
    bits = [
        tensor.view(torch.int16) for part in parts for tensor in (part.weight, part.bias) if isinstance(tensor, Tensor)
    ]
    return torch.cat([each.sum(-1, dtype=torch.int64).flatten() for each in bits])


def layer_bytes(weights: Weights) -> int:
    """What a layer's weights take in fp8: a byte an element, and a scale of 4 for each output channel."""
    parts = (weights.up, weights.down) if isinstance(weights, Mlp) else (first_linear(weights),)
    return sum(part.weight.shape.numel() + 4 * part.weight.shape[0] for part in parts)


def count_fp8(stack: BlockStack) -> dict[str, int]:
    """In how many blocks each layer runs in fp8; only those that do."""
    found = Counter(
        layer
        for block in stack.blocks
        for layer in layer_names(block).values()
        if isinstance(first_linear(layer_weights(block, layer)), Fp8Linear)
    )
    return {layer: found[layer] for layer in LAYERS if found[layer]}


def measure_shapes(stack: BlockStack, rows: int, device: torch.device, dtype: torch.dtype) -> dict[Shape, Trial]:
    """What a model's layers take both ways, for each shape once; its weights may be on the meta device.

    Raises
    ------
    ValueError
        As `Fp8Linears`.
    """
    kinds = {block.kind: block for block in reversed(stack.blocks)}
    blocks = tuple(_random_block(block, {"device": device, "dtype": dtype}) for block in kinds.values())
    linears = Fp8Linears(dataclasses.replace(stack, blocks=blocks))
    linears.at(rows)
    return linears.trials


def _random_block(block: Block, options: dict[str, Any]) -> Block:
    """The block with random weights of other device and dtype."""

    def of(part: Linear | Fp8Linear) -> Linear:
        features, channels = part.weight.shape
        return Linear(torch.randn(features, channels, **options) * channels**-0.5, torch.zeros(features, **options))

    return dataclasses.replace(
        block,
        table=torch.zeros(block.table.shape, **options),
        attention=dataclasses.replace(block.attention, qkv=of(block.attention.qkv)),
        cross=None if block.cross is None else dataclasses.replace(block.cross, q=of(block.cross.q)),
        mlp=Mlp(of(block.mlp.up), of(block.mlp.down)),
    )


def replace_layer(block: Block, layer: str, weights: Weights) -> Block:
    """The block with other weights for the branch that `layer` is part of."""
    name = {"qkv": "attention", "cross.q": "cross", "mlp": "mlp"}[layer]
    changes: dict[str, Any] = {name: weights}
    return dataclasses.replace(block, **changes)


def measure(block: Block, layer: str, rows: int) -> Trial:
    """Time one layer of a block both ways on random rows, with the pass before it: it writes less for fp8."""
    weights = layer_weights(block, layer)
    x = torch.randn(1, rows, block.table.shape[-1], dtype=block.table.dtype, device=block.table.device)
    plain, fp8 = (_median_ms(_runner(each, x)) for each in (weights, quantize_layer(weights)))
    return Trial(plain, fp8)


def _runner(weights: Weights, x: Tensor) -> Callable[[], object]:
    """A pass with a gated branch, and the layer's GEMMs, as the executor runs them."""
    first = first_linear(weights)
    branch, vector = torch.randn_like(x), torch.zeros(1, x.shape[-1], dtype=x.dtype, device=x.device)
    out = torch.empty(*x.shape[:-1], first.weight.shape[0], dtype=x.dtype, device=x.device)
    h: Rows = torch.empty_like(x)
    if isinstance(first, Fp8Linear):
        h = Quantized.empty(tuple(x.shape), E4M3, x.device)

    def run() -> None:
        if isinstance(weights, CrossAttention):  # its input is not normalised: x itself, or a copy in e4m3
            written = ops.residual_norm_modulate(x, [branch], [vector], out=h if isinstance(h, Quantized) else None)
            linear(written, first, out)
        elif isinstance(weights, SelfAttention):
            linear(ops.residual_norm_modulate(x, [branch], [vector], vector, vector, out=h), first, out)
        else:
            mlp(ops.residual_norm_modulate(x, [branch], [vector], vector, vector, out=h), weights, branch)

    return run


def _median_ms(run: Callable[[], object]) -> float:
    # From a graph, as steps run: launched one by one, short kernels would be timed by the host.
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(run, rep=20, return_mode="median")
