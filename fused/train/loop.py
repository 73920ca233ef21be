"""The training itself: steps from where the run's folder stands to the last one, with its log, checkpoints and evaluation.

All that is drawn in a step follows from (seed, step, part, rank), and the clips from (seed, epoch, step). So the state of a
training is its parameters, the optimiser's tensors and the step, and one that went on has the bits of one that never stopped.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused import backends
from fused.train import checkpoints, parallel, tasks
from fused.train import run_folder as runs
from fused.train.config import TrainConfig
from fused.train.data.clips import Batch, ClipFolder, batches
from fused.train.evaluation import evaluate
from fused.train.interrupt import Interrupt
from fused.train.log import Log, memory
from fused.train.optim import parameter_groups
from fused.train.parallel import World
from fused.train.schedule import cosine_schedule
from fused.train.seed import seed_of

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Diverged(RuntimeError):
    """The loss or the gradients are no numbers any more; the message names the step and the last good checkpoint."""


@dataclass(frozen=True)
class Outcome:
    """Where a training stands when `Trainer.run` returns."""

    step: int
    total: int
    interrupted: bool
    checkpoint: Path | None
    results: dict[str, float]  # of the last evaluation
    bad: int  # files that could not be read


class Trainer:
    """A run, built from its configuration and ready to go on from its newest checkpoint.

    Every process of `world` makes one. Raises ValueError, FileNotFoundError, CheckpointError, ImportError or BackendError for
    what does not fit together, models, data, batch sizes, or a folder of another configuration, and what cannot run here.
    """

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config, self.world, self.folder = config, world, Path(str(config.out))
        data = config.data
        if config.backend != "auto":
            backends.choose(config.backend, world.device)  # now, not in the first step
        shape: dict[str, Any] = {
            "sampling": data.sampling,
            "stride": data.stride,
            "scale": data.scale,
            "flip": data.flip,
            "seed": config.seed,
        }

        def folder(key: str, classes: Sequence[str] | None) -> ClipFolder:
            try:
                return ClipFolder(getattr(data, key), data.frames, data.size, train=key == "train", classes=classes, **shape)
            except (ValueError, OSError) as error:
                raise ValueError(f"data.{key}: {error}") from error

        self.data = folder("train", () if config.task == "pretrain" else None)
        self.val = folder("val", self.data.classes) if data.val is not None else None
        self.part, rest = divmod(config.batch_size, world.size * config.accumulate)
        if rest:
            product = f"processes * accumulate ({world.size} * {config.accumulate})"
            raise ValueError(f"batch_size is {config.batch_size}; allowed: a multiple of {product}")
        if len(self.data) < config.batch_size:
            raise ValueError(f"batch_size is {config.batch_size}; allowed: up to the {len(self.data)} videos of {data.train}")
        self.per_epoch = len(self._batches(0, 0)) // config.accumulate
        self.total = config.steps or self.per_epoch * int(config.epochs or 0)
        self.changed = runs.check(self.folder, config)

        self.task = tasks.build(config, self.data.classes, world.device)
        self.module = parallel.spread(self.task, config.parallel, world)
        how = config.optim
        groups = parameter_groups(self.task.student, how.lr, how.weight_decay, how.layer_decay, how.rule)
        self.optimizer = torch.optim.AdamW(groups, lr=how.lr, betas=how.betas)
        self.schedule = cosine_schedule(self.optimizer, self.total, how.warmup_steps, how.warmup_start, how.floor)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.precision == "float16")
        self.step = 0
        self.checkpoint = checkpoints.newest(self.folder / runs.CHECKPOINTS)
        if self.checkpoint is not None:
            self._go_on(self.checkpoint)
        self.results: dict[str, float] = {}

    def run(self) -> Outcome:
        """Train to the last step, or until an interrupt, which is answered between two steps and leaves a checkpoint.

        Raises Diverged, NotWritten (an OSError) for a full disk, Unreadable where too many files cannot be read.
        """
        log = runs.begin(self) if self.world.first else None
        interrupted = False
        try:
            with Interrupt() as interrupt:
                while self.step < self.total and not interrupted:
                    interrupted = self._epoch(log, interrupt)
            if not interrupted:
                runs.finish(self, log)
        finally:
            if log is not None:
                log.close()
        bad = len(log.bad) if log is not None else 0
        return Outcome(self.step, self.total, interrupted, self.checkpoint, self.results, bad)

    def _epoch(self, log: Log | None, interrupt: Interrupt) -> bool:
        """From this step to the epoch's end, or to an interrupt; whether there was one."""
        config, (epoch, done) = self.config, divmod(self.step, self.per_epoch)
        parts = iter(self._batches(epoch, done * config.accumulate))
        clock = time.perf_counter()
        counted = 0
        for _ in range(done, min(self.per_epoch, done + self.total - self.step)):
            found = list(islice(parts, config.accumulate))
            line, bad, interrupted = self._step(epoch, found, interrupt)
            counted += config.batch_size
            line["clips_per_s"] = counted / (time.perf_counter() - clock)
            logged = self.step % config.log_every == 0 or self.step == self.total
            if log is not None:
                for sentence in bad:
                    log.write_bad(self.step, epoch, sentence)
                if logged:
                    log.write(line)
                log.progress(line, logged)
            if logged:
                clock, counted = time.perf_counter(), 0
            last, every = self.step == self.total, config.evaluate_every
            # before the checkpoint: one who goes on from there finds it in the log
            if self.val is not None and (last or (every and self.step % every == 0 and not interrupted)):
                self._evaluate(epoch, log)
            if interrupted or last or self.step % config.save_every == 0:
                self._save()
            if interrupted:
                return not last
        return False

    def _step(self, epoch: int, found: list[Batch], interrupt: Interrupt) -> tuple[dict[str, Any], list[str], bool]:
        """One step of the optimiser: its line for the log, the files that could not be read, whether to stop."""
        config, world, parts = self.config, self.world, self.config.accumulate
        self.task.train()
        self.optimizer.zero_grad()
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(found):
            seed = seed_of(config.seed, self.step, i, world.rank)
            torch.manual_seed(seed)  # what models draw: stochastic depth, dropout
            clips, labels = batch.clips.to(world.device, non_blocking=True), batch.labels.to(world.device, non_blocking=True)
            with parallel.shared(self.module, self.task, i + 1 == parts):
                with self._autocast():
                    given = self.task.prepare(clips, labels, torch.Generator().manual_seed(seed))
                    loss, more = self.module(*given)
                self.scaler.scale(loss / parts).backward()
            for name, value in {"loss": loss, **more}.items():
                sums[name] = sums.get(name, 0) + value.detach()
        self.scaler.unscale_(self.optimizer)
        limit = math.inf if config.optim.clip_grad is None else config.optim.clip_grad
        norm = parallel.norm_of(torch.nn.utils.clip_grad_norm_(self.task.student.parameters(), limit))
        bad = [sentence for batch in found for sentence in batch.bad]
        # before the step: one that is no number must not reach the parameters, in any process
        *values, norm_sum, bad_files, stops = world.sum([*sums.values(), norm, len(bad), interrupt.asked])
        line = dict(zip(sums, (value / (world.size * parts) for value in values), strict=True))
        rate = max(group["lr"] for group in self.optimizer.param_groups)
        self._check(line["loss"], norm_sum)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.step += 1
        line = {"step": self.step, "epoch": epoch, **line, "lr": rate, "grad_norm": norm_sum / world.size}
        if self.scaler.is_enabled():
            line["scale"] = self.scaler.get_scale()  # lower than in the line before: the step was left out
        line["memory_mib"] = memory(world.device)
        every = [sentence for sentences in world.gather(bad) for sentence in sentences] if bad_files else []
        return line, every, stops > 0

    def _check(self, loss: float, norm: float) -> None:
        """Raise Diverged unless both are numbers. A scaler leaves such a step out by itself, unless it has nothing left to
        scale down: then it is not the scale that overflows."""
        if (math.isfinite(loss) and math.isfinite(norm)) or (self.scaler.is_enabled() and self.scaler.get_scale() >= 1):
            return
        what = f"loss is {loss}" if not math.isfinite(loss) else f"norm of the gradients is {norm}"
        kept = self.checkpoint if self.checkpoint is not None else "there is none yet"
        raise Diverged(f"step {self.step + 1}: the {what}; last good checkpoint: {kept}")

    def _evaluate(self, epoch: int, log: Log | None) -> None:
        assert self.val is not None
        autocast, workers = self._autocast(), self.config.data.workers
        self.results, bad = evaluate(self.task, self.val, self.part, self.world, autocast, workers)
        if log is not None:
            for sentence in bad:
                log.write_bad(self.step, epoch, sentence)
            log.write({"step": self.step, "epoch": epoch, **self.results})
            log.say(
                "step {}: top-1 {val_top1:.2%}, top-5 {val_top5:.2%} of {val_videos:.0f} videos".format(
                    self.step, **self.results
                )
            )

    def _batches(self, epoch: int, skip: int) -> Any:
        settings: dict[str, Any] = {"rank": self.world.rank, "world": self.world.size, "workers": self.config.data.workers}
        return batches(self.data, self.part, epoch=epoch, seed=self.config.seed, skip=skip, **settings)

    def _autocast(self) -> torch.autocast:
        dtype = DTYPES.get(self.config.precision)
        return torch.autocast(self.world.device.type, dtype, enabled=dtype is not None)

    def _save(self) -> None:
        facts = {
            "step": self.step, "videos": len(self.data), "processes": self.world.size, "scaler": self.scaler.state_dict(),
        }  # fmt: skip
        place = self.folder / runs.CHECKPOINTS
        self.checkpoint = checkpoints.save(place, facts, self.task.student, self.optimizer, self.world, self.config.keep)

    def _go_on(self, checkpoint: Path) -> None:
        facts = checkpoints.facts_of(checkpoint)
        self.step = facts["step"]
        if self.step > self.total:
            raise ValueError(
                f"the run in {self.folder} is at step {self.step}; allowed: as many steps or more, got {self.total}"
            )
        if facts["videos"] != len(self.data):
            found = (
                f"{self.config.data.train} holds {len(self.data)} videos, and held {facts['videos']} when {self.folder} began"
            )
            raise ValueError(f"{found}; allowed: the same, or another out")
        if facts["processes"] != self.world.size:
            same = "a step takes the same videos, and draws otherwise"
            self.changed.append(f"processes: {facts['processes']} -> {self.world.size}; {same}")
        checkpoints.load(checkpoint, self.task.student, self.optimizer, self.world)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(facts["scaler"])
        self.schedule.last_epoch = self.step
        for group, base, share in zip(
            self.optimizer.param_groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True
        ):
            group["lr"] = base * share(self.step)
