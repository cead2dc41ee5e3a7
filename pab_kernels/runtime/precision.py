"""Which of the blocks' linears run in fp8: those that are asked for, and, unless all are, those that are faster so.

A branch's layer can: the linears that its weights name in `fp8`, whose input is written by a pass that sees whole rows
and so their scales, or by a kernel that is given a scale: what attention gives is a mean of values, and GELU's output
is at most its input, so bounds are known beforehand.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import logging
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pab_kernels import ops
from pab_kernels.blocks.block import Block, BlockStack, Branch
from pab_kernels.blocks.branches import Mlp, Weights, mlp
from pab_kernels.blocks.linears import Fp8Linear, Linear, Rows, balancing_factors, linear
from pab_kernels.blocks.self_attention import SelfAttention
from pab_kernels.distributed.mesh import Ranks
from pab_kernels.ops.backends import no_fp8, no_hopper
from pab_kernels.ops.fp8_linear import E4M3
from pab_kernels.ops.quantized import Quantized
from pab_kernels.runtime.fp8_trials import Shape, Trial, keep, recall

log = logging.getLogger(__name__)


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
        Only where it is faster, by a measurement of each shape, which is kept for later runs; otherwise everywhere,
        also at sizes that are no multiples of 16, where the reference does what no GEMM can.
    ranks : Ranks, optional
        Of a mesh: one of them measures for all.

    Raises
    ------
    ValueError
        The device has no fp8 tensor cores, the weights are not bfloat16, or a pattern fits no layer.
    """

    def __init__(
        self, stack: BlockStack, exclude: Sequence[str] = (), *, measure: bool = True, ranks: Ranks | None = None
    ) -> None:
        if why_not := no_fp8(stack.device):
            raise ValueError(f"linear_precision: got fp8, must be None here: {why_not}")
        if stack.dtype != torch.bfloat16:
            raise ValueError(f"linear_precision: got fp8 for weights of {stack.dtype}, must be None, or torch.bfloat16")
        branches = [(block, branch) for block in stack.blocks for branch in block.branches]
        names = [layer_name(*each) for each in branches if each[1].weights.fp8]
        for pattern in exclude:
            if not fnmatch.filter(names, pattern):
                near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
                raise ValueError(f"linear_exclude: {pattern!r} fits no layer; they are called like {near[0]!r}")
        self.stack = stack
        self.trials: dict[Shape, Trial] = {}
        """What decided: measured now, or kept from an earlier run."""
        self._kept = recall(stack.device) if measure else {}
        self._exclude = tuple(exclude)
        self._measure = measure
        self._ranks = ranks
        self._quantized: dict[tuple[int, int], Weights] = {}
        self._sums: dict[tuple[int, int], Tensor] = {}
        """Of the weights that were quantised."""

    def at(self, rows: int) -> BlockStack:
        """The blocks as they run with `rows` rows B * T * S."""

        def chosen(block: Block, branch: Branch, place: tuple[int, int]) -> Branch:
            name, weights = layer_name(block, branch), branch.weights
            if not weights.fp8 or any(fnmatch.fnmatch(name, pattern) for pattern in self._exclude):
                return branch
            if self._measure and not (fits_fp8(weights) and self._trial(branch, rows).pays):
                return branch
            if place not in self._quantized:
                self._quantized[place], self._sums[place] = quantize_layer(weights), bit_sums(weights)
            return dataclasses.replace(branch, weights=self._quantized[place])

        blocks = []
        for position, block in enumerate(self.stack.blocks):
            branches = (chosen(block, branch, (position, i)) for i, branch in enumerate(block.branches))
            blocks.append(dataclasses.replace(block, branches=tuple(branches)))
        return dataclasses.replace(self.stack, blocks=tuple(blocks))

    def refresh(self) -> bool:
        """Forget what was quantised if weights were changed since, and say whether. Waits for the GPU, once."""
        now = [bit_sums(self.stack.blocks[position].branches[i].weights) for position, i in self._sums]
        if not now or torch.equal(torch.cat(now), torch.cat(list(self._sums.values()))):
            return False
        self._quantized.clear()
        self._sums.clear()
        return True

    def _trial(self, branch: Branch, rows: int) -> Trial:
        weights = branch.weights
        features, channels = weights.linears[0].weight.shape
        shape = Shape(weights.layer, rows, channels, features)
        if shape not in self.trials:
            find = partial(self._found, branch, shape)
            trial = self.trials[shape] = find() if self._ranks is None else self._ranks.agree(find)
            log.info(
                "%s of [%d, %d] to %d: %.3f ms in %s, %.3f ms in fp8, so %s",
                weights.layer,
                rows,
                channels,
                features,
                trial.plain_ms,
                weights.linears[0].bias.dtype,
                trial.fp8_ms,
                "fp8" if trial.pays else "not fp8",
            )
        return self.trials[shape]

    def _found(self, branch: Branch, shape: Shape) -> Trial:
        """What was measured earlier, or is now."""
        trial = self._kept.get(shape)
        if trial is None:
            trial = measure(branch, shape.rows)
            keep(self.stack.device, shape, trial)
        return trial


def layer_name(block: Block, branch: Branch) -> str:
    """What settings call the layer of a branch that can run in fp8, such as "spatial.0.qkv"."""
    return f"{block.name}.{branch.weights.layer}"


def layer_linears(weights: Weights) -> dict[str, Linear | Fp8Linear]:
    """The linears of that layer, by their names in the weights."""
    return {name: getattr(weights, name) for name in weights.fp8}


def with_fp8_attention(stack: BlockStack) -> BlockStack:
    """The blocks with spatial and full self-attention in e4m3.

    Raises
    ------
    ValueError
        The device or this build has no such kernel.
    """
    if why_not := no_hopper(stack.device):
        raise ValueError(f"attention_precision: got fp8, must be None here: {why_not}")

    def changed(branch: Branch) -> Branch:
        weights = branch.weights
        if not isinstance(weights, SelfAttention) or weights.sequence == "temporal":
            return branch
        return dataclasses.replace(branch, weights=dataclasses.replace(weights, precision="fp8"))

    blocks = []
    for block in stack.blocks:
        blocks.append(dataclasses.replace(block, branches=tuple(changed(branch) for branch in block.branches)))
    return dataclasses.replace(stack, blocks=tuple(blocks))


def fits_fp8(weights: Weights) -> bool:
    """Whether the sizes of a layer's linears are multiples of 16, as fp8 GEMMs need them."""
    return all(size % 16 == 0 for part in layer_linears(weights).values() for size in part.weight.shape)


def quantize_layer(weights: Weights) -> Weights:
    """The weights with a layer's linears in fp8.

    Features between two of them that may be much larger than the others, an MLP's or values of attention, are made
    smaller by a power of two, and the weights that read them larger.
    """
    if isinstance(weights, Mlp) and isinstance(weights.up, Linear) and isinstance(weights.down, Linear):
        factors = balancing_factors(weights.up.weight)
        return replaced(weights, {"up": Fp8Linear.of(weights.up, factors), "down": _undo(weights.down, factors)})
    if isinstance(weights, SelfAttention) and isinstance(weights.qkv, Linear) and isinstance(weights.proj, Linear):
        values = slice(weights.qkv.weight.shape[0] * 2 // 3, None)
        factors = balancing_factors(weights.qkv.weight[values])
        weight, bias = weights.qkv.weight.clone(), weights.qkv.bias.clone()
        weight[values] *= factors[:, None].to(weight.dtype)
        bias[values] *= factors.to(bias.dtype)
        qkv = Fp8Linear.of(Linear(weight, bias), bounded=values)
        return replaced(weights, {"qkv": qkv, "proj": _undo(weights.proj, factors)})
    parts: dict[str, Any] = {
        name: part if isinstance(part, Fp8Linear) else Fp8Linear.of(part)
        for name, part in layer_linears(weights).items()
    }
    return replaced(weights, parts)


def _undo(linear: Linear, factors: Tensor) -> Fp8Linear:
    """A linear in fp8 that reads features times `factors`."""
    return Fp8Linear.of(Linear(linear.weight / factors.to(linear.weight.dtype), linear.bias))


def bit_sums(weights: Weights) -> Tensor:
    """Sums of the bits, as integers, of each row and column of a layer's bfloat16 weights, and its biases: int64 [N].

    They tell whether weights were changed, also by writes that torch does not count (to ``parameter.data``), and by a
    new order of rows or columns.
    """
    parts = layer_linears(weights).values()
    tensors = [tensor for part in parts for tensor in (part.weight, part.bias) if isinstance(tensor, Tensor)]
    bits = [tensor.view(torch.int16) for tensor in tensors]
    sums = [each.sum(i, dtype=torch.int64) for each in bits if each.ndim == 2 for i in range(2)]
    return torch.cat([*sums, *(each.long() for each in bits if each.ndim == 1)])


def replaced(weights: Weights, parts: dict[str, Any]) -> Weights:
    """The weights with other parts."""
    dataclass: Any = weights  # as `Weights` asks
    return dataclasses.replace(dataclass, **parts)


def layer_bytes(weights: Weights) -> int:
    """What a layer's weights take in fp8: a byte an element, and a scale of 4 for each output channel."""
    return sum(part.weight.shape.numel() + 4 * part.weight.shape[0] for part in layer_linears(weights).values())


def count_fp8(stack: BlockStack) -> dict[str, int]:
    """In how many blocks each layer runs in fp8; only those that do, in the order of a block."""
    return dict(
        Counter(
            branch.weights.layer
            for block in stack.blocks
            for branch in block.branches
            if isinstance(branch.weights.linears[0], Fp8Linear)
        )
    )


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
    """The block with random weights of other device and dtype; those of attention itself are not needed."""

    def of(part: object) -> object:
        if not isinstance(part, Linear | Fp8Linear):
            return part
        features, channels = part.weight.shape
        return Linear(torch.randn(features, channels, **options) * channels**-0.5, torch.zeros(features, **options))

    def random(weights: Weights) -> Weights:
        return replaced(weights, {name: of(part) for name, part in vars(weights).items()})

    branches = tuple(dataclasses.replace(branch, weights=random(branch.weights)) for branch in block.branches)
    return dataclasses.replace(block, branches=branches)


def measure(branch: Branch, rows: int) -> Trial:
    """Time the layer of a branch both ways on random rows, with the pass before it: it writes less for fp8."""
    weights = branch.weights
    first = weights.linears[0]
    x = torch.randn(1, rows, first.weight.shape[1], dtype=first.bias.dtype, device=first.bias.device)
    plain, fp8 = (
        _median_ms(_runner(dataclasses.replace(branch, weights=each), x)) for each in (weights, quantize_layer(weights))
    )
    return Trial(plain, fp8)


def _runner(branch: Branch, x: Tensor) -> Callable[[], object]:
    """A pass with a gated branch, and the layer's GEMMs, as the executor runs them."""
    weights = branch.weights
    first = weights.linears[0]
    other, vector = torch.randn_like(x), torch.zeros(1, x.shape[-1], dtype=x.dtype, device=x.device)
    wide = torch.empty(*x.shape[:-1], first.weight.shape[0], dtype=x.dtype, device=x.device)
    norm = None if branch.norm is None else branch.norm.kind
    modulation = vector if norm else None
    written: Rows | None = None if norm is None else torch.empty_like(x)
    if isinstance(first, Fp8Linear):
        written = Quantized.empty(tuple(x.shape), E4M3, x.device)

    # After attention: what it gives is another such tensor.
    others = [(part, _rows_for(part, x), torch.empty_like(x)) for part in list(layer_linears(weights).values())[1:]]

    def run() -> None:
        # Without a norm the input is x itself, or a copy of it in e4m3.
        h: Rows = ops.residual_norm_modulate(x, [other], [vector], modulation, modulation, norm=norm, out=written)
        if isinstance(weights, Mlp):
            mlp(h, weights, other)
        else:
            linear(h, first, wide)
            for part, read, out in others:
                linear(read, part, out)

    return run


def _rows_for(part: Linear | Fp8Linear, x: Tensor) -> Rows:
    """Random rows like x that `part` reads."""
    rows = torch.randn_like(x)
    if isinstance(part, Linear):
        return rows
    return ops.residual_norm_modulate(rows, out=Quantized.empty(tuple(x.shape), E4M3, x.device))


def _median_ms(run: Callable[[], object], calls: int = 20, replays: int = 20) -> float:
    """From a graph, as steps run: launched one by one, short kernels would be timed by the host."""
    stream, graph, times = torch.cuda.current_stream(), torch.cuda.CUDAGraph(), []
    own = torch.cuda.Stream() if stream == torch.cuda.default_stream() else stream
    own.wait_stream(stream)
    with torch.cuda.stream(own):
        run()
        torch.cuda.synchronize()
        # Other threads may ask for events meanwhile, as that which watches over NCCL does.
        with torch.cuda.graph(graph, stream=own, capture_error_mode="thread_local"):
            for _ in range(calls):
                run()
        graph.replay()
        for _ in range(replays):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / calls)
    stream.wait_stream(own)
    return statistics.median(times)
