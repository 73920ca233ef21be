"""Evaluation: the accuracy of a classifier on a folder of videos."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from fused.train.data.clips import BadFile, ClipFolder, batches
from fused.train.ema import WeightAverage
from fused.train.interrupt import Interrupt
from fused.train.parallel import World, reshard
from fused.train.prefetch import Prefetcher
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
    workers: int = 0, interrupt: Interrupt | None = None, average: WeightAverage | None = None,
) -> Evaluation | None:  # fmt: skip
    """Return the accuracies, from 0 to 1, or None if any process was interrupted before the end.

    The results are `val_top1`, and with more than five classes `val_top5` (the label is among the five highest logits), of the
    videos that were read; `val_top1_all`, of all videos, where one that gave no clip counts as wrong; and the numbers of videos
    `val_read`, `val_listed`, `val_too_short` and `val_unreadable`. With the EMA `average` of the student, its accuracies are
    `val_ema_top1` and so on; every clip is read once for both. Every process of the world calls this function;
    `batch_size` is that of one process.
    """
    task.eval()
    classes = len(dataset.classes)
    weights: dict[str, Callable[[], AbstractContextManager[None]]] = {"val": nullcontext}
    if average is not None:
        weights["val_ema"] = average.swapped
    right = torch.zeros(len(weights), 2, dtype=torch.long, device=world.device)  # in the first class, among the first five
    read = 0
    bad: list[BadFile] = []
    every = batches(
        dataset, batch_size, epoch=0, seed=0, workers=workers, rank=world.rank, world=world.size, shuffle=False, drop_last=False
    )
    for batch in Prefetcher(iter(every), world.device):
        if interrupt is not None and world.any(interrupt.requested):
            return None
        bad += batch.bad_files
        clips, labels = batch.clips, batch.targets
        # an FSDP forward is a collective: a process without clips joins it with a clip of zeros
        inputs = clips if len(clips) else clips.new_zeros(1, *clips.shape[1:])
        for i, use in enumerate(weights.values()):
            with use(), autocast:
                logits = task.logits(inputs)[: len(clips)]
            hits = logits.topk(min(TOP, classes), dim=1).indices == labels[:, None]
            right[i] += torch.stack((hits[:, 0].sum(), hits.any(dim=1).sum()))
        reshard(task.student)
        read += len(clips)
    *sums, videos = world.all_sum([*right.flatten(), float(read)])
    bad = [file for files in world.all_gather(bad) for file in files]
    too_short = sum(file.too_short for file in bad)
    results: dict[str, float] = {}
    for name, top1, top5 in zip(weights, sums[::2], sums[1::2], strict=True):
        results[f"{name}_top1"] = top1 / max(videos, 1)
        if classes > TOP:
            results[f"{name}_top5"] = top5 / max(videos, 1)
        results[f"{name}_top1_all"] = top1 / len(dataset)
    results |= {"val_read": int(videos), "val_listed": len(dataset)}
    return Evaluation(results | {"val_too_short": too_short, "val_unreadable": len(bad) - too_short}, bad)
