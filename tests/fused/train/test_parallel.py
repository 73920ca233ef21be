"""Two processes take the step of one, with DistributedDataParallel and with FSDP2, and go on bit for bit."""

import shutil
from pathlib import Path

import pytest
import torch
from rule import assert_rule
from trainings import SMALL, log, steps, tensors, together, train, videos

from fused import VideoMamba, VideoMambaConfig, VideoMambaEncoder

SHAPE = {"img_size": 32, "num_frames": 2, "embed_dim": 32, "drop_path_rate": 0.0}
SEEDS = range(4)
# nothing is drawn that depends on how clips are spread over processes
STILL = {"finetune": ["mix.mixup=0", "mix.cutmix=0"], "pretrain": ["mask.ratio=0", "teacher={folder}/teacher"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    videos(folder / "videos", 4)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        VideoMamba(VideoMambaConfig(**SHAPE, depth=2, num_classes=2)).save_pretrained(folder / "finetune")
        VideoMambaEncoder(VideoMambaConfig(**SHAPE, depth=2, clip_output_dim=32)).save_pretrained(folder / "pretrain")
        VideoMamba(VideoMambaConfig(**SHAPE, depth=1)).save_pretrained(folder / "teacher")
    return folder


def words(folder: Path, run: str, *more: str) -> list[str]:
    return [*SMALL, f"data.train={folder / 'videos'}", f"out={folder / run}", *(m.format(folder=folder) for m in more)]


def in_float64() -> None:
    """The truth: what a step is given is the same to the last bit, and all that is computed of it is float64."""
    from fused.train import tasks

    build = tasks.build

    def built(*arguments):
        task = build(*arguments).double()
        prepare = task.prepare
        task.prepare = lambda *given: tuple(x.double() if x.is_floating_point() else x for x in prepare(*given))
        return task

    tasks.build = built


def first_step(run: Path) -> dict[str, torch.Tensor]:
    """Loss and gradients: Adam's first moment after one step is (1 - beta) * gradient."""
    moments = {k: v for k, v in tensors(run / "checkpoints/step-00000001").items() if k.startswith("optimizer.exp_avg.")}
    return moments | {"loss": torch.tensor(steps(run)[0]["loss"])}


@pytest.mark.parametrize("task", list(STILL))
def test_two_processes_take_the_step_of_one(folder, task):
    def runs(kind: str, *more: str) -> list[list[str]]:
        # where parameters have no gradient, DDP would find that out in the second step
        count = 2 if task == "pretrain" else 1
        start = [f"task={task}", f"start={folder / task}", *STILL[task], f"steps={count}", "save_every=1"]
        found = [words(folder, f"{task}-{kind}-{seed}", *start, f"seed={seed}", *more) for seed in SEEDS]
        return [[word for word in run if not word.startswith("model.")] for run in found]

    for kind, sabotage in (("truth", in_float64), ("plain", None)):
        code, said = train(*runs(kind), sabotage=sabotage, folder=folder)
        assert code == 0, said
    for parallel in ("ddp", "fsdp"):
        said = together(*runs(parallel, f"parallel={parallel}", "accumulate=2"), folder=folder)
        assert said.count("2 processes") == len(SEEDS) == said.count("done: "), said  # one of them writes
        of = [{kind: first_step(folder / f"{task}-{kind}-{seed}") for kind in (parallel, "truth", "plain")} for seed in SEEDS]
        assert all(sample[parallel].keys() == sample["plain"].keys() == sample["truth"].keys() for sample in of)
        assert_rule((s[parallel], {k: v.double() for k, v in s["truth"].items()}, s["plain"]) for s in of)
    assert any("layers.1.mixer" in name for name in of[0]["plain"]) == (task == "finetune")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_going_on(folder, parallel):
    """What processes draw differs, and comes again; one process goes on where two stopped."""
    val = f"data.val={folder / 'videos'}"
    run = words(folder, parallel, "task=finetune", "steps=4", "save_every=2", "model.drop_path_rate=0.4", val)
    together([*run, f"parallel={parallel}"], folder=folder)
    whole, again = folder / parallel, folder / f"{parallel}-again"
    shutil.copytree(whole, again)
    shutil.rmtree(again / "model")
    (again / "checkpoints/last").write_text("step-00000002\n")
    said = together([*run, f"parallel={parallel}", f"out={again}"], folder=folder)
    assert "goes on behind step 2" in said
    assert log(again) == log(whole) and [line["step"] for line in steps(again)] == [1, 2, 3, 4]
    ours, theirs = (tensors(path / "checkpoints/step-00000004") for path in (again, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    model = (whole / "model/model.safetensors").read_bytes()
    assert (again / "model/model.safetensors").read_bytes() == model
    shutil.rmtree(again / "model")
    code, said = train([*run, f"out={again}"], folder=folder)
    assert code == 0 and "processes: 2 -> 1" in said, said
    assert (again / "model/model.safetensors").read_bytes() == model
