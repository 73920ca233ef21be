"""The frames of a video for a language model: always as many as asked for, so that a short video repeats some."""

from collections.abc import Callable, Iterator
from pathlib import Path

from jaxtyping import UInt8
from torch import Tensor

from fused.io.sampling import Times
from fused.io.video import decode_frames

Places = Callable[[int, int], list[int]]
"""A function of the number of a video's frames and of the frames to take: their numbers, ascending, some of them repeated."""


class RepeatedFrames:
    """An iterator over (image (H, W, 3), number of times that it is taken) of a video's frames at the places of a rule.

    `places` are the numbers of all frames, repeated ones too. They are known from the start, and final at the end of the
    iteration (see `decode_frames`). Raises VideoError for a file that cannot be read, at once or while iterating.
    """

    def __init__(self, path: str | Path, frames: int, rule: Places) -> None:
        self.places: list[int] = []
        self._times: Times = None
        self._frames, self._rule = frames, rule
        self._images = decode_frames(Path(path), self._choose)

    def __iter__(self) -> Iterator[tuple[UInt8[Tensor, "H W 3"], int]]:
        for number, image in self._images:
            yield image, self.places.count(number)

    @property
    def seconds(self) -> list[float] | None:
        """The time of each frame in seconds from the start, None for a folder of images."""
        return None if self._times is None else [float(self._times[place]) for place in self.places]

    @property
    def duration(self) -> float | None:
        """The seconds that the video lasts; its last frame is shown as long as the one before. None for a folder of images."""
        if self._times is None:
            return None
        last = self._times[-1] - self._times[-2] if len(self._times) > 1 else 0.0
        return float(self._times[-1] + last)

    def _choose(self, total: int, times: Times) -> list[int]:
        self.places, self._times = self._rule(total, self._frames), times
        return self.places


def middle_places(total: int, frames: int) -> list[int]:
    """Return the numbers of the middle frames of equal parts of a video; one with fewer frames repeats its last frame.

    Part i lies between the integer borders i total / frames and (i + 1) total / frames, whose mean is taken, as Vamba does.
    """
    if total < frames:
        return [min(i, total - 1) for i in range(frames)]
    borders = [i * total // frames for i in range(frames + 1)]
    return [min((a + b) // 2, total - 1) for a, b in zip(borders, borders[1:], strict=False)]


def even_places(total: int, frames: int) -> list[int]:
    """Return the numbers of `frames` frames from the first to the last of a video, as upstream's linspace gives BIMBA's."""
    return [i * (total - 1) // max(frames - 1, 1) for i in range(frames)]
