"""The exponential moving average of the weights: its values, under DDP and FSDP2 too, its accuracy, its folder, resuming."""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from trainings import SMALL, class_folders
from videos import write_video

from fused import VideoMamba, VideoMambaConfig
from fused.train import ClipFolder
from fused.train.ema import WeightAverage
from fused.train.evaluation import evaluate
from fused.train.parallel import World
from fused.train.tasks import Finetune, Task
from harness.instruments.two_processes import Training, log, run_trainings, tensors

RATE, STEPS = 0.75, 4
CONFIG = VideoMambaConfig(img_size=32, num_frames=2, depth=2, embed_dim=32, num_classes=2)
ENGINES = ("plain", "ddp", "fsdp")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of a start model and of runs of every engine, each evaluated and saved at every step."""
    folder = tmp_path_factory.mktemp("ema")
    class_folders(folder / "videos", 4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        VideoMamba(CONFIG).save_pretrained(folder / "start")
    run_trainings([training(folder, engine, engine) for engine in ENGINES], folder, partial(record_logits, folder))
    return folder


def record_logits(folder: Path) -> None:
    """Make every process of a training write the logits of its evaluations to a file."""
    compute = Finetune.logits

    def record(self: Finetune, clips: Tensor) -> Tensor:
        logits = compute(self, clips)
        with open(folder / f"logits-{Path(str(self.config.out)).name}-{os.environ.get('RANK', '0')}.jsonl", "a") as file:
            file.write(json.dumps(logits.tolist()) + "\n")
        return logits

    Finetune.logits = record


def training(folder: Path, engine: str, run: str) -> Training:
    words = [word for word in SMALL if not word.startswith("model.")]
    words += ["task=finetune", f"start={folder / 'start'}", f"ema={RATE}", f"steps={STEPS}", f"out={folder / run}"]
    words += [f"data.{part}={folder / 'videos'}" for part in ("train", "val")]
    words += ["evaluate_every=1", "save_every=1", "keep=9"] + ([] if engine == "plain" else [f"parallel={engine}"])
    return Training(tuple(words), in_two_processes=engine != "plain")


def part(checkpoint: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in checkpoint.items() if name.startswith(prefix)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("engine", ENGINES)
def test_values(folder: Path, engine: str) -> None:
    """Evaluations between the steps, with the averages in the model's place, change no bit."""
    average = load_file(folder / "start/model.safetensors")
    for step in range(1, STEPS + 1):
        checkpoint = tensors(folder / engine / f"checkpoints/step-{step:08d}")
        parameters = part(checkpoint, "model.")
        average = {name: torch.lerp(average[name], value, 1 - RATE) for name, value in parameters.items()}
        stored = part(checkpoint, "ema.")
        assert same(stored, average) and all(value.dtype == torch.float32 for value in stored.values())
    assert same(load_file(folder / engine / "model-ema/model.safetensors"), average)
    assert same(load_file(folder / engine / "model/model.safetensors"), parameters)
    assert VideoMamba.from_pretrained(folder / engine / "model-ema").config.num_classes == 2


@pytest.mark.parametrize("engine", ENGINES)
def test_evaluation_has_the_logits_of_the_saved_models(folder: Path, engine: str) -> None:
    dataset = ClipFolder(folder / "videos", 2, 32, train=False)
    clips = torch.stack([dataset.sample(i, 0).clip for i in range(len(dataset))])
    # the last evaluation of each process has two batches, each for the model and then for its average
    recorded = [path.read_text().splitlines()[-4:] for path in folder.glob(f"logits-{engine}-?.jsonl")]
    assert len(recorded) == (1 if engine == "plain" else 2)
    for i, name in enumerate(("model", "model-ema")):
        got = torch.tensor([logits for lines in recorded for line in lines[i::2] for logits in json.loads(line)])
        with torch.no_grad():
            wanted = VideoMamba.from_pretrained(folder / engine / name).eval()(clips)
        torch.testing.assert_close(got.sort(dim=0).values, wanted.sort(dim=0).values)


def test_resumed_in_two_processes(folder: Path) -> None:
    """A run that was killed behind its second checkpoint has the same bits in the end."""
    for engine in ("ddp", "fsdp"):
        run = shutil.copytree(folder / engine, folder / f"{engine}-killed", ignore=shutil.ignore_patterns("model*", "*3", "*4"))
        (run / "checkpoints/last").write_text("step-00000002\n")
        lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
        (run / "log.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 2))
    output = run_trainings([training(folder, engine, f"{engine}-killed") for engine in ("ddp", "fsdp")], folder)
    assert output.count("goes on behind step 2") == 2, output
    for engine in ("ddp", "fsdp"):
        ours, theirs = (tensors(folder / run / f"checkpoints/step-{STEPS:08d}") for run in (engine, f"{engine}-killed"))
        assert same(ours, theirs) and log(folder / engine) == log(folder / f"{engine}-killed")
        ours, theirs = (load_file(folder / run / "model-ema/model.safetensors") for run in (engine, f"{engine}-killed"))
        assert same(ours, theirs)


CPU = World(torch.device("cpu"))


class Classifier(Task):
    """A task that is its student."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def logits(self, clips: Tensor) -> Tensor:
        return self.student(clips)


class Constant(nn.Module):
    """A classifier that gives every clip its weights as logits, by a matrix product, for which autocast rounds them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 2, bias=False)
        nn.init.constant_(self.layer.weight, 1.0)

    def forward(self, clips: Tensor) -> Tensor:
        return self.layer(torch.ones(len(clips), 1))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_evaluation_of_both(tmp_path: Path, precision: torch.dtype) -> None:
    """The model answers with the second class and its average with the first, under autocast too."""
    for label, count in enumerate((3, 1)):
        (tmp_path / str(label)).mkdir()
        for i in range(count):
            write_video(tmp_path / str(label) / f"{i}.avi", frames=2, width=32, height=32)
    student = Constant()
    weight = student.layer.weight
    with torch.no_grad():
        weight[:, 0] = torch.tensor([2.0, 1.0])
        average = WeightAverage(student, 0.9)
        weight[:, 0] = torch.tensor([2.0, 3.0])
        average.update()
    kept, kept_average = weight.clone(), average.tensors["layer.weight"].clone()
    autocast = torch.autocast("cpu", precision, enabled=precision != torch.float32)
    dataset = ClipFolder(tmp_path, 2, 16, train=False)
    evaluation = evaluate(Classifier(student), dataset, 3, CPU, autocast, average=average)
    assert evaluation is not None
    assert evaluation.results["val_top1"] == 1 / 4 and evaluation.results["val_ema_top1"] == 3 / 4
    assert torch.equal(weight, kept) and torch.equal(average.tensors["layer.weight"], kept_average)
    assert torch.allclose(kept_average[:, 0], torch.tensor([2.0, 1.2]))


def test_swap_is_undone_after_an_error() -> None:
    student = Constant()
    average = WeightAverage(student, 0.5)
    with torch.no_grad():
        student.layer.weight.add_(1)
    with pytest.raises(ZeroDivisionError), average.swapped():
        assert (student.layer.weight == 1).all()
        _ = 1 / 0
    assert (student.layer.weight == 2).all() and (average.tensors["layer.weight"] == 1).all()
