"""Evaluation: the accuracy of a classifier on a folder of videos."""

from contextlib import AbstractContextManager

import torch

from fused.train.data.clips import ClipFolder, batches
from fused.train.parallel import World
from fused.train.tasks import Task


@torch.no_grad()
def evaluate(
    task: Task, dataset: ClipFolder, batch_size: int, world: World, autocast: AbstractContextManager[object], workers: int = 0
) -> tuple[dict[str, float], list[str]]:
    """Return accuracies from 0 to 1, and a sentence for each file that could not be read; the same in all processes.

    The keys are `val_top1`, `val_top5` (the label is among the five highest logits) and `val_videos`, the number of videos.
    Every process of the world calls this function; `batch_size` is that of one process.
    """
    task.eval()
    counts = torch.zeros(3, dtype=torch.long, device=world.device)  # right in the first, right in the first five, all
    unreadable: list[str] = []
    for batch in batches(
        dataset, batch_size, epoch=0, seed=0, workers=workers, rank=world.rank, world=world.size, shuffle=False, drop_last=False
    ):
        unreadable += batch.bad
        clips, labels = batch.clips.to(world.device), batch.labels.to(world.device)
        # an FSDP forward is a collective: a process without clips joins it with a clip of zeros
        inputs = clips if len(clips) else clips.new_zeros(1, *clips.shape[1:])
        with autocast:
            logits = task.logits(inputs)[: len(clips)]
        right = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        counts += torch.stack((right[:, 0].sum(), right.any(dim=1).sum(), counts.new_tensor(len(clips))))
    top1, top5, videos = world.all_sum(counts.unbind())
    results = {"val_top1": top1 / max(videos, 1), "val_top5": top5 / max(videos, 1), "val_videos": videos}
    return results, [sentence for sentences in world.all_gather(unreadable) for sentence in sentences]
