"""Search in videos by text: cosines with all, then the matching head's answer for the nearest."""

from pathlib import Path
from typing import NamedTuple

import torch

from fused.evaluate.retrieval_settings import RetrievalSettings
from fused.evaluate.run import Progress
from fused.evaluate.video_text import Engine
from fused.evaluate.videos import list_unlabelled
from fused.models.retrieval.model import VideoTextRetrieval
from fused.rules import COUNT
from fused.terminal import Terminal
from fused.train.data.batches import BadFile, UnreadableFiles
from fused.train.parallel import World, choose_device

FEATURES = ".fused-search"  # the folder of the features, beside the videos


class Found(NamedTuple):
    """A video that was found."""

    video: str
    cosine: float
    match: float | None  # the matching head's logit; None where it was not asked


def search(
    model: VideoTextRetrieval | str | Path, videos: str | Path, text: str, top: int = 5, *,
    settings: RetrievalSettings | None = None, features: str | Path | None = None, terminal: Terminal | None = None,
) -> list[Found]:  # fmt: skip
    """Return the `top` videos of a folder or list that are nearest to a text, the nearest first.

    The settings' `rerank` best by cosine are ranked by the matching head. Features of videos are made once, and kept in the
    folder `features`: without it in .fused-search in the folder of the videos or of the list. With `terminal` the progress is
    printed, and every file that cannot be read.

    Raises ValueError for a folder without videos, a text without words, and a folder that cannot be written to;
    UnreadableFiles if no video can be read; what loading the model raises.
    """
    settings = settings or RetrievalSettings()
    COUNT.check("top", top)
    root = Path(videos)
    paths = [video.path for video in list_unlabelled(root, False, None, settings.prefix, None, "videos")]
    if isinstance(model, str | Path):
        device = choose_device(settings.device)
        model = VideoTextRetrieval.from_pretrained(model, **settings.model_fields()).to(device)
    folder = Path(features) if features is not None else (root if root.is_dir() else root.parent) / FEATURES
    engine = Engine(model, settings, folder, World(model.device))
    if not bool((engine.tokenizer([text], engine.text_length).ids > engine.tokenizer.mask).any()):
        raise ValueError(f"text is {text!r}, of which the vocabulary has no word; allowed: words of {engine.tokenizer.path}")
    bad: list[BadFile] = []
    had = len([path for path in paths if engine.store.has(path)])
    progress = Progress(terminal, len(paths), had) if terminal is not None else None
    for done, unread in engine.encode_videos(paths):
        bad += unread
        if progress is not None:
            progress.add([{"video": str(video)} for video in done] + [{"error": file.sentence} for file in unread])
    left_out = {Path(file.path) for file in bad}
    readable = [path for path in paths if path not in left_out]
    if not readable:
        raise UnreadableFiles(f"none of {len(paths)} videos can be read: {bad[0].sentence}")
    words = engine.encode_texts([text])
    cosines = engine.cosines(readable, words)[:, 0]
    order = cosines.argsort(descending=True, stable=True).tolist()
    only = torch.zeros(1, dtype=torch.long)
    matches = {i: float(engine.match(readable[i], words, only)[0, 1]) for i in order[: settings.rerank]}
    best = sorted(matches, key=lambda i: -matches[i]) + order[settings.rerank :]
    return [Found(str(readable[i]), float(cosines[i]), matches.get(i)) for i in best[:top]]
