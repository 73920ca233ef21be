"""Keys and values of a video and of the text so far, by which answers go on token by token."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # keys and values, (B, key heads, tokens, C)


@dataclass(frozen=True)
class VambaCache:
    """Keys and values of every layer. No call changes one: a video's cache serves any number of questions.

    `video_keys` and `video_values` hold (B, key heads, Lv, C) a layer, `keys` and `values` (B, key heads, L, C) of the text.
    `video_lengths` are the tokens of each row's video; what follows them is padding. `valid` (B, L) is False at padding of
    the text. Without text, or without a video, the tuples are empty. The video may lie in host memory: each layer's part is
    then copied to the GPU while it is used.
    """

    video_keys: tuple[Tensor, ...] = ()
    video_values: tuple[Tensor, ...] = ()
    video_lengths: tuple[int, ...] | None = None
    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()
    valid: Tensor | None = None

    @property
    def text_length(self) -> int:
        """The number of text tokens of a row, padding included."""
        return self.keys[0].shape[2] if self.keys else 0

    @property
    def video_length(self) -> int:
        """The number of video tokens of a row, padding included."""
        return self.video_keys[0].shape[2] if self.video_keys else 0

    @property
    def batch_size(self) -> int:
        """The number of rows."""
        return len((*self.video_keys, *self.keys)[0])

    @property
    def nbytes(self) -> int:
        """The bytes of all keys and values."""
        return sum(t.nbytes for t in (*self.video_keys, *self.video_values, *self.keys, *self.values))

    def video_to(self, device: torch.device | str) -> "VambaCache":
        """Return the cache with the video's keys and values on a device."""
        keys, values = (tuple(t.to(device) for t in ts) for ts in (self.video_keys, self.video_values))
        return replace(self, video_keys=keys, video_values=values)

    def of_rows(self, rows: int) -> "VambaCache":
        """Return a video's cache of one row for `rows` texts, without copying. Raises ValueError for other caches."""
        if rows == self.batch_size:
            return self
        if self.batch_size != 1 or self.keys:
            what = "a text too" if self.keys else f"{self.batch_size} videos"
            raise ValueError(f"the cache holds {what}, the text has {rows} rows; allowed: a row a video, or one video for all")
        keys, values = (tuple(t.expand(rows, -1, -1, -1) for t in ts) for ts in (self.video_keys, self.video_values))
        lengths = None if self.video_lengths is None else self.video_lengths * rows
        return replace(self, video_keys=keys, video_values=values, video_lengths=lengths)

    def check(self, layers: int, key_heads: int, channels: int, batch: int, device: torch.device) -> None:
        """Raise unless the cache is of a model with these layers and heads and of this batch, the text's part on the device.

        ValueError for sizes and devices, also for an empty cache.
        """
        if not (self.video_keys or self.keys):
            raise ValueError("cache is empty, without a video and without a text; allowed: what use_cache or encode_video gave")
        for name in ("video_keys", "video_values", "keys", "values"):
            tensors: tuple[Tensor, ...] = getattr(self, name)
            if len(tensors) not in (0, layers):
                raise ValueError(f"cache.{name} has {len(tensors)} layers; allowed: the {layers} of this model, or none")
            for t in tensors:
                due = (batch, key_heads, t.shape[2], channels)
                if t.shape != due:
                    raise ValueError(
                        f"cache.{name} has shape {tuple(t.shape)}; allowed: {due} for this batch and this model. A text goes "
                        "on with the rows, and the model, whose cache it is"
                    )
                if t.device != device and (t.device.type != "cpu" or not name.startswith("video")):
                    raise ValueError(f"cache.{name} is on {t.device}; allowed: {device}, where the tokens are")


def layer_pairs(keys: tuple[Tensor, ...], values: tuple[Tensor, ...], layers: int) -> list[Pair | None]:
    """Return the pair of each layer, None where nothing is cached."""
    return list(zip(keys, values, strict=True)) if keys else [None] * layers


class LayerMemory:
    """The keys and values that one layer reads and adds to in one call.

    `video` is the pair of a video that is cached, on any device, or what the layer made of the video that it got. `text` is
    the pair of all text tokens so far.
    """

    def __init__(self, video: Pair | None = None, text: Pair | None = None) -> None:
        self.video, self.text = video, text
        self.has_video = video is not None

    def extend(self, k: Tensor, v: Tensor) -> Pair:
        """Add keys and values of new text tokens, and return those of all."""
        self.text = (k, v) if self.text is None else (torch.cat((self.text[0], k), 2), torch.cat((self.text[1], v), 2))
        return self.text


class SlotMemory(LayerMemory):
    """A memory of fixed size and place, for a CUDA graph: new tokens are written into it at `slot`, a tensor (1,)."""

    def __init__(self, video: Pair | None, text: Pair, size: int, slot: Tensor) -> None:
        k, v = text
        room = tuple(t.new_zeros(*t.shape[:2], size, t.shape[3]) for t in (k, v))
        for whole, begin in zip(room, (k, v), strict=True):
            whole[:, :, : k.shape[2]] = begin
        super().__init__(video, (room[0], room[1]))
        self.slot = slot

    def extend(self, k: Tensor, v: Tensor) -> Pair:
        """Write one token's keys and values, and return the whole memory: what is not written yet has to be masked."""
        assert self.text is not None
        for whole, new in zip(self.text, (k, v), strict=True):
            whole.index_copy_(2, self.slot, new)
        return self.text
