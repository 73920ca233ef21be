"""Trainings on numbers: the loss, the evaluation during a training, the best model, and lists that are wrong."""

import json
import math
import statistics
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from trainings import SMALL, train
from videos import write_video

from fused import VideoMamba
from fused.evaluate import Settings
from fused.evaluate import evaluate as evaluate_model
from fused.train.best import BestModel
from fused.train.config_file import read_config
from fused.train.data.target_clips import TargetClips
from fused.train.evaluation import evaluate
from fused.train.loop import Trainer
from fused.train.parallel import World
from fused.train.task import Task
from harness.instruments.two_processes import log

CPU = World(torch.device("cpu"))
NUMBERS = {f"{i}.avi": 100.0 + 35 * (i % 2) for i in range(8)}  # a video with white edges has the higher number


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a list of videos, half of them with white edges, with numbers, as LVU's lists with seconds."""
    root = tmp_path_factory.mktemp("numbers")
    for name in NUMBERS:
        write_video(root / name, frames=3, width=48, height=32, side=20 * (int(name[0]) % 2), step=4 + int(name[0]))
    (root / "list.csv").write_text("".join(f"{name},{number},{60 + number}\n" for name, number in NUMBERS.items()))
    return root / "list.csv"


def words(numbers: Path, out: Path) -> list[str]:
    given = ["task=regress", f"data.train={numbers}", f"data.val={numbers}", "data.columns=[path,label,seconds]", f"out={out}"]
    return [*SMALL, *given, "data.target_mean=117.5", "data.target_std=10", "data.flip=0"]


def test_it_learns_numbers_and_keeps_the_model_of_the_lowest_error(numbers: Path, tmp_path: Path) -> None:
    """The best model's error is what the evaluation of its folder finds, in the units of the training."""
    run = tmp_path / "run"
    code, output = train([*words(numbers, run), "steps=40", "evaluate_every=10", "ema=0.8"], folder=tmp_path)
    assert code == 0 and "8 videos, 2 steps an epoch, 40 steps" in output, output
    judged = [line for line in log(run) if "val_mse" in line]
    assert [line["step"] for line in judged] == [10, 20, 30, 40] and all(line["val_read"] == 8 for line in judged)
    best = json.loads((run / "best/best.json").read_text())
    assert best["mse"] == min(min(line["val_mse"], line["val_ema_mse"]) for line in judged)
    assert best["mse"] < 0.5 < statistics.pvariance(NUMBERS.values()) / 100
    assert "top1" not in best and f"best so far, {'the EMA' * (best['weights'] == 'ema')}" in output
    settings = Settings(target_mean=117.5, target_std=10, columns=("path", "label", "seconds"), workers=0)
    results = evaluate_model(run / "best", numbers, settings=settings)
    assert results.numbers["mse"] == pytest.approx(best["mse"], rel=1e-4)
    assert VideoMamba.from_pretrained(run / "model").config.num_classes == 1


def test_a_run_goes_on_and_is_not_evaluated_twice(numbers: Path, tmp_path: Path) -> None:
    both = [*words(numbers, tmp_path / "run"), "evaluate_every=1"]
    code, output = train([*both, "steps=1"], [*both, "steps=2"], folder=tmp_path)
    assert code == 0 and "goes on behind step 1" in output, output
    assert [line["step"] for line in log(tmp_path / "run") if "val_mse" in line] == [1, 2]


def test_the_loss_is_the_squared_error_of_the_normalised_numbers(numbers: Path, tmp_path: Path) -> None:
    given = [*words(numbers, tmp_path / "run"), "steps=1", "batch_size=8", "precision=bfloat16", "data.repeats=2"]
    trainer = Trainer(read_config(None, given), CPU)
    names = [path.name for path in trainer.data.files]
    targets = trainer.task.encode(torch.arange(8))
    assert targets.tolist() == pytest.approx([(NUMBERS[name] - 117.5) / 10 for name in names])
    clips, outputs = torch.zeros(8, 3, 2, 32, 32), torch.linspace(-1, 1, 8)[:, None]
    trainer.task.logits = lambda _: outputs.bfloat16()
    loss, _ = trainer.task(*trainer.task.prepare(clips, targets, torch.Generator()))
    assert loss.dtype == torch.float32 and float(loss) == float((outputs.bfloat16().float()[:, 0] - targets).square().mean())


class Fixed(Task):
    """A task that gives every clip the same output."""

    def __init__(self, output: float) -> None:
        super().__init__()
        self.student, self.fixed = nn.Identity(), torch.tensor([output])

    def logits(self, clips: Tensor) -> Tensor:
        return self.fixed.expand(len(clips), -1)


def test_videos_that_are_not_read_do_not_count(numbers: Path, tmp_path: Path) -> None:
    """With none at all the error is infinite, and no model is the best one."""
    (tmp_path / "broken.avi").write_bytes(b"no video")
    (tmp_path / "list").write_text(f"{numbers.parent / '0.avi'},3\n{numbers.parent / '1.avi'},-1\nbroken.avi,1000\n")
    clips = TargetClips(tmp_path / "list", 2, 32, train=False, mean=1, std=2)
    found = evaluate(Fixed(0.5), clips, 2, CPU, nullcontext())
    assert found is not None and found.results == {
        "val_mse": (0.5**2 + 1.5**2) / 2, "val_read": 2, "val_listed": 3, "val_too_short": 0, "val_unreadable": 1
    }  # fmt: skip
    (tmp_path / "list").write_text("broken.avi,1000\n")
    found = evaluate(Fixed(0.5), TargetClips(tmp_path / "list", 2, 32, train=False, mean=0, std=1), 2, CPU, nullcontext())
    assert found is not None and found.results["val_mse"] == math.inf
    best = BestModel(tmp_path, read_config(None, [*words(numbers, tmp_path), "steps=1"]), CPU, resumed=False)
    for mse in (math.inf, math.nan):
        assert not best.offer(1, found.results | {"val_mse": mse}, VideoMamba.__new__(VideoMamba), None)


def test_what_is_wrong(numbers: Path, tmp_path: Path) -> None:
    """Each is an error before the first step, which names the key or the line."""
    good = words(numbers, tmp_path / "run")
    (tmp_path / "list").write_text("a.avi,0.5\nb.avi,much\n")
    cases = {
        f"data.train={numbers.parent}": "data.train: data is .* allowed for a model of one output: a list",
        f"data.train={tmp_path / 'list'}": "data.train: .*list, line 2: .*b.avi has the target 'much'; allowed: a number",
        "data.target_std=0": "data.target_std is 0; allowed",
        "data.target_mean=.inf": "data.target_mean is inf; allowed: a number",
        "model.num_classes=3": "model.num_classes is 3; allowed: 1",
        "model.readout=tokens": "model.readout is 'tokens'; allowed",
        "mix.mixup=0.5": "mix.mixup is given; task 'regress' does not read it",
        "loss.label_smoothing=0": "loss.label_smoothing is given; task 'regress' does not read it",
    }
    for word, message in cases.items():
        columns = "data.columns=[path,label]" if str(tmp_path / "list") in word else "steps=1"
        with pytest.raises(ValueError, match=message):
            Trainer(read_config(None, [*good, "steps=1", columns, word]), CPU)
    with pytest.raises(ValueError, match="data.target_mean is given; task 'finetune' does not read it"):
        read_config(None, ["task=finetune", "out=run", "data.train=a", "steps=1", "data.target_mean=3"])
