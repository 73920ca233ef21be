"""A look at a few videos before a training begins, also by a dry run: it finds options that fit no video."""

import math
import os
from collections.abc import Sequence

from fused.io.video import VideoError
from fused.train.data.batches import MAX_ERRORS_SHOWN
from fused.train.data.clips import ClipFolder
from fused.train.data.folder_scan import is_video_name

MAX_TRIED = 32  # files, and as many folders of images


def try_videos(dataset: ClipFolder) -> list[str]:
    """Read files until one gives a clip, folders of images likewise, and return notes on a kind of which none does.

    Those that are tried are spread over the dataset. A single broken one of its kind gives no note. Raises ValueError if none
    gives a clip, ImportError without PyAV.
    """
    others = _spread([i for i, path in enumerate(dataset.files) if not is_video_name(path)])
    folders = [i for i in others if os.path.isdir(dataset.files[i])]
    files = _spread([i for i, path in enumerate(dataset.files) if is_video_name(path)])
    files += [i for i in others if i not in folders]
    kinds = {"files": files, "folders of images": folders}
    errors = {kind: found for kind, indices in kinds.items() if (found := _errors(dataset, indices))}
    if errors.keys() == {kind for kind, indices in kinds.items() if indices}:
        shown = [error for found in errors.values() for error in found][:MAX_ERRORS_SHOWN]
        raise ValueError(f"none of {len(files + folders)} videos that were tried gives a clip: {'; '.join(shown)}")
    failing = {kind: found for kind, found in errors.items() if len(found) > 1}
    notes = [f"none of {len(found)} {kind} that were tried gives a clip: {found[0]}" for kind, found in failing.items()]
    if dataset.frame_pattern is not None and not folders:
        notes.append(f"frame_pattern is {dataset.frame_pattern!r}, and no video that was tried is a folder of images")
    return notes


def _spread(indices: Sequence[int]) -> list[int]:
    """Return at most MAX_TRIED of the indices, evenly spaced."""
    return list(indices[:: math.ceil(len(indices) / MAX_TRIED) or 1])


def _errors(dataset: ClipFolder, indices: Sequence[int]) -> list[str]:
    """Return why each of these videos gives no clip; nothing if one does."""
    errors = []
    for index in indices:
        try:
            dataset.sample(index, 0)
        except VideoError as error:
            errors.append(str(error))
        else:
            return []
    return errors
