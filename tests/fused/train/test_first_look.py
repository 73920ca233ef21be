"""Options that fit no video are found before a training, by a dry run too."""

from pathlib import Path

import pytest
from trainings import train
from videos import encode, write_images, write_video

from fused.train import ClipFolder
from fused.train.data.first_look import MAX_TRIED, try_videos

KINDS = [f"{kind}_{i}.png" for kind in ("img", "flow") for i in (1, 2, 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with videos of two classes: as files, as folders of images, and as folders of two kinds of images."""
    folder = tmp_path_factory.mktemp("look")
    for i, label in enumerate(("a", "b")):
        (folder / "files" / label).mkdir(parents=True)
        write_video(folder / "files" / label / f"{i}.avi", frames=6, width=48, height=32)
        write_images(folder / "images" / label / f"v{i}", ["1.png", "2.png", "3.png"])
        write_images(folder / "kinds" / label / f"v{i}", KINDS)
    for name in ("files", "images", "kinds"):
        paths = sorted(path.relative_to(folder) for path in (folder / name).glob("*/*"))
        (folder / f"{name}.txt").write_text("".join(f"{path},{path.parent.name}\n" for path in paths))
    return folder


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (["data.train=images", "data.fps=2"], "data.train: ClipFolder: fps is 2, but {folder}/images/a/v0 is a folder"),
        (["data.train=images.txt", "data.fps=2"], "data.train: ClipFolder: fps is 2, but {folder}/images/a/v0"),
        (["data.train=files", "data.val=images.txt", "data.fps=25"], "data.val: ClipFolder: fps is 25, but "),
        (["data.train=kinds"], "data.train: none of 2 videos that were tried gives a clip: {folder}/kinds/a/v0: it holds"),
        (["data.train=kinds", "data.frame_pattern=rgb_*"], "{folder}/kinds/a/v0: a folder without images named rgb_*"),
        (["data.train=files", "data.val=kinds"], "data.val: none of 2 videos that were tried gives a clip: "),
        (["data.train=files", "data.sampling=dense", "data.stride=6"], "{folder}/files/a/0.avi: too short: it has 6 frames"),
        (["data.train=files.txt", "data.prefix=images"], "files/a/0.avi: no such file"),
        (["data.train=files.txt", "data.val=files", "data.frames=7"], "data.train: none of 2 videos"),
    ],
)  # fmt: skip
def test_a_dry_run_finds_what_fits_no_video(words: list[str], wrong: str, folder: Path) -> None:
    words = [word.replace("data.train=", f"data.train={folder}/").replace("data.val=", f"data.val={folder}/") for word in words]
    words = [word.replace("data.prefix=", f"data.prefix={folder}/") for word in words]
    more = ["task=finetune", f"out={folder}/run", "steps=1", "data.size=16", "data.frames=2", "batch_size=2", "model.depth=1"]
    code, output = train([*more, *words, "device=cpu", "--dry-run"], folder=folder)
    assert code == 2 and wrong.format(folder=folder) in output.splitlines()[-1], output
    assert not (folder / "run").exists()


def test_a_kind_of_which_none_is_read_is_a_note(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("".join((folder / f"{name}.txt").read_text() for name in ("files", "kinds")))
    mixed = ClipFolder(tmp_path / "list.txt", 2, 16, train=True, prefix=folder)
    (note,) = try_videos(mixed)
    assert note.startswith(f"none of 2 folders of images that were tried gives a clip: {folder}/kinds/a/v0: it holds images")
    assert try_videos(ClipFolder(tmp_path / "list.txt", 2, 16, train=True, prefix=folder, frame_pattern="flow_*")) == []
    files = ClipFolder(folder / "files", 2, 16, train=True, frame_pattern="img_*")
    assert try_videos(files) == ["frame_pattern is 'img_*', and no video that was tried is a folder of images"]


def test_videos_are_tried_over_the_whole_dataset(tmp_path: Path) -> None:
    """Also files whose names do not end like a video's."""
    for i in range(3 * MAX_TRIED):
        (tmp_path / f"{i:03}.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=rf"none of {MAX_TRIED} videos .*/000\.mp4: .*/003\.mp4: .*/006\.mp4: "):
        try_videos(ClipFolder(tmp_path, 2, 16, train=False))
    encode(tmp_path / "093.mp4", "libx264", frames=4)
    assert try_videos(ClipFolder(tmp_path, 2, 16, train=False)) == []
    (tmp_path / "093.mp4").rename(tmp_path / "unnamed")
    (tmp_path / "list.txt").write_text("000.mp4\nunnamed\n")
    assert try_videos(ClipFolder(tmp_path / "list.txt", 2, 16, train=False)) == []
