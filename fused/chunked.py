"""A whole video through a bidirectional model in the memory of a chunk of it: exactly, in inference and in training.

Layer by layer, each over all chunks (`sweep`): what lies between two layers is kept whole, what a layer makes of it is not.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import backends
from .config import VideoMambaConfig
from .sweep import sweep
from .tokens import sincos_positions

if TYPE_CHECKING:
    from .videomamba import Backbone

Video = Tensor | Iterable[Tensor]


class Passed(NamedTuple):
    """What the last layer leaves: its output and the residual stream before it, the features asked for, and the chunks."""

    hidden: Tensor
    residual: Tensor
    features: list[Tensor]
    chunks: list[slice]


def run(
    model: "Backbone", video: Video, chunk_frames: int, num_frames: int | None, offload: bool, taps: Sequence[int] = ()
) -> Passed:
    """Embed a video and send it through the blocks. `taps` as of `Backbone.encode`.

    Raises ValueError or TypeError for a video, a chunk length, a model or a backend that this cannot be done with.
    """
    config, device = model.config, model.cls_token.device
    frames = _check(model, video, chunk_frames, num_frames)
    backend = model._resolve(model.cls_token)
    hidden = model.pos_drop(_embed(model, _pieces(video, config, chunk_frames, frames, device)))
    chunks = _chunks(hidden.shape[1], chunk_frames // config.kernel_size * config.patches)
    residual: Any = None
    features = []
    for i, layer in enumerate(model.layers):
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


def piecewise(function: Callable[..., Tensor], chunks: Sequence[slice], *tensors: Tensor) -> Tensor:
    """function(*tensors), chunk by chunk along their tokens."""
    sizes = [c.stop - c.start for c in chunks]
    return torch.cat([function(*parts) for parts in zip(*(t.split(sizes, dim=1) for t in tensors), strict=True)], dim=1)


def decode(model: Any, passed: Passed) -> Tensor | None:
    """`VideoMambaEncoder`'s CLIP decoders on the features, (K, B, L, clip_output_dim); None without features."""
    if not passed.features:
        return None
    first = passed.features[0]
    positions = sincos_positions(first.shape[1], first.shape[2], first.device)[None]
    backend = model._resolve(first)
    pairs = zip(model.clip_decoder, passed.features, strict=True)
    return torch.stack(
        [piecewise(lambda x, p, own=own: own(x + p.to(x.dtype), backend), passed.chunks, f, positions) for own, f in pairs]
    )


def _check(model: "Backbone", video: Video, chunk_frames: int, num_frames: int | None) -> int:
    """The frames of the video."""
    config, t = model.config, model.config.kernel_size
    if config.num_frames is None:
        raise ValueError("forward_chunked: this is an image model (num_frames is None), which has no frames to cut; call it")
    if config.scan_order != "spatial":
        raise ValueError(
            f"forward_chunked: scan_order is {config.scan_order!r}; chunks are frames, which only 'spatial' order walks one "
            "after the other. Run the whole clip at once"
        )
    if model._asked != "auto" and not backends.abilities("mixer", model._asked).initial_state:
        raise ValueError(
            f"forward_chunked: backend {model._asked!r} cannot carry a state from chunk to chunk; build the model with "
            "backend='native' or 'torch'"
        )
    if not isinstance(chunk_frames, int) or chunk_frames < 1 or chunk_frames % t:
        raise ValueError(
            f"forward_chunked: chunk_frames is {chunk_frames!r}; allowed: a positive multiple of kernel_size ({t}), the "
            "frames that make one tubelet"
        )
    if isinstance(video, Tensor):
        wanted = (config.channels, *config.sides)
        if video.dim() != 5 or (video.shape[1], *video.shape[3:]) != wanted:
            channels, height, width = wanted
            raise ValueError(
                f"forward_chunked: clip has shape {tuple(video.shape)}; this model takes (B, {channels}, T, {height}, {width})"
            )
        if num_frames not in (None, video.shape[2]):
            raise ValueError(f"forward_chunked: num_frames is {num_frames!r}, but the clip has {video.shape[2]}; leave it out")
        num_frames = video.shape[2]
    elif num_frames is None:
        raise ValueError("forward_chunked: num_frames is None; with an iterator of frames, say how many it will give")
    if not isinstance(num_frames, int) or num_frames < 1 or num_frames % t:
        raise ValueError(
            f"forward_chunked: the video has {num_frames!r} frames; allowed: a positive multiple of kernel_size ({t})"
        )
    if num_frames > config.num_frames:
        raise ValueError(
            f"forward_chunked: the video has {num_frames} frames, but the table of temporal positions ends after "
            f"{config.num_frames}; build the model with num_frames={num_frames} or more, and interpolate "
            "temporal_pos_embedding when weights are loaded"
        )
    return num_frames


def _pieces(
    video: Video, config: VideoMambaConfig, chunk_frames: int, frames: int, device: torch.device
) -> Iterator[Tensor]:
    """(B, C, t, H, W) on the device, `chunk_frames` frames or in the end the rest."""
    if isinstance(video, Tensor):
        _check_dtype(video)
        yield from (piece.to(device, non_blocking=True) for piece in video.split(chunk_frames, dim=2))
        return
    waiting: list[Tensor] = []
    given, clips = 0, None
    for item in video:
        item = item.unsqueeze(2) if isinstance(item, Tensor) and item.dim() == 4 else item
        _check_item(item, config, clips)
        clips, given = item.shape[0], given + item.shape[2]
        if given > frames:
            raise ValueError(f"forward_chunked: num_frames is {frames}, but the iterator gives more; say how many it gives")
        waiting += item.to(device, non_blocking=True).split(1, dim=2)
        while len(waiting) >= chunk_frames:
            piece, waiting = waiting[:chunk_frames], waiting[chunk_frames:]
            yield torch.cat(piece, dim=2)
    if given < frames:
        raise ValueError(f"forward_chunked: num_frames is {frames}, but the iterator gave {given}; say how many it gives")
    if waiting:
        yield torch.cat(waiting, dim=2)


def _check_item(item: Any, config: VideoMambaConfig, clips: int | None) -> None:
    channels, height, width = config.channels, *config.sides
    wanted = (item.shape[0] if clips is None else clips, channels, height, width) if isinstance(item, Tensor) else ()
    if not isinstance(item, Tensor) or item.dim() != 5 or (*item.shape[:2], *item.shape[3:]) != wanted:
        came = tuple(item.shape) if isinstance(item, Tensor) else type(item).__name__
        B = "B" if clips is None else clips
        raise ValueError(
            f"forward_chunked: the iterator gave {came}; allowed: runs of frames ({B}, {channels}, t, {height}, {width}) or "
            f"single frames ({B}, {channels}, {height}, {width})"
        )
    _check_dtype(item)


def _check_dtype(frames: Tensor) -> None:
    if not frames.is_floating_point():
        raise TypeError(f"forward_chunked: frames have dtype {frames.dtype}; allowed are floating-point dtypes, normalised")


# The twin of `Backbone._embed` for a part of a clip. FOUNDER: swap for `Backbone.embed` once it takes an offset.
def _embed(model: "Backbone", pieces: Iterable[Tensor]) -> Tensor:
    """Tokens of the whole video, (B, L, D): written chunk by chunk, or for training joined in the end."""
    config = model.config
    done = 0
    tokens: list[Tensor] = []
    for piece in pieces:
        rows = model.temporal_pos_embedding[0, done : done + piece.shape[2] // config.kernel_size, None]
        positions = (rows + model.pos_embed[0, 1:]).flatten(0, 1)
        if not tokens:
            tokens.append((model.cls_token + model.pos_embed[:, :1]).expand(piece.shape[0], -1, -1))
        tokens.append(model.patch_embed(piece) + positions)
        done += rows.shape[0]
    return torch.cat(tokens, dim=1)


def _chunks(length: int, step: int) -> list[slice]:
    """Of tokens: CLS goes with the first."""
    edges = [0, *range(1 + step, length, step), length]
    return [slice(*pair) for pair in zip(edges, edges[1:], strict=False)]
