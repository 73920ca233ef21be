"""Batches on the device, one ahead: while a GPU works on one, the next is copied and normalised on another stream.

    feed = Prefetcher(batches(...), device, encode)
    for batch in feed:
        train(batch.clips, batch.targets)
"""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar, cast

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fused.io.picture import MEAN, STD
from fused.train.data.batches import BadFile, Batch

Read = TypeVar("Read")
Given = TypeVar("Given")


@dataclass(frozen=True)
class DeviceBatch:
    """A batch on the device."""

    clips: Tensor  # (B, 3, T, H, W) float32, normalised; images (B, 3, H, W); with views (B, V, 3, T, H, W)
    targets: Tensor  # as the prefetcher's `encode` returns them
    indices: Tensor  # int64 (B,) into the dataset's files, on the CPU
    bad_files: tuple[BadFile, ...]


class Wait:
    """The time in which a device had nothing to do because a batch was not there yet."""

    def __init__(self, seconds: float, before: torch.cuda.Event | None, after: torch.cuda.Event | None) -> None:
        """Take the time in which the host waited, and events behind the device's earlier work and before its next."""
        self._seconds, self._before, self._after = seconds, before, after

    def seconds(self) -> float:
        """Return the time. The work behind the batch must be done."""
        if self._before is None or self._after is None:
            return self._seconds
        return min(self._seconds, self._before.elapsed_time(self._after) / 1000)


class Feed(Generic[Read, Given]):
    """The batches of an iterator, of which one is read while the device works on the one before.

    `waits` holds the waits of the batches that were taken since its reader emptied it.
    """

    def __init__(self, batches: Iterator[Read], device: torch.device) -> None:
        self._batches, self._device = batches, device
        self._next: Given | None = None
        self._error: Exception | None = None  # StopIteration at the end
        self._wait: tuple[float, torch.cuda.Event | None] = 0.0, None
        self.waits: list[Wait] = []

    def take(self) -> Given:
        """Return the next batch. Raise the error of reading it, or StopIteration."""
        if self._next is None and self._error is None:
            self.advance()
        if self._error is not None:
            raise self._error
        batch, self._next = self._next, None
        assert batch is not None
        self.receive(batch)
        self.waits.append(Wait(*self._wait, self._event()))
        return batch

    def advance(self) -> None:
        """Read the next batch, if there is one. An error is raised when it is taken."""
        if self._next is not None or self._error is not None:
            return
        before, start = self._event(), time.perf_counter()
        try:
            batch = next(self._batches)
        except Exception as error:
            self._error = error
            return
        self._wait = time.perf_counter() - start, before
        self._next = self.send(batch)

    def send(self, batch: Read) -> Given:
        """Return what is taken in the place of a batch that was read."""
        return cast(Given, batch)

    def receive(self, batch: Given) -> None:
        """Let the current stream wait until a batch that is taken is there."""

    def _event(self) -> torch.cuda.Event | None:
        """Return an event behind the device's work so far that tells the time, None on a CPU."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


class Prefetcher(Feed[Batch, DeviceBatch]):
    """The batches of an iterator on a device, of which at most one more than the current one is there.

    `encode` turns labels on the CPU, int64 (B,), into the targets that are copied to the device; without it they are the
    labels.
    """

    def __init__(
        self, batches: Iterator[Batch], device: torch.device, encode: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__(batches, device)
        self._encode, self._copies = encode, torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None

    def __iter__(self) -> Iterator[DeviceBatch]:
        """Yield all batches; the next one is read when the work on the current one has been given to the device."""
        while True:
            try:
                batch = self.take()
            except StopIteration:
                return
            yield batch
            self.advance()

    def receive(self, batch: DeviceBatch) -> None:
        """Let the current stream wait for the batch's copy."""
        if self._copies is not None and self._copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(self._copied)
            for tensor in (batch.clips, batch.targets):
                tensor.record_stream(stream)  # its memory is not used again before the stream has come this far

    def send(self, batch: Batch) -> DeviceBatch:
        """Begin to copy and normalise a batch."""
        clips, targets = batch.clips, batch.labels if self._encode is None else self._encode(batch.labels)
        with nullcontext() if self._copies is None else torch.cuda.stream(self._copies):
            if self._copies is not None:
                clips, targets = (x.pin_memory().to(self._device, non_blocking=True) for x in (clips, targets))
            if clips.dtype == torch.uint8:
                clips = from_bytes(clips)
            if self._copies is not None:
                self._copied = torch.cuda.Event()
                self._copied.record(self._copies)
        return DeviceBatch(clips, targets, batch.indices, batch.bad_files)


def from_bytes(clips: UInt8[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
    """Return clips (..., 3, T, H, W) or images (B, 3, H, W) of bytes, normalised, float32, with the same bits on every device.

    The mean and the standard deviation are ImageNet's.
    """
    scale, mean, std = _constants(clips.device)
    if clips.dim() == 4:
        scale, mean, std = scale[..., 0], mean[..., 0], std[..., 0]
    return clips.to(torch.float32).div_(scale).sub_(mean).div_(std)


@lru_cache(maxsize=16)  # to make them in every step would wait for the GPU
@torch.inference_mode(False)
def _constants(device: torch.device) -> tuple[Tensor, ...]:
    """Return 255, mean and standard deviation, each (3, 1, 1, 1), to divide by.

    They are tensors, since PyTorch multiplies by the rounded reciprocal of a number on a GPU.
    """
    return torch.tensor([(255.0,) * 3, MEAN, STD])[..., None, None, None].to(device).unbind()
