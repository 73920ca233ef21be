"""A compressor of one layer over a video in chunks: exact, in the memory of one chunk and of the queries.

    first to last chunk:   y_forward = forward scan at query rows, its state carried from chunk to chunk
    last to first chunk:   y_backward likewise;  queries + out_proj((y_forward + y_backward) * silu(z))

with x = in_proj_x(norm(sequence)), computed in both passes, and z = in_proj_z(norm(queries)). Tokens stay where they are, on
the host or on the device, and are copied chunk by chunk.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused import backends
from fused.models.bimba.checks import check_inputs
from fused.models.bimba.interleave import Places, interleave, places_between
from fused.models.bimba.layer import CompressorLayer, norm_and_insert
from fused.models.bimba.query_mixer import called_modules
from fused.modules import mamba
from fused.modules.mamba import Mamba
from fused.modules.state import State
from fused.modules.wrapped import describe
from fused.ops.mamba_inner.eager import one_direction_eager
from fused.runtime.dtypes import accumulation_dtype
from fused.runtime.library import wants_gradients


class Chunk(NamedTuple):
    """Some frames of a video with the queries that stand among them or behind the last of them."""

    tokens: Tensor  # (B, T, C), on any device
    queries: Tensor  # (B, Q, C), on the compressor's device; Q may be 0
    places: Places


def compress_chunks(
    layer: CompressorLayer, frames: Sequence[Tensor], queries: Tensor, dtype: torch.dtype, backend: str
) -> Tensor:
    """Return what the layer returns for `queries` (B, G, Q, C) and the chunks of `split_chunks`, computed in `dtype`."""
    chunks = list(_chunks(frames, queries.flatten(1, 2).to(dtype)))
    mixer: Any = layer.mixer
    state: State | None = None
    y_forward = []
    for chunk in chunks:
        y, state = scan_chunk(layer, chunk, 0, state, backend)
        y_forward.append(y)
    out: list[Tensor] = []
    state = None
    for chunk in reversed(chunks):
        y = y_forward.pop()
        if mixer.bimamba:
            y_backward, state = scan_chunk(layer, chunk, 1, state, backend)
            y = y + y_backward
        if y.shape[1]:
            out.append(_read(layer, chunk, y, backend))
    return torch.cat(out[::-1], dim=1).view(queries.shape)


def check_chunkable(layers: Sequence[CompressorLayer], backend: str) -> None:
    """Raise ValueError for a compressor that cannot run in chunks."""
    mixer, count = layers[0].mixer, len(layers)
    if count != 1:
        raise ValueError(f"forward_chunked: n_layer must be 1, got {count}: other layers than the last one make tokens too")
    if not isinstance(mixer, Mamba):
        raise ValueError("forward_chunked: mixer_type must be 'mamba': attention has no state to carry from chunk to chunk")
    if backend != "auto" and not backends.declared("BimbaCompressor", mamba.BACKENDS, backend).initial_state:
        raise ValueError(f"forward_chunked: backend {backend!r} carries no state; build it with backend='native' or 'torch'")
    if called := called_modules(mixer):
        raise ValueError(
            f"forward_chunked: {called[0]} of the mixer {describe(mixer.get_submodule(called[0]))}, and a run in chunks reads "
            "weights: merge the adapter or remove the hook, or call the compressor itself"
        )


def split_chunks(
    tokens: Tensor | Iterable[Tensor], queries: Tensor, d_model: int, chunk_frames: int | None, offload: bool
) -> list[Tensor]:
    """Return the chunks (B, frames, H, W, C) of `BimbaCompressor.forward_chunked`, with `offload` in the memory of the host.

    Raises TypeError or ValueError for what does not fit, at the first chunk that does not.
    """
    frames: list[Tensor] = []
    for chunk in _chunks_of_frames(tokens, chunk_frames):
        first = frames[0] if frames else chunk
        if not frames:
            check_inputs(chunk, queries, d_model, same_device=False)
        elif chunk.shape[:1] + chunk.shape[2:] != first.shape[:1] + first.shape[2:] or chunk.dtype != first.dtype:
            raise ValueError(
                f"forward_chunked: chunk {len(frames)} of tokens is {tuple(chunk.shape)} of {chunk.dtype}; but for its frames "
                f"it must be like the first, {tuple(first.shape)} of {first.dtype}"
            )
        frames.append(chunk.to("cpu", non_blocking=True) if offload else chunk)
    if not frames:
        raise ValueError("forward_chunked: tokens must be at least one chunk with a frame, got none")
    return frames


def scan_chunk(
    layer: CompressorLayer, chunk: Chunk, direction: int, state: State | None, backend: str
) -> tuple[Tensor, State]:
    """Return y (B, Q, E) of a direction at the chunk's queries, before the gate, and the state that leaves the chunk."""
    mixer: Any = layer.mixer
    tokens = chunk.tokens.to(chunk.queries.device, chunk.queries.dtype, non_blocking=True)
    sequence, _ = norm_and_insert(layer.norm, tokens, chunk.queries, chunk.places, backend)
    x = F.linear(sequence, mixer.in_proj.weight.chunk(2)[0])
    del tokens, sequence  # of a long chunk they are as large as x
    weights, reverse = mixer.directions()[direction], direction == 1
    if backends.operators_of(backend) != "native":
        A = -weights.A.to(accumulation_dtype(weights.A.dtype)).exp()
        y, state = one_direction_eager(x, weights._replace(A=A), reverse=reverse, backend="torch", state=state)
    elif wants_gradients(x, *weights):
        from fused.ops.mamba_inner.one_direction import mamba_inner_one_direction

        y, state = mamba_inner_one_direction(x, weights, reverse=reverse, A_is_log=True, state=state)
    else:
        from fused.ops.mamba_inner.query_rows import one_direction_at_queries

        table, count = chunk.places.tile_queries, len(chunk.places.queries)
        return one_direction_at_queries(x, weights, table, count, reverse=reverse, state=state)
    return y.index_select(1, chunk.places.queries), state


def _read(layer: CompressorLayer, chunk: Chunk, y: Tensor, backend: str) -> Tensor:
    """Return the new queries (B, Q, C) of a chunk, given the sum y (B, Q, E) of both scans."""
    mixer: Any = layer.mixer
    readers = chunk.queries if layer.norm is None else layer.norm(chunk.queries, backend)
    z, precise = F.linear(readers, mixer.in_proj.weight.chunk(2)[1]), accumulation_dtype(y.dtype)
    mixed = mixer.out_proj((y.to(precise) * F.silu(z.to(precise))).to(y.dtype))
    return chunk.queries + mixed if layer.use_res else mixed


def _chunks_of_frames(tokens: Tensor | Iterable[Tensor], chunk_frames: int | None) -> Iterator[Tensor]:
    """Yield chunks of one frame or more, and of at most `chunk_frames`."""
    if chunk_frames is not None and (not isinstance(chunk_frames, int) or isinstance(chunk_frames, bool) or chunk_frames < 1):
        raise ValueError(f"forward_chunked: chunk_frames must be a number of frames from 1 up, got {chunk_frames!r}")
    if isinstance(tokens, Tensor) and chunk_frames is None:
        raise ValueError("forward_chunked: chunk_frames must be given for a tensor of tokens; an iterator yields chunks")
    if not isinstance(tokens, Iterable) or isinstance(tokens, str | Mapping):
        raise TypeError(f"forward_chunked: tokens must be a tensor or an iterable of tensors, got {type(tokens).__name__}")
    for part in [tokens] if isinstance(tokens, Tensor) else tokens:
        if not isinstance(part, Tensor) or part.dim() != 5:
            found = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
            raise ValueError(f"forward_chunked: tokens must be (B, frames, rows, columns, C), got {found}")
        if part.shape[1]:
            yield from part.split(chunk_frames, dim=1) if chunk_frames else (part,)


def _chunks(frames: Sequence[Tensor], queries: Tensor) -> Iterator[Chunk]:
    """Yield each chunk with its queries of all `queries` (B, Q, C)."""
    ends = list(itertools.accumulate(x.shape[1:4].numel() for x in frames))
    places = interleave(ends[-1], queries.shape[1])
    for x, start, end in zip(frames, [0, *ends], ends, strict=False):
        first, last, local = places_between(places, start, end, queries.device)
        yield Chunk(x.flatten(1, 3), queries[:, first:last], local)
