"""The log of a training: JSON lines in log.jsonl, optionally TensorBoard, and progress on the terminal."""

import json
import math
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from fused.io.atomic_write import atomic_write

LOG_FILE = "log.jsonl"


class Log:
    """The log of one run, written by one process.

    A line is a step (step, epoch, loss, lr, ...), an evaluation (step, epoch, val_...) or a file that could not be read
    (step, epoch, bad). Lines that a killed training wrote after `step`, from which the run resumes, are removed, so that no
    step occurs twice.
    """

    def __init__(self, folder: Path, step: int, total: int, tensorboard: bool = False) -> None:
        """Open the log of a run that continues after `step` of `total` steps.

        Raises ImportError for `tensorboard` where it is not installed, OSError for a folder that cannot be written to.
        """
        self.total, self.start_step, self.start_time = total, step, time.perf_counter()
        self.stream = sys.stdout
        self.unreadable = Counter(line["bad"] for line in _truncate(folder / LOG_FILE, step) if "bad" in line)
        self._file = open(folder / LOG_FILE, "a")
        self._board = import_summary_writer()(str(folder / "tensorboard"), purge_step=step + 1) if tensorboard else None
        self._line_open = False  # whether the terminal's last line has no end yet

    def close(self) -> None:
        """Close the files; the object cannot be used afterwards."""
        self.end_line()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def print_line(self, text: str) -> None:
        """Print a line on the terminal."""
        self.end_line()
        print(text, file=self.stream, flush=True)

    def write(self, line: dict[str, Any]) -> None:
        """Write a line to the log, and its numbers to TensorBoard. It begins with `step` and `epoch`."""
        self._file.write(json.dumps({name: _finite_or_none(value) for name, value in line.items()}) + "\n")
        self._file.flush()  # a killed process loses no line
        if self._board is not None:
            for name, value in line.items():
                if name not in ("step", "epoch") and isinstance(value, int | float):
                    self._board.add_scalar(name, value, line["step"])

    def write_step(self, line: dict[str, Any], unreadable: list[str], logged: bool) -> None:
        """Write a step's line if it is to be `logged`, and the files that it could not read; print the progress."""
        for sentence in unreadable:
            self.write_unreadable(line["step"], line["epoch"], sentence)
        if logged:
            self.write(line)
        self.progress(line, logged)

    def write_evaluation(self, line: dict[str, Any], unreadable: list[str]) -> None:
        """Write and print an evaluation's line, and the files that it could not read."""
        for sentence in unreadable:
            self.write_unreadable(line["step"], line["epoch"], sentence)
        self.write(line)
        self.print_line(
            "step {step}: top-1 {val_top1:.2%}, top-5 {val_top5:.2%} of {val_videos:.0f} videos".format(**line)
        )

    def write_unreadable(self, step: int, epoch: int, sentence: str) -> None:
        """Write a file that could not be read to the log, and print it the first time that it occurs."""
        self.write({"step": step, "epoch": epoch, "bad": sentence})
        if not self.unreadable[sentence]:
            self.print_line(f"step {step}: left out {sentence}")
        self.unreadable[sentence] += 1

    def progress(self, line: dict[str, Any], logged: bool) -> None:
        """Print the progress: on a terminal one line that is overwritten, otherwise a line for each `logged` step."""
        terminal = self.stream.isatty()
        if not (logged or terminal):
            return
        step = line["step"]
        seconds_left = (time.perf_counter() - self.start_time) / (step - self.start_step) * (self.total - step)
        text = (
            f"step {step}/{self.total}, epoch {line['epoch']}: loss {line['loss']:.4f}, lr {line['lr']:.3g}, "
            f"{line['clips_per_s']:.3g} clips/s, {_clock(seconds_left)} left"
        )
        if terminal:
            print(f"\r\x1b[2K{text}", end="", file=self.stream, flush=True)
            self._line_open = True
        else:
            self.print_line(text)

    def print_done(self, step: int, model: Path) -> None:
        """Print where the model is, and how many files could not be read."""
        count = len(self.unreadable)
        note = f"; {count} file{'s' * (count > 1)} could not be read, {LOG_FILE} names them" if count else ""
        self.print_line(f"done: {step} steps; the model is in {model}{note}")

    def end_line(self) -> None:
        """End the terminal's line if it is open."""
        if self._line_open:
            print(file=self.stream, flush=True)
            self._line_open = False


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
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # incomplete, because the process was killed
            continue
        if line["step"] <= step:
            lines.append(line)
    with atomic_write(path) as draft:
        draft.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def _finite_or_none(value: Any) -> Any:
    """Return None for NaN and infinity, which JSON lacks; a step that the float16 scaler skips may have them."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _clock(seconds: float) -> str:
    """Return a duration as h:mm:ss, or m:ss below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
