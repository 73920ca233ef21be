"""Evaluation: the accuracy of a classifier on a folder of videos, or the error of a regression on a list of them."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from fused.train.data.batches import BadFile, batches
from fused.train.data.clips import ClipFolder
from fused.train.data.target_clips import TargetClips
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
    """Return the accuracies, from 0 to 1, or the error, or None if any process was interrupted before the end.

    The results are `val_top1`, and with more than five classes `val_top5` (the label is among the five highest logits), of the
    videos that were read; `val_top1_all`, of all videos, where one that gave no clip counts as wrong; and the numbers of videos
    `val_read`, `val_listed`, `val_too_short` and `val_unreadable`. Of a `TargetClips` the only measure is `val_mse`, the mean
    squared error over the videos that were read, infinite without one. With the EMA `average` of the student, its measures are
    `val_ema_top1` and so on; every clip is read once for both. Every process of the world calls this function;
    `batch_size` is that of one process.
    """
    task.eval()
    weights: dict[str, Callable[[], AbstractContextManager[None]]] = {"val": nullcontext}
    if average is not None:
        weights["val_ema"] = average.swapped
    measure = _SquaredError(dataset) if isinstance(dataset, TargetClips) else _Hits(dataset)
    sums = torch.zeros(len(weights), measure.count, dtype=torch.float64, device=world.device)
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
            sums[i] += measure.sums(logits, labels)
        reshard(task.student)
        read += len(clips)
    *totals, videos = world.all_sum([*sums.flatten(), float(read)])
    bad = [file for files in world.all_gather(bad) for file in files]
    too_short = sum(file.too_short for file in bad)
    results: dict[str, float] = {}
    for i, name in enumerate(weights):
        of_weights = totals[i * measure.count : (i + 1) * measure.count]
        results |= {f"{name}_{key}": value for key, value in measure.means(of_weights, videos).items()}
    results |= {"val_read": int(videos), "val_listed": len(dataset)}
    return Evaluation(results | {"val_too_short": too_short, "val_unreadable": len(bad) - too_short}, bad)


class _Hits:
    """The measure of a classifier: the labels that are its first class, and those among its first five."""

    count = 2  # of sums

    def __init__(self, dataset: ClipFolder) -> None:
        self.listed, self.classes = len(dataset), len(dataset.classes)

    def sums(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the sums (2,) over clips, for logits (B, classes) and labels (B,)."""
        hits = logits.topk(min(TOP, self.classes), dim=1).indices == labels[:, None]
        return torch.stack((hits[:, 0].sum(), hits.any(dim=1).sum()))

    def means(self, sums: Sequence[float], videos: float) -> dict[str, float]:
        """Return the shares for the sums over all processes, and the number of videos that were read."""
        top1, top5 = sums
        shares = {"top1": top1 / max(videos, 1)}
        if self.classes > TOP:
            shares["top5"] = top5 / max(videos, 1)
        return shares | {"top1_all": top1 / self.listed}


class _SquaredError:
    """The measure of a regression: the squared differences from the targets, in float64."""

    count = 1

    def __init__(self, dataset: TargetClips) -> None:
        self.targets = dataset.targets

    def sums(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the sum (1,) over clips, for outputs (B, 1) and the indices (B,) of their videos."""
        targets = torch.tensor([self.targets[i] for i in labels.tolist()], dtype=torch.float64, device=outputs.device)
        return (outputs[:, 0].double() - targets).square().sum()[None]

    def means(self, sums: Sequence[float], videos: float) -> dict[str, float]:
        """Return the mean for the sum over all processes, and the number of videos that were read."""
        return {"mse": sums[0] / videos if videos else math.inf}
