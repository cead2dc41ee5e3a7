"""The example of Ray Serve, asked over HTTP on the loopback."""

import hashlib
import importlib.util
import json
import socket
import sys
import urllib.request
from pathlib import Path

import pytest

from pab_kernels.batch import on_ray

serve = pytest.importorskip("ray.serve")
EXAMPLE = Path(__file__).parents[2] / "examples" / "serve_videos.py"


@pytest.fixture
def example(monkeypatch):
    spec = importlib.util.spec_from_file_location("serve_videos", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, spec.name, module)
    return module


def test_the_example_is_as_short_as_it_is_said_to_be():
    code = [line for line in EXAMPLE.read_text().splitlines() if line.strip()]
    assert len(code) <= 22  # the docstring and the last line are no part of it


def test_a_row_posted_is_a_video_and_a_bad_one_an_error(example, demo, tmp_path):
    import ray

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def post(**row):
        request = urllib.request.Request(f"http://127.0.0.1:{port}/", json.dumps(row).encode())
        with urllib.request.urlopen(request, timeout=100) as answer:
            return json.load(answer)

    with on_ray.cluster():
        ray.cloudpickle.register_pickle_by_value(example)
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            serve.run(example.Videos.bind(str(demo), str(tmp_path / "out")))
            row = post(prompt="a red star", steps=2, seed=3)
            assert row["status"] == "done", row
            data = (tmp_path / "out" / row["file"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == row["sha256"]
            assert post(prompt="a red star", steps=2, seed=3)["sha256"] == row["sha256"]
            assert "seed: got 'x'" in post(prompt="a red star", seed="x")["error"]
            assert "'unicorn'" in post(prompt="a red unicorn", steps=2)["error"]
        finally:
            serve.shutdown()
