"""The video loader: which frames, which values, and what it says of files that cannot give them."""

import builtins
import random
import wave

import av
import pytest
import torch
from videos import STEP, cut, remux, write_video

from fused.io.video import MEAN, STD, VideoError, count_frames, middle_frames, read_clip
from harness.fixtures.video import SHIPPED


def grey(clip):
    """The number of the frame that each frame of a clip of a made video was, from the middle of its green channel."""
    middle = clip[1, :, clip.shape[2] // 2, clip.shape[3] // 2] * STD[1] + MEAN[1]
    return ((middle * 255 - 20) / STEP).round().int().tolist()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "made.mp4")


@pytest.fixture(scope="module")
def shipped():
    return read_clip(SHIPPED, 4, 32)


@pytest.mark.parametrize(
    ("total", "frames", "start", "stop", "wanted"),
    [
        (8, 8, 0.0, 1.0, [0, 1, 2, 3, 4, 5, 6, 7]),
        (8, 4, 0.0, 1.0, [1, 3, 5, 7]),
        (9, 3, 0.0, 1.0, [1, 4, 7]),
        (132, 1, 0.0, 1.0, [66]),
        (132, 4, 0.5, 1.0, [74, 90, 107, 123]),
        (10, 4, 0.0, 1.0, [1, 3, 6, 8]),
        (10, 3, 0.3, 0.6, [3, 4, 5]),
        (10, 4, 0.3, 0.6, []),
        (0, 1, 0.0, 1.0, []),
    ],
)
def test_sample_takes_the_middle_of_each_segment(total, frames, start, stop, wanted):
    assert middle_frames(total, frames, start, stop) == wanted


def test_parts_that_meet_share_no_frame():
    halves = middle_frames(131, 65, 0.0, 0.5) + middle_frames(131, 65, 0.5, 1.0)
    assert halves == sorted(set(halves))


@pytest.mark.parametrize(("frames", "part"), [(1, (0, 1)), (7, (0, 1)), (50, (0, 1)), (4, (0.25, 0.5)), (3, (0.9, 1))])
def test_clip_is_made_of_the_frames_asked_for(made, frames, part):
    clip = read_clip(made, frames, 32, start=part[0], stop=part[1])
    assert grey(clip) == middle_frames(50, frames, *part)


def test_values_are_imagenets(made):
    clip = read_clip(made, 50, 16)
    assert clip.dtype == torch.float32
    for channel in range(3):
        wanted = ((20 + STEP * 30) / 255 - MEAN[channel]) / STD[channel]
        assert (clip[channel, 30] - wanted).abs().max() * STD[channel] * 255 < 3  # levels that the lossy codec may take


@pytest.mark.parametrize(("width", "height"), [(160, 64), (64, 160)])
def test_short_side_is_resized_and_the_middle_kept(tmp_path, width, height):
    video = write_video(tmp_path / "wide.mp4", frames=1, width=width, height=height, side=16)
    clip = read_clip(video, 1, 32)[1, 0] * STD[1] + MEAN[1]
    edges = (clip[:, 0] > 0.5).all().item(), (clip[:, -1] > 0.5).all().item()
    assert clip.shape == (32, 32)
    assert edges == ((False, False) if width > height else (True, True))  # the white edges of the long side are cut off


def test_shipped_clip(shipped):
    clip = shipped
    assert clip.shape == (3, 4, 32, 32)
    assert torch.isfinite(clip).all() and 0.5 < clip.std() < 2
    assert (clip[:, 1:] != clip[:, :-1]).flatten(2).any(-1).all()  # real frames, each another
    assert count_frames(SHIPPED) == 132


@pytest.mark.parametrize("name", ["bare.h264", "clip.mkv", "clip.ts"])
def test_container_that_does_not_state_the_number_of_frames(tmp_path, name, shipped):
    path = remux(tmp_path / name)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0
    assert torch.equal(read_clip(path, 4, 32), shipped)


def test_missing_empty_and_folder(tmp_path):
    (tmp_path / "empty.mp4").touch()
    for name, wrong in [("missing.mp4", "no such file"), ("empty.mp4", "empty"), ("", "a folder")]:
        with pytest.raises(VideoError, match=wrong) as error:
            read_clip(tmp_path / name, 1, 8)
        assert str(tmp_path / name) in str(error.value) and "allowed" in str(error.value)


def test_not_a_video(tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("not a video\n" * 100)
    with pytest.raises(VideoError, match="text.mp4: truncated, corrupt or no video at all"):
        read_clip(text, 1, 8)


def test_codec_that_is_not_known(tmp_path):
    path = write_video(tmp_path / "other.mp4", frames=2)
    path.write_bytes(path.read_bytes().replace(b"mp4v", b"none").replace(b"esds", b"none"))
    with pytest.raises(VideoError, match="other.mp4: there is no decoder for its video"):
        read_clip(path, 1, 8)


def test_sound_alone(tmp_path):
    path = tmp_path / "sound.wav"
    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(8000)
        out.writeframes(bytes(16000))
    with pytest.raises(VideoError, match="sound.wav: there is no video in it"):
        read_clip(path, 1, 8)


@pytest.mark.parametrize(
    ("name", "options", "wrong"),
    [
        ("index-last.mp4", {}, "truncated, corrupt or no video"),
        ("index-first.mp4", {"movflags": "faststart"}, "truncated: it ends in the middle of a picture"),
        ("clip.mkv", {}, "truncated: it ends in the middle of a picture"),
    ],
)
def test_truncated(tmp_path, name, options, wrong):
    path = cut(remux(tmp_path / name, **options), 0.5)
    with pytest.raises(VideoError, match=f"{name}: .*{wrong}"):
        read_clip(path, 4, 32)


@pytest.mark.parametrize("place", [220_000, 500_000, 900_000])  # inside frames 19, 50 and 106
def test_corrupt_in_the_middle(tmp_path, place):
    path = tmp_path / "corrupt.mp4"
    data = bytearray(SHIPPED.read_bytes())
    data[place : place + 3000] = random.Random(0).randbytes(3000)  # zeros would be valid H.264 in places
    path.write_bytes(data)
    torch.set_num_threads(2)  # the decoder's too: its threads can hide what is corrupt
    with pytest.raises(VideoError, match="corrupt.mp4: (truncated or )?corrupt (at|before) frame"):
        read_clip(path, 8, 32)


@pytest.mark.parametrize("part", [(0.0, 1.0), (0.2, 0.4)])
def test_too_few_frames(made, part):
    with pytest.raises(VideoError, match="made.mp4: too short: 51 frames were asked of .* it has 50 frames"):
        read_clip(made, 51, 8, start=part[0], stop=part[1])


@pytest.mark.parametrize(
    "wrong",
    [
        {"frames": 0}, {"frames": -1}, {"size": 0}, {"size": (8,)}, {"size": (8, 8, 8)}, {"size": "8"}, {"start": -0.1},
        {"stop": 1.1}, {"start": 0.5, "stop": 0.5}, {"start": float("nan")},
    ],
)  # fmt: skip
def test_arguments_out_of_range(wrong, unchecked):
    allowed = r"(frames|size) is \S+; allowed: at least 1|start is \S+ and stop \S+; allowed: .*0 <= start|pixels of a side"
    with pytest.raises(ValueError, match=allowed):
        read_clip(SHIPPED, **{"frames": 1, "size": 8} | wrong)


def test_without_pyav_the_message_names_the_extra(monkeypatch):
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *rest: real("not_there" if name == "av" else name, *rest))
    with pytest.raises(ImportError, match=r"videomamba-bench\[train\]"):
        read_clip(SHIPPED, 1, 8)
