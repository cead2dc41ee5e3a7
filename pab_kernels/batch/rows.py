"""The rows of a batch: read from a file, checked one by one, named by all that decides the result, put in order."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pab_kernels.config import PABConfig
from pab_kernels.distributed.mesh import Mesh
from pab_kernels.pipelines.arguments import check_guidance, check_steps, seeds_of
from pab_kernels.pipelines.generate import DEFAULTS, Request, pab_settings
from pab_kernels.pipelines.sizes import VideoSize, family_size

SUFFIXES = (".jsonl", ".csv", ".parquet")
SIZE_COLUMNS = ("resolution", "duration", "aspect")
COLUMNS = ("prompt", "negative_prompt", "seed", *SIZE_COLUMNS, "steps", "guidance", "settings")
MOST_LINE = 2**20
"""Bytes of a line of JSON."""
PIECE, PIECES = 2**20, 16
"""Of a weight file: bytes of a piece, and how many are looked at."""


@dataclass(frozen=True)
class Row:
    """One video that is asked for. Where it cannot be made, `error` says why, and the rest is as far as it was read.

    `id` is a hash of everything that decides the result, `number` the row's in its file, from 1. `config` None runs
    the model as its authors wrote it. `mesh` is of the GPUs that make it together.
    """

    id: str
    number: int
    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 1
    guidance: float = 1.0
    size: VideoSize | None = None
    settings: str = "off"
    config: PABConfig | None = None
    mesh: Mesh = field(default_factory=Mesh)
    error: str | None = None

    @property
    def request(self) -> Request:
        """As `generate` takes it."""
        return Request([self.prompt], self.negative_prompt, self.steps, self.guidance, [self.seed], self.size)

    @property
    def shape(self) -> tuple[str, str, int, bool]:
        """What rows share that follow each other without anything being captured or allocated again."""
        return (_canonical(self.config), str(self.size), self.steps, self.guidance > 1)


def read_rows(path: Path) -> list[Mapping[str, Any] | str]:
    """The rows of a .jsonl, .csv or .parquet file; in place of a row that cannot be read, why.

    Raises
    ------
    ValueError
        Another suffix, a file that is none of its kind or has no rows, or Parquet without pyarrow.
    FileNotFoundError
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"prompts: got {path.name!r}, must end in {', '.join(SUFFIXES)}")
    if not path.exists():
        raise FileNotFoundError(f"prompts: {path} is not there")
    if path.is_dir():
        raise ValueError(f"prompts: got {path}, must be a file")
    try:
        if path.suffix == ".jsonl":
            with path.open("rb") as lines:
                rows = [_json_row(line) for line in lines if line.strip()]
        elif path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8-sig") as file:
                rows = [_csv_row(row) for row in csv.DictReader(file)]
        else:
            rows = _parquet_rows(path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"prompts: {path} cannot be read: {error}") from error
    if not rows:
        raise ValueError(f"prompts: {path} has no rows")
    return rows


def defaults(family: str, changes: Mapping[str, Any] | None = None, **given: Any) -> dict[str, Any]:
    """What `plan` takes where a row gives nothing: `given`, by the names of columns, else the model's own."""
    own = DEFAULTS[family]
    values = dict.fromkeys((*COLUMNS[1:], "size"))
    values |= {"negative_prompt": "", "seed": 0, "steps": own.steps, "guidance": own.guidance, "settings": own.preset}
    return values | {name: value for name, value in given.items() if value is not None} | {"changes": changes or {}}


def plan(
    rows: Sequence[Mapping[str, Any] | str],
    family: str,
    defaults: Mapping[str, Any],
    identity: Mapping[str, Any],
    mesh_of: Callable[[Row], Mesh] | None = None,
) -> list[Row]:
    """Check every row, name it, and order those that can be made so that shapes and settings change seldom.

    Parameters
    ----------
    rows : sequence of mapping or str
        Of `read_rows`.
    family : str
    defaults : mapping
        Of `defaults`: of each of `COLUMNS` but prompt what holds where a row gives nothing; `size` too, which is none
        of them, and `changes`, the settings that options of the command line give.
    identity : mapping
        What else decides the result, as plain values: version, model, dtype, ...
    mesh_of : callable, optional
        The mesh of a row that several GPUs make together; of rows of one `shape` it is the same. ValueError if there is
        none. Such rows all run this runtime: the model's own code knows no ranks.

    Returns
    -------
    list of Row
        Each id once: rows that ask for the same video are one.
    """
    settings: dict[str, PABConfig | None] = {}
    meshes: dict[Any, Mesh] = {}

    def config_of(text: str) -> PABConfig | None:
        if text not in settings:
            found = pab_settings(text, **defaults["changes"])
            settings[text] = PABConfig() if found is None and mesh_of is not None else found
        return settings[text]

    def on_mesh(row: Row) -> Row:
        if mesh_of is None:
            return row
        if row.shape not in meshes:
            meshes[row.shape] = mesh_of(row)
        return dataclasses.replace(row, mesh=meshes[row.shape])

    found: dict[str, Row] = {}
    for number, given in enumerate(rows, 1):
        try:
            row = on_mesh(_checked(number, given, family, defaults, config_of))
            row = dataclasses.replace(row, id=_hash({**identity, **_decisive(row)}))
        except (ValueError, TypeError, OSError) as error:
            prompt = given.get("prompt") if isinstance(given, Mapping) else None
            name = _hash({**identity, "bad": given if isinstance(given, str) else dict(given), "error": str(error)})
            row = Row(name, number, prompt if isinstance(prompt, str) else "", error=str(error))
        found.setdefault(row.id, row)
    return sorted(found.values(), key=lambda row: (row.error is None, row.shape, row.number))


def fingerprint(place: str | None) -> Any:
    """What tells the weights at a path from others, as plain values; a hub id, or None, is itself.

    Of every file its name, size, and a checksum of at most 16 MiB spread over it.
    """
    if place is None or not Path(place).exists():
        return place
    root = Path(place)
    files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    return [[path.name if path == root else path.relative_to(root).as_posix(), *_look(path)] for path in files]


def _look(path: Path) -> tuple[int, str]:
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for i in range(PIECES):
            file.seek(max(i * PIECE, (size - PIECE) * i // (PIECES - 1)))
            digest.update(file.read(PIECE))
    return size, digest.hexdigest()


def _json_row(line: bytes) -> Mapping[str, Any] | str:
    if len(line) > MOST_LINE:
        return f"a line of more than {MOST_LINE} bytes"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"cannot be read as JSON: {error}"
    return row if isinstance(row, dict) else f"got {type(row).__name__}, must be an object of {', '.join(COLUMNS)}"


def _csv_row(row: dict[Any, Any]) -> Mapping[str, Any] | str:
    return "more values than columns" if None in row else row


def _parquet_rows(path: Path) -> list[Mapping[str, Any] | str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(f"prompts: got {path.name!r}, which needs `pip install pab-kernels[ray]`: {error}") from error
    try:
        return list(parquet.read_table(path).to_pylist())
    except (ArrowException, OSError) as error:
        raise ValueError(f"prompts: {path} cannot be read: {error}") from error


def _checked(
    number: int,
    given: Mapping[str, Any] | str,
    family: str,
    defaults: Mapping[str, Any],
    config_of: Callable[[str], PABConfig | None],
) -> Row:
    """The row without its id; ValueError, TypeError or OSError naming the column."""
    if isinstance(given, str):
        raise ValueError(given)
    values = {key: value for key, value in given.items() if not _is_empty(value)}
    if unknown := sorted(str(key) for key in values if key not in COLUMNS):
        raise ValueError(f"{unknown[0]}: is no column, must be one of {', '.join(COLUMNS)}")
    values = {**defaults, **values}
    prompt = values.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"prompt: got {prompt!r}, must be text")
    for name in ("negative_prompt", "settings"):
        if not isinstance(values[name], str):
            raise TypeError(f"{name}: got {values[name]!r}, must be text")
    for text in (prompt, values["negative_prompt"]):
        text.encode()  # a lone half of a pair, which JSON may hold, is no text
    sizes: dict[str, Any] = {
        name: None if values[name] is None else str(values[name]) for name in (*SIZE_COLUMNS, "size")
    }
    return Row(
        id="",
        number=number,
        prompt=prompt,
        negative_prompt=values["negative_prompt"],
        seed=seeds_of([_whole("seed", values["seed"])], 1)[0],
        steps=_named("steps", check_steps, _whole("steps", values["steps"])),
        guidance=_named("guidance", check_guidance, values["guidance"]),
        size=family_size(family, **sizes),
        settings=values["settings"],
        config=config_of(values["settings"]),
    )


def _named(name: str, check: Callable[[Any], Any], value: Any) -> Any:
    """A value checked, its error naming the column too."""
    try:
        return check(value)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{name}: {error}") from None


def _is_empty(value: Any) -> bool:
    """Whether a cell holds nothing: CSV has empty text there, a table with whole numbers NaN."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _whole(name: str, value: Any) -> Any:
    """A whole number that CSV holds as text, or a table with empty cells as a float."""
    try:
        if isinstance(value, str):
            return int(value)
        if isinstance(value, float) and value.is_integer():
            return int(value)
    except ValueError:
        raise TypeError(f"{name}: got {value!r}, must be an integer") from None
    return value


def _decisive(row: Row) -> dict[str, Any]:
    """What of a row decides the result: the settings themselves, not what their file is called."""
    return {
        "prompt": row.prompt,
        "negative_prompt": row.negative_prompt,
        "seed": row.seed,
        "steps": row.steps,
        "guidance": row.guidance,
        "size": None if row.size is None else dataclasses.asdict(row.size),
        "pab": None if row.config is None else row.config.to_dict(),
        "mesh": str(row.mesh),
    }


def _canonical(config: PABConfig | None) -> str:
    return json.dumps(None if config is None else config.to_dict(), sort_keys=True)


def _hash(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=repr).encode()).hexdigest()[:20]
