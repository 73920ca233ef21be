"""Search by text: the nearest videos, features that are kept, and the way of a new user in three commands."""

import json
import os
import shlex
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from moving_squares import SMALL, folder, square
from pages import blocks_of
from retrieval_models import VIDEO, model, vocabulary
from trainings import train
from videos import write_images

from fused import VideoMambaConfig, VideoTextRetrieval
from fused.evaluate.retrieval_settings import RetrievalSettings
from fused.io.preprocessing import Preprocessing
from fused.search import search
from fused.search.__main__ import main

SETTINGS = RetrievalSettings(workers=0, device="cpu")


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    return folder(tmp_path / "videos").parent


@pytest.fixture
def made(videos: Path) -> VideoTextRetrieval:
    found = model()
    found.vocabulary, found.preprocessing, found.text_length = videos / "words.txt", Preprocessing(2, 32), 8
    return found


@pytest.mark.parametrize("rerank", [0, 2, 128])
def test_the_nearest_come_first(rerank: int, made: VideoTextRetrieval, videos: Path) -> None:
    """By cosine, of which the first `rerank` are in the order of their matching scores."""
    settings = RetrievalSettings(workers=0, device="cpu", rerank=rerank)
    found = search(made, videos, "A seven; moves LEFT", 6, settings=settings)
    assert {Path(one.video).name for one in found} == {f"0{i}.avi" for i in range(6)}
    words = made.tokenizer()(["a seven moves left"], 8)
    with torch.no_grad():
        out = [made(made.preprocessing.read(one.video)[None], *words) for one in found]
        cosines = [float(x.similarity * made.temp) for x in out]
        matches = [float(made.match(x.tokens, x.text, words.visible)[0, 1]) for x in out]
    assert [one.cosine for one in found] == pytest.approx(cosines, abs=1e-5)
    asked = [one.match for one in found if one.match is not None]
    assert len(asked) == min(rerank, 6) and asked == pytest.approx(matches[: len(asked)], abs=1e-5)
    assert asked == sorted(asked, reverse=True)
    rest = cosines[rerank:]
    assert rest == sorted(rest, reverse=True) and (not rest or not asked or min(cosines[:rerank]) >= rest[0])


def test_features_are_made_once(made: VideoTextRetrieval, videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = search(made, videos, "a seven moves left", 2, settings=SETTINGS)
    monkeypatch.setattr(VideoTextRetrieval, "encode_video", lambda *_, **__: pytest.fail("was encoded again"))
    assert search(made, videos, "a seven moves left", 2, settings=SETTINGS) == first
    assert search(made, videos, "a six moves right", 9, settings=SETTINGS) != first
    assert len(list(videos.glob(".fused-search/features-*/*.safetensors"))) == 6


@pytest.mark.parametrize("change", ["a frame", "a video while it is read", "the configuration"])
def test_features_of_what_has_changed_are_made_again(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, encode, seen = model(), VideoTextRetrieval.encode_video, []
    frames = write_images(tmp_path / "videos/frames", [f"{i}.png" for i in range(4)])
    video = square(tmp_path / "videos/a.avi", "black", "left")

    def count(self: VideoTextRetrieval, clips: torch.Tensor) -> object:
        if change == "a video while it is read" and not seen:
            square(video, "seven", "left", frames=5)
        seen.extend(clips)
        return encode(self, clips)

    def run() -> int:
        before = len(seen)
        made.vocabulary, made.preprocessing, made.text_length = vocabulary(tmp_path), Preprocessing(2, 32), 8
        search(made, tmp_path / "videos", "a seven", settings=SETTINGS)
        return len(seen) - before

    monkeypatch.setattr(VideoTextRetrieval, "encode_video", count)
    assert run() == 2
    if change == "a frame":
        shutil.copy(frames / "3.png", frames / "1.png")
    elif change == "the configuration":
        made = model(video=VideoMambaConfig(**VIDEO, scan_order="temporal"))  # with the same weights
    assert run() == (2 if change == "the configuration" else 1)
    assert run() == 0


def test_the_command(made: VideoTextRetrieval, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (videos / "broken.avi").write_bytes(b"no video")
    command = ["--model", str(made.save_pretrained(tmp_path / "model")), "--videos", str(videos), "workers=0", "device=cpu"]
    assert main([*command, "--text", "a seven", "--top", "2", "--features", str(tmp_path / "kept")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len([line for line in said if "cosine" in line]) == 2 and sum("left out" in line for line in said) == 1
    assert main([*command, "--text", "a seven", "--top", "2", "--features", str(tmp_path / "kept"), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2 and lines[0].keys() == {"video", "cosine", "match"} and lines[0]["match"] >= lines[1]["match"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--text", "zebra!"], 2, "text is 'zebra!', of which the vocabulary has no word"),
        (["--text", "seven", "--top", "0"], 2, "top is 0"),
        (["--text", "seven", "--videos", "no"], 2, "videos: root must be a folder of videos"),
        (["--text", "seven", "backend=native"], 2, "backend 'native' cannot run here"),
        (["--text", "seven", "--features", "{file}"], 2, "features cannot be kept in"),
        (["--text", "seven", "--videos", "{broken}"], 1, "none of 1 videos can be read"),
    ],
)  # fmt: skip
def test_bad_input(
    words: list[str], code: int, said: str, made: VideoTextRetrieval, videos: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.avi").write_bytes(b"no video")
    (tmp_path / "file").touch()
    given = [word.format(file=tmp_path / "file", broken=tmp_path / "broken") for word in words]
    command = ["--model", str(made.save_pretrained(tmp_path / "model")), "--videos", str(videos), "workers=0", "device=cpu"]
    assert main([*command, *given]) == code
    assert said in capsys.readouterr().err


def test_a_gpu_where_there_is_none(
    made: VideoTextRetrieval, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is 'cuda'; allowed here, where PyTorch finds no GPU"):
        search(made.save_pretrained(tmp_path / "model"), videos, "a seven", settings=RetrievalSettings(device="cuda"))


def test_new_user(tmp_path: Path) -> None:
    """Train on a folder of videos with captions, evaluate, search, by the guide's three commands; sizes are small ones."""
    captions = folder(tmp_path / "videos", 4, ["a seven moves left", "a six moves right", "a black moves left"])
    shutil.copy(captions.parent / "words.txt", tmp_path / "vocab.txt")
    [shell] = [block for block in blocks_of("fused/README.md") if "fused.search" in block.text]
    commands = [shlex.split(line) for line in shell.text.splitlines() if line.startswith("python")]
    small = [word for word in SMALL if not word.startswith("task=")]
    training = [*small, "batch_size=12", "epochs=40", "optim.lr=1e-2", "loss.mlm=0"]
    more = [training, ["merge_captions=true"], ["--json", "rerank=0"]]
    for (_, _, module, *given), own in zip(commands, more, strict=True):
        own = own if module == "fused.train" else [*own, "workers=0", "device=cpu"]
        code, text = train([*given, *own], fault=partial(os.chdir, tmp_path), folder=tmp_path, module=module)
        assert code == 0, text
        if module == "fused.evaluate":
            assert "3 texts among 12 videos" in text, text
    found = json.loads((tmp_path / "runs/search/test/results.json").read_text())
    assert found["text_to_video"]["cosine"]["r1"] > 80 and found["video_to_text"]["cosine"]["r1"] > 80
    nearest = [json.loads(line)["video"] for line in text.splitlines() if line.startswith("{")][:4]
    assert [Path(video).name[1] for video in nearest] == ["0"] * 4, text
