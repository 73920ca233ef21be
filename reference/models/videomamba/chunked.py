"""A bidirectional model over a video in chunks, exactly (`forward_chunked`) and as an online approximation (`approximate`).

These functions define both. They save no memory, since gradients are those of plain autograd; they show how states pass from
chunk to chunk.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reference.models.videomamba.backbone import Backbone
from reference.models.videomamba.embedding import span_of
from reference.models.videomamba.model import VideoMamba, VideoMambaEncoder
from reference.modules.mamba import Mamba
from reference.modules.state import State

Chunks = Sequence[Tensor]  # (B, L, D) each, in the order of time


def split_tokens(tokens: Float[Tensor, "B L D"], chunk_tokens: int) -> tuple[Tensor, ...]:
    """Return the tokens in chunks of `chunk_tokens` patch tokens; CLS goes with the first, the last may be shorter."""
    sizes = [1, *[chunk_tokens] * ((tokens.shape[1] - 1) // chunk_tokens)]
    first, *others = tokens.split([*sizes, tokens.shape[1] - sum(sizes)], dim=1)
    second, *others = [x for x in others if x.shape[1]]
    return torch.cat((first, second), dim=1), *others


def run_mixer_chunked(mixer: Mamba, chunks: Chunks) -> list[Tensor]:
    """Return what `Mamba.forward` gives for the whole sequence, in chunks (B, L, D).

    Each direction passes its state from chunk to chunk, the backward direction from the last chunk to the first.
    """
    xz = [mixer.in_proj(hidden).chunk(2, dim=-1) for hidden in chunks]
    y = [torch.zeros_like(x) for x, _ in xz]
    state: State | None = None
    if mixer.bimamba:
        for i in reversed(range(len(chunks))):
            x, z = xz[i]
            y[i], state = mixer.run_direction(x, z, mixer.backward_direction, state, reverse=True)
    state = None
    for i, (x, z) in enumerate(xz):
        y_forward, state = mixer.run_direction(x, z, mixer.forward_direction, state)
        y[i] = mixer.out_proj(y_forward + y[i])
    return y


def encode_chunked(
    model: Backbone, tokens: Float[Tensor, "B L D"], chunk_frames: int, out_layers: Sequence[int] = ()
) -> tuple[Tensor, list[Tensor]]:
    """Return (normed tokens, features of `out_layers`) as `Backbone.encode`, layer by layer over all chunks.

    Raise ValueError for another scan order than "spatial".
    """
    config = model.config
    layers: list[Any] = list(model.layers)
    if config.scan_order != "spatial":
        raise ValueError(f"scan_order is {config.scan_order!r}; chunks are frames, which only 'spatial' order keeps together")
    hidden = list(split_tokens(tokens, chunk_frames // config.kernel_size * config.patches))
    residual: list[Any] = [None] * len(hidden)
    features = []
    for i, layer in enumerate(layers):
        normed = []
        for k in range(len(hidden)):
            x, residual[k] = layer.add_norm(hidden[k], residual[k])
            normed.append(x)
        hidden = run_mixer_chunked(layer.mixer, normed)
        if i - 1 in out_layers:
            features.append([model.layer_feature(r) for r in residual])
    finished = [model.finish(h, r) for h, r in zip(hidden, residual, strict=True)]
    if config.depth - 1 in out_layers:
        features.append([feature for _, feature in finished])
    return torch.cat([tokens for tokens, _ in finished], dim=1), [torch.cat(chunks, dim=1) for chunks in features]


def forward_chunked(
    model: VideoMamba | VideoMambaEncoder, clip: Float[Tensor, "B C T H W"], chunk_frames: int, keep_temporal: bool = False
) -> Any:
    """Return what `model(clip)` returns, for an encoder with `keep_temporal`, computed in chunks of `chunk_frames` frames.

    The model drops nothing at random: it is in eval mode, or its rates are 0. Raise ValueError for another scan order than
    "spatial".
    """
    if isinstance(model, VideoMamba):
        tokens, _ = encode_chunked(model, model.embed(clip), chunk_frames)
        return model.apply_heads(tokens, tokens[:, 1:])[0]
    tokens, features = encode_chunked(model, model.embed(clip), chunk_frames, model.config.student_layers())
    return model.apply_heads(tokens, features, span_of(clip, model.config), keep_temporal=keep_temporal)[0]


def approximate(
    model: Backbone, clip: Float[Tensor, "B C T H W"], chunk_frames: int, look_ahead: int = 0
) -> Float[Tensor, "B L D"]:
    """Return the normed tokens (B, L, D) of a model that answers each chunk as soon as `look_ahead` more frames have come.

    A window is a chunk and the look-ahead frames after it. In every layer the forward state comes from the chunk before. The
    backward scan starts with a zero state at the end of the window. The output of the look-ahead frames is dropped: they are
    computed again with their own chunk. A look-ahead to the end of the video gives the exact result.
    """
    config = model.config
    layers: list[Any] = list(model.layers)
    residual: Any
    chunks = split_tokens(model.embed(clip), chunk_frames // config.kernel_size * config.patches)
    look_ahead_tokens = look_ahead // config.kernel_size * config.patches
    remaining = torch.cat(chunks, dim=1)
    states: list[State | None] = [None] * config.depth
    out = []
    for chunk in chunks:
        L = chunk.shape[1]
        hidden, remaining, residual = remaining[:, : L + look_ahead_tokens], remaining[:, L:], None
        for i, layer in enumerate(layers):
            x, residual = layer.add_norm(hidden, residual)
            hidden, states[i] = run_mixer_online(layer.mixer, x, L, states[i])
        out.append(model.finish(hidden[:, :L], residual[:, :L])[0])
    return torch.cat(out, dim=1)


def run_mixer_online(mixer: Mamba, hidden: Float[Tensor, "B W D"], L: int, state: State | None) -> tuple[Tensor, State]:
    """Run the mixer over a window of W tokens: the L of a chunk and the look-ahead tokens after them.

    Return (output (B, W, D), forward state after the L tokens).
    """
    x, z = mixer.in_proj(hidden).chunk(2, dim=-1)
    y, state = mixer.run_direction(x[:, :L], z[:, :L], mixer.forward_direction, state)
    if x.shape[1] > L:
        y = torch.cat((y, mixer.run_direction(x[:, L:], z[:, L:], mixer.forward_direction, state)[0]), dim=1)
    if mixer.bimamba:
        y = y + mixer.run_direction(x, z, mixer.backward_direction, reverse=True)[0]
    return mixer.out_proj(y), state
