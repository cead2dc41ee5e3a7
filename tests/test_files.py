"""Files: never half written, nothing of anyone else's touched, refused before the work."""

import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from pab_kernels.files import append, check_outputs, replaced

WRITER = """
import os, sys, time, typer
from pab_kernels.cli import options
from pab_kernels.files import replaced
class Deleted:
    def __del__(self) -> None:
        os.kill(os.getpid(), int(sys.argv[2]))
        time.sleep(0.01)
def command(path: str, number: int) -> None:
    with options.clean_errors(), replaced(path) as partial:
        partial.write_text("half")
        print("ready", flush=True)
        if number:
            Deleted()
        time.sleep(60)
app = typer.Typer()
app.command(cls=options.Command)(command)
app()
"""
"""Waits to be killed; with a number it sends itself that signal while an object is deleted."""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(path, text="new"):
    with replaced(path) as partial:
        partial.write_text(text)


def test_the_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    write(path, "old")
    for error in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), replaced(path) as partial:  # noqa: PT012
            partial.write_text("half")
            assert partial.suffix == ".txt"
            assert partial.parent == path.parent
            raise error
        assert (path.read_text(), names(path.parent)) == ("old", ["a.txt"])
    write(path)
    assert (path.read_text(), names(path.parent)) == ("new", ["a.txt"])


def test_files_of_others_and_a_second_run_are_left_alone(tmp_path):
    path, own = tmp_path / "video.png", tmp_path / "video.partial.png"
    own.write_text("mine")
    with replaced(path) as first, replaced(path) as second:
        first.write_text("first")
        second.write_text("second")
        assert first != second
    assert own.read_text() == "mine"
    assert path.read_text() == "first"  # the one that ended last
    assert names(tmp_path) == ["video.partial.png", "video.png"]


def test_a_link_is_followed(tmp_path):
    target, link, dangling = tmp_path / "there" / "target.txt", tmp_path / "link.txt", tmp_path / "dangling.txt"
    write(target, "old")
    link.symlink_to(target)
    dangling.symlink_to(tmp_path / "new" / "file.txt")
    write(link)
    write(dangling)
    assert link.is_symlink()
    assert dangling.is_symlink()
    assert (target.read_text(), dangling.read_text(), names(target.parent)) == ("new", "new", ["target.txt"])


def test_the_mode_is_the_old_files_or_the_umasks(tmp_path):
    old, new = tmp_path / "old.txt", tmp_path / "new.txt"
    old.write_text("old")
    old.chmod(0o640)
    before = os.umask(0o027)
    try:
        write(old)
        write(new)
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (old, new)] == [0o640, 0o640]


@pytest.fixture
def pipe(tmp_path):
    path = tmp_path / "pipe.txt"
    os.mkfifo(path)
    return path


def test_pipes_devices_and_folders_stay_what_they_are(tmp_path, pipe):
    link, folder = tmp_path / "link.txt", tmp_path / "folder.txt"
    link.symlink_to(pipe)
    folder.mkdir()
    for path, kind in ((pipe, "a pipe"), (link, "a pipe"), (folder, "a folder"), ("/dev/null", "a device")):
        for attempt in (write, lambda path: append(path, "x"), lambda path: check_outputs({"output": [path]})):
            with pytest.raises(ValueError, match=f"output: got .*, {kind}, must be a regular file"):
                attempt(path)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)  # noqa: PTH116
    assert names(tmp_path) == ["folder.txt", "link.txt", "pipe.txt"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_leaves_nothing_or_the_next_run_clears_it(tmp_path, number):
    path = tmp_path / "a.txt"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path), "0"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    write(path, "ours")
    assert len(names(tmp_path)) == 2, "what a living process writes is no left-over"
    process.send_signal(number)
    assert process.wait(20) == (-number if number == signal.SIGKILL else 128 + number)
    process.stdout.close()
    assert (len(names(tmp_path)) == 2) == (number == signal.SIGKILL)
    write(path, "ours again")
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_an_object_is_deleted_is_not_lost(tmp_path, number):
    """Python drops what is raised in a `__del__`, as some packages have that a command imports."""
    done = subprocess.run(
        [sys.executable, "-c", WRITER, str(tmp_path / "a.txt"), str(int(number))], capture_output=True, timeout=40
    )
    assert (done.returncode, done.stdout) == (128 + number, b"ready\n")
    assert b"Traceback" not in done.stderr
    assert not names(tmp_path)


def test_only_left_overs_are_cleared(tmp_path, pipe):
    left = tmp_path / ".pab-0123456789ab.partial.mp4"
    left.write_text("half")
    keep = {tmp_path / name for name in (".pab-notes.txt", "pab-x.partial.mp4", ".pab-link.partial.mp4", "kept.txt")}
    for path in keep:
        path.symlink_to(pipe) if "link" in path.name else path.write_text("mine")
    os.mkfifo(tmp_path / ".pab-pipe.partial.mp4")
    write(tmp_path / "a.txt")
    assert not left.exists()
    assert all(os.path.lexists(path) for path in keep)
    assert (tmp_path / ".pab-pipe.partial.mp4").exists()


def test_outputs_are_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "ring").symlink_to(tmp_path / "ring")
    for path, words in (
        (tmp_path / "file" / "v.gif", "must be in a folder that can be written, and .*file is not one"),
        (tmp_path / "file" / "deep" / "v.gif", "must be in a folder that can be written"),
        ("/proc/self/v.gif", "must be in a folder that can be written, and /proc"),
        (tmp_path / ("x" * 300 + ".gif"), "cannot be written: File name too long"),
        (tmp_path / "new" / ("x" * 300 + ".gif"), "too long: at most 255 bytes"),
        (tmp_path / "new" / ("ü" * 130 + ".gif"), "too long: at most 255 bytes"),
        (tmp_path / "ring", "cannot be written: Too many levels"),
    ):
        with pytest.raises(ValueError, match=f"^json: got .*{words}"):
            check_outputs({"json": [path]})
    check_outputs({"json": [tmp_path / "new" / "deep" / ("x" * 250), None]})
    assert names(tmp_path) == ["file", "ring"]


def test_outputs_are_no_inputs_and_not_each_other(tmp_path):
    settings, other, folder = tmp_path / "a.yaml", tmp_path / "link.yaml", tmp_path / "model"
    settings.write_text("mine")
    other.symlink_to(settings)
    folder.mkdir()
    (folder / "model.safetensors").write_text("mine")
    check_outputs({"csv": [tmp_path / "b.csv"], "json": [tmp_path / "b.json"]}, [settings, folder, "latte", None])
    check_outputs({"csv": [folder / "new.csv"]}, [folder])
    for outputs, inputs in (
        ({"csv": [settings]}, [settings]),
        ({"csv": [other]}, [settings]),
        ({"csv": [settings]}, [other]),
        ({"csv": [folder / "model.safetensors"]}, [folder]),
        ({"json": [tmp_path / "b"], "csv": [tmp_path / "c" / ".." / "b"]}, []),
    ):
        with pytest.raises(ValueError, match=r"^csv: got .* already, must be another file"):
            check_outputs(outputs, inputs)


FULL = """
import resource, signal, sys
from pab_kernels.files import append, replaced
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    append(sys.argv[1], "x" * 1000)
except OSError as error:
    print(error)
try:
    with replaced(sys.argv[2]) as partial:
        partial.write_text("x" * 1000)
except OSError as error:
    print(error)
"""


def test_a_full_disk_leaves_files_as_they_were(tmp_path):
    log, file = tmp_path / "log.csv", tmp_path / "file.txt"
    append(log, "a\n")
    append(log, "b\n")
    write(file, "old")
    result = subprocess.run([sys.executable, "-c", FULL, log, file], capture_output=True, text=True, check=True)
    assert result.stdout.count("File too large") == 2
    assert (log.read_text(), file.read_text(), names(tmp_path)) == ("a\nb\n", "old", ["file.txt", "log.csv"])


def test_appending_at_the_same_time_mixes_nothing(tmp_path):
    log = tmp_path / "log.csv"
    code = """import sys
from pab_kernels.files import append
for _ in range(50):
    append(sys.argv[1], sys.argv[2] * 9999 + chr(10))
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, log, letter]) for letter in "ab"]
    deadline = time.monotonic() + 60
    assert all(process.wait(deadline - time.monotonic()) == 0 for process in processes)
    assert sorted(log.read_text().split()) == ["a" * 9999] * 50 + ["b" * 9999] * 50
