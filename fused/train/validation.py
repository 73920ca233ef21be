"""The evaluations during a training: when they are due, their place in the log, and the best model."""

from contextlib import AbstractContextManager
from pathlib import Path

from fused.train.best import BestModel
from fused.train.config import TrainConfig
from fused.train.data.clips import ClipFolder
from fused.train.ema import WeightAverage
from fused.train.evaluation import evaluate
from fused.train.interrupt import Interrupt
from fused.train.log import Log
from fused.train.parallel import World
from fused.train.tasks import Task


class Validation:
    """The evaluations of a task on the videos of data.val, with the EMA of its student if there is one."""

    def __init__(
        self, config: TrainConfig, task: Task, dataset: ClipFolder, world: World, average: WeightAverage | None, resumed: bool
    ) -> None:
        self.config, self.task, self.dataset, self.world, self.average = config, task, dataset, world, average
        self.batch_size = config.batch_size // (world.size * config.accumulate)
        self.best = BestModel(Path(str(config.out)), config, world, resumed)

    def due(self, step: int, total: int) -> bool:
        """Return whether the model is to be evaluated behind `step`, which is above 0, of `total`."""
        every = self.config.evaluate_every
        return step == total or (every is not None and step % every == 0)

    def run(
        self, step: int, epoch: int, log: Log | None, autocast: AbstractContextManager[object], interrupt: Interrupt
    ) -> bool:
        """Evaluate the model, write the results to the log, and save the model if it is the best one.

        Every process of the world calls this function. Returns False, and does none of this, if an interrupt came before the
        end of the evaluation. Raises NotWritten, an OSError, in all processes if the best model cannot be written.
        """
        evaluation = evaluate(
            self.task, self.dataset, self.batch_size, self.world, autocast, self.config.data.workers, interrupt, self.average
        )
        if evaluation is None:
            return False
        if log is not None:
            line = {"step": step, "epoch": epoch, "val": self.config.data.val, **evaluation.results}
            log.write_evaluation(line, evaluation.bad_files)
        if self.best.offer(step, evaluation.results, self.task.student, self.average) and log is not None:
            log.print_line(f"step {step}: {self.best}")
        return True
