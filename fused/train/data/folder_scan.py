"""The videos below a folder: video files, and folders of frames."""

import os
from pathlib import Path

from fused.io.frame_folder import IMAGE_SUFFIXES

SUFFIXES = frozenset(
    ".3gp .asf .avi .flv .gif .h264 .m2ts .m4v .mjpeg .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .ts .vob .webm .wmv".split()
)
"""Suffixes of video files in a folder; a list may name any file."""


def is_video_name(path: str | Path) -> bool:
    """Return whether a path ends like a video file's."""
    return os.path.splitext(path)[1].lower() in SUFFIXES


def scan_images(root: Path) -> list[Path]:
    """Return the image files below a folder, sorted. Hidden names are left out, and links to folders are followed, once each.

    Raises OSError, which names the folder, for one that cannot be read.
    """
    found, seen = [], set()

    def fail(error: OSError) -> None:
        raise error

    for folder, names, files in os.walk(root, onerror=fail, followlinks=True):
        seen.add(os.path.realpath(folder))
        names[:] = [n for n in names if not n.startswith(".") and os.path.realpath(os.path.join(folder, n)) not in seen]
        found += [Path(folder, n) for n in files if not n.startswith(".") and os.path.splitext(n)[1].lower() in IMAGE_SUFFIXES]
    return sorted(found)


def scan_folder(root: Path) -> tuple[list[Path], list[str]]:
    """Return the videos below a folder, sorted, and notes on images that were left out.

    A video is a file with one of `SUFFIXES`, or a folder that holds images (`IMAGE_SUFFIXES`) and neither videos nor folders of
    images. `root` itself is no video. Links to folders are followed, unless they lead to a folder above. Names that begin with
    a dot are left out. No file is opened. Raises OSError, which names the folder, for one that cannot be read.
    """
    notes: list[str] = []
    return sorted(_scan(root, (os.path.realpath(root),), notes)), notes


def _scan(folder: Path, ancestors: tuple[str, ...], notes: list[str]) -> list[Path]:
    """Return the videos below a folder; `ancestors` are the real paths of the folder and of those above it, from the root."""
    files, nested, has_images = [], [], False
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.is_dir():
                target = os.path.realpath(entry.path)
                if target not in ancestors:
                    nested += _scan(Path(entry.path), (*ancestors, target), notes)
            elif is_video_name(entry.name):
                files.append(Path(entry.path))
            elif suffix in IMAGE_SUFFIXES:
                has_images = True
    is_root = len(ancestors) == 1
    if has_images and not files and not is_root:
        if not nested:
            return [folder]
        notes.append(f"{folder} holds images beside folders of videos; the images are left out")
    return files + nested
