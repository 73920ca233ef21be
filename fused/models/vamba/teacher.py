"""The teacher of Vamba's distillation: the language model as it was, which reads video tokens in their place in the text.

A pretraining leaves self-attention, feed-forward, norms, embedding and lm_head as they were in Qwen2-VL. So the student itself
is its teacher: its layers without cross-attention, mixer and alpha, over one sequence of text and video.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fused import backends
from fused.models.vamba.layer import Shared
from fused.models.vamba.model import Vamba
from fused.models.vamba.pattern import Pattern, causal_pattern


class Place(NamedTuple):
    """A sample's part of a row, and the place of its video."""

    words: int  # text tokens
    video: int  # video tokens, or 0
    before: int  # text tokens that stand before the video
    grid: tuple[int, int, int]  # pairs of frames, rows and columns of the video tokens


@torch.no_grad()
def stock_logits(
    model: Vamba, input_ids: Int[Tensor, "1 L"], video: Float[Tensor, "1 Lv D"], places: list[Place]
) -> Float[Tensor, "1 L V"]:
    """Return the logits of Qwen2-VL at the text tokens of a row of samples, each of which reads its own video.

    Video tokens stand behind the first `before` text tokens of their sample. As in Qwen2-VL, a video token's position is the
    number of text tokens before plus its place in time, row and column, and the text goes on behind the largest one.
    """
    embedded = model.model.embed_tokens(input_ids)
    parts, positions, samples, is_text = [], [], [], []
    word = token = length = 0
    for place in places:
        text, end = embedded[:, word : word + place.words], word + place.words
        parts += [text[:, : place.before], video[:, token : token + place.video].to(text.dtype), text[:, place.before :]]
        own = stock_positions(place)
        positions.append(own)
        samples.append(slice(length, length + own.shape[1]))
        is_text += [True] * place.before + [False] * place.video + [True] * (place.words - place.before)
        word, token, length = end, token + place.video, length + own.shape[1]
    hidden, at = torch.cat(parts, dim=1), torch.cat(positions, dim=1)[:, None].to(video.device)
    layer = model.first_layer
    pattern = causal_pattern([samples], length, None)
    backend = backends.choose(model.backend, hidden.device)
    shared = Shared(backend, layer.angles(at, hidden.dtype), None, pattern, Pattern(), None)
    for one in model.model.layers:
        hidden, _ = one(hidden, None, shared=shared, stock=True)
    return model.lm_head(model.model.norm(hidden[:, torch.tensor(is_text)], backend))


def stock_positions(place: Place) -> Int[Tensor, "3 N"]:
    """Return the positions of a sample's tokens in time, height and width."""
    before = torch.arange(place.before).expand(3, -1)
    if not place.video:
        return torch.arange(place.words).expand(3, -1)
    grid = torch.cartesian_prod(*(torch.arange(n) for n in place.grid)).T + place.before
    after = torch.arange(place.words - place.before).expand(3, -1) + place.before + max(place.grid)
    return torch.cat((before, grid, after), dim=1)
