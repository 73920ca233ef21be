"""The best model of a run by validation, in the folder best/: as model/ for `from_pretrained`, and best.json.

The better of two models has the higher `val_top1_all`: of all listed videos, since an accuracy of those that were read would
be higher where the harder ones were not. Of regressions it has the lower `val_mse`. Of equals, the first stays. With an EMA,
both the model and its average are candidates, in this order.
"""

import json
import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from fused.io.atomic_write import NotWritten, atomic_write
from fused.io.checkpoint_file import CheckpointError
from fused.train import run_folder
from fused.train.config import TrainConfig
from fused.train.ema import WeightAverage
from fused.train.parallel import World
from fused.train.task import Student

RECORD_FILE = "best.json"


@dataclass(frozen=True)
class Record:
    """The content of best.json; of `top1` and `mse` the one that the task has."""

    step: int
    weights: str  # "model", or "ema" for its average
    val: str  # data.val; results on other videos cannot be compared
    top1: float | None = None  # val_top1_all, from 0 to 1
    mse: float | None = None  # val_mse

    @property
    def score(self) -> float:
        """The number of which the higher is better."""
        return -self.mse if self.mse is not None else self.top1 or 0.0


class BestModel:
    """The best model of a run. Every process of the world makes one, and all hold the same record.

    `resumed` says whether the run goes on from a checkpoint; otherwise what the folder holds is of another run. Raises
    CheckpointError for a best.json that cannot be read.
    """

    def __init__(self, folder: Path, config: TrainConfig, world: World, resumed: bool) -> None:
        self.folder, self.config, self.world = folder, config, world
        self.record: Record | None = None
        if resumed:
            record = _read(folder / run_folder.BEST / RECORD_FILE)
            self.record = record if record is not None and record.val == str(config.data.val) else None

    def __str__(self) -> str:
        if self.record is None:
            return "no best model yet"
        record, of = self.record, "the EMA's " if self.record.weights == "ema" else ""
        result = f"mean squared error {record.mse:.6g}" if record.mse is not None else f"top-1 {record.top1:.2%}"
        return f"best so far, {of}{result}, saved as {self.folder / run_folder.BEST}"

    def offer(
        self, step: int, results: dict[str, float], student: Student, average: WeightAverage | None
    ) -> bool:
        """Save the model, or its average, if it is better than the best so far, and return whether it is.

        `results` are those of `evaluate`. Every process of the world calls this function. Raises NotWritten, an OSError, in
        all of them if it cannot be written.
        """
        val = str(self.config.data.val)
        record = Record(step, "model", val, results.get("val_top1_all"), results.get("val_mse"))
        if average is not None:
            of_ema = Record(step, "ema", val, results.get("val_ema_top1_all"), results.get("val_ema_mse"))
            record = record if record.score >= of_ema.score else of_ema
        if not record.score > (self.record.score if self.record is not None else -math.inf):  # NaN is never better
            return False
        error: Exception | None = None
        try:
            with average.swapped() if average is not None and record.weights == "ema" else nullcontext():
                folder = run_folder.save_model(self.folder, self.config, student, self.world, run_folder.BEST)
            if self.world.is_main:
                with atomic_write(folder / RECORD_FILE) as draft:
                    content = {name: value for name, value in asdict(record).items() if value is not None}
                    draft.write_text(json.dumps(content) + "\n")
        except OSError as problem:
            error = problem
        if errors := [text for text in self.world.all_gather(str(error) if error else "") if text]:
            raise NotWritten(errors[0]) from error
        self.record = record
        return True


def _read(path: Path) -> Record | None:
    """Return the content of best.json, None without such a file. Raise CheckpointError if it cannot be read."""
    if not path.is_file():
        return None
    try:
        return Record(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); without its folder the next evaluation writes it") from error
