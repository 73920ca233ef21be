"""Video-text retrieval: both halves of BERT, the losses, the gather of features over processes, the ranks and their summary."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from harness.fixtures import functional_modules as modules
from harness.judge.case import Case
from harness.subjects.retrieval.sides import SPACE, VOCABULARY, Reference, Side
from harness.subjects.retrieval.sides import implementations as implementations
from harness.subjects.retrieval.timing import bound as bound
from harness.subjects.retrieval.timing import licence as licence
from harness.subjects.retrieval.timing import races as races

CANDIDATES = 40  # of the cases of ranks: shares of 40 are percentages of two digits
FRAMES = 3
MODULES = ("text", "fusion", "shared", "losses")  # options of cases with parameters


def shape(B: int, L: int, V: int, C: int, D: int) -> dict[str, int]:
    """Return the sizes of a case: B pairs of L words and V video tokens, of widths C and D."""
    return {"B": B, "L": L, "V": V, "C": C, "D": D}


def cases(grid: str) -> list[Case]:
    """Return both modes with padding, one video for all texts, the losses, the gather, and the ranks of scores with ties."""
    small, wide = shape(5, 7, 9, 32, 24), shape(3, 20, 49, 128, 96)
    names = (*MODULES, "gathered", "ranks")
    every: list[tuple[dict[str, int], tuple[str, ...]]] = [(small, (name,)) for name in names]
    if grid == "smoke":
        return modules.in_precisions(every, "retrieval", half=False)
    return modules.in_precisions([*every, *((wide, (name,)) for name in MODULES)], "retrieval", half=True)


def build(call: Callable[..., Any], case: Case) -> nn.Module:
    """Return the model of a case without its video encoder."""
    return call(case)


def draw(case: Case, seed: int) -> dict[str, Tensor]:
    """Draw video tokens and pooled frames, and a trained model's parameters; scores, or features, for what has no module."""
    B, L, V, C, D = (size for _, size in case.dims)
    if case.has("ranks"):
        return {"scores": case.normal(seed, "scores", CANDIDATES, CANDIDATES)}
    if case.has("gathered"):
        return {"features": case.normal(seed, "features", B, C)}
    module = modules.on_meta(build, implementations()[0].call, case)
    leaves = modules.parameters(module, case, seed) | {"temp": torch.tensor(0.5, dtype=torch.float64)}
    if not case.has("text"):
        leaves["video"] = case.normal(seed, "video", 1 if case.has("shared") else B, V, D)
    if case.has("losses"):
        leaves["pooled"] = case.normal(seed, "pooled", B, FRAMES, D)
        leaves |= {name: case.normal(seed, name, B, V, SPACE) for name in ("student", "teacher")}
    return leaves


def precise(case: Case) -> set[str]:
    """Return those of `functional_modules.precise`."""
    inputs = {"video", "pooled", "student", "teacher"}
    if not case.has(*MODULES):
        return set() if case.has("cast") else {"features"}
    return modules.precise(case, modules.on_meta(build, implementations()[0].call, case), inputs, set())


def no_cotangent(case: Case) -> set[str]:
    """Return nothing: an output that has no gradient gets no cotangent."""
    return set()


def output_values(case: Case) -> int:
    """Return the values of a text, the logits of matching, or 1: a loss."""
    return 2 * case["B"] if case.has("fusion", "shared") else case["L"] * case["C"] if case.has("text", "gathered") else 1


def steps(case: Case) -> float:
    """Return the time of the truth in that of a scan's step: there is no scan."""
    return 100.0


def sentences(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return words (B, L) with padding at the end of all but the first, what is no padding, and ids of which two are equal."""
    B, L = case["B"], case["L"]
    ids = torch.randint(5, VOCABULARY, (B, L), generator=case.generator(0, "words"))
    visible = torch.arange(L) < (L - torch.arange(B) % (L // 2))[:, None]
    same = torch.arange(B)
    same[-1] = 0
    return ids.masked_fill(~visible, 0).to(device), visible.to(device), same.to(device)


def evaluate(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what the case's option names: features of words that are no padding, logits, losses, numbers of an evaluation."""
    side: Any = call
    # a key's bias changes all scores of a query alike, which softmax does not see: its slope is 0 and a rounding is found
    leaves = leaves | {k: v.detach() for k, v in leaves.items() if k.endswith(".key.bias")}
    with modules.precision(case, leaves):
        if case.has("gathered"):
            gathered = side.gather(leaves["features"])
            return {"gathered": gathered, "similarity": gathered @ gathered.T}
        if case.has("ranks"):
            scores = (2 * leaves["scores"].detach()).round() / 2
            right = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
            right[:, 0] |= right[:, -1]  # the last text has two right videos
            found = side.ranks(scores, scores.T.contiguous(), right)
            drawn = side.positives_drawn(leaves["scores"], torch.arange(len(scores), device=scores.device) // 2)
            return {"text to video": found[0], "video to text": found[1], "positives": drawn}
        module, device = modules.on_meta(build, call, case), leaves["temp"].device
        words, visible, same = sentences(case, device)

        def run(model: Any) -> dict[str, Tensor]:
            return _run(model, side, case, leaves, words, visible, same)

        return modules.call(module, leaves, run)


def _run(
    model: Any, side: Side, case: Case, leaves: dict[str, Tensor], words: Tensor, visible: Tensor, same: Tensor
) -> dict[str, Tensor]:
    """Return the outputs of a case with a module."""
    text = model.text_encoder.text(words, visible)
    if case.has("text"):
        return {"text": text * visible[..., None]}
    video = leaves["video"]
    if case.has("shared"):
        if isinstance(side, Reference) or side.whole:  # every pair by itself
            rows = [model.text_encoder.text(words[i : i + 1], visible[i : i + 1]) for i in range(len(words))]
            return {"match": torch.cat([model.match(video, row, visible[i : i + 1]) for i, row in enumerate(rows)])}
        return {"match": model.match(video, text, visible)}
    predicted = model.predict_words(video, words, visible)
    if case.has("fusion"):
        return {"match": model.match(video, text, visible), "words": predicted * visible[..., None]}
    similarity = model.similarity(leaves["pooled"], text)
    pairs = torch.arange(3 * len(words), device=words.device) % len(words)
    turned = torch.cat((pairs[: len(words)], pairs[1 : 2 * len(words) + 1]))  # the right pairs, then others
    matched = model.match(video[pairs], text[turned], visible[turned])
    labels = torch.where(visible & (torch.arange(words.shape[1], device=words.device) % 2 == 1), words, -100)
    found = side.losses(similarity, same, matched, predicted, labels)
    return found | {"similarity": similarity, "uta": side.align(leaves["student"], leaves["teacher"])[None]}
