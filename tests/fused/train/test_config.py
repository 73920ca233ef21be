"""Every wrong key and value of a training's configuration is reported, with the allowed ones, before anything is built."""

from pathlib import Path

import pytest

from fused.train.__main__ import main
from fused.train.config_file import read_config, to_yaml

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


def test_only_keys_that_the_task_reads_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-config", *LEAST]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("frames: 8", "label_smoothing: 0.1", "mixup: 0.8", "save_every: 500"))
    assert not any(word in printed for word in ("mask", "teacher", "alignment", "distillation"))
    assert main(["--print-config", "teacher=clip", "task=pretrain", *LEAST[1:]]) == 0
    printed = capsys.readouterr().out
    assert "teacher: clip" in printed and "ratio: 0.8" in printed
    assert not any(word in printed for word in ("mixup", "label_smoothing", "val:"))


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
        ([*LEAST, "start=folder", "model.size=tiny"], "model.size is 'tiny'; allowed: null, since start"),
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
