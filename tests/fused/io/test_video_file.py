"""Frames of video files against a full decode: every codec and container, cuts, headers that lie, rotation, several streams."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from videos import assert_frames_equal, encode, full_decode, patch, remux

from fused.io.video import count_frames, decode_frames, open_video

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
