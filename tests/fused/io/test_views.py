"""Views of a video: upstream's frame numbers, crops and pixels, the clips of a model's own rule, and windows of long videos."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from videos import encode, full_decode, write_images

from fused.io.picture import normalise, resize_bytes
from fused.io.preprocessing import Preprocessing
from fused.io.video import VideoError, VideoTooShort
from fused.io.views import Views, Windows

RULED = Preprocessing(8, 32)


def numbers(views: Views, total: int, preprocessing: Preprocessing = RULED, fps: float = 25) -> list[list[int]]:
    return views.frame_numbers(preprocessing, Path("a.mp4"), total, [i / fps for i in range(total)])


@pytest.mark.parametrize(
    ("rule", "clips", "view", "total", "wanted"),
    [
        ("sparse", 4, 0, 300, [7, 44, 82, 119, 157, 194, 231, 269]),
        ("sparse", 4, 3, 300, [29, 66, 104, 141, 179, 216, 253, 291]),
        ("sparse", 1, 0, 300, [18, 55, 93, 130, 168, 205, 242, 280]),
        ("sparse", 1, 0, 21, [1, 3, 6, 9, 11, 13, 16, 19]),  # 2.5 and 12.5 are rounded to even
        ("sparse", 2, 1, 3, [0, 0, 0, 1, 1, 1, 2, 2]),
        ("raw", 2, 0, 40, [0, 5, 10, 15, 20, 25, 30, 35]),
        ("raw", 2, 1, 40, [2, 7, 12, 17, 22, 27, 32, 37]),
        ("raw", 2, 1, 30, [1, 5, 9, 13, 16, 20, 24, 28]),
        ("raw-middle", 1, 0, 43, [2, 7, 12, 17, 22, 27, 32, 37]),
        ("raw-middle", 1, 0, 5, [0, 0, 0, 0, 1, 2, 3, 4]),
    ],
)
def test_upstreams_frames(rule: str, clips: int, view: int, total: int, wanted: list[int]) -> None:
    assert numbers(Views(clips, frames=rule), total)[view] == wanted


@pytest.mark.parametrize("rule", ["sparse", "raw", "raw-middle"])
@pytest.mark.parametrize("frames", [1, 8, 32, 64])
def test_every_video_has_upstreams_frames(rule: str, frames: int) -> None:
    for total in (1, 2, 7, 31, 64, 1000):
        for clip in numbers(Views(1 if rule == "raw-middle" else 10, frames=rule), total, Preprocessing(frames, 32)):
            assert len(clip) == frames and clip == sorted(clip) and 0 <= clip[0] and clip[-1] < total


@pytest.mark.parametrize(
    ("preprocessing", "clips", "wanted"),
    [
        (Preprocessing(2, 32), 3, [[2, 12], [5, 15], [7, 17]]),
        (Preprocessing(2, 32), 1, [[5, 15]]),
        (Preprocessing(2, 32, "dense", 4), 3, [[3, 7], [7, 11], [11, 15]]),
        (Preprocessing(2, 32, fps=5), 2, [[0, 10], [5, 15]]),
    ],
)
def test_clips_by_the_models_own_rule(preprocessing: Preprocessing, clips: int, wanted: list[list[int]]) -> None:
    assert numbers(Views(clips), 20, preprocessing) == wanted


def image(height: int, width: int) -> Tensor:
    i = torch.arange(height * width * 3)
    return ((i * i * 31 + i * 17) % 251).to(torch.uint8).reshape(height, width, 3)


@pytest.mark.parametrize(
    ("before", "after", "first", "last", "total", "digest"),
    [
        ((48, 64), (32, 42), [67, 78, 135], [94, 62, 139], 519484, "9d90812dfb94be0e"),
        ((37, 51), (32, 44), [15, 56, 156], [146, 101, 100], 544796, "128bb9f0d6b02050"),
        ((9, 7), (41, 32), [0, 48, 158], [103, 137, 233], 511718, "9981e5d6847348e5"),
        ((240, 320), (224, 298), [4, 51, 151], [23, 25, 80], 25807461, "20c66e1a62204c59"),
        ((64, 64), (32, 32), [111, 117, 123], [104, 142, 116], 396816, "bd85b097cab20e29"),
        ((360, 480), (112, 149), [212, 155, 112], [154, 119, 199], 6444189, "d1b0e87c12d133b9"),
    ],
)
def test_bytes_of_opencv(
    before: tuple[int, int], after: tuple[int, int], first: list[int], last: list[int], total: int, digest: str
) -> None:
    """The numbers are those of cv2.resize(..., interpolation=cv2.INTER_LINEAR), OpenCV 5.0.0, and 4 as well."""
    out = resize_bytes(image(*before), *after).permute(1, 2, 0)
    assert out[0, 0].tolist() == first and out[-1, -1].tolist() == last
    assert int(out.sum()) == total and hashlib.sha256(out.contiguous().numpy().tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize(
    ("height", "width", "crops", "corners"),
    [
        (32, 57, 3, [(0, 0), (0, 12), (0, 25)]),  # 25 pixels are free: the middle is at int(12.5)
        (57, 32, 3, [(0, 0), (12, 0), (25, 0)]),
        (32, 57, 1, [(0, 12)]),
        (32, 32, 3, [(0, 0)] * 3),
        (32, 42, 2, [(0, 0), (0, 10)]),
    ],
)
@pytest.mark.parametrize("resize", ["antialiased", "upstream"])
def test_crops(height: int, width: int, crops: int, corners: list[tuple[int, int]], resize: str) -> None:
    """The frame has the height or width of the crop, so that no resize changes a pixel."""
    frame = image(height, width)
    found = Views(crops=crops, resize=resize).crops_of(frame, RULED)
    x = normalise(frame.permute(2, 0, 1).float() / 255)
    assert torch.equal(found, torch.stack([x[:, top : top + 32, left : left + 32] for top, left in corners]))


def test_pixels_of_imagenet() -> None:
    """A crop of 28 from a short side of 32: Pillow's pixels, but for 1 in few of them, of columns 8 on, for 43 - 28 = 15."""
    frame = image(60, 81)
    [found] = Views(resize="imagenet").crops_of(frame, Preprocessing(8, 28), as_bytes=True)
    pillow = Image.fromarray(frame.numpy()).resize((43, 32), Image.Resampling.BICUBIC)
    due = torch.from_numpy(np.array(pillow)).permute(2, 0, 1)[:, 2:30, 8:36]
    difference = (found.int() - due.int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.02
    shifted = torch.from_numpy(np.array(pillow)).permute(2, 0, 1)[:, 2:30, 7:35]
    assert (found.int() - shifted.int()).abs().max() > 1


def test_upstreams_long_side_is_rounded_down() -> None:
    """Of 45 x 80 pixels, 32 x 56.9 is resized to 32 x 56: the right crop begins at column 24."""
    right = Views(crops=3, resize="upstream").crops_of(image(45, 80), RULED, as_bytes=True)[2]
    assert torch.equal(right, resize_bytes(image(45, 80), 32, 56)[:, :, 24:])


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of a video of 13 frames and of a folder of images."""
    folder = tmp_path_factory.mktemp("views")
    encode(folder / "a.mp4", "libx264", frames=13, width=96, height=64, gop=4)
    write_images(folder / "c", [f"img_{i}.png" for i in range(1, 14)])
    return folder


def frames_of(path: Path) -> list[Tensor]:
    """Return all frames of a video, decoded by other code."""
    files = sorted(path.iterdir(), key=lambda file: int(file.stem[4:])) if path.is_dir() else [path]
    return [torch.from_numpy(np.array(picture)) for file in files for picture in full_decode(file)]


@pytest.mark.parametrize("name", ["a.mp4", "c"])
@pytest.mark.parametrize("preprocessing", [RULED, Preprocessing(None, 32), Preprocessing(3, (24, 48), "dense", 2)])
def test_one_view_is_the_clip_of_the_model(name: str, preprocessing: Preprocessing, videos: Path) -> None:
    assert torch.equal(Views().read(preprocessing, videos / name)[0], preprocessing.read(videos / name))


@pytest.mark.parametrize("name", ["a.mp4", "c"])
def test_views_are_of_the_frames_and_crops_that_they_name(name: str, videos: Path) -> None:
    views, preprocessing, frames = Views(4, 3, "sparse", "upstream"), Preprocessing(4, 32), frames_of(videos / name)
    found = views.read(preprocessing, videos / name)
    assert found.shape == (12, 3, 4, 32, 32) and found.dtype == torch.float32
    for clip, chosen in enumerate(numbers(views, 13, preprocessing)):
        for crop in range(3):
            due = torch.stack([views.crops_of(frames[number], preprocessing)[crop] for number in chosen], 1)
            assert torch.equal(found[3 * clip + crop], due)
    as_bytes = views.read(preprocessing, videos / name, as_bytes=True)
    assert as_bytes.dtype == torch.uint8 and torch.equal(found[5, :, 2], normalise(as_bytes[5, :, 2].float() / 255))


@pytest.mark.parametrize(
    ("seconds", "wanted"),
    [
        (40, [(0, 40)]),
        (60, [(0, 60)]),
        (61, [(0, 60), (16, 61)]),
        (100, [(0, 60), (16, 76), (32, 92), (48, 100), (64, 100)]),  # the next would hold 20 seconds
    ],
)
def test_windows(seconds: int, wanted: list[tuple[int, int]]) -> None:
    times = tuple(i / 4 for i in range(4 * seconds))
    assert [(start / 4, end / 4) for start, end in Windows().spans(times)] == wanted


def test_a_window_is_a_video_of_its_own(videos: Path) -> None:
    """Of 20 frames, 5 a second, windows of 2 seconds begin at 0, 1 and 2; what would begin at 3 is too short."""
    views = Views(2, windows=Windows(2, 1, 2))
    alone = numbers(Views(2), 10, Preprocessing(4, 32))
    due = [[start + number for number in clip] for start in (0, 5, 10) for clip in alone]
    assert numbers(views, 20, Preprocessing(4, 32), fps=5) == due
    with pytest.raises(VideoError, match="c: a folder of images states no times; windows need video files"):
        views.read(Preprocessing(4, 32), videos / "c")


def test_a_short_video(videos: Path) -> None:
    with pytest.raises(VideoTooShort, match="13 frames"):
        Views(2).read(Preprocessing(14, 32), videos / "a.mp4")
    assert len(Views(2, frames="sparse").read(Preprocessing(14, 32), videos / "a.mp4")) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clips": 0}, "views.clips is 0; allowed: a positive integer"),
        ({"crops": True}, "views.crops is True"),
        ({"frames": "uniform"}, "views.frames is 'uniform'; allowed: one of 'model', 'sparse', 'raw', 'raw-middle'"),
        ({"resize": "bicubic"}, "views.resize is 'bicubic'; allowed: one of 'antialiased', 'upstream', 'imagenet'"),
        ({"clips": 2, "frames": "raw-middle"}, "views.clips is 2; allowed: 1"),
    ],
)
def test_wrong_views(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Views(**options)


def test_wrong_windows_and_what_upstream_lacks() -> None:
    with pytest.raises(ValueError, match="windows.least is 3; allowed: up to windows.seconds"):
        Windows(2, 1, 3)
    with pytest.raises(ValueError, match="views.resize is 'upstream'; allowed: 'antialiased' for frames of 24x48"):
        Views(resize="upstream").check(Preprocessing(4, (24, 48)))
    with pytest.raises(ValueError, match="views.frames is 'sparse'; allowed: 'model'"):
        Views(frames="sparse").check(Preprocessing(4, 32, fps=8))
