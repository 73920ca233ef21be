"""Video files whose frames are known only when they are decoded: how often a file is opened, and an index that proves wrong."""

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from videos import encode, full_decode, patch, remux

from fused.io import video_file
from fused.io.picture import centre_crop
from fused.io.preprocessing import Preprocessing
from fused.io.video import decode_frames, open_video
from fused.io.video_stream import OpenVideoStream


@pytest.fixture
def openings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list that gets the path of a video at each time that it is opened."""
    opened: list[Path] = []
    enter = OpenVideoStream.__enter__

    def count(opener: OpenVideoStream) -> Any:
        opened.append(opener._path)
        return enter(opener)

    monkeypatch.setattr(OpenVideoStream, "__enter__", count)
    return opened


@pytest.mark.parametrize("name", ["a.avi", "a.ts", "b.ts", "c.mkv"])
def test_file_that_is_decoded_to_be_indexed_is_decoded_once(name: str, tmp_path: Path, openings: list[Path]) -> None:
    codec = {"a": "mpeg4", "b": "libx264", "c": "libvpx"}[name[0]]
    wanted, path = full_decode(encode(tmp_path / name, codec, frames=24)), tmp_path / name
    for indices in ([3, 11, 20], [0, 23], list(range(24))):
        openings.clear()
        images = [image for _, image in decode_frames(path, lambda n, times, indices=indices: indices)]
        assert len(openings) == 2  # once for its packets
        assert all(np.array_equal(image.numpy(), wanted[i]) for i, image in zip(indices, images, strict=True))


def test_file_that_is_decoded_again(tmp_path: Path, openings: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the wanted frames are too large to be kept, and where not every packet shows one, so that others are wanted."""
    large = encode(tmp_path / "a.avi", "mpeg4", frames=24)
    mid_group = remux(tmp_path / "b.ts", encode(tmp_path / "b.mp4", "libx264", frames=24, gop=10), skip=3)
    for path, limit in ((large, 176 * 144 * 3), (mid_group, 2**27)):
        frames = open_video(path, decode_all=True)
        due = list(frames.frames([0, len(frames) - 1]))
        monkeypatch.setattr(video_file, "MAX_BYTES_KEPT", limit)
        openings.clear()
        found = list(decode_frames(path, lambda n, times: [0, n - 1]))
        assert [number for number, _ in found] == [0, len(frames) - 1] and len(openings) == 3
        assert all(torch.equal(image, other) for (_, image), other in zip(found, due, strict=True))


def hide(path: Path, number: int) -> None:
    """Make packet `number`, in order of decoding, the end of a sequence of H.264, for which the decoder shows nothing."""
    with av.open(str(path)) as container:
        packet = [p for p in container.demux(video=0) if p.size][number]
        size, place = packet.size, packet.pos
    assert place is not None
    patch(path, place, (size - 4).to_bytes(4, "big") + b"\x0a" + b"\xff" * (size - 6) + b"\x80")


def test_clip_of_a_file_whose_index_proves_wrong_while_it_is_decoded(tmp_path: Path) -> None:
    """A frame is decoded, then one is found to be hidden: the video is shorter than it seemed."""
    options = {"x264-params": "keyint=24:bframes=1:b-adapt=0:b-pyramid=none:scenecut=0"}  # 0 2 1 4 3 6 5 8 7 10 9 11
    path = encode(tmp_path / "hidden.mp4", "libx264", frames=12, options=options)
    for number in (2, 10):  # frames 1 and 9, to which no other refers
        hide(path, number)
    frames = [centre_crop(torch.from_numpy(image), 32) for image in full_decode(path)]
    assert len(frames) == 10 and len(open_video(path)) == 12
    # frames 3 and 9 of 12, 2 and 7 of 10; frame 3 of 12 is frame 2 of 10
    assert torch.equal(Preprocessing(2, 32).read(path), torch.stack([frames[2], frames[7]], 1))
    looped = [*frames, *frames[:3]]  # frame 0 is decoded before it is known that it comes again as the 11th, not the 13th
    assert torch.equal(Preprocessing(13, 32, short="loop").read(path), torch.stack(looped, 1))
