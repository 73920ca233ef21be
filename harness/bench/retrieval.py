"""The timed call of retrieval: the matching scores of the pairs that the best candidates of all videos and texts make."""

from typing import Any

import torch
from torch import Tensor

import fused
from fused.models.retrieval.model import VideoTextHeads
from fused.models.retrieval.ranking import best_candidates
from harness.bench.clock import Call
from harness.bench.workloads import OnDevice
from harness.fixtures import functional_modules as modules
from harness.records.speed import Entry, Point
from harness.subjects.retrieval.sides import FUSION, LAYERS

TEXTS_AT_ONCE = 256  # in one forward
VOCABULARY = 1000


def make(point: Point, entry: Entry, device: str) -> Call:
    """Return the call of an entry at a point.

    "fused:torch" computes the features of all texts once, and the keys and values of a video once for all its texts;
    "whole-bert" runs all layers for every pair.
    """
    dtype, model = getattr(torch, point.dtype), _model(point, device)
    N, M, K, L, V, D = (point[letter] for letter in "BMKLVD")
    with torch.device(device):
        videos = torch.randn(N, V, D, dtype=dtype)
        words = torch.randint(5, VOCABULARY, (M, L))
        visible = torch.arange(L) < torch.randint(L // 2, L + 1, (M, 1))
        wanted = asked_pairs(torch.randn(N, M), K)
    numbers = [row.nonzero().flatten().split(TEXTS_AT_ONCE) for row in wanted]
    whole = entry.implementation == "whole-bert"

    @torch.no_grad()
    def run() -> Tensor:
        scores = videos.new_full((N, M), -100.0)
        text = None if whole else model.text_encoder.text(words, visible)
        for i, parts in enumerate(numbers):
            for part in parts:
                if text is None:
                    of_pair = model.text_encoder.text(words[part], visible[part])
                    scores[i, part] = model.match(videos[i].expand(len(part), -1, -1), of_pair, visible[part])[:, 1]
                else:
                    scores[i, part] = model.match(videos[i : i + 1], text[part], visible[part])[:, 1]
        return scores

    return Call(run)


def _model(point: Point, device: str) -> Any:
    """Return the model without its video encoder: BERT base, or a small one, in the point's dtype."""
    small = {"num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 4 * point["C"], "fusion_layer": FUSION}
    video = fused.VideoMambaConfig(embed_dim=point["D"], depth=1)
    sizes: dict[str, Any] = {} if point["C"] == 768 else small
    config = fused.RetrievalConfig(video, vocab_size=VOCABULARY, hidden_size=point["C"], **sizes)
    with torch.device("meta"):
        model = VideoTextHeads(config)
    case = OnDevice("retrieval", point.dims, (), point.dtype, device=device)
    with torch.device(device):
        values = modules.parameters(model, case, 0)
    dtype = getattr(torch, point.dtype)
    model.load_state_dict({name: value.to(dtype) for name, value in values.items()}, assign=True)
    return model.eval()


def asked_pairs(similarities: Tensor, count: int) -> Tensor:
    """Return which pairs of (N, M) are among the best `count` of their video or of their text."""
    by_video = torch.zeros_like(similarities, dtype=torch.bool).scatter_(1, best_candidates(similarities, count), True)
    by_text = torch.zeros_like(similarities.T, dtype=torch.bool).scatter_(1, best_candidates(similarities.T, count), True)
    return by_video | by_text.T
