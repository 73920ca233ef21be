"""Evaluation of a model on a list of videos: its numbers, its files, what goes on after a stop, and what it refuses."""

import csv
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import nn
from videos import write_images, write_video

import fused
from fused import VideoMamba, VideoMambaConfig
from fused.evaluate import Evaluation, Settings, evaluate
from fused.evaluate.__main__ import main
from fused.evaluate.retrieval_settings import RetrievalSettings
from fused.evaluate.settings import read_settings
from fused.io.atomic_write import NotWritten
from fused.io.preprocessing import Preprocessing
from fused.io.views import Views
from fused.terminal import Terminal
from fused.train.interrupt import Interrupt
from harness.fixtures.video import write
from harness.learning import motion, trained_weights

NAMES = ["light", "dark", "grey"]  # not in the order of a folder's class names
GREYS = {"dark": 0, "grey": 12, "light": 24}
FAST = Settings(workers=0)


def small_model(**options: object) -> VideoMamba:
    torch.manual_seed(0)
    fields = {"depth": 1, "embed_dim": 32, "img_size": 16, "num_frames": 2, "num_classes": 3} | options
    model = VideoMamba(VideoMambaConfig(**fields)).eval()
    nn.init.normal_(model.head.weight)
    model.preprocessing = Preprocessing(model.config.num_frames, 16)
    return model


@pytest.fixture(scope="module")
def model() -> VideoMamba:
    model = small_model()
    model.labels = NAMES
    return model


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a folder of three classes with three videos each, whose names are the same in every class."""
    for name, step in GREYS.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for i, file in enumerate(("a.avi", "a.b.avi", "c.avi")):
            write_video(tmp_path / "data" / name / file, frames=5 + i, width=40, height=24, side=4 * i, step=step)
    return tmp_path / "data"


def damage_unseen(path: Path) -> None:
    """Overwrite a file with what is no video, of the same size and time: only one who reads it sees it."""
    state = path.stat()
    path.write_bytes(bytes(state.st_size))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def predictions(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("settings", "views"),
    [
        (Settings(workers=0), Views()),
        (Settings(workers=1, views=2, crops=3, batch_size=4), Views(2, 3)),
        (Settings(workers=0, protocol="k400", batch_size=100), Views(4, 3, "sparse", "upstream")),
        (Settings(workers=0, protocol="ssv2", views=1, resize="antialiased"), Views(1, 3, "raw")),
    ],
    ids=["one view", "views", "k400", "ssv2"],
)
def test_numbers_are_those_of_classify(
    settings: Settings, views: Views, model: VideoMamba, data: Path, tmp_path: Path
) -> None:
    results = evaluate(model, data, tmp_path / "out", settings)
    paths = sorted(data.glob("*/*.avi"))
    due = {str(path): fused.classify(model, path, views=views) for path in paths}
    lines = predictions(tmp_path / "out")
    assert lines == results.lines and [line["video"] for line in lines] == list(due)
    for line in lines:
        assert line["label"] == Path(line["video"]).parent.name and line["views"] == views.clips * views.crops
        found = dict(map(tuple, line["top"]))
        # batches of other sizes and threads may round a sum otherwise
        assert found == pytest.approx(dict(due[line["video"]]), abs=1e-6)
    best = {path: top[0][0] for path, top in due.items()}
    right = [best[str(path)] == path.parent.name for path in paths]
    assert results.numbers == {
        "top1": sum(right) / 9, "class_mean": pytest.approx(sum(right) / 9), "top1_all": sum(right) / 9,
        "read": 9, "listed": 9, "too_short": 0, "unreadable": 0,
    }  # fmt: skip
    pairs = [(path.parent.name, best[str(path)]) for path in paths]
    counts = [[pairs.count((label, prediction)) for prediction in NAMES] for label in NAMES]
    assert results.confusion == counts
    [header, *rows] = csv.reader((tmp_path / "out/confusion.csv").open())
    assert header == ["label", *NAMES] and [[name, *map(int, row)] for name, *row in rows] == [
        [name, *row] for name, row in zip(NAMES, counts, strict=True)
    ]
    [_, *rows] = csv.reader((tmp_path / "out/classes.csv").open())
    assert [row[:3] for row in rows] == [[name, "3", str(counts[i][i])] for i, name in enumerate(NAMES)]
    assert json.loads((tmp_path / "out/results.json").read_text()) == results.numbers
    assert (tmp_path / "out/confusion.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_top5(tmp_path: Path) -> None:
    six = small_model(num_classes=6)
    nn.init.zeros_(six.head.weight)
    six.head.bias.data = torch.arange(6.0)  # class 0 is the last one
    for name in "012345":
        (tmp_path / "data" / name).mkdir(parents=True)
        write_video(tmp_path / "data" / name / "a.avi", frames=2, width=16, height=16)
    numbers = evaluate(six, tmp_path / "data", settings=FAST).numbers
    assert numbers["top5"] == 5 / 6 and numbers["top1"] == 1 / 6


def test_command_line_and_python_are_equal(
    model: VideoMamba, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model.save_pretrained(tmp_path / "model")
    paths = sorted(data.glob("*/*.avi"), reverse=True)
    (tmp_path / "list.csv").write_text("".join(f"{path},{path.parent.name}\n" for path in paths))
    words = ["--model", str(folder), "--out", str(tmp_path / "out"), "--views", "4", "--crops", "3", "workers=0", "device=cpu"]
    assert main([*words, "--data", str(tmp_path / "list.csv")]) == 0
    results = evaluate(folder, data, settings=Settings(views=4, crops=3, workers=0))
    assert predictions(tmp_path / "out") == results.lines
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "9 videos, 4 x 3 views of 2 frames at 16 pixels (segments, antialiased)"
    assert any(line.startswith("video 9/9: ") and line.endswith(" 0:00 left") for line in out)
    assert out[-2] == str(results) and f"top-1 {results.numbers['top1']:.2%}, mean of classes" in out[-2]


def test_fitted_weights_know_the_direction_of_a_digit(tmp_path: Path) -> None:
    """The weights that come with the project, on videos of their task, where each frame is shown four times.

    By command and in Python, 4 x 3 views give the same, and nearly all are right; a clip shown backwards is another class.
    """
    trained = trained_weights.read()
    clips, classes = motion.clips(trained.pixels, torch.Generator().manual_seed(0), 24)
    names = list(motion.DIRECTIONS)
    for i, (clip, label) in enumerate(zip(clips, classes.tolist(), strict=True)):
        grey = ((clip[0] * motion.STD + motion.MEAN) * 255).round().clamp(0, 255).to(torch.uint8)
        folder = tmp_path / "data" / names[label]
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / f"{i}.avi", grey.repeat_interleave(4, dim=0)[..., None].repeat(1, 1, 1, 3))
    weights = dict(trained.weights)
    kernel = weights["patch_embed.proj.weight"]
    weights["patch_embed.proj.weight"] = kernel.repeat(1, 3, 1, 1, 1) / 3  # of grey, as red, green and blue
    model = VideoMamba(VideoMambaConfig(**trained.config | {"channels": 3})).eval()
    model.load_state_dict(weights)
    model.labels = names
    model.preprocessing = Preprocessing(motion.FRAMES, motion.SIDE, mean=(motion.MEAN,) * 3, std=(motion.STD,) * 3)
    folder = model.save_pretrained(tmp_path / "model")
    words = ["--model", str(folder), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--views", "4"]
    assert main([*words, "--crops", "3", "workers=0", "device=cpu", "batch_size=24"]) == 0
    results = evaluate(folder, tmp_path / "data", settings=Settings(views=4, crops=3, workers=0, batch_size=24))
    assert predictions(tmp_path / "out") == results.lines
    assert results.numbers["top1"] >= motion.TASK.full.bar


def test_finished_videos_are_not_read_again(model: VideoMamba, data: Path, tmp_path: Path) -> None:
    settings = Settings(workers=0, batch_size=1)  # one video at a time, so that the bits depend on it alone
    whole = evaluate(model, data, settings=settings)
    interrupt = Interrupt()
    interrupt.requested = True
    assert Evaluation(model, data, tmp_path / "out", settings).run(interrupt) is None
    done = predictions(tmp_path / "out")
    assert done == whole.lines[:1]
    with open(tmp_path / "out/predictions.jsonl", "a") as file:
        file.write('{"video": "incompl')  # as a killed process leaves it
    for line in done:
        damage_unseen(Path(line["video"]))
    results = evaluate(model, data, tmp_path / "out", settings)
    assert results.lines == whole.lines and predictions(tmp_path / "out") == whole.lines


@pytest.mark.parametrize("change", ["longer", "of the same size", "shorter list of frames", "one frame of a folder"])
def test_a_video_that_has_changed_is_read_again(
    change: str, model: VideoMamba, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_images(data / "dark/frames", [f"{i}.png" for i in range(6)])
    listed = tmp_path / "list"
    listed.write_text(f"{data / 'dark/a.avi'} 5 dark\n{data / 'dark/c.avi'} 7 dark\n{folder} 6 dark\n".replace(" ", "\t"))
    settings = replace(FAST, batch_size=1, columns=("path", "frames", "label"))
    before = evaluate(model, listed, tmp_path / "out", settings).lines
    path = data / "dark/a.avi"
    if change == "longer":
        write_video(path, frames=5, width=40, height=24, side=4, step=9)
    elif change == "of the same size":
        path.write_bytes(path.read_bytes()[::-1])
    elif change == "one frame of a folder":
        path = folder
        shutil.copy(folder / "5.png", folder / "1.png")
    else:
        path = folder
        listed.write_text(listed.read_text().replace("\t6\t", "\t2\t"))
    [old] = [line for line in before if line["video"] == str(path)]
    found = Evaluation(model, listed, tmp_path / "out", settings).run(terminal=Terminal())
    assert "2 of 3 videos were finished before; 1 whose file or label has changed" in capsys.readouterr().out
    assert found is not None
    [new] = [line for line in found.lines if line["video"] == str(path)]
    assert new.get("top") != old["top"] and [a == b for a, b in zip(before, found.lines, strict=True)].count(True) == 2
    assert evaluate(model, listed, settings=settings).lines == found.lines


def test_a_model_is_evaluated_in_eval_mode_and_classes_without_videos_have_no_accuracy(data: Path) -> None:
    model = small_model(num_classes=4, fc_drop_rate=0.9)
    model.labels = [*NAMES, "absent"]
    due = evaluate(model, data, settings=FAST)
    found = evaluate(model.train(), data, settings=FAST)
    assert found.lines == due.lines and not model.training
    accuracies = {c.name: c.accuracy for c in found.classes}
    assert accuracies.pop("absent") is None and found.numbers["class_mean"] == pytest.approx(sum(accuracies.values()) / 3)


def test_the_last_window_has_half_of_a_window_at_least() -> None:
    windows = Settings(window=3).chosen_views().windows
    assert windows is not None and (windows.seconds, windows.every, windows.least) == (3, 3, 1.5)


def test_a_video_with_another_label_is_read_again(model: VideoMamba, data: Path, tmp_path: Path) -> None:
    evaluate(model, data, tmp_path / "out", FAST)
    path = data / "dark/a.avi"
    (tmp_path / "list").write_text(f"{path},light\n")
    damage_unseen(path)
    assert evaluate(model, tmp_path / "list", tmp_path / "out", FAST).numbers["unreadable"] == 1


def test_images(tmp_path: Path) -> None:
    """Every image of a class folder counts, and the protocol has the crop of 7/8."""
    model = small_model(num_frames=None)
    model.labels = NAMES
    for name in GREYS:
        write_images(tmp_path / "data" / name, ["img_1.png", "img_2.png"])
    write_video(tmp_path / "data/dark/a.avi", frames=4)
    results = evaluate(model, tmp_path / "data", settings=Settings(workers=0, protocol="in1k"))
    assert [line["video"] for line in results.lines] == [str(path) for path in sorted(tmp_path.glob("data/*/*.png"))]
    path = results.lines[1]["video"]
    clip = Views(resize="imagenet").read(model.preprocessing, path)
    due = model(clip).softmax(1)[0]
    found = dict(map(tuple, results.lines[1]["top"]))
    torch.testing.assert_close(torch.tensor([found[name] for name in NAMES]), due.detach(), rtol=0, atol=1e-6)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="root must hold images, files with the suffixes .bmp"):
        evaluate(model, empty, settings=FAST)


def test_files_that_give_no_clip(
    model: VideoMamba, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "dark/broken.avi").write_bytes(b"no video")
    write_video(data / "light/short.avi", frames=1, width=40, height=24)
    folder = str(model.save_pretrained(tmp_path / "model"))
    words = ["--model", folder, "--data", str(data), "--out", str(tmp_path / "out"), "workers=0"]
    assert main(words) == 0
    out = capsys.readouterr().out
    numbers = json.loads((tmp_path / "out/results.json").read_text())
    assert {key: numbers[key] for key in ("read", "listed", "too_short", "unreadable")} == {
        "read": 9, "listed": 11, "too_short": 1, "unreadable": 1
    }  # fmt: skip
    assert numbers["top1_all"] == pytest.approx(numbers["top1"] * 9 / 11)
    assert f"left out {data}/dark/broken.avi: " in out and f"left out {data}/light/short.avi: too short" in out
    assert "of all 11: 1 of 11 files could not be read and 1 of 11 files is too short" in out
    write_video(data / "dark/broken.avi", frames=5, width=40, height=24)  # mended: it is tried again
    assert main(words) == 0
    assert "9 of 11 videos were finished before\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/results.json").read_text())["read"] == 10
    (tmp_path / "list").write_text("nowhere.avi,dark\n")
    assert main([*words[:2], "--data", str(tmp_path / "list"), "--out", str(tmp_path / "none")]) == 1


def test_windows_of_a_long_video(model: VideoMamba, tmp_path: Path) -> None:
    """Of 60 frames, 25 a second, windows of a second begin at 0, 1 and, with the least of 0.4 seconds, 2 seconds."""
    write_video(tmp_path / "long.avi", frames=60, width=40, height=24, step=4)
    write_video(tmp_path / "short.avi", frames=10, width=40, height=24, step=4)
    (tmp_path / "list").write_text("long.avi,dark\nshort.avi,grey\n")
    settings = Settings(workers=0, window=1, window_least=0.4, views=2, batch_size=3)
    results = evaluate(model, tmp_path / "list", settings=settings)
    long, short = results.lines
    assert (long["views"], short["views"]) == (6, 2)
    clips = []
    for start, end in ((0, 25), (25, 50), (50, 60)):
        for view in range(2):
            numbers = model.preprocessing.frame_numbers(Path(), end - start, None, view=view, views=2)
            clips.append([start + number for number in numbers])
    frames = dict(zip(range(60), _frames(tmp_path / "long.avi"), strict=True))
    batch = torch.stack([torch.stack([model.preprocessing.prepare(frames[i]) for i in clip], 1) for clip in clips])
    due = model(batch).softmax(1).mean(0)
    torch.testing.assert_close(torch.tensor([dict(long["top"])[name] for name in NAMES]), due, rtol=0, atol=1e-6)


def _frames(path: Path) -> list[torch.Tensor]:
    from videos import full_decode

    return [torch.from_numpy(image) for image in full_decode(path)]


def test_regression(data: Path, tmp_path: Path) -> None:
    one = small_model(num_classes=1)
    paths = sorted(data.glob("dark/*.avi"))
    (tmp_path / "list").write_text("".join(f"{path},{4.5 + i}\n" for i, path in enumerate(paths)))
    settings = Settings(workers=0, protocol="lvu-like", target_mean=4.5, target_std=2)
    results = evaluate(one, tmp_path / "list", tmp_path / "out", settings)
    outputs = [one(Views(4, 3, "sparse", "upstream").read(one.preprocessing, path)).mean().item() for path in paths]
    assert [line["target"] for line in results.lines] == [0.0, 0.5, 1.0]
    assert [line["output"] for line in results.lines] == pytest.approx(outputs, abs=1e-6)
    due = sum((output - 0.5 * i) ** 2 for i, output in enumerate(outputs)) / 3
    assert results.numbers == {"mse": pytest.approx(due), "read": 3, "listed": 3, "too_short": 0, "unreadable": 0}
    assert "mean squared error" in str(results) and not (tmp_path / "out/confusion.csv").exists()


def lists_text(text: str) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / "list").write_text(text)
        return str(folder / "list")

    return write


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--views", "-1"], "views is -1; allowed: a positive integer"),
        (["--views", "2", "views=3"], "views is given twice, 2 and '3'"),
        (["--protocol", "coins"], "protocol is 'coins'; allowed: one of 'k400', 'ssv2'"),
        (["--protocol", "lvu-view"], "protocol is 'lvu-view'; allowed: for a model of one output; this one has 3 classes"),
        (["batchsize=4"], "batchsize is no key; the nearest is batch_size"),
        (["num_workers=4"], "num_workers is no key; the nearest is workers"),
        (["workers"], "'workers' is no setting; allowed: key=value"),
        (["window_every=2"], "window_every is 2; allowed: nothing without window"),
        (["window=2", "window_least=3"], "windows.least is 3; allowed: up to windows.seconds (2)"),
        (["precision=fp8"], "precision is 'fp8'"),
        (["--protocol", "k400", "fps=8"], "views.frames is 'sparse'; allowed: 'model'"),
        (["--data", "nowhere"], "data: root must be a folder of videos, or a list of them"),
        (["backend=native", "device=cpu"], "backend 'native' cannot run here. native runs on CUDA only"),
        (["backend=fast"], "'fast'"),
    ],
)
def test_wrong_command(
    words: list[str], message: str, model: VideoMamba, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model.save_pretrained(tmp_path / "model")
    assert main(["--model", str(folder), "--data", str(data), "--out", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out/predictions.jsonl").exists()


@pytest.mark.parametrize(
    ("labels", "text", "message"),
    [
        (NAMES, "a.avi,7\n", "a.avi has the class '7'; allowed are 'light', 'dark', 'grey'"),
        (None, "a.avi,dark\n", "allowed are '0', '1', '2'; the model has no class names, labels=FILE"),
        (NAMES, "a.avi,dark\na.avi,grey\n", "lines 1 and 2"),
        (NAMES, "# nothing\n", "there is none in"),
    ],
)
def test_wrong_lists(labels: list[str] | None, text: str, message: str, tmp_path: Path) -> None:
    given = small_model()
    given.labels = labels
    (tmp_path / "list").write_text(text)
    with pytest.raises(ValueError) as error:
        evaluate(given, tmp_path / "list", settings=FAST)
    assert message in str(error.value)


def test_a_video_that_is_written_in_two_ways_has_one_label(
    model: VideoMamba, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative to a list in the working folder, and from the root."""
    monkeypatch.chdir(tmp_path)
    Path("list").write_text(f"data/dark/a.avi,dark\n{data}/dark/a.avi,dark\n")
    assert evaluate(model, "list", settings=FAST).numbers["listed"] == 1
    Path("list").write_text(f"data/dark/a.avi,dark\n{data}/dark/a.avi,grey\n")
    with pytest.raises(ValueError, match="data/dark/a.avi has two labels, and is written in two ways"):
        evaluate(model, "list", settings=FAST)


def test_a_gpu_where_there_is_none(
    model: VideoMamba, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder is evaluated on the device that the settings name, as by the command; a model stays where it is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder, asked = model.save_pretrained(tmp_path / "model"), Settings(workers=0, device="cuda")
    with pytest.raises(ValueError, match="device is 'cuda'; allowed here, where PyTorch finds no GPU"):
        evaluate(folder, data, settings=asked)
    assert evaluate(model, data, settings=asked).numbers["read"] == 9


def test_help_says_what_every_key_means(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "batch_size=8 views in one forward" in text and "rerank=128 candidates of each" in text
    for kind in (Settings, RetrievalSettings):
        for f in fields(kind):
            given = read_settings([f"{f.name}={json.dumps(f.default)}"], {}, kind)  # as --help shows it
            assert given == kind() and (f"{f.name}=" in text or f"--{f.name}" in text)


@pytest.mark.parametrize("word", ["null", "None", "~", ""])
def test_none_is_written_as_errors_and_python_write_it(word: str) -> None:
    assert read_settings([f"size={word}", "window=3", f"window_every={word}"], {}) == Settings(window=3)
    with pytest.raises(ValueError, match="sampling is 'none'; allowed: .* or None"):
        read_settings(["sampling=none"], {})


def test_a_disk_that_is_full_from_the_start(
    model: VideoMamba, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its exit code is that of a disk that gets full, and not that of a wrong option."""

    def full(path: Path) -> None:
        raise NotWritten(f"{path}: not written (0 MiB are free there)")

    monkeypatch.setattr("fused.evaluate.predictions.atomic_write", full)
    folder = str(model.save_pretrained(tmp_path / "model"))
    command = ["--model", folder, "--data", str(data), "--out", str(tmp_path / "out"), "workers=0", "device=cpu"]
    assert main(command) == 1 and "evaluation.json: not written" in capsys.readouterr().err


def test_names_from_a_file(model: VideoMamba, data: Path, tmp_path: Path) -> None:
    unnamed = small_model()
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n\n")
    results = evaluate(unnamed, data, settings=Settings(workers=0, labels=str(tmp_path / "names.txt")))
    assert results.lines == evaluate(model, data, settings=FAST).lines
    (tmp_path / "names.txt").write_text("light\ndark\n")
    with pytest.raises(ValueError, match="labels has the length 2"):
        evaluate(unnamed, data, settings=Settings(workers=0, labels=str(tmp_path / "names.txt")))
    with pytest.raises(ValueError, match="labels is 'nowhere', which cannot be read"):
        evaluate(unnamed, data, settings=Settings(workers=0, labels="nowhere"))


def test_wrong_targets(data: Path, tmp_path: Path) -> None:
    one = small_model(num_classes=1)
    with pytest.raises(ValueError, match="allowed for a model of one output: a list, with path,number in each line"):
        evaluate(one, data, settings=FAST)
    for target in ("much", "nan", "1e999"):
        (tmp_path / "list").write_text(f"a.avi,0.5\nb.avi,{target}\n")
        with pytest.raises(ValueError, match=f"line 2: .*b.avi has the target '{target}'; allowed: a number"):
            evaluate(one, tmp_path / "list", settings=FAST)


def test_outputs_that_are_not_finite(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = small_model()
    nn.init.constant_(broken.head.bias, float("nan"))
    broken.labels = NAMES
    folder = str(broken.save_pretrained(tmp_path / "model"))
    assert main(["--model", folder, "--data", str(data), "--out", str(tmp_path / "out"), "workers=0", "device=cpu"]) == 1
    assert f"{data}/dark/a.avi: the model's outputs are not finite in float32" in capsys.readouterr().err


def test_another_evaluation_in_the_same_folder(model: VideoMamba, data: Path, tmp_path: Path) -> None:
    evaluate(model, data, tmp_path / "out", FAST)
    before = predictions(tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds another evaluation \(views.clips: 1 -> 2\); allowed: another folder"):
        evaluate(model, data, tmp_path / "out", Settings(workers=0, views=2))
    other = small_model()
    other.labels = NAMES
    nn.init.ones_(other.head.bias)
    with pytest.raises(ValueError, match=r"holds another evaluation \(weights: "):
        evaluate(other, data, tmp_path / "out", FAST)
    same_weights = small_model(scan_order="temporal")
    same_weights.labels = NAMES
    with pytest.raises(ValueError, match=r"another evaluation \(model.scan_order: spatial -> temporal\)"):
        evaluate(same_weights, data, tmp_path / "out", FAST)
    larger = small_model(depth=2, embed_dim=64, scan_order="temporal", drop_path_rate=0.2, fc_drop_rate=0.1)
    larger.labels = NAMES
    with pytest.raises(ValueError, match=r"model.depth: 1 -> 2; (.*; ){4}and 1 more\); allowed: another folder"):
        evaluate(larger, data, tmp_path / "out", FAST)
    assert predictions(tmp_path / "out") == before
    evaluate(model, data, tmp_path / "out", Settings(workers=0, batch_size=1))  # what the numbers do not depend on


def test_frames_and_size_of_another_number(model: VideoMamba, data: Path, tmp_path: Path) -> None:
    folder = model.save_pretrained(tmp_path / "model")
    results = evaluate(folder, data, settings=Settings(workers=0, frames=4, size=32))
    due = VideoMamba.from_pretrained(folder, num_frames=4, img_size=32)
    assert due.preprocessing == Preprocessing(4, 32)
    top = fused.classify(due, results.lines[0]["video"])
    assert dict(map(tuple, results.lines[0]["top"])) == pytest.approx(dict(top), abs=1e-6)
    with pytest.raises(ValueError, match=r"preprocessing has 4 frames of size 16; allowed: 2 of \(16, 16\)"):
        evaluate(model, data, settings=Settings(workers=0, frames=4))
