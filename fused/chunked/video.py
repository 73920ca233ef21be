"""A whole video through a bidirectional model in the memory of a chunk of it: exactly, in inference and in training.

Layer by layer, each over all chunks (`sweep`): what lies between two layers is kept whole, what a layer makes of it is not.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fused import backends
from fused.chunked.layer import sweep
from fused.models.videomamba.config import VideoMambaConfig
from fused.models.videomamba.embedding import Span, check_place
from fused.modules import mamba

if TYPE_CHECKING:
    from fused.models.videomamba.backbone import Backbone

Video = Tensor | Iterable[Tensor]
Chunks = Sequence[slice]  # of tokens, in the order of time


class Passed(NamedTuple):
    """What the last layer leaves: its output and the residual stream before it, the features asked for, and the chunks."""

    hidden: Tensor
    residual: Tensor
    features: list[Tensor]
    chunks: Chunks


def run(
    model: "Backbone", video: Video, chunk_frames: int, num_frames: int | None, total: int | None, offload: bool,
    taps: Sequence[int] = (),
) -> Passed:  # fmt: skip
    """Embed a video and send it through the blocks. `taps` as of `Backbone.encode`, `total` the tubelets to which the temporal
    table is stretched, if any.

    Raises ValueError or TypeError for a video, a chunk length, a model or a backend that this cannot be done with.
    """
    config, device = model.config, model.cls_token.device
    check_model(model, chunk_frames)
    most = limit(config, total)
    frames = _frames(video, num_frames, config, most)
    backend = model._resolve(model.cls_token)
    tokens = list(embedded(model, pieces(video, config, chunk_frames, device, most, frames), total))
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
        hidden, residual = sweep(layer, hidden, residual, chunks, backend, offload)
        if i - 1 in taps:
            dtype = model.final_norm.weight.dtype
            features.append(piecewise(lambda x: model.final_norm(x.to(dtype), backend), chunks, residual))  # noqa: B023
    hidden = model.drop_path(hidden)
    if config.depth - 1 in taps:
        features.append(residual if config.fused_add_norm else residual + hidden)
    return Passed(hidden, residual, features, chunks)


def piecewise(function: Callable[..., Tensor], chunks: Chunks, *tensors: Tensor) -> Tensor:
    """function(*tensors), chunk by chunk along their tokens; at once where there are no chunks."""
    if not chunks:
        return function(*tensors)
    sizes = [c.stop - c.start for c in chunks]
    return torch.cat([function(*parts) for parts in zip(*(t.split(sizes, dim=1) for t in tensors), strict=True)], dim=1)


def check_model(model: "Backbone", chunk_frames: int) -> None:
    """Raise ValueError unless a video can go through this model in chunks of so many frames."""
    config, t = model.config, model.config.kernel_size
    if config.num_frames is None:
        raise ValueError("this is an image model (num_frames is None): an image has no frames to cut; call the model itself")
    if config.scan_order != "spatial":
        raise ValueError(
            f"scan_order is {config.scan_order!r}; chunks are frames, which only 'spatial' order walks one after the other: "
            "run the whole clip at once"
        )
    if model._asked != "auto" and not backends.declared("mixer", mamba.BACKENDS, model._asked).initial_state:
        raise ValueError(
            f"backend {model._asked!r} cannot carry a state from chunk to chunk; build the model with backend='native' or "
            "'torch'"
        )
    if not isinstance(chunk_frames, int) or chunk_frames < 1 or chunk_frames % t:
        raise ValueError(
            f"chunk_frames is {chunk_frames!r}; allowed: a positive multiple of kernel_size ({t}), a tubelet's frames"
        )


def limit(config: VideoMambaConfig, total: int | None) -> int:
    """Frames for which there are positions. Raises ValueError for a `total` that is no number of tubelets."""
    check_place("temporal_pos_total", total, 1, False)
    return (config.num_frames or 0) if total is None else total * config.kernel_size


def _frames(video: Video, num_frames: int | None, config: VideoMambaConfig, most: int) -> int:
    """How many there will be."""
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
    if num_frames > most:
        raise _past(most, num_frames)
    return num_frames


def _past(most: int, frames: int) -> ValueError:
    return ValueError(
        f"the video has {frames} frames or more, but there are temporal positions for {most}; pass all its tubelets as "
        "temporal_pos_total: the temporal table is stretched to it"
    )


def pieces(
    video: Video, config: VideoMambaConfig, step: int, device: torch.device, most: int, frames: int | None = None
) -> Iterator[Tensor]:
    """(B, C, t, H, W) on the device, `step` frames each, in the end the rest; `frames` in all, or None: not known, `most` at
    most.

    Raises ValueError or TypeError for what the iterator gives that does not fit.
    """
    items = video.split(step, dim=2) if isinstance(video, Tensor) else video
    waiting: list[Tensor] = []
    given, clips = 0, None
    for item in items:
        item = item.unsqueeze(2) if isinstance(item, Tensor) and item.dim() == 4 else item
        _check_item(item, config, clips)
        clips, given = item.shape[0], given + item.shape[2]
        if frames is not None and given > frames:
            raise ValueError(f"num_frames is {frames}, but the iterator gives more; say how many it gives")
        if given > most:
            raise _past(most, given)
        waiting.append(item.to(device, non_blocking=True))
        while sum(x.shape[2] for x in waiting) >= step:
            joined = torch.cat(waiting, dim=2) if len(waiting) > 1 else waiting[0]
            waiting = [joined[:, :, step:]] if joined.shape[2] > step else []
            yield joined[:, :, :step]
    if frames is not None and given < frames:
        raise ValueError(f"num_frames is {frames}, but the iterator gave {given}; say how many it gives")
    if not given:
        raise ValueError("the iterator gave no frames")
    if given % config.kernel_size:
        raise ValueError(f"the iterator gave {given} frames, which are no multiple of kernel_size ({config.kernel_size})")
    if any(x.shape[2] for x in waiting):
        yield torch.cat(waiting, dim=2)


def _check_item(item: Any, config: VideoMambaConfig, clips: int | None) -> None:
    channels, height, width = config.channels, *config.sides
    wanted = (item.shape[0] if clips is None else clips, channels, height, width) if isinstance(item, Tensor) else ()
    if not isinstance(item, Tensor) or item.dim() != 5 or (*item.shape[:2], *item.shape[3:]) != wanted:
        came = tuple(item.shape) if isinstance(item, Tensor) else type(item).__name__
        B = "B" if clips is None else clips
        raise ValueError(
            f"the iterator gave {came}; allowed: runs of frames ({B}, {channels}, t, {height}, {width}) or "
            f"single frames ({B}, {channels}, {height}, {width})"
        )
    if not item.is_floating_point():
        raise TypeError(f"frames have dtype {item.dtype}; allowed are floating-point dtypes, normalised")


def embedded(model: "Backbone", pieces: Iterable[Tensor], total: int | None) -> Iterator[Tensor]:
    """Tokens with positions of a video's pieces, one after the other; CLS goes with the first."""
    config, done = model.config, 0
    for piece in pieces:
        span = Span(done, piece.shape[2] // config.kernel_size, total or config.tubelets)
        yield model._place(piece, span)
        done += span.tubelets
