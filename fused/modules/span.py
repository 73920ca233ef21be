"""The place of a clip in its video, counted in tubelets (the frames that one token of the patch embedding covers)."""

from typing import NamedTuple


class Span(NamedTuple):
    """Tubelets `start` to `start + tubelets - 1` of a video of `total` tubelets."""

    start: int
    tubelets: int
    total: int

    @property
    def cls(self) -> int:
        """Return 1 if CLS goes before the clip's patches, which it does at the start of the video, else 0."""
        return int(self.start == 0)

    def first_token(self, patches: int) -> int:
        """Return the index of the clip's first token among the video's tokens, with `patches` a tubelet. CLS has index 0."""
        return 0 if self.cls else 1 + self.start * patches

    def length(self, patches: int) -> int:
        """Return the number of the clip's tokens before a mask, with `patches` a tubelet."""
        return self.cls + self.tubelets * patches


def check_tubelets(name: str, value: object, minimum: int, image: bool) -> None:
    """Raise ValueError unless `value` is None or a number of tubelets from `minimum` up; for an `image`, unless it is None."""
    if value is None:
        return
    if image:
        raise ValueError(f"{name} is {value!r}; allowed for an image, which has no place in time: None")
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} is {value!r}; allowed: a number of tubelets from {minimum} up, or None")
