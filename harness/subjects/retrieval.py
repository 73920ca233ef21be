"""Video-text retrieval: both halves of BERT, the losses, the gather of features over processes, the ranks and their summary."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import fused
from fused.models.retrieval import model as retrieval_model
from fused.models.retrieval import ranking
from fused.modules import mamba
from fused.train import gather
from fused.train.objectives import losses
from harness.fixtures import functional_modules as modules
from harness.judge.case import Case
from harness.judge.implementation import Implementation
from harness.judge.race import Race, timed_precision
from harness.records.ceilings import Ceilings, element_bytes
from harness.records.speed import Entry, Point
from reference.models import retrieval as reference

VOCABULARY, FRAMES, SPACE, LAYERS, FUSION = 50, 3, 16, 4, 2
CANDIDATES = 40  # of the cases of ranks: shares of 40 are percentages of two digits
DRAWS = 20  # of hard negatives
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


class OneProcess:
    """A stand-in for torch.distributed, as far as the gather asks it, of a group of one process."""

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def get_world_size() -> int:
        return 1

    @staticmethod
    def get_rank() -> int:
        return 0

    @staticmethod
    def all_gather(parts: list[Tensor], x: Tensor) -> None:
        parts[0].copy_(x)


@dataclass(frozen=True)
class Side:
    """A package's model and functions; calling it makes the model of a case."""

    make: Callable[[Case], nn.Module]
    whole: bool = False  # whether the half of BERT that sees words only is run again for every pair

    def __call__(self, case: Case) -> nn.Module:
        return self.make(case)

    def ranks(self, by_text: Tensor, by_video: Tensor, right: Tensor) -> list[Tensor]:
        """Return R@1, R@5, R@10 and the median rank, of texts among videos and of videos among texts."""
        return [
            torch.tensor([numbers[key] for key in ("r1", "r5", "r10", "median_rank")])
            for numbers in ranking.both_directions(by_text, by_video, right)
        ]

    def losses(self, similarity: Tensor, ids: Tensor, matched: Tensor, words: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the losses of contrast, matching and masked words."""
        return {
            "vtc": losses.contrastive_loss(similarity, ids)[None], "vtm": losses.matching_loss(matched)[None],
            "mlm": losses.masked_language_loss(words, labels)[None],
        }  # fmt: skip

    def positives_drawn(self, similarity: Tensor, ids: Tensor) -> Tensor:
        """Return the number of negatives that are right answers, in DRAWS draws, float32 (1,)."""
        generator = torch.Generator().manual_seed(0)
        pairs = [losses.matching_pairs(similarity, ids, generator) for _ in range(DRAWS)]
        wrong = sum(int((ids[p.videos] == ids[p.texts]).sum()) - len(ids) for p in pairs)
        return torch.tensor([float(wrong)], device=ids.device)

    def align(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the alignment with a teacher."""
        return losses.alignment_loss(student, teacher)

    def gather(self, x: Tensor) -> Tensor:
        """Return the rows of all processes, here of one."""
        with mock.patch.object(gather, "dist", OneProcess):
            return gather.gather(x)


@dataclass(frozen=True)
class Reference(Side):
    """The reference, whose functions are the plain ones."""

    def ranks(self, by_text: Tensor, by_video: Tensor, right: Tensor) -> list[Tensor]:
        found = [reference.ranks(by_text, right), reference.ranks(by_video, right.T)]
        median = [torch.quantile(r.double() + 1, 0.5)[None] for r in found]
        return [torch.cat((reference.recalls(r).double(), m)).float() for r, m in zip(found, median, strict=True)]

    def losses(self, similarity: Tensor, ids: Tensor, matched: Tensor, words: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {
            "vtc": reference.contrastive_loss(similarity, ids)[None], "vtm": reference.matching_loss(matched)[None],
            "mlm": reference.masked_language_loss(words, labels)[None],
        }  # fmt: skip

    def positives_drawn(self, similarity: Tensor, ids: Tensor) -> Tensor:
        weights = reference.negative_weights(similarity, ids)
        return weights[ids[:, None] == ids].sum()[None].float().detach()

    def align(self, student: Tensor, teacher: Tensor) -> Tensor:
        return reference.alignment_loss(student, teacher)

    def gather(self, x: Tensor) -> Tensor:
        return x


@functools.lru_cache(maxsize=1)
def implementations() -> list[Implementation]:
    """Return the reference, `fused`, and what the race runs against it: all layers of BERT for every pair."""
    ours = Implementation("fused:torch", Side(_fused), False, "torch", mamba.BACKENDS)
    return [Implementation("reference", Reference(_reference)), ours, Rival("whole-bert", Side(_fused, whole=True), True)]


@dataclass(frozen=True)
class Rival(Implementation):
    """The rival of the race, which is asked what licenses it, no more."""

    def missing(self, case: Case) -> str | None:
        return None if case.has("shared") else "all layers a pair is asked the licence's cases only"


def _fields(case: Case) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "hidden_size": case["C"], "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "intermediate_size": 2 * case["C"], "max_position_embeddings": case["L"] + 2, "fusion_layer": FUSION,
        "embed_dim": SPACE,
    }  # fmt: skip


def _fused(case: Case) -> nn.Module:
    video = fused.VideoMambaConfig(embed_dim=case["D"], depth=1)
    return retrieval_model.VideoTextHeads(fused.RetrievalConfig(video, **_fields(case), dropout=0.0))


def _reference(case: Case) -> nn.Module:
    return reference.VideoTextHeads(reference.RetrievalConfig(**_fields(case), video_width=case["D"]))


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


def races() -> list[Race]:
    """Return the race: of B videos and M texts of L words, the best K candidates of either side are matched."""

    def points(grid: str) -> list[Point]:
        small = {"B": 8, "M": 8, "K": 4, "L": 8, "V": 16, "C": 64, "D": 32}
        full = {"B": 1000, "M": 1000, "K": 128, "L": 32, "V": 1568, "C": 768, "D": 576}
        sizes = {"cpu": [small], "full": [full | {"B": 100, "M": 100}, full]}.get(grid, [])
        dtype = "float32" if grid == "cpu" else "bfloat16"
        return [Point("retrieval", tuple(size.items()), "infer", dtype=dtype) for size in sizes]

    def runs(entry: Entry, point: Point, grid: str) -> bool:
        return True

    # all layers for 134,000 pairs are some 2e15 operations: tens of seconds on a GPU that reaches a tenth of its peak
    contenders, maker = (("retrieval", ""),), "harness.bench.retrieval:make"
    return [Race("retrieval", order=9, points=points, contenders=contenders, runs=runs, maker=maker, slowest=60.0)]


def licence(dtype: str) -> tuple[str, ...]:
    """Return one video with all texts."""
    return (f"B5-L7-V9-*-shared-{timed_precision(dtype)}",)


def bound(point: Point, variant: str, ceilings: Ceilings) -> float:
    """Return the least seconds: the products of the texts' layers once, of the videos' keys and values once, of three layers a
    pair; and the videos read once.

    Pairs are the fewest that there can be: the best K of every video, or of every text."""
    N, M, K, L, V, C, D = (point[letter] for letter in "BMKLVCD")
    pairs = max(N * min(K, M), M * min(K, N))
    words = 12 * C * C  # of a layer: attention and an MLP of four times the width
    layer = L * (words + 2 * C * C) + 2 * L * (V + L) * C
    layers, fusion = (12, 3) if C == 768 else (LAYERS, LAYERS - FUSION)
    products = 2.0 * ((layers - fusion) * M * L * words + fusion * (N * V * 2 * C * D + pairs * layer))
    return products / ceilings.matmul + N * V * D * element_bytes(point.dtype) / ceilings.copy
