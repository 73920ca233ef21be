"""Features of videos on disk, a file for each video: they are made once, and found again by what they depend on."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fused.io.atomic_write import atomic_write
from fused.io.checkpoint_file import SAFETENSORS, CheckpointError, read_checkpoint, save_checkpoint
from fused.io.file_state import file_state

DESCRIPTION = "features.json"


class VideoFeatures(NamedTuple):
    """The features of a video, on the CPU."""

    tokens: Tensor  # (V, D), for matching
    projected: Tensor  # (T, E) float32, a vector for each frame, for cosines


class FeatureStore:
    """The features of videos by one model, in a folder of their own below `folder`, which `description` names.

    `description` is plain data for JSON, and says what the features depend on. A video that was changed, by its size or time,
    has none. What a video is, is looked up once: one that is changed while the store is in use keeps its features till the end.
    Raises ValueError for a folder that cannot be written to.
    """

    def __init__(self, folder: Path, description: dict[str, Any]) -> None:
        text = json.dumps(description, indent=2, sort_keys=True)
        self._files: dict[Path, Path] = {}
        self.folder = folder / f"features-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.folder / DESCRIPTION) as draft:
                draft.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise ValueError(f"features cannot be kept in {folder} ({error}); allowed: a folder to write to") from error

    def has(self, video: Path) -> bool:
        """Return whether the features of a video are there."""
        return self._file(video).is_file()

    def save(self, video: Path, features: VideoFeatures) -> None:
        """Write the features of a video, atomically. Raises NotWritten, an OSError, for a full disk."""
        save_checkpoint(features._asdict(), self._file(video))

    def load(self, video: Path) -> VideoFeatures:
        """Return the features of a video. Raises CheckpointError for a file that cannot be read."""
        found = read_checkpoint(self._file(video))
        try:
            return VideoFeatures(found["tokens"], found["projected"])
        except KeyError as error:
            raise CheckpointError(f"{self._file(video)} holds no features of a video; delete it") from error

    def _file(self, video: Path) -> Path:
        if video not in self._files:
            state = file_state(video)
            seen = f"{video} {state.bytes} {state.modified}" if state else f"{video} missing"
            name = hashlib.sha256(seen.encode("utf-8", "surrogateescape")).hexdigest()[:32]
            self._files[video] = self.folder / (name + SAFETENSORS)
        return self._files[video]
