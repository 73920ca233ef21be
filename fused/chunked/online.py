"""Frames through a bidirectional model as they come: an approximation, since the backward direction would need the future.

In every layer the forward state goes on from chunk to chunk, and the backward scan starts from nothing behind the chunk
and the frames looked ahead at. These are computed again with their own chunk.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fused.chunked.layer_ops import Plan, Weights, add_norm, parameters_of, plan_of, project, scan_chunk
from fused.chunked.video import Video, check_model, embedded, limit, pieces
from fused.modules.mamba import State
from fused.runtime.checks import no_autocast

if TYPE_CHECKING:
    from fused.models.videomamba.backbone import Backbone


@torch.no_grad()
def windows(
    model: "Backbone", video: Video, chunk_frames: int, look_ahead: int, total: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """(hidden, residual) behind the last block of every chunk, as soon as its frames and those ahead of it are there.

    Raises ValueError or TypeError for a model or a video that this cannot be done with.
    """
    config = model.config
    check_model(model, chunk_frames)
    t = config.kernel_size
    if not isinstance(look_ahead, int) or look_ahead < 0 or look_ahead % t:
        raise ValueError(
            f"look_ahead is {look_ahead!r}; allowed: 0 or a positive multiple of kernel_size ({t}), a tubelet's frames"
        )
    backend = model._resolve(model.cls_token)
    layers = _Layers(model, backend)
    size, more = (frames // t * config.patches for frames in (chunk_frames, look_ahead))
    source = pieces(video, config, math.gcd(chunk_frames, look_ahead), model.cls_token.device, limit(config, total))
    waiting, cls = None, 1
    for tokens in embedded(model, source, total):
        waiting = tokens if waiting is None else torch.cat((waiting, tokens), dim=1)
        while waiting.shape[1] >= cls + size + more:
            yield layers(waiting[:, : cls + size + more], cls + size)
            waiting, cls = waiting[:, cls + size :], 0
    while waiting is not None and waiting.shape[1] > 0:
        yield layers(waiting[:, : cls + size + more], cls + size)
        waiting, cls = waiting[:, cls + size :], 0


class _Layers:
    """The blocks, their weights cast once, and the forward states behind the last chunk."""

    def __init__(self, model: "Backbone", backend: str) -> None:
        self.layers: list[Any] = list(model.layers)
        self.backend = backend
        self.ready: list[tuple[Plan, Weights]] = []
        self.states: list[State | None] = [None] * len(self.layers)

    def __call__(self, tokens: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """The `first` of a window's tokens; the others are only looked at."""
        hidden, residual = tokens, cast(Any, None)
        for i, layer in enumerate(self.layers):
            if len(self.ready) == i:
                plan = plan_of(layer, hidden, residual, (), self.backend, False)
                self.ready.append((plan, Weights(plan, parameters_of(layer))))
            plan, w = self.ready[i]
            with no_autocast(tokens.device):
                y, v = add_norm(plan, w, hidden, residual)
                y, self.states[i] = _mix(plan, w, y, first, self.states[i])
                hidden, residual = y, v.to(plan.stored)
        return hidden[:, :first], residual[:, :first]


def _mix(plan: Plan, w: Weights, hidden: Tensor, first: int, state: State | None) -> tuple[Tensor, State]:
    """The mixer over a window, and the forward state behind its `first` tokens."""
    x, z = project(w.into, hidden).chunk(2, dim=-1)
    behind = None if w.behind is None else scan_chunk(plan, w.behind, x, None, reverse=True)[0]

    def ahead(part: slice, state: State | None) -> tuple[Tensor, State]:
        beside = None if behind is None else behind[:, part]
        return scan_chunk(plan, w.ahead, x[:, part], state, False, z[:, part], beside)

    y, state = ahead(slice(first), state)
    if x.shape[1] > first:
        y = torch.cat((y, ahead(slice(first, None), state)[0]), dim=1)
    return project(w.out, y), state
