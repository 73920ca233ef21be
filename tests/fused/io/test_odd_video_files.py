"""Video files that are damaged, cut, none at all, or have names that other programs stumble over."""

import os
from collections.abc import Callable
from pathlib import Path

import av
import pytest
from videos import assert_frames_equal, cut, encode, full_decode, patch

from fused.io.video import VideoError, count_frames, read_clip
from fused.train import ClipFolder
from fused.train.data.first_look import try_videos
from harness.fixtures.video import SHIPPED


def test_damaged_side_data_is_no_damaged_picture(tmp_path: Path) -> None:
    path = encode(tmp_path / "sei.mp4", "libx264", frames=12)
    wanted = full_decode(path)
    data = path.read_bytes()
    text = data.index(b"x264 - core")
    place = data.rindex(b"\x06\x05", 0, text)  # an SEI message: its type, user data, and then its length
    patch(path, place + 1, b"\x01\xff\xff\xff")  # another type, and longer than its packet
    assert_frames_equal(path, wanted)


@pytest.mark.parametrize("ending", ["mp4", "avi", "flv", "mkv"])
def test_title_that_is_no_utf8(ending: str, tmp_path: Path) -> None:
    path = encode(tmp_path / f"title.{ending}", "mpeg4" if ending != "flv" else "flv", frames=6, title="caf\xe9 film")
    data = path.read_bytes()
    assert "caf\xe9 film".encode() in data
    path.write_bytes(data.replace("caf\xe9 film".encode(), b"caf\xe9  film"))
    if int(av.__version__.split(".")[0]) < 19:  # later ones replace what is no UTF-8 by themselves
        with pytest.raises(UnicodeDecodeError), av.open(str(path)) as container:
            dict(container.metadata)
    assert count_frames(path) == 6


@pytest.mark.parametrize("name", ["cam1-12:30:05.mp4", "data:x.mp4", "-o.mp4", "a b%20c.mp4", "\udce9t\udce9.mp4", "Žluť.mp4"])
def test_name_of_a_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.rename(encode(tmp_path / "plain.mp4", "mpeg4", frames=6), name)
    assert count_frames(Path(name)) == 6 and read_clip(name, 2, 8).shape == (3, 2, 8, 8)
    with pytest.raises(VideoError, match="no such file"):
        count_frames(Path(f"no-{name}"))


@pytest.mark.parametrize(("name", "wrong"), [("x" * 300 + ".mp4", "name too long"), ("a\0.mp4", "no such file")])
def test_path_that_cannot_be_looked_up(name: str, wrong: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(VideoError, match=f"(?i){wrong}"):
        count_frames(path)
    (tmp_path / "list.txt").write_text(f"{SHIPPED} 0\n" + f"{name} 0\n" * ("\0" not in name))
    folder = ClipFolder(tmp_path / "list.txt", 2, 16, train=False, fps=5)
    assert try_videos(folder) == []


@pytest.mark.parametrize("ending", ["mp4", "mkv", "flv", "avi"])
def test_file_that_ends_in_mid_picture(ending: str, tmp_path: Path) -> None:
    codec = {"flv": "flv", "avi": "mpeg4"}.get(ending, "libx264")
    muxing = {"movflags": "faststart"} if ending == "mp4" else {}
    path = cut(encode(tmp_path / f"cut.{ending}", codec, frames=40, muxing=muxing), 0.6)
    with pytest.raises(VideoError, match=r"cut\.\w+: truncated"):
        read_clip(path, 4, 32)


@pytest.mark.parametrize(
    ("write", "wrong"),
    [
        (lambda p: p.mkdir(), "a folder without images"),
        (lambda p: os.mkfifo(p), "no file"),
        (lambda p: p.write_bytes(b"\0" * 5000), "no video at all"),
        (lambda p: p.symlink_to(p.parent / "nowhere"), "no such file"),
    ],
)
def test_what_is_no_video(write: Callable[[Path], None], wrong: str, tmp_path: Path) -> None:
    path = tmp_path / "x.mp4"
    write(path)
    with pytest.raises(VideoError, match=f"x.mp4: .*{wrong}"):
        count_frames(path)


def test_decoder_is_gone_when_its_frames_are(tmp_path: Path) -> None:
    """A process that is forked beside a decoder's threads would wait for them."""
    before = len(os.listdir("/proc/self/task"))
    for _ in range(3):
        read_clip(SHIPPED, 2, 16)
    assert len(os.listdir("/proc/self/task")) <= before + 2  # PyTorch's own


def test_a_size_that_no_memory_holds_is_the_files_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of a MP4 that states 2**31 entries; the machine's own lack of memory stays what it is."""
    path = encode(tmp_path / "a.mp4", "libx264")
    entries = path.read_bytes().index(b"stts") + 8
    with pytest.raises(VideoError, match=rf"{path}.*no video at all.*Cannot allocate memory"):
        count_frames(patch(path, entries, b"\x7f\xff\xff\xff"))

    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(av, "open", full)
    with pytest.raises(MemoryError):
        count_frames(path)
