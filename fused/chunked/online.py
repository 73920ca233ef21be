"""An approximate run of a bidirectional model over frames as they arrive: the exact backward scan would need future frames.

A window is a chunk of frames and the look-ahead frames after it. In every layer the forward state is carried from chunk
to chunk, and the backward scan starts from zeros at the window's end. The look-ahead frames are computed again with
their own chunk.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fused.chunked.layer_ops import add_norm, project, scan_chunk
from fused.chunked.layer_weights import LayerParameters, LayerSpec, LayerWeights, layer_spec
from fused.chunked.video import ChunkedOutput, Video, check_chunkable, embed_chunks, max_frames, split_frames
from fused.modules.mamba import State
from fused.runtime.autocast import no_autocast

if TYPE_CHECKING:
    from fused.chunked.protocol import ChunkableModel


@torch.no_grad()
def run_approximate(
    model: "ChunkableModel", video: Video, chunk_frames: int, look_ahead: int, total: int | None
) -> Iterator[ChunkedOutput]:
    """Yield the last layer's output for every chunk, as soon as its frames and the `look_ahead` frames after it have arrived.

    `total` is the number of tubelets to which the temporal table is stretched, None for its own. Raises ValueError or
    TypeError for a model or a video that does not fit.
    """
    config = model.config
    check_chunkable(model, chunk_frames)
    t = config.kernel_size
    if not isinstance(look_ahead, int) or look_ahead < 0 or look_ahead % t:
        raise ValueError(
            f"look_ahead is {look_ahead!r}; allowed: 0 or a positive multiple of kernel_size ({t}), a tubelet's frames"
        )
    backend = model.resolve_backend(model.cls_token)
    layers = _WindowLayers(model, backend)
    chunk_tokens, look_ahead_tokens = (frames // t * config.patches for frames in (chunk_frames, look_ahead))
    limit, device = max_frames(config, total), model.cls_token.device
    clips = split_frames(video, config, math.gcd(chunk_frames, look_ahead), device, limit)
    waiting, cls = None, 1  # tokens that no chunk has taken yet, and whether CLS is the first of them
    for tokens in embed_chunks(model, clips, total):
        waiting = tokens if waiting is None else torch.cat((waiting, tokens), dim=1)
        while waiting.shape[1] >= cls + chunk_tokens + look_ahead_tokens:
            yield layers.run(waiting[:, : cls + chunk_tokens + look_ahead_tokens], cls + chunk_tokens)
            waiting, cls = waiting[:, cls + chunk_tokens :], 0
    while waiting is not None and waiting.shape[1] > 0:
        yield layers.run(waiting[:, : cls + chunk_tokens + look_ahead_tokens], cls + chunk_tokens)
        waiting, cls = waiting[:, cls + chunk_tokens :], 0


class _WindowLayers:
    """The layers of a model, their weights cast once, and their forward states behind the last chunk."""

    def __init__(self, model: "ChunkableModel", backend: str) -> None:
        self.layers: list[Any] = list(model.layers)
        self.backend = backend
        self.ready: list[tuple[LayerSpec, LayerWeights]] = []
        self.states: list[State | None] = [None] * len(self.layers)

    def run(self, tokens: Tensor, count: int) -> ChunkedOutput:
        """Run a window (B, L, D). Its chunk is the first `count` tokens, for which the output is; the rest is look-ahead."""
        hidden, residual = tokens, cast(Any, None)
        for i, layer in enumerate(self.layers):
            if len(self.ready) == i:
                parameters = LayerParameters.of(layer)
                spec = layer_spec(layer, parameters, hidden, residual, (), self.backend, False)
                self.ready.append((spec, LayerWeights(spec, parameters)))
            spec, w = self.ready[i]
            with no_autocast(tokens.device):
                y, v = add_norm(spec, w, hidden, residual)
                y, self.states[i] = _mix_window(spec, w, y, count, self.states[i])
                hidden, residual = y, v.to(spec.residual_dtype)
        return ChunkedOutput(hidden[:, :count], residual[:, :count], [], (), self.backend)


def _mix_window(spec: LayerSpec, w: LayerWeights, hidden: Tensor, count: int, state: State | None) -> tuple[Tensor, State]:
    """Return the mixer's output (B, L, D) for a window, and the forward state behind its first `count` tokens."""
    x, z = project(w.in_proj, hidden).chunk(2, dim=-1)
    y_backward = None if w.backward is None else scan_chunk(spec, w.backward, x, None, reverse=True)[0]

    def scan_forward(part: slice, state: State | None) -> tuple[Tensor, State]:
        other = None if y_backward is None else y_backward[:, part]
        return scan_chunk(spec, w.forward, x[:, part], state, False, z[:, part], other)

    y, state = scan_forward(slice(count), state)
    if x.shape[1] > count:
        y = torch.cat((y, scan_forward(slice(count, None), state)[0]), dim=1)
    return project(w.out_proj, y), state
