"""Every value of a configuration reaches what it is about: the loss, the optimiser, the data; and training is repeatable by
its position."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from videos import write_video

from fused import VideoMamba, VideoMambaConfig
from fused.train import loop, tasks
from fused.train.config_file import read_config
from fused.train.evaluation import evaluate
from fused.train.interrupt import Interrupt
from fused.train.loop import Trainer
from fused.train.parallel import World
from fused.train.seed import derive_seed

CPU = torch.device("cpu")
TINY = "data.frames=2 data.size=32 data.workers=0 model.depth=2 model.embed_dim=32 batch_size=4 device=cpu".split()
CLASSES = ("a", "b", "c")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of two videos each."""
    root = tmp_path_factory.mktemp("videos")
    for name in CLASSES:
        (root / name).mkdir()
        for i in range(2):
            write_video(root / name / f"{i}.mp4", frames=8, width=32, height=32)
    return root


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(1)
    VideoMamba(VideoMambaConfig(img_size=32, num_frames=2, depth=2, embed_dim=24, num_classes=3)).save_pretrained(folder)
    return folder


def task_of(*words: str) -> tasks.Task:
    config = read_config(None, [*TINY, "out=run", "data.train=videos", "steps=20", *words])
    torch.manual_seed(0)
    return tasks.build_task(config, CLASSES, CPU).eval()


def batch(seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 2, 32, 32, generator=drawn), torch.tensor([0, 2, 1, 2])


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """The mean over clips of minus the log-probability of (1 - smoothing) of the label and smoothing / classes of all."""
    log = logits.log_softmax(1)
    return -((1 - smoothing) * log[range(len(labels)), labels] + smoothing * log.mean(1)).mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@torch.no_grad()
def test_label_smoothing_is_in_the_loss(smoothing: float) -> None:
    task, (clips, labels) = task_of("task=finetune", f"loss.label_smoothing={smoothing}"), batch()
    loss, metrics = task(clips, F.one_hot(labels, 3).float())
    torch.testing.assert_close(loss, cross_entropy(task.logits(clips), labels, smoothing))
    assert metrics == {} and task.logits(clips).std() > 0


@pytest.mark.parametrize(("weight", "smoothing"), [(1.0, 0.1), (0.25, 0.0), (0.0, 0.2)])
@torch.no_grad()
def test_weight_and_smoothing_of_a_distillation_are_in_the_loss(weight: float, smoothing: float, teacher: Path) -> None:
    words = ("task=distill", f"teacher={teacher}", f"loss.distillation={weight}", f"loss.label_smoothing={smoothing}")
    task, (clips, labels) = task_of(*words), batch()
    tokens = task.prepare(clips, F.one_hot(labels, 3).float(), torch.Generator())[2]
    loss, metrics = task(clips, F.one_hot(labels, 3).float(), tokens)
    output = task.student(clips)
    distance = (2 - 2 * F.cosine_similarity(output.features, tokens, dim=-1)).mean()
    torch.testing.assert_close(loss, cross_entropy(output.logits, labels, smoothing) + weight * distance)
    torch.testing.assert_close(metrics["distance"], distance)


@torch.no_grad()
def test_a_teacher_sees_the_mixed_clips(teacher: Path) -> None:
    """And with them its tokens differ."""
    task, (clips, labels) = task_of("task=distill", f"teacher={teacher}"), batch()
    mixed, _, tokens = task.prepare(clips, F.one_hot(labels, 3).float(), torch.Generator().manual_seed(1))
    torch.testing.assert_close(tokens, task.teacher.forward(mixed)[0][0])
    assert not torch.equal(mixed, clips)


@pytest.mark.parametrize("kind", ["l2", "mse", "smooth_l1"])
@torch.no_grad()
def test_the_kind_of_alignment_is_in_the_loss(kind: str, teacher: Path) -> None:
    words = ("task=pretrain", f"teacher={teacher}", "mask.kind=random", "mask.ratio=0.5", f"loss.alignment={kind}")
    task, (clips, labels) = task_of(*words), batch()
    inputs, visible, features = task.prepare(clips, labels, torch.Generator().manual_seed(5))
    got = task.student(inputs, visible=visible).clip
    due = {"l2": 2 - 2 * F.cosine_similarity(got, features, dim=-1), "mse": (got - features) ** 2}
    due["smooth_l1"] = F.smooth_l1_loss(got, features, reduction="none")
    torch.testing.assert_close(task(inputs, visible, features)[0], due[kind].mean())


@pytest.mark.parametrize(("ratio", "left"), [(0.5, 5), (0.75, 3)])
@pytest.mark.parametrize("kind", ["random", "tube", "clip-row", "frame-row"])
@torch.no_grad()
def test_ratio_and_kind_of_a_mask_are_its_own(kind: str, ratio: float, left: int, teacher: Path) -> None:
    """Of eight patches, beside CLS; and a student's targets are the teacher's tokens of the same places."""
    words = ("task=pretrain", f"teacher={teacher}", f"mask.kind={kind}", f"mask.ratio={ratio}", "model.patch_size=16")
    if kind.endswith("row") and ratio > 0.5:
        left = 5  # of two rows, one is hidden
    task, (clips, labels) = task_of(*words), batch()
    _, visible, features = task.prepare(clips, labels, torch.Generator().manual_seed(5))
    assert visible.shape == (4, left) and bool((visible[:, 0] == 0).all())
    every = task.teacher.forward(clips)[0]
    for clip in range(4):
        torch.testing.assert_close(features[:, clip], every[:, clip, visible[clip]])


def test_options_of_mixing_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    task, (clips, labels) = task_of("task=finetune", *(f"mix.{k}={v}" for k, v in MIX.items())), batch()
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(tasks, "mix", lambda *given: seen.append(given) or tasks_mix(*given))
    generator = torch.Generator().manual_seed(1)
    task.prepare(clips, F.one_hot(labels, 3).float(), generator)
    assert seen[0][2:] == (3, 0.11, 0.22, 0.33, 0.44, generator)


MIX = {"mixup": 0.11, "cutmix": 0.22, "probability": 0.33, "switch": 0.44}
tasks_mix = tasks.mix


def trainer(videos: Path, out: Path, *words: str) -> Trainer:
    config = read_config(None, [*TINY, "task=finetune", f"out={out}", f"data.train={videos}", "optim.lr=0.01", *words])
    torch.manual_seed(0)
    return Trainer(config, World(CPU))


def test_options_of_the_optimiser_reach_it(videos: Path, tmp_path: Path) -> None:
    words = "steps=10 optim.weight_decay=0.2 optim.layer_decay=0.5 optim.rule=upstream ema=0.75 optim.clip_grad=0.125"
    words += " optim.warmup_steps=4 optim.warmup_start=0.2 optim.floor=0.1 optim.betas=[0.7,0.8] precision=float16"
    found = trainer(videos, tmp_path, *words.split())
    groups = found.optimizer.param_groups
    assert {g["betas"] for g in groups} == {(0.7, 0.8)} and {g["weight_decay"] for g in groups} == {0.0, 0.2}
    names = {id(p): name for name, p in found.task.student.named_parameters()}
    decayed = {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    assert "layers.0.mixer.A_log" in decayed and "layers.0.mixer.D" not in decayed, "upstream's rule decays A_log"
    other = trainer(videos, tmp_path / "r", "steps=1", "optim.rule=corrected")
    spared = [p for g in other.optimizer.param_groups if not g["weight_decay"] for p in g["params"]]
    assert any(p is other.task.student.layers[0].mixer.A_log for p in spared), "the other rule does not"
    assert found.rates.set(0) == pytest.approx(0.01 * 0.2) and found.rates.set(2) == pytest.approx(0.01 * 0.6)
    assert found.rates.set(4) == pytest.approx(0.01) and found.rates.set(10) == pytest.approx(0.01 * 0.1)
    assert sorted({round(float(g["lr"]) / 0.001, 4) for g in groups}) == [0.125, 1.0], "depth 2: embeddings at 0.5^3"
    assert found.scaler.is_enabled() and not trainer(videos, tmp_path / "a", "steps=1").scaler.is_enabled()
    assert found.average is not None and found.total == 10
    before = found.average.tensors["head.bias"].clone()
    with torch.no_grad():
        found.task.student.head.bias.add_(1.0)
    found.average.update()
    torch.testing.assert_close(found.average.tensors["head.bias"], before + 0.25)
    assert trainer(videos, tmp_path / "b", "epochs=3").total == 3, "six videos are one step of four"
    assert trainer(videos, tmp_path / "c", "epochs=4", "accumulate=2", "batch_size=2").total == 12


def test_options_of_the_data_reach_it(videos: Path, tmp_path: Path) -> None:
    words = f"steps=1 seed=7 data.scale=[0.25,0.5] data.flip=0.125 data.sampling=dense data.stride=3 data.val={videos}".split()
    found = trainer(videos, tmp_path, *words)
    data, val = found.data, found.val
    assert (data.seed, data.scale, data.flip) == (7, (0.25, 0.5), 0.125)
    assert (data.preprocessing.sampling, data.preprocessing.stride) == ("dense", 3)
    assert data.train and data.dtype == torch.uint8 and val is not None and not val.train and val.classes == data.classes


@pytest.mark.parametrize("limit", [0.125, None])
def test_gradients_are_clipped_to_their_limit(limit: float | None, videos: Path, tmp_path: Path) -> None:
    found = trainer(videos, tmp_path, "steps=3", f"optim.clip_grad={'null' if limit is None else limit}")
    clips, labels = batch()
    found.rates.set(0)
    found.train_step.add(0, 30 * clips, found.task.encode(labels), seed=1)
    norm = float(found.train_step.update()[-3])
    left = math.sqrt(sum(float(p.grad.square().sum()) for p in found.task.student.parameters() if p.grad is not None))
    assert norm > 0.125 and left == pytest.approx(norm if limit is None else limit, rel=1e-4)


def test_micro_batches_have_the_gradient_of_the_batch(videos: Path, tmp_path: Path) -> None:
    """Their mean, whatever their number; the loss is summed."""
    gradients, losses = [], []
    for count in (1, 2, 4):
        words = ("steps=3", f"accumulate={count}", "mix.probability=0", "model.drop_path_rate=0.0")
        found = trainer(videos, tmp_path / str(count), *words)
        clips, labels = batch()
        for i, part in enumerate(range(0, 4, 4 // count)):
            some = slice(part, part + 4 // count)
            found.train_step.add(i, clips[some], found.task.encode(labels[some]), seed=i)
        losses.append(float(found.train_step.update()[0]) / count)
        gradients.append(found.task.student.head.weight.grad.clone())
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-7)


def test_a_student_trains_in_train_mode_and_is_asked_in_eval_mode(videos: Path, tmp_path: Path) -> None:
    found = trainer(videos, tmp_path, "steps=3", "model.fc_drop_rate=0.5")
    modes: list[bool] = []
    found.task.student.register_forward_pre_hook(lambda module, given: modes.append(module.training))
    clips, labels = batch()
    found.task.eval()  # as an evaluation leaves it
    found.train_step.add(0, clips, found.task.encode(labels), seed=1)
    assert modes == [True]


def test_a_resumed_epoch_skips_the_micro_batches_of_its_steps(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unchecked: None
) -> None:
    found = trainer(videos, tmp_path, "steps=4", "accumulate=2", "batch_size=2")
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(found, "_epoch_batches", lambda epoch, skip: asked.append((epoch, skip)) or iter(()))
    found.step = 2  # of three in an epoch
    with pytest.raises(StopIteration):
        found._train_epoch(None, Interrupt())
    assert asked == [(0, 4)]


def test_a_resumed_training_has_the_scale_of_its_checkpoint(videos: Path, tmp_path: Path, unchecked: None) -> None:
    words = ("precision=float16", "save_every=1", f"data.val={videos}")
    trainer(videos, tmp_path, "steps=1", *words).run()
    [state] = (tmp_path / "checkpoints").glob("step-*/training.json")
    facts = json.loads(state.read_text())
    facts["scaler"]["scale"] = 512.0
    state.write_text(json.dumps(facts))
    assert trainer(videos, tmp_path, "steps=2", *words).scaler.get_scale() == 512.0


def test_validation_has_the_classes_of_the_training_and_no_dropout(videos: Path, tmp_path: Path) -> None:
    """A folder with fewer classes, whose numbers are those of the training."""
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "c").symlink_to(videos / "c")
    found = trainer(videos, tmp_path / "run", "steps=1", f"data.val={tmp_path / 'val'}", "model.fc_drop_rate=0.5")
    assert found.val is not None and found.val.classes == CLASSES and set(found.val.labels) == {2}
    modes: list[bool] = []
    found.task.student.register_forward_pre_hook(lambda module, given: modes.append(module.training))
    found.task.train()
    results = evaluate(found.task, found.val, 4, World(CPU), nullcontext())
    assert results is not None and results.results["val_listed"] == 2 and modes == [False]


def test_random_numbers_follow_from_the_position_and_the_rank(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unchecked: None
) -> None:
    found, seen = trainer(videos, tmp_path, "steps=2", "seed=9", "accumulate=2", "batch_size=4"), []
    found.world = replace(found.world, rank=5)
    monkeypatch.setattr(loop, "derive_seed", lambda *position: seen.append(position) or derive_seed(*position))

    class Feed:
        waits: list[object] = []

        def take(self) -> Any:
            clips, labels = batch()
            return type("Batch", (), {"clips": clips, "targets": found.task.encode(labels), "bad_files": []})

        def advance(self) -> None: ...

    for _ in range(2):
        found._train_step(Feed(), type("Interrupt", (), {"requested": False}))
    assert seen == [(9, 0, 0, 5), (9, 0, 1, 5), (9, 1, 0, 5), (9, 1, 1, 5)]
    every = {derive_seed(*position) for position in seen} | {derive_seed(9, 0, 0, 0), derive_seed(8, 0, 0, 5)}
    assert len(every) == 6 and all(0 <= seed < 2**63 for seed in every)
    assert derive_seed(1, 23) != derive_seed(12, 3)
