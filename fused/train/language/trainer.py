"""The training loop on conversations: rows of packed samples are the micro-batches of a step.

The loss of a step is the mean over all its learnt tokens, however they are divided among rows and processes. So a step of two
processes is that of one, to rounding, and a packed step that of its samples alone.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from fused.train import run_folder
from fused.train.data.batches import BadFile
from fused.train.language.samples import ConversationData, PackedBatch
from fused.train.language.tasks import LanguageTask, make_language_task, make_reader
from fused.train.loop import Trainer
from fused.train.parallel import full_tensor
from fused.train.prefetch import Feed
from fused.train.seed import derive_seed

Rows = Feed[PackedBatch, PackedBatch]


class LanguageTrainer(Trainer):
    """A run of a task on conversations. See `Trainer`."""

    entries = "conversations"
    data: ConversationData
    task: LanguageTask

    def describe(self) -> list[str]:
        """Return lines for the terminal: the model, what learns, the data, the steps, and the step to resume from."""
        config, world, options = self.config, self.world, self.config.language
        processes = f"{world.size} processes" if world.size > 1 else "1 process"
        name = type(self.task.student.model).__name__
        lines = [
            f"{config.task}: {name} on {world.device.type}, {processes}",
            self.task.trained_parts(),
            f"{len(self.data)} conversations, {self.steps_per_epoch} steps an epoch, {self.total} steps; rows of at most "
            f"{options.length} tokens",
            *(f"data.train: {note}" for note in self.data.notes),
        ]
        return lines + self.resume_lines()

    def training_data(self) -> ConversationData:
        data, reader = self.config.data, make_reader(self.config)
        prefix = None if data.prefix is None else Path(data.prefix)
        try:
            found = ConversationData(Path(str(data.train)), prefix, reader)
            found.notes = tuple(found.first_look())
            return found
        except (ValueError, OSError) as error:
            raise ValueError(f"data.train: {error}") from error

    def build_task(self) -> LanguageTask:
        return make_language_task(self.config)

    def make_feed(self, micro_batches: Iterator[PackedBatch]) -> Rows:
        return Feed(micro_batches, self.world.device)

    def forward_backward(self, feed: Rows) -> list[BadFile]:
        """Run forward and backward of a step's rows, the same number in every process; return the files that gave no sample."""
        config, world, batch = self.config, self.world, feed.take()
        counts = world.all_gather((batch.learnt, len(batch.rows)))
        learnt, rows = sum(n for n, _ in counts), max(n for _, n in counts)
        weights = torch.tensor([world.size / learnt, world.size / config.batch_size])
        self.train_step.micro_batches = rows
        for i in range(rows):
            own = i < len(batch.rows)
            row = batch.rows[i if own else 0]  # once more, without weight, while other processes have further rows
            prepare = partial(self.task.prepare_row, row, weights * own, world.device)
            self.train_step.add_inputs(i, prepare, derive_seed(config.seed, self.step, i, world.rank))
        return list(batch.bad_files)

    def save_models(self) -> list[Path]:
        state = {}
        for name, value in self.task.student.state_dict().items():
            if (kept := self.task.as_saved(name, value)) is not None:
                whole = full_tensor(kept)  # of one tensor at a time, which all processes gather
                if self.world.is_main:
                    state[name] = whole.cpu()
        folder = self.folder / run_folder.MODEL
        if self.world.is_main:
            self.task.save(folder, state)
        return [folder]
