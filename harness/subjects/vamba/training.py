"""The training of a Vamba that the check `convergence` asks for: captions of clips, four packed into a row."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.fixtures import functional_modules as modules
from harness.judge.case import Case
from reference.ops.dtypes import accumulation_dtype

VOCABULARY = 31
PATCH = 16  # pixels of a side, of a token


def special_cases(check: str, grid: str) -> list[Case]:
    """Return the training of the check `convergence`: four clips of a batch are packed into one row."""
    if check != "convergence":
        return []
    shape = {"B": 12, "T": 2, "S": 32, "L": 5, "V": 8, "D": 32, "H": 4, "G": 2}
    options = "layers=2", "video", "steps=30", "for=convergence"
    found = modules.in_precisions([(shape, options)], "vamba", half=False)
    return found[:1] if grid == "smoke" else found


def training_title() -> str:
    """Return the task in a few words, for plots."""
    return "packed captions"


def learning_rate() -> float:
    """Return the rate of SGD with momentum."""
    return 0.01


def training_target(call: Callable[..., Any], case: Case, clip: Tensor) -> Tensor:
    """Return a caption of every clip, int64 (B, L): random tokens, of which the first is the same for all."""
    captions = torch.randint(1, VOCABULARY, (case["B"], case["L"]), generator=case.generator(0, "captions"))
    captions[:, 0] = 0
    return captions


def training_losses(model: nn.Module, case: Case, clip: Tensor, rows: list[int], target: Tensor) -> Tensor:
    """Return the loss of every caption, all clips and captions packed into one row of video and one of text."""
    count, L = target.shape
    patches = clip.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH)).permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)
    project = case.generator(0, "patches")
    weight = torch.randn(patches.shape[2], case["D"], generator=project, dtype=torch.float64) / patches.shape[2] ** 0.5
    video = patches.flatten(0, 1)[None] @ weight.to(clip)
    positions = torch.arange(L, device=clip.device).repeat(count).expand(3, 1, -1)
    with modules.precision(case, {"clip": clip}):
        lengths = [[patches.shape[1]] * count]
        out = model(target.reshape(1, -1), video=video, position_ids=positions, encoder_seq_lens=lengths)
    logits = out.logits.unflatten(1, (count, L))[0, :, :-1]
    loss = F.cross_entropy(logits.to(accumulation_dtype(logits.dtype)).flatten(0, 1), target[:, 1:].flatten(), reduction="none")
    return loss.view(count, -1).mean(1)
