"""A folder of images, as a video: `img_00001.jpg`, `img_00002.jpg`, ... in any numbering."""

import re
from collections.abc import Iterator, Sequence
from fnmatch import translate
from pathlib import Path

from jaxtyping import UInt8
from torch import Tensor

from fused.io.video_error import VideoError
from fused.io.video_file import read_image

IMAGE_SUFFIXES = frozenset(".bmp .jpeg .jpg .png .ppm .tif .tiff .webp".split())
"""File names of frames, in lower case."""

_NUMBER = re.compile(r"%(0\d+)?d|\{\w*(?::(0\d+)?d?)?\}")  # of a pattern as C, FFmpeg and Python write it: %05d, {:05}, {}
_PLACE = "\ue000"  # a character that no name has

ALLOWED = "allowed is a folder of images that are numbered evenly, such as img_00001.jpg, img_00002.jpg, ..."


class FrameFolder:
    """The frames of a folder of images, in the order of the last number in their names (10 after 9), else by name.

    `pattern` selects files by name, such as "img_*.jpg" or "img_%05d.jpg" beside optical flow (`matching`). `stated` is the
    number of frames that a list states: the first so many are taken. Hidden files and files that are no images are left out.

    Raises VideoError for a folder without images, with names of several kinds, with a number missing between others, or with
    fewer frames than stated.
    """

    times = None  # a folder states no times

    def __init__(self, path: Path, *, pattern: str | None = None, stated: int | None = None) -> None:
        self.path = path
        try:
            names = [p.name for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
        except OSError as error:
            raise VideoError(path, f"the folder cannot be listed ({error.strerror})", ALLOWED) from error
        if pattern is not None:
            names = list(filter(matching(pattern).match, names))
        if not names:
            raise VideoError(path, f"a folder without images{f' named {pattern}' if pattern else ''}", ALLOWED)
        numbered = [(_split(name), name) for name in names]
        kinds = sorted({f"{start}*{end}" for (start, _, end), _ in numbered})
        if all(number is not None for (_, number, _), _ in numbered):
            if len(kinds) > 1:
                wrong = f"it holds images of {len(kinds)} kinds: {', '.join(kinds[:4])}"
                raise VideoError(path, wrong, "name one, such as data.frame_pattern='img_*.jpg'")
            self._names = [name for _, name in sorted(numbered, key=lambda item: int(item[0][1] or 0))]
            self._check_numbers(sorted(int(number or 0) for (_, number, _), _ in numbered))
        else:
            self._names = sorted(names)
        if stated is not None:
            if len(self._names) < stated:
                raise VideoError(path, f"the list states {stated} frames, and it holds {len(self._names)}", ALLOWED)
            self._names = self._names[:stated]

    def __len__(self) -> int:
        return len(self._names)

    def frames(self, indices: Sequence[int]) -> Iterator[UInt8[Tensor, "H W 3"]]:
        """Yield the images with these numbers, from 0, as RGB bytes. Raises VideoError for an image that cannot be read."""
        for index in indices:
            yield read_image(self.path / self._names[index])

    def _check_numbers(self, numbers: list[int]) -> None:
        """Raise VideoError if a number is missing between others that are evenly spaced, or occurs twice."""
        steps = [b - a for a, b in zip(numbers, numbers[1:], strict=False)]
        if 0 in steps:
            raise VideoError(self.path, f"it holds several images of number {numbers[steps.index(0)]}", ALLOWED)
        if steps and min(steps) != max(steps):
            usual = max(set(steps), key=steps.count)
            odd = next(i for i, step in enumerate(steps) if step != usual)
            wrong = f"number {numbers[odd]} is followed by number {numbers[odd + 1]}, where others are {usual} apart"
            raise VideoError(self.path, wrong, ALLOWED)


def matching(pattern: str) -> re.Pattern[str]:
    """Return the expression of a pattern of file names, of which * is any text, ? a character, and [abc] one of these.

    As C, FFmpeg and Python write the names of frames, %d and {} are a number, %05d and {:05} one of at least five digits.
    """
    digits = [found[1] or found[2] or "1" for found in _NUMBER.finditer(pattern)]
    expression = translate(_NUMBER.sub(_PLACE, pattern))
    for least in digits:
        expression = expression.replace(_PLACE, f"[0-9]{{{int(least)},}}", 1)
    return re.compile(expression)


def _split(name: str) -> tuple[str, str | None, str]:
    """Return what stands before the last number of a file's stem, the number (None without one), and what stands behind it."""
    stem, dot, suffix = name.rpartition(".")
    found = re.fullmatch(r"(.*?)(\d+)(\D*)", stem)
    return (found[1], found[2], found[3] + dot + suffix.lower()) if found else (stem, None, dot + suffix.lower())
