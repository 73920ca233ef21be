"""A model's folder says how its clips are made, and reads them as its training's evaluation did."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from videos import encode, full_decode, write_images

from fused import VideoMamba, VideoMambaConfig
from fused.io.picture import centre_crop
from fused.io.preprocessing import Preprocessing
from fused.io.video import VideoError, VideoTooShort
from fused.train import ClipFolder

TIMES = [*range(0, 20, 2), *range(25, 100, 25)]  # ten frames within a second at 25 a second, then three, a second apart


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of a video of 13 frames at a variable rate, in a file with an index and without, and one of images."""
    folder = tmp_path_factory.mktemp("clips")
    for name, codec in (("a.mp4", "libx264"), ("b.mkv", "mpeg4")):
        encode(folder / name, codec, frames=13, times=TIMES, width=96, height=64, gop=4)
    write_images(folder / "c", [f"img_{i}.png" for i in range(1, 14)])
    write_images(folder / "c", ["flow_1.png"])
    return folder


def frames_of(path: Path) -> list[Tensor]:
    """Return all frames of a video, decoded by other code."""
    files = sorted(path.glob("img_*"), key=lambda file: int(file.stem[4:])) if path.is_dir() else [path]
    return [torch.from_numpy(image) for file in files for image in full_decode(file)]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"frames": 4, "size": 32}, [1, 4, 8, 11]),
        ({"frames": 3, "size": (24, 48)}, [2, 6, 10]),
        ({"frames": 3, "size": (48, 24), "sampling": "dense", "stride": 4}, [2, 6, 10]),
        ({"frames": 4, "size": 32, "fps": 1}, [0, 10, 11, 12]),
        ({"frames": 3, "size": 32, "fps": 2.5, "sampling": "dense", "stride": 2}, [9, 10, 11]),  # of 0 5 9 10 10 11 11 11 12 12
        ({"frames": 5, "size": 32, "sampling": "dense", "stride": 4, "short": "loop"}, [0, 4, 8, 12, 3]),
        ({"frames": 15, "size": 32, "short": "last"}, [*range(13), 12, 12]),
        ({"frames": 2, "size": 32, "mean": (0.5, 0.25, 0), "std": (0.5, 1, 2)}, [3, 9]),
    ],
    ids=["segments", "wide", "dense", "fps", "dense at a rate", "loop", "last", "other colours"],
)
@pytest.mark.parametrize("name", ["a.mp4", "b.mkv", "c"])
def test_clip_is_made_of_the_frames_that_it_says(name: str, options: dict[str, Any], wanted: list[int], videos: Path) -> None:
    preprocessing, path = Preprocessing(**options), videos / name
    if "fps" in options and name == "c":
        with pytest.raises(VideoError, match="states no times; allowed is fps=None, or a video file"):
            preprocessing.read(path, frame_pattern="img_*")
        return
    frames = frames_of(path)
    colours = {key: options[key] for key in ("mean", "std") if key in options}
    due = torch.stack([centre_crop(frames[number], options["size"], **colours) for number in wanted], 1)
    clip = preprocessing.read(str(path), frame_pattern="img_*" if name == "c" else None)
    assert clip.dtype == torch.float32 and clip.is_contiguous() and torch.equal(clip, due)


@pytest.mark.parametrize("sampling", ["segments", "dense"])
@pytest.mark.parametrize("options", [{}, {"fps": 2.5}, {"short": "loop"}, {"short": "last", "fps": 1}], ids=str)
def test_a_models_folder_reads_what_its_evaluation_read(
    options: dict[str, Any], sampling: str, videos: Path, tmp_path: Path
) -> None:
    frames, size = 6 if "short" in options else 2, (32, 48)
    given = {"sampling": sampling, "stride": 3, **options}
    (tmp_path / "list.txt").write_text("a.mp4\nb.mkv\n")
    dataset = ClipFolder(tmp_path / "list.txt", frames, size, train=False, prefix=videos, **given)
    model = VideoMamba(VideoMambaConfig.tiny(num_classes=2, depth=1, embed_dim=24, num_frames=frames, img_size=size))
    model.preprocessing = dataset.preprocessing
    model.save_pretrained(tmp_path / "model")
    read = VideoMamba.from_pretrained(tmp_path / "model").preprocessing
    assert read is not None and read == Preprocessing(frames, size, **given)
    for index, path in enumerate(dataset.files):
        assert torch.equal(read.read(path), dataset.sample(index, 0).clip)


def test_an_image_models_picture(videos: Path) -> None:
    """The middle frame of a video, or the image."""
    preprocessing = Preprocessing(None, (24, 32))
    for path, number in ((videos / "a.mp4", 6), (videos / "c" / "img_3.png", 0)):
        picture = preprocessing.read(path)
        assert picture.shape == (3, 24, 32) and torch.equal(picture, centre_crop(frames_of(path)[number], (24, 32)))


def test_what_gives_no_clip(videos: Path) -> None:
    for options, wrong in (
        ({"frames": 14}, "a.mp4: too short: it has 13 frames; .* at least 14 frames"),
        ({"frames": 5, "sampling": "dense", "stride": 4}, "it has 13 frames; .* 17 frames, 5 that are 4 apart"),
        ({"frames": 6, "fps": 1}, "it has 4 frames at 1 a second"),
    ):
        with pytest.raises(VideoTooShort, match=wrong):
            Preprocessing(size=8, **options).read(videos / "a.mp4")
    with pytest.raises(VideoError, match="images of 2 kinds"):
        Preprocessing(2, 8).read(videos / "c")
    with pytest.raises(VideoTooShort, match="it has 3 frames"):
        Preprocessing(4, 8).read(videos / "c", frame_pattern="img_*", stated_frames=3)
