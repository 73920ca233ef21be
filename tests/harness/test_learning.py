"""Small tasks: what they show, that they are learnt, that what does not learn fails, and the weights that are kept of them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

import fused
from harness.cli.app import app
from harness.cli.learn import recipe
from harness.judge.case import Case
from harness.judge.check import checks
from harness.judge.implementation import Implementation
from harness.judge.registry import subjects
from harness.judge.request import UsageError
from harness.judge.trial import Trial
from harness.learning import arrow, digits, motion, retrieval
from harness.learning import trained_weights as trained
from harness.learning.fit import Fitted, count_wrong, fit
from harness.learning.task import Task, allowed
from harness.learning.tasks import TASKS
from harness.runs import environment
from harness.runs.conclude import FAILED, PASSED
from harness.runs.store import Run
from harness.subjects import videomamba

OPPOSITE = torch.tensor([2, 3, 0, 1])  # right, down, left, up


@pytest.fixture(autouse=True)
def settings_come_back() -> Iterator[None]:
    """A training seeds the process and makes it deterministic; the tests behind this one are in the same."""
    cudnn = torch.backends.cudnn
    kept = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    with torch.random.fork_rng():
        yield
    torch.use_deterministic_algorithms(kept[0])
    cudnn.deterministic, cudnn.benchmark = kept[1:]


def learn(*options: str) -> Result:
    return CliRunner().invoke(app, ["learn", "--device", "cpu", *options])


def ours() -> Implementation:
    return next(i for i in videomamba.implementations() if i.name == "fused:torch")


def short(task: Task, steps: int = 0) -> Fitted:
    return fit(task, task.data(), ours().call, replace(task.short, steps=steps or task.short.steps), seed=0, device="cpu")


def passes(task: Task, count_wrong: int, asked: int) -> bool:
    return count_wrong <= allowed(task.short.bar, asked)


def backwards(clips: Tensor) -> Tensor:
    return clips.flip(2)


def test_digits_and_the_arrow_by_the_command(tmp_path: Path) -> None:
    done = learn("--short", "--task", "digits", "--task", "arrow", "--out", str(tmp_path))
    assert done.exit_code == PASSED, done.output
    assert done.output.splitlines()[-1] == "2 passed, 0 failed, 0 skipped"
    known, free = Run.open(tmp_path).records
    assert known.findings[0].budget == allowed(digits.TASK.short.bar, 359) and free.findings[0].budget == float("inf")
    said = (tmp_path / "report.md").read_text()
    assert "no bar" in said and "> **Short.**" in said and "Not asked: motion" in said
    assert f"{100 * (1 - known.findings[0].error / 359):.1f} % of 359" in said
    assert "handwritten digits, the image model" in said and "held-out" in (tmp_path / "learning-digits-right.svg").read_text()


def test_motion_is_learnt_and_it_is_motion() -> None:
    """The same frames in another order are another answer: backwards the opposite direction, shuffled none."""
    task = motion.TASK
    fitted, (clips, classes) = short(task), task.data().held_out
    asked = len(classes)
    assert passes(task, fitted.evaluations[-1].wrong, asked), fitted.evaluations
    assert passes(task, count_wrong(fitted.model, backwards(clips), OPPOSITE[classes]), asked)
    assert not passes(task, count_wrong(fitted.model, backwards(clips), classes), asked)
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(asked, motion.FRAMES, generator=generator).argsort(dim=1)
    shuffled = clips[torch.arange(asked)[:, None], :, order].transpose(1, 2)
    assert not passes(task, count_wrong(fitted.model, shuffled, classes), asked)


@pytest.mark.parametrize("name", ["digits", "motion"])
def test_what_was_not_trained_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    fitted = short(TASKS[name], steps=2)
    assert not passes(TASKS[name], fitted.evaluations[-1].wrong, fitted.num_held_out)
    assert fitted.evaluations[-1].wrong == fitted.evaluations[0].wrong


def test_a_miss_is_exit_code_1_and_says_how_to_repeat_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "digits", replace(digits.TASK, full=replace(digits.TASK.full, steps=2)))
    done = learn("--task", "digits", "--out", str(tmp_path))
    assert done.exit_code == FAILED and "FAIL (ours) digits fused:torch steps2-" in done.output
    assert "python -m harness learn --task digits --impl fused:torch --seeds 1 --device cpu" in done.output
    assert "0 of 1 trainings of ours reached what their tasks demand." in (tmp_path / "report.md").read_text()


def test_the_reference_learns_too_and_a_run_goes_on(tmp_path: Path) -> None:
    """Fewer steps than the task's own have no bar; what was trained is not trained again; both start alike."""
    options = ("--task", "digits", "--steps", "1", "--impl", "reference", "--impl", "fused:torch", "--out", str(tmp_path))
    assert learn(*options).exit_code == PASSED
    first = Run.open(tmp_path).records
    assert [r.implementation for r in first] == ["reference", "fused:torch"]
    lines = (tmp_path / "records.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "records.jsonl").write_text(lines[0])
    assert learn(*options, "--resume").exit_code == PASSED
    assert (tmp_path / "records.jsonl").read_text().startswith(lines[0]) and len(Run.open(tmp_path).records) == 2


def test_a_training_repeats() -> None:
    once, again = (short(motion.TASK, steps=2) for _ in range(2))
    assert once.losses == again.losses
    assert all(torch.equal(x, y) for x, y in zip(once.model.parameters(), again.model.parameters(), strict=True))


def test_bars_are_exceeded_not_met() -> None:
    assert (allowed(0.9, 360), allowed(0.95, 360), allowed(0.9, 512)) == (35, 17, 51)
    assert recipe(digits.TASK, 1, False).bar is None and recipe(digits.TASK, 10_000, False).bar == 0.95
    assert recipe(digits.TASK, 0, True) == digits.TASK.short and digits.TASK.full.bar == 0.95 and motion.TASK.full.bar == 0.9


def test_digits_move_on_a_torus() -> None:
    pixels = torch.rand(5, 8, 8, generator=torch.Generator().manual_seed(0))
    clips, classes = motion.clips(pixels, torch.Generator().manual_seed(1), 64)
    assert clips.shape == (64, 1, motion.FRAMES, motion.SIDE, motion.SIDE) and classes.unique().tolist() == [0, 1, 2, 3]
    for clip, direction in zip(clips[:, 0], classes.tolist(), strict=True):
        step = [motion.SPEED * x for x in list(motion.DIRECTIONS.values())[direction]]
        assert torch.equal(clip[1:], torch.roll(clip[:-1], step, dims=(1, 2)))
        assert any(torch.allclose(torch.sort(clip[0].flatten())[0][-64:] * motion.STD + motion.MEAN,
                                  torch.sort(digit.flatten())[0], rtol=0, atol=1e-6) for digit in pixels)  # fmt: skip


@pytest.mark.parametrize("module", [digits, motion])
def test_held_out_digits_are_never_trained_on(module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of marked digits, every fifth is brighter."""
    mark = (torch.arange(1797) % 5 == 4).float()
    monkeypatch.setattr(digits, "images", lambda: ((0.25 + 0.5 * mark)[:, None, None].expand(-1, 8, 8), mark.long()))
    data = module.data()
    generator = torch.Generator().manual_seed(0)
    drawn, held_out = torch.cat([data.draw(generator, 256)[0] for _ in range(4)]), data.held_out[0]
    seen, unseen = ((x * module.STD + module.MEAN).flatten(1).amax(dim=1) for x in (drawn, held_out))
    assert seen.max() < 0.5 < unseen.min()


def test_the_arrows_clips_are_of_other_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames that tell their number: what is held out begins where training has ended, and half of it runs backwards."""
    numbers = torch.arange(132.0).expand(3, arrow.SIDE, arrow.SIDE, -1).permute(0, 3, 1, 2)
    monkeypatch.setattr(arrow, "frames", lambda: numbers)
    data = arrow.data()
    seen, back = data.draw(torch.Generator().manual_seed(0), 512)
    held, reverse = data.held_out
    assert seen.max() < arrow.TRAIN_END * 132 < arrow.HELD_OUT_START * 132 - 1 < held.min() and held.max() == 131
    for clips, classes in ((seen, back), (held, reverse)):
        steps = clips.diff(dim=2)[:, 0, :, 0, 0]
        assert torch.equal(steps, (arrow.STRIDE * (1 - 2.0 * classes))[:, None].expand_as(steps))
    assert reverse.float().mean() == 0.5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--task", "chess"), "digits, motion, arrow"), (("--impl", "nobody"), "fused:torch"),
        (("--save-weights", "--short"), "neither --short"), (("--save-weights", "--task", "digits"), "needs task motion"),
    ],
)  # fmt: skip
def test_wrong_wishes_say_what_is_allowed(options: tuple[str, ...], said: str) -> None:
    error = learn(*options).exception
    assert isinstance(error, UsageError) and said in str(error)


def test_what_is_not_here_did_not_run(tmp_path: Path) -> None:
    done = learn("--task", "digits", "--impl", "fused:native", "--out", str(tmp_path))
    assert done.exit_code == 3 and "nothing ran:\n    fused:native: native runs on CUDA only" in done.output


# the weights that are kept


def fitted_case(*options: str) -> Case:
    return Case("videomamba", tuple(videomamba.fitted(2).items()), ("trained", *options))


def test_kept_weights_are_those_of_the_task() -> None:
    """They are above the bar, on the clips that the command asks."""
    kept = trained.read()
    assert kept.config == motion.TASK.config
    model = fused.VideoMamba(fused.VideoMambaConfig(**kept.config), backend="torch")
    model.load_state_dict(kept.weights, strict=True)
    clips, classes = motion.TASK.data().held_out
    assert count_wrong(model, clips, classes) <= allowed(0.9, len(classes))
    seen = {tuple(p.flatten().tolist()) for p in digits.split(digits.images()[0])[0]}
    assert len(kept.pixels) == trained.DIGITS and not seen & {tuple(p.flatten().tolist()) for p in kept.pixels}


def test_keeping_weights(tmp_path: Path) -> None:
    fitted = short(motion.TASK, steps=1)
    kept = trained.read(trained.save(fitted.model, tmp_path / "weights.pth"))
    assert all(torch.equal(kept.weights[name], value) for name, value in fitted.model.state_dict().items())
    assert kept.config == motion.TASK.config and torch.equal(kept.pixels, trained.read().pixels)


def test_parity_asks_on_the_kept_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are, for every seed, with another clip for each; a changed weight is another truth."""
    environment.prepare()
    trial = Trial(fitted_case(), "cpu")
    one, other = trial.leaves(0), trial.leaves(1)
    kept = trained.read()
    assert all(torch.equal(one[k], v) and torch.equal(other[k], v) for k, v in kept.weights.items())
    assert not torch.equal(one["clip"], other["clip"])
    before = trial.truth(0, False).outputs["logits"]
    changed = kept.weights | {"layers.1.mixer.x_proj_b.weight": kept.weights["layers.1.mixer.x_proj_b.weight"] * (1 + 1e-6)}
    monkeypatch.setattr(trained, "read", lambda: kept._replace(weights=changed))
    after = Trial(fitted_case(), "cpu").truth(0, False).outputs["logits"]
    assert not torch.equal(before, after)


@pytest.mark.parametrize("grid", ["smoke", "full"])
def test_trained_cases_and_their_checks(grid: str) -> None:
    cases = [c for c in subjects()["videomamba"].cases(grid) if c.has("trained")]
    assert {c.dtype for c in cases} >= {"float32", "bfloat16"}
    for case in cases:
        asked = {name for name, check in checks().items() if check.asks(videomamba, ours(), case)}
        assert asked >= {"forward", "backward", "determinism", "forward_chunked"}


# captions


def test_captions_are_learnt_by_the_command(tmp_path: Path) -> None:
    done = learn("--short", "--task", "retrieval", "--impl", "fused:torch", "--impl", "reference", "--out", str(tmp_path))
    assert done.exit_code == PASSED, done.output
    reference, ours = sorted(Run.open(tmp_path).records, key=lambda record: record.implementation == "fused:torch")
    assert reference.status == "skip" and "is for fused" in reference.reason
    assert ours.findings[0].budget == allowed(0.6, 200) and "2.5 %" in (tmp_path / "report.md").read_text()


def test_no_training_knows_no_caption() -> None:
    """Forty candidates: a model at its initial values is right as often as chance, also by matching."""
    task, data = retrieval.TASK, retrieval.data()
    fitted = retrieval.fit(task, data, ours().call, replace(task.short, steps=1, batch=4), seed=0, device="cpu")
    assert fitted.num_held_out == 200
    for by_matching in (False, True):
        assert retrieval.count_wrong(fitted.model, data.held_out[0], by_matching) > 180
    with torch.no_grad():
        fitted.model.vision_proj.weight.fill_(torch.nan)
    assert retrieval.count_wrong(fitted.model, data.held_out[0], False) >= 190


def test_clips_show_what_their_captions_say() -> None:
    """The digit of the caption, one of those for training, and its direction; a tubelet begins at the grid of patches."""
    images, classes = digits.images()
    (seen, others), (known, _) = digits.split(images), digits.split(classes)
    data = retrieval.data()
    drawn, captions = data.draw(torch.Generator().manual_seed(0), 64)
    words = retrieval.texts(captions)
    for clip, number, ids in zip(drawn[:, 0] * motion.STD + motion.MEAN, captions.tolist(), words.tolist(), strict=True):
        _, name, _, way = retrieval.CAPTIONS[number].split()
        assert [retrieval.WORDS[i] for i in ids] == ["[CLS]", "a", name, "moves", way, "[SEP]"]
        step = [retrieval.SPEED * x for x in motion.DIRECTIONS[way]]
        assert torch.allclose(clip[1:], torch.roll(clip[:-1], step, dims=(1, 2)), rtol=0, atol=1e-6)
        shown = [torch.roll(clip[0], (-r, -c), dims=(0, 1))[:8, :8] for r in (0, 4, 8) for c in (0, 4, 8)]
        of_name = seen[known == retrieval.NAMES.index(name)]
        assert any(torch.allclose(part, digit, rtol=0, atol=1e-5) for part in shown for digit in of_name)
    held = (data.held_out[0][:, 0, 0] * motion.STD + motion.MEAN).flatten(1).sort(dim=1).values[:, -64:]
    due = others.flatten(1).sort(dim=1).values
    assert all(((due - one).abs().amax(dim=1) < 1e-5).any() for one in held)
    assert data.held_out[1].tolist() == list(range(40)) * 5
