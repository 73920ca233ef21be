"""What a training leaves to read: JSON lines in log.jsonl, TensorBoard where asked for, and progress on the terminal."""

import json
import math
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from fused.io.atomic_write import written_whole

LINES = "log.jsonl"


class Log:
    """The log of one run, written by one process.

    A line is a step (step, epoch, loss, lr, ...), an evaluation (step, epoch, val_...) or a file that could not be read
    (step, epoch, bad). `go_on` drops what a killed training wrote after the step at which the next one goes on, so that no
    step stands there twice.
    """

    def __init__(self, folder: Path, step: int, total: int, tensorboard: bool = False) -> None:
        """Raises ImportError for `tensorboard` where it is not installed, OSError for a folder that cannot be written to."""
        self.total, self.start, self.started = total, step, time.perf_counter()
        self.stream = sys.stdout
        self.bad = Counter(line["bad"] for line in self._kept(folder / LINES, step) if "bad" in line)
        self._file = open(folder / LINES, "a")
        self._board = summary_writer()(str(folder / "tensorboard"), purge_step=step + 1) if tensorboard else None
        self._live = False  # a line without an end stands on the terminal

    def close(self) -> None:
        self.end_line()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def say(self, text: str) -> None:
        """A line on the terminal."""
        self.end_line()
        print(text, file=self.stream, flush=True)

    def write(self, line: dict[str, Any]) -> None:
        """A line of the log: `step` and `epoch` before anything else; a value that is no number has no curve."""
        self._file.write(json.dumps({name: _finite(value) for name, value in line.items()}) + "\n")
        self._file.flush()  # a killed process loses nothing of it
        if self._board is not None:
            for name, value in line.items():
                if name not in ("step", "epoch") and isinstance(value, int | float):
                    self._board.add_scalar(name, value, line["step"])

    def write_bad(self, step: int, epoch: int, sentence: str) -> None:
        """A file that could not be read; said once on the terminal, however often it comes."""
        self.write({"step": step, "epoch": epoch, "bad": sentence})
        if not self.bad[sentence]:
            self.say(f"step {step}: left out {sentence}")
        self.bad[sentence] += 1

    def progress(self, line: dict[str, Any], logged: bool) -> None:
        """Where the training is: a line that changes on a terminal, else one for every line of the log."""
        terminal = self.stream.isatty()
        if not (logged or terminal):
            return
        step = line["step"]
        left = (time.perf_counter() - self.started) / (step - self.start) * (self.total - step)
        text = (
            f"step {step}/{self.total}, epoch {line['epoch']}: loss {line['loss']:.4f}, lr {line['lr']:.3g}, "
            f"{line['clips_per_s']:.3g} clips/s, {_clock(left)} left"
        )
        if terminal:
            print(f"\r\x1b[2K{text}", end="", file=self.stream, flush=True)
            self._live = True
        else:
            self.say(text)

    def end_line(self) -> None:
        if self._live:
            print(file=self.stream, flush=True)
            self._live = False

    @staticmethod
    def _kept(path: Path, step: int) -> list[dict[str, Any]]:
        """The lines up to `step`, which are then all that the file holds."""
        if not path.is_file():
            return []
        kept = []
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:  # cut off when the process was killed
                continue
            if line["step"] <= step:
                kept.append(line)
        with written_whole(path) as draft:
            draft.write_text("".join(json.dumps(line) + "\n" for line in kept))
        return kept


def summary_writer() -> Any:
    """TensorBoard's writer. Raises ImportError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "tensorboard is true, and it is not installed: pip install tensorboard, or tensorboard=false"
        ) from error
    return SummaryWriter


def memory(device: torch.device) -> float:
    """The most MiB that were in use: of the GPU by tensors, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity; with float16 a step that is left out may have them."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
