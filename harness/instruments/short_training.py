"""Short trainings on frames of the video, by SGD with momentum: what the check `convergence` compares.

The video is cut into as many equal parts as the case has clips, one clip each. The classifier learns which quarter of the film
a clip is of (`videomamba`); the encoder, under its mask, learns the features of a fixed random encoder that sees all
(`encoder`, masked alignment). A batch has a clip of every quarter; after three batches every clip was seen.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused.io.video import read_clip
from harness.fixtures import functional_modules as modules
from harness.fixtures.video import SHIPPED
from harness.judge.case import Case
from harness.judge.trial import Named, Trial
from harness.subjects import encoder
from reference.ops.dtypes import accumulation_dtype

BATCHES = 3  # what makes a round through the clips
QUARTERS = 4
MOMENTUM = 0.9
RATE = {"videomamba": 0.002, "encoder": 0.05}  # the loss falls by much, and without leaps


def clips(case: Case) -> Tensor:
    """(B, 3, T, S, S), float64: all frames that the clips need, in one pass through the video."""
    B, T = case["B"], case["T"]
    frames = read_clip(case.video or SHIPPED, B * T, case["S"])
    return frames.unflatten(1, (B, T)).transpose(0, 1).double()


@dataclass(frozen=True)
class State:
    """Everything that a training goes on from: parameters and momentum buffers, by the parameters' names."""

    parameters: Named
    momentum: Named

    def rounded(self) -> "State":
        """The same numbers as float32 can hold them."""
        return State(*({k: v.float() for k, v in part.items()} for part in (self.parameters, self.momentum)))

    def an_ulp_away(self, case: Case, number: int) -> "State":
        """Every parameter, float32, moved to one of its two neighbours; `number` draws which."""
        away = {}
        for name, p in self.parameters.items():
            side = case.normal(number, f"ulp {name}", *p.shape).sign().to(p)
            away[name] = torch.nextafter(p, side * torch.inf)
        return State(away, self.momentum)

    def jittered(self, case: Case, draw: str) -> "State":
        """Every parameter changed a little, which rounds all that is computed from them afresh."""
        return State({k: case.jitter(p, 0, f"{draw} {k}") for k, p in self.parameters.items()}, self.momentum)

    def flat(self) -> Tensor:
        """All parameters in a row, float64."""
        return torch.cat([p.flatten().double() for p in self.parameters.values()])


class Task:
    """Clips, targets and where a case's trainings start. The targets are computed once, in float64, on the CPU."""

    def __init__(self, trial: Trial) -> None:
        self.trial, self.case = trial, trial.case
        leaves = trial.leaves(0)
        self._clip = leaves.pop("clip")
        self.start = State(leaves, {k: torch.zeros_like(v) for k, v in leaves.items()})
        self._hidden: Tensor | None = None
        self._target = torch.arange(self.case["B"]) * QUARTERS // self.case["B"]
        if self.case.subject == "encoder":
            self._hidden = encoder.mask(self.case)
            self._target = self._features(self._clip.cpu().double()).float()
        self._target = self._target.to(trial.device)

    def _features(self, clip: Tensor) -> Tensor:
        """What another random encoder makes of whole clips, of those tokens that are not hidden: (B, K, V, C)."""
        model = modules.on_meta(encoder.build, self.trial.reference.call, self.case)
        with torch.no_grad():
            layers = modules.call(model, modules.parameters(model, self.case, 1), lambda m, x: m(x).clip, clip)
        hidden = torch.zeros(layers.shape[1:3], dtype=torch.bool) if self._hidden is None else self._hidden
        return torch.stack([layers[:, b, ~hidden[b]] for b in range(len(clip))])

    def losses(self, model: nn.Module, step: int, blur: int | None = None) -> Tensor:
        """The loss of every clip of a step's batch, in at least float32; autocast, if the case has it, is for the model.

        `blur` draws which values of the clips are one rounding, of the case's dtype, larger and which are smaller.
        """
        count = self.case["B"]
        rows = [(step + first) % count for first in range(0, count, BATCHES)]
        clip = self._clip[rows].to(next(model.parameters()).dtype)
        if blur is not None:
            sides = self.case.normal(blur, f"blur of {step}", *clip.shape).sign().to(clip)
            clip = clip * (1 + sides * torch.finfo(self.case.torch_dtype).eps / 2)
        hidden = None if self._hidden is None else self._hidden[rows].to(clip.device)
        with modules.precision(self.case, {"clip": clip}):
            found = model(clip) if self.case.subject == "videomamba" else model(clip, hidden).clip.transpose(0, 1)
        found, target = found.to(accumulation_dtype(found.dtype)), self._target[rows]
        if self.case.subject == "videomamba":
            return F.cross_entropy(found, target, reduction="none")
        return (2 - 2 * F.cosine_similarity(found, target.to(found.dtype), dim=-1)).flatten(1).mean(1)


class Learner:
    """A module as users train it: its own parameters, changed in place by PyTorch's optimiser."""

    def __init__(self, task: Task, call: Callable[..., Any], exact: bool = False, blur: int | None = None) -> None:
        built = task.trial.subject.build(call, task.case).train()
        self.blur = blur
        self.task, self.model = task, built.to(task.trial.device, torch.float64 if exact else torch.float32)
        self._named = dict(self.model.named_parameters())
        self._optimiser = torch.optim.SGD(self._named.values(), lr=RATE[task.case.subject], momentum=MOMENTUM)

    def load(self, state: State) -> None:
        """Go on from there: parameters in place, as a checkpoint is loaded."""
        with torch.no_grad():
            for name, p in self._named.items():
                p.copy_(state.parameters[name])
                self._optimiser.state[p]["momentum_buffer"] = state.momentum[name].to(p, copy=True)

    def state(self) -> State:
        """A copy of where it is."""
        buffers = {k: self._optimiser.state[p]["momentum_buffer"] for k, p in self._named.items()}
        return State(*({k: v.detach().clone() for k, v in part.items()} for part in (self._named, buffers)))

    def gradients(self, step: int) -> tuple[Tensor, dict[str, Tensor | None]]:
        """The losses of a step's batch, and the gradient of their mean for every parameter."""
        self._optimiser.zero_grad()
        losses = self.task.losses(self.model, step, self.blur)
        losses.mean().backward()
        return losses.detach(), {k: p.grad for k, p in self._named.items()}

    def update(self) -> None:
        """The optimiser's step."""
        self._optimiser.step()

    def run(self, start: State, steps: int) -> Iterator[tuple[float, State]]:
        """Train freely: before each step the mean loss of its batch and the state; at last those after the last step."""
        self.load(start)
        for step in range(steps + 1):
            losses, _ = self.gradients(step)
            yield float(losses.mean()), self.state()
            self.update()
