"""Keys and values of a video and of the text so far, with which a text goes on token by token."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class VambaCache:
    """Keys and values of every layer; no call changes one, so it serves any number of continuations.

    `video_keys` and `video_values` hold, for each layer, (B, key heads, Lv, C), `keys` and `values` (B, key heads, L, C) of the
    text. `video_lengths` are the video tokens of each row, of which the rest is padding. `valid` (B, L) is False at padding of
    the text. A cache without text holds a video only: empty tuples.
    """

    video_keys: tuple[Tensor, ...] = ()
    video_values: tuple[Tensor, ...] = ()
    video_lengths: tuple[int, ...] | None = None
    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()
    valid: Tensor | None = None

    @property
    def text_length(self) -> int:
        """The number of text tokens, with padding."""
        return self.keys[0].shape[2] if self.keys else 0

    @property
    def batch_size(self) -> int:
        """The number of rows."""
        return len((self.video_keys or self.keys)[0])

    def check(self, layers: int, key_heads: int, channels: int, batch: int, device: torch.device) -> None:
        """Raise ValueError unless the cache is of a model with these layers and heads, of this batch, and on the device."""
        for name in ("video_keys", "video_values", "keys", "values"):
            tensors = getattr(self, name)
            if len(tensors) not in (0, layers):
                raise ValueError(f"cache.{name} has {len(tensors)} layers; allowed: the {layers} of this model, or none")
            for tensor in tensors:
                due = (batch, key_heads, tensor.shape[2], channels)
                if tuple(tensor.shape) != due:
                    raise ValueError(
                        f"cache.{name} has shape {tuple(tensor.shape)}; allowed: {due} for this batch and this model. "
                        "A cache goes on with the rows that made it"
                    )
                if tensor.device != device:
                    raise ValueError(f"cache.{name} is on {tensor.device}, the tokens are on {device}")
        if not (self.video_keys or self.keys):
            raise ValueError("cache is empty: it holds neither a video nor a text; allowed: what a call with use_cache gave")
