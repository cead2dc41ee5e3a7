"""Files that are never seen half written, and outputs that are refused before the work rather than after it."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows: there, what a killed run left over stays
    fcntl = None  # type: ignore[assignment]

LEFT_OVER = ".pab-*.partial*"
"""How temporary files are named. A process that lives holds a lock on its own."""


@contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new temporary file beside `path`, with its suffix: what is written there becomes `path` if all goes well.

    Write into the file that is there: another one in its place would be without the lock that tells who is at work. A
    link is followed. The temporary file is removed on any exception, SystemExit and KeyboardInterrupt too; what killed
    processes left in the folder is removed first.

    Raises
    ------
    ValueError
        As `check_outputs`.
    OSError
        It cannot be written; what was at `path` is as it was.
    """
    target = _target("output", path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, handle = _temporary(target)
    try:
        yield partial
        os.fsync(handle)  # where the disk is full, some file systems say so only now
        with suppress(FileNotFoundError):
            partial.chmod(stat.S_IMODE(target.stat().st_mode))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
        os.close(handle)


def append(path: str | os.PathLike[str], text: str) -> None:
    """Add `text` at the end of a file: all of it, or on an error nothing. Others may append at the same time.

    Raises
    ------
    ValueError, OSError
        As `replaced`.
    """
    target = _target("output", path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("ab", buffering=0) as file:
        _lock(file.fileno(), wait=True)
        size = os.fstat(file.fileno()).st_size
        data = text.encode()
        try:
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except BaseException:
            os.ftruncate(file.fileno(), size)
            raise


@contextmanager
def alone(path: str | os.PathLike[str]) -> Iterator[None]:
    """A block that one process at a time is in, by a lock on the file `path`, which stays; killed ones hold it no more.

    Raises
    ------
    ValueError
        Another process is in it, or as `replaced`.
    OSError
        The file cannot be made.
    """
    target = _target("output", path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("ab") as file:
        if fcntl is not None and not _lock(file.fileno()):
            raise ValueError(f"output: got {str(target.parent)!r}, where another process is at work")
        yield


def check_input(name: str, path: str | os.PathLike[str]) -> None:
    """Refuse what is no file, before it is read; the message begins with the `name` of the argument.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        It is a folder.
    """
    if Path(path).is_dir():
        raise ValueError(f"{name}: got {str(path)!r}, a folder, must be a file")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{name}: there is no file {path}")


def check_outputs(
    outputs: Mapping[str, Iterable[str | os.PathLike[str] | None]],
    inputs: Iterable[str | os.PathLike[str] | None] = (),
) -> None:
    """Refuse, before the work, files that could not be written after it. No file is made or changed.

    Parameters
    ----------
    outputs : mapping of str to paths
        The option that names them, and the files that will be written. None is left out.
    inputs : paths, optional
        What is read, and so must not be written: files, folders with all that lies in them, or names of no file.

    Raises
    ------
    ValueError
        A path is a folder, a pipe, a device or too long; its folder cannot be written; or two outputs, or an output and
        an input, are one file. The message begins with the option.
    """
    taken = {os.path.realpath(path): "is read" for path in inputs if path is not None}
    for name, paths in outputs.items():
        for path in paths:
            if path is None:
                continue
            target = _target(name, path)
            places = [target, *target.parents] if target.exists() else [target]
            if (why := next((taken[place] for place in map(str, places) if place in taken), None)) is not None:
                raise ValueError(f"{name}: got {str(path)!r}, which {why} already, must be another file")
            taken[str(target)] = f"{name} writes"
            _check_folder(name, path, target)


def _target(name: str, path: str | os.PathLike[str]) -> Path:
    """The file that `path` means, links followed; ValueError unless it is a regular file or not there yet."""
    try:
        target = Path(os.path.realpath(path))
        mode = target.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return target
    except OSError as error:  # a ring of links, too long a name, a folder that may not be looked into
        raise ValueError(f"{name}: got {str(path)!r}, which cannot be written: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise ValueError(f"{name}: got {str(path)!r}, {kind}, must be a regular file or a new one")
    return target


def _check_folder(name: str, path: str | os.PathLike[str], target: Path) -> None:
    """ValueError unless a file can be made in the folder of `target`, or of the nearest one that is there."""
    folder = next(parent for parent in target.parents if os.path.lexists(parent))
    try:
        longest = os.pathconf(folder, "PC_NAME_MAX")
        if any(len(os.fsencode(part)) > longest for part in target.parts):
            raise ValueError(f"{name}: got {str(path)!r}, whose name is too long: at most {longest} bytes are allowed")
        partial, handle = _temporary(folder / target.name)
        partial.unlink()
        os.close(handle)
    except OSError as error:
        raise ValueError(
            f"{name}: got {str(path)!r}, must be in a folder that can be written, and {folder} is not one: "
            f"{error.strerror}"
        ) from error


def _temporary(target: Path) -> tuple[Path, int]:
    """A new empty file beside `target`, locked by the handle that comes with it; left-overs there are removed."""
    clear_left_over(target.parent)
    while True:
        partial = target.with_name(f".pab-{secrets.token_hex(6)}.partial{target.suffix[:32]}")
        handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)  # as the umask says
        if not _lock(handle) or os.fstat(handle).st_nlink:
            return partial, handle
        os.close(handle)  # another process took it for a left-over before it was locked


def clear_left_over(folder: Path) -> None:
    """Remove the temporary files of processes that are gone."""
    for partial in folder.glob(LEFT_OVER):
        with suppress(OSError):
            handle = os.open(partial, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
            try:
                if stat.S_ISREG(os.fstat(handle).st_mode) and _lock(handle):
                    partial.unlink()
            finally:
                os.close(handle)


def _lock(handle: int, wait: bool = False) -> bool:
    """Lock an open file; False where another holds it, or there are no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True
