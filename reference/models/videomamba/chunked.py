"""A bidirectional model over a video in chunks: exactly, and as an online approximation. The definition of both.

Nothing here saves memory: gradients are those of plain autograd. What it shows is which state goes where.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reference.models.videomamba.backbone import Backbone
from reference.models.videomamba.embedding import span_of
from reference.models.videomamba.model import VideoMamba, VideoMambaEncoder
from reference.modules.mamba import Mamba, State

Chunks = Sequence[Tensor]  # (B, L, D) each, in the order of time


def cut(tokens: Float[Tensor, "B L D"], chunk_tokens: int) -> tuple[Tensor, ...]:
    """Tokens in chunks of whole frames; CLS goes with the first."""
    sizes = [1, *[chunk_tokens] * ((tokens.shape[1] - 1) // chunk_tokens)]
    first, *others = tokens.split([*sizes, tokens.shape[1] - sum(sizes)], dim=1)
    second, *others = [x for x in others if x.shape[1]]
    return torch.cat((first, second), dim=1), *others


def mix_chunked(mixer: Mamba, chunks: Chunks) -> list[Tensor]:
    """`Mamba.forward` of all chunks in one: each direction's state goes from chunk to chunk in its own direction."""
    xz = [mixer.in_proj(hidden).chunk(2, dim=-1) for hidden in chunks]
    y = [torch.zeros_like(x) for x, _ in xz]
    state: State | None = None
    if mixer.bimamba:
        for i in reversed(range(len(chunks))):
            x, z = xz[i]
            y[i], state = mixer.scan(x, z, mixer.behind, state, reverse=True)
    state = None
    for i, (x, z) in enumerate(xz):
        y_f, state = mixer.scan(x, z, mixer.ahead, state)
        y[i] = mixer.out_proj(y_f + y[i])
    return y


def encode_chunked(
    model: Backbone, tokens: Float[Tensor, "B L D"], chunk_frames: int, taps: Sequence[int] = ()
) -> tuple[Tensor, list[Tensor]]:
    """`Backbone.encode` without mask or state, layer by layer over all chunks: (normed tokens, tapped features)."""
    config, norm = model.config, model.final_norm
    layers: list[Any] = list(model.layers)
    if config.scan_order != "spatial":
        raise ValueError(f"scan_order is {config.scan_order!r}; chunks are frames, which only 'spatial' order keeps together")
    hidden = list(cut(tokens, chunk_frames // config.kernel_size * config.patches))
    residual: list[Any] = [None] * len(hidden)
    features = []
    for i, layer in enumerate(layers):
        normed = []
        for k in range(len(hidden)):
            x, residual[k] = layer.add_norm(hidden[k], residual[k])
            normed.append(x)
        hidden = mix_chunked(layer.mixer, normed)
        if i - 1 in taps:
            features.append([norm(r.to(norm.weight.dtype)) for r in residual])
    pairs = list(zip(hidden, residual, strict=True))
    if config.fused_add_norm:
        last = residual
        out = [norm.add(h, r, prenorm=False) for h, r in pairs]
    else:
        last = [r + h for h, r in pairs]
        out = [norm(v.to(norm.weight.dtype)) for v in last]
    if config.depth - 1 in taps:
        features.append(last)
    return torch.cat(out, dim=1), [torch.cat(parts, dim=1) for parts in features]


def forward_chunked(
    model: VideoMamba | VideoMambaEncoder, clip: Float[Tensor, "B C T H W"], chunk_frames: int, keep_temporal: bool = False
):
    """What `model(clip)` returns, computed in chunks of so many frames. Nothing is dropped at random: eval, or rates of 0."""
    if isinstance(model, VideoMamba):
        tokens, _ = encode_chunked(model, model.embed(clip), chunk_frames)
        return model.read(tokens, tokens[:, 1:])[0]
    tokens, features = encode_chunked(model, model.embed(clip), chunk_frames, model.config.student_layers())
    return model.read(tokens, features, span_of(clip, model.config), keep_temporal=keep_temporal)[0]


def approximate(
    model: Backbone, clip: Float[Tensor, "B C T H W"], chunk_frames: int, look_ahead: int = 0
) -> Float[Tensor, "B L D"]:
    """Normed tokens as an online model would give them: every chunk when it and `look_ahead` frames more have come.

    In every layer the forward state enters from the chunk before, and the backward scan starts from nothing behind the frames
    looked ahead at. These only lend their backward state: they are computed again with their own chunk. Looking ahead to the
    end of the video is exact.
    """
    config, norm = model.config, model.final_norm
    layers: list[Any] = list(model.layers)
    residual: Any
    chunks = cut(model.embed(clip), chunk_frames // config.kernel_size * config.patches)
    more = look_ahead // config.kernel_size * config.patches
    rest = torch.cat(chunks, dim=1)
    states: list[State | None] = [None] * config.depth
    out = []
    for chunk in chunks:
        L = chunk.shape[1]
        hidden, rest, residual = rest[:, : L + more], rest[:, L:], None
        for i, layer in enumerate(layers):
            x, residual = layer.add_norm(hidden, residual)
            hidden, states[i] = mix_online(layer.mixer, x, L, states[i])
        hidden, residual = hidden[:, :L], residual[:, :L]
        if config.fused_add_norm:
            out.append(norm.add(hidden, residual, prenorm=False))
        else:
            out.append(norm((residual + hidden).to(norm.weight.dtype)))
    return torch.cat(out, dim=1)


def mix_online(mixer: Mamba, hidden: Float[Tensor, "B W D"], L: int, state: State | None) -> tuple[Tensor, State]:
    """A window of L tokens and what is seen ahead of them; returns with its output the forward state behind the L tokens."""
    x, z = mixer.in_proj(hidden).chunk(2, dim=-1)
    y, state = mixer.scan(x[:, :L], z[:, :L], mixer.ahead, state)
    if x.shape[1] > L:
        y = torch.cat((y, mixer.scan(x[:, L:], z[:, L:], mixer.ahead, state)[0]), dim=1)
    if mixer.bimamba:
        y = y + mixer.scan(x, z, mixer.behind, reverse=True)[0]
    return mixer.out_proj(y), state
