"""Every Triton kernel computes in float32: what it loads may be moved, stored or given to tl.dot, no more.

Triton's interpreter, which runs the kernels where there is no GPU, does arithmetic on bfloat16 bit by bit and gets it
wrong; and on a GPU a sum in bfloat16 would be a sum in bfloat16.
"""

import ast
import re
from pathlib import Path

import pytest

from pab_kernels import triton_ops

FILES = sorted(Path(next(iter(triton_ops.__path__))).glob("*.py"))
WIDE = {"kv_len", "cos", "sin", "row_scale", "weight_scale", "at_sum", "vectors"}
"""Pointers to float32 or int32, whatever the tensors are, as those whose comment says so; the ops check it."""
MOVES = {"trans", "reshape", "split", "join", "permute", "broadcast_to", "expand_dims", "ravel"}


class Loads:
    """Follows what the kernels of a module load, and notes where it is computed with before it is float32."""

    def __init__(self, source: str) -> None:
        tree = ast.parse(source)
        self.functions = {
            node.name: node
            for node in tree.body
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(each) for each in node.decorator_list)
        }
        self.wide = WIDE | set(re.findall(r"^ +(\w+),  # .*\b(?:float32|int32)\b", source, re.MULTILINE))
        self.wrong: set[str] = set()
        self._done: dict[tuple[str, tuple[bool, ...]], bool] = {}
        for name, function in self.functions.items():
            self.call(name, (False,) * len(function.args.args))

    def call(self, name: str, given: tuple[bool, ...]) -> bool:
        """Whether a function returns what was loaded and not widened, of arguments that are so or not."""
        if (name, given) not in self._done:
            self._done[name, given] = False
            function = self.functions[name]
            names = dict(zip((arg.arg for arg in function.args.args), given, strict=False))
            self._done[name, given] = self._body(function.body, names)
        return self._done[name, given]

    def _body(self, body: list[ast.stmt], names: dict[str, bool]) -> bool:
        returned = False
        for node in body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                raw = self._raw(node.value, names)
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for each in (inner for target in targets for inner in ast.walk(target)):
                    if isinstance(each, ast.Name):
                        names[each.id] = raw
            elif isinstance(node, ast.AugAssign):
                self._raw(ast.copy_location(ast.BinOp(node.target, node.op, node.value), node), names)
            elif isinstance(node, ast.Return):
                returned |= node.value is not None and self._raw(node.value, names)
            elif isinstance(node, ast.For | ast.While | ast.If):
                for _ in range(2):  # what a loop carries
                    returned |= self._body(node.body, names) | self._body(node.orelse, names)
            elif isinstance(node, ast.Expr):
                self._raw(node.value, names)
        return returned

    def _raw(self, node: ast.expr, names: dict[str, bool]) -> bool:
        """Whether an expression is what was loaded, not widened."""
        if isinstance(node, ast.Name):
            return names.get(node.id, False)
        if isinstance(node, ast.Attribute):
            return node.attr == "T" and self._raw(node.value, names)
        if isinstance(node, ast.Subscript):
            return self._raw(node.value, names)
        if isinstance(node, ast.Tuple):
            return any([self._raw(each, names) for each in node.elts])
        if isinstance(node, ast.Call):
            return self._raw_call(node, names)
        children = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
        if any([self._raw(child, names) for child in children]):
            self.wrong.add(f"line {node.lineno}: {ast.unparse(node)}")
        return False

    def _raw_call(self, node: ast.Call, names: dict[str, bool]) -> bool:
        called = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        arguments = [self._raw(each, names) for each in [*node.args, *(keyword.value for keyword in node.keywords)]]
        owner = node.func.value if isinstance(node.func, ast.Attribute) else None
        of_language = owner is not None and ast.unparse(owner) == "tl"
        if called == "load":  # tl.load, or that of a tensor descriptor
            pointer = node.args[0] if of_language else owner
            assert pointer is not None
            while isinstance(pointer, ast.BinOp):  # offsets are added to the right
                pointer = pointer.left
            first = next(each.id for each in ast.walk(pointer) if isinstance(each, ast.Name))
            return first not in self.wide
        on = owner is not None and not of_language and self._raw(owner, names)
        if called == "to":
            return on and "float32" not in ast.unparse(node.args[0])
        if called in self.functions:
            return self.call(called, tuple(arguments))
        if called in MOVES:
            return on or any(arguments)
        if (on or any(arguments)) and called not in ("dot", "store"):
            self.wrong.add(f"line {node.lineno}: {ast.unparse(node)}")
        return False


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nothing_is_computed_before_it_is_float32(path):
    assert not Loads(path.read_text()).wrong


def test_kernels_are_found():
    found = {path.stem: len(Loads(path.read_text()).functions) for path in FILES}
    assert sum(found.values()) > 20
    assert sum(count == 0 for count in found.values()) == 1  # the package's own file


@pytest.mark.parametrize(
    "body",
    [
        "tl.store(y, tl.load(x) + 1)",
        "v = tl.load(x)\n    v += 1",
        "tl.store(y, tl.sum(tl.load(x), 0))",
        "v = tl.load(x)\n    tl.store(y, tl.sum(tl.reshape(v, (4, 4)), 0))",
        "v = half(x)\n    tl.store(y, tl.exp(v))",
        "for i in range(3):\n        y = tl.exp(v)\n        v = tl.load(x)",
        "a, b = tl.split(tl.load(x))\n    tl.store(y, a.to(tl.float32) * b)",
        "tl.store(y, tl.load(x).to(tl.bfloat16) * 2.0)",
        "tl.store(y, tl.load(x) > 0)",
    ],
)
def test_computing_with_what_was_loaded_is_found(body):
    source = f"@triton.jit\ndef half(x):\n    return tl.load(x)\n\n\n@triton.jit\ndef kernel(x, y, v):\n    {body}\n"
    assert Loads(source).wrong
