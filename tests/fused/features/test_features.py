"""Features of videos: vectors and tokens, windows of long videos, chunks, and the files that hold them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from videos import write_video

from fused import VideoMamba, VideoMambaConfig, VideoMambaEncoder
from fused.evaluate import Settings
from fused.features import extract
from fused.features.__main__ import main
from fused.io.preprocessing import Preprocessing
from fused.io.views import Views

FIELDS = {"depth": 2, "embed_dim": 32, "img_size": 32, "num_frames": 4}
FAST = Settings(workers=0)


def built(kind: type, **options: object) -> VideoMamba | VideoMambaEncoder:
    torch.manual_seed(0)
    return kind(VideoMambaConfig(**FIELDS | options)).eval()


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of two videos of one name in class folders, and one that cannot be read."""
    root = tmp_path_factory.mktemp("videos")
    for name, step in (("a", 9), ("b", 3)):
        (root / name).mkdir()
        write_video(root / name / "0.avi", frames=25, width=64, height=48, side=8, step=step)
    (root / "b/broken.avi").write_bytes(b"no video")
    return root


def close(found: Tensor, due: Tensor) -> None:
    torch.testing.assert_close(found, due.detach(), rtol=0, atol=1e-5 * due.abs().max().item())


@pytest.mark.parametrize("readout", ["cls", "mean"])
def test_vector_is_what_the_head_reads(readout: str, videos: Path) -> None:
    model = built(VideoMamba, num_classes=3, readout=readout)
    found = extract(model, videos, Settings(workers=0, views=2))
    assert found.names == [str(videos / "a/0.avi"), str(videos / "b/0.avi")]
    assert [Path(file.path).name for file in found.bad_files] == ["broken.avi"]
    for name, value in zip(found.names, found.values, strict=True):
        clips = Views(2).read(Preprocessing(4, 32), name)
        close(value, model.forward_head(model.forward_features(clips), pre_logits=True).mean(0))
        close(model.head(value), model(clips).mean(0))


def test_encoders(videos: Path) -> None:
    clip = Preprocessing(4, 32).read(videos / "a/0.avi")[None]
    pooled = built(VideoMambaEncoder, pool_type="cls_cat_avg")
    close(extract(pooled, videos, FAST).values[0], pooled(clip).pooled.flatten())
    plain = built(VideoMambaEncoder, add_pool_norm=False)
    close(extract(plain, videos, FAST).values[0], plain(clip).tokens[0, 0])
    close(extract(plain, videos, FAST, tokens=True).values[0], plain(clip).tokens[0])


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("kind", [VideoMamba, VideoMambaEncoder])
def test_chunks_give_what_the_whole_clip_gives(kind: type, tokens: bool, videos: Path) -> None:
    model = built(kind)
    whole = extract(model, videos, FAST, tokens=tokens)
    chunked = extract(model, videos, FAST, tokens=tokens, chunk_frames=2)
    assert whole.names == chunked.names and whole.values[0].dim() == 1 + tokens
    for found, due in zip(chunked.values, whole.values, strict=True):
        close(found, due)


def test_windows_have_features_of_their_own(videos: Path) -> None:
    """A second of 25 frames, in windows of 0.4 seconds: 10, 10 and 5 frames."""
    model = built(VideoMamba, num_classes=3)
    found = extract(model, videos, Settings(workers=0, window=0.4, window_least=0.1, batch_size=2))
    path = str(videos / "a/0.avi")
    assert found.names[:3] == [f"{path}#0", f"{path}#1", f"{path}#2"] and len(found.names) == 6
    views = Settings(window=0.4, window_least=0.1).chosen_views()
    clips = views.read(Preprocessing(4, 32), path)
    due = model.forward_head(model.forward_features(clips), pre_logits=True)
    for value, row in zip(found.values, due, strict=False):
        close(value, row)


def test_a_model_in_training_stays_so(videos: Path) -> None:
    model = built(VideoMamba, num_classes=3, fc_drop_rate=0.9)
    due = extract(model, videos, FAST)
    found = extract(model.train(), videos, FAST)
    assert model.training and all(torch.equal(a, b) for a, b in zip(found.values, due.values, strict=True))


def test_files(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = built(VideoMamba, num_classes=3)
    folder, due = str(model.save_pretrained(tmp_path / "model")), extract(model, videos, FAST)
    words = ["--model", folder, "--data", str(videos), "workers=0", "device=cpu", "--out"]
    assert main([*words, str(tmp_path / "new/f.safetensors")]) == 0
    stored = load_file(tmp_path / "new/f.safetensors")
    assert stored.keys() == set(due.names)
    assert all(torch.equal(stored[name], value) for name, value in zip(due.names, due.values, strict=True))
    assert main([*words, str(tmp_path / "f.npy"), "--tokens"]) == 0
    tokens = extract(model, videos, FAST, tokens=True)
    assert np.array_equal(np.load(tmp_path / "f.npy"), torch.stack(tokens.values).numpy())
    assert json.loads((tmp_path / "f.npy.json").read_text()) == due.names
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"left out {videos}/b/broken.avi") and lines[2].startswith("2 features of 32 are in ")
    assert lines[1].startswith("video 3/3: ") and lines[1].endswith(" left") and len(lines) == 6
    assert lines[2].endswith("1 of 3 files could not be read") and "2 features of 17x32 are in" in lines[5]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "features.pth"], "out is 'features.pth'; allowed: a file that ends with .safetensors or .npy"),
        (["--tokens", "--views", "2"], "tokens is True; allowed: False with 2 views"),
        (["--chunk-frames", "0"], "chunk_frames is 0"),
        (["--data", "nowhere"], "data: root must be a folder of videos, or a list of them"),
        (["backend=native"], "backend 'native' cannot run here"),
        (["frame=4"], "frame is no key; the nearest is frames"),
    ],
)
def test_wrong_command(
    words: list[str], message: str, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(built(VideoMamba, num_classes=3).save_pretrained(tmp_path / "model"))
    start = ["--model", folder, "--data", str(videos), "--out", str(tmp_path / "f.npy"), "device=cpu", "workers=0"]
    assert main([*start, *words]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "f.npy").exists()


@pytest.mark.parametrize(("out", "message"), [("file/f.npy", "nothing can be written"), ("folder.npy", "allowed: a file")])
def test_a_place_that_cannot_be_written_is_found_before_a_video_is_read(
    out: str, message: str, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "folder.npy").mkdir()
    folder = str(built(VideoMamba, num_classes=3).save_pretrained(tmp_path / "model"))
    assert main(["--model", folder, "--data", str(videos), "--out", str(tmp_path / out), "device=cpu", "workers=0"]) == 2
    told = capsys.readouterr()
    assert message in told.err and not told.out  # no progress, no file that is left out


def test_features_that_are_not_finite(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = built(VideoMamba, num_classes=3)
    torch.nn.init.constant_(model.norm_f.weight, float("inf"))
    words = ["--model", str(model.save_pretrained(tmp_path / "model")), "--data", str(videos), "workers=0", "device=cpu"]
    assert main([*words, "--out", str(tmp_path / "f.npy")]) == 1
    assert "a/0.avi: its features are not finite in float32" in capsys.readouterr().err and not (tmp_path / "f.npy").exists()


def test_no_video_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.avi").write_bytes(b"no video")
    found = extract(built(VideoMamba, num_classes=3), tmp_path, FAST)
    with pytest.raises(ValueError, match="no features for .*: none of 1 files could be read"):
        found.save(tmp_path / "f.npy")
