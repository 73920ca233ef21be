"""Keys and values of a video, computed once for any number of questions, chunk by chunk in bounded memory."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fused import backends
from fused.models.vamba.cache import LayerMemory, Pair, VambaCache
from fused.models.vamba.config import VambaConfig
from fused.models.vamba.layer import NO_POSITIONS, Shared, VambaDecoderLayer
from fused.models.vamba.pattern import Pattern, row_lengths
from fused.models.vamba.vision import frame_features
from fused.modules.state import State
from fused.rules import check_integer

CHUNK = 16384  # video tokens; the scratch memory of the published sizes is then 1.5 GB in bfloat16


class EncodesVideo:
    """The video stack of a `Vamba` by itself."""

    config: VambaConfig
    backend: str
    model: Any
    visual: nn.Module | None

    @torch.no_grad()
    def encode_video(
        self,
        video: Tensor | Iterable[Tensor],
        *,
        chunk: int = CHUNK,
        lengths: Sequence[int] | None = None,
        encoder_position_ids: Int[Tensor, "3 B Lv"] | None = None,
        offload: bool = False,
    ) -> VambaCache:
        """Return the cache of a video, for `generate` and for `forward`: what `forward` computes of it, to rounding.

        `video` is merged vision tokens (B, Lv, D), frames (T, 3, H, W) for the vision tower (see `vision.frame_features`), or
        an iterable of such parts in the order of time. Tokens pass all layers `chunk` at a time; between chunks the mixers
        carry their states, so that the result does not depend on `chunk`. Memory beyond the result is that of one chunk.
        `lengths` are the tokens of each row, what follows is padding. With `offload` keys and values go to host memory.

        Raises ValueError or TypeError for what does not fit, ValueError for frames without a vision tower.
        """
        check_integer("encode_video", "chunk", chunk, 1)
        if self.config.cross_attn_use_position_embeddings and encoder_position_ids is None:
            raise ValueError(NO_POSITIONS)
        total = video.shape[1] if isinstance(video, Tensor) and video.dim() == 3 else None
        store: PairStore | None = None
        states: list[State | None] = [None] * len(self.model.layers)
        start = 0
        for part in _regroup(self._token_parts(video), chunk):
            self._check_part(part)
            store = store or PairStore(len(self.model.layers), total, offload)
            positions = encoder_position_ids
            if positions is not None:
                positions = positions[:, :, start : start + part.shape[1]]
            self._encode_chunk(part, states, positions, store, is_last=start + part.shape[1] == total)
            start += part.shape[1]
        if store is None:
            raise ValueError("video is empty; allowed: tokens (B, Lv, D), frames (T, 3, H, W), or an iterable of parts")
        if encoder_position_ids is not None and encoder_position_ids.shape[2] != start:
            found = encoder_position_ids.shape[2]
            raise ValueError(f"encoder_position_ids has {found} tokens; allowed: the {start} of the video")
        keys, values = store.finish()
        rows = None if lengths is None else row_lengths([[n] for n in lengths], len(keys[0]), start)
        return VambaCache(keys, values, None if rows is None else tuple(row[0] for row in rows))

    def _encode_chunk(
        self, video: Tensor, states: list[State | None], positions: Tensor | None, store: "PairStore", is_last: bool
    ) -> None:
        """Store keys and values of a chunk (B, n, D) of all layers, and replace the mixers' states by those after it."""
        backend = backends.choose(self.backend, video.device)
        first: VambaDecoderLayer = self.model.layers[0]
        angles = None if positions is None else first.angles(positions, video.dtype)
        shared = Shared(backend, None, angles, Pattern(), Pattern(), None)
        for i, layer in enumerate(self.model.layers):
            memory = LayerMemory()
            video = layer.read_video(video, shared, memory)
            assert memory.video is not None
            store.add(i, memory.video)
            if i + 1 < len(states):
                video, states[i] = layer.vision_mixer(video, None, backend, states[i], not is_last or states[i] is not None)

    def _token_parts(self, video: Tensor | Iterable[Tensor]) -> Iterator[Float[Tensor, "B n D"]]:
        """Yield the video's tokens part by part; frames pass the vision tower in pairs."""
        parts = [video] if isinstance(video, Tensor) else video
        frames: Tensor | None = None  # of the pair that is not complete
        is_first = True
        for part in parts:
            if not isinstance(part, Tensor) or part.dim() not in (3, 4):
                found = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
                allowed = f"tokens (B, n, {self.config.hidden_size}), or frames (T, 3, H, W)"
                raise ValueError(f"a part of the video is {found}; allowed: {allowed}")
            if part.dim() == 3:
                yield part
                continue
            if self.visual is None:
                raise ValueError("the video has frames, and the model no vision tower; allowed: vision tokens (B, Lv, D)")
            frames = part if frames is None else torch.cat((frames, part))
            pairs = len(frames) // 2 * 2
            if pairs:
                yield frame_features(self.visual, frames[:pairs])[None]
                is_first = False
            frames = frames[pairs:]
        if is_first and frames is not None and len(frames):  # a single image is shown twice
            assert self.visual is not None
            yield frame_features(self.visual, frames.repeat(2, 1, 1, 1))[None]

    def _check_part(self, part: Tensor) -> None:
        """Raise ValueError for tokens of another width or device, TypeError for integers."""
        if part.shape[2] != self.config.hidden_size:
            raise ValueError(f"video has width {part.shape[2]}; allowed: hidden_size ({self.config.hidden_size})")
        if not part.is_floating_point():
            raise TypeError(f"video is {part.dtype}; allowed: floating point")
        device = self.model.embed_tokens.weight.device
        if part.device != device:
            raise ValueError(f"video is on {part.device}; allowed: {device}, where the model is")


class PairStore:
    """Keys and values of all layers, filled chunk by chunk; `total` is the number of tokens where it is known."""

    def __init__(self, layers: int, total: int | None, offload: bool) -> None:
        self.total, self.offload = total, offload
        self.whole: list[Pair | None] = [None] * layers
        self.parts: list[list[Pair]] = [[] for _ in range(layers)]
        self.filled = [0] * layers

    def add(self, layer: int, pair: Pair) -> None:
        """Copy a layer's keys and values of a chunk, (B, key heads, n, C), behind those before."""
        if self.total is None:
            moved = (self._room(t, t.shape[2]).copy_(t) for t in pair)
            self.parts[layer].append((next(moved), next(moved)))
            return
        whole = self.whole[layer]
        if whole is None:
            whole = self.whole[layer] = (self._room(pair[0], self.total), self._room(pair[1], self.total))
        start = self.filled[layer]
        self.filled[layer] = stop = start + pair[0].shape[2]
        for room, new in zip(whole, pair, strict=True):
            room[:, :, start:stop] = new

    def _room(self, like: Tensor, tokens: int) -> Tensor:
        """Return memory for so many tokens; pinned host memory if keys and values leave a GPU."""
        B, G, _, C = like.shape
        if self.offload and like.is_cuda:
            return torch.empty(B, G, tokens, C, dtype=like.dtype, pin_memory=True)
        return torch.empty(B, G, tokens, C, dtype=like.dtype, device="cpu" if self.offload else like.device)

    def finish(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return keys and values of all layers, each in one piece; the parts are freed layer by layer."""
        for i, parts in enumerate(self.parts):
            if parts:
                k = torch.cat([k for k, _ in parts], dim=2)
                self.whole[i] = k, torch.cat([v for _, v in parts], dim=2)
                parts.clear()
        pairs = [pair for pair in self.whole if pair is not None]
        return tuple(k for k, _ in pairs), tuple(v for _, v in pairs)


def _regroup(parts: Iterator[Tensor], chunk: int) -> Iterator[Tensor]:
    """Yield the tokens of all parts (B, n, D), `chunk` at a time and the rest at the end; parts without tokens once, alone.

    Raises ValueError for parts of different batches.
    """
    waiting: list[Tensor] = []
    count, rows, empty, any_yet = 0, None, None, False
    for part in parts:
        if rows is not None and len(part) != rows:
            raise ValueError(f"a part of the video has {len(part)} rows, the one before {rows}; allowed: the same in all parts")
        rows = len(part)
        if not part.shape[1]:
            empty = part
            continue
        waiting.append(part)
        count += part.shape[1]
        while count >= chunk:
            joined = waiting[0] if len(waiting) == 1 else torch.cat(waiting, dim=1)
            yield joined[:, :chunk]
            any_yet, count = True, count - chunk
            waiting = [joined[:, chunk:]] if count else []
    if waiting:
        yield waiting[0] if len(waiting) == 1 else torch.cat(waiting, dim=1)
    elif empty is not None and not any_yet:
        yield empty
