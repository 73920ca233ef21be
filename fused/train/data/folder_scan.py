"""The videos below a folder: video files, and folders of frames."""

import os
from collections import Counter
from pathlib import Path

from fused.io.frame_folder import IMAGE_SUFFIXES

SUFFIXES = frozenset(
    ".264 .265 .3g2 .3gp .amv .asf .avi .divx .dv .f4v .flv .gif .h264 .h265 .hevc .ivf .m1v .m2ts .m2v .m4v .mjpeg .mjpg "
    ".mk3d .mkv .mov .mp4 .mpe .mpeg .mpg .mpv .mts .mxf .nut .ogm .ogv .qt .rm .rmvb .ts .vob .webm .wmv .wtv .y4m".split()
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
    """Return the videos below a folder, sorted, and notes on files that were left out.

    A video is a file with one of `SUFFIXES`, or a folder that holds images (`IMAGE_SUFFIXES`) and neither videos nor folders of
    images. `root` itself is no video. Links to folders are followed, unless they lead to a folder above. Names that begin with
    a dot are left out. No file is opened. Raises OSError, which names the folder, for one that cannot be read.
    """
    notes: list[str] = []
    others = Counter[str]()
    videos = sorted(_scan(root, (os.path.realpath(root),), notes, others))
    if others:
        kinds = ", ".join(f"{suffix or 'without an ending'} ({count})" for suffix, count in others.most_common(5))
        notes.append(f"{root}: files that are no videos by their endings are left out: {kinds}{', ...' * (len(others) > 5)}")
    return videos, notes


def _scan(folder: Path, ancestors: tuple[str, ...], notes: list[str], others: Counter[str]) -> list[Path]:
    """Return the videos below a folder; `ancestors` are the real paths of the folder and of those above it, from the root.

    `notes` gets sentences on images that are left out, `others` the endings of other files.
    """
    files, nested, has_images = [], [], False
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            suffix = os.path.splitext(entry.name)[1].lower()
            if os.path.isdir(entry) if entry.is_symlink() else entry.is_dir():  # a link that leads nowhere is no folder
                target = os.path.realpath(entry.path)
                if target not in ancestors:
                    nested += _scan(Path(entry.path), (*ancestors, target), notes, others)
            elif is_video_name(entry.name):
                files.append(Path(entry.path))
            elif suffix in IMAGE_SUFFIXES:
                has_images = True
            else:
                others[suffix] += 1
    is_root = len(ancestors) == 1
    if has_images and not files and not is_root:
        if not nested:
            return [folder]
        notes.append(f"{folder} holds images beside folders of videos; the images are left out")
    return files + nested
