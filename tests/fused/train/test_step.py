"""A step recorded and replayed has the bits of an eager step: weights, EMA, optimiser, loss, random numbers, resuming."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tape import TapeRecorder
from torch import Tensor

from fused import VideoMamba, VideoMambaConfig
from fused.runtime.graphs import WARMUP, CudaRecorder
from fused.train.config_file import read_config
from fused.train.ema import WeightAverage
from fused.train.optim import LearningRates, parameter_groups
from fused.train.parallel import World
from fused.train.schedule import cosine_factor
from fused.train.seed import derive_seed
from fused.train.step import MAX_SHAPES, TrainStep, choose_recorder
from fused.train.tasks import Task, build_task

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WORDS = (
    "task=finetune out=run data.train=videos steps=20 data.frames=2 data.size=32 model.depth=2 model.embed_dim=32 batch_size=4 "
    "optim.lr=3e-3 optim.warmup_steps=4 optim.layer_decay=0.8 optim.clip_grad=0.5 ema=0.9 model.drop_path_rate=0.4 "
    "model.fc_drop_rate=0.2 mix.probability=0.5"
).split()
CLASSES = ("a", "b", "c")


def make_recorder() -> Any:
    """Return the recorder of this machine: of CUDA graphs, or of tapes."""
    return CudaRecorder(DEVICE) if DEVICE.type == "cuda" else TapeRecorder()


class Training:
    """The parts of a training on random clips, without a loop around them."""

    def __init__(self, *words: str, recorder: Any = None) -> None:
        given = [word for word in WORDS if "task=pretrain" not in words or not word.startswith("mix.")]
        self.config = config = read_config(None, [*given, *words])
        torch.manual_seed(0)
        self.task = build_task(config, CLASSES, DEVICE)
        self.average = WeightAverage(self.task.student, 0.9)
        optim = config.optim
        groups = parameter_groups(self.task.student, optim.lr, optim.weight_decay, optim.layer_decay)
        self.optimizer = torch.optim.AdamW(groups, fused=True, capturable=DEVICE.type == "cuda")
        self.rates = LearningRates(self.optimizer, cosine_factor(20, optim.warmup_steps, 0.1), DEVICE)
        self.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**14, enabled=config.precision == "float16")
        world = World(DEVICE)
        self.step = TrainStep(config, self.task, world, self.optimizer, self.scaler, self.average, recorder)
        self.numbers: list[list[float]] = []

    def run(self, steps: range, size: Callable[[int, int], int] = lambda step, position: 4) -> "Training":
        """Take steps on clips that follow from step and micro-batch, `size(step, position)` of them."""
        for step in steps:
            for i in range(self.config.accumulate):
                drawn = torch.Generator().manual_seed(derive_seed(1, step, i))
                count = size(step, i)
                clips = torch.randn(count, 3, 2, 32, 32, generator=drawn).to(DEVICE)
                targets = self.task.encode(torch.randint(3, (count,), generator=drawn)).to(DEVICE)
                self.step.add(i, clips, targets, derive_seed(2, step, i))
            self.rates.set(step)
            self.numbers.append(self.step.update().tolist())
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that a checkpoint holds."""
        found = {f"model.{name}": p.detach() for name, p in self.task.student.named_parameters()}
        found |= {f"ema.{name}": value for name, value in self.average.tensors.items()}
        for name, p in self.task.student.named_parameters():
            found |= {f"{key}.{name}": value for key, value in self.optimizer.state[p].items()}
        return found | {"scale": torch.tensor(self.scaler.get_scale())}


def assert_same(replayed: Training, eager: Training) -> None:
    assert replayed.numbers == eager.numbers
    ours, theirs = replayed.tensors(), eager.tensors()
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


@pytest.mark.parametrize(
    "words",
    [
        (), ("accumulate=2", "batch_size=8"), ("precision=bfloat16",), ("precision=float16",),
        ("accumulate=3", "batch_size=12", "precision=float16"), ("model.use_checkpoint=true", "model.checkpoint_num=1"),
        ("model.scan_order=temporal",), ("mix.probability=0",),
    ],
)  # fmt: skip
def test_replayed_steps_have_the_bits_of_eager_ones(words: tuple[str, ...]) -> None:
    """Over learning rates that change, drop path and dropout, mixing in half of the steps, and clipped gradients."""
    recorder = make_recorder()
    eager, replayed = Training(*words).run(range(9)), Training(*words, recorder=recorder).run(range(9))
    assert_same(replayed, eager)
    assert len({tuple(numbers) for numbers in eager.numbers}) == 9
    if isinstance(recorder, TapeRecorder):
        accumulate = replayed.config.accumulate
        replays = 9 - WARMUP
        assert [t.replays for t in recorder.tapes] == [replays] + [replays * (accumulate - 1)] * (accumulate > 1) + [replays]


@pytest.mark.parametrize(
    "words", [("task=distill",), ("task=pretrain",), ("task=pretrain", "mask.kind=random", "model.scan_order=temporal")]
)
def test_tasks_with_a_teacher(words: tuple[str, ...], tmp_path: Path) -> None:
    """The teacher's output, and the tokens that a mask leaves, are other ones in every step."""
    torch.manual_seed(1)
    VideoMamba(VideoMambaConfig(img_size=32, num_frames=2, depth=1, embed_dim=24, num_classes=3)).save_pretrained(tmp_path)
    words += (f"teacher={tmp_path}", "precision=bfloat16")
    recorder = make_recorder()
    eager, replayed = (
        Training(*words, *more, recorder=r).run(range(7)) for r, more in ((None, ("graph=off",)), (recorder, ()))
    )
    assert_same(replayed, eager)
    assert len({tuple(numbers) for numbers in eager.numbers}) == 7
    assert not isinstance(recorder, TapeRecorder) or [tape.replays for tape in recorder.tapes] == [4, 4]


def test_a_resumed_training_has_the_same_bits() -> None:
    """Eager to step 5, then with graphs from copies of its tensors; and the other way round."""
    uninterrupted = Training().run(range(12))
    for before, behind in ((None, make_recorder()), (make_recorder(), None)):
        first = Training(recorder=before).run(range(5))
        second = Training(recorder=behind)
        named = dict(first.task.student.named_parameters())
        for name, p in second.task.student.named_parameters():  # as a checkpoint is loaded
            second.optimizer.state[p] = {key: x.clone() for key, x in first.optimizer.state[named[name]].items()}
        with torch.no_grad():
            ours, theirs = second.tensors(), first.tensors()
            for name in theirs:
                ours[name].copy_(theirs[name])
        second.run(range(5, 12))
        second.numbers = first.numbers + second.numbers
        assert_same(second, uninterrupted)


def test_batches_of_other_sizes() -> None:
    """The last batch is smaller, in some steps a further micro-batch is; later steps of the first size are right again."""
    words = ("accumulate=2", "batch_size=8")

    def size(step: int, position: int) -> int:
        return 3 if step % 5 == 4 or (step == 7 and position == 1) else 4

    recorder = make_recorder()
    eager, replayed = Training(*words).run(range(22), size), Training(*words, recorder=recorder).run(range(22), size)
    assert_same(replayed, eager)
    if isinstance(recorder, TapeRecorder):
        assert len(recorder.tapes) == 6  # three of each size


def test_many_sizes_have_a_bound() -> None:
    """Sizes beyond the bound run eagerly."""
    sizes = [2 + i for i in range(MAX_SHAPES + 2)]
    steps = range((WARMUP + 1) * len(sizes))
    recorder = make_recorder()
    eager, replayed = (
        Training(recorder=r).run(steps, lambda step, _: sizes[step % len(sizes)]) for r in (None, recorder)
    )
    assert_same(replayed, eager)
    assert not isinstance(recorder, TapeRecorder) or len(recorder.tapes) == 2 * MAX_SHAPES


def test_weights_that_change_between_steps() -> None:
    """As an evaluation of the EMA does, which exchanges weights in place."""
    trainings = [Training(recorder=r) for r in (None, make_recorder())]
    for training in trainings:
        training.run(range(6))
        with training.average.swapped():
            training.task.eval()
            training.task.logits(torch.ones(2, 3, 2, 32, 32, device=DEVICE))
        with torch.no_grad():
            training.task.student.head.weight.mul_(0.5)
        training.run(range(6, 9))
    assert_same(trainings[1], trainings[0])


def test_a_step_that_the_scaler_skips() -> None:
    """Its gradients are not finite: weights stay, the scale is halved, and the next steps go on."""
    trainings = [Training("precision=float16", recorder=r).run(range(5)) for r in (None, make_recorder())]
    for training in trainings:
        before = training.task.student.head.weight.clone()
        drawn = torch.full((4, 3, 2, 32, 32), torch.inf, device=DEVICE)
        training.step.add(0, drawn, training.task.encode(torch.tensor([0, 1, 2, 0])).to(DEVICE), 0)
        *_, norm, scale_before, scale_behind = training.step.update().tolist()
        assert norm != norm and (scale_before, scale_behind) == (2.0**14, 2.0**13)
        assert torch.equal(training.task.student.head.weight, before)
        training.run(range(6, 8))
    assert_same(trainings[1], trainings[0])


def test_gradients_are_clipped_by_their_own_size() -> None:
    """Not by that of the scaled loss."""
    norms = [Training(f"precision={name}", "mix.probability=0").run(range(1)).numbers[0][-3] for name in ("float32", "float16")]
    assert 0.5 < norms[1] / norms[0] < 2, norms


def reading(task: Task) -> None:
    """Make the task's forward read a value on the host."""
    forward = task.forward
    task.forward = lambda clips, targets: forward(clips * float(clips.mean() < 1e9), targets)  # type: ignore[method-assign]


def test_what_cannot_be_recorded(caplog: pytest.LogCaptureFixture) -> None:
    """Steps go on eagerly with the same bits, and a warning says why; `graph: on` raises."""
    eager, replayed = Training(), Training(recorder=make_recorder())
    for training in (eager, replayed):
        reading(training.task)
        training.run(range(8))
    assert_same(replayed, eager)
    [message] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert message.startswith("graph: steps are eager, since a graph could not be recorded: ") and "captur" in message
    insisting = Training("graph=on", recorder=make_recorder())
    reading(insisting.task)
    with pytest.raises(RuntimeError, match="captur"):
        insisting.run(range(8))


def test_where_graphs_are_taken() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    config, insisting, sharded, without = (
        read_config(None, [*WORDS, *word.split()]) for word in ("", "graph=on", "parallel=fsdp", "graph=off")
    )
    assert choose_recorder(config, cpu) == (None, "graph: auto; steps are eager: the model is on the CPU")
    with pytest.raises(ValueError, match="graph is 'on', but the model is on the CPU; allowed: 'auto' or 'off'"):
        choose_recorder(insisting, cpu)
    assert choose_recorder(sharded, cuda)[1] == "graph: auto; steps are eager: FSDP gathers parameters by code on the host"
    assert choose_recorder(without, cuda) == (None, "graph: off; steps are eager: it is switched off")
    if DEVICE.type == "cuda":
        for chosen in (config, insisting):
            assert "steps are CUDA graphs after 3 eager ones" in choose_recorder(chosen, cuda)[1]
