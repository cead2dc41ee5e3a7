"""YAML that means one thing: no key twice, no aliases, no code, small; numbers as YAML 1.2 has them."""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 2**18
"""Of a file; settings take a few hundred."""
DEEPEST = 16
"""Lists and mappings in one another; settings have three."""


def load(path: Path) -> Any:
    """The one document of a file: UTF-8, or UTF-16 with its mark, as Windows writes it.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        It cannot be read, is too large, is in another encoding, or is not such YAML.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    if len(data) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES // 1024} KiB, which is no file of settings")
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not in UTF-8 (byte {error.start} is {data[error.start]:#04x}): save it as UTF-8") from error
    try:
        return yaml.load(text, _Loader)  # derived from the safe one
    except Exception as error:  # PyYAML's constructors raise what they like, such as KeyError for `!!bool 3`
        raise ValueError(f"not valid YAML: {error}") from error


def dump(settings: Mapping[str, Any]) -> str:
    """Settings as a document that `load` reads back."""
    text: str = yaml.dump(settings, Dumper=_Dumper, sort_keys=False)
    return text


def comment(text: str) -> str:
    """`text` as lines of a comment; characters that YAML does not allow are shown by their numbers."""
    return "".join(f"# {printable(line)}\n" for line in text.splitlines())


def printable(line: str) -> str:
    """A line without control characters: their numbers in their places."""
    letters = (c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in line)
    return "".join(letters)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without what surprises."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"line {_line(event)}: the alias *{event.anchor} is not allowed: write it out")
        self.depth += 1
        if self.depth > DEEPEST:
            raise ValueError(f"line {_line(event)}: more than {DEEPEST} levels deep")
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        if len(mapping) < len(node.value):
            seen: set[Any] = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if key in seen:
                    raise ValueError(f"line {_line(key_node)}: the key {key!r} is there twice")
                seen.add(key)
        return mapping

    def construct_decimal(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node))


def _line(place: Any) -> int:
    return int(place.start_mark.line) + 1


class _Dumper(yaml.SafeDumper):
    """Quotes words that are numbers to either version of YAML."""


# YAML 1.1, which PyYAML reads, has no 1e2, and takes 010 for 8 and 1:30 for 90.
_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_FLOATS = r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan"
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(_INT, re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
    _class.add_implicit_resolver(_FLOAT, re.compile(f"^(?:{_FLOATS})$", re.I), list("-+.0123456789"))
_Loader.add_constructor(_INT, _Loader.construct_decimal)
