"""The most likely classes of a file, in Python and on the command line."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from videos import write_images, write_video

import fused
from fused import VideoMamba, VideoMambaConfig, VideoMambaEncoder
from fused.io.preprocessing import Preprocessing
from fused.io.video import VideoError
from fused.io.views import Views
from fused.predict.__main__ import main

NAMES = ["dark", "grey", "light"]


def small_model(**options: object) -> VideoMamba:
    torch.manual_seed(0)
    fields = {"depth": 1, "embed_dim": 32, "img_size": 32, "num_frames": 2, "num_classes": 3} | options
    model = VideoMamba(VideoMambaConfig(**fields)).eval()
    nn.init.normal_(model.head.weight, std=0.3)  # answers that differ
    return model


@pytest.fixture(scope="module")
def model() -> VideoMamba:
    model = small_model()
    model.labels, model.preprocessing = NAMES, Preprocessing(2, 32)
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_video(folder / "a.avi", frames=9, width=64, height=48, side=10, step=20)
    write_images(folder / "frames", [f"img_{i}.png" for i in range(1, 5)])
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


def test_one_view(model: VideoMamba, files: Path) -> None:
    for name in ("a.avi", "frames"):
        [due] = model.top_labels(model(model.preprocessing.read(files / name)[None]), top=2)
        assert fused.classify(model, files / name, top=2) == due


def test_softmax_comes_before_the_mean(model: VideoMamba, files: Path) -> None:
    views = Views(3, 2)
    clips = views.read(model.preprocessing, files / "a.avi")
    logits = torch.cat([model(clip[None]) for clip in clips]).double()
    due, wrong = logits.softmax(1).mean(0), logits.mean(0).softmax(0)
    found = dict(fused.classify(model, files / "a.avi", views=views))
    values = torch.tensor([found[name] for name in NAMES], dtype=torch.float64)
    torch.testing.assert_close(values, due, rtol=0, atol=1e-6)
    assert (due - wrong).abs().max() > 1e-5  # the two rules differ here by more than the tolerance


def test_model_without_names_and_preprocessing(files: Path) -> None:
    plain = small_model()
    assert [name for name, _ in sorted(fused.classify(plain, files / "a.avi"))] == ["0", "1", "2"]
    assert sum(p for _, p in fused.classify(plain, files / "a.avi")) == pytest.approx(1)


def test_image_model(files: Path) -> None:
    picture = next(iter(sorted((files / "frames").iterdir())))
    image_model = small_model(num_frames=None)
    clip = Preprocessing(None, 32).read(picture)
    best = int(image_model(clip[None]).argmax())
    assert fused.classify(image_model, picture, top=1)[0][0] == str(best)


def test_wrong_arguments(model: VideoMamba, files: Path) -> None:
    path = files / "a.avi"
    with pytest.raises(VideoError, match="broken.mp4"):
        fused.classify(model, files / "broken.mp4")
    with pytest.raises(ValueError, match="classify: top must be an integer from 1 up, got 0"):
        fused.classify(model, path, 0)
    with pytest.raises(TypeError, match="model is a VideoMambaEncoder; allowed: a VideoMamba with classes"):
        fused.classify(VideoMambaEncoder(model.config), path)
    with pytest.raises(ValueError, match="one output, which is a number and no class"):
        fused.classify(small_model(num_classes=1), path)
    with pytest.raises(ValueError, match="training mode"):
        fused.classify(small_model().train(), path)
    with pytest.raises(ValueError, match="model takes 1 channels; allowed: 3"):
        fused.classify(small_model(channels=1), path)
    other = small_model()
    other.preprocessing = Preprocessing(4, 32)
    with pytest.raises(ValueError, match=r"preprocessing has 4 frames of size 32; allowed: 2 of \(32, 32\)"):
        fused.classify(other, path)


def test_command(model: VideoMamba, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, path = str(model.save_pretrained(tmp_path / "model")), str(files / "a.avi")
    due = fused.classify(model, path, 2)
    assert main(["--model", folder, path, "--top", "2", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{path}:", *(f"  {share:7.2%}  {name}" for name, share in due)]
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    assert main(["--model", folder, path, "--top", "1", "--device", "cpu", "--labels", str(tmp_path / "names.txt")]) == 0
    assert capsys.readouterr().out.split()[-1] == "abc"[NAMES.index(due[0][0])]
    command = ["--model", folder, "--json", "--protocol", "k400", "--views", "2", "--device", "cpu", path]
    assert main([*command, str(files / "broken.mp4")]) == 1  # the other file has its prediction
    out, err = capsys.readouterr()
    one, two = map(json.loads, out.splitlines())
    views = Views(2, 3, "sparse", "upstream")
    assert one == {"video": path, "top": [list(entry) for entry in fused.classify(model, path, views=views)]}
    assert two["video"].endswith("broken.mp4") and two["error"] in err


def test_command_on_a_short_video(model: VideoMamba, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, path = str(model.save_pretrained(tmp_path / "model")), str(write_video(tmp_path / "one.avi", 1, 40, 24))
    command = ["--model", folder, path, "--json", "--device", "cpu"]
    assert main(command) == main([*command, "--short", "drop"]) == 1
    assert capsys.readouterr().err.count("one.avi: too short: it has 1 frame; allowed") == 2
    assert main([*command, "--short", "last"]) == 0
    repeated = small_model()
    repeated.load_state_dict(model.state_dict())
    repeated.labels, repeated.preprocessing = model.labels, replace(model.preprocessing, short="last")
    assert json.loads(capsys.readouterr().out)["top"] == [list(entry) for entry in fused.classify(repeated, path)]


def test_interrupted_command(
    model: VideoMamba, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    folder = str(model.save_pretrained(tmp_path / "model"))
    monkeypatch.setattr("fused.predict.__main__.classify", interrupt)
    assert main(["--model", folder, str(files / "a.avi"), "--device", "cpu"]) == 130
    assert capsys.readouterr().err == "fused.predict: stopped\n"


def test_a_reader_that_has_ended(model: VideoMamba, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `| head` has, after its lines."""
    folder, (reader, writer) = str(model.save_pretrained(tmp_path / "model")), os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["--model", folder, str(files / "a.avi"), "--device", "cpu"]) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--top", "0"], "top is 0; allowed: a number from 1 up"),
        (["--views", "0"], "views is 0; allowed: a positive integer"),
        (["--protocol", "k600"], "protocol is 'k600'; allowed: one of 'k400'"),
        (["--model", "nowhere/model"], "nowhere/model"),
        (["--protocol", "ssv2-validation", "--views", "2"], "views is 2; allowed: 1 with the protocol 'ssv2-validation'"),
    ],
)
def test_wrong_command(
    words: list[str], message: str, model: VideoMamba, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the variable is read when it is imported
    folder = str(model.save_pretrained(tmp_path / "model"))
    assert main(["--model", folder, str(files / "a.avi"), "--device", "cpu", *words]) == 2
    assert message in capsys.readouterr().err
