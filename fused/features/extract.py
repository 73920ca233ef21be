"""Features of videos: one vector, or all tokens, of each video or of each window of a long video."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fused.backends import check_can_run
from fused.chunked.video import run_layers
from fused.evaluate.run import NotFinite, Progress
from fused.evaluate.settings import Settings
from fused.evaluate.videos import Labelled, VideoViews, list_unlabelled
from fused.io.atomic_write import atomic_write
from fused.io.checkpoint_file import SAFETENSORS, save_checkpoint
from fused.models.videomamba.classify import check_fits, preprocessing_of
from fused.models.videomamba.model import VideoMamba, VideoMambaEncoder
from fused.rules import COUNT, invalid
from fused.terminal import Terminal
from fused.train.data.batches import BadFile, batches
from fused.train.parallel import World
from fused.train.prefetch import Prefetcher

SUFFIXES = (SAFETENSORS, ".npy")


@dataclass(frozen=True)
class Features:
    """Features with names: the path of a video, and with windows `#` and the window's number from 0."""

    names: list[str]
    values: list[Tensor]  # float32 on the CPU: (D,), or tokens (L, D), of each name
    bad_files: list[BadFile]  # the files that gave no clip

    def save(self, path: str | Path) -> Path:
        """Write the features atomically, and return the path.

        `.safetensors` has a tensor for each name. `.npy` has an array (N, D) or (N, L, D), and beside it `PATH.json` has the
        list of names. Raises ValueError for another suffix and where there are no features, OSError for a full disk.
        """
        path = check_suffix(path)
        if not self.names:
            raise ValueError(f"there are no features for {path}: none of {len(self.bad_files)} files could be read")
        if path.suffix == SAFETENSORS:
            return save_checkpoint(dict(zip(self.names, self.values, strict=True)), path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as draft, open(draft, "wb") as file:
            np.save(file, torch.stack(self.values).numpy())
        with atomic_write(path.with_name(path.name + ".json")) as draft:
            draft.write_text(json.dumps(self.names, indent=0) + "\n", encoding="utf-8")
        return path


def extract(
    model: VideoMamba | VideoMambaEncoder, data: str | Path, settings: Settings | None = None, *, tokens: bool = False,
    chunk_frames: int | None = None, world: World | None = None, terminal: Terminal | None = None,
) -> Features:  # fmt: skip
    """Return the features of the videos of a folder or list, in the order of their paths. Classes are not looked at.

    The vector of a classifier is what its head reads, that of an encoder its pooled output, or its CLS token if it has none. It
    is the mean over the views of a video, or of each window with `settings.window`. With `tokens` it is all normed tokens of
    the one view, CLS first. With `chunk_frames` the model runs in the memory of so many frames (`forward_chunked`), for
    clips of hundreds of frames. Of the settings those of labels are not used. All features are in host memory. Every process of
    `world` calls this function with its model on the world's device, and gets the features of all.

    With `terminal`, of the main process, the progress is printed, and every file that gives no clip.

    Raises ValueError for settings that do not fit the model, for `tokens` of several views, and for data without videos;
    BackendError for a backend that cannot run on the device; NotFinite, which names the video.
    """
    settings = settings or Settings()
    check_can_run(model.requested_backend, world.device if world is not None else model.cls_token.device)
    COUNT.optional().check("chunk_frames", chunk_frames)
    views = settings.chosen_views()
    each = views.clips * views.crops
    if tokens and each > 1:
        raise invalid("tokens", True, f"False with {each} views, whose tokens have no common place")
    preprocessing = replace(preprocessing_of(model), **settings.preprocessing())
    check_fits(preprocessing, model.config)
    views.check(preprocessing)
    videos = list_unlabelled(data, preprocessing.frames is None, **settings.listing())
    dataset = VideoViews(videos, preprocessing, views, settings.frame_pattern)
    world, training = world or World(model.cls_token.device), model.training
    together = 1 if views.windows else max(1, settings.batch_size // each)
    every = batches(
        dataset, together, epoch=0, seed=0, workers=settings.workers, rank=world.rank, world=world.size, shuffle=False,
        drop_last=False,
    )  # fmt: skip
    found: list[tuple[int, Tensor]] = []
    bad_files: list[BadFile] = []
    progress = Progress(terminal, len(videos), 0) if terminal is not None else None
    model.eval()
    try:
        for batch in Prefetcher(iter(every), world.device):
            bad_files += batch.bad_files
            for index, clips in zip(batch.indices.tolist(), batch.clips, strict=True):
                parts = [_forward(model, part, settings, tokens, chunk_frames) for part in clips.split(settings.batch_size)]
                found.append((index, torch.cat(parts).unflatten(0, (-1, each)).mean(dim=1)))
                if not found[-1][1].isfinite().all():
                    wrong = f"{videos[index].path}: its features are not finite in {settings.precision}"
                    raise NotFinite(f"{wrong}; allowed: other weights, or precision=float32")
            step = world.all_gather((len(batch.indices), batch.bad_files))
            if progress is not None:
                bad = [{"error": file.sentence} for _, of_rank in step for file in of_rank]
                progress.add([{}] * sum(count for count, _ in step) + bad)
    finally:
        model.train(training)
        if terminal is not None:
            terminal.end_line()
    features = Features([], [], [])
    gathered = world.all_gather((found, bad_files))
    for index, values in sorted((item for of_rank, _ in gathered for item in of_rank), key=lambda item: item[0]):
        features.names.extend(_names(videos[index], len(values), views.windows is not None))
        features.values.extend(values.unbind())
    features.bad_files.extend(sorted(file for _, of_rank in gathered for file in of_rank))
    return features


def check_suffix(path: str | Path) -> Path:
    """Return the path of a file of features. Raise ValueError for a folder, and for a suffix that is none of SUFFIXES."""
    if Path(path).suffix not in SUFFIXES or Path(path).is_dir():
        raise invalid("out", str(path), "a file that ends with " + " or ".join(SUFFIXES))
    return Path(path)


@torch.no_grad()
def _forward(
    model: VideoMamba | VideoMambaEncoder, clips: Tensor, settings: Settings, tokens: bool, chunk_frames: int | None
) -> Tensor:
    """Return the vectors (B, D) or tokens (B, L, D) of clips (B, C, T, H, W), float32 on the CPU."""
    clips, precision = clips.to(model.cls_token.dtype), getattr(torch, settings.precision)
    with nullcontext() if precision == torch.float32 else torch.autocast(clips.device.type, precision):
        if isinstance(model, VideoMambaEncoder) and model.config.add_pool_norm and not tokens:
            pooled = (model.forward_chunked(clips, chunk_frames=chunk_frames) if chunk_frames else model(clips)).pooled
            assert pooled is not None
            return pooled.flatten(1).float().cpu()
        if chunk_frames:
            out = run_layers(model, clips, chunk_frames, None, None, False)
            normed = model.apply_final_norm(out.hidden, out.residual, out.backend, chunks=out.chunks)
        else:
            normed = model.encode(model.embed(clips))[0]
        if tokens:
            return normed.float().cpu()
        if isinstance(model, VideoMambaEncoder) or model.config.readout == "tokens":
            return normed[:, 0].float().cpu()
        return model.read_tokens(normed, 1, None)[0].float().cpu()


def _names(video: Labelled, count: int, windows: bool) -> Sequence[str]:
    """Return the names of a video's features."""
    return [f"{video.path}#{i}" for i in range(count)] if windows else [str(video.path)]
