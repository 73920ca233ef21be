"""Batches on the device, one ahead: their order, their bits, errors, and the time that was waited for them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from videos import write_video

from fused.io.picture import normalise
from fused.train.data.batches import Batch, batches
from fused.train.data.clips import ClipFolder
from fused.train.prefetch import Prefetcher, from_bytes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def made(count: int, read: list[int], size: int = 4) -> Iterator[Batch]:
    for i in range(count):
        read.append(i)
        clips = torch.full((2, 3, 2, size, size), i, dtype=torch.uint8)
        yield Batch(clips, torch.tensor([i, i + 1]), torch.tensor([0, 1]), ())


def negative(labels: Tensor) -> Tensor:
    return -labels


def test_one_ahead() -> None:
    read: list[int] = []
    feed = Prefetcher(made(3, read), DEVICE, negative)
    for i in range(3):
        batch = feed.take()
        assert batch.clips.device.type == batch.targets.device.type == DEVICE.type
        assert torch.equal(batch.clips.cpu(), from_bytes(torch.full((2, 3, 2, 4, 4), i, dtype=torch.uint8)))
        assert batch.targets.tolist() == [-i, -i - 1] and read == [*range(i + 1)]
        feed.advance()
        feed.advance()  # there is one already
        assert read == [*range(min(i + 2, 3))]
    assert len(feed.waits) == 3 and all(0 <= wait.seconds() < 5 for wait in feed.waits)
    with pytest.raises(StopIteration):
        feed.take()


def test_an_error_comes_with_its_own_batch() -> None:
    """Batches that were read before it are not lost."""

    def broken() -> Iterator[Batch]:
        yield from made(2, [])
        raise OSError("the disk is gone")

    feed = Prefetcher(broken(), DEVICE, negative)
    for _ in range(2):
        feed.take()
        feed.advance()
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            feed.take()


def test_large_batches_on_busy_streams() -> None:
    """Copies and their memory keep to the order of the work that reads them."""
    feed = Prefetcher(made(12, [], size=256), DEVICE, negative)
    sums = []
    for _ in range(12):
        batch = feed.take()
        if DEVICE.type == "cuda":
            torch.cuda._sleep(5_000_000)
        sums.append((batch.clips.mean(), batch.targets.sum()))
        del batch
        feed.advance()
    for i, (mean, total) in enumerate(sums):
        assert total.item() == -2 * i - 1
        wanted = from_bytes(torch.full((1, 3, 1, 1, 1), i, dtype=torch.uint8)).mean()
        assert mean.item() == pytest.approx(wanted.item(), rel=1e-4)


def test_bytes_are_normalised_as_on_the_host() -> None:
    """Bit for bit, for every byte, on every device."""
    every = torch.arange(256, dtype=torch.uint8).expand(2, 3, 1, 16, 256).contiguous()
    wanted = normalise(every[0, :, 0].float() / 255)
    got = from_bytes(every.to(DEVICE)).cpu()
    assert got.dtype == torch.float32 and all(torch.equal(clip[:, 0], wanted) for clip in got)


def test_bytes_of_a_folder(tmp_path: Path) -> None:
    """They are the normalised clips rounded to 8 bits, with the same frames, crops and mirroring."""
    for i in range(4):
        write_video(tmp_path / f"{i}.avi", frames=6 + i, width=48, height=40)
    options = {"train": True, "seed": 3}
    plain, as_bytes = (ClipFolder(tmp_path, 3, 32, **options, dtype=dtype) for dtype in (torch.float32, torch.uint8))
    pairs = zip(*(batches(data, 2, epoch=1, seed=0) for data in (plain, as_bytes)), strict=True)
    for wanted, got in pairs:
        assert got.clips.dtype == torch.uint8 and torch.equal(got.labels, wanted.labels)
        step = 0.5 / 255 / torch.tensor((0.229, 0.224, 0.225))[:, None, None, None]
        assert ((from_bytes(got.clips) - wanted.clips).abs() <= step * 1.001).all()
    with pytest.raises(ValueError, match="dtype must be torch.float32, or with train torch.uint8, got torch.uint8"):
        ClipFolder(tmp_path, 3, 32, train=False, dtype=torch.uint8)
    whole = ClipFolder(tmp_path, 3, (40, 48), train=True, scale=(1, 1), flip=0, dtype=torch.uint8)
    assert whole.sample(0, 0).clip.dtype == torch.uint8
