"""How many videos of a folder a model puts into the right class."""

from contextlib import AbstractContextManager

import torch

from fused.train.data.clips import ClipFolder, batches
from fused.train.parallel import World
from fused.train.tasks import Task


@torch.no_grad()
def evaluate(
    task: Task, dataset: ClipFolder, batch_size: int, world: World, autocast: AbstractContextManager[object], workers: int = 0
) -> tuple[dict[str, float], list[str]]:
    """Shares of videos whose class is the model's first answer (`val_top1`) and among its first five (`val_top5`), of
    `val_videos` videos; and a sentence for each that could not be read. Every process of the world calls it, with its own
    `batch_size`; all get the same."""
    task.eval()
    counts = torch.zeros(3, dtype=torch.long, device=world.device)  # right at first, right among five, all
    bad: list[str] = []
    for batch in batches(
        dataset, batch_size, epoch=0, seed=0, workers=workers, rank=world.rank, world=world.size, shuffle=False, drop_last=False
    ):
        bad += batch.bad
        clips, labels = batch.clips.to(world.device), batch.labels.to(world.device)
        # with FSDP every process takes part in every forward, one that has no clips left too
        shown = clips if len(clips) else clips.new_zeros(1, 3, dataset.frames, dataset.size, dataset.size)
        with autocast:
            logits = task.logits(shown)[: len(clips)]
        right = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        counts += torch.stack((right[:, 0].sum(), right.any(dim=1).sum(), counts.new_tensor(len(clips))))
    top1, top5, videos = world.sum(counts.unbind())
    results = {"val_top1": top1 / max(videos, 1), "val_top5": top5 / max(videos, 1), "val_videos": videos}
    return results, [sentence for found in world.gather(bad) for sentence in found]
