"""The training loop: from the newest checkpoint of a run's folder to the last step, with log, evaluation and checkpoints.

All random choices of a step follow from (seed, step, micro-batch, rank), and its clips from (seed, epoch, step). The state of
a training is therefore its parameters, their EMA, the optimiser's tensors and the step, and a resumed training has the same
bits as one that was never stopped.
"""

import math
import time
from collections import deque
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from fused import backends
from fused.train import checkpoints, parallel, run_folder, tasks
from fused.train.config import TrainConfig
from fused.train.counts import micro_batch_videos, warmup_steps
from fused.train.data.batches import BadFile, Batches, batches
from fused.train.data.captioned import AlternatingBatches, CaptionData
from fused.train.data.open_clips import open_clips
from fused.train.ema import WeightAverage
from fused.train.interrupt import Interrupt
from fused.train.log import Log, peak_memory_mib
from fused.train.optim import LearningRates, parameter_groups
from fused.train.pace import Pace
from fused.train.parallel import PendingSum, World
from fused.train.prefetch import Prefetcher, Wait
from fused.train.schedule import cosine_factor
from fused.train.seed import derive_seed
from fused.train.step import TrainStep, choose_recorder
from fused.train.validation import Validation


class Diverged(RuntimeError):
    """The error for a loss or gradients that are not finite; the message names the step and the last good checkpoint."""


@dataclass(frozen=True)
class StepResult:
    """A step that a GPU may still be working on. `numbers` are the same in all processes, the other fields are this one's."""

    step: int
    rate: float  # the highest learning rate
    numbers: PendingSum  # those of `TrainStep.update`; of bad files, of processes that are interrupted or want to save
    bad_files: list[BadFile]  # the files that gave no clip
    waits: list[Wait]  # for data


class Trainer:
    """A run, built from its configuration, that starts at the newest checkpoint of its folder.

    Every process of `world` makes one. Raises ValueError for a model, data, batch size or folder that does not fit,
    FileNotFoundError, CheckpointError, ImportError, and BackendError for a backend that cannot run here.
    """

    entries = "videos"  # of data.train

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config, self.world, self.folder = config, world, Path(str(config.out))
        backends.check_can_run(config.backend, world.device)
        self.data = self.training_data()
        self.val = val = open_clips(config, "val", self.data.classes) if config.data.val is not None else None
        self.micro_batch_videos = micro_batch_videos(config, world.size, len(self.data), self.entries)
        self.steps_per_epoch = len(self._epoch_batches(0, 0)) // config.accumulate
        self.total = config.steps or self.steps_per_epoch * int(config.epochs or 0)
        self.changes = run_folder.check_run(self.folder, config)

        self.task = self.build_task()
        recorder, self.graph_line = choose_recorder(config, world.device)
        parallel.parallelize(self.task, config.parallel, world)
        self.average = WeightAverage(self.task.student, config.ema) if config.ema is not None else None
        self.ema_tensors = self.average.tensors if self.average is not None else {}
        optim = config.optim
        groups = parameter_groups(self.task.student, optim.lr, optim.weight_decay, optim.layer_decay, optim.rule)
        # the form that reads its learning rates and counts its steps on the GPU, in eager steps too: another rounds otherwise
        capturable = world.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=True, capturable=capturable)
        warmup = warmup_steps(config, self.steps_per_epoch, self.total)
        factor = cosine_factor(self.total, warmup, optim.warmup_start, optim.floor)
        self.rates = LearningRates(self.optimizer, factor, world.device)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.precision == "float16")
        self.train_step = TrainStep(config, self.task, world, self.optimizer, self.scaler, self.average, recorder)
        # On a GPU a step's numbers are read when the next one is on its way, so that the GPU never waits for the host.
        self.delay = 1 if world.device.type == "cuda" else 0
        self.step, self.saved_at = 0, time.monotonic()
        self.pace = Pace()  # since the last line of the log
        self.checkpoint = checkpoints.newest(self.folder / run_folder.CHECKPOINTS)
        if self.checkpoint is not None:
            self._resume(self.checkpoint)
        resumed = self.checkpoint is not None
        self.validation = Validation(config, self.task, val, world, self.average, resumed) if val is not None else None

    def describe(self) -> list[str]:
        """Return lines for the terminal: the model, the data, the number of steps, and the step to resume from."""
        config, student, world = self.config, self.task.student, self.world
        parameters = sum(p.numel() for p in student.parameters()) / 1e6
        names = {"pretrain": "VideoMambaEncoder", "retrieval": "VideoTextRetrieval"}
        name = names.get(str(config.task), "VideoMamba")
        processes = f"{world.size} processes" if world.size > 1 else "1 process"
        classes = f" in {len(self.data.classes)} classes" if self.data.classes else ""
        kind = "pairs of video and caption" if config.task == "retrieval" else "videos" if config.data.frames else "images"
        lines = [
            f"{config.task}: {name}, {parameters:.3g} M parameters, on {world.device.type}, {processes}",
            f"{len(self.data)} {kind}{classes}, {self.steps_per_epoch} steps an epoch, {self.total} steps",
            self.graph_line,
        ]
        for key, dataset in (("train", self.data), ("val", self.val)):
            lines += [f"data.{key}: {note}" for note in (dataset.notes if dataset else ())]
        return lines + self.resume_lines()

    def resume_lines(self) -> list[str]:
        """Return lines that say from where the run goes on, and what has changed."""
        if self.checkpoint is None:
            return []
        goes_on = f"goes on behind step {self.step}, from {self.checkpoint}"
        return [goes_on, *(f"  {change}" for change in self.changes)]

    def run(self) -> bool:
        """Train to the last step and write the model; return whether an interrupt came before that.

        An interrupt is answered after the current step, with a checkpoint. `step` and `checkpoint` then say where the run is.
        An evaluation that it ends or prevents is done when the run is resumed.

        Raises Diverged, NotWritten (an OSError) for a full disk, UnreadableFiles where too many files cannot be read.
        """
        log = None
        if self.world.is_main:
            log = run_folder.open_run(self.folder, self.config, self.step, self.total, self.describe())
        interrupted = False
        try:
            with Interrupt() as interrupt:
                # on these videos at this step, as the log says
                evaluated = self.world.all_gather(log is not None and self.config.data.val in log.evaluated)[0]
                if self.step > 0 and self._validation_due() and not evaluated:
                    interrupted = not self._validate((self.step - 1) // self.steps_per_epoch, log, interrupt)
                while self.step < self.total and not interrupted:
                    interrupted = self._train_epoch(log, interrupt)
                if not interrupted:
                    models = self.save_models()
                    if log is not None:
                        log.print_done(self.step, models, self.data.files)
        finally:
            if log is not None:
                log.close()
        return interrupted

    def _train_epoch(self, log: Log | None, interrupt: Interrupt) -> bool:
        """Train to the end of the current epoch; return whether an interrupt stopped the training before its end."""
        config, (epoch, done) = self.config, divmod(self.step, self.steps_per_epoch)
        count = min(self.steps_per_epoch - done, self.total - self.step)
        micro_batches = islice(self._epoch_batches(epoch, skip=done * config.accumulate), count * config.accumulate)
        feed = self.make_feed(micro_batches)
        under_way: deque[StepResult] = deque()
        self.pace = Pace()
        for i in range(count):
            under_way.append(self._train_step(feed, interrupt))
            last, due = self.step == self.total, self._validation_due()
            steps_over = config.save_every is not None and self.step % config.save_every == 0
            interrupted = minutes_over = False
            # what is saved or evaluated has been seen to be finite
            read_all = last or due or steps_over or i + 1 == count
            while len(under_way) > (0 if read_all else self.delay):
                interrupted_now, minutes_over_now = self._finish_step(epoch, under_way.popleft(), log)
                interrupted, minutes_over = interrupted or interrupted_now, minutes_over or minutes_over_now
                read_all = read_all or interrupted or minutes_over
            # evaluation comes before the checkpoint, so that a training resumed from it finds the results in the log
            if due:
                interrupted = interrupted or not self._validate(epoch, log, interrupt)
            if interrupted or last or steps_over or minutes_over:
                self._save()
            if interrupted and (due or not last):
                return True
        if log is not None and self.step < self.total:
            log.end_epoch(epoch, self.data.files)
        return False

    def _train_step(self, feed: Any, interrupt: Interrupt) -> StepResult:
        """Begin one step of the optimiser."""
        config, world = self.config, self.world
        bad_files = self.forward_backward(feed)
        rate = self.rates.set(self.step)
        numbers = self.train_step.update()
        minutes = math.inf if config.save_minutes is None else config.save_minutes
        minutes_over = world.is_main and time.monotonic() - self.saved_at >= 60 * minutes  # by one clock for all processes
        # one collective for all numbers
        total = world.start_sum(numbers, [float(n) for n in (len(bad_files), interrupt.requested, minutes_over)])
        feed.advance()
        waits, feed.waits = feed.waits, []
        self.step += 1
        return StepResult(self.step, rate, total, bad_files, waits)

    def forward_backward(self, feed: Any) -> list[BadFile]:
        """Run forward and backward of a step's micro-batches; return the files that gave no clip."""
        config, bad_files = self.config, []
        for i in range(config.accumulate):
            batch = feed.take()
            self.train_step.add(i, batch.clips, batch.targets, derive_seed(config.seed, self.step, i, self.world.rank))
            bad_files += batch.bad_files
            if i + 1 < config.accumulate:
                feed.advance()
        return bad_files

    def _finish_step(self, epoch: int, result: StepResult, log: Log | None) -> tuple[bool, bool]:
        """Wait for a step, write its line; return whether any process was interrupted, and whether save_minutes have passed.

        Raises Diverged for a loss or gradients that are not finite.
        """
        config, world, names = self.config, self.world, self.train_step.names
        *values, norm, before, after, num_bad, num_interrupted, save = result.numbers.result()
        means = {name: value / (world.size * config.accumulate) for name, value in zip(names, values, strict=True)}
        self._check_finite(result.step, means["loss"], norm, before / world.size)
        line = {"step": result.step, "epoch": epoch, **means, "lr": result.rate, "grad_norm": norm / world.size}
        if self.scaler.is_enabled():
            line["scale"] = after / world.size  # lower than in the line before: this step was skipped
        line["memory_mib"] = peak_memory_mib(world.device)
        bad_files = [file for files in world.all_gather(result.bad_files) for file in files] if num_bad else []
        logged = result.step == self.total or result.step % config.log_every == 0
        line[f"{self.task.unit}_per_s"], line["data_wait"] = self.pace.add(config.batch_size, result.waits)
        if log is not None:
            log.write_step(line, bad_files, logged)
        if logged:
            self.pace = Pace()
        return num_interrupted > 0, save > 0

    def _check_finite(self, step: int, loss: float, norm: float, scale: float) -> None:
        """Raise Diverged unless loss and gradient norm of a step, at a scale of the loss, are finite.

        A gradient scaler may still lower its scale: it skips such a step by itself. Below a scale of 1, the scale is not the
        reason.
        """
        if (math.isfinite(loss) and math.isfinite(norm)) or (self.scaler.is_enabled() and scale >= 1):
            return
        reason = f"loss is {loss}" if not math.isfinite(loss) else f"norm of the gradients is {norm}"
        good = self.checkpoint if self.checkpoint is not None else "there is none yet"
        raise Diverged(f"step {step}: the {reason}; last good checkpoint: {good}")

    def _validation_due(self) -> bool:
        """Return whether the model is to be evaluated at the current step."""
        return self.validation is not None and self.validation.due(self.step, self.total)

    def _validate(self, epoch: int, log: Log | None, interrupt: Interrupt) -> bool:
        """Evaluate the model; return False if an interrupt ended that."""
        return self.validation is None or self.validation.run(self.step, epoch, log, self.train_step.autocast(), interrupt)

    def training_data(self) -> Any:
        """Return the videos of data.train, for retrieval with captions. Raise ValueError that names the key."""
        if self.config.task == "retrieval":
            return CaptionData(self.config)
        return open_clips(self.config, "train", () if self.config.task == "pretrain" else None)

    def build_task(self) -> Any:
        """Return the task with its models."""
        return tasks.build_task(self.config, self.data.classes, self.world.device, self.data)

    def make_feed(self, micro_batches: Any) -> Any:
        """Return the micro-batches as `forward_backward` takes them."""
        return Prefetcher(micro_batches, self.world.device, self.task.encode)

    def save_models(self) -> list[Path]:
        """Write the trained model, and return its folder, with an EMA those of both."""
        return run_folder.save_models(self.folder, self.config, self.task.student, self.average, self.world)

    def _epoch_batches(self, epoch: int, skip: int) -> Batches | AlternatingBatches:
        """Return this process's micro-batches of an epoch without the first `skip`."""
        if isinstance(self.data, CaptionData):
            return self.data.batches(self.config, epoch, skip, self.world.rank, self.world.size)
        world, config = self.world, self.config
        return batches(
            self.data, self.micro_batch_videos, epoch=epoch, seed=config.seed, workers=config.data.workers, rank=world.rank,
            world=world.size, skip=skip,
        )  # fmt: skip

    def _save(self) -> None:
        """Write a checkpoint of the current step."""
        data = {"videos": len(self.data), "classes": list(self.data.classes)}
        state = {"step": self.step, **data, "processes": self.world.size, "scaler": self.scaler.state_dict()}
        folder, keep = self.folder / run_folder.CHECKPOINTS, self.config.keep
        self.checkpoint = checkpoints.save(folder, state, self.task.student, self.optimizer, self.ema_tensors, self.world, keep)
        self.saved_at = time.monotonic()

    def _resume(self, checkpoint: Path) -> None:
        """Load a checkpoint. Raise ValueError if it does not fit the steps, videos or classes, or CheckpointError."""
        state = checkpoints.read_state(checkpoint)
        self.step = state["step"]
        if self.step > self.total:
            at = f"the run in {self.folder} is at step {self.step}"
            raise ValueError(f"{at}; allowed: as many steps or more, got {self.total}")
        if state["videos"] != len(self.data):
            counts = f"{self.config.data.train} holds {len(self.data)} {self.entries}, and held {state['videos']}"
            raise ValueError(f"{counts} when {self.folder} began; allowed: the same, or another out")
        had, now = state.get("classes", list(self.data.classes)), list(self.data.classes)
        if had != now:  # the model's outputs would be called by names of others
            gone, new = [name for name in had if name not in now], [name for name in now if name not in had]
            names = f"classes of {self.config.data.train} are {new or now} in place of {gone or had}"
            raise ValueError(f"{names}, since {self.folder} began; allowed: the same, or another out")
        if state["processes"] != self.world.size:
            effect = "a step takes the same videos, and draws otherwise"
            self.changes.append(f"processes: {state['processes']} -> {self.world.size}; {effect}")
        checkpoints.load(checkpoint, self.task.student, self.optimizer, self.ema_tensors, self.world)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
