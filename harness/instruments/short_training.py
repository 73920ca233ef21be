"""Short trainings on frames of the video, by SGD with momentum: the check `convergence` compares them.

The video is cut into as many equal parts as the case has clips, one clip each. The subject says what is learned (`Trainable`).
A batch has a clip of every quarter of the film; after three batches every clip was seen.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fused.io.video import read_clip
from harness.fixtures.video import SHIPPED
from harness.judge.case import Case
from harness.judge.trial import Named, Trial

BATCHES = 3  # in which every clip is seen once
MOMENTUM = 0.9


def clips(case: Case) -> Tensor:
    """Return all clips (B, 3, T, S, S), float64, read in one pass through the video."""
    B, T = case["B"], case["T"]
    frames = read_clip(case.video or SHIPPED, B * T, case["S"])
    return frames.unflatten(1, (B, T)).transpose(0, 1).double()


@dataclass(frozen=True)
class State:
    """The state of a training: parameters and momentum buffers, by the parameters' names."""

    parameters: Named
    momentum: Named

    def rounded(self) -> "State":
        """Return the state rounded to float32."""
        return State(*({k: v.float() for k, v in part.items()} for part in (self.parameters, self.momentum)))

    def an_ulp_away(self, case: Case, number: int) -> "State":
        """Return every parameter, float32, moved to one of its two neighbours; `number` draws which."""
        moved = {}
        for name, p in self.parameters.items():
            side = case.normal(number, f"ulp {name}", *p.shape).sign().to(p)
            moved[name] = torch.nextafter(p, side * torch.inf)
        return State(moved, self.momentum)

    def jittered(self, case: Case, draw: str) -> "State":
        """Return every parameter changed a little, which rounds all that is computed from them afresh."""
        return State({k: case.jitter(p, 0, f"{draw} {k}") for k, p in self.parameters.items()}, self.momentum)

    def flat(self) -> Tensor:
        """Return all parameters in a row, float64."""
        return torch.cat([p.flatten().double() for p in self.parameters.values()])


class Task:
    """Clips, targets and the start of a case's trainings. The targets are computed once, in float64, on the CPU."""

    def __init__(self, trial: Trial) -> None:
        self.trial, self.case = trial, trial.case
        leaves = trial.leaves(0)
        self._clip = leaves.pop("clip")
        self.start = State(leaves, {k: torch.zeros_like(v) for k, v in leaves.items()})
        target = trial.subject.training_target(trial.reference.call, self.case, self._clip.cpu().double())
        self._target = target.to(trial.device)

    def losses(self, model: nn.Module, step: int, rounding: int | None = None) -> Tensor:
        """Return the loss of every clip of a step's batch, in at least float32; autocast, if the case has it, is for the model.

        `rounding` draws which values of the clips are one rounding, of the case's dtype, larger and which are smaller.
        """
        count = self.case["B"]
        rows = [(step + first) % count for first in range(0, count, BATCHES)]
        clip = self._clip[rows].to(next(model.parameters()).dtype)
        if rounding is not None:
            sides = self.case.normal(rounding, f"blur of {step}", *clip.shape).sign().to(clip)
            clip = clip * (1 + sides * torch.finfo(self.case.torch_dtype).eps / 2)
        losses: Tensor = self.trial.subject.training_losses(model, self.case, clip, rows, self._target[rows])
        return losses


class Learner:
    """A module as users train it: its own parameters, changed in place by PyTorch's optimiser."""

    def __init__(self, task: Task, call: Callable[..., Any], exact: bool = False, rounding: int | None = None) -> None:
        built = task.trial.subject.build(call, task.case).train()
        self.rounding = rounding
        self.task, self.model = task, built.to(task.trial.device, torch.float64 if exact else torch.float32)
        self._named = dict(self.model.named_parameters())
        self._optimiser = torch.optim.SGD(self._named.values(), lr=task.trial.subject.learning_rate(), momentum=MOMENTUM)

    def load(self, state: State) -> None:
        """Continue from a state: parameters are loaded in place, as from a checkpoint."""
        with torch.no_grad():
            for name, p in self._named.items():
                p.copy_(state.parameters[name])
                self._optimiser.state[p]["momentum_buffer"] = state.momentum[name].to(p, copy=True)

    def state(self) -> State:
        """Return a copy of its state."""
        buffers = {k: self._optimiser.state[p]["momentum_buffer"] for k, p in self._named.items()}
        return State(*({k: v.detach().clone() for k, v in part.items()} for part in (self._named, buffers)))

    def gradients(self, step: int) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Return the losses of a step's batch, and the gradient of their mean for every parameter."""
        self._optimiser.zero_grad()
        losses = self.task.losses(self.model, step, self.rounding)
        losses.mean().backward()
        return losses.detach(), {k: p.grad for k, p in self._named.items()}

    def update(self) -> None:
        """Take the optimiser's step."""
        self._optimiser.step()

    def run(self, start: State, steps: int) -> Iterator[tuple[float, State]]:
        """Train by itself; yield before each step the mean loss of its batch and the state, at last those after the last."""
        self.load(start)
        for step in range(steps + 1):
            losses, _ = self.gradients(step)
            yield float(losses.mean()), self.state()
            self.update()
