"""Ranks on a CPU: results, failures, signals. A launch takes as long as importing torch does in a new process."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pab_kernels.distributed.launch import Group, RankError, launch
from tests.distributed import rank_functions

HANG = """\
import sys
from pathlib import Path
from pab_kernels.distributed.launch import launch
from tests.distributed.rank_functions import hang
if __name__ == "__main__":
    launch(hang, Path(sys.argv[1]), ranks=2, device="cpu")
"""


def test_the_result_is_that_of_rank_0():
    assert launch(rank_functions.total, 4, ranks=3, device="cpu") == (15.0, "0", "3")


@pytest.mark.parametrize(
    ("how", "where", "message"),
    [
        ("raise", 0, r"^rank 0: ValueError: latents: got 0$"),
        ("a bug", 1, r"^rank 1: KeyError: 'name'$"),
        ("kill", 1, r"^rank 1: was killed by SIGKILL$"),
    ],
)
def test_the_rank_that_fails_first_is_named_and_ends_the_others(how, where, message):
    with pytest.raises(RankError, match=message) as caught:
        launch(rank_functions.fail, how, where, ranks=2, device="cpu")
    assert caught.value.rank == where
    assert ("KeyError" in (caught.value.trace or "")) == (how == "a bug")
    assert isinstance(caught.value.about, ValueError) == (how == "raise")


def test_ranks_stay_from_call_to_call_until_one_fails():
    """What a rank keeps is there at the next call, in the same process; a rank that dies in between is found there."""
    with Group(rank_functions.Counts, 10, ranks=2, device="cpu") as group:
        first, second = group.call("add", 1), group.call("add", 5)
        assert (first[0], second[0]) == (10 + 1 + 10 + 2, 10 + 1 + 5 + 10 + 2 + 6)
        assert first[1] == second[1] != os.getpid()
        os.kill(first[1], signal.SIGKILL)
        with pytest.raises(RankError, match=r"^rank 0: was killed by SIGKILL$") as caught:
            group.call("add", 1)
        assert caught.value.died
        with pytest.raises(ValueError, match="ranks: have been ended"):
            group.call("add", 1)
    assert not any(process.is_alive() for process in group._processes)


def test_an_error_of_a_rank_comes_whole_out_of_another_process():
    again = pickle.loads(pickle.dumps(RankError(1, "KeyError: 'name'", "where", died=True)))
    assert (str(again), again.rank, again.trace, again.died) == ("rank 1: KeyError: 'name'", 1, "where", True)


def test_who_waits_in_vain_gives_up():
    with pytest.raises(RankError, match=r"^rank 0: "):
        launch(rank_functions.come_late, ranks=2, device="cpu", timeout=10)  # also to find each other


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_rank_that_hangs_in_an_exchange_of_gpus_is_ended():
    start = time.monotonic()
    with pytest.raises(RankError, match=r"^rank 1: was killed by SIGKILL$"):
        launch(rank_functions.fail, "kill", 1, ranks=2)
    assert time.monotonic() - start < 60


def _is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="looks processes up in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_no_rank_outlives_the_process_that_launched_it(number, tmp_path):
    """Ctrl-C reaches all processes of a terminal; SIGKILL only the launching one, which cannot say anything."""
    command = [sys.executable, "-c", HANG, str(tmp_path)]
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 120
        while len(files := list(tmp_path.glob("*.pid"))) < 2 and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.1)
        ranks = [int(file.read_text()) for file in files]
        assert len(ranks) == 2
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        process.wait(timeout=15)
        end = time.monotonic() + 15
        while any(map(_is_there, ranks)):
            assert time.monotonic() < end
            time.sleep(0.1)
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == -number
    assert said.count("Traceback") == (number == signal.SIGINT), said  # the launching process's own


@pytest.mark.parametrize(
    ("ranks", "device", "message"),
    [
        (0, "cpu", "gpus: got 0, must be an integer of at least 1"),
        (2, "cuda:1", "device: got 'cuda:1', must be cuda or cpu"),
        (1000, "cuda", "gpus: got 1000, must be at most"),
    ],
)
def test_what_cannot_be_is_refused_before_a_process_is_started(ranks, device, message):
    with pytest.raises(ValueError, match=message):
        launch(rank_functions.total, 4, ranks=ranks, device=device)
