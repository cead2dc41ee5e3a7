"""Where a batch lies: a folder, or what fsspec reaches by a URL. Files there are whole or not there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path, PurePosixPath
from typing import Any

from pab_kernels import files

LOCK = ".pab-batch.lock"


class Store:
    """The files of a batch, by names such as ``videos/1f.mp4``.

    Parameters
    ----------
    place : str
        A folder, or a URL such as ``s3://bucket/folder``, whose package of fsspec (s3fs, gcsfs) must be installed.

    Raises
    ------
    ValueError
        fsspec does not know the URL, or lacks a package for it.
    """

    def __init__(self, place: str) -> None:
        self.folder: Path | None = None
        self._fs: Any = None
        if "://" not in place:
            self.folder = Path(place).absolute()
            return
        import fsspec
        from fsspec.implementations.local import LocalFileSystem

        try:
            self._fs, self._root = fsspec.core.url_to_fs(place)
        except (ValueError, ImportError) as error:
            raise ValueError(f"output: got {place!r}, which fsspec cannot open: {error}") from error
        if isinstance(self._fs, LocalFileSystem):
            self.folder = Path(self._root)

    @contextmanager
    def new(self, name: str) -> Iterator[Path]:
        """A path for a file `name`, to be written as `files.replaced` writes; after the block it is in the store.

        If the block fails, what was there is as it was.
        """
        if self.folder is not None:
            yield self.folder / name
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / PurePosixPath(name).name
            yield path
            target = f"{self._root}/{name}"
            self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            with self._fs.transaction, path.open("rb") as source, self._fs.open(target, "wb") as file:
                shutil.copyfileobj(source, file)

    def read(self, name: str) -> bytes | None:
        """A file's bytes, None where it is not there."""
        try:
            if self.folder is not None:
                return (self.folder / name).read_bytes()
            return self._fs.cat_file(f"{self._root}/{name}")
        except FileNotFoundError:
            return None

    def size(self, name: str) -> int | None:
        """A file's bytes, counted; None where it is not there."""
        try:
            if self.folder is not None:
                return (self.folder / name).stat().st_size
            self._fs.invalidate_cache()  # others write there
            return self._fs.size(f"{self._root}/{name}")
        except FileNotFoundError:
            return None

    def sizes(self, under: str) -> dict[str, int]:
        """Names and bytes of all files in a folder."""
        if self.folder is not None:
            found = (self.folder / under).glob("*")
            return {f"{under}/{path.name}": path.stat().st_size for path in found if path.is_file()}
        try:
            entries = self._fs.find(f"{self._root}/{under}", detail=True)
        except FileNotFoundError:
            return {}
        return {f"{under}/{PurePosixPath(path).name}": entry["size"] for path, entry in entries.items()}

    def clear(self, under: str) -> None:
        """Remove the temporary files of processes that are gone."""
        if self.folder is not None:
            files.clear_left_over(self.folder / under)

    def alone(self) -> Any:
        """A context that one process at a time is in, where the store is a folder; ValueError if another is."""
        return nullcontext() if self.folder is None else files.alone(self.folder / LOCK)
