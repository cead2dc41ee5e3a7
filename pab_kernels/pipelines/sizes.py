"""The sizes that each family was trained for, in pixels and in latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ASPECTS = ("9:21", "1:2", "9:16", "2:3", "3:4", "1:1", "4:3", "3:2", "16:9", "2:1")
"""Height to width, as Open-Sora writes it: 9:16 is a wide video, 16:9 a tall one."""

# Height x width for each of ASPECTS. About the same number of pixels in a row; Open-Sora's own rounding.
_OPEN_SORA = {
    "144p": "125x291 135x270 144x256 156x234 166x221 192x192 221x165 235x156 256x144 271x135",
    "240p": "210x490 226x452 240x426 262x393 276x368 320x320 370x278 392x262 426x240 452x226",
    "360p": "314x732 340x680 360x640 392x588 416x554 480x480 554x416 588x392 640x360 678x340",
    "480p": "420x980 452x904 480x854 522x784 554x738 640x640 740x555 784x522 854x480 906x454",
    "720p": "628x1466 678x1356 720x1280 784x1176 832x1110 960x960 1108x832 1176x784 1280x720 1358x680",
}
RESOLUTIONS = tuple(_OPEN_SORA)
DURATIONS = {"2s": 51, "4s": 102, "8s": 204, "16s": 408}
"""Frames of Open-Sora's durations."""

PLAN_SIZES = {
    "open_sora_plan_v110": {"65x512x512": (65, 512, 512), "221x512x512": (221, 512, 512)},
    "open_sora_plan_v120": {
        "93x480p": (93, 480, 640),
        "29x480p": (29, 480, 640),
        "93x720p": (93, 720, 1280),
        "29x720p": (29, 720, 1280),
    },
}
"""Frames, height and width of Open-Sora-Plan's checkpoints, the first of each version its default."""

DIFFUSERS_SIZES: dict[str, dict[str, tuple[int, int, int]]] = {
    "wan_2_1": {"480p": (81, 480, 832), "720p": (81, 720, 1280)},
    "wan_2_2": {"720p": (121, 704, 1280), "480p": (81, 480, 832)},
    "ltx": {"480p": (161, 480, 704), "704p": (121, 704, 1216)},
}
"""Frames, height and width of the families that run in diffusers' pipelines, the first of each its default."""

MODEL_SIZES = {"wan_2_1": ("1.3b", "14b", "i2v-14b"), "wan_2_2": ("5b", "14b", "i2v-14b")}
"""The models of families that come in several sizes, the smallest first."""

FPS = {"latte": 8, "open_sora": 24, "open_sora_plan_v110": 24, "open_sora_plan_v120": 24}


@dataclass(frozen=True)
class VideoSize:
    """A video of `frames` x `height` x `width` pixels, whose latent is (T, H, W)."""

    frames: int
    height: int
    width: int
    latent: tuple[int, int, int]

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, must be one of {', '.join(allowed)}")
    return value


def open_sora_size(resolution: str = "480p", aspect: str = "9:16", duration: str | int = "2s") -> VideoSize:
    """A size of Open-Sora 1.2. Its VAE makes 5 latent frames of 17, and an eighth of height and width, rounded down.

    Decoded, a width of 854 is therefore 848. An image is one latent frame.

    Parameters
    ----------
    resolution : {"144p", "240p", "360p", "480p", "720p"}
    aspect : str
        One of `ASPECTS`, height to width.
    duration : str or int
        "2s", "4s", "8s", "16s" (of 25.5 frames a second), or a number of frames: 1, an image, or a multiple of 17.

    Raises
    ------
    ValueError
        Another value; the message lists what is allowed.
    """
    sizes = _OPEN_SORA[_choice("resolution", resolution, RESOLUTIONS)].split()
    height, width = map(int, sizes[ASPECTS.index(_choice("aspect", aspect, ASPECTS))].split("x"))
    frames = int(duration) if str(duration).isdecimal() else DURATIONS.get(str(duration), 0)
    if frames != 1 and (frames < 17 or frames % 17):
        raise ValueError(
            f"duration: got {duration!r}, must be one of {', '.join(DURATIONS)}, or frames: 1 (an image), or a "
            "multiple of 17"
        )
    return VideoSize(frames, height, width, (max(frames // 17 * 5, 1), height // 8, width // 8))


def plan_size(frames: int, height: int, width: int, patch: int = 2) -> VideoSize:
    """A size of Open-Sora-Plan: its VAE codes the first frame alone and then four at a time.

    Raises
    ------
    ValueError
        Frames are not 4 k + 1 (1 is an image), or height or width are not multiples of 8 times the patch size.
    """
    if frames < 1 or frames % 4 != 1:
        raise ValueError(f"frames: got {frames}, must be 4 k + 1, such as 29, 65 or 93, or 1 for an image")
    for name, value in (("height", height), ("width", width)):
        if value < 1 or value % (8 * patch):
            raise ValueError(f"{name}: got {value}, must be a positive multiple of {8 * patch}")
    return VideoSize(frames, height, width, ((frames - 1) // 4 + 1, height // 8, width // 8))


def _diffusers_size(family: str, resolution: str | None, size: str | None) -> VideoSize:
    """Of Wan and LTX-Video, whose VAEs code the first frame alone and then several at a time; `size` is the model's."""
    sizes = DIFFUSERS_SIZES[family]
    model = model_size(family, size)
    names = tuple(sizes)
    if family == "wan_2_2" and model != "5b":
        sizes = DIFFUSERS_SIZES["wan_2_1"]  # in the same VAE's latents
    frames, height, width = sizes[_choice("resolution", resolution or names[0], names)]
    in_time, in_space = (8, 32) if family == "ltx" else (4, 16 if model == "5b" else 8)
    return VideoSize(frames, height, width, ((frames - 1) // in_time + 1, height // in_space, width // in_space))


def model_size(family: str, size: str | None) -> str | None:
    """Which of a family's models `size` means, the smallest if it is None; None for families that have one.

    Raises
    ------
    ValueError
        The family has no model of this size.
    """
    if family not in MODEL_SIZES:
        return None
    return _choice("size", size or MODEL_SIZES[family][0], MODEL_SIZES[family])


def family_size(
    family: str,
    *,
    resolution: str | None = None,
    aspect: str | None = None,
    duration: str | None = None,
    size: str | None = None,
    image: bool = False,
) -> VideoSize | None:
    """The size that the command line's options mean for `family`; None stands for the family's default.

    With `image` it is one frame of that size. The demo's size is that of its weights: None.

    Raises
    ------
    ValueError
        An option that the family does not have, or a value that it was not trained for.
    """
    given = {"resolution": resolution, "aspect": aspect, "duration": duration, "size": size}
    taken = {
        "open_sora": ("resolution", "aspect", "duration"),
        "latte": (),
        "demo": (),
        "wan_2_1": ("size", "resolution"),
        "wan_2_2": ("size", "resolution"),
        "ltx": ("resolution",),
    }.get(family, ("size",))
    for name, value in given.items():
        if value is not None and name not in taken:
            options = f"it takes {', '.join(f'--{option}' for option in taken)}" if taken else "its size is fixed"
            raise ValueError(f"{name}: got {value!r} for {family}, which does not take it: {options}")
    if family == "demo":
        if image:
            raise ValueError("still: got it for demo, whose weights make videos of one length")
        return None
    if family == "open_sora":
        if image and duration is not None:
            raise ValueError(f"still, duration: got both, must be one of them: duration is {duration!r}")
        return open_sora_size(resolution or "480p", aspect or "9:16", 1 if image else duration or "2s")
    if family == "latte":
        return VideoSize(1, 512, 512, (1, 64, 64)) if image else VideoSize(16, 512, 512, (16, 64, 64))
    if family in DIFFUSERS_SIZES:
        if image:
            raise ValueError(f"still: got it for {family}, which is not made for images here")
        return _diffusers_size(family, resolution, size)
    if family not in PLAN_SIZES:
        known = ", ".join(("latte", "open_sora", *PLAN_SIZES, *DIFFUSERS_SIZES))
        raise ValueError(f"family: got {family!r}, must be one of {known}")
    names = tuple(PLAN_SIZES[family])
    frames, height, width = PLAN_SIZES[family][_choice("size", size or names[0], names)]
    return plan_size(1 if image else frames, height, width)


def plan_size_name(family: str, size: VideoSize | None) -> str | None:
    """The name of Open-Sora-Plan's folder for `size`, None for other families."""
    for name, pixels in PLAN_SIZES.get(family, {}).items():
        if size is not None and pixels == (size.frames, size.height, size.width):
            return name
    return None


def plan_config(family: str, size: VideoSize | None) -> dict[str, Any]:
    """What the config.json of Open-Sora-Plan's checkpoint of `size` would say."""
    if family not in PLAN_SIZES or size is None:
        return {}
    frames = "video_length" if family == "open_sora_plan_v110" else "sample_size_t"
    return {frames: size.latent[0], "sample_size": size.latent[1:]}
