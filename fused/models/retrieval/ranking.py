"""Scores of videos and texts: cosines, the matching head's answer for the best candidates, and the ranks that follow.

A score matrix is (N, M): row i holds the scores of query i with all M candidates. Among equal scores the candidate of the
higher number is ranked first, as upstream's evaluation does: a constant score is right by chance only.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fused.runtime.autocast import no_autocast
from fused.runtime.dtypes import accumulation_dtype

OUTSIDE = -100.0  # the matching score of a candidate that was not among the best by cosine
RECALLS = (1, 5, 10)


def cosines(video: Float[Tensor, "B T E"], text: Float[Tensor, "N E"]) -> Float[Tensor, "B N"]:
    """Return the mean over T frames of the cosines of videos and texts, in at least float32."""
    with no_autocast(video.device):
        video, text = (F.normalize(x.to(accumulation_dtype(x.dtype)), dim=-1) for x in (video, text))
        return video.mean(dim=1) @ text.T  # the product with the mean of unit vectors is the mean of the cosines


def dual_softmax(similarities: Float[Tensor, "N M"], temperature: float) -> Float[Tensor, "N M"]:
    """Return similarities weighted by how likely the query is for each candidate: s * softmax(s / temperature) over queries.

    It makes a candidate that is near to every query count less (arXiv 2109.04290). It looks at all queries at once.
    """
    return similarities * (similarities / temperature).softmax(dim=0)


def best_candidates(similarities: Float[Tensor, "N M"], count: int) -> Int[Tensor, "N k"]:
    """Return the numbers of the `count` candidates of each query with the highest similarity; of all if there are fewer."""
    return similarities.topk(min(count, similarities.shape[1]), dim=1).indices


def ranks(scores: Float[Tensor, "N M"], right: Bool[Tensor, "N M"]) -> Int[Tensor, " N"]:
    """Return for every query the rank, from 0, of the best of its right candidates.

    Raises ValueError for a query without a right candidate and for scores that are not finite.
    """
    if scores.shape != right.shape or not bool(right.any(dim=1).all()):
        allowed = f"{tuple(scores.shape)} like scores, with one or more in every row"
        raise ValueError(f"right is {tuple(right.shape)}; allowed: {allowed}")
    if not bool(scores.isfinite().all()):
        raise ValueError("scores are not finite; allowed: numbers, of which ranks can be made")
    order = scores.flip(1).argsort(dim=1, descending=True, stable=True)
    return right.flip(1).gather(1, order).int().argmax(dim=1)


def recalls(ranks: Int[Tensor, " N"], most: Sequence[int] = RECALLS) -> Float[Tensor, " K"]:
    """Return the share of queries, in percent, whose rank is below each of `most`: R@1, R@5, R@10."""
    return torch.stack([100 * (ranks < k).double().mean() for k in most])


def both_directions(
    by_text: Float[Tensor, "M N"], by_video: Float[Tensor, "N M"], right: Bool[Tensor, "M N"], lost: int = 0
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the `summary` of text to video, and that of video to text with `lost` videos.

    `by_text` are the scores of M texts with N videos, `by_video` those of the videos with the texts; `right` says which fit.
    """
    return summary(by_text, right), summary(by_video, right.T, lost)


def summary(scores: Float[Tensor, "N M"], right: Bool[Tensor, "N M"], lost: int = 0) -> dict[str, float]:
    """Return r1, r5, r10 (percent), their mean, and the median rank, from 1.

    A query without a right candidate, and `lost` further ones, count as never found: their rank is behind all candidates. With
    no more candidates than k, every answer is among the first k: that number is left out.
    """
    answered, behind = right.any(dim=1), scores.shape[1]
    found = torch.full((len(scores) + lost,), behind)
    if bool(answered.any()):
        found[: len(scores)][answered] = ranks(scores[answered], right[answered])
    known = [k for k in RECALLS if k < scores.shape[1]]
    numbers = {f"r{k}": round(x, 2) for k, x in zip(known, recalls(found, known).tolist() if known else [], strict=True)}
    if len(known) == len(RECALLS):
        numbers["r_mean"] = round(sum(numbers.values()) / len(known), 2)
    return numbers | {"median_rank": float((found + 1).double().quantile(0.5))}

