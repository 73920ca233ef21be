"""Clips read from a video file: frames at even distances of a film in H.264."""

import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused.io.picture import centre_crop
from fused.io.video import decode_frames, middle_frames, read_clip
from harness.fixtures.encoded_film import GOPS, HEIGHT, WIDTH, encoded_film
from harness.judge.case import Case
from harness.judge.implementation import Implementation
from harness.judge.race import DATA, Race
from harness.records.ceilings import Ceilings
from harness.records.finding import Finding, differing
from harness.records.speed import Point

SIDE = 224  # pixels of a clip that is resized
CLIPS = (8, 16)  # frames of a clip
FEWEST = 7  # samples of a reader at a point
THINNED = 4  # every so many pixels are enough to know a frame again
INSTALL = {
    "av": "pip install av", "decord": "pip install decord",
    "torchcodec": "pip install torchcodec, which needs FFmpeg's shared libraries",
}  # fmt: skip


def as_decoded(frames: Tensor) -> Tensor:
    """Return the frames as they are."""
    return frames


def as_clip(frames: Tensor) -> Tensor:
    """Return frames (T, H, W, 3) as `read_clip` does: float32 (3, T, SIDE, SIDE), normalised."""
    return torch.stack([centre_crop(frame, SIDE) for frame in frames], 1)


@dataclass(frozen=True)
class Reader(Implementation):
    """A way to read: `call(path, T)` returns what `prepare` makes of the clip's T frames, uint8 (T, H, W, 3).

    `package` is imported for it. A reader with `own_colours` has another conversion to RGB than PyAV's, whose bytes differ by
    a little.
    """

    package: str = "av"
    own_colours: bool = False
    prepare: Callable[[Tensor], Tensor] = as_decoded

    def absent(self, device: str) -> str | None:
        """Return why it cannot run: its package is missing, or what makes the film."""
        return missing_encoder() or missing_package(self.package)


@functools.cache
def missing_package(package: str) -> str | None:
    """Return why a package cannot be imported, with the fix; None if it can."""
    try:
        importlib.import_module(package)
    except Exception as error:  # a library that does not load raises what it likes
        reason = (str(error).splitlines() or [""])[0]
        return f"{package} cannot be imported ({type(error).__name__}: {reason}): {INSTALL[package]}"
    return None


@functools.cache
def missing_encoder() -> str | None:
    """Return why the film cannot be made, None if it can."""
    if reason := missing_package("av"):
        return reason
    return None if "libx264" in importlib.import_module("av").codecs_available else "PyAV was built without libx264"


def implementations() -> list[Implementation]:
    """Return the full decode; ours with and without the picture's preparation; what others use."""
    return [
        Reader("reference", lambda path, T: full_decode(path)[clip_numbers(len(full_decode(path)), T)]),
        Reader("decode_frames", read_frames_of_clip),
        Reader("read_clip", lambda path, T: read_clip(path, T, SIDE), prepare=as_clip),
        Reader("pyav", read_by_pyav, rival=True),
        Reader("decord", read_by_decord, rival=True, package="decord", own_colours=True),
        Reader("torchcodec", read_by_torchcodec, rival=True, package="torchcodec", own_colours=True),
    ]


def clip_numbers(total: int, T: int) -> list[int]:
    """Return the numbers of a clip's frames, the middles of T equal parts of `total`."""
    return [(2 * i + 1) * total // (2 * T) for i in range(T)]


@functools.lru_cache(maxsize=1)
def full_decode(path: Path) -> Tensor:
    """Return all frames of a file, uint8 (N, H, W, 3)."""
    import av

    with av.open(str(path)) as container:
        return torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)])


def read_frames_of_clip(path: Path, T: int) -> Tensor:
    """Return the frames by `decode_frames`."""
    return torch.stack([image for _, image in decode_frames(path, lambda total, times: middle_frames(total, T))])


def read_by_pyav(path: Path, T: int) -> Tensor:
    """Return the frames by a loop over all frames up to the last that is wanted, as it is written by hand."""
    import av

    with av.open(str(path)) as container:
        stream, taken = container.streams.video[0], []
        stream.codec_context.thread_count = 1
        numbers = clip_numbers(stream.frames, T)
        for number, frame in enumerate(container.decode(stream)):
            if number in numbers:
                taken.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
            if number == numbers[-1]:
                break
    return torch.stack(taken)


def read_by_decord(path: Path, T: int) -> Tensor:
    """Return the frames by decord."""
    video = importlib.import_module("decord").VideoReader(str(path), num_threads=1)
    return torch.from_numpy(video.get_batch(clip_numbers(len(video), T)).asnumpy())


def read_by_torchcodec(path: Path, T: int) -> Tensor:
    """Return the frames by torchcodec."""
    decoder = importlib.import_module("torchcodec.decoders").VideoDecoder
    video = decoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
    return video.get_frames_at(clip_numbers(len(video), T)).data


def cases(grid: str) -> list[Case]:
    """Return nothing: no question is asked of a reader but that of `special_cases`."""
    return []


def special_cases(check: str, grid: str) -> list[Case]:
    """Return the files and clips that the check `frames` reads."""
    if check != "frames":
        return []
    found = [Case("clips", (("T", T), ("G", gop)), ("for=frames", "infer"), "float32") for gop in GOPS for T in CLIPS]
    return found[:1] if grid == "smoke" else found


def draw(case: Case, seed: int) -> dict[str, Tensor]:
    """Return nothing: the input is a file."""
    return {}


def precise(case: Case) -> set[str]:
    """Return nothing."""
    return set()


def no_cotangent(case: Case) -> set[str]:
    """Return nothing: nothing is differentiated."""
    return set()


def output_values(case: Case) -> int:
    """Return the bytes of a clip's frames."""
    return case["T"] * HEIGHT * WIDTH * 3


def steps(case: Case) -> float:
    """Return the cost of a full decode in steps of a scan."""
    return 500.0


def evaluate(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the clip of one reader."""
    return {"clip": call(encoded_film(case["G"]), case["T"])}


def frame_findings(implementation: Implementation, case: Case, clip: Tensor) -> list[Finding]:
    """Return how much of a clip differs from the frames of a full decode; none may.

    What differs are bytes, or of a reader with its own colours frames: each must be nearer to its frame than to any other.
    """
    assert isinstance(implementation, Reader)
    film = full_decode(encoded_film(case["G"]))
    numbers = clip_numbers(len(film), case["T"])
    due = film[numbers]
    if not implementation.own_colours:
        return [differing("clip", implementation.prepare(due), clip)]
    if clip.shape != due.shape or clip.dtype != due.dtype:
        note = f"got {clip.dtype} {tuple(clip.shape)}, due is {due.dtype} {tuple(due.shape)}"
        return [Finding("clip", "form", math.inf, 0.0, note=note)]
    thin = film[:, ::THINNED, ::THINNED].float()
    nearest = [int((thin - image[::THINNED, ::THINNED]).abs().mean((1, 2, 3)).argmin()) for image in clip]
    wrong = [i for i, (found, number) in enumerate(zip(nearest, numbers, strict=True)) if found != number]
    return [Finding("clip", "frames", float(len(wrong)), 0.0, scale=float(len(numbers)), worst=tuple(wrong[:1]))]


def races() -> list[Race]:
    """Return the race of readers; it measures the processor and not the models, so that it runs only where it is named."""
    return [
        Race(
            "data", DATA, points=points, contenders=(("clips", ""),), checks=("frames",), licence=licence,
            maker="harness.bench.reading:make", fewest=lambda point: FEWEST, by_default=False,
            title="reading of videos",
        )
    ]  # fmt: skip


def points(grid: str) -> list[Point]:
    """Return a clip of every length from every file, in all grids the same; L are the tokens that a model makes of it."""
    sizes = [(("B", 1), ("T", T), ("S", SIDE), ("L", 1 + T * (SIDE // 16) ** 2), ("G", gop)) for gop in GOPS for T in CLIPS]
    return [Point("data", dims, "infer", "read", "float32") for dims in sizes]


def licence(dtype: str) -> tuple[str, ...]:
    """Return every file and length that is timed."""
    return (f"*-for=frames-infer-{dtype}",)


def bound(point: Point, variant: str, ceilings: Ceilings) -> float:
    """Return the seconds of writing the frames once; decoding itself has no known least time."""
    return point["T"] * HEIGHT * WIDTH * 3 / ceilings.copy
