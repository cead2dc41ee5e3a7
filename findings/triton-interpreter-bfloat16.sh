#!/bin/sh
# Triton 3.9.0, TRITON_INTERPRET=1, arithmetic on bfloat16.
#
# Expected: a kernel gives on a CPU, under the interpreter, what it gives on a GPU.
# Seen: bfloat16 is held as its 16 bits, and arithmetic is done on those as on integers: the sum of 32 ones is not 32,
# a dot of ones is in the billions, the larger of 2 and -1 is -1. Cast to float32 after the load, all are right. Stores
# of float32 as bfloat16 are cut off instead of rounded.
#
# Exit 0 where that is still so, 1 where it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder" triton==3.9.0 torch==2.13.0 numpy
cat > "$folder/bfloat16.py" <<'PYTHON'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def total(x, out, CAST: tl.constexpr):
    value = tl.load(x + tl.arange(0, 32))
    if CAST:
        value = value.to(tl.float32)
    tl.store(out, tl.sum(value, 0).to(tl.float32))


@triton.jit
def larger(x, out, CAST: tl.constexpr):
    first, second = tl.load(x), tl.load(x + 1)
    if CAST:
        first, second = first.to(tl.float32), second.to(tl.float32)
    tl.store(out, tl.maximum(first, second).to(tl.float32))


@triton.jit
def dot(x, out, CAST: tl.constexpr):
    value = tl.load(x + tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None])
    if CAST:
        value = value.to(tl.float32)
    product = tl.dot(value, value)
    tl.store(out, tl.max(tl.max(product, 0), 0).to(tl.float32))


@triton.jit
def rounded(x, out):
    tl.store(out, tl.load(x).to(tl.bfloat16))


def run(kernel, x, cast):
    out = torch.zeros(1)
    kernel[(1,)](x, out, cast)
    return float(out)


ones = torch.ones(256, dtype=torch.bfloat16)
two = torch.tensor([2, -1], dtype=torch.bfloat16)
cases = {
    "sum of 32 ones": (total, ones, 32.0),
    "larger of 2 and -1": (larger, two, 2.0),
    "dot of 16 ones": (dot, ones, 16.0),
}
changed = False
for name, (kernel, x, right) in cases.items():
    plain, cast = (run(kernel, x, cast) for cast in (False, True))
    print(f"{name}: {plain:g} in bfloat16, {cast:g} cast to float32 first, must be {right:g}")
    changed |= plain == right or cast != right
value = torch.tensor([1.0 + 2**-8 + 2**-9])  # nearer to 1 + 2^-7 than to 1
out = torch.zeros(1, dtype=torch.bfloat16)
rounded[(1,)](value, out)
print(f"{float(value)} stored as bfloat16: {float(out)}, torch: {float(value.bfloat16())}")
changed |= float(out) != 1.0
if changed:
    sys.exit("this has changed")
PYTHON
TRITON_INTERPRET=1 PYTHONPATH="$folder" python3 "$folder/bfloat16.py"
