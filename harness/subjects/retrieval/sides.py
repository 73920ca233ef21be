"""The sides of a comparison of video-text retrieval: the model and the functions of the reference, and those of `fused`."""

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
from harness.judge.case import Case
from harness.judge.implementation import Implementation
from reference.models import retrieval as reference

VOCABULARY, SPACE, LAYERS, FUSION = 50, 16, 4, 2
DRAWS = 20  # of hard negatives


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
