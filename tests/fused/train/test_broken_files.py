"""A training over 40 files of which 15 are broken in 15 ways: it ends well, and names the 15 with their reasons."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from trainings import SMALL, train
from videos import cut, encode, patch, write_video


def damaged_pictures(path: Path) -> None:
    data = encode(path, "libx264", frames=40, options={"x264-params": "bframes=0:keyint=40"}).read_bytes()
    start = data.index(b"mdat") + 2000
    for place in range(start, len(data) - 3000, 300):
        patch(path, place, random.Random(place).randbytes(40))


def cover_only(path: Path) -> None:
    import av

    encode(path, "mjpeg", frames=1)
    with av.open(str(path)) as source, av.open(str(path) + ".mp4", "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        stream.disposition = int(av.stream.Disposition.attached_pic)
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    os.replace(str(path) + ".mp4", path)


def without_decoder(path: Path) -> None:
    write_video(path, frames=4)
    path.write_bytes(path.read_bytes().replace(b"mp4v", b"none").replace(b"esds", b"none"))


def sound(path: Path) -> None:
    import wave

    with wave.open(str(path.with_suffix(".wav")), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(8000)
        out.writeframes(bytes(1600))
    os.replace(path.with_suffix(".wav"), path)


def gap(path: Path) -> None:
    path.mkdir()
    for number in (1, 2, 4, 5):
        encode(path / f"img_{number:05}.png", "png", frames=1, container="image2")


def title_and_cut(path: Path) -> None:
    encode(path, "mpeg4", frames=12, title="caf\xe9 film", muxing={"movflags": "faststart"})
    path.write_bytes(path.read_bytes().replace("caf\xe9 film".encode(), b"caf\xe9  film"))
    cut(path, 0.7)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {  # name -> (how it is made, a word of the reason)
    "empty.mp4": (lambda p: p.touch(), "empty"),
    "missing.mp4": (lambda p: p.symlink_to("nowhere.mp4"), "no such file"),
    "text.mp4": (lambda p: p.write_text("no video\n" * 99), "no video at all"),
    "zeros.mp4": (lambda p: p.write_bytes(bytes(9000)), "no video at all"),
    "sound.mp4": (sound, "no video in it"),
    "cover.mp4": (cover_only, "attached"),
    "decoder.mp4": (without_decoder, "no decoder"),
    "short.mp4": (lambda p: write_video(p, frames=1), "too short"),
    "cut.mp4": (lambda p: cut(encode(p, "libx264", frames=30, muxing={"movflags": "faststart"}), 0.6), "middle of a picture"),
    "index.mp4": (lambda p: cut(encode(p, "libx264", frames=30), 0.6), "truncated"),
    "cut.mkv": (lambda p: cut(encode(p, "libx264", frames=30), 0.6), "middle of a picture"),
    "cut.avi": (lambda p: cut(encode(p, "mpeg4", frames=30), 0.6), "truncated"),
    "pictures.mp4": (damaged_pictures, "corrupt"),
    "title.mp4": (title_and_cut, "middle of a picture"),
    "frames": (gap, "number 2 is followed by number 4"),
}


@pytest.mark.parametrize("workers", [0, 2])
def test_training_over_broken_files(workers: int, tmp_path: Path) -> None:
    for side in "ab":
        (tmp_path / "videos" / side).mkdir(parents=True)
    for i in range(25):
        write_video(tmp_path / "videos" / "ab"[i % 2] / f"{i}.mp4", frames=4, width=48, height=32)
    for i, (name, (make, _)) in enumerate(BROKEN.items()):
        make(tmp_path / "videos" / "ab"[i % 2] / name)
    options = [f"data.workers={workers}", "task=finetune", "epochs=1", "batch_size=4", "mix.probability=0"]
    arguments = [*SMALL, *options, f"data.train={tmp_path / 'videos'}", f"out={tmp_path / 'run'}"]
    code, output = train(arguments, folder=tmp_path)
    assert code == 0, output
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    named = {Path(line["file"]).name: line["bad"] for line in lines if "file" in line}
    assert named.keys() == BROKEN.keys()
    for name, (_, reason) in BROKEN.items():
        assert reason in named[name], f"{name}: {named[name]}"
        assert output.count(f"/{name}:") == 1, f"{name} is named {output.count(f'/{name}:')} times"
    assert "14 of 40 files could not be read" in output and "1 of 40 files is too short" in output
