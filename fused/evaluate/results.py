"""The numbers of an evaluation, from the predictions of its videos."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fused.terminal import bad_file_reasons

TOP = 5  # classes of the second accuracy; with no more classes every answer would be right


@dataclass(frozen=True)
class ClassResult:
    """The accuracy of one class."""

    name: str
    videos: int  # that were read
    right: int  # whose most likely class it is

    @property
    def accuracy(self) -> float | None:
        """The share of its videos that are right, None without videos."""
        return self.right / self.videos if self.videos else None


@dataclass(frozen=True)
class Results:
    """The results of an evaluation.

    `numbers` are, of classes, `top1`, with more than five classes `top5`, `class_mean` (the mean accuracy of the classes that
    have videos) as shares of the videos that were read, and `top1_all` as the share of all; of targets `mse`, the mean squared
    error. None are numbers without a video. `read`, `listed`, `too_short` and `unreadable` count videos.
    """

    numbers: dict[str, float | int | None]
    lines: list[dict[str, Any]]  # of predictions.jsonl, in the order of paths
    classes: list[ClassResult] = field(default_factory=list)
    confusion: list[list[int]] = field(default_factory=list)  # a row for each label, a column for each prediction

    def __str__(self) -> str:
        n = self.numbers
        kinds = {"top1": "top-1", "top5": "top-5", "class_mean": "mean of classes"}
        parts = [f"{name} {n[key]:.2%}" for key, name in kinds.items() if n.get(key) is not None]
        if n.get("mse") is not None:
            parts = [f"mean squared error {n['mse']:.6g}"]
        text = f"{', '.join(parts)} of {n['read']} videos" if parts else "no video was read"
        if n["read"] != n["listed"]:
            reasons = bad_file_reasons(int(n["unreadable"] or 0), int(n["too_short"] or 0), int(n["listed"] or 0))
            all_ = f"; top-1 {n['top1_all']:.2%} of all {n['listed']}" if n.get("top1_all") is not None else ""
            text += f"{all_}: {reasons}"
        return text


def summarise(lines: list[dict[str, Any]], names: Sequence[str] | None) -> Results:
    """Return the results of the lines of predictions.jsonl; `names` are the classes, None for a regression."""
    read = [line for line in lines if "error" not in line]
    too_short = sum(line.get("too_short", False) for line in lines)
    numbers: dict[str, float | int | None] = {}
    counts = {"read": len(read), "listed": len(lines), "too_short": too_short}
    counts["unreadable"] = len(lines) - len(read) - too_short
    if names is None:
        errors = [(line["output"] - line["target"]) ** 2 for line in read]
        numbers["mse"] = sum(errors) / len(errors) if errors else None
        return Results(numbers | counts, lines)
    number = {name: i for i, name in enumerate(names)}
    confusion = [[0] * len(names) for _ in names]
    for line in read:
        confusion[number[line["label"]]][number[line["top"][0][0]]] += 1
    classes = [ClassResult(name, sum(confusion[i]), confusion[i][i]) for i, name in enumerate(names)]
    right = sum(result.right for result in classes)
    numbers["top1"] = right / len(read) if read else None
    if len(names) > TOP:
        hits = sum(any(line["label"] == name for name, _ in line["top"]) for line in read)
        numbers["top5"] = hits / len(read) if read else None
    shares = [result.accuracy for result in classes if result.accuracy is not None]
    numbers["class_mean"] = sum(shares) / len(shares) if shares else None
    numbers["top1_all"] = right / len(lines) if lines else None
    return Results(numbers | counts, lines, classes, confusion)


def classes_csv(results: Results) -> str:
    """Return a table of the classes: class, videos, right, accuracy (empty without videos)."""
    rows = [[c.name, c.videos, c.right, "" if c.accuracy is None else c.accuracy] for c in results.classes]
    return _csv([["class", "videos", "right", "accuracy"], *rows])


def confusion_csv(results: Results) -> str:
    """Return the confusion: a row for each label, with the number of its videos for each predicted class."""
    names = [c.name for c in results.classes]
    return _csv([["label", *names], *([name, *row] for name, row in zip(names, results.confusion, strict=True))])


def _csv(rows: list[list[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
