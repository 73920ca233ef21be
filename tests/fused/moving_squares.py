"""A folder of small videos with captions: a white bar that moves to the left or to the right, on three colours."""

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from retrieval_models import WORDS, vocabulary

from harness.fixtures.video import write

COLOURS = {"six": (200, 0, 0), "seven": (0, 200, 0), "black": (0, 0, 200)}
WAYS = "left", "right"
CAPTIONS = [f"a {name} moves {way}" for name in COLOURS for way in WAYS]


def square(path: Path, name: str, way: str, row: int = 0, frames: int = 4) -> Path:
    """Write a video of 32 x 32 pixels with a bar of 8 x 16, which moves by 4 after two frames, within a patch of 16 x 16."""
    images = torch.tensor(COLOURS[name], dtype=torch.uint8).repeat(frames, 32, 32, 1)
    for t in range(frames):
        column = 4 if t < 2 else 8 * (way == "right")
        images[t, row : row + 16, column : column + 8] = 255
    return write(path, images)


def folder(root: Path, each: int = 1, captions: Sequence[str] = CAPTIONS) -> Path:
    """Write `each` videos for each caption, captions.csv and a vocabulary; return the path of captions.csv."""
    root.mkdir(parents=True)
    rows = []
    for i in range(each):
        for j, caption in enumerate(captions):
            _, name, _, way = caption.split()
            rows.append((square(root / f"{i}{j}.avi", name, way, 16 * (i % 2)).name, caption))
    with open(root / "captions.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "caption"), *rows])
    vocabulary(root, WORDS)
    return root / "captions.csv"


SMALL = (
    "task=retrieval data.frames=2 data.size=32 data.workers=0 data.scale=[1,1] data.flip=0 model.depth=1 model.embed_dim=32 "
    "optim.lr=3e-3 log_every=1 deterministic=true device=cpu text.length=8 text.ids=caption text.bert.hidden_size=32 "
    "text.bert.num_hidden_layers=2 text.bert.num_attention_heads=2 text.bert.intermediate_size=32 text.bert.fusion_layer=1 "
    "text.bert.max_position_embeddings=8 text.bert.embed_dim=16 text.bert.dropout=0"
).split()
"""Words of a small training of captions.csv and words.txt, without steps, batch_size, out, data.train and text.vocabulary."""


def words(captions: Path, out: Path, *more: str) -> list[str]:
    """Return the words of a small training."""
    return [*SMALL, f"data.train={captions}", f"text.vocabulary={captions.parent / 'words.txt'}", f"out={out}", *more]
