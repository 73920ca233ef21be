"""Image classification as a training task: `data.frames: null`, an image model, and every image of a class folder."""

from pathlib import Path

import pytest
import torch
from trainings import SMALL, train
from videos import write_images

from fused import VideoMamba, VideoMambaConfig
from fused.evaluate import Settings, evaluate
from fused.io.preprocessing import Preprocessing
from fused.train import ClipFolder, batches
from fused.train.config_file import read_config
from fused.train.prefetch import from_bytes
from harness.instruments.two_processes import log, steps


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with six dark and six light images."""
    root = tmp_path_factory.mktemp("images")
    every = write_images(root / "every", [f"{i}.png" for i in range(26)])
    for name, first in (("dark", 0), ("light", 20)):
        (root / "data" / name).mkdir(parents=True)
        for i in range(first, first + 6):
            (every / f"{i}.png").rename(root / "data" / name / f"{i}.png")
    return root / "data"


def test_batches_of_images(images: Path) -> None:
    folder = ClipFolder(images, None, 16, train=True, flip=0.0, dtype=torch.uint8)
    [batch] = batches(folder, 12, epoch=0, seed=0)
    assert folder.classes == ("dark", "light") and batch.clips.shape == (12, 3, 16, 16)
    grey = [int(path.stem) * 10 for path in folder.files]
    assert [int(clip.float().mean().round()) for clip in batch.clips] == [grey[index] for index in batch.indices]
    alone = torch.stack([from_bytes(clip[None, :, None])[0, :, 0] for clip in batch.clips])  # as clips of one frame
    assert torch.equal(from_bytes(batch.clips), alone)
    evaluated = ClipFolder(images, None, 16, train=False)
    assert torch.equal(evaluated.sample(3, 0).clip, Preprocessing(None, 16).read(evaluated.files[3]))


def test_training_on_images(images: Path, tmp_path: Path) -> None:
    """It learns, is evaluated by the images' protocol, and teaches a second one by distillation."""
    words = [*SMALL, f"data.train={images}", f"data.val={images}", "data.frames=null", "optim.lr=1e-2"]
    run = tmp_path / "run"
    code, output = train([*words, "task=finetune", "steps=20", "mix.probability=0", f"out={run}"], folder=tmp_path)
    assert code == 0 and "12 images in 2 classes" in output, output
    assert log(run)[-1]["val_top1"] == 1 and steps(run)[-1]["loss"] < steps(run)[0]["loss"]
    model = VideoMamba.from_pretrained(run / "model")
    assert model.config.num_frames is None and model.preprocessing == Preprocessing(None, 32)
    assert evaluate(run / "model", images, settings=Settings(workers=0, protocol="in1k")).numbers["top1"] == 1
    distilled = ["task=distill", f"teacher={run / 'model'}", "steps=2", f"out={tmp_path / 'distilled'}"]
    code, output = train([*words, *distilled], folder=tmp_path)
    assert code == 0, output
    assert VideoMamba.from_pretrained(tmp_path / "distilled/model").config.num_frames is None


def test_pretraining_needs_clips() -> None:
    with pytest.raises(ValueError, match="data.frames is None; allowed: a number for task 'pretrain', whose model takes clips"):
        read_config(None, ["task=pretrain", "teacher=t", "out=o", "data.train=d", "steps=1", "data.frames=null"])
    assert VideoMambaConfig(num_frames=read_config(None, ["data.frames=null"], complete=False).data.frames).tubelets == 1
