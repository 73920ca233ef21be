"""Evaluation: the accuracy of a classifier on a folder of videos."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from fused.train.data.clips import BadFile, ClipFolder, batches
from fused.train.interrupt import Interrupt
from fused.train.parallel import World, reshard
from fused.train.tasks import Task

TOP = 5  # classes of the second accuracy; with no more classes every answer would be right


@dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation, the same in all processes."""

    results: dict[str, float]  # the fields of a log line, see `evaluate`
    bad_files: list[BadFile]  # the files that gave no clip


@torch.no_grad()
def evaluate(
    task: Task, dataset: ClipFolder, batch_size: int, world: World, autocast: AbstractContextManager[object],
    workers: int = 0, interrupt: Interrupt | None = None,
) -> Evaluation | None:  # fmt: skip
    """Return the accuracies, from 0 to 1, or None if any process was interrupted before the end.

    The results are `val_top1`, and with more than five classes `val_top5` (the label is among the five highest logits), of the
    videos that were read; `val_top1_all`, of all videos, where one that gave no clip counts as wrong; and the numbers of videos
    `val_read`, `val_listed`, `val_too_short` and `val_unreadable`. Every process of the world calls this function;
    `batch_size` is that of one process.
    """
    task.eval()
    classes = len(dataset.classes)
    counts = torch.zeros(3, dtype=torch.long, device=world.device)  # right in the first, right in the first five, all
    bad: list[BadFile] = []
    for batch in batches(
        dataset, batch_size, epoch=0, seed=0, workers=workers, rank=world.rank, world=world.size, shuffle=False, drop_last=False
    ):
        if interrupt is not None and world.any(interrupt.requested):
            return None
        bad += batch.bad_files
        clips, labels = batch.clips.to(world.device), batch.labels.to(world.device)
        # an FSDP forward is a collective: a process without clips joins it with a clip of zeros
        inputs = clips if len(clips) else clips.new_zeros(1, 3, dataset.frames, dataset.size, dataset.size)
        with autocast:
            logits = task.logits(inputs)[: len(clips)]
        reshard(task.student)
        right = logits.topk(min(TOP, classes), dim=1).indices == labels[:, None]
        counts += torch.stack((right[:, 0].sum(), right.any(dim=1).sum(), counts.new_tensor(len(clips))))
    top1, top5, read = world.all_sum(counts.unbind())
    bad = [file for files in world.all_gather(bad) for file in files]
    too_short = sum(file.too_short for file in bad)
    results = {"val_top1": top1 / max(read, 1)}
    if classes > TOP:
        results["val_top5"] = top5 / max(read, 1)
    results |= {"val_top1_all": top1 / len(dataset), "val_read": int(read), "val_listed": len(dataset)}
    return Evaluation(results | {"val_too_short": too_short, "val_unreadable": len(bad) - too_short}, bad)
