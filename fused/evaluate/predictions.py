"""The folder of an evaluation: predictions.jsonl, to which every video is added when it is done, and evaluation.json.

A line of predictions.jsonl is one of

    {"video": absolute path, "label": name, "top": [[name, probability], ...], "views": number, ...}
    {"video": absolute path, "target": number, "output": number, "views": number, ...}          of a regression
    {"video": absolute path, "label" or "target": ..., "error": sentence, "too_short": false, ...}

where the dots are "bytes" and "modified", the state of the file (`fused.io.file_state`), and the "frames" that a list states.

evaluation.json says what the numbers depend on: the weights' digest, views, preprocessing and the like.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fused.io.atomic_write import NotWritten, atomic_write

PREDICTIONS, DESCRIPTION = "predictions.jsonl", "evaluation.json"
SHOWN = 5  # differences in an error

Line = dict[str, Any]


class PredictionFile:
    """The predictions of an evaluation in a folder that one process writes.

    `done` holds the lines of videos that were finished before, by path. Raises ValueError if the folder holds an evaluation
    that depends on other things than `description`, OSError for a folder that cannot be written to.
    """

    def __init__(self, folder: Path, description: Line) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._check(description)
        self.done = {line["video"]: line for line in _lines(folder / PREDICTIONS) if "error" not in line}
        self._rewrite(self.done.values())  # without what a killed process left incomplete
        self._file = open(folder / PREDICTIONS, "a", encoding="utf-8")

    def add(self, lines: Iterable[Line]) -> None:
        """Add lines to the file at once: a process that is killed later loses none. Raises NotWritten, an OSError."""
        try:
            self._file.write("".join(json.dumps(line) + "\n" for line in lines))
            self._file.flush()
        except OSError as error:
            raise NotWritten(f"{self.folder / PREDICTIONS}: not written, what was there before stays: {error}") from error

    def finish(self, lines: Sequence[Line]) -> None:
        """Replace the file by these lines, atomically, and close it."""
        self.close()
        self._rewrite(lines)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _rewrite(self, lines: Iterable[Line]) -> None:
        with atomic_write(self.folder / PREDICTIONS) as draft:
            draft.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def _check(self, description: Line) -> None:
        """Write the description, or raise ValueError if the folder holds another one."""
        path, given = self.folder / DESCRIPTION, _flatten(json.loads(json.dumps(description)))
        if path.is_file():
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path} cannot be read ({error}); allowed: another out, or its folder deleted") from error
            keys = [key for key in stored | given if stored.get(key) != given.get(key)]
            if keys:
                changes = "; ".join(f"{key}: {stored.get(key)} -> {given.get(key)}" for key in keys[:SHOWN])
                changes += f"; and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
                holds = f"out is {str(self.folder)!r}, which holds another evaluation ({changes})"
                raise ValueError(f"{holds}; allowed: another folder")
        with atomic_write(path) as draft:
            draft.write_text(json.dumps(given, indent=2) + "\n", encoding="utf-8")


def _flatten(tree: Line, prefix: str = "") -> Line:
    """Return dotted keys and their values."""
    flat: Line = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def weights_digest(model: nn.Module) -> str:
    """Return a digest of the model's tensors, their names, shapes and dtypes."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _lines(path: Path) -> list[Line]:
    """Return the complete lines of a file; none if there is no file."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:  # incomplete, because the process was killed
            continue
    return [line for line in lines if isinstance(line, dict) and "video" in line]
