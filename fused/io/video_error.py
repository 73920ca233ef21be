"""Errors for videos that cannot give a clip."""

from pathlib import Path

ALLOWED = "allowed is a complete video file in any container and codec that FFmpeg reads (mp4, mkv, webm, avi, ...)"


class VideoError(ValueError):
    """The error for a video that cannot give the clip: names the file, what is wrong with it and what is allowed."""

    def __init__(self, path: Path, wrong: str, allowed: str = ALLOWED) -> None:
        super().__init__(f"{path}: {wrong}; {allowed}")


class VideoTooShort(VideoError):
    """The error for a video that can be read and has fewer frames than the clip takes."""


class IndexMismatch(VideoError):
    """The error for a file whose packets announce other frames than its decoder shows. A full decode tells which it shows."""
