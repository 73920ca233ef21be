"""Every wrong key and value of a training's configuration is reported, with the allowed ones, before anything is built."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fused.train.__main__ import main
from fused.train.config import all_keys
from fused.train.config_file import read_config, to_yaml
from fused.train.config_keys import TASKS
from fused.train.config_sections import SECTIONS
from fused.train.data import open_clips
from fused.train.language.options import LANGUAGE_TASKS

LEAST = ["task=finetune", "out=run", "data.train=videos", "steps=3"]
DISTILL = ["task=distill", "teacher=small", "out=run", "data.train=videos", "steps=3"]


def test_file_and_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "task: finetune\nout: run\nepochs: 2\ndata: {train: videos, frames: 16}\n"
        "model: {size: small, drop_path_rate: 0.2}\noptim: {lr: 2e-4, betas: [0.9, 0.95]}\n"
    )
    config = read_config(file, ["data.frames=4", "model.ssm_cfg.d_state=8", "optim.weight_decay=1e-2", "data.val=more"])
    assert (config.data.frames, config.data.train, config.data.val) == (4, "videos", "more")
    assert (config.epochs, config.steps) == (2, None)
    assert config.optim.lr == 2e-4 and config.optim.weight_decay == 0.01 and config.optim.betas == (0.9, 0.95)
    assert config.model == {"size": "small", "drop_path_rate": 0.2, "ssm_cfg": {"d_state": 8}}
    file.write_text(to_yaml(config))
    assert read_config(file) == config


def test_graphs_are_switched_by_words_of_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """YAML reads on and off as true and false."""
    for word in ("on", "off", "auto"):
        config = read_config(None, [*LEAST, f"graph={word}"])
        (tmp_path / "run.yaml").write_text(to_yaml(config))
        assert config.graph == word and read_config(tmp_path / "run.yaml") == config
    assert main([*LEAST, "graph=always"]) == 2
    assert "graph is 'always'; allowed: one of 'auto', 'on', 'off'" in capsys.readouterr().err


def test_only_keys_that_the_task_reads_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-config", *LEAST]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("frames: 8", "label_smoothing: 0.1", "mixup: 0.8", "save_every: 500"))
    assert not any(word in printed for word in ("mask", "teacher", "alignment", "distillation"))
    assert main(["--print-config", "teacher=clip", "task=pretrain", *LEAST[1:]]) == 0
    printed = capsys.readouterr().out
    assert "teacher: clip" in printed and "ratio: 0.8" in printed
    assert not any(word in printed for word in ("mixup", "label_smoothing", "val:"))


def test_every_key_is_printed_without_any_being_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-config"]) == 0
    printed = capsys.readouterr().out
    names = {key.rpartition(".")[2] for key in all_keys() if not key.startswith("model.")}
    assert set(re.findall(r"^ *(?:# )?(\w+):", printed, re.M)) == names | {"model", *SECTIONS}
    assert "task: null  # required: finetune, pretrain, distill" in printed and "  train: null  # required" in printed
    assert "# teacher: null  # pretrain, distill, retrieval; required" in printed
    assert "  # alignment: l2  # pretrain, retrieval; one of 'l2', 'mse', 'smooth_l1'\n" in printed
    assert "\n  clip_grad: null  # a positive number, or null\n" in printed  # what is allowed, in words of YAML
    assert "val: null  # finetune, distill, regress; a folder or a list of videos, or null\n" in printed


@pytest.mark.parametrize("task", TASKS)
def test_what_is_printed_is_accepted_when_complete(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With all its required keys set in the text itself, and its own keys no longer behind a #."""
    main(["--print-config"])
    text = capsys.readouterr().out.replace("task: null", f"task: {task}").replace("train: null", "train: videos")
    text = text.replace("out: null", "out: run").replace("steps: null", "steps: 3").replace("teacher: null", "teacher: clip")
    file = tmp_path / "run.yaml"
    text = text.replace("start: null", "start: folder") if task in LANGUAGE_TASKS else text
    hidden = re.compile(r"^( *)# (\w+: .*  # .*)$")  # a key of some tasks, with their names
    readers = {line: re.split("[,;] ", line.rpartition("  # ")[2]) for line in text.splitlines()}
    own = [hidden.sub(r"\1\2", line) if task in readers[line] else line for line in text.splitlines()]
    for lines in [own] + [text.splitlines()] * (task == "finetune"):  # for which everything else has a default
        file.write_text("\n".join(lines))
        config = read_config(file)
        assert config.task == task and config.steps == 3 and config == read_config(None, set_keys(task))


def set_keys(task: str) -> list[str]:
    more = ["start=folder"] if task in LANGUAGE_TASKS else ["teacher=clip"] * (task not in ("finetune", "regress"))
    return [f"task={task}", *LEAST[1:-1], "steps=3", *more]


@pytest.mark.usefixtures("unchecked")
def test_what_is_missing_is_printed_as_null(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-config", "task=distill", "epochs=2", "data.frames=4"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("required") == 3  # out, data.train, teacher
    assert "out: null  # required" in printed and "\nteacher: null  # required: a folder" in printed
    assert "steps: null\n" in printed and "  frames: 4  #" in printed and "mask" not in printed
    assert main(["--print-config", "data.frames=many"]) == 2  # what is set has to be right
    assert "data.frames is 'many'" in capsys.readouterr().err


def test_without_arguments_it_says_what_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    error = capsys.readouterr().err
    first, *example = error.strip().splitlines()
    assert all(word in first for word in ("task", "out", "data.train", "steps", "epochs")) and len(example) == 2
    words = example[0].split()
    assert words[:3] == ["python", "-m", "fused.train"] and read_config(None, words[3:-1]).epochs == 30


@pytest.mark.parametrize(
    ("key", "wanted"),
    [
        ("learning_rate", "optim.lr"), ("lr", "optim.lr"), ("base-lr", "optim.lr"), ("optim.learning_rate", "optim.lr"),
        ("train.lr", "optim.lr"), ("wd", "optim.weight_decay"), ("weight_decay", "optim.weight_decay"),
        ("num_workers", "data.workers"), ("data.num_workers", "data.workers"), ("workers", "data.workers"),
        ("num_frames", "data.frames"), ("model.nframes", "data.frames"), ("img_size", "data.size"), ("imgsize", "data.size"),
        ("data.img_size", "data.size"), ("num_epochs", "epochs"), ("epoch", "epochs"), ("bs", "batch_size"),
        ("output_dir", "out"), ("depth", "model.depth"), ("drop_path", "model.drop_path_rate"),
        ("optim.label_smoothing", "loss.label_smoothing"), ("label_smoothin", "loss.label_smoothing"), ("pretrained", "start"),
        ("weigth_decay", "optim.weight_decay"), ("data.batch_size", "batch_size"), ("accum_iter", "accumulate"),
        ("num_class", "model.num_classes"), ("optimizer", "optim.lr"), ("split", "data.separator"), ("model_ema", "ema"),
        ("filename_tmpl", "data.frame_pattern"), ("data.target_fps", "data.fps"), ("data_root", "data.prefix"),
    ],
)  # fmt: skip
def test_the_nearest_key(key: str, wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LEAST, f"{key}=1"]) == 2
    error = capsys.readouterr().err
    assert f"{key} is no key; the nearest is {wanted}" in error and wanted in all_keys()
    section, _, name = wanted.rpartition(".")
    elsewhere = section and section != key.rpartition(".")[0]
    assert (f"(in YAML {section}: {{{name}: ...}})" in error) == bool(elsewhere)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("task: finetune\nout: a\ndata: {train: v}\nout: b\n", "the key out in line 2 and again in line 4"),
        ("data:\n  frames: 8\n  # again\n  frames: 16\n", "the key frames in line 2 and again in line 4"),
        ("data: {train: a}\nsteps: 3\ndata: {val: b}\n", "the key data in line 1 and again in line 3"),
        ("model: {ssm_cfg: {d_state: 8, 'd_state': 8}}\n", "the key d_state in line 1 and again in line 1"),
        ("task: finetune\noptim.lr: 1e-3\n", "optim.lr is one word; allowed: a section, optim: {lr: ...}"),
        ("optim: {betas: [0.9, 0.99]}\noptim.lr: 1e-3\n", "optim.lr is one word; allowed: a section, optim: {lr: ...}"),
        ("lr: 1e-3\n", "lr is no key; the nearest is optim.lr (in YAML optim: {lr: ...})"),
        ("optimizer: {lr: 1e-3}\n", "optimizer.lr is no key; the nearest is optim.lr (in YAML optim: {lr: ...})"),
        ("2: 3\n", "2 is no key"),
    ],
)
def test_errors_in_a_file(text: str, wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert main(["--config", str(file), "--print-config"]) == 2
    error = capsys.readouterr().err
    assert wanted in error and error.count("\n") == 1
    assert "again" not in wanted or f"fused.train: {file} has" in error


def test_merged_keys_may_be_given_again(tmp_path: Path) -> None:
    """YAML's << brings a mapping whose keys the mapping around it may replace; that is no duplicate."""
    (tmp_path / "run.yaml").write_text("model: &small {depth: 2, embed_dim: 32}\n<<: {steps: 3}\nsteps: 4\n")
    config = read_config(tmp_path / "run.yaml", LEAST[:3])
    assert config.steps == 4 and config.model == {"depth": 2, "embed_dim": 32}


def test_a_section_of_nothing_sets_nothing(tmp_path: Path) -> None:
    """All its keys may be behind a #, also those that the task does not read."""
    (tmp_path / "run.yaml").write_text("data:\n  # frames: 4\nmask:\nmodel:\n")
    assert read_config(tmp_path / "run.yaml", LEAST) == read_config(None, LEAST)
    assert read_config(tmp_path / "run.yaml", [*LEAST, "model.depth=2"]).model == {"depth": 2}


def test_files_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_bytes(b"task: \xff\xfe")
    for path, wanted in ((tmp_path / "run.yaml", "run.yaml is no YAML: 'utf-8'"), (tmp_path, "Is a directory")):
        assert main(["--config", str(path)]) == 2
        error = capsys.readouterr().err
        assert wanted in error and error.count("\n") == 1


def test_home_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("data: {train: ~/train, val: ~/val}\nout: ~/runs/first\nteacher: ~/teacher\n")
    config = read_config("~/run.yaml", ["task=distill", "start=~/start", "steps=1"])
    assert config.out == f"{tmp_path}/runs/first" and config.data.train == f"{tmp_path}/train"
    assert (config.data.val, config.start, config.teacher) == (f"{tmp_path}/val", f"{tmp_path}/start", f"{tmp_path}/teacher")
    assert read_config(None, [*LEAST, "data.prefix=~/videos"]).data.prefix == f"{tmp_path}/videos"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["data.size=30"], "data.size is 30; allowed: multiples of 16, the pixels of a patch's side; nearest to 30: 16 or 32"),
        (["data.size=225"], "nearest to 225: 224 or 240"),
        (["data.size=10"], "data.size is 10; allowed: multiples of 16, the pixels of a patch's side; nearest to 10: 16"),
        (["data.size=[224,100]"], "data.size is (224, 100); allowed: multiples of 16"),
        (["data.size=224", "model.patch_size=15"], "multiples of 15, the pixels of a patch's side; nearest to 224: 210 or 225"),
        (["data.size=[224]"], "data.size is (224,); allowed: pixels of a side, or [height, width]"),
        (["data.size=[16,16,16]"], "data.size is (16, 16, 16); allowed: pixels of a side, or [height, width]"),
        (["data.size=0"], "data.size is 0; allowed: pixels of a side, or [height, width]"),
        (["data.sampling=even"], "data.sampling is 'even'; allowed: one of 'segments', 'dense'"),
        (["data.short=skip"], "data.short is 'skip'; allowed: one of 'drop', 'loop', 'last'"),
        (["data.fps=0"], "data.fps is 0; allowed: a positive number, or None"),
        (["data.fps=fast"], "data.fps is 'fast'; allowed: a positive number, or None"),
    ],
)
def test_sizes_and_sampling(words: list[str], wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LEAST, *words, "--dry-run"]) == 2
    assert wanted in capsys.readouterr().err


def test_sizes_and_sampling_reach_the_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def clip_folder(root: str, frames: int, size: Any, **options: Any) -> None:
        asked.update(options, size=size)
        raise ValueError("seen")

    monkeypatch.setattr(open_clips, "ClipFolder", clip_folder)
    words = ["data.size=[128,160]", "data.short=loop", "data.fps=12.5", "data.sampling=dense", f"out={tmp_path / 'run'}"]
    with torch.random.fork_rng():
        assert main([*LEAST, *words, "device=cpu", "--dry-run"]) == 2
    assert asked["size"] == (128, 160) and asked["short"] == "loop" and asked["fps"] == 12.5 and asked["sampling"] == "dense"
    assert read_config(None, [*LEAST, "data.size=225", "model.stride=16"]).data.size == 225  # the rest is cropped then
    with torch.random.fork_rng():
        assert main([*LEAST, f"out={tmp_path / 'run'}", "device=cpu", "--dry-run"]) == 2
    assert asked["size"] == 224 and asked["short"] == "drop" and asked["fps"] is None


@pytest.mark.parametrize("out", ["file", "file/run", "file/a/run", "/proc/run", "/proc/a/run", "lost", "x" * 300])
def test_folder_that_cannot_be_written(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if out.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("there is no /proc")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "lost").symlink_to(tmp_path / "no/such")
    assert main([*LEAST, f"out={out}", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert f"out is '{out}', where nothing can be written (" in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "lost"]


def test_without_pyyaml_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert main(LEAST) == 2
    assert "pip install 'videomamba-bench[train]'" in capsys.readouterr().err


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["tsk=finetune"], "tsk is no key; the nearest is task. Allowed: task, out, model"),
        (["data.frame=3", *LEAST], "data.frame is no key; the nearest is data.frames. Allowed: data.train"),
        (["model.dept=3", *LEAST], "model.dept is no key; the nearest is model.depth"),
        (["task=train", *LEAST[1:]], "task is 'train'; allowed: one of 'finetune', 'pretrain', 'distill'"),
        (LEAST[1:], "task is None; allowed: one of"),
        (["task=finetune", "steps=3", "out=run"], "data.train is None; allowed: a folder"),
        (LEAST[:3], "steps is None and epochs is None; allowed: a number for one, none for the other"),
        ([*LEAST, "epochs=3"], "steps is 3 and epochs is 3; allowed"),
        ([*LEAST, "data.frames=many"], "data.frames is 'many'; allowed: a positive integer"),
        ([*LEAST, "data.workers=-1"], "data.workers is -1; allowed: an integer from 0 up"),
        ([*LEAST, "data.separator=bar"], "data.separator is 'bar'; allowed: one of 'tab', 'comma', 'semicolon', 'blank'"),
        ([*LEAST, "data.frame_pattern=*.jpg"], "text that begins with * or & stands in quotes"),
        ([*LEAST, "data.prefix=3"], "data.prefix is 3; allowed: a folder, or None"),
        ([*LEAST, "data.columns=[label]"], "data.columns is ('label',); allowed: a list of path, label, frames, seconds, skip"),
        ([*LEAST, "data.scale=[0.5,2]"], "data.scale is (0.5, 2); allowed: two shares"),
        ([*LEAST, "data=3"], "data is 3; allowed: a section with the keys train, val"),
        ([*LEAST, "optim.lr=0"], "optim.lr is 0; allowed: a positive number"),
        ([*LEAST, "optim.betas=0.9"], "optim.betas is 0.9; allowed: two rates"),
        ([*LEAST, "optim.rule=own"], "optim.rule is 'own'; allowed: one of 'upstream', 'corrected'"),
        ([*LEAST, "deterministic=maybe"], "deterministic is 'maybe'; allowed: True or False"),
        ([*LEAST, "seed=-1"], "seed is -1; allowed: an integer from 0"),
        ([*LEAST, "precision=half"], "precision is 'half'; allowed: one of 'float32', 'bfloat16', 'float16'"),
        ([*LEAST, "ema=1"], "ema is 1; allowed: a rate between 0 and 1, such as 0.9999, or None"),
        ([*LEAST, "save_minutes=0"], "save_minutes is 0; allowed: a positive number, or None"),
        ([*LEAST, "save_every=0"], "save_every is 0; allowed: a positive integer, or None"),
        ([*LEAST, "accumulate=3"], "accumulate is 3; allowed: a divisor of batch_size (8)"),
        ([*LEAST, "model.img_size=32"], "model.img_size is 32; allowed: nothing, it follows from data.size"),
        ([*LEAST, "model.size=huge"], "model.size is 'huge'; allowed: one of 'tiny'"),
        ([*LEAST, f"start={Path(__file__).parent}", "model.size=tiny"], "model.size is 'tiny'; allowed: null, since start"),
        ([*LEAST, "start=videomamba_t16_k400_f8_res224", "model.size=tiny"], "allowed: null, since start (videomamba_t16_k400"),
        ([*LEAST, "mask.ratio=0.5"], "mask.ratio is given; task 'finetune' does not read it"),
        ([*LEAST, "teacher=clip"], "teacher is given; task 'finetune' does not read it"),
        (["task=pretrain", *LEAST[1:]], "teacher is None; allowed: for task 'pretrain' a folder"),
        ([*DISTILL, "mask={}"], "mask is given; task 'distill' does not read it"),
        ([*LEAST, "frames"], "'frames' is no override; allowed: key=value"),
        ([*LEAST, "out.put=3"], "out.put is given, but out is 'run', no section"),
        ([*LEAST, "data.flip=[1"], "data.flip=[1 is no YAML"),
        (["--config", "no/such.yaml"], "No such file"),
    ],
)
def test_errors(words: list[str], wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    output = capsys.readouterr()
    assert wanted in output.err and "Traceback" not in output.err and not output.out


def test_file_without_a_mapping(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.yaml").write_text("- task\n")
    assert main(["--config", str(tmp_path / "list.yaml")]) == 2
    assert "holds a list; allowed: a mapping of keys" in capsys.readouterr().err
