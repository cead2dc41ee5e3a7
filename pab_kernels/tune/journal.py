"""Trials that are done, on disk: a search that was interrupted goes on where it was."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pab_kernels.config import PABConfig
from pab_kernels.files import replaced
from pab_kernels.quality import Quality
from pab_kernels.tune.trials import Trial

TryOut = Callable[[str, PABConfig, "int | None"], Trial]


class Journal:
    """The trials of one model, steps and videos.

    Parameters
    ----------
    path : Path
        A JSON file, which is made with the first trial.
    origin : str
        What is run. A file of another origin is not read, and is replaced.
    """

    def __init__(self, path: Path, origin: str) -> None:
        self.path, self._origin = path, origin
        self._done: dict[str, Any] = {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if isinstance(found, dict) and found.get("origin") == origin and isinstance(found.get("trials"), dict):
            self._done = found["trials"]

    def __len__(self) -> int:
        return len(self._done)

    def around(self, try_out: TryOut) -> TryOut:
        """`try_out`, which leaves out what is done already and writes down what is not."""

        def known(name: str, config: PABConfig, videos: int | None = None) -> Trial:
            key = json.dumps([config.to_dict(), videos], sort_keys=True)
            if key in self._done:
                try:
                    return _read(name, config, self._done[key])
                except (TypeError, KeyError):  # not what this version writes
                    del self._done[key]
            trial = try_out(name, config, videos)
            self._done[key] = {
                "videos": [dataclasses.asdict(video) for video in trial.videos],
                "predicted": trial.predicted,
                "measured": trial.measured,
            }
            with replaced(self.path) as partial:
                partial.write_text(json.dumps({"origin": self._origin, "trials": self._done}), encoding="utf-8")
            return trial

        return known

    def close(self) -> None:
        """The search is over: the file goes."""
        self.path.unlink(missing_ok=True)


def _read(name: str, config: PABConfig, found: dict[str, Any]) -> Trial:
    videos = tuple(Quality(**video) for video in found["videos"])
    return Trial(name, config, videos, float(found["predicted"]), float(found["measured"]))
