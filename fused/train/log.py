"""The log of a training: JSON lines in log.jsonl, optionally TensorBoard, and progress on the terminal."""

import json
import math
import resource
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from fused.io.atomic_write import atomic_write
from fused.terminal import Terminal, bad_file_reasons, clock
from fused.train.data.batches import BadFile

LOG_FILE = "log.jsonl"
SHOWN_WAIT = 0.05  # share of the time for which steps waited for data, from which on the progress says so


class Log(Terminal):
    """The log of one run, written by one process.

    A line is a step (step, epoch, loss, lr, ...), an evaluation (step, epoch, val: data.val, val_...) or a file that gave no
    clip (step, epoch, file, too_short, bad: a sentence), which is written the first time that this happens. Lines that a
    killed training wrote after `step`, from which the run resumes, are removed, so that no step occurs twice.
    """

    def __init__(self, folder: Path, step: int, total: int, tensorboard: bool = False) -> None:
        """Open the log of a run that continues after `step` of `total` steps.

        Raises ImportError for `tensorboard` where it is not installed, OSError for a folder that cannot be written to.
        """
        self.total, self.start_step, self.start_time = total, step, time.perf_counter()
        super().__init__()
        lines = _truncate(folder / LOG_FILE, step)
        # the videos of evaluations at `step`
        self.evaluated = {line.get("val") for line in lines if "val_listed" in line and line["step"] == step}
        self._bad_files = {line["file"]: line for line in lines if "file" in line}
        self._file = open(folder / LOG_FILE, "a", encoding="utf-8")
        self._board = import_summary_writer()(str(folder / "tensorboard"), purge_step=step + 1) if tensorboard else None

    def close(self) -> None:
        """Close the files; the object cannot be used afterwards."""
        self.end_line()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, line: dict[str, Any]) -> None:
        """Write a line to the log, and its numbers to TensorBoard. It begins with `step` and `epoch`."""
        self._file.write(json.dumps({name: _finite_or_none(value) for name, value in line.items()}) + "\n")
        self._file.flush()  # a killed process loses no line
        if self._board is not None:
            for name, value in line.items():
                if name not in ("step", "epoch") and isinstance(value, int | float) and not isinstance(value, bool):
                    self._board.add_scalar(name, value, line["step"])

    def write_step(self, line: dict[str, Any], bad_files: Iterable[BadFile], logged: bool) -> None:
        """Write a step's line if it is to be `logged`, and the files that gave it no clip; print the progress."""
        self.write_bad_files(line, bad_files)
        if logged:
            self.write(line)
        self.progress(line, logged)

    def write_evaluation(self, line: dict[str, Any], bad_files: Iterable[BadFile]) -> None:
        """Write and print an evaluation's line, and the files that gave it no clip."""
        self.write_bad_files(line, bad_files)
        self.write(line)
        measures = [("top1", "top-1", ".2%"), ("top5", "top-5", ".2%"), ("mse", "mean squared error", ".6g")]
        found = [f"{name} {_measure(line, key, shown)}" for key, name, shown in measures if f"val_{key}" in line]
        text = f"step {line['step']}: {', '.join(found)} of {line['val_read']} videos"
        if line["val_read"] < line["val_listed"]:
            reasons = bad_file_reasons(line["val_unreadable"], line["val_too_short"], line["val_listed"])
            if "val_top1_all" in line:
                reasons = f"top-1 {_measure(line, 'top1_all', '.2%')} of all {line['val_listed']}: {reasons}"
            text += f" that were read; {reasons}"
        self.print_line(text)

    def write_bad_files(self, line: dict[str, Any], bad_files: Iterable[BadFile]) -> None:
        """Write and print files that gave no clip at the step of `line`, unless that was done before."""
        for path, sentence, too_short, too_long in bad_files:
            if path not in self._bad_files:
                entry = {"step": line["step"], "epoch": line["epoch"], "file": path, "too_short": too_short, "bad": sentence}
                entry |= {"too_long": True} if too_long else {}
                self._bad_files[path] = entry
                self.write(entry)
                self.print_line(f"step {line['step']}: left out {sentence}")

    def end_epoch(self, epoch: int, paths: Collection[Path]) -> None:
        """Print how many files of the training, which are `paths`, gave no clip so far, if this epoch found some."""
        if any(line["epoch"] == epoch for line in self._bad_files.values()) and (count := self._count_bad(paths)):
            self.print_line(f"epoch {epoch}: {count}")

    def progress(self, line: dict[str, Any], logged: bool) -> None:
        """Print the progress: on a terminal one line that is overwritten, otherwise a line for each `logged` step."""
        if not (logged or self.overwrites):
            return
        step = line["step"]
        seconds_left = (time.perf_counter() - self.start_time) / (step - self.start_step) * (self.total - step)
        speed = next(f"{value:.3g} {name.removesuffix('_per_s')}/s" for name, value in line.items() if name.endswith("_per_s"))
        text = (
            f"step {step}/{self.total}, epoch {line['epoch']}: loss {line['loss']:.4f}, lr {line['lr']:.3g}, "
            f"{speed}, {clock(seconds_left)} left"
        )
        if line.get("data_wait", 0) >= SHOWN_WAIT:
            text += f", {line['data_wait']:.0%} of the time waiting for data"
        self.print_progress(text)

    def print_done(self, step: int, models: Sequence[Path], paths: Collection[Path]) -> None:
        """Print where the model and its EMA are, and how many files of the training, which are `paths`, gave no clip."""
        count = self._count_bad(paths)
        note = f"; {count}, {LOG_FILE} names them" if count else ""
        self.print_line(f"done: {step} steps; the model is in {', its EMA in '.join(map(str, models))}{note}")

    def _count_bad(self, paths: Collection[Path]) -> str:
        """Return how many of `paths` gave no clip so far, and why, in words; nothing if all gave one."""
        if not self._bad_files:
            return ""
        found = [self._bad_files[name] for name in map(str, paths) if name in self._bad_files]
        short, long = (sum(line.get(key, False) for line in found) for key in ("too_short", "too_long"))
        return bad_file_reasons(len(found) - short - long, short, len(paths), long)


def import_summary_writer() -> Any:
    """Return TensorBoard's writer class. Raise ImportError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "tensorboard is true, and it is not installed: pip install tensorboard, or tensorboard=false"
        ) from error
    return SummaryWriter


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory in MiB: of tensors on a GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _truncate(path: Path, step: int) -> list[dict[str, Any]]:
    """Remove the lines of a log file after `step`, and return the others."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # incomplete, because the process was killed
            continue
        if line["step"] <= step:
            lines.append(line)
    with atomic_write(path) as draft:
        draft.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return lines


def _finite_or_none(value: Any) -> Any:
    """Return None for NaN and infinity, which JSON lacks; a step that the float16 scaler skips may have them."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _measure(line: dict[str, Any], name: str, shown: str) -> str:
    """Return a measure of an evaluation's line in the format `shown`, with the EMA's if there is one."""
    ema = f" (EMA {line[f'val_ema_{name}']:{shown}})" if f"val_ema_{name}" in line else ""
    return f"{line[f'val_{name}']:{shown}}{ema}"
