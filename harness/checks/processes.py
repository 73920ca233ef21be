"""Do two processes, by DDP and by FSDP2, take the step of one, and does a training that was stopped go on bit for bit?

Asked of the command of `fused.train`, on one GPU each through NCCL, or on the CPU through gloo, for each engine:

- The loss of the first step and the gradients of all parameters, taken in two parts, keep to the rule: against one process in
  float64 by backend `torch`, and one in float32 by the same backend.
- Of a training that was stopped and goes on from its last checkpoint, everything in the log and the tensors of its end have
  the bits of one that was never stopped, with `deterministic=true`. What is drawn differs from process to process.
"""

import json
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

import fused
from fused.io.video import MEAN, STD, read_clip
from harness.fixtures import video
from harness.instruments import two_processes
from harness.instruments.two_processes import Training
from harness.judge.case import Case
from harness.judge.check import CannotAsk
from harness.judge.implementation import Implementation
from harness.judge.protocols import Subject, TrainableByCommand
from harness.judge.seeds import SEEDS
from harness.judge.trial import Named, Trial
from harness.records.finding import Finding, Tally, differing

NAME = "processes"
ENGINES = ("ddp", "fsdp")
STEPS, SAVED, LOGGED = 4, 2, 3  # stopped after step LOGGED; its last checkpoint is of step SAVED
VIDEOS, FRAMES = 8, 6

COMMON = (
    "data.workers=0 data.scale=[0.9,1.0] model.depth=2 batch_size=4 optim.lr=3e-3 log_every=1 deterministic=true"
).split()  # fmt: skip


def steps(case: Case) -> float:
    """Return the cost of the processes and trainings, as tokens of the scan."""
    return 2000.0


def asks(subject: Subject, implementation: Implementation, case: Case) -> bool:
    """Return True of all backends of `fused`, in cases for it."""
    selected = case.only_check == NAME and isinstance(subject, TrainableByCommand)
    return selected and implementation.backend is not None


def run(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Ask both questions, for both engines."""
    if missing := [name for name in ("av", "yaml", "safetensors") if find_spec(name) is None]:
        raise CannotAsk(f"fused.train needs {', '.join(missing)}: pip install 'videomamba-bench[train]'")
    if trial.device.startswith("cuda") and (count := torch.cuda.device_count()) < 2:
        raise CannotAsk(f"needs two GPUs, there is {count}")
    truth = trial.cached(NAME, lambda: first_steps_in_float64(trial))
    with tempfile.TemporaryDirectory() as name:
        questions = Questions(trial, str(implementation.backend), Path(name))
        engines = [training for engine in ENGINES for training in (*questions.firsts(engine), questions.uninterrupted(engine))]
        two_processes.run_trainings([*questions.firsts("plain"), *engines], questions.folder)
        for engine in ENGINES:
            questions.stop(engine)
        output = two_processes.run_trainings([questions.resumed(engine) for engine in ENGINES], questions.folder)
        if output.count(f"goes on behind step {SAVED}") != len(ENGINES):
            end = output[-two_processes.SHOWN_CHARACTERS :]
            raise RuntimeError(f"a training did not go on from step {SAVED}; its output: {end}")
        return [f for e in ENGINES for f in (*questions.first_step_findings(e, truth), *questions.same_after_resume(e))]


def first_steps_in_float64(trial: Trial) -> list[Named]:
    """Return the first step in float64, for each seed."""
    with tempfile.TemporaryDirectory() as name:
        questions = Questions(trial, "torch", Path(name))
        two_processes.run_trainings(questions.firsts("truth"), questions.folder)
        return [questions.first_step("truth", seed) for seed in range(SEEDS)]


class Questions:
    """The trainings of one backend in one folder, and the questions about their results."""

    def __init__(self, trial: Trial, backend: str, folder: Path) -> None:
        self.case, self.folder, self.subject = trial.case, folder, trial.subject
        device = "cuda" if trial.device.startswith("cuda") else "cpu"
        sizes = (f"data.frames={self.case['T']}", f"data.size={self.case['S']}", f"model.embed_dim={self.case['D']}")
        self.words = (*COMMON, *sizes, f"device={device}", f"backend={backend}", f"data.train={folder / 'videos'}")
        write_videos(self.case, folder / "videos")
        if self.subject.needs_teacher():
            write_teacher(self.case, folder / "teacher")
            self.words += (f"teacher={folder / 'teacher'}",)

    def firsts(self, kind: str) -> list[Training]:
        """Return trainings of the first step for each seed, by an engine in two processes, or by one as "plain" or "truth"."""
        length = f"steps={self.subject.first_steps()}"
        words = (*self.words, *self.subject.training_words(drawn=False), length, "model.drop_path_rate=0", "save_every=1")
        if kind in ENGINES:
            words += (f"parallel={kind}", "accumulate=2")
        return [
            Training((*words, f"seed={seed}", f"out={self.folder / f'{kind}-{seed}'}"), kind in ENGINES, kind == "truth")
            for seed in range(SEEDS)
        ]

    def uninterrupted(self, engine: str) -> Training:
        """Return a training that is not stopped."""
        return self._long(engine, engine)

    def resumed(self, engine: str) -> Training:
        """Return the training that goes on where `stop` left it."""
        return self._long(engine, f"{engine}-again")

    def _long(self, engine: str, out: str) -> Training:
        words = (*self.words, *self.subject.training_words(drawn=True), f"steps={STEPS}", f"save_every={SAVED}")
        more = ("model.drop_path_rate=0.4", f"parallel={engine}", f"out={self.folder / out}")
        return Training((*words, *more), in_two_processes=True)

    def stop(self, engine: str) -> None:
        """Make a folder as a training leaves it that was killed after step LOGGED."""
        folder = self.folder / f"{engine}-again"
        shutil.copytree(self.folder / engine, folder)
        shutil.rmtree(folder / "model")
        shutil.rmtree(folder / f"checkpoints/step-{STEPS:08d}")
        (folder / "checkpoints/last").write_text(f"step-{SAVED:08d}\n")
        lines = (folder / "log.jsonl").read_text().splitlines(keepends=True)
        (folder / "log.jsonl").write_text("".join(x for x in lines if json.loads(x).get("step", 0) <= LOGGED))

    def first_step(self, kind: str, seed: int) -> Named:
        """Return loss and gradients: Adam's first moment after one step is (1 - beta) * gradient."""
        folder, moment = self.folder / f"{kind}-{seed}", "optimizer.exp_avg."
        found = {k: v for k, v in two_processes.tensors(folder / "checkpoints/step-00000001").items() if k.startswith(moment)}
        dtype = torch.float64 if kind == "truth" else torch.float32
        loss = torch.tensor(two_processes.steps(folder)[0]["loss"], dtype=dtype)
        return {"loss": loss} | {f"grad {k.removeprefix(moment)}": v for k, v in found.items()}

    def first_step_findings(self, engine: str, truth: list[Named]) -> list[Finding]:
        """Apply the rule."""
        tally = Tally()
        for seed, exact in enumerate(truth):
            got, plain = self.first_step(engine, seed), self.first_step("plain", seed)
            for name in exact | plain | got:
                tally.add(f"{name}, {engine}", got.get(name), plain.get(name), exact.get(name))
        return tally.findings()

    def same_after_resume(self, engine: str) -> list[Finding]:
        """Compare bit by bit the log of every step, and all tensors of the last checkpoint."""
        first, resumed = (log_and_tensors(self.folder / name) for name in (engine, f"{engine}-again"))
        return [differing(f"{name}, {engine} again", resumed.get(name), first.get(name)) for name in first | resumed]


def log_and_tensors(run: Path) -> Named:
    """Return the columns of a run's log and the tensors of its last checkpoint."""
    lines = two_processes.steps(run)
    columns = {f"log {key}": torch.tensor([float(line[key]) for line in lines], dtype=torch.float64) for key in lines[0]}
    return columns | two_processes.tensors(run / f"checkpoints/step-{STEPS:08d}")


def write_videos(case: Case, root: Path) -> None:
    """Write parts of the video, alternately of two classes."""
    clip = read_clip(case.video or video.SHIPPED, VIDEOS * FRAMES, 2 * case["S"]).movedim(0, -1)
    frames = ((clip * torch.tensor(STD) + torch.tensor(MEAN)) * 255).round().clamp(0, 255).byte()
    for i, part in enumerate(frames.split(FRAMES)):
        folder = root / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        video.write(folder / f"{i}.avi", part)


def write_teacher(case: Case, folder: Path) -> None:
    """Write a model of one layer to learn from."""
    config = fused.VideoMambaConfig(img_size=case["S"], num_frames=case["T"], embed_dim=case["D"], depth=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        fused.VideoMamba(config, backend="torch").save_pretrained(folder)
