"""Frames of video files against a full decode: every codec and container, cuts, headers that lie, rotation, colours, names."""

import os
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from videos import cut, encode, full_decode, patch, remux

from fused.io import video_file
from fused.io.picture import centre_crop
from fused.io.preprocessing import Preprocessing
from fused.io.video import VideoError, count_frames, decode_frames, open_video, read_clip
from fused.io.video_stream import OpenVideoStream
from fused.train import ClipFolder
from fused.train.data.first_look import try_videos
from harness.fixtures.video import SHIPPED

CONTAINERS = ("mp4", "matroska", "webm", "mov", "avi", "mpegts", "flv", "nut")
HARDWARE = ("_nvenc", "_qsv", "_amf", "_v4l2m2m", "_vaapi", "_vulkan", "_mf", "_videotoolbox")
# jpeg2000 encodes for ever here; the others are names of encoders that have another name in this list, or write no packets
LEFT_OUT = ("jpeg2000", "vnull", "wrapped_avframe", "h264", "hevc", "vp8", "vp9", "av1")
MUST_BE_READ = (
    "libx264", "libx265", "libvpx", "libvpx-vp9", "libsvtav1", "mpeg4", "mpeg2video", "mpeg1video", "mjpeg", "msmpeg4", "wmv2",
    "flv", "h263", "ffv1", "huffyuv", "prores", "gif", "rawvideo",
)  # fmt: skip


def encoders() -> list[str]:
    """Return the names of all video encoders of this PyAV that need no special hardware."""
    found = []
    for name in sorted(av.codecs_available):
        try:
            codec = av.Codec(name, "w")
        except ValueError:
            continue
        if codec.type == "video" and not name.endswith(HARDWARE) and name not in LEFT_OUT:
            found.append(name)
    return found


def assert_frames_equal(path: Path, wanted: list[np.ndarray], reads_alone: bool = True) -> None:
    """Assert that the file has these frames, read all at once, and each by itself or with another."""
    total = len(wanted)
    assert count_frames(path) == total
    choices = [list(range(total))]
    if reads_alone:
        choices += [[0], [total - 1], [total // 2], [1, total - 2], list(range(0, total, 3))]
    for indices in choices:
        got = list(decode_frames(path, lambda n, times, indices=indices: indices))
        assert [number for number, _ in got] == sorted(set(indices))
        for number, image in got:
            assert np.array_equal(image.numpy(), wanted[number]), f"{path.name}: frame {number} of {total}"


@pytest.mark.parametrize("codec", encoders())
def test_every_codec_that_can_be_written(codec: str, tmp_path: Path) -> None:
    read = 0
    for container in CONTAINERS:
        path = tmp_path / f"{codec}.{container}"
        try:
            encode(path, codec, container=container, frames=13)
            wanted = full_decode(path)
            with av.open(str(path)) as opened:
                square = (opened.streams.video[0].sample_aspect_ratio or 1) == 1
        except Exception:  # the two do not go together, or nothing reads what was written
            continue
        if len(wanted) > 2 and square:
            assert_frames_equal(path, wanted)
            read += 1
    assert read or codec not in MUST_BE_READ or codec == "h263"  # whose pixels are never square


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("b.mp4", "libx264", {"x264-params": "keyint=8:bframes=3:b-pyramid=normal"}),
        ("b.mkv", "libx264", {"x264-params": "keyint=8:bframes=3"}),
        ("open.mp4", "libx264", {"x264-params": "keyint=8:min-keyint=8:open-gop=1:bframes=3"}),
        ("open.mkv", "libx265", {"x265-params": "keyint=8:min-keyint=8:open-gop=1:bframes=3:log-level=none"}),
        ("refresh.mp4", "libx264", {"x264-params": "keyint=8:intra-refresh=1:bframes=0"}),
        ("refresh.ts", "libx264", {"x264-params": "keyint=8:intra-refresh=1:bframes=0"}),
        ("fields.ts", "libx264", {"x264-params": "keyint=8:interlaced=1"}),
        ("altref.webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "b": "100k"}),
        ("altref.webm", "libvpx-vp9", {"auto-alt-ref": "1", "lag-in-frames": "16", "b": "100k"}),
        ("altref.mp4", "libvpx-vp9", {"auto-alt-ref": "1", "lag-in-frames": "16", "b": "100k"}),
        ("b.avi", "mpeg4", {"bf": "2"}),
        ("b.mp4", "mpeg4", {"bf": "2"}),
        ("b.ts", "mpeg2video", {"bf": "2"}),
        ("b.mpg", "mpeg1video", {"bf": "2"}),
    ],
)
def test_pictures_that_depend_on_later_ones(name: str, codec: str, options: dict[str, str], tmp_path: Path) -> None:
    path = encode(tmp_path / name, codec, frames=40, gop=8, options=options)
    assert_frames_equal(path, full_decode(path))


@pytest.mark.parametrize("skip", [1, 5, 11])
@pytest.mark.parametrize(
    ("codec", "ending"), [("libx264", "mp4"), ("libx264", "mkv"), ("libx265", "mp4"), ("libx265", "mkv"), ("libx265", "ts")]
)
def test_stream_copy_from_the_middle_of_an_open_group(codec: str, ending: str, skip: int, tmp_path: Path) -> None:
    parameters = "keyint=8:min-keyint=8:open-gop=1:bframes=3"
    key = "x264-params" if codec == "libx264" else "x265-params"
    quiet = ":log-level=none" if codec == "libx265" else ""
    source = encode(tmp_path / "whole.mkv", codec, frames=40, options={key: parameters + quiet})
    path = remux(tmp_path / f"part.{ending}", source, skip=skip)
    shown = tolerant_decode(path)
    assert 20 < len(shown) < 40
    assert_frames_equal(path, shown)


def tolerant_decode(path: Path) -> list[np.ndarray]:
    """Return the frames that a decoder shows which goes on after errors, without those marked as corrupt."""
    shown = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type, has_key = "FRAME", False
        for packet in container.demux(stream):
            has_key |= bool(packet.is_keyframe)
            try:
                shown += [f.to_ndarray(format="rgb24") for f in packet.decode() if has_key and not f.is_corrupt]
            except av.FFmpegError:
                continue
    return shown


def test_transport_stream_that_begins_in_mid_group(tmp_path: Path) -> None:
    whole = encode(tmp_path / "whole.ts", "libx264", frames=40, gop=10, options={"x264-params": "bframes=0"})
    data = whole.read_bytes()
    path = tmp_path / "part.ts"
    path.write_bytes(data[len(data) // 188 // 3 * 188 :])
    shown = full_decode(whole)
    total = count_frames(path)
    assert 0 < total < 40
    assert_frames_equal(path, shown[-total:])


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
@pytest.mark.parametrize("ending", ["avi", "mp4", "mkv", "flv"])
def test_variable_frame_rate(codec: str, ending: str, tmp_path: Path) -> None:
    times = [0, 1, 2, 6, 7, 15, 16, 17, 18, 30, 31, 48]
    try:
        path = encode(tmp_path / f"vfr.{ending}", codec, frames=12, times=times)
    except (ValueError, av.FFmpegError):
        pytest.skip(f"{codec} does not go into {ending}")
    assert_frames_equal(path, full_decode(path))
    video = open_video(path)
    if ending != "avi":  # in which a picture has a slot, and no time
        assert np.allclose(video.times, np.array(times) / 25, atol=2e-3)


def test_header_that_states_another_number_of_frames(tmp_path: Path) -> None:
    path = encode(tmp_path / "slots.avi", "mpeg4", frames=23, times=[2 * i for i in range(23)])
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames != 23  # it counts slots, of which every second is empty
    assert_frames_equal(path, full_decode(path))


def test_duration_that_is_not_reached(tmp_path: Path) -> None:
    path = encode(tmp_path / "long.flv", "flv", frames=20)
    place = path.read_bytes().index(b"duration") + 9
    patch(path, place, struct.pack(">d", 20.0))
    with av.open(str(path)) as container:
        assert (container.duration or 0) / 1e6 == 20
    assert_frames_equal(path, full_decode(path))


@pytest.mark.parametrize(("head", "tail"), [(7, 0), (0, 6), (5, 9)])
@pytest.mark.parametrize("bframes", [0, 2])
def test_edit_list(head: int, tail: int, bframes: int, tmp_path: Path) -> None:
    path = encode(tmp_path / "edit.mp4", "libx264", frames=40, options={"x264-params": f"keyint=8:bframes={bframes}"})
    data = path.read_bytes()
    place = data.index(b"elst") + 12  # version and flags, number of entries
    duration, media_time = struct.unpack(">ii", data[place : place + 8])
    with av.open(str(path)) as container:
        tick = round(1 / 25 / container.streams.video[0].time_base)
    patch(path, place, struct.pack(">ii", duration - (head + tail) * 40, media_time + head * tick))
    wanted = full_decode(path)
    assert len(wanted) == pytest.approx(40 - head - tail, abs=1)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 40
    assert_frames_equal(path, wanted)


@pytest.mark.parametrize("angle", [0, 90, 180, 270])
@pytest.mark.parametrize("is_mirrored", [False, True])
def test_display_matrix(angle: int, is_mirrored: bool, tmp_path: Path) -> None:
    path = encode(tmp_path / "phone.mp4", "libx264", frames=6, width=96, height=64)
    plain = full_decode(path)
    cos, sin = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[angle]
    flip = -1 if is_mirrored else 1
    matrix = [v * 65536 for v in (flip * cos, flip * sin, 0, -sin, cos, 0)] + [0, 0, 1 << 30]  # clockwise, after the mirror
    data = path.read_bytes()
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    patch(path, data.index(identity, data.index(b"tkhd")), struct.pack(">9i", *matrix))
    wanted = [np.rot90(image[:, ::-1] if is_mirrored else image, -angle // 90) for image in plain]
    assert_frames_equal(path, wanted)
    if not is_mirrored:
        with av.open(str(path)) as container:  # FFmpeg's own reading of the matrix, counter-clockwise
            assert next(container.decode(video=0)).rotation % 360 == -angle % 360


@pytest.mark.parametrize(("aspect", "width"), [(Fraction(16, 11), 256), (Fraction(1, 2), 88), (Fraction(1), 176)])
@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi"])
def test_pixel_aspect(aspect: Fraction, width: int, ending: str, tmp_path: Path) -> None:
    path = encode(tmp_path / f"wide.{ending}", "mpeg4", frames=3, aspect=aspect)
    (_, image), *_ = decode_frames(path, lambda n, times: [0])
    assert image.shape == (144, width, 3)
    columns = np.asarray(image, float)[..., 0].mean(0)
    plain = full_decode(path)[0][..., 0].mean(0)
    assert np.abs(columns - np.interp((np.arange(width) + 0.5) * 176 / width - 0.5, np.arange(176), plain)).max() < 6


def videos_and_pictures(path: Path, order: tuple[str, ...]) -> Path:
    """Write streams: "large" of 12 frames, "small" of 9, "default", small and marked as default, "cover" of 1 picture."""
    kinds = av.stream.Disposition
    with av.open(str(path), "w") as out:
        streams = []
        for kind in order:
            stream = out.add_stream("mjpeg" if kind == "cover" else "mpeg4", rate=25)
            stream.pix_fmt = "yuvj420p" if kind == "cover" else "yuv420p"
            stream.width, stream.height = {"large": (96, 64), "cover": (160, 160)}.get(kind, (48, 32))
            stream.disposition = int({"cover": kinds.attached_pic, "default": kinds.default}.get(kind, kinds(0)))
            streams.append((kind, stream))
        for kind, stream in streams:
            for i in range({"large": 12, "cover": 1}.get(kind, 9)):
                frame = av.VideoFrame.from_ndarray(np.full((stream.height, stream.width, 3), 10 * i, np.uint8), format="rgb24")
                frame = frame.reformat(format=stream.pix_fmt)
                frame.pts, frame.time_base = i, Fraction(1, 25)
                out.mux(stream.encode(frame))
            out.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("order", "chosen"),
    [(("cover", "large"), 1), (("large", "cover"), 0), (("small", "large"), 1), (("large", "small"), 0),
     (("large", "default"), 1)],
)
def test_the_shown_stream_is_taken_among_several(order: tuple[str, ...], chosen: int, tmp_path: Path) -> None:
    path = videos_and_pictures(tmp_path / f"streams.{'mp4' if 'cover' in order else 'mkv'}", order)
    if order[0] == "cover":
        with av.open(str(path)) as container:
            kinds = av.stream.Disposition
            assert any(kinds(s.disposition) & kinds.attached_pic for s in container.streams.video)
    wanted = max((full_decode(path, i) for i in range(2)), key=len) if "cover" in order else full_decode(path, chosen)
    assert_frames_equal(path, wanted)


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


def expected_rgb(y: int, u: int, v: int, kr: float, kb: float, is_full: bool) -> np.ndarray:
    """Return the colour of a pixel by ITU-R BT.601, 709 and 2020: luma weights of red and blue, limited or full range."""
    luma = y / 255 if is_full else (y - 16) / 219
    scale = 255 if is_full else 224
    pb, pr = (u - 128) / scale, (v - 128) / scale
    red, blue = luma + 2 * (1 - kr) * pr, luma + 2 * (1 - kb) * pb
    green = (luma - kr * red - kb * blue) / (1 - kr - kb)
    return np.clip(np.array([red, green, blue]) * 255, 0, 255)


@pytest.mark.parametrize("is_full", [False, True])
@pytest.mark.parametrize(
    ("matrix", "kr", "kb"), [(1, 0.2126, 0.0722), (5, 0.299, 0.114), (2, 0.299, 0.114), (9, 0.2627, 0.0593)]
)
def test_colours_are_those_that_the_stream_states(matrix: int, kr: float, kb: float, is_full: bool, tmp_path: Path) -> None:
    pixels = [(81, 90, 200), (145, 54, 84), (100, 160, 110), (180, 120, 140)]
    path = tmp_path / "colours.mkv"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv444p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if is_full else 1
        for i, pixel in enumerate(pixels):
            planes = np.repeat(np.array(pixel, np.uint8)[:, None], 32 * 32, 1).reshape(3, 32, 32)
            frame = av.VideoFrame.from_ndarray(planes, format="yuv444p")
            frame.colorspace, frame.color_range = matrix, 2 if is_full else 1
            frame.pts, frame.time_base = i, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    for number, image in decode_frames(path, lambda n, times: range(4)):
        wanted = expected_rgb(*pixels[number], kr, kb, is_full)
        assert np.abs(image[16, 16].numpy().astype(float) - wanted).max() <= 2, pixels[number]


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
