"""An exact run of a bidirectional model over a video in the memory of one chunk, in inference and in training.

The layers run one after the other, each over all chunks. The streams between two layers are in memory for the full video, the
intermediate tensors of a layer for one chunk only.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fused import backends
from fused.chunked.layer import run_block_two_pass
from fused.chunked.layer_weights import check_unwrapped
from fused.modules import mamba
from fused.modules.span import Span, check_tubelets

if TYPE_CHECKING:
    from fused.chunked.protocol import ChunkableConfig, ChunkableModel

# (B, C, T, H, W), or an iterator of frames (B, C, H, W), of frames of one video (C, H, W), or of runs of frames (B, C, t, H, W)
Video = Tensor | Iterable[Tensor]
Chunks = Sequence[slice]  # of tokens, ascending


class ChunkedOutput(NamedTuple):
    """The output of the last layer and the residual stream before it, (B, L, D), and how they were made."""

    hidden: Tensor
    residual: Tensor
    features: list[Tensor]  # of the layers that were asked for
    chunks: Chunks
    backend: str


def run_layers(
    model: "ChunkableModel", video: Video, chunk_frames: int, num_frames: int | None, total: int | None, offload: bool,
    out_layers: Sequence[int] = (),
) -> ChunkedOutput:  # fmt: skip
    """Embed a video and run the layers over it in chunks of `chunk_frames` frames.

    `num_frames` is the number of frames that an iterator gives. `total` is the number of tubelets to which the temporal table
    is stretched, None for its own. With `offload` a layer keeps in host memory the tensors that its first pass leaves for its
    second. `out_layers` are the numbers of layers whose feature is wanted, as in `Backbone.encode`.

    Raises ValueError or TypeError for a video, a chunk length, a model or a backend that does not fit.
    """
    config, device = model.config, model.cls_token.device
    check_chunkable(model, chunk_frames)
    limit = max_frames(config, total)
    frames = count_frames(video, num_frames, config, limit)
    backend = model.resolve_backend(model.cls_token)
    tokens = list(embed_chunks(model, split_frames(video, config, chunk_frames, device, limit, frames), total))
    edges = [0, *itertools.accumulate(t.shape[1] for t in tokens)]
    chunks = [slice(*pair) for pair in itertools.pairwise(edges)]
    hidden = torch.cat(tokens, dim=1)
    del tokens
    hidden = model.pos_drop(hidden)
    residual: Any = None
    layers: list[Any] = list(model.layers)
    features = []
    for i, layer in enumerate(layers):
        if residual is not None:
            hidden = layer.drop_path(hidden)
        hidden, residual = run_block_two_pass(layer, hidden, residual, chunks, backend, offload)
        if i - 1 in out_layers:  # layer i computes the residual stream after layer i - 1
            features.append(apply_per_chunk(lambda x: model.layer_feature(x, backend), chunks, residual))
    hidden = model.drop_path(hidden)
    if config.depth - 1 in out_layers:
        features.append(model.last_layer_feature(hidden, residual))
    return ChunkedOutput(hidden, residual, features, chunks, backend)


def apply_per_chunk(function: Callable[..., Tensor], chunks: Chunks, *tensors: Tensor) -> Tensor:
    """Return function(*tensors), computed chunk by chunk along dimension 1; at once if there are no chunks."""
    if not chunks:
        return function(*tensors)
    sizes = [c.stop - c.start for c in chunks]
    return torch.cat([function(*parts) for parts in zip(*(t.split(sizes, dim=1) for t in tensors), strict=True)], dim=1)


def check_chunkable(model: "ChunkableModel", chunk_frames: int) -> None:
    """Raise ValueError unless this model can run a video in chunks of `chunk_frames` frames."""
    config, t = model.config, model.config.kernel_size
    if config.num_frames is None:
        raise ValueError("this is an image model (num_frames is None): an image has no frames to cut; call the model itself")
    if config.scan_order != "spatial":
        raise ValueError(
            f"scan_order is {config.scan_order!r}; chunks are frames, which only 'spatial' order scans one after the other: "
            "run the whole clip at once"
        )
    backend = model.requested_backend
    if backend != "auto" and not backends.declared("mixer", mamba.BACKENDS, backend).initial_state:
        raise ValueError(
            f"backend {backend!r} cannot carry a state from chunk to chunk; build the model with backend='native' or 'torch'"
        )
    if not isinstance(chunk_frames, int) or chunk_frames < 1 or chunk_frames % t:
        raise ValueError(
            f"chunk_frames is {chunk_frames!r}; allowed: a positive multiple of kernel_size ({t}), a tubelet's frames"
        )
    check_unwrapped(model.layers)


def max_frames(config: "ChunkableConfig", total: int | None) -> int:
    """Return the number of frames for which there are positions. Raises ValueError for a `total` below 1."""
    check_tubelets("temporal_pos_total", total, 1, False)
    return (config.num_frames or 0) if total is None else total * config.kernel_size


def count_frames(video: Video, num_frames: int | None, config: "ChunkableConfig", limit: int) -> int:
    """Return the number of frames of a video: a clip's own, or the `num_frames` that an iterator will give.

    Raises ValueError for a number that is missing, is no multiple of kernel_size, or is above `limit`.
    """
    if isinstance(video, Tensor):
        if video.dim() != 5:
            raise ValueError(f"clip has shape {tuple(video.shape)}; this model takes (B, {config.channels}, T, H, W)")
        if num_frames not in (None, video.shape[2]):
            raise ValueError(f"num_frames is {num_frames!r}, but the clip has {video.shape[2]}; leave it out")
        num_frames = video.shape[2]
    if num_frames is None:
        raise ValueError("num_frames is None; an iterator's frames cannot be counted beforehand: say how many it gives")
    if not isinstance(num_frames, int) or num_frames < 1 or num_frames % config.kernel_size:
        raise ValueError(
            f"num_frames is {num_frames!r}; allowed: a positive multiple of kernel_size ({config.kernel_size}), the frames of "
            "a tubelet"
        )
    if num_frames > limit:
        raise _too_long(limit, num_frames)
    return num_frames


def _too_long(limit: int, frames: int) -> ValueError:
    """Return the error for a video of more frames than there are positions for."""
    return ValueError(
        f"the video has {frames} frames or more, but there are temporal positions for {limit}; pass all its tubelets as "
        "temporal_pos_total: the temporal table is stretched to it"
    )


def split_frames(
    video: Video, config: "ChunkableConfig", step: int, device: torch.device, limit: int, frames: int | None = None
) -> Iterator[Tensor]:
    """Yield clips (B, C, t, H, W) on the device, of `step` frames each; the last may be shorter.

    `frames` is the number of frames in all, None if it is not known; `limit` is the largest allowed. Raises ValueError or
    TypeError for frames that do not fit the model, or for a number of them that does not.
    """
    items = video.split(step, dim=2) if isinstance(video, Tensor) else video
    waiting: list[Tensor] = []
    received, clips = 0, None
    for item in items:
        item = _as_run(item, config, clips)
        clips, received = item.shape[0], received + item.shape[2]
        if frames is not None and received > frames:
            raise ValueError(f"num_frames is {frames}, but the iterator gives more; say how many it gives")
        if received > limit:
            raise _too_long(limit, received)
        waiting.append(item.to(device, non_blocking=True))
        while sum(x.shape[2] for x in waiting) >= step:
            joined = torch.cat(waiting, dim=2) if len(waiting) > 1 else waiting[0]
            waiting = [joined[:, :, step:]] if joined.shape[2] > step else []
            yield joined[:, :, :step]
    if frames is not None and received < frames:
        raise ValueError(f"num_frames is {frames}, but the iterator gave {received}; say how many it gives")
    if not received:
        raise ValueError("the iterator gave no frames")
    if received % config.kernel_size:
        raise ValueError(f"the iterator gave {received} frames, which are no multiple of kernel_size ({config.kernel_size})")
    if any(x.shape[2] for x in waiting):
        yield torch.cat(waiting, dim=2)


def _as_run(item: Any, config: "ChunkableConfig", clips: int | None) -> Tensor:
    """Return what an iterator gave as a run of frames (B, C, t, H, W): a run as it is, frames (B, C, H, W), or one (C, H, W).

    Raises ValueError or TypeError for what does not fit the model, or has not B = `clips` unless that is None.
    """
    channels, height, width = config.channels, *config.sides
    run = item
    if isinstance(item, Tensor) and item.dim() in (3, 4):
        run = (item if item.dim() == 4 else item[None]).unsqueeze(2)
    wanted = (run.shape[0] if clips is None else clips, channels, height, width) if isinstance(run, Tensor) else ()
    if not isinstance(run, Tensor) or run.dim() != 5 or (*run.shape[:2], *run.shape[3:]) != wanted:
        received = tuple(item.shape) if isinstance(item, Tensor) else type(item).__name__
        B = "B" if clips is None else clips
        one = f" or ({channels}, {height}, {width})" if clips in (None, 1) else ""
        raise ValueError(
            f"the iterator gave {received}; allowed: runs of frames ({B}, {channels}, t, {height}, {width}) or "
            f"single frames ({B}, {channels}, {height}, {width})" + one
        )
    if not run.is_floating_point():
        raise TypeError(f"frames have dtype {run.dtype}; allowed are floating-point dtypes, normalised")
    return run


def embed_chunks(model: "ChunkableModel", clips: Iterable[Tensor], total: int | None) -> Iterator[Tensor]:
    """Yield tokens with positions (B, L, D) of a video's clips, which follow each other; CLS goes with the first.

    `total` is the number of tubelets to which the temporal table is stretched, None for its own.
    """
    config, first_tubelet = model.config, 0
    for clip in clips:
        span = Span(first_tubelet, clip.shape[2] // config.kernel_size, total or config.tubelets)
        yield model.embed_span(clip, span)
        first_tubelet += span.tubelets
