"""Which caption fits? Forty of them, "a seven moves left", and digits that move; the held-out clips show other digits.

A digit moves by half a patch from a frame to the next, on a torus. A tubelet is two frames: it begins at the grid of patches,
so that its first frame shows what moves, and its second one whither. Answers are the nearest of forty candidates, of a text
among videos and of a video among texts, by cosines; a training of MATCHED_FROM steps or more has to know them by matching too.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fused
from fused.models.retrieval.ranking import cosines, ranks
from fused.train import (
    contrastive_loss,
    matching_loss,
    matching_pairs,
    parameter_groups,
    setup_seed,
)
from harness.learning import digits, motion
from harness.learning.fit import WEIGHT_DECAY, Evaluation, Fitted, take_steps
from harness.learning.task import Batch, Data, Recipe, Task

NAMES = "zero one two three four five six seven eight nine".split()
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "moves", *NAMES, *motion.DIRECTIONS]
CAPTIONS = [f"a {name} moves {way}" for name in NAMES for way in motion.DIRECTIONS]
SIDE, FRAMES, SPEED, PATCH = 12, 4, 2, 4
SETS = 5  # of held-out clips, one for each caption
MATCHED_FROM = 500  # steps
BERT: dict[str, Any] = {
    "vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 8, "fusion_layer": 1, "embed_dim": 32, "dropout": 0.0, "mlm": False,
}  # fmt: skip


def clips(pixels: Tensor, labels: Tensor, generator: torch.Generator, captions: Tensor) -> Tensor:
    """Return clips (B, 1, FRAMES, SIDE, SIDE) that fit captions (B,), of digits drawn from `pixels` (any, 8, 8) in 0..1."""
    count = len(captions)
    of_digit = [(labels == digit).nonzero().flatten() for digit in range(len(NAMES))]
    drawn = torch.rand(count, generator=generator).tolist()
    digit = (captions // len(motion.DIRECTIONS)).tolist()
    chosen = [int(of_digit[d][int(x * len(of_digit[d]))]) for d, x in zip(digit, drawn, strict=True)]
    ways = torch.tensor(list(motion.DIRECTIONS.values()))[captions % len(motion.DIRECTIONS)]
    start = PATCH * torch.randint(SIDE // PATCH, (count, 1, 2), generator=generator)
    corner = start + torch.arange(FRAMES)[:, None] * SPEED * ways[:, None]
    rows, columns = ((corner[..., None] + torch.arange(8)) % SIDE).unbind(dim=2)  # each (count, FRAMES, 8)
    each, frame = torch.arange(count)[:, None, None, None], torch.arange(FRAMES)[:, None, None]
    shown = torch.zeros(count, FRAMES, SIDE, SIDE)
    shown[each, frame, rows[..., :, None], columns[..., None, :]] = pixels[chosen][:, None]
    return ((shown - motion.MEAN) / motion.STD)[:, None]


def texts(captions: Tensor) -> Tensor:
    """Return the words (B, 6) of captions (B,): [CLS], a, the digit, moves, the direction, [SEP]."""
    words = [[2, *(WORDS.index(word) for word in CAPTIONS[i].split()), 3] for i in captions.tolist()]
    return torch.tensor(words)


def data() -> Data:
    """Return clips of the digits that `digits` trains on, and SETS of clips, one a caption, of those that it holds out."""
    images, classes = digits.images()
    (seen, others), (known, answers) = digits.split(images), digits.split(classes)

    def draw(generator: torch.Generator, count: int) -> Batch:
        captions = torch.randint(len(CAPTIONS), (count,), generator=generator)
        return clips(seen, known, generator, captions), captions

    every = torch.arange(len(CAPTIONS)).repeat(SETS)
    return Data(draw, (clips(others, answers, torch.Generator().manual_seed(0), every), every))


def fit(
    task: Task, data: Data, build: Callable[[dict[str, Any]], Any], recipe: Recipe, seed: int, device: str,
    tell: Callable[[Evaluation], None] = lambda evaluation: None,
) -> Fitted:  # fmt: skip
    """Train a `VideoTextRetrieval` on the backend of `build(task.config)`, a VideoMamba of `fused`, as `fit.fit` does."""
    setup_seed(seed)
    backend = build(task.config).requested_backend
    model = fused.VideoTextRetrieval(fused.RetrievalConfig(fused.VideoMambaConfig(**task.config), **BERT), backend).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe.lr, WEIGHT_DECAY, rule="corrected"), betas=(0.9, 0.95))

    def loss(generator: torch.Generator) -> Tensor:
        return batch_loss(model.train(), *data.draw(generator, recipe.batch), generator, device)

    def wrong() -> int:
        return count_wrong(model, data.held_out[0].to(device), recipe.steps >= MATCHED_FROM)

    fitted = Fitted(model, len(data.held_out[1]))
    take_steps(fitted, optimizer, recipe.steps, seed, loss, wrong, tell)
    return fitted


def batch_loss(model: Any, videos: Tensor, captions: Tensor, generator: torch.Generator, device: str) -> Tensor:
    """Return the sum of contrast and matching for clips (B, 1, T, S, S) and the numbers of their captions (B,)."""
    model.clamp_temperature()
    words = texts(captions).to(device)
    visible, ids = torch.ones_like(words, dtype=torch.bool), captions.to(device)
    output = model(videos.to(device), words, visible)
    pairs = matching_pairs(output.similarity, ids, generator)
    matched = model.match(output.tokens[pairs.videos], output.text[pairs.texts], visible[pairs.texts])
    return contrastive_loss(output.similarity, ids) + matching_loss(matched)


@torch.no_grad()
def count_wrong(model: Any, videos: Tensor, by_matching: bool) -> int:
    """Return how many of the clips are wrong, the mean of both directions, rounded up; the worse of both ways to rank.

    `videos` are SETS of one clip a caption. A model that gives NaN gives no answer.
    """
    model.eval()
    words = texts(torch.arange(len(CAPTIONS))).to(videos.device)
    visible, right = torch.ones_like(words, dtype=torch.bool), torch.eye(len(CAPTIONS), dtype=torch.bool)
    text, wrong = model.encode_text(words, visible), [0, 0]
    for clips_of_set in videos.split(len(CAPTIONS)):
        output = model.encode_video(clips_of_set)
        scores = [cosines(model.vision_proj(output.pooled), model.text_proj(text[:, 0]))]
        if by_matching:
            scores.append(torch.stack([model.match(tokens[None], text, visible)[:, 1] for tokens in output.tokens]))
        for way, found in enumerate(scores):
            found = found.float().cpu().nan_to_num(nan=0.0)
            wrong[way] += int((ranks(found, right) > 0).sum() + (ranks(found.T.contiguous(), right) > 0).sum())
    return -(-max(wrong) // 2)


TASK = Task(
    "retrieval",
    "captions of moving digits, one of forty",
    {"img_size": SIDE, "patch_size": PATCH, "channels": 1, "num_frames": FRAMES, "kernel_size": 2,
     "num_classes": len(CAPTIONS), "embed_dim": 32, "depth": 1, "drop_path_rate": 0.0, "clip_return_layer": 0,
     "ssm_cfg": {"d_state": 8}},
    data,
    full=Recipe(steps=800, batch=64, lr=1e-2, bar=0.6),
    short=Recipe(steps=220, batch=64, lr=1.2e-2, bar=0.6),
    fit=fit,
)  # fmt: skip
