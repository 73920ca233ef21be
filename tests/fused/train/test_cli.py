"""`python -m fused.train` from a folder of videos to a model: the three tasks, the log, and errors."""

import io
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from trainings import SMALL, class_folders, train

from fused import VideoMamba, VideoMambaConfig, VideoMambaEncoder
from fused.io.preprocessing import Preprocessing
from fused.io.video import read_clip
from fused.models.videomamba.resize import inflate_kernel
from fused.train import checkpoints, parameter_groups
from fused.train.log import Log
from fused.train.parallel import World
from harness.instruments.two_processes import log, steps

TINY = {"img_size": 32, "num_frames": 2, "depth": 1, "embed_dim": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of eight videos of two classes, and of an untrained teacher."""
    folder = tmp_path_factory.mktemp("cli")
    class_folders(folder / "videos", 4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        VideoMamba(VideoMambaConfig(**TINY, num_classes=3)).save_pretrained(folder / "teacher")
        VideoMamba(VideoMambaConfig(**TINY, num_classes=3, kernel_size=2)).save_pretrained(folder / "tubelets")
    class_folders(folder / "one", 1)
    for i in range(1, 40):  # a look at some finds the one that can be read
        (folder / "one" / "side20" / f"{i}.avi").write_bytes(b"no video")
    (folder / "paths.txt").write_text("".join(f"{path}\n" for path in (folder / "videos").rglob("*.*")))
    (folder / "broken").mkdir()
    (folder / "broken/config.json").write_text("no JSON")
    return folder


def arguments(folder: Path, run: str, *more: str) -> list[str]:
    return [*SMALL, f"data.train={folder / 'videos'}", f"out={folder / run}", *more]


def falls(run: Path) -> bool:
    losses = [line["loss"] for line in steps(run)]
    return sum(losses[-4:]) < 0.8 * sum(losses[:4])


def test_finetune(folder: Path) -> None:
    """A run writes log, evaluation, checkpoints and model; the classes are learnt."""
    # with evaluation during training, an unreadable file, micro-batches, and mixing in some of the steps
    val = class_folders(folder / "val", 3)
    (val / "side0" / "broken.avi").write_bytes(b"no video")
    more = ["task=finetune", "epochs=12", f"data.val={val}", "evaluate_every=20", "accumulate=2", "mix.probability=0.3"]
    code, output = train(arguments(folder, "fine", *more, "log_every=2", "optim.clip_grad=1.0"), folder=folder)
    assert code == 0, output
    run = folder / "fine"
    assert "finetune: VideoMamba" in output and "8 videos in 2 classes, 2 steps an epoch, 24 steps" in output
    assert output.count("left out") == 1 and "6 videos that were read; top-1" in output
    assert [line["step"] for line in steps(run)] == list(range(2, 25, 2)) and falls(run)
    assert [line["epoch"] for line in steps(run)][:3] == [0, 1, 2]
    assert steps(run)[0].keys() == {"step", "epoch", "loss", "lr", "grad_norm"}
    judged = [line for line in log(run) if "val_top1" in line]
    assert [line["step"] for line in judged] == [20, 24]
    assert judged[-1]["val_read"] == 6 and judged[-1]["val_top1"] > 0.8
    assert [line["step"] for line in log(run) if "broken.avi" in line.get("bad", "")] == [20]
    model = VideoMamba.from_pretrained(run / "model")
    assert model.config.num_classes == 2 and model.config.num_frames == 2
    assert model.labels == ("side0", "side20") and model.preprocessing == Preprocessing(2, 32)
    [[(name, probability)]] = model.top_labels(model(read_clip(val / "side20" / "0.avi", 2, 32)[None]), top=1)
    assert name == "side20" and probability > 0.5
    code, output = train(["--config", str(run / "config.yaml"), "--dry-run"], folder=folder)
    assert code == 0 and "goes on behind step 24" in output and "accumulate: 2" in output


@pytest.mark.parametrize("inflate", ["centre", "mean"])
def test_start_from_an_image_model(inflate: str, folder: Path) -> None:
    """The patches of an image model become those of tubelets of two frames, as `inflate` says."""
    torch.manual_seed(1)
    image = VideoMamba(VideoMambaConfig(**TINY | {"num_frames": None}, num_classes=2))
    image.save_pretrained(folder / "image")
    words = [word for word in arguments(folder, f"inflated-{inflate}", "task=finetune", "steps=1") if "model." not in word]
    words += ["optim.lr=1e-9", f"start={folder / 'image'}", "model.kernel_size=2", f"inflate={inflate}"]
    code, output = train(words, folder=folder)
    assert code == 0, output
    found = VideoMamba.from_pretrained(folder / f"inflated-{inflate}/model").patch_embed.proj.weight
    due = inflate_kernel(image.patch_embed.proj.weight, 2, inflate)
    torch.testing.assert_close(found, due, rtol=0, atol=1e-7)  # one step moves a weight by its learning rate, 1e-9
    assert (found[:, :, 0].abs().max() < 1e-7) == (inflate == "centre")


def test_classes_of_the_start(folder: Path) -> None:
    """A run that starts from a model of other classes has its own; as many classes of other names get a new head."""
    torch.manual_seed(1)
    start = VideoMamba(VideoMambaConfig(**TINY, num_classes=2))
    torch.nn.init.ones_(start.head.weight)
    for name, labels in (("same", ("side0", "side20")), ("other", ("cat", "dog")), ("unnamed", None)):
        start.labels = labels
        start.save_pretrained(folder / name)
    start.reset_classifier(3)
    start.labels = ("cat", "dog", "cow")
    start.save_pretrained(folder / "more")
    words = [word for word in arguments(folder, "from", "task=finetune", "steps=1", "optim.lr=1e-9") if "model." not in word]
    kept = {}
    for name in ("same", "other", "unnamed", "more"):
        code, output = train([*words, f"start={folder / name}", f"out={folder / 'from'}-{name}"], folder=folder)
        assert code == 0, output
        model = VideoMamba.from_pretrained(folder / f"from-{name}" / "model")
        assert model.labels == ("side0", "side20")
        kept[name] = bool(model.head.weight.sub(1).abs().max() < 1e-3)
        said = "start has other classes than data.train ('cat', here 'side0'): the head is left at init" in output
        assert said == (name == "other")
    assert kept == {"same": True, "other": False, "unnamed": True, "more": False}


def test_the_model_of_a_run_that_was_stopped(folder: Path) -> None:
    """The error for a run without a model says how one is made of its last checkpoint."""
    more, run = ["task=finetune", "save_every=1", "data.val=null"], folder / "stopped"
    assert train(arguments(folder, "stopped", *more, "steps=2"), folder=folder)[0] == 0
    for path in (run, run / "checkpoints/step-00000002"):
        with pytest.raises(FileNotFoundError, match=rf"its model is in {run}/model"):
            VideoMamba.from_pretrained(path)
    shutil.rmtree(run / "model")
    for path in (run, run / "checkpoints/step-00000002"):
        with pytest.raises(FileNotFoundError, match="no model yet; epochs=null steps=N, of its last checkpoint, writes one"):
            VideoMamba.from_pretrained(path)
    code, output = train(arguments(folder, "stopped", *more, "epochs=null", "steps=2"), folder=folder)
    assert code == 0, output
    assert VideoMamba.from_pretrained(run / "model").labels


def test_a_run_whose_classes_were_renamed_does_not_go_on(folder: Path) -> None:
    """As many videos in as many classes, whose order is another: its outputs would be called by the names of others."""
    videos = class_folders(folder / "renamed", 4)
    words = [*SMALL, f"data.train={videos}", f"out={folder / 'renamed run'}", "task=finetune", "save_every=1"]
    assert train([*words, "steps=2"], folder=folder)[0] == 0
    first = sorted(path for path in videos.iterdir() if path.is_dir())[0]
    first.rename(videos / "zebra")
    code, output = train([*words, "steps=3"], folder=folder)
    assert code == 2 and f"are ['zebra'] in place of ['{first.name}'], since" in output.splitlines()[-1], output
    (videos / "zebra").rename(first)
    code, output = train([*words, "steps=3"], folder=folder)
    assert code == 0, output


def test_a_dry_run_leaves_nothing(folder: Path) -> None:
    """With frames that are no squares, sampled by time."""
    before = sorted(path for path in folder.rglob("*") if path.suffix != ".txt")
    more = ["data.size=[32,48]", "data.sampling=dense", "data.fps=2", "data.short=last", "task=finetune", "steps=2"]
    code, output = train(arguments(folder, "dry/run", *more, "--dry-run"), folder=folder)
    assert code == 0 and "8 videos in 2 classes" in output, output
    assert re.search(r"size:  # pixels of a side, or \[height, width\]\n +- 32\n +- 48\n", output), output
    assert sorted(path for path in folder.rglob("*") if path.suffix != ".txt") == before


def test_keys_that_are_newer_than_a_run(folder: Path) -> None:
    """A run is continued whose configuration lacks a key that came later: it had the default."""
    more = ["task=finetune", "steps=2"]
    assert train(arguments(folder, "older", *more), folder=folder)[0] == 0
    stored = folder / "older" / "config.yaml"
    stored.write_text("".join(line for line in stored.open() if line.split(":")[0].strip() not in ("short", "fps", "seed")))
    code, output = train(arguments(folder, "older", *more, "--dry-run"), folder=folder)
    assert code == 0 and "goes on behind step 2" in output and "->" not in output, output
    code, output = train(arguments(folder, "older", *more, "data.short=loop", "--dry-run"), folder=folder)
    assert code == 2 and "which differs in data.short: drop -> loop" in output


def test_without_the_published_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no network, the advice is for a command line."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(folder / "hub"))
    pytest.importorskip("huggingface_hub")
    words = [word for word in arguments(folder, "published", "task=finetune", "steps=1") if "model." not in word]
    code, output = train([*words, "start=videomamba_t16_k400_f8_res224"], fault=offline, folder=folder)
    last = output.splitlines()[-1]
    assert code == 2 and last.startswith("fused.train: start is a published model, and videomamba_t16_k400_f8_res224.pth is")
    assert "set start=videomamba_t16_k400_f8_res224.pth model.size=" in last and "load_checkpoint" not in output


def offline() -> None:
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = True


def test_distill(folder: Path) -> None:
    more = ["task=distill", f"teacher={folder / 'teacher'}", "steps=14", "precision=bfloat16", "optim.lr=1e-2"]
    code, output = train(arguments(folder, "distilled", *more), folder=folder)
    assert code == 0, output
    first, *_, last = steps(folder / "distilled")
    assert last["distance"] < 0.8 * first["distance"] and falls(folder / "distilled")
    model = VideoMamba.from_pretrained(folder / "distilled/model")
    logits = model(torch.zeros(1, 3, 2, 32, 32))
    assert isinstance(logits, torch.Tensor) and logits.shape == (1, 2) and model.labels == ("side0", "side20")
    student = VideoMamba(replace(model.config, distill_dim=TINY["embed_dim"]))
    optimizer = torch.optim.AdamW(parameter_groups(student, 1.0, 0.05))
    checkpoints.load(folder / "distilled/checkpoints/step-00000014", student, optimizer, {}, World(torch.device("cpu")))
    output = student.eval()(torch.zeros(1, 3, 2, 32, 32))  # with the head of distillation, which a checkpoint keeps
    assert torch.equal(output.logits, logits) and output.features.shape == (1, 9, TINY["embed_dim"])
    code, output = train(arguments(folder, "distilled", *more[:2], "steps=15", *more[3:]), folder=folder)
    assert code == 0 and "goes on behind step 14" in output


def test_pretrain_and_finetune_its_weights(folder: Path) -> None:
    pretrain = ["task=pretrain", f"teacher={folder / 'teacher'}", "mask.ratio=0.5", "optim.lr=1e-2"]
    finetune = ["task=finetune", f"start={folder / 'tube/model'}", "steps=1"]
    code, output = train(
        arguments(folder, "tube", *pretrain, "steps=12"),
        *(arguments(folder, kind, *pretrain, "steps=1", f"mask.kind={kind}") for kind in ("random", "clip-row", "frame-row")),
        [word for word in arguments(folder, "from", *finetune) if "model." not in word],
        folder=folder,
    )
    assert code == 0 and falls(folder / "tube"), output
    assert VideoMambaEncoder.from_pretrained(folder / "tube/model").config.clip_output_dim == TINY["embed_dim"]
    assert "the checkpoint has no head" in output and "model has no clip_decoder" in output
    assert VideoMamba.from_pretrained(folder / "from/model").config.depth == 2
    first = [steps(folder / kind)[0]["loss"] for kind in ("tube", "random", "clip-row", "frame-row")]
    assert len(set(first)) == 4  # the same weights and clips under different masks


def test_pretrain_with_clip(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16,
        projection_dim=12,
    )  # fmt: skip
    with torch.random.fork_rng():
        transformers.CLIPVisionModelWithProjection(config).save_pretrained(folder / "clip")
    more = ["task=pretrain", f"teacher={folder / 'clip'}", "steps=12", "mask.kind=attention", "mask.ratio=0.5", "optim.lr=1e-2"]
    code, output = train(arguments(folder, "clipped", *more, "model.clip_return_layer=2"), folder=folder)
    assert code == 0 and falls(folder / "clipped"), output
    student = VideoMambaEncoder.from_pretrained(folder / "clipped/model")
    assert (student.config.clip_output_dim, student.config.clip_return_layer) == (12, 2)


def test_float16(folder: Path) -> None:
    """The loss is scaled; a step whose gradients overflow is skipped, and the scale is lowered."""
    more = ["task=finetune", "steps=3", "precision=float16", "save_every=2"]
    code, output = train(arguments(folder, "half", *more), folder=folder)
    assert code == 0, output
    assert all(line["scale"] >= 1 for line in steps(folder / "half"))
    facts = json.loads((folder / "half/checkpoints/step-00000002/training.json").read_text())
    assert facts["scaler"]["scale"] == steps(folder / "half")[1]["scale"]


class Board:
    """A replacement of TensorBoard's writer that writes its calls to a file."""

    def __init__(self, folder: str, purge_step: int) -> None:
        self.file = open(Path(folder).parent / "board.txt", "a")
        self.add_scalar("from", 0, purge_step)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        print(name, value, step, file=self.file)

    def close(self) -> None:
        self.file.close()


def with_board() -> None:
    sys.modules["torch.utils.tensorboard"] = SimpleNamespace(SummaryWriter=Board)


def without_board() -> None:
    sys.modules["torch.utils.tensorboard"] = None


def test_tensorboard(folder: Path) -> None:
    """It gets the numbers of steps and evaluations, and nothing of a file that could not be read."""
    val = class_folders(folder / "board-val", 1)
    (val / "side0" / "broken.avi").write_bytes(b"no video")
    more = arguments(folder, "board", "task=finetune", "tensorboard=true", f"data.val={val}")
    code, output = train([*more, "steps=2"], fault=without_board, folder=folder)
    assert code == 2 and "tensorboard is true, and it is not installed: pip install tensorboard" in output, output
    code, output = train([*more, "steps=2"], [*more, "steps=3"], fault=with_board, folder=folder)
    assert code == 0, output
    scalars = [line.split() for line in (folder / "board/board.txt").read_text().splitlines()]
    assert [step for name, _, step in scalars if name == "from"] == ["1", "3"]
    assert "val_top1" in {name for name, _, _ in scalars} and not {"too_short", "bad"} & {name for name, _, _ in scalars}
    assert [float(value) for name, value, _ in scalars if name == "loss"] == [line["loss"] for line in steps(folder / "board")]


def test_progress_overwrites_one_line_of_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    lines = Log(tmp_path, 0, 100)
    for step in (1, 2):
        lines.progress({"step": step, "epoch": 0, "loss": 0.5, "lr": 1e-3, "clips_per_s": 20.0}, logged=False)
    lines.print_line("done")
    lines.close()
    first, second, end = lines.stream.getvalue().split("\r\x1b[2K")[1:] + ["no more"]
    assert first.startswith("step 1/100, epoch 0: loss 0.5000, lr 0.001, 20 clips/s, 0:0") and "\n" not in first
    assert second.endswith(" left\ndone\n") and end == "no more"


def test_loss_that_is_not_finite(folder: Path) -> None:
    more = ["task=finetune", "steps=9", "optim.lr=1e30", "save_every=1"]
    code, output = train(arguments(folder, "diverged", *more), folder=folder)
    assert code == 1 and "Traceback" not in output
    last = (folder / "diverged/checkpoints/last").read_text().strip()
    assert f"step {int(last[5:]) + 1}: the " in output
    assert f"last good checkpoint: {folder / 'diverged/checkpoints' / last}" in output
    assert len(steps(folder / "diverged")) == int(last[5:]) < 9


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        (["batch_size=16"], "batch_size is 16; allowed: up to the 8 videos"),
        (["backend=native", "device=cpu"], "backend 'native' cannot run here. "),
        (["data.frames=5000"], "data.train: none of 8 videos that were tried gives a clip: "),
        (["data.train={folder}/one"], " files can be read: "),
        (["batch_size=8", "accumulate=8", "parallel=ddp"], "parallel is 'ddp'; allowed without torchrun: 'auto'"),
        (["data.train=no/such"], "there is no no/such"),
        (["model.num_classes=7"], "model.num_classes is 7; allowed: 2, which follows from data and teacher"),
        (["model.depth=0"], "model.depth is 0; allowed: a positive integer"),
        (["model.readout=tokens"], "model.readout is 'tokens'; allowed: 'cls', 'mean' or 'last'"),
        (["start=no/such/file.pth"], "start is 'no/such/file.pth', and there is no such folder or file; allowed: a "),
        (["start=runs/model"], "start is 'runs/model', and there is no such folder or file"),
        (["start=./model"], "start is './model', and there is no such folder or file"),
        (["start=~/no/such"], "/no/such', and there is no such folder or file"),
        (["start=model.pth"], "start is 'model.pth', and there is no such folder or file"),
        (["start=model.pth", "model.size=tiny"], "start is 'model.pth', and there is no such folder or file"),
        (["start=m16_k400"], "start is 'm16_k400', no folder and no published model; allowed: a folder that save_pretrained"),
        (["start={folder}/videos"], "videos/config.json"),
        (["start={folder}/tubelets", "data.frames=3"], "data.frames is 3; allowed: a multiple of kernel_size (2)"),
        (["model.kernel_size=2", "data.frames=3"], "data.frames is 3; allowed: a multiple of kernel_size (2)"),
        (["task=distill", "teacher={folder}/tubelets", "data.frames=3"], "data.frames is 3; allowed: a multiple of kernel"),
        (["data.train={folder}/paths.txt"], "/paths.txt' with 0 classes; allowed: 2 or more, a label in each line of the list"),
        (["data.size=[32,40]"], "data.size is (32, 40); allowed: multiples of 16"),
        (["optim.warmup_steps=3"], "optim.warmup_steps is 3; allowed: fewer than the 3 steps of the training"),
        (["backend=fast"], "backend"),
        (["task=pretrain", "teacher={teacher}", "mask.kind=attention"], "mask.kind is 'attention'; allowed: with a VideoMamba"),
        (["task=pretrain", "teacher={teacher}", "model.patch_size=8"], "teacher has 2x2x2 tokens"),
        (["task=distill", "teacher=no/such/folder"], "teacher is 'no/such/folder', and there is no such folder or file"),
        (["task=pretrain", "teacher=openai/clip"], "teacher is 'openai/clip', and there is no such folder or file; allowed"),
        (["task=pretrain", "teacher={folder}/videos/side0/0.avi"], "/side0/0.avi', a file; allowed: a folder that"),
        (["task=pretrain", "teacher={folder}/broken"], "broken', whose config.json cannot be read: Expecting value"),
    ],
)  # fmt: skip
def test_configurations_that_do_not_fit(folder: Path, more: list[str], wanted: str) -> None:
    assert_refused(folder, [word.format(teacher=folder / "teacher", folder=folder) for word in more], wanted)


def assert_refused(folder: Path, more: list[str], wanted: str) -> None:
    """One line says what is wrong, and a dry run sees it too. An error found while training is not a usage error."""
    code, output = train(arguments(folder, "wrong", "task=finetune", "steps=3", *more), folder=folder)
    found_while_training = "can be read" in wanted
    if not found_while_training:
        [line] = [line for line in output.splitlines() if wanted in line]
        code, output = train(arguments(folder, "wrong", "task=finetune", "steps=3", *more, "--dry-run"), folder=folder)
        assert output.splitlines()[-1] == line
    assert code == (1 if found_while_training else 2) and "Traceback" not in output and wanted in output, output


def test_configurations_that_do_not_fit_a_run(folder: Path) -> None:
    """A folder that holds a run takes no other configuration, and no fewer steps."""
    right = ["batch_size=2", "data.flip=0"]
    code, output = train(arguments(folder, "wrong", "task=finetune", "steps=3", "data.workers=2", *right), folder=folder)
    assert code == 0, output
    for more, wanted in (
        (["batch_size=2"], "another configuration, which differs in data.flip: 0 -> 0.5. Go on with"),
        ([*right, "steps=2"], "is at step 3; allowed: as many steps or more, got 2"),
        ([*right, f"data.train={folder}/val"], "data.train"),
    ):
        assert_refused(folder, more, wanted)
