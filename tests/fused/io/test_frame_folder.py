"""Folders of images as videos: order, patterns, numbers that are missing or stated, and kinds of images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from videos import write_images

from fused.io.preprocessing import Preprocessing
from fused.io.video import VideoError, VideoTooShort, count_frames, decode_frames, read_clip
from fused.io.video_stream import OpenVideoStream
from fused.train import ClipFolder


def order(folder: Path, **options: object) -> list[int]:
    """Return the places of the images in the order in which they are read."""
    images = decode_frames(folder, lambda total, times: range(total), **options)  # type: ignore[arg-type]
    return [round(int(image[12, 16, 0]) / 10) for _, image in images]


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["img_00001.png", "img_00002.png", "img_00003.png"], [0, 1, 2]),
        (["0.png", "1.png", "10.png", "2.png", "3.png", "4.png", "5.png", "6.png", "7.png", "8.png", "9.png"], None),
        (["v2_f9.png", "v2_f10.png", "v2_f8.png"], [2, 0, 1]),
        (["000.png", "005.png", "010.png"], [0, 1, 2]),
        (["b.png", "a.png"], [1, 0]),
        (["frame 3 of film.png", "frame 1 of film.png", "frame 2 of film.png"], [1, 2, 0]),
    ],
)
def test_order_of_frames(names: list[str], wanted: list[int] | None, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "video", names)
    (folder / "readme.txt").write_text("text")
    (folder / ".hidden_7.png").write_bytes(b"")
    assert count_frames(folder) == len(names)
    assert order(folder) == (wanted or [0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 2])


@pytest.mark.parametrize(("suffix", "codec"), [(".jpg", "mjpeg"), (".JPEG", "mjpeg"), (".webp", "libwebp"), (".bmp", "bmp")])
def test_kinds_of_images(suffix: str, codec: str, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "video", [f"{i}{suffix}" for i in range(4)], codec)
    assert order(folder) == [0, 1, 2, 3]
    assert read_clip(folder, 2, 16).shape == (3, 2, 16, 16)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_orientation_of_exif(suffix: str, orientation: int, tmp_path: Path) -> None:
    quarters = np.repeat(np.repeat(np.array([[250, 160], [90, 10]], np.uint8), 16, 0), 24, 1)[..., None].repeat(3, 2)
    exif = Image.Exif()
    for place, value in enumerate((1, orientation)):
        exif[0x0112], exif[0x010F] = value, "maker"
        Image.fromarray(quarters).save(tmp_path / f"{place}{suffix}", exif=exif)
    (_, stored), (_, shown) = decode_frames(tmp_path, lambda total, times: [0, 1])
    wanted = Image.fromarray(stored.numpy())
    wanted.getexif()[0x0112] = orientation
    assert np.array_equal(shown.numpy(), np.asarray(ImageOps.exif_transpose(wanted)))


def test_pattern_chooses_among_several_kinds(tmp_path: Path) -> None:
    names = [f"{kind}_{i:05}.png" for kind in ("img", "flow_x", "flow_y") for i in (1, 2, 3)]
    folder = write_images(tmp_path / "video", names)
    with pytest.raises(VideoError, match=r"images of 3 kinds: flow_x_\*\.png.*data.frame_pattern='img_\*.jpg'"):
        count_frames(folder)
    assert order(folder, pattern="flow_x_*") == [3, 4, 5]
    with pytest.raises(VideoError, match="without images named rgb"):
        order(folder, pattern="rgb*")


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("img_%05d.png", [0, 1]), ("img_{:05}.png", [0, 1]), ("img_{:05d}.png", [0, 1]), ("img_{i:05d}.png", [0, 1]),
        ("img_%d.png", [0, 1]), ("img_{}.png", [0, 1]), ("flow_?_%05d.png", [2, 3]), ("i[m]g_*.png", [0, 1, 5]),
        ("100%_*.png", [4]), ("100%_%d.png", [4]),
    ],
)  # fmt: skip
def test_patterns_with_a_number(pattern: str, wanted: list[int], tmp_path: Path) -> None:
    """As C, FFmpeg and Python write them; upstream's `filename_tmpl` is one."""
    names = ["img_00009.png", "img_00010.png", "flow_x_00001.png", "flow_x_00002.png", "100%_7.png", "img_x.png"]
    folder = write_images(tmp_path / "video", names)
    assert order(folder, pattern=pattern) == wanted
    for wrong, reason in (("img_%06d.png", "without images named img_%06d.png"), ("*_{:05}.png", "images of 2 kinds")):
        with pytest.raises(VideoError, match=reason):
            order(folder, pattern=wrong)


@pytest.mark.parametrize(
    ("names", "wrong"),
    [
        (["1.png", "2.png", "4.png", "5.png"], "number 2 is followed by number 4, where others are 1 apart"),
        (["a_1.png", "a_01.png", "a_2.png"], "several images of number 1"),
        ([], "a folder without images"),
    ],
)
def test_folder_that_is_incomplete(names: list[str], wrong: str, tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=f"video: .*{wrong}"):
        count_frames(write_images(tmp_path / "video", names))


def test_number_of_frames_that_a_list_states(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "frames" / "a", [f"img_{i:05}.png" for i in range(1, 7)])
    assert order(folder, stated=4) == [0, 1, 2, 3]
    with pytest.raises(VideoError, match="the list states 9 frames, and it holds 6"):
        order(folder, stated=9)
    (tmp_path / "list.txt").write_text(f"{folder} 3 0\n{folder.parent / 'b'} 3 1\n")
    clips = ClipFolder(tmp_path / "list.txt", 3, (8, 16), train=False)
    sample = clips.sample(0, 0)
    assert sample.clip.shape == (3, 3, 8, 16) and sample.label == 0
    (tmp_path / "list.txt").write_text(f"{folder} 3 0\n")
    with pytest.raises(VideoTooShort, match="it has 3 frames"):
        ClipFolder(tmp_path / "list.txt", 4, 8, train=False).sample(0, 0)


def test_image_that_cannot_be_read(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "video", ["1.png", "2.png", "3.png"])
    (folder / "2.png").write_bytes(b"no image")
    with pytest.raises(VideoError, match=r"2\.png: truncated, corrupt or no video"):
        read_clip(folder, 3, 8)
    assert read_clip(folder, 1, 8, stop=0.4).shape == (3, 1, 8, 8)


def test_images_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, opened = write_images(tmp_path / "video", ["1.png", "2.png", "3.png"]), []
    enter = OpenVideoStream.__enter__

    def count(opener: OpenVideoStream) -> Any:
        opened.append(opener)
        return enter(opener)

    monkeypatch.setattr(OpenVideoStream, "__enter__", count)
    read_clip(folder, 2, 8)
    assert len(opened) == 2


def test_rate_needs_times(tmp_path: Path) -> None:
    write_images(tmp_path / "a" / "video", ["1.png", "2.png"])
    with pytest.raises(VideoError, match="states no times"):
        Preprocessing(1, 8, fps=2).read(tmp_path / "a" / "video")
    (tmp_path / "list.txt").write_text("a/video 0\nb.avi 1\n")  # before a file is opened
    for root in (tmp_path, tmp_path / "list.txt"):
        with pytest.raises(ValueError, match=r"fps is 2, but .*/a/video is a folder of images.*; allowed: fps=None"):
            ClipFolder(root, 1, 8, train=False, fps=2)
