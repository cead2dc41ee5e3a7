"""What the commands share: options, the values of options, errors and exit codes."""

from __future__ import annotations

import errno
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand

from pab_kernels.config import ATTENTION_PRECISIONS, CACHE_DTYPES, LINEAR_PRECISIONS, PRESETS
from pab_kernels.strict_yaml import printable

if TYPE_CHECKING:
    import torch

    from pab_kernels.pipelines.sizes import VideoSize

EXIT_CODES = "Exit codes: 0 done, 1 failed while running, 2 wrong option or file. PAB_DEBUG=1 shows tracebacks."
INTERRUPTED = 130
OF_PATHS = (errno.EACCES, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR)
"""Errors of the system that say that a path is wrong."""
DTYPES = ("float32", "bfloat16", "float16")
CACHE_DEVICES = ("cpu", "cuda")


class Command(TyperCommand):
    """A command whose numbers are finite: a range lets nan through, and most let infinity.

    Ctrl-C, SIGTERM and SIGHUP end it as an exception, so that no temporary file stays, and with 128 plus their number.
    """

    def invoke(self, ctx: Any) -> Any:
        """As typer's."""
        with _signals_raise():
            return super().invoke(ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer's; exit code 2 naming the option."""
        rest = super().parse_args(ctx, args)
        for option in self.get_params(ctx):
            value = ctx.params.get(option.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise typer.BadParameter(f"{value} is not a finite number.", ctx=ctx, param=cast(Any, option))
        return rest


@contextmanager
def clean_errors() -> Iterator[None]:
    """A wrong option or file ends with its message and exit code 2; lack of memory or disk with exit code 1.

    Ctrl-C ends with 130. Anything else is a bug and keeps its traceback; with PAB_DEBUG=1 in the environment everything
    does.
    """
    try:
        yield
    except KeyboardInterrupt:
        print_error("interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        if (trace := getattr(error, "trace", None)) is not None:
            print(trace, file=sys.stderr, end="")
        _fail(error, code)


def _exit_code(error: Exception) -> int | None:
    """That of an error, also where a rank met with it; None for a bug."""
    if isinstance(error, ValueError | TypeError | FileNotFoundError):
        return 2
    if isinstance(error, OSError):
        return 2 if error.errno in OF_PATHS else 1
    if isinstance(error, MemoryError):
        return 1
    if isinstance(error, RuntimeError):
        import torch

        from pab_kernels.distributed.launch import RankError

        if isinstance(error, RankError) and error.about is not None:
            return _exit_code(error.about)
        if isinstance(error, torch.OutOfMemoryError | RankError):
            return 1
    return None


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP, unless they are ignored or handled already, raise SystemExit.

    What a signal raises while an object is being deleted, Python drops: then the signal is sent again.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():  # Python lets no other thread do this
        for number in filter(None, (signal.SIGTERM, getattr(signal, "SIGHUP", None))):
            if signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, _end)
    report = sys.unraisablehook

    def send_again(dropped: Any) -> None:
        error = dropped.exc_value
        code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else getattr(error, "code", None)
        number = code - 128 if isinstance(code, int) else None
        if number not in (signal.SIGINT, *before):
            report(dropped)
            return
        again = threading.Timer(0.05, os.kill, (os.getpid(), number))  # later, when the deletion is over
        again.daemon = True
        again.start()

    sys.unraisablehook = send_again
    try:
        yield
    finally:
        sys.unraisablehook = report
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _fail(error: Exception, code: int) -> None:
    if os.environ.get("PAB_DEBUG", "0") not in ("", "0"):
        raise error
    print_error(str(error) or type(error).__name__)
    raise typer.Exit(code) from error


def print_error(message: str) -> None:
    """To stderr, as every error of the command line."""
    console(stderr=True).print(
        Text.assemble(("error:", "red"), " " + "\n".join(map(printable, message.splitlines()))), soft_wrap=True
    )


def console(stderr: bool = False, least_width: int = 0) -> Console:
    """Where a command prints. Text is text: names with brackets are no styles."""
    width = max(least_width, Console().width) if least_width else None
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False, width=width)


def device_named(name: str | None) -> torch.device:
    """The device of an option; by default cuda where there is one.

    Raises
    ------
    ValueError
        Unknown, or a GPU that torch does not see.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: got {name!r}, must be cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: got {name!r}, must be cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: got {name}, must be cpu: torch sees no CUDA GPU")
    return device


def rank_device(device: torch.device, rank: int) -> torch.device:
    """The device of a rank: a GPU of its own, or the CPU that all share."""
    import torch

    return torch.device("cuda", rank) if device.type == "cuda" else device


def default_dtype(device: torch.device) -> str:
    """bfloat16 on a GPU, float32 on a CPU."""
    return "bfloat16" if device.type == "cuda" else "float32"


def dtype_named(name: str) -> torch.dtype:
    """The dtype of an option, or ValueError."""
    import torch

    if name not in DTYPES:
        raise ValueError(f"dtype: got {name!r}, must be one of {', '.join(DTYPES)}")
    return getattr(torch, name)


def on_host(cache_device: str | None) -> bool:
    """Whether slots go to pinned host memory; ValueError for another device than the option allows."""
    if cache_device not in (None, *CACHE_DEVICES):
        raise ValueError(f"cache_device: got {cache_device!r}, must be {' or '.join(CACHE_DEVICES)}")
    return cache_device == "cpu"


def say_size(console: Console, size: VideoSize, real: tuple[int, int]) -> None:
    """Say it where a video's height and width are not those that were asked for."""
    if (size.height, size.width) != real:
        console.print(
            f"The video is {real[1]}x{real[0]}, not {size.width}x{size.height}: latents are eighths, rounded down.",
            soft_wrap=True,
        )


def _families() -> list[str]:
    return ["demo", *PRESETS]


def _presets() -> list[str]:
    return ["off", *PRESETS]


Model = Annotated[
    str,
    typer.Option(
        help="demo, latte, open_sora, open_sora_plan_v110, open_sora_plan_v120, or a folder or hub id of a Latte "
        "pipeline.",
        autocompletion=_families,
    ),
]
Weights = Annotated[str | None, typer.Option(help="The model's checkpoint: a file, folder or hub id.")]
TextEncoder = Annotated[str | None, typer.Option(help="T5 or mT5: a folder or hub id.")]
Vae = Annotated[
    str | None,
    typer.Option(
        help="The video decoder: a file, folder or hub id; by default the family's own. Also one of diffusers."
    ),
]
DecodeMemory = Annotated[
    str | None,
    typer.Option(help="What a piece of the decoder may take, such as 4GiB: picks how large pieces are."),
]
Seamless = Annotated[
    bool,
    typer.Option("--seamless", help="Decode without the originals' seams: other numbers than theirs, see the docs."),
]
Guidance = Annotated[float | None, typer.Option("--guidance", "--cfg", help="Guidance scale.")]
Pab = Annotated[
    str | None,
    typer.Option(
        help="A preset (latte, latte:347), a YAML file, or off; by default the family's own.", autocompletion=_presets
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu or cuda; by default cuda where there is one.", autocompletion=lambda: ["cpu", "cuda"]),
]
Dtype = Annotated[
    str | None,
    typer.Option(help="By default bfloat16 on cuda, float32 on cpu.", autocompletion=lambda: list(DTYPES)),
]
CacheDevice = Annotated[
    str | None,
    typer.Option(
        help="cpu keeps this runtime's slots in pinned host memory.", autocompletion=lambda: list(CACHE_DEVICES)
    ),
]
CacheDtype = Annotated[
    str | None,
    typer.Option(help="fp8 or int8: slots in half the memory.", autocompletion=lambda: list(CACHE_DTYPES)),
]
LinearPrecision = Annotated[
    str | None,
    typer.Option(
        help="fp8: the blocks' linears in fp8 where that is faster; fp8-all: all of them, measured or not.",
        autocompletion=lambda: list(LINEAR_PRECISIONS),
    ),
]
AttentionPrecision = Annotated[
    str | None,
    typer.Option(
        help="fp8: spatial and full attention in e4m3 where there are many tokens, on Hopper GPUs.",
        autocompletion=lambda: list(ATTENTION_PRECISIONS),
    ),
]
Gpus = Annotated[int, typer.Option(min=1, help="GPUs of this machine that run it together (with --device cpu, ranks).")]
MeshAxes = Annotated[
    str | None,
    typer.Option("--mesh", help="How they share it: guidance=2,frames=4; by default what costs least, computed."),
]
Resolution = Annotated[
    str | None, typer.Option(help="Open-Sora: 144p to 720p. `pab info`: Wan 480p, 720p; LTX 480p, 704p.")
]
Duration = Annotated[str | None, typer.Option(help="Open-Sora: 2s, 4s, 8s or 16s, or frames: 1, or a multiple of 17.")]
Aspect = Annotated[str | None, typer.Option(help="Open-Sora, height to width: 9:16 (wide), 16:9 (tall), 1:1, ...")]
Size = Annotated[
    str | None, typer.Option(help="Open-Sora-Plan: 65x512x512, 29x480p, ... `pab info`: Wan's 1.3b, 14b, 5b.")
]
